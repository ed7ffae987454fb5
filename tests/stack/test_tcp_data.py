"""ESTABLISHED: data both ways, what the user has not taken, holes, windows, stray numbers.

The guest is at 1000 with a window of 65536, we are at 9000 with a window of 1 MiB, shown as 4096.
"""

from __future__ import annotations

from collections import deque

import pytest

from netns_kit.stack import Closed, Limits, State
from netns_kit.stack.seq import acceptable
from netns_kit.stack.wire import virtio
from netns_kit.stack.wire.tcp import ACK, FIN, RST, SYN, pack_options
from tests.support.stack import OUR_ISS, PORTS, VNET, Guest, beyond


def test_from_the_guest(tcp: Guest) -> None:
    tcp.gets(ACK, 1000, 9000, b"hello")
    tcp.sends(ACK, 9000, 1005, window=4096)
    assert tcp.listener.bytes == b"hello"


def test_acks_of_one_batch_are_one(tcp: Guest) -> None:
    for at in range(5):
        tcp.stack.receive(memoryview(tcp.segment(ACK, 1000 + at, 9000, b"x")), tcp.now)
    tcp.quiet()
    tcp.stack.flush()
    tcp.sends(ACK, 9000, 1005)
    tcp.quiet()


def test_data_carries_the_ack(tcp: Guest) -> None:
    tcp.listener.on["deliver"] = lambda: tcp.send(b"yes") if tcp.listener.bytes == b"?" else None
    tcp.gets(ACK, 1000, 9000, b"?")
    tcp.sends(ACK, 9000, 1000, b"yes")  # sent before the user has said that it took the byte
    tcp.sends(ACK, 9003, 1001)


def test_to_the_guest(tcp: Guest) -> None:
    tcp.send(b"hello")
    tcp.sends(ACK, 9000, 1000, b"hello")
    tcp.send(b"world")
    tcp.sends(ACK, 9005, 1000, b"world")
    tcp.gets(ACK, 1000, 9010, window=512)
    tcp.quiet()
    assert not tcp.connection.snd.queue
    assert tcp.connection.room() == 65536


def test_what_the_user_has_not_taken_is_not_acknowledged(tcp: Guest) -> None:
    tcp.listener.room = 3
    tcp.gets(ACK, 1000, 9000, b"hello")
    tcp.sends(ACK, 9000, 1003, window=4096)
    tcp.gets(ACK, 1005, 9000, b" world")
    tcp.quiet()
    tcp.resume(5)
    tcp.sends(ACK, 9000, 1008, window=4096)
    tcp.resume()
    tcp.sends(ACK, 9000, 1011, window=4096)
    assert tcp.listener.bytes == b"hello world"
    tcp.resume()
    tcp.quiet()


def test_held_bytes_again_are_answered_with_a_shut_window_and_no_more(tcp: Guest) -> None:
    tcp.listener.room = 3
    tcp.gets(ACK, 1000, 9000, b"hello")
    tcp.sends(ACK, 9000, 1003)
    for _ in range(3):
        tcp.gets(ACK, 1003, 9000, b"lo")
        tcp.sends(ACK, 9000, 1003, window=0)
    tcp.gets(ACK, 1003, 9000, b"lo!")  # the same and one more
    tcp.sends(ACK, 9000, 1003, window=0)
    tcp.quiet()
    tcp.resume()
    tcp.sends(ACK, 9000, 1006, window=4096)
    assert tcp.listener.bytes == b"hello!"


def test_held_bytes_and_fin_again_are_answered_too(tcp: Guest) -> None:
    tcp.listener.room = 3
    tcp.gets(FIN | ACK, 1000, 9000, b"hello")
    tcp.sends(ACK, 9000, 1003)
    tcp.gets(FIN | ACK, 1003, 9000, b"lo")
    tcp.sends(ACK, 9000, 1003, window=0)
    tcp.gets(FIN | ACK, 1005, 9000)
    tcp.sends(ACK, 9000, 1003, window=0)
    assert tcp.listener.events == ["established"]
    assert tcp.state() is State.ESTABLISHED
    tcp.resume()
    tcp.sends(ACK, 9000, 1006)
    assert tcp.listener.events == ["established", "end"]
    assert tcp.state() is State.CLOSE_WAIT


