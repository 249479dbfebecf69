"""The project's testbed: real CRIU, real engines, a real registry and a slow link.

Standard library only. `../build.sh` builds what it runs; `../README.md` shows it by hand.
"""

from __future__ import annotations

from .containerd import Containerd, ContainerdCheckpoint, Task, containerd_checkpoint
from .convert import (
    CRIO_NAME,
    buildah_image,
    checkpointctl_annotations,
    oras_push,
    skopeo_copy,
    umoci_change,
    write_crio_archive,
)
from .criu import CriuError, Restored, dump, restore, start_lazy_pages
from .engines import (
    PODMAN,
    PodmanCheckpoint,
    PushedCheckpoint,
    make_bundle,
    podman_checkpoint,
    runc_restore,
)
from .errors import TestbedError, TestbedMissing
from .images import (
    Config,
    Descriptor,
    Image,
    Layer,
    get_manifest,
    push_blob,
    push_manifest,
    push_oci_image,
    tar_checkpoint,
    write_manifest,
    write_oci_layout,
)
from .incremental import split_dump
from .podman import Container, Podman
from .portable import portable_lazyfs
from .readers import Readers, Tally
from .recorder import Recorder
from .registry import Access, Registry
from .roots import Testbed
from .session import Session
from .soci import SociMount, push_soci_enabled, soci_index, soci_mounted
from .wan import Wan
from .weather import ALTERING, PASSING, REFUSING, Fault, Forecast, Weather
from .web import WebServer
from .workload import Event, Pattern, Status, Workload
from .zstd_seekable import write_seekable

__all__ = [
    "ALTERING",
    "CRIO_NAME",
    "PASSING",
    "PODMAN",
    "REFUSING",
    "Access",
    "Config",
    "Container",
    "Containerd",
    "ContainerdCheckpoint",
    "CriuError",
    "Descriptor",
    "Event",
    "Fault",
    "Forecast",
    "Image",
    "Layer",
    "Pattern",
    "Podman",
    "PodmanCheckpoint",
    "PushedCheckpoint",
    "Readers",
    "Recorder",
    "Registry",
    "Restored",
    "Session",
    "SociMount",
    "Status",
    "Tally",
    "Task",
    "Testbed",
    "TestbedError",
    "TestbedMissing",
    "Wan",
    "Weather",
    "WebServer",
    "Workload",
    "buildah_image",
    "checkpointctl_annotations",
    "containerd_checkpoint",
    "dump",
    "get_manifest",
    "make_bundle",
    "oras_push",
    "podman_checkpoint",
    "portable_lazyfs",
    "push_blob",
    "push_manifest",
    "push_oci_image",
    "push_soci_enabled",
    "restore",
    "runc_restore",
    "skopeo_copy",
    "soci_index",
    "soci_mounted",
    "split_dump",
    "start_lazy_pages",
    "tar_checkpoint",
    "umoci_change",
    "write_crio_archive",
    "write_manifest",
    "write_oci_layout",
    "write_seekable",
]
