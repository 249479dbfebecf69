"""What is missing, against a model that knows each page by itself."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.lazypages.missing import Missing, Range

PAGES = 60


@st.composite
def beginnings(draw: st.DrawFn) -> list[Range]:
    """Disjoint ranges, some of which touch; their origins are all over the place."""
    edges = sorted(draw(st.sets(st.integers(0, PAGES), max_size=16)))
    pairs = list(itertools.pairwise(edges))
    chosen = [pair for pair in pairs if draw(st.booleans())]
    return [Range(start, stop, 1000 * (n + 1)) for n, (start, stop) in enumerate(chosen)]


pages = st.integers(0, PAGES)
operations = st.one_of(
    st.tuples(st.just("drop"), pages, pages),
    st.tuples(st.just("move"), pages, pages, st.integers(0, 20)),
    st.tuples(st.just("copy")),
)


def model_of(missing: Missing) -> dict[int, int]:
    return {
        page: origin + page - start
        for start, stop, origin in missing
        for page in range(start, stop)
    }


@settings(max_examples=400)
@given(beginnings(), st.lists(operations, max_size=12), st.integers(1, 8))
def test_it_is_as_if_each_page_were_noted_by_itself(
    ranges: list[Range], done: list[tuple[str, int, int, int]], run_ranges: int
) -> None:
    missing = Missing(reversed(ranges), run_ranges)
    model = model_of(missing)
    for name, *numbers in done:
        if name == "drop":
            start, stop = numbers
            gone = [model.pop(page) for page in range(start, stop) if page in model]
            assert missing.drop(start, stop) == len(gone)
        elif name == "move":
            source, to, length = numbers
            moved = {
                to + page - source: model.pop(page)
                for page in range(source, source + length)
                if page in model
            }
            for page in range(to, to + length):
                model.pop(page, None)
            model |= moved
            missing.move(source, to, length)
        else:
            before, was = missing, list(missing)
            missing = missing.copy()
            before.drop(0, 2 * PAGES)  # which is the parent's own affair
            missing.copy().move(1, 2, 2 * PAGES)  # and what a child does is its own
            assert list(missing) == was
        assert model_of(missing) == model
        assert missing.size_bytes == len(model)
        listed = list(missing)
        assert len(listed) == len(missing)
        assert all(a.stop <= b.start for a, b in itertools.pairwise(listed))
        for page in range(-1, 2 * PAGES):
            found = missing.at(page)
            assert (found is not None) == (page in model)
            if found is not None:
                assert found.start <= page < found.stop
                assert found.origin + page - found.start == model[page]
            first = min((each for each in model if each >= page), default=None)
            rest = missing.after(page)
            assert (rest.start if rest else None) == first
            assert rest is None or rest.origin == model[rest.start]


def test_a_change_costs_the_same_among_many_ranges() -> None:
    many = Missing(Range(16 * n, 16 * n + 8, 16 * n) for n in range(300_000))
    for n in range(5_000):  # seconds, if each moved all others
        assert many.drop(16 * n, 16 * n + 8) == 8
        assert many.after(0) == Range(16 * n + 16, 16 * n + 24, 16 * n + 16)
    children = [many.copy() for _ in range(10)]
    many.drop(0, 4_800_000)
    assert {child.size_bytes for child in children} == {295_000 * 8}


def test_ranges_that_touch_stay_apart() -> None:
    missing = Missing([Range(0, 4, 0), Range(4, 8, 4)])
    assert missing.at(3) == Range(0, 4, 0)
    missing.drop(1, 5)
    assert list(missing) == [Range(0, 1, 0), Range(5, 8, 5)]


def test_what_moves_over_itself_is_what_it_was() -> None:
    missing = Missing([Range(10, 20, 10)])
    missing.move(10, 12, 10)
    assert list(missing) == [Range(12, 22, 10)]
