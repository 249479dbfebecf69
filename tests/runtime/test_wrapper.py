"""A restore of a stub through the wrapper: what the runtime reads, who is told, what is left."""

import json
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.checkpoint.stub import MARKER, Stub, write_stub
from lazyfs.checkpoint.trace import dump_trace
from tests.faults import FaultServer, status
from tests.mount.published import FEW
from tests.runtime.scripts import write_program
from tests.runtime.wrapping import ID, TIMEOUT_S, Wrapped, wait_until
from tests.traces import annotations_of, attach, listed, trace_of

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="there is no /dev/fuse"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a detached mount needs root"),
]


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def wrapped(server: FaultServer, tmp_path: Path) -> Iterator[Wrapped]:
    wrapped = Wrapped(server, tmp_path / "here")
    yield wrapped
    wrapped.close()


def _engine_words(wrapped: Wrapped) -> str:
    """What Podman shows: it takes the log only if all of it is one JSON object."""
    words = json.loads(wrapped.log.read_text())
    assert words["level"] == "error"
    return str(words["msg"])


@pytest.mark.parametrize("kind", FEW)
def test_the_runtime_reads_the_real_image(server: FaultServer, tmp_path: Path, kind: str) -> None:
    wrapped = Wrapped(server, tmp_path / "here", kind)
    try:
        assert wrapped.run() == (0, "")
        assert wrapped.sums == wrapped.right_sums
        (call,) = wrapped.calls("restore")
        assert (Path(wrapped.state) / "images").read_text().startswith("/proc/")
        at = call.index("--image-path") + 1
        assert call[:at] + call[at + 1 :] == wrapped.words[:at] + wrapped.words[at + 1 :]
        assert wrapped.container() is not None
        assert not wrapped.log.exists()
        wrapped.wait_alone()
        assert wrapped.container() is not None
        assert wrapped.alarms() == []
    finally:
        wrapped.close()


def test_what_is_opened_is_what_was_allowed_however_it_is_written(wrapped: Wrapped) -> None:
    """The marker's own words are read once, before the policy is asked."""
    stub = Stub(reference=f"docker://{wrapped.reference}")
    (wrapped.images / MARKER).write_bytes(write_stub(stub))
    assert wrapped.run() == (0, "")
    assert wrapped.sums == wrapped.right_sums
    of_referrers = wrapped.server.count("/manifests/sha256-")  # where no API lists them
    assert wrapped.server.count("/manifests/") - of_referrers == 1
    wrapped.wait_alone()


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, "asking") for kind in FEW), ("zstd:chunked", "careless")]
)
def test_what_read_wrong_bytes_is_killed(
    server: FaultServer, tmp_path: Path, kind: str, mode: str
) -> None:
    """Whether CRIU asks before it lets the tasks run, or was told not to."""
    wrapped = Wrapped(server, tmp_path / "here", kind)
    wrapped.spoil()
    try:
        code, said = wrapped.run(mode)
        if code == 0:  # a layer that is proven as a whole, behind what was read
            assert kind == "tar"
            wait_until(lambda: wrapped.container() is None, wrapped.own_words)
        else:
            assert wrapped.container() is None
            for words in (said.splitlines()[-1], _engine_words(wrapped)):
                assert wrapped.reference.partition("@")[0] in words
                assert "lazyfs" in words
        wrapped.wait_alone()
    finally:
        wrapped.close()


def test_what_could_not_be_read_is_killed(wrapped: Wrapped) -> None:
    wrapped.configure('deadline = 1\nverify = "full"')
    wrapped.server.always(wrapped.layer.digest, status(500))
    code, said = wrapped.run("careless")
    assert code != 0
    assert "500" in said
    assert said.startswith("lazyfs: ")
    assert ID[:12] in _engine_words(wrapped)
    wrapped.wait_alone()


def test_a_failing_runtime_is_as_it_was(wrapped: Wrapped) -> None:
    code, said = wrapped.run("failing")
    assert (code, said) == (7, "")
    assert len(wrapped.log.read_text().splitlines()) == 2
    wrapped.wait_alone()


