"""Several mounts of one stream at once: one decodes, all read, and each is right or condemned."""

import fcntl
import os
import random
import time
import zlib
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.content.cache import Cache
from lazyfs.content.growing_file import GrowingFile
from lazyfs.content.incoming import Cradle, make_shared, shared_name
from lazyfs.content.notice import Notice, State
from lazyfs.content.room import Room
from lazyfs.content.streamed import StreamedContent
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import FetchError, IntegrityError, LazyfsError, MalformedError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB, ContentSettings
from tests.blobs import Gate, MemoryBlob
from tests.content.test_streamed import Stages, small_disk
from tests.streams import (
    TAG,
    Setup,
    Zlib,
    growing_in,
    indexed_stream,
    kept_in,
    stream_index,
    streamed,
    wait_kept,
    whole_run,
)

DATA = random.Random(1).randbytes(9 * MIB + 12345)
DIGEST = Digest.of(DATA)
WHOLE = ByteRange(0, len(DATA))
HASTY = ContentSettings(idle_s=0.0, stream_patience_s=0.4)


def flipped(at: int) -> bytes:
    wrong = bytearray(DATA)
    wrong[at] ^= 1
    return bytes(wrong)


def gated(data: bytes = DATA, at: int = 4 * MIB) -> tuple[MemoryBlob, Gate]:
    blob = MemoryBlob(data)
    return blob, Stages(blob).hold(at)


async def until(size_bytes: int, *contents: StreamedContent) -> None:
    """Come back when so much is here of each."""
    for content in contents:
        while content.here_bytes() < size_bytes:  # noqa: ASYNC110 - no event tells it
            await trio.sleep(0.005)


async def ended(*setups: Setup) -> None:
    for setup in setups:
        while not setup.ended:  # noqa: ASYNC110 - for a test
            await trio.sleep(0.005)


class ByHand:
    """Another daemon, as far as its files go: it decodes what it is told to."""

    def __init__(self, directory: Path, digest: Digest = DIGEST) -> None:
        cache = Cache(directory)
        name = shared_name(digest, TAG, "here")
        cradle = make_shared(cache, name, lambda: False)
        assert cradle is not None
        assert cradle.lead()
        self.cradle: Cradle = cradle
        self.file = GrowingFile(cradle, cache, "by hand")
        assert self.file.begin()

    def decode(self, data: bytes) -> None:
        for start in range(0, len(data), 300_000):
            self.file.append(data[start : start + 300_000])

    def die(self) -> None:
        """Leave as after SIGKILL: locks go, files stay."""
        assert self.cradle.notice is not None
        self.cradle.notice.close()
        os.close(self.cradle.fd)


@contextmanager
def by_hand(directory: Path, digest: Digest = DIGEST) -> Iterator[ByHand]:
    other = ByHand(directory, digest)
    try:
        yield other
    finally:
        other.die()


