"""Ways to resume a checkpointed process, each in a box, all measured from their first command.

A way is a context: within it the process runs, and its row says what that took. Seconds are from
the moment when the first command of the way was started, by `time.time()`, since that is what the
restored process knows; what is prepared before that is told in the way's docstring.

    first_loop_s   until the process has done its work for the first time
    home_s         until all its memory was here
    done_s         of `lazyfs restore`: until it was proven, too, and the command had ended

`resumed_s` and `own_home_s` are lazyfs's own account, which begins when Python has started.
"""

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from boxes import Box
from harness import LAZYFS_WORDS
from testbed import Testbed, TestbedError, soci_mounted
from testbed.process import stop, wait_until
from testbed.ratarmount import ratarmount

Row = dict[str, Any]
UNPACK = {"tar": "tar -x", "gzip": "tar -xz", "zstd": "tar --zstd -x"}


@dataclass
class Case:
    """A checkpoint, pushed in some formats to a registry over some link."""

    testbed: Testbed
    work: Path
    """Where boxes and caches are made."""
    images: Path
    """What CRIU dumped."""
    status: Path
    """Where the process reports, as it knows it."""
    pid: int
    """The process's."""
    registry: str
    memory: tuple[str, ...]
    patience_s: float
    """A way that takes longer is given up."""
    blobs: dict[str, str] = field(default_factory=dict)
    """URL of each format's layer."""
    references: dict[str, str] = field(default_factory=dict)
    """Image of each format."""
    traces: dict[str, Path] = field(default_factory=dict)
    """What was recorded of each format."""
    soci_index: str = ""
    """Digest of the index that SOCI's snapshotter is told."""
    features: frozenset[str] = frozenset()
    """What this lazyfs has: options of `lazyfs restore`, with dashes, and commands."""

    def __post_init__(self) -> None:
        self._criu = self.testbed.host_command("criu")

    def cache(self, name: str) -> Path:
        """Return lazyfs's cache directory of a name, which all boxes share."""
        return self.work / "caches" / name

    def forget(self, name: str) -> None:
        """Empty a cache."""
        shutil.rmtree(self.cache(name), ignore_errors=True)

    def criu(self, box: Box, action: str, images: Path, *options: str | Path) -> list[str]:
        """Return the words of CRIU in a box; it logs into `criu`."""
        verbosity = "-v3" if action == "restore" else "-v1"
        words = [*self._criu, action, verbosity, "-o", f"{action}.log"]
        return [*words, "-D", str(images), "-W", str(box.work / "criu"), *map(str, options)]

    @property
    def criu_words(self) -> str:
        """CRIU as `lazyfs restore --criu` wants it."""
        return shlex.join(self._criu)


@dataclass(frozen=True)
class Way:
    """One way, and what has to be there for it."""

    resume: Callable[[Case, Box], AbstractContextManager[Row]]
    needs: frozenset[str] = frozenset()
    """Formats to be pushed, `soci` (an index of the gzip); `trace`, `attached`, `standby`."""
    at_once: bool = False
    """Whether it is measured with several at once, too."""
    begin: Callable[[Case], None] = lambda case: None
    """What is done before the clock starts, once for all boxes."""
    around: Callable[[Case, Box], AbstractContextManager[None]] = lambda case, box: nullcontext()
    """What runs in each box already when the clock starts."""


def _restore(case: Case, box: Box, images: Path, row: Row, *, lazy: bool = False) -> None:
    """Restore with CRIU from a directory; `lazy`: its lazy-pages server runs already."""
    began_s = time.time()
    options = ["--restore-detached", *(["--lazy-pages"] if lazy else [])]
    box.run(case.criu(box, "restore", images, *options), box.work / "restore.out", case.patience_s)
    row["criu_s"] = time.time() - began_s


