"""Content that is decoded from its start: served as it comes, exactly, or not at all."""

import errno
import os
import random
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from lazyfs.content.lanes import Lane
from lazyfs.content.streamed import StreamReader
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import FetchError, IntegrityError, LazyfsError, MalformedError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB
from tests.blobs import Gate, MemoryBlob
from tests.streams import Identity, Zlib, growing_in, kept_in, stream_index, streamed

DATA = random.Random(1).randbytes(7 * MIB) + bytes(3 * MIB) + random.Random(2).randbytes(12345)
PACKED = zlib.compress(DATA, 1)
WHOLE = ByteRange(0, len(DATA))


class Stages:
    """Lets a blob's bytes through up to a point that moves."""

    def __init__(self, blob: MemoryBlob) -> None:
        self._gates: list[tuple[int, Gate]] = []
        blob.before = self

    def hold(self, start: int) -> Gate:
        gate = Gate()
        self._gates.append((start, gate))
        return gate

    def __call__(self, wanted: ByteRange) -> None:
        for start, gate in self._gates:
            if wanted.start >= start:
                gate(wanted)


async def test_reads_at_random_times_are_exact(tmp_path: Path) -> None:
    blob = MemoryBlob(PACKED)
    dice = random.Random(3)
    blob.before = lambda _: time.sleep(dice.random() / 50)
    done = 0

    async def read(seed: int) -> None:
        nonlocal done
        mine = random.Random(seed)
        for _ in range(30):
            await trio.sleep(mine.random() / 100)
            offset, size = mine.randrange(len(DATA) + 5), mine.choice([1, 4096, 100_000, 3 * MIB])
            start = mine.randrange(len(DATA))
            reader = StreamReader(setup.content, start, len(DATA) - start)
            with trio.move_on_after(mine.choice([0.001, 60])) as scope:
                got = bytes(await reader.read(offset, size))
                assert got == DATA[start + offset : start + offset + size]
            done += not scope.cancelled_caught

    async with streamed(tmp_path, blob, stream_index(Zlib)) as setup:
        async with trio.open_nursery() as nursery:
            for seed in range(20):
                nursery.start_soon(read, seed)
        await setup.content.wait_end()
        assert setup.content.content_size_bytes == len(DATA) == setup.content.here_bytes()
        assert setup.content.proven
        assert setup.counters.bytes_fetched == len(PACKED)
    assert done > 200


async def test_what_has_come_is_served_while_the_rest_is_on_its_way(tmp_path: Path) -> None:
    blob = MemoryBlob(DATA)
    gate = Stages(blob).hold(4 * MIB)
    async with streamed(tmp_path, blob) as setup:
        content = setup.content
        early = ByteRange(0, 4 * MIB)
        view = await content.read(early)
        assert content.peek(early) is not None
        assert content.peek(ByteRange(0, 8 * MIB)) is None, "a piece may reach beyond the gate"
        assert content.content_size_bytes is None
        assert not content.proven
        gate.open()
        assert bytes(await content.read(WHOLE)) == DATA
        assert bytes(view) == DATA[: 4 * MIB]
    assert bytes(view) == DATA[: 4 * MIB], "a slice outlives its content"


async def test_waiters_are_woken_when_their_range_has_come(tmp_path: Path) -> None:
    blob = MemoryBlob(DATA)
    stages = Stages(blob)
    gates = [stages.hold(size * MIB) for size in (1, 4, 8)]
    came: list[int] = []
    async with streamed(tmp_path, blob) as setup, trio.open_nursery() as nursery:

        async def wait(stop: int) -> None:
            await setup.content.ensure(ByteRange(stop - 1, stop), Lane.DEMAND)
            came.append(stop)

        for stop in (len(DATA), 8 * MIB, 4 * MIB, 1):
            nursery.start_soon(wait, stop)
        for index, gate in enumerate(gates):
            with trio.fail_after(10):
                while len(came) <= index:  # noqa: ASYNC110 - what is waited for is tested
                    await trio.sleep(0.01)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(came) == index + 1
            gate.open()
    assert came == [1, 4 * MIB, 8 * MIB, len(DATA)]


