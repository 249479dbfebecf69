"""Questions to the daemons of this machine's mounts, from outside; none may hold up who asks.

Light imports only. What a daemon says is another process's word, for root perhaps another user's:
it is bounded in size and time, and not believed to be text for a terminal.
"""

import http.client
import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

import msgspec

from lazyfs import mountpoint, rundir
from lazyfs.ground.errors import LazyfsError, UsageError
from lazyfs.mountpoint import Mounted

ANSWER_TIMEOUT_S = 5.0
_ANSWER_MOST_BYTES = 4 << 20
_RECEIVE_BYTES = 64 * 1024
_STATUS_XATTR = "user.lazyfs.status"

State = Literal["serving", "failed", "stuck", "dead", "silent", "detached", "restoring"]


class Known(msgspec.Struct, frozen=True):
    """A mount as it is seen from outside."""

    directory: str
    reference: str
    state: State
    told: Mapping[str, Any]
    """What its daemon tells (`docs/json.md`); empty if it tells nothing."""

    def as_json(self) -> dict[str, Any]:
        """Return all that is known; what the daemon says of itself, if it does."""
        return {
            **self.told,
            "reference": self.reference,
            "directory": self.directory,
            "state": self.state,
        }


class _Candidate(msgspec.Struct, frozen=True):
    mounted: Mounted | None
    socket: rundir.Found | None


def known_mounts() -> list[Known]:
    """Return all mounts of this user, for root of everybody: by directory."""
    found = _ask_all(_candidates(mountpoint.mounts()))
    # A daemon that was given its mount may not know its device, nor its socket's name tell it.
    pids = [known.told.get("pid") for known in found if known.state != "detached"]
    pids = [pid for pid in pids if isinstance(pid, int)]  # who says nothing is nobody else
    found = [each for each in found if each.state != "detached" or each.told.get("pid") not in pids]
    return sorted(found, key=lambda known: known.directory)


def known_mount(directory: Path) -> Known:
    """Return the mount on a directory.

    Raises:
        UsageError: there is none.
    """
    mounted = mountpoint.mounted_at(directory)
    if mounted is not None:
        candidates = [each for each in _candidates([mounted]) if each.mounted is not None]
        for known in _ask_all(candidates):
            return known
    if mounted is not None and mounted.is_ours:
        raise mountpoint.of_another(directory, mounted)
    what = mountpoint.what_is_at(directory, mounted)
    raise UsageError(f"{directory} is not a lazyfs mount: it {what}")


def request_completion(directory: Path) -> None:
    """Have the daemon of a mount fetch all of it.

    Raises:
        UsageError: there is no mount.
        LazyfsError: its daemon cannot be asked.
    """
    mounted = mountpoint.mounted_at(directory)
    found = [each.socket for each in _candidates([mounted] if mounted else []) if each.mounted]
    if mounted is None or not found:
        known_mount(directory)  # which says what is there
    if not found or found[0] is None:
        raise LazyfsError(f"{directory}: its daemon has no control socket, see its log")
    try:
        _ask(found[0], "POST", "/complete")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise LazyfsError(f"{directory}: its daemon does not answer: {error}") from None


def complete_of(device: int, pid: int) -> bool:
    """Have the daemon of a mount that is in no directory fetch and prove all of it, if it can be.

    Returns whether it was asked: one without a control socket proves what it serves by itself,
    later.
    """
    names = (f"mount-{device}.sock", f"pid-{pid}.sock")
    for each in rundir.find_sockets():
        if each.path.name in names:
            with suppress(OSError, http.client.HTTPException, ValueError):
                _ask(each, "POST", "/complete")
                return True
    return False


def _candidates(mounts: Iterable[Mounted]) -> list[_Candidate]:
    """Put mounts and sockets together by device; a mount's own type is not needed for that.

    Of a mount only the user whom it is mounted for, or who asks, may tell by a socket: a socket's
    name is whatever its user likes.
    """
    sockets = {each.path: each for each in rundir.find_sockets()}
    by_device = {(each.device, each.user_id): each for each in sockets.values()}
    found: list[_Candidate] = []
    topmost: dict[str, Mounted] = {}
    for mounted in mounts:
        topmost[mounted.directory] = mounted
    seen = set()
    for mounted in topmost.values():
        tells = by_device.get((mounted.device, mounted.user_id)) or by_device.get(
            (mounted.device, os.geteuid())
        )
        if mounted.device in seen or not (mounted.is_ours or tells is not None):
            continue
        if os.geteuid() not in (0, mounted.user_id) and tells is None:
            continue
        seen.add(mounted.device)
        found.append(_Candidate(mounted, tells))
    here = {each.socket for each in found}
    found += [_Candidate(None, each) for each in sockets.values() if each not in here]
    return found


