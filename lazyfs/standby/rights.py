"""What a process may do and sees, as far as its children have it from it and cannot change it.

A deputy is a child of the standby, not of the client, so it has all of this from the standby. It
would be more than the client has, or less, or something else, wherever the two differ; such a
client is declined. Which namespaces, which capabilities: that is not weighed, only compared.

Its own group among the supplementary ones gives a process nothing, so it is no difference: a root's
shell has it there, a service of systemd has none.

What /proc does not tell is not compared: securebits, the keyrings of the session, Landlock's
domains, and what filters of system calls say beside how many they are.

Sources: proc_pid_status(5), namespaces(7), proc_pid_attr(5), proc_pid_personality(5).
"""

import os
from collections.abc import Mapping

_IN_STATUS = {
    "Uid": "user",
    "Gid": "group",
    "Groups": "supplementary groups",
    "CapInh": "inheritable capabilities",
    "CapPrm": "capabilities",
    "CapEff": "effective capabilities",
    "CapBnd": "bounding set of capabilities",
    "CapAmb": "ambient capabilities",
    "NoNewPrivs": "no_new_privs",
    "Seccomp": "seccomp mode",
    "Seccomp_filters": "seccomp filters",
}


class Gone(Exception):
    """The process has ended, or cannot be looked at."""


def rights_of(process: int | str) -> Mapping[str, str]:
    """Return what a process may do, by what it is called; `self` is this one.

    Raises:
        Gone: it has ended, or is none of ours to look at.
    """
    home = f"/proc/{process}"
    try:
        found = dict(_from_status(f"{home}/status"))
        for name in sorted(os.listdir(f"{home}/ns")):  # noqa: PTH208 - a hot path, as below
            found[f"{name} namespace"] = os.readlink(f"{home}/ns/{name}")  # noqa: PTH115
        root = os.stat(f"{home}/root")  # noqa: PTH116
        found["root directory"] = f"{root.st_dev}:{root.st_ino}"
        found["personality"] = _text(f"{home}/personality")
        found["security label"] = _label(f"{home}/attr/current")
    except OSError as problem:
        raise Gone(f"it cannot be looked at: {problem.strerror}") from None
    groups = {*found["supplementary groups"].split(), *found["group"].split()}
    found["supplementary groups"] = " ".join(sorted(groups))
    return found


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """Return the name of something in which two differ; None if they do not."""
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            return name
    return None


def _from_status(path: str) -> Mapping[str, str]:
    found = {}
    for line in _text(path).splitlines():
        key, _, value = line.partition(":")
        if key in _IN_STATUS:
            found[_IN_STATUS[key]] = value.strip()
        elif key == "TracerPid":  # who is traced wants that of what it does
            found["tracer"] = value.strip()
    return found


def _label(path: str) -> str:
    """Return the label that a security module gives; empty without one (EINVAL, ENOENT)."""
    try:
        return _text(path).rstrip("\0\n")
    except OSError:
        return ""


def _text(path: str) -> str:
    with open(path, errors="surrogateescape") as file:
        return file.read()
