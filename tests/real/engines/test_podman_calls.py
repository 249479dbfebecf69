"""What Podman calls its runtime with is what tests/data/engines/podman.json says."""

import json
from pathlib import Path

import pytest
from testbed import Testbed

from tests.real.engines.podman_calls import record

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

_RECORDED = Path(__file__).parents[2] / "data/engines/podman.json"


def test_podman_calls_its_runtime_as_was_recorded(testbed: Testbed, work: Path) -> None:
    assert record(testbed, work) == json.loads(_RECORDED.read_text())