def _ask_all(candidates: Sequence[_Candidate]) -> list[Known]:
    """Ask all of them at once: one that is stuck holds up no other."""
    answers: SimpleQueue[tuple[_Candidate, Known | None]] = SimpleQueue()

    def look(candidate: _Candidate) -> None:
        answers.put((candidate, _look(candidate)))

    for candidate in candidates:
        threading.Thread(target=look, args=(candidate,), daemon=True).start()
    deadline_s = time.monotonic() + 2 * ANSWER_TIMEOUT_S
    waiting = list(candidates)
    known = []
    with suppress(Empty):
        while waiting:
            candidate, answer = answers.get(timeout=max(0.0, deadline_s - time.monotonic()))
            waiting.remove(candidate)
            known.append(answer)
    known += [_seen(each, "stuck") for each in waiting]
    return [each for each in known if each is not None]


def _look(candidate: _Candidate) -> Known | None:
    """Return what is to be known of a mount; None if there is none any more."""
    told = None
    if candidate.socket is not None:
        try:
            told = _ask(candidate.socket, "GET", "/status")
        except (ConnectionRefusedError, FileNotFoundError):
            return _seen(candidate, "dead") if candidate.mounted is not None else None
        except TimeoutError:
            return _seen(candidate, "stuck")
        except (OSError, http.client.HTTPException, ValueError):
            pass
    elif candidate.mounted is not None:
        directory = Path(candidate.mounted.directory)
        if mountpoint.is_dead(directory):
            return _seen(candidate, "dead")
        with suppress(OSError, ValueError):
            told = _mapping(os.getxattr(directory, _STATUS_XATTR))
    if told is None:
        return _seen(candidate, "silent")
    if candidate.mounted is None and told.get("failed") is None:
        return _seen(candidate, "restoring" if told.get("restores") else "detached", told)
    return _seen(candidate, "serving" if told.get("failed") is None else "failed", told)


def _seen(
    candidate: _Candidate, state: State, told: Mapping[str, Any] | None = None
) -> Known | None:
    told = told or {}
    mounted = candidate.mounted
    if mounted is None and not told:
        return None
    directory = mounted.directory if mounted is not None else str(told.get("directory", ""))
    source = mounted.source if mounted is not None else ""
    return Known(directory, str(told.get("reference") or source), state, told)


def _ask(found: rundir.Found, method: str, path: str) -> Mapping[str, Any]:
    """Ask a daemon for something in JSON.

    Raises:
        OSError, http.client.HTTPException, ValueError: it gives no good answer.
    """
    words = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with rundir.connect(found, ANSWER_TIMEOUT_S) as link:
        link.sendall(words.encode())
        heard = _Heard(_all_of(link, ANSWER_TIMEOUT_S))
    with http.client.HTTPResponse(heard, method=method) as answer:  # type: ignore[arg-type]
        answer.begin()
        text = answer.read()
        if answer.status not in (200, 202):
            raise ValueError(f"{answer.status} {answer.reason}")
        return _mapping(text)


def _all_of(link: socket.socket, timeout_s: float) -> bytes:
    """Return what is said up to the end; a socket's own timeout is for each receive alone.

    Raises:
        TimeoutError: the end does not come.
        ValueError: that is too much.
    """
    deadline_s = time.monotonic() + timeout_s
    heard = bytearray()
    while len(heard) <= _ANSWER_MOST_BYTES:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        link.settimeout(left_s)
        piece = link.recv(_RECEIVE_BYTES)
        if not piece:
            return bytes(heard)
        heard += piece
    raise ValueError("it says too much")


class _Heard:
    """What has been heard, in the place of a socket."""

    def __init__(self, words: bytes) -> None:
        self._words = words

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._words)


def _mapping(text: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("that is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("an object was expected")  # noqa: TRY004 - as for what is no JSON
    return value


def wait_for(
    directory: Path,
    is_so: Callable[[Known], bool],
    on_look: Callable[[Known], None],
    *,
    timeout_s: float | None,
    pause_s: float = 0.25,
) -> Known:
    """Look at a mount until something is so; `on_look` is told what was seen, and may raise.

    Raises:
        UsageError: there is no mount any more.
        TimeoutError: it is not so in time.
    """
    deadline_s = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
    while True:
        known = known_mount(directory)
        on_look(known)
        if is_so(known):
            return known
        if time.monotonic() >= deadline_s:
            raise TimeoutError
        time.sleep(min(pause_s, max(0.0, deadline_s - time.monotonic())))
