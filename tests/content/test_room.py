"""Room: what may be written to a cache, what goes to make room, and that it is soon forgiven."""

import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from lazyfs.content import shelf
from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import open_cache_file
from lazyfs.content.room import DiskBounds, MemoryBounds, Room, level_of
from lazyfs.ground.digest import Digest
from lazyfs.ground.settings import CACHE_LIMIT, GIB, KIB, MIB, Limit
from tests.shelves import layers_in, put_layer, using


class Tank:
    """Bounds that count what they were asked, over so many bytes."""

    credit_bytes = 100

    def __init__(self, whole_bytes: int) -> None:
        self.left_bytes = whole_bytes
        self.looks = 0
        self.changed = False
        self.gate: threading.Event | None = None

    def have(self, wanted_bytes: int) -> int:
        self.looks += 1
        if self.gate is not None:
            self.gate.wait(10)
        if self.left_bytes < wanted_bytes:
            raise OSError(errno.EDQUOT, "the tank is empty")
        return self.left_bytes

    def has_changed(self) -> bool:
        return self.changed


def test_without_bounds_there_is_always_room() -> None:
    Room().take(1 << 60)


def test_asking_costs_nothing_until_the_credit_is_used_up() -> None:
    tank = Tank(10_000)
    room = Room(tank)
    for _ in range(11):
        room.take(10)
    assert tank.looks == 1, "the first looks, and leaves a credit for ten more"
    room.take(10)
    assert tank.looks == 2


def test_more_than_a_credit_is_taken_at_once() -> None:
    tank = Tank(10_000)
    Room(tank).take(9_999)
    with pytest.raises(OSError, match="the tank is empty"):
        Room(tank).take(10_001)


def test_more_than_a_credit_that_is_not_written_yet_is_not_granted_twice() -> None:
    tank = Tank(1_500)
    room = Room(tank)
    room.take(1_000)  # and whoever looks next finds nothing of it on the disk
    with pytest.raises(OSError, match="the tank is empty"):
        room.take(1_000)
    assert tank.looks == 2


def test_what_is_refused_is_refused_for_a_while_without_a_look() -> None:
    tank = Tank(5)
    room = Room(tank)
    for _ in range(20):
        with pytest.raises(OSError, match="the tank is empty") as caught:
            room.take(10)
        assert caught.value.errno == errno.EDQUOT
    assert tank.looks == 1
    tank.left_bytes = 1000
    tank.changed = True
    room.take(10)
    room.take(100)


def test_refusal_is_looked_at_again_by_itself() -> None:
    tank = Tank(5)
    room = Room(tank)
    with pytest.raises(OSError, match="empty"):
        room.take(10)
    tank.left_bytes = 1000
    deadline_s = time.monotonic() + 20
    while True:
        try:
            room.take(10)
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        else:
            return


def test_a_look_that_takes_long_holds_up_nobody_at_first() -> None:
    tank = Tank(10_000)
    room = Room(tank)
    tank.gate = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(room.take, 10)
        while not tank.looks:
            time.sleep(0.001)
        for _ in range(10):
            room.take(10)  # a credit may be overdrawn meanwhile
        late = pool.submit(room.take, 10)
        assert not first.done()
        tank.gate.set()
        first.result(10)
        late.result(10)
    assert tank.looks <= 3


def test_threads_overdraw_a_limit_by_two_credits_at_most() -> None:
    limit = 50_000
    taken = 0
    counting = threading.Lock()

    class Shrinking(Tank):
        def have(self, wanted_bytes: int) -> int:
            with counting:
                self.left_bytes = limit - taken
            return super().have(wanted_bytes)

    room = Room(Shrinking(limit))

    def write() -> None:
        nonlocal taken
        dice = random.Random(threading.get_ident())
        for _ in range(3000):
            count = dice.randrange(1, 60)
            try:
                room.take(count)
            except OSError:
                continue
            with counting:
                taken += count

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    unwritten = 8 * 60  # taken, and not counted when somebody looked
    assert limit - 100 <= taken <= limit + 2 * Tank.credit_bytes + unwritten


