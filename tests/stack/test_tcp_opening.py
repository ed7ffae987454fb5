"""Opening: the SYN on hold, its refusal, its acceptance; our own SYN; initial sequence numbers."""

from __future__ import annotations

import pytest

from netns_kit.stack import Closed, Limits, Refusal, State
from netns_kit.stack.wire import icmp, ip
from netns_kit.stack.wire.tcp import ACK, FIN, RST, SYN, Options, pack_options, parse_options
from tests.support.stack import GATEWAY, GUEST, OTHER, PORTS, Guest, key, packet


def test_a_syn_is_held_until_the_user_accepts(guest: Guest) -> None:
    guest.gets(SYN, 999, options=pack_options(1460, 7))
    guest.quiet()
    assert guest.state() is State.SYN_HELD
    guest.connection.accept(guest.now)
    guest.sends(SYN | ACK, 8999, 1000)
    guest.gets(ACK, 1000, 9000)
    guest.quiet()
    assert guest.state() is State.ESTABLISHED
    assert guest.listener.events == ["established"]


def test_a_syn_again_while_on_hold_makes_no_second_connection(guest: Guest) -> None:
    guest.on_hold()
    guest.gets(SYN, 999)
    guest.quiet()
    assert len(guest.stack.tcp) == len(guest.users.listeners) == 1


def test_another_syn_while_on_hold_replaces_the_first(guest: Guest) -> None:
    """A kernel that gives up connecting says nothing, and may use the port again."""
    guest.on_hold()
    guest.gets(SYN, 5000, options=pack_options(1000, 3))
    guest.connection.accept(guest.now)
    guest.sends(SYN | ACK, 8999, 5001)
    guest.gets(ACK, 5001, 9000, window=2)
    assert guest.connection.room() == 2 << 3
    assert guest.connection.snd.mss == 1000


def test_reset_while_on_hold(guest: Guest) -> None:
    guest.on_hold()
    guest.gets(RST, 5)
    assert guest.state() is State.SYN_HELD
    guest.gets(RST, 1000)
    guest.quiet()
    assert guest.listener.events == [Closed.RESET]
    assert not guest.stack.tcp


def test_an_acknowledgement_while_on_hold_means_nothing(guest: Guest) -> None:
    guest.on_hold()
    guest.gets(ACK, 1000, 9000)
    guest.gets(SYN | ACK, 7000, 9000)
    guest.quiet()
    assert guest.state() is State.SYN_HELD
    assert guest.connection.rcv.nxt == 1000


def test_refused_with_reset(guest: Guest) -> None:
    guest.on_hold()
    guest.connection.refuse(Refusal.RESET)
    guest.sends(RST | ACK, 0, 1000)
    assert not guest.stack.tcp
    guest.connection.accept(guest.now)  # too late: nothing happens
    guest.connection.refuse(Refusal.RESET)
    guest.quiet()


ICMP_CODES = {
    Refusal.NET_UNREACHABLE: (0, 0),
    Refusal.HOST_UNREACHABLE: (1, 3),
    Refusal.PROHIBITED: (13, 1),
}


@pytest.mark.parametrize("refusal", ICMP_CODES)
def test_refused_with_icmp(guest: Guest, refusal: Refusal) -> None:
    guest.on_hold()
    guest.connection.refuse(refusal)
    sent = guest.taken().packet
    ipv4 = guest.family == 4
    message = icmp.parse(sent.payload)
    assert sent.addresses == GATEWAY[guest.family] + GUEST[guest.family]
    assert sent.protocol == (ip.ICMP if ipv4 else ip.ICMPV6)
    assert message.type == (icmp.UNREACHABLE if ipv4 else icmp.V6_UNREACHABLE)
    assert message.code == ICMP_CODES[refusal][0 if ipv4 else 1]
    size = 20 if ipv4 else 40
    quoted = bytes(message.payload)
    assert GUEST[guest.family] + OTHER[guest.family] in quoted[:size]
    assert quoted[size : size + 8] == PORTS + (999).to_bytes(4, "big")
    assert not guest.stack.tcp


def test_refused_with_silence(guest: Guest) -> None:
    guest.on_hold()
    guest.connection.refuse(Refusal.DROP)
    guest.quiet()
    guest.gets(SYN, 999)  # its next try is a new one
    assert len(guest.users.listeners) == 2


def no_way_out(guest: Guest) -> None:
    """It is told that its network is unreachable: that is a fault of ours, and nobody's refusal."""
    packet = guest.taken().packet
    told = (ip.ICMP, b"\3\0") if guest.family == 4 else (ip.ICMPV6, b"\1\0")
    assert (packet.protocol, bytes(packet.payload[:2])) == told


def test_aborted_while_on_hold(guest: Guest) -> None:
    guest.on_hold()
    guest.connection.abort(guest.now)
    no_way_out(guest)
    assert not guest.stack.tcp


