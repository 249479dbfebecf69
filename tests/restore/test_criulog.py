import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.restore.criulog import Diagnosis, diagnose

PREFIX = "(00.012345)    123: Error (criu/x.c:12): "


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("Can't fork for 24663: File exists", "a pid of the checkpoint's"),
        ("Pid 5 do not match expected 4", "a pid of the checkpoint's"),
        ("This process tree can only be restored in a new pid namespace.", "--runtime runc"),
        ("Can't open file var/log/x on restore: No such file or directory", "--root DIR"),
        ("File /usr/lib/libc.so.6 has bad size 5 (expect 6)", "same version"),
        ("mnt: No mapping for 725:/etc/hosts mountpoint", "--external mnt[KEY]:PATH"),
        ("mnt: Can't bind-mount at /tmp/cr/x: No such file or directory", "--root DIR"),
        ("tty: Don't have tty to inherit session from, aborting", "--shell-job"),
        ("tty: Found dangling tty with sid 5 pgid 5 (pts) on peer fd 0.", "--shell-job"),
        ("Missing required plugin: cuda_plugin", "--libdir"),
        ("inet: Connected TCP socket in image; Need --tcp-established", "--tcp-established"),
        ("Need to set the --tcp-close options.", "--tcp-close"),
        ("inet: Can't bind inet socket (id 3): Address already in use", "port"),
        ("sk unix: External socket found in image. Consider using the", "--ext-unix-sk"),
        ("seccomp: SECCOMP_SET_MODE_FILTER returned -1 on tid 7", "seccomp=unconfined"),
        ("apparmor LSM specified but apparmor not supported by kernel", "apparmor:PROFILE"),
        ("can't write lsm profile -22: selinux", "selinux:CONTEXT"),
        ("cg: Can't make cgroup dir x: Permission denied", "--manage-cgroups"),
        ("cpu: CPU capabilities do not match run time", "--cpu-cap=none"),
        ("uffd: Lazy pages are not available", "vm.unprivileged_userfaultfd"),
        ("uffd: connect to lazy-pages.socket failed: No such file", "lazyfs restore --lazy-pages"),
        ("net: Unable to find an external netns: extRootNetNS", "extRootNetNS"),
        ("Can't open images directory: Permission denied", "/proc"),
        ("Unexpected EOF on mm-5.img", "dump anew"),
        ("Can't open pages-1.img: No such file or directory", "stub"),
        ("Can't read async pr bytes (-1 / 4096 read, 0 off, 6 iovs)", "stub"),
        ("Can't set uid map: Operation not permitted", "be root"),
        ("Can't mmap 4096 bytes: Cannot allocate memory", "free memory"),
        ("vdso: Unexpected rt vDSO area bounds", "update CRIU"),
    ],
)
def test_what_crius_words_mean_for_who_restores(line: str, advice: str) -> None:
    end = "(00.1) Error (x.c:1): Restoring FAILED."
    found = diagnose(f"(00.000001) Version: 4.1.1\n{PREFIX}{line}\n{end}")
    assert found.lines == (PREFIX + line,)
    assert len(found.advice) == 1, found.advice
    assert advice in found.advice[0]


def test_the_cause_is_told_before_what_came_of_it() -> None:
    lines = [f"{PREFIX}Can't fork for 5: File exists", f"{PREFIX}cg: something of a cgroup"]
    assert "a pid of the checkpoint's" in diagnose("\n".join(lines)).advice[0]


def test_what_is_less_telling_is_said_only_where_nothing_else_is_known() -> None:
    lines = [f"{PREFIX}x: Operation not permitted", f"{PREFIX}Can't fork for 5: File exists"]
    assert len(diagnose("\n".join(lines)).advice) == 1
    assert "a pid of the checkpoint's" in diagnose("\n".join(lines)).advice[0]


def test_of_a_container_it_is_said_first_that_it_is_one() -> None:
    line = "(00.1) Error (criu/mount.c:3130): mnt: No mapping for 57:(null) mountpoint\n"
    alone = diagnose(line).advice
    first, *others = diagnose(line, bare=True).advice
    assert "--runtime runc" in first and "lazyfs stub" in first
    assert tuple(others) == alone


def test_an_unknown_error_is_shown_without_advice() -> None:
    found = diagnose(f"{PREFIX}the moon is down")
    assert found == Diagnosis((f"{PREFIX}the moon is down",), ())


def test_a_log_without_errors_shows_its_end() -> None:
    assert diagnose("(0.1) one\n(0.2) two\n").lines == ("(0.1) one", "(0.2) two")
    assert diagnose("") == Diagnosis()


def test_of_many_errors_the_first_and_the_last_are_shown() -> None:
    found = diagnose("\n".join(f"{PREFIX}{number}" for number in range(100)))
    numbers = [int(line.removeprefix(PREFIX)) for line in found.lines]
    assert numbers == [0, 1, 2, 3, 96, 97, 98, 99]


@given(st.text(st.characters(codec="utf-8"), max_size=2000), st.integers(0, 50))
def test_any_text_gives_a_short_diagnosis(text: str, times: int) -> None:
    for log in (text, (PREFIX + text + "\n") * times):
        found = diagnose(log)
        assert len(found.lines) <= 8
        assert len(found.advice) <= 3
        assert all(len(line) <= 300 and "\n" not in line for line in found.lines)
