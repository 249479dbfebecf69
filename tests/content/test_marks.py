"""Marks that nobody can foretell, and all daemons of a host agree on."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from lazyfs.content.cache import Cache
from lazyfs.content.marks import Marker, mark_from, marker_of

DATA = b"some bytes" * 1000


def test_one_cache_has_one_seed_and_another_another(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        markers = list(pool.map(marker_of, [tmp_path / "a"] * 32))
    marks = {marker.of(DATA) for marker in markers}
    assert len(marks) == 1
    assert Cache(tmp_path / "a").marker.of(DATA) in marks
    assert Cache(tmp_path / "b").marker.of(DATA) not in marks
    assert xxhash.xxh3_64_intdigest(DATA) not in marks
    assert Cache(None).marker.of(DATA) != Cache(None).marker.of(DATA)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["seed"]
    assert (tmp_path / "a/seed").stat().st_mode & 0o777 == 0o600


def test_pieces_give_the_mark_of_the_whole() -> None:
    marker = Marker()
    hasher = marker.hasher()
    hasher.update(b"something else")
    hasher.reset()
    for start in range(0, len(DATA), 777):
        hasher.update(DATA[start : start + 777])
    assert mark_from(hasher) == marker.of(DATA)


def test_a_torn_seed_is_made_anew_and_one_that_cannot_be_kept_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "seed").write_bytes(b"short")
    assert marker_of(tmp_path).of(DATA) == marker_of(tmp_path).of(DATA)
    (tmp_path / "file").touch()
    lost = marker_of(tmp_path / "file"), marker_of(tmp_path / "file")
    assert lost[0].of(DATA) != lost[1].of(DATA)
