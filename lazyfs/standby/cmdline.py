"""What `ps` shows of a deputy, and of the daemons that it leaves: the client's own command line.

Without it all of them were `lazyfs standby`. Only for whoever looks: where the kernel does not do
it, all else works.

Source: prctl(2), PR_SET_MM_MAP (needs CONFIG_CHECKPOINT_RESTORE, as CRIU does; no capability);
include/uapi/linux/prctl.h, struct prctl_mm_map; proc_pid_stat(5).
"""

import ctypes
import mmap
from contextlib import suppress

_PR_SET_MM = 35
_PR_SET_MM_MAP = 14
_NO_FILE = 0xFFFFFFFF
_COMMAND_MOST_BYTES = 15
_kept: list[object] = []


class _MemoryMap(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("start_code", "end_code", "start_data")),
        *((name, ctypes.c_uint64) for name in ("end_data", "start_brk", "brk", "start_stack")),
        *((name, ctypes.c_uint64) for name in ("arg_start", "arg_end", "env_start", "env_end")),
        ("auxv", ctypes.c_void_p),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    )


def show_as(client: int, variables: bytes) -> None:
    """Be shown as the client is: its command line, name and environment (NAME=VALUE, NULs)."""
    with suppress(OSError, ValueError):
        with open(f"/proc/{client}/cmdline", "rb") as file:
            words = file.read()
        with open(f"/proc/{client}/comm", "rb") as file:
            name = file.read(_COMMAND_MOST_BYTES).rstrip(b"\n")
        with open("/proc/self/comm", "wb") as file:
            file.write(name)
        if words:
            _show(words, variables)


def _show(words: bytes, variables: bytes) -> None:
    with open("/proc/self/stat", "rb") as file:
        numbers = file.read().rpartition(b")")[2].split()

    def field(number: int) -> int:
        return int(numbers[number - 3])  # the first after the name is the third

    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    memory = mmap.mmap(-1, len(words) + len(variables), flags=mmap.MAP_PRIVATE)
    memory.write(words + variables)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    layout = _MemoryMap(
        start_code=field(26),
        end_code=field(27),
        start_data=field(45),
        end_data=field(46),
        start_brk=field(47),
        brk=libc.sbrk(0),
        start_stack=field(28),
        arg_start=start,
        arg_end=start + len(words),
        env_start=start + len(words),
        env_end=start + len(words) + len(variables),
        auxv=None,
        auxv_size=0,
        exe_fd=_NO_FILE,
    )
    size = ctypes.c_ulong(ctypes.sizeof(layout))
    zero = ctypes.c_ulong(0)
    option = ctypes.c_ulong(_PR_SET_MM_MAP)
    if libc.prctl(_PR_SET_MM, option, ctypes.byref(layout), size, zero) == 0:
        _kept.append(memory)  # for as long as the process lives
