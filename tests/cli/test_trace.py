"""`lazyfs trace`: what is attached to which image, and what is told of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazyfs.checkpoint.referrals import TRACE_TYPE
from lazyfs.checkpoint.trace import Recording, dump_trace, parse_trace
from lazyfs.cli.main import run
from tests.faults import OCI_MANIFEST, FaultServer, digest_of
from tests.images import Layer, tar_layer
from tests.mount.published import checkpoint_files, manifest_of, publish, write_layout
from tests.traces import trace_of

LAYER = tar_layer(checkpoint_files(50_000))
SUBJECT = digest_of(json.dumps(manifest_of(LAYER)).encode())


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.writable = True
        yield server


class Said:
    """What `lazyfs trace` printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
        self._capsys, self._cache = capsys, str(cache)

    def __call__(self, word: str, *words: str) -> tuple[int, str, str]:
        code = run(["trace", word, "--cache-dir", self._cache, "--deadline", "2", *words])
        said = self._capsys.readouterr()
        return code, said.out, said.err


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Said:
    return Said(capsys, tmp_path / "cache")


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "a.trace"
    trace = trace_of(LAYER.digest, recording=Recording(reference="secret", began_at_s=1.7e9))
    path.write_bytes(dump_trace(trace))
    return path


def documented(section: str) -> str:
    text = (Path(__file__).parents[2] / "docs/json.md").read_text()
    found = text.partition(f"## `lazyfs {section}")[2].partition("\n## ")[0]
    assert found, section
    return found


def check_keys(value: Any, section: str) -> None:
    """See that all keys are documented."""
    for key, inner in value.items():
        assert f"`{key}`" in section, key
        for each in inner if isinstance(inner, list) else []:
            if isinstance(each, dict):
                check_keys(each, section)


def test_one_line_tells_what_was_attached(server: FaultServer, say: Said, trace_file: Path) -> None:
    reference = publish(server, LAYER)
    code, out, err = say("push", reference, str(trace_file))
    assert (code, err) == (0, "")
    name = f"{server.host}/{server.repository}@{SUBJECT}"
    assert out.startswith("attached the trace (")
    assert out.endswith(f" B; 12.0 KiB needed) to {name}\n")
    listed = json.loads(
        server.resources[f"/v2/{server.repository}/manifests/{SUBJECT.replace(':', '-')}"].body
    )
    (entry,) = listed["manifests"]
    manifest = json.loads(
        server.resources[f"/v2/{server.repository}/manifests/{entry['digest']}"].body
    )
    image = json.dumps(manifest_of(LAYER)).encode()
    assert manifest["subject"] == {
        "mediaType": OCI_MANIFEST,
        "digest": SUBJECT,
        "size": len(image),
    }
    assert manifest["artifactType"] == entry["artifactType"] == TRACE_TYPE
    assert manifest["annotations"] == entry["annotations"]
    assert server.resources[f"/v2/{server.repository}/blobs/{digest_of(b'{}')}"].body == b"{}"
    (layer,) = manifest["layers"]
    document = server.resources[f"/v2/{server.repository}/blobs/{layer['digest']}"].body
    assert b"secret" not in document
    assert parse_trace(document, "it") == parse_trace(trace_file.read_bytes(), "it").hint()


def test_again_for_the_same_workload_takes_its_place(
    server: FaultServer, say: Said, trace_file: Path, tmp_path: Path
) -> None:
    reference = publish(server, LAYER)
    for name in ("web", "job", "web"):
        code, out, err = say("push", reference, str(trace_file), "--workload", name, "--json")
        assert (code, err) == (0, "")
        check_keys(json.loads(out), documented("trace push"))
    code, out, _err = say("list", reference, "--json")
    report = json.loads(out)
    check_keys(report, documented("trace list"))
    assert [each["workload"] for each in report["traces"]] == ["web", "job"]
    code, out, _err = say("list", reference)
    assert [line.split("\t")[0] for line in out.splitlines()] == ["web", "job"]


