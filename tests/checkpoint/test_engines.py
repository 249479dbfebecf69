from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.checkpoint.engines import DUMPS, Origin, origin_of, parse_dump
from lazyfs.ground.errors import MalformedError

from . import sample

DIGEST = "sha256:" + "a" * 64
CRIO_CONFIG = {
    "id": "6924be1b",
    "name": "k8s_counter_counters_default_6975ee47_0",
    "rootfsImage": f"docker.io/library/nginx@{DIGEST}",
    "rootfsImageRef": "a8758716",
    "rootfsImageName": "docker.io/library/nginx:latest",
    "runtime": "runc",
    "createdTime": "2026-01-27T14:45:26.083444055Z",
    "checkpointedTime": "2026-01-28T00:10:45.673538606+05:30",
    "restoredTime": "0001-01-01T00:00:00Z",
}


def origin(
    annotations: Mapping[str, str] | None = None,
    dumps: Mapping[str, Mapping[str, Any]] | None = None,
    media_types: tuple[str, ...] = (),
    names: tuple[str, ...] = (),
) -> Origin:
    return origin_of(annotations or {}, dumps or {}, media_types, names)


def test_what_podman_wrote() -> None:
    files = sample.files()
    dumps = {name: parse_dump(files[name], name) for name in DUMPS if name in files}
    names = {path.partition("/")[0] for path in files}
    found = origin_of(sample.manifest()["annotations"], dumps, [sample.TAR_TYPE], names)
    assert found.engine == "Podman"
    assert found.engine_version == "5.4.2"
    assert found.recognised_by == "annotations io.podman.annotations.checkpoint.*"
    assert found.container_name == "sample"
    assert len(found.container_id or "") == 64
    assert found.base_image_name == "localhost/sample:1"
    assert found.base_image_digest is None  # Podman writes it empty
    assert len(found.base_image_id or "") == 64
    assert found.criu_version == "4.1.1"
    assert (found.runtime_name, found.runtime_version) == ("runc", "1.1.15+ds1")
    assert found.host_architecture == "amd64"
    assert (found.distribution_name, found.distribution_version) == ("debian", "13")
    assert found.cgroup_version == "v1"
    assert (found.container_created_at or "").endswith("Z")
    assert found.checkpointed_at is None


def test_podmans_archive_without_an_image_around_it() -> None:
    files = sample.files()
    dumps = {name: parse_dump(files[name], name) for name in DUMPS if name in files}
    found = origin(dumps=dumps)
    assert found.engine == "Podman"
    assert found.recognised_by == "io.container.manager in spec.dump is libpod"
    assert found.container_name == "sample"
    assert found.runtime_name == "runc"


def test_cri_o_by_one_annotation_and_its_dumps() -> None:
    found = origin(
        {"io.kubernetes.cri-o.annotations.checkpoint.name": "counter"},
        {
            "config.dump": CRIO_CONFIG,
            "spec.dump": {
                "annotations": {
                    "io.container.manager": "cri-o",
                    "io.kubernetes.container.name": "counter",
                    "io.kubernetes.pod.name": "counters",
                    "io.kubernetes.pod.namespace": "default",
                }
            },
        },
    )
    assert found == Origin(
        engine="CRI-O",
        recognised_by="annotations io.kubernetes.cri-o.annotations.checkpoint.*",
        container_id="6924be1b",
        container_name="counter",
        container_created_at="2026-01-27T14:45:26.083444055Z",
        checkpointed_at="2026-01-28T00:10:45.673538606+05:30",
        pod_name="counters",
        pod_namespace="default",
        base_image_name="docker.io/library/nginx:latest",
        base_image_id="a8758716",
        runtime_name="runc",
    )


def test_checkpointctl_names_the_engine_itself() -> None:
    prefix = "org.criu.checkpoint."
    found = origin(
        {
            prefix + "engine.name": "containerd",
            prefix + "container.name": "web",
            prefix + "pod.name": "web-0",
            prefix + "pod.namespace": "shop",
            prefix + "rootfsImageName": "docker.io/library/nginx:latest",
            prefix + "rootfsImageUserRequested": f"docker.io/library/nginx@{DIGEST}",
            prefix + "rootfsImageSha": DIGEST,
            prefix + "runtime.name": "crun",
        }
    )
    assert found.engine == "containerd"
    assert found.recognised_by == "annotation org.criu.checkpoint.engine.name"
    assert (found.container_name, found.pod_name, found.pod_namespace) == ("web", "web-0", "shop")
    assert found.base_image_digest == DIGEST
    assert found.runtime_name == "crun"


