"""What CRIU's log says of a restore that failed, and what to do about it.

Sans-I/O. The log may hold names from the checkpoint: anybody's text, bounded here, made fit for a
terminal by who prints it.

The texts are CRIU's own, of 4.1.1 and 4.2: `criu/cr-restore.c`, `clone-noasan.c`, `files-reg.c`,
`mount.c`, `tty.c`, `image.c`, `lsm.c`, `apparmor.c`, `seccomp.c`, `cgroup.c`, `sk-unix.c`,
`sk-inet.c`, `net.c`, `uffd.c`, `pagemap.c`, `plugin.c`, `arch/x86/cpu.c`, `pie/restorer.c`.
"""

import re
from collections.abc import Iterator

import msgspec

_MOST_BYTES = 8 << 20
_LINES_MOST = 8
_LINE_MOST = 300
_ADVICE_MOST = 3
_ERROR = re.compile(r"^(?:\([0-9. ]{1,20}\)\s{1,8})?(?:\s{0,8}[0-9]{1,10}:\s{1,8})?Error \(")
_TRAILING = (
    "Restoring FAILED",
    "Killing processes because",
    "cgroupd: recv req",
    "Can't setup RLIMIT_NOFILE",
)


class Diagnosis(msgspec.Struct, frozen=True):
    """What went wrong, as far as the log tells."""

    lines: tuple[str, ...] = ()
    """The log's last telling lines, oldest first."""
    advice: tuple[str, ...] = ()
    """What helps, the likeliest first; empty if that is not known."""


_ADVICE = (
    (
        r"Can't fork for \d+: File exists|Pid \d+ do not match expected \d+",
        "a process here has a pid of the checkpoint's: wait until it has ended, or restore into a "
        "pid namespace of its own (unshare --pid --fork --mount-proc lazyfs restore …)",
    ),
    (
        r"can only be restored in a new pid namespace",
        "the checkpoint's first process is pid 1: it is a container's; restore it by its runtime "
        "(--runtime runc --bundle DIR --id ID)",
    ),
    (
        r"Can't open file .* on restore|Can't open file .*: No such file",
        "a file that the process had open is not here: put it where the log says, from the "
        "container's image and its changes (lazyfs mount --view=image shows those), or restore "
        "with --root DIR",
    ),
    (
        r"File .* has bad (size|mode|build-?ID)|Checksum mismatch|Build-?ID",
        "a file is another than at the dump: bring back the same version of it, or, if you know "
        "it does no harm, restore with --skip-file-rwx-check (mode) or --file-validation filesize",
    ),
    (
        r"No mapping for .* mountpoint|autodetected external mount|Can't restore ext mount",
        "a mount came from outside of the container: name what is to be there with "
        "--external mnt[KEY]:PATH, one for each",
    ),
    (
        r"--root option is required|A few mount points can't be mounted|No root for|"
        r"Can't bind-mount|Can't mount at|Unable to (bind-)?mount",
        "a mount cannot be made again: see that its source is here; for a container give the "
        "root directory (--root DIR), or restore it by its runtime (--runtime, --bundle)",
    ),
    (
        r"shell-job|Don't have tty to inherit|Found dangling tty|Can't open slave tty|self_stdin|"
        r"ctty inheritance|Can't set sid on terminal|Can't place stdin fd|tty: ",
        "the process had a terminal: restore with --shell-job (-j) from a terminal; for a terminal "
        "that somebody else holds, --inherit-fd fd[N]:tty[RDEV:DEV]",
    ),
    (
        r"tcp-established|Connected TCP socket in image",
        "it has open TCP connections: restore with --tcp-established where its addresses are "
        "here, or with --tcp-close to close them",
    ),
    (
        r"Need to set the --tcp-close|--tcp-close",
        "it was dumped with --tcp-close: restore with --tcp-close",
    ),
    (
        r"allow-uprobes",
        "it was dumped with --allow-uprobes: restore with --allow-uprobes",
    ),
    (
        r"inet: Can't bind|Can't bind inet socket|Cannot assign requested address|"
        r"Address already in use",
        "an address or port of the checkpoint's is taken or not here: free it, or restore into a "
        "network namespace that has it",
    ),
    (
        r"External socket found in image|Can't connect .* socket",
        "it was connected to a Unix socket of another process: restore with --ext-unix-sk, with "
        "that process listening",
    ),
    (
        r"seccomp",
        "the seccomp filters cannot be put back: the kernel lacks what they need, or whoever "
        "restores is confined itself (in a container: --security-opt seccomp=unconfined)",
    ),
    (
        r"[Aa]pp[Aa]rmor|AA (policy|namespace)|aa policy",
        "the AppArmor profile is not loaded here: load it (apparmor_parser -r), or restore with "
        "--lsm-profile apparmor:PROFILE",
    ),
    (
        r"[Ss][Ee][Ll]inux|lsm type|lsm profile|LSM",
        "the security module differs from where it was dumped: restore with "
        "--lsm-profile selinux:CONTEXT, or --lsm-mount-context CONTEXT for mounts",
    ),
    (
        r"[Cc]group|cg_yard|cgyard|cgroupd",
        "its cgroups cannot be made here: restore with --manage-cgroups=ignore, or name another "
        "place with --cgroup-root",
    ),
    (
        r"CPU (instruction )?capabilities do not match|CPU xsave|CPU Feature .* not supported|"
        r"[Cc]puinfo|cpu: .*not supported|fpu: ",
        "this CPU lacks what the process may use: restore on one like it, or, if you know that it "
        "uses none of it, with --cpu-cap=none",
    ),
    (
        r"Lazy pages are not available|userfaultfd|[Ii]ncompatible uffd|uffd.*[Pp]ermission",
        "userfaultfd is not to be had: be root, or sysctl vm.unprivileged_userfaultfd=1; or "
        "restore without --lazy-pages",
    ),
    (
        r"connect to lazy-pages.socket failed",
        "nobody serves the lazy pages: restore with lazyfs restore --lazy-pages, which starts "
        "that side by itself",
    ),
    (
        r"iptables-restore|ip6tables-restore|nft(ables)? .*failed|Can't restore netns|"
        r"Unable to find an external netns|netns: |RTNETLINK|ip .*restore",
        "the network namespace cannot be put back: see that ip, iptables-restore and nft are "
        "installed and their modules can be loaded; for one made elsewhere give "
        "--inherit-fd fd[N]:extRootNetNS, or restore with --empty-ns net",
    ),
    (
        r"Missing required plugin|Can't load plugin|Corrupted plugin|plugin path",
        "a CRIU plugin that took part in the dump is not here: install it, or say where it is "
        "with --libdir",
    ),
    (
        r"Can't open images|Couldn't open image dir|Can't open dir|Unable to open inventory|"
        r"inventory.*[Ee]mpty|"
        r"Can't open .*inventory",
        "the images directory cannot be opened: where restoring is confined (a container, another "
        "mount namespace), /proc must be that of lazyfs' pid namespace",
    ),
    (
        r"Img trimmed|Unexpected EOF|Image is truncated|[Mm]agic doesn't match|Bad magic",
        "an image is not what it should be: dump anew, or use the CRIU that made it "
        "(lazyfs inspect tells its version)",
    ),
    (
        r"pages-\d+\.img|[Cc]an't (open|read) .*pages|Can't read async pr bytes|"
        r"Can't read mapping page|Page (read|entry)|pagemap.*(short|missing)|"
        r"Missing .* in parent|No parent for snapshot",
        "pages are missing: if it is a stub (lazyfs inspect says so), restore it by lazyfs "
        "restore or lazyfs-runtime; of an incremental checkpoint the parents are needed too",
    ),
    (
        r"(dump|image)s? version|Unsupported .*img_version|Not supported images version|"
        r"unknown (field|entry) in image",
        "the images are of another version of CRIU: use the one that made them, or a newer one",
    ),
    (
        r"vdso|VDSO",
        "CRIU does not know this kernel's vdso: update CRIU",
    ),
)
_LESS_TELLING = (
    (
        r"Permission denied|Operation not permitted|needs? CAP_|CAP_CHECKPOINT_RESTORE",
        "something is not permitted: be root, or give criu CAP_CHECKPOINT_RESTORE and restore "
        "with --unprivileged what needs no more",
    ),
    (
        r"Cannot allocate memory|Out of memory|No space left on device",
        "there is no room: free memory (lazyfs inspect tells how much it needs), or raise the "
        "limit of the cgroup",
    ),
)
"""What other errors end with, too: for where nothing else is known."""
_TABLES = tuple(
    tuple((re.compile(pattern), advice) for pattern, advice in table)
    for table in (_ADVICE, _LESS_TELLING)
)


