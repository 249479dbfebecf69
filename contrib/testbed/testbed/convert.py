"""Images made, and remade, by the tools that people have: skopeo, buildah, oras, umoci.

All run in a `Session` that sees the folders they are told of. Registries are spoken to over plain
HTTP.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from .process import run
from .session import Session

_BLOB_CACHE = "/var/lib/containers/cache"
CRIO_NAME = "io.kubernetes.cri-o.annotations.checkpoint.name"


def skopeo_copy(
    session: Session, source: str, target: str, *options: str, timeout_s: float = 600
) -> None:
    """Copy an image, `transport:name` to `transport:name`, as `skopeo copy` does by itself.

    What an earlier copy left in other compressions is forgotten first: skopeo would use it.
    """
    session.run(["rm", "-rf", _BLOB_CACHE])
    copy = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"]
    session.run([*copy, *options, source, target], timeout_s=timeout_s)


def buildah_image(
    session: Session, archive: Path, target: str, annotations: Mapping[str, str], *options: str
) -> None:
    """Make an image of a checkpoint archive, as Kubernetes' documentation has it, and push it.

    Args:
        session: sees the archive.
        archive: a tar, compressed or not; buildah unpacks it.
        target: `host:port/repository:tag`.
        annotations: the image's.
        options: of `buildah push`, which compresses with gzip if it is not told otherwise.
    """
    session.run(["rm", "-rf", _BLOB_CACHE])
    container = session.run(["buildah", "from", "scratch"]).strip()
    session.run(["buildah", "add", container, archive.absolute(), "/"], timeout_s=600)
    for key, value in annotations.items():
        session.run(["buildah", "config", f"--annotation={key}={value}", container])
    session.run(["buildah", "commit", "--quiet", container, "built"], timeout_s=600)
    push = ["buildah", "push", "--quiet", "--tls-verify=false", *options]
    session.run([*push, "built", f"docker://{target}"], timeout_s=600)
    session.run(["buildah", "rm", container])


def checkpointctl_annotations(tree: Path) -> dict[str, str]:
    """Return the annotations that `checkpointctl build` puts on an image of this archive.

    It runs buildah as `buildah_image` does. Debian 13's checkpointctl is older than that command;
    this is what its source says (checkpointctl, internal/oci_image_build.go and container.go).

    Args:
        tree: the archive of Podman or CRI-O, unpacked.
    """
    config = json.loads((tree / "config.dump").read_text())
    said: dict[str, str] = json.loads((tree / "spec.dump").read_text()).get("annotations") or {}
    name, pod, namespace = config["name"], "", ""
    engine = "Podman"
    if said.get("io.container.manager") == "cri-o":
        engine, name = "CRI-O", json.loads(said["io.kubernetes.cri-o.Metadata"])["name"]
        pod, namespace = said["io.kubernetes.pod.name"], said["io.kubernetes.pod.namespace"]
    values = {
        "engine.name": engine,
        "container.name": name,
        "pod.name": pod,
        "pod.namespace": namespace,
        "rootfsImageUserRequested": config.get("rootfsImage", ""),
        "rootfsImageName": config.get("rootfsImageName", ""),
        "rootfsImageID": config.get("rootfsImageRef", ""),
        "runtime.name": config.get("runtime", ""),
    }
    return {f"org.criu.checkpoint.{key}": value for key, value in values.items()}


def write_crio_archive(podman_tree: Path, tree: Path, archive: Path) -> None:
    """Write an archive as CRI-O's, of what Podman wrote: there is no kubelet here.

    Both are of the same libraries. CRI-O's has no artifacts/, network.status and ctr.log, has a
    bind.mounts, and says in spec.dump who manages the container and which pod it is in (CRI-O,
    internal/lib/checkpoint.go).

    Args:
        podman_tree: `PodmanCheckpoint.tree`.
        tree: what is in the archive, made by this.
        archive: an uncompressed tar.
    """
    left = shutil.ignore_patterns("artifacts", "network.status", "ctr.log")
    shutil.copytree(podman_tree, tree, ignore=left)
    spec = json.loads((tree / "spec.dump").read_text())
    spec["annotations"] = {
        "io.container.manager": "cri-o",
        "io.kubernetes.cri-o.Metadata": json.dumps({"name": "workload"}),
        "io.kubernetes.container.name": "workload",
        "io.kubernetes.pod.name": "pod",
        "io.kubernetes.pod.namespace": "default",
    }
    (tree / "spec.dump").write_text(json.dumps(spec))
    (tree / "bind.mounts").write_text("[]")
    run(["tar", "-C", tree, "-cf", archive, *sorted(each.name for each in tree.iterdir())])


def oras_push(
    session: Session, target: str, folder: Path, files: Sequence[str], *options: str
) -> None:
    """Push files of a folder, or folders of it, as an artifact.

    Args:
        session: sees the folder.
        target: `host:port/repository:tag`.
        folder: the working directory: names in the artifact are relative to it.
        files: `name` or `name:media type`.
        options: of `oras push`.
    """
    script = 'cd "$1" && shift && exec oras push --plain-http --no-tty "$@"'
    words = ["sh", "-c", script, "oras", str(folder.absolute()), *options, target, *files]
    session.run(words, timeout_s=600)


def umoci_change(session: Session, layout: Path, tag: str, new_tag: str, script: str) -> None:
    """Unpack an image of an OCI layout, change its files, add what changed as another layer.

    Args:
        session: sees the layout.
        layout: gets the image `new_tag` besides; umoci compresses the new layer with gzip.
        tag: of the image in it.
        new_tag: of the image to be.
        script: for sh, in the image's root directory.
    """
    bundle = "/tmp/umoci-bundle"
    session.run(["umoci", "unpack", "--image", f"{layout.absolute()}:{tag}", bundle])
    session.run(["sh", "-ec", f"cd {bundle}/rootfs\n{script}"])
    session.run(["umoci", "repack", "--image", f"{layout.absolute()}:{new_tag}", bundle])
    session.run(["rm", "-rf", bundle])
