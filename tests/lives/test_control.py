"""The small HTTP server: whatever a client says, it gets an answer or is let go."""

import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.address import Address, parse_address
from lazyfs.control import Answer, Route, Server, as_json, listen
from lazyfs.ground.errors import LazyfsError, UsageError

HANDLERS = {
    Route("GET", "/status"): lambda: as_json({"state": "serving"}),
    Route("POST", "/complete"): lambda: as_json({}, 202),
}


@asynccontextmanager
async def serving(only_user: int | None = None) -> AsyncIterator[str]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")  # an abstract name of the kernel's choice
        listening.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server(HANDLERS, only_user=only_user).serve, listening)
            yield listening.getsockname()
            nursery.cancel_scope.cancel()


async def say(address: str, words: bytes) -> bytes:
    heard = b""
    with trio.socket.socket(trio.socket.AF_UNIX) as link:
        await link.connect(address)
        with suppress(OSError, trio.BrokenResourceError):
            stream = trio.SocketStream(link)
            await stream.send_all(words)
            await stream.send_eof()
            while piece := await stream.receive_some():
                heard += piece
    return heard


@pytest.mark.parametrize(
    ("words", "code", "body"),
    [
        (b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n", 200, b'{"state": "serving"}\n'),
        (b"GET /status?x=1 HTTP/1.0\r\n\r\n", 200, b'{"state": "serving"}\n'),
        (b"HEAD /status HTTP/1.1\r\nHost: x\r\n\r\n", 200, b""),
        (b"POST /complete HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 202, b"{}\n"),
        (
            b"POST /status HTTP/1.1\r\nHost: x\r\n\r\n",
            405,
            b'{"error": "another method, please"}\n',
        ),
        (
            b"GET /etc HTTP/1.1\r\nHost: x\r\n\r\n",
            404,
            b'{"error": "there is no such thing here"}\n',
        ),
    ],
)
async def test_what_is_answered(words: bytes, code: int, body: bytes) -> None:
    async with serving() as address:
        head, _, said = (await say(address, words)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % code)
        assert said == body


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (b"\0\0\0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000, 431),
        (
            b"POST /complete HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
            + b"x" * 70_000,
            413,
        ),
    ],
)
async def test_what_is_refused(words: bytes, code: int) -> None:
    async with serving() as address:
        heard = await say(address, words)
        assert heard == b"" or heard.startswith(b"HTTP/1.1 %d " % code)
        assert b"200" in await say(address, b"GET /status HTTP/1.0\r\n\r\n")


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=300) | st.sampled_from([b"GET ", b"\r\n", b"HTTP/1.1"])))
def test_nonsense_ends_no_server(pieces: list[bytes]) -> None:
    async def main() -> None:
        async with serving() as address:
            await say(address, b"".join(pieces))
            assert b"200" in await say(address, b"GET /status HTTP/1.0\r\n\r\n")

    trio.run(main)


async def test_strangers_are_not_heard() -> None:
    """Root is heard by everybody, so as root this is tried as another."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    ask = (
        "import os, socket, sys; os.setuid(65534); link = socket.socket(socket.AF_UNIX);"
        r"link.connect('\0' + sys.argv[1]); print(link.recv(100))"
    )
    async with serving(only_user=0) as address:
        name = os.fsdecode(address).removeprefix("\0")
        done = await trio.run_process(["/usr/bin/python3", "-c", ask, name], capture_stdout=True)
        assert done.stdout == b"b''\n"
        assert b"200" in await say(address, b"GET /status HTTP/1.0\r\n\r\n")


async def test_where_it_can_listen(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for _ in range(2):  # the second finds what the first left behind
        (listening,) = await listen(Address(path=path))
        assert path.lstat().st_mode & 0o777 == 0o600
        listening.close()
    for listening in await listen(Address("127.0.0.1", 0)):
        address = Address(*listening.getsockname())
        with pytest.raises(
            LazyfsError, match=f"cannot listen on {address}: Address already in use"
        ):
            await listen(address)
        listening.close()
    with socket.socket(socket.AF_UNIX) as stuck, ExitStack() as waiting:
        path.unlink()
        stuck.bind(str(path))
        stuck.listen(0)
        with suppress(BlockingIOError):
            while True:
                link = waiting.enter_context(socket.socket(socket.AF_UNIX))
                link.setblocking(False)
                link.connect(str(path))
        with pytest.raises(LazyfsError, match="Address already in use"):
            await listen(Address(path=path))
    taken = tmp_path / "file"
    taken.write_text("mine")
    with pytest.raises(LazyfsError, match="cannot listen on unix:"):
        await listen(Address(path=taken))
    assert taken.read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9100", Address("127.0.0.1", 9100)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:9100", Address("::1", 9100)),
        ("unix:/run/x", Address(path=Path("/run/x"))),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", "9100", ":9100", "x:", "x:y", "x:70000", "::1:9", "unix:", "x:²"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="is no address to listen on"):
        parse_address(text)


def test_an_answer_in_json() -> None:
    assert as_json([1]) == Answer(b"[1]\n", "application/json", 200)