def test_a_window_opens_while_bytes_are_held(tcp: Guest) -> None:
    """Both sides full, and the guest reads first.  Its kernel has been shown a window of zero, so that its
    ACKs come from that window's edge (tcp_acceptable_seq) and not from the end of what it has sent."""
    tcp.listener.room = 0
    tcp.gets(ACK, 1000, 9000, b"held", window=0)
    tcp.gets(ACK, 1004, 9000, b" too", window=0)
    tcp.gets(ACK, 1000, 9000, b"held", window=0)
    tcp.sends(ACK, 9000, 1000, window=0)
    assert not tcp.connection.room()
    tcp.gets(ACK, 1000, 9000, window=512)
    tcp.quiet()
    assert "writable" in tcp.listener.events
    assert tcp.connection.room()


def test_held_bytes_fill_the_window(family: int) -> None:
    guest = Guest(family, limits=Limits(tcp_receive=1024)).established()
    guest.listener.room = 0
    guest.gets(ACK, 1000, 9000, bytes(1000))
    guest.quiet()
    guest.gets(FIN | ACK, 2000, 9000, b"a" * 24 + b"b" * 100)
    guest.quiet()
    guest.gets(ACK, 2024, 9000, b"b")
    guest.sends(ACK, 9000, 1000, window=0)
    guest.resume()
    guest.sends(ACK, 9000, 2024, window=4)
    assert guest.listener.bytes == bytes(1000) + b"a" * 24
    assert guest.state() is State.ESTABLISHED  # its FIN lay behind what did not fit


def test_out_of_order(tcp: Guest) -> None:
    tcp.gets(ACK, 1006, 9000, b"world")
    tcp.sends(ACK, 9000, 1000)
    tcp.gets(ACK, 1005, 9000, b" ")
    tcp.sends(ACK, 9000, 1000)
    tcp.gets(ACK, 1000, 9000, b"hello")
    tcp.sends(ACK, 9000, 1011)
    assert tcp.listener.bytes == b"hello world"
    tcp.quiet()


def test_one_hole_of_two_is_filled(tcp: Guest) -> None:
    tcp.gets(ACK, 1001, 9000, b"b")
    tcp.gets(ACK, 1003, 9000, b"d")
    tcp.frames.clear()
    tcp.gets(ACK, 1000, 9000, b"a")
    tcp.sends(ACK, 9000, 1002)
    tcp.quiet()
    tcp.gets(ACK, 1002, 9000, b"c")
    tcp.sends(ACK, 9000, 1004)
    assert tcp.listener.bytes == b"abcd"


def test_beyond_a_hole_behind_held_bytes(tcp: Guest) -> None:
    tcp.listener.room = 1
    tcp.gets(ACK, 1000, 9000, b"ab")
    tcp.sends(ACK, 9000, 1001)
    tcp.gets(ACK, 1003, 9000, b"d")
    tcp.sends(ACK, 9000, 1001, window=4096)
    tcp.gets(ACK, 1002, 9000, b"c")
    tcp.quiet()
    tcp.resume()
    tcp.sends(ACK, 9000, 1004)
    assert tcp.listener.bytes == b"abcd"


TEXT = b"abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    "pieces",
    [
        [(2, 4), (0, 3)],  # overlap to the left
        [(2, 4), (3, 6), (0, 2)],  # overlap to the right
        [(2, 4), (2, 4), (0, 2)],  # a duplicate
        [(3, 4), (2, 6), (0, 2), (4, 6)],  # around what is kept: its tail comes again
        [(2, 6), (3, 4), (0, 2)],  # within what is kept
        [(0, 4), (2, 6)],  # overlaps what was delivered
        [(0, 4), (0, 4), (4, 6)],  # repeats it
        [(4, 6), (2, 4), (0, 2)],  # backwards
        [(1, 2), (3, 4), (5, 6), (0, 6)],  # all at once
    ],
)
def test_overlap(tcp: Guest, pieces: list[tuple[int, int]]) -> None:
    for start, end in pieces:
        tcp.gets(ACK, 1000 + start, 9000, TEXT[start:end])
    whole = max(end for _, end in pieces)
    assert tcp.listener.bytes == TEXT[:whole]
    tcp.frames = deque([tcp.frames[-1]])
    tcp.sends(ACK, 9000, 1000 + whole)
    assert not beyond(tcp.connection)


