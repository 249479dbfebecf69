"""The command line of an OCI runtime, as far as a restore goes: runc's and crun's.

Decides where the images directory is named, and what a second command of the same runtime about
the same container looks like. What it does not know is left where it is: the runtime judges its
own command line. Sans-I/O.

runc takes options with one dash or two, and those of a command also behind its arguments
(urfave/cli v1: `app.go`, `command.go:reorderArgs`; runc, `main.go`, `restore.go`). crun takes
clusters of short options and abbreviations of long ones, in order (GNU argp; crun, `src/crun.c`,
`src/restore.c`); it goes to the bundle before it looks at other paths.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath

import msgspec

_GLOBAL_VALUES = frozenset(
    ("root", "log", "log-format", "log-level", "criu", "rootless", "cgroup-manager", "config")
)
_GLOBAL_FLAGS = frozenset(("debug", "systemd-cgroup", "version", "help"))
_RESTORE_VALUES = frozenset(
    (
        *("image-path", "work-path", "bundle", "pid-file", "console-socket", "lsm-profile"),
        *("lsm-mount-context", "manage-cgroups-mode", "empty-ns", "preserve-fds"),
    )
)
_RESTORE_FLAGS = frozenset(
    (
        *("tcp-established", "ext-unix-sk", "shell-job", "file-locks", "detach", "no-subreaper"),
        *("no-pivot", "auto-dedup", "lazy-pages", "no-new-keyring", "network-lock", "help"),
    )
)
_SHORT_VALUES = {"b": "bundle"}
_SHORT_FLAGS = {"d": "detach"}
_FALSE = frozenset(("0", "f", "F", "false", "FALSE", "False"))
"""Go's strconv.ParseBool."""


class _Place(msgspec.Struct, frozen=True):
    """Where a value stands: a word of its own, or behind a prefix."""

    index: int
    prefix: str = ""


class _Options(msgspec.Struct):
    values: dict[str, str] = msgspec.field(default_factory=dict)
    places: dict[str, list[_Place]] = msgspec.field(default_factory=dict)
    plain: list[str] = msgspec.field(default_factory=list)

    def put(self, name: str, value: str, place: _Place) -> None:
        self.values[name] = value
        self.places.setdefault(name, []).append(place)

    def is_on(self, flag: str) -> bool:
        return flag in self.values and self.values[flag] not in _FALSE


class RestoreCall(msgspec.Struct, frozen=True):
    """A runtime's `restore`, understood."""

    words: tuple[str, ...]
    """All arguments, without the program."""
    container: str
    """The container's id; "" if there is none: the runtime will say so. Engines have it stand last:
    what stands before may be the value of an option that is not known here."""
    image_path: str | None
    work_path: str | None
    bundle: str | None
    pid_file: str | None
    detach: bool
    lazy_pages: bool
    log: str | None
    log_format: str
    """"text" unless something else is asked for."""
    _command: int
    """Index of the word `restore`."""
    _image_places: tuple[_Place, ...]
    _control: tuple[str, ...]

    def with_image_path(self, path: str, *more: str) -> list[str]:
        """Return the arguments with the images directory replaced, and options added."""
        words = list(self.words)
        for place in self._image_places:
            words[place.index] = place.prefix + path
        added = list(more) if self._image_places else ["--image-path", path, *more]
        at = self._command + 1
        return words[:at] + added + words[at:]

    def control(self, *words: str) -> list[str]:
        """Return the arguments of another command of this runtime: with the same global options.

        But for where it logs: the engine reads that as the last word of its own command.
        """
        return [*self._control, *words]

    def images_directories(self, directory: str, program: str) -> list[str]:
        """Return where the runtime may look for images, if it is started in `directory`.

        Without --image-path that is `checkpoint` there (runc, `utils_linux.go`), for crun in the
        bundle.
        """
        bundle = PurePosixPath(directory, self.bundle or ".")
        first, second = PurePosixPath(directory), bundle
        if "crun" in PurePosixPath(program).name:
            first, second = second, first
        asked = self.image_path or "checkpoint"
        return list(dict.fromkeys((str(first / asked), str(second / asked))))


