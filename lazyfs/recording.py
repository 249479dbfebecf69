"""From what was noted while a workload was restored to its trace. Sans-I/O.

Decides what a workload *needed*: of all ranges that were read, or that faults were served with,
each byte once, where it was first wanted. What was fetched beside is not needed, however early it
came. Ranges that touch each other, wanted within a few milliseconds, are one: a task that walks
through memory asks page by page, and a trace should be small.

Must not: change what it is given, which may go on growing meanwhile; it is looked at once.
"""

import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

import lazyfs
from lazyfs.checkpoint.opened import OpenedCheckpoint
from lazyfs.checkpoint.trace import (
    FILES_MOST,
    LAYERS_MOST,
    Arrival,
    Fetch,
    Mark,
    Need,
    Phase,
    Read,
    Recording,
    Trace,
    TracedFile,
    TracedLayer,
    can_hold,
)
from lazyfs.ground.journal import Journal
from lazyfs.ground.printable import printable
from lazyfs.ground.ranges import Covered
from lazyfs.ground.settings import KIB
from lazyfs.layers.model import EntryType

_NEEDS_MOST = 100_000
"""More would make a hint larger than anybody believes; what was wanted last is left out."""
_TOGETHER_MS = (5.0, 50.0, 500.0, float("inf"))
"""Within which ranges are one; the next where there are too many."""
_STAGES = (
    ("began", "opening", "lazyfs: start"),
    ("opening", "resolved", "lazyfs: find the image"),
    ("resolved", "opened", "lazyfs: open its layers"),
    ("opened", "mounted", "lazyfs: mount"),
    ("restore started", "restored", "restore"),
    ("restored", "until", "until the first answer"),
)
"""Phases by the marks between which they lie."""


class Wanted(NamedTuple):
    """A range of a file that somebody wanted."""

    file: int
    offset: int
    size_bytes: int
    at_ms: float


class Located(NamedTuple):
    """Where a file's bytes lie."""

    layer: int
    start: int
    """In the layer's content address space."""
    size_bytes: int


class Layout(msgspec.Struct, frozen=True):
    """Where the files of a checkpoint lie."""

    layers: Sequence[TracedLayer]
    blobs: Mapping[str, int]
    """The layer of each blob, by the blob's name."""
    files: Mapping[str, Located]


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What is told of a recording beside its events."""

    workload: str = ""
    until: str = ""
    reference: str = ""
    way: str = ""
    is_partial: bool = False
    """`Trace.is_partial`."""
    began_s: float = 0.0
    """The trace's zero, by `time.monotonic`."""
    ended_s: float = 0.0
    phases: Sequence[Phase] = ()
    """Of others, by the trace's zero."""
    figures: Mapping[str, Any] = msgspec.field(default_factory=dict)


def layout_of(checkpoint: OpenedCheckpoint) -> Layout:
    """Return where a checkpoint's files lie, as far as they are known by now.

    Those whose names no trace can hold, since they are not UTF-8, are left out.
    """
    layers = [
        TracedLayer(str(layer.descriptor.digest or ""), layer.descriptor.size_bytes)
        for layer in checkpoint.layers[:LAYERS_MOST]
    ]
    blobs = {layer.blob_name: number for number, layer in enumerate(checkpoint.layers)}
    files = {
        path: Located(node.layer, node.content_start, node.size_bytes)
        for path, node in checkpoint.tree.walk(checkpoint.tree.root)
        if node.type is EntryType.FILE and node.layer < LAYERS_MOST and can_hold(path)
    }
    return Layout(layers, blobs, files)


def trace_of(journal: Journal, layout: Layout, about: About) -> Trace:
    """Return the trace of what was noted up to `about.ended_s`."""
    noted = _Noted(layout, about)
    reads = [note for note in journal.reads[:] if note.began_s <= about.ended_s]
    reads.sort(key=lambda note: note.began_s)
    found, wanted = [], []
    for note in reads:
        number = noted.file(note.path)
        if number is None:
            continue
        offset, size_bytes = noted.clip(number, note.offset, note.size_bytes)
        began_ms, ended_ms = noted.ms(note.began_s), noted.ms(note.ended_s)
        kind = "fault" if note.is_fault else "read"
        found.append(Read(number, offset, size_bytes, began_ms, ended_ms, kind, note.waited))
        wanted.append(Wanted(number, offset, size_bytes, began_ms))
    needs, too_many = needs_of(wanted)
    arrivals = [
        Arrival(number, offset, size_bytes, noted.ms(note.at_s))
        for note in journal.arrivals[:]
        for number, offset, size_bytes in noted.files_at(note.blob, note.start, note.stop)
    ]
    fetches = [
        Fetch(
            layout.blobs[note.blob],
            note.start,
            note.stop,
            noted.ms(note.began_s),
            noted.ms(note.first_s),
            noted.ms(note.ended_s),
            note.why,
            note.attempts,
        )
        for note in journal.fetches[:]
        if layout.blobs.get(note.blob, LAYERS_MOST) < LAYERS_MOST
    ]
    marks = [Mark(name, noted.ms(at_s)) for name, at_s in journal.marks[:]]
    marks.sort(key=lambda mark: mark.at_ms)
    recording = Recording(
        reference=_told(about.reference),
        began_at_s=round(time.time() - (time.monotonic() - about.began_s), 6),
        length_ms=noted.ms(about.ended_s),
        way=about.way,
        reads=found,
        fetches=fetches,
        arrivals=arrivals,
        phases=[*_stages(marks), *about.phases],
        marks=marks,
        dropped=journal.dropped + noted.dropped + too_many,
        figures=dict(about.figures),
    )
    return Trace(
        workload=_told(about.workload),
        made_by=f"lazyfs {lazyfs.__version__}",
        until=_told(about.until),
        layers=list(layout.layers),
        files=noted.files,
        needs=needs,
        is_partial=about.is_partial,
        recording=recording,
    )


