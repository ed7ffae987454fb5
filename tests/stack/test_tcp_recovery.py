"""What gets lost on the way to the guest: timer, fast retransmit, going back."""

from __future__ import annotations

import pytest

from netns_kit.stack import Closed
from netns_kit.stack.rto import CEILING, FLOOR, FORGET, INITIAL, RetransmissionTimeout
from netns_kit.stack.wire.tcp import ACK, FIN, RST
from tests.support.stack import Guest


def test_the_timer_doubles_and_gives_up(tcp: Guest) -> None:
    tcp.send(b"hello")
    tcp.sends(ACK, 9000, 1000, b"hello")
    for wait in (0.2, 0.4, 0.8, 1.6, 3.2, *[4.0] * 25):  # 106 s in all: R2 is at least 100
        tcp.passes(wait - 0.001)
        tcp.quiet()
        tcp.passes(0.001)
        tcp.sends(ACK, 9000, 1000, b"hello")
    tcp.passes(4)
    tcp.sends(RST | ACK, 9005)
    tcp.quiet()
    assert tcp.listener.events[-1] is Closed.TIMED_OUT
    assert not tcp.stack.tcp
    assert not tcp.connection.snd.queue


def test_each_acknowledgement_starts_the_timer_anew(tcp: Guest) -> None:
    tcp.send(b"hello")
    tcp.send(b"world")
    tcp.frames.clear()
    tcp.passes(0.15)
    tcp.gets(ACK, 1000, 9005, window=512)
    tcp.passes(0.19)
    tcp.quiet()


def test_progress_ends_the_backing_off(tcp: Guest) -> None:
    tcp.send(b"hello")
    tcp.send(b"world")
    tcp.passes(3)  # 0.2 + 0.4 + 0.8 + 1.6
    tcp.frames.clear()
    tcp.gets(ACK, 1000, 9005, window=512)
    tcp.frames.clear()
    tcp.passes(0.2)
    tcp.sends(ACK, 9005, 1000, b"world")


def test_three_duplicates_bring_the_segment_again(tcp: Guest) -> None:
    for chunk in (b"one", b"two", b"three", b"four", b"five"):
        tcp.send(chunk)
    tcp.frames.clear()
    tcp.gets(ACK, 1000, 9000, window=512)
    tcp.gets(ACK, 1000, 9000, window=512)
    tcp.quiet()
    tcp.gets(ACK, 1000, 9000, window=512)
    tcp.sends(ACK, 9000, 1000, b"one")
    tcp.gets(ACK, 1000, 9000, window=512)  # more of them: nothing more
    tcp.quiet()
    tcp.gets(ACK, 1000, 9003, window=512)  # RFC 6582: a partial one brings the next hole
    tcp.sends(ACK, 9003, 1000, b"two")
    tcp.gets(ACK, 1000, 9019, window=512)
    tcp.quiet()
    assert tcp.connection.recovery is None


def test_of_what_was_handed_over_at_once_one_segment_comes_again(tcp: Guest) -> None:
    """The link takes one at a time, the user hands over several."""
    snd = tcp.connection.snd
    tcp.send(bytes(8 * snd.mss))
    assert len(tcp.frames) == 8
    tcp.frames.clear()
    for _ in range(3):
        tcp.gets(ACK, 1000, 9000, window=512)
    tcp.sends(ACK, 9000, 1000, bytes(snd.mss))
    tcp.quiet()


@pytest.mark.parametrize(
    "change",
    [
        {"window": 511},  # news of the window
        {"data": b"x"},  # text, which draws its own ACK
        {"flags": FIN | ACK},
    ],
)
def test_what_is_no_duplicate(tcp: Guest, change: dict[str, object]) -> None:
    tcp.send(b"hello")
    for at in range(4):
        flags = change.get("flags", ACK)
        window = change.get("window", 512)
        data = change.get("data", b"")
        assert isinstance(flags, int)
        assert isinstance(window, int)
        assert isinstance(data, bytes)
        tcp.gets(flags, 1000 + at * len(data), 9000, data, window=window - at * (window < 512))
    assert tcp.connection.recovery is None