def parse_restore(words: Sequence[str]) -> RestoreCall | None:
    """Understand a runtime's arguments; None if they are no restore."""
    ours = _Options()
    command = _scan(words, 0, ours, _GLOBAL_VALUES, _GLOBAL_FLAGS, to_end=False)
    if command >= len(words) or words[command] != "restore":
        return None
    theirs = _Options()
    _scan(words, command + 1, theirs, _RESTORE_VALUES, _RESTORE_FLAGS, to_end=True)
    silent = {
        index
        for name in ("log", "log-format")
        for place in ours.places.get(name, [])
        for index in (place.index, place.index - (not place.prefix))
    }
    return RestoreCall(
        words=tuple(words),
        container=theirs.plain[-1] if theirs.plain else "",
        image_path=theirs.values.get("image-path") or None,
        work_path=theirs.values.get("work-path") or None,
        bundle=theirs.values.get("bundle") or None,
        pid_file=theirs.values.get("pid-file") or None,
        detach=theirs.is_on("detach"),
        lazy_pages=theirs.is_on("lazy-pages"),
        log=ours.values.get("log") or None,
        log_format=ours.values.get("log-format", "text"),
        _command=command,
        _image_places=tuple(theirs.places.get("image-path", ())),
        _control=tuple(word for index, word in enumerate(words[:command]) if index not in silent),
    )


def _scan(
    words: Sequence[str],
    begin: int,
    into: _Options,
    values: frozenset[str],
    flags: frozenset[str],
    *,
    to_end: bool,
) -> int:
    """Take options in; return the index of the first plain word, or with `to_end` the end."""
    index = begin
    while index < len(words):
        word = words[index]
        if word == "--":
            into.plain += words[index + 1 :]
            return index + 1 if not to_end else len(words)
        if word == "-" or not word.startswith("-"):
            if not to_end:
                return index
            into.plain.append(word)
            index += 1
            continue
        dashes = "--" if word.startswith("--") else "-"
        name, equals, value = word[len(dashes) :].partition("=")
        known = _known(name, values | flags, abbreviated=dashes == "--")
        if known is None and dashes == "-":
            index = _cluster(words, index, into)
        elif known is not None and equals:
            into.put(known, value, _Place(index, word[: -len(value)] if value else word))
            index += 1
        elif known in values and index + 1 < len(words):
            into.put(str(known), words[index + 1], _Place(index + 1))
            index += 2
        else:
            if known in flags:
                into.put(str(known), "true", _Place(index))
            index += 1
    return len(words)


def _known(name: str, names: frozenset[str], *, abbreviated: bool) -> str | None:
    """Return the option that is meant; with `abbreviated` as GNU getopt has it."""
    if name in names or not abbreviated or not name:
        return name if name in names else None
    found = [each for each in names if each.startswith(name)]
    return found[0] if len(found) == 1 else None


def _cluster(words: Sequence[str], index: int, into: _Options) -> int:
    """Take a cluster of short options (`-db DIR`, `-bDIR`) in; return where to go on."""
    word = words[index]
    for position, letter in enumerate(word[1:], 1):
        if letter in _SHORT_FLAGS:
            into.put(_SHORT_FLAGS[letter], "true", _Place(index))
        elif letter in _SHORT_VALUES:
            rest = word[position + 1 :]
            if rest:
                value = rest.removeprefix("=")
                into.put(_SHORT_VALUES[letter], value, _Place(index, word[: -len(value) or None]))
            elif index + 1 < len(words):
                into.put(_SHORT_VALUES[letter], words[index + 1], _Place(index + 1))
                return index + 2
            break
        else:
            break
    return index + 1
