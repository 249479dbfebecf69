"""What is fuzzed: functions of bytes that return, or raise a `LazyfsError`.

Where a format proves its index by a digest, the target makes the digest right, so that what
stands behind it is reached.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import zstandard

from lazyfs.checkpoint import criu, criu_cpu, criu_memory, engines, manifest, trace
from lazyfs.checkpoint.archive import read_members
from lazyfs.checkpoint.containerd import parse_config
from lazyfs.checkpoint.criu_phases import length_ms, phases_of
from lazyfs.checkpoint.overlay import lay_over
from lazyfs.checkpoint.placed import place_layers
from lazyfs.checkpoint.reference import RegistryReference, parse_reference
from lazyfs.checkpoint.stub import read_stub, real_reference
from lazyfs.checkpoint.stub_documents import edit_config
from lazyfs.checkpoint.stub_layer import Written
from lazyfs.checkpoint.tree import Tree, path_of
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import LazyfsError, MalformedError
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.deflate import best_engine
from lazyfs.layers.estargz import EStargz
from lazyfs.layers.gzip import GzipDecoder
from lazyfs.layers.model import (
    HEAD_BYTES,
    Entry,
    LayerDescriptor,
    LayerFormat,
    LayerIndex,
    StreamDecoder,
    StreamIndex,
)
from lazyfs.layers.pagemap_hint import read_pagemap
from lazyfs.layers.plain_zstd import ZstdDecoder
from lazyfs.layers.restart_index import open_restart_index
from lazyfs.layers.soci_checkpoints import read_checkpoints
from lazyfs.layers.stargz_zstd import StargzZstd
from lazyfs.layers.table import choose
from lazyfs.layers.tar import walk_tar, walk_tar_stream
from lazyfs.layers.zstd_chunked import POSITION_KEY, ZstdChunked
from lazyfs.layers.ztoc import read_files, read_ztoc
from lazyfs.restore.criulog import diagnose
from lazyfs.transport import (
    address,
    answers,
    auth,
    credentials,
    helpers,
    hosts_toml,
    local,
    proxies,
    referrers,
    registries_conf,
    urls,
)
from tests.blobs import MemoryBlob
from tests.images import Layer, with_toc, zstd_chunked
from tests.layers.driving import drive, drive_opening, reader_of
from tests.layers.stargz_writer import gzipped, stargz_body, with_gzip_toc, with_zstd_toc, zstded

Target = Callable[[bytes], object]
CONTENT_MOST_BYTES = 4 << 20
"""More content than this is not decoded: a bomb is refused elsewhere, and time is short."""
FILES = {"checkpoint/inventory.img": b"\x16\x31\x31\x58", "checkpoint/pages-1.img": bytes(9000)}
"""Whose stretches tables of contents may point into."""


def reference(data: bytes) -> None:
    """What a person types."""
    parsed = parse_reference(data.decode("utf-8", "surrogateescape"))
    if isinstance(parsed, RegistryReference):
        assert parse_reference(str(parsed)) == parsed


def image_manifest(data: bytes) -> None:
    """A manifest or an index, and what its layers make of the tree."""
    kinds = ("", *manifest.IMAGE_TYPES, *manifest.INDEX_TYPES)
    kind = kinds[data[0] % len(kinds)] if data else ""
    parsed = manifest.parse_manifest(data[1:], kind, "fuzzed")
    if isinstance(parsed, manifest.ImageManifest):
        place_layers(parsed.layers, "fuzzed")
        manifest.describe(parsed, data)
    else:
        manifest.choose(parsed, manifest.this_platform(), "fuzzed")


def tar(data: bytes) -> None:
    """A tar of known size, as a tree."""
    entries: list[Entry] = []
    drive(walk_tar(len(data), entries), reader_of(data))
    see_tree(entries, len(data))


def tar_stream(data: bytes) -> None:
    """A tar that comes as a stream: the same names as by its size, or an error."""
    entries: list[Entry] = []
    walk = walk_tar_stream(entries)
    wanted: Sequence[ByteRange] = next(walk)
    try:
        while True:
            (item,) = wanted
            wanted = walk.send([data[item.start : item.stop]])
    except StopIteration:
        pass
    see_tree(entries, 1 << 62)  # whoever decodes the stream knows where it ends


def zstd_chunked_toc(data: bytes) -> None:
    """The table of contents of a zstd:chunked layer."""
    see_layer(with_toc(zstd_frames(), data), ZstdChunked())


def estargz_toc(data: bytes) -> None:
    """The table of contents of an eStargz layer."""
    see_layer(with_gzip_toc(stargz_body(FILES, gzipped, 4096, 0)[0], data), EStargz())


def stargz_zstd_toc(data: bytes) -> None:
    """The table of contents of stargz' zstd layer."""
    see_layer(with_zstd_toc(stargz_body(FILES, zstded, 4096, 0)[0], data), StargzZstd())


