"""One small checkpoint in every form that the tools people have can give it."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

from testbed import (
    Config,
    Containerd,
    Layer,
    Session,
    WebServer,
    buildah_image,
    oras_push,
    push_oci_image,
    push_soci_enabled,
    skopeo_copy,
    soci_index,
    umoci_change,
    write_manifest,
    write_oci_layout,
    write_seekable,
)

from tests.real.checkpoints import Checkpoint
from tests.real.conftest import Store

GZIP_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
ZSTD_LAYER = "application/vnd.oci.image.layer.v1.tar+zstd"
_CRIU_ARTIFACT = "application/vnd.criu.checkpoint.v1"
_EMPTY = "application/vnd.oci.empty.v1+json"
_SCRATCH = "application/vnd.oci.scratch.v1+json"
_ARTIFACT_MANIFEST = "application/vnd.oci.artifact.manifest.v1+json"

Proof: TypeAlias = Literal["chunk", "layer", "none"]


class Corpus:
    """A dump of a host process, and where its forms are made, each when it is first asked for."""

    def __init__(self, store: Store, checkpoint: Checkpoint, work: Path) -> None:
        """Within `corpus` only: the programs that make the forms run there."""
        self.checkpoint = checkpoint
        self.images = work / "checkpoint"
        """The images directory, unpacked by tar."""
        self.store, self.work = store, work
        self.session: Session
        self.containerd: Containerd
        self.web: WebServer
        self._made: dict[str, str] = {}

    def reference(self, name: str) -> str:
        """Return the reference of a form, which is made if it is asked for the first time."""
        if name not in self._made:
            self._made[name] = form(name).make(self)
        return self._made[name]

    def image(self, name: str) -> str:
        """Return what a form's image is called in the registry."""
        return f"{self.store.address}/corpus/{name}:1"

    @cached_property
    def plain(self) -> str:
        """An OCI layout with the layer as it was dumped."""
        write_oci_layout(self.work / "plain", "1", [Layer(self.checkpoint.layer)])
        return f"oci:{self.work}/plain:1"

    @cached_property
    def gzip(self) -> str:
        """An image in the registry, as skopeo pushes what is not compressed."""
        target = self.image("gzip")
        skopeo_copy(self.session, self.plain, f"docker://{target}")
        return target

    @cached_property
    def soci_index(self) -> str:
        """The digest of the SOCI index of `gzip`."""
        return soci_index(self.session, self.containerd, self.indexed)

    @cached_property
    def indexed(self) -> str:
        """The same as `gzip`, in a repository of its own: an index is for all who have it."""
        target = self.image("soci")
        skopeo_copy(self.session, f"docker://{self.gzip}", f"docker://{target}")
        return target

    def by_skopeo(self, name: str, *options: str) -> str:
        """Copy the plain image into the registry."""
        skopeo_copy(self.session, self.plain, f"docker://{self.image(name)}", *options)
        return self.image(name)

    def by_ctr_remote(self, name: str, *options: str) -> str:
        """Convert the gzip image by stargz-snapshotter's tool."""
        target = self.image(name)
        self.containerd.ctr("image", "pull", "--plain-http", self.gzip)
        convert = ["ctr-remote", "image", "convert", "--oci", *options]
        self.session.run([*convert, self.gzip, target], timeout_s=300)
        self.containerd.ctr("image", "push", "--plain-http", target)
        return target

    def copied(self, target: str) -> str:
        """Copy the gzip image to a place on this machine."""
        skopeo_copy(self.session, f"docker://{self.gzip}", target)
        return target

    def compressed(self, program: str, suffix: str) -> Path:
        """Compress the archive as a person would."""
        target = self.work / f"layer.tar{suffix}"
        if not target.exists():
            with target.open("wb") as out:
                subprocess.run([program, "-c", str(self.checkpoint.layer)], stdout=out, check=True)
        return target


@contextmanager
def corpus(store: Store, checkpoint: Checkpoint, work: Path) -> Iterator[Corpus]:
    """Run what makes a checkpoint's forms for the length of a block."""
    work.mkdir()
    subprocess.run(["tar", "-C", str(work), "-xf", str(checkpoint.layer)], check=True)
    made = Corpus(store, checkpoint, work)
    with ExitStack() as running:
        binds = [work, checkpoint.layer.parent]
        made.session = running.enter_context(Session(store.testbed, binds))
        log = work / "containerd.log"
        made.containerd = running.enter_context(Containerd(made.session, log))
        web = WebServer.of_folder(store.testbed, work / "web", work)
        made.web = running.enter_context(web)
        yield made


