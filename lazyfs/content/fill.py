"""All of a layer's content brought here and checked, on the lane that nobody waits for.

For content whose bytes prove themselves chunk by chunk, or have been proven: others are brought
here by the pass that proves them (`completion.py`). What an earlier mount left is checked.
"""

from collections.abc import Callable

import trio

from lazyfs.content.lanes import Lane
from lazyfs.content.layer_content import LayerContent
from lazyfs.content.readahead import Readahead
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.ranges import ByteRange

_STEP_BYTES = 4 << 20
_AHEAD_BYTES = 64 << 20
_LOOK_AGAIN_S = 0.5


async def fill(
    content: LayerContent,
    readahead: Readahead,
    *,
    eager: bool,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Come back when all of it is here; `on_progress` is told bytes done, and bytes in all.

    `readahead` must be running. `eager`: over as many connections as fill the link, whoever is
    reading; otherwise so only while nobody misses anything.

    Raises:
        IntegrityError: it is not what it should be.
        FetchError, SourceError: it could not be had.
        LazyfsError: there is no room for it.
    """
    size_bytes = content.content_size_bytes
    readahead.take_fill_error()  # of somebody's who asked before
    for start in range(0, size_bytes, _STEP_BYTES):
        stop = min(start + _STEP_BYTES, size_bytes)
        ahead = ByteRange(start, min(start + _AHEAD_BYTES, size_bytes))
        await _obtain(content, readahead, ByteRange(start, stop), ahead, eager=eager)
        if on_progress is not None:
            on_progress(stop, size_bytes)
    content.raise_if_condemned()
    if content.here_bytes() < size_bytes:
        raise _no_room(content)


async def _obtain(
    content: LayerContent, readahead: Readahead, step: ByteRange, ahead: ByteRange, *, eager: bool
) -> None:
    while not content.is_here(step):
        content.raise_if_condemned()
        error = readahead.take_fill_error()
        if error is not None:
            raise error
        if not content.holdings.keeps_all:
            missing_bytes = content.content_size_bytes - content.here_bytes()
            if missing_bytes > content.settings.memory_cache_bytes:
                raise _no_room(content)
            await content.ensure(step, Lane.COMPLETION)
            return
        is_idle = content.lanes.idle_for_s >= content.settings.idle_s
        readahead.fill(ahead, eager=eager or is_idle)
        with trio.move_on_after(_LOOK_AGAIN_S):
            await content.wait_change(step)


def _no_room(content: LayerContent) -> LazyfsError:
    return LazyfsError(
        f"{content.blob.name}: the cache does not take all of its {content.content_size_bytes} "
        "bytes; make room in its directory, allow it more (--cache-size), or choose another place "
        "(--cache-dir, --cache)"
    )
