"""What a service manager is told, and the unit that makes one listen."""

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import trio

from lazyfs.systemd import Notifier

UNIT = Path(__file__).parents[2] / "contrib/systemd/lazyfs@.service"
MOUNT = UNIT.parents[1] / "mount"
GENERATORS = [
    f"{prefix}/lib/systemd/system-generators/systemd-fstab-generator" for prefix in ("", "/usr")
]
NAMESPACES = set(
    re.findall(
        r"\w+",
        """
        ProtectSystem ProtectHome PrivateTmp PrivateDevices PrivateMounts ProtectKernelTunables
        ProtectKernelModules ProtectKernelLogs ProtectControlGroups ProtectProc ReadOnlyPaths
        ReadWritePaths InaccessiblePaths TemporaryFileSystem BindPaths RootDirectory MountFlags
        DynamicUser ProtectHostname
        """,
    )
)
"""Settings that give a service a mount namespace of its own: systemd.exec(5)."""


def listening(address: str | bytes) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    link.bind(address)
    link.settimeout(20)
    return link


def test_nobody_is_told_where_nobody_listens(tmp_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": "nowhere"}, {"NOTIFY_SOCKET": f"{tmp_path}/none"}):
        Notifier(dict(environment)).tell(READY="1")


def test_the_environment_is_left_to_nobody_else(tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": f"{tmp_path}/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}
    environment["HOME"] = "/"
    Notifier(environment)
    assert environment == {"HOME": "/"}


def test_a_value_is_one_line(tmp_path: Path) -> None:
    with listening(f"{tmp_path}/n") as link:
        Notifier({"NOTIFY_SOCKET": f"{tmp_path}/n"}).tell(READY="1", STATUS="two\nWATCHDOG=1")
        assert link.recv(4096) == b"READY=1\nSTATUS=two WATCHDOG=1"


@pytest.mark.parametrize(
    ("more", "watched"),
    [
        ({"WATCHDOG_USEC": "20000"}, True),
        ({"WATCHDOG_USEC": "20000", "WATCHDOG_PID": str(os.getpid())}, True),
        ({"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}, False),
        ({"WATCHDOG_USEC": "soon"}, False),
        ({}, False),
    ],
)
async def test_the_watchdog_is_told_if_it_is_ours(more: dict[str, str], watched: bool) -> None:
    name = f"lazyfs-test-{os.getpid()}"
    with listening(b"\0" + name.encode()) as link:
        notifier = Notifier({"NOTIFY_SOCKET": f"@{name}", **more})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(notifier.keep_telling, lambda: "fine")
            said = await trio.to_thread.run_sync(link.recv, 4096)
            assert (b"WATCHDOG=1" in said) == watched
            assert b"STATUS=fine" in said
            if watched:
                assert await trio.to_thread.run_sync(link.recv, 4096) == b"WATCHDOG=1"
            nursery.cancel_scope.cancel()


def test_the_unit_mounts_where_all_can_see_it() -> None:
    settings = re.findall(r"^(\w+)=", UNIT.read_text(), re.MULTILINE)
    assert not set(settings) & NAMESPACES
    assert "Type=notify\n" in UNIT.read_text()


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("there is no systemd-analyze")
    unit = tmp_path / "lazyfs@.service"
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/lazyfs", "/bin/true"))
    done = subprocess.run(
        [program, "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    ours = [line for line in done.stderr.splitlines() if "lazyfs" in line]
    assert (done.returncode, ours) == (0, []), done


def test_systemd_understands_the_mount_unit() -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("there is no systemd-analyze")
    words = [program, "verify", "--man=no", MOUNT / "mnt-web.mount"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "mnt-web" in line]
    assert (done.returncode, ours) == (0, []), done


def test_systemd_makes_of_the_fstab_line_what_the_mount_unit_says(tmp_path: Path) -> None:
    generator = next((path for path in map(Path, GENERATORS) if path.exists()), None)
    if generator is None:
        pytest.skip("there is no systemd-fstab-generator")
    environment = {**os.environ, "SYSTEMD_FSTAB": str(MOUNT / "fstab.example")}
    subprocess.run([generator, *[tmp_path] * 3], env=environment, check=True)
    made = (tmp_path / "mnt-web.mount").read_text()
    assert "\nBefore=remote-fs.target\n" in made
    wanted = (MOUNT / "mnt-web.mount").read_text()
    for key in ("What", "Where", "Type"):
        (line,) = re.findall(rf"^{key}=.*$", wanted, re.MULTILINE)
        assert line in made.splitlines()


async def test_a_bug_in_what_is_told_does_not_end_the_telling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def describe() -> str:
        raise KeyError("a bug")

    with listening(f"{tmp_path}/n") as link:
        notifier = Notifier({"NOTIFY_SOCKET": f"{tmp_path}/n", "WATCHDOG_USEC": "20000"})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(notifier.keep_telling, describe)
            for _ in range(3):
                said = await trio.to_thread.run_sync(link.recv, 4096)
                assert said.startswith(b"WATCHDOG=1")
            nursery.cancel_scope.cancel()
    assert [each.levelname for each in caplog.records] == ["ERROR"]
