"""Incremental checkpoints, made of a full one.

`criu pre-dump` needs the kernel's soft-dirty tracking, which not every kernel has. So a full dump
is split, with CRIU's own library, into what a chain of pre-dumps and a last dump would have left:
each page is present in one directory of the chain, and `in_parent` (CRIU's PE_PARENT) in the
later ones.

Earlier directories also hold the older versions of pages that changed in between: they are
present there with other bytes, so whoever resolves a page to the wrong directory is found out.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from .errors import TestbedError
from .roots import Testbed
from .session import Session

PAGE_BYTES = 4096
_PE_PARENT, _PE_LAZY, _PE_PRESENT = 1, 2, 4  # CRIU, criu/include/pagemap.h
_LONGEST_RUN_PAGES = 400


@dataclass(frozen=True)
class Run:
    """Neighbouring pages that came to be in the same dump of the chain."""

    address: int
    pages: int
    flags: int
    first_page: int
    """Where they are in the pages file of the full dump."""
    level: int
    """The dump of the chain, from 0, that has them as they are."""
    stale: bool
    """Whether the dumps before that have them too, with the bytes of then."""


def split_dump(
    testbed: Testbed, images_dir: Path, directories: list[Path], *, seed: int = 1
) -> None:
    """Split a full dump into a chain: pre-dumps, oldest first, then the dump that is restored.

    Args:
        testbed: where pycriu is.
        images_dir: the full dump, left as it is.
        directories: made by this, beside each other; each but the first has a symbolic link
            `parent` to the one before, relative, as `--prev-images-dir` makes it.
        seed: of the choice which pages go where.

    Raises:
        TestbedError: the directories are not beside each other, or pycriu failed.
    """
    base = directories[0].absolute().parent
    if any(each.absolute().parent != base for each in directories):
        raise TestbedError("the directories of a chain lie beside each other")
    chance = random.Random(seed)
    last = directories[-1]
    shutil.copytree(images_dir, last)
    for earlier in directories[:-1]:
        earlier.mkdir(parents=True)
        shutil.copy2(images_dir / "inventory.img", earlier)  # as pre-dump leaves it
    for earlier, later in pairwise(directories):
        (later / "parent").symlink_to(f"../{earlier.name}")
    pagemaps = sorted(images_dir.glob("pagemap-*.img"))
    with Session(testbed, [images_dir, base]) as session:
        for pagemap, entries in zip(pagemaps, _decode(session, pagemaps), strict=True):
            _split(pagemap, entries, directories, chance)
        _encode(session, [each / pagemap.name for each in directories for pagemap in pagemaps])


def _decode(session: Session, images: list[Path]) -> list[list[dict[str, Any]]]:
    script = "import json, sys, pycriu.images as images\n"
    script += (
        "print(json.dumps([images.load(open(path, 'rb'))['entries'] for path in sys.argv[1:]]))"
    )
    said = session.run(["python3", "-c", script, *(image.absolute() for image in images)])
    entries: list[list[dict[str, Any]]] = json.loads(said)
    return entries


def _encode(session: Session, images: list[Path]) -> None:
    """Have files that are JSON be what they are named."""
    script = "import json, sys, pycriu.images as images\n"
    script += "for path in sys.argv[1:]:\n"
    script += "    image = json.load(open(path))\n"
    script += "    images.dump(image, open(path, 'wb'))"
    session.run(["python3", "-c", script, *(image.absolute() for image in images)])


def _split(
    pagemap: Path,
    whole: list[dict[str, Any]],
    directories: list[Path],
    chance: random.Random,
) -> None:
    head, *entries = whole
    pages_name = f"pages-{head['pages_id']}.img"
    runs = _runs(entries, len(directories), chance)
    for level, directory in enumerate(directories):
        with (
            (pagemap.parent / pages_name).open("rb") as full,
            (directory / pages_name).open("wb") as pages,
        ):
            mine = [head, *_write_level(level, runs, full, pages)]
        image = {"magic": "PAGEMAP", "entries": mine}
        (directory / pagemap.name).write_text(json.dumps(image))


def _runs(entries: list[dict[str, Any]], levels: int, chance: random.Random) -> list[Run]:
    runs, first_page = [], 0
    for entry in entries:
        address, left, flags = entry["vaddr"], entry["nr_pages"], _flags(entry["flags"])
        while left:
            pages = min(left, chance.randint(1, _LONGEST_RUN_PAGES))
            level, stale = chance.randrange(levels), chance.random() < 0.5
            runs.append(Run(address, pages, flags, first_page, level, stale))
            address, first_page, left = (
                address + pages * PAGE_BYTES,
                first_page + pages,
                left - pages,
            )
    return runs


def _write_level(
    level: int, runs: list[Run], full: BinaryIO, pages: BinaryIO
) -> list[dict[str, Any]]:
    """Write one dump's pages; return its pagemap entries."""
    entries = []
    for run in runs:
        if run.level > level and not run.stale:
            continue  # not mapped yet
        present = run.level >= level
        flags = run.flags if present else _PE_PARENT
        entries.append({"vaddr": run.address, "nr_pages": run.pages, "flags": flags})
        if present:
            full.seek(run.first_page * PAGE_BYTES)
            content = full.read(run.pages * PAGE_BYTES)
            if run.level > level:  # bytes of another time
                content = bytes(reversed(content))
            pages.write(content)
    return entries


def _flags(value: int | str) -> int:
    """Return a pagemap entry's flags, which some versions of pycriu spell out."""
    if isinstance(value, int):
        return value
    names = {"PE_PARENT": _PE_PARENT, "PE_LAZY": _PE_LAZY, "PE_PRESENT": _PE_PRESENT}
    return sum(names[name.strip()] for name in value.split("|"))
