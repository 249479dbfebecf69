"""A cache directory is its user's own, or refused."""

import os
import stat
from pathlib import Path

import pytest

from lazyfs.content.private_dir import insist_on_private, make_private
from lazyfs.ground.errors import UsageError


def test_it_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    make_private(tmp_path / "a/b/cache")
    assert stat.S_IMODE((tmp_path / "a/b/cache").stat().st_mode) == 0o700
    make_private(tmp_path / "a/b/cache")
    insist_on_private(tmp_path / "nothing there")
    assert not (tmp_path / "nothing there").exists()


@pytest.mark.parametrize("name", ["", "layers", "incoming"])
def test_a_symbolic_link_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    cache = tmp_path / "cache"
    if name:
        cache.mkdir(mode=0o700)
    (cache / name).symlink_to(tmp_path / "real")
    with pytest.raises(UsageError, match="it is a symbolic link"):
        make_private(cache)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777, 0o720])
def test_what_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(UsageError, match="others may write to it; `chmod 700` keeps them out"):
        make_private(tmp_path / "cache")


def test_what_others_may_list_is_not(tmp_path: Path) -> None:
    """It may hold other things; what is below is nobody else's to read."""
    (tmp_path / "cache").mkdir(mode=0o755)
    make_private(tmp_path / "cache")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UsageError, match="it is no directory"):
        make_private(tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
@pytest.mark.parametrize("name", ["", "layers"])
def test_another_users_is_refused(tmp_path: Path, name: str) -> None:
    place = tmp_path / "cache" / name
    place.mkdir(parents=True, mode=0o700)
    os.chown(place, 65534, 65534)
    with pytest.raises(UsageError, match=r"belongs to another user \(uid 65534\)"):
        make_private(tmp_path / "cache")
