"""What happened, in numbers. Plain additions under the GIL; readers tolerate being one behind."""

import msgspec

from lazyfs.ground.journal import Journal


class Counters(msgspec.Struct):
    """One mount's counters, from its start."""

    requests: int = 0
    """HTTP requests and local reads sent to the source, retries included."""
    retries: int = 0
    stalls: int = 0
    """Attempts given up because the source had been silent for longer than it usually is."""
    hedges: int = 0
    """Second attempts made beside a slow one, that a reader waited for."""
    hedges_won: int = 0
    """Those of them that had bytes first."""
    places_refused: int = 0
    """Times that bytes were found wrong and the place that gave them was left for another."""
    bytes_fetched: int = 0
    """Body bytes received, as they were on the wire (compressed, headers not counted)."""
    reads: int = 0
    """Reads that reached lazyfs; what the kernel answers from its cache is not seen."""
    bytes_read: int = 0
    reads_waited: int = 0
    """Reads that had to wait for the source."""
    failed_reads: int = 0
    """Reads, lookups and the like answered with an error. CRIU ignores some: whoever drives a
    restore looks here."""
    chunks_from_cache: int = 0
    """Chunks of other mounts, earlier or now, found in the cache and proven unchanged."""
    chunks_shared: int = 0
    """Those of them that another daemon has fetched since this mount began."""
    cache_refused: int = 0
    """Chunks of other mounts whose bytes had changed; fetched anew."""
    cache_write_errors: int = 0
    journal: Journal | None = None
    """Where what happens is noted, while somebody records; no counter."""

    def snapshot(self) -> dict[str, int]:
        """All counters by name."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name != "journal"}
