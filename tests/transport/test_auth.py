"""Challenges, tokens and their renewal; and that secrets stay where they belong."""

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.ground.errors import FetchError, LazyfsError, SourceError
from lazyfs.transport.auth import (
    Challenge,
    RegistryAuthorizer,
    parse_challenges,
    parse_token,
    pull_scope,
    push_scope,
    token_url,
)
from lazyfs.transport.client import SmallReply
from lazyfs.transport.credentials import Credentials
from lazyfs.transport.helpers import HelperError
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
    with pytest.raises(SourceError):
        parse_token(b'{"x":' + b"[" * 100_000, "a")


@pytest.mark.parametrize("expires_in", ["1" + "0" * 400, "1e999", '"300"', "[]"])
def test_no_number_of_seconds_is_more_than_an_error(expires_in: str) -> None:
    with pytest.raises(SourceError, match="something else than a token"):
        parse_token(f'{{"token": "x", "expires_in": {expires_in}}}'.encode(), "a")


def test_where_a_token_is_asked_for() -> None:
    (challenge,) = parse_challenges(BEARER)
    assert token_url(challenge, REGISTRY, [pull_scope("a/b")]) == (
        "https://auth.example/token?service=registry.example&scope=repository%3Aa%2Fb%3Apull"
    )
    assert token_url(challenge, REGISTRY, [push_scope("a/b"), pull_scope("c")]) == (
        "https://auth.example/token?service=registry.example"
        "&scope=repository%3Aa%2Fb%3Apull%2Cpush&scope=repository%3Ac%3Apull"
    )
    for realm in ("http://auth.example/token", "ftp://x", "https://u:p@x/", "nonsense", ""):
        with pytest.raises(SourceError):
            token_url(Challenge("bearer", {"realm": realm}), REGISTRY, [pull_scope("a/b")])
    plain = Challenge("bearer", {"realm": "http://localhost/token?a=b"})
    url = token_url(plain, Origin("http", "localhost", 5000), [pull_scope("r")])
    assert url == "http://localhost/token?a=b&scope=repository%3Ar%3Apull"


