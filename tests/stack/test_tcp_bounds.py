"""What a connection may keep, how long it may wait, and how its windows follow the path."""

from __future__ import annotations

import math

import pytest

from netns_kit.stack import Closed, Limits, State
from netns_kit.stack.send_half import PIECES
from netns_kit.stack.windows import OVERHEAD, Tuner
from netns_kit.stack.wire.tcp import ACK, FIN, RST, SYN, pack_options
from tests.support.stack import Guest, beyond, key

SMALL = Limits(tcp_pending=3, tcp_pending_time=75.0)


# -- pending connections ------------------------------------------------------------------------------


def syn_from(guest: Guest, port: int) -> None:
    guest.gets(SYN, 999, ports=key(guest.family, port)[-4:])


def test_the_oldest_pending_connection_makes_room(family: int) -> None:
    guest = Guest(family, limits=SMALL)
    for port in range(1, 5):
        syn_from(guest, port)
    guest.quiet()
    assert [listener.events for listener in guest.users.listeners] == [[Closed.TIMED_OUT], [], [], []]
    assert guest.stack.dropped["limit-tcp-pending"] == 1
    assert list(guest.stack.pending) == [key(family, port) for port in (2, 3, 4)]


def test_established_connections_are_not_pending(family: int) -> None:
    guest = Guest(family, limits=SMALL)
    for port in range(1, 20):
        syn_from(guest, port)
        guest.connection.accept(guest.now)
        guest.gets(ACK, 1000, guest.connection.snd.max, ports=key(family, port)[-4:])
    assert not guest.stack.pending
    assert not guest.stack.dropped
    assert len(guest.stack.tcp) == 19


def test_the_oldest_half_open_connection_makes_room(family: int) -> None:
    """A flood of SYNs that nobody stands behind: it keeps nobody out, and the bound holds."""
    guest = Guest(family, limits=SMALL)
    for port in range(1, 5):
        syn_from(guest, port)
        guest.connection.accept(guest.now)
    assert guest.stack.dropped["limit-tcp-pending"] == 1
    assert list(guest.stack.pending) == list(guest.stack.tcp) == [key(family, port) for port in (2, 3, 4)]
    assert guest.users.listeners[0].events == [Closed.TIMED_OUT]
    guest.frames.clear()
    guest.gets(ACK, 1000, guest.connection.snd.max, ports=key(family, 4)[-4:])
    assert guest.state() is State.ESTABLISHED


def test_a_guest_that_has_stopped_asking(guest: Guest) -> None:
    """Its program has given up; kernels tell nobody then."""
    guest.on_hold()
    guest.passes(60)
    guest.gets(SYN, 999)
    guest.passes(74)
    assert guest.state() is State.SYN_HELD
    guest.passes(1)
    guest.quiet()
    assert guest.listener.events == [Closed.TIMED_OUT]
    assert not guest.stack.pending
    assert guest.stack.deadline == math.inf


# -- memory -------------------------------------------------------------------------------------------


def held(guest: Guest) -> int:
    """Counted the slow way: the bytes, and what the pieces they are kept in take."""
    pieces: list[bytes | bytearray | memoryview] = []
    for connection in guest.stack.tcp.values():
        pieces += [data for _, data in connection.snd.queue]
        pieces += connection.rcv.unread
        pieces += [run for _, run in beyond(connection)]
    return sum(len(each) + OVERHEAD for each in pieces)


def test_what_is_kept_is_counted(tcp: Guest) -> None:
    """In every place where bytes wait, and out again."""
    memory = tcp.stack.memory
    tcp.listener.room = 10
    tcp.gets(ACK, 1000, 9000, bytes(100))
    assert memory.held == held(tcp) == 90 + OVERHEAD
    tcp.gets(ACK, 1200, 9000, bytes(100))
    tcp.gets(ACK, 1250, 9000, bytes(100))  # half of it is there
    assert memory.held == held(tcp) == 90 + 150 + 2 * OVERHEAD
    tcp.send(bytes(1000))
    assert memory.held == held(tcp) == 90 + 150 + 1000 + 3 * OVERHEAD
    tcp.gets(ACK, 1100, 9500, bytes(100))  # the hole
    assert memory.held == held(tcp) == 340 + 1000 + 2 * OVERHEAD
    tcp.gets(ACK, 1350, 10000)
    assert memory.held == held(tcp) == 340 + OVERHEAD
    tcp.resume(40)
    assert memory.held == held(tcp) == 300 + OVERHEAD
    tcp.resume()
    assert memory.held == held(tcp) == 0
    tcp.send(bytes(10))
    tcp.gets(ACK, 1400, 10000, bytes(7))
    assert memory.held == 17 + 2 * OVERHEAD
    tcp.gets(RST, 1350)
    assert memory.held == 0