def test_a_fin_beyond_a_hole(tcp: Guest) -> None:
    tcp.gets(FIN | ACK, 1002, 9000, b"c")
    tcp.gets(FIN | ACK, 1003, 9000)
    tcp.sends(ACK, 9000, 1000)
    tcp.sends(ACK, 9000, 1000)
    assert len(beyond(tcp.connection)) == 1
    tcp.gets(ACK, 1000, 9000, b"ab")
    tcp.sends(ACK, 9000, 1004)
    assert tcp.listener.bytes == b"abc"
    assert tcp.state() is State.CLOSE_WAIT


def test_what_is_kept_beyond_a_hole_is_bounded(family: int) -> None:
    """By the window in bytes, however often a guest repeats itself, and by runs."""
    guest = Guest(family, limits=Limits(tcp_receive=4096, tcp_out_of_order=8)).established()
    for start in range(1, 200):
        guest.gets(ACK, 1000 + start, 9000, bytes(4000))
        guest.gets(ACK, 1000 + 20 * start, 9000, bytes(15))
    assert sum(len(run) for _, run in beyond(guest.connection)) <= 4096
    guest.gets(RST, 1000, 9000)
    assert not guest.stack.tcp
    guest = Guest(family, limits=Limits(tcp_out_of_order=8)).established()
    for start in range(1, 200):
        guest.gets(ACK, 1000 + 2 * start, 9000, b"x")
    assert len(beyond(guest.connection)) == 8


def test_old_segments_are_answered_once(tcp: Guest) -> None:
    tcp.gets(ACK, 1000, 9000, b"hello")
    tcp.sends(ACK, 9000, 1005)
    tcp.gets(ACK, 1000, 9000, b"hello")
    tcp.sends(ACK, 9000, 1005, window=4096)
    tcp.quiet()
    assert tcp.listener.bytes == b"hello"


def test_a_keepalive_of_the_guest_is_answered(tcp: Guest) -> None:
    tcp.gets(ACK, 999, 9000)
    tcp.sends(ACK, 9000, 1000)
    tcp.gets(ACK, 999, 9000, b"\0")  # with a byte, as some do
    tcp.sends(ACK, 9000, 1000)


def test_the_ack_of_an_old_segment_counts(tcp: Guest) -> None:
    """A guest whose window is shut has nothing else to say."""
    tcp.send(bytes(65536))
    tcp.frames.clear()
    assert tcp.connection.room() == 0
    tcp.gets(ACK, 999, 9000 + 65536, window=512)
    tcp.sends(ACK, 9000 + 65536, 1000)
    assert tcp.listener.events[-1] == "writable"
    assert not tcp.connection.snd.queue


@pytest.mark.parametrize(
    ("seq", "size", "window", "accepted"),
    [  # RFC 9293 3.10.7.4, the table of the first check; the guest is at 1000
        (1000, 0, 0, True),
        (999, 0, 0, False),
        (1001, 0, 0, False),
        (1000, 1, 0, False),
        (1000, 0, 100, True),
        (1099, 0, 100, True),
        (1100, 0, 100, True),  # the far edge: see seq.acceptable
        (1101, 0, 100, False),
        (999, 0, 100, False),
        (1000, 100, 100, True),
        (1099, 5, 100, True),
        (1100, 1, 100, False),
        (990, 10, 100, False),
        (990, 11, 100, True),
    ],
)
def test_acceptability(seq: int, size: int, window: int, accepted: bool) -> None:
    for shift in (0, 0xFFFFFFFF - 1050):  # and across the wrap-around
        assert acceptable((seq + shift) & 0xFFFFFFFF, size, (1000 + shift) & 0xFFFFFFFF, window) is accepted


