"""Urgent data (RFC 9293 3.8.5, RFC 6093), keepalive (3.8.4) and traffic class: what crosses beside the bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.stack import State
from netns_kit.stack.wire import tcp as wire
from netns_kit.stack.wire import virtio
from netns_kit.stack.wire.tcp import ACK, FIN, SYN, URG
from tests.support.stack import SYN_OPTIONS, VNET, Guest

# -- from the guest -----------------------------------------------------------------------------------


def test_the_urgent_byte_is_delivered_as_such(tcp: Guest) -> None:
    """The pointer points one past it."""
    tcp.gets(ACK | URG, 1000, 9000, b"before!after", urgent=7)
    tcp.sends(ACK, 9000, 1012)
    assert bytes(tcp.listener.bytes) == b"before!after"
    assert tcp.listener.events[-1] == ("urgent", b"!")


def test_the_pointer_may_point_beyond_the_segment(tcp: Guest) -> None:
    """Every segment up to the byte has it; of the last even the flag may be missing."""
    tcp.gets(ACK | URG, 1000, 9000, b"bef", urgent=7)
    tcp.gets(ACK | URG, 1003, 9000, b"ore", urgent=4)
    assert tcp.listener.events == ["established"]
    tcp.gets(ACK, 1006, 9000, b"!")
    assert tcp.listener.events[-1] == ("urgent", b"!")
    tcp.gets(ACK, 1007, 9000, b"after")
    assert bytes(tcp.listener.bytes) == b"before!after"
    assert tcp.listener.events[-1] == ("urgent", b"!")


def test_an_urgent_byte_beyond_a_hole(tcp: Guest) -> None:
    tcp.gets(ACK | URG, 1006, 9000, b"!after", urgent=1)
    tcp.gets(ACK, 1000, 9000, b"before")
    assert bytes(tcp.listener.bytes) == b"before!after"
    assert tcp.listener.events[-1] == ("urgent", b"!")


def test_an_urgent_byte_waits_for_a_user_that_is_full(tcp: Guest) -> None:
    """At the byte before it, at the byte itself, and after it."""
    tcp.listener.room = 6
    tcp.gets(ACK | URG, 1000, 9000, b"before!after", urgent=7)
    tcp.sends(ACK, 9000, 1006)
    assert tcp.listener.events[1:] == []
    tcp.resume(room=1)
    tcp.sends(ACK, 9000, 1007)
    assert tcp.listener.events[-1] == ("urgent", b"!")
    tcp.resume()
    tcp.sends(ACK, 9000, 1012)
    assert bytes(tcp.listener.bytes) == b"before!after"


def test_the_last_of_several_counts(tcp: Guest) -> None:
    """As kernels have it: the earlier ones have become ordinary bytes."""
    tcp.listener.room = 0
    tcp.gets(ACK | URG, 1000, 9000, b"a!", urgent=2)
    tcp.gets(ACK | URG, 1002, 9000, b"b!", urgent=2)
    tcp.resume()
    assert bytes(tcp.listener.bytes) == b"a!b!"
    assert [event for event in tcp.listener.events if event == ("urgent", b"!")] == [("urgent", b"!")]


def test_a_pointer_at_nothing(tcp: Guest) -> None:
    """Zero, or at what has been taken: the bytes are bytes."""
    tcp.gets(ACK, 1000, 9000, b"ab")
    tcp.gets(ACK | URG, 1002, 9000, b"cd", urgent=0)
    tcp.gets(ACK | URG, 1001, 9000, b"bcde", urgent=1)
    assert bytes(tcp.listener.bytes) == b"abcde"
    tcp.gets(ACK, 1005, 9000, b"f")
    assert bytes(tcp.listener.bytes) == b"abcdef"
    assert tcp.connection.rcv.urgent is None


def test_the_user_aborts_when_given_the_urgent_byte(tcp: Guest) -> None:
    tcp.listener.on["deliver"] = lambda: tcp.connection.abort(tcp.now)
    tcp.gets(ACK | URG, 1000, 9000, b"!after", urgent=1)
    assert tcp.state() is State.CLOSED
    assert bytes(tcp.listener.bytes) == b"!"


pieces = st.lists(st.tuples(st.binary(min_size=1, max_size=5), st.none() | st.integers(0, 12)), max_size=8)


@given(pieces, st.lists(st.integers(0, 6), max_size=20))
def test_whatever_is_urgent_no_byte_is_lost(pieces: list[tuple[bytes, int | None]], rooms: list[int]) -> None:
    guest, seq = Guest().established(), 1000
    guest.listener.room = 0
    for data, pointer in pieces:
        flags = ACK if pointer is None else ACK | URG
        guest.gets(flags, seq, 9000, data, urgent=pointer or 0)
        seq += len(data)
    for room in rooms:
        guest.resume(room)
    guest.resume()
    assert bytes(guest.listener.bytes) == b"".join(data for data, _ in pieces)
    assert guest.connection.rcv.ack == seq


# -- to the guest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("offloads", [None, VNET], ids=["plain", "offloads"])
def test_our_urgent_byte(family: int, offloads: object) -> None:
    guest = Guest(family, offloads=VNET if offloads else None).established()
    guest.send(b"before")
    guest.connection.send_urgent(b"!", guest.now)
    guest.send(b"after")
    guest.sends(ACK, 9000, 1000, b"before")
    assert guest.sends(ACK | URG, 9006, 1000, b"!").urgent == 1
    guest.sends(ACK, 9007, 1000, b"after")
    guest.passes(0.2)
    assert guest.sends(ACK | URG, 9000, 1000, b"before").urgent == 7, "sent again, it tells still"
    guest.frames.clear()
    guest.gets(ACK, 1000, 9007, window=512)
    guest.frames.clear()
    guest.passes(0.5)
    guest.sends(ACK, 9007, 1000, b"after")


def test_no_super_segment_has_a_pointer(family: int) -> None:
    """Whoever cuts it would give each piece the same one."""
    guest = Guest(family, offloads=VNET).established()
    guest.send(bytes(14000))
    guest.connection.send_urgent(b"!", guest.now)
    guest.frames.clear()
    guest.passes(0.2)
    while guest.frames:
        sent = guest.taken()
        assert sent.virtio[1] == virtio.GSO_NONE
        segment = wire.parse(sent.packet.payload)
        assert (segment.seq + segment.urgent) & 0xFFFFFFFF == 9000 + 14001


def test_a_pointer_too_far_ahead_is_not_written(tcp: Guest) -> None:
    tcp.gets(ACK, 1000, 9000, window=2000)
    for _ in range(2):
        tcp.send(bytes(50000))
    tcp.connection.send_urgent(b"!", tcp.now)
    tcp.frames.clear()
    tcp.passes(0.2)
    tcp.sends(ACK, 9000, 1000, bytes(1460 if tcp.family == 4 else 1440))


# -- keepalive ----------------------------------------------------------------------------------------


def probe(guest: Guest, data: bytes = b"") -> None:
    guest.gets(ACK, 999, 9000, data, window=512)
    guest.sends(ACK, 9000, 1000)


@pytest.mark.parametrize("garbage", [b"", b"\0"])
def test_the_guests_keepalive_is_passed_on(tcp: Guest, garbage: bytes) -> None:
    tcp.passes(5)
    probe(tcp, garbage)
    assert tcp.listener.events[-1] == ("keepalive", pytest.approx(5))
    tcp.passes(5)
    probe(tcp, garbage)
    assert tcp.listener.events[-1] == ("keepalive", pytest.approx(5)), "since the last one"


def test_what_is_no_keepalive(tcp: Guest) -> None:
    probe(tcp)  # too soon: a retransmission
    tcp.passes(5)
    tcp.gets(ACK, 998, 9000, window=512)
    tcp.gets(ACK, 998, 9000, b"ab", window=512)
    tcp.listener.room = 0
    tcp.gets(ACK, 1000, 9000, b"held", window=512)
    tcp.passes(5)
    tcp.gets(ACK, 1003, 9000, window=512)  # asks for the window
    assert tcp.listener.events == ["established"]


# -- traffic class ------------------------------------------------------------------------------------


def test_the_traffic_class_is_passed_on_when_it_changes(family: int) -> None:
    guest = Guest(family)
    guest.gets(SYN, 999, tos=0x48 | 2, options=SYN_OPTIONS)
    connection = guest.connection
    assert (connection.tos, connection.ttl) == (0x48, 64), "without ECN's bits"
    connection.accept(guest.now)
    guest.frames.clear()
    guest.gets(ACK, 1000, 9000, tos=0x48, window=512)
    guest.gets(ACK, 1000, 9000, b"a", tos=0x4B, window=512)
    assert guest.listener.events == ["established"]
    guest.gets(ACK, 1001, 9000, b"b", tos=0xB8, window=512)
    guest.gets(ACK, 1002, 9000, b"c", tos=0xB9, window=512)
    assert guest.listener.events == ["established", ("traffic class", 0xB8)]


def test_ecn_is_not_offered(family: int) -> None:
    """A relay ends the path that ECN would speak about."""
    guest = Guest(family)
    guest.gets(SYN | 0xC0, 999, options=SYN_OPTIONS)
    guest.connection.accept(guest.now)
    guest.sends(SYN | ACK, 8999, 1000)


def test_urgent_and_fin_together(tcp: Guest) -> None:
    tcp.gets(ACK | URG | FIN, 1000, 9000, b"x!", urgent=2)
    tcp.sends(ACK, 9000, 1003)
    assert tcp.listener.events[-2:] == [("urgent", b"!"), "end"]


def test_the_pointer_never_goes_back(tcp: Guest) -> None:
    """An older segment that comes late has an older pointer."""
    tcp.gets(ACK | URG, 1006, 9000, b"b!", urgent=2)
    tcp.gets(ACK | URG, 1000, 9000, b"befor!", urgent=6)
    assert bytes(tcp.listener.bytes) == b"befor!b!"
    assert [event for event in tcp.listener.events if event == ("urgent", b"!")] == [("urgent", b"!")]
    assert tcp.connection.rcv.urgent is None
