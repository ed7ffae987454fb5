"""Closing: FIN in every order, TIME-WAIT, half-closed connections, guests that are gone."""

from __future__ import annotations

import pytest

from netns_kit.stack import Closed, Limits, State
from netns_kit.stack.wire.tcp import ACK, FIN, RST, SYN, pack_options
from tests.support.stack import Guest


def test_the_guest_closes_first(tcp: Guest) -> None:
    tcp.gets(FIN | ACK, 1000, 9000, window=512)
    tcp.sends(ACK, 9000, 1001)
    assert (tcp.state(), tcp.listener.events[-1]) == (State.CLOSE_WAIT, "end")
    tcp.send(b"after half-close")
    tcp.sends(ACK, 9000, 1001, b"after half-close")
    tcp.gets(ACK, 1001, 9016, window=512)
    tcp.shutdown()
    tcp.sends(FIN | ACK, 9016, 1001)
    assert tcp.state() is State.LAST_ACK
    tcp.gets(ACK, 1001, 9017)
    tcp.quiet()
    assert tcp.listener.events[-1] is Closed.NORMAL
    assert not tcp.stack.tcp


def test_we_close_first(tcp: Guest) -> None:
    tcp.shutdown()
    tcp.sends(FIN | ACK, 9000, 1000)
    assert tcp.state() is State.FIN_WAIT_1
    tcp.gets(ACK, 1000, 9001)
    tcp.quiet()
    assert tcp.state() is State.FIN_WAIT_2
    tcp.gets(ACK, 1000, 9001, b"after half-close")
    tcp.sends(ACK, 9001, 1016)
    tcp.gets(FIN | ACK, 1016, 9001)
    tcp.sends(ACK, 9001, 1017)
    assert tcp.listener.bytes == b"after half-close"
    assert tcp.listener.events[-2:] == ["end", Closed.NORMAL]
    assert tcp.state() is State.TIME_WAIT
    assert not tcp.stack.tcp, "a record is enough"
    tcp.passes(9.9)
    assert len(tcp.stack.time_wait) == 1
    tcp.passes(0.1)
    tcp.quiet()
    assert len(tcp.stack.time_wait) == 0


def test_their_fin_acknowledges_ours(tcp: Guest) -> None:
    tcp.shutdown()
    tcp.sends(FIN | ACK, 9000, 1000)
    tcp.gets(FIN | ACK, 1000, 9001)
    tcp.sends(ACK, 9001, 1001)
    assert tcp.state() is State.TIME_WAIT


def test_the_fins_cross(tcp: Guest) -> None:
    """3.6 figure 13"""
    tcp.shutdown()
    tcp.sends(FIN | ACK, 9000, 1000)
    tcp.gets(FIN | ACK, 1000, 9000)
    tcp.sends(ACK, 9001, 1001)
    assert tcp.state() is State.CLOSING
    tcp.gets(ACK, 1001, 9001)
    tcp.quiet()
    assert tcp.state() is State.TIME_WAIT
    assert tcp.listener.events == ["established", "end", Closed.NORMAL]


def test_data_while_our_fin_is_under_way(tcp: Guest) -> None:
    tcp.shutdown()
    tcp.sends(FIN | ACK, 9000, 1000)
    tcp.gets(ACK, 1000, 9000, b"late")
    tcp.sends(ACK, 9001, 1004)
    tcp.gets(FIN | ACK, 1004, 9000, b"r")
    tcp.sends(ACK, 9001, 1006)
    assert tcp.listener.bytes == b"later"
    assert tcp.state() is State.CLOSING


def test_fin_with_data(tcp: Guest) -> None:
    tcp.gets(FIN | ACK, 1000, 9000, b"bye")
    tcp.sends(ACK, 9000, 1004)
    tcp.quiet()
    assert tcp.listener.bytes == b"bye"
    assert tcp.listener.events == ["established", "end"]


def test_the_user_answers_the_end_with_its_own(tcp: Guest) -> None:
    """LAST-ACK, so without TIME-WAIT: the guest closed first."""
    tcp.listener.on["end"] = tcp.shutdown
    tcp.gets(FIN | ACK, 1000, 9000)
    tcp.sends(FIN | ACK, 9000, 1001)
    tcp.quiet()
    assert tcp.state() is State.LAST_ACK
    tcp.gets(ACK, 1001, 9001)
    assert not tcp.stack.tcp


