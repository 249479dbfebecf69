"""How one origin is spoken to: whom to trust there, what to show it, what to send along.

Decides what a `TlsConfig` means: its authorities are added to those that this machine trusts, as
containers/image's `pkg/tlsclientconfig` has it; of its client certificates OpenSSL shows the one
that the server's signature algorithms allow (of several with the same kind of key the first).
Where the values come from is others' matter: `certs.py`, a mirror's entry, the command line.

A client certificate, a header and `verify=False` are for the one origin that they are given for.
"""

import ssl
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from lazyfs.ground.discreet import Discreet
from lazyfs.ground.errors import SourceError
from lazyfs.transport.urls import Origin


class ClientPair(msgspec.Struct, frozen=True):
    """A client certificate and its key, in PEM."""

    certificate: Path
    key: Path | None = None
    """None: it is in the certificate's file."""


class TlsConfig(msgspec.Struct, frozen=True):
    """Whom to trust, and what to show. The default is what this machine trusts, and nothing."""

    authorities: tuple[Path, ...] = ()
    """Files of certificates (PEM) that are trusted beside those of this machine."""
    clients: tuple[ClientPair, ...] = ()
    verify: bool = True
    """False: whoever answers is believed. Only by a person's word, for one host."""

    def apply(self, context: ssl.SSLContext) -> None:
        """Set up a context that trusts what this machine trusts.

        Raises:
            SourceError: a file cannot be read or is not what it should be.
        """
        for path in self.authorities:
            try:
                context.load_verify_locations(cafile=path)
            except (OSError, ValueError) as error:  # an SSLError is an OSError
                raise _unusable("authority", path, error) from None
        for pair in reversed(self.clients):  # the last that is loaded of a kind is shown
            try:
                context.load_cert_chain(pair.certificate, pair.key, password=_no_password)
            except (OSError, ValueError) as error:
                which = pair.certificate if pair.key is None else pair.key
                raise _unusable("client certificate", which, error) from None
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE

    def stamp(self) -> tuple[object, ...]:
        """Return what becomes another value when one of the files does: they are rotated."""
        paths = [*self.authorities]
        for pair in self.clients:
            paths += [pair.certificate] if pair.key is None else [pair.certificate, pair.key]
        return (self, *(_stamp_of(path) for path in paths))


class Endpoint(Discreet, frozen=True):
    """How one origin is spoken to."""

    unprinted = ("headers",)
    tls: TlsConfig = TlsConfig()
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Sent with each request to it, and to nobody else: they may be secret."""


Endpoints = Callable[[Origin], Endpoint]
"""Asked for each new connection; called in several threads at once, may raise SourceError."""


_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
"""Where distributions keep whom they trust: Debian, Fedora, older Fedora, SUSE, Alpine.

Source: Go's crypto/x509, root_linux.go.
"""


def machine_bundle(candidates: Iterable[str] = _BUNDLES) -> str | None:
    """Return the file of those that this machine trusts, for an OpenSSL of another machine.

    OpenSSL looks where the distribution that it was built for keeps them; one that was taken
    elsewhere with its Python may find nothing there.
    """
    return next((path for path in candidates if Path(path).is_file()), None)


def plain_endpoint(origin: Origin) -> Endpoint:
    """Speak to anybody in the same way, with what this machine trusts."""
    del origin
    return Endpoint()


def _no_password() -> str:
    raise ValueError("it is encrypted, and there is nobody to ask for a password")


def _unusable(what: str, path: Path, error: Exception) -> SourceError:
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "not what it should be").replace("_", " ").lower()
    elif isinstance(error, OSError):
        reason = error.strerror or type(error).__name__
    else:
        reason = str(error)
    return SourceError(f"the TLS {what} {path} cannot be used: {reason}")


def _stamp_of(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_mtime_ns, found.st_size)
