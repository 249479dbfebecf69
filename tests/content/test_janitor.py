"""Removing layers while others come to use them: nobody is left with half of one."""

import fcntl
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lazyfs.content import janitor, shelf
from lazyfs.content.cache import Cache
from lazyfs.content.growing_file import GrowingFile
from lazyfs.content.incoming import make_private
from lazyfs.ground.settings import KIB, MIB
from tests.shelves import layers_in, put_layer, using

USER = """
import fcntl, os, random, sys, time
content, data = sys.argv[1] + "/content", open(sys.argv[2], "rb").read()
dice, found, missed = random.Random(int(sys.argv[3])), 0, 0
print("ready", flush=True)
while not os.path.exists(sys.argv[2] + ".end"):
    try:
        file = os.open(content, os.O_RDWR)
    except FileNotFoundError:
        missed += 1
        continue
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            mine = os.path.samestat(os.fstat(file), os.stat(content))
        except FileNotFoundError:
            mine = False
        for _ in range(dice.randrange(20) if mine else 0):
            start = dice.randrange(len(data))
            assert os.pread(file, 5000, start) == data[start : start + 5000]
            assert os.path.samestat(os.fstat(file), os.stat(content)), "removed under a user"
            found += 1
    finally:
        os.close(file)
    time.sleep(dice.random() / 50)  # or there would always be one who uses it
print(found, missed, flush=True)
"""
"""Uses a layer by the rules, again and again: lock, look whether it still is the layer, read."""


def test_whoever_uses_a_layer_keeps_it_while_others_remove_it(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(300 * KIB)
    (tmp_path / "data").write_bytes(data)
    cache = tmp_path / "cache"
    home = put_layer(cache, data)
    users = [
        subprocess.Popen(
            [sys.executable, "-c", USER, str(home), str(tmp_path / "data"), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    for user in users:
        assert user.stdout is not None
        user.stdout.readline()
    removed = 0
    deadline_s = time.monotonic() + 30
    while removed < 15 and time.monotonic() < deadline_s:
        for layer in shelf.shelved(cache):
            if janitor.remove(cache, layer) is not None:
                removed += 1
        if not home.exists():
            put_layer(tmp_path / "new", data)
            (tmp_path / "new/layers" / home.name).rename(home)
    (tmp_path / "data.end").touch()
    for user in users:
        out, _ = user.communicate(timeout=30)
        assert user.returncode == 0
        assert int(out.split()[0]) > 0
    assert removed > 0
    assert not shelf.unfinished(cache)


def test_a_layer_in_use_is_not_removed(tmp_path: Path) -> None:
    home = put_layer(tmp_path, b"x" * 1000)
    (layer,) = shelf.shelved(tmp_path)
    with using(home):
        assert janitor.remove(tmp_path, layer) is None
        assert (home / "content").exists()
    freed_bytes = janitor.remove(tmp_path, layer)
    assert freed_bytes == layer.disk_bytes > 0
    assert not home.exists()
    assert janitor.remove(tmp_path, layer) is None, "it is gone"


def test_a_new_layer_is_not_taken_for_an_old_one(tmp_path: Path) -> None:
    """Who has opened a file that is no layer's any more must not remove the layer."""
    home = put_layer(tmp_path, b"x" * 1000)
    file = os.open(home / "content", os.O_RDWR)
    try:
        home.rename(tmp_path / "away")
        put_layer(tmp_path, b"x" * 1000)
        fcntl.flock(file, fcntl.LOCK_EX)
        with janitor.sole_user(home) as fd:
            assert fd is not None, "the lock of another file means nothing"
    finally:
        os.close(file)


def test_a_link_is_nobodys_layer(tmp_path: Path) -> None:
    home = put_layer(tmp_path, b"x" * 1000)
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (home / "content").unlink()
    (home / "content").symlink_to(tmp_path / "elsewhere")
    assert not shelf.shelved(tmp_path)
    with janitor.sole_user(home) as fd:
        assert fd is None
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_what_is_left_is_removed_and_what_grows_is_not(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    growing = GrowingFile(make_private(cache), cache, "it")
    growing.append(bytes(MIB))
    left = tmp_path / "incoming/left"
    left.mkdir()
    (left / "content").write_bytes(bytes(MIB))
    torso = tmp_path / "layers" / ("sha256-" + "0" * 64 + ".tar-256k")
    torso.mkdir(parents=True)
    (torso / "marks").write_bytes(bytes(8))
    fresh = tmp_path / "layers" / ("sha256-" + "1" * 64 + ".tar-256k")
    fresh.mkdir()
    foreign = tmp_path / "layers" / "what people put there"
    foreign.mkdir()
    for path in (torso, foreign):
        os.utime(path, (1, 1))
    assert janitor.remove_leftovers(tmp_path) >= MIB
    assert shelf.unfinished(tmp_path) == [growing.cradle.directory]
    assert layers_in(tmp_path) == sorted([fresh, foreign]), "somebody may just be making it"
    growing.close()
    assert janitor.remove_leftovers(tmp_path) == 0
    assert janitor.remove_leftovers(tmp_path / "nothing") == 0


def test_a_lock_is_had_in_time_or_not(tmp_path: Path) -> None:
    with janitor.locked(tmp_path / "lock", 5) as alone:
        assert alone
        with janitor.locked(tmp_path / "lock", 0.05) as also:
            assert not also
    with janitor.locked(tmp_path / "no/lock", 5) as alone:
        assert not alone


def test_who_uses_what_is_seen(tmp_path: Path) -> None:
    homes = [put_layer(tmp_path, data) for data in (b"a" * 99, b"b" * 99)]
    with using(homes[0]):
        held = shelf.holders()
        assert shelf.users_of(homes[0], held) == {os.getpid()}
        assert shelf.users_of(homes[1], held) == frozenset()
    assert shelf.users_of(homes[0], shelf.holders()) == frozenset()
    assert shelf.users_of(tmp_path / "gone", held) == frozenset()


@pytest.mark.parametrize(
    ("tag", "name", "proven"),
    [
        ("tar-256k", "tar", True),
        ("tar-256k-0123456789abcdef", "tar", False),
        ("gzip-spans-1", "gzip", False),
        ("zstd-stream-1", "zstd", False),
        ("zstd-chunked-1-" + "a" * 64, "zstd:chunked", True),
        ("stargz-1-" + "a" * 64, "eStargz", True),
        ("soci-1-" + "a" * 64, "gzip+SOCI", True),
        ("soci-1-" + "a" * 64 + "-0123456789abcdef", "gzip+SOCI", False),
        ("zstd-seekable-1-" + "a" * 64 + "-0123456789abcdef", "zstd:seekable", False),
        ("of-tomorrow-1", "of-tomorrow-1", True),
    ],
)
def test_a_tag_tells_the_format(tmp_path: Path, tag: str, name: str, proven: bool) -> None:
    put_layer(tmp_path, b"x", tag=tag)
    (layer,) = shelf.shelved(tmp_path)
    assert (layer.format_name, layer.chunks_proven) == (name, proven)


def test_the_latest_used_comes_last(tmp_path: Path) -> None:
    homes = [put_layer(tmp_path, bytes([at]), used_at_s=500 - at) for at in range(4)]
    assert [layer.home for layer in shelf.shelved(tmp_path)] == homes[::-1]
    assert not shelf.shelved(tmp_path / "nothing")
    assert shelf.used_bytes(tmp_path / "nothing") == 0
