"""What daemons say, which may be other users': whatever it is, who asks gets an answer."""

import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from lazyfs import asking


@pytest.mark.parametrize(
    ("said", "is_told"),
    [
        (json.dumps({"pid": [], "reference": {}, "directory": 7}), True),
        ("[" * 200_000, False),
        ("[]", False),
        ("\\ud800", False),
        ('{"directory": "\\ud800"}', True),
    ],
)
def test_anything_may_be_said(
    said: str, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYFS_RUN_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    path = tmp_path / f"pid-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def answer() -> None:
            with suppress(OSError):
                while True:
                    link, _ = listening.accept()
                    with link:
                        link.recv(65536)
                        link.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + said.encode())

        thread = threading.Thread(target=answer)
        thread.start()
        known = [each for each in asking.known_mounts() if each.told]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert [each.state for each in known if each.told.get("pid") in ([], None)] == (
        ["detached"] if is_told else []
    )


def test_who_says_nothing_hides_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither's process is known; that they are the same one is not."""
    silent = asking.Known("/a", "", "silent", {})
    detached = asking.Known("/b", "", "detached", {"directory": "/b"})
    monkeypatch.setattr(asking, "_ask_all", lambda candidates: [silent, detached])
    assert asking.known_mounts() == [silent, detached]
