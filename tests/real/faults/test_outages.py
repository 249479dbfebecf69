"""A registry that goes and comes back, a name that stops resolving, a mirror that dies.

The readers of `testbed.readers` read while it happens; what they may get is what is right, or an
error.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from testbed import ALTERING, Fault, Forecast, Readers, Registry, TestbedError, Weather
from testbed.guard import forget, watch
from testbed.process import wait_until

from tests.real.conftest import Store
from tests.real.corpus import Corpus
from tests.real.faults.ledger import Ledger
from tests.real.faults.skies import (
    FORMS,
    PROVEN_FIRST,
    RATE_BYTES_S,
    WEATHERED,
    Sky,
    is_here,
    recover,
    since,
)
from tests.real.mounts import Mount, mounted

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]


def test_a_registry_is_restarted_and_frozen(
    store: Store, forms: Corpus, work: Path, ledger: Ledger, seed: int
) -> None:
    """Each reader waits, and hears of nothing."""
    with (
        store.served_at(work / "far") as registry,
        Weather(registry.address, seed=seed, rate_bytes_s=RATE_BYTES_S // 3) as link,
    ):
        sky = Sky(forms, link, work)
        with sky.mounts() as mounts, Readers(3, seed=seed) as readers:
            for mount in mounts.values():
                readers.add(mount.directory, sky.truth)
            for name, begin, end in (
                ("registry frozen", Registry.freeze, Registry.thaw),
                ("registry killed", Registry.kill, Registry.start),
            ):
                before = readers.tally()
                _wait_some(link)
                begin(registry)
                time.sleep(1)  # of an outage: what is waited for is that nothing happens
                end(registry)
                ledger[name].faults += 1
                _wait_some(link)
                ledger[name].cases += len(mounts)
                ledger[name].tally.add(since(before, readers.tally()))
                assert not ledger[name].tally.wrong
                ledger[name].survived += len(mounts)
            for mount in mounts.values():
                readers.drop(mount.directory)
            assert not readers.tally().errors
            with Readers(1, seed=seed) as sweeper:
                for mount in mounts.values():
                    recover(sweeper, mount, sky.truth)


def _wait_some(link: Weather) -> None:
    """Wait until something more has come, unless nothing more is to come."""
    before = link.sent_bytes.total()
    with suppress(TestbedError):
        wait_until(lambda: link.sent_bytes.total() > before + (1 << 20), "a MiB more", 3)


# -- names --------------------------------------------------------------------------------------

_HOST = "registry.lazyfs.test"
_ALONE = """
set -e
mount --make-rprivate /
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/resolv.conf" /etc/resolv.conf
mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
echo up
exec sleep 3600
"""


class Elsewhere:
    """A mount namespace with a resolver of its own; `root` is its view of the files."""

    def __init__(self, work: Path, fallback: str) -> None:
        self.etc = work / "etc"
        self.etc.mkdir(parents=True)
        (self.etc / "hosts").write_text(f"127.0.0.1 localhost {_HOST}\n")
        (self.etc / "resolv.conf").write_text("nameserver 127.0.0.9\noptions timeout:1\n")
        (self.etc / "nsswitch.conf").write_text(f"hosts: files {fallback}\n")
        command = ["unshare", "-m", "sh", "-c", _ALONE, "elsewhere", str(self.etc)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        watch(self._process.pid)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "up\n"
        self.root = Path(f"/proc/{self._process.pid}/root")

    def enter(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command in it."""
        words = ["nsenter", f"--mount=/proc/{self._process.pid}/ns/mnt", *map(str, command)]
        return subprocess.run(
            words, capture_output=True, text=True, timeout=90, check=False, cwd=Path.cwd()
        )

    def forget_name(self) -> None:
        """Let nobody know the registry's name any more."""
        (self.etc / "hosts").write_text("127.0.0.1 localhost\n")

    def know_name(self) -> None:
        """Let it be known again."""
        (self.etc / "hosts").write_text(f"127.0.0.1 localhost {_HOST}\n")

    def end(self) -> None:
        """Let it go, and with it what is mounted in it."""
        self._process.kill()
        self._process.communicate()
        forget(self._process.pid)


@contextmanager
def _elsewhere(work: Path, fallback: str) -> Iterator[Elsewhere]:
    place = Elsewhere(work, fallback)
    try:
        yield place
    finally:
        place.end()


