"""What is missing of one task, and how it is filled in: nothing here waits.

Whoever calls has looked at `missing` after the last read of the task's messages, with no checkpoint
in between (`task.py` says why that is enough).
"""

import mmap
import os
from collections.abc import Iterable, Iterator

from lazyfs.ground.data import Data
from lazyfs.ground.errors import LazyfsError
from lazyfs.lazypages.missing import Missing
from lazyfs.lazypages.uffd import Copied, Outcome, Userfaultfd

PAGE = mmap.PAGESIZE


class Filling:
    """One task's memory, as far as it is still to come."""

    def __init__(self, name: str, uffd: Userfaultfd, missing: Missing) -> None:
        """`name`: whose memory it is, for messages."""
        self._name = name
        self.uffd = uffd
        self.missing = missing
        self.gone = False
        """Nothing more can be filled, or need be."""
        self.filled = 0
        """How often something was filled, for whoever wants to know whether anything was."""

    def fill_all(self, start: int, datas: Iterable[Data]) -> Outcome:
        """Fill missing memory of one mapping with bytes that follow one another."""
        for data in datas:
            outcome = self.fill(start, data)
            if outcome is not Outcome.DONE:
                return outcome
            start += len(data)
        return Outcome.DONE

    def fill(self, start: int, data: Data) -> Outcome:
        """Fill missing memory of one mapping; what is filled is missing no more.

        Raises:
            LazyfsError: the kernel refuses, for a reason that will not pass.
        """
        view = memoryview(data)
        done = 0
        while done < len(view):
            result = self._check(self.uffd.copy(start + done, view[done:]))
            size_bytes = result.size_bytes
            if result.outcome is Outcome.THERE:
                size_bytes = PAGE
                self.uffd.wake(start + done, PAGE)
            elif not size_bytes:
                return result.outcome
            self.missing.drop(start + done, start + done + size_bytes)
            self.filled += 1
            done += size_bytes
        return Outcome.DONE

    def fill_page(self, page: int, data: Data) -> Outcome:
        """Fill one page; if it is mapped no more, forget it."""
        outcome = self._fill_or_forget(page, data)
        if outcome is Outcome.UNMAPPED:
            self.uffd.wake(page, PAGE)
        return outcome

    def fill_by_page(self, start: int, data: Data) -> Outcome:
        """Fill what can be, where mappings have been split, or are not there any more."""
        for each, piece in _pages(data):
            outcome = self._fill_or_forget(start + each, piece)
            if outcome not in (Outcome.DONE, Outcome.UNMAPPED):
                return outcome
        return Outcome.DONE

    def _fill_or_forget(self, page: int, data: Data) -> Outcome:
        """Fill one page, or forget it.

        It is asked twice: the kernel (since 6.8) looks for the mapping before it looks anew whether
        memory is being changed, and whoever waits there for an mremap(2) that is under way finds
        none. Of that we have not been told yet, and the page has only moved; asked again it says
        so. Source: Linux, mm/userfaultfd.c (mfill_atomic, uffd_mfill_lock).
        """
        outcome = self.fill(page, data)
        if outcome is Outcome.UNMAPPED:
            outcome = self.fill(page, data)
        if outcome is Outcome.UNMAPPED:
            self.missing.drop(page, page + PAGE)
        return outcome

    def zero(self, page: int, stop: int) -> Copied:
        """Fill memory that the checkpoint has nothing for, all of it or the first page."""
        result = self._check(self.uffd.zero(page, stop - page))
        if result.outcome is Outcome.UNMAPPED and stop - page > PAGE:
            result = self._check(self.uffd.zero(page, PAGE))
        return result

    def _check(self, result: Copied) -> Copied:
        if result.outcome is Outcome.GONE:
            self.gone = True
        elif result.outcome is Outcome.FAILED:
            why = os.strerror(result.errno)
            raise LazyfsError(f"{self._name}: its memory cannot be filled: {why}")
        return result


def _pages(data: Data) -> Iterator[tuple[int, memoryview]]:
    view = memoryview(data)
    for offset in range(0, len(view), PAGE):
        yield offset, view[offset : offset + PAGE]
