#!/usr/bin/env python3
"""Does lazyfs stay as it is, with fifty mounts, in bad weather, for as long as one likes?

Fifty mounts of one checkpoint in four formats and some variants, half of them there throughout,
half coming and going; processes that read random places of all of them and compare each byte with
the truth; a proxy before a real registry that injects faults, and the registry itself killed and
started again.
Where `lazyfs mount` has `--cache-size` the cache is too small for all, so that layers are evicted;
else every newcomer has an empty cache of its own, so that there is always something to fetch.

Each daemon's anonymous memory, descriptors and threads are sampled. At the end: what was read, what
was wrong (nothing, or the exit code is 1), and by how much a daemon has grown, as the slope of a
line through the samples of those that were there throughout.

    bench/soak.py [--minutes 10] [--mounts 50] [--readers 4] [--size 24] [--seed 1] [--json FILE]
"""

import argparse
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, linear_regression, median
from typing import Any

from formats import push_formats
from harness import LAZYFS_WORDS, Mount, machine, write_json
from testbed import (
    PASSING,
    Fault,
    Forecast,
    Layer,
    Readers,
    Registry,
    Session,
    Testbed,
    Weather,
    Workload,
    dump,
    push_oci_image,
    skopeo_copy,
    tar_checkpoint,
)

VARIANTS = 12
"""How many images there are that differ in a file: more than are mounted at a time."""
RESIDENT = ("soak/0-tar:1", "soak/0-gzip:1", "soak/0-chunked:1", "bench/soci-v1:enabled")
COMING = tuple(
    f"soak/{variant}-{form}:1"
    for variant in range(1, VARIANTS + 1)
    for form in ("tar", "gzip", "chunked")
)
RATE_BYTES_S = 64 << 20
SAMPLE_S = 5.0
REPLACE_S = 1.0
TURN_S = 10.0
RESTART_S = 60.0
CACHE_SIZE = "800M"
"""Enough for what is mounted at a time, and not for all that comes."""
ROUGH = Forecast(
    dict.fromkeys(PASSING - {Fault.TOKEN_EXPIRED, Fault.URL_EXPIRED, Fault.GARBAGE}, 1.0),
    chance=0.4,
    stall_s=2.0,
)


@dataclass
class Sample:
    """One daemon at one moment."""

    at_s: float
    anonymous_bytes: int
    descriptors: int
    threads: int


@dataclass
class Inhabitant:
    """A place for a mount, and the daemon that serves it now."""

    number: int
    work: Path
    cache: Path
    pid: int = 0
    own_cache: bool = False
    samples: list[Sample] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        """Where it is mounted."""
        return self.work / "mount"