def test_two_full_windows_with_a_hole_each_do_not_answer_each_other_for_ever(family: int) -> None:
    guest = Guest(family, limits=Limits(tcp_receive=1024)).established()
    guest.gets(ACK, 1001, 9000, bytes(1023))
    guest.sends(ACK, 9000, 1000)
    guest.gets(ACK, 2024, 9000)  # a bare ACK at the window's edge
    guest.quiet()


def test_an_ack_of_what_was_never_sent(tcp: Guest) -> None:
    tcp.gets(ACK, 1000, 9001, b"hello")
    tcp.sends(ACK, 9000, 1000)
    assert tcp.listener.bytes == b""


def test_an_old_ack_changes_nothing(tcp: Guest) -> None:
    tcp.send(b"hello")
    tcp.gets(ACK, 1000, 9005, window=512)
    tcp.frames.clear()
    tcp.gets(ACK, 1000, 9003, b"x", window=5)
    tcp.sends(ACK, 9005, 1001)
    assert tcp.connection.room() == 65536


def test_a_segment_without_ack_is_dropped(tcp: Guest) -> None:
    tcp.gets(0, 1000, 9000, b"hello")
    tcp.quiet()
    assert tcp.listener.bytes == b""


# -- RFC 5961 ----------------------------------------------------------------------------------------


def test_exact_reset(tcp: Guest) -> None:
    tcp.gets(RST, 1000)
    tcp.quiet()
    assert tcp.listener.events[-1] is Closed.RESET
    assert not tcp.stack.tcp


def test_reset_in_the_window_is_challenged(tcp: Guest) -> None:
    tcp.gets(RST, 1001)
    tcp.sends(ACK, 9000, 1000)
    tcp.gets(RST, 1000)
    assert not tcp.stack.tcp


def test_reset_elsewhere_is_ignored(tcp: Guest) -> None:
    for seq in (999, 1000 + (1 << 20) + 1, 0x80000000):
        tcp.gets(RST, seq)
        tcp.gets(RST | ACK, seq, 9000)
    tcp.quiet()
    assert tcp.state() is State.ESTABLISHED


def test_reset_by_a_guest_that_was_told_to_wait(tcp: Guest) -> None:
    """Its window is shut at what we have acknowledged, so that is where its RST lies."""
    tcp.listener.room = 3
    tcp.gets(ACK, 1000, 9000, b"hello")
    tcp.gets(ACK, 1003, 9000, b"lo")
    tcp.frames.clear()
    tcp.gets(RST, 1004)
    tcp.sends(ACK, 9000, 1003)
    tcp.gets(RST, 1003)
    assert tcp.listener.events[-1] is Closed.RESET


@pytest.mark.parametrize("seq", [999, 1000, 1001, 0x80000000])
def test_a_syn_is_challenged(tcp: Guest, seq: int) -> None:
    tcp.gets(SYN, seq)
    tcp.sends(ACK, 9000, 1000)
    tcp.gets(SYN | ACK, seq, 9000)
    tcp.sends(ACK, 9000, 1000)
    assert tcp.state() is State.ESTABLISHED


# -- strays -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "ack", "data", "reply"),
    [  # 3.10.7.1
        (ACK, 777, b"", (RST, 777, 0)),
        (ACK, 777, b"data", (RST, 777, 0)),
        (FIN | ACK, 777, b"", (RST, 777, 0)),
        (SYN | ACK, 777, b"", (RST, 777, 0)),
        (0, 0, b"data", (RST | ACK, 0, 1004)),
        (FIN, 0, b"", (RST | ACK, 0, 1001)),
        (RST, 0, b"", None),
        (RST | ACK, 777, b"", None),
        (RST | SYN, 0, b"", None),
    ],
)
def test_stray(guest: Guest, flags: int, ack: int, data: bytes, reply: tuple[int, int, int] | None) -> None:
    guest.gets(flags, 1000, ack, data)
    if reply:
        guest.sends(*reply)
    guest.quiet()
    assert guest.stack.dropped["tcp-stray"] == 1
    assert not guest.stack.tcp