@dataclass(frozen=True)
class Form:
    """One form of a checkpoint, and what lazyfs should find it to be."""

    name: str
    make: Callable[[Corpus], str]
    """Makes it; returns its reference."""
    format: str
    """As `inspect` names it."""
    proof: Proof
    """As `inspect` tells it."""


FORMS: list[Form] = []


def form(name: str) -> Form:
    """Return the form of that name."""
    return next(each for each in FORMS if each.name == name)


def _form(
    name: str, layer_format: str, proof: Proof
) -> Callable[[Callable[[Corpus], str]], Callable[[Corpus], str]]:
    def add(make: Callable[[Corpus], str]) -> Callable[[Corpus], str]:
        FORMS.append(Form(name, make, layer_format, proof))
        return make

    return add


@_form("plain-tar", "tar", "layer")
def _plain_tar(corpus: Corpus) -> str:
    return f"{corpus.store.address}/{corpus.store.push('corpus/plain', corpus.checkpoint)}"


@_form("skopeo-gzip", "gzip", "layer")
def _gzip(corpus: Corpus) -> str:
    return corpus.gzip


@_form("skopeo-docker-v2s2", "gzip", "layer")
def _docker(corpus: Corpus) -> str:
    return corpus.by_skopeo("docker", "--format=v2s2")


@_form("skopeo-zstd", "zstd", "layer")
def _zstd(corpus: Corpus) -> str:
    return corpus.by_skopeo("zstd", "--dest-compress-format=zstd")


@_form("skopeo-zstd-chunked", "zstd:chunked", "chunk")
def _zstd_chunked(corpus: Corpus) -> str:
    return corpus.by_skopeo("chunked", "--dest-compress-format=zstd:chunked")


@_form("ctr-remote-estargz", "estargz", "chunk")
def _estargz(corpus: Corpus) -> str:
    return corpus.by_ctr_remote("estargz", "--estargz")


@_form("ctr-remote-estargz-external-toc", "gzip", "layer")
def _estargz_external(corpus: Corpus) -> str:
    """The TOC is an image of its own: what is left is a layer of many gzip members."""
    options = ["--estargz", "--estargz-external-toc", "--estargz-compression-level=1"]
    return corpus.by_ctr_remote("estargz-external", *options)


@_form("ctr-remote-zstdchunked", "zstd:stargz", "chunk")
def _stargz_zstd(corpus: Corpus) -> str:
    return corpus.by_ctr_remote("stargz-zstd", "--zstdchunked")


@_form("soci-v1", "soci", "layer")
def _soci_v1(corpus: Corpus) -> str:
    assert corpus.soci_index
    return corpus.indexed


@_form("soci-v2", "soci", "chunk")
def _soci_v2(corpus: Corpus) -> str:
    push_soci_enabled(corpus.store.address, "corpus/soci", "v2", "1", corpus.soci_index)
    return f"{corpus.store.address}/corpus/soci:v2"


@_form("seekable-zstd", "zstd:seekable", "layer")
def _seekable(corpus: Corpus) -> str:
    layer = corpus.work / "seekable.tar.zst"
    write_seekable(corpus.checkpoint.layer, layer)
    push_oci_image(corpus.store.address, "corpus/seekable", "1", [Layer(layer, ZSTD_LAYER)])
    return corpus.image("seekable")


@_form("gzip-labelled-tar", "gzip", "layer")
def _mislabelled(corpus: Corpus) -> str:
    """Its bytes decide, whatever the manifest calls it."""
    layer = corpus.compressed("gzip", ".gz")
    push_oci_image(corpus.store.address, "corpus/mislabelled", "1", [Layer(layer)])
    return corpus.image("mislabelled")


@_form("oci-archive", "gzip", "layer")
def _oci_archive(corpus: Corpus) -> str:
    return corpus.copied(f"oci-archive:{corpus.work}/oci.tar:1")


@_form("docker-archive", "tar", "layer")
def _docker_archive(corpus: Corpus) -> str:
    """Skopeo unpacks layers on the way into one."""
    return corpus.copied(f"docker-archive:{corpus.work}/docker.tar:corpus:1")


