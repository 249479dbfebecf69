"""docs/SEMANTICS.md makes no promise that no test holds, and names no test that is not there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/SEMANTICS.md").read_text()
PROMISE = re.compile(r"^- (.*(?:\n  .*)*)", re.MULTILINE)
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
PROMISES = PROMISE.findall(TEXT)


@cache
def names_in(path: str) -> frozenset[str]:
    """Return the names that pytest would collect at the top of a file."""
    found: set[str] = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):  # hypothesis: TestIt = It.TestCase
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(name for name in found if name.lower().startswith("test"))


def test_there_are_promises() -> None:
    assert len(PROMISES) > 60
    assert len(NAMED.findall(TEXT)) == TEXT.count("::"), "each is written as it should be"


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise[:40])
def test_a_promise_is_held_by_tests_that_exist(promise: str) -> None:
    named = NAMED.findall(promise)
    assert named, "no test holds it"
    for path, name in named:
        assert (ROOT / path).is_file(), path
        assert name in names_in(path), f"{path} has no {name}"
