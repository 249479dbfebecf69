"""`kill -9` of the daemon at random moments, again and again; the next one takes over.

`make test` kills a few times, `make faults` two hundred times and more: --kills, --criu-kills.
"""

import shutil
from pathlib import Path

import pytest
from testbed import Weather, get_manifest

from tests.real.corpus import Corpus
from tests.real.faults.kills import Blob, Killer
from tests.real.faults.ledger import Ledger
from tests.real.faults.skies import FORMS, Sky

pytestmark = [pytest.mark.real]

MIB = 1 << 20
RATE_BYTES_S = 24 * MIB


def layer_of(forms: Corpus, layer_format: str) -> Blob:
    """Return what the registry has of an image's only layer."""
    reference = forms.reference(FORMS[layer_format]).removeprefix(f"{forms.store.address}/")
    repository, _, tag = reference.rpartition(":")
    _, manifest = get_manifest(forms.store.address, repository, tag)
    if "manifests" in manifest:
        digest = manifest["manifests"][0]["digest"]
        _, manifest = get_manifest(forms.store.address, repository, digest)
    (layer,) = manifest["layers"]
    return Blob(layer["digest"], layer["size"])


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("by_criu", [False, True], ids=["reads", "restores"])
def test_no_kill_costs_a_byte(
    forms: Corpus,
    work: Path,
    ledger: Ledger,
    request: pytest.FixtureRequest,
    by_criu: bool,
) -> None:
    count = request.config.getoption("--criu-kills" if by_criu else "--kills")
    seed = request.config.getoption("--faults-seed")
    name = "kill -9 in a CRIU restore" if by_criu else "kill -9 while all is read"
    entry = ledger[name]
    with Weather(forms.store.address, rate_bytes_s=RATE_BYTES_S) as link:
        killer = Killer(link, forms.checkpoint, forms.images, seed)
        sky = Sky(forms, link, work)
        for number in range(count):
            layer_format = list(FORMS)[number % len(FORMS)]
            reference, blob = sky.reference(layer_format), layer_of(forms, layer_format)
            here = work / f"{number}"
            if by_criu:
                killer.kill_a_restore(reference, here, blob)
            else:
                killer.kill_a_reader(reference, here, blob)
            shutil.rmtree(here)
            entry.cases += 1
            entry.faults += 1
            entry.survived += 1
    entry.tally.add(killer.score.dead)
    entry.tally.add(killer.score.taken_over)
    ledger.figures[name] = killer.score.figures()
    assert killer.score.kills == count
