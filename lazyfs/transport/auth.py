"""How a registry is shown credentials: challenges, tokens and their expiry.

Decides when a token is fetched: when a 401 asks for it, shortly before it expires, and once
when it is refused. One lock a repository, held while its token is fetched, so that many threads
that met the same 401 fetch it once; a failure is theirs in common, too.

Credentials go to the registry's own origin and to the realm that it names, which must be https
unless the registry itself is spoken to in plain HTTP. We ask for `pull` of one repository,
whatever the challenge would have us ask for. Nothing here puts a secret into a message.

Sources: RFC 9110, section 11; distribution, "Token Authentication Specification". Identity
tokens (OAuth2 POST) would be one more case in `_fetch_token`.
"""

import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit

import msgspec

from lazyfs.ground.errors import FetchError, LazyfsError, SourceError
from lazyfs.transport.answers import Question, refusal
from lazyfs.transport.client import SmallReply
from lazyfs.transport.credentials import Credentials
from lazyfs.transport.urls import Origin, origin_of, shown

_TOKEN_LIFE_S = 60
_RENEW_AGAIN_S = 3.0
_CHALLENGE_LIMIT = 8192
_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'({_WORD})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))')
_SCHEME = re.compile(rf"({_WORD})(?=[\s,]|\Z)")
_GAP = re.compile(r"[\s,]*")
_SAFE_TOKEN = re.compile(r"[\x21-\x7e]+")


