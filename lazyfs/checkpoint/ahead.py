"""Resolving an image while what opens it is still being imported.

A command that reads a checkpoint spends longer on importing libraries than on the round trips to
the registry. So these are made in a thread, begun as soon as the few modules are there that it
needs; the rest, trio first of all, is imported meanwhile. What the thread needs is imported
before it starts, not in it: two that import vie for the one interpreter, and the round trips would
begin later.

Imports no trio, and nothing that does.
"""

import threading
from concurrent.futures import Future

from lazyfs.checkpoint.image import ResolvedImage, resolve
from lazyfs.checkpoint.reference import Reference, RegistryReference, parse_reference
from lazyfs.checkpoint.referrals import TRACE_TYPE
from lazyfs.checkpoint.remembered import is_remembered
from lazyfs.content.cache import Cache
from lazyfs.ground.counters import Counters
from lazyfs.ground.settings import TransportSettings


class Ahead:
    """One image that is being resolved in a thread, for whoever opens it with the same words."""

    def __init__(
        self, text: str, settings: TransportSettings, cache: Cache, *, traced: bool = False
    ) -> None:
        """Begin. `text` is the reference; `traced`: whether its traces are wanted, too.

        Raises:
            UsageError: it is none.
        """
        reference = parse_reference(text)
        early: tuple[str, ...] = ()
        if isinstance(reference, RegistryReference) and not _is_kept(reference, cache):
            if traced and not _is_kept(reference, cache, "trace"):
                early = (TRACE_TYPE,)
            import lazyfs.transport.http
            import lazyfs.transport.mirrors  # noqa: F401 - see above
        self.counters = Counters()
        """What it costs, and then whatever else is done with the image."""
        self._text = text
        self._future: Future[ResolvedImage] | None = Future()
        arguments = reference, settings, cache, early, self._future
        threading.Thread(target=self._run, args=arguments, name="ahead", daemon=True).start()

    def take(self, text: str) -> "Future[ResolvedImage] | None":
        """Return the image to be; None if another was asked for, or somebody has it already."""
        if text != self._text:
            return None
        future, self._future = self._future, None
        return future

    def _run(
        self,
        reference: Reference,
        settings: TransportSettings,
        cache: Cache,
        early: tuple[str, ...],
        future: "Future[ResolvedImage]",
    ) -> None:
        try:
            image = resolve(
                reference, settings, self.counters, documents=cache.documents, early=early
            )
        except BaseException as error:  # noqa: BLE001 - told to who takes it
            future.set_exception(error)
        else:
            future.set_result(image)


def _is_kept(reference: RegistryReference, cache: Cache, kind: str = "manifest") -> bool:
    """Whether it is likely that the registry will not be asked for the manifest."""
    name, digest = f"{reference.host}/{reference.repository}", reference.digest
    return digest is not None and is_remembered(cache.documents, digest, name, kind)
