"""Writing OCI layouts: whole files, an index that keeps what others wrote, archives."""

import fcntl
import io
import json
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, LazyfsError, MalformedError
from lazyfs.transport.files import LayoutSource
from lazyfs.transport.layout_writer import LayoutTarget, archive_target
from tests.faults import OCI_MANIFEST

BLOB = b"some bytes" * 1000
DIGEST = Digest.of(BLOB)
MANIFEST = b'{"schemaVersion": 2, "layers": []}'


def put(target: LayoutTarget, data: bytes = BLOB, digest: Digest = DIGEST) -> None:
    target.put_blob(digest, len(data), lambda: io.BytesIO(data))


def index_of(directory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((directory / "index.json").read_text())["manifests"]
    return found


def tags(directory: Path) -> list[str | None]:
    name = "org.opencontainers.image.ref.name"
    return [each.get("annotations", {}).get(name) for each in index_of(directory)]


def not_needed() -> BinaryIO:
    raise AssertionError("nothing was to be written")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    target = LayoutTarget(tmp_path / "a/layout")
    put(target)
    digest = target.put_manifest(MANIFEST, OCI_MANIFEST, "v1")
    target.close()
    source = LayoutSource(tmp_path / "a/layout", counters=Counters())
    assert source.manifest("v1").data == source.manifest(str(digest)).data == MANIFEST
    assert source.read_blob(DIGEST, len(BLOB)) == BLOB
    source.close()
    target = LayoutTarget(tmp_path / "a/layout")
    target.put_blob(DIGEST, len(BLOB), not_needed)


def test_the_index_keeps_the_others(tmp_path: Path) -> None:
    target = LayoutTarget(tmp_path)
    for tag in ("v1", "v2", "", "v1", ""):
        target.put_manifest(MANIFEST, OCI_MANIFEST, tag)
    assert tags(tmp_path) == ["v2", "v1", None]
    target.put_manifest(MANIFEST + b" ", OCI_MANIFEST, "v2")
    target.put_manifest(MANIFEST + b" ", OCI_MANIFEST, "")
    target.put_manifest(MANIFEST + b"  ", OCI_MANIFEST, None)
    assert tags(tmp_path) == ["v1", None, "v2", None]
    assert index_of(tmp_path)[2]["digest"] == str(Digest.of(MANIFEST + b" "))


@pytest.mark.parametrize("damage", [b"", BLOB[:-1], BLOB[:-1] + b"?"])
def test_a_damaged_blob_is_written_anew(tmp_path: Path, damage: bytes) -> None:
    target = LayoutTarget(tmp_path)
    put(target)
    (tmp_path / "blobs/sha256" / DIGEST.hex).write_bytes(damage)
    put(target)
    assert (tmp_path / "blobs/sha256" / DIGEST.hex).read_bytes() == BLOB


def test_bytes_that_are_not_the_digests_are_not_written(tmp_path: Path) -> None:
    target = LayoutTarget(tmp_path)
    with pytest.raises(IntegrityError):
        put(target, b"other")
    assert list((tmp_path / "blobs/sha256").iterdir()) == []


def test_a_directory_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(LazyfsError, match="something else in it"):
        LayoutTarget(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b'{"manifests": 1}', b'{"manifests": [1]}', b"[" * 99_999, b" " * (5 << 20)],
)
def test_an_index_that_is_none_is_left_alone(tmp_path: Path, index: bytes) -> None:
    target = LayoutTarget(tmp_path)
    (tmp_path / "index.json").write_bytes(index)
    with pytest.raises(MalformedError):
        target.put_manifest(MANIFEST, OCI_MANIFEST, "v1")
    assert (tmp_path / "index.json").read_bytes() == index


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LazyfsError, match="cannot be written"):
        LayoutTarget(tmp_path / "file/layout")
    with (
        pytest.raises(LazyfsError, match=r"oci-archive:.* cannot be written"),
        archive_target(tmp_path / "nowhere/archive.tar"),
    ):
        pass


def test_who_may_read_it_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        put(LayoutTarget(tmp_path))
    finally:
        os.umask(before)
    assert (tmp_path / "blobs/sha256" / DIGEST.hex).stat().st_mode & 0o777 == 0o640


def test_of_several_writers_none_loses_an_entry(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from lazyfs.transport.layout_writer import LayoutTarget\n"
        "sys.stdin.read(1)\n"
        "target = LayoutTarget(Path(sys.argv[1]))\n"
        "for at in range(10): target.put_manifest(b'{}', 'x/y', sys.argv[2] + str(at))\n"
    )
    directory = tmp_path / "layout"
    writers = [
        subprocess.Popen([sys.executable, "-c", code, directory, name], stdin=subprocess.PIPE)
        for name in "abcd"
    ]
    for writer in writers:  # all of them wait for this
        assert writer.stdin is not None
        writer.stdin.write(b"x")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0] * 4
    assert sorted(filter(None, tags(directory))) == [f"{x}{at}" for x in "abcd" for at in range(10)]


def test_whoever_is_making_it_is_waited_for(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    layout.mkdir()
    descriptor = os.open(layout, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    (layout / "blobs").mkdir()
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(LayoutTarget, layout)
        with pytest.raises(TimeoutError):
            begun.result(0.3)
        (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        os.close(descriptor)
        put(begun.result(30))


def test_an_archive_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "image.tar"
    path.write_text("an older one")
    with pytest.raises(RuntimeError), archive_target(path) as target:
        put(target)
        raise RuntimeError
    assert path.read_text() == "an older one"
    with archive_target(path) as target:
        assert target.name == f"oci-archive:{path}"
        put(target)
        target.put_manifest(MANIFEST, OCI_MANIFEST, "v1")
    with tarfile.open(path) as archive:
        members = {each.name: each for each in archive}
        assert {"oci-layout", "index.json", f"blobs/sha256/{DIGEST.hex}"} <= set(members)
        assert {(each.uid, each.uname, each.mtime) for each in members.values()} == {(0, "", 0)}
    assert [each.name for each in tmp_path.iterdir()] == ["image.tar"]