@pytest.mark.parametrize("sack", [False, True])
def test_when_memory_is_full_the_guest_keeps_its_bytes(family: int, sack: bool) -> None:
    """It is shown a shut window, and goes on when the user has taken something."""
    guest = Guest(family, limits=Limits(tcp_memory=1000)).established(options=pack_options(1460, 7, sack))
    guest.listener.room = 0
    guest.gets(ACK, 1000, 9000, bytes(1000))
    guest.quiet()
    guest.gets(ACK, 2000, 9000, b"no room for this")
    guest.sends(ACK, 9000, 1000, window=0)
    guest.gets(ACK, 3000, 9000, b"nor beyond a hole")
    guest.sends(ACK, 9000, 1000)
    assert guest.stack.memory.held == held(guest) == 1000 + OVERHEAD
    assert guest.stack.stats()["dropped_limit_tcp_memory"] == 2
    guest.resume()
    assert guest.sends(ACK, 9000, 2000).window > 0
    guest.gets(FIN | ACK, 2000, 9000, b"no room for this")
    guest.sends(ACK, 9000, 2017)
    assert bytes(guest.listener.bytes)[1000:] == b"no room for this"
    assert guest.listener.events[-1] == "end"


def test_when_nothing_at_all_can_be_held(family: int) -> None:
    """Not even then is the guest left waiting: its window opens when the user can take more."""
    guest = Guest(family, limits=Limits(tcp_memory=0)).established()
    guest.listener.room = 4
    guest.gets(ACK, 1000, 9000, b"halfway")
    guest.sends(ACK, 9000, 1004, window=0)
    guest.gets(ACK, 1004, 9000, b"way")
    guest.sends(ACK, 9000, 1004, window=0)
    guest.resume()
    assert guest.sends(ACK, 9000, 1004).window > 0
    guest.gets(ACK, 1004, 9000, b"way")
    guest.sends(ACK, 9000, 1007)
    assert bytes(guest.listener.bytes) == b"halfway"


def test_when_memory_is_full_little_is_in_flight(family: int) -> None:
    guest = Guest(family, limits=Limits(tcp_memory=5000)).established()
    assert guest.connection.room() == 65536
    guest.send(bytes(5000))
    assert guest.connection.room() == 0, "more than one burst is in flight"
    guest.gets(ACK, 1000, 14000, window=512)
    assert guest.connection.room() == 65536


def test_many_small_ones_are_few_large_ones(family: int) -> None:
    """Or each byte would cost hundreds, and finding one of them would take a walk past all others."""
    guest = Guest(family).established()
    connection = guest.connection
    for _ in range(5000):
        connection.send(b"x", guest.now)
    guest.frames.clear()
    assert len(connection.snd.queue) <= PIECES + 2
    assert b"".join(bytes(data) for _, data in connection.snd.queue) == b"x" * 5000
    guest.listener.room = 0
    for number in range(5000):
        guest.gets(ACK, 1000 + number, 9000, number.to_bytes(2, "big")[1:])
    assert len(connection.rcv.unread) == 1
    guest.resume()
    assert bytes(guest.listener.bytes) == b"".join(number.to_bytes(2, "big")[1:] for number in range(5000))
    guest.gets(ACK, 6000, 9000 + 2500, window=512)
    assert guest.stack.memory.held == held(guest)
    guest.passes(0.3)
    resent = b""
    while guest.frames:
        resent += bytes(guest.taken().packet.payload[20:])
    assert resent
    assert set(resent) == {ord("x")}


# -- windows ------------------------------------------------------------------------------------------


