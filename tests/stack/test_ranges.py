"""A `RangeSet` beside a plain set of numbers, wherever on the circle it lies."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from netns_kit.stack.ranges import RangeSet
from netns_kit.stack.seq import add, distance

Step = tuple[str, tuple[int, int]]
SIZE = 16  # small, so that ranges meet
numbers = st.integers(0, SIZE)
spans = st.tuples(numbers, numbers)
bases = st.sampled_from([0, 5, 0x7FFFFFF0, 0xFFFFFFE0, 0xFFFFFFFF])
steps = st.one_of(
    st.tuples(st.just("add"), spans),
    st.tuples(st.just("add"), spans),
    st.tuples(st.just("add"), spans),
    st.tuples(st.just("discard"), spans),
    st.tuples(st.just("bound"), spans),
)


def content(ranges: RangeSet, base: int) -> set[int]:
    """The numbers in it, from `base` on; and that its ranges are apart, and in order."""
    found = [(distance(base, start), distance(base, end)) for start, end in ranges]
    assert all(start < end for start, end in found)
    assert all(end < start for (_, end), (start, _) in pairwise(found)), "they touch"
    assert len(ranges) == len(found)
    if found:
        assert (distance(base, ranges.start), distance(base, ranges.end)) == (found[0][0], found[-1][1])
    return {number for start, end in found for number in range(start, end)}


@given(bases, st.lists(steps, max_size=12), spans)
def test_it_is_what_a_set_would_be(base: int, script: list[Step], asked: tuple[int, int]) -> None:
    ranges, plain = RangeSet(), set[int]()
    for what, (start, end) in script:
        if what == "add":
            new = set(range(start, end)) - plain
            assert ranges.add(add(base, start), add(base, end)) == bool(new)
            plain |= new
        elif what == "discard":
            ranges.discard_before(add(base, start))
            plain -= set(range(start))
        else:
            before = list(ranges)
            ranges.bound(2)
            assert list(ranges) == (before if len(before) <= 2 else [before[0], before[-1]])
            plain = content(ranges, base)
        assert content(ranges, base) == plain
    start, end = asked
    missing = [
        (distance(base, first), distance(base, last))
        for first, last in ranges.missing(add(base, start), add(base, end))
    ]
    assert all(first < last for first, last in missing)
    assert {number for first, last in missing for number in range(first, last)} == set(
        range(start, end)
    ) - plain
    if start < end:
        assert ranges.overlaps(add(base, start), add(base, end)) == bool(plain & set(range(start, end)))


def test_around_the_circle_and_on() -> None:
    """What is acknowledged moves on, for many times as many numbers as there are."""
    ranges, at = RangeSet(), 0
    for _ in range(50):
        ranges.add(add(at, 100), add(at, 200))
        ranges.add(add(at, 0x40000000), add(at, 0x40000010))
        assert next(iter(ranges)) == (add(at, 100), add(at, 200))
        at = add(at, 0x30000000)
        ranges.discard_before(at)
        assert ranges.start == add(at, 0x10000000)
        ranges.discard_before(add(at, 0x10000010))
        assert not ranges
