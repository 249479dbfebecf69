"""An image larger than this machine's memory costs no more requests and memory than a small one."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tests.faults import OCI_LAYER, OCI_MANIFEST, FaultServer
from tests.images import zstd_chunked
from tests.mount.mounting import Mount, Mounts, read_at
from tests.mount.published import MIB, publish

GIB = 1024 * MIB
LARGE_BYTES = 16 * GIB
CHUNK = b"chunk of pages" * 40
MORE_MEMORY_BYTES = 8 * MIB
"""What a large image may take beyond a small one; a table of its 65,536 chunks alone, in Python's
own objects, would be more."""


def layout_with_a_hole(directory: Path, pages_bytes: int) -> str:
    """Write an OCI layout whose layer is a tar with a hole for pages; return its reference."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes) -> dict[str, object]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"digest": f"sha256:{name}", "size": len(data)}

    head = io.BytesIO()
    for name, size_bytes in (("inventory.img", 512), ("pages-1.img", pages_bytes)):
        info = tarfile.TarInfo(f"checkpoint/{name}")
        info.size = size_bytes
        head.write(info.tobuf(tarfile.GNU_FORMAT) + (b"i" * 512 if size_bytes == 512 else b""))
    # Of what nobody reads whole, so that nobody finds that this is not its digest.
    layer = hashlib.sha256(str(pages_bytes).encode()).hexdigest()
    with (blobs / layer).open("wb") as file:
        file.write(head.getvalue())
        file.truncate(len(head.getvalue()) + pages_bytes + 1024)
    layer_bytes = (blobs / layer).stat().st_size
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", **put(b"{}")},
        "layers": [{"mediaType": OCI_LAYER, "digest": f"sha256:{layer}", "size": layer_bytes}],
    }
    described = {"mediaType": OCI_MANIFEST, **put(json.dumps(manifest).encode())}
    index = {"schemaVersion": 2, "manifests": [described]}
    (directory / "index.json").write_text(json.dumps(index))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci:{directory}"


def cut(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Cut a file into chunks of `CHUNK`'s size; none is a hole."""
    for start in range(0, len(data), len(CHUNK)):
        yield data[start : start + len(CHUNK)], False


def cost_of(mount: Mount, end: bytes) -> tuple[int, int]:
    """Read the end of the pages; return fetched bytes and the daemon's own memory."""
    pages = mount / "pages-1.img"
    size_bytes = pages.stat().st_size
    assert read_at(pages, size_bytes - len(end), len(end)) == end
    state = mount.status()
    fields = Path(f"/proc/{state['pid']}/status").read_text().splitlines()
    memory = next(line.split()[1] for line in fields if line.startswith("RssAnon:"))
    fetched: int = state["bytes_fetched"]
    return fetched, int(memory) * 1024


def test_a_layer_of_sixteen_gigabytes_costs_what_a_small_one_does(
    mounts: Mounts, tmp_path: Path
) -> None:
    costs = []
    for name, size_bytes in (("small", 16 * MIB), ("large", LARGE_BYTES)):
        reference = layout_with_a_hole(tmp_path / name, size_bytes)
        costs.append(cost_of(mounts.mount(reference, at=tmp_path / f"at-{name}"), bytes(4096)))
    small, large = costs
    assert large[0] <= small[0] + 4 * MIB
    assert large[1] <= small[1] + MORE_MEMORY_BYTES
    on_disk = sum(each.lstat().st_blocks * 512 for each in mounts.cache_dir.rglob("*"))
    assert on_disk < 64 * MIB, "a cache file is as long as its layer, and as full as what was read"


def test_twenty_thousand_chunks_take_as_many_requests_as_few_do(
    server: FaultServer, mounts: Mounts, tmp_path: Path
) -> None:
    requests, memory = [], []
    for tag, chunks in (("few", 20), ("many", 20_000)):
        files = {
            "checkpoint/inventory.img": b"inventory",
            "checkpoint/pages-1.img": CHUNK * chunks,
        }
        mount = mounts.mount(
            publish(server, zstd_chunked(files, cut=cut), tag), at=tmp_path / f"at-{tag}"
        )
        fetched, used = cost_of(mount, CHUNK)
        requests.append(mount.status()["requests"])
        memory.append(used)
        assert fetched <= 4 * MIB
    assert requests[1] <= requests[0] + 2
    assert memory[1] <= memory[0] + MORE_MEMORY_BYTES
