"""Ranges that are received before anybody asks: given once, and never in the way."""

import random
import threading
from collections.abc import Iterator

import pytest

from lazyfs.ground.errors import FetchError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.answers import Question
from lazyfs.transport.begun import BeginsRanges, Begun, result_of
from lazyfs.transport.blob import Sink
from lazyfs.transport.client import HttpClient
from lazyfs.transport.httpblob import HttpBlob
from tests import faults
from tests.faults import FaultServer
from tests.transport.gather import QUICK, Gather, read

DATA = random.Random(11).randbytes(100_000)
LONG_S = 30.0


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def blob(server: FaultServer) -> Iterator[HttpBlob]:
    client = HttpClient(QUICK)
    url = server.add_file("/f", DATA)
    yield HttpBlob(
        client, url, question=Question("the blob", "the host", "log in"), size_bytes=len(DATA)
    )
    client.close()


def test_a_range_that_was_begun_is_given_without_a_request(
    server: FaultServer, blob: HttpBlob
) -> None:
    assert isinstance(blob, BeginsRanges)
    assert result_of(blob.begin(ByteRange(0, 50_000)), LONG_S) == DATA[:50_000]
    assert read(blob, 0, 20_000) == DATA[:20_000]
    assert read(blob, 20_000, 50_000) == DATA[20_000:50_000]
    assert len(server.seen) == 1
    assert read(blob, 0, 50_000) == DATA[:50_000], "each byte is given once"
    assert len(server.seen) == 2


def test_what_lies_beside_a_begun_range_is_asked_for(server: FaultServer, blob: HttpBlob) -> None:
    result_of(blob.begin(ByteRange(1000, 2000)), LONG_S)
    for start, stop in ((0, 1001), (1999, 2001), (5000, 6000)):
        assert read(blob, start, stop) == DATA[start:stop]
    assert len(server.seen) == 4


@pytest.mark.parametrize("fault", [faults.status(503), faults.reset()])
def test_a_range_that_failed_is_asked_for_as_ever(
    server: FaultServer, blob: HttpBlob, fault: faults.Fault
) -> None:
    server.script("/f", fault)
    assert result_of(blob.begin(ByteRange(0, 1000)), LONG_S) is None
    assert read(blob, 0, 1000) == DATA[:1000]


def test_who_asks_too_soon_waits_and_asks_when_it_takes_too_long() -> None:
    begun, gate = Begun(), threading.Event()

    def ask(byte_range: ByteRange, sink: Sink) -> None:
        gate.wait(LONG_S)
        sink.space()[:10] = DATA[:10]
        sink.advance(10)

    try:
        begun.begin(ByteRange(0, 10), ask)
        assert not begun.give(ByteRange(0, 5), Gather(), most_s=0.01)
        opener = threading.Timer(0.05, gate.set)
        opener.start()
        sink = Gather()
        assert begun.give(ByteRange(5, 10), sink, most_s=LONG_S)
        assert bytes(sink.data) == DATA[5:10]
        opener.join()
    finally:
        gate.set()


def test_the_error_of_a_range_is_told_to_nobody() -> None:
    begun = Begun()

    def ask(byte_range: ByteRange, sink: Sink) -> None:
        raise FetchError("away", transient=True)

    begun.begin(ByteRange(0, 10), ask)
    assert not begun.give(ByteRange(0, 10), Gather(), most_s=LONG_S)
    assert not begun.give(ByteRange(0, 10), Gather(), most_s=LONG_S)
