"""A runtime that reads an images directory as CRIU does, and starts a process for a container.

Run as a program; $FAKE_STATE is where it notes what it does, $FAKE_MODE how it behaves:

    (none)   reads all, asks CRIU's action script, starts the container
    careless does not look at errors of reading, and asks nobody
    asking   does not look at errors of reading, but asks
    failing  fails, with a line in its log
    hanging  reads, starts the container, tells nobody, and hangs
    dying    ends by SIGTERM, its own
    waiting  waits for a signal, and ends by it

It knows one container, as long as its process lives, whatever it is called.
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


def start() -> int:
    """Start what sleeps for a container; return its pid.

    As a task that CRIU restores it has the images directory open, as its parent has, until it is
    let go.
    """
    waiting, letting_go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(letting_go)
        if not os.read(waiting, 1):
            signal.pause()  # nobody will ever let it go
        os.closerange(3, 4096)
        os.execvp("sleep", ["sleep", "600"])
    os.close(waiting)
    note("container", str(pid))
    os.write(letting_go, b"x")
    os.close(letting_go)
    return pid


def is_known() -> bool:
    with contextlib.suppress(OSError, ValueError):
        text = Path(f"/proc/{int((state / 'container').read_text())}/stat").read_text()
        return text.rpartition(")")[2].split()[0] != "Z"
    return False


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
    if is_known():
        print("container with given ID already exists", file=sys.stderr)
        return 1
    note("sums", json.dumps(read(images)))
    if not may_run():
        return 1
    pid = start()
    if mode == "hanging":
        os.set_inheritable(descriptor, True)
        subprocess.Popen(["sleep", "600"], close_fds=False, start_new_session=True)
        note("hangs", "")
        time.sleep(600)
    os.close(descriptor)
    if "--pid-file" in words:
        Path(value_of("--pid-file")).write_text(str(pid))
    if "--detach" in words:
        return 0
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


with open(state / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\n")
if "restore" in words:
    sys.exit(restore())
if "state" in words:
    sys.exit(not is_known())
if "delete" in words:
    with contextlib.suppress(OSError, ValueError):
        os.kill(int((state / "container").read_text()), signal.SIGKILL)