@contextmanager
def _criu_pages(case: Case, box: Box, images: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run CRIU's own lazy-pages server; it ends by itself when all memory is home."""
    server = box.start(case.criu(box, "lazy-pages", images), box.work / "lazy-pages.out")
    socket = box.work / "criu/lazy-pages.socket"
    try:

        def listens() -> bool:
            if server.poll() is not None:
                raise TestbedError(f"criu lazy-pages ended with code {server.returncode}")
            return socket.exists()

        wait_until(listens, "criu lazy-pages", case.patience_s)
        yield server
    finally:
        stop(server)


@contextmanager
def _resumed(
    case: Case, box: Box, images: Path, row: Row, began_s: float, *, lazy: bool
) -> Iterator[Row]:
    """Restore, wait for the first loop and for all memory."""
    with ExitStack() as stack:
        server = stack.enter_context(_criu_pages(case, box, images)) if lazy else None
        _restore(case, box, images, row, lazy=lazy)
        row["first_loop_s"] = box.wait_until(
            lambda: box.first_loop_s(began_s), "its first loop", case.patience_s
        )
        note_lazyfs(box, row)
        row["home_s"] = row["first_loop_s"]
        if server is not None:
            box.wait(server, box.work / "lazy-pages.out", case.patience_s)
            row["home_s"] = time.time() - began_s
        yield row


def note_lazyfs(box: Box, row: Row) -> None:
    """Note what a lazyfs in the box has done up to the first loop."""
    state = box.lazyfs_status()
    if not state:
        return
    row["loop_cpu_s"] = box.lazyfs_cpu_s()
    for key, name in (
        ("bytes_fetched", "loop_fetched_bytes"),
        ("requests", "loop_requests"),
        ("reads_waited", "loop_waits"),
    ):
        row[name] = state.get(key)
    pages = state.get("lazy_pages")
    if isinstance(pages, dict):
        row["loop_faults"] = pages.get("faults")


# -- peers -------------------------------------------------------------------------------------


def warm_images(case: Case) -> None:
    """Have the images in the page cache."""
    for file in case.images.iterdir():
        with file.open("rb") as stream:
            while stream.read(1 << 20):
                pass


@contextmanager
def local(case: Case, box: Box, *, lazy: bool) -> Iterator[Row]:
    """From the local disk, the page cache being warm."""
    began_s = time.time()
    with _resumed(case, box, case.images, {"fetched_bytes": 0}, began_s, lazy=lazy) as row:
        yield row


@contextmanager
def pull(case: Case, box: Box, *, name: str) -> Iterator[Row]:
    """Pull and unpack in one pipe, which is better than any engine does it; then restore."""
    target = box.work / "unpacked"
    target.mkdir()
    began_s = time.time()
    pipe = f"set -o pipefail; curl -sSf {case.blobs[name]} | {UNPACK[name]} -C {target}"
    box.run(["bash", "-c", pipe], box.work / "pull.out", case.patience_s)
    row = {"mount_s": time.time() - began_s, "fetched_bytes": content_length(case.blobs[name])}
    try:
        with _resumed(case, box, target / "checkpoint", row, began_s, lazy=False):
            yield row
    finally:
        shutil.rmtree(target, ignore_errors=True)


@contextmanager
def soci(case: Case, box: Box, *, lazy: bool, image: str = "bench/gzip:1") -> Iterator[Row]:
    """By SOCI's snapshotter, which runs already, as does containerd.

    Its index comes by way of an nginx here (`testbed.soci`). What it fetches is not measured.
    """
    with soci_mounted(
        case.testbed, box.work / "soci", case.registry, image, case.soci_index
    ) as mount:
        began_s = time.time() - mount.seconds
        images = box.machine(mount.directory / "checkpoint")
        with _resumed(case, box, images, {"mount_s": mount.seconds}, began_s, lazy=lazy) as row:
            yield row


@contextmanager
def ratarmounted(case: Case, box: Box, *, lazy: bool) -> Iterator[Row]:
    """By ratarmount, from the uncompressed layer's URL; it makes its index as it mounts."""
    program, mount, log = ratarmount(case.testbed), box.work / "mount", box.work / "ratarmount.out"
    began_s = time.time()
    words: list[str | Path] = [program, "--foreground", "--index-file", ":memory:"]
    words += [case.blobs["tar"], mount]
    process = box.start(words, log)
    try:

        def is_there() -> bool:
            if process.poll() is not None:
                raise TestbedError(f"ratarmount ended: {log.read_text()[-2000:]}")
            return os.path.ismount(box.seen(mount))

        wait_until(is_there, "ratarmount", case.patience_s)
        row = {"mount_s": time.time() - began_s}
        with _resumed(case, box, mount / "checkpoint", row, began_s, lazy=lazy):
            yield row
    finally:
        stop(process)


# -- lazyfs ------------------------------------------------------------------------------------


@contextmanager
def mounted(case: Case, box: Box, *, name: str, lazy: bool, cache: str = "cold") -> Iterator[Row]:
    """`lazyfs mount`, and CRIU with its own lazy-pages server on what that shows."""
    mount = box.work / "mount"
    options = ["--plain-http", "--cache-dir", str(case.cache(cache)), "--log-file"]
    words = [*LAZYFS_WORDS, "mount", *options, str(box.work / "lazyfs.log")]
    began_s = time.time()
    mounting = box.work / "mount.out"
    box.run([*words, case.references[name], str(mount)], mounting, case.patience_s)
    row: Row = {"mount_s": time.time() - began_s}
    try:
        with _resumed(case, box, mount, row, began_s, lazy=lazy):
            state = box.lazyfs_status()
            row["fetched_bytes"], row["cpu_s"] = state["bytes_fetched"], box.lazyfs_cpu_s()
            row["waits"] = state.get("reads_waited")
            yield row
    finally:
        box.run([*LAZYFS_WORDS, "umount", str(mount)], mounting, case.patience_s)


@contextmanager
def restored(
    case: Case,
    box: Box,
    *,
    name: str,
    lazy: bool,
    trace: str | None = None,
    cache: str = "cold",
) -> Iterator[Row]:
    """`lazyfs restore`, as users call it.

    `trace`: off; file, what was recorded; auto, as if it were not said, of an image that has one.
    """
    reference = case.references[f"{name} traced" if trace == "auto" else name]
    told = box.work / "restore.json"
    words = [*LAZYFS_WORDS, "restore", reference, "--plain-http", "--json"]
    words += ["--cache-dir", str(case.cache(cache)), "--work-dir", str(box.work / "criu")]
    words += ["--criu", case.criu_words, *(["--lazy-pages"] if lazy else [])]
    if "--trace" in case.features and trace != "auto":
        words += ["--trace", str(case.traces[name]) if trace == "file" else "off"]
    with ExitStack() as stack:
        began_s = time.time()
        process = box.start(words, box.work / "restore.out", stdout=told)
        stack.callback(stop, process)
        row: Row = {"trace": trace}
        try:
            row["first_loop_s"] = _first_loop_of(case, box, process, told, began_s)
            note_lazyfs(box, row)
            box.wait(process, box.work / "restore.out", case.patience_s)
        except TestbedError as error:
            said = told.read_text()[-2000:] if told.exists() else ""
            raise type(error)(f"{error}\n{said}".strip()) from None
        row["done_s"] = time.time() - began_s
        account = json.loads(told.read_text())
        row["resumed_s"] = account["resumed_after_s"]
        row["own_home_s"] = account["home_after_s"]
        row["fetched_bytes"], row["requests"] = account["fetched_bytes"], account["requests"]
        row["cpu_s"] = round(box.usage.total_s, 3)
        yield row


def _first_loop_of(
    case: Case, box: Box, process: "subprocess.Popen[bytes]", told: Path, began_s: float
) -> float:
    """Return when the process first did its work; fail at once if the command has failed."""

    def first() -> float | None:
        if process.poll():
            raise TestbedError(f"lazyfs restore ended with code {process.returncode}")
        return box.first_loop_s(began_s)

    return box.wait_until(first, "its first loop", case.patience_s)


@contextmanager
def _standing_by(case: Case, box: Box) -> Iterator[None]:
    """Run a standby in the box, and have it used: a restore without it fails.

    One for each box: what it forks has its pids. It has a run directory of its own.
    """
    run_directory, log = box.work / "standby", box.work / "standby.out"
    run_directory.mkdir(mode=0o700)
    box.environment |= {"LAZYFS_RUN_DIR": str(run_directory), "LAZYFS_STANDBY": "must"}
    process = box.start([*LAZYFS_WORDS, "standby"], log)
    try:

        def listens() -> bool:
            if process.poll() is not None:
                raise TestbedError(f"lazyfs standby ended:\n{log.read_text()[-2000:]}")
            return (run_directory / "standby.sock").exists()

        box.wait_until(listens, "lazyfs standby", case.patience_s)
        while box.start([*LAZYFS_WORDS, "ls", "--help"], log).wait():  # it is still importing
            listens()
        yield
    finally:
        stop(process)


def content_length(url: str) -> int:
    """Return the size of what is at a URL."""
    head = subprocess.run(["curl", "-sfIL", url], capture_output=True, text=True, check=True)
    lengths = [
        line.split(":")[1]
        for line in head.stdout.splitlines()
        if line.lower().startswith("content-length:")
    ]
    return int(lengths[-1])


@contextmanager
def link(case: Case, box: Box, *, name: str) -> Iterator[Row]:
    """What the link alone needs for a layer: nothing is restored."""
    log = box.work / "curl.out"
    began_s = time.time()
    box.run(["curl", "-sSf", "-o", "/dev/null", case.blobs[name]], log, case.patience_s)
    yield {"link_s": time.time() - began_s, "fetched_bytes": content_length(case.blobs[name])}


# -- what is measured --------------------------------------------------------------------------

CHUNKED = "zstd:chunked"
_NAMES = {"tar": "uncompressed", "chunked": CHUNKED}


_WARM: tuple[tuple[str, bool, frozenset[str]], ...] = (
    ("eager", False, frozenset()),
    ("lazy", True, frozenset()),
    ("lazy, standby", True, frozenset({"standby"})),
)


def _with_standby(way: Way) -> Way:
    return replace(way, around=_standing_by) if "standby" in way.needs else way


def _forget_cold(case: Case) -> None:
    case.forget("cold")


def _fill(case: Case, *, name: str) -> None:
    """Have a cache hold all of an image, proven, and in the page cache."""
    cache = case.cache(f"warm-{name}")
    words = [*LAZYFS_WORDS, "warm", "--plain-http", "--cache-dir", str(cache)]
    subprocess.run([*words, case.references[name]], check=True, capture_output=True)
    for file in cache.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                while stream.read(1 << 20):
                    pass


def _peers() -> dict[str, Way]:
    ways = {
        "local disk, eager": Way(partial(local, lazy=False), at_once=True, begin=warm_images),
        "local disk, criu lazy-pages": Way(
            partial(local, lazy=True), at_once=True, begin=warm_images
        ),
    }
    for name, words in (("tar", "uncompressed"), ("gzip", "gzip"), ("zstd", "zstd")):
        ways[f"pull, {words}"] = Way(partial(pull, name=name), frozenset({name}))
    for lazy, words in ((False, "eager"), (True, "criu lazy-pages")):
        ways[f"SOCI snapshotter, {words}"] = Way(partial(soci, lazy=lazy), frozenset({"soci"}))
    for lazy, words in ((False, "eager"), (True, "criu lazy-pages")):
        ways[f"ratarmount, {words}"] = Way(partial(ratarmounted, lazy=lazy), frozenset({"tar"}))
    return ways


def _ours() -> dict[str, Way]:
    ways: dict[str, Way] = {}
    for name, words in _NAMES.items():
        form = frozenset({name})

        def cold(
            way: str,
            needs: Set[str] = frozenset(),
            name: str = name,
            words: str = words,
            form: frozenset[str] = form,
            **options: Any,
        ) -> None:
            resume = partial(restored, name=name, **options)
            ways[f"lazyfs {words}, {way}"] = Way(resume, form | needs, name == "tar", _forget_cold)

        ways[f"lazyfs {words}, mount + criu lazy-pages"] = Way(
            partial(mounted, name=name, lazy=True), form, begin=_forget_cold
        )
        cold("eager", lazy=False)
        cold("lazy, no trace", lazy=True)
        cold("lazy, trace", {"trace"}, lazy=True, trace="file")
        cold("lazy, attached trace", {"trace", "attached"}, lazy=True, trace="auto")
        cold("lazy, trace, standby", {"trace", "standby"}, lazy=True, trace="file")
    for name, words in _NAMES.items():
        begin = partial(_fill, name=name)
        for how, lazy, needs in _WARM:
            resume = partial(restored, name=name, cache=f"warm-{name}", lazy=lazy)
            ways[f"lazyfs {words}, warm, {how}"] = Way(resume, needs | {name}, name == "tar", begin)
    return {name: _with_standby(way) for name, way in ways.items()}


LINKS: dict[str, Way] = {
    f"link, {words}": Way(partial(link, name=name), frozenset({name}))
    for name, words in (*_NAMES.items(), ("zstd", "zstd"))
}
WAYS: dict[str, Way] = {**_peers(), **_ours()}
