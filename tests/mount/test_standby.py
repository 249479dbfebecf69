"""Commands that a standby's child is: nothing of them differs, and nobody is worse off for one."""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lazyfs.standby import wire
from tests.faults import FaultServer, stall
from tests.images import zstd_chunked
from tests.mount.mounting import (
    Done,
    Mount,
    Mounts,
    command,
    descriptors,
    is_alive,
    run,
    wait_until,
)
from tests.mount.published import MIB, checkpoint_files, publish, write_layout

FILES = checkpoint_files(2 * MIB)
DATA = FILES["checkpoint/pages-1.img"]


class Standby:
    """One in a run directory of its own, for commands with its `environment`."""

    def __init__(self, home: Path, environment: Mapping[str, str] = os.environ) -> None:
        self.home = home
        self.environment = {
            **environment,
            "LAZYFS_RUN_DIR": str(home / "run"),
            "LAZYFS_STANDBY": "must",
        }
        self.path = home / "run" / wire.SOCKET_NAME
        self.start()

    def start(self, **more: Any) -> None:
        with (self.home / "standby.log").open("a") as log:
            self.process = subprocess.Popen(
                command("standby", "-v"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
                cwd=self.home,
                start_new_session=True,
                **more,
            )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        with self.process:
            return self.process.wait(20)

    @property
    def log(self) -> str:
        return (self.home / "standby.log").read_text()

    def lazyfs(self, *arguments: str | Path, before: Sequence[str] = (), **more: Any) -> Done:
        words = [*before, *command(*arguments)]
        environment = {**self.environment, **more.pop("env", {})}
        return run(words, env=environment, **more)

    @contextmanager
    def begun(self, *arguments: str | Path, **more: Any) -> Iterator["subprocess.Popen[str]"]:
        process = subprocess.Popen(
            command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            **more,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()
            wait_until(lambda: not self.deputies(), "what has been begun has ended")

    def deputies(self) -> list[int]:
        """Its children that are commands; none if it has been killed."""
        try:
            text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return []
        return [pid for pid in map(int, text.split()) if is_alive(pid)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standby]:
    standby = Standby(tmp_path_factory.mktemp("standby"))
    yield standby
    wait_until(lambda: not standby.deputies(), "all commands have ended")
    assert standby.stop() == 0
    assert not standby.path.exists()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Standby]:
    """For tests that harm it."""
    standby = Standby(tmp_path)
    yield standby
    if standby.process.poll() is None:
        standby.process.send_signal(signal.SIGCONT)
        standby.stop()


@pytest.fixture
def local(tmp_path: Path) -> str:
    return write_layout(tmp_path / "layout", zstd_chunked(FILES))


@pytest.fixture
def may_go_on() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def stalling(server: FaultServer, may_go_on: threading.Event) -> str:
    """An image whose layer's bytes do not come before they may."""
    reference = publish(server, zstd_chunked(FILES))
    server.always("/blobs/", stall(until=may_go_on))
    return reference


# -- the same ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["mount", "--help"],
        ["mount", "--nope"],
        ["mount", "REF"],
        ["mount", "REF", "/nowhere/at/all"],
        ["-v", "ls", "-l", "REF"],
        ["ls", "oci:/nowhere"],
        ["ls", "REF", "nothing"],
        ["cat", "REF", "spec.dump"],
        ["inspect", "--json", "REF"],
        ["restore", "REF", "--criu", "/nowhere/criu"],
        ["status", "/nowhere"],
        ["umount", "/"],
    ],
    ids=" ".join,
)
def test_it_prints_and_exits_as_without(
    shared: Standby, local: str, tmp_path: Path, words: list[str]
) -> None:
    words = [local if word == "REF" else word for word in words]
    caches = {"LAZYFS_CACHE_DIR": str(tmp_path / "cache")}
    without = shared.lazyfs(*words, env={**caches, "LAZYFS_STANDBY": "off"})
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    with_it = shared.lazyfs(*words, env=caches)
    assert with_it == without


