"""SOCI: indexes of gzip layers, and the snapshotter that mounts images lazily by them.

Debian 13 has SOCI 0.4.1, which makes and reads indexes of version 1. Those of version 2 differ
in their envelope only, so they are made here of the same zTOCs (soci-snapshotter's soci_index.go
and soci_convert.go, as of 0.11).
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .containerd import Containerd
from .errors import TestbedError
from .images import (
    IMAGE_INDEX,
    IMAGE_MANIFEST,
    Descriptor,
    get_manifest,
    push_manifest,
)
from .process import last_lines, stop, wait_until
from .roots import Testbed
from .session import Session
from .web import WebServer

INDEX_V1 = "application/vnd.amazon.soci.index.v1+json"
INDEX_V2 = "application/vnd.amazon.soci.index.v2+json"
_INDEX_DIGEST = "com.amazon.soci.index-digest"
_IMAGE_DIGEST = "com.amazon.soci.image-manifest-digest"
_SOCKET = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock"
_CONFIG = "/etc/soci-snapshotter-grpc/config.toml"
_TRUSTED = "/etc/ssl/certs/ca-certificates.crt"
_STORAGE = "/var/lib/containers/soci"
_IMAGES = "/run/soci-images"
_PLUGIN = f"""
[proxy_plugins]
  [proxy_plugins.soci]
    type = "snapshot"
    address = "{_SOCKET}"
"""


def soci_index(session: Session, containerd: Containerd, reference: str) -> str:
    """Have `soci create` index an image in a registry, and push that; return the index's digest.

    The registry has no referrers API, so `soci push` lists the index under the fallback tag,
    `sha256-<hex of the image's manifest>` (OCI distribution-spec, "Unavailable Referrers API").
    Layers of less than 10 MiB are not indexed.

    Args:
        session: which `containerd` runs in.
        containerd: gets the image.
        reference: `host:port/repository:tag`, the host being this one: soci speaks plain HTTP
            with no other.
    """
    containerd.ctr("image", "pull", "--plain-http", reference)
    session.run(["soci", "create", reference])
    said = session.run(["soci", "push", "--plain-http", reference])
    mark = "pushing soci index with digest: "
    for line in said.splitlines():
        if line.startswith(mark):
            return line.removeprefix(mark)
    raise TestbedError(f"soci push says nothing of an index:\n{said}")


def push_soci_enabled(registry: str, repository: str, tag: str, source: str, index: str) -> str:
    """Push what `soci convert` makes of an image with an index; return the image's digest.

    Pushed as `tag` is an OCI index of two: the image's manifest, with the annotation that names
    its SOCI index, and that, of version 2.

    Args:
        registry: `host:port`.
        repository: where the image and its index of version 1 are.
        tag: of the new image.
        source: tag or digest of the image as it was.
        index: digest of its index of version 1.
    """
    _, ztocs = get_manifest(registry, repository, index)
    ztocs.pop("subject")
    ztocs["config"] |= {"mediaType": INDEX_V2}
    second = _push(registry, repository, ztocs)
    _, image = get_manifest(registry, repository, source)
    image["annotations"] = image.get("annotations", {}) | {_INDEX_DIGEST: second.digest}
    enabled = _push(registry, repository, image)
    platform = {"platform": {"os": "linux", "architecture": "amd64"}}
    listed = [
        enabled.as_json() | platform | {"annotations": image["annotations"]},
        second.as_json()
        | platform
        | {"artifactType": INDEX_V2, "annotations": {_IMAGE_DIGEST: enabled.digest}},
    ]
    both = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": listed}
    push_manifest(registry, repository, tag, json.dumps(both).encode(), IMAGE_INDEX)
    return enabled.digest


def _push(registry: str, repository: str, manifest: dict[str, Any]) -> Descriptor:
    content = json.dumps(manifest).encode()
    return push_manifest(registry, repository, None, content, IMAGE_MANIFEST)


@dataclass(frozen=True)
class SociMount:
    """An image mounted by SOCI's snapshotter."""

    directory: Path
    """The image's root, as processes of the host reach it."""
    inside: Path
    """The same, as processes of the session reach it."""
    session: Session
    seconds: float
    """What it took to pull and mount it, the programs running already."""


@contextmanager
def soci_mounted(
    testbed: Testbed, work_dir: Path, registry: str, image: str, index: str
) -> Iterator[SociMount]:
    """Mount an image of a registry by soci-snapshotter, lazily, for the length of a block.

    containerd and the snapshotter run in a session of their own, with their storage in memory, as
    they are configured by default. Layers come straight from the registry, over plain HTTP; but
    the snapshotter asks for indexes over HTTPS only, so these come by way of an nginx here.

    Args:
        testbed: where the programs are.
        work_dir: for logs; seen in the session too.
        registry: `host:port` of the registry, near or behind a `Wan`.
        image: `repository:tag`.
        index: digest of its SOCI index of version 1.

    Raises:
        TestbedError: the snapshotter did not mount it, or fell back to unpacking a whole layer.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir / "soci-snapshotter.log"
    with (
        WebServer.before(testbed, work_dir, registry) as near,
        Session(testbed, [work_dir]) as session,
        _snapshotter(session, log, near, registry),
        Containerd(session, work_dir / "containerd.log", _PLUGIN) as containerd,
    ):
        reference = f"{near.address}/{image}"
        pull = ["soci", "image", "rpull", "--soci-index-digest", index, reference]
        started_s = time.monotonic()
        session.run(pull, timeout_s=600)
        session.path(_IMAGES).mkdir()
        containerd.ctr("image", "mount", "--snapshotter", "soci", reference, _IMAGES)
        seconds = time.monotonic() - started_s
        try:
            mounts = Path(f"/proc/{session.pid}/mounts").read_text()
            if "fuse.rawBridge" not in mounts:
                raise TestbedError(f"nothing is mounted lazily:\n{last_lines(log)}\n{mounts}")
            yield SociMount(session.path(_IMAGES), Path(_IMAGES), session, seconds)
        finally:
            containerd.ctr("image", "unmount", _IMAGES)


@contextmanager
def _snapshotter(session: Session, log: Path, near: WebServer, registry: str) -> Iterator[None]:
    """Run soci-snapshotter-grpc; whatever it has mounted goes with the session."""
    session.run(["mkdir", "-p", _STORAGE, str(Path(_SOCKET).parent), str(Path(_CONFIG).parent)])
    mirror = f'[[resolver.host."{near.address}".mirrors]]\nhost = "{registry}"\ninsecure = true\n'
    session.path(_CONFIG).write_text(f'[resolver]\n[resolver.host."{near.address}"]\n{mirror}')
    with session.path(_TRUSTED).open("a") as trusted:
        trusted.write(near.certificate.read_text())
    with log.open("wb") as out:
        process = subprocess.Popen(
            session.command(["soci-snapshotter-grpc", "-root", _STORAGE]),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )

    def listens() -> bool:
        if process.poll() is not None:
            raise TestbedError(f"soci-snapshotter-grpc ended:\n{last_lines(log)}")
        return session.path(_SOCKET).exists()

    try:
        wait_until(listens, f"soci-snapshotter-grpc; its log: {log}", 30)
        yield
    finally:
        stop(process)
