"""Small parts of HTTP: headers and URLs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.ground.errors import SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.answers import (
    Question,
    parse_content_range,
    range_header,
    refusal,
    retry_after_s,
    warnings_in,
)
from lazyfs.transport.urls import Origin, is_loopback, origin_of, redirect_target, shown


def test_ranges_are_half_open_here_and_closed_there() -> None:
    assert range_header(ByteRange(0, 1)) == "bytes=0-0"
    found = parse_content_range("bytes 0-0/10")
    assert found is not None
    assert (found.byte_range, found.total_bytes) == (ByteRange(0, 1), 10)
    unknown = parse_content_range("Bytes 5-9/*")
    assert unknown is not None
    assert (unknown.byte_range, unknown.total_bytes) == (ByteRange(5, 10), None)


@pytest.mark.parametrize(
    "text", [None, "", "bytes 5-4/10", "bytes 0-10/10", "bytes */10", "items 0-1/2", "bytes 0-1"]
)
def test_content_ranges_that_make_no_sense(text: str | None) -> None:
    assert parse_content_range(text) is None


@given(st.text())
def test_any_header_is_read_without_an_error(text: str) -> None:
    parse_content_range(text)
    wait_s = retry_after_s(text)
    assert wait_s is None or 0 <= wait_s <= 3600


def test_retry_after() -> None:
    assert retry_after_s("7") == 7
    assert retry_after_s("99999999") == 3600
    assert retry_after_s("Thu, 01 Jan 1970 00:01:40 GMT", now_s=40) == 60
    assert retry_after_s("Thu, 01 Jan 1970 00:01:40 GMT", now_s=200) == 0
    for text in (None, "", "soon", "-1", "1e3"):
        assert retry_after_s(text) is None


@pytest.mark.parametrize(
    "authority", ["%31%36%39.254.169.254", "169.254.169.254\\.example", "a%2eexample", "a%00"]
)
def test_a_host_that_libraries_read_differently_is_refused(authority: str) -> None:
    """The first would be asked for by a proxy, and taken for a name of no meaning by us."""
    with pytest.raises(SourceError, match="names no host"):
        origin_of(f"http://{authority}/latest")
    assert origin_of("http://[fe80::1%25eth0]/").host == "fe80::1%25eth0"


def test_what_is_shown_of_a_url() -> None:
    assert shown("https://u:p@host:1/a/b?sig=x#y") == "https://host:1/a/b"
    assert shown("https://u:p@ss@host/a") == "https://host/a"
    assert "secret" not in shown("user:secret@host?secret")


@given(st.text())
def test_any_url_has_an_origin_or_is_refused(text: str) -> None:
    try:
        origin = origin_of(text)
    except SourceError:
        return
    assert origin.scheme in ("http", "https")


def test_origins() -> None:
    assert origin_of("HTTPS://Host/x") == Origin("https", "host", 443)
    assert str(origin_of("http://[::1]:5000/")) == "[::1]:5000"
    assert str(origin_of("http://host:80/")) == "host"


def test_loopback() -> None:
    for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"):
        assert is_loopback(host)
    for host in ("localhost.example", "10.0.0.1", "::2", "127.0.0.1.example", ""):
        assert not is_loopback(host)


def test_redirect_targets() -> None:
    assert redirect_target("https://a/b/c", "d?e#f") == "https://a/b/d?e"
    assert redirect_target("http://a/b", "//c/d") == "http://c/d"
    with pytest.raises(SourceError, match="plain http"):
        redirect_target("https://a/b", "http://a/b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, []),
        ("", []),
        ('299 - "Your token will expire."', ["Your token will expire."]),
        ('299 - "one", 299 - "say \\"two\\""', ["one", 'say "two"']),
        ('112 - "another code", 299 host "another agent", 299 - "ok"', ["ok"]),
        ('299 - "\x1b[31mred"', ["[31mred"]),
        ('299 - "never ends', []),
        ("299 - " + '"' * 100_000, [""]),
    ],
)
def test_warnings(text: str | None, expected: list[str]) -> None:
    assert warnings_in(text) == expected


@given(st.text(max_size=300))
def test_any_warning(text: str) -> None:
    assert all(said.isprintable() for said in warnings_in(text))


@pytest.mark.parametrize(
    "body",
    [
        b"Client sent an HTTP request to an HTTPS server.\n",
        b"<center>The plain HTTP request was sent to HTTPS port</center>",
    ],
)
def test_plain_http_to_who_speaks_https(body: bytes) -> None:
    question = Question("r.example/a:1", "r.example", "log in")
    assert "speaks HTTPS" in str(refusal(question, 400, {}, body))
    assert str(refusal(question, 400, {})) == "r.example/a:1: r.example answered 400 Bad Request"
