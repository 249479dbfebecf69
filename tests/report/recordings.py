"""Recordings that nobody has recorded: a lazy restore over a link, simulated event by event."""

import random

from lazyfs.checkpoint.trace import (
    Arrival,
    Fetch,
    Mark,
    Need,
    Phase,
    Read,
    Recording,
    Trace,
    TracedFile,
    TracedLayer,
)

KIB, MIB = 1 << 10, 1 << 20
LINK = 118e3
"""Bytes a millisecond."""
ROUND_TRIP_MS = 11.0
CHUNK = 4 * MIB


class _Link:
    """One at a time, in the order in which it is asked."""

    def __init__(self) -> None:
        self.free_ms = 0.0
        self.fetches: list[Fetch] = []

    def fetch(self, start: int, stop: int, at_ms: float, why: str, attempts: int = 1) -> float:
        first_ms = max(at_ms + ROUND_TRIP_MS * attempts, self.free_ms)
        self.free_ms = first_ms + (stop - start) / LINK
        self.fetches.append(Fetch(0, start, stop, at_ms, first_ms, self.free_ms, why, attempts))
        return self.free_ms


def lazy_restore(
    size_mib: int = 256,
    needed_percent: int = 5,
    *,
    seed: int = 1,
    dropped: int = 0,
    as_usual: bool = False,
) -> Trace:
    """A process whose pages are faulted in, with a transfer of the rest behind."""
    chance = random.Random(seed)
    size = size_mib * MIB
    pages = 1
    link = _Link()
    reads = [Read(0, 0, 4 * KIB, 400.0, 425.0, "read", True)]
    arrivals = [Arrival(0, 0, 16 * KIB, 424.0)]
    needs = [Need(0, 0, 4 * KIB, 400.0)]
    link.fetch(0, 64 * KIB, 120.0, "index")
    link.fetch(64 * KIB, 80 * KIB, 400.5, "demand")
    here: dict[int, float] = {}
    now_ms, last_ms, background = 520.0, 0.0, 0
    chunks = list(range(size // CHUNK))
    wanted = [
        chance.randrange(size // (64 * KIB)) for _ in range(16 * size_mib * needed_percent // 100)
    ]
    for number, slot in enumerate(dict.fromkeys(wanted)):
        while chunks and background * CHUNK / LINK < now_ms - 520.0:
            chunk = chunks.pop(0)
            background += 1
            if chunk not in here:
                here[chunk] = link.fetch(chunk * CHUNK, (chunk + 1) * CHUNK, now_ms, "readahead")
                arrivals.append(Arrival(pages, chunk * CHUNK, CHUNK, here[chunk] + 2))
        offset = slot * 64 * KIB
        needs.append(Need(pages, offset, 64 * KIB, now_ms))
        chunk = offset // CHUNK
        began_ms = now_ms
        waited = here.get(chunk, 1e9) > now_ms
        if chunk not in here:
            attempts = 2 if number == 7 else 1
            here[chunk] = link.fetch(
                chunk * CHUNK, (chunk + 1) * CHUNK, now_ms + 0.4, "demand", attempts
            )
            arrivals.append(Arrival(pages, chunk * CHUNK, CHUNK, here[chunk] + 2))
        now_ms = max(now_ms + 0.1, here[chunk] + 2.3)
        reads.append(Read(pages, offset, 64 * KIB, began_ms, now_ms, "fault", waited))
        last_ms = now_ms
        now_ms += chance.expovariate(1 / 1.5)
    until_ms = last_ms + 30.0
    for chunk in chunks:
        if chunk not in here:
            done_ms = link.fetch(chunk * CHUNK, (chunk + 1) * CHUNK, last_ms, "completion")
            arrivals.append(Arrival(pages, chunk * CHUNK, CHUNK, done_ms + 2))
    return Trace(
        workload="first-loop",
        made_by="lazyfs test",
        until="port 8080 answered",
        layers=[TracedLayer("sha256:" + "ab" * 32, size + 10 * MIB)],
        files=[
            TracedFile("checkpoint/core-1.img", 0, 16 * KIB),
            TracedFile("checkpoint/pages-1.img", 0, size),
        ],
        needs=needs,
        is_partial=as_usual,
        recording=Recording(
            reference="registry.example/job:1",
            began_at_s=1_790_000_000.0,
            length_ms=max(link.free_ms, until_ms) + 10,
            way="lazy pages",
            dropped=dropped,
            reads=reads,
            fetches=link.fetches,
            arrivals=arrivals,
            phases=[
                Phase("start", 0.0, 110.0),
                Phase("open the image", 110.0, 300.0),
                Phase("mount", 300.0, 380.0),
                Phase("criu: namespaces", 395.0, 430.0),
                Phase("criu: forking", 430.0, 470.0),
                Phase("criu: memory", 470.0, 515.0),
            ],
            marks=[
                Mark("mounted", 380.0),
                Mark("criu started", 390.0),
                Mark("restored", 518.0),
                Mark("until", until_ms),
            ],
        ),
    )
