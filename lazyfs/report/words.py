"""What a recording says, in plain words. Sans-I/O.

Names of the trace's are raw in it: who shows them escapes them. Rates are in decimal megabytes, as
those of links are; sizes in MiB, as those of memory are.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lazyfs.ground.words import human_bytes, plural
from lazyfs.report.analysis import FAULT, Analysis
from lazyfs.report.waits import Wait

_TELLING = 0.1
"""A cause is named if it is so much of a wait."""
_HINTS_MOST = 2
_MEGA = 1_000_000
_OWN_LAZY_PAGES = "lazy pages"
"""As a recording says that the mount itself brought memory."""
_ONLY_A_HINT = "It does not say what came when: only the file that --record wrote does."
_BEGIN = "lazyfs: start"
"""The phase until the program is loaded."""
_ANSWERED = ("answered", "answered over HTTP", "succeeded")
"""How an end mark is told that is a first response."""


def seconds(milliseconds: float) -> str:
    """Write "1.42 s"."""
    return f"{milliseconds / 1000:.2f} s"


def brief(milliseconds: float) -> str:
    """Write "412 ms", "3.1 ms", "1.42 s"."""
    if milliseconds < 0.05:
        return "0 ms"
    if milliseconds >= 999.5:
        return seconds(milliseconds)
    return f"{milliseconds:.0f} ms" if milliseconds >= 9.95 else f"{milliseconds:.1f} ms"


def rate(bytes_a_second: float) -> str:
    """Write "118 MB/s"."""
    value = bytes_a_second / _MEGA
    return f"{value:.0f} MB/s" if value >= 9.95 else f"{value:.1f} MB/s"


def sentence(analysis: Analysis) -> str:
    """Say what happened, in one sentence."""
    if not analysis.has_recording:
        needs = plural(len(analysis.trace.needs), "range")
        return (
            f"A hint: {human_bytes(analysis.needed_bytes)} in {needs} of "
            f"{plural(len(analysis.files), 'file')} were needed within "
            f"{seconds(analysis.end_ms)}. {_ONLY_A_HINT}"
        )
    until = analysis.trace.until
    what = f" ({until})" if analysis.has_end and until else ""
    spent = spent_on(analysis)
    return f"{headline(analysis)}{what}{': ' if spent else ''}{spent}."


def headline(analysis: Analysis) -> str:
    """Say how long it took."""
    if not analysis.has_recording:
        return f"{human_bytes(analysis.needed_bytes)} needed within {seconds(analysis.end_ms)}"
    if not analysis.has_end:
        return f"{seconds(analysis.end_ms)} were recorded, and no end mark came"
    if analysis.trace.until.endswith(_ANSWERED):
        return f"First response after {seconds(analysis.end_ms)}"
    return f"{seconds(analysis.end_ms)} recorded"


def circumstances(analysis: Analysis) -> str:
    """Say what has to be known of how it was recorded; "" if that is nothing."""
    if not analysis.has_recording:
        return _ONLY_A_HINT
    if analysis.was_usual:
        named = analysis.followed_bytes
        trace = "Without a trace." if named is None else f"With a trace of {human_bytes(named)}."
        return f"{trace} Memory that was brought before a task touched it is not seen as needed."
    if analysis.recording.way == _OWN_LAZY_PAGES:
        return (
            "What was touched was brought, and little else, so that the trace is exact: a restore "
            "that nobody records, or one with --as-usual, is quicker."
        )
    return ""


def spent_on(analysis: Analysis) -> str:
    """Write what the time was spent on; "" if that is nothing worth a word."""
    budget = analysis.budget
    parts = (
        (budget.start_ms, "until the mount answered"),
        (budget.criu_ms, "CRIU"),
        (budget.waiting_ms, f"waiting for {who_waited(analysis)}"),
        (budget.rest_ms, "other work"),
    )
    return ", ".join(f"{seconds(time_ms)} {what}" for time_ms, what in parts if time_ms >= 5)


def who_waited(analysis: Analysis) -> str:
    """Write "41 faults and 3 reads"."""
    waits = analysis.waits_until_end
    faults = sum(wait.read.kind == FAULT for wait in waits)
    counts = [(faults, "fault"), (len(waits) - faults, "read")]
    return " and ".join(plural(count, thing) for count, thing in counts if count) or "no read"


class Figure(NamedTuple):
    """One of the summary's."""

    name: str
    value: str
    note: str = ""


