"""Pins against a plain list of them."""

from __future__ import annotations

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
