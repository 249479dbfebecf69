"""How CRIU frames its messages, and which fields of them lazyfs knows.

An image file is a magic number or two, then records of a u32 length and a protobuf message.
Every field is declared optional, and every string as bytes: a process may name itself anything.
The only importer of protobuf, and not before a message is parsed.

Source: CRIU, criu/image.c (img_check_magic), criu/protobuf.c, images/*.proto.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from lazyfs.ground.errors import MalformedError

_COMMON_MAGIC = 0x54564319
_SERVICE_MAGIC = 0x55105940
_U32 = struct.Struct("<I")


def records(data: bytes, magic: int, what: str) -> Iterator[bytes]:
    """Yield the records behind the magic; images version 1 has no common magic before it.

    Raises:
        MalformedError: another kind of file, no record in it, or cut off. `what` names it.
    """
    words = [word for (word,) in _U32.iter_unpack(data[: min(8, len(data) & ~3)])]
    if words[:1] == [magic]:
        position = 4
    elif words[1:] == [magic] and words[0] in (_COMMON_MAGIC, _SERVICE_MAGIC):
        position = 8
    else:
        raise MalformedError(f"{what} does not begin as CRIU's do: {data[:8].hex(' ') or 'empty'}")
    if position == len(data):
        raise MalformedError(f"{what} has no record in it")
    while position < len(data):
        start = position + 4
        if start > len(data):
            raise MalformedError(f"{what} is cut off at byte {len(data)}, in a record's length")
        position = start + _U32.unpack_from(data, start - 4)[0]
        if position > len(data):
            raise MalformedError(f"{what} is cut off: a record ends at {position} of {len(data)}")
        yield data[start:position]


def first(data: bytes, magic: int, what: str) -> bytes:
    """Return the first record, all that CRIU reads of some files."""
    return next(records(data, magic, what))


def has_unknown(message: Any) -> bool:
    """Whether there is something in a message that the table below does not name."""
    from google.protobuf.unknown_fields import UnknownFieldSet

    return len(UnknownFieldSet(message)) > 0


def parse(name: str, record: bytes, what: str, *required: str) -> Any:
    """Parse a record as the message `name` of the table below.

    Raises:
        MalformedError: it is none, or lacks a field of `required`.
    """
    parsers, decode_error = _parsers()
    try:
        message = parsers[name](record)
    except decode_error as error:
        raise MalformedError(f"{what} holds no {name}: {error}") from error
    for field in required:
        if not message.HasField(field):
            raise MalformedError(f"{what}: {name} without {field}")
    return message


_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "task_kobj_ids_entry": {
        5: "uint32 pid_ns_id",
        6: "uint32 net_ns_id",
        7: "uint32 ipc_ns_id",
        8: "uint32 uts_ns_id",
        9: "uint32 mnt_ns_id",
        10: "uint32 user_ns_id",
        11: "uint32 cgroup_ns_id",
        12: "uint32 time_ns_id",
    },
    "plugins_entry": {12: "repeated bytes plugins"},
    "inventory_entry": {
        1: "uint32 img_version",
        3: "task_kobj_ids_entry root_ids",
        6: "uint32 lsmtype",
        8: "uint64 dump_uptime",
        9: "uint32 pre_dump_mode",
        10: "bool tcp_close",
        11: "uint32 network_lock_method",
        12: "plugins_entry plugins_entry",
        13: "bytes dump_criu_run_id",
        14: "bool allow_uprobes",
        15: "uint32 compress",
        16: "uint32 compress_region_size",
    },
    "pstree_entry": {
        1: "uint32 pid",
        2: "uint32 ppid",
        3: "uint32 pgid",
        4: "uint32 sid",
        5: "repeated uint32 threads",
    },
    "task_core_entry": {1: "uint32 task_state", 6: "bytes comm"},
    "creds_entry": {15: "bytes lsm_profile"},
    "thread_core_entry": {10: "creds_entry creds", 13: "bytes comm"},
    "user_x86_xsave_entry": {1: "uint64 xstate_bv"},
    "user_x86_fpregs_entry": {13: "user_x86_xsave_entry xsave"},
    "thread_info_x86": {3: "user_x86_fpregs_entry fpregs"},
    "core_entry": {
        1: "uint32 mtype",
        2: "thread_info_x86 thread_info",
        3: "task_core_entry tc",
        5: "thread_core_entry thread_core",
    },
    "pagemap_head": {1: "uint32 pages_id"},
    "pagemap_entry": {
        1: "uint64 vaddr",
        2: "uint32 compat_nr_pages",
        3: "bool in_parent",
        4: "uint32 flags",
        5: "uint64 nr_pages",
        6: "pagemap_blocks blocks",
        7: "uint64 total_compressed_size",
        8: "uint32 region_pages",
    },
    "pagemap_blocks": {
        1: "repeated uint32 block_sizes",
        2: "uint64 total_payload_size",
        3: "uint32 pages_per_block",
    },
    "vma_entry": {
        1: "uint64 start",
        2: "uint64 end",
        3: "uint64 pgoff",
        4: "uint64 shmid",
        5: "uint32 prot",
        6: "uint32 flags",
        7: "uint32 status",
    },
    "mm_entry": {14: "repeated vma_entry vmas"},
    "mnt_entry": {7: "bytes mountpoint", 13: "bool ext_mount", 18: "bytes ext_key"},
    "cpuinfo_x86_entry": {
        5: "uint32 capability_ver",
        6: "repeated uint32 capability",
        7: "bytes model_id",
    },
    "cpuinfo_entry": {1: "repeated cpuinfo_x86_entry x86_entry"},
}


@cache
def _parsers() -> tuple[Mapping[str, Callable[[bytes], Any]], type[Exception]]:
    """Make protobuf's parser for each message, in a pool of our own; and its error."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

    described = descriptor_pb2.FileDescriptorProto(name="lazyfs_criu.proto", syntax="proto2")
    field_type = descriptor_pb2.FieldDescriptorProto
    for name, fields in _MESSAGES.items():
        entry = described.message_type.add(name=name)
        for number, words in fields.items():
            *repeated, kind, label = words.split()
            field = entry.field.add(name=label, number=number)
            field.label = field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL
            if kind in _MESSAGES:
                field.type, field.type_name = field_type.TYPE_MESSAGE, f".{kind}"
            else:
                field.type = field_type.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(described.SerializeToString())
    classes = {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name))
        for name in _MESSAGES
    }
    return {name: made.FromString for name, made in classes.items()}, message.DecodeError
