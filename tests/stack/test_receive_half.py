"""Runs beyond a hole: whatever arrives, in whatever pieces, they never overlap and never lie."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from netns_kit.stack.receive_half import ReceiveHalf
from netns_kit.stack.seq import add
from netns_kit.stack.windows import Memory

TEXT = bytes(range(100, 160))
FIRST = 0xFFFFFFE0  # so that the numbers wrap around

spans = st.tuples(st.integers(1, 60), st.integers(0, 20)).map(lambda span: (span[0], min(sum(span), 60)))


@given(st.lists(spans, max_size=15), st.integers(1, 5))
def test_runs(pieces: list[tuple[int, int]], limit: int) -> None:
    """The FIN is behind the last byte of the text."""
    rcv = ReceiveHalf(1 << 16, Memory(1 << 20))
    for start, end in pieces:
        rcv.keep(add(FIRST, start), memoryview(TEXT)[start:end], end == 60, limit)
    assert len(rcv.later) <= limit
    found = [((seq - FIRST) & 0xFFFFFFFF, bytes(run), fin) for seq, run, fin in rcv.later]
    for start, run, fin in found:
        assert run == TEXT[start : start + len(run)]
        assert run or fin
        assert not fin or start + len(run) == 60
    for (start, run, fin), (following, _, _) in pairwise(found):
        assert start + len(run) <= following
        assert not fin
    if limit == 5 and len(pieces) < 5:  # as many as fit beyond the first hole of each
        first = min((start for start, end in pieces if end > start or end == 60), default=None)
        assert (found[0][0] if found else None) == first


def test_nothing_follows_a_fin() -> None:
    rcv = ReceiveHalf(1 << 16, Memory(1 << 20))
    rcv.keep(10, memoryview(b"end"), True, 8)
    rcv.keep(12, memoryview(b"d of it"), False, 8)
    assert rcv.later == [(10, bytearray(b"end"), True)]
