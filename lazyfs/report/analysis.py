"""What a trace says: bytes, times and waits, added up. Sans-I/O, and without a thought of drawing.

Decides what each moment until the end mark was spent on, what came in time and what too late, and
how long anybody waited. Must not believe that times are in order: the trace is anybody's. Bytes of
files are as unpacked, bytes of fetches as they lie in the blob: the two are never added.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from lazyfs.checkpoint.criu_phases import phases_of
from lazyfs.checkpoint.trace import Fetch, Mark, Need, Phase, Read, Recording, Trace
from lazyfs.report.spans import (
    Fate,
    Flow,
    Piece,
    Span,
    common,
    earliest,
    fates,
    minus,
    total_ms,
    union,
)
from lazyfs.report.waits import Causes, Wait, waits_of

FAULT = "fault"
CRIU = "criu"
START = "lazyfs"
"""How the names of phases begin: CRIU's, and those until the mount answers."""
_MOUNTED = ("mounted",)
_CRIU_STARTED = ("restore started",)
_RESTORED = ("restored",)
_UNTIL = "until"


class FileFates(msgspec.Struct, frozen=True):
    """What became of a file's bytes."""

    index: int
    """In `Trace.files`."""
    path: str
    size_bytes: int
    fates: Sequence[Fate]
    """By offset; what was neither needed nor came is left out."""
    needed_bytes: int
    late_bytes: int
    """Of these, what came after it was needed."""
    spare_bytes: int
    """What came by the end mark, and nobody had needed."""
    arrived_bytes: int
    """All that came, also after the end mark."""


class Budget(msgspec.Struct, frozen=True):
    """What the time until the end mark was spent on, each moment on one thing."""

    start_ms: float
    """Before the mount answered."""
    criu_ms: float
    """CRIU at work, and nobody waiting for bytes."""
    waiting_ms: float
    """Somebody waited for bytes; others may have worked meanwhile."""
    rest_ms: float
    """The process itself, or nobody."""

    @property
    def all_ms(self) -> float:
        """Until the end mark."""
        return self.start_ms + self.criu_ms + self.waiting_ms + self.rest_ms


class Analysis(msgspec.Struct, frozen=True):
    """All that the report tells."""

    trace: Trace
    recording: Recording
    """Empty if there is none."""
    has_recording: bool
    has_end: bool
    """Whether it was ended by its end mark; else `end_ms` is the recording's end."""
    end_ms: float
    length_ms: float
    phases: list[Phase]
    marks: Sequence[Mark]
    files: Sequence[FileFates]
    """That anything was needed of, or came of; the most needed first."""
    waits: Sequence[Wait]
    """In order of time."""
    waiting: Sequence[Span]
    """When anybody waited."""
    stalls: Sequence[Span]
    """When somebody waited, and no byte came from anywhere."""
    flow: Flow
    budget: Budget
    causes: Causes
    """Of all waits until the end mark, each counted for itself."""
    image_bytes: int
    needed_bytes: int
    fetched_bytes: int
    """As it lies in blobs, by the end mark."""
    fetched_in_all_bytes: int
    arrived_bytes: int
    """As unpacked, by the end mark."""
    receiving_ms: float
    """How long bytes came, by the end mark."""
    read_count: int
    fault_count: int

    @property
    def was_usual(self) -> bool:
        """Whether all went as without a recording; else only what was touched was brought."""
        return self.trace.is_partial

    @property
    def followed_bytes(self) -> int | None:
        """How much an earlier trace named that was followed; None: there was none."""
        trace = self.recording.figures.get("trace")
        needed = trace.get("needed_bytes") if isinstance(trace, dict) else None
        return needed if isinstance(needed, int) and needed >= 0 else None

    @property
    def waits_until_end(self) -> list[Wait]:
        """Those that began before the end mark."""
        return [wait for wait in self.waits if wait.read.began_ms < self.end_ms]

    @property
    def slowest(self) -> list[Wait]:
        """All waits, the longest first; first those before the end mark, which held it up."""
        return sorted(
            self.waits, key=lambda wait: (wait.read.began_ms >= self.end_ms, -wait.waited_ms)
        )

    @property
    def link_rate(self) -> float:
        """Bytes a second, while any came; 0 if none did."""
        return self.fetched_bytes / (self.receiving_ms / 1000) if self.receiving_ms else 0.0

    @property
    def retried(self) -> list[Fetch]:
        """Fetches that were not had at the first attempt."""
        return [fetch for fetch in self.recording.fetches if fetch.attempts > 1]