@_form("skopeo-dir", "gzip", "layer")
def _skopeo_dir(corpus: Corpus) -> str:
    return corpus.copied(f"dir:{corpus.work}/skopeo-dir")


@_form("unpacked-dir", "tar", "none")
def _unpacked_dir(corpus: Corpus) -> str:
    """Which lazyfs reads as the tar that it would make."""
    return f"dir:{corpus.images}"


@_form("archive-gzip", "gzip", "none")
def _archive_gzip(corpus: Corpus) -> str:
    return str(corpus.compressed("gzip", ".gz"))


@_form("archive-zstd", "zstd", "none")
def _archive_zstd(corpus: Corpus) -> str:
    return str(corpus.compressed("zstd", ".zst"))


@_form("url-gzip", "gzip", "none")
def _url_gzip(corpus: Corpus) -> str:
    return f"http://{corpus.web.address}/{corpus.compressed('gzip', '.gz').name}"


@_form("url-zstd", "zstd", "none")
def _url_zstd(corpus: Corpus) -> str:
    return f"http://{corpus.web.address}/{corpus.compressed('zstd', '.zst').name}"


@_form("oras-folder", "gzip", "layer")
def _oras_folder(corpus: Corpus) -> str:
    oras_push(corpus.session, corpus.image("oras-folder"), corpus.work, [corpus.images.name])
    return corpus.image("oras-folder")


@_form("oras-files", "file", "layer")
def _oras_files(corpus: Corpus) -> str:
    names = sorted(path.name for path in corpus.images.iterdir())
    oras_push(corpus.session, corpus.image("oras-files"), corpus.images, names)
    return corpus.image("oras-files")


@_form("oras-artifact", "gzip", "layer")
def _oras_artifact(corpus: Corpus) -> str:
    """A layer in an artifact of a type of its own, with an empty config."""
    layer = corpus.compressed("gzip", ".gz")
    options = ["--artifact-type", _CRIU_ARTIFACT]
    options += ["--annotation", "org.opencontainers.image.checkpoint.name=workload"]
    target, files = corpus.image("oras-artifact"), [f"{layer.name}:{GZIP_LAYER}"]
    oras_push(corpus.session, target, layer.parent, files, *options)
    return target


@_form("artifact-with-scratch-config", "tar", "layer")
def _scratch_config(corpus: Corpus) -> str:
    push_oci_image(
        corpus.store.address,
        "corpus/scratch",
        "1",
        [Layer(corpus.checkpoint.layer)],
        config=Config(b"{}", _SCRATCH),
        artifact_type=_CRIU_ARTIFACT,
        annotations={"org.opencontainers.image.checkpoint.id": "workload"},
    )
    return corpus.image("scratch")


@_form("artifact-manifest", "tar", "layer")
def _artifact_manifest(corpus: Corpus) -> str:
    """The manifest type that image-spec 1.1 had for a while: no config, `blobs` for layers.

    Registries of today refuse it; in a layout nobody minds.
    """
    layout = corpus.work / "artifact"
    layer = Layer(corpus.checkpoint.layer)
    image = write_oci_layout(layout, None, [layer], config=Config(b"{}", _EMPTY))
    content = {"mediaType": _ARTIFACT_MANIFEST, "artifactType": _CRIU_ARTIFACT}
    manifest = json.dumps(content | {"blobs": [image.layers[0].as_json()]}).encode()
    write_manifest(layout, "1", manifest, _ARTIFACT_MANIFEST)
    return f"oci:{layout}:1"


@_form("buildah-gzip", "gzip", "layer")
def _buildah(corpus: Corpus) -> str:
    buildah_image(corpus.session, corpus.checkpoint.layer, corpus.image("buildah"), {})
    return corpus.image("buildah")


@_form("umoci-three-layers", "gzip", "layer")
def _umoci(corpus: Corpus) -> str:
    """The second layer adds files beside CRIU's, and the third takes them away."""
    layout = corpus.work / "umoci"
    skopeo_copy(corpus.session, corpus.plain, f"oci:{layout}:1")
    more = "mkdir checkpoint/old; touch checkpoint/old/file checkpoint/stats-dump"
    umoci_change(corpus.session, layout, "1", "2", more)
    umoci_change(corpus.session, layout, "2", "3", "rm -r checkpoint/old checkpoint/stats-dump")
    return f"oci:{layout}:3"
