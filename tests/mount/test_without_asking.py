"""A mount by digest asks for nothing that an earlier one has kept, and believes none of it."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import OCI_INDEX, FaultServer, digest_of
from tests.mount.mounting import Mount, Mounts, error_of, lazyfs, wait_until
from tests.mount.published import (
    KIB,
    LAYERS,
    MIB,
    checkpoint_files,
    manifest_of,
    publish,
    publish_files,
    publish_many,
    tar_layer,
    zstd_chunked,
)

FILES = checkpoint_files(2 * MIB)
KINDS = {"manifest", "blob", "index", "trace"}


def read_everything(mount: Mount) -> None:
    for name, data in FILES.items():
        if name.startswith("checkpoint/"):
            assert (mount / name.removeprefix("checkpoint/")).read_bytes() == data


def warm(mounts: Mounts, reference: str) -> str:
    """Fill the cache; return the reference by digest."""
    done = lazyfs("warm", f"--cache-dir={mounts.cache_dir}", reference)
    assert done.code == 0, done
    found = re.match(r"(\S+@sha256:[0-9a-f]{64}): ", done.out)
    assert found is not None, done
    return found[1]


def documents_in(mounts: Mounts) -> list[Path]:
    return sorted(mounts.cache_dir.glob("documents/*"))


@pytest.mark.parametrize("kind", LAYERS)
def test_what_was_warmed_is_mounted_while_the_registry_is_away(
    server: FaultServer, mounts: Mounts, kind: str
) -> None:
    pinned = warm(mounts, publish_files(server, FILES, kind))
    server.stop()
    mount = mounts.mount(pinned)
    read_everything(mount)
    status = mount.status()
    assert status["requests"] == 0
    assert status["bytes_fetched"] == 0
    assert status["reference"] == pinned
    assert status["blob_proven"] or status["chunks_proven"]
    assert mount.umount().code == 0
    assert lazyfs("inspect", f"--cache-dir={mounts.cache_dir}", pinned).code == 0


@pytest.mark.parametrize("kind", ["tar", "zstd"])
def test_a_mount_leaves_what_the_next_one_would_ask_for(
    server: FaultServer, mounts: Mounts, kind: str
) -> None:
    reference = publish_files(server, FILES, kind)
    mount = mounts.mount(reference)
    assert lazyfs("wait", mount.directory, "--complete").code == 0
    pinned = mount.status()["reference"]
    assert mount.umount().code == 0
    server.seen.clear()
    mount = mounts.mount(pinned)
    read_everything(mount)
    assert server.seen == []


def test_a_tag_is_asked_for_each_time(server: FaultServer, mounts: Mounts) -> None:
    reference = publish_files(server, FILES)
    warm(mounts, reference)
    server.seen.clear()
    mount = mounts.mount(reference)
    wait_until(lambda: len(server.seen) >= 3, "nobody waits for what may have been attached")
    assert mount.umount().code == 0
    base = f"/v2/{server.repository}/"
    asked = [seen.path.removeprefix(base).partition("sha256")[0] for seen in server.seen]
    assert asked == ["manifests/1", "referrers/", "manifests/"], "and what has been attached since"
    other = publish(server, tar_layer({"checkpoint/inventory.img": b"new"}))
    assert other == reference
    mount = mounts.mount(reference)
    assert (mount / "inventory.img").read_bytes() == b"new"
    mount.umount()
    server.stop()
    assert mounts.refuse(reference, "--deadline=1").code == 3


def test_an_index_of_platforms_and_several_layers(server: FaultServer, mounts: Mounts) -> None:
    base, top = tar_layer({"checkpoint/inventory.img": b"old", **FILES}), zstd_chunked(FILES)
    publish_many(server, [base, top], "inner")
    inner = server.resources[f"/v2/{server.repository}/manifests/inner"].body
    entry = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": len(inner)}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX}
    index["manifests"] = [{**entry, "digest": digest_of(inner)}]
    server.add_manifest(index, "many")
    pinned = warm(mounts, f"{server.host}/{server.repository}:many")
    server.stop()
    read_everything(mounts.mount(pinned))


def test_of_an_incomplete_layer_only_missing_bytes_are_asked_for(
    server: FaultServer, mounts: Mounts
) -> None:
    layer = zstd_chunked(checkpoint_files(24 * MIB))
    mount = mounts.mount(publish(server, layer))
    pinned = mount.status()["reference"]
    wait_small_files(server, mount)
    assert mount.umount().code == 0
    server.seen.clear()
    mount = mounts.mount(pinned)
    assert (mount / "inventory.img").read_bytes() == FILES["checkpoint/inventory.img"]
    assert server.seen == []
    pages = checkpoint_files(24 * MIB)["checkpoint/pages-1.img"]
    with open(mount / "pages-1.img", "rb") as file:
        file.seek(12 * MIB)
        assert file.read(4 * KIB) == pages[12 * MIB :][: 4 * KIB]
    asked = {seen.path for seen in server.seen} - {"/v2/"}  # which tells HTTPS from HTTP
    assert asked == {f"/v2/{server.repository}/blobs/{layer.digest}"}


def wait_small_files(server: FaultServer, mount: Mount) -> None:
    """And until it is known that no trace is attached, which is remembered, too."""
    wait_until(lambda: server.count("/manifests/sha256-") > 0, "a trace was looked for")
    for name in FILES:
        if name.startswith("checkpoint/") and "pages" not in name:
            (mount / name.removeprefix("checkpoint/")).read_bytes()


def test_what_is_missing_is_an_error_as_ever_when_the_registry_is_away(
    server: FaultServer, mounts: Mounts
) -> None:
    mount = mounts.mount(publish(server, zstd_chunked(checkpoint_files(24 * MIB))))
    pinned = mount.status()["reference"]
    wait_small_files(server, mount)
    assert mount.umount().code == 0
    server.stop()
    mounts.expect_log("gave up, 1 s without a byte")
    mount = mounts.mount(pinned, "--deadline=1")
    assert error_of(lambda: (mount / "pages-1.img").read_bytes()) == "EIO"
    assert mount.status()["failed_reads"] > 0


def test_another_repository_has_documents_of_its_own(server: FaultServer, mounts: Mounts) -> None:
    """Who may read one repository is not told what only another holds."""
    pinned = warm(mounts, publish_files(server, FILES))
    other = pinned.replace(server.repository, "team/other")
    assert mounts.refuse(other).code == 3


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def other(path: Path) -> None:
    """Put another document in its place, well-formed."""
    mates = [each for each in path.parent.iterdir() if each != path]
    path.write_bytes(mates[0].read_bytes())


@pytest.mark.parametrize("damage", [flip, cut, empty, link, other])
def test_documents_that_changed_are_had_anew(
    server: FaultServer, mounts: Mounts, damage: Callable[[Path], None]
) -> None:
    pinned = warm(mounts, publish_files(server, FILES, "soci"))
    before = {path.name for path in documents_in(mounts)}
    assert {name.partition(".")[2].partition("-")[0] for name in before} == KINDS
    for path in documents_in(mounts):
        damage(path)
    mount = mounts.mount(pinned)
    read_everything(mount)
    assert mount.status()["bytes_fetched"] > 0
    mount.umount()
    server.stop()
    read_everything(mounts.mount(pinned))


def test_documents_are_private(server: FaultServer, mounts: Mounts) -> None:
    warm(mounts, publish_files(server, FILES, "zstd:chunked"))
    for path in (mounts.cache_dir / "documents", *documents_in(mounts)):
        assert path.stat().st_mode & 0o077 == 0


def test_in_memory_there_are_none(server: FaultServer, mounts: Mounts) -> None:
    mount = mounts.mount(publish_files(server, FILES), "--cache=memory")
    read_everything(mount)
    mount.umount()
    assert documents_in(mounts) == []


def test_a_manifest_that_led_to_no_checkpoint_is_not_kept(
    server: FaultServer, mounts: Mounts
) -> None:
    layer = tar_layer({"etc/passwd": b"root"})
    server.add_manifest({**manifest_of(layer), "layers": [{"digest": "x"}]}, "1")
    mounts.refuse(f"{server.host}/{server.repository}:1")
    assert documents_in(mounts) == []


def test_the_caches_commands_know_them(server: FaultServer, mounts: Mounts) -> None:
    pinned = warm(mounts, publish_files(server, FILES, "zstd:chunked"))
    option = f"--cache-dir={mounts.cache_dir}"
    listed = json.loads(lazyfs("cache", "ls", "--json", option).out)
    assert listed["documents"] == 4
    assert 0 < listed["documents_bytes"] < listed["used_bytes"]
    assert lazyfs("cache", "verify", option).code == 0
    flip(documents_in(mounts)[0])
    done = lazyfs("cache", "verify", option)
    assert done.code == 5
    assert "1 damaged document" in done.out
    assert len(documents_in(mounts)) == 3
    old_s = time.time() - 3600
    os.utime(documents_in(mounts)[0], (old_s, old_s))
    done = lazyfs("cache", "prune", "--older-than=30m", option)
    assert "removed 1 document" in done.out
    image = pinned.partition("@")[2]
    named = [path for path in documents_in(mounts) if image.replace(":", "-") in path.name]
    done = lazyfs("cache", "prune", image, option)
    assert done.code == (0 if named else 2)
    assert lazyfs("cache", "prune", "--all", option).code == 0
    assert documents_in(mounts) == []


NEVER = {"rich", "google", "prometheus_client", "flatbuffers", "hypothesis", "pytest"}
"""What no mount needs before its directory answers."""
HTTP = {"requests", "urllib3", "charset_normalizer", "certifi"}


def imported_by(mount: Mount) -> set[str]:
    """Names of the packages that were imported before the directory answered."""
    lines = mount.said.err.splitlines()
    names = [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]
    assert "lazyfs.fuse" in names
    return {name.partition(".")[0] for name in names}


def test_a_mount_imports_only_what_it_needs(server: FaultServer, mounts: Mounts) -> None:
    noted = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    mount = mounts.mount(publish_files(server, FILES), env=noted)
    read_everything(mount)
    pinned = mount.status()["reference"]
    assert imported_by(mount).isdisjoint(NEVER)
    assert imported_by(mount) > HTTP
    assert lazyfs("wait", mount.directory, "--complete").code == 0
    mount.umount()
    mount = mounts.mount(pinned, env=noted)
    assert imported_by(mount).isdisjoint(NEVER | HTTP)
