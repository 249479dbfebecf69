"""Whose child an orphan becomes is found by making one."""

import ctypes
import os

from lazyfs.standby.adopter import adopter

_PR_SET_CHILD_SUBREAPER = 36


def test_whoever_asks_for_orphans_is_found() -> None:
    outside = adopter()
    assert outside not in (0, os.getpid())
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        os.write(writing, f"{adopter()}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reading, 20)) == child
    assert adopter() == outside
    os.close(reading)
    os.close(writing)