def analyse(trace: Trace, phases: Iterable[Phase] = ()) -> Analysis:
    """Add up a trace; `phases` are CRIU's, from its log, if the recording has none of these."""
    recording = trace.recording or Recording()
    has_criu = any(phase.name.startswith(CRIU) for phase in recording.phases)
    every_phase = [*recording.phases, *(() if has_criu else phases)]
    marks = sorted(recording.marks, key=lambda mark: mark.at_ms)
    length_ms = _length_ms(trace, recording, every_phase)
    until = _moment(marks, (_UNTIL,))
    end_ms = min(length_ms, length_ms if until is None else until)

    lots = [_lot(fetch) for fetch in recording.fetches]
    flow = Flow(lots)
    arrivals: dict[int, list[Piece]] = {}
    for arrival in recording.arrivals:
        piece = Piece(arrival.offset, arrival.offset + arrival.size_bytes, arrival.at_ms)
        arrivals.setdefault(arrival.file, []).append(piece)
    first_arrivals = {file: earliest(pieces) for file, pieces in arrivals.items()}
    files = _files(trace, first_arrivals, end_ms)

    reads = sorted(recording.reads, key=lambda read: (read.began_ms, read.ended_ms))
    waits = waits_of(trace, reads, first_arrivals, flow)
    waiting = union((wait.read.began_ms, wait.read.ended_ms) for wait in waits)
    receiving = union((began_ms, ended_ms) for began_ms, ended_ms, _ in lots)
    causes = Causes()
    for wait in waits:
        if wait.read.began_ms < end_ms:
            causes = causes.plus(wait.causes)
    return Analysis(
        trace=trace,
        recording=recording,
        has_recording=trace.recording is not None,
        has_end=until is not None,
        end_ms=end_ms,
        length_ms=length_ms,
        phases=sorted(every_phase, key=lambda phase: phase.began_ms),
        marks=marks,
        files=files,
        waits=waits,
        waiting=waiting,
        stalls=minus(waiting, receiving),
        flow=flow,
        budget=_budget(every_phase, marks, waiting, end_ms),
        causes=causes,
        image_bytes=sum(layer.size_bytes for layer in trace.layers),
        needed_bytes=sum(file.needed_bytes for file in files),
        fetched_bytes=round(flow.at(end_ms)),
        fetched_in_all_bytes=sum(size_bytes for *_, size_bytes in lots),
        arrived_bytes=sum(
            fate.size_bytes
            for file in files
            for fate in file.fates
            if fate.arrived_ms is not None and fate.arrived_ms <= end_ms
        ),
        receiving_ms=total_ms(common(receiving, 0.0, end_ms)),
        read_count=_until(reads, end_ms, fault=False),
        fault_count=_until(reads, end_ms, fault=True),
    )


def phases_by(log: bytes, trace: Trace) -> list[Phase]:
    """Return CRIU's phases by its log, for a trace that has none of them.

    CRIU is taken to have begun when the mount was first asked for inventory.img, the first of the
    images that it reads (`criu/image.c`, `check_img_inventory`); or else, where the recording
    says that the restore began. There are none if the log is no such log.
    """
    recording = trace.recording or Recording()
    asked = (
        read.began_ms
        for read in recording.reads
        if trace.files[read.file].path.rpartition("/")[2] == "inventory.img"
    )
    began_ms = _moment(recording.marks, _CRIU_STARTED)
    if began_ms is None:
        began_ms = min(asked, default=0.0)
    return phases_of(log.decode(errors="replace"), began_ms)


def _lot(fetch: Fetch) -> tuple[float, float, int]:
    first_ms = max(fetch.first_ms, fetch.began_ms)
    return first_ms, max(fetch.ended_ms, first_ms), fetch.stop - fetch.start


def _until(reads: Iterable[Read], end_ms: float, *, fault: bool) -> int:
    return sum((read.kind == FAULT) == fault and read.began_ms < end_ms for read in reads)


def _moment(marks: Iterable[Mark], names: Sequence[str]) -> float | None:
    return next((mark.at_ms for mark in marks if mark.name in names), None)


