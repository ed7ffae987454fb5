"""Timestamps (RFC 7323 3 to 5): spoken where both offer them, echoed by its rules, and what they are good for."""

from __future__ import annotations

import pytest

from netns_kit.stack import Closed, State
from netns_kit.stack.segments import MAX_PAYLOAD
from netns_kit.stack.tcp import STAMP_VALID
from netns_kit.stack.wire import tcp as wire
from netns_kit.stack.wire import virtio
from netns_kit.stack.wire.tcp import ACK, FIN, RST, SYN, pack_options, pack_sack, pack_stamp, parse_options
from tests.support.stack import VNET, Guest

THEIRS = 5000  # the guest's clock, to begin with
BEGAN = 100.0  # and when ours is that of a hundred seconds
OURS = 100_000


def offering(stamp: tuple[int, int] | None = (THEIRS, 0)) -> bytes:
    return pack_options(1460, 7, True, stamp)


def stamped(value: int, echo: int = OURS) -> bytes:
    return pack_stamp(value, echo)


def stamp_of(segment: wire.Segment) -> tuple[int, int] | None:
    return parse_options(segment.options).stamp


@pytest.fixture
def guest(family: int) -> Guest:
    """Established at `BEGAN`, with timestamps."""
    guest = Guest(family)
    guest.now = BEGAN
    guest.opening(options=offering())
    guest.gets(ACK, 1000, 9000, window=512, options=stamped(THEIRS))
    guest.quiet()
    return guest


# -- agreeing -------------------------------------------------------------------------------------------


def test_they_are_spoken_when_they_are_offered(family: int) -> None:
    guest = Guest(family).on_hold(options=offering())
    guest.now = BEGAN
    guest.connection.accept(guest.now)
    assert stamp_of(guest.sends(SYN | ACK)) == (OURS, THEIRS)
    guest.passes(0.25)
    assert stamp_of(guest.sends(SYN | ACK)) == (OURS + 250, THEIRS), "again, by our clock as it is then"


def test_they_are_not_when_they_are_not(family: int) -> None:
    guest = Guest(family).on_hold(options=offering(None))
    guest.connection.accept(guest.now)
    assert stamp_of(guest.sends(SYN | ACK)) is None
    guest.gets(ACK, 1000, 9000, options=stamped(THEIRS))
    guest.send(b"data")
    assert guest.sends(ACK, 9000, 1000, b"data").options is None


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_another_syn_decides_anew(family: int, before: bool, after: bool) -> None:
    """The first one is on hold when its program has gone."""
    guest = Guest(family).on_hold(options=offering((1, 0) if before else None))
    guest.on_hold(options=offering((THEIRS, 0) if after else None))
    guest.connection.accept(guest.now)
    assert stamp_of(guest.sends(SYN | ACK)) == ((0, THEIRS) if after else None)
    guest.gets(ACK, 1000, 9000, window=512, options=stamped(THEIRS) if after else b"")
    largest = 1460 if family == 4 else 1440
    assert guest.connection.snd.mss == largest - (12 if after else 0)


@pytest.mark.parametrize("agreed", [True, False])
def test_we_offer_them(family: int, agreed: bool) -> None:
    guest = Guest(family).connecting()
    guest.passes(0.25)
    assert stamp_of(guest.sends(SYN)) == (250, 0)
    guest.gets(SYN | ACK, 999, 9000, options=offering((THEIRS, 250) if agreed else None))
    assert stamp_of(guest.sends(ACK, 9000, 1000)) == ((250, THEIRS) if agreed else None)