def test_without_anything_in_flight_nothing_is_a_duplicate(tcp: Guest) -> None:
    for _ in range(5):
        tcp.gets(ACK, 1000, 9000, window=512)
    tcp.quiet()
    assert tcp.connection.recovery is None


def test_a_lost_fin_is_repaired_fast(tcp: Guest) -> None:
    tcp.send(b"hello")
    tcp.shutdown()
    tcp.frames.clear()
    for _ in range(3):
        tcp.gets(ACK, 1000, 9000, window=512)
    tcp.sends(ACK, 9000, 1000, b"hello")
    tcp.gets(ACK, 1000, 9005, window=512)
    tcp.sends(FIN | ACK, 9005, 1000)


def test_after_a_timeout_we_go_back_and_open_up_again(tcp: Guest) -> None:
    mss = tcp.connection.snd.mss
    for _ in range(16):
        tcp.send(bytes(mss))
    tcp.frames.clear()
    tcp.passes(0.2)
    tcp.sends(ACK, 9000, 1000, bytes(mss))
    tcp.quiet()
    assert tcp.connection.room() == 0  # nothing new before that is repaired
    tcp.gets(ACK, 1000, 9000 + mss, window=512)
    for at in (1, 2, 3):
        tcp.sends(ACK, 9000 + at * mss, 1000, bytes(mss))
    tcp.quiet()
    tcp.gets(ACK, 1000, 9000 + 12 * mss, window=512)  # it had these already
    for at in (12, 13, 14, 15):
        tcp.sends(ACK, 9000 + at * mss, 1000, bytes(mss))
    tcp.quiet()
    tcp.gets(ACK, 1000, 9000 + 16 * mss, window=512)
    assert tcp.listener.events[-1] == "writable"
    assert tcp.connection.room() == 65536


def test_an_ack_into_the_middle_of_a_segment(tcp: Guest) -> None:
    tcp.send(b"hello")
    tcp.frames.clear()
    tcp.gets(ACK, 1000, 9002, window=512)
    tcp.passes(0.2)
    tcp.sends(ACK, 9002, 1000, b"llo")


def test_karn(tcp: Guest) -> None:
    """What was sent twice tells nothing about the round trip."""
    before = tcp.connection.snd.rto.value
    tcp.send(b"hello")
    tcp.passes(5)
    tcp.gets(ACK, 1000, 9005, window=512)
    assert tcp.connection.snd.rto.value == before == FLOOR
    tcp.send(b"world")
    tcp.now += 0.1
    tcp.gets(ACK, 1000, 9010, window=512)
    assert tcp.connection.snd.rto.value > FLOOR


def test_rfc_6298() -> None:
    rto = RetransmissionTimeout()
    assert rto.value == INITIAL
    rto.sample(0.5, 0.0)  # (2.2): SRTT 0.5, RTTVAR 0.25
    assert rto.value == pytest.approx(0.5 + 4 * 0.25)
    rto.sample(0.9, 0.0)  # (2.3): RTTVAR 3/4 * 0.25 + 1/4 * 0.4, then SRTT 7/8 * 0.5 + 1/8 * 0.9
    assert rto.value == pytest.approx(0.55 + 4 * 0.2875)
    for _ in range(10):
        rto.back_off()
    assert rto.value == CEILING
    rto.settle()
    assert rto.value == pytest.approx(1.7)
    for _ in range(200):
        rto.sample(0.0001, 0.0)
    assert rto.value == FLOOR


def test_the_shortest_round_trip_is_looked_for_anew() -> None:
    """A path may have become longer, and windows follow it."""
    timer = RetransmissionTimeout()
    for now, rtt in enumerate((0.03, 0.01, 0.02)):
        timer.sample(rtt, now)
    assert timer.smallest == 0.01
    timer.sample(0.1, FORGET)
    assert timer.smallest == 0.01
    timer.sample(0.1, FORGET + 1.5)
    assert timer.smallest == 0.1