# -- on disk -------------------------------------------------------------------------------------


def test_a_share_has_a_least_and_a_number_is_a_number() -> None:
    assert CACHE_LIMIT.of(100 * GIB) == 50 * GIB
    assert CACHE_LIMIT.of(MIB) == GIB
    assert Limit(percent=20).of(1000) == 200
    assert Limit(17).of(1000) == 17


def test_the_least_recently_used_layers_make_room(tmp_path: Path) -> None:
    homes = [put_layer(tmp_path, os.urandom(MIB), used_at_s=1000 + at) for at in (2, 0, 1)]
    bounds = DiskBounds(tmp_path, Limit(4 * MIB))
    bounds.have(MIB // 2)
    assert len(layers_in(tmp_path)) == 3, "there is room for all"
    bounds.have(MIB + 100 * KIB)
    assert layers_in(tmp_path) == sorted([homes[0], homes[2]])
    assert not shelf.unfinished(tmp_path)
    bounds.have(3 * MIB)
    assert not layers_in(tmp_path)


def test_a_layer_without_a_note_of_its_use_is_as_old_as_its_content(tmp_path: Path) -> None:
    old, new = (put_layer(tmp_path, os.urandom(MIB)) for _ in range(2))
    os.utime(old / "content", (5, 5))
    DiskBounds(tmp_path, Limit(2 * MIB + 300 * KIB)).have(MIB)
    assert layers_in(tmp_path) == [new]


def test_a_limit_below_a_mebibyte_is_told_in_bytes(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="has reached its limit of 1000 bytes"):
        DiskBounds(tmp_path, Limit(1000)).have(KIB)


def test_what_is_in_use_stays_and_what_more_is_wanted_is_refused(tmp_path: Path) -> None:
    homes = [put_layer(tmp_path, os.urandom(MIB), used_at_s=at) for at in range(3)]
    bounds = DiskBounds(tmp_path, Limit(3 * MIB))
    with ExitStack() as stack:
        for home in homes[:2]:
            stack.enter_context(using(home))
        bounds.have(KIB)
        assert layers_in(tmp_path) == sorted(homes[:2])
        with pytest.raises(OSError, match="has reached its limit of 3 MiB") as caught:
            bounds.have(2 * MIB)
        assert caught.value.errno == errno.EDQUOT
        assert (homes[0] / "content").exists()
    bounds.have(2 * MIB)
    assert layers_in(tmp_path) in ([], [homes[1]])


def test_what_daemons_left_behind_goes_first(tmp_path: Path) -> None:
    home = put_layer(tmp_path, os.urandom(MIB))
    left = tmp_path / "incoming" / "abandoned"
    left.mkdir(parents=True)
    (left / "content").write_bytes(bytes(MIB))
    DiskBounds(tmp_path, Limit(3 * MIB)).have(MIB)
    assert not left.exists()
    assert layers_in(tmp_path) == [home]


def test_a_removed_layer_that_is_still_open_here_counts(tmp_path: Path) -> None:
    home = put_layer(tmp_path, os.urandom(MIB))
    with using(home):
        before = shelf.used_bytes(tmp_path)
        for name in ("content", "marks"):
            (home / name).unlink()
        assert shelf.used_bytes(tmp_path) >= MIB
    assert shelf.used_bytes(tmp_path) < before - MIB


def test_one_makes_room_at_a_time_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    """Another that holds the lock, and is stopped: no layer is removed, and what fits fits."""
    home = put_layer(tmp_path, os.urandom(MIB))
    script = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1], 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\nsys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        bounds = DiskBounds(tmp_path, Limit(2 * MIB))
        bounds.have(MIB - 100 * KIB)
        with pytest.raises(OSError, match="limit"):
            bounds.have(2 * MIB)
        assert layers_in(tmp_path) == [home]
    finally:
        holder.communicate()
    bounds.have(2 * MIB - 100 * KIB)
    assert not layers_in(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")


@pytest.mark.mount
@needs_root
def test_a_part_of_the_disk_stays_free(small_disk: Path) -> None:
    """And below a tenth of it, what is not in use makes room, whoever filled it."""
    cache = small_disk / "cache"
    homes = [put_layer(cache, os.urandom(MIB), used_at_s=at) for at in range(2)]
    bounds = DiskBounds(cache)
    (small_disk / "others").write_bytes(bytes(5 * MIB))
    with using(homes[0]), using(homes[1]), pytest.raises(OSError, match="No space left") as caught:
        bounds.have(MIB)
    assert caught.value.errno == errno.ENOSPC
    assert not bounds.has_changed()
    (small_disk / "others").unlink()
    room = Room(DiskBounds(cache, Limit(GIB)))
    room.take(4 * MIB)
    level = level_of(cache, CACHE_LIMIT)
    assert level.disk_bytes == 8 * MIB
    assert level.limit_bytes == GIB
    assert level.room_bytes <= level.free_bytes - MIB // 2


@pytest.mark.mount
@needs_root
def test_room_that_others_make_is_noticed_at_once(small_disk: Path) -> None:
    (small_disk / "others").write_bytes(bytes(7 * MIB))
    room = Room(DiskBounds(small_disk / "cache", Limit(6 * MIB)))
    with pytest.raises(OSError, match="No space left"):
        room.take(2 * MIB)
    (small_disk / "others").unlink()
    room.take(2 * MIB)


def test_a_cache_file_asks_before_it_writes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, Limit(MIB))
    file = open_cache_file(cache, Digest.of(b"x"), "tag", 4 * MIB, 4)
    file.write(0, [bytes(MIB // 2)])
    with pytest.raises(OSError, match="limit of 1 MiB"):
        file.write(MIB, [bytes(MIB)])
    file.close()


def test_scratch_and_copies_are_bounded_too(tmp_path: Path) -> None:
    cache = Cache(tmp_path, Limit(4 * MIB))
    with cache.scratch(3 * MIB) as kept:
        assert shelf.used_bytes(tmp_path) >= 3 * MIB
        assert len(kept) == 3 * MIB
        with pytest.raises(OSError, match="limit"):
            cache.keep(bytes(2 * MIB))
        with cache.scratch(2 * MIB) as other:  # in memory
            assert shelf.used_bytes(tmp_path) < 4 * MIB
            assert len(other) == 2 * MIB


# -- in memory -----------------------------------------------------------------------------------


def test_memory_is_bounded_and_touches_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = shelf.memory_bytes()
    cache = Cache.memory(Limit(before + 4 * MIB))
    assert cache.home(Digest.of(b"x"), "tag") is None
    file = open_cache_file(cache, Digest.of(b"x"), "tag", 64 * MIB, 64)
    assert not file.persistent
    file.write(0, [bytes(3 * MIB)])
    assert shelf.memory_bytes() == before + 3 * MIB, "holes take nothing"
    with pytest.raises(OSError, match="in memory has reached its limit of") as caught:
        file.write(10 * MIB, [bytes(3 * MIB)])
    assert caught.value.errno == errno.EDQUOT
    assert bytes(file.view[: 3 * MIB]) == bytes(3 * MIB)
    file.close()
    assert shelf.memory_bytes() == before
    with cache.scratch(2 * MIB) as scratch:
        scratch[:3] = b"abc"
    assert bytes(cache.keep(b"abc")) == b"abc"
    assert not list(tmp_path.iterdir())


def test_memory_that_is_not_there_is_not_taken() -> None:
    """A share is one of what is available; a number may be more than there is."""
    with pytest.raises(OSError, match="limit"):
        MemoryBounds().have(1 << 50)
    with pytest.raises(OSError, match="No space left in memory"):
        MemoryBounds(Limit(1 << 60)).have(1 << 50)
    assert MemoryBounds().have(1) > 1