def _told(text: str) -> str:
    """Return what a person gave as a trace can hold it: paths need not be UTF-8."""
    return printable(text)[: 4 * KIB]


def needs_of(wanted: Iterable[Wanted], most: int = _NEEDS_MOST) -> tuple[list[Need], int]:
    """Return what was needed, first needed first, and how many ranges were too many.

    `wanted`: in the order of time. Ranges of one file do not overlap, and cover all that was
    wanted, unless there were too many.
    """
    covered: dict[int, Covered] = {}
    needs: list[Need] = []
    for item in wanted:
        known = covered.setdefault(item.file, Covered())
        for start, stop in known.add(item.offset, item.offset + item.size_bytes):
            needs.append(Need(item.file, start, stop - start, item.at_ms))
    for within_ms in _TOGETHER_MS:
        needs = _joined(needs, within_ms)
        if len(needs) <= most:
            break
    return needs[:most], max(0, len(needs) - most)


def _joined(needs: Sequence[Need], within_ms: float) -> list[Need]:
    """Make one of ranges that touch, if the later was wanted so soon after the first."""
    parts: list[Need | None] = []
    begins: dict[tuple[int, int], int] = {}
    ends: dict[tuple[int, int], int] = {}

    def near(number: int | None, at_ms: float) -> Need | None:
        found = parts[number] if number is not None else None
        return found if found is not None and at_ms - found.at_ms <= within_ms else None

    for need in needs:
        number, start, stop = len(parts), need.offset, need.offset + need.size_bytes
        before_at, after_at = ends.get((need.file, start)), begins.get((need.file, stop))
        before, after = near(before_at, need.at_ms), near(after_at, need.at_ms)
        at_ms = need.at_ms
        for where, found in ((before_at, before), (after_at, after)):
            if where is None or found is None:
                continue
            begins.pop((need.file, found.offset), None)
            ends.pop((need.file, found.offset + found.size_bytes), None)
            start, stop = min(start, found.offset), max(stop, found.offset + found.size_bytes)
            parts[where] = None
            number, at_ms = min(number, where), min(at_ms, found.at_ms)
        joined = Need(need.file, start, stop - start, at_ms)
        if number == len(parts):
            parts.append(joined)
        else:
            parts[number] = joined
        begins[need.file, start] = ends[need.file, stop] = number
    return [need for need in parts if need is not None]


class _Noted:
    """The files of a trace, as they are met; its clock."""

    def __init__(self, layout: Layout, about: About) -> None:
        self.files: list[TracedFile] = []
        self.dropped = 0
        self._layout = layout
        self._zero_s = about.began_s
        self._numbers: dict[str, int] = {}
        self._starts: dict[int, tuple[list[int], list[tuple[int, str]]]] = {}

    def ms(self, at_s: float) -> float:
        return max(0.0, round((at_s - self._zero_s) * 1000, 3))

    def file(self, path: str) -> int | None:
        """Return a file's number; None if it is none of the checkpoint's, or one too many."""
        number = self._numbers.get(path)
        if number is not None:
            return number
        found = self._layout.files.get(path)
        if found is None or len(self.files) == FILES_MOST:
            self.dropped += 1
            return None
        self._numbers[path] = len(self.files)
        self.files.append(TracedFile(path, found.layer, found.size_bytes))
        return len(self.files) - 1

    def clip(self, number: int, offset: int, size_bytes: int) -> tuple[int, int]:
        """Return the part of a range that is within the file: the kernel asks for whole pages."""
        most = self.files[number].size_bytes
        offset = min(offset, most)
        return offset, min(size_bytes, most - offset)

    def files_at(self, blob: str, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
        """Yield what a stretch of a layer's content is of files: number, offset, size."""
        layer = self._layout.blobs.get(blob)
        if layer is None or layer >= LAYERS_MOST:
            return
        if not self._starts:
            self._sort()
        starts, files = self._starts.get(layer, ([], []))
        index = max(0, bisect_right(starts, start) - 1)
        while index < len(files) and starts[index] < stop:
            begin = starts[index]
            end, path = files[index]
            index += 1
            if max(begin, start) >= min(end, stop):
                continue
            number = self.file(path)
            if number is not None:
                offset = max(begin, start) - begin
                yield number, offset, min(end, stop) - begin - offset

    def _sort(self) -> None:
        by_layer: dict[int, dict[int, tuple[int, str]]] = {}
        for path, found in self._layout.files.items():
            if found.size_bytes:  # hard links lie at the same place: the first stands for all
                end = found.start + found.size_bytes
                by_layer.setdefault(found.layer, {}).setdefault(found.start, (end, path))
        for layer, at in by_layer.items():
            starts = sorted(at)
            self._starts[layer] = starts, [at[start] for start in starts]


def _stages(marks: Sequence[Mark]) -> list[Phase]:
    first: dict[str, float] = {}
    for mark in marks:
        first.setdefault(mark.name, mark.at_ms)
    return [
        Phase(name, first[begin], max(first[begin], first[end]))
        for begin, end, name in _STAGES
        if begin in first and end in first
    ]
