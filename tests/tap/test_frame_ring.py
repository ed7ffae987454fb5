"""The ring between an engine and the thread that writes a capture."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.tap.frame_ring import ACCEPTED, ASLEEP, HEAD, LOST, PAGE, SEEN, FrameRing

SIZE = 4096


@pytest.fixture
def ends() -> Iterator[tuple[FrameRing, FrameRing]]:
    with ExitStack() as opened:
        yield _ends(opened)


def _ends(opened: ExitStack) -> tuple[FrameRing, FrameRing]:
    fd = FrameRing.make(SIZE)
    opened.callback(os.close, fd)
    engine, owner = FrameRing(fd), FrameRing(fd)
    opened.callback(engine.close)
    opened.callback(owner.close)
    return engine, owner


@given(st.lists(st.lists(st.binary(max_size=900), max_size=3), max_size=40), st.lists(st.booleans()))
def test_what_goes_in_comes_out(blocks: list[list[bytes]], reads: list[bool]) -> None:
    with ExitStack() as opened:
        engine, owner = _ends(opened)
        put, taken = b"", b""
        for parts, is_read in zip(blocks, [*reads, *[True] * len(blocks)], strict=False):
            text = b"".join(parts)
            has_room = len(put) - len(taken) + len(text) <= SIZE
            assert engine.put(len(text), *parts) is has_room
            if has_room:
                put += text
            engine.publish(1, 1, 0)
            if is_read:
                pieces = owner.waiting()
                found = b"".join(pieces)
                for piece in pieces:
                    piece.release()
                owner.take(len(found))
                taken += found
                assert taken == put


@pytest.mark.parametrize("size", [100, 999, SIZE // 2 + 1, SIZE])
def test_the_ring_begins_again(ends: tuple[FrameRing, FrameRing], size: int) -> None:
    engine, owner = ends
    for number in range(100):
        text = os.urandom(size)
        assert engine.put(size, text[:7], text[7:])
        engine.publish(number, number, 0)
        pieces = owner.waiting()
        assert b"".join(pieces) == text
        owner.take(size)


def test_nothing_is_seen_before_it_is_published(ends: tuple[FrameRing, FrameRing]) -> None:
    engine, owner = ends
    assert engine.put(3, b"abc")
    assert owner.waiting() == []
    assert not engine.publish(5, 4, 3), "nobody sleeps"
    assert b"".join(owner.waiting()) == b"abc"
    assert owner.count((SEEN, ACCEPTED, LOST)) == [5, 4, 3]


def test_who_sleeps_is_woken_once_when_there_is_much(ends: tuple[FrameRing, FrameRing]) -> None:
    engine, owner = ends
    owner.counters[ASLEEP] = 1
    engine.put(SIZE // 4, bytes(SIZE // 4))
    assert not engine.publish(1, 1, 0)
    engine.put(1, b"a")
    assert engine.publish(2, 2, 0)
    engine.put(1, b"b")
    assert not engine.publish(3, 3, 0), "it is awake"
    owner.take(SIZE // 4 + 2)
    owner.counters[ASLEEP] = 1
    engine.put(1, b"c")
    assert not engine.publish(4, 4, 0), "it has taken what there was"


def test_a_ring_may_begin_in_the_middle() -> None:
    with ExitStack() as opened:
        fd = FrameRing.make(SIZE)
        opened.callback(os.close, fd)
        owner = FrameRing(fd)
        opened.callback(owner.close)
        owner.start_at(PAGE - 2)
        engine = FrameRing(fd)
        opened.callback(engine.close)
        assert owner.at == PAGE - 2
        assert engine.put(5, b"abcde")
        engine.publish(1, 1, 0)
        assert list(map(bytes, owner.waiting())) == [b"ab", b"cde"]
        owner.take(3)
        assert owner.at == 1
        assert list(map(bytes, owner.waiting())) == [b"de"]


@pytest.mark.parametrize("head", [SIZE + 1, (1 << 64) - 1])
def test_counters_of_a_hostile_engine_are_refused(ends: tuple[FrameRing, FrameRing], head: int) -> None:
    engine, owner = ends
    engine.counters[HEAD] = head
    with pytest.raises(ValueError, match="in a ring of"):
        owner.waiting()


def test_the_memory_cannot_be_taken_away() -> None:
    fd = FrameRing.make(SIZE)
    for size in 0, 2 * SIZE:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, PAGE + size)
    assert os.fstat(fd).st_size % mmap.PAGESIZE == 0
    os.close(fd)
