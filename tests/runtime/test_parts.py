"""What the wrapper decides by: a command line, a configuration, a log, a policy."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from lazyfs.checkpoint.stub import Stub
from lazyfs.ground.errors import UsageError
from lazyfs.runtime.arguments import parse_restore
from lazyfs.runtime.config import RuntimeConfig, parse_config, read_config
from lazyfs.runtime.enginelog import error_line, open_engine_log
from lazyfs.runtime.policy import (
    LAZY_ANNOTATION,
    NotAllowed,
    check_allowed,
    read_bundle,
    wants_lazy_pages,
)
from lazyfs.runtime.remains import run_quietly

_CALLS = Path(__file__).parents[1] / "data" / "engines"
_STUB = Stub(reference="registry.example:5000/team/web@sha256:" + "ab" * 32)


def _recorded() -> list[list[str]]:
    """All calls of engines that were recorded, without the program."""
    found: list[list[str]] = []

    def collect(value: object) -> None:
        if isinstance(value, dict):
            if "argv" in value:
                found.append(value["argv"][1:])
            for each in value.values():
                collect(each)
        elif isinstance(value, list):
            for each in value:
                collect(each)

    for path in sorted(_CALLS.glob("*.json")):
        collect(json.loads(path.read_text()))
    return found


def test_restores_of_engines_are_understood_and_nothing_else_is_taken_for_one() -> None:
    calls = _recorded()
    assert len(calls) > 20
    restores = 0
    for words in calls:
        call = parse_restore(words)
        assert (call is not None) == ("restore" in words)
        if call is None or "--lsm-mount-context" in words:
            continue
        restores += 1
        assert call.container == words[-1]
        assert call.detach
        assert call.bundle == words[words.index("--bundle") + 1]
        assert call.pid_file == words[words.index("--pid-file") + 1]
        assert call.work_path == words[words.index("--work-path") + 1]
        at = words.index("--image-path") + 1
        assert call.image_path == words[at]
        new = call.with_image_path("/proc/7/fd/8", "--lazy-pages")
        more = words.index("restore") + 1
        assert new == [
            *words[:more],
            "--lazy-pages",
            *words[more:at],
            "/proc/7/fd/8",
            *words[at + 1 :],
        ]
        control = call.control("delete", "--force", call.container)
        assert not [word for word in control if "log" in word]
        assert control[-3:] == ["delete", "--force", words[-1]]
    assert restores >= 3


@pytest.mark.parametrize(
    ("line", "image", "bundle", "detach", "container"),
    [
        ("restore --image-path=/i -b/b -d c", "/i", "/b", True, "c"),
        ("restore -image-path /i -bundle=/b -d=true c", "/i", "/b", True, "c"),
        ("restore c --image-path /i --detach", "/i", None, True, "c"),
        ("restore --im /i --bun /b --det c", "/i", "/b", True, "c"),
        ("restore -db /b --i=/i c", "/i", "/b", True, "c"),
        ("restore --detach=false --image-path /a --image-path /i c", "/i", None, False, "c"),
        ("restore --empty-ns network -no-subreaper --image-path /i -- -c", "/i", None, False, "-c"),
        ("--systemd-cgroup --rootless=auto --root r --debug restore c", None, None, False, "c"),
        ("--cgroup-manager systemd --log-level debug restore c", None, None, False, "c"),
        ("restore --image-path /i --not-known-yet value c", "/i", None, False, "c"),
        ("restore", None, None, False, ""),
        ("restore --image-path", None, None, False, ""),
    ],
)
def test_options_are_read_as_runc_and_crun_read_them(
    line: str, image: str | None, bundle: str | None, detach: bool, container: str
) -> None:
    call = parse_restore(line.split())
    assert call is not None
    found = (call.image_path, call.bundle, call.detach, call.container)
    assert found == (image, bundle, detach, container)


@pytest.mark.parametrize(
    "line", ["", "exec c restore --image-path /i", "--root restore state c", "create restore", "--"]
)
def test_what_only_looks_like_a_restore_is_none(line: str) -> None:
    assert parse_restore(line.split()) is None


def test_where_images_lie_when_nobody_says() -> None:
    call = parse_restore(["restore", "--bundle", "b", "c"])
    assert call is not None
    assert call.images_directories("/d", "/usr/bin/runc") == ["/d/checkpoint", "/d/b/checkpoint"]
    assert call.images_directories("/d", "/usr/bin/crun") == ["/d/b/checkpoint", "/d/checkpoint"]
    assert call.with_image_path("/new") == ["restore", "--image-path", "/new", "--bundle", "b", "c"]


_WORDS = some.lists(
    some.one_of(
        some.sampled_from(
            [
                *("restore", "--image-path", "-image-path", "--image-path=/x", "-b", "-db", "--"),
                *("--bundle", "-d", "--log", "--log=f", "--root", "-", "--i", "--lazy-pages"),
            ]
        ),
        some.text(string.printable, max_size=6),
    ),
    max_size=12,
)


@given(_WORDS)
def test_any_words_are_understood_or_none_and_only_the_images_directory_changes(
    words: list[str],
) -> None:
    call = parse_restore(words)
    if call is None:
        return
    new = call.with_image_path("/new")
    if call.image_path is None and new != words:
        assert "/new" in new
    again = parse_restore(new)
    assert again is not None
    assert again.image_path == "/new"
    for name in ("container", "bundle", "work_path", "pid_file", "detach", "log", "log_format"):
        assert getattr(again, name) == getattr(call, name)


def test_the_example_configuration_is_understood_and_all_as_by_default() -> None:
    path = Path(__file__).parents[2] / "contrib/runtime/runtime.toml"
    text = path.read_text()
    assert parse_config(text.encode(), path) == RuntimeConfig()
    keys = [line for line in text.splitlines() if line.startswith("#") and " = " in line]
    shown = "\n".join(line.removeprefix("#") for line in text.splitlines() if line[:2] != "# ")
    config = parse_config(shown.encode(), path)
    assert config.allows("registry.example", "checkpoints/web")
    assert not config.allows("registry.example", "other")
    assert config.registry("registry.example:5000").plain_http
    assert len(keys) >= 15


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "there is no key `x`"),
        ('authfile = "a.json"', "authfile: not a full path"),
        ("lazy-pages = 'sometimes'", "lazy-pages"),
        ("[log]\nlevel = 3", "log.level"),
        ("deadline = -1", "deadline"),
        ("cache-dir = 'relative'", "cache-dir"),
        ("allowed = 'all'", "allowed"),
        ("[registries.'a.example']\nplain-htpp = true", "plain-htpp"),
        ("= 1", "no TOML"),
        ("\xff", "x"),
    ],
)
def test_a_wrong_configuration_is_told_by_file_and_key(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_config(text.encode("latin-1"), Path("/etc/x.toml"))
    assert "/etc/x.toml" in str(raised.value)
    assert words in str(raised.value)


@given(some.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_a_usage_error(data: bytes) -> None:
    try:
        parse_config(data, Path("x"))
    except UsageError:
        return


def test_a_configuration_that_is_named_must_exist(tmp_path: Path) -> None:
    named = str(tmp_path / "none.toml")
    with pytest.raises(UsageError, match=r"none\.toml"):
        read_config({"LAZYFS_RUNTIME_CONFIG": named})


@pytest.mark.parametrize(
    ("allowed", "is_allowed"),
    [
        (["*"], True),
        ([], False),
        (["registry.example:5000"], True),
        (["registry.example"], False),
        (["*.example:5000"], True),
        (["registry.example:5000/team"], True),
        (["registry.example:5000/tea"], False),
        (["registry.example:5000/team/web/more"], False),
        (["other.example", "registry.example:5000/team/web"], True),
    ],
)
def test_a_stub_names_what_is_allowed(allowed: list[str], is_allowed: bool) -> None:
    config = RuntimeConfig(allowed=allowed)
    if is_allowed:
        check_allowed(_STUB, config)
    else:
        with pytest.raises(NotAllowed, match="allowed"):
            check_allowed(_STUB, config)


@pytest.mark.parametrize(
    ("policy", "annotation", "stub", "asked", "is_lazy"),
    [
        ("annotation", None, None, False, False),
        ("annotation", None, True, False, True),
        ("annotation", "false", True, False, False),
        ("annotation", "True", False, False, True),
        ("annotation", "false", None, True, True),
        ("always", "false", False, False, True),
        ("never", "true", True, True, False),
    ],
)
def test_who_decides_about_lazy_pages(
    policy: str, annotation: str | None, stub: bool | None, asked: bool, is_lazy: bool
) -> None:
    config = parse_config(f"lazy-pages = '{policy}'".encode(), Path("x"))
    annotations = {} if annotation is None else {LAZY_ANNOTATION: annotation}
    marker = Stub(reference=_STUB.reference, lazy_pages=stub)
    assert wants_lazy_pages(config, annotations, marker, asked=asked) is is_lazy


def test_an_annotation_that_says_neither_is_an_error() -> None:
    with pytest.raises(UsageError, match="perhaps"):
        wants_lazy_pages(RuntimeConfig(), {LAZY_ANNOTATION: "perhaps"}, _STUB, asked=False)


def test_a_bundle_is_read_as_far_as_it_can_be(tmp_path: Path) -> None:
    assert read_bundle(tmp_path).annotations == {}
    text = {"annotations": {"a": "b"}, "linux": {"cgroupsPath": "/c"}, "root": {"path": "r"}}
    (tmp_path / "config.json").write_text(json.dumps(text))
    assert (read_bundle(tmp_path).annotations, read_bundle(tmp_path).cgroups_path) == (
        {"a": "b"},
        "/c",
    )
    (tmp_path / "config.json").write_text("[" * 10_000)
    assert read_bundle(tmp_path).cgroups_path == ""


def test_whose_trace_to_follow_is_the_containers_to_say(tmp_path: Path) -> None:
    assert read_bundle(tmp_path).workload == ""
    (tmp_path / "config.json").write_text('{"annotations": {"io.lazyfs.workload": "web"}}')
    assert read_bundle(tmp_path).workload == "web"
    assert RuntimeConfig().trace == "auto"
    assert parse_config(b'trace = "off"', Path("x")).trace == "off"
    with pytest.raises(UsageError, match="trace"):
        parse_config(b'trace = "/a/file"', Path("x"))


def test_what_was_logged_before_stays_and_our_error_is_the_only_new_line(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text('{"level":"error","msg":"old"}\n')
    log = open_engine_log(str(path), "json")
    assert log.last_error() is None
    with path.open("a") as file:
        file.write('{"level":"warning","msg":"w"}\n{"level":"error","msg":"criu failed"}\nrest\n')
    assert log.last_error() == "criu failed"
    log.replace('two\nlines "quoted" \udcff')
    old, new = map(json.loads, path.read_text().splitlines())
    assert old["msg"] == "old"
    assert (new["level"], new["msg"]) == ("error", 'two lines "quoted" \udcff')


def test_a_log_of_text_is_added_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('time="x" level=error msg="before"\n')
    log = open_engine_log(f"file:{path}", "text")
    with path.open("a") as file:
        file.write('time="x" level=error msg="its \\"own\\""\n')
    assert log.last_error() == 'its "own"'
    log.replace("ours")
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert lines[-1].endswith('level=error msg="ours"')


@pytest.mark.parametrize("name", [None, "", "journald:x", "syslog:x", "/nowhere/at/all", "/dev"])
def test_where_there_is_no_log_nothing_is_written(name: str | None) -> None:
    log = open_engine_log(name, "json")
    log.replace("lost")
    assert log.last_error() is None


@given(some.text(), some.booleans())
def test_any_message_is_one_line(message: str, is_json: bool) -> None:
    line = error_line(message, is_json=is_json)
    assert line.count(b"\n") == 1
    if is_json:
        assert json.loads(line)["level"] == "error"


def test_a_second_command_of_the_runtime_says_what_went_wrong() -> None:
    assert run_quietly("true", [], "/") is None
    assert run_quietly("sh", ["-c", "echo no >&2; exit 3"], "/") == "no"
    assert run_quietly("/nowhere", [], "/") is not None
