"""Auth files and the helpers they name: which of them counts, and that secrets stay unsaid."""

import base64
import json
import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.ground.errors import SourceError
from lazyfs.transport.credentials import Credentials, auth_files, find_credentials
from lazyfs.transport.helpers import HelperAnswer, HelperError, NoHelper, ask_helper


def entry(username: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}


def write(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def test_longest_path_wins(tmp_path: Path) -> None:
    authfile = write(
        tmp_path / "auth.json",
        {
            "auths": {
                "registry.example": entry("host", "p"),
                "registry.example/team": entry("team", "p"),
                "registry.example/team/app": entry("app", "a:b"),
                "registry.example/empty": {},
                "https://old.example/v1/": {"username": "old", "password": "p"},
                "https://index.docker.io/v1/": entry("docker", "p"),
            }
        },
    )

    def user(host: str, repository: str) -> str | None:
        found = find_credentials(host, repository, authfile=authfile, environ={})
        return f"{found.username} {found.password}" if found else None

    assert user("registry.example", "team/app") == "app a:b"
    assert user("registry.example", "team/app2") == "team p"
    assert user("registry.example", "team/app/x") == "app a:b"
    assert user("registry.example", "empty") == "host p"
    assert user("registry.example:5000", "team/app") is None
    assert user("old.example", "x") == "old p"
    assert user("docker.io", "library/alpine") == "docker p"
    assert user("other.example", "x") is None


def test_files_in_order(tmp_path: Path) -> None:
    environ = {
        "HOME": str(tmp_path / "home"),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "DOCKER_CONFIG": str(tmp_path / "docker"),
    }
    files = [
        tmp_path / "run/containers/auth.json",
        tmp_path / "config/containers/auth.json",
        tmp_path / "docker/config.json",
        tmp_path / "home/.dockercfg",
    ]
    assert auth_files(None, environ) == files

    def user() -> str | None:
        found = find_credentials("r.example", "a", authfile=None, environ=environ)
        return found.username if found else None

    assert user() is None
    write(files[3], {"r.example": entry("oldest", "p")})
    assert user() == "oldest"
    write(files[2], {"auths": {"r.example": entry("docker", "p")}, "credsStore": "x"})
    assert user() == "docker"
    write(files[0], {"auths": {}})
    assert user() == "docker"
    write(files[0], {"auths": {"r.example": entry("runtime", "p")}})
    assert user() == "runtime"
    environ["REGISTRY_AUTH_FILE"] = str(write(tmp_path / "named.json", {"auths": {}}))
    assert user() is None, "a file that is named stands alone"
    assert auth_files(tmp_path / "x", environ) == [tmp_path / "x"]
    assert auth_files(None, {"HOME": "/h"})[1] == Path("/h/.config/containers/auth.json")


def test_auth_files_that_cannot_be_read(tmp_path: Path) -> None:
    def look(path: Path) -> None:
        find_credentials("r.example", "a", authfile=path, environ={})

    with pytest.raises(SourceError, match="does not exist"):
        look(tmp_path / "none.json")
    with pytest.raises(SourceError, match="cannot be read"):
        look(tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text('{"auths": {"r.example": {"auth": 1, "secret": "s3cr3t"}}}')
    with pytest.raises(SourceError, match="not an auth file") as caught:
        look(broken)
    assert "s3cr3t" not in str(caught.value)
    write(broken, {"auths": {"r.example": {"auth": "s3cr3t"}}})
    with pytest.raises(SourceError, match="cannot be read") as caught:
        look(broken)
    assert "s3cr3t" not in str(caught.value)
    broken.write_text("")
    look(broken)


class Helpers:
    """Helpers in memory, by name and server."""

    def __init__(self, known: dict[tuple[str, str], HelperAnswer]) -> None:
        self.known = known
        self.asked: list[tuple[str, str]] = []

    def ask(self, name: str, server: str) -> HelperAnswer | None:
        self.asked.append((name, server))
        if name == "missing":
            raise NoHelper("the credential helper docker-credential-missing is not on PATH")
        return self.known.get((name, server))


def test_helper_of_the_registry_comes_first_and_that_for_all_last(tmp_path: Path) -> None:
    authfile = write(
        tmp_path / "auth.json",
        {
            "auths": {
                "r.example": entry("plain", "p"),
                "own.example": entry("plain", "p"),
                "stored.example": {},
            },
            "credHelpers": {"own.example": "own"},
            "credsStore": "all",
        },
    )
    helpers = Helpers(
        {
            ("own", "own.example"): HelperAnswer("own", "p"),
            ("all", "stored.example"): HelperAnswer("<token>", "refresh"),
            ("all", "https://index.docker.io/v1/"): HelperAnswer("hub", "p"),
            ("all", "r.example"): HelperAnswer("never", "p"),
        }
    )

    def find(host: str) -> Credentials | None:
        return find_credentials(host, "a/b", authfile=authfile, environ={}, ask=helpers.ask)

    own, plain, stored, hub = map(find, ("own.example", "r.example", "stored.example", "docker.io"))
    assert own is not None
    assert (own.username, str(authfile) in str(own.source)) == ("own", True)
    assert plain is not None and plain.username == "plain"
    assert stored is not None
    assert (stored.username, stored.password, stored.identity_token) == ("", "", "refresh")
    assert stored.basic() is None
    assert hub is not None and hub.username == "hub"
    assert find("unknown.example") is None
    assert ("all", "r.example") not in helpers.asked


def test_helper_that_knows_nothing_leaves_it_to_the_next_file(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    helpers = {"credHelpers": {"r.example": "own"}, "auths": {"r.example": entry("first", "p")}}
    write(tmp_path / "run/containers/auth.json", helpers)
    write(tmp_path / ".docker/config.json", {"auths": {"r.example": entry("second", "p")}})
    found = find_credentials("r.example", "a", authfile=None, environ=environ, ask=Helpers({}).ask)
    assert found is not None and found.username == "second"


def test_helper_that_is_missing(tmp_path: Path) -> None:
    authfile = write(
        tmp_path / "config.json",
        {
            "auths": {"known.example": {}},
            "credHelpers": {"own.example": "missing"},
            "credsStore": "missing",
        },
    )
    ask = Helpers({}).ask
    for host in ("own.example", "known.example"):
        with pytest.raises(NoHelper, match=r"docker-credential-missing .*config\.json names it"):
            find_credentials(host, "a", authfile=authfile, environ={}, ask=ask)
    assert find_credentials("public.example", "a", authfile=authfile, environ={}, ask=ask) is None


def test_tokens_in_a_file(tmp_path: Path) -> None:
    authfile = write(
        tmp_path / "auth.json",
        {
            "auths": {
                "identity.example": {**entry("user", ""), "identitytoken": "refresh"},
                "bare.example": {"identitytoken": "refresh"},
                "registry.example": {"registrytoken": "bearer"},
                "null.example": None,
                "nothing.example": {"auth": None, "email": "x"},
            },
            "credHelpers": None,
            "HttpHeaders": {"X": "y"},
        },
    )

    def find(host: str) -> Credentials | None:
        return find_credentials(host, "a", authfile=authfile, environ={}, ask=Helpers({}).ask)

    for host in ("identity.example", "bare.example"):
        found = find(host)
        assert found is not None and found.identity_token == "refresh"
        assert "refresh" not in repr(found)
    found = find("registry.example")
    assert found is not None and found.registry_token == "bearer"
    assert find("null.example") is None
    assert find("nothing.example") is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda each: (
        st.lists(each, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "auths",
                    "credHelpers",
                    "credsStore",
                    "r.example",
                    "r.example/a",
                    "auth",
                    "username",
                    "password",
                    "identitytoken",
                    "registrytoken",
                    "https://r.example/v1/",
                    "..",
                    "x" * 300,
                ]
            ),
            each,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.binary(max_size=200) | _JSON.map(lambda each: json.dumps(each).encode()))
def test_any_auth_file_gives_credentials_or_the_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    for name in ("auth.json", ".dockercfg"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(data)
        try:
            found = find_credentials(
                "r.example", "a/b", authfile=path, environ={}, ask=Helpers({}).ask
            )
        except SourceError:
            continue
        assert found is None or found.password or found.identity_token or found.registry_token


def helper(directory: Path, name: str, script: str) -> dict[str, str]:
    """Install a helper; return an environment that finds it."""
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(script))
    path.chmod(0o755)
    return {"PATH": str(directory), "MARK": str(directory / "mark")}


def test_helper_is_asked_on_its_standard_input(tmp_path: Path) -> None:
    environ = helper(
        tmp_path,
        "fine",
        """
        import json, os, sys
        server = sys.stdin.read()
        with open(os.environ["MARK"], "w") as file:
            json.dump([sys.argv[1:], server], file)
        print(json.dumps({"ServerURL": server, "Username": "user", "Secret": "s3cr3t"}))
        """,
    )
    answer = ask_helper("fine", "r.example:5000", environ=environ)
    assert answer == HelperAnswer("user", "s3cr3t")
    assert "s3cr3t" not in repr(answer)
    assert json.loads((tmp_path / "mark").read_text()) == [["get"], "r.example:5000"]


@pytest.mark.parametrize(
    "message", ["credentials not found in native keychain\n", "no credentials server URL"]
)
def test_helper_that_knows_nothing(tmp_path: Path, message: str) -> None:
    environ = helper(tmp_path, "none", f"print({message!r}); raise SystemExit(1)")
    assert ask_helper("none", "r.example", environ=environ) is None
    environ = helper(tmp_path, "empty", "print('{}')")
    assert ask_helper("empty", "r.example", environ=environ) is None


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("print('s3cr3t'); raise SystemExit('s3cr3t')", r"exit status 1\).*\| docker-credential-x"),
        ("print('s3cr3t')", "something else"),
        ('print(\'{"Secret": 5, "Username": "s3cr3t"}\')', "something else"),
        ("import os; os.kill(os.getpid(), 9)", "exit status -9"),
    ],
)
def test_helper_that_fails_is_not_quoted(tmp_path: Path, script: str, says: str) -> None:
    environ = helper(tmp_path, "x", script)
    with pytest.raises(HelperError, match=says) as caught:
        ask_helper("x", "r.example", environ=environ)
    assert "s3cr3t" not in str(caught.value)


