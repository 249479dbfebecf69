import json
from typing import Any, cast

import pytest

from lazyfs.checkpoint.inspect import Report, inspect, iso_time
from lazyfs.ground.errors import FetchError, NotACheckpoint

from . import sample
from .sample import FakeCheckpoint
from .test_criu import CORE, PAGEMAP, PSTREE, image, message

INVENTORY = "inventory.img"


async def report_of(checkpoint: FakeCheckpoint) -> Report:
    return await inspect(cast(Any, checkpoint))


async def test_the_sample() -> None:
    checkpoint = FakeCheckpoint(sample.files(), annotations=sample.manifest()["annotations"])
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
    assert not report.has_parent
    parent, child = report.processes
    assert (parent.pid, parent.command, parent.state) == (1, "sample", "alive")
    assert [(item.tid, item.command) for item in parent.threads] == [
        (1, "sample"),
        (7, "sample-thread"),
    ]
    assert (child.pid, child.ppid, child.command) == (6, 1, "sample-child")
    assert parent.memory_bytes == len(sample.images()["pages-1.img"])
    assert parent.parent_memory_bytes == 0
    assert report.layer.proof == "layer"
    sizes = report.sizes
    assert (sizes.pages_files, sizes.metadata_files) == (2, len(sample.images()) - 2)
    assert sizes.pages_bytes + sizes.metadata_bytes == sum(map(len, sample.images().values()))
    assert sizes.files_bytes == sum(map(len, sample.files().values()))


async def test_it_reads_no_pages_and_prefetches_once_what_it_reads() -> None:
    checkpoint = FakeCheckpoint(sample.files())
    await report_of(checkpoint)
    (prefetched,) = checkpoint.prefetched
    assert set(checkpoint.read) <= set(prefetched)
    assert not [path for path in prefetched if "pages-" in path]
    assert "config.dump" in prefetched
    assert "checkpoint/core-7.img" in prefetched


async def test_json_has_the_documented_keys() -> None:
    report = await report_of(FakeCheckpoint(sample.files(), proven=True))
    as_json = json.loads(json.dumps(report.as_json()))
    documented = (sample.LAYOUT.parents[2] / "docs/json.md").read_text()
    for key in keys_of(as_json):
        assert f"`{key}`" in documented, key
    assert as_json["layer"]["proof"] == "chunk"


def keys_of(value: object) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in keys_of(inner)}
    if isinstance(value, list):
        return {key for inner in value for key in keys_of(inner)}
    return set()


async def test_a_plain_criu_directory() -> None:
    report = await report_of(FakeCheckpoint(sample.images(), images_directory=""))
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
    report = await report_of(FakeCheckpoint(contents))
    assert report.criu is None
    assert report.processes == ()
    assert len(report.notes) == 3
    assert report.origin.engine == "Podman"  # spec.dump is as it was


async def test_a_process_whose_files_are_missing() -> None:
    contents = {INVENTORY: sample.images()[INVENTORY], "pstree.img": sample.images()["pstree.img"]}
    report = await report_of(FakeCheckpoint(contents, images_directory=""))
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
    checkpoint = FakeCheckpoint(contents, images_directory="", links={"parent": "pre/1"})
    report = await report_of(checkpoint)
    (process,) = report.processes
    assert report.has_parent
    assert process.memory_bytes == process.lazy_memory_bytes == 2 * 65536
    assert process.parent_memory_bytes == 3 * 65536
    assert report.origin.host_architecture == "arm64"


async def test_no_images_directory() -> None:
    with pytest.raises(NotACheckpoint, match="it is something else"):
        await report_of(FakeCheckpoint({"etc/passwd": b"x"}, images_directory=None))


async def test_a_source_that_fails_ends_it() -> None:
    class Failing(FakeCheckpoint):
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
