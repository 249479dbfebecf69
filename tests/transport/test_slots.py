"""Connections are shared among daemons: bounded, fair, and given back by whoever dies."""

import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from lazyfs.transport.slots import Slot, Slots
from tests.transport.hammer import body


def take(slots: Slots, *, urgent: bool = False, most: int = 1000) -> list[Slot]:
    """Take all there are."""
    taken: list[Slot] = []
    while len(taken) < most and (slot := slots.take_at_once("host", urgent=urgent)) is not None:
        taken.append(slot)
    return taken


async def test_each_has_two_of_its_own_and_all_share_the_rest(tmp_path: Path) -> None:
    one, other = Slots(str(tmp_path / "run"), 9), Slots(str(tmp_path / "run"), 9)
    greedy = take(one)
    assert len(greedy) == 1 + 6, "its own, and two thirds of what is shared"
    assert len(take(other)) == 1, "its own is nobody else's"
    assert len(take(other, urgent=True)) == 1 + 3, "a third is for those who are waited for"
    assert len(take(one, urgent=True)) == 1
    greedy[-1].give_back()
    greedy[-1].give_back()
    assert len(take(other)) == 1
    one.close()
    assert len(take(other)) == 5, "what was closed is free"
    other.close()


async def test_hosts_do_not_share(tmp_path: Path) -> None:
    slots = Slots(str(tmp_path / "run"), 0)
    assert len(take(slots)) == 1
    assert slots.take_at_once("elsewhere", urgent=False) is not None
    slots.close()


async def test_a_slot_is_waited_for(tmp_path: Path) -> None:
    slots, others = Slots(str(tmp_path / "run"), 3), Slots(str(tmp_path / "run"), 3)
    theirs = take(others)
    (own,) = take(slots)
    got: list[str] = []

    async def wait(what: str) -> None:
        slot = await slots.take("host", urgent=False)
        got.append(what)
        slot.give_back()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "one")
        await trio.sleep(0.05)
        assert got == []
        own.give_back()
        with trio.fail_after(10):
            while got != ["one"]:  # noqa: ASYNC110
                await trio.sleep(0.005)
        take(slots)
        nursery.start_soon(wait, "two")
        await trio.sleep(0.02)
        theirs[-1].give_back()  # another daemon's: nobody tells us
    assert got == ["one", "two"]
    slots.close()
    others.close()


@pytest.mark.parametrize("mode", [0o755, 0o770])
async def test_a_directory_that_others_may_get_at_is_not_used(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    directory.chmod(mode)
    slots = Slots(str(directory), 0)
    assert len(take(slots, most=50)) == 50, "nothing is shared, nothing is limited"
    assert list(directory.iterdir()) == []


async def test_no_symlink_is_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(0o700)
    (tmp_path / "run").symlink_to(tmp_path / "theirs")
    assert len(take(Slots(str(tmp_path / "run"), 0), most=50)) == 50
    assert list((tmp_path / "theirs").iterdir()) == []


async def test_without_a_directory_nothing_is_shared() -> None:
    assert len(take(Slots(None, 0), most=50)) == 50


HOLDER = """
import sys, trio
from lazyfs.transport.slots import Slots
async def main():
    slots = Slots(sys.argv[1], 4)
    held = [slots.take_at_once("host", urgent=True) for _ in range(5)]
    assert None not in held
    print("held", flush=True)
    await trio.sleep(60)
trio.run(main)
"""


def test_who_is_killed_has_given_everything_back(tmp_path: Path) -> None:
    directory = str(tmp_path / "run")
    words = [sys.executable, "-c", HOLDER, directory]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        slots = Slots(directory, 4)
        assert len(take(slots, urgent=True)) == 1
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert len(take(slots, urgent=True)) == 4
    slots.close()


class CountingServer:
    """Answers ranges after a while, and counts how many requests are under way at once."""

    def __init__(self, body: bytes, answer_s: float) -> None:
        self._body = body
        self._answer_s = answer_s
        self._lock = threading.Lock()
        self._now = 0
        self.most = 0
        self.requests = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._main = threading.Thread(target=self._accept)
        self._main.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in [self._main, *self._threads]:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            try:
                while (first := lines.readline()).startswith(b"GET"):
                    wanted = b""
                    while (line := lines.readline().strip()) != b"":
                        if line.lower().startswith(b"range:"):
                            wanted = line.partition(b"=")[2]
                    self._answer(connection, wanted)
                assert first == b""
            except OSError:
                pass

    def _answer(self, connection: socket.socket, wanted: bytes) -> None:
        with self._lock:
            self._now += 1
            self.requests += 1
            self.most = max(self.most, self._now)
        time.sleep(self._answer_s)
        start, last = map(int, wanted.split(b"-"))
        body = self._body[start : last + 1]
        head = (
            "HTTP/1.1 206 Partial Content\r\n"
            f"Content-Range: bytes {start}-{last}/{len(self._body)}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with self._lock:
            self._now -= 1  # before the client can know of it
        connection.sendall(head.encode() + body)


@contextmanager
def counting(body: bytes, answer_s: float) -> Iterator[CountingServer]:
    server = CountingServer(body, answer_s)
    try:
        yield server
    finally:
        server.close()


def test_thirty_daemons_share_one_server_and_none_starves(tmp_path: Path) -> None:
    size, processes, fetches, shared = 100_000, 30, 16, 12
    with counting(body(size), 0.25) as server:
        url = f"http://127.0.0.1:{server.port}/f"
        numbers = [str(number) for number in (processes, fetches, shared)]
        words = [sys.executable, "-m", "tests.transport.hammer", url, str(size)]
        words += [str(tmp_path / "run"), *numbers]
        root = Path(__file__).parents[2]
        done = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=root)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        seconds = [float(line[0]) for line in lines]
        assert len(seconds) == processes
        assert server.requests == sum(int(line[1]) for line in lines) >= processes * fetches
        assert server.most <= 2 * processes + shared
        assert server.most > shared, "it was a crowd"
        assert max(seconds) < 4 * statistics.median(seconds)
