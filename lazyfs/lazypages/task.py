"""One task whose memory is still coming: its faults, and what is sent before it asks.

What keeps this right: the kernel refuses to fill memory (EAGAIN) from the moment it is moved,
dropped or copied by fork(2) until its message of that has been read. So whatever is filled must
be looked up in `_missing` after the last read of messages, with no checkpoint in between; and of
messages that were read together the faults come last. Both are the case since all of this runs on
the trio thread, and `_missing` is asked anew after every `await`.

Source: Linux, fs/userfaultfd.c (mmap_changing); CRIU, criu/uffd.c (handle_page_fault,
uffd_check_op_error).
"""

import logging
import time
from collections.abc import Callable
from enum import Enum
from functools import partial

import trio

from lazyfs.content.lanes import Lane
from lazyfs.ground.data import Data
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.journal import Journal, ReadNote
from lazyfs.ground.settings import MIB
from lazyfs.lazypages.changes import Changes
from lazyfs.lazypages.counts import Counts
from lazyfs.lazypages.filling import PAGE, Filling
from lazyfs.lazypages.memory import Place
from lazyfs.lazypages.missing import Missing, Range
from lazyfs.lazypages.pages import Job, LazyMemory
from lazyfs.lazypages.protocol import parse_messages
from lazyfs.lazypages.uffd import Outcome, Userfaultfd
from lazyfs.lazypages.walks import LEAST_BYTES, PRECISE_BYTES, Walk, Walks

log = logging.getLogger(__name__)

_MOST_ZEROS_BYTES = MIB
_STEP_BYTES = MIB
"""What is sent in the background at a time: a fault waits for the rest of it, 0.3 ms."""
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


class Sent(Enum):
    """What became of memory that was foreseen."""

    ALL = "all"
    """It is there, or is left to others."""
    ABSENT = "absent"
    """Bytes of it are not here."""
    LATER = "later"
    """The kernel does not take it yet."""


class Desk:
    """What the tasks of a mount share."""

    def __init__(self, counts: Counts, journal: Journal | None = None) -> None:
        """`journal`: where faults are noted, if somebody records."""
        self.counts = counts
        self.journal = journal
        self.precise = False
        """Whether just what is wanted is brought, for as long as somebody records that."""
        self.whole = trio.Event()
        """Set when that is over, and all the rest may be brought."""


