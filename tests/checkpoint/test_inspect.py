import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lazyfs.checkpoint.criu import Mount
from lazyfs.checkpoint.inspect import inspect, iso_time
from lazyfs.checkpoint.report import Report
from lazyfs.ground.errors import FetchError, NotACheckpoint
from lazyfs.layers.model import LayerDescriptor

from . import sample
from .sample import TAR_TYPE, FakeCheckpoint
from .test_criu import CORE, PAGEMAP, PSTREE, image, message

INVENTORY = "inventory.img"


def opened_layer(descriptor: LayerDescriptor, **others: Any) -> SimpleNamespace:
    """What inspect looks at of an OpenedLayer."""
    known = {"format_name": "tar", "mislabelled": False, "is_stream": False, "proof": "layer"}
    return SimpleNamespace(**{"descriptor": descriptor, **known, **others})


class Inspected(FakeCheckpoint):
    """What inspect knows of an OpenedCheckpoint."""

    def __init__(
        self,
        *arguments: Any,
        layers: Sequence[SimpleNamespace] | None = None,
        parents: tuple[str, ...] = (),
        **others: Any,
    ) -> None:
        super().__init__(*arguments, **others)
        descriptor = LayerDescriptor(TAR_TYPE, sample.Digest.of(b"layer"), 320512, {})
        self.layers: Any = layers or [opened_layer(descriptor)]
        self.image.layers = tuple(layer.descriptor for layer in self.layers)
        self.image_layers = self.layers
        self.parents = parents
        self.completed = 0

    async def complete(self) -> None:
        self.completed += 1


async def report_of(checkpoint: FakeCheckpoint, *, brief: bool = False) -> Report:
    return await inspect(cast(Any, checkpoint), brief=brief)


async def test_the_sample() -> None:
    checkpoint = Inspected(sample.files(), annotations=sample.manifest()["annotations"])
    report = await report_of(checkpoint)
    assert report.notes == ()
    assert report.origin.engine == "Podman"
    assert report.origin.checkpointed_at == "2023-11-14T22:13:20Z"  # the inventory's own time
    assert report.images_directory == "checkpoint"
    assert report.manifest_digest == sample.manifest_digest()
    assert report.image_size_bytes == 320512
    assert report.criu is not None
    assert report.criu.images_version == 2
    assert report.own_namespaces == ("ipc", "mnt", "net", "pid", "uts")
    assert report.parents == ()
    parent, child = report.processes
    assert (parent.pid, parent.command, parent.state) == (1, "sample", "alive")
    assert [(item.tid, item.command) for item in parent.threads] == [
        (1, "sample"),
        (7, "sample-thread"),
    ]
    assert (child.pid, child.ppid, child.command) == (6, 1, "sample-child")
    assert parent.memory_bytes == len(sample.images()["pages-1.img"])
    assert parent.parent_memory_bytes == 0
    memory, needs = report.memory, report.needs
    assert memory.total_bytes == sum(
        len(data) for name, data in sample.images().items() if name.startswith("pages-")
    )
    assert memory.anonymous_bytes is not None
    assert memory.file_bytes is not None
    vdso_bytes = 4 * 4096
    assert memory.anonymous_bytes + memory.file_bytes + vdso_bytes == memory.total_bytes
    assert 0 < (memory.lazy_bytes or 0) <= memory.anonymous_bytes
    assert (memory.shared_bytes, memory.parent_bytes, memory.device_bytes) == (0, 0, 0)
    assert not memory.compressed
    assert Mount("/dev/shm", "/dev/shm") in needs.external_mounts
    assert (needs.tcp_connections, needs.security_labels, needs.cpu) == (0, (), None)
    assert needs.cpu_features == ("avx512f",)
    assert not needs.wide_page_counts  # CRIU 4.1.1
    (layer,) = report.layers
    assert (layer.format, layer.proof, layer.mislabelled) == ("tar", "layer", False)
    sizes = report.sizes
    assert (sizes.pages_files, sizes.metadata_files) == (2, len(sample.images()) - 2)
    assert sizes.pages_bytes + sizes.metadata_bytes == sum(map(len, sample.images().values()))
    assert sizes.files_bytes == sum(map(len, sample.files().values()))


async def test_it_reads_no_pages_and_prefetches_once_what_it_reads() -> None:
    checkpoint = Inspected(sample.files())
    await report_of(checkpoint)
    (prefetched,) = checkpoint.prefetched
    assert set(checkpoint.read) <= set(prefetched)
    assert not [path for path in prefetched if "pages-" in path]
    assert "config.dump" in prefetched
    assert "checkpoint/core-7.img" in prefetched


async def test_json_has_the_documented_keys() -> None:
    report = await report_of(Inspected(sample.files()))
    as_json = json.loads(json.dumps(report.as_json()))
    documented = (sample.LAYOUT.parents[2] / "docs/json.md").read_text()
    for key in keys_of(as_json):
        assert f"`{key}`" in documented, key
    assert as_json["needs"]["external_mounts"][0].keys() == {"mountpoint", "key"}


def keys_of(value: object) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in keys_of(inner)}
    if isinstance(value, list):
        return {key for inner in value for key in keys_of(inner)}
    return set()


async def test_a_plain_criu_directory() -> None:
    report = await report_of(Inspected(sample.images(), images_directory=""))
    assert report.origin.engine == "runc or crun"
    assert report.origin.host_architecture == "amd64"
    assert len(report.processes) == 2


