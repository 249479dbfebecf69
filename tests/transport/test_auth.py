"""Challenges, tokens and auth files; and that secrets stay where they belong."""

import base64
import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.ground.errors import FetchError, LazyfsError, SourceError
from lazyfs.transport.auth import (
    Challenge,
    RegistryAuthorizer,
    parse_challenges,
    parse_token,
    token_url,
)
from lazyfs.transport.client import SmallReply
from lazyfs.transport.credentials import Credentials, auth_files, find_credentials
from lazyfs.transport.urls import Origin

REGISTRY = Origin("https", "registry.example", 443)
BEARER = 'Bearer realm="https://auth.example/token",service="registry.example"'


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("Basic realm=here", [Challenge("basic", {"realm": "here"})]),
        (
            'BEARER Realm="https://a/t",service="a, \\"b\\"" , scope="x"',
            [Challenge("bearer", {"realm": "https://a/t", "service": 'a, "b"', "scope": "x"})],
        ),
        (
            'Negotiate, Bearer realm = "r" , Basic realm="b"',
            [
                Challenge("negotiate", {}),
                Challenge("bearer", {"realm": "r"}),
                Challenge("basic", {"realm": "b"}),
            ],
        ),
        ("", []),
        ('Bearer realm="unfinished', [Challenge("bearer", {})]),
    ],
)
def test_challenges(header: str, wanted: list[Challenge]) -> None:
    assert parse_challenges(header) == wanted


@given(st.text(alphabet='ab=", \\\t;Bearer', max_size=60) | st.text())
def test_any_challenge_is_read_without_an_error(header: str) -> None:
    parse_challenges(header)


@given(
    st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda each: st.dictionaries(
            st.sampled_from(["token", "access_token", "expires_in"]), each
        ),
    ).map(lambda each: json.dumps(each).encode())
)
def test_any_token_reply_is_a_token_or_an_error(body: bytes) -> None:
    try:
        token = parse_token(body, "auth.example")
    except SourceError:
        return
    assert token.header.startswith("Bearer ")
    assert token.life_s > 0


def test_token_reply() -> None:
    token = parse_token(b'{"access_token": "abc", "expires_in": 10}', "a")
    assert (token.header, token.life_s) == ("Bearer abc", 10)
    assert parse_token(b'{"token": "abc"}', "a").life_s == 60
    assert "abc" not in repr(token)
    with pytest.raises(SourceError):
        parse_token(b'{"token": "a\\r\\nb"}', "a")


def test_where_a_token_is_asked_for() -> None:
    (challenge,) = parse_challenges(BEARER)
    assert token_url(challenge, REGISTRY, "a/b") == (
        "https://auth.example/token?service=registry.example&scope=repository%3Aa%2Fb%3Apull"
    )
    for realm in ("http://auth.example/token", "ftp://x", "https://u:p@x/", "nonsense", ""):
        with pytest.raises(SourceError):
            token_url(Challenge("bearer", {"realm": realm}), REGISTRY, "a/b")
    plain = Challenge("bearer", {"realm": "http://localhost/token?a=b"})
    url = token_url(plain, Origin("http", "localhost", 5000), "r")
    assert url == "http://localhost/token?a=b&scope=repository%3Ar%3Apull"


class TokenServer:
    """Gives numbered tokens, or what it is told to."""

    def __init__(self, life_s: float = 300) -> None:
        self.life_s = life_s
        self.asked: list[tuple[str, Mapping[str, str]]] = []
        self.error: LazyfsError | None = None
        self.gate: threading.Event | None = None

    def get(self, url: str, headers: Mapping[str, str], form: bytes | None) -> SmallReply:
        self.asked.append((url, headers))
        if self.gate is not None:
            assert self.gate.wait(5)
        if self.error is not None:
            raise self.error
        body = {"token": f"t{len(self.asked)}", "expires_in": self.life_s}
        return SmallReply(url, 200, {}, json.dumps(body).encode())

    def authorizer(self, credentials: Credentials | None = None) -> RegistryAuthorizer:
        return RegistryAuthorizer(
            REGISTRY, "a/b", lambda: credentials, self.get, name="registry.example"
        )


def test_token_is_for_the_registry_alone() -> None:
    authorizer = TokenServer().authorizer()
    assert authorizer.authorization(REGISTRY) is None
    assert authorizer.renew(REGISTRY, BEARER, None) == "Bearer t1"
    assert authorizer.authorization(REGISTRY) == "Bearer t1"
    for other in (
        Origin("http", "registry.example", 443),
        Origin("https", "registry.example", 8443),
        Origin("https", "auth.example", 443),
    ):
        assert authorizer.authorization(other) is None


def test_token_is_renewed_before_it_expires_and_when_refused() -> None:
    server = TokenServer(life_s=1e-9)
    authorizer = server.authorizer()
    authorizer.renew(REGISTRY, BEARER, None)
    assert authorizer.authorization(REGISTRY) == "Bearer t2", "the first has expired by now"
    server.life_s = 300
    assert authorizer.renew(REGISTRY, BEARER, "Bearer t2") == "Bearer t3"
    assert authorizer.renew(REGISTRY, BEARER, "Bearer t2") == "Bearer t3", "another thread was first"
    assert len(server.asked) == 3


def test_threads_that_met_the_same_401_share_a_token_or_its_failure() -> None:
    server = TokenServer()
    authorizer = server.authorizer()
    server.gate = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(authorizer.renew, REGISTRY, BEARER, None) for _ in range(8)]
        server.gate.set()
        assert {future.result() for future in futures} == {"Bearer t1"}
    assert len(server.asked) == 1


def test_threads_share_a_failure_too() -> None:
    server = TokenServer()
    server.error = FetchError("away", transient=True)
    server.gate = threading.Event()
    authorizer = server.authorizer()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(authorizer.renew, REGISTRY, BEARER, None) for _ in range(8)]
        server.gate.set()
        assert all(isinstance(future.exception(), FetchError) for future in futures)


def test_token_that_cannot_be_had() -> None:
    server = TokenServer()
    server.error = FetchError("away", transient=True)
    authorizer = server.authorizer()
    with pytest.raises(FetchError, match="away"):
        authorizer.renew(REGISTRY, BEARER, None)
    server.error = None
    assert authorizer.renew(REGISTRY, BEARER, None) == "Bearer t2", "a failure is not for ever"


def test_schemes_that_are_not_known_are_left_alone() -> None:
    authorizer = TokenServer().authorizer()
    assert authorizer.renew(REGISTRY, "Negotiate", None) is None
    assert authorizer.renew(REGISTRY, 'Basic realm="x"', None) is None, "there are no credentials"


def test_basic() -> None:
    credentials = Credentials("user", "pass", Path("auth.json"))
    server = TokenServer()
    authorizer = server.authorizer(credentials)
    header = authorizer.renew(REGISTRY, 'Basic realm="x"', None)
    assert header == "Basic dXNlcjpwYXNz"
    assert authorizer.authorization(REGISTRY) == header
    assert authorizer.renew(REGISTRY, 'Basic realm="x"', header) is None, "it was refused already"
    assert authorizer.renew(REGISTRY, BEARER, header) == "Bearer t1"
    assert server.asked[0][1] == {"Authorization": header}
    assert "pass" not in repr(credentials) + repr(authorizer)


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
