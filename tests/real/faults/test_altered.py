"""Bytes that are other than they should be: on their way here, or in the cache.

Chunks and spans that have digests of their own are never given out wrong. A plain tar or gzip has
only the layer's digest: with `--verify=full` nothing is given out before it has been compared, and
without, what was given out before the comparison is counted for itself, as what it is.
"""

import random
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from testbed import ALTERING, Fault, Forecast, Readers
from testbed.process import wait_until

from tests.real.corpus import Corpus
from tests.real.faults.ledger import Ledger
from tests.real.faults.skies import (
    FORMS,
    PROVEN_FIRST,
    WEATHERED,
    Sky,
    assert_condemned,
    recover,
    weather_over,
)
from tests.real.mounts import Mount, lazyfs, mounted

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

MIB = 1 << 20
BY_LAYER_ONLY = tuple(name for name in FORMS if name not in PROVEN_FIRST)
LIED_TO = (
    "does not match its digest",
    "every read fails from now on",
    "answered with an error",
    "gave other bytes than before",
    "does not decompress",
    "could not be fetched ahead",
)
altering = pytest.mark.parametrize(
    "fault", sorted(ALTERING, key=lambda fault: fault.name), ids=lambda fault: fault.name.lower()
)


@altering
def test_proven_chunks_are_never_given_out_wrong(
    forms: Corpus, work: Path, ledger: Ledger, seed: int, fault: Fault
) -> None:
    with weather_over(forms, work, seed) as sky:
        with (
            sky.mounts(formats=PROVEN_FIRST, forgiven=LIED_TO) as mounts,
            Readers(2, seed=seed) as readers,
        ):
            sky.weather.turn(Forecast.of(fault, chance=1))
            for mount in mounts.values():
                ledger[fault.value].cases += 1
                readers.sweep(mount.directory, sky.truth)
            sky.weather.clear()
            tally = readers.tally()
            assert not tally.wrong, tally.wrong
            for mount in mounts.values():
                assert_condemned(readers, mount, sky.truth)
            tally = readers.tally()
            assert not tally.wrong, tally.wrong
            ledger[fault.value].tally.add(tally)
        _mount_again(sky, PROVEN_FIRST, ledger, fault)


@altering
def test_what_is_proven_in_full_is_never_given_out_wrong(
    forms: Corpus, work: Path, ledger: Ledger, seed: int, fault: Fault
) -> None:
    with weather_over(forms, work, seed) as sky:
        for name in BY_LAYER_ONLY:
            sky.weather.script(None, *[fault] * 40)  # the first is for the layer's format
            ledger[fault.value].cases += 1
            here = work / name
            (here / "mount").mkdir(parents=True)
            words = ["--plain-http", "--verify=full", "--cache-dir", here / "cache"]
            done = lazyfs("mount", *words, sky.reference(name), here / "mount")
            assert done.returncode in (3, 4, 5), done
            assert not (here / "mount").is_mount()
            sky.weather.clear()
        _mount_again(sky, BY_LAYER_ONLY, ledger, fault)


def test_what_is_proven_behind_is_found_out(
    forms: Corpus, work: Path, ledger: Ledger, seed: int
) -> None:
    """Without `--verify=full`: wrong bytes may have been given out, and the mount says so."""
    fault = Fault.WRONG_BYTES
    with weather_over(forms, work, seed) as sky:
        with (
            sky.mounts(formats=("tar",), forgiven=LIED_TO) as mounts,
            Readers(1, seed=seed) as readers,
        ):
            (mount,) = mounts.values()
            sky.weather.script(fault, fault, fault)
            swept = readers.sweep(mount.directory, sky.truth)
            sky.weather.clear()
            assert sky.weather.counts[fault] > 0
            ledger[fault.value].unproven_wrong_bytes += swept.wrong_bytes
            assert_condemned(readers, mount, sky.truth)
            ledger[fault.value].cases += 1
        _mount_again(sky, ("tar",), ledger, fault)


def _mount_again(sky: Sky, formats: tuple[str, ...], ledger: Ledger, fault: Fault) -> None:
    """After a failed proof nothing wrong is left in the cache: a new mount is right throughout."""
    ledger.note_weather(sky.weather.counts)
    with (
        sky.mounts(formats=formats, forgiven=LIED_TO) as mounts,  # the same log goes on
        Readers(1, seed=1) as readers,
    ):
        for mount in mounts.values():
            ledger[fault.value].tally.add(recover(readers, mount, sky.truth))
            ledger[fault.value].survived += 1


# -- in the cache -----------------------------------------------------------------------------

UNCACHED = ("could not be sealed", "later mounts will not find")
DAMAGED = ("has changed on disk", "is damaged", "an earlier mount made is not used")
FLIPS = {"content": 40, "marks": 3, "proven": 1, "index": 5}


