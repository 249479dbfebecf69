"""What a pass leaves, and what later mounts make of it: all of it, or nothing."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import open_cache_file
from lazyfs.content.growing_file import STRETCH_BYTES, GrowingFile
from lazyfs.content.incoming import make_private
from lazyfs.content.kept import find_restart_index, forget, open_kept
from lazyfs.content.lanes import Lanes
from lazyfs.content.layer_content import LayerContent
from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB
from lazyfs.transport.retry import Fetcher
from tests.blobs import Gate, MemoryBlob
from tests.streams import (
    FAST,
    SETTINGS,
    TAG,
    growing_in,
    indexed_stream,
    kept_in,
    reopen,
    stream_index,
    streamed,
    wait_kept,
    whole_run,
)

DATA = random.Random(1).randbytes(11 * MIB + 12345)
DIGEST = Digest.of(DATA)
WHOLE = ByteRange(0, len(DATA))


def home_of(directory: Path) -> Path:
    home = Cache(directory).home(DIGEST, TAG)
    assert home is not None
    return home


def damage(path: Path, offset: int, data: bytes = b"\0damage\0") -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


async def test_a_later_mount_needs_no_pass(tmp_path: Path) -> None:
    await whole_run(tmp_path, DATA, stream_index())
    assert not growing_in(tmp_path)
    async with streamed(tmp_path, DATA) as setup:
        content = setup.content
        assert content.content_size_bytes == len(DATA) == content.here_bytes()
        assert content.proven
        assert content.peek(ByteRange(0, 10)) is None, "nobody has looked at it yet"
        dice = random.Random(2)
        for _ in range(50):
            start = dice.randrange(len(DATA))
            stop = min(start + dice.choice([1, 4096, 5 * MIB]), len(DATA))
            assert bytes(await content.read(ByteRange(start, stop))) == DATA[start:stop]
        await content.wait_end()
        await content.prove()
        assert content.peek(WHOLE) == DATA
        assert setup.blob.asked == []
        assert setup.counters.chunks_from_cache == 3


async def test_two_mounts_may_share_what_is_kept(tmp_path: Path) -> None:
    await whole_run(tmp_path, DATA, stream_index())
    async with streamed(tmp_path, DATA) as first, streamed(tmp_path, DATA) as second:
        for setup in (first, second):
            assert bytes(await setup.content.read(WHOLE)) == DATA
            assert setup.blob.asked == []


@pytest.mark.parametrize("offset", [0, 5 * MIB, len(DATA) - 8])
async def test_damage_costs_a_pass_and_no_wrong_byte(tmp_path: Path, offset: int) -> None:
    await whole_run(tmp_path, DATA, stream_index())
    home = home_of(tmp_path)
    damage(home / "content", offset)
    async with streamed(tmp_path, DATA) as setup, trio.open_nursery() as nursery:

        async def read(start: int) -> None:
            assert (
                bytes(await setup.content.read(ByteRange(start, start + MIB)))
                == DATA[start : start + MIB]
            )

        for start in range(0, 11 * MIB, MIB):
            nursery.start_soon(read, start)
    assert setup.counters.cache_refused == 1
    assert setup.counters.bytes_fetched <= len(DATA)
    counters = await whole_run(tmp_path, DATA, stream_index())
    if counters.bytes_fetched:  # the pass before was not waited for
        counters = await whole_run(tmp_path, DATA, stream_index())
    assert (counters.bytes_fetched, counters.cache_refused) == (0, 0)


async def test_verification_finds_damage_and_makes_the_pass(tmp_path: Path) -> None:
    await whole_run(tmp_path, DATA, stream_index())
    damage(home_of(tmp_path) / "content", 9 * MIB)
    async with streamed(tmp_path, DATA) as setup:
        assert bytes(await setup.content.read(ByteRange(0, MIB))) == DATA[:MIB]
        assert setup.blob.asked == [], "nobody looked"
        await setup.content.prove()
        assert setup.content.proven
        assert setup.counters.bytes_fetched == len(DATA)
        assert bytes(await setup.content.read(WHOLE)) == DATA


@pytest.mark.parametrize("name", ["content", "marks", "proven"])
@pytest.mark.parametrize("how", ["missing", "empty", "changed"])
async def test_torn_files_cost_a_pass(tmp_path: Path, name: str, how: str) -> None:
    await whole_run(tmp_path, DATA, stream_index())
    path = home_of(tmp_path) / name
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:
        damage(path, 3)
    async with streamed(tmp_path, DATA) as setup:
        assert bytes(await setup.content.read(WHOLE)) == DATA
        await setup.content.prove()
        assert setup.counters.bytes_fetched == len(DATA)


async def test_a_restart_index_is_found_and_the_content_with_it(tmp_path: Path) -> None:
    assert find_restart_index(Cache(tmp_path), DIGEST, TAG) is None
    await whole_run(tmp_path, DATA, indexed_stream())
    found = find_restart_index(Cache(tmp_path), DIGEST, TAG)
    assert found is not None
    assert open_kept(Cache(tmp_path), DIGEST, TAG) is None, "it is for a CacheFile"
    chunks = reopen(found).chunks
    cache = open_cache_file(Cache(tmp_path), DIGEST, TAG, chunks.content_size_bytes, len(chunks))
    assert cache.persistent
    counters, blob = Counters(), MemoryBlob(DATA)
    content = LayerContent(blob, chunks, cache, Lanes(SETTINGS), Fetcher(FAST, counters), SETTINGS)
    assert content.holdings.sealed
    assert content.proven
    assert bytes(await content.read(WHOLE)) == DATA
    assert blob.asked == []
    assert counters.cache_refused == 0
    content.close()


async def test_an_index_that_is_not_understood_is_left_alone(tmp_path: Path) -> None:
    await whole_run(tmp_path, DATA, indexed_stream())
    counters = await whole_run(tmp_path, DATA, stream_index())
    assert counters.bytes_fetched == len(DATA)
    assert find_restart_index(Cache(tmp_path), DIGEST, TAG) is not None
    forget(home_of(tmp_path))
    assert find_restart_index(Cache(tmp_path), DIGEST, TAG) is None
    assert not growing_in(tmp_path)


async def test_while_the_publisher_lives_others_read_its_file(tmp_path: Path) -> None:
    async with streamed(tmp_path, DATA, indexed_stream()) as setup:
        await setup.content.read(WHOLE)
        await wait_kept(tmp_path)
        found = find_restart_index(Cache(tmp_path), DIGEST, TAG)
        assert found is not None
        chunks = reopen(found).chunks
        cache = open_cache_file(Cache(tmp_path), DIGEST, TAG, len(DATA), len(chunks))
        before = cache.view[: len(DATA)].tobytes()
        blob, fetcher = MemoryBlob(DATA), Fetcher(FAST, Counters())
        content = LayerContent(blob, chunks, cache, Lanes(SETTINGS), fetcher, SETTINGS)
        assert bytes(await content.read(WHOLE)) == DATA == before
        assert blob.asked == []
        content.close()
        assert bytes(await setup.content.read(WHOLE)) == DATA


async def test_of_two_passes_at_once_one_is_kept(tmp_path: Path) -> None:
    """Of mounts that know the image by different names each makes its own."""
    gates = []

    async def run(key: str, blob: MemoryBlob) -> None:
        async with streamed(tmp_path, blob, source_key=key) as setup:
            await setup.content.prove()
            while not setup.ended:  # noqa: ASYNC110 - for a test
                await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        for key in ("here", "there"):
            blob = MemoryBlob(DATA)
            gate = blob.before = Gate()
            gates.append(gate)
            nursery.start_soon(run, key, blob)
        for gate in gates:
            await trio.to_thread.run_sync(gate.wait_entered)
        assert len(growing_in(tmp_path)) == 2
        for gate in gates:
            gate.open()
    assert len(kept_in(tmp_path)) == 1
    assert not growing_in(tmp_path)
    assert (await whole_run(tmp_path, DATA, stream_index())).bytes_fetched == 0


async def test_condemning_forgets_what_was_published(tmp_path: Path) -> None:
    for _ in range(2):  # by the daemon that published it, and by one that found it
        async with streamed(tmp_path, DATA) as setup:
            await wait_kept(tmp_path)
            setup.content.condemn(LookupError("a test"))  # type: ignore[arg-type]
            assert not kept_in(tmp_path)
        await whole_run(tmp_path, DATA, stream_index())


def test_leftovers_are_cleaned_and_the_living_spared(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from lazyfs.content.cache import Cache\n"
        "from lazyfs.content.incoming import make_private\n"
        "os.write(make_private(Cache(Path(sys.argv[1]))).fd, bytes(5000)); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    half_made = tmp_path / "incoming" / "half-made"
    half_made.mkdir()
    os.utime(half_made, (0, 0))
    assert len(list(tmp_path.glob("incoming/*/"))) == 2
    living = make_private(Cache(tmp_path))
    other = make_private(Cache(tmp_path))
    assert set(tmp_path.glob("incoming/*/")) == {living.directory, other.directory}
    other.close()
    living.close()
    assert list(tmp_path.glob("incoming/*/")) == []


def test_a_growing_file_keeps_slices_of_all_its_mappings(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    file = GrowingFile(make_private(cache), cache, "it")
    piece = random.Random(4).randbytes(MIB)
    slices = []
    for count in range(1, 131):
        file.append(piece)
        view = file.peek(ByteRange((count - 1) * MIB, count * MIB))
        assert view is not None
        slices.append(view)
    assert file.peek(ByteRange(0, 130 * MIB + 1)) is None
    assert all(view == piece for view in slices)
    file.finish()
    assert os.fstat(file.fd).st_size == 130 * MIB
    assert len(file.strides.marks) == -(-130 * MIB // STRETCH_BYTES)
    file.close()
    assert slices[0] == slices[-1] == piece
