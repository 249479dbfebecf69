from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.restore.verdict import exit_code_of, judge


def test_clean_bytes_may_live() -> None:
    assert judge({"failed": None, "failed_reads": 0}) is None


@pytest.mark.parametrize(
    ("status", "why", "code"),
    [
        ({"failed": "layer x is wrong", "failed_reads": 0}, "layer x is wrong", 5),
        ({"failed": None, "failed_reads": 1, "last_error": "gone"}, "a read of the", 3),
        ({"failed": None, "failed_reads": 2}, "2 reads", 3),
        ({"failed": None}, "does not say", 3),
        ({"failed": None, "failed_reads": True}, "does not say", 3),
        ({"failed_reads": 0}, "does not say", 3),
    ],
)
def test_anything_else_may_not(status: dict[str, Any], why: str, code: int) -> None:
    assert why in str(judge(status))
    assert exit_code_of(status) == code


VALUES = st.none() | st.integers() | st.text() | st.booleans()


@given(st.dictionaries(st.sampled_from(["failed", "failed_reads", "last_error"]), VALUES))
def test_only_what_says_that_it_is_clean_may_live(status: dict[str, Any]) -> None:
    is_clean = "failed" in status and status["failed"] is None
    reads = status.get("failed_reads")
    is_clean = is_clean and isinstance(reads, int) and not isinstance(reads, bool) and reads == 0
    assert (judge(status) is None) == is_clean
