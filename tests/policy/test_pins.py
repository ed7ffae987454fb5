"""Pins against a plain list of them."""

from __future__ import annotations

import tracemalloc

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


def test_the_pin_that_was_answered_longest_ago_makes_room_and_is_counted() -> None:
    pins = Pins(2)
    pins.add(b"one", A, 20.0)
    pins.add(b"two", A, 30.0)
    pins.add(b"one", A, 25.0)  # renewed: now the other one was answered longer ago
    pins.add(b"three", B, 10.0)
    assert (pins.names(A, 5.0), pins.names(B, 5.0), pins.evicted) == ((b"one",), (b"three",), 1)


def test_a_pin_whose_time_is_over_makes_room_before_others() -> None:
    pins = Pins(3)
    pins.add(b"one", A, 30.0)
    pins.add(b"two", A, 10.0)
    pins.add(b"three", B, 10.0)
    pins.add(b"three", B, 20.0)  # renewed
    assert pins.names(A, 15.0) == (b"one",)
    pins.add(b"four", B, 40.0)
    assert pins.evicted == 0
    assert (pins.names(A, 15.0), pins.names(B, 15.0)) == ((b"one",), (b"three", b"four"))
    assert pins.names(B, 25.0) == (b"four",)
    pins.add(b"five", B, 40.0)
    assert (pins.names(A, 25.0), pins.names(B, 25.0), pins.evicted) == ((b"one",), (b"four", b"five"), 0)


def test_long_pins_that_fill_the_table_keep_nobody_out() -> None:
    """As somebody's has them who owns what is below a wildcard."""
    pins = Pins(100)
    for number in range(100):
        pins.add(b"%d" % number, A, 1e6)
    for number in range(100):
        pins.add(b"good%d" % number, B, 10.0)
    assert pins.names(A, 5.0) == ()
    assert pins.has(b"good0", B, 5.0)
    assert pins.has(b"good99", B, 5.0)


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 50)), max_size=60),
    st.lists(st.integers(0, 40), min_size=60, max_size=60),
)
def test_those_are_left_whose_time_is_not_over_and_that_were_answered_last(
    limit: int, added: list[tuple[int, int, int]], times: list[int]
) -> None:
    pins, plain, evicted = Pins(limit), dict[tuple[bytes, bytes], float](), 0
    now = 0
    for (name, address, until), passes in zip(added, sorted(times), strict=False):
        key = b"%d" % name, b"%d" % address
        if key not in plain and len(plain) == limit:
            over = [each for each, end in plain.items() if end <= now]
            evicted += not over
            # of those that are over, the one is first that ended first
            del plain[min(over, key=lambda each: (plain[each], each)) if over else next(iter(plain))]
        plain[key] = max(plain.pop(key, 0), until)
        pins.add(*key, until)
        now = passes
        assert len(pins) == len(plain) <= limit
        assert pins.evicted == evicted
        of_it = tuple(name for (name, at), end in plain.items() if at == key[1] and end > now)
        assert pins.names(key[1], now) == of_it
    pins.keep(lambda name, _: name != b"0")
    assert len(pins) == sum(name != b"0" for name, _ in plain)


def test_of_many_names_of_one_address_those_count_that_were_answered_last() -> None:
    pins = Pins()
    for number in range(NAMES_MAX):
        pins.add(b"%d" % number, A, 10.0)
    assert pins.names(A, 0.0) == tuple(b"%d" % number for number in range(NAMES_MAX)), "so many count"
    pins.add(b"0", A, 5.0)  # it is answered again, for a shorter time
    pins.add(b"more", A, 10.0)
    assert pins.names(A, 0.0) == (*(b"%d" % number for number in range(2, NAMES_MAX)), b"0", b"more")
    assert pins.names(A, 10.0) == ()
    assert pins.has(b"1", A, 9.9), "it is pinned, though it does not count"
    assert not pins.has(b"1", A, 10.0)
    assert not pins.has(b"1", B, 0.0)
    assert not pins.has(b"no", A, 0.0)


def test_pins_that_have_made_room_take_none() -> None:
    pins = Pins(100)
    tracemalloc.start()
    try:
        for number in range(10_000):
            pins.add(b"%d" % number, A, 1e6 + number)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(pins) == 100
    assert held < 1000 * 200, "bytes"
