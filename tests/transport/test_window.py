"""What may be on its way to a connection follows what the thread that receives has wished."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.lease import Attempt, Lease
from lazyfs.transport.place import place_of
from lazyfs.transport.window import NARROW_BYTES, Window, allow_on_the_way
from tests.blobs import MemoryBlob
from tests.transport.gather import Gather


class Modest(Gather):
    """A sink that wants little on its way."""

    def begin(self) -> None:
        allow_on_the_way(NARROW_BYTES)


@contextmanager
def connected() -> Iterator[socket.socket]:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as near,
        server.accept()[0],
    ):
        yield near


@pytest.fixture(autouse=True)
def no_wish() -> Iterator[None]:
    yield
    allow_on_the_way(None)


def clamp(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP)


def test_it_is_narrow_while_that_is_wished() -> None:
    with connected() as sock:
        window = Window(sock)
        before = clamp(sock)
        window.follow_wish()
        assert clamp(sock) == before
        allow_on_the_way(NARROW_BYTES)
        window.follow_wish()
        assert clamp(sock) == NARROW_BYTES
        allow_on_the_way(None)
        window.follow_wish()
        assert clamp(sock) > NARROW_BYTES


def test_the_next_response_on_a_connection_is_not_narrow_because_of_the_last() -> None:
    with connected() as sock:
        allow_on_the_way(NARROW_BYTES)
        Window(sock).follow_wish()
        allow_on_the_way(None)
        Window(sock).follow_wish()
        assert clamp(sock) > NARROW_BYTES


def test_a_wish_is_that_of_one_thread() -> None:
    with connected() as sock:
        before = clamp(sock)
        allow_on_the_way(NARROW_BYTES)
        other = threading.Thread(target=Window(sock).follow_wish)
        other.start()
        other.join()
        assert clamp(sock) == before


def test_what_knows_no_window_is_left_alone() -> None:
    left, right = socket.socketpair()
    with left, right:
        allow_on_the_way(NARROW_BYTES)
        Window(left).follow_wish()
    Window(left).follow_wish()


def test_each_attempt_of_a_thread_is_received_as_its_own_sink_wishes() -> None:
    blob = MemoryBlob(b"bytes")
    clamps: list[int] = []
    with connected() as sock:

        def look(wanted: ByteRange) -> None:
            Window(sock).follow_wish()
            clamps.append(clamp(sock))

        blob.before = look
        for sink in (Modest(), Gather(), Modest()):
            attempt = Attempt(Lease(sink, ByteRange(0, 5)), place_of(blob), 1)
            attempt.run()
            assert attempt.error is None
            assert sink.data == b"bytes"
    assert clamps[0] == clamps[2] == NARROW_BYTES < clamps[1]
