"""The commands as a shell runs them, on the sample image that ships with the repository."""

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint import sample

REF = f"oci:{sample.LAYOUT}"


def lazyfs(cache: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "lazyfs", arguments[0], f"--cache-dir={cache}", *arguments[1:]]
    return subprocess.run(command, capture_output=True, check=False, timeout=60)


def on_a_terminal(cache: Path, *arguments: str) -> bytes:
    """Run a command with a terminal of 100 columns as its standard output and error."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "lazyfs", arguments[0], f"--cache-dir={cache}", *arguments[1:]]
    env = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=slave, stderr=slave, env=env) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # EIO: the other side has closed it
                break
            seen += data
        assert process.wait() == 0
    os.close(master)
    return seen


def test_cat_gives_every_file_as_it_is(tmp_path: Path) -> None:
    files = sample.files()
    for path in ("config.dump", "checkpoint/pages-1.img", "checkpoint/inventory.img", "ctr.log"):
        done = lazyfs(tmp_path, "cat", REF, path)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == files[path]


def test_cat_finds_names_of_the_images_directory(tmp_path: Path) -> None:
    done = lazyfs(tmp_path, "cat", REF, "pages-2.img")
    assert done.stdout == sample.images()["pages-2.img"]


def test_ls_lists_what_tar_lists(tmp_path: Path) -> None:
    done = lazyfs(tmp_path, "ls", "-R", REF)
    assert (done.returncode, done.stderr) == (0, b"")
    listed = {
        line.split("\t")[5]: line.split("\t")[3] for line in done.stdout.decode().splitlines()
    }
    assert listed == {path: str(len(data)) for path, data in sample.files().items()}


def test_ls_for_machines(tmp_path: Path) -> None:
    done = lazyfs(tmp_path, "ls", REF, "checkpoint", "--json")
    sizes = {item["path"]: item["size_bytes"] for item in json.loads(done.stdout)}
    assert sizes == {f"checkpoint/{name}": len(data) for name, data in sample.images().items()}


def test_ls_on_a_terminal(tmp_path: Path) -> None:
    seen = on_a_terminal(tmp_path, "ls", REF)
    assert b"\x1b[" in seen
    assert b"6.6 KiB" in seen
    assert b"checkpoint/" in seen


def test_inspect_for_machines(tmp_path: Path) -> None:
    done = lazyfs(tmp_path, "inspect", REF, "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    report = json.loads(done.stdout)
    assert report["reference"].endswith(sample.manifest_digest())
    assert report["origin"]["engine"] == "Podman"
    assert [process["command"] for process in report["processes"]] == ["sample", "sample-child"]
    assert report["layers"][0]["format"] == "tar"
    assert report["notes"] == []


def test_inspect_for_people(tmp_path: Path) -> None:
    plain = lazyfs(tmp_path, "inspect", REF).stdout.decode()
    assert "\nEngine: Podman 5.4.2" in plain
    assert "\n    6 sample-child: " in plain
    assert b"\x1b[1mEngine" in on_a_terminal(tmp_path, "inspect", REF)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("cat", REF, "nothing"), 1, "there is no 'nothing'"),
        (("cat", REF, "checkpoint"), 1, "is a directory"),
        (("ls", REF, "a/b"), 1, "there is no 'a/b'"),
        (("ls", "oci:/nowhere"), 3, "/nowhere"),
        (("ls", "UPPER"), 2, "not a reference"),
    ],
)
def test_what_cannot_be_had(
    arguments: tuple[str, ...], code: int, says: str, tmp_path: Path
) -> None:
    done = lazyfs(tmp_path, *arguments)
    assert done.returncode == code
    assert done.stdout == b""
    assert done.stderr.decode().startswith("lazyfs: ")
    assert says in done.stderr.decode()


def test_strict_takes_no_tag_and_no_archive(tmp_path: Path) -> None:
    """It says how the image is named by its digest now."""
    done = lazyfs(tmp_path, "cat", "--verify=strict", f"oci:{sample.LAYOUT}", "pages-2.img")
    assert (done.returncode, done.stdout) == (2, b"")
    pinned = done.stderr.decode().split()[-1]
    assert pinned == f"oci:{sample.LAYOUT}@{sample.manifest_digest()}"
    done = lazyfs(tmp_path, "cat", "--verify=strict", pinned, "pages-2.img")
    assert (done.returncode, done.stdout) == (0, sample.files()["checkpoint/pages-2.img"])

    layer = sample.manifest()["layers"][0]["digest"].replace(":", "/")
    (tmp_path / "c.tar").write_bytes((sample.LAYOUT / "blobs" / layer).read_bytes())
    done = lazyfs(tmp_path, "cat", "--verify=strict", str(tmp_path / "c.tar"), "pages-2.img")
    assert (done.returncode, done.stdout) == (2, b"")
    assert "named by nothing that could prove it" in done.stderr.decode()


@pytest.mark.parametrize("verify", ["full", "strict"])
def test_a_changed_byte_that_is_looked_for_first(tmp_path: Path, verify: str) -> None:
    layout = tmp_path / "layout"
    shutil.copytree(sample.LAYOUT, layout)
    layer = layout / "blobs" / sample.manifest()["layers"][0]["digest"].replace(":", "/")
    data = bytearray(layer.read_bytes())
    data[200_000] ^= 1
    layer.write_bytes(data)
    reference = f"oci:{layout}@{sample.manifest_digest()}"
    done = lazyfs(tmp_path, "cat", f"--verify={verify}", reference, "pages-2.img")
    assert (done.returncode, done.stdout) == (5, b"")
    assert "does not match its digest" in done.stderr.decode()