def test_containerd_cri_by_its_dumps() -> None:
    found = origin(
        dumps={
            "spec.dump": {
                "annotations": {
                    "io.kubernetes.cri.container-name": "web",
                    "io.kubernetes.cri.sandbox-name": "web-0",
                    "io.kubernetes.cri.sandbox-namespace": "shop",
                }
            },
            "status.dump": {
                "id": "abc",
                "metadata": {"name": "web"},
                "image": {"image": "docker.io/library/nginx:latest"},
                "image_ref": DIGEST,
            },
        }
    )
    assert found.engine == "containerd"
    assert (found.container_name, found.pod_name, found.pod_namespace) == ("web", "web-0", "shop")
    assert found.base_image_id == DIGEST


def test_the_proposal_for_the_image_spec() -> None:
    prefix = "org.opencontainers.image.checkpoint."
    found = origin(
        {
            prefix + "engine": "docker",
            prefix + "name": "db",
            prefix + "id": "abc",
            prefix + "checkpointer": "CRIU 3.19",
            prefix + "version": "1",
            prefix + "created": "2026-02-03T04:05:06Z",
            prefix + "runtime": "runc",
            prefix + "base.name": "postgres:17",
            prefix + "base.digest": DIGEST,
        }
    )
    assert (found.engine, found.container_name) == ("docker", "db")
    assert found.container_id == "abc"
    assert found.criu_version == "3.19"
    assert found.checkpointed_at == "2026-02-03T04:05:06Z"
    assert (found.base_image_name, found.base_image_digest) == ("postgres:17", DIGEST)


def test_everything_that_podman_writes() -> None:
    """All names of libpod/define/annotations.go, with values as Podman 5.4 has them."""
    prefix = "io.podman.annotations.checkpoint."
    found = origin(
        {
            prefix + "name": "sample",
            prefix + "rawImageName": "sample",
            prefix + "rootfsImageID": "ab" * 32,
            prefix + "rootfsImageName": "localhost/sample:1",
            prefix + "podman.version": "5.4.2",
            prefix + "criu.version": "40101",
            prefix + "runtime.name": "runc",
            prefix + "runtime.version": "runc version 1.1.15+ds1\ncommit: 1.1.15+ds1-2\n",
            prefix + "conmon.version": "conmon version 2.1.12",
            prefix + "host.arch": "amd64",
            prefix + "host.kernel": "6.18.5",
            prefix + "cgroups.version": "v1",
            prefix + "distribution.name": "debian",
            prefix + "distribution.version": "13",
        }
    )
    assert found == Origin(
        engine="Podman",
        engine_version="5.4.2",
        recognised_by="annotations io.podman.annotations.checkpoint.*",
        container_name="sample",
        base_image_name="localhost/sample:1",
        base_image_id="ab" * 32,
        criu_version="4.1.1",
        runtime_name="runc",
        runtime_version="1.1.15+ds1",
        host_kernel="6.18.5",
        host_architecture="amd64",
        distribution_name="debian",
        distribution_version="13",
        cgroup_version="v1",
    )


def test_everything_that_cri_o_knows() -> None:
    """All names of CRI-O's internal/annotations/checkpoint.go."""
    prefix = "io.kubernetes.cri-o.annotations.checkpoint."
    found = origin(
        {
            prefix + "name": "counter",
            prefix + "rawImageName": "nginx",
            prefix + "rootfsImageID": "ab",
            prefix + "rootfsImageName": "docker.io/library/nginx:latest",
            prefix + "cri-o.version": "1.33.0",
            prefix + "criu.version": "40101",
        }
    )
    assert (found.engine, found.engine_version) == ("CRI-O", "1.33.0")
    assert (found.base_image_name, found.base_image_id) == ("docker.io/library/nginx:latest", "ab")
    assert found.criu_version == "4.1.1"


def test_everything_that_checkpointctl_knows() -> None:
    """All names of its lib/annotations.go."""
    prefix = "org.criu.checkpoint."
    keys = {
        "engine.name": "CRI-O",
        "engine.version": "1.33",
        "container.name": "web",
        "pod.name": "web-0",
        "pod.id": "p",
        "pod.namespace": "shop",
        "pod.uid": "u",
        "rootfsImageName": "nginx:1",
        "rootfsImageUserRequested": "nginx",
        "rootfsImageSha": DIGEST,
        "rootfsImageID": "ab",
        "rawImageName": "nginx",
        "runtime.name": "crun",
        "runtime.version": "1.21",
        "criu.version": "4.1",
        "conmon.version": "2",
        "host.arch": "arm64",
        "host.kernel": "6.12",
        "cgroup.version": "v2",
        "distribution.name": "fedora",
        "distribution.version": "42",
    }
    found = origin({prefix + key: value for key, value in keys.items()})
    assert found == Origin(
        engine="CRI-O",
        engine_version="1.33",
        recognised_by="annotation org.criu.checkpoint.engine.name",
        container_name="web",
        pod_name="web-0",
        pod_namespace="shop",
        base_image_name="nginx:1",
        base_image_digest=DIGEST,
        base_image_id="ab",
        criu_version="4.1",
        runtime_name="crun",
        runtime_version="1.21",
        host_kernel="6.12",
        host_architecture="arm64",
        distribution_name="fedora",
        distribution_version="42",
        cgroup_version="v2",
    )


