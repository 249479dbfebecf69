"""lazyfs-runtime hands everything but restores of stubs to the real runtime, as it was given."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from lazyfs.cli.main import run
from tests.runtime.scripts import (
    SCRIPT,
    SHELLS,
    install,
    says,
    shell_words,
    write_noting_runtime,
    write_program,
    write_speaking_runtime,
)

_SHELLS_OWN = {b"PWD", b"OLDPWD", b"SHLVL", b"_"}
"""Variables that a shell sets, whatever it is given."""
_ODD = [
    b"",
    b"two words",
    b"a\nline",
    b"quo'te\"s",
    b"$HOME `id` \\",
    b"*",
    b"\xff\xfe",
    b"-",
    b"--",
]


class _Seen:
    def __init__(self, notes: Path) -> None:
        self.words = (notes / "cmdline").read_bytes().split(b"\0")[2:]
        pairs = (notes / "environ").read_bytes().split(b"\0")
        self.environ = {
            pair for pair in pairs if pair and pair.partition(b"=")[0] not in _SHELLS_OWN
        }
        lines = (notes / "descriptors").read_text().splitlines()[1:]
        lines = [re.sub(r"pipe:\[\d+\]", "a pipe", line) for line in lines]
        self.descriptors = {
            line.split(" -> ")[0].split()[-1]: line.split(" -> ")[1] for line in lines
        }
        self.status = [
            line
            for line in (notes / "status").read_text().splitlines()
            if line.startswith(("SigBlk", "SigIgn", "SigCgt", "Umask", "PPid", "NoNewPrivs"))
        ]
        self.rest = [(notes / name).read_bytes() for name in ("directory", "umask")]


def _run(
    words: list[str | Path], arguments: list[bytes], tmp_path: Path, **more: str
) -> tuple[int, _Seen, bytes]:
    notes = tmp_path / "notes"
    notes.mkdir(exist_ok=True)
    (notes / "input").unlink(missing_ok=True)
    directory = tmp_path / "a place"
    directory.mkdir(exist_ok=True)
    environ = {
        **os.environ,
        **more,
        "NOTES": str(notes),
        "EMPTY": "",
        "LINES": "one\ntwo",
        "first": "1",
        "real": "2",
        "name": "3",
        "LISTEN_FDS": "1",
        "_OCI_SYNCPIPE": "3",
    }

    def ignore() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        os.umask(0o027)
        for number in (10, 200):
            os.dup2(low.fileno(), number)

    with open(tmp_path / "low", "wb") as low:
        done = subprocess.run(
            [os.fsencode(word) for word in words] + arguments,
            input=b"what is said\nto it",
            stdout=subprocess.PIPE,
            env=environ,
            cwd=directory,
            close_fds=False,
            preexec_fn=ignore,
            check=False,
            timeout=60,
        )
    given = notes / "input"
    seen = given.read_bytes() if given.exists() else b""
    return done.returncode, _Seen(notes), seen


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "arguments",
    [
        [b"--root", b"/run/x", b"--log-format=json", b"state", b"id"],
        [b"exec", *_ODD],
        [b"restore", b"--image-path", b"/nowhere", *_ODD, b"id"],
        [],
    ],
    ids=["state", "odd", "restore", "none"],
)
def test_the_runtime_sees_what_it_would_without_it(
    shell: str, arguments: list[bytes], tmp_path: Path
) -> None:
    runtime = write_noting_runtime(tmp_path / "runc")
    more = {"LAZYFS_REAL_RUNTIME": str(runtime), "READS": "1", "CODE": "42"}
    code, directly, heard = _run([runtime], arguments, tmp_path, **more)
    through = _run([*shell_words(shell), SCRIPT], arguments, tmp_path, **more)
    assert (through[0], through[2]) == (code, heard) == (42, b"what is said\nto it")
    assert through[1].words == directly.words == [*arguments, b""]
    assert through[1].environ == directly.environ
    assert through[1].status == directly.status
    assert through[1].rest == directly.rest
    assert through[1].descriptors == directly.descriptors
    assert {"10", "200"} < through[1].descriptors.keys()


def test_a_signal_that_ends_the_runtime_is_what_the_engine_sees(tmp_path: Path) -> None:
    runtime = write_noting_runtime(tmp_path / "runc")
    more = {"LAZYFS_REAL_RUNTIME": str(runtime), "SIGNAL": "TERM"}
    code, _, _ = _run([SCRIPT], [b"run", b"id"], tmp_path, **more)
    assert code == -signal.SIGTERM


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("lazyfs-runc", "runc"),
        ("lazyfs-crun", "crun"),
        ("lazyfs-runtime", "runc"),
        ("crun", "crun"),
    ],
)
def test_its_name_says_which_runtime_is_meant(
    shell: str, name: str, found: str, tmp_path: Path
) -> None:
    """Installed under the runtime's own name, too: before it on PATH, a link, or two copies."""
    real = {each: write_speaking_runtime(tmp_path / "usr" / each) for each in ("runc", "crun")}
    script = install(tmp_path / "ours", name)
    install(tmp_path / "copies", name)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / name).symlink_to(script)
    (tmp_path / "directory" / found).mkdir(parents=True)
    write_program(tmp_path / "plain" / found, "no program").chmod(0o644)
    path = ":".join(
        str(tmp_path / each)
        for each in ("links", "copies", "ours", "directory", "plain", "nowhere", "usr")
    )
    environ = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    environ["LAZYFS_RUNTIME_CONFIG"] = str(tmp_path / "none.toml")
    for called in (tmp_path / "links" / name, script, tmp_path / "copies" / name):
        said = says([*shell_words(shell), called, "--version"], env=environ)
        assert said == [str(real[found]), "--version"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_environment_names_a_path_or_a_name_on_path_but_not_this_script(
    shell: str, tmp_path: Path
) -> None:
    """Which would be found in the environment again, and for ever."""
    real = write_speaking_runtime(tmp_path / "usr/kata")
    copy = install(tmp_path / "copy", "lazyfs-runc")
    environ = {**os.environ, "PATH": f"{tmp_path / 'copy'}:{real.parent}:{os.environ['PATH']}"}
    for named in (str(real), "kata"):
        environ["LAZYFS_REAL_RUNTIME"] = named
        assert says([*shell_words(shell), SCRIPT, "list"], env=environ) == [str(real), "list"]
    for named in (str(SCRIPT), str(copy), "lazyfs-runc", "nosuchruntime"):
        environ["LAZYFS_REAL_RUNTIME"] = named
        words = [*shell_words(shell), SCRIPT, "list"]
        done = subprocess.run(words, env=environ, capture_output=True, check=False, timeout=10)
        assert done.returncode == 127
        assert b"LAZYFS_REAL_RUNTIME" in done.stderr


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "line",
    [
        'runtime = "{path}"',
        "runtime='{path}'",
        "\truntime  =\t'{path}' # this one",
        'runtime="{path}"',
        'runtime = "odd runtime"',
    ],
)
def test_the_configuration_names_it(shell: str, line: str, tmp_path: Path) -> None:
    odd = write_speaking_runtime(tmp_path / "usr bin" / "odd runtime")
    config = tmp_path / "runtime.toml"
    text = line.format(path=odd)
    config.write_text(f'# runtime = "x"\nlazy-pages = "never"\n{text}\n[log]\nruntime = "y"\n')
    environ = {**os.environ, "LAZYFS_RUNTIME_CONFIG": str(config)}
    environ["PATH"] = f"{odd.parent}:{environ['PATH']}"
    said = says([*shell_words(shell), SCRIPT, "state", "x"], env=environ)
    assert said == [str(odd), "state", "x"]


