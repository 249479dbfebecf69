"""`lazyfs stub`, and what the commands that read make of a stub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazyfs.checkpoint.stub import ANNOTATION, MARKER
from lazyfs.cli.main import run
from tests.checkpoint import sample
from tests.faults import FaultServer, digest_of, status
from tests.images import tar_layer
from tests.mount.published import checkpoint_files, publish_files, write_layout

FILES = checkpoint_files(100_000)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.writable = True
        yield server


class Said:
    """What a command printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
        self._capsys, self._cache = capsys, str(cache)

    def __call__(self, *words: str) -> tuple[int, str, str]:
        code = run([words[0], "--cache-dir", self._cache, "--deadline", "2", *words[1:]])
        said = self._capsys.readouterr()
        return code, said.out, said.err


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Said:
    return Said(capsys, tmp_path / "cache")


@pytest.fixture
def stub(server: FaultServer, say: Said) -> str:
    """A stub of the sample that is in another repository of the same registry."""
    publish_files(server, sample.files())
    code, _out, err = say("stub", f"{server.host}/{server.repository}:1", f"{server.host}/a/stub:1")
    assert (code, err) == (0, "")
    return f"{server.host}/a/stub:1"


def real_of(server: FaultServer) -> str:
    manifest = server.resources[f"/v2/{server.repository}/manifests/1"].body
    return f"{server.host}/{server.repository}@{digest_of(manifest)}"


def test_one_line_tells_what_was_written(server: FaultServer, say: Said) -> None:
    reference = publish_files(server, FILES)
    code, out, err = say("stub", reference, f"docker://{server.host}/a/b:stub")
    written = server.resources["/v2/a/b/manifests/stub"].body
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote {server.host}/a/b@{digest_of(written)} (")
    assert out.endswith(f"stands for {real_of(server)})\n")
    assert " KiB in place of 1" in out
    mounted = [seen.query for seen in server.seen if "mount=" in seen.query]
    assert all("from=team%2Fcheckpoint" in query for query in mounted)
    assert len(mounted) >= 1


def test_the_object_has_the_documented_keys(server: FaultServer, say: Said, tmp_path: Path) -> None:
    reference = publish_files(server, FILES)
    code, out, _err = say("stub", "--json", reference, f"oci:{tmp_path}/layout:a")
    assert code == 0
    documented = (Path(__file__).parents[2] / "docs/json.md").read_text()
    section = documented.partition("## `lazyfs stub")[2].partition("\n## ")[0]
    report = json.loads(out)
    for key in report:
        assert f"`{key}`" in section, key
    assert report["pages_bytes"] == 100_000


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("/srv/stub.tar", "a stub cannot be written to /srv/stub.tar"),
        ("docker-archive:a.tar", "a stub cannot be written to"),
        ("dir:/srv", "a stub cannot be written to"),
        (f"a.example/b@{digest_of(b'')}", "a stub cannot be written to"),
        (f"oci:/srv/layout@{digest_of(b'')}", "a stub cannot be written to"),
        ("http://a.example/x.tar", "a stub cannot be written to"),
        ("no such reference", "is not a reference"),
    ],
)
def test_where_none_can_be_written(say: Said, server: FaultServer, where: str, why: str) -> None:
    reference = publish_files(server, FILES)
    code, out, err = say("stub", reference, where)
    assert (code, out) == (2, "")
    assert why in err
    assert server.seen == [], "it is said before anything is fetched"


def test_what_is_in_no_registry_needs_its_like_in_one(
    server: FaultServer, say: Said, tmp_path: Path
) -> None:
    layer = tar_layer(FILES)
    local = write_layout(tmp_path / "layout", layer)
    target = f"oci:{tmp_path}/stub:1"
    code, _out, err = say("stub", local, target)
    assert (code, "--real" in err, "skopeo copy" in err) == (2, True, True)
    code, _out, err = say("stub", "--real", local, local, target)
    assert (code, "is no image in a registry" in err) == (2, True)
    publish_files(server, FILES)
    real = f"{server.host}/{server.repository}:1"
    code, out, err = say("stub", "--real", real, local, target)
    assert (code, err) == (0, "")
    assert out.endswith(f"stands for {real_of(server)})\n")
    publish_files(server, {**FILES, "other": b""})
    code, _out, err = say("stub", "--real", real, local, target)
    assert (code, "their digests differ" in err) == (2, True)
    server.always("/manifests/", status(404))
    code, _out, err = say("stub", "--real", real, local, target)
    assert (code, "has no such thing" in err) == (3, True)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("digest", ["", f"@{digest_of(b'')}"])
def test_the_name_of_the_image_itself_stays_its_own(
    server: FaultServer, say: Said, tmp_path: Path, real: bool, digest: str
) -> None:
    """Else nothing in the registry would name the memory any more, and it would be cleared away."""
    named = publish_files(server, FILES)
    asked = ["--real", named + digest, write_layout(tmp_path / "layout", tar_layer(FILES))]
    code, out, err = say("stub", *(asked if real else [named + digest]), f"docker://{named}")
    assert (code, out) == (2, "")
    assert "by another name" in err
    assert server.seen == [], "it is said before anything is asked"