class TokenServer:
    """Gives numbered tokens, or what it is told to."""

    def __init__(self, life_s: float = 300) -> None:
        self.life_s = life_s
        self.now_s = 1000.0
        self.asked: list[tuple[str, Mapping[str, str]]] = []
        self.forms: list[bytes | None] = []
        self.knows_post = True
        self.error: LazyfsError | None = None
        self.gate: threading.Event | None = None

    def get(self, url: str, headers: Mapping[str, str], form: bytes | None) -> SmallReply:
        self.asked.append((url, headers))
        self.forms.append(form)
        if form is not None and not self.knows_post:
            return SmallReply(url, 404, {}, b"")
        if self.gate is not None:
            assert self.gate.wait(5)
        if self.error is not None:
            raise self.error
        body = {"token": f"t{len(self.asked)}", "expires_in": self.life_s}
        return SmallReply(url, 200, {}, json.dumps(body).encode())

    def authorizer(
        self,
        credentials: Credentials | None = None,
        look: Callable[[], Credentials | None] | None = None,
    ) -> RegistryAuthorizer:
        return RegistryAuthorizer(
            REGISTRY,
            "a/b",
            look or (lambda: credentials),
            self.get,
            name="registry.example",
            clock=lambda: self.now_s,
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
    server = TokenServer(life_s=100)
    authorizer = server.authorizer()
    authorizer.renew(REGISTRY, BEARER, None)
    server.now_s += 74
    assert authorizer.authorization(REGISTRY) == "Bearer t1"
    server.now_s += 2
    assert authorizer.authorization(REGISTRY) == "Bearer t2", "the first is about to expire"
    server.life_s = 300
    assert authorizer.renew(REGISTRY, BEARER, "Bearer t2") == "Bearer t3"
    assert authorizer.renew(REGISTRY, BEARER, "Bearer t2") == "Bearer t3", (
        "another thread was first"
    )
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


def test_another_origin_is_given_nothing_whatever_it_asks_for() -> None:
    server = TokenServer()
    authorizer = server.authorizer(Credentials("user", "pass", Path("auth.json")))
    elsewhere = Origin("https", "storage.example", 443)
    evil = 'Bearer realm="https://evil.example/token"'
    assert authorizer.renew(elsewhere, evil, None) is None
    authorizer.renew(REGISTRY, BEARER, None)
    assert authorizer.renew(elsewhere, evil, None) is None
    assert authorizer.renew(REGISTRY, BEARER, "Bearer t1") == "Bearer t2"
    assert all("evil" not in url for url, _ in server.asked)


def test_failing_to_renew_matters_only_when_the_token_has_expired() -> None:
    server = TokenServer(life_s=100)
    authorizer = server.authorizer()
    authorizer.renew(REGISTRY, BEARER, None)
    for error in (FetchError("away", transient=True), SourceError("the password is another")):
        server.error = error
        server.now_s = 1090
        assert authorizer.authorization(REGISTRY) == "Bearer t1"
        asked = len(server.asked)
        assert authorizer.authorization(REGISTRY) == "Bearer t1"
        assert len(server.asked) == asked, "not asked again with each request"
        server.now_s = 1101
        with pytest.raises(type(error), match=str(error)):
            authorizer.authorization(REGISTRY)
    server.error = None
    assert authorizer.authorization(REGISTRY) == f"Bearer t{len(server.asked)}"


def test_token_that_outlived_a_suspend_of_days_is_renewed() -> None:
    server = TokenServer(life_s=100)
    authorizer = server.authorizer()
    authorizer.renew(REGISTRY, BEARER, None)
    server.now_s += 5 * 24 * 3600
    assert authorizer.authorization(REGISTRY) == "Bearer t2"


def test_refusal_without_a_challenge_is_met_by_the_last_one() -> None:
    server = TokenServer()
    authorizer = server.authorizer()
    assert authorizer.renew(REGISTRY, None, None) is None, "nothing is known yet"
    authorizer.renew(REGISTRY, BEARER, None)
    assert authorizer.renew(REGISTRY, None, "Bearer t1") == "Bearer t2"


def test_identity_token_is_posted() -> None:
    server = TokenServer()
    credentials = Credentials("", "", "helper", identity_token="r3fresh &=")
    authorizer = server.authorizer(credentials)
    assert authorizer.renew(REGISTRY, BEARER, None) == "Bearer t1"
    ((url, headers),) = server.asked
    assert url == "https://auth.example/token"
    assert "Authorization" not in headers
    assert parse_qs((server.forms[0] or b"").decode()) == {
        "grant_type": ["refresh_token"],
        "service": ["registry.example"],
        "scope": ["repository:a/b:pull"],
        "client_id": ["lazyfs"],
        "refresh_token": ["r3fresh &="],
    }
    assert "r3fresh" not in repr(credentials)
    server.knows_post = False
    with pytest.raises(SourceError, match="404"):
        authorizer.renew(REGISTRY, BEARER, "Bearer t1")


def test_token_server_that_knows_no_post_is_asked_with_the_password() -> None:
    server = TokenServer()
    server.knows_post = False
    authorizer = server.authorizer(Credentials("user", "pass", "helper", identity_token="x"))
    assert authorizer.renew(REGISTRY, BEARER, None) == "Bearer t2"
    assert server.asked[1][1] == {"Authorization": "Basic dXNlcjpwYXNz"}


def test_registry_token_is_shown_as_it_is() -> None:
    server = TokenServer()
    tokens = ["first", "first", "second"]
    authorizer = server.authorizer(
        look=lambda: Credentials("", "", "file", registry_token=tokens.pop(0))
    )
    assert authorizer.renew(REGISTRY, BEARER, None) == "Bearer first"
    assert authorizer.renew(REGISTRY, BEARER, "Bearer first") is None
    assert authorizer.renew(REGISTRY, BEARER, "Bearer first") == "Bearer second"
    assert server.asked == []


def test_helper_that_has_worked_before_is_waited_for() -> None:
    failing = True

    def look() -> Credentials:
        if failing:
            raise HelperError("docker-credential-x failed")
        return Credentials("user", "pass", "helper")

    server = TokenServer()
    authorizer = server.authorizer(look=look)
    with pytest.raises(HelperError):
        authorizer.renew(REGISTRY, BEARER, None)
    failing = False
    authorizer.renew(REGISTRY, BEARER, None)
    failing = True
    with pytest.raises(FetchError) as caught:
        authorizer.renew(REGISTRY, BEARER, "Bearer t1")
    assert caught.value.transient
