"""`lazyfs restore` with real CRIU: what comes up is intact, and what may not come up does not."""

import io
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed import Layer, Testbed, get_manifest, push_oci_image, write_oci_layout
from testbed.process import children

from lazyfs.checkpoint.stub import MARKER, Pages, Stub, write_stub
from lazyfs.checkpoint.trace import dump_trace
from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.restoring import Restorer, alive
from tests.traces import trace_of

pytestmark = [pytest.mark.real, pytest.mark.timeout(180), pytest.mark.usefixtures("adopting")]

MIB = 1 << 20
lazily = pytest.mark.parametrize(
    "lazy",
    [(), ("--lazy-pages",), ("--lazy-pages", "--pages-by=criu")],
    ids=["eager", "lazy-pages", "criu lazy-pages"],
)


@pytest.fixture(scope="module")
def dumped(testbed: Testbed, shelf: Path) -> Checkpoint:
    return checkpoint(testbed, shelf / "dumped", size_mib=24, shared_mib=4, children=1)


@pytest.fixture(scope="module")
def image(store: Store, dumped: Checkpoint) -> str:
    """Its `repository:tag`."""
    return store.push("restored", dumped)


@pytest.fixture
def restorer(testbed: Testbed, work: Path, dumped: Checkpoint) -> Iterator[Restorer]:
    dumped.rewind()
    restorer = Restorer(testbed, work)
    yield restorer
    restorer.assert_nothing_is_left()


@lazily
def test_several_processes_go_on_with_their_memory_and_nothing_else_is_left(
    store: Store, image: str, dumped: Checkpoint, restorer: Restorer, lazy: tuple[str, ...]
) -> None:
    started_s = time.time()
    ended = restorer.run(f"{store.address}/{image}", "--json", *lazy)
    assert (ended.code, ended.err) == (0, ""), ended
    told = ended.told
    with alive(told["pid"], dumped, started_s) as restored:
        assert told["pid"] in children(os.getpid())
        assert [line for line in restorer.left() if "workload" not in line] == []
        dumped.before.assert_goes_on(restored)
    assert told["restored"] is True
    assert told["exit_code"] == 0
    assert told["reference"].startswith(f"{store.address}/restored@sha256:")
    assert told["fetched_bytes"] >= 52 * MIB
    assert told["read_bytes"] >= told["pages_bytes"] >= 52 * MIB
    assert told["resumed_after_s"] <= told.get("home_after_s") if lazy else True
    assert told["work_dir"] is None
    assert list((restorer.work / "tmp").iterdir()) == []


def test_a_person_is_told_what_happens(
    store: Store, image: str, dumped: Checkpoint, restorer: Restorer
) -> None:
    started_s = time.time()
    ended = restorer.run(f"{store.address}/{image}", "--lazy-pages", "--work-dir", "criu")
    with alive(dumped.root_pid, dumped, started_s) as restored:
        dumped.before.assert_goes_on(restored)
    assert ended.code == 0, ended
    lines = [line for line in ended.err.splitlines() if "still waiting" not in line]
    assert lines[0].startswith(f"restoring {store.address}/restored@sha256:")
    assert lines[1].startswith(f"resumed as process {dumped.root_pid} after ")
    assert lines[2].startswith("all pages home after ")
    assert lines[-1].startswith("done: fetched ")
    assert ended.out == ""


def test_a_trace_of_another_image_is_told_of_and_not_followed(
    store: Store, image: str, dumped: Checkpoint, restorer: Restorer
) -> None:
    file = restorer.work / "other.trace"
    file.write_bytes(dump_trace(trace_of(f"sha256:{'7' * 64}")))
    started_s = time.time()
    ended = restorer.run(f"{store.address}/{image}", "--json", "--lazy-pages", "--trace", file)
    with alive(dumped.root_pid, dumped, started_s) as restored:
        dumped.before.assert_goes_on(restored)
    assert ended.code == 0, ended
    assert ended.told["followed_trace"] is None
    said = f"lazyfs: the trace {file} is of other layers than this image's: it was not followed\n"
    assert ended.err == said


def test_a_workload_without_a_trace_is_told_of(
    store: Store, image: str, dumped: Checkpoint, restorer: Restorer
) -> None:
    started_s = time.time()
    ended = restorer.run(f"{store.address}/{image}", "--json", "--workload", "nobody")
    with alive(dumped.root_pid, dumped, started_s) as restored:
        dumped.before.assert_goes_on(restored)
    assert ended.code == 0, ended
    assert ended.err == "lazyfs: no trace of nobody was found in time: none was followed\n"


def test_a_cache_that_cannot_be_made_is_told_of(
    store: Store, image: str, dumped: Checkpoint, restorer: Restorer
) -> None:
    started_s = time.time()
    ended = restorer.run(f"{store.address}/{image}", "--json", "--cache-dir", "/proc/no-cache")
    with alive(dumped.root_pid, dumped, started_s) as restored:
        dumped.before.assert_goes_on(restored)
    said = "lazyfs: no cache in /proc/no-cache: what is read is kept in memory\n"
    assert (ended.code, ended.err) == (0, said), ended