def _length_ms(trace: Trace, recording: Recording, phases: Iterable[Phase]) -> float:
    """Return when the last of all was: a recording may have been cut, or may say anything."""
    moments = [recording.length_ms]
    moments += [need.at_ms for need in trace.needs]
    moments += [read.ended_ms for read in recording.reads]
    moments += [fetch.ended_ms for fetch in recording.fetches]
    moments += [arrival.at_ms for arrival in recording.arrivals]
    moments += [phase.ended_ms for phase in phases]
    moments += [mark.at_ms for mark in recording.marks]
    return max(moments)


def _needed(trace: Trace, arrivals: Mapping[int, Sequence[Piece]]) -> Iterator[Need]:
    """Yield what was needed when: by the reads themselves, where there are any.

    Needs are made of these, but those that touch and are near in time are one. A fault is noted
    with the window around it; what of that came only after the fault was answered without a wait
    was not needed by it.
    """
    reads = trace.recording.reads if trace.recording else []
    if not reads:
        yield from trace.needs
    starts = {file: [piece.start for piece in pieces] for file, pieces in arrivals.items()}
    for read in reads:
        start, stop = read.offset, read.offset + read.size_bytes
        if not read.waited and read.file in arrivals:
            first = max(0, bisect_right(starts[read.file], start) - 1)
            last = bisect_left(starts[read.file], stop)
            for piece in arrivals[read.file][first:last]:
                if piece.stop <= start or piece.at_ms <= read.ended_ms:
                    continue
                if piece.start > start:
                    yield Need(read.file, start, piece.start - start, read.began_ms)
                start = min(piece.stop, stop)
        if start < stop:
            yield Need(read.file, start, stop - start, read.began_ms)


def _files(trace: Trace, arrivals: dict[int, list[Piece]], end_ms: float) -> list[FileFates]:
    needs: dict[int, list[Piece]] = {}
    for need in _needed(trace, arrivals):
        piece = Piece(need.offset, need.offset + need.size_bytes, need.at_ms)
        needs.setdefault(need.file, []).append(piece)
    found = []
    for index in sorted(needs.keys() | arrivals.keys()):
        file = trace.files[index]
        lot = fates(earliest(needs.get(index, [])), arrivals.get(index, []))
        found.append(
            FileFates(
                index=index,
                path=file.path,
                size_bytes=file.size_bytes,
                fates=lot,
                needed_bytes=sum(fate.size_bytes for fate in lot if fate.needed_ms is not None),
                late_bytes=sum(fate.size_bytes for fate in lot if fate.is_late),
                spare_bytes=sum(
                    fate.size_bytes
                    for fate in lot
                    if fate.needed_ms is None
                    and fate.arrived_ms is not None
                    and fate.arrived_ms <= end_ms
                ),
                arrived_bytes=sum(fate.size_bytes for fate in lot if fate.arrived_ms is not None),
            )
        )
    return sorted(found, key=lambda file: (-file.needed_bytes, -file.arrived_bytes, file.path))


def _budget(
    phases: Sequence[Phase], marks: Sequence[Mark], waiting: Sequence[Span], end_ms: float
) -> Budget:
    """Give each moment until the end mark to one thing: the start, waiting, CRIU, the rest."""
    criu = [phase for phase in phases if phase.name.startswith(CRIU)]
    mounted_ms = _moment(marks, _MOUNTED)
    if mounted_ms is None:
        starting = (phase.ended_ms for phase in phases if phase.name.startswith(START))
        mounted_ms = max(starting, default=0.0)
    mounted_ms = min(max(0.0, mounted_ms), end_ms)
    began_ms = _moment(marks, _CRIU_STARTED)
    if began_ms is None:
        began_ms = min((phase.began_ms for phase in criu), default=end_ms)
    restored_ms = _moment(marks, _RESTORED)
    if restored_ms is None:
        restored_ms = max((phase.ended_ms for phase in criu), default=began_ms)
    waited = common(waiting, mounted_ms, end_ms)
    at_work = minus(common([Span(began_ms, restored_ms)], mounted_ms, end_ms), waited)
    waiting_ms, criu_ms = total_ms(waited), total_ms(at_work)
    return Budget(
        start_ms=mounted_ms,
        criu_ms=criu_ms,
        waiting_ms=waiting_ms,
        rest_ms=max(0.0, end_ms - mounted_ms - waiting_ms - criu_ms),
    )
