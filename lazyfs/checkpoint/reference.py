"""What a person may call an image, as values: where it lies, and which one it is there.

Imported before the daemon is forked: nothing heavier than `re` and `urllib.parse` here. The
only look at the world is whether a word without a telling form is the name of a file or of a
directory.

Grammar: OCI distribution-spec, "Pulling manifests" (name, tag); OCI image-spec,
annotations.md (`org.opencontainers.image.ref.name`); containers-transports(5) (`oci-archive:`,
`docker-archive:`, `dir:`); defaults of docker.io as Docker and Podman have them.
"""

import re
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import msgspec

from lazyfs.ground.digest import Digest
from lazyfs.ground.discreet import Discreet
from lazyfs.ground.errors import MalformedError, UsageError

FORMS = """\
  [docker://]HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]  an image in a registry
  oci:DIRECTORY[:TAG]                               an OCI layout on disk
  oci-archive:FILE[:TAG]                            a tar of an OCI layout
  docker-archive:FILE[:NAME[:TAG]]                  what docker or podman save
  dir:DIRECTORY                                     unpacked, or skopeo's dir:
  http://… or https://…                             an exported archive by URL
  ./FILE, /PATH/FILE, FILE.tar                      an exported archive"""

_NAME_LIMIT = 255
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{{1,5}}))?")
_REF_NAME_PART = r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*"
_REF_NAME = re.compile(rf"{_REF_NAME_PART}(?:/{_REF_NAME_PART})*")
_DIGEST_SUFFIX = re.compile(r"@((?:sha256|sha512):[0-9a-f]+)\Z")
_BEFORE_AT = re.compile(r"(^|//).*@(?!(?:sha256|sha512|md5):)", re.DOTALL)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")
_FOREIGN = re.compile(r"(?:containers-storage|docker-daemon|ostree|sif|tarball):.*")
_PREFIXES = ("oci:", "oci-archive:", "docker-archive:", "dir:")
_DOCKER_ALIASES = {"index.docker.io": "docker.io"}


