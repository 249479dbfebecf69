"""Daemons that come, go and are stopped over one growing content: never another byte twice."""

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lazyfs.content.cache import Cache
from lazyfs.content.growing_file import Contradiction, GrowingFile
from lazyfs.content.incoming import make_shared
from lazyfs.content.notice import State
from lazyfs.content.served import PAGE_BYTES, Former, Served
from lazyfs.ground.errors import IntegrityError
from lazyfs.ground.ranges import ByteRange

PAGES = 6
SIZE = PAGES * PAGE_BYTES - 1000
TRUTH = random.Random(1).randbytes(SIZE)
LIES = [0, PAGE_BYTES, 3 * PAGE_BYTES + 7, SIZE - 1]


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
        self.proven = False
        self.file: GrowingFile | None = None
        self.join()

    def join(self) -> None:
        before = self.file
        cradle = make_shared(self.cache, "name", lambda: False)
        assert cradle is not None
        formers = before.as_formers() if before is not None else []
        self.file = GrowingFile(cradle, self.cache, "it", formers)
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
        if self.proven:
            return
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
        if news.state is State.WHOLE:
            self.proven = True
            return
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
            file.append(piece)
            if file.decoded_bytes == len(self.source):
                self._end(file)
        except Contradiction:
            self._fail()
            self.begin_anew()

    def _end(self, file: GrowingFile) -> None:
        """See whether the blob matches its digest."""
        file.finish()
        if self.source != TRUTH:
            raise IntegrityError("it does not match its digest")
        assert file.cradle.notice is not None
        file.cradle.notice.tell(state=State.WHOLE)
        self.proven = True

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
        alive = [each for each in self.daemons if not each.condemned]
        return alive[number % len(alive)] if alive else None

    @initialize(lies=st.lists(st.none() | st.sampled_from(LIES), min_size=2, max_size=3))
    def begin(self, lies: list[int | None]) -> None:
        """One decodes, the others follow."""
        for lie in lies:
            self.come(lie)

    @precondition(lambda self: len(self.daemons) < 4)
    @rule(lie=st.none() | st.sampled_from(LIES))
    def come(self, lie: int | None) -> None:
        daemon = Daemon(self.cache, TRUTH if lie is None else lie_at(lie))
        self.daemons.append(daemon)
        self.all.append(daemon)
        daemon.work(0)

    @rule(number=st.integers(0, 3), count=st.sampled_from([1000, 4 * PAGE_BYTES]))
    def work(self, number: int, count: int) -> None:
        if (daemon := self.pick(number)) is not None:
            daemon.work(count)

    @rule(number=st.integers(0, 3), start=st.sampled_from([*LIES, 10]), size=st.integers(1, 9))
    def read(self, number: int, start: int, size: int) -> None:
        """A reader first looks how far it is."""
        if (daemon := self.pick(number)) is not None:
            if not daemon.leads:
                daemon.work(0)
            daemon.read(start, size)

    @precondition(lambda self: len(self.daemons) > 1)
    @rule(number=st.integers(0, 3), kill=st.booleans())
    def leave(self, number: int, kill: bool) -> None:
        if (daemon := self.pick(number)) is not None:
            daemon.end(kill=kill)
            self.daemons.remove(daemon)

    @rule(number=st.integers(0, 3))
    def lose_patience(self, number: int) -> None:
        """Whoever follows may find that the other does not go on, rightly or not."""
        daemon = self.pick(number)
        if daemon is not None and not daemon.leads and not daemon.proven:
            daemon.begin_anew()

    @invariant()
    def nobody_is_condemned_for_nothing(self) -> None:
        """Only who was fed wrong bytes, or has served some."""
        for daemon in self.all:
            wrong = any(byte != TRUTH[at] for at, byte in daemon.given.items())
            if daemon.condemned:
                assert wrong or daemon.source != TRUTH or self.lies_near(daemon)
            elif all(each.source == TRUTH for each in self.all):
                assert not wrong

    def lies_near(self, daemon: Daemon) -> bool:
        """Whether somebody lies within a page of which the daemon has served something else."""
        pages = {at // PAGE_BYTES for at in daemon.given}
        lies = {at for at in LIES if any(each.source[at] != TRUTH[at] for each in self.all)}
        return any(at // PAGE_BYTES in pages for at in lies)

    @invariant()
    def who_is_proven_has_served_the_truth(self) -> None:
        for daemon in self.daemons:
            if daemon.proven and not daemon.condemned:
                assert all(byte == TRUTH[at] for at, byte in daemon.given.items())

    def teardown(self) -> None:
        """All come to an end: proven, or condemned."""
        for _ in range(60):
            for daemon in self.daemons:
                if not daemon.condemned:
                    daemon.work(SIZE)
        for daemon in self.daemons:
            assert daemon.proven or daemon.condemned
        self.nobody_is_condemned_for_nothing()
        self.who_is_proven_has_served_the_truth()
        for daemon in self.daemons:
            daemon.end(kill=False)
        shutil.rmtree(self.directory)


TestDaemons = Daemons.TestCase
TestDaemons.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)


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
def test_what_was_not_served_binds_nobody(trusted: bool) -> None:
    served = Served()
    served.note(ByteRange(0, 1))
    former = Former(memoryview(TRUTH), SIZE, served, trusted=trusted)
    former.compare(0, TRUTH, "it")
    former.compare(10, TRUTH[10:], "it")
    former.check_size(SIZE, "it")
    late = ByteRange(SIZE - 1, SIZE)
    assert former.peek(late) == (TRUTH[-1:] if trusted else None)
    assert former.peek(ByteRange(0, SIZE + 1)) is None
    if trusted:  # and so it has been served
        with pytest.raises(IntegrityError):
            former.compare(0, lie_at(SIZE - 1), "it")
        with pytest.raises(IntegrityError):
            former.check_size(SIZE - 1, "it")
    else:
        former.compare(0, lie_at(SIZE - 1), "it")
        former.check_size(1, "it")
    with pytest.raises(IntegrityError):
        former.compare(0, lie_at(0), "it")
    with pytest.raises(IntegrityError):
        former.check_size(0, "it")


def test_what_differs_is_not_served_any_more() -> None:
    former = Former(memoryview(TRUTH), SIZE, Served(), trusted=True)
    former.compare(0, lie_at(0), "it")
    assert former.peek(ByteRange(5, 6)) is None
