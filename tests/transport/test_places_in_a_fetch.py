"""A fetch that has several places to ask, or a slow one: nothing is lost, nothing repeated."""

import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import trio
from msgspec.structs import replace

from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import FetchError, IntegrityError, OddAnswer, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.answers import Question
from lazyfs.transport.blob import Blob, Sink
from lazyfs.transport.client import HttpClient
from lazyfs.transport.httpblob import HttpBlob
from lazyfs.transport.place import Health, PlaceLied
from lazyfs.transport.retry import Fetcher
from tests import faults
from tests.blobs import Gate, Hang, MemoryBlob, Mirrored
from tests.faults import FaultServer
from tests.transport.gather import QUICK, Gather
from tests.transport.test_place import known

DATA = random.Random(1).randbytes(100_000)
WHOLE = ByteRange(0, len(DATA))
RESET = FetchError("reset", transient=True)
SLEEPY = replace(QUICK, backoff_first_s=60.0, backoff_most_s=60.0, deadline_s=600.0)
"""Whoever pauses does not come back within a test."""


async def fetch(
    fetcher: Fetcher, blob: Blob, sink: Sink, *, urgent: bool = False, tokens: int = 4
) -> None:
    limiter = trio.CapacityLimiter(tokens)
    await fetcher.fetch(blob, WHOLE, sink, limiter=limiter, urgent=urgent, why="demand")


def failing(*errors: Exception) -> MemoryBlob:
    """Return a blob whose first attempts fail so."""
    left = list(errors)

    def before(_: ByteRange) -> None:
        if left:
            raise left.pop(0)

    blob = MemoryBlob(DATA)
    blob.before = before
    return blob


async def wait_threads(fetcher: Fetcher) -> None:
    """Wait until no thread is at work, given up or not."""
    with trio.fail_after(20):
        while fetcher.threads:  # noqa: ASYNC110 - threads tell nobody
            await trio.sleep(0.005)


async def test_another_place_goes_on_where_the_first_ended() -> None:
    first, second = MemoryBlob(DATA, "first"), MemoryBlob(DATA, "second")
    first.cut_after = 64 * 1024
    sink, counters = Gather(), Counters()
    blob = Mirrored(first, second)
    with trio.fail_after(10):
        await fetch(Fetcher(SLEEPY, counters), blob, sink)
    assert sink.data == DATA
    assert second.asked == [ByteRange(66_000, len(DATA))], "after 66 rooms of 1000 bytes"
    assert (counters.requests, counters.retries) == (2, 1)
    assert blob.all[0].health.rests
    assert blob.places()[0].blob is second


async def test_a_mirror_need_not_have_it() -> None:
    absent, forbidden = failing(SourceError("404")), failing(SourceError("403"))
    sink = Gather()
    with trio.fail_after(10):
        await fetch(
            Fetcher(SLEEPY, Counters()), Mirrored(absent, forbidden, MemoryBlob(DATA)), sink
        )
    assert sink.data == DATA


async def test_what_is_nowhere_to_be_had_is_told_of_each_place() -> None:
    first, second = failing(SourceError("404 there")), failing(SourceError("403 here"))
    first.name, second.name = "mirror.example", "registry.example"
    with pytest.raises(SourceError) as caught:
        await fetch(Fetcher(SLEEPY, Counters()), Mirrored(first, second), Gather())
    assert not isinstance(caught.value, FetchError)
    assert str(caught.value) == (
        "the blob is to be had nowhere: mirror.example: 404 there; registry.example: 403 here"
    )


async def test_giving_up_tells_of_each_place() -> None:
    settings = replace(QUICK, deadline_s=0.1)
    first, second = failing(*[RESET] * 999), failing(*[FetchError("503", transient=True)] * 999)
    first.name, second.name = "mirror.example", "registry.example"
    with pytest.raises(
        FetchError, match=r"gave up.*mirror.example: reset; registry.example: 503"
    ) as caught:
        await fetch(Fetcher(settings, Counters()), Mirrored(first, second), Gather())
    assert "\n" not in str(caught.value)


async def test_the_only_place_that_may_have_it_is_waited_for() -> None:
    absent, away = failing(SourceError("404")), failing(RESET, RESET, RESET)
    sink = Gather()
    await fetch(Fetcher(QUICK, Counters()), Mirrored(absent, away), sink)
    assert sink.data == DATA
    assert len(absent.asked) == 1