def layer(data: bytes) -> None:
    """A whole layer; its first byte says what it is labelled."""
    labels = ("tar", "tar+gzip", "tar+zstd")
    kind = labels[data[0] % len(labels)] if data else labels[0]
    see_layer(Layer(data[1:], {}, f"application/vnd.oci.image.layer.v1.{kind}"))


def gzip_stream(data: bytes) -> None:
    """A gzip stream; where it can be decoded, zlib agrees, and its restart index opens."""
    decoder = GzipDecoder(best_engine())
    content = decode(decoder, data)
    if content is None:
        return
    truth, rest = b"", data
    while rest:
        unpacker = zlib.decompressobj(31)
        truth += unpacker.decompress(rest)
        rest = unpacker.unused_data
        if not rest.startswith(b"\x1f\x8b"):
            break
    assert content == truth
    index = decoder.restart_index()
    if index is not None:
        opened = open_restart_index(index, len(data))
        assert bytes_of(opened, data) == content


def zstd_stream(data: bytes) -> None:
    """A zstd stream."""
    decode(ZstdDecoder(), data)


def ztoc(data: bytes) -> None:
    """A SOCI index of one layer."""
    read_ztoc(data)
    for _ in read_files(data):
        pass


def soci_checkpoints(data: bytes) -> None:
    """The windows within a SOCI index."""
    read_checkpoints(memoryview(data))


def restart_index(data: bytes) -> None:
    """What an earlier mount left beside a gzip layer, or somebody else there."""
    size_bytes = int.from_bytes(data[:4], "little")
    index = open_restart_index(data[4:], size_bytes)
    for number in range(min(len(index.chunks), 100)):
        item = index.chunks.blob_range(number)
        assert 0 <= item.start <= item.stop <= size_bytes


def criu_images(data: bytes) -> None:
    """CRIU's small files; the first byte says which."""
    parsers: tuple[Target, ...] = (
        criu.parse_inventory,
        criu.parse_pstree,
        criu.parse_core,
        criu.parse_ids,
        criu.parse_external_mounts,
        criu_memory.parse_pagemap,
        criu_memory.parse_mm,
        criu_cpu.parse_cpuinfo,
        read_pagemap,
    )
    if data:
        parsers[data[0] % len(parsers)](data[1:])


def dumps(data: bytes) -> None:
    """What engines leave beside CRIU's files."""
    if data[:1] == b"c":
        parse_config(data[1:], "fuzzed")
    else:
        engines.parse_dump(data[1:], "fuzzed")


def stub(data: bytes) -> None:
    """A stub's marker, and a real image's config that is edited for one."""
    layer = Written(Digest.of(b"1"), 1, Digest.of(b"2"))
    edit_config(data, [Digest.of(b"3")], {0: layer})
    assert real_reference(read_stub(data)).digest is not None


def trace_document(data: bytes) -> None:
    """A trace that somebody has attached: packed, or what is in the frame."""
    packed = data[1:] if data[:1] == b"p" else zstandard.compress(data)
    with suppress(MalformedError):
        found = trace.parse_trace(packed, "it")
        assert trace.parse_trace(trace.dump_trace(found), "again") == found
    hint = trace.parse_hint(packed, "it")
    assert trace.parse_hint(trace.dump_trace(hint), "again") == hint


def criu_log(data: bytes) -> None:
    """What CRIU logged; names in it are the checkpoint's."""
    text = data.decode("utf-8", "replace")
    phases = phases_of(text, 5.0)
    moments = [moment for phase in phases for moment in (phase.began_ms, phase.ended_ms)]
    assert moments == sorted(moments)
    assert not phases or moments[-1] <= 5.001 + length_ms(text)
    diagnose(text)


def archive(data: bytes) -> None:
    """An archive of images."""
    if data:
        for item in read_members(MemoryBlob(data)).values():
            assert 0 <= item.start <= item.stop <= len(data)


def headers(data: bytes) -> None:
    """What a registry writes into headers."""
    text = data.decode("latin-1")
    found = answers.parse_content_range(text)
    assert found is None or found.byte_range.size_bytes > 0
    wait_s = answers.retry_after_s(text, 0.0)
    assert wait_s is None or 0 <= wait_s <= 3600
    assert all(said.isprintable() for said in answers.warnings_in(text))
    registry = urls.Origin("https", "registry.example", 443)
    for challenge in auth.parse_challenges(text):
        with suppress(LazyfsError):
            assert auth.token_url(challenge, registry, ["repository:team/image:pull"]).startswith(
                "https://"
            )
    page = referrers.next_page("https://registry.example/v2/", text)
    assert page is None or urls.origin_of(page) == registry
    assert "?" not in urls.shown(text)
    urls.redirect_target("https://registry.example/", text)


def token(data: bytes) -> None:
    """A token server's answer."""
    found = auth.parse_token(data, "registry.example")
    assert "\n" not in found.header
    assert "Bearer" not in repr(found)


