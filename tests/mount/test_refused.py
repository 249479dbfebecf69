"""What cannot be mounted: an exit code, one message that says why and what to do, nothing else."""

import gzip
import json
import os
import shlex
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lazyfs import mountpoint
from lazyfs.checkpoint import manifest as manifests
from tests.faults import OCI_INDEX, OCI_MANIFEST, FaultServer, digest_of, status
from tests.images import Layer, tar_bytes, tar_layer, zstd_chunked
from tests.mount.mounting import Done, Mounts, command, lazyfs, run
from tests.mount.published import (
    checkpoint_files,
    manifest_of,
    publish,
    publish_files,
    write_layout,
)

SECRET = "s3cr3t"


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert text.startswith("lazyfs: ")
    return text


# -- the reference and its source ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("", "empty"),
        ("a b", "not a repository's name"),
        ("oci:", "names no directory"),
        ("localhost:99999/x", "not a host"),
        ("registry.example/x@sha256:1", "not a digest"),
        ("http://x", "names no file"),
    ],
)
def test_a_malformed_reference(mounts: Mounts, reference: str, said: str) -> None:
    done = mounts.refuse(reference)
    assert done.code == 2
    assert said in done.err
    assert "A reference is one of\n" in done.err


def test_nobody_listens(mounts: Mounts) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        done = mounts.refuse(f"{host}/team/web:1", "--deadline=0.5")
    assert done.code == 3
    assert f"{host}/team/web:1: gave up" in one_line(done.err)
    assert "connection refused" in done.err


def test_an_unknown_host(mounts: Mounts) -> None:
    done = mounts.refuse("registry.invalid/team/web:1", "--deadline=0.5")
    assert done.code == 3
    assert "registry.invalid: its address is not known" in one_line(done.err)


@pytest.mark.parametrize(
    ("code", "headers", "said"),
    [
        (
            401,
            {"WWW-Authenticate": 'Basic realm="x"'},
            "wants credentials (401 Unauthorized); log in",
        ),
        (403, {}, "does not allow it (403 Forbidden); log in"),
        (404, {}, "has no such thing, or does not show it to you (404 Not Found); check the name"),
        (500, {}, "500 Internal Server Error"),
        (429, {"Retry-After": "100"}, "429 Too Many Requests"),
    ],
)
def test_the_registry_refuses(
    server: FaultServer, mounts: Mounts, code: int, headers: dict[str, str], said: str
) -> None:
    server.always("/manifests/", status(code, headers))
    name = f"{server.host}/team/checkpoint:1"
    done = mounts.refuse(name, "--deadline=0.5")
    assert done.code == 3
    assert f"lazyfs: {name}: " in one_line(done.err)
    assert said in done.err


@pytest.mark.parametrize("repository", ["team/checkpoint:nope", "team/other:1"])
def test_no_such_name(server: FaultServer, mounts: Mounts, repository: str) -> None:
    publish_files(server, checkpoint_files())
    done = mounts.refuse(f"{server.host}/{repository}")
    assert done.code == 3
    assert f"{server.host}/{repository}: {server.host} has no such thing" in one_line(done.err)


@pytest.mark.parametrize("path", ["nope.tar", "junk.tar", "cut.tar", "empty.tar"])
def test_an_archive_behind_a_signed_url(server: FaultServer, mounts: Mounts, path: str) -> None:
    server.add_file("/junk.tar", b"this is no archive" * 1000)
    server.add_file("/cut.tar", tar_bytes(checkpoint_files())[:700])
    server.add_file("/empty.tar", b"")
    user = server.url.replace("http://", f"http://me:{SECRET}@")
    for url in (f"{server.url}/{path}?Signature={SECRET}", f"{user}/{path}"):
        done = mounts.refuse(url)
        assert done.code in (2, 3, 4)
        assert path in done.err or done.code == 2
        assert SECRET not in done.err
        assert SECRET not in mounts.log()


def test_a_layout_or_archive_that_is_not_there(mounts: Mounts, tmp_path: Path) -> None:
    for reference in (f"oci:{tmp_path}/none", f"{tmp_path}/none.tar"):
        done = mounts.refuse(reference)
        assert done.code == 3
        assert f"{tmp_path}/none" in one_line(done.err)
        assert "No such file or directory" in done.err
    done = mounts.refuse(f"oci:{tmp_path}")
    assert done.code == 3
    assert f"{tmp_path} is not an OCI layout" in one_line(done.err)


# -- what the image is --------------------------------------------------------------------------