def test_helper_that_hangs_or_leaves_a_child_is_not_waited_for(tmp_path: Path) -> None:
    environ = helper(tmp_path, "slow", "import time; time.sleep(60)")
    with pytest.raises(HelperError, match=r"within 0\.2 s"):
        ask_helper("slow", "r.example", environ=environ, timeout_s=0.2)
    script = """
        import json, os, time
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        with open(os.environ["MARK"], "w") as file:
            file.write(str(child))
        print(json.dumps({"Username": "user", "Secret": "x"}), flush=True)
    """
    environ = helper(tmp_path, "child", script)
    try:
        assert ask_helper("child", "r.example", environ=environ) is not None
    finally:
        os.kill(int((tmp_path / "mark").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x y", "-x", "x" * 101, "x\0", "ä"])
def test_names_that_no_helper_has(name: str) -> None:
    with pytest.raises(NoHelper):
        ask_helper(name, "r.example", environ=dict(os.environ))


def test_helper_that_is_not_on_path(tmp_path: Path) -> None:
    with pytest.raises(NoHelper, match="docker-credential-none is not on PATH"):
        ask_helper("none", "r.example", environ={"PATH": str(tmp_path)})
    helper(tmp_path, "bad", "")
    (tmp_path / "docker-credential-bad").write_text("#!/no/such/interpreter\n")
    with pytest.raises(HelperError, match="cannot be run"):
        ask_helper("bad", "r.example", environ={"PATH": str(tmp_path)})