async def test_past_the_end_is_an_error(tmp_path: Path) -> None:
    async with streamed(tmp_path, PACKED, stream_index(Zlib)) as setup:
        for _ in range(2):
            with pytest.raises(MalformedError, match="ends at"):
                await setup.content.read(ByteRange(len(DATA) - 5, len(DATA) + 1))
        with trio.fail_after(5), pytest.raises(MalformedError):  # who waits for that waits no more
            await setup.content.read(ByteRange(2**62 + 5, 2**62 + 6))
        assert bytes(await setup.content.read(ByteRange(5, 5))) == b""
        assert setup.content.poison is None


@pytest.mark.parametrize("data", [b"", b"x"])
async def test_tiny_contents(tmp_path: Path, data: bytes) -> None:
    async with streamed(tmp_path, data) as setup:
        await setup.content.wait_end()
        assert bytes(await setup.content.read(ByteRange(0, len(data)))) == data
        assert setup.content.proven


async def expect_condemned(setup_content: object, kind: type[LazyfsError]) -> None:
    content = setup_content
    await content.condemned.wait()  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(kind):
            await content.read(ByteRange(0, 10))  # type: ignore[attr-defined]
    assert content.peek(ByteRange(0, 10)) is None  # type: ignore[attr-defined]
    assert not content.proven  # type: ignore[attr-defined]


async def test_a_wrong_digest_condemns(tmp_path: Path) -> None:
    blob = MemoryBlob(DATA)
    gate = Stages(blob).hold(4 * MIB)
    async with streamed(tmp_path, blob, digest=Digest.of(b"other")) as setup:
        await setup.content.read(ByteRange(0, 10))
        gate.open()
        with pytest.raises(IntegrityError, match="does not match its digest"):
            await setup.content.wait_end()
        await expect_condemned(setup.content, IntegrityError)
        with pytest.raises(IntegrityError):
            await setup.content.prove()
    assert not kept_in(tmp_path)
    assert not growing_in(tmp_path)