@pytest.mark.parametrize("parts", [("content",), ("marks", "proven", "index")], ids="-".join)
def test_flipped_bits_in_the_cache_between_mounts(
    forms: Corpus, work: Path, ledger: Ledger, seed: int, parts: tuple[str, ...]
) -> None:
    entry = ledger[f"flipped bits in the cache's {', '.join(parts)}"]
    with weather_over(forms, work, seed) as sky, Readers(1, seed=seed) as readers:
        _fill(sky, readers)
        for part in parts:
            files = list(work.glob(f"*/cache/layers/*/{part}"))
            assert files
            for file in files:
                entry.faults += _flip(file, FLIPS[part], random.Random(seed))
        with sky.mounts(forgiven=DAMAGED) as mounts:
            for mount in mounts.values():
                entry.cases += 1
                entry.tally.add(recover(readers, mount, sky.truth))
                entry.survived += 1
        tally = readers.tally()
        assert not tally.wrong, tally.wrong


def test_flipped_bits_in_the_cache_under_mounts(
    forms: Corpus, work: Path, ledger: Ledger, seed: int
) -> None:
    """What an earlier mount has left, and this one has not used yet, is checked when it is."""
    entry = ledger["flipped bits in the cache, mounted"]
    with weather_over(forms, work, seed) as sky, Readers(1, seed=seed) as readers:
        _fill(sky, readers)
        with sky.mounts(forgiven=DAMAGED) as mounts:
            for content in work.glob("*/cache/layers/*/content"):
                size = content.stat().st_size  # its middle is pages that nobody has read yet
                start, chosen = size * 45 // 100, random.Random(seed)
                entry.faults += _flip(content, FLIPS["content"], chosen, start, size // 4)
            for mount in mounts.values():
                entry.cases += 1
                entry.tally.add(recover(readers, mount, sky.truth))
                entry.survived += 1
        tally = readers.tally()
        assert not tally.wrong, tally.wrong


def test_the_cache_is_removed_under_a_mount(
    forms: Corpus, work: Path, ledger: Ledger, seed: int
) -> None:
    entry = ledger["cache removed under a mount"]
    with weather_over(forms, work, seed) as sky, Readers(2, seed=seed) as readers:
        with sky.mounts(forgiven=UNCACHED) as mounts:
            for name, mount in mounts.items():
                readers.add(mount.directory, sky.truth)
                mount.wait_fetched(1)
                shutil.rmtree(work / name.replace(":", "-") / "cache/layers", ignore_errors=True)
                shutil.rmtree(work / name.replace(":", "-") / "cache/incoming", ignore_errors=True)
                entry.faults += 1
                entry.cases += 1
            for mount in mounts.values():
                readers.drop(mount.directory)
                recover(readers, mount, sky.truth)
                entry.survived += 1
        with sky.mounts(forgiven=UNCACHED) as mounts:
            for mount in mounts.values():
                recover(readers, mount, sky.truth)
        entry.tally.add(readers.tally())
        assert not entry.tally.wrong, entry.tally.wrong


def test_a_full_disk_costs_no_byte(forms: Corpus, work: Path, ledger: Ledger, seed: int) -> None:
    """Random access goes on without the cache; a stream needs room, and goes on when there is."""
    entry = ledger["cache's disk full"]
    disk = work / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "lazyfs", str(disk)], check=True)
    try:
        with weather_over(forms, work, seed) as sky, Readers(2, seed=seed) as readers:
            for name in FORMS:
                forgiven = (*WEATHERED, "takes no more", "no room", "room", "No space", "cache")
                cache = disk / "cache"
                with mounted(
                    sky.reference(name), work / f"full-{name}", cache=cache, forgiven=forgiven
                ) as mount:
                    entry.faults += 1
                    entry.cases += 1
                    full = readers.sweep(mount.directory, sky.truth)
                    assert not full.wrong, full.wrong
                    resize = ["mount", "-o", "remount,size=128m", str(disk)]
                    subprocess.run(resize, check=True)
                    recover(readers, mount, sky.truth)
                    entry.survived += 1
                shutil.rmtree(cache)
                subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
            entry.tally.add(readers.tally())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _fill(sky: Sky, readers: Readers) -> None:
    """Mount, read and prove all, so that the caches are full."""
    with sky.mounts() as mounts:
        for mount in mounts.values():
            readers.sweep(mount.directory, sky.truth)
        for mount in mounts.values():
            wait_until(partial(_is_settled, mount), "that it is proven", 60)


def _is_settled(mount: Mount) -> bool:
    state = mount.status()
    return bool(state["blob_proven"] or state["chunks_proven"])


def _flip(file: Path, count: int, chosen: random.Random, start: int = 0, size: int = 0) -> int:
    """Flip bits of a file in place; return how many."""
    size = size or file.stat().st_size
    with file.open("r+b", buffering=0) as damaged:
        for _ in range(min(count, size)):
            at = start + chosen.randrange(size)
            damaged.seek(at)
            byte = damaged.read(1)[0] ^ (1 << chosen.randrange(8))
            damaged.seek(at)
            damaged.write(bytes([byte]))
    return min(count, size)
