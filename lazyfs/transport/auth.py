"""How a registry is shown credentials: challenges, tokens and their expiry.

Decides when a token is fetched: when a 401 asks for it, shortly before it expires, and once
when it is refused (401, or 403, as some clouds have it). One lock a repository, held while its
token is fetched, so that many threads that met the same 401 fetch it once; a failure is theirs in
common, too. Each time the credentials are looked up anew. Before a token has expired, failing to
renew it is no failure; later it is one of those that wait, so that it passes if it can.

Credentials go to the registry's own origin and to the realm that it names, which must be https
unless the registry itself is spoken to in plain HTTP. What another origin would have us do, such
as the object store that the registry redirects to, is not done. We ask for what
the source was opened for, `pull` of one repository as a rule, whatever the challenge would have us
ask for. Nothing here puts a secret into a
message.

Time is that since boot, suspended or not: no clock that somebody sets makes a token seem good.

Sources: RFC 9110, section 11; RFC 6749, section 6; distribution, "Token Authentication
Specification", "Token Scope Documentation" and "Distribution Registry v2 authentication using
OAuth2".
"""

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol
from urllib.parse import urlencode, urlsplit

import msgspec

from lazyfs.ground.errors import FetchError, LazyfsError, SourceError
from lazyfs.transport.answers import Question, refusal
from lazyfs.transport.client import SmallReply
from lazyfs.transport.credentials import Credentials
from lazyfs.transport.helpers import HelperError
from lazyfs.transport.urls import Origin, origin_of, shown

_TOKEN_LIFE_S = 60
_RENEW_AGAIN_S = 3.0
_CHALLENGE_LIMIT = 8192
_CLIENT_ID = "lazyfs"
_FORM = "application/x-www-form-urlencoded"
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
    expires_in: float | None = None


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
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise SourceError(f"{host} answered something else than a token") from None
    token = reply.token or reply.access_token
    if not _SAFE_TOKEN.fullmatch(token):
        raise SourceError(f"{host} answered without a token that can be used")
    life_s = reply.expires_in or 0.0
    return TokenValue(f"Bearer {token}", life_s if 0 < life_s < 1e9 else _TOKEN_LIFE_S)


def _realm(challenge: Challenge, registry: Origin) -> str:
    """Return the realm of a challenge, if it is one that credentials may be sent to."""
    realm = challenge.parameters.get("realm", "")
    try:
        origin = origin_of(realm)
    except SourceError:
        raise SourceError(f"{registry} names no usable realm to ask for a token") from None
    if origin.scheme == "http" and registry.scheme == "https":
        raise SourceError(
            f"{registry} sends credentials to {shown(realm)} over plain http, which is refused"
        )
    return realm.partition("#")[0]


def _wish(challenge: Challenge, scopes: Sequence[str]) -> list[tuple[str, str]]:
    service = challenge.parameters.get("service")
    wanted = [("scope", scope) for scope in scopes]
    return wanted if service is None else [("service", service), *wanted]


def pull_scope(repository: str) -> str:
    """Return what a token is good for that lets us read `repository`."""
    return f"repository:{repository}:pull"


def push_scope(repository: str) -> str:
    """Return what a token is good for that lets us read and write `repository`."""
    return f"repository:{repository}:pull,push"


def token_url(challenge: Challenge, registry: Origin, scopes: Sequence[str]) -> str:
    """Return where to ask for a token that is good for `scopes`, with a GET.

    Raises:
        SourceError: the realm is not one that credentials may be sent to.
    """
    parts = urlsplit(_realm(challenge, registry))
    joined = "&".join(filter(None, (parts.query, urlencode(_wish(challenge, scopes)))))
    return f"{parts.scheme}://{parts.netloc}{parts.path}?{joined}"


def token_form(
    challenge: Challenge, registry: Origin, scopes: Sequence[str], identity_token: str
) -> tuple[str, bytes]:
    """Return where to ask for a token by a refresh token, and what to POST there.

    Raises:
        SourceError: the realm is not one that credentials may be sent to.
    """
    fields = [
        ("grant_type", "refresh_token"),
        *_wish(challenge, [" ".join(scopes)]),
        ("client_id", _CLIENT_ID),
        ("refresh_token", identity_token),
    ]
    return _realm(challenge, registry), urlencode(fields).encode()


class AskForToken(Protocol):
    """A request to a token server: a GET, or with a form a POST, which is not redirected."""

    def __call__(self, url: str, headers: Mapping[str, str], form: bytes | None) -> SmallReply:
        """Return the answer, whatever its status. May block and raise our errors."""


