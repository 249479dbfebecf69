"""One task whose memory is still coming: its faults, and what is sent before it asks.

What keeps this right: the kernel refuses to fill memory (EAGAIN) from the moment it is moved,
dropped or copied by fork(2) until its message of that has been read. So whatever is filled must
be looked up in `_missing` after the last read of messages, with no checkpoint in between; and of
messages that were read together the faults come last. Both are the case since all of this runs on
the trio thread, and `_missing` is asked anew after every `await`.

A thread of the task waits until its message has been read, so messages that are read together are
of different threads, and their order says little: the kernel lets go of the task's memory before
it queues them. So what is unmapped is forgotten last: a child that was made at the same time may
have it still, and what has been moved there is what came after it. And mremap(2) tells twice: that
memory has moved, and, once that has been read, that there is none where it was; by then another
thread may have moved its own there.

Source: Linux, fs/userfaultfd.c (mmap_changing), mm/mremap.c (the order of its messages); CRIU,
criu/uffd.c (handle_page_fault, handle_remove, handle_remap, handle_fork, uffd_check_op_error).
"""

import logging
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum

import trio

from lazyfs.content.lanes import Lane
from lazyfs.ground.data import Data
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.settings import KIB, MIB
from lazyfs.lazypages.counts import Counts
from lazyfs.lazypages.missing import Missing, Range
from lazyfs.lazypages.pages import LazyMemory
from lazyfs.lazypages.protocol import (
    Fault,
    Forked,
    Moved,
    Unmapped,
    Zeroed,
    parse_messages,
)
from lazyfs.lazypages.uffd import Copied, Outcome, Userfaultfd

log = logging.getLogger(__name__)

_PAGE = mmap.PAGESIZE
_LEAST_WINDOW_BYTES = max(64 * KIB, _PAGE)
_FIRST_WINDOW_BYTES = 512 * KIB
_MOST_WINDOW_BYTES = 2 * MIB
_BEFORE_BYTES = _LEAST_WINDOW_BYTES
_MOST_ZEROS_BYTES = MIB
_STEP_BYTES = MIB
"""What is sent in the background at a time: a fault waits for the rest of it, 0.3 ms."""
_LEFT_MOST = 64
"""Moves that are remembered until the rest of them is told; of MREMAP_DONTUNMAP it never is."""
_SETTLE_S = 0.0003
_SETTLE_MOST_S = 0.02
"""A task that is frozen in the middle of mremap(2) or fork(2) keeps it busy for as long."""
_NOT_YET_S = 0.002
"""Until CRIU may have registered more memory."""


class _Served(Enum):
    YES = "yes"
    BUSY = "busy"
    """The kernel wants its messages to be read first."""
    ABSENT = "absent"
    """Its bytes are not here."""


