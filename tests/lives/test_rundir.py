"""Where control sockets are, and whom a daemon and a client believe."""

import os
import socket
from pathlib import Path

import pytest

from lazyfs import rundir
from lazyfs.rundir import Found, ListeningSocket
from lazyfs.transport.run_directory import run_directory


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / ("long-" * 30) / "run"


@pytest.fixture(autouse=True)
def deep(home: Path) -> None:
    home.parent.mkdir()


def connects(path: Path) -> bool:
    try:
        rundir.connect(Found(path, None, os.geteuid()), 5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_socket_is_closed_to_others(home: Path) -> None:
    """Also where the path is longer than a socket's may be."""
    listening = ListeningSocket(7, home)
    path = home / "mount-7.sock"
    assert path.lstat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    assert connects(path)
    listening.close()
    assert list(home.iterdir()) == []


def test_sockets_on_which_nobody_listens_are_cleared_away(home: Path) -> None:
    first, second = ListeningSocket(1, home), ListeningSocket(2, home)
    first.socket.close()  # as a daemon that is killed
    (home / "notes.txt").write_text("not ours")
    third = ListeningSocket(3, home)
    names = sorted(path.name for path in home.iterdir())
    assert names == ["mount-2.sock", "mount-3.sock", "notes.txt"]
    assert connects(home / "mount-2.sock")
    for each in (first, second, third):
        each.close()


def test_a_name_is_taken_over_with_its_device(home: Path) -> None:
    """A device number is free again when its mount is gone; the old daemon leaves ours alone."""
    old, new = ListeningSocket(5, home), ListeningSocket(5, home)
    old.close()
    assert connects(home / "mount-5.sock")
    new.close()


def test_a_directory_that_others_made_is_not_believed(home: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    home.symlink_to(mine)
    with pytest.raises(OSError, match=r"Not a directory|symbolic"):
        ListeningSocket(1, home)
    home.unlink()
    home.mkdir()
    home.chmod(0o755)
    with pytest.raises(PermissionError, match="others may get at it"):
        ListeningSocket(1, home)
    if os.geteuid() == 0:
        home.chmod(0o700)
        os.chown(home, 65534, 65534)
        with pytest.raises(PermissionError, match="others may get at it"):
            ListeningSocket(1, home)
    assert list(mine.iterdir()) == []


def test_what_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYFS_RUN_DIR", str(home))
    assert Path(run_directory()) == home
    assert not [each for each in rundir.find_sockets() if each.path.parent == home]
    listening = [ListeningSocket(41), ListeningSocket(None)]
    (home / "mount-x.sock").touch()
    found = {each.path.name: each for each in rundir.find_sockets() if each.path.parent == home}
    assert set(found) == {"mount-41.sock", f"pid-{os.getpid()}.sock"}
    assert (found["mount-41.sock"].device, found["mount-41.sock"].user_id) == (41, os.geteuid())
    home.chmod(0o755)
    assert not [each for each in rundir.find_sockets() if each.path.parent == home]
    for each in listening:
        each.close()


def test_who_is_at_the_other_end() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert rundir.peer_user(left) == os.geteuid()