def test_what_both_ends_offer(guest: Guest) -> None:
    guest.on_hold(window=4000, options=pack_options(1400, 7))
    guest.connection.accept(guest.now)
    segment = guest.sends(SYN | ACK, window=65535)  # a window in a SYN is not scaled
    assert parse_options(segment.options) == Options(1460 if guest.family == 4 else 1440, 8)
    guest.gets(ACK, 1000, 9000, window=100)
    assert guest.connection.room() == 100 << 7
    assert guest.connection.snd.mss == 1400
    guest.gets(ACK, 1000, 9000, b"x", window=100)
    guest.sends(ACK, 9000, 1001, window=(1 << 20) >> 8)


def test_no_window_scale_and_no_mss(guest: Guest) -> None:
    guest.on_hold(options=b"")
    guest.connection.accept(guest.now)
    segment = guest.sends(SYN | ACK)
    assert parse_options(segment.options).scale is None
    guest.gets(ACK, 1000, 9000, b"x", window=100)
    guest.sends(ACK, window=65535)
    guest.gets(ACK, 1001 + 65536, 9000)  # our own window is no larger than we can say
    guest.sends(ACK, 9000, 1001)
    assert guest.connection.room() == 100
    assert guest.connection.snd.mss == (536 if guest.family == 4 else 1220)


def test_syn_ack_is_sent_again_whole(guest: Guest) -> None:
    """By the timer, doubling, and for a SYN that comes again; with its options each time."""
    guest.on_hold()
    guest.connection.accept(guest.now)
    first = guest.sends(SYN | ACK, 8999, 1000)
    guest.gets(SYN, 999)
    again = guest.sends(SYN | ACK, 8999, 1000, window=65535)
    assert parse_options(again.options) == parse_options(first.options)
    for wait in (0.25, 0.5, 1, 2, 4, 8, 16):
        guest.passes(wait - 0.01)
        guest.quiet()
        guest.passes(0.01)
        third = guest.sends(SYN | ACK, 8999, 1000)
        assert parse_options(third.options) == parse_options(first.options)
    guest.passes(32)
    guest.sends(RST | ACK, 9000)
    assert guest.listener.events == [Closed.TIMED_OUT]
    assert not guest.stack.tcp


def test_a_wrong_acknowledgement_of_our_syn(guest: Guest) -> None:
    guest.opening()
    guest.gets(ACK, 1000, 9001)
    guest.sends(RST, 9001)
    guest.gets(ACK, 1000, 8999)
    guest.sends(RST, 8999)
    assert guest.state() is State.SYN_RECEIVED


def test_data_and_fin_with_the_last_ack_of_the_handshake(guest: Guest) -> None:
    guest.opening()
    guest.gets(FIN | ACK, 1000, 9000, b"hello")
    guest.sends(ACK, 9000, 1006)
    assert guest.listener.bytes == b"hello"
    assert guest.listener.events == ["established", "end"]
    assert guest.state() is State.CLOSE_WAIT


def test_reset_instead_of_the_last_ack(guest: Guest) -> None:
    guest.opening()
    guest.gets(RST, 1000)
    guest.quiet()
    assert guest.listener.events == [Closed.RESET]
    assert not guest.stack.tcp


def test_aborted_before_the_last_ack(guest: Guest) -> None:
    guest.opening()
    guest.connection.abort(guest.now)
    guest.sends(RST | ACK, 9000, 1000)


def test_we_connect(guest: Guest) -> None:
    guest.connecting()
    guest.gets(SYN | ACK, 999, 9000, window=4000, options=pack_options(1200, 7))
    guest.sends(ACK, 9000, 1000, window=4096)
    assert guest.listener.events == ["established"]
    assert guest.connection.room() == 4000
    assert guest.connection.snd.mss == 1200


def test_our_syn_is_sent_again_then_given_up(guest: Guest) -> None:
    guest.connecting()
    for wait in (0.25, 0.5, 1, 2, 4, 8, 16):
        guest.passes(wait)
        assert parse_options(guest.sends(SYN, 8999, 0).options).scale == 8
    guest.passes(32)
    guest.quiet()  # nobody to reset
    assert guest.listener.events == [Closed.TIMED_OUT]
    assert guest.stack.deadline == float("inf")


def test_the_guest_refuses_our_syn(guest: Guest) -> None:
    guest.connecting()
    guest.gets(RST, 0, 9000)  # acknowledges nothing: anybody could have sent it
    guest.gets(RST | ACK, 0, 5)
    assert guest.state() is State.SYN_SENT
    guest.gets(RST | ACK, 0, 9000)
    guest.quiet()
    assert guest.listener.events == [Closed.RESET]


