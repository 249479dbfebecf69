"""A mount's state as Prometheus metrics (`docs/metrics.md`), in the text that its scrapers ask for.

Names follow https://prometheus.io/docs/practices/naming/. Written by the project's own client
library, which is imported only when somebody asks.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from lazyfs.ground.counters import Counters

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_COUNTERS = {
    "requests": ("source_requests", "Requests sent to the source, retries included"),
    "retries": ("source_retries", "Requests sent again after a failed attempt"),
    "bytes_fetched": ("fetched_bytes", "Bytes received from the source"),
    "reads": ("reads", "Reads that reached lazyfs"),
    "bytes_read": ("read_bytes", "Bytes that reads were answered with"),
    "reads_waited": ("reads_waited", "Reads that had to wait for the source"),
    "failed_reads": ("failed_reads", "Reads, lookups and the like answered with an error"),
    "chunks_from_cache": ("cache_chunks_used", "Chunks found in the cache, unchanged"),
    "cache_refused": ("cache_chunks_refused", "Chunks found in the cache, changed"),
    "cache_write_errors": ("cache_write_errors", "Chunks that the cache's disk did not take"),
}
_GAUGES = {
    "layer_bytes": ("layer_bytes", "Size of all layers, as stored"),
    "content_bytes": ("content_bytes", "Size of all layers, unpacked"),
    "here_bytes": ("here_bytes", "Content that is on this machine"),
    "proven_bytes": ("proven_bytes", "Content that is here and proven by a digest"),
    "open_files": ("open_files", "Files held open"),
    "open_directories": ("open_directories", "Directories held open"),
    "reads_waiting": ("reads_waiting", "Reads under way"),
    "longest_wait_s": ("longest_wait_seconds", "For how long the oldest of them has been"),
    "safe_offline": ("safe_offline", "Whether nothing will be asked of the source any more"),
    "safe_unmount": ("safe_unmount", "Whether nobody holds a file or directory open"),
}
_LAZY_COUNTERS = {
    "restores": ("lazy_restores", "Restores with lazy pages that have come to their end"),
    "failures": ("lazy_restores_failed", "Restores whose tasks have been killed"),
    "faults": ("lazy_faults", "Pages that a restored task has waited for"),
    "faults_fetched": ("lazy_faults_fetched", "Those of them whose bytes were not here"),
    "bytes_faulted": ("lazy_faulted_bytes", "Memory filled because of faults"),
    "bytes_background": ("lazy_background_bytes", "Memory filled before anybody asked"),
}
_LAZY_GAUGES = {
    "tasks": ("lazy_tasks", "Restored tasks that are being served"),
    "missing_bytes": ("lazy_missing_bytes", "Their memory that has still to come"),
}
_INFO = ("reference", "directory", "view", "layer_format", "version")


def exposition(state: Mapping[str, Any]) -> bytes:
    """Return what `status.py` tells of a mount, and the daemon's own use of the machine."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Mount(state))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Mount(Collector):
    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """Yield what prometheus_client writes down."""
        state = self._state
        yield InfoMetricFamily(
            "lazyfs_mount", "What is mounted", {key: str(state[key]) for key in _INFO}
        )
        mounted_at_s = datetime.fromisoformat(state["mounted_at"]).timestamp()
        yield GaugeMetricFamily("lazyfs_mounted_timestamp_seconds", "Since when", mounted_at_s)
        failed = float(state["failed"] is not None)
        yield GaugeMetricFamily("lazyfs_failed", "Whether bytes were found to be wrong", failed)
        for key in Counters().snapshot():
            name, text = _COUNTERS.get(key, (key, key.replace("_", " ")))
            yield CounterMetricFamily(f"lazyfs_{name}", text, state[key])
        for key, (name, text) in _GAUGES.items():
            if state[key] is not None:
                yield GaugeMetricFamily(f"lazyfs_{name}", text, float(state[key]))
        yield from self._lazy_pages()
        yield from self._places()

    def _lazy_pages(self) -> Iterator[Metric]:
        pages = self._state.get("lazy_pages")
        if not isinstance(pages, Mapping):
            return
        for key, (name, text) in _LAZY_COUNTERS.items():
            yield CounterMetricFamily(f"lazyfs_{name}", text, float(pages[key]))
        for key, (name, text) in _LAZY_GAUGES.items():
            yield GaugeMetricFamily(f"lazyfs_{name}", text, float(pages[key]))

    def _places(self) -> Iterator[Metric]:
        places = [each for each in self._state["places"] if isinstance(each, Mapping)]
        if not places:
            return
        failures = GaugeMetricFamily(
            "lazyfs_place_failures", "Attempts that failed since one succeeded", labels=["place"]
        )
        lied = GaugeMetricFamily(
            "lazyfs_place_lied",
            "Whether it gave bytes that contradict a digest",
            labels=["place"],
        )
        for place in places:
            failures.add_metric([str(place.get("name"))], float(place.get("failures") or 0))
            lied.add_metric([str(place.get("name"))], float(bool(place.get("lied"))))
        yield failures
        yield lied