class Challenge(NamedTuple):
    """One way of a `WWW-Authenticate` header; scheme and parameter names in small letters."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """Read a `WWW-Authenticate` header, several of them joined by commas included.

    What cannot be read ends the list: what came before it still counts.
    """
    header = header[:_CHALLENGE_LIMIT]
    found: list[tuple[str, dict[str, str]]] = []
    at = 0
    while True:
        gap = _GAP.match(header, at)
        at = gap.end() if gap else at
        parameter = _PARAMETER.match(header, at) if found else None
        if parameter is not None:
            quoted = parameter[2]
            value = parameter[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            found[-1][1].setdefault(parameter[1].lower(), value)
            at = parameter.end()
            continue
        scheme = _SCHEME.match(header, at)
        if scheme is None:
            return [Challenge(name, parameters) for name, parameters in found]
        found.append((scheme[1].lower(), {}))
        at = scheme.end()


class _TokenReply(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""
    expires_in: int | float | None = None


class TokenValue(NamedTuple):
    """A bearer token and for how long it is good, from when it was asked for."""

    header: str
    life_s: float

    def __repr__(self) -> str:
        return f"TokenValue(life_s={self.life_s})"


def parse_token(body: bytes, host: str) -> TokenValue:
    """Read a token server's answer.

    Raises:
        SourceError: it is not one.
    """
    try:
        reply = msgspec.json.decode(body, type=_TokenReply)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise SourceError(f"{host} answered something else than a token") from None
    token = reply.token or reply.access_token
    if not _SAFE_TOKEN.fullmatch(token):
        raise SourceError(f"{host} answered without a token that can be used")
    life_s = float(reply.expires_in or 0)
    return TokenValue(f"Bearer {token}", life_s if 0 < life_s < 1e9 else _TOKEN_LIFE_S)


def token_url(challenge: Challenge, registry: Origin, repository: str) -> str:
    """Return where to ask for a token to pull `repository`.

    Raises:
        SourceError: the realm is not one that credentials may be sent to.
    """
    realm = challenge.parameters.get("realm", "")
    try:
        origin = origin_of(realm)
    except SourceError:
        raise SourceError(f"{registry} names no usable realm to ask for a token") from None
    if origin.scheme == "http" and registry.scheme == "https":
        raise SourceError(
            f"{registry} sends credentials to {shown(realm)} over plain http, which is refused"
        )
    query = [("scope", f"repository:{repository}:pull")]
    if "service" in challenge.parameters:
        query.insert(0, ("service", challenge.parameters["service"]))
    parts = urlsplit(realm)
    joined = "&".join(filter(None, (parts.query, urlencode(query))))
    return f"{parts.scheme}://{parts.netloc}{parts.path}?{joined}"


class RegistryAuthorizer:
    """What to put into `Authorization` for one repository of one registry. Thread-safe."""

    def __init__(
        self,
        registry: Origin,
        repository: str,
        credentials: Callable[[], Credentials | None],
        get: Callable[[str, Mapping[str, str]], SmallReply],
        *,
        name: str,
    ) -> None:
        """`credentials` and `get` (a GET with these headers) may block and raise our errors.

        `name` is what a person calls the registry: `docker.io`.
        """
        self._registry = registry
        self._repository = repository
        self._credentials = credentials
        self._get = get
        self._name = name
        self._lock = threading.Lock()
        self._challenge: Challenge | None = None
        self._header: str | None = None
        self._renew_at_s = float("inf")
        self._expires_at_s = float("inf")
        self._failures = 0
        self._failure: LazyfsError | None = None

    def __repr__(self) -> str:
        return f"RegistryAuthorizer({self._name}/{self._repository})"

    def authorization(self, origin: Origin) -> str | None:
        """Return the header for requests to `origin`: None for any but the registry itself.

        Raises:
            SourceError: a token has expired and there is no other.
        """
        if origin != self._registry:
            return None
        if self._header is None or time.monotonic() < self._renew_at_s:
            return self._header
        failures = self._failures
        with self._lock:
            now_s = time.monotonic()
            if now_s >= self._renew_at_s:
                try:
                    self._renew(failures)
                except FetchError:
                    if now_s >= self._expires_at_s:
                        raise
                    self._renew_at_s = min(self._expires_at_s, now_s + _RENEW_AGAIN_S)
            return self._header

    def renew(self, challenge: str, rejected: str | None) -> str | None:
        """Return the header to try after a 401 with this challenge; None if there is no other.

        Raises:
            SourceError: no token was given, or credentials cannot be read.
        """
        failures = self._failures
        with self._lock:
            if self._header is not None and self._header != rejected:
                return self._header  # another thread met the same 401 earlier
            challenges = {each.scheme: each for each in reversed(parse_challenges(challenge))}
            self._challenge = challenges.get("bearer") or challenges.get("basic")
            self._renew(failures)
            return self._header if self._header != rejected else None

    def _renew(self, failures_before: int) -> None:
        """Fetch a header by `_challenge`, unless that failed while we waited for the lock."""
        if self._failure is not None and self._failures != failures_before:
            raise self._failure
        try:
            self._header = self._obtain()
        except LazyfsError as error:
            self._failures += 1
            self._failure = error
            raise

    def _obtain(self) -> str | None:
        credentials = self._credentials()
        challenge = self._challenge
        if challenge is not None and challenge.scheme == "bearer":
            return self._fetch_token(challenge, credentials)
        self._renew_at_s = self._expires_at_s = float("inf")
        return None if challenge is None or credentials is None else credentials.basic()

    def _fetch_token(self, challenge: Challenge, credentials: Credentials | None) -> str:
        url = token_url(challenge, self._registry, self._repository)
        headers = {} if credentials is None else {"Authorization": credentials.basic()}
        asked_at_s = time.monotonic()
        reply = self._get(url, headers)
        host = str(origin_of(url))
        if reply.status != 200:
            what = f"a token to pull {self._name}/{self._repository}"
            login = login_advice(self._name, credentials)
            raise refusal(Question(what, host, login), reply.status, reply.headers, reply.body)
        token = parse_token(reply.body, host)
        self._expires_at_s = asked_at_s + token.life_s
        self._renew_at_s = self._expires_at_s - min(30.0, token.life_s / 4)
        return token.header


def login_advice(registry: str, credentials: Credentials | None) -> str:
    """Say what to do about a refusal, in the imperative."""
    if credentials is None:
        return (
            f"log in with `podman login {registry}`, or name the file that has credentials in "
            "REGISTRY_AUTH_FILE"
        )
    return (
        f"the credentials in {credentials.source} are not good for it; "
        f"log in with `podman login {registry}`"
    )