def test_show_tells_what_was_needed_of_which_file(
    server: FaultServer, say: Said, trace_file: Path
) -> None:
    code, out, err = say("show", str(trace_file))
    assert (code, err) == (0, "")
    assert "Until: port 8080 answered" in out
    assert f"Layer: {LAYER.digest}, 10 B" in out
    assert "Needed: 12.0 KiB of 1 file, in 2 ranges" in out
    assert "Recorded: 2023-11-14T22:13:20+00:00, of secret" in out
    row = "checkpoint/pages-1.img\t12.0 KiB\t0.6%\t2.0 MiB\t2\t0.013 to 0.020 s"
    assert row in out.splitlines()
    code, out, err = say("show", str(trace_file), "--json")
    report = json.loads(out)
    check_keys(report, documented("trace show"))
    assert report["needed_bytes"] == 12 * 1024
    assert report["recorded"] is True
    reference = publish(server, LAYER)
    assert say("push", reference, str(trace_file), "--workload=web")[0] == 0
    for options in ((), ("--workload=web",)):
        code, out, err = say("show", reference, "--json", *options)
        assert (code, err) == (0, "")
        report = json.loads(out)
        assert (report["workload"], report["recorded"]) == ("web", False)
    code, _out, err = say("show", reference, "--workload=job")
    assert code == 1
    assert "has no trace of job that can be used: those that are attached: web" in err


def test_a_recording_that_is_not_whole_says_so(say: Said, tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_bytes(dump_trace(trace_of(LAYER.digest, recording=Recording(dropped=7))))
    _code, out, _err = say("show", str(path))
    assert "Left out: 7 events: more may have been needed" in out.splitlines()


def test_a_trace_of_another_image_is_refused(
    server: FaultServer, say: Said, tmp_path: Path
) -> None:
    path = tmp_path / "other"
    other = "sha256:" + "0" * 64
    path.write_bytes(dump_trace(trace_of(other)))
    code, _out, err = say("push", publish(server, LAYER), str(path))
    assert code == 2
    assert f"it names {other}, and the image has {LAYER.digest}" in err
    assert all(seen.method == "GET" for seen in server.seen)


@pytest.mark.parametrize("data", [b"", b"not a trace", b"\x28\xb5\x2f\xfd"])
def test_a_file_that_is_no_trace(
    server: FaultServer, say: Said, tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "it"
    path.write_bytes(data)
    for words in (("push", publish(server, LAYER), str(path)), ("show", str(path))):
        code, out, err = say(*words)
        assert (code, out) == (4, "")
        assert f"{path} is no trace" in err
        assert "Traceback" not in err
    assert server.seen == []


def test_what_nothing_can_be_attached_to(
    server: FaultServer, say: Said, trace_file: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "checkpoint.tar"
    archive.write_bytes(LAYER.blob)
    code, _out, err = say("push", str(archive), str(trace_file))
    assert code == 2
    assert "in a registry or in an OCI layout" in err
    code, _out, err = say("list", str(archive))
    assert code == 2
    code, _out, err = say("push", publish(server, LAYER), str(tmp_path / "missing"))
    assert code == 2
    assert "cannot be read: No such file" in err
    code, _out, err = say("push", f"{server.host}/{server.repository}:none", str(trace_file))
    assert code == 3


def test_a_stub_has_no_traces(server: FaultServer, say: Said, trace_file: Path) -> None:
    real = f"{server.host}/real@{SUBJECT}"
    layer = Layer(LAYER.blob, LAYER.annotations, LAYER.media_type)
    server.add_manifest(manifest_of(layer, {"lazyfs.stub.reference": real}), "stub")
    for words in (("push", "REF", str(trace_file)), ("list", "REF"), ("show", "REF")):
        named = [f"{server.host}/{server.repository}:stub" if w == "REF" else w for w in words]
        code, _out, err = say(*named)
        assert code == 2
        assert f"it stands for, {real}" in err


def test_a_layout(say: Said, trace_file: Path, tmp_path: Path) -> None:
    reference = write_layout(tmp_path / "layout", LAYER)
    code, out, err = say("push", reference, str(trace_file), "--workload", "web", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["listed_by"] == "index"
    code, out, err = say("show", reference)
    assert (code, err) == (0, "")
    assert "Workload: web" in out
    code, out, err = say("list", reference)
    assert out.startswith("web\t")


def test_nothing_is_attached(server: FaultServer, say: Said) -> None:
    reference = publish(server, LAYER)
    code, out, _err = say("list", reference)
    assert (code, out) == (0, "")
    code, _out, err = say("show", reference)
    assert code == 1
    assert "has no trace that can be used: none is attached" in err


def test_a_name_that_is_neither_a_file_nor_an_image(server: FaultServer, say: Said) -> None:
    name = f"{server.address}/no-such.trace"
    code, _out, err = say("show", name)
    assert code == 3
    assert f"{name} is no file here; and as an image: " in err


def test_names_that_would_move_a_cursor(server: FaultServer, say: Said, trace_file: Path) -> None:
    reference = publish(server, LAYER)
    code, _out, err = say("push", reference, str(trace_file), "--workload", "a\x1b[2J")
    assert code == 2
    assert "all printable" in err
