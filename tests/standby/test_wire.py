"""What is sent to a standby: any bytes are a request, or are said not to be."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lazyfs.standby.wire import Request, identity, parse_request, read_at_start, variables

TEXT = st.binary(max_size=40).map(lambda each: each.replace(b"\0", b""))
TEXTS = st.lists(TEXT, max_size=5)


def request(
    arguments: list[bytes], environment: list[bytes], descriptors: list[int], umask: int
) -> Request:
    return Request(
        [b"0.1", b""],
        b"lazyfs",
        arguments,
        environment,
        [b"/lib"],
        [b"utf-8", b"strict", b"utf-8", b"strict", b"", b""],
        descriptors,
        [1, 15],
        umask,
        1,
    )


@given(
    TEXTS.filter(bool),
    TEXTS,
    st.sets(st.integers(3, 1 << 20), max_size=5),
    st.integers(0, 0o777),
)
def test_a_request_comes_as_it_was_sent(
    arguments: list[bytes], environment: list[bytes], more: set[int], umask: int
) -> None:
    sent = request(arguments, environment, [0, 1, 2, *more], umask)
    came = parse_request(sent.encode())
    assert {name: getattr(came, name) for name in Request.__slots__} == {
        name: getattr(sent, name) for name in Request.__slots__
    }


@given(st.binary(max_size=200) | st.lists(st.integers(-1, 9)).map(lambda n: b"%r\0" % n))
@example(b"")
@example(b"1\0" * 9)
@example(b"99999999999\0")
@example(b"\xb2\0")
def test_other_bytes_are_no_request(message: bytes) -> None:
    with pytest.raises(ValueError):
        parse_request(message)


@given(st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_a_request_that_was_changed_is_one_or_is_none(at: int, other: bytes) -> None:
    message = request([b"lazyfs", b"ls"], [b"A=b"], [0, 1, 2], 0o22).encode()
    try:
        came = parse_request(message[:at] + other + message[at + len(other) :])
    except ValueError:
        return
    assert {0, 1, 2} <= set(came.descriptors)
    assert 0 <= came.umask <= 0o777


@pytest.mark.parametrize("descriptors", [[], [0, 1], [0, 1, 2, 2], [1, 2, 3]])
def test_a_program_has_three_descriptors_and_none_twice(descriptors: list[int]) -> None:
    message = request([b"lazyfs"], [], descriptors, 0).encode()
    with pytest.raises(ValueError, match="descriptors"):
        parse_request(message)


def test_one_interpreter_is_the_same_as_itself() -> None:
    assert identity() == identity()
    assert not any(b"\0" in each for each in identity())


def test_variables_that_are_read_once_are_told_apart() -> None:
    several = [b"HOME=/", b"PYTHONHASHSEED=0", b"LD_PRELOAD=x.so", b"OPENSSL_CONF=/c"]
    assert read_at_start(several) == [b"LD_PRELOAD=x.so", b"OPENSSL_CONF=/c", b"PYTHONHASHSEED=0"]
    assert len(variables()) == len(os.environb)