class Soak:
    """The mounts, and what becomes of them."""

    def __init__(self, options: Any, work: Path, weather: Weather, registry: Registry) -> None:
        self._options, self._work = options, work
        self._weather, self._registry = weather, registry
        self._random = random.Random(options.seed)
        self._bounded = "--cache-size" in _help()
        self._began_s = time.monotonic()
        self.mounted = 0
        self.restarts = 0
        self.problems: list[str] = []
        self.evictions = 0
        self._layers: set[str] = set()
        self.inhabitants = [
            Inhabitant(number, work / f"{number}", work / "cache")
            for number in range(options.mounts)
        ]

    def run(self, readers: Readers) -> None:
        """Mount all, then let it rain until the time is up; leave everything mounted."""
        truth = self._work / "images"
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self.mount, self.inhabitants))
        for each in self.inhabitants:
            readers.add(each.directory, truth)
        print(f"{len(self.inhabitants)} mounts after {self._now_s():.0f} s", flush=True)
        began_s = self._now_s()
        due = dict.fromkeys(("sample", "replace", "turn"), began_s) | {"restart": began_s + 20}
        while self._now_s() < began_s + self._options.minutes * 60:
            now_s = self._now_s()
            if now_s >= due["turn"]:
                rainy = self._weather.forecast is not ROUGH
                self._weather.turn(ROUGH) if rainy else self._weather.clear()
                due["turn"] = now_s + TURN_S
            if now_s >= due["restart"]:
                self._registry.kill()
                self._registry.start()
                self.restarts += 1
                due["restart"] = now_s + RESTART_S
            if now_s >= due["sample"]:
                self._sample()
                due["sample"] = now_s + SAMPLE_S
            if now_s >= due["replace"]:
                self._replace(readers, truth)
                due["replace"] = now_s + REPLACE_S
            time.sleep(0.05)
        self._weather.clear()
        self._sample()

    def mount(self, each: Inhabitant) -> None:
        """Mount one of the images there."""
        comes = each.number >= len(self.inhabitants) // 2
        image = self._random.choice(COMING if comes else RESIDENT)
        reference = f"{self._weather.address}/{image}"
        each.own_cache = comes and not self._bounded
        cache = each.work / "cache" if each.own_cache else each.cache
        each.directory.mkdir(parents=True, exist_ok=True)
        command = [*LAZYFS_WORDS, "mount", "--plain-http", "--cache-dir", str(cache)]
        command += ["--log-file", str(each.work / "log")]
        command += ["--cache-size", CACHE_SIZE] if self._bounded else []
        command += [reference, str(each.directory)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
        each.pid = Mount(each.directory, 0).status()["pid"]
        each.samples = []
        self.mounted += 1

    def umount(self, each: Inhabitant) -> None:
        """Unmount, after a look at the mount's account of itself."""
        state = Mount(each.directory, 0).status()
        if state["failed"]:
            self.problems.append(f"mount {each.number} has failed: {state['failed']}")
        subprocess.run([*LAZYFS_WORDS, "umount", str(each.directory)], check=True, timeout=120)
        if each.own_cache:
            shutil.rmtree(each.work / "cache")

    def _replace(self, readers: Readers, truth: Path) -> None:
        """Let one of the second half go, and another come."""
        comers = self.inhabitants[len(self.inhabitants) // 2 :]
        each = self._random.choice(comers)
        readers.drop(each.directory)
        self.umount(each)
        self.mount(each)
        readers.add(each.directory, truth)

    def _sample(self) -> None:
        for each in self.inhabitants:
            try:
                each.samples.append(_sample_of(each.pid, self._now_s()))
            except OSError as error:
                self.problems.append(f"daemon {each.pid} of mount {each.number}: {error}")
        layers = {path.name for path in (self._work / "cache/layers").glob("*")}
        self.evictions += len(self._layers - layers)
        self._layers = layers

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    def growth(self) -> dict[str, dict[str, float]]:
        """Return what daemons that were there throughout hold, and by how much it grows a minute.

        The first fifth of the time is left out: there they fill what they keep.
        """
        residents = self.inhabitants[: len(self.inhabitants) // 2]
        figures = {}
        for name in ("anonymous_bytes", "descriptors", "threads"):
            slopes, firsts, lasts = [], [], []
            for each in residents:
                kept = each.samples[len(each.samples) // 5 :]
                values = [float(getattr(sample, name)) for sample in kept]
                if len(values) > 2:
                    times = [sample.at_s / 60 for sample in kept]
                    slopes.append(linear_regression(times, values).slope)
                    firsts.append(values[0])
                    lasts.append(values[-1])
            if slopes:
                figures[name] = {
                    "first_mean": fmean(firsts),
                    "last_mean": fmean(lasts),
                    "slope_a_minute_median": median(slopes),
                    "slope_a_minute_mean": fmean(slopes),
                    "slope_a_minute_most": max(slopes),
                    "most": max(
                        getattr(sample, name) for each in residents for sample in each.samples
                    ),
                }
        return figures

    def alarms(self) -> Counter[str]:
        """Return what the daemons have warned of, by the first words; a traceback is a problem."""
        found: Counter[str] = Counter()
        for each in self.inhabitants:
            text = (each.work / "log").read_text(errors="replace")
            if "Traceback" in text:
                self.problems.append(f"a bug: {text[text.index('Traceback') :][:2000]}")
            for line in text.splitlines():
                words = line.split(" ", 4)
                if len(words) == 5 and words[2] in ("WARNING", "ERROR", "CRITICAL"):
                    found[f"{words[2]} {' '.join(words[4].split()[:5])[:60]}"] += 1
        return found


def _sample_of(pid: int, now_s: float) -> Sample:
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    anonymous_bytes = int(fields["RssAnon"].split()[0]) * 1024
    return Sample(now_s, anonymous_bytes, descriptors, int(fields["Threads"]))


def _help() -> str:
    command = [*LAZYFS_WORDS, "mount", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _prepare(testbed: Testbed, work: Path, stack: ExitStack, size_mib: int) -> Registry:
    """Dump a process, and push it in all forms, and in variants that have one more file."""
    with Workload(testbed, work / "status", size_mib=size_mib) as workload:
        dump(testbed, workload.pid, work / "images", work / "dump")
    tar = work / "checkpoint.tar"
    tar_checkpoint(work / "images", tar)
    registry = stack.enter_context(Registry(testbed, work / "registry"))
    at = registry.address
    with Session(testbed, [work]) as session:
        push_formats(session, registry, tar, ["soci-v2"])
        for variant in range(VARIANTS + 1):
            with tarfile.open(tar, "a") as archive:
                archive.addfile(tarfile.TarInfo(f"checkpoint/variant-{variant}"))
            push_oci_image(at, f"soak/{variant}-tar", "1", [Layer(tar)])
            source = f"docker://{at}/soak/{variant}-tar:1"
            for form, compression in (("gzip", "gzip"), ("chunked", "zstd:chunked")):
                target = f"docker://{at}/soak/{variant}-{form}:1"
                skopeo_copy(session, source, target, f"--dest-compress-format={compression}")
    return registry


def _tell(result: dict[str, Any]) -> None:
    reads = result["reads"]
    print(f"\n{result['minutes']:g} minutes, {result['mounts']} mounts at once, ", end="")
    print(f"{result['mounted']} in all; registry restarted {result['registry_restarts']} times")
    print(f"reads {reads['reads']:,}, {reads['bytes_read'] / 1e9:.2f} GB right; ", end="")
    print(f"errors {reads['errors'] or 0}; WRONG BYTES {reads['wrong_bytes']}")
    evictions = "not bounded" if result["evictions"] is None else result["evictions"]
    print(f"fetched {result['sent_bytes'] / 1e9:.2f} GB; layers evicted: {evictions}")
    print(f"faults {sum(result['faults'].values())}: {result['faults']}")
    for name, growth in result["growth"].items():
        unit, scale = (" MB", 1e6) if name.endswith("bytes") else ("", 1)
        print(
            f"{name:16} {growth['first_mean'] / scale:8.2f}{unit} -> "
            f"{growth['last_mean'] / scale:8.2f}{unit} a daemon; a minute "
            f"{growth['slope_a_minute_median'] / scale:+.3f}{unit} (median), "
            f"{growth['slope_a_minute_most'] / scale:+.3f}{unit} (most); "
            f"most held {growth['most'] / scale:.1f}{unit}"
        )
    for line, count in result["alarms"].items():
        print(f"{count:6} x {line}")
    for problem in result["problems"]:
        print(f"PROBLEM: {problem}")


def main() -> int:
    """Soak, tell, and say whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--mounts", type=int, default=50)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--size", type=int, default=24, help="MiB of the process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    testbed = Testbed.locate()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-soak-")))
        registry = _prepare(testbed, work, stack, options.size)
        weather = stack.enter_context(
            Weather(registry.address, seed=options.seed, rate_bytes_s=RATE_BYTES_S)
        )
        soak = Soak(options, work, weather, registry)
        stack.callback(_clear, soak)
        with Readers(options.readers, seed=options.seed) as readers:
            soak.run(readers)
            for each in soak.inhabitants:
                readers.drop(each.directory)
            tally = readers.tally()
        growth = soak.growth()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(soak.umount, soak.inhabitants))
        result = {
            "machine": machine(),
            "minutes": options.minutes,
            "mounts": options.mounts,
            "mounted": soak.mounted,
            "registry_restarts": soak.restarts,
            "reads": tally.as_json(),
            "sent_bytes": weather.sent_bytes.total(),
            "evictions": soak.evictions if "--cache-size" in _help() else None,
            "faults": {fault.value: count for fault, count in weather.counts.most_common()},
            "growth": growth,
            "alarms": dict(soak.alarms().most_common(20)),
            "problems": soak.problems,
        }
    _tell(result)
    write_json(options.json, result)
    return 1 if tally.wrong_bytes or soak.problems else 0


def _clear(soak: Soak) -> None:
    """Leave no mount behind, whatever has happened."""
    for each in soak.inhabitants:
        with suppress(OSError, subprocess.SubprocessError):
            if each.directory.is_mount():
                subprocess.run(["umount", "-l", str(each.directory)], check=False)


if __name__ == "__main__":
    sys.exit(main())
