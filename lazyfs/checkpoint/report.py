"""What `lazyfs inspect` tells of a checkpoint: values, and their stable form as JSON."""

from typing import Any

import msgspec

from lazyfs.checkpoint.criu import Inventory, Mount
from lazyfs.checkpoint.criu_cpu import DumpedCpu
from lazyfs.checkpoint.engines import Origin
from lazyfs.checkpoint.trust import Trust


class ThreadReport(msgspec.Struct, frozen=True):
    """A thread, the main one too."""

    tid: int
    command: str | None


class ProcessReport(msgspec.Struct, frozen=True):
    """A process of the checkpoint; None where its images do not say."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    command: str | None
    state: str | None
    """"alive", "stopped" or "zombie"."""
    threads: tuple[ThreadReport, ...]
    memory_bytes: int | None
    """In its pages file, as they were in memory."""
    lazy_memory_bytes: int | None
    """Part of `memory_bytes` that `criu lazy-pages` may bring after the process has resumed."""
    parent_memory_bytes: int | None
    """Beside `memory_bytes`: left in the parent checkpoint."""


class MemoryReport(msgspec.Struct, frozen=True):
    """The memory of all processes, as it was in memory; None where it was not looked at."""

    total_bytes: int | None
    """In this checkpoint; what is shared counts once."""
    anonymous_bytes: int | None
    file_bytes: int | None
    """Private mappings of files: the pages that were written to."""
    shared_bytes: int | None
    """Shared memory and memfds: `criu restore` reads them before any process runs."""
    lazy_bytes: int | None
    parent_bytes: int | None
    """Beside `total_bytes`: left in parent checkpoints."""
    device_bytes: int
    """Of GPUs, as CRIU's amdgpu plugin stores it; beside `total_bytes`."""
    compressed: bool
    """Pages are stored in another form than they had in memory."""


class NeedsReport(msgspec.Struct, frozen=True):
    """What a restore of this checkpoint takes beside its memory."""

    tcp_connections: int
    """Established ones."""
    external_mounts: tuple[Mount, ...]
    security_labels: tuple[str, ...]
    """SELinux contexts or AppArmor profiles of the processes."""
    cpu: DumpedCpu | None
    """The CPU of the dump; None without cpuinfo.img."""
    cpu_features: tuple[str, ...]
    """Register sets that were in use, by the x86 feature that they come with."""
    wide_page_counts: bool
    """CRIU before 4.2 takes the memory for empty."""


class LayerReport(msgspec.Struct, frozen=True):
    """A layer of the image."""

    media_type: str
    digest: str | None
    size_bytes: int
    format: str
    mislabelled: bool
    """Its bytes are of another compression than `media_type` says."""
    streamed: bool
    """It can only be decoded from its start, so far."""
    proof: str
    """"chunk": each chunk by its digest before a byte of it is served; "layer": the whole by the
    layer's digest, in the background or before the first byte with --verify full; "none"."""


class SizesReport(msgspec.Struct, frozen=True):
    """Files of the checkpoint, as they are when unpacked."""

    files: int
    files_bytes: int
    pages_files: int
    pages_bytes: int
    """Fetched as they are read."""
    metadata_files: int
    metadata_bytes: int
    """The other files of the images directory: fetched while a mount comes up."""


class StandsFor(msgspec.Struct, frozen=True):
    """What a stub says of the image that has its memory."""

    reference: str
    """In a registry, by digest."""
    image_bytes: int
    """Of its layers, as stored."""
    pages_files: int
    pages_bytes: int
    lazy_pages: bool | None
    """How whoever made the stub wants it restored."""
    made_by: str


class Report(msgspec.Struct, frozen=True):
    """Everything that `lazyfs inspect` tells; `as_json` gives its stable form."""

    reference: str
    manifest_digest: str | None
    manifest_media_type: str
    image_size_bytes: int
    """Of the layers, as stored."""
    origin: Origin
    images_directory: str
    """Its path in the checkpoint; "" where it is the checkpoint itself."""
    criu: Inventory | None
    own_namespaces: tuple[str, ...] | None
    """Namespaces that the root process does not share with the host that it was dumped on."""
    parents: tuple[str, ...]
    """Paths of the images directories that hold part of the memory, from the nearest on."""
    processes: tuple[ProcessReport, ...]
    memory: MemoryReport
    needs: NeedsReport
    layers: tuple[LayerReport, ...]
    trust: tuple[Trust, ...]
    """What is proven by what, and when."""
    sizes: SizesReport
    inspection_requests: int
    """What this inspection cost."""
    inspection_fetched_bytes: int
    notes: tuple[str, ...]
    """What was found odd."""
    stub: str | None = None
    """The stub that was asked for, if this is about what it stands for."""
    stands_for: StandsFor | None = None
    """Of a stub that was not followed."""

    def as_json(self) -> dict[str, Any]:
        """The report as plain values. Keys are documented in docs/json.md, and stay."""
        told: dict[str, Any] = msgspec.to_builtins(self)
        return told
