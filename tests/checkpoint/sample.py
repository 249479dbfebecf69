"""The sample checkpoint of contrib/demo, and an opened checkpoint that is in memory."""

import io
import json
import tarfile
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lazyfs.checkpoint.tree import Node, Tree
from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import MalformedError, NotACheckpoint
from lazyfs.ground.settings import ContentSettings
from lazyfs.layers.model import Entry, EntryType, LayerDescriptor

LAYOUT = Path(__file__).parents[2] / "contrib/demo/sample"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
TAR_TYPE = "application/vnd.oci.image.layer.v1.tar"


def blob(digest: str) -> bytes:
    return (LAYOUT / "blobs" / digest.replace(":", "/")).read_bytes()


def manifest_digest() -> str:
    index = json.loads((LAYOUT / "index.json").read_text())
    return str(index["manifests"][0]["digest"])


def manifest() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(blob(manifest_digest()))
    return found


def layer_tar() -> bytes:
    return blob(manifest()["layers"][0]["digest"])


def files() -> dict[str, bytes]:
    """All files of the sample, by path; directories end with a slash."""
    with tarfile.open(fileobj=io.BytesIO(layer_tar())) as tar:
        return {
            f"{member.name}/" if member.isdir() else member.name: (
                stream.read() if (stream := tar.extractfile(member)) else b""
            )
            for member in tar
        }


def images() -> dict[str, bytes]:
    """The files of its CRIU images directory, by name."""
    return {
        path.removeprefix("checkpoint/"): data
        for path, data in files().items()
        if path.startswith("checkpoint/") and data
    }


class FakeCheckpoint:
    """What inspect, ls and cat know of an OpenedCheckpoint, from a mapping of paths to bytes."""

    def __init__(
        self,
        contents: Mapping[str, bytes],
        *,
        annotations: Mapping[str, str] | None = None,
        images_directory: str | None = "checkpoint",
        links: Mapping[str, str] | None = None,
        proven: bool = False,
        mtime_ns: int = 1_700_000_000_000_000_000,
    ) -> None:
        self.contents = dict(contents)
        self.images_directory = images_directory
        self.prefetched: list[list[str]] = []
        self.read: list[str] = []
        self.counters = Counters(requests=3, bytes_fetched=12345)
        self.reference = f"oci:sample@{manifest_digest()}"
        self.layer = LayerDescriptor(TAR_TYPE, Digest.parse("sha256:" + "1" * 64), 320512, {})
        self.index = SimpleNamespace(format_name="tar", chunks=SimpleNamespace(proven=proven))
        self.image = SimpleNamespace(
            annotations=annotations or {},
            digest=Digest.parse(manifest_digest()),
            media_type=MANIFEST_TYPE,
            config=None,
            layers=(self.layer,),
            describe=lambda: "something else",
            dumps=dict,
        )
        self.by_digest = True
        self.stub = None
        self.desk = SimpleNamespace(config=SimpleNamespace(content=ContentSettings()))
        self.tree = Tree(
            [
                *(
                    Entry(path.rstrip("/"), EntryType.DIRECTORY, 0o700, mtime_ns=mtime_ns)
                    for path in self.contents
                    if path.endswith("/")
                ),
                *(
                    Entry(path, EntryType.FILE, 0o600, size_bytes=len(data), mtime_ns=mtime_ns)
                    for path, data in self.contents.items()
                    if not path.endswith("/")
                ),
                *(
                    Entry(path, EntryType.SYMLINK, 0o777, symlink_target=target)
                    for path, target in (links or {}).items()
                ),
            ]
        )

    async def find(self, path: str) -> Node | None:
        return self.tree.find(path)

    async def complete(self) -> None:
        pass

    async def read_file(self, path: str, limit_bytes: int) -> bytes:
        if path not in self.contents:
            raise NotACheckpoint(f"there is no {path!r}")
        self.read.append(path)
        if len(self.contents[path]) > limit_bytes:
            raise MalformedError(f"{path!r} is {len(self.contents[path])} bytes")
        return self.contents[path]

    async def prefetch(self, paths: Iterable[str]) -> None:
        self.prefetched.append(list(paths))

    async def stream_file(self, path: str) -> AsyncIterator[memoryview]:
        data = memoryview(self.contents[path])
        for start in range(0, len(data), 50_000):
            yield data[start : start + 50_000]
