"""What a task does with memory that it misses, as its userfaultfd tells. Sans-I/O.

A thread of the task waits until its message has been read, so messages that are read together are
of different threads, and their order says little: the kernel lets go of the task's memory before
it queues them. So what is unmapped is forgotten last: a child that was made at the same time may
have it still, and what has been moved there is what came after it. And mremap(2) tells twice: that
memory has moved, and, once that has been read, that there is none where it was; by then another
thread may have moved its own there.

Source: Linux, mm/mremap.c (the order of its messages); CRIU, criu/uffd.c (handle_remove,
handle_remap, handle_fork).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from lazyfs.lazypages.missing import Missing
from lazyfs.lazypages.protocol import Event, Fault, Forked, Moved, Unmapped, Zeroed

_LEFT_MOST = 64
"""Moves that are remembered until the rest of them is told; of MREMAP_DONTUNMAP it never is."""


class Changes:
    """Of one task."""

    def __init__(self, missing: Missing) -> None:
        """`missing`: what they are noted in."""
        self._missing = missing
        self._left: deque[tuple[Unmapped, list[tuple[int, int]]]] = deque(maxlen=_LEFT_MOST)
        """What will be told to be unmapped since it has moved, and what has moved there since."""

    def apply(self, events: Iterable[Event], on_fork: Callable[[int], None]) -> list[int]:
        """Note all that was read together; return the addresses of faults, to be served then.

        `on_fork` is told the descriptor of a child when `missing` is what that has inherited.
        """
        faults: list[int] = []
        moved: list[tuple[int, int]] = []
        unmapped: list[Unmapped] = []
        for event in list(events):
            if isinstance(event, Fault):
                faults.append(event.address)
            elif isinstance(event, Forked):
                on_fork(event.descriptor)
            elif isinstance(event, Moved):
                moved.append(self._move(event))
            elif isinstance(event, Zeroed):
                self._missing.drop(*event)
            else:
                unmapped.append(event)
        for each in unmapped:
            for start, stop in _without(each, moved + self._moved_after(each)):
                self._missing.drop(start, stop)
        return faults

    def _move(self, event: Moved) -> tuple[int, int]:
        self._missing.move(*event)
        moved = event.to, event.to + event.length
        for left, since in self._left:
            if moved[0] < left.stop and left.start < moved[1]:
                since.append(moved)
        self._left.append((Unmapped(event.source, event.source + event.length), []))
        return moved

    def _moved_after(self, unmapped: Unmapped) -> list[tuple[int, int]]:
        """Return what has moved since this was unmapped, where a move has already told of that."""
        for number, (left, since) in enumerate(self._left):
            if left == unmapped:
                del self._left[number]
                return since
        return []


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
