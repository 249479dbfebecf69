"""From a reference to layers, wherever the image is and whatever its manifest says."""

import contextlib
import gzip
import json
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.checkpoint.image import ResolvedImage, resolve
from lazyfs.checkpoint.manifest import parse_manifest, this_platform
from lazyfs.checkpoint.reference import parse_reference
from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import (
    FetchError,
    IntegrityError,
    LazyfsError,
    MalformedError,
    NotACheckpoint,
    SourceError,
    UnsupportedLayer,
)
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from tests import faults
from tests.faults import OCI_INDEX, OCI_LAYER, OCI_MANIFEST, FaultServer, digest_of

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER = random.Random(7).randbytes(100_000)
SETTINGS = TransportSettings(deadline_s=5, backoff_first_s=0.01, backoff_most_s=0.05)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def opened() -> Iterator[list[ResolvedImage]]:
    """Images to close at the end."""
    images: list[ResolvedImage] = []
    yield images
    for image in images:
        image.close()


def descriptor(data: bytes, media_type: str = OCI_LAYER, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **more}


def image_manifest(config: bytes = b"{}", layers: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(config, CONFIG_TYPE),
        "layers": [descriptor(LAYER)] * layers,
        **more,
    }


def pull(server: FaultServer, tag: str = "v1", tmp: Path | None = None) -> ResolvedImage:
    reference = parse_reference(f"{server.host}/{server.repository}:{tag}")
    return resolve(reference, SETTINGS, Counters(), authfile=tmp)


class Taken:
    def __init__(self) -> None:
        self.data = bytearray()
        self._room = bytearray(1 << 20)

    def space(self) -> memoryview:
        return memoryview(self._room)

    def advance(self, count: int) -> None:
        self.data += self._room[:count]


def read_layer(image: ResolvedImage) -> bytes:
    (placed,) = image.placed_layers()
    blob = image.open_blob(placed.descriptor)
    taken = Taken()
    blob.read_into(ByteRange(0, blob.size_bytes), taken)
    return bytes(taken.data)


def test_image_in_a_registry(server: FaultServer, opened: list[ResolvedImage]) -> None:
    config = b'{"os": "linux", "architecture": "amd64"}'
    server.add_blob(LAYER)
    server.add_blob(config)
    digest = server.add_manifest(image_manifest(config, annotations={"a": "b"}), "v1")
    image = pull(server)
    opened.append(image)
    assert image.reference == f"{server.host}/team/checkpoint@{digest}"
    assert str(image.digest) == digest
    assert image.media_type == OCI_MANIFEST
    assert image.annotations == {"a": "b"}
    assert (image.platform, image.artifact_type) == (None, "")
    assert image.read_config() == config
    assert read_layer(image) == LAYER
    again = resolve(parse_reference(image.reference), SETTINGS, Counters())
    opened.append(again)
    assert again.digest == image.digest


def test_index_gives_this_machines_image(server: FaultServer, opened: list[ResolvedImage]) -> None:
    here = this_platform()
    manifests = []
    for architecture in ("s390x", here.architecture):
        document = json.dumps(image_manifest(annotations={"own": architecture, "both": "own"}))
        server.add_manifest(document.encode())
        manifests.append(
            descriptor(
                document.encode(),
                OCI_MANIFEST,
                platform={"os": "linux", "architecture": architecture},
                annotations={"index": architecture, "both": "index"},
            )
        )
    server.add_manifest({"schemaVersion": 2, "manifests": manifests}, "v1", OCI_INDEX)
    image = pull(server)
    opened.append(image)
    assert str(image.digest) == manifests[1]["digest"]
    assert image.platform == here
    assert image.annotations == {
        "own": here.architecture,
        "index": here.architecture,
        "both": "own",
    }
    server.add_manifest({"schemaVersion": 2, "manifests": manifests[:1]}, "v2", OCI_INDEX)
    with pytest.raises(NotACheckpoint, match=f"no image for {here}; it has linux/s390x"):
        pull(server, "v2")
    server.add_manifest({"schemaVersion": 2, "manifests": []}, "v3", OCI_INDEX)
    with pytest.raises(NotACheckpoint, match="points at no image manifest"):
        pull(server, "v3")