_BARE = (
    "it is a container's checkpoint, and its runtime gives CRIU what that does not know by itself "
    "(mounts, cgroups, namespaces): restore it with --runtime runc --bundle DIR --id ID, or by its "
    "engine, from a stub (lazyfs stub, docs/runtime.md)"
)


def diagnose(log: str, *, bare: bool = False) -> Diagnosis:
    """Return what a restore.log says last, and what helps; of any text, in linear time.

    `bare`: a container was to be restored by CRIU alone.
    """
    errors = list(_errors(log[-_MOST_BYTES:]))
    telling = [line for line in errors if not any(word in line for word in _TRAILING)]
    lines = telling or errors
    if not lines:
        lines = [line[:_LINE_MOST] for line in log[-_MOST_BYTES:].splitlines()[-3:] if line.strip()]
    advice = next((found for table in _TABLES if (found := _advice(telling, table))), ())
    return Diagnosis(_shortened(lines), (_BARE, *advice) if bare else advice)


def _advice(lines: list[str], table: tuple[tuple[re.Pattern[str], str], ...]) -> tuple[str, ...]:
    """Return what helps, in the order of the lines: the first error causes those that follow."""
    found = []
    for line in lines:
        found += [text for pattern, text in table if pattern.search(line)][:1]
    return tuple(dict.fromkeys(found))[:_ADVICE_MOST]


def _errors(log: str) -> Iterator[str]:
    for line in log.splitlines():
        shortened = line[:_LINE_MOST]
        if _ERROR.match(shortened):
            yield shortened


def _shortened(lines: list[str]) -> tuple[str, ...]:
    """The first few and the last few: those are the cause and what came of it."""
    if len(lines) <= _LINES_MOST:
        return tuple(lines)
    half = _LINES_MOST // 2
    return (*lines[:half], *lines[-half:])
