import os
import stat
from pathlib import Path

import pytest

from lazyfs.ground.errors import UsageError
from lazyfs.trace_file import check_recordable, write_whole


def test_a_file_takes_the_place_of_another_and_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.trace"
    file.write_bytes(b"old")
    file.chmod(0o644)
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["a.trace"]


def test_looking_whether_it_can_be_written_leaves_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_recordable(Path("new")) == tmp_path / "new"
    assert os.listdir(tmp_path) == []
    (tmp_path / "old").write_bytes(b"old")
    check_recordable(tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"old"


def test_where_it_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory"):
        check_recordable(tmp_path / "no" / "trace")
    with pytest.raises(UsageError, match="regular file"):
        check_recordable(tmp_path)
    with pytest.raises(UsageError, match="regular file"):
        check_recordable(Path("/dev/null"))
    with pytest.raises(UsageError, match="File name too long"):
        check_recordable(tmp_path / ("é" * 150))