def figures(analysis: Analysis) -> list[Figure]:
    """Return the summary strip's figures."""
    known = "as far as it was asked for" if analysis.was_usual else "unpacked"
    strip = [Figure("needed", human_bytes(analysis.needed_bytes), known)]
    image = Figure("image", human_bytes(analysis.image_bytes), "of its layers that were read from")
    if not analysis.has_recording:
        return [*strip, image]
    waits = analysis.waits_until_end
    after = analysis.fetched_in_all_bytes - analysis.fetched_bytes
    slowest = max((wait.waited_ms for wait in waits), default=0.0)
    counts = [
        plural(count, thing)
        for count, thing in ((analysis.fault_count, "fault"), (analysis.read_count, "read"))
        if count
    ]
    return [
        *strip,
        Figure(
            "fetched",
            human_bytes(analysis.fetched_bytes),
            f"by then; {human_bytes(after)} after" if after > 0 else "over the link",
        ),
        image,
        Figure(
            "link",
            rate(analysis.link_rate),
            f"while bytes came: {seconds(analysis.receiving_ms)}",
        ),
        Figure("asked for", str(analysis.fault_count + analysis.read_count), " and ".join(counts)),
        Figure("waited", str(len(waits)), f"{seconds(analysis.causes.all_ms)} together"),
        Figure("slowest", brief(slowest), f"stalled {brief(stalled_ms(analysis))} in all"),
    ]


def stalled_ms(analysis: Analysis) -> float:
    """Return how long somebody waited and nothing came, before the end mark."""
    end_ms = analysis.end_ms
    return sum(
        max(0.0, min(stall.ended_ms, end_ms) - stall.began_ms)
        for stall in analysis.stalls
        if stall.began_ms < end_ms
    )


CAUSE_NAMES = {
    "queue_ms": "queue",
    "behind_ms": "behind others",
    "first_byte_ms": "first byte",
    "transfer_ms": "link",
    "decoding_ms": "decoding",
    "answering_ms": "answer",
    "unknown_ms": "not seen",
}
"""Of `Causes`, for a table and a legend."""


def main_cause(wait: Wait) -> str:
    """Return the name of what took longest."""
    longest = max(wait.causes._fields, key=lambda name: getattr(wait.causes, name))
    return CAUSE_NAMES[longest]


def why(wait: Wait) -> str:
    """Say why a read waited."""
    if wait.fetch is None and wait.arrived_ms is None:
        return (
            "no arrival of its bytes was noted while it waited: another daemon of this host "
            "brought them, or they were being read from the cache"
        )
    if wait.fetch is None:
        return (
            "no fetch of this mount ended when its bytes came: they were being decoded, or "
            "another daemon of this host brought them"
        )
    causes = wait.causes
    size = human_bytes(wait.fetch.stop - wait.fetch.start)
    lane = wait.fetch.why
    begun = "fetched only when it was asked for" if wait.asked else f"on its way already ({lane})"
    parts = [begun]
    told = [
        (causes.queue_ms, f"{brief(causes.queue_ms)} until its fetch was begun"),
        (
            causes.behind_ms,
            f"{brief(causes.behind_ms)} behind {human_bytes(wait.behind_bytes)} of others",
        ),
        (causes.first_byte_ms, f"{brief(causes.first_byte_ms)} until the first byte"),
        (causes.transfer_ms, f"{brief(causes.transfer_ms)} for {size} to come"),
        (causes.decoding_ms, f"{brief(causes.decoding_ms)} to decode, check and store it"),
        (causes.answering_ms, f"{brief(causes.answering_ms)} from there to the answer"),
    ]
    parts += [text for took_ms, text in told if took_ms >= _TELLING * wait.waited_ms and took_ms]
    if wait.fetch.attempts > 1:
        parts.append(f"had at attempt {wait.fetch.attempts}")
    return "; ".join(parts)


def hints(analysis: Analysis) -> list[str]:
    """Return what may be done about it, what gains most first: only what the recording shows."""
    if not analysis.has_recording:
        return []
    found = [
        (gain_ms, text)
        for gain_ms, text in (
            _hint_of_trace(analysis),
            _hint_of_link(analysis),
            _hint_of_others(analysis),
            _hint_of_start(analysis),
            _hint_of_decoding(analysis),
            _hint_of_retries(analysis),
            _hint_of_work(analysis),
        )
        if text and gain_ms > 0 and gain_ms >= 0.1 * analysis.end_ms
    ]
    found.sort(key=lambda hint: -hint[0])
    return [text for _, text in found[:_HINTS_MOST]]


def _share_ms(analysis: Analysis, waits_ms: float) -> float:
    """Return what a part of all waits is of the time in which anybody waited: they overlap."""
    whole_ms = analysis.causes.all_ms
    return analysis.budget.waiting_ms * waits_ms / whole_ms if whole_ms else 0.0


def _needed_on_link_ms(analysis: Analysis) -> float:
    """Return how long the link takes for what was needed, at the rate that it had."""
    if not analysis.link_rate or not analysis.arrived_bytes:
        return 0.0
    packed = min(1.0, analysis.fetched_bytes / analysis.arrived_bytes)
    return analysis.needed_bytes * packed / analysis.link_rate * 1000


