"""What happens to a container after its restore, while something can still turn out to be wrong."""

import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from lazyfs.ground.errors import LazyfsError
from lazyfs.restore.served import NoAnswer
from lazyfs.runtime.lingering import is_proven, linger

_UNPROVEN = {
    "failed": None,
    "failed_reads": 0,
    "served_proven": False,
    "completion": None,
}
_COMING = {**_UNPROVEN, "lazy_pages": {"state": "transferring", "failed": None}}
_LOST = {**_UNPROVEN, "lazy_pages": {"state": "failed", "failed": "no more"}}
_PROVEN = {**_UNPROVEN, "served_proven": True}
_HOME = {**_PROVEN, "lazy_pages": {"state": "home", "failed": None}}


class _Mount:
    """Tells one state after the other; the last for ever."""

    def __init__(self, *states: Mapping[str, Any] | LazyfsError) -> None:
        self._states = list(states)

    def status(self) -> Mapping[str, Any]:
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        if isinstance(state, LazyfsError):
            raise state
        return state


@pytest.fixture
def init() -> Iterator[int]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        process.kill()


def _linger(mount: _Mount, init: int) -> tuple[str | None, int]:
    asked: list[int] = []
    reason = linger(mount, init, "web", lambda: asked.append(1))
    return reason, len(asked)


def test_what_is_proven_is_waited_for_no_longer(init: int) -> None:
    assert _linger(_Mount(_PROVEN), init) == (None, 0)


def test_a_proof_is_asked_for_once_and_again_when_it_has_failed(init: int) -> None:
    states = [_UNPROVEN, {**_UNPROVEN, "completion": {"state": "running"}}]
    states += [{**_UNPROVEN, "completion": {"state": "failed"}}, _PROVEN]
    assert _linger(_Mount(*states), init) == (None, 2)


def test_wrong_bytes_are_told(init: int) -> None:
    reason, _ = _linger(_Mount(_UNPROVEN, {**_UNPROVEN, "failed": "digest"}), init)
    assert reason is not None
    assert "digest" in reason


def test_a_mount_that_is_gone_proves_nothing(init: int) -> None:
    reason, _ = _linger(_Mount(_UNPROVEN, LazyfsError("gone")), init)
    assert reason is not None
    assert "gone" in reason


def test_a_daemon_that_is_busy_is_asked_again_and_one_that_is_stuck_is_given_up(init: int) -> None:
    busy = NoAnswer("does not answer")
    assert _linger(_Mount(_UNPROVEN, busy, busy, _UNPROVEN, busy, _PROVEN), init) == (None, 1)
    reason, _ = _linger(_Mount(_UNPROVEN, busy), init)
    assert reason is not None
    assert "does not answer" in reason


def test_lazy_pages_are_waited_for_and_their_failure_is_told(init: int) -> None:
    assert _linger(_Mount(_COMING, _COMING, _HOME), init) == (None, 0)
    reason, _ = _linger(_Mount(_COMING, _LOST), init)
    assert reason is not None
    assert "no more" in reason


def test_a_container_that_has_ended_is_waited_for_only_as_long_as_others_miss_pages() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert _linger(_Mount(_UNPROVEN), process.pid) == (None, 0)
    reason, _ = _linger(_Mount(_COMING, _LOST), process.pid)
    assert reason is not None
    assert "no more" in reason


def test_nothing_is_proven_by_silence() -> None:
    assert not is_proven({})
    assert is_proven(_PROVEN)