def auth_file(data: bytes) -> None:
    """An auth file of both kinds, and what a helper answers."""

    def ask(name: str, server: str) -> helpers.HelperAnswer | None:
        return helpers.parse_answer(data, name, server)

    for name in ("auth.json", ".dockercfg"):
        with suppress(LazyfsError):
            found = credentials.credentials_in(data, Path(name), "r.example", "team/image", ask)
            assert found is None or name not in (found.basic() or "")
    ask("helper", "r.example")


def proxy(data: bytes) -> None:
    """What the environment says of proxies, and names that may mean this machine."""
    text = data.decode("utf-8", "surrogateescape")
    local.near(text)
    value, _, exceptions = text.partition("\n")
    origin = urls.Origin("https", exceptions[:50], 443)
    proxies.excepted(origin, text)
    environ = {"HTTPS_PROXY": value, "NO_PROXY": exceptions}
    found = proxies.proxy_for(urls.Origin("https", "r.example", 443), environ)
    assert found is None or "://" in found


def mirror_entries(data: bytes) -> None:
    """registries.conf, and where it sends one for an image."""
    text = data.decode("utf-8", "replace")
    entries = registries_conf.parse_registries_conf(text, "registries.conf")
    address.addresses_by_registries_conf(entries, "r.example", "team/image", by_digest=False)


def host_servers(data: bytes) -> None:
    """hosts.toml, likewise."""
    servers = hosts_toml.parse_hosts_toml(data.decode("utf-8", "replace"), "hosts.toml", "/etc")
    assert servers
    address.addresses_by_hosts_toml(servers, "r.example", "team/image")


def referrers_list(data: bytes) -> None:
    """What a registry says that refers to an image."""
    referrers.parse_referrers(data, "")
    referrers.referring_as(data, Digest.of(b""))


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        reference,
        image_manifest,
        tar,
        tar_stream,
        zstd_chunked_toc,
        estargz_toc,
        stargz_zstd_toc,
        layer,
        gzip_stream,
        zstd_stream,
        ztoc,
        soci_checkpoints,
        restart_index,
        criu_images,
        dumps,
        archive,
        stub,
        trace_document,
        criu_log,
        headers,
        token,
        auth_file,
        proxy,
        mirror_entries,
        host_servers,
        referrers_list,
    )
}


# -- looking at what was parsed -----------------------------------------------------------------


def see_tree(entries: Sequence[Entry], content_bytes: int) -> None:
    """Check that no name leaves the tree, and that files lie within the content."""
    for entry in entries:
        assert not entry.path.startswith("/")
        assert ".." not in entry.path.split("/")
        assert entry.content_start >= 0
        assert entry.size_bytes >= 0
        assert entry.content_start + entry.size_bytes <= content_bytes or not entry.size_bytes
    tree = Tree(entries)
    for path, node in tree.walk(tree.root):
        assert path_of(node) == path
    lay_over(tree, Tree(entries))


@cache
def zstd_frames() -> bytes:
    """The frames of a zstd:chunked layer, without its table of contents."""
    made = zstd_chunked(FILES)
    position = int(made.annotations[POSITION_KEY].partition(":")[0])
    return made.blob[: position - 8]


def see_layer(made: Layer, form: LayerFormat | None = None) -> None:
    """Open a layer as the floor above does, and decode what it says is there."""
    described = LayerDescriptor(made.media_type, None, len(made.blob), made.annotations)
    head = made.blob[:HEAD_BYTES]
    index = drive_opening((form or choose(described, head)).open(described, head), made.blob)
    if isinstance(index, StreamIndex):
        decode(index.decoder(), made.blob)
        return
    entries = index.entries
    if index.chunks.content_size_bytes <= CONTENT_MOST_BYTES:
        content = bytes_of(index, made.blob)
        drive(index.walk, reader_of(content))
    see_tree(entries, index.chunks.content_size_bytes)


def bytes_of(index: LayerIndex, blob: bytes) -> bytes:
    """Decode every chunk, each of which has to lie in the blob and be as large as promised."""
    chunks = index.chunks
    content = bytearray(chunks.content_size_bytes)
    for number in range(len(chunks)):
        item = chunks.blob_range(number)
        assert 0 <= item.start <= item.stop <= len(blob)
        start = chunks.content_start(number)
        if item.size_bytes:
            data = b"".join(map(bytes, chunks.decode(number, blob[item.start : item.stop])))
            assert len(data) == chunks.content_size(number)
            content[start : start + len(data)] = data
    return bytes(content)


def decode(decoder: StreamDecoder, data: bytes) -> bytes | None:
    """Decode a stream in two pieces; None if it is longer than is worth it."""
    content = bytearray()
    for piece in _halves(data):
        for part in decoder.decode(piece):
            content += part
            if len(content) > CONTENT_MOST_BYTES:
                return None
    try:
        decoder.finish()
    except MalformedError:
        return None
    return bytes(content)


def _halves(data: bytes) -> Iterator[bytes]:
    yield data[: len(data) // 2]
    yield data[len(data) // 2 :]
