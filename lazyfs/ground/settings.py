"""What may be tuned, as plain values; the door fills them in, everything below reads them."""

from typing import Literal

import msgspec
from msgspec.structs import replace

KIB = 1024
MIB = 1024 * KIB
MIRRORS = ("auto", "containers", "containerd", "none")
GIB = 1024 * MIB


class Limit(msgspec.Struct, frozen=True):
    """How large something may become: so many bytes, or a part of what there is."""

    count_bytes: int | None = None
    percent: float = 100.0
    least_bytes: int = 0
    """A part of what there is comes to so much at least."""

    def of(self, whole_bytes: int) -> int:
        """Return the bytes that it comes to, where there are `whole_bytes` in all."""
        if self.count_bytes is not None:
            return self.count_bytes
        return max(self.least_bytes, int(whole_bytes * self.percent / 100))


CACHE_LIMIT = Limit(percent=50, least_bytes=GIB)
"""Half of the filesystem that the cache is on, or of the memory that is available."""


class TransportSettings(msgspec.Struct, frozen=True):
    """How long to wait for a source, and how often to ask again.

    `deadline_s` bounds the silence of one fetch: attempts and pauses since its last byte, or
    since its first attempt. A server that is restarted is back within seconds, one that is rolled
    out anew in Kubernetes within a minute or so (its old pod alone may take 30 s to end); CRIU
    would rather wait than be told EIO, some of which it ignores (shared memory, CRIU <= 4.2). But
    an engine's own patience should not end first, as then nobody hears why: the kubelet's is two
    minutes (`runtimeRequestTimeout`).
    """

    connect_timeout_s: float = 5.0
    stall_timeout_s: float = 10.0
    """No byte for so long, or fewer than `stall_floor_bytes` within it: the attempt is over. Where
    a place's answers are known to be quicker, it is over sooner (`transport/place.py`)."""
    stall_floor_bytes: int = 4 * KIB
    deadline_s: float = 90.0
    brief_deadline_s: float = 2.5
    """In place of `deadline_s`, once a fetch has given up and until one succeeds: long enough for
    a lost connection, not for a server that is away."""
    prompt_deadline_s: float = 20.0
    """At most so much in place of `deadline_s` for what a command asks first, while a person waits
    at the prompt: a name that is wrong should not take a minute to say so."""
    backoff_first_s: float = 0.1
    backoff_most_s: float = 3.0
    whole_body_limit_bytes: int = 4 * MIB
    """A server without ranges answers 200 with everything; up to here that is good enough."""
    plain_http: bool = False
    """Speak HTTP to any registry; loopback is always spoken to in HTTP first."""
    tls_verify: bool = True
    """Whether the registry has to prove that it is who it says; others always have to."""
    authfile: str | None = None
    """The file that credentials are in; None: where Podman and Docker keep them."""
    allow_local_redirects: bool = False
    """Whether a registry elsewhere may lead to loopback and link-local addresses."""
    mirrors: str = "auto"
    """Where to look for mirrors: one of `MIRRORS`, or a path; see `transport/mirror_files.py`."""
    shared_connections: int = 64
    """Requests under way at one host, of all daemons of a user on this machine together, beside
    the two that each may always have; see `transport/slots.py`."""
    run_directory: str | None = None
    """Where daemons find each other, to share; None: each for itself."""

    @property
    def at_the_prompt(self) -> "TransportSettings":
        """The same, with the patience of a person who waits."""
        return replace(self, deadline_s=min(self.deadline_s, self.prompt_deadline_s))


class ContentSettings(msgspec.Struct, frozen=True):
    """Sizes of requests and how many at once; see ARCHITECTURE.md, "The read path".

    Fill rule: connections x request size >= 3 x the link's bandwidth-delay product.
    """

    demand_connections: int = 16
    demand_least_bytes: int = 256 * KIB
    """A lone fault fetches so much from its chunk on: 2 ms of 1 Gbit/s, beside a round trip."""
    demand_most_bytes: int = 2 * MIB
    readahead_connections_least: int = 2
    readahead_connections: int = 8
    """At most; as many as the link rewards (`content/width.py`)."""
    readahead_request_bytes: int = 8 * MIB
    """At most; while a window is small its requests are small enough for all connections."""
    readahead_window_bytes: int = 64 * MIB
    yield_s: float = 0.5
    """After a fault out of the blue, background lanes keep to `gentle_connections` for so long at
    most, with narrow windows (`transport/window.py`)."""
    gentle_connections: int = 2
    """Narrow windows of so many connections are 0.8 of a link of 1 Gbit/s and 10 ms, and fill no
    queue; with three a read waits twice as long. Beside who fetches much at each fault, none."""
    patience_s: float = 0.4
    """A reader that waits for somebody else's fetch and sees no byte of it for so long asks
    for itself."""
    stream_patience_s: float = 5.0
    """A daemon that decodes a stream for others, and shows no life for so long, is given up."""
    idle_s: float = 2.0
    """The background pass over an unproven layer begins when nobody missed for so long."""
    completion_connections: int = 2
    memory_cache_bytes: int = 32 * MIB
    """Chunks held in memory where there is no disk to hold them."""
    verify: Literal["background", "full", "strict"] = "background"
    """When a layer without digests for its chunks is proven: behind what is read, or before the
    first byte of it is served; strict: so, and what nothing proves is refused."""

    @property
    def proves_first(self) -> bool:
        """Whether nothing is served before it is proven."""
        return self.verify != "background"