@pytest.mark.parametrize("encoding", ["ascii:strict", "latin-1", "utf-8"])
def test_what_is_printed_is_encoded_as_without(shared: Standby, encoding: str) -> None:
    """PYTHONIOENCODING makes it another Python than the standby's; the locale does not."""
    locales = {"LC_ALL": "C" if encoding == "ascii:strict" else "C.UTF-8"}
    without = shared.lazyfs("ls", "oci:/ä", env={**locales, "LAZYFS_STANDBY": "off"})
    assert shared.lazyfs("ls", "oci:/ä", env=locales) == without
    refused = shared.lazyfs("ls", "oci:/ä", env={"PYTHONIOENCODING": encoding})
    assert "other settings of Python" in refused.err


def test_a_pipe_that_nobody_reads_ends_it_as_without(shared: Standby, local: str) -> None:
    words = command("cat", local, "checkpoint/pages-1.img", f"--cache-dir={shared.home}/cache")
    script = '"$@" | head -c 1 > /dev/null; echo ${PIPESTATUS[0]}'
    done = run(["bash", "-c", script, "bash", *words], env=shared.environment)
    assert (done.out, done.err) == ("141\n", "")


def test_a_mount_outlives_its_command_and_holds_nothing_of_it(
    shared: Standby, mounts: Mounts, local: str
) -> None:
    """Nor of the standby: it is where, and limited as, its command was."""
    here = mounts.home / "here"
    here.mkdir()
    (mounts.home / "mnt").mkdir()
    with open(mounts.home / "lock", "w") as lock:
        layout = os.path.relpath(mounts.home / "layout", here)
        done = shared.lazyfs(
            *("mount", *mounts.options(), f"oci:{layout}", "../mnt"),
            cwd=here,
            pass_fds=[lock.fileno()],
            env={"SOME": "thing"},
            before=["prlimit", "--nofile=777:888", "nice", "-n", "3"],
            umask=0o77,
        )
    assert (done.code, done.err) == (0, "")
    mount = Mount(mounts.home / "mnt", done)
    home = Path(f"/proc/{mount.pid}")
    kept = descriptors(mount.pid)
    assert not [each for each in kept.values() if "/lock" in each or "standby." in each]
    assert os.getsid(mount.pid) == mount.pid
    assert os.readlink(home / "cwd") == "/"
    assert resource.prlimit(mount.pid, resource.RLIMIT_NOFILE) == (777, 888)
    assert os.getpriority(os.PRIO_PROCESS, mount.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 3
    status = (home / "status").read_text()
    assert "Umask:\t0077" in status
    assert (home / "comm").read_text() == Path("/proc/self/comm").read_text()
    words = (home / "cmdline").read_bytes().split(b"\0")
    assert words[1:4] == [b"-m", b"lazyfs", b"mount"]
    assert words[-2:] == [b"../mnt", b""]
    assert b"SOME=thing" in (home / "environ").read_bytes().split(b"\0")
    assert not shared.deputies()
    assert (mount / "pages-1.img").read_bytes() == DATA
    assert shared.lazyfs("umount", mount.directory).code == 0
    mount.wait_end()


def test_descriptors_have_their_numbers(shared: Standby, local: str, tmp_path: Path) -> None:
    """An --authfile of a shell's <(…) is /dev/fd/63."""
    script = 'exec 7<&0; "$@" --authfile /dev/fd/63 63< "$AUTH"'
    (tmp_path / "auth").write_text("{}")
    words = command("ls", local, f"--cache-dir={tmp_path}/cache")
    environment = {**shared.environment, "AUTH": str(tmp_path / "auth")}
    done = run(["bash", "-c", script, "bash", *words], env=environment)
    assert (done.code, done.err) == (0, "")
    assert "config.dump" in done.out


def test_a_closed_standard_output_is_one(shared: Standby, local: str, tmp_path: Path) -> None:
    words = command("ls", local, f"--cache-dir={tmp_path}/cache")
    for closed in ("<&-", ">&-", "2>&-"):
        done = run(["sh", "-c", f'"$@" {closed}', "sh", *words], env=shared.environment)
        assert (done.code, done.err) == (0, ""), closed


def test_the_helper_of_mount_8(shared: Standby, mounts: Mounts, local: str) -> None:
    (mounts.home / "mnt").mkdir()
    program = "from lazyfs.__main__ import mount_helper; mount_helper()"
    words = [sys.executable, "-c", program, local, str(mounts.home / "mnt")]
    options = f"ro,cache-dir={mounts.cache_dir}"
    done = run([*words, "-o", options], env=shared.environment)
    assert (done.code, done.err) == (0, "")
    assert Mount(mounts.home / "mnt", done).umount().code == 0
    done = run([*words, "-o", "nope"], env=shared.environment)
    assert done.code == 1


# -- signals and ends --------------------------------------------------------------------------


def ended_by(number: signal.Signals) -> int:
    return 130 if number == signal.SIGINT else -number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("words", ["mount", "warm"])
def test_a_signal_ends_it_as_without(
    shared: Standby,
    server: FaultServer,
    mounts: Mounts,
    stalling: str,
    may_go_on: threading.Event,
    number: signal.Signals,
    words: str,
) -> None:
    """SIGKILL too, which nobody hands on."""
    (mounts.home / "mnt").mkdir()
    more = [mounts.home / "mnt"] if words == "mount" else []
    with shared.begun(words, *mounts.options(), stalling, *more) as process:
        wait_until(lambda: bool(shared.deputies()), "it is under way")
        (deputy,) = shared.deputies()
        server.wait_count("/blobs/", 1, timeout_s=30)
        process.send_signal(number)
        process.wait(20)
        may_go_on.set()  # a mount's daemon looks for who has asked for it when it is ready
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (ended_by(number), "")
    assert err.strip() in ("", "lazyfs: whoever asked for the mount is gone; unmounting")
    wait_until(lambda: not mounts.processes(), "nothing is left of it")
    wait_until(lambda: not is_alive(deputy), "its child has ended")


def test_a_signal_that_is_ignored_is(
    shared: Standby, server: FaultServer, mounts: Mounts, stalling: str
) -> None:
    with shared.begun("warm", *mounts.options(), stalling, preexec_fn=_ignore_hangups) as process:
        wait_until(lambda: bool(shared.deputies()), "it is under way")
        (deputy,) = shared.deputies()
        server.wait_count("/blobs/", 1, timeout_s=30)
        for pid in (process.pid, deputy):
            os.kill(pid, signal.SIGHUP)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM


def _ignore_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_it_stops_and_goes_on_with_its_terminal(
    shared: Standby, server: FaultServer, mounts: Mounts, stalling: str
) -> None:
    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    with shared.begun("warm", *mounts.options(), stalling) as process:
        wait_until(lambda: bool(shared.deputies()), "it is under way")
        (deputy,) = shared.deputies()
        server.wait_count("/blobs/", 1, timeout_s=30)
        process.send_signal(signal.SIGTSTP)
        wait_until(lambda: state(process.pid) == state(deputy) == "T", "both are stopped")
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: "T" not in (state(process.pid), state(deputy)), "both go on")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_that_is_killed_is_told_as_that(
    shared: Standby, server: FaultServer, mounts: Mounts, stalling: str, number: signal.Signals
) -> None:
    with shared.begun("warm", *mounts.options(), stalling) as process:
        wait_until(lambda: bool(shared.deputies()), "it is under way")
        (deputy,) = shared.deputies()
        server.wait_count("/blobs/", 1, timeout_s=30)
        os.kill(deputy, number)
        assert process.wait(20) == -number


