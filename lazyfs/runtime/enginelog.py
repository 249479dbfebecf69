"""What went wrong, said where the engine looks for it: in the runtime's log.

Podman reads the file that it gives as `--log` when the runtime has failed, and takes it only if all
of it is one JSON object (`libpod/oci_conmon_common.go:readConmonPipeData`); else, as CRI-O does,
what conmon saw on standard error. containerd takes the last line of level error
(`pkg/process/utils.go:getLastRuntimeError`). So after a failure what the runtime has written in
this call becomes one line, which has its last error in it, too.

Podman looks for words in the message: "permission denied" and the like make it another error
(`libpod/oci_util.go:getOCIRuntimeError`), with the same text.

Shape of a line: runc's (logrus, JSONFormatter and TextFormatter without a terminal); crun writes
the same keys.
"""

import contextlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import msgspec

_READ_MOST_BYTES = 1 << 20
_MESSAGE_MOST = 4000


class EngineLog(msgspec.Struct, frozen=True):
    """The runtime's log file, as it was before the call."""

    path: Path | None
    """None: there is none, or none that is a file (crun: `journald:ID`, `syslog:ID`)."""
    is_json: bool
    begin_bytes: int

    def last_error(self) -> str | None:
        """Return the last error that the runtime has logged in this call."""
        for line in reversed(self._added()):
            message = _message_of(line, is_json=self.is_json)
            if message is not None:
                return message
        return None

    def replace(self, message: str) -> None:
        """Make an error the only thing that was logged in this call. Errors are swallowed."""
        if self.path is None:
            return
        line = error_line(message, is_json=self.is_json)
        with contextlib.suppress(OSError), open(self.path, "ab") as file:
            with contextlib.suppress(OSError):
                if self.is_json and os.fstat(file.fileno()).st_size >= self.begin_bytes:
                    file.truncate(self.begin_bytes)
            file.write(line)

    def _added(self) -> list[bytes]:
        if self.path is None:
            return []
        try:
            with open(self.path, "rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self.begin_bytes, end - _READ_MOST_BYTES))
                return file.read(_READ_MOST_BYTES).splitlines()
        except OSError:
            return []


def open_engine_log(log: str | None, log_format: str) -> EngineLog:
    """Look at the log that the engine has named; crun's may begin with `file:`."""
    path = None
    if log:
        scheme, colon, rest = log.partition(":")
        if colon and scheme == "file":
            path = Path(rest)
        elif not (colon and scheme in ("journald", "syslog")):
            path = Path(log)
    begin_bytes = 0
    if path is not None:
        with contextlib.suppress(OSError):
            if not path.is_file():
                path = None if path.exists() else path
            else:
                begin_bytes = path.stat().st_size
    return EngineLog(path, log_format == "json", begin_bytes)


def error_line(message: str, *, is_json: bool) -> bytes:
    """Return an error as runc would log it, in one line."""
    message = " ".join(message.split())[:_MESSAGE_MOST]
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    if is_json:
        words = {"level": "error", "msg": message, "time": now}
        return json.dumps(words, separators=(",", ":")).encode() + b"\n"
    quoted = json.dumps(message, ensure_ascii=False)
    return f'time="{now}" level=error msg={quoted}\n'.encode(errors="backslashreplace")


def _message_of(line: bytes, *, is_json: bool) -> str | None:
    """Return the message of an error's line; None if it is none."""
    text = line.decode(errors="replace")
    if is_json:
        with contextlib.suppress(ValueError, RecursionError):
            words = json.loads(text)
            if isinstance(words, dict) and words.get("level") in ("error", "fatal"):
                return str(words.get("msg", "")).strip()[:_MESSAGE_MOST] or None
        return None
    _, found, message = text.partition("level=error msg=")
    if not found:
        return None
    with contextlib.suppress(ValueError, RecursionError):
        message = str(json.loads(message))
    return message.strip()[:_MESSAGE_MOST] or None
