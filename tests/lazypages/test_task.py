"""A task against a kernel that only seems to be one: what is filled, and with what."""

import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from lazyfs.checkpoint.criu_memory import PageExtent, PageFlags, Pagemap, Vma
from lazyfs.content.lanes import Lane
from lazyfs.ground.data import Data
from lazyfs.ground.errors import FetchError, LazyfsError
from lazyfs.ground.journal import Journal
from lazyfs.lazypages.ahead import Ahead
from lazyfs.lazypages.counts import Counts
from lazyfs.lazypages.memory import Level, TaskMemory
from lazyfs.lazypages.missing import Missing
from lazyfs.lazypages.order import Part
from lazyfs.lazypages.pages import Job, LazyMemory
from lazyfs.lazypages.task import Desk, Sent, Task
from lazyfs.lazypages.uffd import Copied, Outcome, Userfaultfd

PAGE = 4096
PAGES = 2048
ZEROS = bytes(PAGE)


def content(page: int) -> bytes:
    return struct.pack("=I", page + 1) * (PAGE // 4)


class Kernel(Userfaultfd):
    """A task's memory, by page; its descriptor is the reading end of a pipe."""

    def __init__(self) -> None:
        reading, self.bell = os.pipe2(os.O_NONBLOCK)
        super().__init__(reading)
        self.mapped = set(range(PAGES))
        self.borders: set[int] = set()
        """Pages at which a mapping begins."""
        self.filled: dict[int, bytes] = {}
        self.queue: list[bytes] = []
        self.refusals: list[int] = []
        """Errnos that the next attempts fail with."""
        self.is_strict = False
        """Whether it fills nothing while it has something to say."""
        self.woken: set[int] = set()
        self.calls = 0

    def tell(self, kind: int, *fields: int) -> None:
        self.queue.append(struct.pack("=BBHI3Q", kind, 0, 0, 0, *fields, *[0] * (3 - len(fields))))
        os.write(self.bell, b"!")

    def fault(self, page: int) -> None:
        self.tell(0x12, 0, page * PAGE + 8)

    def read(self) -> memoryview:
        if not self.queue:
            return memoryview(b"")
        os.read(self.descriptor, 1000)
        told, self.queue = b"".join(self.queue), []
        return memoryview(told)

    def copy(self, to: int, data: Data) -> Copied:
        return self.fill_in(to, bytes(data))

    def zero(self, start: int, size_bytes: int) -> Copied:
        return self.fill_in(start, bytes(size_bytes))

    def may_fill(self, page: int) -> bool:
        return page // PAGE in self.mapped

    def wake(self, start: int, size_bytes: int) -> None:
        self.woken.add(start // PAGE)

    def fill_in(self, to: int, data: bytes) -> Copied:
        self.calls += 1
        assert not to % PAGE
        assert not len(data) % PAGE
        if self.is_strict and self.queue:
            return Copied(0, Outcome.BUSY)
        if self.refusals:
            number = self.refusals.pop(0)
            outcomes = {
                errno.EAGAIN: Outcome.BUSY,
                errno.ESRCH: Outcome.GONE,
                errno.ENOENT: Outcome.UNMAPPED,
            }
            return Copied(0, outcomes.get(number, Outcome.FAILED), number)
        pages = range(to // PAGE, (to + len(data)) // PAGE)
        if any(page not in self.mapped for page in pages) or self.borders & set(pages[1:]):
            return Copied(0, Outcome.UNMAPPED)
        for count, page in enumerate(pages):
            if page in self.filled:
                if count:
                    return Copied(count * PAGE, Outcome.BUSY)
                return Copied(0, Outcome.THERE)
            self.filled[page] = data[count * PAGE : (count + 1) * PAGE]
            self.woken.add(page)
        return Copied(len(data), Outcome.DONE)


class File:
    """A pages file, of which some pages are here."""

    def __init__(self, here: Sequence[int]) -> None:
        self.here = set(here)
        self.path = "pages-1.img"
        self.reads: list[tuple[int, int]] = []
        self.begun: list[tuple[int, int]] = []
        self.flying: set[int] = set()
        self.foreseen: set[int] = set()
        """Pages that somebody else brings, with all that is wanted beside them."""
        self.run = 0
        self.gates_reads = self.fails_reads = True
        self.gate = trio.Event()
        self.gate.set()
        self.error: LazyfsError | None = None

    def peek(self, offset: int, size_bytes: int) -> Data | None:
        pages = range(offset // PAGE, (offset + size_bytes) // PAGE)
        if not self.here.issuperset(pages):
            return None
        return b"".join(map(content, pages))

    def is_foreseen(self, offset: int) -> bool:
        return offset // PAGE in self.foreseen

    def begin(self, offset: int, size_bytes: int) -> Sequence[Job]:
        pages = set(range(offset // PAGE, (offset + size_bytes) // PAGE))
        if not pages - self.here - self.flying:
            return ()
        self.begun.append((offset // PAGE, size_bytes // PAGE))
        self.flying |= pages
        return (partial(self.bring, pages),)

    async def bring(self, pages: set[int]) -> None:
        self.run += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.here |= pages

    async def wait(self, offset: int, size_bytes: int) -> None:
        if self.error is not None:
            raise self.error
        await trio.sleep(0.001)

    async def read(self, offset: int, size_bytes: int, lane: Lane) -> Data:
        self.reads.append((offset // PAGE, size_bytes // PAGE))
        if self.gates_reads:
            await self.gate.wait()
        if self.error is not None and self.fails_reads:
            raise self.error
        self.here.update(range(offset // PAGE, (offset + size_bytes) // PAGE))
        return b"".join(map(content, range(offset // PAGE, (offset + size_bytes) // PAGE)))


class World:
    """A task of 512 pages that come lazily, from page 16 on."""

    first, last = 16, 528

    def __init__(self, here: Sequence[int] = range(PAGES)) -> None:
        self.kernel = Kernel()
        self.file = File(here)
        self.counts = Counts()
        self.journal = Journal()
        self.desk = Desk(self.counts, self.journal)
        self.children: list[int] = []
        self.inherited: list[Missing] = []
        flags = PageFlags.LAZY | PageFlags.PRESENT
        pagemap = Pagemap(1, (PageExtent(self.first * PAGE, self.last - self.first, flags),))
        vmas = [Vma(0, PAGES * PAGE, 0, 3, 0x22, 1)]
        memory = TaskMemory(vmas, [Level(pagemap, PAGES * PAGE)], PAGE)
        self.task = Task(
            "it",
            self.kernel,
            LazyMemory(memory, [self.file]),
            Missing(memory.ranges),
            self.desk,
            self.on_fork,
        )

    def on_fork(self, parent: Task, descriptor: int) -> None:
        self.children.append(descriptor)
        self.inherited.append(parent.missing())

    def right(self, page: int) -> bytes:
        """What a page should hold, where nothing was moved."""
        return content(page - self.first) if self.first <= page < self.last else ZEROS

    def all_right(self) -> bool:
        return all(data == self.right(page) for page, data in self.kernel.filled.items())


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    os.close(made.kernel.bell)
    made.kernel.close()


async def until(true: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not true():  # noqa: ASYNC110 - of a kernel that tells nobody
            await trio.sleep(0.001)


async def test_a_fault_is_served_with_what_lies_around_it(world: World) -> None:
    world.kernel.fault(100)
    world.task.hear()
    assert 100 in world.kernel.woken
    assert 16 < len(world.kernel.filled) < 200
    assert world.all_right()
    assert world.kernel.calls == 1


async def test_a_fault_at_the_end_stays_within_what_is_missing(world: World) -> None:
    world.kernel.fault(527)
    world.task.hear()
    assert 527 in world.kernel.filled
    assert max(world.kernel.filled) == 527
    assert world.all_right()


async def test_a_page_that_the_checkpoint_does_not_have_is_zero(world: World) -> None:
    world.kernel.fault(600)
    world.task.hear()
    assert world.kernel.filled == {600: ZEROS}
    for page in range(601, 604):
        if page not in world.kernel.filled:
            world.kernel.fault(page)
            world.task.hear()
    assert len(world.kernel.filled) >= 4
    world.kernel.fault(15)
    world.task.hear()
    assert 16 not in world.kernel.filled
    assert world.all_right()


async def test_zeros_never_go_over_what_is_missing(world: World) -> None:
    for page in (9, 10, 12):
        world.kernel.fault(page)
        world.task.hear()
    assert max(world.kernel.filled) <= 15
    assert world.all_right()


async def test_what_is_sent_unasked_is_all_of_it_and_then_it_is_over(world: World) -> None:
    world.task.may_end()
    while not world.task.is_over:
        await world.task.send_some()
    assert set(world.kernel.filled) == set(range(16, 528))
    assert world.all_right()
    assert world.task.missing_bytes == 0


async def test_it_is_not_over_before_all_is_set_up(world: World) -> None:
    for _ in range(10):
        await world.task.send_some()
    assert world.task.missing_bytes == 0
    assert not world.task.is_over
    world.task.may_end()
    assert world.task.is_over


async def test_memory_that_has_moved_is_filled_where_it_is(world: World) -> None:
    world.kernel.tell(0x14, 100 * PAGE, 1000 * PAGE, 50 * PAGE)
    world.kernel.fault(1010)
    world.kernel.fault(110)
    world.task.hear()
    assert world.kernel.filled[1010] == content(110 - 16)
    assert world.kernel.filled[110] == ZEROS


async def test_faults_are_served_after_all_that_was_told_with_them(world: World) -> None:
    world.kernel.fault(1010)
    world.kernel.tell(0x14, 100 * PAGE, 1000 * PAGE, 50 * PAGE)
    world.task.hear()
    assert world.kernel.filled[1010] == content(110 - 16)


async def test_memory_that_was_dropped_reads_as_zeros(world: World) -> None:
    world.kernel.tell(0x15, 100 * PAGE, 110 * PAGE)
    world.kernel.fault(105)
    world.task.hear()
    world.task.may_end()
    while not world.task.is_over:
        await world.task.send_some()
    assert world.kernel.filled[105] == ZEROS
    assert not set(range(100, 110)) & {
        page for page, data in world.kernel.filled.items() if data != ZEROS
    }


async def test_what_moved_to_where_others_unmap_at_the_same_time_came_after(world: World) -> None:
    world.kernel.tell(0x14, 100 * PAGE, 200 * PAGE, 50 * PAGE)
    world.kernel.tell(0x16, 190 * PAGE, 260 * PAGE)
    world.kernel.fault(210)
    world.task.hear()
    assert world.kernel.filled[210] == content(110 - 16)
    world.kernel.fault(195)
    world.kernel.fault(255)
    world.task.hear()
    assert world.kernel.filled[195] == world.kernel.filled[255] == ZEROS


async def test_what_has_moved_to_where_something_just_moved_away_is_not_forgotten(
    world: World,
) -> None:
    world.kernel.tell(0x14, 100 * PAGE, 1000 * PAGE, 50 * PAGE)
    world.task.hear()
    world.kernel.tell(0x14, 300 * PAGE, 100 * PAGE, 20 * PAGE)
    world.task.hear()
    world.kernel.tell(0x16, 100 * PAGE, 150 * PAGE)
    world.kernel.tell(0x16, 300 * PAGE, 320 * PAGE)
    world.kernel.fault(110)
    world.kernel.fault(1010)
    world.task.hear()
    assert world.kernel.filled[110] == content(310 - 16)
    assert world.kernel.filled[1010] == content(110 - 16)


async def test_what_is_unmapped_after_it_has_moved_there_is_forgotten(world: World) -> None:
    for event in (
        (0x14, 100 * PAGE, 1000 * PAGE, 50 * PAGE),
        (0x16, 100 * PAGE, 150 * PAGE),
        (0x14, 300 * PAGE, 100 * PAGE, 50 * PAGE),
        (0x16, 300 * PAGE, 350 * PAGE),
        (0x16, 100 * PAGE, 150 * PAGE),
    ):
        world.kernel.tell(*event)
        world.task.hear()
    world.kernel.fault(110)
    world.task.hear()
    assert world.kernel.filled[110] == ZEROS


async def test_a_child_has_what_others_unmap_at_the_same_time(world: World) -> None:
    world.kernel.tell(0x16, 100 * PAGE, 200 * PAGE)
    world.kernel.tell(0x13, 77)
    world.task.hear()
    assert world.inherited[0].size_bytes == 512 * PAGE
    assert world.task.missing_bytes == 412 * PAGE


async def test_a_child_is_told_of(world: World) -> None:
    world.kernel.tell(0x13, 77)
    world.task.hear()
    assert world.children == [77]


async def test_pages_that_are_there_already_are_left_alone(world: World) -> None:
    mine = b"\7" * PAGE
    world.kernel.filled = dict.fromkeys((100, 101, 120, 527), mine)
    world.kernel.fault(100)
    world.task.hear()
    assert 100 in world.kernel.woken
    world.task.may_end()
    while not world.task.is_over:
        await world.task.send_some()
    assert len(world.kernel.filled) == 512
    for page, data in world.kernel.filled.items():
        assert data == (mine if page in (100, 101, 120, 527) else world.right(page))


async def test_a_mapping_that_was_split_is_filled_page_by_page(world: World) -> None:
    world.kernel.borders = {99, 101, 300}
    world.kernel.fault(100)
    world.task.hear()
    assert world.kernel.filled[100] == world.right(100)
    world.task.may_end()
    while not world.task.is_over:
        await world.task.send_some()
    assert set(world.kernel.filled) == set(range(16, 528))
    assert world.all_right()


async def test_what_is_not_mapped_any_more_is_forgotten(world: World) -> None:
    world.kernel.mapped -= set(range(200, 300))
    world.task.may_end()
    while not world.task.is_over:
        await world.task.send_some()
    assert set(world.kernel.filled) == set(range(16, 528)) - set(range(200, 300))


async def test_what_is_not_mapped_yet_is_waited_for(world: World) -> None:
    mapped, world.kernel.mapped = world.kernel.mapped, set()
    for _ in range(3):
        await world.task.send_some()
    assert world.task.missing_bytes == 512 * PAGE
    world.kernel.mapped = mapped
    world.task.may_end()
    while not world.task.is_over:
        await world.task.send_some()
    assert len(world.kernel.filled) == 512


async def test_bytes_that_are_not_here_are_fetched(nursery: trio.Nursery) -> None:
    world = World(here=range(0))
    nursery.start_soon(world.task.run)
    world.kernel.fault(100)
    await until(lambda: 100 in world.kernel.filled)
    assert world.counts.as_json()["faults_fetched"] == 1
    assert world.all_right()
    world.task.may_end()
    while not world.task.is_over:
        await world.task.send_some()
    assert set(world.kernel.filled) == set(range(16, 528))


async def test_what_moves_while_it_is_fetched_is_filled_where_it_is(nursery: trio.Nursery) -> None:
    world = World(here=range(0))
    world.file.gate = trio.Event()
    nursery.start_soon(world.task.run)
    nursery.start_soon(world.task.send_some)
    world.kernel.fault(100)
    await until(lambda: len(world.file.reads) == 2)
    world.kernel.tell(0x14, 0, 1000 * PAGE, 1000 * PAGE)
    world.kernel.mapped -= set(range(1000))
    await until(lambda: not world.kernel.queue)
    world.file.gate.set()
    await until(lambda: 100 in world.kernel.woken)
    assert not set(world.kernel.filled) & set(range(1000))
    world.kernel.fault(1100)
    await until(lambda: 1100 in world.kernel.filled)
    assert all(data == world.right(page - 1000) for page, data in world.kernel.filled.items())
    nursery.cancel_scope.cancel()


async def test_a_kernel_that_is_busy_is_asked_again(nursery: trio.Nursery) -> None:
    world = World()
    nursery.start_soon(world.task.run)
    world.kernel.refusals = [errno.EAGAIN] * 3
    world.kernel.fault(100)
    await until(lambda: 100 in world.kernel.filled)
    world.kernel.refusals = [errno.EAGAIN] * 3
    world.kernel.fault(700)
    await until(lambda: 700 in world.kernel.filled)
    world.kernel.refusals = [errno.EAGAIN] * 3
    world.task.may_end()
    while not world.task.is_over:
        await world.task.send_some()
    assert world.all_right()


async def test_a_task_that_is_gone_is_over(nursery: trio.Nursery) -> None:
    world = World()
    nursery.start_soon(world.task.run)
    world.kernel.refusals = [errno.ESRCH]
    world.kernel.fault(100)
    await until(lambda: world.task.is_over)
    assert world.task.missing_bytes == 0


async def test_a_page_that_cannot_be_had_is_an_error(world: World) -> None:
    world.file.here.clear()
    world.file.error = FetchError("no", transient=True)
    world.kernel.fault(100)
    with pytest.RaisesGroup(FetchError):
        await world.task.run()
    assert not world.task.is_over
    with pytest.raises(FetchError):
        await world.task.send_some()


def test_events_that_cannot_be_read_are_an_error() -> None:
    reading, writing = os.pipe2(os.O_NONBLOCK)
    uffd = Userfaultfd(reading)
    assert not uffd.read()
    uffd.close()
    uffd = Userfaultfd(writing)
    with pytest.raises(LazyfsError):
        uffd.read()
    uffd.close()


async def test_memory_that_cannot_be_filled_is_an_error(world: World) -> None:
    world.kernel.refusals = [errno.ENOMEM]
    world.kernel.fault(100)
    with pytest.RaisesGroup(LazyfsError):
        await world.task.run()
    assert not world.task.is_over


async def test_a_fault_goes_on_before_all_that_is_fetched_with_it_has_come(
    nursery: trio.Nursery,
) -> None:
    world = World(here=range(0))
    world.file.gate = trio.Event()  # what is fetched ahead does not come
    world.file.gates_reads = False
    nursery.start_soon(world.task.run)
    world.kernel.fault(100)
    await until(lambda: 100 in world.kernel.filled)
    assert world.file.begun
    assert len(world.kernel.filled) <= 16
    assert world.all_right()
    nursery.cancel_scope.cancel()


async def test_what_was_reserved_is_fetched_or_given_back(nursery: trio.Nursery) -> None:
    world = World(here=range(0))
    world.file.gate = trio.Event()
    async with trio.open_nursery() as inner:
        inner.start_soon(world.task.run)
        world.kernel.fault(100)
        await until(lambda: bool(world.file.begun))
        inner.cancel_scope.cancel()
    assert world.file.run == len(world.file.begun)


async def test_ahead_of_a_walk_more_is_fetched_and_what_fails_there_fails_nobody(
    nursery: trio.Nursery,
) -> None:
    world = World(here=range(0))
    nursery.start_soon(world.task.run)
    for page in (16, 144):
        if page not in world.kernel.filled:
            world.kernel.fault(page)
            await until(lambda: page in world.kernel.filled)  # noqa: B023
    asked = sum(size for _, size in world.file.begun)
    assert asked >= 256
    world.file.here.clear()
    world.file.flying.clear()
    world.file.error = FetchError("no", transient=True)
    world.file.gates_reads = False
    world.file.fails_reads = False
    page = next(each for each in range(300, 528) if each not in world.kernel.filled)
    world.kernel.fault(page)
    await until(lambda: page in world.kernel.filled)
    assert world.all_right()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("event", ["move", "unmap", "drop", "fork"])
async def test_what_becomes_of_memory_while_it_is_fetched_is_not_undone(
    nursery: trio.Nursery, event: str
) -> None:
    world = World(here=range(0))
    world.file.gate = trio.Event()
    nursery.start_soon(world.task.run)
    world.kernel.fault(100)
    await until(lambda: bool(world.file.reads))
    if event == "move":
        world.kernel.tell(0x14, 0, 1000 * PAGE, 1000 * PAGE)
        world.kernel.mapped -= set(range(1000))
    elif event == "unmap":
        world.kernel.tell(0x16, 96 * PAGE, 112 * PAGE)
        world.kernel.mapped -= set(range(96, 112))
    elif event == "drop":
        world.kernel.tell(0x15, 96 * PAGE, 112 * PAGE)
    else:
        world.kernel.tell(0x13, 77)
    await until(lambda: not world.kernel.queue)
    world.file.gate.set()
    await until(lambda: 100 in world.kernel.woken)
    world.task.may_end()
    while not world.task.is_over:
        await world.task.send_some()
    shift = 1000 if event == "move" else 0
    for page, data in world.kernel.filled.items():
        dropped = event == "drop" and 96 <= page < 112
        assert data == (ZEROS if dropped else world.right(page - shift)), page
    gone = set(range(96, 112)) if event in ("unmap", "drop") else set()
    assert set(world.kernel.filled) - {100} == set(range(16 + shift, 528 + shift)) - gone - {100}
    assert (100 in world.kernel.filled) == (event in ("drop", "fork"))
    if event == "fork":
        assert world.inherited[0].size_bytes == 512 * PAGE


async def test_while_somebody_records_a_fault_brings_its_page_and_is_noted(world: World) -> None:
    world.desk.precise = True
    for page in (300, 16, 17, 600):
        world.kernel.fault(page)
        world.task.hear()
    assert set(world.kernel.filled) == {300, 16, 17, 18, 19, 20, 600}
    assert world.all_right()
    notes = [
        (note.path, note.offset // PAGE, note.size_bytes // PAGE) for note in world.journal.reads
    ]
    assert notes == [("pages-1.img", 284, 1), ("pages-1.img", 0, 1), ("pages-1.img", 1, 4)]
    assert all(note.is_fault and not note.waited for note in world.journal.reads)


async def test_what_is_foreseen_is_filled_as_far_as_it_is_here_and_has_not_moved(
    world: World,
) -> None:
    assert world.task.send(100 * PAGE, 110 * PAGE) is Sent.ALL
    assert set(world.kernel.filled) == set(range(100, 110))
    assert world.task.send(90 * PAGE, 112 * PAGE) is Sent.ALL
    assert set(world.kernel.filled) == set(range(90, 112))
    world.kernel.tell(0x14, 200 * PAGE, 1000 * PAGE, 10 * PAGE)
    world.task.hear()
    assert world.task.send(195 * PAGE, 215 * PAGE) is Sent.ALL
    assert not set(range(200, 210)) & set(world.kernel.filled)
    world.file.here -= {400}
    assert world.task.send(410 * PAGE, 420 * PAGE) is Sent.ABSENT
    world.kernel.mapped -= {501}
    assert world.task.send(500 * PAGE, 502 * PAGE) is Sent.LATER
    world.task.may_end()
    assert world.task.send(500 * PAGE, 502 * PAGE) is Sent.ALL
    assert world.all_right()


async def test_memory_that_nobody_registered_is_an_error_before_the_task_runs(
    world: World,
) -> None:
    world.task.check_registered()
    world.kernel.mapped -= {16}
    with pytest.raises(LazyfsError, match="not registered"):
        world.task.check_registered()
    world.kernel.tell(0x16, 16 * PAGE, 17 * PAGE)
    world.task.check_registered()


async def test_a_trace_is_filled_in_as_it_comes_in_its_order(nursery: trio.Nursery) -> None:
    world = World(here=range(0))
    nursery.start_soon(world.task.run)
    memory = world.task.lazy.memory
    parts = [Part(memory, page * PAGE, (page + 2) * PAGE) for page in (300, 100, 200)]
    done = trio.Event()

    async def run() -> None:
        await Ahead(parts, [world.task]).run(lambda: True)
        done.set()

    nursery.start_soon(run)
    world.file.here |= set(range(84, 86))
    await until(lambda: {100, 101} <= set(world.kernel.filled))
    assert not done.is_set()
    world.file.here |= set(range(512))
    await until(done.is_set)
    assert set(world.kernel.filled) == {100, 101, 200, 201, 300, 301}
    assert list(world.kernel.filled)[2] == 300
    assert not world.file.reads
    assert not world.counts.faults
    assert world.all_right()
    nursery.cancel_scope.cancel()


async def test_what_a_trace_foretells_and_nobody_fetches_is_given_up(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    world = World(here=range(0))
    parts = [Part(world.task.lazy.memory, 100 * PAGE, 101 * PAGE)]
    world.file.error = FetchError("no", transient=True)
    await Ahead(parts, [world.task]).run(lambda: True)
    assert not world.kernel.filled


async def test_what_a_trace_foretells_is_awaited_as_long_as_it_is_fetched(
    autojump_clock: MockClock,
) -> None:
    world = World(here=range(0))
    world.file.foreseen = {84}
    parts = [Part(world.task.lazy.memory, 100 * PAGE, 101 * PAGE)]
    with trio.fail_after(600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Ahead(parts, [world.task]).run, lambda: True)
            await trio.sleep(60)
            world.file.here = {84}
    assert world.kernel.filled == {100: world.right(100)}
    os.close(world.kernel.bell)
    world.kernel.close()


class Transient(File):
    """A pages file whose bytes are in memory alone: to be read, and not looked at."""

    def __init__(self, on_read: Callable[[], None]) -> None:
        super().__init__(())
        self.on_read = on_read

    def peek(self, offset: int, size_bytes: int) -> Data | None:
        return None

    async def read(self, offset: int, size_bytes: int, lane: Lane) -> Data:
        self.reads.append((offset // PAGE, size_bytes // PAGE))
        assert len(self.reads) < 1000, "it is read for ever"
        self.on_read()
        return b"".join(map(content, range(offset // PAGE, (offset + size_bytes) // PAGE)))


async def test_a_page_whose_mapping_has_just_moved_is_not_forgotten(world: World) -> None:
    world.kernel.borders = {100}
    world.task.may_end()
    # The range lies in two mappings; then one of its pages has moved while the kernel looked.
    world.kernel.refusals = [errno.ENOENT, errno.ENOENT, errno.EAGAIN]
    await world.task.send_some()
    assert world.task.missing_bytes == 512 * PAGE
    world.kernel.tell(0x14, 16 * PAGE, 1000 * PAGE, 512 * PAGE)
    world.kernel.tell(0x16, 16 * PAGE, 528 * PAGE)
    world.task.hear()
    while not world.task.is_over:
        await world.task.send_some()
    assert world.kernel.filled == {page + 984: world.right(page) for page in range(16, 528)}


async def test_a_fault_for_a_page_that_has_just_moved_does_not_forget_it(world: World) -> None:
    world.kernel.refusals = [errno.ENOENT, errno.ENOENT, errno.EAGAIN]
    world.kernel.fault(100)
    world.task.hear()
    assert world.task.missing_bytes == 512 * PAGE


async def test_bytes_that_only_memory_holds_are_filled_in_a_mapping_that_was_split(
    nursery: trio.Nursery,
) -> None:
    world = World()
    world.task.lazy = LazyMemory(world.task.lazy.memory, [Transient(lambda: None)])
    world.kernel.borders = {101, 104}
    nursery.start_soon(world.task.run)
    world.kernel.fault(100)
    await until(lambda: 100 in world.kernel.filled)
    assert world.all_right()
    nursery.cancel_scope.cancel()


async def test_bytes_that_only_memory_holds_wait_for_what_the_kernel_has_to_say(
    nursery: trio.Nursery,
) -> None:
    world = World()
    world.kernel.is_strict = True

    def move() -> None:
        if len(file.reads) == 1:
            world.kernel.tell(0x14, 300 * PAGE, 1000 * PAGE, 10 * PAGE)

    file = Transient(move)
    world.task.lazy = LazyMemory(world.task.lazy.memory, [file])
    nursery.start_soon(world.task.run)
    world.kernel.fault(100)
    await until(lambda: 100 in world.kernel.filled)
    assert len(file.reads) == 2
    assert world.all_right()
    nursery.cancel_scope.cancel()


async def test_behind_what_a_trace_foretells_nothing_is_fetched_until_a_fault_is_there(
    nursery: trio.Nursery,
) -> None:
    world = World(here=range(256))
    world.file.foreseen = set(range(256))
    nursery.start_soon(world.task.run)
    for page in range(16, 272, 16):
        world.kernel.fault(page)
        await until(lambda page=page: page in world.kernel.filled)  # type: ignore[misc]
    assert not world.file.begun
    world.kernel.fault(272)
    await until(lambda: 272 in world.kernel.filled)
    assert world.file.begun[0][0] == 256
    assert world.all_right()
    nursery.cancel_scope.cancel()
