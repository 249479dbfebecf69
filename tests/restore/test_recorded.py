"""A restore's recording, as its keeper sees it."""

import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from lazyfs.restore.plan import LOG, Recording
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


def test_the_end_is_when_it_was_seen_and_not_when_the_log_of_criu_has_been_read(
    tmp_path: Path,
) -> None:
    hearing, telling = os.pipe()
    wanted = Recording(tmp_path / "trace", Until("1e-9"), time.monotonic())
    recorded = Recorded(wanted, tmp_path, "lazy pages")
    assert recorded.config.link is not None
    daemon = socket.socket(fileno=os.dup(recorded.config.link))
    daemon.sendall(b'{"error": null}\n')
    log = tmp_path / LOG
    os.mkfifo(log)

    def write_log() -> float:
        with log.open("w"):  # which is when it is opened to be read
            return time.monotonic()

    watch = Watch(telling, ())
    recorded.begin()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_log)
        recorded.last(watch, cast(Any, None), 0)
        read_at_s = writing.result(DOES_NOT_HANG_S)
    recorded.end(watch)
    for each in (telling, hearing):
        os.close(each)
    with daemon, daemon.makefile("rb") as told:
        *_, end = (json.loads(told.readline()) for _ in range(3))
    assert end["end"] == "1e-09 s passed"
    assert end["at_s"] <= read_at_s


def test_phases_of_criu_lie_in_the_restore_whoever_has_touched_its_log_since(
    tmp_path: Path,
) -> None:
    hearing, telling = os.pipe()
    wanted = Recording(tmp_path / "trace", Until("1e-9"), time.monotonic())
    recorded = Recorded(wanted, tmp_path, "lazy pages")
    assert recorded.config.link is not None
    daemon = socket.socket(fileno=os.dup(recorded.config.link))
    daemon.sendall(b'{"error": null}\n')
    log = tmp_path / LOG
    log.write_text("(00.000000) Version: 4.1.1\n(00.000500) Restore finished successfully\n")
    os.utime(log, (time.time() + 60, time.time() + 60))
    watch = Watch(telling, ())
    began_s = time.monotonic()
    recorded.begin()
    recorded.last(watch, cast(Any, None), 0)
    recorded.end(watch)
    for each in (telling, hearing):
        os.close(each)
    with daemon, daemon.makefile("rb") as told:
        _, restored, end = (json.loads(told.readline()) for _ in range(3))
    ((_, phase_began_s, phase_ended_s),) = end["phases"]
    assert began_s <= phase_began_s <= phase_ended_s
    assert phase_ended_s <= max(restored["at_s"], phase_began_s + 0.0005) + 1e-6