async def test_a_mangled_answer_is_asked_for_anew_but_not_for_ever() -> None:
    odd = [OddAnswer("another range")] * 9
    sink, blob = Gather(), failing(*odd[:2])
    await fetch(Fetcher(QUICK, Counters()), blob, sink)
    assert sink.data == DATA
    blob = failing(*odd)
    with pytest.raises(OddAnswer):
        await fetch(Fetcher(QUICK, Counters()), blob, Gather())
    assert len(blob.asked) == 3


async def test_wrong_bytes_are_blamed_on_the_place_that_gave_them() -> None:
    def refuse(size: int) -> None:
        if size > 50_000:
            raise IntegrityError("chunk 3 does not match its digest")

    counters = Counters()
    fetcher = Fetcher(QUICK, counters)
    blob = Mirrored(MemoryBlob(DATA, "liar"), MemoryBlob(DATA, "other"))
    with pytest.raises(PlaceLied, match="chunk 3 does not match") as caught:
        await fetch(fetcher, blob, Gather(on_advance=refuse))
    assert caught.value.place == "liar"
    assert [each.health.name for each in blob.places()] == ["other"]
    with pytest.raises(IntegrityError, match="chunk 3") as last:
        await fetch(fetcher, blob, Gather(on_advance=refuse))
    assert not isinstance(last.value, PlaceLied), "nobody else is left"
    assert counters.places_refused == 2
    with pytest.raises(IntegrityError, match="chunk 3"):
        blob.places()


async def test_a_sole_place_is_not_another_place() -> None:
    def refuse(_: int) -> None:
        raise IntegrityError("wrong")

    counters = Counters()
    with pytest.raises(IntegrityError) as caught:
        await fetch(Fetcher(QUICK, counters), MemoryBlob(DATA), Gather(on_advance=refuse))
    assert type(caught.value) is IntegrityError
    assert counters.places_refused == 0


async def test_an_attempt_that_is_silent_for_too_long_is_left() -> None:
    settings = replace(SLEEPY, stall_timeout_s=0.05)
    hang = Hang()
    stuck = MemoryBlob(DATA, "stuck", known())
    stuck.before = hang
    sink, counters = Gather(), Counters()
    fetcher = Fetcher(settings, counters)
    with trio.fail_after(10):
        await fetch(fetcher, Mirrored(stuck, MemoryBlob(DATA, "other", known())), sink)
    assert sink.data == DATA
    assert counters.stalls == 1
    await wait_threads(fetcher)
    assert hang.woken == 1, "its thread does not block for ever"


async def test_a_place_that_became_slow_is_given_more_time() -> None:
    """Nobody would ever be told of a source whose every answer takes longer than it used to."""
    settings = replace(QUICK, stall_timeout_s=30.0)
    blob = MemoryBlob(DATA, "slow", known(first_byte_s=0.01))

    def slowly(_: ByteRange) -> None:
        time.sleep(1.5)

    blob.before = slowly
    sink, counters = Gather(), Counters()
    fetcher = Fetcher(settings, counters)
    with trio.fail_after(30):
        await fetch(fetcher, blob, sink)
    assert sink.data == DATA
    assert 1 <= counters.stalls <= 3
    await wait_threads(fetcher)


async def test_time_that_the_sink_takes_is_not_silence() -> None:
    settings = replace(QUICK, stall_timeout_s=0.25)

    def slowly(size: int) -> None:
        if size == 10_000:
            time.sleep(0.8)

    sink, counters = Gather(on_advance=slowly), Counters()
    await fetch(Fetcher(settings, counters), MemoryBlob(DATA, "quick", known()), sink)
    assert sink.data == DATA
    assert (counters.stalls, counters.requests) == (0, 1)


async def test_time_in_which_we_were_stopped_is_not_silence() -> None:
    gate = Gate()
    late = MemoryBlob(DATA, "late", known())
    late.before = gate
    sink, counters = Gather(), Counters()
    fetcher = Fetcher(replace(QUICK, stall_timeout_s=0.3), counters)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, fetcher, late, sink)
        await trio.to_thread.run_sync(gate.wait_entered)
        time.sleep(0.9)  # noqa: ASYNC251 - as SIGSTOP would
        gate.open()
    assert sink.data == DATA
    assert (counters.stalls, counters.requests) == (0, 1)


async def test_threads_that_cannot_be_woken_do_not_become_too_many() -> None:
    gate = Gate()
    stuck = MemoryBlob(DATA, "stuck", known())
    stuck.before = gate
    settings = replace(
        QUICK, stall_timeout_s=0.001, backoff_first_s=0.0, backoff_most_s=0.0, deadline_s=600.0
    )
    fetcher = Fetcher(settings, Counters())
    most = 0
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(fetch, fetcher, stuck, Gather())
        with trio.fail_after(60):
            while fetcher.threads < 128:  # noqa: ASYNC110
                await trio.sleep(0.01)
        for _ in range(20):
            most = max(most, fetcher.threads)
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert most == 128
    gate.open()
    await wait_threads(fetcher)


