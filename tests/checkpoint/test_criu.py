import struct
import sys
from collections.abc import Callable
from subprocess import run
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.checkpoint import criu, criu_cpu, criu_memory
from lazyfs.ground.errors import MalformedError

from . import sample

IMAGES = sample.images()
COMMON, PSTREE, PAGEMAP, CORE = 0x54564319, 0x50273030, 0x56084025, 0x55053847

PARSERS: dict[str, tuple[str, Callable[[bytes], Any]]] = {
    "inventory": ("inventory.img", criu.parse_inventory),
    "pstree": ("pstree.img", criu.parse_pstree),
    "core": ("core-1.img", criu.parse_core),
    "thread core": ("core-7.img", criu.parse_core),
    "ids": ("ids-1.img", criu.parse_ids),
    "pagemap": ("pagemap-1.img", criu_memory.parse_pagemap),
    "mm": ("mm-1.img", criu_memory.parse_mm),
    "mounts": ("mountpoints-13.img", criu.parse_external_mounts),
}


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def message(**fields: int) -> bytes:
    """A protobuf message of varints: f1=2 is field 1 with value 2."""
    return b"".join(varint(int(key[1:]) << 3) + varint(value) for key, value in fields.items())


def image(magic: int, *messages: bytes) -> bytes:
    framed = b"".join(struct.pack("<I", len(item)) + item for item in messages)
    return struct.pack("<II", COMMON, magic) + framed


def test_the_tree_of_the_sample() -> None:
    parent, child = criu.parse_pstree(IMAGES["pstree.img"])
    assert (parent.pid, parent.ppid) == (1, 0)
    assert (child.pid, child.ppid) == (6, 1)
    assert parent.thread_ids == (1, 7)
    assert child.thread_ids == (6,)


@pytest.mark.parametrize(
    ("task_id", "command", "state"),
    [(1, "sample", "alive"), (6, "sample-child", "alive"), (7, "sample-thread", None)],
)
def test_the_tasks_of_the_sample(task_id: int, command: str, state: str | None) -> None:
    core = criu.parse_core(IMAGES[criu.task_image("core", task_id)])
    assert (core.architecture, core.command, core.state) == ("amd64", command, state)


def test_the_inventory_of_the_sample() -> None:
    inventory = criu.parse_inventory(IMAGES["inventory.img"])
    assert inventory.images_version == 2
    assert inventory.lsm == "none"
    assert inventory.network_lock == "iptables"
    assert inventory.plugins == ()
    assert len(inventory.run_id or "") == 36
    assert not inventory.tcp_close
    ids = criu.parse_ids(IMAGES["ids-1.img"])
    assert inventory.root_ids is not None
    assert ids.namespaces_unlike(inventory.root_ids) == ("ipc", "mnt", "net", "pid", "uts")
    assert ids.namespaces_unlike(ids) == ()


def test_images_version_1_has_no_common_magic() -> None:
    assert criu.parse_pstree(IMAGES["pstree.img"][4:]) == criu.parse_pstree(IMAGES["pstree.img"])


def test_a_process_may_call_itself_anything() -> None:
    tc = message(f1=2) + b"\x32\x03\xff\x1bA"
    data = image(CORE, message(f1=3) + b"\x1a" + varint(len(tc)) + tc)
    assert criu.parse_core(data) == criu.Core("arm64", "\\xff\x1bA", "zombie")


def test_numbers_of_the_future_have_a_name() -> None:
    tc = message(f1=77)
    data = image(CORE, message(f1=99) + b"\x1a" + varint(len(tc)) + tc)
    core = criu.parse_core(data)
    assert (core.architecture, core.state) == ("unknown (99)", "unknown (77)")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"\x19\x43", "begin"),
        (image(PSTREE), "no record"),
        (image(CORE, message(f1=1)), "begin"),
        (image(PSTREE, message(f1=1, f2=0))[:-1], "cut off"),
        (image(PSTREE, message(f1=1, f2=0)) + b"\x01\x00", "cut off"),
        (image(PSTREE, b"\xff\xff\xff"), "no pstree_entry"),
        (image(PSTREE, b""), "without pid"),
        (image(PSTREE, message(f1=1)), "without ppid"),
        (image(PSTREE, message(f1=1, f2=0), message(f1=1, f2=0)), "two tasks 1"),
        (image(PSTREE, message(f1=1, f2=0, f5=2), message(f1=2, f2=1)), "two tasks 2"),
    ],
)
def test_a_pstree_that_is_none(data: bytes, says: str) -> None:
    with pytest.raises(MalformedError, match=says):
        criu.parse_pstree(data)


def test_external_mounts_of_the_sample() -> None:
    mounts = criu.parse_external_mounts(IMAGES["mountpoints-13.img"])
    assert criu.Mount("/etc/hosts", "/etc/hosts") in mounts
    assert criu.Mount("/proc/keys", "/dev/null") in mounts
    assert all(mount.mountpoint.startswith("/") for mount in mounts)


def test_the_registers_of_the_sample() -> None:
    core = criu.parse_core(IMAGES["core-1.img"])
    assert criu_cpu.features_in_use(core.x86_state) == ("avx512f",)
    assert criu_cpu.features_in_use(0b11) == ()


@pytest.mark.parametrize("kind", PARSERS)
@given(data=st.binary(max_size=300), keep=st.integers(0, 100))
def test_a_value_or_malformed(kind: str, data: bytes, keep: int) -> None:
    name, parse = PARSERS[kind]
    for attempt in (data, IMAGES[name][:keep] + data, data[:8] + IMAGES[name][len(data[:8]) :]):
        try:
            parse(attempt)
        except MalformedError:
            continue


@pytest.mark.parametrize("kind", PARSERS)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_gives_a_value_or_malformed(kind: str, where: float, bit: int) -> None:
    name, parse = PARSERS[kind]
    data = bytearray(IMAGES[name])
    data[int(where * len(data))] ^= 1 << bit
    try:
        parse(bytes(data))
    except MalformedError:
        return


@pytest.mark.parametrize(
    ("name", "pages"),
    [
        ("pages-1.img", True),
        ("pages-12345.img", True),
        ("pages-shmem-77.img", True),
        ("amdgpu-pages-1-0a2b.img", True),
        ("pagemap-1.img", False),
        ("pages-1.img.sha256", False),
        ("inventory.img", False),
        ("ipcns-shm-9.img", False),
    ],
)
def test_which_files_hold_pages(name: str, pages: bool) -> None:
    assert criu.is_pages(name) is pages


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("core-1.img", ("core", 1)),
        ("pagemap-4194304.img", ("pagemap", 4194304)),
        ("pagemap-shmem-1.img", None),
        ("core-01.img", None),
        ("core-99999999999.img", None),
        ("core-1.img\n", None),
        ("fs-1.img", None),
    ],
)
def test_names_of_tasks_images(name: str, task: tuple[str, int] | None) -> None:
    assert criu.task_of(name) == task
    if task is not None:
        assert criu.task_image(*task) == name


def test_names_alone_do_not_import_protobuf() -> None:
    code = "import sys, lazyfs.checkpoint.criu; sys.exit('google.protobuf' in sys.modules)"
    run([sys.executable, "-c", code], check=True)
