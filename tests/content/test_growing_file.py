"""Daemons that come, go and are stopped over one growing content: never another byte twice."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lazyfs.content.cache import Cache
from lazyfs.content.growing_file import Contradiction, GrowingFile
from lazyfs.content.incoming import make_shared
from lazyfs.content.notice import State
from lazyfs.content.served import PAGE_BYTES, Former, Served
from lazyfs.ground.errors import IntegrityError
from lazyfs.ground.ranges import ByteRange

PAGES = 6
SIZE = PAGES * PAGE_BYTES - 1000
TRUTH = os.urandom(SIZE)


def lie_at(at: int) -> bytes:
    wrong = bytearray(TRUTH)
    wrong[at] ^= 1
    return bytes(wrong)


class Daemon:
    """One daemon: what its source gives it, and what its readers have been given."""

    def __init__(self, cache: Cache, source: bytes) -> None:
        self.cache = cache
        self.source = source
        self.given: dict[int, int] = {}
        self.condemned = False
        self.stopped = False
        self.file: GrowingFile | None = None
        self.join()

    def join(self) -> None:
        before = self.file
        cradle = make_shared(self.cache, "name", lambda: False)
        assert cradle is not None
        formers = before.as_formers() if before is not None else []
        self.file = GrowingFile(cradle, self.cache.room, "it", formers)
        self.leads = False
        if before is not None:
            before.close()

    def begin_anew(self) -> None:
        assert self.file is not None
        self.file.cradle.discard()
        self.join()

    def work(self, count: int) -> None:
        """Lead if nobody does, else follow; as far as it goes now."""
        try:
            self._work(count)
        except IntegrityError:
            self.condemned = True
            self._fail()

    def _fail(self) -> None:
        assert self.file is not None
        assert self.file.cradle.notice is not None
        self.file.withdraw()
        if self.leads:
            self.file.cradle.discard()
            self.file.cradle.notice.tell(state=State.FAILED)

    def _work(self, count: int) -> None:
        file = self.file
        assert file is not None
        assert file.cradle.notice is not None
        if self.leads:
            self._decode(file, count)
            return
        news = file.cradle.notice.look()
        assert news is not None
        if news.state is State.FAILED:
            file.withdraw()
            self.begin_anew()
            return
        file.advance(news.position)
        if not file.cradle.lead():
            return
        if file.cradle.is_replaced():
            self.join()
            return
        self.leads = True
        assert file.begin()

    def _decode(self, file: GrowingFile, count: int) -> None:
        if file.cradle.is_replaced():
            self.join()
            return
        piece = self.source[file.decoded_bytes : file.decoded_bytes + count]
        try:
            if piece:
                file.append(piece)
        except Contradiction:
            self._fail()
            self.begin_anew()

    def read(self, start: int, size: int) -> None:
        if self.file is None or self.condemned:
            return
        wanted = ByteRange(start, min(SIZE, start + size))
        view = self.file.peek(wanted)
        for at, byte in enumerate(view or b"", start):
            assert self.given.setdefault(at, byte) == byte, "two bytes for one address"

    def end(self, *, kill: bool) -> None:
        assert self.file is not None
        cradle = self.file.cradle
        if kill:
            assert cradle.notice is not None
            cradle.notice.close()
            os.close(cradle.fd)
        else:
            self.file.close()
        self.file = None


class Daemons(RuleBasedStateMachine):
    """Every daemon by itself must be right, or condemned; some sources lie, at one byte."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.cache = Cache(self.directory)
        self.daemons: list[Daemon] = []
        self.all: list[Daemon] = []

    def pick(self, number: int) -> Daemon | None:
        alive = [each for each in self.daemons if not each.stopped and not each.condemned]
        return alive[number % len(alive)] if alive else None

    @precondition(lambda self: len(self.daemons) < 5)
    @rule(lie=st.none() | st.sampled_from([0, PAGE_BYTES, 3 * PAGE_BYTES + 7, SIZE - 1]))
    def come(self, lie: int | None) -> None:
        daemon = Daemon(self.cache, TRUTH if lie is None else lie_at(lie))
        self.daemons.append(daemon)
        self.all.append(daemon)

    @rule(number=st.integers(0, 4), count=st.sampled_from([1000, PAGE_BYTES, 3 * PAGE_BYTES]))
    def work(self, number: int, count: int) -> None:
        if (daemon := self.pick(number)) is not None:
            daemon.work(count)

    @rule(
        number=st.integers(0, 4),
        start=st.sampled_from([0, 10, PAGE_BYTES, 3 * PAGE_BYTES, SIZE - 5000]),
        size=st.sampled_from([1, 5000, 2 * PAGE_BYTES]),
    )
    def read(self, number: int, start: int, size: int) -> None:
        if (daemon := self.pick(number)) is not None:
            daemon.read(start, size)

    @rule(number=st.integers(0, 4), kill=st.booleans())
    def leave(self, number: int, kill: bool) -> None:
        if (daemon := self.pick(number)) is not None:
            daemon.end(kill=kill)
            self.daemons.remove(daemon)

    @rule(number=st.integers(0, 4))
    def stop(self, number: int) -> None:
        if (daemon := self.pick(number)) is not None:
            daemon.stopped = True

    @rule()
    def wake(self) -> None:
        for daemon in self.daemons:
            daemon.stopped = False

    @rule(number=st.integers(0, 4))
    def lose_patience(self, number: int) -> None:
        """Whoever follows may find that the other does not go on, rightly or not."""
        daemon = self.pick(number)
        if daemon is not None and not daemon.leads:
            daemon.begin_anew()

    @invariant()
    def nobody_is_condemned_for_nothing(self) -> None:
        if all(each.source == TRUTH for each in self.all):
            assert not any(each.condemned for each in self.all)
            for daemon in self.all:
                for at, byte in daemon.given.items():
                    assert byte == TRUTH[at]

    @invariant()
    def who_has_decoded_to_the_end_has_served_what_came(self) -> None:
        """A pass that ends has compared all that its readers were given before."""
        for daemon in self.daemons:
            file = daemon.file
            if daemon.condemned or file is None or file.decoded_bytes < SIZE:
                continue
            assert all(byte == daemon.source[at] for at, byte in daemon.given.items())

    def teardown(self) -> None:
        for daemon in self.daemons:
            daemon.end(kill=False)
        shutil.rmtree(self.directory)