def test_our_fin_follows_what_is_queued(tcp: Guest) -> None:
    tcp.send(b"hello")
    tcp.shutdown()
    tcp.sends(ACK, 9000, 1000, b"hello")
    tcp.sends(FIN | ACK, 9005, 1000)
    tcp.gets(ACK, 1000, 9005, window=512)
    assert tcp.state() is State.FIN_WAIT_1
    tcp.gets(ACK, 1000, 9006, window=512)
    assert tcp.state() is State.FIN_WAIT_2


def test_our_fin_is_sent_again(tcp: Guest) -> None:
    tcp.shutdown()
    tcp.sends(FIN | ACK, 9000, 1000)
    tcp.passes(0.2)
    tcp.sends(FIN | ACK, 9000, 1000)
    tcp.passes(0.4)
    tcp.sends(FIN | ACK, 9000, 1000)


def test_our_fin_behind_a_lost_segment(tcp: Guest) -> None:
    tcp.send(b"hello")
    tcp.shutdown()
    tcp.frames.clear()
    tcp.passes(0.2)
    tcp.sends(ACK, 9000, 1000, b"hello")
    tcp.sends(FIN | ACK, 9005, 1000)


def test_our_fin_though_the_window_is_shut(tcp: Guest) -> None:
    tcp.gets(ACK, 1000, 9000, window=0)
    tcp.shutdown()
    tcp.sends(FIN | ACK, 9000, 1000)
    tcp.passes(0.2)
    tcp.sends(FIN | ACK, 9000, 1000)


@pytest.mark.parametrize("state", [State.CLOSE_WAIT, State.CLOSING, State.LAST_ACK, State.TIME_WAIT])
def test_a_fin_again_is_acknowledged_again(guest: Guest, state: State) -> None:
    guest.into(state)
    guest.gets(FIN | ACK, 1000, 9000)
    guest.sends(ACK, None, 1001)
    assert guest.state() is state


@pytest.mark.parametrize("state", [State.CLOSE_WAIT, State.CLOSING, State.LAST_ACK, State.TIME_WAIT])
def test_data_after_the_fin_is_dropped(guest: Guest, state: State) -> None:
    guest.into(state)
    guest.gets(ACK, 1001, 9000, b"zombie")
    assert guest.listener.bytes == b""
    assert guest.state() is state


def test_time_wait_begins_again_with_the_fin(guest: Guest) -> None:
    guest.into(State.TIME_WAIT)
    guest.passes(9)
    guest.gets(FIN | ACK, 1000, 9001)
    guest.sends(ACK, 9001, 1001)
    guest.passes(9)
    assert len(guest.stack.time_wait) == 1
    guest.passes(1)
    assert len(guest.stack.time_wait) == 0


def test_a_new_syn_ends_time_wait(guest: Guest) -> None:
    """RFC 6191: only with a higher number; else it may be old."""
    guest.into(State.TIME_WAIT)
    guest.gets(SYN, 1001)
    guest.sends(ACK, 9001, 1001)
    guest.gets(SYN, 500)
    guest.sends(ACK, 9001, 1001)
    guest.gets(SYN, 1002, options=pack_options(1460, 7))
    guest.quiet()
    assert len(guest.users.listeners) == 2
    assert guest.state() is State.SYN_HELD
    guest.connection.accept(guest.now)
    guest.sends(SYN | ACK, 8999, 1003)
    guest.passes(8)
    assert guest.state() is State.SYN_RECEIVED  # the old one's timer is not the new one's


@pytest.mark.parametrize("state", [State.FIN_WAIT_1, State.FIN_WAIT_2, State.CLOSE_WAIT])
def test_abort_resets(guest: Guest, state: State) -> None:
    guest.into(state)
    connection = guest.connection
    guest.connection.abort(guest.now)
    guest.sends(RST | ACK, connection.snd.max)
    assert not guest.stack.tcp
    assert Closed.NORMAL not in guest.listener.events


@pytest.mark.parametrize("state", [State.SYN_SENT, State.CLOSING, State.LAST_ACK, State.TIME_WAIT])
def test_abort_is_silent(guest: Guest, state: State) -> None:
    """3.10.5: what is over, or has not begun, needs no reset."""
    guest.into(state)
    guest.connection.abort(guest.now)
    guest.quiet()
    assert not guest.stack.tcp


