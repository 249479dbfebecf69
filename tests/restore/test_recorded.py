"""A restore's recording, as its keeper sees it."""

import json
import os
import time
from pathlib import Path

from lazyfs.restore.plan import Recording
from lazyfs.restore.recorded import Recorded
from lazyfs.restore.watch import Watch
from lazyfs.until import Until

DOES_NOT_HANG_S = 20.0


def test_a_daemon_that_is_gone_before_the_restore_begins_is_not_waited_for(tmp_path: Path) -> None:
    """It had the only other end of the link, but for ours of it."""
    hearing, telling = os.pipe()
    began_s = time.monotonic()
    recorded = Recorded(Recording(tmp_path / "trace", Until("10"), began_s), tmp_path, "lazy pages")
    recorded.end(Watch(telling, ()))
    assert time.monotonic() - began_s < DOES_NOT_HANG_S
    os.close(telling)
    with open(hearing, "rb") as told:
        (line,) = map(json.loads, told)
    assert line["event"] == "recorded"
    assert "no trace has been written" in line["error"]