def test_every_segment_has_them(guest: Guest) -> None:
    guest.send(b"data")
    assert stamp_of(guest.sends(ACK, 9000, 1000, b"data")) == (OURS, THEIRS)
    guest.passes(0.06)
    assert stamp_of(guest.sends(ACK, 9000, 1000, b"data")) == (OURS + 50, THEIRS), "sent again"
    guest.gets(ACK, 1000, 9004, b"more", options=stamped(THEIRS + 300))
    assert stamp_of(guest.sends(ACK, 9004, 1004)) == (OURS + guest_ticks(guest), THEIRS + 300)
    guest.passes(1)
    guest.shutdown()
    assert stamp_of(guest.sends(FIN | ACK, 9004, 1004)) == (OURS + guest_ticks(guest), THEIRS + 300)


def guest_ticks(guest: Guest) -> int:
    """Milliseconds since it began."""
    return int(guest.now * 1000) - OURS


def test_they_take_their_room_from_the_text(family: int) -> None:
    """Of a segment (RFC 6691); a super-segment is as long as it ever was."""
    guest = Guest(family, offloads=VNET)
    guest.opening(options=offering())
    guest.gets(ACK, 1000, 9000, window=512, options=stamped(THEIRS))
    burst, mss = guest.connection.snd.burst, 1448 if family == 4 else 1428
    assert guest.connection.snd.mss == mss
    assert burst % mss == 0
    assert MAX_PAYLOAD - mss < burst <= MAX_PAYLOAD
    guest.send(bytes(burst))
    sent = guest.taken()
    _, gso_type, header, gso_size, _, _ = sent.virtio
    assert gso_type == (virtio.GSO_TCPV4 if family == 4 else virtio.GSO_TCPV6)
    assert (header, gso_size) == (14 + (20 if family == 4 else 40) + 32, mss)
    assert len(wire.parse(sent.packet.payload).payload) == burst


def test_with_them_sack_has_room_for_three(guest: Guest) -> None:
    for number in range(5):
        guest.gets(ACK, 1100 + 200 * number, 9000, b"x", options=stamped(THEIRS + 1))
        options = parse_options(guest.sends(ACK, 9000, 1000).options)
    assert options.stamp is not None
    assert len(options.sack) == 3


# -- what is echoed (4.3) -------------------------------------------------------------------------------


def test_of_what_is_acknowledged_together_the_first_is_echoed(family: int) -> None:
    guest = Guest(family, ack_delay=0.004)
    guest.opening(options=offering())
    guest.gets(ACK, 1000, 9000, window=512, options=stamped(THEIRS))
    guest.gets(ACK, 1000, 9000, b"a", options=stamped(THEIRS + 1))
    guest.gets(ACK, 1001, 9000, b"b", options=stamped(THEIRS + 2))
    guest.quiet()
    guest.passes(0.01)
    segment = guest.sends(ACK, 9000, 1002)
    assert stamp_of(segment) == (0, THEIRS + 1)
    guest.gets(ACK, 1002, 9000, b"c", options=stamped(THEIRS + 3))
    assert stamp_of(guest.sends(ACK, 9000, 1003)) == (10, THEIRS + 3)


def test_beyond_a_hole_the_last_before_it_is_echoed(guest: Guest) -> None:
    guest.gets(ACK, 1000, 9000, b"a", options=stamped(THEIRS + 1))
    assert stamp_of(guest.sends(ACK, 9000, 1001)) == (OURS, THEIRS + 1)
    guest.gets(ACK, 1002, 9000, b"c", options=stamped(THEIRS + 3))
    assert stamp_of(guest.sends(ACK, 9000, 1001)) == (OURS, THEIRS + 1)
    guest.gets(ACK, 1001, 9000, b"b", options=stamped(THEIRS + 2))
    assert stamp_of(guest.sends(ACK, 9000, 1003)) == (OURS, THEIRS + 2)
    assert guest.listener.bytes == b"abc"


# -- PAWS (5.3) -----------------------------------------------------------------------------------------


