"""What the benchmarks of restores need before they begin: a checkpoint, pushed in some formats.

It is made next to the registry, with no link between, and may be kept for another run: what a
directory has already is not made again. A checkpoint names its status file by its path, so the
directory must not be moved.
"""

import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from boxes import Box
from harness import LAZYFS_WORDS
from resuming import CHUNKED, UNPACK, Case
from testbed import (
    Layer,
    Registry,
    Session,
    Testbed,
    TestbedError,
    Wan,
    Workload,
    dump,
    get_manifest,
    push_oci_image,
    skopeo_copy,
    soci_index,
    tar_checkpoint,
)
from testbed.containerd import Containerd
from testbed.process import run

Link = Literal["1gbit", "unshaped"]
RATE_MBIT = 1000
ONE_WAY_MS = 5
LINKS: dict[Link, str] = {
    "1gbit": f"{RATE_MBIT} Mbit/s, {2 * ONE_WAY_MS} ms",
    "unshaped": "loopback",
}
_COMPRESSIONS = {"gzip": "gzip", "zstd": "zstd", "chunked": CHUNKED}
_LONG_S = 3600
_FEATURES = {
    "--trace": {"--trace"},
    "trace": {"--trace", "--record", "--until"},
    "attached": {"--trace", "--record", "--until", "lazyfs trace"},
    "standby": {"lazyfs standby"},
}
"""What a lazyfs must have for some of the ways' needs."""


def features() -> frozenset[str]:
    """Return what this lazyfs has: options of `lazyfs restore`, and commands."""
    known = {word for words in _FEATURES.values() for word in words}
    options = run([*LAZYFS_WORDS, "restore", "--help"])
    commands = [line.split() for line in run([*LAZYFS_WORDS, "--help"]).splitlines()]
    has = {f"lazyfs {words[0]}" for words in commands if words}
    return frozenset(known & (has | {word for word in known if f"{word} " in options}))


def missing(needs: frozenset[str], has: frozenset[str]) -> str:
    """Return what this lazyfs lacks of a way's needs; nothing, if it has all."""
    wanted = {word for need in needs for word in _FEATURES.get(need, ())}
    return ", ".join(sorted(wanted - has))


