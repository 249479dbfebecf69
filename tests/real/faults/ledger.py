"""What the fault suite did, in one table: faults by kind, reads, errors, wrong bytes.

pytest prints it after its own summary, and writes it as JSON where `--faults-json` says.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from testbed import Fault, Tally


@dataclass
class Entry:
    """What one kind of trouble came to."""

    faults: int = 0
    cases: int = 0
    """Mounts, restores or lives of a daemon that met it."""
    survived: int = 0
    """Of these, in how many everything was right afterwards, as it should be."""
    tally: Tally = field(default_factory=Tally)
    unproven_wrong_bytes: int = 0
    """Given out before the proof that condemned them: layers proven by their own digest only,
    mounted without `--verify=full`."""


@dataclass
class Ledger:
    """All kinds of trouble, by name."""

    entries: dict[str, Entry] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    """Whatever else a test has measured."""

    def __getitem__(self, name: str) -> Entry:
        return self.entries.setdefault(name, Entry())

    def note_weather(self, counts: Mapping[Fault, int]) -> None:
        """Account for what a weather has done."""
        for fault, count in counts.items():
            self[fault.value].faults += count

    def total(self) -> Entry:
        """Return the sum of all."""
        total = Entry()
        for entry in self.entries.values():
            total.faults += entry.faults
            total.cases += entry.cases
            total.survived += entry.survived
            total.unproven_wrong_bytes += entry.unproven_wrong_bytes
            total.tally.add(entry.tally)
        return total

    def lines(self) -> list[str]:
        """Return the table."""
        head = f"{'trouble':40} {'faults':>7} {'cases':>6} {'survived':>8} {'reads':>8} "
        head += f"{'MB':>8} {'errors':>7} {'wrong bytes':>11} {'unproven':>9}"
        rows = [*sorted(self.entries.items()), ("in all", self.total())]
        return [head, *(self._line(name, entry) for name, entry in rows)]

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        rows = [*sorted(self.entries.items()), ("in all", self.total())]
        plain = {
            name: {
                "faults": entry.faults,
                "cases": entry.cases,
                "survived": entry.survived,
                **entry.tally.as_json(),
                "unproven_wrong_bytes": entry.unproven_wrong_bytes,
            }
            for name, entry in rows
        }
        path.write_text(json.dumps({"troubles": plain, "figures": self.figures}, indent=1) + "\n")

    @staticmethod
    def _line(name: str, entry: Entry) -> str:
        tally = entry.tally
        return (
            f"{name:40} {entry.faults:7} {entry.cases:6} {entry.survived:8} {tally.reads:8} "
            f"{tally.bytes_read / 1e6:8.1f} {sum(tally.errors.values()):7} "
            f"{tally.wrong_bytes:11} {entry.unproven_wrong_bytes:9}"
        )


LEDGER = pytest.StashKey[Ledger]()


def ledger_of(config: pytest.Config) -> Ledger:
    """Return this run's ledger."""
    return config.stash.setdefault(LEDGER, Ledger())


def report(config: pytest.Config, terminal: pytest.TerminalReporter) -> None:
    """Print the table if there is anything in it, and write it where it was asked for."""
    ledger = ledger_of(config)
    if not ledger.entries:
        return
    terminal.section("faults, and what came of them")
    for line in ledger.lines():
        terminal.write_line(line)
    errors = Counter(ledger.total().tally.errors)
    terminal.write_line("errors by name: " + (str(dict(errors)) if errors else "none"))
    for name, value in ledger.figures.items():
        terminal.write_line(f"{name}: {value}")
    path = config.getoption("--faults-json")
    if path:
        ledger.write(Path(path))
        terminal.write_line(f"{path} written")
