"""Every form that a checkpoint comes in: shown as it was dumped, and restored by real CRIU."""

import hashlib
import json
import os
import re
import struct
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from testbed import (
    Descriptor,
    Layer,
    Testbed,
    get_manifest,
    push_blob,
    push_manifest,
    push_oci_image,
    skopeo_copy,
)
from testbed.images import IMAGE_INDEX, IMAGE_MANIFEST
from testbed.process import wait_until

from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.corpus import FORMS, GZIP_LAYER, Corpus, Form, corpus
from tests.real.mounts import Mount, lazyfs, mounted
from tests.real.trees import contents

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

every_form = pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
lazily = pytest.mark.parametrize(
    "form",
    [form for form in FORMS if form.name in ("skopeo-gzip", "soci-v2", "ctr-remote-estargz")],
    ids=lambda form: form.name,
)


@pytest.fixture(scope="module")
def small(testbed: Testbed, shelf: Path) -> Checkpoint:
    return checkpoint(testbed, shelf / "small", size_mib=32)


@pytest.fixture(scope="module")
def forms(store: Store, small: Checkpoint, shelf: Path) -> Iterator[Corpus]:
    with corpus(store, small, shelf / "corpus") as made:
        yield made


@every_form
def test_it_is_what_was_dumped_and_goes_on(forms: Corpus, form: Form, work: Path) -> None:
    reference = forms.reference(form.name)
    with mounted(reference, work) as mount:
        with forms.checkpoint.restore(mount.directory, work / "criu") as restored:
            forms.checkpoint.before.assert_goes_on(restored)
        assert contents(mount.directory) == contents(forms.images)
        state = mount.status()
    assert state["layer_format"] == form.format
    assert state["chunks_proven"] == (form.proof == "chunk")
    assert state["failed_reads"] == 0
    assert state["failed"] is None


@every_form
def test_inspect_tells_its_form(forms: Corpus, form: Form, work: Path) -> None:
    reference = forms.reference(form.name)
    done = lazyfs("inspect", "--json", "--plain-http", "--cache-dir", work / "cache", reference)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert {layer["format"] for layer in report["layers"]} == {form.format}
    assert {layer["proof"] for layer in report["layers"]} == {form.proof}
    mislabelled = {layer["mislabelled"] for layer in report["layers"]}
    # oras calls every file a tar if it is not told otherwise.
    assert mislabelled == {form.name in ("gzip-labelled-tar", "oras-files")}
    assert [process["command"] for process in report["processes"]] == ["workload"]


@lazily
def test_it_goes_on_with_lazy_pages(forms: Corpus, form: Form, work: Path) -> None:
    reference = forms.reference(form.name)
    with (
        mounted(reference, work) as mount,
        forms.checkpoint.restore(mount.directory, work / "criu", lazy_pages=True) as restored,
    ):
        forms.checkpoint.before.assert_goes_on(restored)
        restored.wait_lazy_pages()
        assert mount.status()["failed_reads"] == 0


@pytest.mark.parametrize("name", ["skopeo-gzip", "skopeo-zstd"])
def test_a_second_mount_reads_it_from_the_cache(forms: Corpus, name: str, work: Path) -> None:
    """What was streamed once can be read at random: from the cache, without the registry."""
    reference, cache = forms.reference(name), work / "cache"
    layer_bytes = _layer(forms, reference)["size"]
    with mounted(reference, work / "first", cache=cache) as mount:
        expected = contents(mount.directory)
        assert mount.status()["bytes_fetched"] >= layer_bytes
        mount.wait_quiet()
    with (
        mounted(reference, work / "second", cache=cache) as mount,
        forms.checkpoint.restore(mount.directory, work / "criu") as restored,
    ):
        forms.checkpoint.before.assert_goes_on(restored)
        assert contents(mount.directory) == expected
        state = mount.status()
    assert state["bytes_fetched"] < layer_bytes / 10
    assert state["failed_reads"] == 0


