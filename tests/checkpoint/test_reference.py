"""What a person may call an image."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lazyfs.checkpoint.reference import (
    FORMS,
    ArchiveReference,
    DirectoryReference,
    ImageArchiveReference,
    LayoutReference,
    RegistryReference,
    parse_reference,
)
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import UsageError

HEX = "ab" * 32
DIGEST = Digest("sha256", HEX)


@pytest.mark.parametrize(
    ("text", "host", "repository", "tag", "digest"),
    [
        ("alpine", "docker.io", "library/alpine", "latest", None),
        ("team/app", "docker.io", "team/app", "latest", None),
        ("docker.io/alpine:3", "docker.io", "library/alpine", "3", None),
        ("index.docker.io/alpine", "docker.io", "library/alpine", "latest", None),
        ("docker://quay.io/a/b:v1", "quay.io", "a/b", "v1", None),
        ("DOCKER://quay.io/a.tar", "quay.io", "a.tar", "latest", None),
        ("localhost/a", "localhost", "a", "latest", None),
        ("localhost:5000/a/b-c__d.e", "localhost:5000", "a/b-c__d.e", "latest", None),
        ("127.0.0.1:5000/a", "127.0.0.1:5000", "a", "latest", None),
        ("[::1]:5000/a:b", "[::1]:5000", "a", "b", None),
        ("Registry.Example/a", "registry.example", "a", "latest", None),
        (f"quay.io/a@sha256:{HEX}", "quay.io", "a", None, DIGEST),
        (f"quay.io/a:v1@sha256:{HEX}", "quay.io", "a", "v1", DIGEST),
        (f"alpine@sha256:{HEX}", "docker.io", "library/alpine", None, DIGEST),
    ],
)
def test_registry(
    text: str, host: str, repository: str, tag: str | None, digest: Digest | None
) -> None:
    reference = parse_reference(text)
    assert reference == RegistryReference(host, repository, tag, digest)
    assert parse_reference(str(reference)) == reference


def test_what_is_asked_for() -> None:
    digest = f"sha256:{HEX}"
    both = parse_reference(f"quay.io/a:v1@{digest}")
    assert isinstance(both, RegistryReference)
    assert both.wanted == digest
    assert str(both.pinned(DIGEST)) == f"quay.io/a@{digest}"
    layout = parse_reference("oci:/srv/image:v1")
    assert isinstance(layout, LayoutReference)
    assert layout.wanted == "v1"
    assert str(layout.pinned(DIGEST)) == f"oci:/srv/image@{digest}"


@pytest.mark.parametrize(
    ("text", "directory", "tag", "digest"),
    [
        ("oci:dir", "dir", None, None),
        ("oci:/a/b:v1", "/a/b", "v1", None),
        ("oci:./a:quay.io/b/c:v1", "a", "quay.io/b/c:v1", None),
        (f"oci:a@sha256:{HEX}", "a", None, DIGEST),
        ("oci:x.tar", "x.tar", None, None),
    ],
)
def test_layout(text: str, directory: str, tag: str | None, digest: Digest | None) -> None:
    reference = parse_reference(text)
    assert reference == LayoutReference(Path(directory), tag, digest)
    assert parse_reference(str(reference)) == reference


@pytest.mark.parametrize(
    ("text", "path", "tag", "digest"),
    [
        ("oci-archive:a.tar", "a.tar", None, None),
        ("oci-archive:/a/b.tar:v1", "/a/b.tar", "v1", None),
        ("oci-archive:./a:quay.io/b/c:v1", "a", "quay.io/b/c:v1", None),
        (f"oci-archive:a@sha256:{HEX}", "a", None, DIGEST),
        ("docker-archive:a.tar", "a.tar", None, None),
        ("docker-archive:/a.tar:alpine", "/a.tar", "docker.io/library/alpine:latest", None),
        ("docker-archive:a:localhost/b:v1", "a", "localhost/b:v1", None),
        ("docker-archive:a:index.docker.io/b/c:v1", "a", "docker.io/b/c:v1", None),
        (f"docker-archive:a@sha256:{HEX}", "a", None, DIGEST),
    ],
)
def test_archive_of_images(text: str, path: str, tag: str | None, digest: Digest | None) -> None:
    scheme = text.partition(":")[0]
    reference = parse_reference(text)
    assert reference == ImageArchiveReference(scheme, Path(path), tag, digest)
    assert parse_reference(str(reference)) == reference
    assert reference.wanted == (str(digest) if digest else tag)
    assert str(reference.pinned(DIGEST)) == f"{scheme}:{path}@sha256:{HEX}"


@pytest.mark.parametrize(
    ("text", "directory", "digest"),
    [
        ("dir:a", "a", None),
        ("dir:/a/b:c", "/a/b:c", None),
        (f"dir:a@sha256:{HEX}", "a", DIGEST),
    ],
)
def test_directory(text: str, directory: str, digest: Digest | None) -> None:
    reference = parse_reference(text)
    assert reference == DirectoryReference(Path(directory), digest)
    assert parse_reference(str(reference)) == reference
    assert reference.wanted == (str(digest) if digest else None)
    assert str(reference.pinned(DIGEST)) == f"dir:{directory}@sha256:{HEX}"


def test_a_directory_must_be_called_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"say dir:{tmp_path}"):
        parse_reference(str(tmp_path))
    (tmp_path / "oci-layout").touch()
    with pytest.raises(UsageError, match=f"say oci:{tmp_path}"):
        parse_reference(str(tmp_path))


def test_every_form_is_listed() -> None:
    for form in ("oci:", "oci-archive:", "docker-archive:", "dir:", "https://", "docker://"):
        assert form in FORMS


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("/a/b.tar", "/a/b.tar"),
        ("/a/b", "/a/b"),
        ("./b", "./b"),
        ("../b", "../b"),
        ("b.tar", "./b.tar"),
        ("a/b.tar", "./a/b.tar"),
        ("./oci:b", "./oci:b"),
        ("https://Host.example/a/b.tar", "https://host.example/a/b.tar"),
        ("HTTP://host:8080/b.tar#x", "http://host:8080/b.tar"),
    ],
)
def test_archive(text: str, location: str) -> None:
    reference = parse_reference(text)
    assert reference == ArchiveReference(location)
    assert parse_reference(str(reference)) == reference


def test_signed_url_is_asked_for_and_not_shown() -> None:
    reference = parse_reference("https://host/b.tar?sig=s3cr3t")
    assert isinstance(reference, ArchiveReference)
    assert reference.url == "https://host/b.tar?sig=s3cr3t"
    assert reference.is_url
    assert "s3cr3t" not in str(reference) + repr(reference)


def test_word_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.tar.zst"
    path.touch()
    assert parse_reference(str(path)) == ArchiveReference(str(path))
    assert not ArchiveReference(str(path)).is_url
    assert ArchiveReference(str(path)).path == path


@pytest.mark.parametrize(
    "text",
    [
        "",
        " a",
        "a\n",
        "a\0b.tar",
        "a/UPPER",
        "a//b",
        "a:",
        "a:b:c",
        "a@sha256:12",
        "a@md5:12",
        "quay.io/",
        "quay.io:0/a",
        "quay.io:99999/a",
        "-quay.io/a",
        "a" * 256,
        f"a:{'t' * 129}",
        "user:s3cr3t@quay.io/a",
        "docker://user:s3cr3t@quay.io/a",
        "docker://user:s3cr3t@localhost:5000/a",
        "user:p@ss/s3cr3t@quay.io/a",
        "https://host/a\u2003b.tar",
        "https://user:s3cr3t@host/a.tar",
        "https://s3cr3t@host/a.tar",
        "https:///a.tar",
        "https://host",
        "https://host/?s3cr3t",
        "https://host/a b.tar?s3cr3t",
        "https://[::1/a.tar",
        "https://host:x/a.tar",
        "ftp://host/a.tar",
        "oci:",
        "oci::v1",
        "oci:a:",
        "oci:a:b c",
        f"oci:@sha256:{HEX}",
        "containers-storage:alpine",
        "docker-daemon:alpine:latest",
        "oci-archive:",
        "oci-archive:a.tar:",
        "oci-archive:a.tar:b c",
        "docker-archive:",
        "docker-archive:a.tar:",
        "docker-archive:a.tar:UPPER",
        f"docker-archive:@sha256:{HEX}",
        "dir:",
        "dir:a@sha256:12x" + "\0",
        "ostree:a",
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(UsageError, match="A reference is one of") as caught:
        parse_reference(text)
    assert "s3cr3t" not in str(caught.value)


@given(st.text() | st.text(alphabet="ab/.:@-_[]1 ~?#%\\", max_size=30))
@example("..")
@example("./")
@example(" /")
@example("http:/x.tar")
@example("https://a/..?")
@example("./\udcff")
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    for prefix in (
        "",
        "docker://",
        "oci:",
        "oci-archive:",
        "docker-archive:",
        "dir:",
        "./",
        "https://host/",
        "quay.io/",
        "https://",
    ):
        try:
            reference = parse_reference(prefix + text)
        except UsageError:
            continue
        assert parse_reference(str(reference)) == reference


def test_parsing_loads_nothing_heavy() -> None:
    script = (
        "import sys, lazyfs.checkpoint.reference\n"
        "print(sorted({'requests', 'trio', 'asyncio'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert output.stdout.strip() == b"[]"
