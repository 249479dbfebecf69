import ctypes
import gc
import mmap
import random
import resource
import tempfile
import zlib
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.ground.errors import MalformedError
from lazyfs.layers.deflate import (
    GZIP,
    RAW,
    Buffer,
    Engine,
    Inflater,
    PythonInflater,
    RestartInflater,
    Source,
    best_engine,
    engines,
)
from tests.layers.streaming import gzip_member, mixed

ENGINES = engines()
each_engine = pytest.mark.parametrize("engine", ENGINES, ids=lambda item: item.name)
DATA = mixed(300_000)


class Boundary(NamedTuple):
    blob: int
    bits: int
    content: int
    window: bytes


def raw(data: bytes, level: int = 6, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, RAW, 1, strategy)
    return packer.compress(data) + packer.flush()


def boundaries(engine: Engine, packed: bytes, room: int) -> tuple[bytes, list[Boundary]]:
    inflater = RestartInflater(engine, RAW)
    out, content = Buffer(room), bytearray()
    found: list[Boundary] = []
    with Source(packed) as source:
        while True:
            step = inflater.inflate(source, out, 0, room, seek=True)
            content += out.view[: step.produced]
            if step.ended:
                return bytes(content), found
            if step.bits is not None:
                assert 0 <= step.bits < 8
                found.append(Boundary(source.position, step.bits, len(content), inflater.window()))


def test_both_libraries_are_here() -> None:
    """They are what a checkout is tested with; an installation may lack either."""
    assert [engine.name.split()[0] for engine in ENGINES] == ["zlibng", "zlibVersion"]
    assert best_engine() is ENGINES[0]


@each_engine
@pytest.mark.parametrize(
    ("level", "strategy"),
    [(0, 0), (1, 0), (6, 0), (9, 0), (6, zlib.Z_HUFFMAN_ONLY), (6, zlib.Z_FIXED), (6, zlib.Z_RLE)],
)
def test_every_block_is_a_place_to_restart(engine: Engine, level: int, strategy: int) -> None:
    packed = raw(DATA, level, strategy)
    content, found = boundaries(engine, packed, 10_000)
    assert content == DATA
    assert len(found) > 4
    inflater = RestartInflater(engine, RAW)
    for point in found:
        assert point.window == DATA[max(0, point.content - 32768) : point.content]
        out = Buffer(len(DATA))
        inflater.reset()
        inflater.restart(point.bits, packed[point.blob - 1], point.window)
        with Source(packed[point.blob :]) as source:
            step = inflater.inflate(source, out, 0, len(DATA))
        assert step.ended
        assert out.view[: step.produced] == DATA[point.content :]


def test_libraries_find_the_same_blocks() -> None:
    packed = raw(DATA)
    one, *others = (boundaries(engine, packed, room)[1] for engine in ENGINES for room in (1, 9999))
    assert {point.bits for point in one} == set(range(8))
    assert all(other == one for other in others)


@each_engine
def test_output_stops_where_it_is_told(engine: Engine) -> None:
    out = Buffer(100)
    with Source(raw(DATA)) as source:
        step = RestartInflater(engine, RAW).inflate(source, out, 10, 20)
    assert step.produced == 10
    assert out.view == bytes(10) + DATA[:10] + bytes(80)


def test_a_read_only_mapping_is_read_in_place() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(5000) + b"hello")
        file.flush()
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        with Source(memoryview(mapping)[5000:]) as source:
            assert ctypes.string_at(source.address, source.left) == b"hello"
            source.position = 3
            assert ctypes.string_at(source.address, source.left) == b"lo"
            with pytest.raises(BufferError):
                mapping.close()
        del source
        gc.collect()
        mapping.close()


@pytest.mark.parametrize("data", [b"x", bytearray(b"x"), memoryview(b"axa")[1:2]])
def test_sources_of_every_kind(data: bytes | bytearray | memoryview) -> None:
    with Source(data) as source:
        assert ctypes.string_at(source.address, 1) == b"x"


def test_pythons_own_gives_the_same() -> None:
    out, content = Buffer(70_000), bytearray()
    inflater = PythonInflater(GZIP)
    for _ in range(2):
        content.clear()
        with Source(gzip_member(DATA)) as source:
            ended = False
            while not ended:
                step = inflater.inflate(source, out, 0, 70_000)
                content += out.view[: step.produced]
                ended = step.ended
                assert step.bits is None
            assert not source.left
        assert content == DATA
        inflater.reset()


def test_states_are_freed() -> None:
    """200 states of some 40 KiB each, six times."""

    def peak() -> int:
        for engine in ENGINES:
            for _ in range(200):
                RestartInflater(engine, GZIP)
            RestartInflater(engine, GZIP).close()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    first = peak()
    assert max(peak() for _ in range(5)) < first + 8_000


@each_engine
def test_a_window_is_bounded(engine: Engine) -> None:
    inflater = RestartInflater(engine, RAW)
    with pytest.raises(MalformedError):
        RestartInflater(engine, GZIP).restart(0, 0, b"dictionary")
    inflater.restart(0, 0, bytes(40_000))
    assert inflater.window() == bytes(32_768)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300), st.integers(0, 7), st.booleans(), st.booleans(), st.data())
def test_hostile_bytes(data: bytes, bits: int, seek: bool, gzip: bool, draw: st.DataObject) -> None:
    packed = bytearray(gzip_member(DATA[:2000]) if gzip else raw(DATA[:2000]))
    at = draw.draw(st.integers(0, len(packed)))
    packed[at : at + draw.draw(st.integers(0, 300))] = data
    out = Buffer(1000)
    for engine in ENGINES:
        inflater = RestartInflater(engine, GZIP if gzip else RAW)
        try:
            if not gzip:
                inflater.restart(bits, 0xA5, b"window")
            with Source(bytes(packed)) as source:
                for _ in range(len(packed) * 1100):
                    step = inflater.inflate(source, out, 0, 1000, seek=seek)
                    assert 0 <= step.produced <= 1000
                    if step.ended or (not source.left and step.produced < 1000):
                        break
                else:
                    pytest.fail("it does not end")
        except MalformedError:
            pass


def test_damage_is_told() -> None:
    packed = bytearray(gzip_member(DATA))
    packed[len(packed) // 2] ^= random.Random(1).randrange(1, 256)
    inflaters: list[Inflater] = [RestartInflater(engine, GZIP) for engine in ENGINES]
    for inflater in (*inflaters, PythonInflater(GZIP)):
        with Source(packed) as source, pytest.raises(MalformedError):
            out = Buffer(2 * len(DATA))
            while not inflater.inflate(source, out, 0, 2 * len(DATA)).ended:
                pass