TestDaemons = Daemons.TestCase
TestDaemons.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_was_served_is_noted_by_pages() -> None:
    served, other = Served(), Served()
    served.note(ByteRange(PAGE_BYTES - 1, PAGE_BYTES + 1))
    assert [served.has(page * PAGE_BYTES) for page in range(3)] == [True, True, False]
    other.note(ByteRange(5 * PAGE_BYTES, 5 * PAGE_BYTES + 1))
    served.add(other)
    assert served.stop == 5 * PAGE_BYTES + 1
    assert [served.has(page * PAGE_BYTES) for page in range(7)] == [
        True, True, False, False, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("trusted", [True, False])
def test_what_was_not_served_binds_only_while_it_may_be(trusted: bool) -> None:
    served = Served()
    served.note(ByteRange(0, 1))
    former = Former(memoryview(TRUTH), SIZE, served, trusted)
    former.compare(0, TRUTH, "it")
    former.compare(10, TRUTH[10:], "it")
    former.check_size(SIZE, "it")
    late = lie_at(SIZE - 1)
    if trusted:
        with pytest.raises(IntegrityError):
            former.compare(0, late, "it")
        with pytest.raises(IntegrityError):
            former.check_size(SIZE - 1, "it")
    else:
        former.compare(0, late, "it")
        former.check_size(1, "it")
    with pytest.raises(IntegrityError):
        former.compare(0, lie_at(0), "it")
    with pytest.raises(IntegrityError):
        former.check_size(0, "it")
