"""How much memory there is: the machine's, or what a container was given of it."""

from pathlib import Path

import pytest

from lazyfs.content.memory_left import memory_left
from lazyfs.ground.settings import GIB, MIB

MACHINE = {"proc/meminfo": f"MemTotal: {64 * MIB} kB\nMemFree: 1 kB\nMemAvailable: {32 * MIB} kB\n"}
LIMITED = {
    "memory.max": f"{4 * GIB}\n",
    "memory.current": f"{3 * GIB}\n",
    "memory.stat": f"anon 5\nfile 7\ninactive_file {GIB}\n",
}
V1 = {"memory.limit_in_bytes": f"{2 * GIB}\n", "memory.usage_in_bytes": f"{GIB}\n"}


def tree(root: Path, cgroup: str, groups: dict[str, dict[str, str]]) -> Path:
    files = {**MACHINE, "proc/self/cgroup": cgroup}
    for group, members in groups.items():
        files |= {f"sys/fs/cgroup/{group}/{name}": text for name, text in members.items()}
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "groups", "expected"),
    [
        ("0::/\n", {}, (64 * GIB, 32 * GIB)),
        ("0::/\n", {".": LIMITED}, (4 * GIB, 2 * GIB)),
        ("0::/a/b\n", {"a/b": LIMITED}, (4 * GIB, 2 * GIB)),
        ("0::/a/b\n", {"a": LIMITED, "a/b": {"memory.max": "max\n"}}, (4 * GIB, 2 * GIB)),
        ("0::/a\n", {"b": LIMITED}, (64 * GIB, 32 * GIB)),
        ("0::/../a\n", {"a": LIMITED}, (64 * GIB, 32 * GIB)),
        ("4:memory:/x\n0::/\n", {"memory/x": V1}, (2 * GIB, GIB)),
        ("4:cpu,memory:/x\n", {"memory": V1}, (2 * GIB, GIB)),
        (
            "4:memory:/\n",
            {"memory": {"memory.limit_in_bytes": f"{2**63 - 4096}"}},
            (64 * GIB, 32 * GIB),
        ),
        ("0::/a\n", {"a": {"memory.max": str(GIB), "memory.current": str(2 * GIB)}}, (GIB, 0)),
        ("nonsense\n\n::\n", {}, (64 * GIB, 32 * GIB)),
    ],
)
def test_the_least_of_all_that_bounds_it(
    tmp_path: Path, cgroup: str, groups: dict[str, dict[str, str]], expected: tuple[int, int]
) -> None:
    assert memory_left(tree(tmp_path, cgroup, groups)) == expected


def test_where_nothing_tells_there_is_enough(tmp_path: Path) -> None:
    assert memory_left(tmp_path).available_bytes >= 1 << 59


def test_here_there_is_some() -> None:
    memory = memory_left()
    assert 0 < memory.available_bytes <= memory.all_bytes < 1 << 50
