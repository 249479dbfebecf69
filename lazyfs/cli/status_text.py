"""The state of mounts in words and tables.

What a daemon tells is shown as far as it is what it should be: it may be another user's, or of
another version.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lazyfs.asking import Known
from lazyfs.cli.text import human_bytes, plural, printable

_STYLES = {"serving": "green", "restoring": "green", "detached": "yellow", "silent": "yellow"}
_BAD = "bold red"
_SHOWN_MOST = 8
_DIGEST_SHOWN = 12
_DIGITS_IN_LIST = 8
_REFERENCE_MOST = 24
_NAME_LEAST = 12
_EXPLAINED = {
    "dead": "its daemon has ended; mount again, or clear it away: lazyfs umount {directory}",
    "stuck": "its daemon does not answer; detach it all the same: lazyfs umount --lazy {directory}",
    "silent": "it has no control socket that could be asked; see its log",
    "detached": "not mounted here: its daemon ends when the last file of it is closed",
    "failed": "bytes were found to be wrong: every read fails",
}


class Fact(NamedTuple):
    """A line about a mount."""

    label: str
    text: str
    style: str = ""


def plain(everything: Iterable[Known]) -> Iterator[str]:
    """Yield a line for a machine, with tabs: what `lazyfs status --help` names."""
    for known in everything:
        told = known.told
        columns = (
            shown_at(known),
            known.state,
            _number(told, "here_bytes", "-"),
            _number(told, "content_bytes", "-"),
            "offline" if told.get("safe_offline") is True else "-",
            _open(known),
            known.reference,
        )
        yield "\t".join(printable(str(column)) for column in columns)


def print_list(everything: list[Known]) -> None:
    """Print a line a mount, and what is wrong below."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("MOUNT", overflow="fold", min_width=_NAME_LEAST)
    table.add_column("CHECKPOINT", no_wrap=True)
    table.add_column("HERE", justify="right", no_wrap=True)
    table.add_column("OFFLINE", no_wrap=True)
    table.add_column("OPEN", justify="right", no_wrap=True)
    table.add_column("STATE", no_wrap=True)
    for known in everything:
        table.add_row(
            Text(printable(shown_at(known))),
            Text(short_reference(known.reference), style="dim"),
            Text(_share(known.told)),
            Text("yes" if known.told.get("safe_offline") is True else "-"),
            Text(_open(known)),
            Text(known.state, style=_style(known)),
        )
    console = Console(highlight=False)
    console.print(table)
    for known in everything:
        if known.state not in ("serving", "restoring"):
            console.print(Text(f"\n{printable(shown_at(known))}: {printable(_why(known))}"))