def test_a_window_is_twice_what_a_round_trip_brings() -> None:
    tuner = Tuner(100)
    assert tuner.grown(5000, 100, 5.0, 0.1) == 5000, "the first look is for next time"
    assert tuner.due == pytest.approx(5.1)
    assert tuner.grown(5000, 1_000_100, 5.2, 0.1) == pytest.approx(1_000_000, rel=0.01)
    assert tuner.grown(1_000_000, 1_000_100, 5.3, 0.1) == 1_000_000, "it never shrinks"
    assert tuner.grown(1_000_000, 2_000_100, 5.301, 0.0001) == 1_000_000, "a short path needs less"
    assert tuner.due == pytest.approx(5.311), "no more often than every 10 ms"


def test_a_queue_feeds_nothing() -> None:
    """Round trips grow with what waits in them, and no more crosses: once is enough."""
    tuner, window, position = Tuner(0), 1 << 20, 0
    tuner.grown(window, position, 0.0, 0.2)
    for second in range(1, 30):
        position += 10_000_000
        window = tuner.grown(window, position, float(second), window / 10_000_000)
    assert window == 2 << 20


def far_away(family: int, limits: Limits | None = None) -> Guest:
    """A guest 100 ms away."""
    guest = Guest(family, limits=limits).opening()
    guest.passes(0.1)
    guest.gets(ACK, 1000, 9000, window=65535)
    return guest


def test_the_window_grows_with_a_long_path(family: int) -> None:
    """As much as it allows comes in each round trip: it doubles, up to its bound, and never shrinks."""
    guest = far_away(family, Limits(tcp_receive_max=6 << 20))
    seq, shown = 1000, []
    for _ in range(6):
        guest.passes(0.1)
        for _ in range(guest.connection.rcv.wnd // 65000):
            guest.gives(guest.segment(ACK, seq, 9000, bytes(1000)))
            guest.connection.rcv.nxt = guest.connection.rcv.ack = (
                seq := seq + 65000
            )  # as if so many had come
        guest.frames.clear()
        shown.append(guest.connection.rcv.wnd)
    assert shown[0] == 1 << 20
    assert shown == sorted(shown)
    assert shown[-1] == 6 << 20


def test_a_short_path_needs_no_more(family: int) -> None:
    guest = Guest(family).opening()
    guest.passes(0.0001)
    guest.gets(ACK, 1000, 9000, window=65535)
    seq = 1000
    for _ in range(50):
        guest.passes(0.01)
        for _ in range(16):
            guest.gets(ACK, seq, 9000, bytes(1000))
            guest.connection.rcv.nxt = guest.connection.rcv.ack = (seq := seq + 65000)
        guest.frames.clear()
    assert guest.connection.rcv.wnd == 1 << 20


def test_without_scaling_the_window_fits_its_field(family: int) -> None:
    guest = Guest(family).opening(options=b"")
    guest.passes(0.1)
    guest.gets(ACK, 1000, 9000)
    seq = 1000
    for _ in range(20):
        guest.passes(0.1)
        for _ in range(40):
            guest.gets(ACK, seq, 9000, bytes(1000))
            seq += 1000
        guest.frames.clear()
    assert guest.connection.rcv.wnd == 0xFFFF


def test_what_is_in_flight_grows_with_a_long_path(family: int) -> None:
    guest = far_away(family)
    connection = guest.connection
    for _ in range(6):
        while connection.room() >= 65000:
            connection.send(bytes(65000), guest.now)
        guest.frames.clear()
        guest.passes(0.1)
        guest.gets(ACK, 1000, connection.snd.max, window=65535)
    assert connection.snd.limit > 4 << 20


def test_what_was_kept_beyond_a_hole_goes_on_when_memory_allows(family: int) -> None:
    """Memory was full when the hole was filled: nobody but `resume` will come back to it."""
    guest = Guest(family, limits=Limits(tcp_memory=2500)).established()
    guest.listener.room = 0
    guest.gets(ACK, 3000, 9000, b"C" * 1000)
    guest.gets(FIN | ACK, 4000, 9000)
    guest.gets(ACK, 1000, 9000, b"A" * 1000)
    guest.gets(ACK, 2000, 9000, b"B" * 1000)
    guest.resume()
    for start, text in ((2000, b"B"), (3000, b"C")):
        guest.gets(ACK, start, 9000, text * 1000)
    guest.gets(FIN | ACK, 4000, 9000)
    assert bytes(guest.listener.bytes) == b"A" * 1000 + b"B" * 1000 + b"C" * 1000
    assert guest.listener.events[-1] == "end"
    assert guest.stack.memory.held == 0