def test_index_of_one_without_a_platform(server: FaultServer, opened: list[ResolvedImage]) -> None:
    document = json.dumps(image_manifest()).encode()
    server.add_manifest(document)
    for depth in range(1, 6):
        index = {"schemaVersion": 2, "manifests": [descriptor(document, OCI_MANIFEST)]}
        if depth > 1:
            index["manifests"] = [descriptor(document, OCI_INDEX)]
        document = json.dumps(index).encode()
        server.add_manifest(document, f"depth{depth}", OCI_INDEX)
    opened.append(pull(server, "depth1"))
    opened.append(pull(server, "depth3"))
    with pytest.raises(MalformedError, match="indexes within indexes"):
        pull(server, "depth5")


def test_index_whose_manifest_is_another(server: FaultServer) -> None:
    document = json.dumps(image_manifest()).encode()
    digest = server.add_manifest(document)
    index = {"schemaVersion": 2, "manifests": [descriptor(document, OCI_MANIFEST)]}
    server.add_manifest(index, "v1", OCI_INDEX)
    server.always(digest, faults.corrupt)
    with pytest.raises(IntegrityError):
        pull(server)


def test_index_that_points_at_no_manifest(server: FaultServer) -> None:
    index = {"schemaVersion": 2, "manifests": [descriptor(LAYER, "application/x")]}
    server.add_manifest(index, "v1", OCI_INDEX)
    with pytest.raises(NotACheckpoint, match="points at no image manifest, but at application/x"):
        pull(server)


def test_index_of_several_without_platforms(server: FaultServer) -> None:
    documents = [json.dumps(image_manifest(annotations={"n": str(n)})).encode() for n in range(3)]
    key = "io.podman.annotations.checkpoint.name"
    entries = [
        descriptor(each, OCI_MANIFEST, annotations={key: f"c{number}", "z": "untold"})
        for number, each in enumerate(documents)
    ]
    server.add_manifest({"schemaVersion": 2, "manifests": entries}, "v1", OCI_INDEX)
    with pytest.raises(NotACheckpoint, match="Name the one you want by its digest") as caught:
        pull(server)
    for number, each in enumerate(documents):
        assert f"{digest_of(each)} ({key}=c{number})" in str(caught.value)
    assert "untold" not in str(caught.value)


def test_index_of_a_checkpoint_and_its_base(
    server: FaultServer, opened: list[ResolvedImage]
) -> None:
    """As proposed on containerd issue 8440; and attestations are no images."""
    here = this_platform()
    platform = {"os": "linux", "architecture": here.architecture}
    base = json.dumps(image_manifest(annotations={"is": "base"})).encode()
    checkpoint = json.dumps(image_manifest(annotations={"is": "checkpoint"})).encode()
    server.add_manifest(base)
    server.add_manifest(checkpoint)
    kind = "application/vnd.containerd.container.checkpoint.config.v1+proto"
    entries = [
        descriptor(base, OCI_MANIFEST, platform=platform),
        descriptor(checkpoint, OCI_MANIFEST, platform=platform, artifactType=kind),
    ]
    server.add_manifest({"schemaVersion": 2, "manifests": entries}, "v1", OCI_INDEX)
    opened.append(pull(server))
    assert opened[-1].annotations == {"is": "checkpoint"}
    unknown = {"os": "unknown", "architecture": "unknown"}
    entries = [descriptor(checkpoint, OCI_MANIFEST), descriptor(base, OCI_MANIFEST)]
    entries[1]["platform"] = unknown
    server.add_manifest({"schemaVersion": 2, "manifests": entries}, "v2", OCI_INDEX)
    opened.append(pull(server, "v2"))
    assert opened[-1].annotations == {"is": "checkpoint"}


def test_annotations_of_an_index_itself(server: FaultServer, opened: list[ResolvedImage]) -> None:
    """Where containerd's CRI plugin looks for those of checkpointctl."""
    document = json.dumps(image_manifest(annotations={"a": "manifest"})).encode()
    server.add_manifest(document)
    index = {
        "schemaVersion": 2,
        "manifests": [descriptor(document, OCI_MANIFEST, annotations={"b": "entry"})],
        "annotations": {"a": "index", "b": "index", "c": "index"},
    }
    server.add_manifest(index, "v1", OCI_INDEX)
    opened.append(pull(server))
    assert opened[-1].annotations == {"a": "manifest", "b": "entry", "c": "index"}


