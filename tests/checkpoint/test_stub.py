"""The marker of a stub: what is written is read, and nothing else is believed."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from lazyfs.checkpoint.stub import Pages, Stub, read_stub, real_reference, write_stub
from lazyfs.ground.errors import MalformedError

_DIGEST = "sha256:" + "ab" * 32
_STUB = Stub(
    reference=f"registry.example/checkpoints/web@{_DIGEST}",
    pages=[Pages("pages-1.img", 4096), Pages("parent/pages-1.img", 8192)],
    checkpoint_bytes=20_000,
    image_bytes=9_000,
    made_by="lazyfs 0",
)


def test_a_marker_is_read_as_it_was_written() -> None:
    stub = read_stub(write_stub(_STUB))
    assert stub == _STUB
    assert stub.pages_bytes == 12_288
    assert str(real_reference(stub)) == f"registry.example/checkpoints/web@{_DIGEST}"


@pytest.mark.parametrize(
    "reference",
    [
        "registry.example/web:1",
        "registry.example/web",
        "oci:/srv/layout",
        f"oci:/srv/layout@{_DIGEST}",
        "/srv/checkpoint.tar",
        "http://registry.example/checkpoint.tar",
        "dir:/etc",
        "no reference",
        f"docker://user:secret@registry.example/web@{_DIGEST}",
        f"docker://docker://registry.example/web@{_DIGEST}",
        f"dir:/etc@{_DIGEST}",
        f"https://registry.example/web@{_DIGEST}",
    ],
)
def test_it_names_an_image_in_a_registry_by_digest_and_nothing_else(reference: str) -> None:
    with pytest.raises(MalformedError) as raised:
        read_stub(write_stub(Stub(reference=reference)))
    assert len(str(raised.value).splitlines()) == 1, "engines show one line"
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("name", ["{}", "docker.io/{}"])
def test_no_file_of_this_machine_is_in_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    image = f"team/web@{_DIGEST}"
    file = tmp_path / name.format(image)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"a checkpoint that somebody has put there")
    monkeypatch.chdir(tmp_path)
    stub = read_stub(write_stub(Stub(reference=name.format(image))))
    assert str(real_reference(stub)) == f"docker.io/{image}"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"version": 2, "reference": "a.example/b@%s"}' % _DIGEST.encode(),
        b'{"reference": "a.example/b@%s", "pages": [{"name": "", "size_bytes": 1}]}'
        % _DIGEST.encode(),
        b'{"reference": "a.example/b@%s", "checkpoint_bytes": -1}' % _DIGEST.encode(),
        b"[" * 100_000,
        b" " * ((1 << 20) + 1),
    ],
)
def test_what_is_no_marker_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        read_stub(data)


@given(some.binary(max_size=300))
def test_any_bytes_are_a_marker_or_refused(data: bytes) -> None:
    with contextlib.suppress(MalformedError):
        read_stub(data)
