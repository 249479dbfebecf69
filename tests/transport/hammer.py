"""Daemons that all want one server at once: run as a program by test_slots.py.

    python -m tests.transport.hammer URL SIZE DIRECTORY PROCESSES FETCHES SHARED

Prints a line for each process: how many seconds it took, and how many requests it made.
"""

import os
import random
import sys
import time

import trio

from lazyfs.ground.counters import Counters
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.answers import Question
from lazyfs.transport.client import HttpClient
from lazyfs.transport.httpblob import HttpBlob
from lazyfs.transport.retry import Fetcher
from tests.transport.gather import Gather

WANTED_BYTES = 1000


def body(size: int) -> bytes:
    """Return what the server serves."""
    return bytes(n % 251 for n in range(size))


async def hammer(url: str, size: int, fetches: int, settings: TransportSettings) -> int:
    """Fetch ranges at random, all at once, half of them urgently; return the requests it took."""
    fetcher = Fetcher(settings, Counters())
    client = HttpClient(settings)
    blob = HttpBlob(client, url, question=Question("blob", "host", ""), size_bytes=size)
    limiters = trio.CapacityLimiter(8), trio.CapacityLimiter(8)
    expected = body(size)

    async def one(number: int) -> None:
        start = random.randrange(size - WANTED_BYTES)
        wanted = ByteRange(start, start + WANTED_BYTES)
        limiter, urgent = limiters[number % 2], number % 2 == 0
        sink = Gather()
        await fetcher.fetch(blob, wanted, sink, limiter=limiter, urgent=urgent)
        assert sink.data == expected[wanted.start : wanted.stop]

    async with trio.open_nursery() as nursery:
        for number in range(fetches):
            nursery.start_soon(one, number)
    fetcher.close()
    client.close()
    return fetcher.counters.requests


def main() -> None:
    url, size, directory, processes, fetches, shared = sys.argv[1:]
    settings = TransportSettings(run_directory=directory, shared_connections=int(shared))
    began_s = time.monotonic()
    children = []
    for _ in range(int(processes)):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            requests = trio.run(hammer, url, int(size), int(fetches), settings)
            os.write(writing, f"{time.monotonic() - began_s} {requests}".encode())
            os._exit(0)
        os.close(writing)
        children.append((child, reading))
    for child, reading in children:
        print(os.read(reading, 100).decode())
        assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    main()