def test_containerd_cri_by_its_config_dump() -> None:
    """Its runtime is called by the shim, and its spec has annotations of its own."""
    found = origin(
        dumps={
            "config.dump": {"id": "abc", "name": "web", "runtime": "io.containerd.runc.v2"},
            "spec.dump": {
                "annotations": {"io.kubernetes.cri.image-name": "docker.io/library/nginx:latest"}
            },
        },
        names=("checkpoint", "config.dump", "spec.dump", "status", "status.dump", "container.log"),
    )
    assert (found.engine, found.runtime_name) == ("containerd", "runc")
    assert found.base_image_name == "docker.io/library/nginx:latest"


@pytest.mark.parametrize(
    ("path", "container_id"),
    [
        ("/default/t1", "t1"),
        ("system.slice:cri-containerd:abc", "abc"),
        ("/t1", None),
        ("/kubepods/besteffort/poda/abc", None),
        ("", None),
        (7, None),
    ],
)
def test_a_container_id_in_the_cgroups_path(path: object, container_id: str | None) -> None:
    spec = {"linux": {"cgroupsPath": path}}
    assert origin(dumps={"spec.dump": spec}).container_id == container_id
    both = {"spec.dump": spec, "config.dump": {"id": "known"}}
    assert origin(dumps=both).container_id == "known"


@pytest.mark.parametrize(
    ("media_types", "names", "engine"),
    [
        (("application/vnd.containerd.container.criu.checkpoint.criu.tar",), (), "containerd"),
        ((), ("checkpoint", "config.dump", "container.log", "status"), "containerd"),
        ((), ("checkpoint", "config.dump", "network.status"), "Podman"),
        ((), ("checkpoint", "status", "status.dump"), "containerd"),
        ((), ("checkpoint", "spec.dump", "io.kubernetes.cri-o.LogPath"), "CRI-O"),
        ((), ("checkpoint", "bind.mounts", "config.dump"), "CRI-O"),
        ((), ("descriptors.json", "inventory.img"), "runc or crun"),
        ((), ("inventory.img", "pstree.img"), "CRIU"),
        ((), ("bin", "etc"), None),
    ],
)
def test_by_media_types_and_names(
    media_types: tuple[str, ...], names: tuple[str, ...], engine: str | None
) -> None:
    found = origin(media_types=media_types, names=names)
    assert found.engine == engine
    assert (found.recognised_by is None) is (engine is None)


def test_an_annotation_wins_over_a_dump() -> None:
    found = origin(
        {"io.podman.annotations.checkpoint.name": "said"},
        {"config.dump": {"name": "dumped", "id": "x"}},
    )
    assert (found.container_name, found.container_id) == ("said", "x")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("40101", "4.1.1"),
        ("31701", "3.17.1"),
        ("4.2", "4.2"),
        ("999", "999"),
        ("CRIU 4.1", "4.1"),
        ("criu/v3.19", "3.19"),
        ("criu", None),
        ("", None),
    ],
)
def test_versions_of_criu(written: str, read: str | None) -> None:
    assert origin({"org.criu.checkpoint.criu.version": written}).criu_version == read


def test_what_is_of_the_wrong_type_is_not_believed() -> None:
    found = origin(
        dumps={
            "config.dump": {"id": 7, "name": ["x"], "createdTime": None, "runtime": {}},
            "spec.dump": {"annotations": [1]},
            "status.dump": {"metadata": "x", "labels": 3, "image": []},
        }
    )
    assert found == Origin()


def test_a_long_text_is_cut() -> None:
    found = origin({"io.podman.annotations.checkpoint.name": "x" * 1_000_000})
    assert found.container_name == "x" * 1000


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b'{"a":1e}', b'{"a":' + b"[" * 10**6])
def test_a_dump_that_is_none(data: bytes) -> None:
    with pytest.raises(MalformedError, match=r"config\.dump"):
        parse_dump(data, "config.dump")


@given(st.binary(max_size=200))
def test_a_dump_or_malformed(data: bytes) -> None:
    try:
        parse_dump(data, "spec.dump")
    except MalformedError:
        return


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=10,
)
keys = st.sampled_from(
    ["annotations", "labels", "metadata", "image", "id", "name", "runtime", "linux", "cgroupsPath"]
)


@given(st.dictionaries(st.sampled_from(DUMPS), st.dictionaries(keys, json_values)))
def test_any_dump_gives_an_origin(dumps: dict[str, dict[str, Any]]) -> None:
    assert isinstance(origin(dumps=dumps), Origin)