async def test_what_makes_no_sense_is_a_note() -> None:
    contents = {
        **sample.files(),
        "config.dump": b"{",
        "checkpoint/pstree.img": b"nonsense",
        "checkpoint/inventory.img": b"",
    }
    report = await report_of(Inspected(contents))
    assert report.criu is None
    assert report.processes == ()
    assert len(report.notes) == 3
    assert report.origin.engine == "Podman"  # spec.dump is as it was


async def test_a_process_whose_files_are_missing() -> None:
    contents = {INVENTORY: sample.images()[INVENTORY], "pstree.img": sample.images()["pstree.img"]}
    report = await report_of(Inspected(contents, images_directory=""))
    assert [process.command for process in report.processes] == [None, None]
    assert [process.memory_bytes for process in report.processes] == [None, None]
    assert report.notes == ()


async def test_an_incremental_checkpoint() -> None:
    contents = {
        INVENTORY: sample.images()[INVENTORY],
        "pstree.img": image(PSTREE, message(f1=5, f2=0, f5=5)),
        "core-5.img": image(CORE, message(f1=3)),
        "pagemap-5.img": image(
            PAGEMAP, message(f1=9), message(f1=0, f4=1, f5=3), message(f1=1 << 20, f4=6, f5=2)
        ),
        "pages-9.img": bytes(2 * 65536),  # an arm64 kernel with pages of 64 KiB
    }
    checkpoint = Inspected(contents, images_directory="", parents=("pre/1",))
    report = await report_of(checkpoint)
    (process,) = report.processes
    assert report.parents == ("pre/1",)
    assert report.memory.parent_bytes == 3 * 65536
    assert report.memory.anonymous_bytes is None  # without an mm image
    assert process.memory_bytes == process.lazy_memory_bytes == 2 * 65536
    assert process.parent_memory_bytes == 3 * 65536
    assert report.origin.host_architecture == "arm64"


async def test_shared_memory_and_what_a_restore_needs() -> None:
    contents = {
        **sample.images(),
        "pagemap-shmem-77.img": image(PAGEMAP, message(f1=5), message(f1=0, f4=4, f2=3)),
        "pages-5.img": bytes(3 * 4096),
        "tcp-stream-1a.img": b"",
        "tcp-stream-1b.img": b"",
        "amdgpu-pages-1-0a2b.img": b"x" * 100,
    }
    report = await report_of(Inspected(contents, images_directory=""))
    assert report.memory.shared_bytes == 3 * 4096
    assert report.memory.device_bytes == 100
    assert report.needs.tcp_connections == 2
    alone = await report_of(Inspected(sample.images(), images_directory=""))
    assert report.memory.total_bytes == (alone.memory.total_bytes or 0) + 3 * 4096


async def test_counts_that_older_versions_do_not_see() -> None:
    contents = {
        INVENTORY: sample.images()[INVENTORY],
        "pagemap-1.img": image(PAGEMAP, message(f1=1), message(f1=0, f2=0, f4=4, f5=3)),
        "pstree.img": sample.images()["pstree.img"],
    }
    for brief in (False, True):
        report = await report_of(Inspected(contents, images_directory=""), brief=brief)
        assert report.needs.wide_page_counts


async def test_a_brief_look_reads_little_and_fetches_nothing_ahead() -> None:
    contents = {name: data for name, data in sample.files().items() if "core-6" not in name}
    checkpoint = Inspected(contents)
    report = await report_of(checkpoint, brief=True)
    assert checkpoint.prefetched == []
    assert checkpoint.completed == 0
    assert "checkpoint/core-7.img" not in checkpoint.read
    assert not [path for path in checkpoint.read if "mm-" in path or "pages-" in path]
    assert [process.command for process in report.processes] == ["sample", None]
    assert report.own_namespaces == ("ipc", "mnt", "net", "pid", "uts")
    assert report.memory.total_bytes is None
    assert report.origin.host_architecture == "amd64"


async def test_several_layers() -> None:
    first = LayerDescriptor(TAR_TYPE + "+gzip", sample.Digest.of(b"1"), 10, {})
    second = LayerDescriptor(TAR_TYPE, sample.Digest.of(b"2"), 20, {})
    layers = [
        opened_layer(first, format_name="zstd", mislabelled=True, is_stream=True),
        opened_layer(second, format_name="zstd:chunked", proof="chunk"),
    ]
    report = await report_of(Inspected(sample.files(), layers=layers))
    assert report.image_size_bytes == 30
    assert [(layer.format, layer.mislabelled, layer.streamed) for layer in report.layers] == [
        ("zstd", True, True),
        ("zstd:chunked", False, False),
    ]
    assert [layer.proof for layer in report.layers] == ["layer", "chunk"]


async def test_no_images_directory() -> None:
    with pytest.raises(NotACheckpoint, match="it is something else"):
        await report_of(Inspected({"etc/passwd": b"x"}, images_directory=None))


async def test_a_source_that_fails_ends_it() -> None:
    class Failing(Inspected):
        async def read_file(self, path: str, limit_bytes: int) -> bytes:
            raise FetchError("gone", transient=True)

    with pytest.raises(FetchError):
        await report_of(Failing(sample.files()))


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_500_000_000, "1970-01-01T00:00:01.5Z"),
        (-1, "1969-12-31T23:59:59.999999999Z"),
        (1 << 100, None),
    ],
)
def test_times(time_ns: int, text: str | None) -> None:
    assert iso_time(time_ns) == text