def test_a_lost_cache_is_refilled_at_random(forms: Corpus, work: Path) -> None:
    """The restart points of a gzip layer outlive its content: then one file is one range."""
    reference, cache = forms.reference("skopeo-gzip"), work / "cache"
    layer_bytes = _layer(forms, reference)["size"]
    with mounted(reference, work / "first", cache=cache) as mount:
        expected = contents(mount.directory)
        mount.wait_quiet()
    for content in cache.rglob("content"):
        content.unlink()
    with mounted(reference, work / "second", cache=cache) as mount:
        with (mount.directory / "pages-1.img").open("rb") as pages:
            os.pread(pages.fileno(), 4096, 20 << 20)
        assert mount.status()["bytes_fetched"] < layer_bytes
        assert contents(mount.directory) == expected


def test_later_layers_hide_what_earlier_ones_have(store: Store, forms: Corpus, work: Path) -> None:
    """A whiteout of a file, and an opaque directory (OCI image-spec, layer.md)."""
    below, above = work / "below.tar", work / "above.tar"
    old = {"checkpoint/stats-dump": b"old", "checkpoint/logs/left": b"old", "spec.dump": b"{}"}
    _write_tar(below, old)
    hidden = {"checkpoint/.wh.stats-dump": b"", "checkpoint/logs/.wh..wh..opq": b""}
    _write_tar(above, hidden | {"checkpoint/logs/new": b"new", ".wh.spec.dump": b""})
    layers = [Layer(below), Layer(forms.checkpoint.layer), Layer(above)]
    push_oci_image(store.address, "layers", "1", layers)
    expected = contents(forms.images) | {
        "logs": "directory",
        "logs/new": hashlib.sha256(b"new").hexdigest(),
    }
    with (
        mounted(f"{store.address}/layers:1", work) as mount,
        forms.checkpoint.restore(mount.directory, work / "criu") as restored,
    ):
        forms.checkpoint.before.assert_goes_on(restored)
        assert contents(mount.directory) == expected


# ---- what bad input gets ----


def test_a_stream_cut_off_is_an_error(store: Store, forms: Corpus, work: Path) -> None:
    """A truncated gzip whose digest is right: the digest of what is left."""
    whole = forms.compressed("gzip", ".gz").read_bytes()
    cut = work / "cut.tar.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    push_oci_image(store.address, "cut", "1", [Layer(cut, GZIP_LAYER)])
    seen = _look(f"{store.address}/cut:1", forms, work)
    assert seen.errors
    assert not seen.wrong


def test_a_stream_that_contradicts_itself_is_an_error(
    store: Store, forms: Corpus, work: Path
) -> None:
    """A gzip of right digest whose own checksum is not that of what it holds."""
    whole = bytearray(forms.compressed("gzip", ".gz").read_bytes())
    whole[-8] ^= 1
    lying = work / "lying.tar.gz"
    lying.write_bytes(whole)
    push_oci_image(store.address, "lying", "1", [Layer(lying, GZIP_LAYER)])
    assert _look(f"{store.address}/lying:1", forms, work).failed


@pytest.mark.parametrize("name", ["skopeo-gzip", "skopeo-zstd", "seekable-zstd", "soci-v1"])
def test_wrong_bytes_fail_the_mount(store: Store, forms: Corpus, name: str, work: Path) -> None:
    """The registry's disk has changed a byte of a layer that only its own digest proves.

    What was read before all of it was here may be wrong: `failed` says so, loudly. With
    --verify=full nothing of it is seen.
    """
    reference = forms.reference(name)
    with _one_byte_changed(store, _layer(forms, reference)["digest"]):
        assert _look(reference, forms, work / "behind").failed
        seen = _look(reference, forms, work / "before", "--verify=full")
        assert seen.failed
        assert not seen.wrong


@pytest.mark.parametrize("name", ["skopeo-zstd-chunked", "ctr-remote-estargz", "soci-v2"])
def test_wrong_bytes_are_never_served(store: Store, forms: Corpus, name: str, work: Path) -> None:
    """The same, where each chunk has a digest."""
    reference = forms.reference(name)
    with _one_byte_changed(store, _layer(forms, reference)["digest"]):
        seen = _look(reference, forms, work)
    assert seen.failed
    assert not seen.wrong