@pytest.mark.parametrize(
    "state", [state for state in State if state not in (State.SYN_HELD, State.SYN_SENT, State.CLOSED)]
)
def test_a_reset_ends_every_state(guest: Guest, state: State) -> None:
    guest.into(state)
    guest.gets(RST, guest.connection.rcv.nxt)
    guest.quiet()
    assert not guest.stack.tcp
    assert guest.state() is State.CLOSED


def test_the_user_aborts_at_the_end(tcp: Guest) -> None:
    tcp.listener.on["end"] = lambda: tcp.connection.abort(tcp.now)
    tcp.gets(FIN | ACK, 1000, 9000)
    tcp.sends(RST | ACK, 9000, 1001)
    tcp.quiet()
    assert not tcp.stack.tcp


def test_the_user_aborts_at_the_end_after_its_own(guest: Guest) -> None:
    guest.into(State.FIN_WAIT_2)
    guest.listener.on["end"] = lambda: guest.connection.abort(guest.now)
    guest.gets(FIN | ACK, 1000, 9001)
    guest.sends(RST | ACK, 9001, 1001)
    guest.passes(100)
    guest.quiet()
    assert not guest.stack.tcp


def test_the_user_aborts_when_closed(guest: Guest) -> None:
    guest.into(State.CLOSING)
    connection = guest.connection
    guest.listener.on["closed"] = lambda: connection.abort(guest.now)
    guest.gets(ACK, 1001, 9001)
    guest.quiet()
    assert not guest.stack.tcp
    guest.passes(100)
    guest.quiet()


# -- guests that are gone -----------------------------------------------------------------------------


def test_an_idle_guest_is_asked(tcp: Guest) -> None:
    """3.8.4: after two hours a probe, and if it answers two hours more."""
    tcp.passes(7199)
    tcp.quiet()
    tcp.passes(1)
    tcp.sends(ACK, 8999, 1000)
    tcp.gets(ACK, 1000, 9000, window=512)
    tcp.passes(7199)
    tcp.quiet()
    tcp.passes(1)
    tcp.sends(ACK, 8999, 1000)


def test_an_idle_guest_that_does_not_answer(tcp: Guest) -> None:
    tcp.passes(7200)
    for _ in range(5):
        tcp.sends(ACK, 8999, 1000)
        tcp.quiet()
        tcp.passes(30)
    tcp.sends(RST | ACK, 9000)
    assert tcp.listener.events[-1] is Closed.TIMED_OUT
    assert not tcp.stack.tcp


def test_traffic_postpones_the_question(tcp: Guest) -> None:
    tcp.passes(7000)
    tcp.gets(ACK, 1000, 9000, b"x", window=512)
    tcp.frames.clear()
    tcp.passes(7000)
    tcp.quiet()
    tcp.passes(200)
    tcp.sends(ACK, 8999, 1001)


@pytest.mark.parametrize("state", [State.FIN_WAIT_2, State.CLOSE_WAIT])
def test_half_closed_connections_are_reaped(guest: Guest, state: State) -> None:
    """Sooner than idle ones, unless the guest answers."""
    guest.into(state)
    guest.passes(240)
    probe = guest.sends(ACK)
    guest.gets(ACK, guest.connection.rcv.nxt, probe.seq + 1, window=512)
    guest.passes(240)
    guest.sends(ACK)
    guest.passes(150)
    assert not guest.stack.tcp
    assert guest.listener.events[-1] is Closed.TIMED_OUT


def test_nothing_is_left_of_many_connections(family: int) -> None:
    """Neither in the table nor, for a keepalive's two hours, in the heap of timers."""
    guest = Guest(family, limits=Limits(tcp_time_wait=0.5))
    for number in range(6000):
        ports = (number + 1000).to_bytes(2, "big") + b"\0\x50"
        guest.gets(SYN, 999, ports=ports)
        guest.connection.accept(guest.now)
        guest.gets(ACK, 1000, 9000, ports=ports)
        guest.passes(1.1)  # its first timer has expired: the next entry is two hours away
        guest.gets(RST, 1000, ports=ports)
        guest.frames.clear()
    assert not guest.stack.tcp
    assert len(guest.stack.timers) <= 1024