def test_a_signal_that_ends_the_runtime_ends_the_wrapper(wrapped: Wrapped) -> None:
    assert wrapped.run("dying")[0] == -signal.SIGTERM
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets how children end
    try:
        process = wrapped.start("dying")
    finally:
        signal.signal(signal.SIGCHLD, before)
    with process:
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGTERM
    wrapped.wait_alone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_passed_on(wrapped: Wrapped, number: int) -> None:
    with wrapped.start("waiting") as process:
        wait_until((wrapped.state / "waits").exists, wrapped.own_words)
        process.send_signal(number)
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -number
    wrapped.wait_alone()


def _ignored(status: Path) -> int:
    (mask,) = re.findall(r"SigIgn:\s*(\w+)", status.read_text())
    return int(mask, 16)


@pytest.mark.parametrize("number", [None, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP])
def test_the_runtime_ignores_the_signals_that_the_engine_has_it_ignore(
    wrapped: Wrapped, number: int | None
) -> None:
    notes = wrapped.state / "status"
    write_program(wrapped.runtime, f"#!/bin/sh\nexec cat /proc/self/status >{notes}\n")
    ignore = f"trap '' {number}; " if number is not None else ""
    words = ["sh", "-c", f'{ignore}exec "$@"', "sh", str(wrapped.script), *wrapped.words]
    subprocess.run(words, env=wrapped.environ(), check=True, cwd=wrapped.directory)
    # glibc's posix_spawn, by which make starts programs, leaves its own signals 32 and 33 ignored;
    # a shell ignores SIGINT and SIGQUIT for what it starts in the background.
    ours = _ignored(Path("/proc/self/status")) & ~(1 << 31 | 1 << 32)
    ours &= ~sum(1 << each - 1 for each in (signal.SIGPIPE, signal.SIGXFSZ))  # Python's own
    wanted = ours | (0 if number is None else 1 << number - 1)
    assert _ignored(notes) & 0x7FFF_FFFF == wanted
    wrapped.wait_alone()


def test_a_killed_wrapper_leaves_nothing(wrapped: Wrapped) -> None:
    """Not the runtime, not what it has begun to restore, not what holds the images directory."""
    with wrapped.start("hanging") as process:
        wait_until((wrapped.state / "hangs").exists, wrapped.own_words)
        assert wrapped.container() is not None
        process.kill()
        process.communicate(timeout=TIMEOUT_S)
    wrapped.wait_alone()
    assert wrapped.container() is None
    (deleted,) = wrapped.calls("delete")
    assert deleted == ["--root", "/run/fake", "delete", "--force", ID]


def test_killed_at_any_moment_it_leaves_nothing(wrapped: Wrapped) -> None:
    """Nothing, or, killed after all was judged and before it could say so, all."""
    draw = random.Random(1)
    for _ in range(8):
        said_before = len(wrapped.own_words())
        with wrapped.start() as process:
            try:
                process.communicate(timeout=draw.uniform(0.02, 0.9))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate(timeout=TIMEOUT_S)
        wrapped.wait_alone()
        container = wrapped.container()
        if process.returncode == 0:
            assert container is not None
        if container is not None:
            said = wrapped.own_words()[said_before:]
            assert process.returncode == 0 or f"{ID[:12]}: restored" in said, said
            os.kill(container, signal.SIGKILL)


def test_without_its_keeper_nothing_lives(wrapped: Wrapped) -> None:
    with wrapped.start("waiting") as process:
        wait_until((wrapped.state / "waits").exists, wrapped.own_words)
        images = (wrapped.state / "images").read_text()
        os.kill(int(images.split("/")[2]), signal.SIGKILL)
        process.send_signal(signal.SIGUSR1)
        _, said = process.communicate(timeout=TIMEOUT_S)
    assert b"was killed" in said
    assert wrapped.calls("delete")
    wrapped.wait_alone()


@pytest.fixture
def other(wrapped: Wrapped) -> Iterator["subprocess.Popen[bytes]"]:
    """A container that runs already, and is called as ours would be."""
    with subprocess.Popen(["sleep", "600"]) as process:
        (wrapped.state / "container").write_text(str(process.pid))
        yield process
        process.kill()


