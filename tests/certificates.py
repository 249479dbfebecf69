"""Certificates for tests, made by openssl: an authority, and what it signs."""

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in PEM."""

    certificate: Path
    key: Path


class Authority:
    """An authority that nobody trusts, and its certificates, in a directory."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.pair = self._made(name, "-addext", "basicConstraints=critical,CA:TRUE")

    @property
    def certificate(self) -> Path:
        return self.pair.certificate

    def server(self, *addresses: str) -> Pair:
        """Sign a certificate for these addresses."""
        names = ",".join(f"IP:{address}" for address in addresses)
        return self._signed("server-" + addresses[0], "-addext", f"subjectAltName={names}")

    def expired(self, address: str) -> Pair:
        """Sign a certificate for an address that was good until yesterday."""
        pair = Pair(self._directory / "expired.crt", self.server(address).key)
        asked = self._directory / "expired.csr"
        names = f"subjectAltName=IP:{address}"
        request = ["req", "-new", "-subj", "/CN=expired", "-addext", names, "-key", pair.key]
        sign = ["x509", "-req", "-in", asked, "-days", "-1", "-copy_extensions", "copy"]
        sign += ["-CA", self.pair.certificate, "-CAkey", self.pair.key, "-CAcreateserial"]
        for command, result in ((request, asked), (sign, pair.certificate)):
            words = ["openssl", *command, "-out", result]
            subprocess.run(words, check=True, capture_output=True)
        return pair

    def client(self, name: str = "client") -> Pair:
        """Sign a certificate that a client may show."""
        return self._signed(name, "-addext", "extendedKeyUsage=clientAuth")

    def context(self, server: Pair, *, wants_client: bool = False) -> ssl.SSLContext:
        """Return the context of a server; one that wants a certificate of this authority's."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.certificate, server.key)
        if wants_client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.certificate)
        return context

    def _signed(self, name: str, *extra: str) -> Pair:
        ca = self.pair
        return self._made(name, "-CA", str(ca.certificate), "-CAkey", str(ca.key), *extra)

    def _made(self, name: str, *extra: str) -> Pair:
        pair = Pair(self._directory / f"{name}.crt", self._directory / f"{name}.key")
        command = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
        command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        command += ["-keyout", str(pair.key), "-out", str(pair.certificate), *extra]
        subprocess.run(command, check=True, capture_output=True)
        return pair