@pytest.mark.parametrize(
    "text", ['runtime = "a\\\\b"\n', 'runtime = "/nowhere"\n', "runtime = 7\n", 'runtime = "nil"\n']
)
def test_a_configuration_that_it_cannot_follow_is_an_error(text: str, tmp_path: Path) -> None:
    config = tmp_path / "runtime.toml"
    config.write_text(text)
    environ = {**os.environ, "LAZYFS_RUNTIME_CONFIG": str(config)}
    done = subprocess.run([SCRIPT, "state"], env=environ, capture_output=True, check=False)
    assert done.returncode in (126, 127)
    assert b"lazyfs-runtime" in done.stderr


def test_where_there_is_no_runtime_it_says_so(tmp_path: Path) -> None:
    script = install(tmp_path, "lazyfs-nosuchruntime")
    done = subprocess.run([script, "state"], capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert "no nosuchruntime on PATH" in done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_a_runtime_that_was_named_and_is_not_there_is_told_by_who_names_it(
    shell: str, tmp_path: Path
) -> None:
    config = tmp_path / "runtime.toml"
    config.write_text('runtime = "/nowhere/runc"\n')
    for variable, value, namer in (
        ("LAZYFS_REAL_RUNTIME", "/nowhere/runc", "LAZYFS_REAL_RUNTIME"),
        ("LAZYFS_RUNTIME_CONFIG", str(config), str(config)),
    ):
        words = [*shell_words(shell), SCRIPT, "state"]
        environ = {**os.environ, variable: value}
        done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 127
        assert f"{namer} names /nowhere/runc, which cannot be run" in done.stderr


def test_a_runtime_that_the_command_cannot_run_is_no_bug(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(["runtime", "/nowhere/runc", "state"]) == 1
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN  # as Python has it
    assert (
        "lazyfs: /nowhere/runc cannot be run: No such file or directory" in capfd.readouterr().err
    )


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "words",
    [
        ["--root", "/r", "restore", "--image-path", "{stub}", "--detach", "id"],
        ["restore", "--image-path={stub}", "id"],
        ["restore", "-image-path", "{stub}", "id"],
        ["restore", "-image-path={stub}", "id"],
        ["restore", "--image", "{stub}", "id"],
        ["restore", "id", "--image-path", "{stub}"],
        ["restore", "--bundle", "{bundle}", "--image-path", "checkpoint", "id"],
        ["restore", "--bundle={bundle}", "id"],
        ["restore", "-b{bundle}", "id"],
        ["restore", "-b", "{bundle}", "id"],
    ],
    ids=" ".join,
)
def test_a_restore_of_a_stub_is_lazyfs_s(shell: str, words: list[str], tmp_path: Path) -> None:
    script = install(tmp_path / "bin")
    write_speaking_runtime(tmp_path / "bin/lazyfs")
    stub = tmp_path / "a bundle/checkpoint"
    stub.mkdir(parents=True)
    words = [word.format(stub=stub, bundle=stub.parent) for word in words]
    runtime = write_speaking_runtime(tmp_path / "usr/runc")
    environ = {**os.environ, "LAZYFS_REAL_RUNTIME": str(runtime)}
    command = [*shell_words(shell), script, *words]
    assert says(command, env=environ) == [str(runtime), *words]
    (stub / "lazyfs-stub.json").touch()
    said = says(command, env=environ)
    assert said[:3] == [str(tmp_path / "bin/lazyfs"), "runtime", "--ignored"]
    assert said[4:] == [str(runtime), *words]


def test_its_lazyfs_is_beside_what_it_is_a_link_to(tmp_path: Path) -> None:
    """And not the one that PATH happens to have, or that lies beside the link."""
    script = install(tmp_path / "opt/bin")
    ours = write_speaking_runtime(tmp_path / "opt/bin/lazyfs")
    write_speaking_runtime(tmp_path / "usr/lazyfs")
    (tmp_path / "usr/second").symlink_to("../opt/bin/lazyfs-runtime")
    (tmp_path / "usr/lazyfs-runc").symlink_to(tmp_path / "usr/second")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/lazyfs-stub.json").touch()
    runtime = write_speaking_runtime(tmp_path / "usr/runc")
    environ = {**os.environ, "LAZYFS_REAL_RUNTIME": str(runtime), "PATH": "/usr/bin:/bin"}
    said = says([tmp_path / "usr/lazyfs-runc", "restore", "id"], env=environ, cwd=tmp_path)
    assert said[0] == str(ours)
    (tmp_path / "opt/bin/lazyfs").unlink()
    (tmp_path / "usr/lazyfs").unlink()
    done = subprocess.run(
        [script, "restore", "id"], env=environ, cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 127
    assert b"no lazyfs beside" in done.stderr