# -- all is well --------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
async def test_of_six_at_once_one_fetches(tmp_path: Path, packed: bool) -> None:
    data = zlib.compress(DATA, 1) if packed else DATA
    stream = stream_index(Zlib) if packed else indexed_stream()
    setups: list[Setup] = []

    async def read(setup: Setup, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(20):
            start = dice.randrange(len(DATA))
            stop = min(len(DATA), start + dice.choice([1, 5000, 2 * MIB]))
            assert bytes(await setup.content.read(ByteRange(start, stop))) == DATA[start:stop]

    async with AsyncExitStack() as stack:
        for _ in range(6):
            blob = MemoryBlob(data)
            blob.before = lambda _: time.sleep(0.02)
            setups.append(await stack.enter_async_context(streamed(tmp_path, blob, stream)))
        async with trio.open_nursery() as nursery:
            for seed, setup in enumerate(setups):
                nursery.start_soon(read, setup, seed)
        for setup in setups:
            await setup.content.prove()
            assert setup.content.proven
            assert setup.content.content_size_bytes == len(DATA) == setup.content.here_bytes()
        await ended(*setups)
        assert len(kept_in(tmp_path)) == 1
        assert not growing_in(tmp_path)
    assert sum(setup.counters.bytes_fetched for setup in setups) == len(data)
    assert (await whole_run(tmp_path, data, stream_index())).bytes_fetched in (0, len(data))


async def test_who_follows_reads_what_has_come(tmp_path: Path) -> None:
    blob, gate = gated()
    async with streamed(tmp_path, blob) as leader:
        await leader.content.read(ByteRange(0, MIB))
        async with streamed(tmp_path, DATA) as follower:
            content = follower.content
            assert bytes(await content.read(ByteRange(MIB, 4 * MIB))) == DATA[MIB : 4 * MIB]
            assert content.peek(ByteRange(0, 4 * MIB)) == DATA[: 4 * MIB]
            assert content.peek(ByteRange(0, 8 * MIB)) is None
            assert not content.proven
            assert content.content_size_bytes is None
            gate.open()
            assert bytes(await content.read(ByteRange(8 * MIB, len(DATA)))) == DATA[8 * MIB :]
            await content.prove()
            assert content.hashed_bytes == len(DATA)
            with pytest.raises(MalformedError, match="ends at"):
                await content.read(ByteRange(0, len(DATA) + 1))
            assert follower.blob.asked == []


async def test_verification_of_who_follows_tells_how_far_it_is(tmp_path: Path) -> None:
    blob, gate = gated()
    told: list[tuple[int, int]] = []
    async with streamed(tmp_path, blob) as leader:
        await until(4 * MIB, leader.content)
        async with streamed(tmp_path, DATA) as follower, trio.open_nursery() as nursery:
            nursery.start_soon(follower.content.prove, lambda *now: told.append(now))
            while len(told) < 2:  # noqa: ASYNC110 - what is waited for is tested
                await trio.sleep(0.01)
            gate.open()
        assert follower.content.proven
    assert 0 < told[1][0] < len(DATA)
    assert told[-1] == (len(DATA), len(DATA))


@pytest.mark.parametrize("indexed", [False, True])
async def test_who_comes_as_it_is_published_finds_it(tmp_path: Path, indexed: bool) -> None:
    """Between looking for what is kept and looking for who decodes."""
    stream = indexed_stream() if indexed else stream_index()
    late = Setup(MemoryBlob(DATA), tmp_path, DIGEST, stream)
    await whole_run(tmp_path, DATA, stream)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(late.run)
        with trio.fail_after(10):
            assert bytes(await late.content.read(WHOLE)) == DATA
            await late.content.prove()
        assert late.content.proven
        nursery.cancel_scope.cancel()
    late.content.close()
    assert late.blob.asked == []


async def test_another_source_is_not_believed(tmp_path: Path) -> None:
    """What it gives for a digest may be anything, until it is proven."""
    blob, gate = gated(flipped(5))
    async with streamed(tmp_path, blob, digest=DIGEST, source_key="hostile") as hostile:
        await hostile.content.read(ByteRange(0, MIB))
        async with streamed(tmp_path, DATA) as honest:
            assert bytes(await honest.content.read(WHOLE)) == DATA
            await honest.content.prove()
        gate.open()
        with pytest.raises(IntegrityError):
            await hostile.content.prove()
    async with streamed(tmp_path, MemoryBlob(flipped(5)), digest=DIGEST) as later:
        assert bytes(await later.content.read(WHOLE)) == DATA


# -- who decodes goes away ----------------------------------------------------------------------


@pytest.mark.parametrize("left_to_do", [1, len(DATA) - 3 * MIB])
async def test_when_it_leaves_another_goes_on(tmp_path: Path, left_to_do: int) -> None:
    begun = ByHand(tmp_path)
    begun.decode(DATA[: len(DATA) - left_to_do])
    size_bytes = begun.file.size_bytes
    blob, gate = gated(at=2 * MIB)
    async with streamed(tmp_path, blob) as first, streamed(tmp_path, blob) as second:
        await until(size_bytes, first.content, second.content)
        begun.die()
        await trio.to_thread.run_sync(gate.wait_entered)
        for content in (first.content, second.content):
            here = content.peek(ByteRange(0, size_bytes))
            assert here == DATA[:size_bytes], "nobody waits for what has come once"
        gate.open()
        for setup in (first, second):
            assert bytes(await setup.content.read(WHOLE)) == DATA
            await setup.content.prove()
        await ended(first, second)
    assert first.counters.bytes_fetched + second.counters.bytes_fetched == len(DATA)
    assert (await whole_run(tmp_path, DATA, stream_index())).bytes_fetched == 0


async def test_one_after_the_other_leaves(tmp_path: Path) -> None:
    scopes = []
    async with trio.open_nursery() as nursery:

        async def take_part(at: int, scope: trio.CancelScope) -> None:
            blob, _ = gated(at=at)
            with scope:
                async with streamed(tmp_path, blob):
                    await trio.sleep_forever()

        for at in (2 * MIB, 4 * MIB, 6 * MIB):
            scopes.append(trio.CancelScope())
            nursery.start_soon(take_part, at, scopes[-1])
            await trio.sleep(0.1)
        async with streamed(tmp_path, DATA) as last:
            for at, scope in zip((MIB, 3 * MIB, 5 * MIB), scopes, strict=True):
                await last.content.read(ByteRange(0, at))
                scope.cancel()
            assert bytes(await last.content.read(WHOLE)) == DATA
            await last.content.prove()


async def test_the_last_who_leaves_clears_up(tmp_path: Path) -> None:
    blobs = [gated(at=MIB)[0] for _ in range(3)]
    async with AsyncExitStack() as stack:
        for blob in blobs:
            await stack.enter_async_context(streamed(tmp_path, blob))
        with trio.fail_after(20):
            while not growing_in(tmp_path):  # noqa: ASYNC110 - a thread's
                await trio.sleep(0.01)
        await trio.sleep(0.1)
        assert len(growing_in(tmp_path)) == 1
    assert not growing_in(tmp_path)
    assert not kept_in(tmp_path)


async def test_who_does_not_go_on_is_given_up(tmp_path: Path) -> None:
    """A stopped daemon keeps its lock, and writes to its file when it is woken."""
    with by_hand(tmp_path) as stopped:
        stopped.decode(DATA[: 4 * MIB])
        blob, gate = gated(at=2 * MIB)
        async with (
            streamed(tmp_path, blob, settings=HASTY) as first,
            streamed(tmp_path, blob, settings=HASTY) as second,
        ):
            await until(4 * MIB, first.content, second.content)
            await trio.to_thread.run_sync(gate.wait_entered)
            for setup in (first, second):
                assert setup.content.peek(ByteRange(0, 4 * MIB)) == DATA[: 4 * MIB]
            stopped.decode(bytes(MIB))
            gate.open()
            for setup in (first, second):
                assert bytes(await setup.content.read(WHOLE)) == DATA
                await setup.content.prove()
            await ended(first, second)
            assert stopped.cradle.is_replaced() is False
            with pytest.raises(OSError, match="removed meanwhile"):
                stopped.cradle.publish(tmp_path / "layers" / "x", lambda _: None, replace=True)
        assert first.counters.bytes_fetched + second.counters.bytes_fetched == len(DATA)
    assert len(kept_in(tmp_path)) == 1


async def test_who_was_given_up_follows_when_it_goes_on(tmp_path: Path) -> None:
    blob, gate = gated()
    async with streamed(tmp_path, blob) as stopped:
        await until(4 * MIB, stopped.content)
        (directory,) = growing_in(tmp_path)
        directory.rename(tmp_path / "incoming" / "grave")
        with by_hand(tmp_path) as other:
            other.decode(DATA)
            other.file.finish()
            assert other.cradle.notice is not None
            other.cradle.notice.tell(state=State.WHOLE)
            with trio.fail_after(10):
                assert bytes(await stopped.content.read(WHOLE)) == DATA
            assert stopped.content.proven
        gate.open()
    assert stopped.counters.bytes_fetched <= 6 * MIB


async def test_who_comes_when_it_is_whole_publishes_it(tmp_path: Path) -> None:
    """Two daemons have it whole, and have not published it; one of them has led, and is dead."""
    other = ByHand(tmp_path)
    user = make_shared(Cache(tmp_path), shared_name(DIGEST, TAG, "here"), lambda: False)
    assert user is not None
    other.decode(DATA)
    other.file.finish()
    assert other.cradle.notice is not None
    other.cradle.notice.tell(state=State.WHOLE)
    other.die()
    async with streamed(tmp_path, DATA) as setup:
        assert bytes(await setup.content.read(WHOLE)) == DATA
        await ended(setup)
        assert setup.blob.asked == []
    user.close()
    assert len(kept_in(tmp_path)) == 1


async def test_whole_but_not_published_is_published_by_who_is_left(tmp_path: Path) -> None:
    other = ByHand(tmp_path)
    other.decode(DATA)
    other.file.finish()
    assert other.cradle.notice is not None
    other.cradle.notice.tell(state=State.WHOLE)
    async with streamed(tmp_path, DATA) as setup:
        assert bytes(await setup.content.read(WHOLE)) == DATA
        assert not kept_in(tmp_path)
        other.die()
        await wait_kept(tmp_path)
        await ended(setup)
    assert (await whole_run(tmp_path, DATA, stream_index())).bytes_fetched == 0


@pytest.mark.parametrize("is_dead", [False, True])
async def test_whole_but_damaged_since_is_not_the_whole(tmp_path: Path, is_dead: bool) -> None:
    other = ByHand(tmp_path)
    other.decode(DATA)
    other.file.finish()
    assert other.cradle.notice is not None
    user = make_shared(Cache(tmp_path), shared_name(DIGEST, TAG, "here"), lambda: False)
    assert user is not None
    other.cradle.notice.tell(state=State.WHOLE)
    os.ftruncate(other.cradle.fd, 5 * MIB)
    if is_dead:
        other.die()
    async with streamed(tmp_path, DATA, settings=HASTY) as setup:
        assert bytes(await setup.content.read(WHOLE)) == DATA
        await ended(setup)
    assert (await whole_run(tmp_path, DATA, stream_index())).bytes_fetched == 0
    user.close()
    if not is_dead:
        other.die()


# -- wrong bytes --------------------------------------------------------------------------------


async def expect_condemned(content: StreamedContent, match: str) -> None:
    await content.condemned.wait()
    assert content.peek(ByteRange(0, 10)) is None
    assert not content.proven
    with pytest.raises(LazyfsError, match=match):
        await content.read(ByteRange(0, 10))


@pytest.mark.parametrize("how", ["dies", "is stopped"])
@pytest.mark.parametrize("at", [0, 2 * MIB, 3 * MIB - 1])
async def test_bytes_that_were_served_and_were_wrong(tmp_path: Path, at: int, how: str) -> None:
    other = ByHand(tmp_path)
    other.decode(flipped(at)[: 3 * MIB])
    async with streamed(tmp_path, DATA, settings=HASTY) as setup:
        served = await setup.content.read(ByteRange(at, at + 1))
        assert bytes(served) != DATA[at : at + 1]
        if how == "dies":
            other.die()
        await expect_condemned(setup.content, "other bytes than before")
        assert not growing_in(tmp_path)
        async with streamed(tmp_path, DATA) as newcomer:
            assert bytes(await newcomer.content.read(WHOLE)) == DATA
            await newcomer.content.prove()
    if how != "dies":
        other.die()


@pytest.mark.parametrize("size", [MIB, len(DATA) - 1])
async def test_a_content_that_ends_before_what_was_served(tmp_path: Path, size: int) -> None:
    digest = Digest.of(DATA[:size])
    with by_hand(tmp_path, digest) as other:
        other.decode(DATA)
        async with streamed(tmp_path, DATA[:size], settings=HASTY) as setup:
            assert bytes(await setup.content.read(WHOLE)) == DATA
            await expect_condemned(setup.content, "before, there were")


@pytest.mark.parametrize("served", [4 * MIB, len(DATA)])
async def test_who_decodes_is_fed_wrong_bytes(tmp_path: Path, served: int) -> None:
    """It is condemned; the others begin anew, and must find what they have served."""
    wrong = Stages(blob := MemoryBlob(flipped(7 * MIB)))
    early, late = wrong.hold(4 * MIB), wrong.hold(8 * MIB)
    honest, honest_gate = gated(at=2 * MIB)
    async with streamed(tmp_path, blob, digest=DIGEST) as leader:
        await leader.content.read(ByteRange(0, MIB))
        async with streamed(tmp_path, honest) as one, streamed(tmp_path, honest) as two:
            early.open()
            await until(8 * MIB, one.content, two.content)
            for setup in (one, two):
                assert await setup.content.read(ByteRange(0, min(served, 8 * MIB)))
            late.open()
            await expect_condemned(leader.content, "does not match its digest")
            await trio.to_thread.run_sync(honest_gate.wait_entered)
            for setup in (one, two):
                await until_not_served(setup.content, ByteRange(3 * MIB, 4 * MIB))
                assert setup.content.poison is None
            honest_gate.open()
            for setup in (one, two):
                if served <= 7 * MIB:
                    assert bytes(await setup.content.read(WHOLE)) == DATA
                    await setup.content.prove()
                else:
                    await expect_condemned(setup.content, "other bytes than before")
    counters = await whole_run(tmp_path, DATA, stream_index())
    assert counters.bytes_fetched == (0 if served <= 7 * MIB else len(DATA))


async def until_not_served(content: StreamedContent, wanted: ByteRange) -> None:
    while content.peek(wanted) is not None:  # noqa: ASYNC110 - no event tells it
        await trio.sleep(0.005)


async def test_what_a_dead_daemon_wrote_and_nobody_was_served(tmp_path: Path) -> None:
    """It need not have been right."""
    other = ByHand(tmp_path)
    other.decode(flipped(5 * MIB)[: 6 * MIB])
    async with streamed(tmp_path, DATA) as one, streamed(tmp_path, DATA) as two:
        for setup in (one, two):
            assert bytes(await setup.content.read(ByteRange(0, MIB))) == DATA[:MIB]
        other.die()
        for setup in (one, two):
            await until(len(DATA), setup.content)
            assert bytes(await setup.content.read(WHOLE)) == DATA
            await setup.content.prove()
    assert (await whole_run(tmp_path, DATA, stream_index())).bytes_fetched == 0


async def test_when_all_are_fed_wrong_bytes_not_all_have_to_look(tmp_path: Path) -> None:
    setups: list[Setup] = []
    async with AsyncExitStack() as stack:
        for _ in range(5):
            blob = MemoryBlob(flipped(len(DATA) - 1))
            setups.append(await stack.enter_async_context(streamed(tmp_path, blob, digest=DIGEST)))
        for setup in setups:
            await setup.content.condemned.wait()
            with pytest.raises(IntegrityError, match="does not match its digest"):
                await setup.content.wait_end()
    assert sum(setup.counters.bytes_fetched for setup in setups) <= 3 * len(DATA)
    assert not kept_in(tmp_path)
    assert not growing_in(tmp_path)


async def test_a_notice_that_is_damaged(tmp_path: Path) -> None:
    """Nobody can tell how much has been written: it is left as it is, and begun anew."""
    other = ByHand(tmp_path)
    other.decode(DATA[: 3 * MIB])
    async with streamed(tmp_path, DATA, settings=HASTY) as setup:
        await until(3 * MIB, setup.content)
        assert other.cradle.notice is not None
        os.pwrite(other.cradle.notice.fd, b"\0", 24)
        other.die()
        assert bytes(await setup.content.read(WHOLE)) == DATA
        await setup.content.prove()


# -- weather ------------------------------------------------------------------------------------


async def test_a_dead_source_is_an_error_for_all_and_recovers(tmp_path: Path) -> None:
    alive = False

    def dead(wanted: ByteRange) -> None:
        if wanted.start >= 4 * MIB and not alive:
            raise FetchError("connection refused", transient=True)

    blob = MemoryBlob(DATA)
    blob.before = dead
    async with streamed(tmp_path, blob) as leader:
        await leader.content.read(ByteRange(0, MIB))
        async with streamed(tmp_path, DATA) as follower:
            for _ in range(2):
                with pytest.raises(FetchError, match=r"refused|nothing came"):
                    await follower.content.read(WHOLE)
                assert bytes(await follower.content.read(ByteRange(9, 99))) == DATA[9:99]
            alive = True
            with trio.fail_after(4):  # it has asked, or the other would rest for longer
                while True:
                    try:
                        assert bytes(await follower.content.read(WHOLE)) == DATA
                        break
                    except FetchError:
                        continue
            assert follower.blob.asked == []


@pytest.mark.mount
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
async def test_a_full_disk_is_said_to_all(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 6 * MIB) as resize:
        async with (
            streamed(tmp_path / "small", DATA) as one,
            streamed(tmp_path / "small", DATA) as two,
        ):
            for setup in (one, two):
                with pytest.raises(FetchError, match=r"takes no more|nothing came"):
                    await setup.content.read(WHOLE)
                assert bytes(await setup.content.read(ByteRange(0, MIB))) == DATA[:MIB]
            resize(64 * MIB)
            for setup in (one, two):
                while True:
                    try:
                        assert bytes(await setup.content.read(WHOLE)) == DATA
                        break
                    except FetchError:
                        continue
                await setup.content.prove()
            assert one.counters.bytes_fetched + two.counters.bytes_fetched == len(DATA)


async def test_a_daemon_that_is_stopped_while_it_holds_the_lock(tmp_path: Path) -> None:
    """Nobody waits for it for ever: others go on alone."""
    (tmp_path / "incoming").mkdir()
    fd = os.open(tmp_path / "incoming" / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    async with streamed(tmp_path, DATA) as setup:
        assert bytes(await setup.content.read(WHOLE)) == DATA
        await setup.content.prove()
    os.close(fd)


# -- in memory ----------------------------------------------------------------------------------


async def test_in_memory_nothing_touches_a_disk(tmp_path: Path) -> None:
    async with streamed(Cache(None), DATA) as one, streamed(Cache(None), DATA) as two:
        for setup in (one, two):
            assert bytes(await setup.content.read(WHOLE)) == DATA
            await setup.content.prove()
            await ended(setup)
            assert setup.counters.bytes_fetched == len(DATA)
    assert os.listdir(tmp_path) == []


class Little(Room):
    """Room for so much."""

    def __init__(self, left_bytes: int) -> None:
        self.left_bytes = left_bytes

    def take(self, count: int) -> None:
        if count > self.left_bytes:
            raise OSError(28, "no room")
        self.left_bytes -= count


@pytest.mark.parametrize("where", ["memory", "disk"])
async def test_a_cache_that_is_bounded(tmp_path: Path, where: str) -> None:
    cache = Cache(None if where == "memory" else tmp_path)
    room = cache.room = Little(4 * MIB)
    async with streamed(cache, DATA) as setup:
        with pytest.raises(FetchError, match=r"the cache in .* takes no more after \d+ bytes"):
            await setup.content.read(WHOLE)
        room.left_bytes = len(DATA)
        assert bytes(await setup.content.read(WHOLE)) == DATA
        await setup.content.prove()
        assert setup.counters.bytes_fetched == len(DATA)


# -- what is told -------------------------------------------------------------------------------


@given(data=st.binary(max_size=200), at=st.integers(0, 120))
def test_a_notice_is_understood_or_none(data: bytes, at: int) -> None:
    notice = Notice(os.memfd_create("notice"))
    try:
        notice.begin()
        notice.tell(position=5, hashed_bytes=7, trouble=FetchError("no", transient=True))
        before = notice.look()
        assert before is not None
        assert (before.position, before.hashed_bytes, before.troubles) == (5, 7, 1)
        os.pwrite(notice.fd, data, at)
        assert notice.look() in (None, before)
        os.pwrite(notice.fd, data, 512 + at)
        assert isinstance(notice.trouble(), LazyfsError)
    finally:
        notice.close()


@pytest.mark.parametrize(
    "error",
    [
        FetchError("é" * 3000, transient=True),
        FetchError("b", transient=False),
        MalformedError("c"),
        IntegrityError("d"),
        LazyfsError("e"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_told_as_what_it_is(error: LazyfsError) -> None:
    notice = Notice(os.memfd_create("notice"))
    notice.begin()
    notice.tell(trouble=error)
    told = notice.trouble()
    notice.close()
    assert type(told) is type(error)
    assert str(error).startswith(str(told).rstrip("\ufffd"))
    if isinstance(error, FetchError):
        assert isinstance(told, FetchError)
        assert told.transient == error.transient
