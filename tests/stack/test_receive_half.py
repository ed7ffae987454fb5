"""Text beyond a hole: whatever arrives, in whatever pieces, they never overlap and never lie."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from netns_kit.stack.receive_half import ReceiveHalf
from netns_kit.stack.seq import add, distance
from netns_kit.stack.windows import OVERHEAD, Memory

TEXT = bytes(range(100, 160))
FIRST = 0xFFFFFFE0  # so that the numbers wrap around

spans = st.tuples(st.integers(1, 60), st.integers(0, 20)).map(lambda span: (span[0], min(sum(span), 60)))


@given(st.lists(spans, max_size=15), st.integers(1, 5))
def test_pieces(arriving: list[tuple[int, int]], limit: int) -> None:
    """The FIN is behind the last byte of the text."""
    memory = Memory(1 << 20)
    rcv = ReceiveHalf(1 << 16, memory)
    rcv.start(add(FIRST, -1), 0.0)
    complete = True
    for start, end in arriving:
        complete &= rcv.keep(add(FIRST, start), memoryview(TEXT)[start:end], end == 60, limit)
    kept = rcv.out_of_order
    assert (kept is None) == all(start == end < 60 for start, end in arriving)
    if kept is None:
        return
    assert kept.pieces
    assert len(kept.pieces) <= limit
    found = [(distance(FIRST, seq), bytes(data)) for seq, data in kept.pieces]
    for (start, data), (following, _) in pairwise(found):
        assert start + len(data) <= following
    assert all(data == TEXT[start : start + len(data)] for start, data in found)
    assert memory.held == sum(len(data) + OVERHEAD for _, data in found)
    here = {number for start, data in found for number in range(start, start + len(data))}
    arrived = {number for start, end in arriving for number in range(start, end)}
    assert here <= arrived
    blocks = kept.blocks()
    if complete:
        assert here == arrived
        ended = any(end == 60 for _, end in arriving)
        told = {
            number
            for first, last in blocks
            for number in range(distance(FIRST, first), distance(FIRST, last))
        }
        assert len(blocks) == 4 or told == here | ({60} if ended else set())
        rcv.nxt = add(FIRST, 60)  # the hole is filled
        fins = []
        while (piece := rcv.next_piece()) is not None:
            fins.append(piece[2])
        assert any(fins) == ended
        assert rcv.out_of_order is None
        assert memory.held == 0


def test_nothing_follows_a_fin() -> None:
    rcv = ReceiveHalf(1 << 16, Memory(1 << 20))
    rcv.keep(10, memoryview(b"end"), True, 8)
    rcv.keep(12, memoryview(b"d of it"), False, 8)
    rcv.keep(30, memoryview(b"more"), True, 8)
    assert rcv.out_of_order is not None
    assert rcv.out_of_order.pieces == [(10, bytearray(b"end"))]
    assert rcv.out_of_order.blocks() == [(10, 14)]


def test_a_fin_before_what_is_here_is_none() -> None:
    rcv = ReceiveHalf(1 << 16, Memory(1 << 20))
    rcv.keep(20, memoryview(b"text"), False, 8)
    rcv.keep(10, memoryview(b"end"), True, 8)
    rcv.nxt = 13
    piece = rcv.next_piece()
    assert piece is not None
    assert (piece[0], bytes(piece[1]), piece[2]) == (10, b"end", False)