def test_an_index_of_another_layer_changes_nothing(store: Store, forms: Corpus, work: Path) -> None:
    """Anybody who may push can attach a SOCI index that lies about which layer it is for."""
    layer = forms.compressed("gzip", ".gz")
    image = push_oci_image(store.address, "lying-soci", "1", [Layer(layer, GZIP_LAYER)])
    _, index = get_manifest(store.address, "corpus/soci", forms.soci_index)
    named = {"com.amazon.soci.image-layer-digest": image.layers[0].digest}
    index["layers"][0]["annotations"] |= named
    ztoc = _stored(store, index["layers"][0]["digest"]).read_bytes()
    _attach(store, "lying-soci", image.manifest, index, ztoc)
    reference = f"{store.address}/lying-soci:1"
    with mounted(reference, work, forgiven=("zTOC", "SOCI index")) as mount:
        assert contents(mount.directory) == contents(forms.images)
        state = mount.status()
    assert state["layer_format"] == "gzip"
    assert state["failed"] is None


def test_an_index_with_wrong_windows_is_found_out(store: Store, forms: Corpus, work: Path) -> None:
    """Digests of the layer's compressed bytes do not tell that they decompress to other ones.

    Nothing promises such an index but who pushed it, so the whole layer is decoded and compared
    behind what is read; and whoever names the image by its digest is spared it.
    """
    blob = _stored(store, _layer(forms, forms.reference("soci-v1"))["digest"])
    copy = push_oci_image(store.address, "wrong-soci", "1", [Layer(blob, GZIP_LAYER)])
    _, index = get_manifest(store.address, "corpus/soci", forms.soci_index)
    ztoc = bytearray(_stored(store, index["layers"][0]["digest"]).read_bytes())
    _spoil_windows(ztoc)
    _attach(store, "wrong-soci", copy.manifest, index, bytes(ztoc))
    reference = f"{store.address}/wrong-soci:1"
    seen = _look(reference, forms, work / "behind")
    assert seen.failed or not seen.wrong
    assert not _look(reference, forms, work / "before", "--verify=full").wrong
    by_digest = f"{store.address}/wrong-soci@{copy.manifest.digest}"
    seen = _look(by_digest, forms, work / "by-digest")
    assert not seen.failed
    assert not seen.wrong


def test_an_encrypted_layer_is_refused_by_name(forms: Corpus, work: Path) -> None:
    """As skopeo encrypts (ocicrypt); the error says for whom it is."""
    key, public = forms.work / "key.pem", forms.work / "public.pem"
    forms.session.run(["openssl", "genrsa", "-out", key, "2048"])
    forms.session.run(["openssl", "rsa", "-in", key, "-pubout", "-out", public])
    layout = f"oci:{forms.work}/encrypted:1"
    skopeo_copy(forms.session, forms.plain, layout, "--encryption-key", f"jwe:{public}")
    done = lazyfs("inspect", "--cache-dir", work / "cache", layout)
    assert done.returncode == 4
    assert "encrypted" in done.stderr
    assert "jwe" in done.stderr


def _spoil_windows(ztoc: bytearray) -> None:
    """Change the windows of a zTOC's checkpoints, which are in it as soci's ztoc/compression has.

    An i32 that counts them and an i64 for the span size, then of each two offsets, the bits and
    32 KiB of window.
    """
    head, item = struct.Struct("<iq"), struct.Struct("<qqB32768x")
    span_size = struct.pack("<q", 4 << 20)
    begin = next(
        found.start() - 4
        for found in re.finditer(re.escape(span_size), ztoc)
        if (count := struct.unpack_from("<i", ztoc, found.start() - 4)[0]) in range(1, 100)
        and found.end() + count * item.size <= len(ztoc)
    )
    count, _ = head.unpack_from(ztoc, begin)
    for number in range(count):
        stop = begin + head.size + (number + 1) * item.size
        ztoc[stop - 32768 : stop] = bytes(byte ^ 0x55 for byte in ztoc[stop - 32768 : stop])