# -- windows ------------------------------------------------------------------------------------------


def test_the_guests_window_bounds_what_we_send(tcp: Guest) -> None:
    assert tcp.connection.room() == 65536
    tcp.send(bytes(65536))
    assert tcp.connection.room() == 0
    tcp.gets(ACK, 1000, 9000 + 65536, window=100)
    assert tcp.connection.room() == 12800
    assert tcp.listener.events[-1] == "writable"


def test_our_own_bound_on_what_is_in_flight(family: int) -> None:
    guest = Guest(family, limits=Limits(tcp_send=10000)).established()
    assert guest.connection.room() == 10000


def test_silly_windows_are_waited_out(tcp: Guest) -> None:
    """3.8.6.2.1: less than a segment is no room while something is in flight, and is when nothing is."""
    tcp.send(bytes(65000))
    assert tcp.connection.room() == 0
    tcp.gets(ACK, 1000, 9000 + 64000, window=14)  # 1792 bytes, of which 1000 are in flight
    assert tcp.connection.room() == 0
    tcp.gets(ACK, 1000, 9000 + 65000, window=7)
    assert tcp.connection.room() == 896


def test_shut_window_is_probed_until_it_opens(tcp: Guest) -> None:
    """3.8.6.1, though every news of its opening gets lost."""
    tcp.send(bytes(65536))
    assert tcp.connection.room() == 0
    tcp.connection.wait_for_room(tcp.now)
    tcp.frames.clear()
    tcp.gets(ACK, 1000, 9000 + 65536, window=0)
    tcp.quiet()
    for wait in (0.2, 0.4, 0.8, 1.6):
        tcp.passes(wait - 0.01)
        tcp.quiet()
        tcp.passes(0.01)
        tcp.sends(ACK, 9000 + 65535, 1000)
        tcp.gets(ACK, 1000, 9000 + 65536, window=0)
    tcp.passes(3.2)
    tcp.sends(ACK, 9000 + 65535, 1000)
    tcp.gets(ACK, 1000, 9000 + 65536, window=512)
    assert tcp.listener.events[-1] == "writable"
    tcp.send(b"more")
    tcp.sends(ACK, 9000 + 65536, 1000, b"more")
    tcp.gets(ACK, 1000, 9000 + 65540, window=512)
    tcp.passes(1000)
    tcp.quiet()


def test_the_user_finds_the_window_shut_long_after(tcp: Guest) -> None:
    tcp.gets(ACK, 1000, 9000, window=0)
    tcp.passes(100)
    tcp.quiet()
    assert tcp.connection.room() == 0
    tcp.connection.wait_for_room(tcp.now)
    tcp.passes(0.2)
    tcp.sends(ACK, 8999, 1000)


def test_a_shut_window_may_stay_shut_while_the_guest_answers(tcp: Guest) -> None:
    tcp.gets(ACK, 1000, 9000, window=0)
    assert not tcp.connection.room()
    tcp.connection.wait_for_room(tcp.now)
    for _ in range(100):
        tcp.passes(61)
        while tcp.frames:
            tcp.sends(ACK, 8999)
            tcp.now += 0.001
            tcp.gets(ACK, 1000, 9000, window=0)
    assert tcp.state() is State.ESTABLISHED


def test_a_guest_that_is_gone_with_its_window_shut(tcp: Guest) -> None:
    tcp.gets(ACK, 1000, 9000, window=0)
    assert not tcp.connection.room()
    tcp.connection.wait_for_room(tcp.now)
    tcp.passes(111)
    for _ in range(30):
        tcp.sends(ACK, 8999)
    tcp.sends(RST | ACK, 9000)
    assert tcp.listener.events[-1] is Closed.TIMED_OUT


