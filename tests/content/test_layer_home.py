"""A layer's directory: one for all who make it at once, and never half of one."""

import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from lazyfs.content.layer_home import LayerHome, discard, open_home

SIZES = 10_000, 80


def opened(path: Path) -> LayerHome:
    home = open_home(path, *SIZES)
    assert home is not None
    return home


def path_in(directory: Path) -> Path:
    return directory / "layers" / "sha256-1234.tag"


def inodes(home: LayerHome) -> tuple[int, int]:
    return os.fstat(home.content_fd).st_ino, os.fstat(home.marks_fd).st_ino


def test_it_is_made_whole_and_for_the_owner_only(tmp_path: Path) -> None:
    path = path_in(tmp_path)
    home = opened(path)
    assert sorted(each.name for each in path.iterdir()) == ["content", "marks", "used"]
    assert [(path / name).stat().st_size for name in ("content", "marks")] == list(SIZES)
    assert all(each.stat().st_mode & 0o077 == 0 for each in (path, *path.iterdir()))
    assert not list((tmp_path / "incoming").iterdir())
    home.close()


def test_all_who_make_it_at_once_have_the_same_files(tmp_path: Path) -> None:
    start = threading.Barrier(16)

    def make(_: int) -> LayerHome:
        start.wait()
        return opened(path_in(tmp_path))

    with ThreadPoolExecutor(16) as pool:
        homes = list(pool.map(make, range(16)))
    assert len({inodes(home) for home in homes}) == 1
    assert all(home.is_found for home in homes)
    assert not list((tmp_path / "incoming").iterdir())
    for home in homes:
        home.close()


def test_those_who_come_and_go_while_it_is_thrown_away_have_whole_ones(tmp_path: Path) -> None:
    over = threading.Event()

    def throw_away() -> None:
        while not over.is_set():
            with suppress(FileNotFoundError):
                discard(path_in(tmp_path), path_in(tmp_path).lstat())

    def come_and_go(_: int) -> None:
        for _ in range(50):
            home = opened(path_in(tmp_path))
            assert os.fstat(home.content_fd).st_size == SIZES[0]
            assert os.fstat(home.marks_fd).st_size == SIZES[1]
            home.close()

    with ThreadPoolExecutor(5) as pool:
        thrower = pool.submit(throw_away)
        for done in [pool.submit(come_and_go, number) for number in range(4)]:
            done.result()
        over.set()
        thrower.result()


def test_who_has_it_keeps_it_when_it_is_thrown_away(tmp_path: Path) -> None:
    path = path_in(tmp_path)
    one = opened(path)
    os.pwrite(one.content_fd, b"kept", 0)
    one.discard()
    assert not path.exists()
    assert not one.is_found
    two = opened(path)
    assert inodes(one) != inodes(two)
    assert os.pread(one.content_fd, 4, 0) == b"kept"
    assert os.pread(two.content_fd, 4, 0) == bytes(4)
    one.discard()
    assert two.is_found, "that is not the one's any more"
    one.prove("nobody will ever see it")
    assert two.proof() == ""
    one.close()
    two.close()


def test_who_makes_room_is_kept_from_it_while_it_is_used(tmp_path: Path) -> None:
    path = path_in(tmp_path)
    home = opened(path)
    with open(path / "content", "rb") as evictor:
        with pytest.raises(BlockingIOError):
            fcntl.flock(evictor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        home.close()
        fcntl.flock(evictor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert open_home(path, *SIZES) is None, "it is being removed, for longer than one waits"
        remover = threading.Timer(0.1, discard, (path, path.lstat()))
        remover.start()
        home = opened(path)
        remover.join()
        assert not os.path.sameopenfile(home.content_fd, evictor.fileno())
        home.close()


@pytest.mark.parametrize("name", ["content", "marks"])
@pytest.mark.parametrize("damage", ["missing", "cut", "grown", "a directory", "a link"])
def test_a_damaged_one_is_made_anew(tmp_path: Path, name: str, damage: str) -> None:
    path = path_in(tmp_path)
    opened(path).close()
    file = path / name
    if damage == "cut":
        os.truncate(file, 5)
    elif damage == "grown":
        os.truncate(file, 5_000_000)
    else:
        file.unlink()
        if damage == "a directory":
            file.mkdir()
        elif damage == "a link":
            file.symlink_to("/etc/passwd")
    home = opened(path)
    assert (path / name).stat().st_size in SIZES
    assert home.is_found
    home.close()


@pytest.mark.parametrize("what", ["file", "link", "dangling link"])
def test_what_is_no_directory_is_replaced(tmp_path: Path, what: str) -> None:
    path = path_in(tmp_path)
    path.parent.mkdir()
    if what == "file":
        path.write_bytes(b"?")
    else:
        path.symlink_to(tmp_path if what == "link" else tmp_path / "nothing")
    home = opened(path)
    assert path.is_dir()
    assert not path.is_symlink()
    home.close()


def test_what_is_noted_is_there_for_all_and_whole(tmp_path: Path) -> None:
    one, two = opened(path_in(tmp_path)), opened(path_in(tmp_path))
    assert (two.proof(), two.proof_stamp()) == ("", 0)
    one.prove("abc")
    assert two.proof() == "abc"
    assert two.proof_stamp() != 0
    names = sorted(each.name for each in path_in(tmp_path).iterdir())
    assert names == ["content", "marks", "proven", "used"]
    one.close()
    two.close()


def test_the_last_use_is_noted(tmp_path: Path) -> None:
    used = path_in(tmp_path) / "used"
    home = opened(path_in(tmp_path))
    os.utime(used, (1, 1))
    home.note_use()
    assert used.stat().st_mtime == 1, "it was a moment ago"
    home.close()
    assert used.stat().st_mtime > 1