def _attach(
    store: Store, repository: str, image: Descriptor, index: dict[str, Any], ztoc: bytes
) -> None:
    """Push a SOCI index with a zTOC as a referrer of an image."""
    address = store.address
    index["subject"] = image.as_json()
    descriptor = push_blob(address, repository, ztoc)
    index["layers"][0] |= {"digest": descriptor.digest, "size": descriptor.size}
    push_blob(address, repository, b"{}")
    pushed = push_manifest(address, repository, None, json.dumps(index).encode(), IMAGE_MANIFEST)
    listed = pushed.as_json() | {"artifactType": index["config"]["mediaType"]}
    referrers = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": [listed]}
    tag, content = image.digest.replace(":", "-"), json.dumps(referrers).encode()
    push_manifest(address, repository, tag, content, IMAGE_INDEX)


@dataclass(frozen=True)
class _Seen:
    """What came of mounting something that is not as it should be, and reading all of it."""

    errors: list[str]
    """What was refused, or could not be read."""
    wrong: list[str]
    """Files that were read with other bytes than they had."""
    failed: bool
    """Whether lazyfs found out: mounting was refused, or the status says so."""


def _look(reference: str, forms: Corpus, work: Path, *options: str) -> _Seen:
    work.mkdir(parents=True, exist_ok=True)
    mount = Mount(reference, work, options, work / "cache")
    words: list[str | Path] = ["--cache-dir", work / "cache", "--log-file", mount.log]
    done = lazyfs("mount", *words, "--plain-http", *options, reference, mount.directory)
    if done.returncode != 0:
        assert done.returncode in (4, 5), done.stderr
        assert "Traceback" not in done.stderr
        return _Seen([done.stderr], [], True)
    try:
        errors, wrong = [], []
        for name in sorted(contents(forms.images)):
            try:
                if (mount.directory / name).read_bytes() != (forms.images / name).read_bytes():
                    wrong.append(name)
            except OSError as error:
                errors.append(f"{name}: {error}")
        wait_until(lambda: _is_judged(mount), "that it is found out, or found to be right", 60)
        failed = mount.status()["failed"] is not None
    finally:
        lazyfs("umount", mount.directory)
        print(mount.log_text())
    assert "Traceback" not in mount.log_text()
    return _Seen(errors, wrong, failed)


def _is_judged(mount: Mount) -> bool:
    """Whether what was read so far cannot turn out to be wrong any more."""
    status = mount.status()
    return bool(status["failed"] or status["blob_proven"] or status["chunks_proven"])


@contextmanager
def _one_byte_changed(store: Store, digest: str) -> Iterator[None]:
    """Change a byte in the middle of a blob where the registry keeps it."""
    blob = _stored(store, digest)
    _flip(blob)
    try:
        yield
    finally:
        _flip(blob)


def _stored(store: Store, digest: str) -> Path:
    """Return the file in which the registry keeps a blob."""
    hexadecimal = digest.partition(":")[2]
    blobs = store.data / "docker/registry/v2/blobs/sha256"
    return blobs / hexadecimal[:2] / hexadecimal / "data"


def _flip(blob: Path) -> None:
    with blob.open("r+b") as file:
        file.seek(blob.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))


def _layer(forms: Corpus, reference: str) -> dict[str, Any]:
    """Return what the manifest says of the one layer."""
    repository, _, tag = reference.removeprefix(f"{forms.store.address}/").partition(":")
    _, manifest = get_manifest(forms.store.address, repository, tag)
    if "manifests" in manifest:
        digest = manifest["manifests"][0]["digest"]
        _, manifest = get_manifest(forms.store.address, repository, digest)
    (layer,) = manifest["layers"]
    described: dict[str, Any] = layer
    return described


def _write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))