def test_a_tag_that_names_the_image_stays_its_own_though_it_was_asked_for_by_digest(
    server: FaultServer, say: Said
) -> None:
    named, real = publish_files(server, FILES), real_of(server)
    code, out, err = say("stub", real, named)
    assert (code, out, "by another name" in err) == (2, "", True)
    code, out, err = say("stub", real, f"{named}-stub")
    assert (code, err) == (0, "")
    assert say("stub", real, f"{named}-stub")[0] == 0, "a stub may take a stub's place"


def test_a_registry_that_does_not_take_it(server: FaultServer, say: Said) -> None:
    reference = publish_files(server, FILES)
    server.always("/blobs/uploads/", status(405))
    code, _out, err = say("stub", reference, f"{server.host}/a/b:1")
    assert (code, "can only be read" in err) == (3, True)
    assert server.count("/manifests/") == 0, "it is said before anything is fetched"


def test_what_has_no_checkpoint_has_no_stub(server: FaultServer, say: Said) -> None:
    reference = publish_files(server, {"etc/passwd": b""})
    assert say("stub", reference, f"{server.host}/a/b:1")[0] == 4


def test_skopeo_that_is_missing_or_fails(
    server: FaultServer, say: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = publish_files(server, FILES)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _out, err = say("stub", reference, "containers-storage:name")
    assert (code, "install it" in err) == (1, True)
    (tmp_path / "skopeo").write_text('#!/bin/sh\necho "$@" >&2\necho it is broken >&2\nexit 3\n')
    (tmp_path / "skopeo").chmod(0o755)
    code, out, err = say("stub", reference, "containers-storage:name")
    assert (code, out) == (1, "")
    assert err == "lazyfs: containers-storage:name: skopeo failed: it is broken\n"


# -- what others make of it ---------------------------------------------------------------------


def test_ls_and_cat_show_what_it_stands_for_and_say_so(
    server: FaultServer, say: Said, stub: str
) -> None:
    code, out, err = say("ls", stub, "checkpoint/pages-1.img")
    assert (code, out.split("\t")[3]) == (0, str(len(sample.images()["pages-1.img"])))
    assert err.startswith(f"lazyfs: {server.host}/a/stub@sha256:")
    assert f"is a stub of {real_of(server)}" in err
    code, out, err = say("ls", "--no-follow", stub, "checkpoint/pages-1.img")
    assert (code, err) == (0, "")
    assert out.startswith("lrwxrwxrwx")
    assert json.loads(say("cat", "--no-follow", stub, MARKER)[1])["reference"] == real_of(server)


def test_inspect_tells_of_both(server: FaultServer, say: Said, stub: str) -> None:
    code, out, err = say("inspect", stub)
    assert (code, "is a stub of" in err) == (0, True)
    assert f"Reference: {real_of(server)}\nBy the stub: {server.host}/a/stub@sha256:" in out
    assert "Engine: Podman" not in err
    code, out, err = say("inspect", "--no-follow", stub)
    assert (code, err) == (0, "")
    assert f"Stub of: {real_of(server)} (" in out
    assert "in 2 pages files more" in out
    report = json.loads(say("inspect", "--no-follow", "--json", stub)[1])
    assert report["stands_for"]["pages_files"] == 2
    assert report["memory"]["total_bytes"] > 0, "the pagemaps are there"


def test_inspect_tells_of_a_stub_whose_image_is_gone(
    server: FaultServer, stub: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On another machine: who has made it has its documents in the cache."""
    say = Said(capsys, tmp_path / "elsewhere")
    path = f"/v2/{server.repository}/manifests/{real_of(server).partition('@')[2]}"
    del server.resources[path]
    code, out, err = say("inspect", stub)
    assert (code, "has no such thing" in err) == (3, True)
    assert f"Stub of: {real_of(server)}" in out
    code, out, err = say("ls", stub)
    assert (code, out, "is a stub of" in err) == (3, "", True)


def test_warm_fetches_what_it_stands_for(server: FaultServer, say: Said, stub: str) -> None:
    code, out, _err = say("warm", stub)
    assert code == 0
    assert out.startswith(real_of(server))


def test_an_annotation_of_somebody_who_knows_no_better(server: FaultServer, say: Said) -> None:
    reference = publish_files(server, FILES)
    manifest: dict[str, Any] = json.loads(
        server.resources[f"/v2/{server.repository}/manifests/1"].body
    )
    manifest["annotations"][ANNOTATION] = "latest"
    server.add_manifest(manifest, "1")
    code, _out, err = say("ls", reference)
    assert (code, MARKER in err or ANNOTATION in err) == (4, True)
