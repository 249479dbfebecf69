"""What CRIU was at while it restored, by its log. Sans-I/O.

A line of the log begins with the seconds since CRIU began, in parentheses. A phase begins with the
first line that is known to open it, and lasts until the next begins. Of several tasks the
first to get somewhere counts: they are restored side by side.

Sources: CRIU 4.1.1, `criu/log.c` (`print_ts`: from 100 s on there are five decimals), and where the
lines are printed: `criu/pstree.c` (`prepare_pstree`), `criu/cr-restore.c` (`fork_with_pid`,
`crtools_prepare_shared`, `create_children_and_session`, `restore_one_alive_task`,
`sigreturn_restore`), `criu/namespaces.c` (`prepare_namespace`), `criu/mount.c` (`prepare_mnt_ns`),
`criu/mem.c` (`prepare_mm_pid`), `criu/files.c` (`prepare_fds`), `criu/net.c` (`network_unlock`).
"""

import re

from lazyfs.checkpoint.trace import Phase

_MOST_CHARACTERS = 64 << 20
_LINE = re.compile(
    r"^\(([0-9]{1,7}\.[0-9]{1,6})\)[ \t]{1,8}(?:pie:[ \t]{1,8})?"
    r"(?:[0-9]{1,10}:[ \t]{1,8})?(.{0,80})",
    re.MULTILINE,
)
_BEGIN = "criu: look at the kernel"
_PHASES = (
    ("Reading image tree", "criu: read the images"),
    ("Forking task with ", "criu: fork"),
    ("Restoring namespaces ", "criu: namespaces"),
    ("Restoring mount namespace", "criu: mounts"),
    ("Preparing info about shared resources", "criu: what tasks share"),
    ("vma 0x", "criu: map memory"),
    ("nr_restored_pages: ", "criu: children"),
    ("Restoring resources", "criu: resources"),
    ("Opening fdinfo-s", "criu: files"),
    ("Restore via sigreturn", "criu: memory into its place"),
    ("net: Unlock network", "criu: resume"),
)
_END = "Restore finished successfully"


def phases_of(log_text: str, at_ms: float = 0.0) -> list[Phase]:
    """Return the phases of a restore, in their order; none of a text that is no such log.

    `at_ms`: when CRIU began. A log that ends early ends its last phase.
    """
    found: list[tuple[str, float]] = []
    position, latest_ms = 0, 0.0
    for match in _LINE.finditer(log_text[:_MOST_CHARACTERS]):
        latest_ms = max(latest_ms, float(match[1]) * 1000)
        if not found:
            found.append((_BEGIN, 0.0))
        if match[2].startswith(_END):
            break
        for number in range(position, len(_PHASES)):
            begin, name = _PHASES[number]
            if match[2].startswith(begin):
                position = number + 1
                found.append((name, latest_ms))
                break
    if not found:
        return []
    ends = [began_ms for _, began_ms in found[1:]] + [latest_ms]
    return [
        Phase(name, round(at_ms + began_ms, 3), round(at_ms + ended_ms, 3))
        for (name, began_ms), ended_ms in zip(found, ends, strict=True)
    ]


def length_ms(log_text: str) -> float:
    """Return the latest moment that a log tells of, since CRIU began."""
    times = (float(match[1]) * 1000 for match in _LINE.finditer(log_text[:_MOST_CHARACTERS]))
    return max(times, default=0.0)
