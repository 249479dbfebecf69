"""Which CPU instructions a dump may use, and which of them a machine lacks.

Two images tell: cpuinfo.img, which `criu dump --cpu-cap` writes, with all that the CPU had; and
each core image, with the register sets that were in use. CRIU compares the first only if told to
(`criu restore --cpu-cap`), and of the second leaves out silently what the CPU does not have.

Source: CRIU, criu/arch/x86/cpu.c (x86_ins_capability_mask), compel/arch/x86 .../asm/cpu.h and
fpu.h; the names are those of /proc/cpuinfo: Linux, arch/x86/include/asm/cpufeatures.h.
"""

from collections.abc import Mapping

import msgspec

from lazyfs.checkpoint import criu_wire as wire
from lazyfs.ground.errors import MalformedError

CPUINFO = "cpuinfo.img"
_CPUINFO_MAGIC = 0x61404013

_WORDS_OF_VERSION = {1: 12, 2: 19}

_INSTRUCTIONS: Mapping[int, str] = {
    0: "fpu 0, tsc 4, cx8 8, sep 11, cmov 15, clflush 19, mmx 23, fxsr 24, sse 25, sse2 26",
    1: "syscall 11, mmxext 22, rdtscp 27, 3dnowext 30, 3dnow 31",
    3: "nopl 20",
    4: "pni 0, pclmulqdq 1, ssse3 9, cx16 13, sse4_1 19, sse4_2 20, movbe 22, popcnt 23, aes 25, "
    "xsave 26, avx 28, f16c 29, rdrand 30",
    6: "abm 5, sse4a 6, misalignsse 7, 3dnowprefetch 8, xop 11, fma4 16, tbm 21",
    9: "fsgsbase 0, bmi1 3, hle 4, avx2 5, bmi2 8, erms 9, rtm 11, avx512f 16, avx512dq 17, "
    "rdseed 18, adx 19, clflushopt 23, avx512pf 26, avx512er 27, avx512cd 28, sha_ni 29, "
    "avx512bw 30, avx512vl 31",
    10: "xsaveopt 0, xsavec 1, xgetbv1 2",
    11: "avx512vbmi 1, avx512_vbmi2 6, gfni 8, vaes 9, vpclmulqdq 10, avx512_vnni 11, "
    "avx512_bitalg 12, avx512_vpopcntdq 14, rdpid 22",
    13: "clzero 0",
    18: "avx512_4vnniw 2, avx512_4fmaps 3",
}
"""By capability word: the name in /proc/cpuinfo, and the bit.

Left out of CRIU's list: what no program can use (mwait, rep_good, tme), and MPX, which is gone.
"""

_REGISTER_SETS = ((2, "avx"), (5, "avx512f"), (6, "avx512f"), (7, "avx512f"))
"""Bits of XSTATE_BV, and the feature without which those registers are not there.

Protection keys are always in use where they exist, and not missed where they do not.
"""


class DumpedCpu(msgspec.Struct, frozen=True):
    """cpuinfo.img of an x86 machine."""

    model: str
    instructions: tuple[str, ...]
    """Sets of instructions that programs may have found there, as /proc/cpuinfo names them."""


def parse_cpuinfo(data: bytes, what: str = CPUINFO) -> DumpedCpu | None:
    """Read cpuinfo.img; None for one of another architecture than x86.

    Raises:
        MalformedError: it is not one, or has another number of words than its version.
    """
    message = wire.parse("cpuinfo_entry", wire.first(data, _CPUINFO_MAGIC, what), what)
    if not message.x86_entry:
        return None
    entry = message.x86_entry[0]
    if _WORDS_OF_VERSION.get(entry.capability_ver) != len(entry.capability):
        raise MalformedError(
            f"{what}: {len(entry.capability)} words of version {entry.capability_ver}"
        )
    names = sorted(
        name
        for word, text in _INSTRUCTIONS.items()
        if word < len(entry.capability)
        for name, bit in map(str.split, text.split(","))
        if entry.capability[word] >> int(bit) & 1
    )
    return DumpedCpu(entry.model_id.decode("utf-8", "backslashreplace").strip("\0 "), tuple(names))


def features_in_use(x86_state: int) -> tuple[str, ...]:
    """Return the features without which a task's registers (`Core.x86_state`) are lost."""
    return tuple(sorted({name for bit, name in _REGISTER_SETS if x86_state >> bit & 1}))
