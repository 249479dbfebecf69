"""Lives of a daemon that end by SIGKILL at a random moment, and what the next one finds.

One life: `lazyfs mount --foreground`, and a reader of everything (a process that reads the images
directory from end to end, or CRIU that restores from it); after a random time the daemon is killed:
in the middle of mounting, of fetching, of storing, of proving, or after.
What the reader got is compared. The next daemon mounts over the dead mount with the same cache, and
all of it is read and compared.

A link of a few MB/s lets the moments fall into the middle of things.
"""

import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from testbed import CriuError, Readers, Tally, TestbedError, Weather
from testbed.guard import forget, watch
from testbed.process import wait_until

from lazyfs.mountpoint import mounted_at
from tests.real.checkpoints import Checkpoint
from tests.real.faults.skies import since
from tests.real.mounts import Mount

_ALARMING = (" ERROR ", " CRITICAL ")
_UNTIL_S = 60
_MOUNTING_SHARE = 0.2
_MEASURED_AGAIN = 25
"""Kills until the length of a life is measured anew: machines are busy now and then."""


@dataclass
class Score:
    """What so many lives came to."""

    kills: int = 0
    while_mounting: int = 0
    """Of these, before the directory answered."""
    after_all_was_read: int = 0
    dead: Tally = field(default_factory=Tally)
    """Reads from those that were killed."""
    taken_over: Tally = field(default_factory=Tally)
    """Reads from those that came after them."""
    layer_bytes: int = 0
    """What one fetch of each layer would have been."""
    fetched_bytes: int = 0
    """What both lives have fetched of it."""
    from_cache: int = 0
    cache_refused: int = 0
    """Chunks of the first life that the second found, and found damaged."""
    takeover_s: list[float] = field(default_factory=list)
    """From the start of the second `lazyfs mount` until its directory answered."""
    restores_failed: int = 0
    restores_intact: int = 0

    @property
    def refetched_bytes(self) -> int:
        """What was fetched more than once."""
        return max(0, self.fetched_bytes - self.layer_bytes)

    def figures(self) -> dict[str, float]:
        """Return what is worth telling."""
        times = sorted(self.takeover_s) or [0.0]
        return {
            "kills": self.kills,
            "while it mounted": self.while_mounting,
            "after all was read": self.after_all_was_read,
            "MB of layers": round(self.layer_bytes / 1e6, 1),
            "MB fetched in both lives": round(self.fetched_bytes / 1e6, 1),
            "MB fetched twice": round(self.refetched_bytes / 1e6, 1),
            "chunks found in the cache": self.from_cache,
            "chunks found damaged": self.cache_refused,
            "takeover, median s": round(times[len(times) // 2], 2),
            "takeover, longest s": round(times[-1], 2),
            "restores failed": self.restores_failed,
            "restores intact": self.restores_intact,
        }


class Life:
    """One daemon in the foreground; `kill` it, or `end` it in good order."""

    def __init__(self, reference: str, work: Path, cache: Path) -> None:
        self.directory = work / "mount"
        with suppress(OSError):  # there is a dead mount on it
            self.directory.mkdir(parents=True, exist_ok=True)
        self.log = work / "lazyfs.log"
        command = [sys.executable, "-m", "lazyfs", "mount", "--foreground", "--plain-http"]
        command += ["--cache-dir", str(cache), "--log-file", str(self.log)]
        self.began_s = time.monotonic()
        with (work / "lazyfs.out").open("ab") as out:
            self._process = subprocess.Popen(
                [*command, reference, str(self.directory)], stdout=out, stderr=out
            )
        watch(self._process.pid)

    def wait_ready(self) -> float:
        """Wait until the directory answers; return the seconds that it took."""

        def answers() -> bool:
            if self._process.poll() is not None:
                raise TestbedError(f"it ended:\n{self.log.read_text()}")
            return self.is_ready

        wait_until(answers, "that it mounts", _UNTIL_S)
        return time.monotonic() - self.began_s

    @property
    def is_ready(self) -> bool:
        """Whether the directory shows this daemon's files."""
        try:
            return Mount.state_of(self.directory)["pid"] == self._process.pid
        except OSError:
            return False

    def kill(self) -> None:
        """Kill it as the kernel's OOM killer would; a dead mount may stay."""
        self._process.kill()
        self._process.wait()
        forget(self._process.pid)

    def end(self) -> None:
        """Let it unmount."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_UNTIL_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        forget(self._process.pid)
        assert mounted_at(self.directory) is None

    def clear(self) -> None:
        """Whatever has happened: leave neither a mount nor a daemon."""
        self.kill()
        while mounted_at(self.directory) is not None:
            subprocess.run(["umount", "-l", str(self.directory)], check=True)


class Killer:
    """Kills daemons of images that come over a slow link."""

    def __init__(self, weather: Weather, checkpoint: Checkpoint, truth: Path, seed: int) -> None:
        self._weather, self._checkpoint, self._truth = weather, checkpoint, truth
        self._random = random.Random(seed)
        self._whole_life_s: dict[str, tuple[float, float]] = {}
        """Of each image: seconds until it was mounted, and from then until it was read."""
        self.score = Score()

    def kill_a_reader(self, reference: str, work: Path, blob: "Blob") -> None:
        """Kill while everything is read from end to end, or, one in five, while it mounts.

        The moment is drawn from a life that nobody ended: the first of each image.
        """
        work.mkdir(parents=True)
        if reference not in self._whole_life_s or self.score.kills % _MEASURED_AGAIN == 0:
            self._whole_life_s[reference] = self._live(reference, work / "whole")
        mounting_s, reading_s = self._whole_life_s[reference]
        sent_before = self._weather.sent_bytes[blob.digest]
        with Readers(1, seed=1) as readers:
            life = Life(reference, work, work / "cache")
            try:
                self.score.kills += 1
                if self._random.random() < _MOUNTING_SHARE:
                    self._kill_early(life, self._random.uniform(0, mounting_s))
                else:
                    self._kill_late(life, readers, self._random.uniform(0, reading_s))
                life = Life(reference, work, work / "cache")
                self._take_over(life, readers)
            except BaseException:
                life.clear()
                print(life.log.read_text())
                raise
        self._account(blob, sent_before, life.log)

    def kill_a_restore(self, reference: str, work: Path, blob: "Blob") -> None:
        """Kill in the middle of a real restore: it fails, or what comes up is intact."""
        work.mkdir(parents=True)
        if reference not in self._whole_life_s:
            self._whole_life_s[reference] = (0.0, self._restore(reference, work / "whole"))
        _, most_s = self._whole_life_s[reference]
        sent_before = self._weather.sent_bytes[blob.digest]
        life = Life(reference, work, work / "cache")
        try:
            life.wait_ready()
            self._restore_and_kill(life, work / "criu", most_s)
            life = Life(reference, work, work / "cache")
            self.score.takeover_s.append(life.wait_ready())
            with self._checkpoint.restore(life.directory, work / "criu") as restored:
                self._checkpoint.before.assert_goes_on(restored)
            self.score.restores_intact += 1
            self._note_state(life)
            life.end()
        except BaseException:
            life.clear()
            print(life.log.read_text())
            raise
        self._account(blob, sent_before, life.log)

    def _live(self, reference: str, work: Path) -> tuple[float, float]:
        """Let a daemon live until all is read; return the seconds to mount, and to read."""
        with Readers(1, seed=1) as readers:
            life = Life(reference, work, work / "cache")
            try:
                mounting_s = life.wait_ready()
                began_s = time.monotonic()
                swept = readers.sweep(life.directory, self._truth)
                reading_s = time.monotonic() - began_s
                life.end()
            except BaseException:
                life.clear()
                raise
        assert not swept.wrong, swept.wrong
        assert not swept.errors, swept.errors
        return mounting_s, reading_s

    def _restore(self, reference: str, work: Path) -> float:
        """Restore without a kill; return the seconds that `criu restore` took."""
        life = Life(reference, work, work / "cache")
        try:
            life.wait_ready()
            with self._checkpoint.restore(life.directory, work / "criu") as restored:
                self._checkpoint.before.assert_goes_on(restored)
            life.end()
        except BaseException:
            life.clear()
            raise
        return restored.seconds

    def _kill_early(self, life: Life, moment_s: float) -> None:
        """Kill so long after it was started."""
        time.sleep(moment_s)
        self.score.while_mounting += not life.is_ready
        life.kill()

    def _kill_late(self, life: Life, readers: Readers, moment_s: float) -> None:
        """Kill so long after somebody has begun to read."""
        life.wait_ready()
        readers.begin_sweep(life.directory, self._truth)
        time.sleep(moment_s)
        life.kill()
        swept = readers.end_sweep()
        self.score.after_all_was_read += not swept.errors
        self.score.dead.add(swept)
        assert not swept.wrong, swept.wrong

    def _restore_and_kill(self, life: Life, criu: Path, most_s: float) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.score.kills += 1
        moment_s = self._random.uniform(0.0, most_s)
        with ThreadPoolExecutor(1) as pool:
            restoring = pool.submit(self._checkpoint.restore, life.directory, criu)
            time.sleep(moment_s)
            life.kill()
            try:
                restored = restoring.result()
            except CriuError:
                self.score.restores_failed += 1
                return
        with restored:  # it was there before the kill, all of it
            self.score.after_all_was_read += 1
            self._checkpoint.before.assert_goes_on(restored)

    def _take_over(self, life: Life, readers: Readers) -> None:
        self.score.takeover_s.append(life.wait_ready())
        before = readers.tally()
        swept = since(before, readers.sweep(life.directory, self._truth))
        self.score.taken_over.add(swept)
        assert not swept.wrong, swept.wrong
        assert not swept.errors, swept.errors
        self._note_state(life)
        life.end()

    def _note_state(self, life: Life) -> None:
        state = Mount.state_of(life.directory)
        assert state["failed"] is None
        assert state["failed_reads"] == 0
        self.score.from_cache += state["chunks_from_cache"]
        self.score.cache_refused += state["cache_refused"]

    def _account(self, blob: "Blob", sent_before: int, log: Path) -> None:
        self.score.layer_bytes += blob.size_bytes
        self.score.fetched_bytes += self._weather.sent_bytes[blob.digest] - sent_before
        alarms = [line for line in log.read_text().splitlines() if _is_alarm(line)]
        assert not alarms, alarms


@dataclass(frozen=True)
class Blob:
    """An image's layer, as its registry knows it."""

    digest: str
    size_bytes: int


def _is_alarm(line: str) -> bool:
    return any(word in line for word in _ALARMING)
