import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.ground.errors import MalformedError
from lazyfs.lazypages.protocol import (
    FINISHED,
    MESSAGE_BYTES,
    Announced,
    Fault,
    Finished,
    Forked,
    Moved,
    Unmapped,
    Zeroed,
    Zombie,
    parse_announcement,
    parse_messages,
)


def message(kind: int, *fields: int) -> bytes:
    """A struct uffd_msg, as the kernel's header has it."""
    return struct.pack("=BBHI3Q", kind, 0, 0, 0, *fields, *[0] * (3 - len(fields)))


@pytest.mark.parametrize(
    ("number", "said"),
    [(1, Announced(1)), (4194304, Announced(4194304)), (-7, Zombie(7)), (FINISHED, Finished())],
)
def test_a_number_is_a_task_a_zombie_or_the_end(number: int, said: object) -> None:
    assert parse_announcement(struct.pack("=i", number)) == said


@pytest.mark.parametrize("number", [0, 4194305, -4194305, FINISHED + 1, -(1 << 31)])
def test_no_task_has_such_a_number(number: int) -> None:
    with pytest.raises(MalformedError):
        parse_announcement(struct.pack("=i", number))


@pytest.mark.parametrize("size", [0, 3, 5])
def test_a_number_has_four_bytes(size: int) -> None:
    with pytest.raises(MalformedError, match="cut off"):
        parse_announcement(bytes(size))


def test_messages_are_read_as_the_kernel_lays_them_out() -> None:
    fault = struct.pack("=BBHIQQII", 0x12, 0, 0, 0, 1, 0x7F0000001234, 99, 0)
    fork = struct.pack("=BBHIIIQQ", 0x13, 0, 0, 0, 17, 0xDEAD, 0, 0)
    data = fault + fork + message(0x14, 0x1000, 0x5000, 0x2000)
    data += message(0x15, 0x1000, 0x3000) + message(0x16, 0x5000, 0x6000)
    assert list(parse_messages(data)) == [
        Fault(0x7F0000001234),
        Forked(17),
        Moved(0x1000, 0x5000, 0x2000),
        Zeroed(0x1000, 0x3000),
        Unmapped(0x5000, 0x6000),
    ]


def test_nothing_is_no_message() -> None:
    assert list(parse_messages(b"")) == []


@given(st.binary(max_size=3 * MESSAGE_BYTES + 1))
def test_anything_is_messages_or_an_error(data: bytes) -> None:
    with contextlib.suppress(MalformedError):
        assert len(list(parse_messages(data))) * MESSAGE_BYTES == len(data)