def _hint_of_trace(analysis: Analysis) -> tuple[float, str]:
    asked_ms = sum(wait.waited_ms for wait in analysis.waits_until_end if wait.asked)
    share_ms = _share_ms(analysis, asked_ms)
    waiting = f"{seconds(share_ms)} of the {seconds(analysis.budget.waiting_ms)} of waiting were"
    takes = f"{seconds(_needed_on_link_ms(analysis))} on the link"
    if not analysis.was_usual:
        text = (
            f"{waiting} for ranges that were fetched only when somebody asked for them. This trace "
            "names them: attach it to the image with `lazyfs trace push REF FILE`, and the next "
            f"restore fetches them first. At the rate seen here that is {takes}, beginning while "
            "the mount is made."
        )
    elif analysis.followed_bytes is None:
        text = (
            f"{waiting} for ranges that nobody had foretold: there was no trace. Record one with "
            "`lazyfs restore --record FILE` (without --as-usual), and attach it to the image with "
            "`lazyfs trace push REF FILE`."
        )
    else:
        text = (
            f"{waiting} for ranges that the trace, of {human_bytes(analysis.followed_bytes)}, did "
            "not foretell, or that were asked for before it. If the workload has changed, record "
            "it anew."
        )
    return share_ms, text


def _hint_of_link(analysis: Analysis) -> tuple[float, str]:
    share_ms = _share_ms(analysis, analysis.causes.transfer_ms)
    ways = ["a mirror nearby", "a cache filled by `lazyfs warm`"]
    if analysis.fetched_bytes >= 0.9 * analysis.arrived_bytes:
        ways.append("the image pushed with --compression-format zstd:chunked")
    text = (
        f"{seconds(share_ms)} of the waiting were for bytes on the link, which carried "
        f"{rate(analysis.link_rate)}. What makes that less: {', or '.join(ways)}."
    )
    return share_ms, text


def _hint_of_others(analysis: Analysis) -> tuple[float, str]:
    share_ms = _share_ms(analysis, analysis.causes.behind_ms)
    spare_bytes = sum(file.spare_bytes for file in analysis.files)
    if not analysis.was_usual or analysis.followed_bytes is not None:
        return 0.0, ""
    text = (
        f"{seconds(share_ms)} of the waiting were behind other transfers: by the end mark "
        f"{human_bytes(spare_bytes)} had come that nobody had asked for. A trace puts what is "
        "needed before it."
    )
    return share_ms, text


def _hint_of_start(analysis: Analysis) -> tuple[float, str]:
    start_ms = analysis.budget.start_ms
    if start_ms < 0.25 * analysis.end_ms:
        return 0.0, ""
    begun_ms = max((phase.ended_ms for phase in analysis.phases if phase.name == _BEGIN), default=0)
    if begun_ms > start_ms / 2:
        text = (
            f"{seconds(start_ms)} went by before the mount answered, {seconds(begun_ms)} of them "
            "before lazyfs itself was loaded: its files are not in the page cache, or the machine "
            "is busy. A standby (`lazyfs standby`) has it loaded already."
        )
    else:
        text = (
            f"{seconds(start_ms)} went by before the mount answered. Mounted by digest instead of "
            "tag, with what `lazyfs warm` or an earlier mount has kept, it asks the registry for "
            "nothing."
        )
    return start_ms, text


def _hint_of_decoding(analysis: Analysis) -> tuple[float, str]:
    share_ms = _share_ms(analysis, analysis.causes.decoding_ms)
    text = (
        f"{seconds(share_ms)} of the waiting were for bytes that had come, and were being decoded, "
        "checked and stored: the processor or the cache's disk is the limit. An uncompressed "
        "layer, or --cache=memory, shows which."
    )
    return share_ms, text


def _hint_of_retries(analysis: Analysis) -> tuple[float, str]:
    slow = [wait for wait in analysis.waits_until_end if wait.fetch and wait.fetch.attempts > 1]
    share_ms = _share_ms(analysis, sum(wait.waited_ms for wait in slow))
    text = (
        f"{seconds(share_ms)} of the waiting were for {plural(len(slow), 'fetch', 'fetches')} that "
        "needed more than one attempt: the registry, or the way there, fails. The mount's log "
        "says how."
    )
    return share_ms, text


def _hint_of_work(analysis: Analysis) -> tuple[float, str]:
    rest_ms = analysis.budget.rest_ms
    if rest_ms < 0.5 * analysis.end_ms:
        return 0.0, ""
    text = (
        f"For {seconds(rest_ms)} nobody waited for a byte: that is the process itself, or the "
        "health check that ended the recording. No way of fetching makes it shorter."
    )
    return rest_ms, text


def told(analysis: Analysis, most: int = 5) -> Sequence[str]:
    """Return the report as lines for a terminal: the sentence, the longest waits, what helps."""
    lines = [sentence(analysis)]
    slowest = analysis.slowest[:most]
    if slowest:
        lines += ["", "longest waits:"]
    for wait in slowest:
        path = analysis.trace.files[wait.read.file].path
        lines.append(
            f"  {brief(wait.waited_ms):>7}  at {seconds(wait.read.began_ms)}  "
            f"{path} at {human_bytes(wait.read.offset)}: {why(wait)}"
        )
    for hint in hints(analysis):
        lines += ["", hint]
    if analysis.recording.dropped:
        lines += ["", too_many(analysis)]
    return lines


def too_many(analysis: Analysis) -> str:
    """Say that a recording is not whole."""
    return (
        f"{plural(analysis.recording.dropped, 'event')} left out, too many to be recorded or of "
        "files that no trace can name: all figures are lower bounds."
    )
