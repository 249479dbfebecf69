"""A mount that is in no directory, without a daemon: what the kernel gives, and takes back."""

import os
from pathlib import Path

import pytest

from lazyfs.ground.errors import LazyfsError
from lazyfs.mountpoint import check_fuse, mounts
from lazyfs.restore.detached import on_directory, open_place

pytestmark = pytest.mark.mount


@pytest.fixture(autouse=True)
def _can_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYFS_RUN_DIR", str(tmp_path / "run"))
    try:
        check_fuse()
    except LazyfsError as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))


@pytest.mark.skipif(os.geteuid() != 0, reason="a detached mount needs root")
def test_a_detached_mount_is_in_no_mount_table_and_closed_with_its_descriptor() -> None:
    with open_place("host/web@sha256:00") as place:
        assert place.directory is None
        assert str(place.path) == f"/proc/{os.getpid()}/fd/{place.root}"
        assert str(place.mount_point) == f"/dev/fd/{place.fuse}"
        assert "host/web@sha256:00" not in [each.source for each in mounts()]
        assert not os.get_inheritable(place.root)
        assert not os.get_inheritable(place.fuse)
        fuse, root = place.fuse, place.root
    for descriptor in (fuse, root):
        with pytest.raises(OSError):
            os.fstat(descriptor)
    place.close()


def test_otherwise_there_is_a_directory_that_nobody_else_may_enter(tmp_path: Path) -> None:
    place = on_directory()
    directory = place.directory
    assert directory is not None
    assert place.path == place.mount_point == directory
    assert directory.is_relative_to(tmp_path / "run")
    assert directory.stat().st_mode & 0o777 == 0o700
    assert directory.parent.stat().st_mode & 0o777 == 0o700
    place.close()
    assert not directory.parent.exists()


def test_a_run_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    with pytest.raises(LazyfsError, match="LAZYFS_RUN_DIR"):
        on_directory()