def test_several_layers(server: FaultServer, opened: list[ResolvedImage]) -> None:
    for count in (0, 2):
        server.add_manifest(image_manifest(layers=count), f"v{count}")
        opened.append(pull(server, f"v{count}"))
    with pytest.raises(UnsupportedLayer, match="has no layers"):
        opened[0].placed_layers()
    placed = opened[1].placed_layers()
    assert [(each.place, each.kind) for each in placed] == [("", "layer")] * 2


@pytest.mark.parametrize(
    ("config", "more", "wanted"),
    [
        (
            b'{"os":"linux","architecture":"arm64","config":{"Entrypoint":["/bin/sh","-c"]}}',
            {},
            "an ordinary container image (linux/arm64, 1 layer, entrypoint /bin/sh -c)",
        ),
        (
            b'{"os":"linux","architecture":"amd64","config":{"Cmd":["sh"]}}',
            {},
            "an ordinary container image (linux/amd64, 1 layer, command sh)",
        ),
        (
            b'{"os":"linux","architecture":"amd64"}',
            {},
            "an image without a program to start (linux/amd64, 1 layer)",
        ),
        (b"nonsense", {}, "an image of 1 layer"),
        (b"{}", {"artifactType": "application/x"}, "an artifact of type application/x"),
        (
            b"{}",
            {"config": descriptor(b"{}", "application/vnd.cncf.helm.config.v1+json")},
            "a Helm chart",
        ),
    ],
)
def test_describe(
    server: FaultServer,
    opened: list[ResolvedImage],
    config: bytes,
    more: dict[str, Any],
    wanted: str,
) -> None:
    server.add_blob(config)
    server.add_manifest(image_manifest(config) | more, "v1")
    image = pull(server)
    opened.append(image)
    assert image.describe() == wanted


def test_describe_without_the_config(server: FaultServer, opened: list[ResolvedImage]) -> None:
    server.add_manifest(image_manifest(b"not there"), "v1")
    image = pull(server)
    opened.append(image)
    assert image.describe() == "an image of 1 layer"


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"layers":' + b"[" * 100_000,
        b"\xff\xfe",
        image_manifest(layers=0) | {"layers": None},
        image_manifest() | {"manifests": []},
        image_manifest() | {"mediaType": OCI_INDEX},
        {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "manifests": []},
        image_manifest() | {"layers": [descriptor(LAYER) | {"size": -1}]},
        image_manifest() | {"layers": [descriptor(LAYER) | {"size": 1 << 62}]},
        image_manifest() | {"layers": [descriptor(LAYER) | {"size": 1.5}]},
        image_manifest() | {"layers": [descriptor(LAYER) | {"size": "1"}]},
        image_manifest() | {"layers": [descriptor(LAYER) | {"digest": "sha256:../x"}]},
        image_manifest() | {"layers": [{"mediaType": OCI_LAYER, "size": 1}]},
        image_manifest() | {"annotations": {"a": 1}},
        image_manifest(layers=10_001),
    ],
)
def test_manifests_that_are_none(server: FaultServer, document: Any) -> None:
    server.add_manifest(document, "v1")
    with pytest.raises(MalformedError):
        pull(server)


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
        "application/json",
    ],
)
def test_schema_1(server: FaultServer, media_type: str) -> None:
    server.add_manifest({"schemaVersion": 1, "fsLayers": []}, "v1", media_type)
    with pytest.raises(NotACheckpoint, match="schema 1"):
        pull(server)


def test_artifact_manifest_of_the_release_candidates() -> None:
    document = {
        "mediaType": "application/vnd.oci.artifact.manifest.v1+json",
        "artifactType": "application/x",
        "blobs": [descriptor(LAYER)],
    }
    parsed = parse_manifest(json.dumps(document).encode(), "", "it")
    assert len(getattr(parsed, "layers", ())) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each),
)
KEYS = ["mediaType", "digest", "size", "layers", "manifests", "config", "annotations", "platform"]