def test_commands_go_on_without_the_standby_that_they_came_from(
    own: Standby,
    server: FaultServer,
    mounts: Mounts,
    stalling: str,
    may_go_on: threading.Event,
) -> None:
    (mounts.home / "mnt").mkdir()
    with own.begun("mount", *mounts.options(), stalling, mounts.home / "mnt") as process:
        server.wait_count("/blobs/", 1, timeout_s=30)
        (deputy,) = own.deputies()
        own.stop(signal.SIGKILL)
        may_go_on.set()
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
    wait_until(lambda: not is_alive(deputy), "it has ended")
    mount = Mount(mounts.home / "mnt", Done(0, out, err))
    assert (mount / "pages-1.img").read_bytes() == DATA
    assert mount.umount().code == 0


def test_who_loses_both_is_told(
    own: Standby, server: FaultServer, mounts: Mounts, stalling: str
) -> None:
    with own.begun("warm", *mounts.options(), stalling) as process:
        wait_until(lambda: bool(own.deputies()), "it is under way")
        (deputy,) = own.deputies()
        server.wait_count("/blobs/", 1, timeout_s=30)
        own.stop(signal.SIGKILL)
        os.kill(deputy, signal.SIGKILL)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (1, "lazyfs: the standby and its command were killed\n")


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.02, 0.05])
def test_a_signal_at_any_moment_ends_it(shared: Standby, tmp_path: Path, after_s: float) -> None:
    """While the child becomes it, and later: another moment each time."""
    words = ["ls", "127.0.0.1:1/team/checkpoint:1", f"--cache-dir={tmp_path}/cache"]
    with shared.begun(*words) as process:
        wait_until(lambda: bool(shared.deputies()), "it has asked")
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert process.returncode == 130
    wait_until(lambda: not shared.deputies(), "its child has ended")


