"""ACKs that are delayed: when they travel along, when alone, and when they are not delayed at all."""

from __future__ import annotations

import pytest

from netns_kit.stack.acks import MUCH, QUICK
from netns_kit.stack.wire.tcp import ACK, FIN
from tests.support.stack import Guest

DELAY = 0.004


@pytest.fixture
def guest(family: int) -> Guest:
    return Guest(family, ack_delay=DELAY).established()


def test_an_answer_takes_it_along(guest: Guest) -> None:
    guest.gets(ACK, 1000, 9000, b"question")
    guest.quiet()
    guest.passes(DELAY / 2)
    guest.send(b"answer")
    guest.sends(ACK, 9000, 1008, b"answer")
    guest.passes(DELAY)
    guest.quiet()


def test_without_an_answer_it_travels_alone(guest: Guest) -> None:
    guest.gets(ACK, 1000, 9000, b"a")
    guest.passes(DELAY / 2)
    guest.gets(ACK, 1001, 9000, b"b")
    guest.quiet()
    guest.passes(DELAY / 2)
    guest.sends(ACK, 9000, 1002)
    guest.passes(10 * DELAY)
    guest.quiet()


def test_then_the_next_ones_are_not_delayed(guest: Guest) -> None:
    """The guest may be one that says nothing more until it is acknowledged."""
    guest.gets(ACK, 1000, 9000, b"a")
    guest.passes(DELAY)
    guest.sends(ACK, 9000, 1001)
    for at in range(QUICK):
        guest.gets(ACK, 1001 + at, 9000, b"b")
        guest.sends(ACK, 9000, 1002 + at)
    guest.gets(ACK, 1001 + QUICK, 9000, b"c")
    guest.quiet()


def test_each_has_its_own_time(guest: Guest) -> None:
    """What was owed first has been carried; what is owed now is not due when that would have been."""
    guest.gets(ACK, 1000, 9000, b"a")
    guest.passes(DELAY * 3 / 4)
    guest.send(b"x")
    guest.sends(ACK, 9000, 1001, b"x")
    guest.gets(ACK, 1001, 9001, b"b")
    guest.passes(DELAY * 3 / 4)
    guest.quiet()
    guest.passes(DELAY / 4)
    guest.sends(ACK, 9001, 1002)


def test_much_is_not_delayed(guest: Guest) -> None:
    guest.gets(ACK, 1000, 9000, b"a")
    guest.gets(ACK, 1001, 9000, bytes(MUCH))
    guest.sends(ACK, 9000, 1001 + MUCH)
    guest.passes(10 * DELAY)
    guest.quiet()


def test_the_end_takes_it_along(guest: Guest) -> None:
    guest.gets(FIN | ACK, 1000, 9000)
    guest.quiet()
    assert guest.listener.events[-1] == "end"
    guest.shutdown()
    guest.sends(FIN | ACK, 9000, 1001)
    guest.gets(ACK, 1001, 9001)
    guest.passes(10 * DELAY)
    guest.quiet()


def test_nothing_is_owed_by_one_that_is_closed(guest: Guest) -> None:
    guest.gets(ACK, 1000, 9000, b"a")
    guest.connection.abort(guest.now)
    guest.frames.clear()
    guest.passes(10 * DELAY)
    guest.quiet()


def test_a_hole_is_told_at_once(guest: Guest) -> None:
    guest.gets(ACK, 1001, 9000, b"b")
    guest.sends(ACK, 9000, 1000)
