"""Whatever places do, and whenever a fetch is cancelled: each byte once, in order, right, or an
error; and the sink is left alone once the fetch has ended."""

import random
import threading
from dataclasses import dataclass

import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import FetchError, LazyfsError, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.blob import Sink
from lazyfs.transport.place import Health
from lazyfs.transport.retry import Fetcher
from lazyfs.transport.wake import blocks_on
from tests.blobs import MemoryBlob, Mirrored
from tests.transport.gather import QUICK
from tests.transport.test_place import known

DATA = random.Random(1).randbytes(20_000)
IMPATIENT = replace(
    QUICK, stall_timeout_s=0.04, backoff_first_s=0.0, backoff_most_s=0.001, deadline_s=20.0
)


@dataclass(frozen=True)
class Behaviour:
    """What one attempt meets."""

    delivers: int
    """So many bytes at most before the rest."""
    then: str
    """`go on`, `reset`, `refuse`, `end` (too early), `hang` until woken, `deaf`: hang and not be
    woken, then go on delivering as if nothing had happened."""


BEHAVIOURS = st.builds(
    Behaviour,
    st.sampled_from([0, 0, 1, 5000, 19_999]),
    st.sampled_from(["reset", "refuse", "end", "hang", "deaf", "go on"]),
)


class Scripted(MemoryBlob):
    """A blob whose attempts meet what is scripted, in order; then it behaves."""

    def __init__(self, script: list[Behaviour], name: str, release: threading.Event) -> None:
        super().__init__(DATA, name, known(name))
        self._script = script
        self._release = release
        self._lock = threading.Lock()

    def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
        with self._lock:
            meets = self._script.pop(0) if self._script else Behaviour(0, "go on")
        middle = min(byte_range.stop, byte_range.start + meets.delivers)
        super().read_into(ByteRange(byte_range.start, middle), sink)
        if meets.then == "reset":
            raise FetchError("reset", transient=True)
        if meets.then == "refuse":
            raise SourceError("refused")
        if meets.then == "end":
            return
        if meets.then == "hang":
            woken = threading.Event()
            blocks_on(woken.set)
            woken.wait(20)
            raise FetchError("shut down", transient=True)
        if meets.then == "deaf":
            self._release.wait(20)
        super().read_into(ByteRange(middle, byte_range.stop), sink)


class Strict:
    """A sink that knows when it may be used, and by one thread at a time."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.over = False
        self.wrongs: list[str] = []
        self._room = bytearray(700)
        self._user: int | None = None

    def space(self) -> memoryview:
        if self.over:
            self.wrongs.append("lent after the end")
        if self._user not in (None, threading.get_ident()):
            self.wrongs.append("lent to two")
        self._user = threading.get_ident()
        return memoryview(self._room)

    def advance(self, count: int) -> None:
        if self.over or self._user != threading.get_ident():
            self.wrongs.append("advanced by one who had no room")
        self._user = None
        self.data += self._room[:count]


@example([[Behaviour(0, "deaf")]], False, 0.01, ByteRange(0, 20_000))
@example([[Behaviour(5000, "deaf")]], True, 0.06, ByteRange(0, 20_000))
@example([[Behaviour(0, "deaf")], [Behaviour(0, "deaf")]], True, None, ByteRange(0, 20_000))
@settings(max_examples=200)
@given(
    scripts=st.lists(st.lists(BEHAVIOURS, min_size=1, max_size=4), min_size=1, max_size=3),
    urgent=st.booleans(),
    cancel_after_s=st.sampled_from([0.01, None, 0.06, None, 0.0]),
    wanted=st.sampled_from([ByteRange(0, 20_000), ByteRange(100, 7_000), ByteRange(9, 10)]),
)
def test_each_byte_once_in_order_or_an_error(
    scripts: list[list[Behaviour]], urgent: bool, cancel_after_s: float | None, wanted: ByteRange
) -> None:
    release = threading.Event()
    places = [Scripted(script[:], f"p{n}", release) for n, script in enumerate(scripts)]
    blob = Mirrored(*places) if len(places) > 1 else places[0]
    sink, counters = Strict(), Counters()
    ended = []

    async def main() -> None:
        fetcher = Fetcher(IMPATIENT, counters)
        limiter = trio.CapacityLimiter(3)
        with trio.move_on_after(float("inf") if cancel_after_s is None else cancel_after_s):
            try:
                await fetcher.fetch(blob, wanted, sink, limiter=limiter, urgent=urgent)
                ended.append("whole")
            except LazyfsError:
                ended.append("error")
        sink.over = True
        assert limiter.borrowed_tokens == 0
        assert fetcher.waiting() == []
        release.set()
        with trio.fail_after(30):
            while fetcher.threads:  # noqa: ASYNC110 - threads tell nobody
                await trio.sleep(0.002)

    trio.run(main)
    assert sink.wrongs == []
    assert DATA[wanted.start : wanted.stop].startswith(sink.data)
    assert counters.bytes_fetched == len(sink.data)
    if ended == ["whole"]:
        assert len(sink.data) == wanted.size_bytes
    if cancel_after_s is None:
        assert ended
        if not any(each.then == "refuse" for script in scripts for each in script):
            assert ended == ["whole"]


def test_health_is_kept_by_name() -> None:
    assert Health("mirror.example:5000/library").host == "mirror.example:5000"
