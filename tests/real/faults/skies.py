"""Several mounts under one sky: images of the same checkpoint, readers on all, and their recovery.

What is asserted of each read is in `testbed.readers`; here is what is asserted of a mount: when the
weather has cleared up everything is readable and right, or, after a failed proof, nothing is.
"""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from testbed import Readers, Tally, Weather
from testbed.process import wait_until

from tests.real.corpus import Corpus
from tests.real.mounts import Mount, mounted

FORMS = {
    "tar": "plain-tar",
    "zstd:chunked": "skopeo-zstd-chunked",
    "soci": "soci-v2",
    "gzip": "skopeo-gzip",
}
"""The layer formats, and their names in the corpus."""
RATE_BYTES_S = 24 << 20
PROVEN_FIRST = ("zstd:chunked", "soci")
"""Those in which each chunk or span is proven before a byte of it is given out."""
WEATHERED = (
    "gave up",
    "answered with an error",
    "small files could not be fetched ahead",
    "the whole layer could not be",
    "could not be fetched",
    "closed the connection",
    "waiting to go on",
    "not all names are known yet",
    "is not proven yet",
)
"""What a daemon may warn of when its source fails it."""


class Sky:
    """A corpus behind a proxy."""

    def __init__(self, corpus: Corpus, weather: Weather, work: Path) -> None:
        self.corpus, self.weather, self.work = corpus, weather, work
        self.truth = corpus.images

    def reference(self, layer_format: str) -> str:
        """Return an image's reference by way of the weather."""
        reference = self.corpus.reference(FORMS[layer_format])
        return reference.replace(self.corpus.store.address, self.weather.address)

    @contextmanager
    def mounts(
        self, *options: str, formats: tuple[str, ...] = tuple(FORMS), forgiven: tuple[str, ...] = ()
    ) -> Iterator[Mapping[str, Mount]]:
        """Mount images of these formats, all at once, each with a cache of its own."""
        contexts = {
            name: mounted(
                self.reference(name),
                self.work / name.replace(":", "-"),
                *options,
                forgiven=(*WEATHERED, *forgiven),
            )
            for name in formats
        }
        with ThreadPoolExecutor(len(contexts)) as pool:
            starting = {name: pool.submit(each.__enter__) for name, each in contexts.items()}
            failed = [each.exception() for each in starting.values() if each.exception()]
            try:
                if failed and failed[0]:
                    raise failed[0]
                yield {name: each.result() for name, each in starting.items()}
            finally:
                running = [contexts[name] for name in contexts if not starting[name].exception()]
                for each in [pool.submit(one.__exit__, None, None, None) for one in running]:
                    each.result()


@contextmanager
def weather_over(
    corpus: Corpus,
    work: Path,
    seed: int,
    *,
    token_life_s: float | None = None,
    url_life_s: float | None = None,
) -> Iterator[Sky]:
    """Put a proxy before the corpus' registry, on a link that is not too fast to have a middle."""
    with Weather(
        corpus.store.address,
        seed=seed,
        rate_bytes_s=RATE_BYTES_S,
        token_life_s=token_life_s,
        url_life_s=url_life_s,
    ) as weather:
        yield Sky(corpus, weather, work)


def is_here(mount: Mount) -> bool:
    """Whether all of the content has come."""
    state = mount.status()
    return bool(state["here_bytes"] == state["content_bytes"])


def recover(readers: Readers, mount: Mount, truth: Path, timeout_s: float = 60) -> Tally:
    """Sweep a mount until a sweep meets no error; return what the last one has read.

    `readers` read nothing else meanwhile.
    """
    deadline_s = time.monotonic() + timeout_s
    before = readers.tally()
    while True:
        now = readers.sweep(mount.directory, truth)
        last = since(before, now)
        assert not last.wrong, last.wrong
        if not last.errors:
            return last
        state = mount.status()
        assert state["failed"] is None, state["failed"]
        assert time.monotonic() < deadline_s, f"still errors: {last.errors}\n{mount.log_text()}"
        before = now


def since(before: Tally, now: Tally) -> Tally:
    """Return what has happened between two accounts of the same readers."""
    errors = now.errors.copy()
    errors.subtract(before.errors)
    return Tally(
        now.reads - before.reads,
        now.bytes_read - before.bytes_read,
        +errors,
        now.wrong_bytes - before.wrong_bytes,
        now.wrong[len(before.wrong) :],
    )


def assert_condemned(readers: Readers, mount: Mount, truth: Path) -> None:
    """After a failed proof: the status says why, and not a byte is given out any more."""
    wait_until(lambda: mount.status()["failed"], "that the mount has failed", 60)

    def silent() -> bool:  # the kernel's own copies are taken back behind it, file by file
        before = readers.tally()
        last = since(before, readers.sweep(mount.directory, truth))
        return last.bytes_read == 0 and set(last.errors) == {"EIO"}

    wait_until(silent, "that nothing is given out any more", 30)