class RegistryReference(msgspec.Struct, frozen=True):
    """An image in a registry; where there is a digest, it decides and the tag is a comment."""

    host: str
    """With its port, if it was given: `localhost:5000`, `docker.io`."""
    repository: str
    tag: str | None
    digest: Digest | None = None

    @property
    def wanted(self) -> str:
        """What to ask the registry for: the digest if there is one, or the tag."""
        return str(self.digest) if self.digest is not None else self.tag or "latest"

    def pinned(self, digest: Digest) -> "RegistryReference":
        """Return the same repository's image `digest`."""
        return RegistryReference(self.host, self.repository, None, digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag is not None else ""
        digest = f"@{self.digest}" if self.digest is not None else ""
        return f"{self.host}/{self.repository}{tag}{digest}"


class LayoutReference(msgspec.Struct, frozen=True):
    """An image in an OCI layout directory; without tag and digest, the only one there."""

    directory: Path
    tag: str | None = None
    digest: Digest | None = None

    @property
    def wanted(self) -> str | None:
        """What to look for in the layout's index; None for whatever is alone there."""
        return str(self.digest) if self.digest is not None else self.tag

    def pinned(self, digest: Digest) -> "LayoutReference":
        """Return the same layout's image `digest`."""
        return LayoutReference(self.directory, None, digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag is not None else ""
        digest = f"@{self.digest}" if self.digest is not None else ""
        return f"oci:{self.directory}{tag}{digest}"


class ImageArchiveReference(msgspec.Struct, frozen=True):
    """An image in a tar on this machine; without name and digest, the only one there."""

    scheme: str
    """`oci-archive` or `docker-archive`."""
    path: Path
    tag: str | None = None
    """Of an OCI archive the tag, of Docker's the image's name, in full: `docker.io/library/a:1`."""
    digest: Digest | None = None

    @property
    def wanted(self) -> str | None:
        """What to look for in the archive; None for whatever is alone there."""
        return str(self.digest) if self.digest is not None else self.tag

    def pinned(self, digest: Digest) -> "ImageArchiveReference":
        """Return the same archive's image `digest`."""
        return ImageArchiveReference(self.scheme, self.path, None, digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag is not None else ""
        digest = f"@{self.digest}" if self.digest is not None else ""
        return f"{self.scheme}:{self.path}{tag}{digest}"


class DirectoryReference(msgspec.Struct, frozen=True):
    """An image that skopeo copied to a `dir:`, or a checkpoint that was unpacked."""

    directory: Path
    digest: Digest | None = None

    @property
    def wanted(self) -> str | None:
        """Of skopeo's, what to look for among the manifests there; None for the one on top."""
        return str(self.digest) if self.digest is not None else None

    def pinned(self, digest: Digest) -> "DirectoryReference":
        """Return the same directory's image `digest`."""
        return DirectoryReference(self.directory, digest)

    def __str__(self) -> str:
        digest = f"@{self.digest}" if self.digest is not None else ""
        return f"dir:{self.directory}{digest}"


class ArchiveReference(Discreet, frozen=True):
    """A checkpoint archive that is in no image: `podman container checkpoint --export`.

    `location` is a URL without its query, or a path that begins with `/`, `./` or `../`.
    """

    unprinted = ("query",)
    location: str
    query: str = ""
    """Of a URL; often a signature, and so never in messages."""

    @property
    def is_url(self) -> bool:
        """Whether it is fetched over HTTP rather than read from this machine."""
        return self.location.startswith(("http://", "https://"))

    @property
    def url(self) -> str:
        """The whole URL: to be asked for, not to be shown."""
        return f"{self.location}?{self.query}" if self.query else self.location

    @property
    def path(self) -> Path:
        """The file, if it is not a URL."""
        return Path(self.location)

    def __str__(self) -> str:
        return self.location

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArchiveReference) and self.location == other.location

    def __hash__(self) -> int:
        return hash(self.location)


ImageReference: TypeAlias = (
    RegistryReference | LayoutReference | ImageArchiveReference | DirectoryReference
)
"""What may lead to a manifest."""

Reference: TypeAlias = ImageReference | ArchiveReference


def parse_reference(text: str) -> Reference:
    """Read any form of reference.

    Raises:
        UsageError: it is none; the message lists the forms there are.
    """
    if not text or _UNPRINTABLE.search(text):
        raise _refused(text, "it is empty or has unprintable characters")
    scheme, separator, rest = text.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        return _parse_url(text)
    if separator and scheme.lower() == "docker":
        return _parse_registry(rest, text)
    if _is_file(f"{text}/oci-layout"):
        raise _refused(text, f"it is an OCI layout on this machine: say oci:{text}")
    if text.startswith(("/", "./", "../")):
        if _is_directory(text):
            raise _refused(text, f"it is a directory: if a checkpoint is in it, say dir:{text}")
        return _path_reference(text)
    if text.startswith(_PREFIXES):
        return _parse_prefixed(text)
    if separator:
        raise _refused(text, f"{scheme[:40]!r} is not a scheme that is known here")
    if _FOREIGN.fullmatch(text):
        raise _refused(
            text,
            "this way of storing images is not read here (`skopeo copy` or `podman push` bring "
            "the image to a registry or an oci-archive:)",
        )
    if text.endswith(".tar") or _is_file(text):
        return _path_reference(text)
    return _parse_registry(text, text)


def _refused(text: str, why: str) -> UsageError:
    shown = _BEFORE_AT.sub(r"\1…@", text.partition("?")[0])[:300]
    return UsageError(f"{shown!r} is not a reference: {why}. A reference is one of\n{FORMS}")


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def _is_directory(text: str) -> bool:
    try:
        return Path(text).is_dir()
    except (OSError, ValueError):
        return False


def _path_reference(text: str) -> ArchiveReference:
    path = str(Path(text))
    return ArchiveReference(path if path.startswith(("/", "../")) else f"./{path}")


def _parse_url(text: str) -> ArchiveReference:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _refused(text, "it is not a URL") from None
    if "@" in parts.netloc:
        raise _refused(text, "a URL with a user name or password in it is not taken")
    if not host or port == 0:
        raise _refused(text, "the URL names no host")
    if "\\" in text or any(each.isspace() for each in text):
        raise _refused(text, "it is not a URL: blanks must be written %20, backslashes %5C")
    if parts.path in ("", "/"):
        raise _refused(text, "the URL names no file")
    location = f"{parts.scheme}://{parts.netloc.lower()}{parts.path}"
    return ArchiveReference(location, parts.query)


def _split_digest(text: str, whole: str) -> tuple[str, Digest | None]:
    found = _DIGEST_SUFFIX.search(text)
    if found is None:
        return text, None
    try:
        return text[: found.start()], Digest.parse(found.group(1))
    except MalformedError as error:
        raise _refused(whole, str(error)) from None


def _parse_prefixed(text: str) -> Reference:
    scheme, _, rest = text.partition(":")
    rest, digest = _split_digest(rest, text)
    if scheme == "dir":
        if not rest:
            raise _refused(text, "it names no directory")
        return DirectoryReference(Path(rest), digest)
    path, colon, tag = rest.partition(":")
    if not path:
        raise _refused(text, f"it names no {'directory' if scheme == 'oci' else 'file'}")
    if scheme == "docker-archive":
        name = _parse_registry(tag, text) if colon else None
        return ImageArchiveReference(scheme, Path(path), str(name) if name else None, digest)
    if colon and not _REF_NAME.fullmatch(tag):
        raise _refused(text, f"{tag[:100]!r} is not a tag")
    if scheme == "oci":
        return LayoutReference(Path(path), tag if colon else None, digest)
    return ImageArchiveReference(scheme, Path(path), tag if colon else None, digest)


def _parse_registry(text: str, whole: str) -> RegistryReference:
    name, digest = _split_digest(text, whole)
    if "@" in name:
        raise _refused(whole, "after '@' comes a digest, sha256:…; credentials are not taken")
    host, slash, repository = name.partition("/")
    if not slash or not (_names_a_host(host) or host != host.lower()):
        host, repository = "docker.io", name
    repository, colon, tag = repository.partition(":")
    host = _checked_host(host, whole)
    if host == "docker.io" and "/" not in repository:
        repository = f"library/{repository}"
    if not _REPOSITORY.fullmatch(repository) or len(host) + len(repository) >= _NAME_LIMIT:
        raise _refused(
            whole,
            f"{repository[:100]!r} is not a repository's name (small letters, digits, "
            "'.', '_', '-' and '/')",
        )
    if colon and not _TAG.fullmatch(tag):
        raise _refused(whole, f"{tag[:150]!r} is not a tag")
    if not colon:
        return RegistryReference(host, repository, None if digest else "latest", digest)
    return RegistryReference(host, repository, tag, digest)


def _checked_host(host: str, whole: str) -> str:
    found = _HOST.fullmatch(host)
    if found is None or not 0 < int(found["port"] or 443) < 65536:
        raise _refused(whole, f"{host[:100]!r} is not a host")
    small = host.lower()
    if not _names_a_host(small):
        return host  # it is one by its capitals alone, and shall be when it is read again
    return _DOCKER_ALIASES.get(small, small)


def _names_a_host(text: str) -> bool:
    """Whether the first part of a name is a host whatever its case: distribution's rule."""
    return bool(set(text) & set(".:[")) or text.lower() == "localhost"
