"""What starting imports, and what it must not: each library costs every mount its time."""

import subprocess
import sys

SLOW = ["trio", "requests", "urllib3", "pyfuse3", "rich", "google", "prometheus_client", "h11"]


def imported(statement: str, names: list[str]) -> set[str]:
    """Those of `names` that are there after `statement`, in an interpreter of its own."""
    program = f"import sys; {statement}; print(*(set({names}) & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_who_parses_a_command_line_imports_no_slow_library() -> None:
    """The caller of a mount waits for its daemon, and needs none of what that does."""
    commands = ("main", "mount", "status", "wait", "warm", "inspect", "ls", "cat", "report")
    statement = f"import {', '.join(f'lazyfs.cli.{name}' for name in commands)}"
    assert imported(statement, [*SLOW, "xxhash", "zstandard"]) == set()


def test_what_asks_for_a_manifest_waits_for_no_event_loop() -> None:
    """So that the rest is imported while the registry is waited for."""
    statement = "import lazyfs.checkpoint.ahead, lazyfs.transport.mirrors"
    assert imported(statement, SLOW) == set()
    statement = "import lazyfs.checkpoint.ahead, lazyfs.transport.http"
    assert imported(statement, SLOW) == {"requests", "urllib3"}


def test_a_mount_does_import_them() -> None:
    """Else the tests above would find nothing whatever is imported."""
    assert imported("import lazyfs.mount", SLOW) >= {"trio", "pyfuse3"}
