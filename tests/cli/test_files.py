"""`ls` and `cat` over an opened checkpoint that is in memory."""

import io
import json
from typing import Any, cast

import pytest

from lazyfs.cli.cat import copy
from lazyfs.cli.ls import Line, lines, plain
from lazyfs.cli.opening import locate
from lazyfs.ground.errors import LazyfsError
from tests.checkpoint import sample
from tests.checkpoint.sample import FakeCheckpoint

CONTENTS = {
    "config.dump": b"outer",
    "checkpoint/": b"",
    "checkpoint/inventory.img": b"inner",
    "checkpoint/config.dump": b"inner",
    "checkpoint/pages-1.img": bytes(range(256)) * 1000,
    "odd/\x1b[31m": b"",
}


def fake(**options: Any) -> Any:
    return cast(Any, FakeCheckpoint(CONTENTS, links={"checkpoint/parent": "../pre"}, **options))


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("", ""),
        ("/", ""),
        (".", ""),
        ("config.dump", "config.dump"),  # the root comes first
        ("/config.dump", "config.dump"),
        ("./checkpoint/", "checkpoint"),
        ("checkpoint//inventory.img", "checkpoint/inventory.img"),
        ("inventory.img", "checkpoint/inventory.img"),
        ("parent", "checkpoint/parent"),
    ],
)
async def test_what_a_path_means(path: str, found: str) -> None:
    assert (await locate(fake(), path))[0] == found


@pytest.mark.parametrize("path", ["nothing", "../config.dump", "checkpoint/..", "config.dump/x"])
async def test_paths_that_are_not_there(path: str) -> None:
    with pytest.raises(LazyfsError, match="ls -R"):
        await locate(fake(), path)


async def test_a_directory() -> None:
    names = [line.path for line in await lines(fake(), "", recursive=False)]
    assert names == ["checkpoint", "config.dump", "odd"]
    names = [line.path for line in await lines(fake(), "checkpoint", recursive=False)]
    assert names == [
        "checkpoint/config.dump",
        "checkpoint/inventory.img",
        "checkpoint/pages-1.img",
        "checkpoint/parent",
    ]


async def test_everything_below() -> None:
    below = [line.path for line in await lines(fake(), "", recursive=True)]
    assert below == sorted([*(name.rstrip("/") for name in CONTENTS), "checkpoint/parent", "odd"])
    below = [line.path for line in await lines(fake(), "odd", recursive=True)]
    assert below == ["odd/\x1b[31m"]


async def test_lines_for_a_pipe() -> None:
    assert list(plain(await lines(fake(), "checkpoint", recursive=False)))[1:] == [
        "-rw-------\t0\t0\t5\t2023-11-14T22:13:20Z\tcheckpoint/inventory.img",
        "-rw-------\t0\t0\t256000\t2023-11-14T22:13:20Z\tcheckpoint/pages-1.img",
        "lrwxrwxrwx\t0\t0\t0\t1970-01-01T00:00:00Z\tcheckpoint/parent -> ../pre",
    ]
    assert next(plain(await lines(fake(), "odd", recursive=False))).endswith("\todd/\\x1b[31m")
    assert next(plain(await lines(fake(), "", recursive=False))) == (
        "drwx------\t0\t0\t0\t2023-11-14T22:13:20Z\tcheckpoint/"
    )


async def test_lines_for_a_machine() -> None:
    (line,) = await lines(fake(), "inventory.img", recursive=False)
    assert json.loads(json.dumps(line.as_json())) == {
        "path": "checkpoint/inventory.img",
        "type": "file",
        "mode": "0600",
        "uid": 0,
        "gid": 0,
        "size_bytes": 5,
        "modified_at": "2023-11-14T22:13:20Z",
        "symlink_target": None,
    }
    documented = (sample.LAYOUT.parents[2] / "docs/json.md").read_text()
    assert not [key for key in Line.__struct_fields__ if f"`{key}`" not in documented]


async def test_a_file_is_written_whole() -> None:
    out = io.BytesIO()
    await copy(fake(), "pages-1.img", out, progress=False)
    assert out.getvalue() == CONTENTS["checkpoint/pages-1.img"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("checkpoint", "is a directory"),
        ("/", "^/ is a directory"),
        ("parent", "symbolic link, to ../pre"),
        ("x", "no 'x'"),
    ],
)
async def test_what_cannot_be_written(path: str, says: str) -> None:
    with pytest.raises(LazyfsError, match=says):
        await copy(fake(), path, io.BytesIO(), progress=False)


async def test_a_stream_that_takes_little_at_a_time() -> None:
    class Narrow(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(data[:1000])

    out = Narrow()
    await copy(fake(), "pages-1.img", out, progress=False)
    assert out.getvalue() == CONTENTS["checkpoint/pages-1.img"]