class Task:
    """A task; `run` it. Its descriptor is open until nothing is missing, or nobody is left."""

    def __init__(
        self,
        name: str,
        uffd: Userfaultfd,
        lazy: LazyMemory,
        missing: Missing,
        desk: Desk,
        on_fork: Callable[["Task", int], None],
    ) -> None:
        """`on_fork` is told of a child: its parent, and its descriptor. It must not raise."""
        self.name = name
        self.uffd = uffd
        self.lazy = lazy
        self._missing = missing
        self._filling = Filling(name, uffd, missing)
        self._desk = desk
        self._counts = desk.counts
        self._on_fork = on_fork
        self._may_end = False
        self._walks = Walks()
        self._zeros_bytes = PAGE
        self._zeros_end = 0
        self._settle_s = _SETTLE_S
        self._cursor = 0
        self._changes = Changes(missing)
        self._bringing: set[int] = set()
        self._nursery: trio.Nursery | None = None

    @property
    def missing_bytes(self) -> int:
        """How much has still to come; 0 when nobody is left to want it."""
        return 0 if self._filling.gone else self._missing.size_bytes

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

    def check_registered(self) -> None:
        """See that all that comes lazily is memory that waits for us. Before the task runs.

        CRIU registers a mapping as it moves it to its place; one that the kernel happened to make
        there in the first place it passes over, and its pages would read as zeros.

        Source: CRIU, criu/pie/restorer.c (vma_remap), the same in 4.1.1 and 4.2.

        Raises:
            LazyfsError: there is some that does not.
        """
        self.hear()
        for page in self.lazy.memory.firsts:
            found = None if self._filling.gone else self._missing.at(page)
            if found is not None and found.origin == found.start and not self.uffd.may_fill(page):
                raise LazyfsError(
                    f"{self.name}: CRIU has not registered its memory at {page:#x}, which would "
                    "read as zeros; restore it again, or without --lazy-pages"
                )

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
            self._filling.gone = True
            self._end_if_done()

    def hear(self) -> None:
        """Read messages, if there are any, apply them, and serve the faults among them."""
        if self.is_over:
            return
        began_s = time.monotonic()
        messages = parse_messages(self.uffd.read())
        for address in self._changes.apply(messages, partial(self._on_fork, self)):
            page = address & -PAGE
            if self._filling.gone:
                break
            self._hear_fault(page, began_s)
        self._end_if_done()

    # -- faults -----------------------------------------------------------------------------

    def _hear_fault(self, page: int, began_s: float) -> None:
        self._counts.faults += 1
        if page in self._bringing:
            return
        place = self._place(page)
        walk = self._walks.note(place.level, place.offset) if place is not None else None
        if self._serve(page, walk) is _Served.YES:
            self._note_served(place, walk, began_s, waited=False)
        elif self._nursery is not None:
            self._bringing.add(page)
            self._nursery.start_soon(self._bring, page, walk, began_s)
        if place is not None and walk is not None:
            self._fetch_ahead(place, walk)

    def _place(self, page: int) -> Place | None:
        """Return where the bytes of a page are, if it is missing."""
        found = self._missing.at(page)
        if found is None:
            return None
        origin = found.origin + page - found.start
        return next(self.lazy.memory.places(origin, origin + min(found.stop - page, LEAST_BYTES)))

    def _serve(self, page: int, walk: Walk | None) -> _Served:
        """Fill a page, and what lies around it, if its bytes are here."""
        filling = self._filling
        while not filling.gone:
            found = self._missing.at(page)
            if found is None:
                return self._serve_zeros(page)
            window = self._window(found, page, walk)
            if window is None:
                return _Served.ABSENT
            start, datas = window
            before_bytes = self._missing.size_bytes
            outcome = filling.fill_all(start, datas)
            if outcome is Outcome.UNMAPPED:
                datas = self._peek(found.origin + page - found.start, PAGE) or []
                outcome = filling.fill_page(page, datas[0]) if datas else outcome
            self._counts.bytes_faulted += before_bytes - self._missing.size_bytes
            if outcome is Outcome.BUSY:
                return _Served.BUSY
            self._settle_s = _SETTLE_S
            if outcome is Outcome.DONE:
                break
        return _Served.YES

    def _serve_zeros(self, page: int) -> _Served:
        """Fill a page that the checkpoint has nothing for, and more if that goes on."""
        goes_on = page == self._zeros_end and not self._desk.precise
        self._zeros_bytes = min(2 * self._zeros_bytes, _MOST_ZEROS_BYTES) if goes_on else PAGE
        after = self._missing.after(page)
        stop = page + self._zeros_bytes
        result = self._filling.zero(page, stop if after is None else min(stop, after.start))
        if result.size_bytes:
            self._counts.faults_zero += 1
            self._zeros_end = page + result.size_bytes
        elif result.outcome is Outcome.BUSY:
            return _Served.BUSY
        elif not self._filling.gone:
            self.uffd.wake(page, PAGE)
        return _Served.YES

    def _window(self, found: Range, page: int, walk: Walk | None) -> tuple[int, list[Data]] | None:
        """Return where to begin, and the bytes: as many around a page as are here."""
        is_first = walk is None or walk.is_first
        size_bytes = walk.fill_bytes if walk is not None else LEAST_BYTES
        start = max(found.start, page & -LEAST_BYTES) if is_first else page
        if self._desk.precise:
            size_bytes, start = PAGE if is_first else PRECISE_BYTES, page
        while True:
            stop = min(found.stop, start + size_bytes)
            if stop > page:
                datas = self._peek(found.origin + start - found.start, stop - start)
                if datas is not None:
                    return start, datas
            if size_bytes > PAGE:
                size_bytes = max(size_bytes // 2 & -PAGE, PAGE)
            elif start < page:
                start, size_bytes = page, LEAST_BYTES
            else:
                return None

    def _peek(self, origin: int, size_bytes: int) -> list[Data] | None:
        datas: list[Data] = []
        for place in self.lazy.memory.places(origin, origin + size_bytes):
            data = self.lazy.files[place.level].peek(place.offset, place.size_bytes)
            if data is None:
                return None
            datas.append(data)
        return datas

    def _fetch_ahead(self, place: Place, walk: Walk) -> None:
        """Have what follows a fault fetched, the page itself first if it is not here."""
        file = self.lazy.files[place.level]
        if self._nursery is None or self._desk.precise or file.is_foreseen(place.offset):
            return
        wanted = walk.wants(place.offset)
        if wanted is not None:
            start, stop = wanted
            for job in file.begin(start, stop - start):
                self._nursery.start_soon(_do, job)

    async def _bring(self, page: int, walk: Walk | None, began_s: float) -> None:
        """Fetch what a fault waits for, and fill it in."""
        first = self._place(page)
        try:
            while (served := self._serve(page, walk)) is not _Served.YES:
                if served is _Served.BUSY:
                    await self._settle()
                    continue
                place = self._place(page)
                if place is None:
                    raise AssertionError("it was missing a moment ago")
                self._counts.faults_fetched += 1
                if walk is not None and not self._desk.precise:
                    walk.note_wait()
                    self._fetch_ahead(place, walk)
                if await self._fetch(page, place, walk) is Outcome.BUSY:
                    await self._settle()
        finally:
            self._bringing.discard(page)
        self._note_served(first, walk, began_s, waited=True)
        self._end_if_done()

    async def _fetch(self, page: int, place: Place, walk: Walk | None) -> Outcome:
        """Fetch what a fault waits for; fill it in where only memory holds it."""
        file = self.lazy.files[place.level]
        size_bytes = PAGE if self._desk.precise else place.size_bytes
        data = await file.read(place.offset, size_bytes, Lane.DEMAND)
        found = None if self._filling.gone else self._missing.at(page)
        if found is None or file.peek(place.offset, PAGE) is not None:
            return Outcome.DONE  # which is looked at anew, with what lies around it
        now = self._place(page)
        if now is None or (now.level, now.offset) != (place.level, place.offset):
            return Outcome.DONE
        before_bytes = self._missing.size_bytes
        view = memoryview(data)
        outcome = self._filling.fill(page, view[: found.stop - page])
        if outcome is Outcome.UNMAPPED:
            outcome = self._filling.fill_page(page, view[:PAGE])
        self._counts.bytes_faulted += before_bytes - self._missing.size_bytes
        return outcome

    def _note_served(
        self, place: Place | None, walk: Walk | None, began_s: float, *, waited: bool
    ) -> None:
        """Count a fault that has been served, and note it if somebody records."""
        now_s = time.monotonic()
        self._counts.note_served(now_s - began_s)
        if self._desk.journal is not None and place is not None and walk is not None:
            size_bytes = PAGE if walk.is_first else min(PRECISE_BYTES, place.size_bytes)
            path = self.lazy.files[place.level].path
            note = ReadNote(
                path, place.offset, size_bytes, began_s, now_s, is_fault=True, waited=waited
            )
            self._desk.journal.note_read(note)

    async def _settle(self) -> None:
        """Let the kernel say what it is waiting to say."""
        await trio.sleep(self._settle_s)
        self._settle_s = min(2 * self._settle_s, _SETTLE_MOST_S)
        if not self.is_over:
            self.hear()

    # -- the background ---------------------------------------------------------------------

    def send(self, start: int, stop: int) -> Sent:
        """Fill what is missing of memory, by addresses at the dump; never waits. Raises as `run`.

        What has moved since is left to `send_some`.
        """
        before_bytes = self._missing.size_bytes
        try:
            while not self._filling.gone:
                found = self._missing.after(start)
                if found is None or found.start >= stop:
                    break
                start = min(found.stop, stop)
                if found.origin != found.start:
                    continue
                datas = self._peek(found.start, start - found.start)
                if datas is None:
                    return Sent.ABSENT
                outcome = self._filling.fill_all(found.start, datas)
                if outcome is Outcome.BUSY or (outcome is Outcome.UNMAPPED and not self._may_end):
                    return Sent.LATER
        finally:
            self._counts.bytes_background += before_bytes - self._missing.size_bytes
        self._end_if_done()
        return Sent.ALL

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
        outcome = self._filling.fill(found.start, data)
        if outcome is Outcome.UNMAPPED and self._may_end:
            outcome = self._filling.fill_by_page(found.start, data)
        self._counts.bytes_background += before_bytes - self._missing.size_bytes
        self._cursor = found.start
        self._end_if_done()
        if outcome is Outcome.BUSY:
            await self._settle()
        elif outcome is Outcome.UNMAPPED:
            await trio.sleep(_NOT_YET_S)
        else:
            self._settle_s = _SETTLE_S
            await trio.lowlevel.checkpoint()

    def _end_if_done(self) -> None:
        if self.is_over:
            return
        if self._filling.gone or (self._may_end and not self._missing.size_bytes):
            self._filling.gone = True
            trio.lowlevel.notify_closing(self.uffd.descriptor)
            self.uffd.close()


async def _do(job: Job) -> None:
    """Fetch ahead; what cannot be had is told to whoever wants it, and asks again."""
    try:
        await job()
    except LazyfsError as error:
        log.debug("what follows a fault has not come: %s", error)
