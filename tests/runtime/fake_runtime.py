"""A runtime that reads an images directory as CRIU does, and starts a process for a container.

Run as a program; $FAKE_STATE is where it notes what it does, $FAKE_MODE how it behaves:

    (none)   reads all, asks CRIU's action script, starts the container
    careless does not look at errors of reading, and asks nobody
    asking   does not look at errors of reading, but asks
    failing  fails, with a line in its log
    hanging  reads, starts the container, tells nobody, and hangs
    dying    ends by SIGTERM, its own
    waiting  waits for a signal, and ends by it
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

state = Path(os.environ["FAKE_STATE"])
mode = os.environ.get("FAKE_MODE", "")
words = sys.argv[1:]


def value_of(option: str) -> str:
    return words[words.index(option) + 1]


def note(name: str, text: str) -> None:
    partial = state / f"{name}.partial"
    partial.write_text(text)
    partial.rename(state / name)


def read(images: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(images.rglob("*.img")):
        try:
            sums[str(path.relative_to(images))] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            if mode not in ("careless", "asking"):
                sys.exit(f"{path}: {error}")
            sums[str(path.relative_to(images))] = f"{error.errno}"
    return sums


def may_run() -> bool:
    """CRIU, `criu/action-scripts.c`."""
    if mode == "careless" or "CRIU_CONFIG_FILE" not in os.environ:
        return True
    config = Path(os.environ["CRIU_CONFIG_FILE"]).read_text()
    (script,) = [line.split('"')[1] for line in config.splitlines() if "action-script" in line]
    more = {"CRTOOLS_SCRIPT_ACTION": "post-restore", "CRTOOLS_INIT_PID": "1"}
    return subprocess.run([script], env={**os.environ, **more}, check=False).returncode == 0


def start() -> "subprocess.Popen[bytes]":
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        ["sleep", "600"], stdin=null, stdout=null, stderr=null, start_new_session=True
    )
    note("container", str(process.pid))
    return process


def restore() -> int:
    images = Path(value_of("--image-path"))
    note("images", str(images))
    descriptor = os.open(images, os.O_RDONLY)  # as CRIU has it while it restores
    if mode == "failing":
        with open(value_of("--log"), "a") as file:
            file.write('{"level":"warning","msg":"odd"}\n{"level":"error","msg":"no such luck"}\n')
        return 7
    if mode == "dying":
        os.kill(os.getpid(), signal.SIGTERM)
    if mode == "waiting":
        note("waits", "")
        signal.pause()
    note("sums", json.dumps(read(images)))
    if not may_run():
        return 1
    process = start()
    if mode == "hanging":
        os.set_inheritable(descriptor, True)
        subprocess.Popen(["sleep", "600"], close_fds=False, start_new_session=True)
        note("hangs", "")
        time.sleep(600)
    os.close(descriptor)
    if "--pid-file" in words:
        Path(value_of("--pid-file")).write_text(str(process.pid))
    if "--detach" in words:
        return 0
    code = process.wait()
    return code if code >= 0 else 128 - code


with open(state / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\n")
if "restore" in words:
    sys.exit(restore())
if "delete" in words:
    with contextlib.suppress(OSError, ValueError):
        os.kill(int((state / "container").read_text()), signal.SIGKILL)