def add_image(
    server: FaultServer,
    layers: Sequence[Layer],
    config: dict[str, Any] | None = None,
    **more: Any,
) -> str:
    written = json.dumps(config or {}).encode()
    manifest = {**manifest_of(layers[0]), **more}
    manifest["config"] = {
        "mediaType": "application/vnd.oci.image.config.v1+json",
        "digest": server.add_blob(written),
        "size": len(written),
    }
    manifest["layers"] = [manifest_of(layer)["layers"][0] for layer in layers]
    for layer in layers:
        server.add_blob(layer.blob)
    server.add_manifest(manifest, "it")
    return f"{server.host}/{server.repository}:it"


ORDINARY = {"os": "linux", "architecture": "amd64", "config": {"Entrypoint": ["nginx", "-g"]}}
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


def test_an_ordinary_image(server: FaultServer, mounts: Mounts) -> None:
    gzipped = Layer(gzip.compress(tar_bytes({"etc/passwd": b"x"})), {}, GZIP)
    plain = tar_layer({"etc/passwd": b"x"})
    for layers in ([gzipped, gzipped], [gzipped], [plain]):
        done = mounts.refuse(add_image(server, layers, ORDINARY, annotations={}))
        assert done.code == 4
        assert "checkpoint" in one_line(done.err)
        count = "2 layers" if len(layers) == 2 else "1 layer"
        said = f"an ordinary container image (linux/amd64, {count}, entrypoint nginx -g)"
        assert said in done.err


def test_a_helm_chart(server: FaultServer, mounts: Mounts) -> None:
    blob = {"digest": server.add_blob(b"{}"), "size": 2}
    config = {"mediaType": "application/vnd.cncf.helm.config.v1+json", **blob}
    layer = {"mediaType": "application/vnd.cncf.helm.chart.content.v1.tar+gzip", **blob}
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [layer]}
    server.add_manifest(manifest, "chart")
    done = mounts.refuse(f"{server.host}/{server.repository}:chart")
    assert done.code == 4
    assert "does not look like a checkpoint: it is a Helm chart" in one_line(done.err)


def test_an_index_without_our_platform(server: FaultServer, mounts: Mounts) -> None:
    entry = {"mediaType": OCI_MANIFEST, "digest": digest_of(b""), "size": 0}
    other = {**entry, "platform": {"os": "linux", "architecture": "s390x"}}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [other]}
    server.add_manifest(index, "many", OCI_INDEX)
    done = mounts.refuse(f"{server.host}/{server.repository}:many")
    assert done.code == 4
    here = manifests.this_platform()
    assert f"has no image for {here}; it has linux/s390x" in one_line(done.err)


@pytest.mark.parametrize("media_type", [GZIP, "application/x-thing"])
def test_a_layer_that_is_nothing_that_is_known(
    server: FaultServer, mounts: Mounts, media_type: str
) -> None:
    layer = Layer(b"BZh91AY&SY" + bytes(5000), {}, media_type)
    done = mounts.refuse(publish(server, layer))
    assert done.code == 4
    said = one_line(done.err)
    assert f"of media type '{media_type}' cannot be read: its bytes look like bzip2" in said
    assert "What works: tar, or tar compressed by gzip or zstd" in said


def test_an_encrypted_layer(server: FaultServer, mounts: Mounts) -> None:
    layer = replace(
        tar_layer(checkpoint_files()),
        media_type="application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
        annotations={"org.opencontainers.image.enc.keys.jwe": "e30="},
    )
    done = mounts.refuse(publish(server, layer))
    assert done.code == 4
    assert "encrypted for jwe" in one_line(done.err)
    assert "decrypt" in done.err


# -- the directory ------------------------------------------------------------------------------


@pytest.fixture
def reference(tmp_path: Path) -> str:
    return write_layout(tmp_path / "layout", zstd_chunked(checkpoint_files()))