@pytest.mark.parametrize("kind", ["./", "oci:"])
def test_a_path_is_one_of_the_callers_directory(
    dumped: Checkpoint, restorer: Restorer, kind: str
) -> None:
    if kind == "oci:":
        write_oci_layout(restorer.work / "layout", "1", [Layer(dumped.layer)])
        reference = "oci:layout:1"
    else:
        (restorer.work / "checkpoint.tar").symlink_to(dumped.layer)
        reference = "./checkpoint.tar"
    started_s = time.time()
    ended = restorer.run(reference, "--lazy-pages")
    with alive(dumped.root_pid, dumped, started_s) as restored:
        dumped.before.assert_goes_on(restored)
    assert ended.code == 0, ended


def test_options_go_to_criu(
    store: Store, image: str, dumped: Checkpoint, restorer: Restorer
) -> None:
    work_dir = restorer.work / "criu"
    words = [f"{store.address}/{image}", "--json", "--work-dir", work_dir]
    started_s = time.time()
    ended = restorer.run(*words, extra=["--leave-stopped"])
    assert ended.code == 0, ended
    with alive(ended.told["pid"], dumped, started_s) as restored:
        stat = Path(f"/proc/{restored.pid}/stat").read_text()
        assert stat.rpartition(")")[2].split()[0] == "T"
        assert "Tasks resumed" in (work_dir / "restore.log").read_text()


def test_a_pid_that_is_taken_is_told_before_and_after(
    store: Store, image: str, dumped: Checkpoint, restorer: Restorer
) -> None:
    reference = f"{store.address}/{image}"
    started_s = time.time()
    first = restorer.run(reference, "--json")
    with alive(first.told["pid"], dumped, started_s) as restored:
        told = restorer.run(reference)
        assert told.code == 4
        assert f"{dumped.root_pid}" in told.err
        assert "With --force it is tried" in told.err
        forced = restorer.run(reference, "--force", "--json")
        assert forced.code == 6
        report = forced.told
        assert report["restored"] is False
        assert report["program_exit_code"] == 1
        assert any("File exists" in line for line in report["log"]), report
        assert "a pid of the checkpoint's" in report["advice"][0]
        assert f"logs are in {report['work_dir']}" in forced.err
        assert (Path(report["work_dir"]) / "restore.log").exists()
        dumped.before.assert_goes_on(restored)  # the first is unharmed


def test_a_stub_is_followed_to_what_it_stands_for(
    store: Store, image: str, dumped: Checkpoint, restorer: Restorer
) -> None:
    digest, _ = get_manifest(store.address, *image.split(":"))
    reference = f"{store.address}/restored@{digest}"
    stub = _push_stub(store, dumped, restorer.work, reference)
    started_s = time.time()
    ended = restorer.run(stub)
    with alive(dumped.root_pid, dumped, started_s) as restored:
        assert ended.code == 0, ended
        assert f"is a stub of {reference}" in ended.err
        dumped.before.assert_goes_on(restored)


def test_criu_by_itself_refuses_a_stub_and_the_advice_says_why(
    store: Store, image: str, dumped: Checkpoint, restorer: Restorer
) -> None:
    from testbed import CriuError, restore

    from lazyfs.restore.criulog import diagnose

    images = restorer.work / "images"
    with tarfile.open(dumped.layer) as layer:
        layer.extractall(images, filter="data")
    for pages in (images / "checkpoint").glob("pages-*.img"):
        pages.unlink()
    with pytest.raises(CriuError):
        restore(restorer.testbed, images / "checkpoint", restorer.work / "c", dumped.status)
    found = diagnose((restorer.work / "c/restore.log").read_text())
    assert any("if it is a stub" in advice for advice in found.advice), found


def test_what_cannot_be_had_has_its_exit_code_and_leaves_no_work_directory(
    store: Store, restorer: Restorer
) -> None:
    ended = restorer.run(f"{store.address}/restored:none")
    assert ended.code == 3, ended
    ended = restorer.run(f"{store.address}/restored:none", "--runtime", "runc")
    assert (ended.code, "--bundle" in ended.err) == (2, True)
    assert list((restorer.work / "tmp").iterdir()) == []


def test_a_criu_that_cannot_be_run(store: Store, image: str, restorer: Restorer) -> None:
    program = restorer.work / "criu"
    program.write_bytes(b"\x7fELF, and no more")
    program.chmod(0o755)
    ended = restorer.run(f"{store.address}/{image}", f"--criu={program}", "--force")
    assert ended.code == 2, ended
    assert f"{program} cannot be run" in ended.err


def _push_stub(store: Store, dumped: Checkpoint, work: Path, reference: str) -> str:
    with tarfile.open(dumped.layer) as whole, tarfile.open(work / "stub.tar", "w") as stub:
        left_out = []
        for entry in whole:
            if Path(entry.name).name.startswith("pages-"):
                left_out.append(Pages(Path(entry.name).name, entry.size))
            else:
                stub.addfile(entry, whole.extractfile(entry))
        marker = write_stub(Stub(reference=reference, pages=left_out))
        entry = tarfile.TarInfo(f"checkpoint/{MARKER}")
        entry.size = len(marker)
        stub.addfile(entry, io.BytesIO(marker))
    push_oci_image(store.address, "stub", "1", [Layer(work / "stub.tar")])
    return f"{store.address}/stub:1"