def test_a_window_that_shuts_over_what_is_in_flight(tcp: Guest) -> None:
    """One byte of what it owes us, for as long as it answers."""
    tcp.send(b"hello")
    tcp.sends(ACK, 9000, 1000, b"hello")
    tcp.gets(ACK, 1000, 9000, window=0)
    for _ in range(30):
        tcp.passes(60)
        while tcp.frames:
            tcp.sends(ACK, 9000, 1000, b"h")
            tcp.now += 0.001
            tcp.gets(ACK, 1000, 9000, window=0)
    tcp.gets(ACK, 1000, 9001, window=512)
    tcp.sends(ACK, 9001, 1000, b"ello")


def test_a_window_smaller_than_what_was_sent(tcp: Guest) -> None:
    """It shrank: what fits is sent again, though it is less than a segment."""
    tcp.send(bytes(1000))
    tcp.frames.clear()
    tcp.gets(ACK, 1000, 9000, window=1)
    tcp.passes(0.2)
    tcp.sends(ACK, 9000, 1000, bytes(128))
    tcp.gets(ACK, 1000, 9128, window=1)
    tcp.sends(ACK, 9128, 1000, bytes(128))


def test_window_updates_come_from_the_newest_segment(tcp: Guest) -> None:
    tcp.gets(ACK, 1000, 9000, b"hello", window=300)
    tcp.gets(ACK, 999, 9000, b"xhello!", window=5)  # begins before the last one that counted
    assert tcp.connection.snd.wnd == 300 << 7
    tcp.gets(ACK, 1100, 9000, b"later", window=200)
    assert tcp.connection.snd.wnd == 200 << 7


# -- numbers wrap around ------------------------------------------------------------------------------


@pytest.mark.parametrize("before", range(12))
def test_wrap_around(family: int, before: int) -> None:
    """Both ends' numbers pass 2**32 within a segment, at its edges, and between segments."""
    ours, theirs = (1 << 32) - before, (1 << 32) - 11 + before
    guest = Guest(family, iss=(ours - 1) & 0xFFFFFFFF)
    guest.gets(SYN, theirs - 1, options=pack_options(1460, 7))
    guest.connection.accept(guest.now)
    guest.sends(SYN | ACK, ours - 1, theirs)
    guest.gets(ACK, theirs, ours, window=512)
    guest.gets(ACK, theirs + 6, ours, b"world", window=512)
    guest.sends(ACK, ours, theirs)
    guest.gets(ACK, theirs, ours, b"hello,", window=512)
    guest.sends(ACK, ours, theirs + 11)
    guest.send(b"hello")
    guest.sends(ACK, ours, theirs + 11, b"hello")
    guest.send(b"world")
    guest.sends(ACK, ours + 5, theirs + 11, b"world")
    guest.gets(ACK, theirs + 11, ours + 3, window=512)
    guest.passes(0.2)
    guest.sends(ACK, ours + 3, theirs + 11, b"lo")
    guest.sends(ACK, ours + 5, theirs + 11, b"world")
    guest.gets(ACK, theirs + 11, ours + 10, window=512)
    guest.shutdown()
    guest.sends(FIN | ACK, ours + 10, theirs + 11)
    guest.gets(FIN | ACK, theirs + 11, ours + 11)
    guest.sends(ACK, ours + 11, theirs + 12)
    assert guest.listener.bytes == b"hello,world"
    assert guest.listener.events[-2:] == ["end", Closed.NORMAL]


# -- super-segments -----------------------------------------------------------------------------------


def test_without_offloads_we_cut_to_the_mss(tcp: Guest) -> None:
    data = bytes(range(256)) * 20
    mss = tcp.connection.snd.mss
    tcp.send(data)
    at = 0
    while at < len(data):
        tcp.sends(ACK, 9000 + at, 1000, data[at : at + mss])
        at += mss
    tcp.quiet()