async def test_a_slow_answer_is_asked_for_twice_and_the_first_to_have_bytes_goes_on() -> None:
    hang = Hang()
    slow, quick = MemoryBlob(DATA, "slow", known()), MemoryBlob(DATA, "quick", known())
    slow.before = hang
    sink, counters = Gather(), Counters()
    fetcher = Fetcher(SLEEPY, counters)
    with trio.fail_after(10):
        await fetch(fetcher, Mirrored(slow, quick), sink, urgent=True)
    assert sink.data == DATA
    assert (counters.hedges, counters.hedges_won, counters.stalls) == (1, 1, 0)
    assert counters.bytes_fetched == len(DATA)
    await wait_threads(fetcher)
    assert hang.woken == 1


async def test_the_first_answer_goes_on_if_it_has_bytes_first() -> None:
    slow, slower = MemoryBlob(DATA, "slow", known()), MemoryBlob(DATA, "slower", known())
    hang, go_on = Hang(), threading.Event()
    slower.before = hang

    def wait(_: ByteRange) -> None:
        assert go_on.wait(20)

    slow.before = wait
    sink, counters = Gather(), Counters()
    fetcher = Fetcher(SLEEPY, counters)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: fetch(fetcher, Mirrored(slow, slower), sink, urgent=True))
        with trio.fail_after(10):
            while not hang.entered:  # noqa: ASYNC110
                await trio.sleep(0.005)
        go_on.set()
    assert sink.data == DATA
    assert (counters.hedges, counters.hedges_won) == (1, 0)
    await wait_threads(fetcher)
    assert hang.woken == 1


async def test_of_two_attempts_one_may_fail() -> None:
    slow, broken = MemoryBlob(DATA, "slow", known()), failing(RESET)
    broken.health = known("broken")
    asked = threading.Event()

    def wait_for_the_other(_: ByteRange) -> None:
        while not broken.asked:
            asked.wait(0.002)
        asked.wait(0.05)

    slow.before = wait_for_the_other
    sink, counters = Gather(), Counters()
    fetcher = Fetcher(SLEEPY, counters)
    with trio.fail_after(10):
        await fetch(fetcher, Mirrored(slow, broken), sink, urgent=True)
    assert sink.data == DATA
    assert (counters.hedges, counters.hedges_won, counters.retries) == (1, 0, 0)


@pytest.mark.parametrize(
    ("urgent", "tokens", "failed"), [(False, 4, False), (True, 1, False), (True, 4, True)]
)
async def test_who_is_not_asked_twice(urgent: bool, tokens: int, failed: bool) -> None:
    """Background work; where no connection is free; a place that fails."""
    slow = MemoryBlob(DATA, "slow", known())
    if failed:
        assert slow.health is not None
        slow.health.failed(RESET)
    gate = Gate()
    slow.before = gate
    sink, counters = Gather(), Counters()
    fetcher = Fetcher(SLEEPY, counters)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: fetch(fetcher, slow, sink, urgent=urgent, tokens=tokens))
        await trio.to_thread.run_sync(gate.wait_entered)
        await trio.sleep(0.15)
        gate.open()
    assert sink.data == DATA
    assert (counters.hedges, counters.requests) == (0, 1)


async def test_a_source_that_is_slow_all_over_is_hardly_asked_twice() -> None:
    counters = Counters()
    fetcher = Fetcher(QUICK, counters)
    blob = MemoryBlob(DATA, "slow")

    def slowly(_: ByteRange) -> None:
        time.sleep(0.08)

    blob.before = slowly
    limiter = trio.CapacityLimiter(50)

    async def one() -> None:
        blob.health = known()  # as if it had not been noticed yet
        await fetcher.fetch(blob, ByteRange(0, 10), Gather(), limiter=limiter, urgent=True)

    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(one)
    assert 1 <= counters.hedges <= 5 + 4


async def test_who_may_not_ask_twice_any_more_holds_no_connection_for_it() -> None:
    counters = Counters()
    fetcher = Fetcher(SLEEPY, counters)
    limiter = trio.CapacityLimiter(100)
    gate = Gate()
    blob = MemoryBlob(DATA, "slow", known())
    blob.before = gate
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            sink = Gather()
            job = partial(fetcher.fetch, blob, WHOLE, sink, limiter=limiter, urgent=True)
            nursery.start_soon(job)
        with trio.fail_after(10):
            while counters.hedges < 5:  # noqa: ASYNC110
                await trio.sleep(0.01)
        await trio.sleep(0.2)
        assert (counters.hedges, limiter.borrowed_tokens) == (5, 15)
        gate.open()


