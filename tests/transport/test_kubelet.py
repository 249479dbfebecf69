"""The kubelet's credential providers, asked as it asks them."""

import json
import logging
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from lazyfs.ground.errors import SourceError
from lazyfs.transport.kubelet import find_login, matches, parse_config, parse_response

_KIND = {"kind": "CredentialProviderConfig", "apiVersion": "kubelet.config.k8s.io/v1"}
_ANSWER = {
    "kind": "CredentialProviderResponse",
    "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
    "cacheKeyType": "Registry",
    "auth": {
        "*.dkr.example": {"username": "any", "password": "wide"},
        "a.dkr.example/team": {"username": "AWS", "password": "secret"},
    },
}


def _provider(directory: Path, name: str, answer: object = _ANSWER, code: int = 0) -> None:
    text = json.dumps(answer)
    program = directory / name
    program.write_text(
        f'#!/bin/sh\ncat >"{directory}/asked"\necho "$1 $MODE" >"{directory}/words"\n'
        f"cat <<'END'\n{text}\nEND\nexit {code}\n"
    )
    program.chmod(0o755)


def _config(directory: Path, *providers: dict[str, object]) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**_KIND, "providers": providers}))
    return path


def test_the_provider_that_knows_the_image_is_asked(tmp_path: Path) -> None:
    _provider(tmp_path, "ecr")
    path = _config(
        tmp_path,
        {"name": "nobody", "matchImages": ["gcr.io"], "defaultCacheDuration": "1h"},
        {
            "name": "ecr",
            "matchImages": ["*.dkr.example"],
            "defaultCacheDuration": "12h",
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1beta1",
            "args": ["get"],
            "env": [{"name": "MODE", "value": "quiet"}],
        },
    )
    found = find_login(path, tmp_path, "a.dkr.example", "team/web", {"PATH": "/usr/bin:/bin"})
    assert found is not None
    assert (found.username, found.password, found.provider) == ("AWS", "secret", "ecr")
    assert "secret" not in repr(found)
    assert json.loads(found.auth_file("a.dkr.example"))["auths"].keys() == {"a.dkr.example"}
    assert json.loads((tmp_path / "asked").read_text()) == {
        "kind": "CredentialProviderRequest",
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1beta1",
        "image": "a.dkr.example/team/web",
    }
    assert (tmp_path / "words").read_text() == "get quiet\n"
    assert find_login(path, tmp_path, "other.example", "team/web", {}) is None


_YAML = """\
# as Google Cloud and Azure write it
---
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: acr
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    defaultCacheDuration: "10m"
    matchImages: ["*.azurecr.io", '*.example:5000']
    args:
      - /etc/kubernetes/azure.json
    env: [{name: MODE, value: "1"}]
"""


def test_a_configuration_is_yaml_as_a_rule(tmp_path: Path) -> None:
    (provider,) = parse_config(_YAML.encode(), Path("config.yaml"))
    assert (provider.name, provider.args) == ("acr", ["/etc/kubernetes/azure.json"])
    assert provider.match_images == ["*.azurecr.io", "*.example:5000"]
    _provider(tmp_path, "acr", {**_ANSWER, "auth": {"a.example:5000": {"password": "secret"}}})
    path = tmp_path / "config.yaml"
    path.write_text(_YAML)
    found = find_login(path, tmp_path, "a.example:5000", "web", {"PATH": "/usr/bin:/bin"})
    assert found is not None
    assert found.password == "secret"
    assert (tmp_path / "words").read_text() == "/etc/kubernetes/azure.json 1\n"


@pytest.mark.parametrize(
    "line",
    [
        "TOKEN: secret: x",
        "TOKEN: 'secret",
        "TOKEN: secret\n\t- secret",
        "TOKEN: !!python/name:os.secret",
        "TOKEN: 2026-77-77",
        "TOKEN: !!timestamp secret",
        "TOKEN: !!bool secret",
        "TOKEN: !!int ''",
        "TOKEN: &a [*a, secret]\nproviders: *a",
        "providers: secret",
    ],
)
def test_what_is_wrong_with_it_is_told_without_what_is_in_it(line: str) -> None:
    data = f"kind: CredentialProviderConfig\n{line}\n".encode()
    with pytest.raises(SourceError, match=r"config\.yaml") as raised:
        parse_config(data, Path("config.yaml"))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("name", ["missing", "failing", "odd", "../evil", "token"])
def test_a_provider_that_fails_is_passed_over(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    _provider(tmp_path, "failing", code=1)
    _provider(tmp_path, "odd", answer=["secret"])
    _provider(tmp_path, "good")
    first: dict[str, object] = {"name": name, "matchImages": ["a.dkr.example"]}
    if name == "token":
        first["tokenAttributes"] = {"serviceAccountTokenAudience": "x"}
    path = _config(tmp_path, first, {"name": "good", "matchImages": ["a.dkr.example"]})
    with caplog.at_level(logging.INFO, "lazyfs"):
        found = find_login(path, tmp_path, "a.dkr.example", "web", {"PATH": "/usr/bin:/bin"})
    assert found is not None
    assert found.provider == "good"
    assert Path(name).name in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("pattern", "image", "is_meant"),
    [
        ("gcr.io", "gcr.io/a", True),
        ("*.azurecr.io", "x.azurecr.io/a", True),
        ("*.io", "x.azurecr.io/a", False),
        ("app*.k8s.io", "app7.k8s.io/a", True),
        ("*.*.registry.io", "a.b.registry.io/c", True),
        ("registry.io:8080/path", "registry.io:8080/path/x", True),
        ("registry.io:8080/path", "registry.io/path/x", False),
        ("registry.io", "registry.io:8080/path", False),
        ("registry.io/other", "registry.io/path", False),
        ("https://registry.io/path", "registry.io/path", True),
    ],
)
def test_images_are_matched_as_the_kubelet_matches_them(
    pattern: str, image: str, is_meant: bool
) -> None:
    assert matches(pattern, image) is is_meant


@given(some.text(), some.text())
def test_any_pattern_matches_or_not(pattern: str, image: str) -> None:
    assert matches(pattern, image) in (True, False)


@pytest.mark.parametrize("data", [b"{", b"{}", b'{"kind": "Pod"}', b'{"kind": 3}', b"\xff: ["])
def test_what_is_no_configuration_is_an_error(data: bytes) -> None:
    with pytest.raises(SourceError, match=r"config\.json"):
        parse_config(data, Path("config.json"))


@given(some.binary(max_size=100) | some.text(max_size=100).map(str.encode))
def test_any_bytes_are_a_configuration_or_a_source_error(data: bytes) -> None:
    with suppress(SourceError):
        parse_config(data, Path("config.yaml"))


@given(some.binary(max_size=100))
def test_any_bytes_are_a_response_or_a_source_error(data: bytes) -> None:
    try:
        parse_response(data, "x", "a/b")
    except SourceError:
        return


def test_a_configuration_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        find_login(tmp_path / "none.json", tmp_path, "a", "b", {})