def test_with_offloads_one_frame_is_64_kib(family: int) -> None:
    guest = Guest(family, offloads=VNET).established(window=1024)
    burst = guest.connection.snd.burst
    data = bytes(range(256)) * 512
    guest.send(data)
    header = 54 if family == 4 else 74
    at = 0
    while at < len(data):
        head = virtio.parse(guest.frames[0])
        guest.sends(ACK, 9000 + at, 1000, data[at : at + burst])
        at += burst
        kind = virtio.GSO_TCPV4 if family == 4 else virtio.GSO_TCPV6
        assert head == (virtio.NEEDS_CSUM, kind, header, guest.connection.snd.mss, header - 20, 16)
    assert 64000 < burst <= 65535 - 60
    assert burst % guest.connection.snd.mss == 0
    guest.gets(ACK, 1000, 9000 + len(data), window=1024)
    guest.send(b"small")
    head = virtio.parse(guest.frames[0])
    guest.sends(ACK, data=b"small")
    assert head == (virtio.NEEDS_CSUM, virtio.GSO_NONE, 0, 0, header - 20, 16)


def test_a_super_segment_of_the_guest(family: int) -> None:
    guest = Guest(family, offloads=VNET).established()
    guest.gets(ACK, 1000, 9000, bytes(60000))
    guest.sends(ACK, 9000, 61000)
    assert len(guest.listener.bytes) == 60000


def test_two_connections_do_not_mix(tcp: Guest) -> None:
    first = tcp.connection
    other = b"\x12\x34" + PORTS[2:]
    tcp.gets(SYN, 4999, ports=other)
    tcp.connection.accept(tcp.now)
    tcp.gets(ACK, 5000, OUR_ISS + 1, b"second", ports=other)
    tcp.gets(ACK, 1000, 9000, b"first")
    assert [bytes(listener.bytes) for listener in tcp.users.listeners] == [b"first", b"second"]
    assert first is not tcp.connection


def test_the_user_aborts_while_it_is_given_data(tcp: Guest) -> None:
    """In order, in the readable path, and when it resumes."""
    listener = tcp.listener
    listener.room = 2
    listener.on["deliver"] = lambda: tcp.connection.abort(tcp.now)
    tcp.gets(ACK, 1000, 9000, b"hello")
    tcp.sends(RST | ACK, 9000, 1000)
    tcp.quiet()
    assert_holds_nothing(tcp)


def test_the_user_aborts_while_it_is_given_data_of_the_slow_kind(tcp: Guest) -> None:
    tcp.gets(ACK, 1002, 9000, b"later")
    tcp.frames.clear()
    tcp.listener.room = 1
    tcp.listener.on["deliver"] = lambda: tcp.connection.abort(tcp.now)
    tcp.gets(FIN | ACK, 1000, 9000, b"he")
    tcp.sends(RST | ACK, 9000, 1000)
    tcp.quiet()
    assert_holds_nothing(tcp)


def test_the_user_aborts_while_it_resumes(tcp: Guest) -> None:
    tcp.listener.room = 0
    tcp.gets(FIN | ACK, 1000, 9000, b"hello")
    tcp.listener.on["deliver"] = lambda: tcp.connection.abort(tcp.now)
    tcp.resume(2)
    tcp.sends(RST | ACK, 9000, 1000)
    tcp.quiet()
    assert_holds_nothing(tcp)


def test_the_user_aborts_when_there_is_room(tcp: Guest) -> None:
    tcp.send(bytes(65536))
    assert not tcp.connection.room()
    tcp.frames.clear()
    tcp.listener.on["writable"] = lambda: tcp.connection.abort(tcp.now)
    tcp.gets(ACK, 1000, 9000 + 65536, window=512)
    tcp.sends(RST | ACK, 9000 + 65536, 1000)
    tcp.quiet()
    assert_holds_nothing(tcp)


def test_a_closed_connection_takes_no_calls(tcp: Guest) -> None:
    connection = tcp.connection
    connection.abort(tcp.now)
    tcp.frames.clear()
    assert connection.room() == 0
    connection.wait_for_room(tcp.now)
    connection.resume(tcp.now)
    connection.shutdown(tcp.now)
    connection.abort(tcp.now)
    connection.accept(tcp.now)
    tcp.passes(10000)
    tcp.quiet()


def assert_holds_nothing(guest: Guest) -> None:
    connection = guest.connection
    assert connection.state is State.CLOSED
    assert not guest.stack.tcp
    assert [*connection.snd.queue, *connection.rcv.unread, *beyond(connection)] == []
    guest.passes(10000)
    guest.quiet()