async def test_without_a_digest_nothing_is_proven_or_kept(tmp_path: Path) -> None:
    async with streamed(tmp_path, DATA, digest=None) as setup:
        await setup.content.wait_end()
        assert bytes(await setup.content.read(WHOLE)) == DATA
        assert not setup.content.proven
    assert not kept_in(tmp_path)
    assert not growing_in(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flip"])
async def test_a_broken_stream_condemns(tmp_path: Path, damage: str) -> None:
    broken = bytearray(PACKED)
    if damage == "cut":
        del broken[-3:]
    else:
        broken[len(broken) // 2] ^= 0xFF
    async with streamed(tmp_path, bytes(broken), stream_index(Zlib)) as setup:
        with pytest.raises(MalformedError):
            await setup.content.read(ByteRange(len(DATA), len(DATA) + 1))
        await expect_condemned(setup.content, MalformedError)


async def test_a_blob_that_changed_condemns(tmp_path: Path) -> None:
    blob = MemoryBlob(DATA)

    def changed(wanted: ByteRange) -> None:
        if wanted.start >= 4 * MIB:
            raise IntegrityError("it was replaced")

    blob.before = changed
    async with streamed(tmp_path, blob) as setup:
        with pytest.raises(IntegrityError, match="replaced"):
            await setup.content.read(WHOLE)
        await expect_condemned(setup.content, IntegrityError)


async def test_a_bug_in_a_decoder_is_an_error_for_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Identity):
        def decode(self, data: Data) -> Iterator[Data]:
            raise ZeroDivisionError

    async with streamed(tmp_path, DATA, stream_index(Broken)) as setup:
        with pytest.raises(LazyfsError, match="ZeroDivisionError"):
            await setup.content.read(ByteRange(0, 10))
    assert "please report" in caplog.text


async def test_a_dead_source_is_an_error_and_recovers(tmp_path: Path) -> None:
    blob = MemoryBlob(DATA)
    alive = False

    def dead(wanted: ByteRange) -> None:
        if wanted.start >= 4 * MIB and not alive:
            raise FetchError("connection refused", transient=True)

    blob.before = dead
    async with streamed(tmp_path, blob) as setup:
        for _ in range(3):
            with pytest.raises(FetchError, match="refused"):
                await setup.content.read(WHOLE)
            assert bytes(await setup.content.read(ByteRange(9, 99))) == DATA[9:99]
        with pytest.raises(FetchError, match="refused"):
            await setup.content.prove()
        alive = True
        assert bytes(await setup.content.read(WHOLE)) == DATA
        await setup.content.prove()
        assert setup.counters.bytes_fetched == len(DATA)


async def test_cancelled_readers_leave_nothing_behind(tmp_path: Path) -> None:
    blob = MemoryBlob(DATA)
    gate = Stages(blob).hold(2 * MIB)
    async with streamed(tmp_path, blob) as setup:
        async with trio.open_nursery() as nursery:
            for index in range(50):
                nursery.start_soon(setup.content.read, ByteRange(0, 3 * MIB + index))
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        gate.open()
        assert bytes(await setup.content.read(WHOLE)) == DATA


async def test_leaving_in_the_middle(tmp_path: Path) -> None:
    blob = MemoryBlob(DATA)
    gate = Stages(blob).hold(2 * MIB)
    async with streamed(tmp_path, blob) as setup:
        await setup.content.read(ByteRange(0, MIB))
    gate.open()
    assert not growing_in(tmp_path)


async def test_verification_tells_how_far_it_is(tmp_path: Path) -> None:
    blob = MemoryBlob(PACKED)
    blob.before = lambda _: time.sleep(0.2)
    told: list[tuple[int, int]] = []
    async with streamed(tmp_path, blob, stream_index(Zlib)) as setup:
        await setup.content.prove(lambda done, of: told.append((done, of)))
        assert setup.content.proven
    assert told[-1] == (len(PACKED), len(PACKED))
    assert told == sorted(told)


async def test_condemning_from_above_ends_the_pass(tmp_path: Path) -> None:
    blob = MemoryBlob(DATA)
    gate = Stages(blob).hold(2 * MIB)
    async with streamed(tmp_path, blob) as setup:
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(IntegrityError, match="somebody"):
                    await setup.content.read(WHOLE)

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked(0.05)
            setup.content.condemn(IntegrityError("somebody says so"))
        await expect_condemned(setup.content, IntegrityError)
    gate.open()


@contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a tmpfs; yields what gives it another size."""
    path.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "small", str(path)]
    subprocess.run(options, check=True)
    try:
        yield (
            lambda size: (
                subprocess.run(["mount", "-o", f"remount,size={size}", str(path)], check=True)
                and None
            )
        )
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.mount
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
async def test_a_full_disk_is_said_and_gone_on_after(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 6 * MIB) as resize:
        async with streamed(tmp_path / "small", DATA) as setup:
            for _ in range(2):
                with pytest.raises(FetchError, match=r"small takes no more after \d+ bytes"):
                    await setup.content.read(WHOLE)
            part = ByteRange(0, MIB)
            assert bytes(await setup.content.read(part)) == DATA[:MIB]
            resize(64 * MIB)
            assert bytes(await setup.content.read(WHOLE)) == DATA
            await setup.content.prove()
            assert setup.counters.bytes_fetched == len(DATA)


async def test_no_place_for_the_content_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    async with streamed(tmp_path / "file", DATA) as setup:
        with pytest.raises(FetchError, match=os.strerror(errno.ENOTDIR)):
            await setup.content.read(WHOLE)
        (tmp_path / "file").unlink()
        assert bytes(await setup.content.read(WHOLE)) == DATA
