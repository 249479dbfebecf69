import os
import sys
from pathlib import Path
from subprocess import run

import click
import pytest
from click.testing import CliRunner

from lazyfs.cli.options import SourceOptions, default_cache_dir, source_options
from lazyfs.ground.settings import ContentSettings, Limit, TransportSettings
from lazyfs.transport.run_directory import run_directory


def settings_of(*arguments: str, env: dict[str, str] | None = None) -> SourceOptions:
    seen: list[SourceOptions] = []

    @click.command()
    @click.argument("other")
    @source_options
    def command(other: str, source: SourceOptions) -> None:
        assert other == "x"
        seen.append(source)

    result = CliRunner().invoke(command, ["x", *arguments], env=env, catch_exceptions=False)
    if result.exit_code:
        raise click.UsageError(result.output)
    return seen[0]


def test_by_default() -> None:
    settings = settings_of(env={"LAZYFS_CACHE_DIR": None})  # type: ignore[dict-item]
    assert settings == SourceOptions(
        default_cache_dir(),
        TransportSettings(run_directory=run_directory()),
        ContentSettings(),
        "auto",
    )


def test_figures_that_are_documented() -> None:
    """README and docs/SEMANTICS.md name these defaults."""
    transport, content = TransportSettings(), ContentSettings()
    assert (transport.deadline_s, transport.brief_deadline_s) == (90, 2.5)
    assert transport.whole_body_limit_bytes == 4 << 20
    assert transport.shared_connections == 64
    assert (content.patience_s, content.stream_patience_s) == (0.4, 5)
    assert content.memory_cache_bytes == 32 << 20


def test_all_of_them() -> None:
    settings = settings_of(
        "--cache-dir=/tmp/c",
        "--plain-http",
        "--verify=full",
        "--deadline=1.5",
        "--referrers=never",
        "--connections=3",
    )
    assert settings == SourceOptions(
        Path("/tmp/c"),
        TransportSettings(
            plain_http=True,
            deadline_s=1.5,
            stall_timeout_s=1.5,
            connect_timeout_s=1.5,
            shared_connections=3,
            run_directory=run_directory(),
        ),
        ContentSettings(verify="full"),
        "never",
    )


def test_how_the_registry_is_spoken_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "auth.json").touch()
    monkeypatch.chdir(tmp_path)
    settings = settings_of(
        "--authfile=auth.json", "--tls-verify=false", "--allow-local-redirects"
    ).transport
    assert settings == TransportSettings(
        authfile=str(tmp_path / "auth.json"),
        tls_verify=False,
        allow_local_redirects=True,
        run_directory=run_directory(),
    ), "a daemon is elsewhere"
    default = TransportSettings(run_directory=run_directory())
    assert settings_of("--tls-verify=true").transport == default
    for wrong in ("--authfile=none.json", "--authfile=.", "--tls-verify=perhaps"):
        with pytest.raises(click.UsageError):
            settings_of(wrong)


def test_where_mirrors_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = {"LAZYFS_MIRRORS": "containerd"}
    assert settings_of(env=env).transport.mirrors == "containerd"
    assert settings_of("--mirrors=none", env=env).transport.mirrors == "none"
    assert settings_of("--mirrors=./certs.d").transport.mirrors == str(tmp_path / "certs.d")
    with pytest.raises(click.UsageError, match=r"'podman' is none of auto, .*a path has a slash"):
        settings_of("--mirrors=podman")


def test_the_cache_directory_of_the_environment() -> None:
    env = {"LAZYFS_CACHE_DIR": "/tmp/env"}
    assert settings_of(env=env).cache_dir == Path("/tmp/env")
    assert settings_of("--cache-dir=/tmp/c", env=env).cache_dir == Path("/tmp/c")


def test_where_bytes_are_kept_and_how_many() -> None:
    settings = settings_of("--cache=memory", "--cache-size=2G")
    assert (settings.cache_kind, settings.cache_limit) == ("memory", Limit(2 << 30))
    assert settings.cache().directory is None
    env = {"LAZYFS_CACHE_SIZE": "25%"}
    assert settings_of(env=env).cache_limit == Limit(percent=25)
    assert settings_of("--cache-size=1G", env=env).cache_limit == Limit(1 << 30)


def test_the_cache_directory_is_made_for_its_owner(tmp_path: Path) -> None:
    cache = settings_of(f"--cache-dir={tmp_path}/cache").cache()
    assert cache.directory == tmp_path / "cache"
    assert cache.directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "arguments", [["--deadline=0"], ["--deadline=x"], ["--verify=never"], ["--connections=-1"]]
)
def test_what_cannot_be(arguments: list[str]) -> None:
    with pytest.raises(click.UsageError):
        settings_of(*arguments)


@pytest.mark.parametrize(
    ("env", "directory"),
    [
        ({"XDG_CACHE_HOME": "/tmp/xdg", "HOME": "/tmp/home"}, "/tmp/xdg/lazyfs"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/tmp/home"}, "/tmp/home/.cache/lazyfs"),
        ({"HOME": "/tmp/home"}, "/tmp/home/.cache/lazyfs"),
    ],
)
def test_a_users_cache_directory(env: dict[str, str], directory: str) -> None:
    root = os.geteuid() == 0
    code = (
        "import os, lazyfs.cli.options as options\n"
        f"{'os.setuid(65534)' if root else ''}\n"
        "print(options.default_cache_dir())"
    )
    found = run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == directory


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_roots_cache_directory() -> None:
    assert default_cache_dir() == Path("/var/cache/lazyfs")