def print_detail(known: Known) -> None:
    """Print all about one mount."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    before = ""
    for fact in facts(known):
        label = fact.label if fact.label != before else ""
        table.add_row(Text(label, style="bold"), Text(fact.text, style=fact.style))
        before = fact.label
    Console(highlight=False).print(table)


def facts(known: Known) -> Iterator[Fact]:
    """Yield what is known of a mount, fit for a terminal."""
    for fact in _facts(known):
        yield Fact(printable(fact.label), printable(fact.text), fact.style)


def _facts(known: Known) -> Iterator[Fact]:
    told = known.told
    yield Fact("Mount", shown_at(known))
    yield Fact("State", _state(known), _style(known))
    yield Fact("Checkpoint", known.reference)
    if not told:
        return
    yield Fact("Shown as", f"view of {told.get('view')}, since {told.get('mounted_at')}")
    yield from _content(told)
    yield from _trace(told)
    offline = told.get("safe_offline") is True
    yield Fact(
        "Offline",
        "safe: all is here and proven"
        if offline
        else f"not yet: lazyfs wait {known.directory} --complete",
    )
    unused = told.get("safe_unmount") is True
    yield Fact("Unmount", "safe: nobody holds a file" if unused else _open_words(told))
    yield from _lazy_pages(told)
    yield from _waiting(told)
    yield from _places(told)
    yield from _troubles(told)
    yield Fact("Daemon", f"process {told.get('pid')}, lazyfs {told.get('version')}")


def _lazy_pages(told: Mapping[str, Any]) -> Iterator[Fact]:
    """Yield how it is with the memory of those who are restored from here."""
    pages = told.get("lazy_pages")
    if not isinstance(pages, Mapping):
        return
    text = str(pages.get("state"))
    missing_bytes, tasks = _number(pages, "missing_bytes", 0), _number(pages, "tasks", 0)
    if missing_bytes:
        text += f", {plural(tasks, 'task')} without {human_bytes(missing_bytes)}"
    if faults := _number(pages, "faults", 0):
        fetched = _number(pages, "faults_fetched", 0)
        text += f"; {plural(faults, 'fault')}, {fetched} of them for bytes that were not here"
    yield Fact("Memory", text)
    if failures := _number(pages, "failures", 0):
        text = f"{plural(failures, 'restore')} failed, the last one: {pages.get('last_failure')}"
        yield Fact("Memory", text, "red")


def _trace(told: Mapping[str, Any]) -> Iterator[Fact]:
    trace = told.get("trace")
    if isinstance(trace, Mapping):
        needed = human_bytes(_number(trace, "needed_bytes", 0))
        whose = f" of {trace.get('workload')}" if trace.get("workload") else ""
        yield Fact("Trace", f"{needed} needed{whose} ({trace.get('source')})")


def _content(told: Mapping[str, Any]) -> Iterator[Fact]:
    here, proven = _number(told, "here_bytes", 0), _number(told, "proven_bytes", 0)
    whole = told.get("content_bytes")
    if isinstance(whole, int) and whole > 0:
        text = f"{human_bytes(here)} of {human_bytes(whole)} ({here * 100 // whole}%)"
    else:
        text = f"{human_bytes(here)}, of so far unknown size"
    if here:
        proof = "all of it proven" if proven >= here else f"{human_bytes(proven)} of it proven"
        text += f", {proof}"
    yield Fact("Here", text)
    fetched, requests = _number(told, "bytes_fetched", 0), _number(told, "requests", 0)
    retries = _number(told, "retries", 0)
    again = f", {plural(retries, 'retry', 'retries')}" if retries else ""
    yield Fact("Fetched", f"{human_bytes(fetched)} in {plural(requests, 'request')}{again}")
    layers = _mappings(told, "layers")
    for number, layer in enumerate(layers[:_SHOWN_MOST], 1):
        label = "Layer" if len(layers) == 1 else f"Layer {number}"
        yield Fact(label, _layer(layer))
    if len(layers) > _SHOWN_MOST:
        yield Fact("Layers", f"and {len(layers) - _SHOWN_MOST} more")
    for row in _mappings(told, "trust")[:_SHOWN_MOST]:
        when = f"; {row.get('when')}" if row.get("when") != "never" else ""
        yield Fact(f"Proof of {row.get('what')}", f"{row.get('proven_by')}{when}")


def _layer(layer: Mapping[str, Any]) -> str:
    digest = str(layer.get("digest") or "without a digest")
    algorithm, colon, digits = digest.partition(":")
    name = f"{algorithm}:{digits[:_DIGEST_SHOWN]}…" if colon else digest
    state = {
        "chunk": "each chunk is proven before it is served",
        "layer": "proven" if layer.get("blob_proven") is True else "not proven yet",
        "none": "nothing to prove it by",
    }.get(str(layer.get("proof")), "")
    return f"{name} as {layer.get('format')}, {state}"


def _waiting(told: Mapping[str, Any]) -> Iterator[Fact]:
    reading = _mappings(told, "reading")
    for each in reading[:_SHOWN_MOST]:
        size = human_bytes(_number(each, "size_bytes", 0))
        yield Fact(
            "Waiting",
            f"{each.get('path')}: {size} at {each.get('offset')}, for {_seconds(each)}"
            + (f", opened by process {pid}" if (pid := each.get("opened_by_pid")) else ""),
        )
    more = _number(told, "reads_waiting", 0) - len(reading[:_SHOWN_MOST])
    if more > 0:
        yield Fact("Waiting", f"and {plural(more, 'more read', 'more reads')}")
    for fetch in _mappings(told, "fetches")[:_SHOWN_MOST]:
        yield Fact("Fetching", _fetch(fetch))
    completion = told.get("completion")
    if isinstance(completion, Mapping) and completion.get("state") == "running":
        done, whole = (_number(completion, key, 0) for key in ("done_bytes", "all_bytes"))
        yield Fact("Completing", f"{done * 100 // max(1, whole)}% done")


def _fetch(fetch: Mapping[str, Any]) -> str:
    wanted = fetch.get("byte_range")
    wanted = wanted if isinstance(wanted, Mapping) else {}
    text = (
        f"{fetch.get('blob')}, bytes {wanted.get('start')} to {wanted.get('stop')} from "
        f"{fetch.get('place')}, for {_seconds(fetch, 'since_s')}, silent for "
        f"{_seconds(fetch, 'silent_s')}, {plural(_number(fetch, 'attempts', 0), 'attempt')}"
    )
    return text + (f"; {fetch['last_error']}" if fetch.get("last_error") else "")


def _places(told: Mapping[str, Any]) -> Iterator[Fact]:
    for place in _mappings(told, "places"):
        words = [str(place.get("name"))]
        if place.get("first_byte_ms") is not None:
            words.append(f"answers after {place['first_byte_ms']} ms")
        if place.get("lied") is True:
            words.append("gave wrong bytes: it is asked no more")
        elif place.get("resting") is True:
            words.append("rests: others are asked first")
        failures = _number(place, "failures", 0)
        if failures:
            attempts = plural(failures, "attempt")
            words.append(f"{attempts} failed, the last: {place.get('last_error')}")
        style = _BAD if place.get("lied") is True else "yellow" if failures else ""
        yield Fact("Place", ", ".join(words), style)


def _troubles(told: Mapping[str, Any]) -> Iterator[Fact]:
    failed = _number(told, "failed_reads", 0)
    if failed:
        yield Fact("Failed", f"{plural(failed, 'read')} answered with an error", _BAD)
    if told.get("last_error"):
        yield Fact("Last error", f"{told['last_error']} ({told.get('last_error_at')})", "red")
    if _number(told, "cache_write_errors", 0):
        chunks = plural(told["cache_write_errors"], "chunk was", "chunks were")
        yield Fact("Cache", f"{chunks} not kept: no room, or its disk refused", "yellow")
    warnings = told.get("warnings")
    for warning in warnings if isinstance(warnings, list) else ():
        yield Fact("May not restore", str(warning), "yellow")


def short_reference(reference: str) -> str:
    """Return what tells one checkpoint from another, in 24 columns: `web@19d1f0a2`."""
    name, _, digest = printable(reference).partition("@")
    last = name.rpartition("/")[2]
    digits = digest.rpartition(":")[2][:_DIGITS_IN_LIST]
    most = _REFERENCE_MOST - (len(digits) + 1 if digits else 0)
    if len(last) > most:
        last = last[: most - 1] + "…"
    return f"{last}@{digits}" if digits else last


def shown_at(known: Known) -> str:
    """Return where a mount is: a directory, or what it is for where it is in none."""
    restores = known.told.get("restores")
    return f"restore of {restores}" if restores else known.directory


def _state(known: Known) -> str:
    if known.state in ("serving", "restoring"):
        return known.state
    return f"{known.state}: {_why(known)}"


def _why(known: Known) -> str:
    failed = known.told.get("failed")
    if known.state == "failed" and failed:
        return f"{failed}; every read fails"
    return _EXPLAINED.get(known.state, "").format(directory=known.directory)


def _style(known: Known) -> str:
    return _STYLES.get(known.state, _BAD)


def _share(told: Mapping[str, Any]) -> str:
    here, whole = told.get("here_bytes"), told.get("content_bytes")
    if not isinstance(here, int):
        return "-"
    if not isinstance(whole, int) or whole <= 0:
        return human_bytes(here)
    return f"{human_bytes(here)} {here * 100 // whole:3d}%"


def _open(known: Known) -> str:
    if not known.told:
        return "-"
    return str(_number(known.told, "open_files", 0) + _number(known.told, "open_directories", 0))


def _open_words(told: Mapping[str, Any]) -> str:
    files = plural(_number(told, "open_files", 0), "file")
    directories = _number(told, "open_directories", 0)
    if directories:
        files += f" and {plural(directories, 'directory', 'directories')}"
    return f"busy: {files} held open"


def _seconds(each: Mapping[str, Any], key: str = "waits_s") -> str:
    waits_s = each.get(key)
    return f"{waits_s:.1f} s" if isinstance(waits_s, int | float) else "?"


def _number(told: Mapping[str, Any], key: str, otherwise: Any) -> Any:
    value = told.get(key)
    return value if isinstance(value, int) else otherwise


def _mappings(told: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = told.get(key)
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