def test_a_name_in_use_is_refused_and_its_container_lives(
    wrapped: Wrapped, other: "subprocess.Popen[bytes]"
) -> None:
    assert wrapped.run() == (1, "container with given ID already exists\n")
    wrapped.wait_alone()
    assert wrapped.calls("delete") == []
    assert other.poll() is None


@pytest.mark.parametrize("killed", ["wrapper", "keeper", "runtime"])
def test_whoever_is_killed_a_container_of_the_same_name_lives(
    wrapped: Wrapped, other: "subprocess.Popen[bytes]", killed: str
) -> None:
    with wrapped.start("waiting") as process:
        wait_until((wrapped.state / "waits").exists, wrapped.own_words)
        keeper = int((wrapped.state / "images").read_text().split("/")[2])
        if killed == "wrapper":
            process.kill()
        elif killed == "keeper":
            os.kill(keeper, signal.SIGKILL)
            process.send_signal(signal.SIGUSR1)
        else:
            process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=TIMEOUT_S)
    wrapped.wait_alone()
    assert wrapped.calls("delete") == []
    assert other.poll() is None


def test_what_a_killed_runtime_has_restored_is_killed(wrapped: Wrapped) -> None:
    with wrapped.start("hanging") as process:
        wait_until((wrapped.state / "hangs").exists, wrapped.own_words)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGTERM
    wrapped.wait_alone()
    assert wrapped.container() is None


def test_in_the_foreground_the_wrapper_ends_with_the_container(wrapped: Wrapped) -> None:
    words = [word for word in wrapped.words if word != "--detach"]
    at = words.index("--pid-file")
    with wrapped.start(words=words[:at] + words[at + 2 :]) as process:
        wait_until(lambda: wrapped.container() is not None, wrapped.own_words)
        wait_until(lambda: ": restored" in wrapped.own_words(), wrapped.own_words)
        os.kill(wrapped.container() or 0, signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM
    wrapped.wait_alone()


def test_where_no_mount_is_to_be_had_the_policy_decides(wrapped: Wrapped) -> None:
    hide = "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9"
    command = ["unshare", "--mount", "sh", "-ec", f'{hide}; exec "$@"', "sh", str(wrapped.script)]
    options = {"env": wrapped.environ(), "capture_output": True, "timeout": TIMEOUT_S}
    done = subprocess.run([*command, *wrapped.words], check=False, **options)  # type: ignore[call-overload]
    assert done.returncode != 0
    assert b"/dev/fuse" in done.stderr
    assert "modprobe fuse" in _engine_words(wrapped)
    wrapped.configure('on-failure = "fetch"')
    done = subprocess.run([*command, *wrapped.words], check=False, **options)  # type: ignore[call-overload]
    assert (done.returncode, done.stderr) == (0, b"")
    assert wrapped.sums == wrapped.right_sums
    wrapped.wait_alone()
    assert [path.name for path in wrapped.images.iterdir()] == ["lazyfs-stub.json"]
    wrapped.spoil()
    subprocess.run(["rm", "-rf", wrapped.directory / "cache"], check=True)
    done = subprocess.run([*command, *wrapped.words], check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 5
    wrapped.wait_alone()
    assert [path.name for path in wrapped.images.iterdir()] == ["lazyfs-stub.json"]


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ('allowed = ["registry.example/web"]', "`allowed`"),
        ("lazy-pages = true", "lazy-pages"),
        ("nonsense = 1", "nonsense"),
        ('cache-size = "much"', "cache-size"),
        ('mirrors = "some"', "mirrors"),
        ("[", "no TOML"),
    ],
)
def test_what_the_configuration_forbids_is_told_to_the_engine(
    wrapped: Wrapped, policy: str, words: str
) -> None:
    wrapped.configure(policy)
    code, said = wrapped.run()
    assert code != 0
    assert words in said
    assert words in _engine_words(wrapped)
    assert wrapped.calls("restore") == []
    assert wrapped.processes() == {}


