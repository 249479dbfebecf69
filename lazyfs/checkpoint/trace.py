"""What a restore needed of a checkpoint, in which order: the trace's document. Sans-I/O.

A trace is a hint. It says which ranges of which files a workload wanted before it gave its first
answer, so that a later restore fetches these first. It belongs to layers, by their digests, and to
a workload: the same image may be restored for different work. It comes from whoever may attach one
to the image, so all of it is bounded, and nothing that is read depends on it.

With a `Recording` beside it, it is also what `lazyfs report` draws: what went on meanwhile. That
part stays with whoever has recorded it; what is attached to an image is the hint alone.

The document is JSON in a zstd frame. Version 1 is described by the structures here; what is unknown
is passed over, so a later writer may add to it. Lists of events are lists of lists, in the order of
their fields.
"""

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec
import zstandard

from lazyfs.ground.errors import MalformedError
from lazyfs.ground.settings import KIB, MIB

TRACE_BLOB_TYPE = "application/vnd.lazyfs.trace.v1+zstd"
"""The media type of the document."""
WORKLOAD_KEY = "lazyfs.trace.workload"
"""The annotation of both manifest and list of referrers that says whose working set it is."""
BLOB_KEY = "lazyfs.trace.blob"
"""The annotation that names the document's digest, so it can be had without the manifest."""
BLOB_SIZE_KEY = "lazyfs.trace.size"
"""And its size in bytes, in decimal."""

HINT_LIMIT_BYTES = 4 * MIB
"""Of a document that somebody else made, as it is fetched."""
RECORDING_LIMIT_BYTES = 64 * MIB
"""Of a file that somebody names on the command line."""
_UNPACKED_LIMIT_BYTES = 256 * MIB
_HINT_UNPACKED_LIMIT_BYTES = 16 * MIB
"""What it becomes in memory is ten times that, at worst."""
_VERSION = 1
LAYERS_MOST = 512
FILES_MOST = 64 * 1024
_NEEDS_MOST = 500_000
_EVENTS_MOST = 2_000_000
_ZSTD_LEVEL = 6