@given(
    st.dictionaries(st.sampled_from([*KEYS, "schemaVersion", "blobs"]), JSON)
    | st.lists(st.dictionaries(st.sampled_from(KEYS), JSON)).map(lambda each: {"layers": each})
)
def test_any_manifest_is_read_or_refused(document: Any) -> None:
    with contextlib.suppress(MalformedError, NotACheckpoint):
        parse_manifest(json.dumps(document).encode(), "", "it")


@given(st.binary())
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(LazyfsError):
        parse_manifest(data, OCI_MANIFEST, "it")


def test_image_in_a_layout(tmp_path: Path, opened: list[ResolvedImage]) -> None:
    document = json.dumps(image_manifest()).encode()
    blobs = tmp_path / "blobs/sha256"
    blobs.mkdir(parents=True)
    for data in (document, LAYER, b"{}"):
        (blobs / digest_of(data).partition(":")[2]).write_bytes(data)
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    names = {"org.opencontainers.image.ref.name": "v1"}
    index = {"manifests": [descriptor(document, OCI_MANIFEST, annotations=names)]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    for text in (f"oci:{tmp_path}", f"oci:{tmp_path}:v1"):
        image = resolve(parse_reference(text), SETTINGS, Counters())
        opened.append(image)
        assert image.reference == f"oci:{tmp_path}@{digest_of(document)}"
        assert image.read_config() == b"{}"
        assert read_layer(image) == LAYER
        assert parse_reference(image.reference)
    with pytest.raises(SourceError, match="it has v1"):
        resolve(parse_reference(f"oci:{tmp_path}:v2"), SETTINGS, Counters())


@pytest.mark.parametrize(
    ("data", "suffix"),
    [(LAYER, ""), (gzip.compress(LAYER), "+gzip"), (b"\x28\xb5\x2f\xfd" + LAYER, "+zstd")],
)
def test_archives(
    server: FaultServer, tmp_path: Path, opened: list[ResolvedImage], data: bytes, suffix: str
) -> None:
    path = tmp_path / "c.tar"
    path.write_bytes(data)
    url = server.add_file("/c.tar", data, {"ETag": '"1"'})
    for text in (str(path), url + "?sig=s3cr3t"):
        image = resolve(parse_reference(text), SETTINGS, Counters())
        opened.append(image)
        assert image.reference == text.partition("?")[0]
        assert (image.digest, image.config, image.read_config()) == (None, None, b"")
        (layer,) = image.layers
        assert (layer.digest, layer.size_bytes) == (None, len(data))
        assert layer.media_type == OCI_LAYER + suffix
        assert read_layer(image) == data
        assert image.describe() == "an archive of other files"


def test_archives_that_are_not_there(server: FaultServer, tmp_path: Path) -> None:
    empty = tmp_path / "empty.tar"
    empty.touch()
    for text in (str(tmp_path / "none.tar"), str(empty), f"{server.url}/none.tar"):
        with pytest.raises(SourceError):
            resolve(parse_reference(text), SETTINGS, Counters())


def test_registry_that_is_away(server: FaultServer) -> None:
    server.stop()
    brief = TransportSettings(deadline_s=0.2)
    reference = parse_reference(f"{server.host}/a")
    counters = Counters()
    with pytest.raises(FetchError, match=r"gave up.*connection refused"):
        resolve(reference, brief, counters)
    assert counters.requests >= 1


def test_this_platform_has_go_words() -> None:
    assert this_platform().os == "linux"
    assert platform.machine() != "x86_64" or this_platform().architecture == "amd64"


def test_archive_on_this_machine_loads_no_http(tmp_path: Path) -> None:
    (tmp_path / "c.tar").write_bytes(LAYER)
    script = (
        "import sys\n"
        "from lazyfs.checkpoint.image import resolve\n"
        "from lazyfs.checkpoint.reference import parse_reference\n"
        "from lazyfs.ground.counters import Counters\n"
        "from lazyfs.ground.settings import TransportSettings\n"
        "image = resolve(parse_reference(sys.argv[1]), TransportSettings(), Counters())\n"
        "image.close()\n"
        "print('requests' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "c.tar")]
    output = subprocess.run(command, check=True, capture_output=True)
    assert output.stdout.strip() == b"False"