# -- without -----------------------------------------------------------------------------------


def test_a_standby_that_is_gone_is_done_without(own: Standby, tmp_path: Path) -> None:
    """Its socket may be left; the next one clears it away. One at a time."""
    second = own.lazyfs("standby")
    assert (second.code, second.out) == (2, "")
    assert f"there is a standby already, at {tmp_path}/run" in second.err
    own.stop(signal.SIGKILL)
    assert own.path.exists()
    assert own.lazyfs("mount", "--help", env={"LAZYFS_STANDBY": ""}).code == 0
    told = own.lazyfs("mount", "--help")
    assert (told.code, told.out) == (1, "")
    assert told.err == (
        "lazyfs: no standby runs this: there is none; `lazyfs standby &` starts one\n"
    )
    own.start()
    assert own.said == f"standing by at {own.path}\n"
    assert own.lazyfs("mount", "--help").code == 0


def test_a_standby_that_is_stopped_is_not_waited_for_and_does_nothing_later(
    own: Standby, local: str, tmp_path: Path
) -> None:
    own.process.send_signal(signal.SIGSTOP)
    words = ("warm", local, f"--cache-dir={tmp_path}/cache")
    assert own.lazyfs(*words, env={"LAZYFS_STANDBY": ""}).code == 0
    assert "timed out" in own.lazyfs(*words).err
    own.process.send_signal(signal.SIGCONT)
    assert own.lazyfs("mount", "--help").code == 0
    wait_until(lambda: not own.deputies(), "what nobody waits for has ended")


