"""Finding the SOCI index of an image: who named it, and what of it is believed."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lazyfs.checkpoint.soci_index import (
    INDEX_DIGEST_KEY,
    INDEX_V1,
    INDEX_V2,
    LAYER_DIGEST_KEY,
    ZtocRef,
    find_ztocs,
)
from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import FetchError, IntegrityError, SourceError
from lazyfs.ground.settings import TransportSettings
from lazyfs.layers.model import LayerDescriptor
from lazyfs.layers.soci import open_soci
from lazyfs.transport.blob import Blob
from lazyfs.transport.files import LayoutSource
from lazyfs.transport.place import Health
from lazyfs.transport.registry import RegistrySource
from lazyfs.transport.source import Manifest, ReferrerDescriptor, Referrers
from tests.faults import OCI_INDEX, OCI_MANIFEST, FaultServer, digest_of

SAMPLE = Path(__file__).parent.parent / "data" / "soci"
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
IMAGE = Digest.of(b"the image's manifest")
LAYERS = tuple(
    LayerDescriptor(GZIP, Digest.of(name), 1_000_000, {}) for name in (b"layer 1", b"layer 2")
)
ZTOC = Digest.of(b"a zTOC")


@dataclass
class Fake:
    """A source that holds manifests, and counts what it is asked for."""

    manifests: dict[str, bytes] = field(default_factory=dict)
    referring: list[bytes] = field(default_factory=list)
    failure: Exception | None = None
    asked: list[str] = field(default_factory=list)
    name: str = "fake"

    def add(self, data: bytes) -> str:
        self.manifests[digest_of(data)] = data
        return digest_of(data)

    def manifest(self, reference: str | None) -> Manifest:
        assert reference is not None
        self.asked.append(reference)
        if self.failure is not None:
            raise self.failure
        if reference not in self.manifests:
            raise SourceError("404")
        return Manifest(self.manifests[reference], OCI_MANIFEST, Digest.parse(reference))

    def referrers(self, digest: Digest, *artifact_types: str) -> Referrers:
        assert (digest, artifact_types) == (IMAGE, (INDEX_V1,))
        self.asked.append("referrers")
        return Referrers(
            ReferrerDescriptor(Digest.parse(self.add(data)), OCI_MANIFEST, len(data), INDEX_V1)
            for data in self.referring
        )

    def read_offer(self, digest: Digest, size_bytes: int, *, is_manifest: bool = False) -> bytes:
        raise NotImplementedError

    @property
    def is_settled(self) -> bool:
        return True

    def blob(self, digest: Digest, size_bytes: int) -> Blob:
        raise NotImplementedError

    def read_blob(self, digest: Digest, size_bytes: int) -> bytes:
        raise NotImplementedError

    def healths(self) -> list[Health]:
        return []

    def close(self) -> None:
        pass


def row(layer: LayerDescriptor, ztoc: Digest = ZTOC, size: int = 1000, **more: Any) -> Any:
    return {
        "mediaType": "application/octet-stream",
        "digest": str(ztoc),
        "size": size,
        "annotations": {LAYER_DIGEST_KEY: str(layer.digest)},
        **more,
    }


def soci_index(*rows: Any, kind: str = INDEX_V1, **more: Any) -> bytes:
    config = {"mediaType": kind, "digest": digest_of(b"{}"), "size": 2}
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": rows}
    return json.dumps({**manifest, **more}).encode()


def found_in(source: Fake, annotations: Mapping[str, str] = {}) -> dict[Digest, ZtocRef]:
    return find_ztocs(source, IMAGE, annotations, LAYERS, referrers=source.referrers)


@pytest.mark.parametrize("kind", [INDEX_V2, INDEX_V1])
def test_what_the_manifest_names_is_pinned(kind: str) -> None:
    source = Fake(referring=[soci_index(row(LAYERS[0]))])
    digest = source.add(soci_index(row(LAYERS[1], size=77), kind=kind))
    found = found_in(source, {INDEX_DIGEST_KEY: digest})
    assert list(found) == [LAYERS[1].digest]
    (ref,) = found.values()
    assert ref.pinned
    assert (ref.descriptor.digest, ref.descriptor.size_bytes) == (ZTOC, 77)
    assert "annotation" in ref.found
    assert source.asked == [digest], "and nobody else is asked"


def test_what_refers_to_it_is_not() -> None:
    source = Fake(referring=[soci_index(row(LAYERS[0]), row(LAYERS[1]))])
    found = found_in(source)
    assert set(found) == {LAYERS[0].digest, LAYERS[1].digest}
    assert not any(ref.pinned for ref in found.values())
    assert all("referrer sha256:" in ref.found for ref in found.values())


def test_the_old_artifact_manifest() -> None:
    manifest = {
        "mediaType": "application/vnd.oci.artifact.manifest.v1+json",
        "artifactType": INDEX_V1,
        "blobs": [row(LAYERS[0])],
    }
    assert list(found_in(Fake(referring=[json.dumps(manifest).encode()]))) == [LAYERS[0].digest]


@pytest.mark.parametrize(
    "failure",
    [SourceError("404"), FetchError("weather", transient=False), IntegrityError("other bytes")],
)
def test_an_index_that_cannot_be_had_is_none(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = Fake(failure=failure, referring=[soci_index(row(LAYERS[0]))])
    assert found_in(source, {INDEX_DIGEST_KEY: str(ZTOC)}) == {}
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


@pytest.mark.parametrize(
    "named",
    [
        "x",
        "sha256:00",
        digest_of(b"{}"),
        digest_of(soci_index(kind="application/spdx+json")),
        digest_of(soci_index(row(LAYERS[0], size=-1), kind=INDEX_V2)),
        digest_of(soci_index(kind=INDEX_V2)),
        digest_of(b'{"manifests": []}'),
    ],
)
def test_without_a_pinned_index_referrers_are_asked(named: str) -> None:
    source = Fake(referring=[soci_index(row(LAYERS[0]))])
    for data in (
        b"{}",
        b'{"manifests": []}',
        soci_index(kind="application/spdx+json"),
        soci_index(row(LAYERS[0], size=-1), kind=INDEX_V2),
        soci_index(kind=INDEX_V2),
    ):
        source.add(data)
    found = found_in(source, {INDEX_DIGEST_KEY: named})
    assert [ref.pinned for ref in found.values()] == [False]


def test_the_first_referrer_that_fits() -> None:
    other = LayerDescriptor(GZIP, Digest.of(b"of another image"), 10, {})
    source = Fake(
        referring=[
            b"not JSON",
            soci_index(row(LAYERS[0]), kind=INDEX_V2),
            soci_index(row(other)),
            soci_index(row(LAYERS[0], size=3)),
        ]
    )
    assert [ref.descriptor.size_bytes for ref in found_in(source).values()] == [3]
    source.referring.insert(0, b"too many to be tried")
    assert found_in(source) == {}


def test_rows_that_are_passed_over() -> None:
    source = Fake(
        referring=[
            soci_index(
                row(LAYERS[0], size=2_100_000),
                row(LAYERS[0], size=0),
                row(LAYERS[0], mediaType="application/vnd.amazon.soci.prefetch.v1+json"),
                row(LAYERS[0], annotations=None),
                row(LAYERS[0], annotations={LAYER_DIGEST_KEY: "sha256:../.."}),
                row(LAYERS[0], size=5),
                row(LAYERS[0], size=6),
            )
        ]
    )
    assert [ref.descriptor.size_bytes for ref in found_in(source).values()] == [5]


# --- what soci has pushed ----------------------------------------------------------------------


def read(name: str) -> bytes:
    return (SAMPLE / name).read_bytes()


def layers_of_sample() -> list[LayerDescriptor]:
    (layer,) = json.loads(read("manifest.json"))["layers"]
    return [LayerDescriptor(layer["mediaType"], Digest.parse(layer["digest"]), layer["size"], {})]


def check_sample(found: dict[Digest, ZtocRef], *, pinned: bool) -> None:
    (layer,) = layers_of_sample()
    assert list(found) == [layer.digest]
    assert layer.digest is not None
    ref = found[layer.digest]
    assert ref.pinned is pinned
    assert ref.descriptor.digest is not None
    ref.descriptor.digest.check(read("ztoc"), "the sample")
    assert ref.descriptor.size_bytes == len(read("ztoc"))
    index = open_soci(layer, read("ztoc"), pinned=ref.pinned, head=read("layer"))
    assert index.chunks.proven is pinned


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[tuple[FaultServer, RegistrySource]]:
    (tmp_path / "auth.json").write_text("{}")
    with FaultServer() as server:
        source = RegistrySource(
            server.host,
            server.repository,
            settings=TransportSettings(),
            counters=Counters(),
            authfile=tmp_path / "auth.json",
        )
        yield server, source
        source.close()


def test_a_registry_that_soci_has_pushed_to(
    registry: tuple[FaultServer, RegistrySource],
) -> None:
    server, source = registry
    digest = Digest.parse(server.add_manifest(read("manifest.json"), "v1"))
    server.add_manifest(read("index.json"))
    server.add_manifest(read("referrers.json"), f"sha256-{digest.hex}", OCI_INDEX)
    check_sample(
        find_ztocs(source, digest, {}, layers_of_sample(), referrers=source.referrers), pinned=False
    )


def test_an_image_that_soci_has_converted(registry: tuple[FaultServer, RegistrySource]) -> None:
    """Version 2, as `soci convert` lays it out: of the same zTOC, without a subject."""
    server, source = registry
    index = json.loads(read("index.json"))
    del index["subject"]
    index["config"]["mediaType"] = INDEX_V2
    annotations = {INDEX_DIGEST_KEY: server.add_manifest(index)}
    manifest = {**json.loads(read("manifest.json")), "annotations": annotations}
    digest = Digest.parse(server.add_manifest(manifest))
    check_sample(
        find_ztocs(source, digest, annotations, layers_of_sample(), referrers=source.referrers),
        pinned=True,
    )
    assert server.count("/referrers/") == 0


def test_a_layout_that_oras_has_copied_to(tmp_path: Path) -> None:
    (tmp_path / "blobs/sha256").mkdir(parents=True)
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    rows = []
    for name in ("manifest.json", "index.json"):
        data = read(name)
        (tmp_path / "blobs/sha256" / Digest.of(data).hex).write_bytes(data)
        rows.append({"mediaType": OCI_MANIFEST, "digest": digest_of(data), "size": len(data)})
    (tmp_path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": rows}))
    source = LayoutSource(tmp_path, counters=Counters())
    digest = Digest.of(read("manifest.json"))
    check_sample(
        find_ztocs(source, digest, {}, layers_of_sample(), referrers=source.referrers), pinned=False
    )
    source.close()