def test_an_old_timestamp_is_an_old_segment(guest: Guest) -> None:
    guest.gets(ACK, 1000, 9000, b"new", options=stamped(THEIRS + 10))
    guest.sends(ACK, 9000, 1003)
    guest.gets(ACK, 1003, 9000, b"old", options=stamped(THEIRS + 9))
    assert stamp_of(guest.sends(ACK, 9000, 1003)) == (OURS, THEIRS + 10)
    assert guest.listener.bytes == b"new"
    assert guest.stack.dropped["tcp-old-timestamp"] == 1
    guest.gets(FIN | ACK, 1003, 9000, options=stamped(THEIRS + 9))
    guest.sends(ACK, 9000, 1003)
    assert guest.state() is State.ESTABLISHED
    guest.gets(ACK, 1003, 9000, b" and", options=stamped(THEIRS + 10))
    guest.sends(ACK, 9000, 1007)
    assert guest.listener.bytes == b"new and"


def test_the_guests_clock_may_wrap(family: int) -> None:
    guest = Guest(family)
    guest.opening(options=offering((0xFFFFFFFF, 0)))
    guest.gets(ACK, 1000, 9000, window=512, options=stamped(0))
    guest.gets(ACK, 1000, 9000, b"data", options=stamped(1))
    assert stamp_of(guest.sends(ACK, 9000, 1004)) == (0, 1)
    guest.gets(ACK, 1004, 9000, b"data", options=stamped(0xFFFFFFFF))
    assert guest.listener.bytes == b"data"


@pytest.mark.parametrize("options", [b"", b"\x01\x01\x01\x01", pack_sack([(9001, 9002)])])
def test_without_one_it_is_not_the_guests(guest: Guest, options: bytes) -> None:
    guest.gets(ACK, 1000, 9000, b"forged", options=options)
    guest.quiet()
    assert not guest.listener.bytes
    assert guest.stack.dropped["tcp-no-timestamp"] == 1


@pytest.mark.parametrize("options", [b"", stamped(THEIRS - 1)])
def test_a_reset_needs_none(guest: Guest, options: bytes) -> None:
    """5.2"""
    guest.gets(RST, 1000, 0, options=options)
    assert guest.listener.events[-1] is Closed.RESET


def test_after_24_days_the_last_one_says_nothing(guest: Guest) -> None:
    guest.now += STAMP_VALID + 1
    guest.gets(ACK, 1000, 9000, b"data", options=stamped(THEIRS - 10))
    assert stamp_of(guest.sends(ACK, 9000, 1004)) == (guest_ticks(guest) + OURS & 0xFFFFFFFF, THEIRS - 10)
    assert guest.listener.bytes == b"data"


# -- what else they are good for ------------------------------------------------------------------------


def test_what_was_sent_again_is_timed_by_its_echo(guest: Guest) -> None:
    """4.1; without, Karn's rule leaves it untimed (RFC 6298 3)."""
    guest.send(b"data")
    guest.frames.clear()
    guest.passes(0.4)
    sent_again = stamp_of(guest.sends(ACK, 9000, 1000, b"data"))
    assert sent_again is not None
    guest.frames.clear()
    guest.now += 0.005
    before = guest.connection.snd.rto.smallest
    guest.gets(ACK, 1000, 9004, options=stamped(THEIRS + 400, guest_ticks(guest) + OURS - 7))
    assert before == 0.0
    assert guest.connection.snd.rto.smallest == pytest.approx(0.007)


@pytest.mark.parametrize(("value", "reopened"), [(THEIRS + 5, True), (THEIRS + 1, False), (None, False)])
def test_a_newer_one_ends_time_wait(guest: Guest, value: int | None, reopened: bool) -> None:
    """RFC 6191, also when the new number is below the last."""
    guest.shutdown()
    guest.sends(FIN | ACK, 9000, 1000)
    guest.gets(FIN | ACK, 1000, 9001, options=stamped(THEIRS + 1))
    guest.sends(ACK, 9001, 1001)
    assert guest.state() is State.TIME_WAIT
    users = len(guest.users.listeners)
    guest.gets(SYN, 500, options=offering(None if value is None else (value, 0)))
    assert (len(guest.users.listeners) > users) is reopened