@pytest.mark.parametrize("fallback", ["dns", ""], ids=["no-server-answers", "unknown"])
def test_a_name_stops_resolving_for_a_while(
    forms: Corpus, work: Path, ledger: Ledger, seed: int, fallback: str
) -> None:
    """No name server answers, or one says that there is no such name; connections are cut."""
    entry = ledger["DNS failure"]
    with (
        Weather(forms.store.address, seed=seed, rate_bytes_s=RATE_BYTES_S // 4) as link,
        _elsewhere(work, fallback) as place,
        Readers(2, seed=seed) as readers,
    ):
        port = link.address.rpartition(":")[2]
        reference = Sky(forms, link, work).reference("tar")
        reference = reference.replace(link.address, f"{_HOST}:{port}")
        directory = work / "mount"
        directory.mkdir()
        log = work / "lazyfs.log"
        command = [sys.executable, "-m", "lazyfs"]
        words = ["mount", "--plain-http", "--cache-dir", work / "cache", "--log-file", log]
        done = place.enter(*command, *words, reference, directory)
        assert done.returncode == 0, f"{done.stderr}\n{log.read_text()}"
        seen = place.root / directory.relative_to("/")
        try:
            readers.add(seen, forms.images)
            link.wait_sent(2 << 20)
            place.forget_name()
            link.drop_connections()
            entry.faults += 1
            entry.cases += 1
            retries = Mount.state_of(seen)["retries"]
            wait_until(lambda: Mount.state_of(seen)["retries"] >= retries + 2, "two retries", 30)
            place.know_name()
            readers.drop(seen)
            tally = readers.sweep(seen, forms.images)
            assert not tally.wrong, tally.wrong
            assert not tally.errors, f"{tally.errors}\n{log.read_text()}"
            state = Mount.state_of(seen)
            assert (state["failed"], state["failed_reads"]) == (None, 0)
            entry.tally.add(tally)
            entry.survived += 1
        finally:
            done = place.enter(*command, "umount", directory)
        assert done.returncode == 0, done.stderr


# -- mirrors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FORMS))
def test_a_mirror_dies_in_mid_read(
    store: Store,
    forms: Corpus,
    work: Path,
    ledger: Ledger,
    seed: int,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The registry that it stands for finishes what it has begun; no reader hears of it."""
    entry = ledger["mirror death"]
    entry.cases += 1
    with (
        store.served_at(work / "mirror") as mirror,
        Weather(mirror.address, seed=seed, rate_bytes_s=RATE_BYTES_S // 4) as link,
        Readers(2, seed=seed) as readers,
    ):
        _say_mirror(monkeypatch, work, store.address, link.address)
        reference = forms.reference(FORMS[name])
        with mounted(reference, work / "here", forgiven=WEATHERED) as mount:
            readers.add(mount.directory, forms.images)
            link.wait_sent(1 << 20)
            mirror.kill()
            link.drop_connections()
            entry.faults += 1
            readers.drop(mount.directory)
            tally = readers.sweep(mount.directory, forms.images)
            assert not tally.wrong, tally.wrong
            assert not tally.errors, tally.errors
            entry.tally.add(tally)
            assert is_here(mount)
    entry.survived += 1


@pytest.mark.parametrize("name", PROVEN_FIRST)
@pytest.mark.parametrize("fault", sorted(ALTERING, key=lambda fault: fault.name))
def test_a_mirror_that_lies_is_left_for_the_registry(
    store: Store,
    forms: Corpus,
    work: Path,
    ledger: Ledger,
    seed: int,
    name: str,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not a byte of its lies is given out, and the mount goes on: there is another place."""
    entry = ledger[f"mirror: {fault.value}"]
    entry.cases += 1
    with (
        Weather(store.address, seed=seed) as mirror,
        Readers(2, seed=seed) as readers,
    ):
        _say_mirror(monkeypatch, work, store.address, mirror.address)
        lied = ("does not match", "does not decompress", "lie", "other bytes")
        reference = forms.reference(FORMS[name])
        with mounted(reference, work / "here", forgiven=(*WEATHERED, *lied)) as mount:
            mirror.turn(Forecast.of(fault, chance=1))
            tally = readers.sweep(mount.directory, forms.images)
            assert not tally.wrong, tally.wrong
            assert not tally.errors, tally.errors
            assert mirror.counts[fault] > 0
            assert mount.status()["failed"] is None
        entry.tally.add(tally)
        entry.faults += mirror.counts[fault]
    entry.survived += 1


def _say_mirror(monkeypatch: pytest.MonkeyPatch, work: Path, registry: str, mirror: str) -> None:
    """Let the daemons that are started from here on know of a mirror."""
    conf = work / "registries.conf"
    conf.write_text(
        f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n'
        f'[[registry.mirror]]\nlocation = "{mirror}"\ninsecure = true\n'
    )
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(conf))
