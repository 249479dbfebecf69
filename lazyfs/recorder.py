"""The recording of one mount: a journal from its first moment, and a trace at its end.

It ends when whoever watches for `--until` says so (`until.py`), or with the mount; what has been
noted by then is written, whatever has become of the restore. The file is there whole or not at all.

While it lasts lazy pages come precisely (`is_on`), so that the trace shows what was wanted and not
what lay beside it.
"""

import json
import logging
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import trio
from msgspec.structs import replace

from lazyfs.checkpoint.desk import OpenConfig
from lazyfs.checkpoint.opened import OpenedCheckpoint
from lazyfs.checkpoint.trace import Phase, Trace, dump_trace
from lazyfs.ground.counters import Counters
from lazyfs.ground.journal import Journal
from lazyfs.recording import About, Layout, layout_of, trace_of
from lazyfs.trace_file import RecordConfig, write_whole

log = logging.getLogger(__name__)

_LINE_MOST_BYTES = 1 << 20
_PHASES_MOST = 1000


class Recorder:
    """One recording."""

    def __init__(self, config: RecordConfig) -> None:
        """Begin to note."""
        self.journal = Journal(is_precise=config.is_precise)
        self.journal.mark("began", config.began_s)
        self.journal.mark("opening", time.monotonic())
        self._config = config
        self._link = socket.socket(fileno=config.link) if config.link is not None else None
        self._checkpoint: OpenedCheckpoint | None = None
        self.on_end: Callable[[], None] = _nobody
        """Called when it ends, however that comes."""
        self._figures: Callable[[], Mapping[str, Any]] = dict
        self._is_on = True
        self._is_mounted = False
        self._workload = ""
        self._phases: list[Phase] = []
        self._written: dict[str, Any] = {}

    @property
    def is_precise(self) -> bool:
        """Whether only what is wanted is to be brought while it lasts."""
        return self._config.is_precise

    @property
    def is_on(self) -> bool:
        """Whether it goes on."""
        return self._is_on

    def opening(self, config: OpenConfig) -> OpenConfig:
        """Return how to open what is recorded: what an earlier trace says is not fetched ahead."""
        self._workload = config.workload
        if not self.is_precise:
            return config
        return replace(config, trace="off", given_trace=None)

    def counters(self, config: OpenConfig) -> Counters:
        """Return the mount's counters, with the journal in them."""
        counters = config.ahead.counters if config.ahead is not None else Counters()
        counters.journal = self.journal
        return counters

    def opened(
        self, checkpoint: OpenedCheckpoint, figures: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Take note of what is recorded, and where figures are to be had at the end."""
        self._checkpoint, self._figures = checkpoint, figures
        self.journal.mark("opened", time.monotonic())

    async def mounted(self) -> None:
        """Take note that the mount answers, and hear of the end; for ever."""
        self.journal.mark("mounted", time.monotonic())
        self._is_mounted = True
        if self._link is None:
            return
        self._link.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(self._link))
        try:
            await stream.send_all(b'{"ready": true}\n')
            await self._hear(stream)
        except (OSError, trio.BrokenResourceError, ValueError, TypeError, KeyError) as error:
            log.warning("the end of the recording is not told: %r; it is the mount's", error)

    async def finish(self, why: str, at_s: float | None = None) -> dict[str, Any]:
        """Write the trace, unless that has been done; return what was written. Does not raise."""
        checkpoint = self._checkpoint
        if not self._is_on or not self._is_mounted or checkpoint is None:
            return self._written
        self._is_on = False
        self.on_end()
        if not self.journal.reads:
            self.journal.end()
            self.journal.forget()
            self._written = {"error": f"nothing was read: {self._config.file} is not written"}
            log.info("%s", self._written["error"])
            return self._written
        at_s = at_s if at_s is not None else time.monotonic()
        self.journal.mark("until", at_s)
        self.journal.end()
        config = self._config
        with trio.CancelScope(shield=True):
            try:
                about = About(
                    workload=self._workload,
                    until=why,
                    reference=checkpoint.reference,
                    way=config.way,
                    is_partial=not config.is_precise,
                    began_s=config.began_s,
                    ended_s=at_s,
                    phases=self._phases,
                    figures=self._figures(),
                )
                job = partial(_write, self.journal, layout_of(checkpoint), about, config.file)
                trace = await trio.to_thread.run_sync(job)
            except OSError as error:
                why = error.strerror or str(error)
                self._written = {"error": f"the trace {config.file} cannot be written: {why}"}
            except Exception as error:  # a bug must not end the mount
                log.exception("there is no trace: please report this")
                self._written = {"error": f"a bug in lazyfs: {error!r}"}
            else:
                self._written = {
                    "file": str(config.file),
                    "until": about.until,
                    "needed_bytes": trace.needed_bytes,
                    "error": None,
                }
        self.journal.forget()
        if self._written["error"] is None:
            log.info("recorded what was needed (until %s): %s", about.until, config.file)
        else:
            log.error("%s", self._written["error"])
        return self._written

    async def _hear(self, stream: trio.SocketStream) -> None:
        heard = b""
        async for piece in stream:
            *lines, heard = (heard + piece).split(b"\n")
            if len(heard) > _LINE_MOST_BYTES:
                raise ValueError("a line without an end")
            for line in lines:
                told = json.loads(line)
                if "mark" in told:
                    self._mark(str(told["mark"]), float(told["at_s"]))
                    continue
                self._phases = [self._phase(*each) for each in told["phases"][:_PHASES_MOST]]
                written = await self.finish(str(told["end"]), float(told["at_s"]))
                await stream.send_all(json.dumps(written).encode() + b"\n")

    def _mark(self, name: str, at_s: float) -> None:
        """Note a moment, unless it is known already: lazy pages hear first that tasks may run."""
        if all(name != known for known, _ in self.journal.marks):
            self.journal.mark(name, at_s)

    def _phase(self, name: str, began_s: float, ended_s: float) -> Phase:
        began_ms, ended_ms = (
            max(0.0, round((at_s - self._config.began_s) * 1000, 3)) for at_s in (began_s, ended_s)
        )
        return Phase(name, began_ms, max(began_ms, ended_ms))


def _nobody() -> None:
    pass


def _write(journal: Journal, layout: Layout, about: About, file: Path) -> Trace:
    trace = trace_of(journal, layout, about)
    write_whole(file, dump_trace(trace))
    return trace