@pytest.mark.parametrize("umask", ["0", "022"])
def test_a_fresh_cache_directory_is_its_owner_s_alone(wrapped: Wrapped, umask: str) -> None:
    """Though the log, which is in it, is the first that is written there."""
    cache = wrapped.directory / "cache"
    (wrapped.directory / "runtime.toml").write_text(f'cache-dir = "{cache}"\n')
    words = ["sh", "-c", f'umask {umask}; exec "$@"', "sh", str(wrapped.script), *wrapped.words]
    done = subprocess.run(words, env=wrapped.environ(), check=False, cwd=wrapped.directory)
    wrapped.wait_alone()
    assert done.returncode == 0
    assert (cache / "log" / "runtime.log").exists()
    found = [cache, *cache.rglob("*")]
    assert [path for path in found if path.is_dir() and path.stat().st_mode & 0o077] == []
    assert [path for path in found if path.is_file() and path.stat().st_mode & 0o022] == []


def test_a_marker_that_is_none_is_told_to_the_engine(wrapped: Wrapped) -> None:
    (wrapped.images / "lazyfs-stub.json").write_bytes(b"\xff{")
    code, said = wrapped.run()
    assert code == 4
    assert "lazyfs-stub.json" in said
    assert wrapped.calls("restore") == []


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_marker_that_is_no_file_holds_nobody_up(wrapped: Wrapped, kind: str) -> None:
    marker = wrapped.images / "lazyfs-stub.json"
    elsewhere = marker.rename(wrapped.directory / "elsewhere")
    if kind == "pipe":
        os.mkfifo(marker)
    else:
        marker.symlink_to(elsewhere)
    code, said = wrapped.run()
    assert code != 0
    assert "lazyfs-stub.json" in said
    assert wrapped.calls("restore") == []


def test_a_checkpoint_that_was_written_over_a_stub_is_none(wrapped: Wrapped) -> None:
    (wrapped.images / "pages-1.img").write_bytes(b"new")
    assert wrapped.run() == (0, "")
    assert wrapped.calls("restore") == [wrapped.words]
    assert wrapped.sums == {"pages-1.img": wrapped.sums["pages-1.img"]}
    assert wrapped.server.count("") == 0


def test_the_kubelet_s_credential_providers_are_asked(wrapped: Wrapped) -> None:
    wrapped.server.auth = "basic"
    wrapped.server.password = ("AWS", "secret")
    code, said = wrapped.run()
    assert code == 3
    assert "401" in said
    answer = {"auth": {wrapped.server.host: {"username": "AWS", "password": "secret"}}}
    write_program(wrapped.directory / "ecr", f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    config = wrapped.directory / "providers.json"
    providers = [{"name": "ecr", "matchImages": ["127.0.0.1", wrapped.server.host]}]
    config.write_text(json.dumps({"kind": "CredentialProviderConfig", "providers": providers}))
    wrapped.configure(f'[kubelet]\nconfig = "{config}"\nbin-dir = "{wrapped.directory}"')
    assert wrapped.run() == (0, "")
    assert wrapped.sums == wrapped.right_sums
    wrapped.wait_alone()
    assert "secret" not in wrapped.own_words()


def test_the_trace_that_is_attached_is_followed_by_the_containers_workload(
    wrapped: Wrapped,
) -> None:
    subject = wrapped.reference.rpartition("@")[2]
    rows = []
    for name in ("web", "job"):
        document = dump_trace(trace_of(wrapped.layer.digest, workload=name))
        wrapped.server.add_blob(document)
        rows.append(listed(annotations_of(document, name), name.encode()))
    attach(wrapped.server, subject, *rows)
    config = wrapped.bundle / "config.json"
    config.write_text(json.dumps({"annotations": {"io.lazyfs.workload": "job"}}))
    assert wrapped.run() == (0, "")
    wait_until(lambda: "follows the trace" in wrapped.own_words(), wrapped.own_words)
    assert " of job, " in wrapped.own_words()
    wrapped.wait_alone()
    assert wrapped.alarms() == []
