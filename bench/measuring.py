"""Measure ways to resume a process in turn, and compare its memory each time."""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from subprocess import SubprocessError

from boxes import Box, GaveUpError
from resuming import Case, Row, Way
from rich.console import Console
from testbed import TestbedError

_MOST = ("first_loop_s", "home_s", "done_s", "resumed_s", "mount_s", "criu_s", "link_s")
_SUM = ("fetched_bytes", "loop_fetched_bytes", "requests", "loop_requests", "cpu_s", "loop_cpu_s")
_TOLD = (("link_s", "link"), ("first_loop_s", "loop"), ("home_s", "home"), ("done_s", "proven"))


def resume(case: Case, way: Way, count: int) -> Row:
    """Resume the process by one way, in so many boxes at the same time; compare the memory.

    Of several, the row has the latest's seconds, and all bytes and processor time together.

    Raises:
        TestbedError: it failed, with any of them.
    """
    work = case.work / "boxes"
    shutil.rmtree(work, ignore_errors=True)
    way.begin(case)
    os.sync()
    with ExitStack() as stack:
        stack.callback(case.forget, "cold")
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        boxes = [
            stack.enter_context(Box(work / str(number), number, case.status, case.pid))
            for number in range(count)
        ]
        for box in boxes:
            stack.enter_context(way.around(case, box))
        ways = [ExitStack() for _ in boxes]
        for each in ways:
            stack.enter_context(each)

        def enter(number: int) -> Row:
            return ways[number].enter_context(way.resume(case, boxes[number]))

        pool = stack.enter_context(ThreadPoolExecutor(count))
        began = [pool.submit(enter, number) for number in range(count)]
        rows = [each.result() for each in began]
        for box in boxes if "first_loop_s" in rows[0] else ():
            if box.memory_hash(case.patience_s) != case.memory:
                raise TestbedError("the process's memory is not what it was")
    return rows[0] if count == 1 else together(rows)


def together(rows: Sequence[Row]) -> Row:
    """Make one row of those of several restores at once."""
    made: Row = {"each": list(rows)}
    for keys, join in ((_MOST, max), (_SUM, sum)):
        for key in keys:
            values = [row[key] for row in rows if row.get(key) is not None]
            if values:
                made[key] = join(values)
    return made


def measure(
    case: Case, ways: Mapping[str, Way], console: Console, *, at_once: int, runs: int
) -> dict[str, list[Row]]:
    """Measure every way in turn, run after run; a failure is a row, too."""
    rows: dict[str, list[Row]] = {name: [] for name in ways}
    given_up: set[str] = set()
    for number in range(runs):
        first = number * len(ways) // runs
        order = [*ways][first:] + [*ways][:first]
        for name in order:
            if name in given_up:
                continue
            began_s = time.monotonic()
            try:
                row = resume(case, ways[name], at_once)
            except GaveUpError as error:
                row = {"gave_up": str(error)}
                if not name.startswith("lazyfs"):
                    given_up.add(name)
                else:
                    row["failed"] = row["gave_up"]
            except (TestbedError, OSError, LookupError, ValueError, SubprocessError) as error:
                row = {"failed": f"{type(error).__name__}: {error}"}
            row["took_s"] = round(time.monotonic() - began_s, 1)
            rows[name].append(row)
            console.print(f"run {number + 1} {name}: {_told(row)}", highlight=False, markup=False)
    return rows


def _told(row: Row) -> str:
    for key in ("failed", "gave_up"):
        if key in row:
            return f"{key.upper().replace('_', ' ')}: {row[key]}"
    words = [f"{name} {row[key]:.2f} s" for key, name in _TOLD if row.get(key) is not None]
    fetched = row.get("loop_fetched_bytes", row.get("fetched_bytes"))
    return ", ".join([*words, *([f"{fetched / 1e6:,.1f} MB"] if fetched else [])])
