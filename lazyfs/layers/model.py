"""What all layer formats look like to the floor above.

A layer has a *content address space*: its files' bytes, uncompressed, each file in one piece.
A format decides the addresses (for a plain tar they are the tar's own offsets) and cuts the
space into *chunks*, the unit of fetching, caching and verifying. Chunks are numbered from 0 in
content order, cover the space without gap or overlap, and each comes from one blob range, which
it shares with no other, but that one may begin with the last byte of the one before.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from enum import Enum
from typing import Protocol

import msgspec

from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.ranges import ByteRange


class EntryType(Enum):
    """What a name in a layer stands for. Hard links are resolved to files by the format."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    FIFO = "fifo"
    OTHER = "other"
    """A device or socket: known to be there, never shown."""
    WHITEOUT = "whiteout"
    """A name that hides the same name in what lies below; only of a container's file changes."""


class Entry(msgspec.Struct, frozen=True):
    """One name of a layer, in the order of the layer.

    `path`: relative, normalised ("checkpoint/pages-1.img"), "" for the layer's root; never
    absolute, never with "." or "..". Bytes that are not UTF-8 are surrogate-escaped.
    `content_start`: address of a file's first byte; files that are hard links of each other
    share it, and `link_of` is then the path of the first.
    """

    path: str
    type: EntryType
    mode: int
    """Permission bits, with suid, sgid and sticky as archived."""
    uid: int = 0
    gid: int = 0
    size_bytes: int = 0
    mtime_ns: int = 0
    content_start: int = 0
    symlink_target: str = ""
    link_of: str = ""
    xattrs: tuple[tuple[str, bytes], ...] = ()
    """Extended attributes as archived; only the files of a container have any."""


class LayerDescriptor(msgspec.Struct, frozen=True):
    """A layer as the manifest describes it (OCI image-spec, descriptor.md).

    `digest` is None where nothing promises one: a checkpoint archive that is not in an image.
    """

    media_type: str
    digest: Digest | None
    size_bytes: int
    annotations: Mapping[str, str]


class ChunkMap(Protocol):
    """Where each chunk lies in the content address space and in the blob."""

    @property
    def content_size_bytes(self) -> int:
        """Size of the content address space."""

    @property
    def proven(self) -> bool:
        """Whether `decode` proves each chunk by a digest that the manifest vouches for."""

    def relocate(self, keep: Callable[[Data], memoryview]) -> None:
        """Move what is large into memory that `keep` gives: a read-only copy of its argument.

        Before anybody else uses the map. Where there is no such memory, `keep` may raise
        OSError; the map is then as it was, or partly moved, and good in either case.
        """

    def zero_chunks(self) -> Sequence[int]:
        """Numbers of the chunks of zeros, whose blob range is empty."""

    def __len__(self) -> int:
        """How many chunks there are."""

    def index_at(self, content_offset: int) -> int:
        """Number of the chunk that holds the byte at `content_offset` (0 <= it < size)."""

    def content_start(self, index: int) -> int:
        """Address of the chunk's first byte; for `index == len(self)`, the end of the space."""

    def content_size(self, index: int) -> int:
        """How many bytes `decode` gives.

        What is left up to the next chunk's start is padding that belongs to no file.
        """

    def blob_range(self, index: int) -> ByteRange:
        """The bytes of the blob from which the chunk is decoded; empty for a chunk of zeros."""

    def decode(self, index: int, data: Data) -> Iterator[Data]:
        """Yield the chunk's content in order, in pieces of bounded size, from its blob bytes.

        A caller may use the pieces only after the iterator has ended without an error: the
        digest is compared last. A chunk of at most 1 MiB comes in one piece; of a larger one a
        piece is valid only until the next is asked for. A piece may be a view of `data`.

        Raises:
            IntegrityError: the content is not what the digest promised, or not as long.
        """


Walk = Generator[Sequence[ByteRange], Sequence[bytes], None]
"""Yields content ranges that it must see and is sent their bytes; adds to a list of entries."""


def no_walk() -> Walk:
    """Return the walk of a layer whose index has told all entries already."""
    yield from ()


class LayerIndex(msgspec.Struct, frozen=True):
    """An opened layer that can be read at random: how its content is cut, and who is in it.

    The walk's ranges are read through the chunks like any file, so what it saw is cached.
    """

    format_name: str
    """Short and stable ("tar", "zstd:chunked"): shown to people."""
    cache_tag: str
    """Names the content layout and, where something other than the layer's digest proves the
    chunks, that too ("tar-256k", "zstd-chunked-1-<TOC digest>"). The same tag and layer digest
    mean the same addresses and chunks, in every later version."""
    chunks: ChunkMap
    entries: list[Entry]
    """Complete once `walk` has ended, in the order of the layer."""
    walk: Walk
    stream: "StreamIndex | None" = None
    """For chunks that nothing proves, of a blob whose bytes are not its content: how to decode
    the whole of it, which is what proves them then."""


class StreamDecoder(Protocol):
    """Turns a blob's bytes, given in order, into its content. Used by one thread at a time."""

    def decode(self, data: Data) -> Iterator[Data]:
        """Yield the content that `data` completes, in order, in pieces of at most 1 MiB.

        A piece is valid only until the next is asked for. The caller exhausts the iterator
        before it gives more.

        Raises:
            MalformedError: this is no such stream, from here on.
            UnsupportedLayer: nor one that can be decoded here.
        """

    def finish(self) -> None:
        """Say that the blob has ended.

        Raises:
            MalformedError: it is cut off.
        """

    def restart_index(self) -> bytes | None:
        """After `finish`: what `StreamIndex.reopen` wants; None if there is no such thing."""


class StreamIndex(msgspec.Struct, frozen=True):
    """An opened layer that can only be decoded from its start.

    Its content address space is the uncompressed tar.
    """

    format_name: str
    cache_tag: str
    """As of `LayerIndex`, for content that was decoded from a blob proven by its digest."""
    decoder: "Callable[[], StreamDecoder]"
    """Makes a decoder that stands at the blob's first byte."""
    reopen: "Callable[[Data], LayerIndex] | None" = None
    """Opens the layer for reading at random, by what `StreamDecoder.restart_index` gave once.

    Raises MalformedError if the data is not that. The index has the same `cache_tag`.
    """


Opening = Generator[Sequence[ByteRange], Sequence[Data], "LayerIndex | StreamIndex"]
"""Yields blob ranges to fetch (few, of bounded size), is sent their bytes, returns the layer.

Raises:
    IntegrityError: an index contradicts the digest that the manifest promised.
    MalformedError: an index or an annotation lies: offsets, overlaps, sizes, names.
    UnsupportedLayer: it cannot be read, and the message says why.
"""

HEAD_BYTES = 64 * 1024
"""How much of a blob's beginning a format gets to see before it is asked."""


class LayerFormat(Protocol):
    """One way to lay out a layer. Sans-I/O: the caller fetches what `open` asks for."""

    name: str

    def recognises(self, layer: LayerDescriptor, head: bytes) -> bool:
        """Whether the layer is of this format; `head` is its first `HEAD_BYTES`, or all of it.

        Bytes decide over media types; of two formats with the same bytes, annotations.
        """

    def open(self, layer: LayerDescriptor, head: bytes) -> Opening:
        """Open a layer that this format recognises."""
