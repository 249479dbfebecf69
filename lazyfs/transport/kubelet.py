"""Credentials from the kubelet's image credential providers, asked as the kubelet asks them.

A provider is a program in the kubelet's directory of them. It reads a CredentialProviderRequest on
standard input and writes a CredentialProviderResponse; which images it is asked about says the
kubelet's own configuration. Pods' pull secrets are not to be had this way: the kubelet hands those
to the engine, and to nobody else.

Of several that know the image the first one that gives something is taken. What a provider says
when it fails is not shown: nobody promises that there is no secret in it. One that wants a service
account's token is not asked: only the kubelet has it.

Sources: Kubernetes, "Kubelet CredentialProvider (v1)" and "Kubelet Configuration (v1)"; matching:
`pkg/credentialprovider/keyring.go` (URLsMatch), `pkg/credentialprovider/plugin/plugin.go`.
"""

import base64
import fnmatch
import logging
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lazyfs.ground.discreet import Discreet
from lazyfs.ground.errors import SourceError

_log = logging.getLogger(__name__)

_FILE_LIMIT_BYTES = 4 << 20
_ANSWER_LIMIT_BYTES = 4 << 20
_PROVIDER_MOST_S = 60.0
"""As the kubelet waits."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_VERSIONS = tuple(
    f"credentialprovider.kubelet.k8s.io/{each}" for each in ("v1", "v1beta1", "v1alpha1")
)

_UNREADABLE = (
    msgspec.DecodeError,
    *(ValueError, LookupError, AttributeError, TypeError, RecursionError),
)
"""What PyYAML raises besides its own, for tags on what they do not fit (`!!int ""`)."""


class _Variable(msgspec.Struct, frozen=True):
    name: str
    value: str = ""


class Provider(msgspec.Struct, frozen=True, rename="camel"):
    """A provider, as the kubelet's configuration names it."""

    name: str
    match_images: list[str] = []
    api_version: str = _VERSIONS[0]
    args: list[str] | None = None
    env: list[_Variable] | None = None
    token_attributes: Any = None


class _Config(msgspec.Struct, frozen=True):
    kind: str
    providers: list[Provider] = []


class _Login(msgspec.Struct, frozen=True):
    username: str = ""
    password: str = ""


class _Response(msgspec.Struct, frozen=True):
    auth: dict[str, _Login] | None = None


class Login(Discreet, frozen=True):
    """What a provider knows. Its repr tells nothing of it."""

    unprinted = ("username", "password")
    username: str
    password: str
    provider: str

    def auth_file(self, host: str) -> bytes:
        """Return an auth file of this login for a registry (containers-auth.json(5))."""
        pair = base64.b64encode(f"{self.username}:{self.password}".encode()).decode()
        return msgspec.json.encode({"auths": {host: {"auth": pair}}})


def find_login(
    config: Path, bin_dir: Path, host: str, repository: str, environ: Mapping[str, str]
) -> Login | None:
    """Return what the providers know of an image; None: nothing. Blocks.

    A provider that fails is passed over, with a warning, as the kubelet does.

    Raises:
        SourceError: the configuration cannot be read.
    """
    image = f"{host}/{repository}"
    try:
        with config.open("rb") as file:
            data = file.read(_FILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise SourceError(f"the kubelet's {config} cannot be read: {error.strerror}") from None
    for provider in parse_config(data, config):
        if not any(matches(pattern, image) for pattern in provider.match_images):
            continue
        if provider.token_attributes is not None:
            _log.info("%s wants a service account's token: not asked", provider.name)
            continue
        try:
            found = _ask(provider, bin_dir, image, environ)
        except SourceError as error:
            _log.warning("%s; %s is asked for without it", error, image)
            continue
        if found is not None:
            return found
    return None


def parse_config(data: bytes, path: Path) -> Sequence[Provider]:
    """Read a CredentialProviderConfig: JSON or YAML.

    Raises:
        SourceError: it is none; the message has nothing of what is in it: `env` may be secret.
    """
    try:
        if data.lstrip()[:1] == b"{":
            config = msgspec.json.decode(data, type=_Config)
        else:
            config = msgspec.yaml.decode(data, type=_Config)
    except msgspec.ValidationError as error:
        raise SourceError(f"{path} is no CredentialProviderConfig: {error}") from None
    except _UNREADABLE:
        raise SourceError(f"{path} is neither JSON nor YAML that can be read") from None
    if config.kind != "CredentialProviderConfig" or len(data) > _FILE_LIMIT_BYTES:
        raise SourceError(f"{path} is no CredentialProviderConfig")
    return config.providers


def matches(pattern: str, image: str) -> bool:
    """Whether an image, or a key of a response, is meant: `*.azurecr.io`, `gcr.io/etcd-dev`.

    A `*` stands for within one part of the domain; ports are the same or absent in both.
    """
    pattern_host, slash, pattern_path = _schemeless(pattern).partition("/")
    image_host, _, image_path = image.partition("/")
    pattern_name, _, pattern_port = pattern_host.partition(":")
    image_name, _, image_port = image_host.partition(":")
    pattern_parts, image_parts = pattern_name.split("."), image_name.split(".")
    return (
        pattern_port == image_port
        and len(pattern_parts) == len(image_parts)
        and (not slash or image_path.startswith(pattern_path))
        and all(map(fnmatch.fnmatchcase, image_parts, pattern_parts))
    )


def parse_response(data: bytes, provider: str, image: str) -> Login | None:
    """Read what a provider wrote; None: nothing for this image.

    Raises:
        SourceError: it is no response.
    """
    try:
        response = msgspec.json.decode(data, type=_Response)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise SourceError(f"the credential provider {provider} answered something else") from None
    keys = sorted(response.auth or {}, reverse=True)  # the kubelet's order: the longest path first
    for key in keys:
        login = (response.auth or {})[key]
        if matches(key, image) and login.password:
            return Login(login.username, login.password, provider)
    return None


def _ask(provider: Provider, bin_dir: Path, image: str, environ: Mapping[str, str]) -> Login | None:
    """Run a provider.

    Raises:
        SourceError: it is not there, fails, or answers something else.
    """
    name = provider.name
    if not _NAME.fullmatch(name) or provider.api_version not in _VERSIONS:
        raise SourceError(f"the credential provider {name[:100]!r} cannot be asked")
    request = {
        "kind": "CredentialProviderRequest",
        "apiVersion": provider.api_version,
        "image": image,
    }
    with (
        open(os.memfd_create("request"), "w+b") as question,
        open(os.memfd_create("response"), "w+b") as answer,
    ):
        question.write(msgspec.json.encode(request))
        question.seek(0)
        try:
            done = subprocess.run(
                [bin_dir / name, *(provider.args or [])],
                stdin=question,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                env={**environ, **{each.name: each.value for each in provider.env or []}},
                timeout=_PROVIDER_MOST_S,
                check=False,
            )
        except OSError as error:
            why = error.strerror or error
            raise SourceError(f"the credential provider {bin_dir / name}: {why}") from None
        except (subprocess.TimeoutExpired, ValueError):
            raise SourceError(f"the credential provider {name} did not answer in time") from None
        if done.returncode != 0:
            raise SourceError(f"the credential provider {name} failed ({done.returncode})")
        answer.seek(0)
        return parse_response(answer.read(_ANSWER_LIMIT_BYTES), name, image)


def _schemeless(pattern: str) -> str:
    return pattern.partition("://")[2] or pattern
