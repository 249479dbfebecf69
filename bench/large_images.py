"""Checkpoint images larger than the machine: made of holes and of repetition, served by range.

A registry in this process that answers what a mount asks for, from blobs that are described and
not stored: pieces, each a pattern over and over. Layers: a plain tar, zstd:chunked (containers/
storage, `pkg/chunked/internal/minimal/compression.go`), seekable zstd (zstd,
`contrib/seekable_format`). Only what is read of them has to make sense, and all of it does.
"""

import bisect
import hashlib
import io
import json
import re
import struct
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import zstandard

_SKIPPABLE = 0x184D2A50
_SEEK_TABLE = 0x184D2A5E
_SEEK_TABLE_MAGIC = 0x8F92EAB1
_KEYS = "io.github.containers.zstd-chunked."
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_TAR = "application/vnd.oci.image.layer.v1.tar"
_BLOCK_BYTES = 512
_SEND_BYTES = 1 << 20


class Blob:
    """Bytes in pieces: each so many of a pattern that begins anew at its end."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._patterns: list[bytes] = []
        self.size_bytes = 0

    def add(self, pattern: bytes, size_bytes: int | None = None) -> None:
        """Append a pattern, once or over and over to `size_bytes`."""
        self._starts.append(self.size_bytes)
        self._patterns.append(pattern)
        self.size_bytes += len(pattern) if size_bytes is None else size_bytes

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of a range."""
        while start < stop:
            number = bisect.bisect_right(self._starts, start) - 1
            ends = [*self._starts[number + 1 : number + 2], self.size_bytes][0]
            pattern, size = self._patterns[number], min(stop, ends, start + _SEND_BYTES) - start
            at = (start - self._starts[number]) % len(pattern)
            yield (pattern * ((at + size) // len(pattern) + 1))[at : at + size]
            start += size


@dataclass
class Layer:
    """A layer, and what the manifest says of it."""

    blob: Blob
    media_type: str = _TAR
    annotations: dict[str, str] = field(default_factory=dict)


def _header(name: str, size_bytes: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    return info.tobuf(tarfile.GNU_FORMAT)


def _small_files() -> bytes:
    out = io.BytesIO()
    for name in ("inventory.img", "pstree.img"):
        data = name.encode()
        out.write(_header(f"checkpoint/{name}", len(data)))
        out.write(data.ljust(_BLOCK_BYTES, b"\0"))
    return out.getvalue()


def tar(pages_bytes: int) -> Layer:
    """Return a plain tar with one pages file, which is a hole."""
    blob = Blob()
    blob.add(_small_files())
    blob.add(_header("checkpoint/pages-1.img", pages_bytes))
    blob.add(bytes(1 << 16), pages_bytes)
    blob.add(bytes(1024))
    return Layer(blob)


def seekable(frames: int, frame_bytes: int) -> Layer:
    """Return a tar in so many frames of seekable zstd, nearly all of them the same."""
    compress = zstandard.ZstdCompressor(level=1).compress
    head = _small_files() + _header("checkpoint/pages-1.img", frames * frame_bytes)
    parts = [head, bytes(frame_bytes), bytes(1024)]
    packed = [compress(part) for part in parts]
    entries = [
        struct.pack("<II", len(p), len(plain)) for p, plain in zip(packed, parts, strict=True)
    ]
    table = entries[0] + entries[1] * frames + entries[2]
    table += struct.pack("<IBI", frames + 2, 0, _SEEK_TABLE_MAGIC)
    blob = Blob()
    blob.add(packed[0])
    blob.add(packed[1], len(packed[1]) * frames)
    blob.add(packed[2] + struct.pack("<II", _SEEK_TABLE, len(table)) + table)
    return Layer(blob, f"{_TAR}+zstd")


def chunked(files: int, chunks: int, chunk_bytes: int) -> Layer:
    """Return a zstd:chunked layer of so many files, each of so many chunks."""
    compress = zstandard.ZstdCompressor(level=1).compress
    frames = bytearray()
    entries: list[dict[str, object]] = []
    for number in range(files + 1):
        name = f"checkpoint/pages-{number}.img" if number else "checkpoint/inventory.img"
        first: dict[str, object] = {"type": "reg", "name": name, "mode": 0o600}
        rows = [first]
        first["offset"] = len(frames)
        for chunk in range(chunks if number else 1):
            data = struct.pack("<II", number, chunk).ljust(chunk_bytes, b"\1")
            if chunk:
                rows.append({"type": "chunk", "name": name, "offset": len(frames)})
                rows[-1]["chunkOffset"] = chunk * chunk_bytes
            rows[-1]["chunkSize"] = chunk_bytes
            rows[-1]["chunkDigest"] = f"sha256:{hashlib.sha256(data).hexdigest()}"
            frames += compress(data)
        first["size"] = chunk_bytes * len(rows)
        first["digest"] = first["chunkDigest"]  # true where it is the only one, and else not read
        first["endOffset"] = len(frames)
        entries += rows
    toc = {"version": 1, "entries": entries, "tarSplitDigest": "sha256:" + "0" * 64}
    text = json.dumps(toc, separators=(",", ":")).encode()
    packed = zstandard.ZstdCompressor().compress(text)
    blob = Blob()
    blob.add(bytes(frames) + struct.pack("<II", _SKIPPABLE, len(packed)))
    position = blob.size_bytes
    blob.add(packed)
    blob.add(struct.pack("<II", _SKIPPABLE, 64) + bytes(64))
    annotations = {
        _KEYS + "manifest-checksum": f"sha256:{hashlib.sha256(packed).hexdigest()}",
        _KEYS + "manifest-position": f"{position}:{len(packed)}:{len(text)}:1",
    }
    return Layer(blob, f"{_TAR}+zstd", annotations)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: dict[str, Blob] = {}
        self.manifests: dict[str, bytes] = {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        """Answer for a manifest, or a range of a blob."""
        name, _, what = self.path.removeprefix("/v2/").rpartition("/")
        if name.endswith("/manifests"):
            body = self.server.manifests.get(f"{name.removesuffix('/manifests')}:{what}")
            if body is not None:
                self._head(200, len(body), {"Content-Type": _MANIFEST})
                self.wfile.write(body)
                return
        blob = self.server.blobs.get(what)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if blob is None or asked is None:
            self._head(404, 0, {})
            return
        start, stop = int(asked[1]), min(int(asked[2]) + 1, blob.size_bytes)
        said = {"Content-Range": f"bytes {start}-{stop - 1}/{blob.size_bytes}"}
        self._head(206, stop - start, said)
        for piece in blob.read(start, stop):
            self.wfile.write(piece)

    def _head(self, status: int, size_bytes: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size_bytes))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def registry(layers: dict[str, Layer]) -> Iterator[dict[str, str]]:
    """Serve an image of each layer; yields their references, by digest."""
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield {name: _put(server, name, layer) for name, layer in layers.items()}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _put(server: _Server, name: str, layer: Layer) -> str:
    # Of what nobody has whole: whoever reads all of it would find that this is not its digest.
    digest = f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
    server.blobs[digest] = layer.blob
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "size": 2, "data": "e30="}
    config["digest"] = f"sha256:{hashlib.sha256(b'{}').hexdigest()}"
    described = {
        "mediaType": layer.media_type,
        "digest": digest,
        "size": layer.blob.size_bytes,
        "annotations": layer.annotations,
    }
    manifest = {"schemaVersion": 2, "mediaType": _MANIFEST, "config": config, "layers": [described]}
    body = json.dumps(manifest).encode()
    pinned = f"sha256:{hashlib.sha256(body).hexdigest()}"
    repository = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    server.manifests[f"{repository}:{pinned}"] = body
    return f"127.0.0.1:{server.server_port}/{repository}@{pinned}"