def seconds_since_boot() -> float:
    """Return the time since boot; unlike that of `time.monotonic` it passes in a suspend, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class RegistryAuthorizer:
    """What to put into `Authorization` for one repository of one registry. Thread-safe."""

    def __init__(
        self,
        registry: Origin,
        repository: str,
        credentials: Callable[[], Credentials | None],
        ask: AskForToken,
        *,
        name: str,
        scopes: Sequence[str] = (),
        clock: Callable[[], float] = seconds_since_boot,
    ) -> None:
        """`credentials` and `ask` may block and raise our errors.

        `name` is what a person calls the registry: `docker.io`. `scopes`: what tokens shall be
        good for, if it is not to pull `repository`.
        """
        self._registry = registry
        self._repository = repository
        self._scopes = tuple(scopes) or (pull_scope(repository),)
        self._credentials = credentials
        self._ask = ask
        self._name = name
        self._clock_s = clock
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
        if self._header is None or self._clock_s() < self._renew_at_s:
            return self._header
        failures = self._failures
        with self._lock:
            now_s = self._clock_s()
            if now_s >= self._renew_at_s:
                try:
                    self._renew(failures)
                except LazyfsError:
                    if now_s >= self._expires_at_s:
                        raise
                    self._renew_at_s = min(self._expires_at_s, now_s + _RENEW_AGAIN_S)
            return self._header

    def renew(self, origin: Origin, challenge: str | None, rejected: str | None) -> str | None:
        """Return the header to try after `rejected` was refused; None if there is no other.

        Raises:
            SourceError: no token was given, or credentials cannot be read.
        """
        if origin != self._registry:
            return None
        failures = self._failures
        with self._lock:
            if self._header is not None and self._header != rejected:
                return self._header  # another thread met the same refusal earlier
            challenges = {each.scheme: each for each in reversed(parse_challenges(challenge or ""))}
            asked = challenges.get("bearer") or challenges.get("basic")
            self._challenge = asked or self._challenge
            if self._challenge is None:
                return None
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
        try:
            credentials = self._credentials()
        except HelperError as error:
            if self._header is None:
                raise
            raise FetchError(str(error), transient=True) from None  # it has worked before
        challenge = self._challenge
        if challenge is not None and challenge.scheme == "bearer":
            if credentials is None or not _SAFE_TOKEN.fullmatch(credentials.registry_token):
                return self._fetch_token(challenge, credentials)
            self._renew_at_s = self._expires_at_s = float("inf")
            return f"Bearer {credentials.registry_token}"
        self._renew_at_s = self._expires_at_s = float("inf")
        return None if challenge is None or credentials is None else credentials.basic()

    def _fetch_token(self, challenge: Challenge, credentials: Credentials | None) -> str:
        asked_at_s = self._clock_s()
        host, reply = self._ask_for_token(challenge, credentials)
        if reply.status != 200:
            pushes = push_scope(self._repository) in self._scopes
            verb = "push to" if pushes else "pull"
            what = f"a token to {verb} {self._name}/{self._repository}"
            login = login_advice(self._name, credentials)
            raise refusal(Question(what, host, login), reply.status, reply.headers, reply.body)
        token = parse_token(reply.body, host)
        self._expires_at_s = asked_at_s + token.life_s
        self._renew_at_s = self._expires_at_s - min(30.0, token.life_s / 4)
        return token.header

    def _ask_for_token(
        self, challenge: Challenge, credentials: Credentials | None
    ) -> tuple[str, SmallReply]:
        """Ask as the credentials allow; return who answered, and the answer."""
        basic = None if credentials is None else credentials.basic()
        if credentials is not None and credentials.identity_token:
            url, form = token_form(
                challenge, self._registry, self._scopes, credentials.identity_token
            )
            reply = self._ask(url, {"Content-Type": _FORM}, form)
            if reply.status not in (404, 405) or basic is None:
                return str(origin_of(url)), reply
        # The way that all token servers know; the other is for some.
        url = token_url(challenge, self._registry, self._scopes)
        headers = {} if basic is None else {"Authorization": basic}
        return str(origin_of(url)), self._ask(url, headers, None)


def login_advice(registry: str, credentials: Credentials | None) -> str:
    """Say what to do about a refusal, in the imperative."""
    if credentials is None:
        return (
            f"log in with `podman login {registry}`, or name the file that has credentials: "
            "--authfile"
        )
    return (
        f"the credentials of {credentials.source} are not good for it; "
        f"log in with `podman login {registry}`"
    )
