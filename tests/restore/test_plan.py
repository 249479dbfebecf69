import shlex
from pathlib import Path
from typing import Any

import pytest

from lazyfs.restore.plan import Container, Plan

IMAGES, WORK = Path("/proc/7/fd/3"), Path("/tmp/work")


def plan(**options: Any) -> Plan:
    return Plan(reference="host/web:1", opening=lambda: None, **options)  # type: ignore[arg-type, return-value]


def test_criu_is_called_with_images_work_directory_and_the_users_options_last() -> None:
    words = plan(criu=("ld.so", "criu"), extra=("--tcp-close", "-v4")).command(IMAGES, WORK)
    assert words[:4] == ["ld.so", "criu", "restore", "--restore-detached"]
    assert words[words.index("--images-dir") + 1] == str(IMAGES)
    assert words[words.index("--work-dir") + 1] == str(WORK)
    assert words[-2:] == ["--tcp-close", "-v4"]
    assert "--lazy-pages" not in words
    assert "--lazy-pages" in plan(lazy_pages=True).command(IMAGES, WORK)


def test_the_criu_that_is_asked_for_its_version_is_the_one_that_restores() -> None:
    made = plan(criu=("/opt/my criu/criu", "-x", "a b"))
    assert shlex.split(made.check_with) == list(made.criu)
    box = Container(runtime=("runc",), bundle=Path("/b"), name="web")
    assert plan(criu=("mine",), container=box).check_with == "criu"


def test_a_runtime_is_called_with_its_own_global_options() -> None:
    box = Container(runtime=("runc", "--root", "/r"), bundle=Path("/b"), name="web")
    made = plan(container=box, lazy_pages=True, extra=("--tcp-established",))
    assert made.command(IMAGES, WORK) == [
        *("runc", "--root", "/r", "restore", "--detach", "--image-path", str(IMAGES)),
        *("--work-path", str(WORK), "--bundle", "/b", "--lazy-pages", "--tcp-established", "web"),
    ]
    assert made.undo() == ["runc", "--root", "/r", "delete", "--force", "web"]
    assert made.restores == "web"
    assert plan().undo() is None
    assert plan().restores == "host/web:1"


@pytest.mark.parametrize(
    ("extra", "keeps"),
    [
        ((), False),
        (("-j",), True),
        (("--shell-job",), True),
        (("-vj",), True),
        (("--join-ns",), False),
    ],
)
def test_a_shell_job_stays_in_the_session_of_the_terminal(
    extra: tuple[str, ...], keeps: bool
) -> None:
    assert plan(extra=extra).keeps_terminal is keeps
