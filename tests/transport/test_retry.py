"""Fetching until it is all there, or until patience ends."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import FetchError, IntegrityError, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.answers import Question
from lazyfs.transport.attempts import attempts
from lazyfs.transport.blob import Blob, Sink
from lazyfs.transport.client import HttpClient
from lazyfs.transport.httpblob import HttpBlob
from lazyfs.transport.patience import Patience
from lazyfs.transport.retry import Fetcher
from tests import faults
from tests.blobs import Gate, MemoryBlob
from tests.faults import FaultServer
from tests.transport.gather import QUICK, Gather

DATA = random.Random(1).randbytes(100_000)
TRANSIENT = FetchError("the server is away", transient=True)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.add_file("/f", DATA)
        yield server


@pytest.fixture
def blob(server: FaultServer) -> Iterator[HttpBlob]:
    client = HttpClient(QUICK)
    question = Question("the blob", "the host", "log in")
    yield HttpBlob(client, f"{server.url}/f", question=question, size_bytes=len(DATA))
    client.close()


async def fetch(
    blob: Blob,
    byte_range: ByteRange,
    sink: Sink,
    *,
    settings: TransportSettings,
    limiter: trio.CapacityLimiter,
    counters: Counters,
) -> None:
    await Fetcher(settings, counters).fetch(blob, byte_range, sink, limiter=limiter)


async def fetch_all(
    blob: Blob, sink: Sink, counters: Counters | None = None, settings: TransportSettings = QUICK
) -> None:
    await fetch(
        blob,
        ByteRange(0, blob.size_bytes),
        sink,
        settings=settings,
        limiter=trio.CapacityLimiter(4),
        counters=counters or Counters(),
    )


async def test_resumes_where_the_last_attempt_ended(server: FaultServer, blob: HttpBlob) -> None:
    server.script(
        "/f",
        faults.reset(after=1000),
        faults.status(503),
        faults.short(after=20_000),
        faults.stall(after=500),
        faults.drip(0.02, count=10),
        faults.reset(),
    )
    counters = Counters()
    sink = Gather()
    await fetch_all(blob, sink, counters)
    assert sink.data == DATA
    assert (counters.requests, counters.retries) == (7, 6)
    assert counters.bytes_fetched == len(DATA), "no byte was asked for twice and used"


async def test_server_that_restarts_in_mid_read(server: FaultServer, blob: HttpBlob) -> None:
    server.script("/f", faults.stall(after=5000))
    sink = Gather()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch_all, blob, sink)
        await trio.to_thread.run_sync(server.wait_count, "/f", 1)
        await trio.to_thread.run_sync(server.stop)
        await trio.to_thread.run_sync(server.start)
    assert sink.data == DATA


async def test_a_name_that_nobody_knows_for_a_while(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = socket.getaddrinfo, [socket.EAI_NONAME, socket.EAI_AGAIN, socket.EAI_FAIL]

    def resolve(host: str, *rest: Any, **named: Any) -> Any:
        if host != "registry.example":
            return real(host, *rest, **named)
        if failures:
            raise socket.gaierror(failures.pop(), "as if there were no name server")
        return real("127.0.0.1", *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    client, sink = HttpClient(QUICK), Gather()
    question = Question("the blob", "the host", "log in")
    url = f"http://registry.example:{server.port}/f"
    await fetch_all(HttpBlob(client, url, question=question, size_bytes=len(DATA)), sink)
    client.close()
    assert sink.data == DATA
    assert not failures


async def test_server_that_does_not_come_back(server: FaultServer, blob: HttpBlob) -> None:
    server.stop()
    settings = TransportSettings(deadline_s=0.5, backoff_first_s=0.01, backoff_most_s=0.05)
    began_s = time.monotonic()
    with pytest.raises(FetchError, match=r"gave up.*connection refused") as caught:
        await fetch_all(blob, Gather(), settings=settings)
    assert not caught.value.transient
    assert 0.4 < time.monotonic() - began_s < 10


@pytest.mark.parametrize(
    "error", [SourceError("no"), FetchError("no", transient=False), IntegrityError("no")]
)
async def test_what_cannot_help_is_not_tried(error: Exception) -> None:
    def refuse(_: ByteRange) -> None:
        raise error

    blob = MemoryBlob(DATA)
    blob.before = refuse
    with pytest.raises(type(error), match="no"):
        await fetch_all(blob, Gather())
    assert len(blob.asked) == 1


async def test_blob_that_ends_early_is_asked_again() -> None:
    class Short(MemoryBlob):
        def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
            super().read_into(
                ByteRange(byte_range.start, (byte_range.start + len(DATA)) // 2), sink
            )

    sink = Gather()
    with pytest.raises(FetchError, match="the reply ended early"):
        await fetch_all(Short(DATA), sink, settings=TransportSettings(deadline_s=0.1))
    assert sink.data == DATA[: len(sink.data)]


async def test_blob_that_gives_too_much() -> None:
    class Long(MemoryBlob):
        def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
            super().read_into(ByteRange(byte_range.start, byte_range.stop + 1), sink)

    sink = Gather()
    with pytest.raises(FetchError, match="more bytes"):
        await fetch(
            Long(DATA),
            ByteRange(10, 2010),
            sink,
            settings=QUICK,
            limiter=trio.CapacityLimiter(1),
            counters=Counters(),
        )
    assert sink.data == DATA[10:2010]


async def test_empty_range_asks_nobody() -> None:
    blob = MemoryBlob(DATA)
    limiter = trio.CapacityLimiter(1)
    await fetch(
        blob, ByteRange(5, 5), Gather(), settings=QUICK, limiter=limiter, counters=Counters()
    )
    assert blob.asked == []


async def test_sink_that_raises_ends_the_fetch() -> None:
    class Enough(Exception):
        pass

    def enough(size: int) -> None:
        raise Enough

    blob = MemoryBlob(DATA)
    with pytest.raises(Enough):
        await fetch_all(blob, Gather(on_advance=enough))
    assert len(blob.asked) == 1


async def test_cancelled_while_nothing_comes(server: FaultServer, blob: HttpBlob) -> None:
    go_on = threading.Event()
    server.script("/f", faults.stall(after=5000, until=go_on))
    limiter = trio.CapacityLimiter(1)
    sink = Gather()
    counters = Counters()
    settings = TransportSettings()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            lambda: fetch(
                blob,
                ByteRange(0, len(DATA)),
                sink,
                settings=settings,
                limiter=limiter,
                counters=counters,
            )
        )
        await trio.to_thread.run_sync(server.wait_count, "/f", 1)
        began_s = time.monotonic()
        nursery.cancel_scope.cancel()
    assert time.monotonic() - began_s < 5, "less than the thread's own timeout"
    had = bytes(sink.data)
    go_on.set()
    async with limiter:  # the abandoned thread gives its token back when it ends
        pass
    assert sink.data == had, "and what came for it reached nobody"
    assert counters.requests == 1
    assert counters.bytes_fetched == len(had)


async def test_cancelled_while_it_waits_for_the_limiter() -> None:
    limiter = trio.CapacityLimiter(1)
    counters = Counters()
    blob = MemoryBlob(DATA)
    async with limiter:
        with trio.move_on_after(0.01) as scope:
            await fetch(
                blob, ByteRange(0, 9), Gather(), settings=QUICK, limiter=limiter, counters=counters
            )
    assert scope.cancelled_caught
    assert (counters.requests, blob.asked) == (0, [])


async def test_waiting_for_the_limiter_is_not_silence() -> None:
    gate = Gate()
    slow, quick = MemoryBlob(DATA), MemoryBlob(DATA)
    slow.before = gate
    limiter = trio.CapacityLimiter(1)
    settings = TransportSettings(deadline_s=0.05, backoff_first_s=0.001, backoff_most_s=0.001)
    quick.cut_after = 60_000
    sink = Gather()

    async def one(blob: MemoryBlob, sink: Sink) -> None:
        await fetch(
            blob,
            ByteRange(0, len(DATA)),
            sink,
            settings=settings,
            limiter=limiter,
            counters=Counters(),
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, slow, Gather())
        await trio.to_thread.run_sync(gate.wait_entered)
        nursery.start_soon(one, quick, sink)
        await trio.sleep(0.1)  # longer than the deadline
        gate.open()
    assert sink.data == DATA


async def test_token_is_not_held_in_the_pauses(server: FaultServer, blob: HttpBlob) -> None:
    server.script("/f", faults.status(503, {"Retry-After": "30"}))
    limiter = trio.CapacityLimiter(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            lambda: fetch(
                blob,
                ByteRange(0, 10),
                Gather(),
                settings=TransportSettings(),
                limiter=limiter,
                counters=Counters(),
            )
        )
        await trio.to_thread.run_sync(server.wait_count, "/f", 1)
        with trio.fail_after(5):
            async with limiter:
                pass
        nursery.cancel_scope.cancel()


def test_sync_attempts() -> None:
    counters = Counters()
    answers = iter([TRANSIENT, TRANSIENT, None])

    def action() -> str:
        error = next(answers)
        if error is not None:
            raise error
        return "got"

    assert attempts("it", action, settings=QUICK, counters=counters) == "got"
    assert (counters.requests, counters.retries) == (3, 2)

    def never() -> str:
        raise TRANSIENT

    brief = TransportSettings(deadline_s=0.05, backoff_first_s=0.01)
    with pytest.raises(FetchError, match=r"it: gave up.*the server is away"):
        attempts("it", never, settings=brief, counters=counters)

    def refused() -> str:
        raise SourceError("no")

    with pytest.raises(SourceError, match="no"):
        attempts("it", refused, settings=QUICK, counters=counters)


def test_patience_backs_off_and_ends() -> None:
    settings = TransportSettings(deadline_s=60, backoff_first_s=0.1, backoff_most_s=3)
    patience = Patience("it", settings)
    silence_s = 0.0
    pauses: list[float] = []
    with pytest.raises(FetchError, match="gave up, 6"):
        while len(pauses) < 1000:
            pause_s = patience.pause_after(TRANSIENT, silent_s=1, progressed=False)
            assert 0 <= pause_s <= min(3, 0.1 * 2.0 ** len(pauses))
            pauses.append(pause_s)
            silence_s += 1 + pause_s
    assert 58 < silence_s <= 61


def test_patience_lasts_while_bytes_come() -> None:
    patience = Patience("it", TransportSettings(deadline_s=10, backoff_first_s=0.1))
    for _ in range(1000):
        pause_s = patience.pause_after(TRANSIENT, silent_s=9, progressed=True)
        assert pause_s <= 0.1


def test_patience_obeys_the_server_as_far_as_it_can() -> None:
    patience = Patience("it", TransportSettings(deadline_s=10))
    wish = FetchError("busy", transient=True, retry_after_s=7)
    assert patience.pause_after(wish, silent_s=0, progressed=False) == 7
    assert patience.pause_after(wish, silent_s=0, progressed=False) == pytest.approx(3)
    with pytest.raises(FetchError, match="gave up"):
        patience.pause_after(wish, silent_s=0, progressed=False)


@given(
    st.lists(
        st.tuples(st.floats(0, 30), st.booleans(), st.one_of(st.none(), st.floats(0, 3600))),
        max_size=50,
    )
)
def test_patience_never_outlives_the_deadline_by_more_than_an_attempt(
    failures: list[tuple[float, bool, float | None]],
) -> None:
    patience = Patience("it", TransportSettings(deadline_s=60))
    silence_s = 0.0
    for silent_s, progressed, wish_s in failures:
        silence_s = silent_s + (0 if progressed else silence_s)
        error = FetchError("x", transient=True, retry_after_s=wish_s)
        try:
            silence_s += patience.pause_after(error, silent_s=silent_s, progressed=progressed)
        except FetchError:
            assert silence_s >= 60 - 1e-6
            return
        assert silence_s <= 60 + 1e-6
