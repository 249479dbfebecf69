"""A restore is told from those who look around by what it opens, in which order."""

from collections.abc import Iterable

import pytest

from lazyfs.checkpoint.restore_sign import MemoryReads, RestoreSign

from . import sample

CRIU = ["inventory.img", "pstree.img", "ids-1.img", "files.img", "mm-1.img", "core-1.img"]
"""As CRIU 4.1.1 opens them; what is not there it only looks up."""
NAMES = sorted(sample.images())


def has_begun(names: Iterable[str], pid: int = 1, sign: RestoreSign | None = None) -> bool:
    sign = sign or RestoreSign()
    found = [sign.opened(name, pid) for name in names]
    return any(found)


@pytest.mark.parametrize(
    "names",
    [
        CRIU,
        ["inventory.img", "pstree.img", "mm-7.img", "pagemap-7.img"],  # criu lazy-pages
        ["inventory.img", "cpuinfo.img", "inventory.img", "pstree.img", "files.img", "core-1.img"],
    ],
)
def test_criu_is_known(names: list[str]) -> None:
    assert has_begun(names)
    sign = RestoreSign()
    found = [sign.opened(name, 1) for name in [*names, *names]]
    assert found.count(True) == 1


@pytest.mark.parametrize(
    "names",
    [
        NAMES,  # cp -r, tar, grep -r
        NAMES[::-1],
        [],  # ls
        ["pstree.img", "core-1.img", "files.img", "mm-1.img"],  # crit x DIR mems
        ["pstree.img", "core-1.img", "inventory.img"],
        ["config.dump", "stats-dump", "inventory.img", "pstree.img"],
        ["inventory.img", "files.img", "mm-1.img"],
        ["stats-dump", "inventory.img", "pstree.img", "core-1.img"],
    ],
)
def test_others_are_not_taken_for_it(names: list[str]) -> None:
    assert not has_begun(names)


def test_who_looks_at_one_file_after_the_other_is_several_processes() -> None:
    sign = RestoreSign()
    assert not any(sign.opened(name, pid) for pid, name in enumerate(CRIU, 100))


def test_a_restore_is_seen_among_others() -> None:
    sign = RestoreSign()
    found = []
    for at, name in enumerate(CRIU):
        for other in range(200, 240):
            sign.opened(NAMES[at], other)
        found.append(sign.opened(name, 7))
    assert found.count(True) == 1


def test_it_remembers_a_few_processes_only() -> None:
    sign = RestoreSign()
    assert not has_begun(CRIU[:2], 7, sign)
    for pid in range(1000, 1100):
        sign.opened("core-1.img", pid)
    assert not has_begun(CRIU[2:], 7, sign)


def test_memory_is_read_from_a_pages_file_that_a_task_opens_again() -> None:
    reads = MemoryReads()
    opened = [("pages-1.img", 7), ("pages-2.img", 8), ("pagemap-7.img", 7), ("pagemap-7.img", 7)]
    assert not any(reads.opened(*each) for each in opened)
    assert reads.opened("pages-1.img", 7)
    assert not reads.opened("pages-2.img", 7), "a parent's"
    assert reads.opened("pages-2.img", 8)


def test_a_task_of_another_restore_may_have_the_same_number() -> None:
    reads = MemoryReads()
    assert [reads.opened("pages-1.img", 7) for _ in range(4)] == [False, True, False, True]


def test_tasks_that_cannot_be_told_apart_read_none() -> None:
    reads = MemoryReads()
    assert not any(reads.opened("pages-1.img", 0) for _ in range(3))


def test_of_ever_more_tasks_the_latest_are_known() -> None:
    reads = MemoryReads()
    assert not any(reads.opened("pages-1.img", pid) for pid in range(1, 100_000))
    assert reads.opened("pages-1.img", 99_999)
    assert not reads.opened("pages-1.img", 1)