_Document = TypeVar("_Document")

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Text = Annotated[str, msgspec.Meta(max_length=4 * KIB)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class TracedLayer(msgspec.Struct, frozen=True):
    """A layer that files were read from."""

    digest: Text
    """Of its blob, as the manifest has it; empty for an archive that has none."""
    size_bytes: Count


class TracedFile(msgspec.Struct, frozen=True):
    """A file that ranges were read of."""

    path: Text
    """In the image, as the tree has it: checkpoint/pages-1.img."""
    layer: Count
    """The index in `Trace.layers`."""
    size_bytes: Count


class Need(msgspec.Struct, frozen=True, array_like=True):
    """A range that somebody wanted, and nobody had wanted before."""

    file: Count
    """The index in `Trace.files`."""
    offset: Count
    size_bytes: Count
    at_ms: Milliseconds
    """Since the recording began."""


class Read(msgspec.Struct, frozen=True, array_like=True):
    """A read through the mount, or a fault of lazy pages."""

    file: Count
    offset: Count
    size_bytes: Count
    began_ms: Milliseconds
    ended_ms: Milliseconds
    kind: Text
    """"read": of the mount, "fault": of a task's memory."""
    waited: bool
    """Whether its bytes had to be fetched, or were on their way."""


class Fetch(msgspec.Struct, frozen=True, array_like=True):
    """A range of a layer's blob that was fetched from its source."""

    layer: Count
    start: Count
    stop: Count
    began_ms: Milliseconds
    first_ms: Milliseconds
    """When its first byte came."""
    ended_ms: Milliseconds
    why: Text
    """The lane: "demand", "readahead", "completion"; "index" before there were any."""
    attempts: Count


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """A range of a file whose bytes had come, and could be read from then on."""

    file: Count
    offset: Count
    size_bytes: Count
    at_ms: Milliseconds


class Phase(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of time in which somebody did something: "mount", "criu: mount namespaces"."""

    name: Text
    began_ms: Milliseconds
    ended_ms: Milliseconds


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """A moment: "mounted", "restored", "until"."""

    name: Text
    at_ms: Milliseconds


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """What went on while the trace was recorded."""

    reference: Text = ""
    began_at_s: float = 0.0
    """Since the epoch."""
    length_ms: Milliseconds = 0.0
    way: Text = ""
    """How memory came: "eager", "lazy pages", "criu lazy-pages"; "" if it is not known."""
    reads: list[Read] = []
    fetches: list[Fetch] = []
    arrivals: list[Arrival] = []
    phases: list[Phase] = []
    marks: list[Mark] = []
    dropped: Count = 0
    """Events that were too many, or of files that have no name here."""
    figures: dict[str, Any] = {}
    """The mount's counters at the end (`docs/json.md`)."""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """What a workload needed, first needed first."""

    version: int = _VERSION
    workload: Text = ""
    """Whose it is; empty if nobody has said."""
    made_by: Text = ""
    until: Text = ""
    """What ended it, for a person: "port 8080 answered"."""
    layers: list[TracedLayer] = []
    files: list[TracedFile] = []
    needs: list[Need] = []
    is_partial: bool = False
    """More was brought meanwhile than was asked for, and nobody knows what of that was needed."""
    recording: Recording | None = None

    @property
    def needed_bytes(self) -> int:
        """How much was needed."""
        return sum(need.size_bytes for need in self.needs)

    def hint(self) -> "Trace":
        """Return what others may have of it: files that nothing was needed of are left out."""
        needed = sorted({need.file for need in self.needs})
        numbers = {number: index for index, number in enumerate(needed)}
        files = [self.files[number] for number in needed]
        needs = [msgspec.structs.replace(need, file=numbers[need.file]) for need in self.needs]
        return msgspec.structs.replace(self, files=files, needs=needs, recording=None)


def can_hold(text: str) -> bool:
    """Whether a trace can have a text in it: JSON is UTF-8, names of files need not be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def dump_trace(trace: Trace) -> bytes:
    """Return the document."""
    packed: bytes = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(msgspec.json.encode(trace))
    return packed


def parse_trace(data: bytes, name: str) -> Trace:
    """Read a document that somebody named, recording and all; `name` is for messages.

    Raises:
        MalformedError: it is no trace, or one of a later version, or larger than is believed.
    """
    trace = _decoded(_unpacked(data, _UNPACKED_LIMIT_BYTES, name), Trace, name)
    _check(trace, name)
    return trace


def parse_hint(data: bytes, name: str) -> Trace:
    """Read a document of a stranger; of its recording, if it has one, nothing. As `parse_trace`."""
    if len(data) > HINT_LIMIT_BYTES:
        raise MalformedError(f"{name} is larger than is believed of a hint")
    hint = _decoded(_unpacked(data, _HINT_UNPACKED_LIMIT_BYTES, name), _Hint, name)
    trace = Trace(**msgspec.structs.asdict(hint))
    _check(trace, name)
    return trace


class _Hint(msgspec.Struct, frozen=True, kw_only=True):
    """A trace without its recording, which is passed over as it is read."""

    version: int = _VERSION
    workload: Text = ""
    made_by: Text = ""
    until: Text = ""
    layers: list[TracedLayer] = []
    files: list[TracedFile] = []
    needs: list[Need] = []
    is_partial: bool = False


def _unpacked(data: bytes, limit_bytes: int, name: str) -> bytes:
    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=limit_bytes)
        with decompressor.stream_reader(data) as reader:
            text = reader.read(limit_bytes + 1)
    except zstandard.ZstdError as error:
        raise MalformedError(f"{name} is no trace: {error}") from None
    if len(text) > limit_bytes:
        raise MalformedError(f"{name} is larger than is believed of a trace")
    return bytes(text)


def _decoded(text: bytes, kind: type[_Document], name: str) -> _Document:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(f"{name} is no trace: {error}") from None


def _check(trace: Trace, name: str) -> None:
    if trace.version != _VERSION:
        raise MalformedError(
            f"{name} is a trace of version {trace.version}, and only {_VERSION} is known here"
        )
    recording = trace.recording or Recording()
    events: Sequence[Sequence[Any]] = (
        recording.reads,
        recording.fetches,
        recording.arrivals,
        recording.phases,
        recording.marks,
    )
    limits = (
        (len(trace.layers), LAYERS_MOST, "layers"),
        (len(trace.files), FILES_MOST, "files"),
        (len(trace.needs), _NEEDS_MOST, "needs"),
        (sum(map(len, events)), _EVENTS_MOST, "events"),
    )
    for count, most, what in limits:
        if count > most:
            raise MalformedError(f"{name} has {count} {what}; at most {most} are believed")
    for file in trace.files:
        if file.layer >= len(trace.layers):
            raise MalformedError(f"{name}: {file.path!r} is of a layer that it does not name")
    for part in (trace.needs, recording.reads, recording.arrivals):
        for item in part:
            if item.file >= len(trace.files):
                raise MalformedError(f"{name} has a range of a file that it does not name")
            file = trace.files[item.file]
            if item.offset + item.size_bytes > file.size_bytes:
                raise MalformedError(f"{name} has a range beyond the end of {file.path!r}")
    for fetch in recording.fetches:
        if fetch.layer >= len(trace.layers) or fetch.start > fetch.stop:
            raise MalformedError(f"{name} has a fetch that cannot have been")
