"""The project's testbed: real CRIU, real engines, a real registry and a slow link.

Standard library only. `../build.sh` builds what it runs; `../README.md` shows it by hand.
"""

from __future__ import annotations

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
    push_manifest,
    push_oci_image,
    tar_checkpoint,
    write_oci_layout,
)
from .registry import Registry
from .roots import Testbed
from .session import Session
from .wan import Wan
from .workload import Event, Pattern, Status, Workload

__all__ = [
    "PODMAN",
    "Config",
    "CriuError",
    "Descriptor",
    "Event",
    "Image",
    "Layer",
    "Pattern",
    "PodmanCheckpoint",
    "PushedCheckpoint",
    "Registry",
    "Restored",
    "Session",
    "Status",
    "Testbed",
    "TestbedError",
    "TestbedMissing",
    "Wan",
    "Workload",
    "dump",
    "make_bundle",
    "podman_checkpoint",
    "push_manifest",
    "push_oci_image",
    "restore",
    "runc_restore",
    "start_lazy_pages",
    "tar_checkpoint",
    "write_oci_layout",
]