def test_a_standby_ends_when_lazyfs_changes(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    source = Path(wire.__file__).parent.parent
    shutil.copytree(source, library / "lazyfs", ignore=shutil.ignore_patterns("__pycache__"))
    standby = Standby(tmp_path, {**os.environ, "PYTHONPATH": str(library)})
    other = standby.lazyfs("mount", "--help", cwd=tmp_path, env={"PYTHONPATH": str(source.parent)})
    assert "another lazyfs" in other.err
    assert standby.lazyfs("mount", "--help", cwd=tmp_path).code == 0
    os.utime(library / "lazyfs" / "mount.py", (1, 1))
    assert "lazyfs has changed" in standby.lazyfs("mount", "--help", cwd=tmp_path).err
    with standby.process:
        assert standby.process.wait(20) == 0
    assert not standby.path.exists()


def test_a_standby_that_is_to_ignore_a_signal_does(own: Standby) -> None:
    """As `nohup lazyfs standby &` asks for."""
    own.stop()
    own.start(preexec_fn=_ignore_hangups)
    own.process.send_signal(signal.SIGHUP)
    assert own.lazyfs("mount", "--help").code == 0
    assert own.process.poll() is None


def test_children_that_nobody_is_told_of_are_no_hindrance(own: Standby, local: str) -> None:
    """Some supervisors ignore SIGCHLD, and whatever they start does then."""
    own.stop()
    own.start(preexec_fn=_ignore_children)
    assert own.said.startswith("standing by")
    for _ in range(2):
        done = own.lazyfs("restore", local, "--criu", "/nowhere/criu", preexec_fn=_ignore_children)
        assert (done.code, done.err.splitlines()) == (2, [done.err.strip()])
        assert "there is no program /nowhere/criu" in done.err
    wait_until(lambda: not own.deputies(), "they have ended")


def _ignore_children() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


@pytest.mark.parametrize(
    "words", [["--shell-job"], ["-j"], ["-vj"], ["-v", "4", "-Rj"]], ids=" ".join
)
def test_what_wants_the_session_of_its_caller_is_not_asked_for(
    shared: Standby, local: str, words: list[str]
) -> None:
    served = shared.log.count("is the command of")
    done = shared.lazyfs("restore", local, "--criu", "/nowhere/criu", "--", *words)
    assert (done.code, done.out) == (2, "")
    assert "there is no program /nowhere/criu" in done.err
    assert shared.log.count("is the command of") == served


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (["unshare", "--mount"], "mnt namespace"),
        (["unshare", "--net"], "net namespace"),
        (["unshare", "--pid", "--fork"], "pid namespace"),
        (["setpriv", "--no-new-privs"], "no_new_privs"),
        (["setpriv", "--bounding-set=-sys_admin"], "capabilities"),
        (["setpriv", "--groups=12"], "supplementary groups"),
        (["setarch", "-R"], "personality"),
        (["chroot", "/proc/self/root/.//"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_whoever_has_other_rights_is_declined(
    shared: Standby, before: list[str], why: str | None
) -> None:
    if shutil.which(before[0]) is None:
        pytest.skip(f"there is no {before[0]}")
    told = shared.lazyfs("mount", "--help", before=before, cwd="/")
    if why is None:
        assert told.code == 0
    else:
        assert (told.code, told.out) == (1, "")
        assert why in told.err
    alone = shared.lazyfs("mount", "--help", before=before, env={"LAZYFS_STANDBY": ""}, cwd="/")
    assert (alone.code, alone.err) == (0, "")


@pytest.mark.parametrize("groups", ["--clear-groups", f"--groups={os.getegid()}"])
def test_whoever_has_his_own_group_twice_has_no_other_rights(shared: Standby, groups: str) -> None:
    """A login gives it to root's shells, systemd none to its services."""
    if shutil.which("setpriv") is None or os.geteuid() != 0:
        pytest.skip("no groups can be set")
    told = shared.lazyfs("mount", "--help", before=["setpriv", groups])
    assert (told.code, told.err) == (0, "")


def test_another_user_is_declined_by_either_side(own: Standby, tmp_path: Path) -> None:
    """Though a directory be open to all, which it never is."""
    for path in (own.path.parent, *list(own.path.parents)[1:-2]):
        path.chmod(0o755)
    own.path.chmod(0o666)
    told = own.lazyfs("mount", "--help")
    assert f"others may get at {own.path.parent}" in told.err
    program = """
import socket, sys
link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
link.connect(sys.argv[1])
print(link.recv(999).decode())
"""
    words = [sys.executable, "-c", program, str(own.path)]
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv")
    assert run([*nobody, *words]).out == "nit is for another user or group\n"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_it_is_in_the_control_group_of_its_command(
    shared: Standby, mounts: Mounts, local: str, version: str
) -> None:
    where = Path("/sys/fs/cgroup/pids" if version == "v1" else "/sys/fs/cgroup/unified")
    if version == "v2" and not where.exists():
        where = Path("/sys/fs/cgroup")
    group = where / f"lazyfs-standby-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cgroup.procs").read_text()
    except OSError as problem:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group of {version} can be made: {problem}")
    (mounts.home / "mnt").mkdir()
    try:
        enter = ["sh", "-c", f'echo 0 > {group}/cgroup.procs; exec "$@"', "sh"]
        words = ("mount", *mounts.options(), local, mounts.home / "mnt")
        done = shared.lazyfs(*words, before=enter)
        assert (done.code, done.err) == (0, "")
        mount = Mount(mounts.home / "mnt", done)
        assert (group / "cgroup.procs").read_text().split() == [str(mount.pid)]
        assert mount.umount().code == 0
        mount.wait_end()
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "nobody is in the group")
        group.rmdir()


# -- who else connects -------------------------------------------------------------------------


def test_whatever_is_sent_it_serves_the_next(shared: Standby) -> None:
    for message in (b"", b"x", b"0\0" * 9, b"9" * 5000, b"1\0" * 100_000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
            link.settimeout(20)
            link.connect(str(shared.path))
            assert link.recv(999) == wire.WELCOME
            if message:
                link.send(message)
                assert link.recv(999).startswith(wire.NO)
    assert shared.lazyfs("mount", "--help").code == 0


def test_who_does_not_say_go_gets_nothing_done(shared: Standby, local: str, tmp_path: Path) -> None:
    """A client that is killed in between has asked for nothing."""
    program = """
import sys
from lazyfs.standby import client
link = client._connect()
deputy = client._ask(link, "lazyfs", set())
print("asked", flush=True)
"""
    words = [sys.executable, "-c", program, "warm", local, f"--cache-dir={tmp_path}/cache"]
    assert run(words, env=shared.environment).out == "asked\n"
    wait_until(lambda: not shared.deputies(), "its child has ended")
    assert not (tmp_path / "cache").exists()


def test_who_carries_on_by_himself_is_ended_by_a_signal(
    server: FaultServer, mounts: Mounts, stalling: str
) -> None:
    """Also where the standby is lost when all but GO has been said."""
    directory = mounts.home / "run"
    directory.mkdir(mode=0o700)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        subprocess.Popen(["sleep", "60"]) as deputy,
    ):
        listener.bind(str(directory / wire.SOCKET_NAME))
        listener.listen()
        pidfd = os.pidfd_open(deputy.pid)
        environment = {**os.environ, "LAZYFS_RUN_DIR": str(directory), "LAZYFS_STANDBY": ""}
        words = command("warm", *mounts.options(), stalling)
        with subprocess.Popen(words, env=environment) as process:
            link, _ = listener.accept()
            with link:
                link.send(wire.WELCOME)
                assert link.recv(wire.REQUEST_MOST_BYTES)
                link.shutdown(socket.SHUT_RD)
                socket.send_fds(link, [wire.READY], [pidfd])
                server.wait_count("/blobs/", 1, timeout_s=30)
                process.terminate()
                assert process.wait(20) == -signal.SIGTERM
        os.close(pidfd)
        assert deputy.poll() is None
        deputy.kill()


def test_systemd_may_hold_the_socket(tmp_path: Path) -> None:
    """It keeps who connects until a standby is there, and clears up after it."""
    (tmp_path / "run").mkdir(mode=0o700)
    path = tmp_path / "run" / wire.SOCKET_NAME
    program = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "lazyfs", "standby"])
"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        environment = {**os.environ, "LAZYFS_RUN_DIR": str(path.parent), "LISTEN_FDS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"standing by at {path}\n"
            environment = {**environment, "LAZYFS_STANDBY": "must"}
            del environment["LISTEN_FDS"]
            assert run(command("mount", "--help"), env=environment).code == 0
            process.terminate()
            assert process.wait(20) == 0
    assert path.exists()