class Task:
    """A task; `run` it. Its descriptor is open until nothing is missing, or nobody is left."""

    def __init__(
        self,
        name: str,
        uffd: Userfaultfd,
        lazy: LazyMemory,
        missing: Missing,
        counts: Counts,
        on_fork: Callable[["Task", int], None],
    ) -> None:
        """`on_fork` is told of a child: its parent, and its descriptor. It must not raise."""
        self.name = name
        self.uffd = uffd
        self.lazy = lazy
        self._missing = missing
        self._counts = counts
        self._on_fork = on_fork
        self._may_end = False
        self._gone = False
        """Nothing more can be filled, or need be."""
        self._window_bytes = _FIRST_WINDOW_BYTES
        self._near = range(0)
        self._zeros_bytes = _PAGE
        self._zeros_end = 0
        self._settle_s = _SETTLE_S
        self._cursor = 0
        self._left: deque[tuple[Unmapped, list[tuple[int, int]]]] = deque(maxlen=_LEFT_MOST)
        """What will be told to be unmapped since it has moved, and what has moved there since."""
        self._bringing: set[int] = set()
        self._nursery: trio.Nursery | None = None

    @property
    def missing_bytes(self) -> int:
        """How much has still to come; 0 when nobody is left to want it."""
        return 0 if self._gone else self._missing.size_bytes

    @property
    def is_over(self) -> bool:
        """Whether its descriptor has been closed, since nothing more is to be done."""
        return self.uffd.descriptor < 0

    def missing(self) -> Missing:
        """Return a copy of what is missing, for a child."""
        return self._missing.copy()

    def may_end(self) -> None:
        """All is set up: once nothing is missing, the kernel can have it."""
        self._may_end = True
        self._end_if_done()

    async def run(self) -> None:
        """Serve faults until the task has all of its memory, or has ended.

        Raises:
            LazyfsError: a page cannot be had. The descriptor stays open: see to the task's end.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                while not self.is_over:
                    await trio.lowlevel.wait_readable(self.uffd.descriptor)
                    self.hear()
            except trio.ClosedResourceError:  # by who saw, elsewhere, that it is over
                nursery.cancel_scope.cancel()

    def note_exit(self) -> None:
        """The process has ended; its memory, if nobody else runs in it."""
        if not self.is_over and not self.uffd.is_alive():
            self._gone = True
            self._end_if_done()

    def hear(self) -> None:
        """Read messages, if there are any, apply them, and serve the faults among them."""
        if self.is_over:
            return
        began_s = time.monotonic()
        faults: list[int] = []
        moved: list[tuple[int, int]] = []
        unmapped: list[Unmapped] = []
        for event in list(parse_messages(self.uffd.read())):
            if isinstance(event, Fault):
                faults.append(event.address & -_PAGE)
            elif isinstance(event, Forked):
                self._on_fork(self, event.descriptor)
            elif isinstance(event, Moved):
                self._missing.move(*event)
                moved.append((event.to, event.to + event.length))
                for left, since in self._left:
                    if event.to < left.stop and left.start < event.to + event.length:
                        since.append(moved[-1])
                self._left.append((Unmapped(event.source, event.source + event.length), []))
            elif isinstance(event, Zeroed):
                self._missing.drop(*event)
            else:
                unmapped.append(event)
        for each in unmapped:
            for start, stop in _without(each, moved + self._moved_after(each)):
                self._missing.drop(start, stop)
        for page in faults:
            if self._gone:
                break
            self._counts.faults += 1
            if self._serve(page) is _Served.YES:
                self._counts.note_served(time.monotonic() - began_s)
            elif page not in self._bringing and self._nursery is not None:
                self._bringing.add(page)
                self._nursery.start_soon(self._bring, page, began_s)
        self._end_if_done()

    def _moved_after(self, unmapped: Unmapped) -> list[tuple[int, int]]:
        """Return what has moved since this was unmapped, where a move has already told of that."""
        for number, (left, since) in enumerate(self._left):
            if left == unmapped:
                del self._left[number]
                return since
        return []

    # -- faults -----------------------------------------------------------------------------

    def _serve(self, page: int) -> _Served:
        """Fill a page, and what lies around it, if its bytes are here."""
        while not self._gone:
            found = self._missing.at(page)
            if found is None:
                return self._serve_zeros(page)
            window = self._window(found, page)
            if window is None:
                return _Served.ABSENT
            start, datas = window
            before_bytes = self._missing.size_bytes
            outcome = self._fill_all(start, datas)
            self._counts.bytes_faulted += before_bytes - self._missing.size_bytes
            if outcome is Outcome.UNMAPPED:
                outcome = self._fill_one(found, page)
            if outcome is Outcome.BUSY:
                return _Served.BUSY
        return _Served.YES

    def _serve_zeros(self, page: int) -> _Served:
        """Fill a page that the checkpoint has nothing for, and more if that goes on."""
        self._zeros_bytes = (
            min(2 * self._zeros_bytes, _MOST_ZEROS_BYTES) if page == self._zeros_end else _PAGE
        )
        after = self._missing.after(page)
        stop = (
            page + self._zeros_bytes
            if after is None
            else min(page + self._zeros_bytes, after.start)
        )
        result = self._check(self.uffd.zero(page, stop - page))
        if result.outcome is Outcome.UNMAPPED and stop - page > _PAGE:
            result = self._check(self.uffd.zero(page, _PAGE))
        if result.size_bytes:
            self._counts.faults_zero += 1
            self._zeros_end = page + result.size_bytes
        elif result.outcome is Outcome.BUSY:
            return _Served.BUSY
        elif not self._gone:
            self.uffd.wake(page, _PAGE)
        return _Served.YES

    def _window(self, found: Range, page: int) -> tuple[int, list[Data]] | None:
        """Return where to begin, and the bytes: as many around a page as are here."""
        if page in self._near:
            self._window_bytes = min(2 * self._window_bytes, _MOST_WINDOW_BYTES)
        else:
            self._window_bytes = max(self._window_bytes // 2, _LEAST_WINDOW_BYTES)
        size_bytes = self._window_bytes
        while True:
            start = max(found.start, page & -min(size_bytes, _BEFORE_BYTES))
            stop = min(found.stop, start + size_bytes)
            datas = self._peek(found.origin + start - found.start, stop - start)
            if datas is not None:
                self._near = range(start - size_bytes, stop + size_bytes)
                return start, datas
            if size_bytes <= _PAGE:
                return None
            size_bytes = max(size_bytes // 4, _PAGE)

    def _peek(self, origin: int, size_bytes: int) -> list[Data] | None:
        datas: list[Data] = []
        for place in self.lazy.memory.places(origin, origin + size_bytes):
            data = self.lazy.files[place.level].peek(place.offset, place.size_bytes)
            if data is None:
                return None
            datas.append(data)
        return datas

    async def _bring(self, page: int, began_s: float) -> None:
        """Fetch what a fault waits for, and fill it in."""
        try:
            while (served := self._serve(page)) is not _Served.YES:
                if served is _Served.BUSY:
                    await self._settle()
                    continue
                self._counts.faults_fetched += 1
                found = self._missing.at(page)
                if found is None:
                    raise AssertionError("it was missing a moment ago")
                size_bytes = min(found.stop - page, self._window_bytes)
                await self._fetch(found.origin + page - found.start, size_bytes, page)
        finally:
            self._bringing.discard(page)
        self._counts.note_served(time.monotonic() - began_s)
        self._end_if_done()

    async def _fetch(self, origin: int, size_bytes: int, address: int) -> Outcome:
        """Fetch bytes by their origin, and fill them in where they are wanted by then."""
        place = next(self.lazy.memory.places(origin, origin + size_bytes))
        file = self.lazy.files[place.level]
        data = await file.read(place.offset, place.size_bytes, Lane.DEMAND)
        found = None if self._gone else self._missing.at(address)
        if found is None or found.origin + address - found.start != origin:
            return Outcome.DONE
        before_bytes = self._missing.size_bytes
        outcome = self._fill(address, memoryview(data)[: found.stop - address])
        self._counts.bytes_faulted += before_bytes - self._missing.size_bytes
        return outcome

    async def _settle(self) -> None:
        """Let the kernel say what it is waiting to say."""
        await trio.sleep(self._settle_s)
        self._settle_s = min(2 * self._settle_s, _SETTLE_MOST_S)
        if not self.is_over:
            self.hear()

    # -- the background ---------------------------------------------------------------------

    async def send_some(self) -> None:
        """Fill some of what is missing; a checkpoint. Raises as `run`."""
        found = None if self.is_over else self._missing.after(self._cursor)
        if found is None:
            self._cursor = 0
            await trio.lowlevel.checkpoint()
            return
        step_bytes = min(found.stop - found.start, _STEP_BYTES)
        place = next(self.lazy.memory.places(found.origin, found.origin + step_bytes))
        file = self.lazy.files[place.level]
        data = file.peek(place.offset, place.size_bytes)
        if data is None:
            data = await file.read(place.offset, place.size_bytes, Lane.READAHEAD)
            now = None if self.is_over else self._missing.at(found.start)
            if now is None or now.origin + found.start - now.start != found.origin:
                return
            data = memoryview(data)[: now.stop - found.start]
        before_bytes = self._missing.size_bytes
        outcome = self._fill(found.start, data)
        if outcome is Outcome.UNMAPPED and self._may_end:
            outcome = self._fill_by_page(found.start, data)
        self._counts.bytes_background += before_bytes - self._missing.size_bytes
        self._cursor = found.start
        self._end_if_done()
        if outcome is Outcome.BUSY:
            await self._settle()
        elif outcome is Outcome.UNMAPPED:
            await trio.sleep(_NOT_YET_S)
        else:
            await trio.lowlevel.checkpoint()

    # -- filling ----------------------------------------------------------------------------

    def _fill_all(self, start: int, datas: list[Data]) -> Outcome:
        for data in datas:
            outcome = self._fill(start, data)
            if outcome is not Outcome.DONE:
                return outcome
            start += len(data)
        return Outcome.DONE

    def _fill_one(self, found: Range, page: int) -> Outcome:
        """Fill one page, where the mapping has been split since the dump."""
        datas = self._peek(found.origin + page - found.start, _PAGE)
        if datas is None:
            raise AssertionError("it was here a moment ago")
        outcome = self._fill(page, datas[0])
        if outcome is Outcome.UNMAPPED:
            self._missing.drop(page, page + _PAGE)
            self.uffd.wake(page, _PAGE)
        return outcome

    def _fill_by_page(self, start: int, data: Data) -> Outcome:
        """Fill what can be, where mappings have been split, or are not there any more."""
        for each, piece in _pages(data):
            outcome = self._fill(start + each, piece)
            if outcome is Outcome.UNMAPPED:
                self._missing.drop(start + each, start + each + _PAGE)
            elif outcome is not Outcome.DONE:
                return outcome
        return Outcome.DONE

    def _fill(self, start: int, data: Data) -> Outcome:
        """Fill missing memory of one mapping; what is filled is missing no more."""
        view = memoryview(data)
        done = 0
        while done < len(view):
            result = self._check(self.uffd.copy(start + done, view[done:]))
            size_bytes = result.size_bytes
            if result.outcome is Outcome.THERE:
                size_bytes = _PAGE
                self.uffd.wake(start + done, _PAGE)
            elif not size_bytes:
                return result.outcome
            self._missing.drop(start + done, start + done + size_bytes)
            self._settle_s = _SETTLE_S
            done += size_bytes
        return Outcome.DONE

    def _check(self, result: Copied) -> Copied:
        if result.outcome is Outcome.GONE:
            self._gone = True
        elif result.outcome is Outcome.FAILED:
            why = os.strerror(result.errno)
            raise LazyfsError(f"{self.name}: its memory cannot be filled: {why}")
        return result

    def _end_if_done(self) -> None:
        if self.is_over:
            return
        if self._gone or (self._may_end and not self._missing.size_bytes):
            self._gone = True
            trio.lowlevel.notify_closing(self.uffd.descriptor)
            self.uffd.close()


def _without(whole: Unmapped, holes: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what is left of a range."""
    start = whole.start
    for begin, end in sorted(holes):
        if begin >= whole.stop:
            break
        if start < begin:
            yield start, begin
        start = max(start, end)
    if start < whole.stop:
        yield start, whole.stop


def _pages(data: Data) -> Iterator[tuple[int, memoryview]]:
    view = memoryview(data)
    for offset in range(0, len(view), _PAGE):
        yield offset, view[offset : offset + _PAGE]
