#!/usr/bin/env python3
"""Make contrib/demo/sample: a small checkpoint image, as an OCI layout, by real Podman and CRIU.

    sudo contrib/demo/make_sample.py          needs the testbed (contrib/testbed/build.sh) and gcc

sample.c is run in a container by Podman, checkpointed with --create-image, and pushed to a
layout. Podman compresses a layout's layer whatever it is told, so the layer is unpacked here and
the manifest written anew around it: one uncompressed layer, every annotation and every name in
it as Podman wrote them. The image's size is some 300 KB.

What names the machine that it was made on is taken out: the kernel's local version in the
annotations, and in the pages the strings of the vDSO that hold it, whose bytes become "-". So
the sample is to be read and looked at, not to be restored.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from gzip import decompress
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTBED = Path(os.environ.get("LAZYFS_TESTBED", "/var/cache/lazyfs-testbed"))
KERNEL = os.uname().release

INSIDE = """
set -eu
mount --bind "$ROOT" "$ROOT"
cd "$ROOT"
mount -t proc proc proc
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount --rbind /sys sys
mount --rbind /dev dev
mkdir tmp/made
mount --bind "$WORK" tmp/made
pivot_root . mnt
umount -l /mnt
cd /tmp/made
export PATH=/usr/sbin:/usr/bin:/sbin:/bin PODMAN_IGNORE_CGROUPSV1_WARNING=1
podman() {
    command podman --runtime runc --cgroup-manager cgroupfs --storage-driver overlay \
        --root /tmp/storage "$@"
}
podman import base.tar localhost/sample:1
podman run -d --name sample --network none --security-opt seccomp=unconfined --pids-limit=0 \
    localhost/sample:1 /bin/sample
sleep 1
podman container checkpoint --create-image checkpoint:1 sample
podman push --compression-format gzip checkpoint:1 oci:/tmp/made/layout:1
"""


def main() -> None:
    """Make the sample, in place of the one that is there."""
    if os.geteuid() != 0:
        sys.exit("make_sample: needs root, for Podman and CRIU")
    if not (TESTBED / "root" / "usr/bin/podman").exists():
        sys.exit(f"make_sample: no testbed in {TESTBED}: contrib/testbed/build.sh makes one")
    with tempfile.TemporaryDirectory() as work:
        layout = checkpoint(Path(work))
        write_sample(layout, HERE / "sample")


def checkpoint(work: Path) -> Path:
    """Have Podman checkpoint a container; return the OCI layout that it pushed."""
    binary = work / "sample"
    subprocess.run(
        ["gcc", "-O2", "-static", "-pthread", "-o", binary, HERE / "sample.c"], check=True
    )
    with tarfile.open(work / "base.tar", "w") as base:
        base.add(binary, "bin/sample")
    environment = {**os.environ, "ROOT": str(TESTBED / "root"), "WORK": str(work)}
    enter = ["unshare", "--mount", "--pid", "--fork", "--propagation", "private"]
    subprocess.run([*enter, "bash", "-c", INSIDE], check=True, env=environment)
    return work / "layout"


def write_sample(layout: Path, sample: Path) -> None:
    """Write `layout`'s image to `sample`, its layer uncompressed and its machine unnamed."""

    def blob(digest: str) -> bytes:
        return (layout / "blobs" / digest.replace(":", "/")).read_bytes()

    manifest = json.loads(
        blob(json.loads((layout / "index.json").read_text())["manifests"][0]["digest"])
    )
    layer = unnamed(decompress(blob(manifest["layers"][0]["digest"])))
    config = json.loads(blob(manifest["config"]["digest"]))
    config["rootfs"]["diff_ids"] = [digest_of(layer)]

    shutil.rmtree(sample, ignore_errors=True)
    (sample / "blobs/sha256").mkdir(parents=True)

    def store(data: bytes, media_type: str) -> dict[str, object]:
        (sample / "blobs" / digest_of(data).replace(":", "/")).write_bytes(data)
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}

    manifest["config"] = store(as_json(config), manifest["config"]["mediaType"])
    manifest["layers"] = [store(layer, "application/vnd.oci.image.layer.v1.tar")]
    annotations = manifest["annotations"]
    for key, value in annotations.items():
        annotations[key] = value.replace(KERNEL, KERNEL.partition("-")[0])
    described = store(as_json(manifest), manifest["mediaType"])
    described["annotations"] = {"org.opencontainers.image.ref.name": "1"}
    (sample / "oci-layout").write_bytes(as_json({"imageLayoutVersion": "1.0.0"}))
    (sample / "index.json").write_bytes(as_json({"schemaVersion": 2, "manifests": [described]}))


def unnamed(layer: bytes) -> bytes:
    """Blank the strings in which the kernel's local version appears."""
    local = re.escape(KERNEL.partition("-")[1] + KERNEL.partition("-")[2]).encode()
    if not local:
        return layer
    return re.sub(rb"[!-~]*%b[!-~]*" % local, lambda found: b"-" * len(found[0]), layer)


def digest_of(data: bytes) -> str:
    """Return the digest of a blob."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def as_json(value: object) -> bytes:
    """Write JSON for people to read as well."""
    return json.dumps(value, indent=2).encode() + b"\n"


if __name__ == "__main__":
    main()
