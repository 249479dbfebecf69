#!/usr/bin/env python3
"""How soon does a checkpointed process run again, by lazyfs and by what else there is?

Each way in turn, run after run, the order moving on by one each time; the process's memory is
compared each time. What the link alone needs is measured between them, and so is the local disk
with its page cache warm. Peers are at their best: a pull is `curl | tar`, unpacked while it
arrives, which no engine does; SOCI's programs run before its clock starts. Each restore runs in
pid and mount namespaces of its own (`boxes.py`); the clock starts with a way's first command.

    bench/peers.py [--size 1024 ...] [--pattern regions ...] [--links 1gbit ...] [--at-once 1 ...]
                   [--runs 5] [--only PATTERN ...] [--stage DIR] [--json FILE] [--plot FILE]

`--stage DIR` keeps what was prepared (a checkpoint in four formats) for another run: of 4096 MiB
that takes a quarter of an hour and 17 GB, and 10 GB more while it is measured. `--only` takes
names of ways, with `*`; `--list` prints them. Several at once are measured of the ways for which
that says something.

Ends with 1 if a way failed; not if another's only took too long, which is told.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from aims import Conditions, aims_of, crowd_aims, judge, middle, profile, table
from harness import machine, write_json
from measuring import measure
from resuming import LINKS as LINK_WAYS
from resuming import WAYS, Case, Row, Way
from rich.console import Console
from stage import LINKS, Stage, features, missing
from testbed import Testbed

Cases = list[dict[str, Any]]

_PATIENCE_S = 40.0
_PATIENCE_S_A_GIB = 45.0
"""A way may take so long, and this for each GiB: five times what the shaped link needs."""
_MEMORY_SPARE = 0.75

console = Console(width=170, soft_wrap=False)


def choose(options: Any, has: frozenset[str]) -> dict[str, Way]:
    """Return the ways that are asked for and can be had; say which cannot."""
    chosen: dict[str, Way] = {}
    patterns: list[str] = options.only or ["*"]
    for name, way in WAYS.items():
        if not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        lacks = missing(way.needs, has)
        if lacks:
            console.print(f"left out, for this lazyfs has no {lacks}: {name}", highlight=False)
        else:
            chosen[name] = way
    forms = {need for way in chosen.values() for need in way.needs}
    links = {name: way for name, way in LINK_WAYS.items() if way.needs <= forms | {"tar"}}
    return links | chosen


def measure_all(testbed: Testbed, options: Any, note: Callable[[Cases], None]) -> Cases:
    """Measure all cases; `note` is told after each of those up to then."""
    ways = choose(options, has := features())
    cases: Cases = []
    for size_mib in options.size:
        for pattern in options.pattern:
            with ExitStack() as stack:
                directory = _directory(stack, options.stage, size_mib, pattern)
                began_s = time.monotonic()
                stage = Stage(testbed, directory, size_mib, pattern)
                stage.push(frozenset({"tar"}.union(*(way.needs for way in ways.values()))))
                prepared_s = time.monotonic() - began_s
                console.print(f"\n{size_mib} MiB {pattern}: prepared in {prepared_s:.0f} s")
                for link in options.links:
                    patience_s = _PATIENCE_S + _PATIENCE_S_A_GIB * size_mib / 1024
                    with stage.beyond(link, has, patience_s) as case:
                        alone: dict[str, list[Row]] = {}
                        for at_once in sorted(options.at_once):
                            conditions = Conditions(size_mib, pattern, link, at_once)
                            runs = options.runs
                            found = _measure_case(case, stage, ways, conditions, runs, alone)
                            if at_once == 1:
                                alone = found["rows"]
                            cases.append(found | {"prepared_s": round(prepared_s, 1)})
                            note(cases)
                shutil.rmtree(stage.directory / "caches", ignore_errors=True)
    return cases


def _measure_case(
    case: Case,
    stage: Stage,
    ways: dict[str, Way],
    conditions: Conditions,
    runs: int,
    alone: dict[str, list[Row]],
) -> dict[str, Any]:
    """Measure one case, print its table, and return it for the JSON."""
    console.print(f"\n{conditions}", style="bold", highlight=False)
    if conditions.at_once > 1:
        ways = {name: way for name, way in ways.items() if way.at_once}
        wanted = conditions.at_once * conditions.size_mib << 20
        if wanted > _MEMORY_SPARE * _memory_bytes():
            console.print(f"not measured: it needs {wanted / 1e9:.0f} GB of memory")
            ways = {}
    began_s = time.monotonic()
    rows = measure(case, ways, console, at_once=conditions.at_once, runs=runs)
    if conditions.at_once > 1:
        verdicts = judge(crowd_aims(), rows, alone)
    else:
        verdicts = judge(aims_of(conditions), rows, rows)
    link_s = middle(rows.get("link, uncompressed", ()), "link_s")
    of = alone if conditions.at_once > 1 else None
    console.print(table(conditions, rows, verdicts, link_s, of))
    if (why := profile(rows, verdicts)) is not None:
        console.print(why)
    return {
        "size_mib": conditions.size_mib,
        "pattern": conditions.pattern,
        "link": conditions.link,
        "at_once": conditions.at_once,
        "layer_bytes": stage.form_bytes,
        "took_s": round(time.monotonic() - began_s, 1),
        "aims": [each.as_json() for each in verdicts],
        "rows": rows,
    }


def _directory(stack: ExitStack, kept: Path | None, size_mib: int, pattern: str) -> Path:
    if kept is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-peers-")))
    directory = kept / f"{size_mib}-{pattern}"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main() -> None:
    """Measure, interleaved; print tables; write JSON and a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--size", type=int, nargs="+", default=[1024], help="MiB of memory")
    parser.add_argument(
        "--pattern", nargs="+", choices=["regions", "scattered"], default=["regions"]
    )
    parser.add_argument("--links", nargs="+", choices=list(LINKS), default=["1gbit"])
    parser.add_argument("--at-once", type=int, nargs="+", default=[1])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="names of ways, with *")
    parser.add_argument("--list", action="store_true", help="print the ways, and end")
    parser.add_argument("--stage", type=Path, metavar="DIR", help="keep what is prepared")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a picture: .svg, .png")
    options = parser.parse_args()
    if options.list:
        print("\n".join(WAYS))
        return
    began_s = time.monotonic()
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": machine(),
        "links": {name: LINKS[name] for name in options.links},
        "runs": options.runs,
    }

    def note(cases: Cases) -> None:
        """Keep what there is: a later case may not come to its end."""
        result.update(took_s=round(time.monotonic() - began_s, 1), cases=cases)
        write_json(options.json, result)

    cases = measure_all(Testbed.locate(), options, note)
    if options.plot is not None:
        from picture import draw

        draw(result, options.plot)
    measured = [row for case in cases for rows in case["rows"].values() for row in rows]
    sys.exit(1 if any("failed" in row for row in measured) else 0)


if __name__ == "__main__":
    main()
