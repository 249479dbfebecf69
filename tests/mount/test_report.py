"""`lazyfs report` of what a real mount has recorded."""

import json
import re
from pathlib import Path

import pytest

from lazyfs.checkpoint.trace import parse_trace
from lazyfs.report.analysis import analyse
from tests.faults import FaultServer
from tests.mount.mounting import Mounts, lazyfs
from tests.mount.published import LAYERS, MIB, checkpoint_files, publish

FILES = checkpoint_files(3 * MIB)
PAGES = "checkpoint/pages-1.img"


@pytest.mark.parametrize("kind", ["tar", "zstd:chunked"])
def test_what_a_mount_has_recorded_is_drawn_and_explained(
    mounts: Mounts, server: FaultServer, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "cat.trace"
    mount = mounts.mount(publish(server, LAYERS[kind](FILES)), "--record", file)
    assert (mount / "pages-1.img").read_bytes() == FILES[PAGES]
    assert mount.umount().code == 0
    mount.wait_end()

    done = lazyfs("report", file, "-o", tmp_path / "report.html")
    assert done.code == 0
    assert " until the mount answered" in done.out.splitlines()[0]
    page = (tmp_path / "report.html").read_text()
    figures = json.loads(re.findall(r'id="figures">(.*?)</script>', page)[0])
    assert list(figures) == ["timeline", "map0", "amounts", "files"]

    found = analyse(parse_trace(file.read_bytes(), "it"))
    assert found.needed_bytes == len(FILES[PAGES])
    assert found.fetched_bytes > 0
    assert all(wait.causes.unknown_ms == 0 for wait in found.waits)