class Stage:
    """A checkpoint of one size and pattern, in one directory."""

    def __init__(self, testbed: Testbed, directory: Path, size_mib: int, pattern: str) -> None:
        """Make the checkpoint, unless it is there."""
        self.testbed = testbed
        self.directory = directory.absolute()
        self.images = self.directory / "images"
        self.status = self.directory / "report/status"
        self._note = self.directory / "stage.json"
        self._made: dict[str, Any] = {}
        if self._note.exists():
            self._made = json.loads(self._note.read_text())
            return
        self.status.parent.mkdir(parents=True, exist_ok=True)
        with Workload(
            testbed,
            self.status,
            size_mib=size_mib,
            pattern="regions" if pattern == "regions" else "scattered",
        ) as workload:
            memory = workload.memory_hash()
            dump(testbed, workload.pid, self.images, self.directory / "dump")
            pid = workload.pid
        self._made = {"size_mib": size_mib, "pattern": pattern, "memory": memory, "pid": pid}
        self._made |= {"forms": {}, "soci_index": "", "traces": {}}
        self._keep()

    @property
    def pid(self) -> int:
        """The checkpointed process's."""
        return int(self._made["pid"])

    @property
    def layer_bytes(self) -> int:
        """Size of the uncompressed layer."""
        return int(self._made["forms"]["tar"]["bytes"])

    @property
    def form_bytes(self) -> dict[str, int]:
        """Size of each format's layer."""
        return {name: int(form["bytes"]) for name, form in self._made["forms"].items()}

    def push(self, needs: frozenset[str]) -> None:
        """Push all formats that some ways need, and record and attach what they want of traces."""
        forms = needs | ({"gzip"} if "soci" in needs else set())
        made = self._made
        with ExitStack() as stack:
            registry = stack.enter_context(Registry(self.testbed, self.directory / "registry"))
            session = stack.enter_context(Session(self.testbed, [self.directory]))
            if "tar" not in made["forms"]:
                tar = self.directory / "checkpoint.tar"
                tar_checkpoint(self.images, tar)
                push_oci_image(registry.address, "bench/tar", "1", [Layer(tar)])
                tar.unlink()
                self._note_form(registry, "tar")
            for name, compression in _COMPRESSIONS.items():
                if name in forms and name not in made["forms"]:
                    self._copy(session, registry, "tar", name, compression)
            if "soci" in needs and not made["soci_index"]:
                with Containerd(session, self.directory / "containerd.log") as containerd:
                    reference = f"{registry.address}/bench/gzip:1"
                    made["soci_index"] = soci_index(session, containerd, reference)
                self._keep()
            for name in ("tar", "chunked"):
                if {name, "trace"} <= needs:
                    self._record(registry, name)
                if {name, "attached"} <= needs:
                    self._attach(session, registry, name)

    @contextmanager
    def beyond(self, link: Link, has: frozenset[str], patience_s: float) -> Iterator[Case]:
        """Serve it beyond a link, within the block."""
        with ExitStack() as stack:
            data = self.directory / "registry"
            if link == "unshaped":
                registry = stack.enter_context(Registry(self.testbed, data))
            else:
                wan = stack.enter_context(
                    Wan(self.testbed, one_way_ms=ONE_WAY_MS, rate_mbit=RATE_MBIT)
                )
                registry = stack.enter_context(
                    Registry(self.testbed, data, ip=wan.far_ip, enter=wan.enter)
                )
            yield self._case(registry, has, patience_s)

    def _case(self, registry: Registry, has: frozenset[str], patience_s: float) -> Case:
        case = Case(
            self.testbed,
            self.directory,
            self.images,
            self.status,
            self.pid,
            registry.address,
            tuple(self._made["memory"]),
            patience_s,
            features=has,
            soci_index=self._made["soci_index"],
        )
        for name, form in self._made["forms"].items():
            base = f"{registry.address}/bench/{name}"
            case.references[name] = f"{base}:1"
            case.references[f"{name} traced"] = f"{base}-traced:1"
            if name in UNPACK or name == "chunked":
                url = f"http://{registry.address}/v2/bench/{name}/blobs/{form['digest']}"
                case.blobs[name] = url
        case.traces |= {name: Path(each) for name, each in self._made["traces"].items()}
        return case

    def _copy(
        self, session: Session, registry: Registry, source: str, name: str, compression: str
    ) -> None:
        at = registry.address
        words = [f"docker://{at}/bench/{each}:1" for each in (source, name)]
        form = f"--dest-compress-format={compression}"
        skopeo_copy(session, words[0], words[1], form, timeout_s=_LONG_S)
        self._note_form(registry, name)

    def _note_form(self, registry: Registry, name: str) -> None:
        _, manifest = get_manifest(registry.address, f"bench/{name}", "1")
        (layer,) = manifest["layers"]
        self._made["forms"][name] = {"digest": layer["digest"], "bytes": layer["size"]}
        self._keep()

    def _record(self, registry: Registry, name: str) -> None:
        """Record what the process needs up to its first loop, as a user would."""
        if name in self._made["traces"]:
            return
        trace = self.directory / f"{name}.trace"
        work = self.directory / f"record-{name}"
        case = self._case(registry, frozenset(), _LONG_S)
        case.forget("recording")
        shutil.rmtree(work, ignore_errors=True)
        with Box(work, 0, self.status, self.pid) as box:
            words = [
                *LAZYFS_WORDS,
                "restore",
                case.references[name],
                "--plain-http",
                "--lazy-pages",
            ]
            words += ["--cache-dir", str(case.cache("recording")), "--criu", case.criu_words]
            words += ["--work-dir", str(box.work / "criu"), "--record", str(trace)]
            words += ["--until", f"exec:grep -q loop {shlex.quote(str(self.status))}"]
            box.run(words, box.work / "restore.out", _LONG_S)
        case.forget("recording")
        shutil.rmtree(work)
        if not trace.is_file():
            raise TestbedError(f"lazyfs restore --record wrote no {trace}")
        self._made["traces"][name] = str(trace)
        self._keep()

    def _attach(self, session: Session, registry: Registry, name: str) -> None:
        attached = self._made.setdefault("attached", [])
        if name in attached:
            return
        at = registry.address
        target = f"{at}/bench/{name}-traced:1"
        source = f"docker://{at}/bench/{name}:1"
        skopeo_copy(session, source, f"docker://{target}", "--preserve-digests", timeout_s=_LONG_S)
        trace = self._made["traces"][name]
        run([*LAZYFS_WORDS, "trace", "push", "--plain-http", target, trace], timeout_s=_LONG_S)
        attached.append(name)
        self._keep()

    def _keep(self) -> None:
        self._note.write_text(json.dumps(self._made, indent=1))