async def test_who_waits_for_what_is_told() -> None:
    gate = Gate()
    stuck = MemoryBlob(DATA, "registry.example/app@sha256:12", Health("registry.example"))
    stuck.before = gate
    fetcher = Fetcher(SLEEPY, Counters())
    failing_first = failing(RESET)
    failing_first.name = "other"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, fetcher, stuck, Gather())
        nursery.start_soon(fetch, fetcher, failing_first, Gather())
        await trio.to_thread.run_sync(gate.wait_entered)
        assert all(each.since_s >= 0.2 for each in fetcher.waiting()), "who has waited for long"
        await trio.sleep(0.25)
        told = {each.blob: each for each in fetcher.waiting()}
        assert set(told) == {stuck.name, "other"}
        one = told[stuck.name]
        assert (one.byte_range, one.why, one.attempts) == (WHOLE, "demand", 1)
        assert (one.place, one.received_bytes, one.last_error) == ("registry.example", 0, None)
        assert one.since_s >= one.silent_s >= 0.2
        assert told["other"].last_error == "reset"
        nursery.cancel_scope.cancel()
    assert fetcher.waiting() == []
    gate.open()


@contextmanager
def served(server: FaultServer, settings: TransportSettings) -> Iterator[HttpBlob]:
    client = HttpClient(settings)
    question = Question("the blob", "the host", "log in")
    blob = HttpBlob(client, f"{server.url}/f", question=question, size_bytes=len(DATA))
    yield blob
    client.close()


@pytest.mark.parametrize("after", [None, 5000])
async def test_a_thread_that_waits_for_a_socket_is_woken(after: int | None) -> None:
    """Before the answer's first byte, and in its middle: long before the transport's timeout."""
    settings = replace(QUICK, stall_timeout_s=600.0)
    with FaultServer() as server, served(server, settings) as blob:
        server.add_file("/f", DATA)
        fetcher = Fetcher(settings, Counters())
        await fetch(fetcher, blob, Gather())  # a warm connection
        server.script("/f", faults.stall(after=after))
        sink = Gather()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, fetcher, blob, sink)
            await trio.to_thread.run_sync(server.wait_count, "/f", 2)
            nursery.cancel_scope.cancel()
        had = bytes(sink.data)
        await wait_threads(fetcher)
        assert sink.data == had == DATA[: len(had)]
        again = Gather()
        await fetch(fetcher, blob, again)
        assert again.data == DATA


async def test_a_stalled_answer_is_gone_on_with_on_another_connection() -> None:
    settings = replace(QUICK, stall_timeout_s=600.0)
    with FaultServer() as server, served(server, settings) as blob:
        server.add_file("/f", DATA)
        for _ in range(10):
            blob.health.answered(0.01)
        server.script("/f", faults.stall(after=5000))
        sink, counters = Gather(), Counters()
        fetcher = Fetcher(settings, counters)
        with trio.fail_after(30):
            await fetch(fetcher, blob, sink)
        assert sink.data == DATA
        assert counters.stalls == 1
        assert counters.bytes_fetched == len(DATA), "no byte was used twice"
        await wait_threads(fetcher)


async def test_a_redirect_that_leads_to_silence_is_asked_for_anew() -> None:
    settings = replace(QUICK, stall_timeout_s=600.0)
    with FaultServer() as server, served(server, settings) as blob:
        server.add_file("/store", DATA)
        server.always("/f", faults.redirect(f"{server.url}/store"))
        fetcher = Fetcher(settings, Counters())
        for _ in range(10):
            await fetch(fetcher, blob, Gather())
        assert server.count("/f") == 1, "where it leads to is remembered"
        server.script("/store", faults.stall())
        sink = Gather()
        with trio.fail_after(30):
            await fetch(fetcher, blob, sink)
        assert sink.data == DATA
        assert server.count("/f") == 2


async def test_failing_over_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    first = failing(RESET)
    first.name = "mirror.example"
    with caplog.at_level(logging.INFO, "lazyfs"):
        await fetch(
            Fetcher(SLEEPY, Counters()), Mirrored(first, MemoryBlob(DATA, "primary")), Gather()
        )
    assert "going on at primary: reset" in caplog.messages
