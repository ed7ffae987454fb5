"""Pins against a plain list of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.policy.pins import NAMES_MAX, Pins

A, B = b"\xc0\x00\x02\x01", b"\xc0\x00\x02\x02"


def test_an_address_has_the_names_it_was_given_for_until_their_time_is_over() -> None:
    pins = Pins()
    pins.add(b"one", A, 10.0)
    pins.add(b"two", A, 20.0)
    pins.add(b"one", B, 30.0)
    assert pins.names(A, 9.9) == (b"one", b"two")
    assert pins.names(A, 10.0) == (b"two",)
    assert pins.names(A, 20.0) == ()
    assert pins.names(B, 20.0) == (b"one",)
    assert pins.names(b"\0\0\0\0", 0.0) == ()
    assert len(pins) == 3


def test_a_later_answer_renews_and_an_earlier_one_does_not_shorten() -> None:
    pins = Pins()
    pins.add(b"one", A, 10.0)
    pins.add(b"one", A, 30.0)
    pins.add(b"one", A, 20.0)
    assert pins.names(A, 29.0) == (b"one",)
    assert len(pins) == 1


def test_the_pin_that_ends_first_makes_room_and_is_counted() -> None:
    pins = Pins(2)
    pins.add(b"one", A, 10.0)
    pins.add(b"two", A, 20.0)
    pins.add(b"one", A, 30.0)  # renewed: now the other one ends first
    pins.add(b"three", B, 25.0)
    assert (pins.names(A, 5.0), pins.names(B, 5.0), pins.evicted) == ((b"one",), (b"three",), 1)
    assert pins.names(B, 25.0) == ()
    pins.add(b"four", B, 40.0)
    assert pins.evicted == 1, "what makes room now was over"
    assert len(pins) == 2


def test_an_address_has_so_many_names_and_the_one_told_longest_ago_makes_room() -> None:
    """A program that asks for all names of a domain at one address makes no flow dear, and none large."""
    pins = Pins(NAMES_MAX + 4)
    for number in range(NAMES_MAX):
        pins.add(b"%d" % number, A, 1000.0 - number)
    pins.add(b"0", A, 1.0)  # it is told once more
    pins.add(b"new", A, 5.0)
    assert set(pins.names(A, 0.0)) == {b"0", b"new", *(b"%d" % number for number in range(2, NAMES_MAX))}
    assert (len(pins), pins.evicted) == (NAMES_MAX, 1)
    pins.add(b"1", A, 2000.0)  # back again, for the one that had come after it
    for number in range(4):
        pins.add(b"%d" % number, B, 3000.0)
    assert len(pins) <= NAMES_MAX + 4
    assert b"1" in pins.names(A, 1999.0)
    assert len(pins.names(B, 0.0)) == 4


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(1, 50)), max_size=100),
    st.integers(1, 6),
    st.integers(1, 4),
)
def test_the_bounds_hold_whatever_comes(added: list[tuple[int, int, int]], limit: int, names: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("netns_kit.policy.pins.NAMES_MAX", names)
        pins = Pins(limit)
        for name, address, until in added:
            pins.add(b"%d" % name, b"%d" % address, float(until))
            sizes = [len(pins.names(b"%d" % each, 0.0)) for each in range(3)]
            assert b"%d" % name in pins.names(b"%d" % address, 0.0)
            assert sum(sizes) == len(pins) <= limit
            assert max(sizes) <= names
        kept = len(pins)
        pins.keep(lambda name, _: name != b"0")
        assert len(pins) <= kept
        assert len(pins) == sum(len(pins.names(b"%d" % each, 0.0)) for each in range(3))


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 50)), max_size=60),
    st.integers(0, 50),
)
def test_those_that_are_left_are_those_that_end_last(
    limit: int, added: list[tuple[int, int, int]], now: int
) -> None:
    pins, plain = Pins(limit), dict[tuple[bytes, bytes], float]()
    for name, address, until in added:
        key = b"%d" % name, b"%d" % address
        if key not in plain and len(plain) == limit:
            # of those that end at the same time any may go: the lowest, here as there
            del plain[min(plain, key=lambda each: (plain[each], each))]
        plain[key] = max(plain.get(key, 0), until)
        pins.add(*key, until)
    assert len(pins) == len(plain) <= limit
    for _, address, _ in added:
        of_it = {name for (name, at), until in plain.items() if at == b"%d" % address and until > now}
        assert set(pins.names(b"%d" % address, now)) == of_it