@pytest.mark.parametrize("wrong", [None, "number", "port", "protocol", "length"])
def test_the_guest_rejects_our_syn(guest: Guest, wrong: str | None) -> None:
    """By ICMP, as a firewall of its own does.  It ends that connection, opened by that SYN, and no other."""
    guest.connecting()
    family = guest.family
    size = 20 if family == 4 else 40
    ports = PORTS[2:] + (b"\0\1" if wrong == "port" else PORTS[:2])
    number = 8998 if wrong == "number" else 8999
    header = ip.pack(OTHER[family] + GUEST[family], ip.UDP if wrong == "protocol" else ip.TCP, 20)
    about = header + ports + number.to_bytes(4, "big")
    kind, protocol = (icmp.UNREACHABLE, ip.ICMP) if family == 4 else (icmp.V6_UNREACHABLE, ip.ICMPV6)
    message = icmp.HEADER.pack(kind, 3, 0, 0, 0) + about[: size + (7 if wrong == "length" else 8)]
    guest.gives(packet(GUEST[family] + OTHER[family], protocol, message, sum_at=2))
    guest.quiet()
    told = Closed.RESET if family == 4 else Closed.UNREACHABLE  # no such port, no such address
    assert guest.listener.events == ([] if wrong else [told])


def test_an_old_connection_of_the_guest_answers_our_syn(guest: Guest) -> None:
    """3.5.1 figure 8: its ACK is wrong, our RST clears it, our SYN comes again."""
    guest.connecting()
    guest.gets(ACK, 300, 100)
    guest.sends(RST, 100)
    guest.passes(1)
    guest.sends(SYN, 8999)


def test_both_connect_at_once(guest: Guest) -> None:
    """3.5 figure 7"""
    guest.connecting()
    guest.gets(SYN, 999, options=pack_options(1460, 7))
    guest.sends(SYN | ACK, 8999, 1000, window=65535)
    guest.gets(SYN | ACK, 999, 9000)
    guest.sends(ACK, 9000, 1000)
    assert guest.state() is State.ESTABLISHED
    assert guest.listener.events == ["established"]


def test_the_round_trip_of_the_handshake_sets_the_timer(guest: Guest) -> None:
    guest.on_hold()
    guest.connection.accept(guest.now)
    guest.now += 0.5
    guest.gets(ACK, 1000, 9000)
    assert guest.connection.snd.rto.value == pytest.approx(0.5 + 4 * 0.25)


def test_the_user_aborts_when_told_that_it_is_established(guest: Guest) -> None:
    guest.opening()
    listener = guest.listener

    def send_and_abort() -> None:
        guest.send(b"bye")
        guest.connection.abort(guest.now)

    listener.on["established"] = send_and_abort
    guest.gets(FIN | ACK, 1000, 9000, b"hello")
    guest.sends(ACK, 9000, 1000, b"bye")
    guest.sends(RST | ACK, 9003)
    guest.passes(1000)
    guest.quiet()
    assert listener.bytes == b""


def test_the_user_aborts_when_its_own_connection_is_established(guest: Guest) -> None:
    guest.connecting()
    guest.listener.on["established"] = lambda: guest.connection.abort(guest.now)
    guest.gets(SYN | ACK, 999, 9000)
    guest.sends(RST | ACK, 9000)
    guest.passes(1000)
    guest.quiet()


def test_beyond_the_limit_of_the_table_there_is_no_way_out(family: int) -> None:
    guest = Guest(family, limits=Limits(tcp_connections=2))
    for port in (1, 2):
        guest.gets(SYN, 999, ports=bytes([80, port]) + PORTS[2:])
        guest.connection.accept(guest.now)
    guest.frames.clear()
    guest.gets(SYN, 999, ports=bytes([80, 3]) + PORTS[2:])
    no_way_out(guest)
    assert len(guest.stack.tcp) == len(guest.users.listeners) == 2
    assert guest.stack.dropped["limit-tcp-connections"] == 1
    with pytest.raises(KeyError):
        guest.stack.connect_tcp(key(family, 9), guest.listener, 0.0)


def test_initial_sequence_numbers(family: int) -> None:
    """RFC 6528: they rise with the clock for one tuple, and tell nothing about another's."""
    guest = Guest(family, iss=None)

    def isn(port: int, now: float) -> int:
        guest.now = now
        guest.gets(SYN, 999, ports=port.to_bytes(2, "big") + PORTS[2:])
        guest.connection.accept(now)
        number = guest.sends(SYN | ACK).seq
        guest.connection.abort(now)
        guest.frames.clear()
        return number

    assert isn(1, 10.0) == isn(1, 10.0)
    assert (isn(1, 11.0) - isn(1, 10.0)) % (1 << 32) == 250_000
    steps = {(isn(port + 1, 0.0) - isn(port, 0.0)) % (1 << 32) for port in range(1, 60)}
    assert len(steps) == 59
    assert len({step >> 24 for step in steps}) > 20
