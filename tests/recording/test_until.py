"""Ends of recordings, as they are looked for."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.ground.errors import UsageError
from lazyfs.until import Check, Until, parse_until
from lazyfs.watcher import Link, process_began_s, start_watcher, wait_until

DOES_NOT_HANG_S = 20.0


def wait(check: Check) -> str:
    deadline_s = time.monotonic() + DOES_NOT_HANG_S
    while (why := check.poll()) is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    check.close()
    return why


def some_polls(check: Check) -> list[str | None]:
    found = []
    for _ in range(30):
        found.append(check.poll())
        time.sleep(0.005)
    check.close()
    return found


def free_port() -> int:
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        port: int = link.getsockname()[1]
    return port


@contextmanager
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def answering(*codes: int) -> Iterator[int]:
    """An HTTP server that answers so, one after the other; the last for ever."""
    left = list(codes)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(left.pop(0) if len(left) > 1 else left[0])
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_seconds_pass() -> None:
    assert wait(parse_until("0.05").begin()) == "0.05 s passed"
    assert some_polls(parse_until("600").begin()) == [None] * 30


def test_a_port_takes_a_connection() -> None:
    with listening() as port:
        for text in (f"port:{port}", f"port:127.0.0.1:{port}"):
            assert wait(parse_until(text).begin()) == f"port {port} answered"


def test_a_port_that_nobody_listens_on_is_looked_at_again_and_again() -> None:
    port = free_port()
    check = parse_until(f"port:127.0.0.1:{port}").begin()
    assert check.poll() is None
    time.sleep(0.1)
    with socket.create_server(("127.0.0.1", port)):
        assert wait(check) == f"port {port} answered"


def test_a_host_that_is_not_known_is_no_error() -> None:
    assert some_polls(parse_until("port:[::1]:1").begin()) == [None] * 30


@pytest.mark.parametrize("form", ["port:localhost:{}", "http://localhost:{}/"])
def test_any_address_of_a_host_will_do(form: str) -> None:
    """Whatever listens on 127.0.0.1 alone is at `localhost`, though ::1 comes first there."""

    def lookup(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        assert host == "localhost"
        tcp = socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
        return [
            (socket.AF_INET6, *tcp, ("::1", port)),
            (socket.AF_INET, *tcp, ("127.0.0.2", port)),
            (socket.AF_INET, *tcp, ("127.0.0.1", port)),
        ]

    with answering(503, 200) as port:
        assert wait(parse_until(form.format(port)).begin(lookup)).startswith(f"port {port} ")


def test_who_knows_the_addresses_is_not_waited_for() -> None:
    """Whoever looks has a restore to keep meanwhile."""
    asked, may_answer = threading.Event(), threading.Event()

    def lookup(*_: object, **__: object) -> list[tuple[object, ...]]:
        asked.set()
        assert may_answer.wait(DOES_NOT_HANG_S)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]

    with listening() as port:
        check = parse_until(f"port:far.example:{port}").begin(lookup)
        assert check.poll() is None
        assert asked.wait(DOES_NOT_HANG_S)
        assert check.poll() is None
        may_answer.set()
        assert wait(check) == f"port {port} answered"


def test_a_server_answers_well() -> None:
    with answering(503, 404, 200) as port:
        why = wait(parse_until(f"http://127.0.0.1:{port}/health?a=1").begin())
    assert why == f"port {port} answered over HTTP"


def test_one_that_only_takes_connections_has_not_answered() -> None:
    with listening() as port:
        assert some_polls(parse_until(f"http://127.0.0.1:{port}/").begin()) == [None] * 30


def test_a_command_succeeds_when_it_does(tmp_path: Path) -> None:
    check = parse_until(f"exec:test -e '{tmp_path}/a file'").begin()
    assert check.poll() is None
    time.sleep(0.1)
    (tmp_path / "a file").touch()
    assert wait(check) == "test succeeded"


def test_a_command_that_cannot_be_run_any_more_is_tried_again(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.symlink_to("/bin/true")
    check = parse_until(f"exec:{program}").begin()
    program.unlink()
    assert some_polls(check) == [None] * 30
    program.symlink_to("/bin/true")
    assert wait(check) == "program succeeded"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("no-such-program --at-all", "no-such-program is not on the PATH"),
        ("/no/such/program -x", "/no/such/program is not there"),
        ("./no-such-program", "./no-such-program is not there"),
        ("/etc/passwd", "/etc/passwd cannot be executed"),
        ("/etc", "/etc cannot be executed"),
    ],
)
def test_a_command_that_is_not_there_is_not_waited_for(command: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"the program {why}"):
        parse_until(f"exec:{command}")


def test_a_command_that_still_runs_is_ended_with_the_recording(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"echo $$ > {pid_file}; sleep 100 & wait"
    check = parse_until(f"exec:sh -c '{script}'").begin()
    deadline_s = time.monotonic() + DOES_NOT_HANG_S
    while not (pid_file.exists() and pid_file.read_text().strip()):
        assert check.poll() is None
        assert time.monotonic() < deadline_s
    check.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_a_command_gets_none_of_our_descriptors() -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    code = f"import os, sys; sys.exit(os.path.exists('/proc/self/fd/{writing}'))"
    assert wait(Until(f'exec:{sys.executable} -c "{code}"').begin())
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "0",
        "-1",
        "nan",
        "inf",
        "1e9",
        "port:",
        "port:0",
        "port:65536",
        "port:a:b",
        "port:a..b:80",
        f"port:{'a' * 64}:80",
        f"port:{'1' * 5000}",
        f"http://{'a' * 64}/",
        "exec:",
        "exec:'",
        "exec:no-such-program --at-all",
        "http:",
        "http://",
        "http://a b/",
        "http://a:0/",
        "http://a:x/",
    ],
)
def test_what_is_no_end_is_told(text: str) -> None:
    with pytest.raises(UsageError, match="--until"):
        parse_until(text)


@given(st.text())
def test_any_text_is_an_end_or_an_error_of_the_user(text: str) -> None:
    with suppress(UsageError):
        assert parse_until(text).text == text


def test_a_watcher_tells_the_daemon_and_goes() -> None:
    theirs = start_watcher(parse_until("0.01"))
    with theirs, theirs.makefile("rwb") as daemon:
        daemon.write(b'{"ready": true}\n')
        daemon.flush()
        said = daemon.readline()
        assert b'"end": "0.01 s passed"' in said
        daemon.write(b'{"error": null}\n')
        daemon.flush()
        assert daemon.readline() == b""


def test_a_watcher_of_a_mount_that_never_was_goes() -> None:
    theirs = start_watcher(parse_until("0.01"))
    theirs.shutdown(socket.SHUT_WR)
    assert theirs.recv(100) == b""
    theirs.close()


def test_what_does_not_come_is_given_up() -> None:
    link, theirs = Link.pair()
    why = wait_until(parse_until("exec:false"), link, given_up_after_s=0.1)
    assert why is not None
    assert why.startswith("given up: not within ")
    theirs.close()
    assert wait_until(parse_until("600"), link) is None
    link.close()


def test_seconds_that_were_asked_for_pass_however_many_they_are() -> None:
    link, theirs = Link.pair()
    with theirs:
        why = wait_until(parse_until("0.3"), link, given_up_after_s=0.05)
    assert why == "0.3 s passed"
    link.close()


def test_a_command_fails_for_a_watcher_whose_caller_does_not_look_at_children() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        theirs = start_watcher(parse_until("exec:false"))
    finally:
        signal.signal(signal.SIGCHLD, before)
    with theirs, theirs.makefile("rwb") as daemon:
        theirs.sendall(b'{"ready": true}\n')
        with pytest.raises(TimeoutError):
            theirs.settimeout(1.0)
            daemon.readline()


def test_a_link_says_the_end_once_and_hears_what_was_written() -> None:
    link, theirs = Link.pair()
    theirs.sendall(b'{"ready": true}\n{"file": "f", "error": null}\n')
    link.mark("restored", 5.0)
    assert link.end("2 s", [("criu: fork", 1.0, 2.0)], 6.0) == {"file": "f", "error": None}
    assert link.end("again") == {}
    with theirs.makefile("rb") as said:
        link.close()
        assert [*said] == [
            b'{"mark": "restored", "at_s": 5.0}\n',
            b'{"end": "2 s", "at_s": 6.0, "phases": [["criu: fork", 1.0, 2.0]]}\n',
        ]
    theirs.close()


def test_a_daemon_that_is_gone_has_written_nothing() -> None:
    link, theirs = Link.pair()
    theirs.close()
    assert "has gone" in link.end("2 s")["error"]
    link.close()


def test_a_process_knows_when_it_began() -> None:
    now_s = time.monotonic()
    assert now_s - 24 * 3600 < process_began_s() <= now_s + 0.1