def test_a_directory_that_cannot_be_mounted_on(
    mounts: Mounts, tmp_path: Path, reference: str
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    file = full / "file"
    file.write_text("")
    for at, said in {
        tmp_path / "none": "does not exist; create it first",
        file: "is not a directory",
        file / "below": "is not a directory",
        full: "is not empty; mount on an empty directory",
        Path("/proc"): "is a mount already (proc of proc); mount on an empty directory",
    }.items():
        done = mounts.refuse(reference, at=at)
        assert done.code == 2
        assert one_line(done.err) == f"lazyfs: {at} {said}\n"
    assert os.listdir(full) == ["file"]


def test_a_directory_that_is_mounted_already(mounts: Mounts, reference: str) -> None:
    mount = mounts.mount(reference)
    done = mounts.refuse(reference)
    assert done.code == 2
    assert f"{mount.directory} is a mount already (fuse.lazyfs of oci:" in one_line(done.err)
    assert f"unmount it first: lazyfs umount {mount.directory}" in done.err
    assert (mount / "inventory.img").exists()


@pytest.mark.parametrize("name", ["a space", "日本", "new\nline", "\udcff", "a,b=c\\", "x" * 250])
def test_a_directory_of_any_name(mounts: Mounts, tmp_path: Path, reference: str, name: str) -> None:
    mount = mounts.mount(reference, at=tmp_path / name)
    assert (mount / "inventory.img").exists()
    assert mount.said.out.count("\n") == 1
    assert mount.umount().code == 0
    assert not mount.is_mounted


def test_a_relative_directory_and_one_behind_a_link(
    mounts: Mounts, tmp_path: Path, reference: str
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for given in (Path("real"), Path("link"), Path("./real/"), Path("link/../real")):
        done = lazyfs("mount", *mounts.options(), reference, given, cwd=tmp_path)
        assert done.code == 0, done
        assert done.out.endswith(f" on {tmp_path}/real\n")
        assert (tmp_path / "real" / "inventory.img").exists()
        assert lazyfs("umount", given, cwd=tmp_path).code == 0
        assert mountpoint.mounted_at(tmp_path / "real") is None


def test_an_unmount_of_what_is_no_lazyfs_mount(mounts: Mounts, tmp_path: Path) -> None:
    for directory, said in {
        tmp_path: "is not a mount point",
        tmp_path / "none": "does not exist",
        Path("/proc"): "is a mount of proc",
    }.items():
        done = lazyfs("umount", directory)
        assert done.code == 2
        assert done.err == f"lazyfs: {directory} is not a lazyfs mount: it {said}\n"


# -- the machine --------------------------------------------------------------------------------


def in_namespace(mounts: Mounts, before: str, reference: str, *options: str) -> Done:
    """Mount, list and unmount in a mount namespace of its own, in which `before` was done."""
    directory = mounts.home / "mnt"
    directory.mkdir(exist_ok=True)
    words = command("mount", *mounts.options(*options), reference, directory)
    umount = shlex.join(command("umount", directory))
    script = f'set -e; {before}; "$@" && ls {directory} && {umount}'
    return run(["unshare", "-m", "sh", "-c", script, "sh", *words])


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("", "there is no /dev/fuse: load the module (modprobe fuse), or give the container"),
        ("mkdir /dev/fuse", "/dev/fuse cannot be opened: Is a directory"),
        ("touch /dev/fuse", "cannot mount on "),
    ],
)
def test_no_fuse(mounts: Mounts, reference: str, device: str, said: str) -> None:
    hide = "mount -t tmpfs tmpfs /dev; mknod -m 666 /dev/null c 1 3"
    done = in_namespace(mounts, f"{hide}; {device or 'true'}", reference)
    assert done.code == 1
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_cache_directory_that_cannot_be_written(
    mounts: Mounts, tmp_path: Path, reference: str
) -> None:
    """It goes on without one."""
    (tmp_path / "file").write_text("")
    mount = mounts.mount(reference, f"--cache-dir={tmp_path}/file/below")
    assert "what is read is kept in memory" in one_line(mount.said.err)
    for name, data in checkpoint_files().items():
        if name.startswith("checkpoint/"):
            assert (mount / name.removeprefix("checkpoint/")).read_bytes() == data
    assert mount.umount().code == 0
    (tmp_path / "ro").mkdir()
    readonly = f"mount --bind {tmp_path}/ro {tmp_path}/ro; mount -o remount,ro,bind {tmp_path}/ro"
    done = in_namespace(mounts, readonly, reference, f"--cache-dir={tmp_path}/ro")
    assert (done.code, "inventory.img" in done.out) == (0, True), done
    assert "Read-only file system" in done.err


def test_a_log_file_that_cannot_be_written(mounts: Mounts, reference: str) -> None:
    done = mounts.refuse(reference, "--log-file=/none/at/all")
    assert done.code == 2
    assert "the log file /none/at/all cannot be written: No such file" in one_line(done.err)


def test_options_that_cannot_be(mounts: Mounts, reference: str) -> None:
    for option in ("--deadline=0", "--deadline=x", "--view=all", "--verify=no", "--nope"):
        done = mounts.refuse(reference, option)
        assert done.code == 2
        assert "Try 'lazyfs mount --help' for help" in done.err
