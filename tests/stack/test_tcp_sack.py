"""SACK (RFC 2018): what we tell the guest of what arrived beyond a hole, and what we make of what it tells us.

Probes for a loss (RFC 8985 7), which SACK makes worth sending, are here as well.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.stack import Closed, Limits
from netns_kit.stack.recovery import SACKED, Recovery
from netns_kit.stack.send_half import SendHalf
from netns_kit.stack.seq import add, distance
from netns_kit.stack.windows import Memory
from netns_kit.stack.wire import tcp as wire
from netns_kit.stack.wire import virtio
from netns_kit.stack.wire.tcp import ACK, FIN, RST, pack_options, pack_sack, parse_options
from tests.support.stack import VNET, Guest, Listener, key

WITH_SACK = pack_options(1460, 7, True)
MSS = 1000


@pytest.fixture
def tcp(family: int) -> Guest:
    """Established, SACK permitted by both ends."""
    return Guest(family).established(options=WITH_SACK)


def told(guest: Guest) -> list[tuple[int, int]]:
    """The blocks of the ACK that the stack has sent."""
    return list(parse_options(guest.sends(ACK).options).sack)


def sends_pieces(guest: Guest, count: int) -> None:
    for _ in range(count):
        guest.send(bytes(MSS))
    guest.frames.clear()


def acks(guest: Guest, ack: int, *blocks: tuple[int, int]) -> None:
    guest.gets(ACK, 1000, ack, window=512, options=pack_sack(blocks) if blocks else b"")


def resent(guest: Guest) -> list[int]:
    """The sequence numbers of the segments that the stack has sent."""
    numbers = []
    while guest.frames:
        numbers.append(wire.parse(guest.taken().packet.payload).seq)
    return numbers


def test_permitted_when_offered(family: int) -> None:
    for options, permitted in ((WITH_SACK, True), (pack_options(1460, 7), False)):
        guest = Guest(family).on_hold(options=options)
        guest.connection.accept(guest.now)
        assert parse_options(guest.taken().packet.payload[20:]).sack_permitted is permitted


def test_offered_when_we_connect(family: int) -> None:
    guest = Guest(family)
    guest.stack.connect_tcp(key(family), Listener(None), 0.0)  # type: ignore[arg-type]  # nothing is told
    assert parse_options(guest.taken().packet.payload[20:]).sack_permitted


# -- what we tell -------------------------------------------------------------------------------------


def test_the_most_recent_block_comes_first(tcp: Guest) -> None:
    tcp.gets(ACK, 1100, 9000, bytes(50))
    assert told(tcp) == [(1100, 1150)]
    tcp.gets(ACK, 1300, 9000, bytes(50))
    assert told(tcp) == [(1300, 1350), (1100, 1150)]
    tcp.gets(ACK, 1150, 9000, bytes(50))  # it continues the first
    assert told(tcp) == [(1100, 1200), (1300, 1350)]


def test_no_more_blocks_than_fit(tcp: Guest) -> None:
    for start in range(1100, 1700, 100):
        tcp.gets(ACK, start, 9000, b"x")
    for _ in range(5):
        tcp.taken()
    assert told(tcp) == [(1600, 1601), (1100, 1101), (1200, 1201), (1300, 1301)]


def test_a_super_segment_before_it_leaves_nothing_in_the_template(family: int) -> None:
    """The one behind it is as long as the ACK with SACK, which is no super-segment either."""
    guest = Guest(family, offloads=VNET).established(options=WITH_SACK)
    guest.send(bytes(3000))
    guest.gets(ACK, 1100, 9000, bytes(50))
    guest.send(bytes(12))
    sent = [guest.taken() for _ in range(3)]
    assert [len(each.packet.payload) for each in sent] == [3020, 32, 32]
    assert [each.virtio[1] != virtio.GSO_NONE for each in sent] == [True, False, False]


def test_what_is_acknowledged_is_told_no_more(tcp: Guest) -> None:
    tcp.gets(ACK, 1100, 9000, bytes(50))
    tcp.gets(ACK, 1300, 9000, bytes(50))
    tcp.frames.clear()
    tcp.gets(ACK, 1000, 9000, bytes(100))
    assert told(tcp) == [(1300, 1350)]
    assert tcp.connection.rcv.ack == 1150


def test_none_once_the_hole_is_filled(tcp: Guest) -> None:
    tcp.gets(ACK, 1100, 9000, bytes(50))
    tcp.frames.clear()
    tcp.gets(ACK, 1000, 9000, bytes(100))
    assert told(tcp) == []
    assert tcp.connection.rcv.ack == 1150


def test_a_hole_that_the_frames_at_hand_fill_is_not_told(tcp: Guest) -> None:
    """A guest on two processors sends its frames in the wrong order; no frame is to be sent again for that."""
    for seq in (1100, 1200, 1000):
        tcp.stack.receive(memoryview(tcp.segment(ACK, seq, 9000, bytes(100))), tcp.now)
    tcp.stack.flush()
    assert told(tcp) == []
    tcp.quiet()
    assert tcp.connection.rcv.ack == 1300


def test_the_frames_at_hand_are_told_at_once(tcp: Guest) -> None:
    for seq in (1100, 1300):
        tcp.stack.receive(memoryview(tcp.segment(ACK, seq, 9000, bytes(100))), tcp.now)
    tcp.stack.flush()
    assert told(tcp) == [(1300, 1400), (1100, 1200)]
    tcp.quiet()


def test_without_sack_each_frame_beyond_a_hole_is_told(family: int) -> None:
    """The guest counts them (RFC 5681 3.2)."""
    guest = Guest(family).established()
    for seq in (1100, 1200, 1300):
        guest.stack.receive(memoryview(guest.segment(ACK, seq, 9000, bytes(100))), guest.now)
    assert [told(guest) for _ in "123"] == [[], [], []]
    guest.quiet()


def test_a_guest_that_did_not_ask_is_not_told(family: int) -> None:
    guest = Guest(family).established()
    guest.gets(ACK, 1100, 9000, bytes(50))
    assert told(guest) == []


def test_a_fin_beyond_a_hole_has_a_number(tcp: Guest) -> None:
    tcp.gets(FIN | ACK, 1100, 9000)
    assert told(tcp) == [(1100, 1101)]
    tcp.gets(ACK, 1050, 9000, bytes(50))
    assert told(tcp) == [(1050, 1101)], "a block ends where something is missing (RFC 2018 4)"


# -- what we are told ---------------------------------------------------------------------------------


def test_every_hole_is_filled_at_once(tcp: Guest) -> None:
    """Six segments; the first, third and fifth are lost."""
    sends_pieces(tcp, 6)
    acks(tcp, 9000, (10000, 11000))
    acks(tcp, 9000, (12000, 13000), (10000, 11000))
    assert resent(tcp) == [], "twice is no loss yet"
    tcp.gets(ACK, 1000, 9000, window=512, options=pack_sack([(14000, 15000), (12000, 13000), (10000, 11000)]))
    assert resent(tcp) == [9000, 11000, 13000]
    acks(tcp, 10000 + 1000, (14000, 15000), (12000, 13000))
    assert resent(tcp) == [], "each of them once"
    acks(tcp, 15000)
    assert not tcp.connection.snd.queue
    assert tcp.connection.recovery is None


def test_the_tail_that_arrives_need_not_come_thrice(tcp: Guest) -> None:
    sends_pieces(tcp, 2)
    acks(tcp, 9000, (10000, 11000))
    assert resent(tcp) == [9000]


def test_news_of_more_holes_while_recovering(tcp: Guest) -> None:
    sends_pieces(tcp, 8)
    for end in (11000, 12000, 13000):
        acks(tcp, 9000, (10000, end))
    assert resent(tcp) == [9000]
    acks(tcp, 9000, (14000, 15000), (10000, 13000))
    assert resent(tcp) == [13000]


def test_what_was_sent_again_and_lost_again(tcp: Guest) -> None:
    """What is sent after it arrives: so it has been lost a second time."""
    sends_pieces(tcp, 4)
    for end in (11000, 12000, 13000):
        acks(tcp, 9000, (10000, end))
    assert resent(tcp) == [9000]
    sends_pieces(tcp, 1)
    acks(tcp, 9000, (10000, 14000))
    assert resent(tcp) == [9000]


def test_lies_are_not_believed(tcp: Guest) -> None:
    """Blocks of what was never sent, of what is acknowledged, upside down, and of the whole circle."""
    sends_pieces(tcp, 2)
    for block in ((11001, 12000), (8000, 9000), (9000, 9500), (10500, 10200), (9500, 9499), (10000, 11001)):
        acks(tcp, 9000, block)
        assert tcp.connection.recovery is None
    assert resent(tcp) == []


def test_after_a_timeout_what_arrived_is_not_sent_again(tcp: Guest) -> None:
    sends_pieces(tcp, 4)
    acks(tcp, 9000, (11000, 12000))
    tcp.passes(0.049)
    assert resent(tcp) == []
    tcp.passes(0.4)
    assert resent(tcp) == [9000, 10000, 9000, 10000, 9000], "two probes of the holes, then the timeout"
    acks(tcp, 10000, (11000, 12000))
    assert 11000 not in resent(tcp)
    acks(tcp, 13000)
    assert not tcp.connection.snd.queue


def test_a_guest_may_throw_away_what_it_had(tcp: Guest) -> None:
    """RFC 2018 8: after the second timeout nothing counts that is not acknowledged."""
    sends_pieces(tcp, 3)
    acks(tcp, 9000, (11000, 12000))
    tcp.passes(2)
    assert tcp.connection.recovery is not None
    assert not tcp.connection.recovery.sacked
    tcp.frames.clear()
    acks(tcp, 11000)
    assert resent(tcp) == [11000]


def test_nothing_is_left_to_send_again(tcp: Guest) -> None:
    """All behind the hole has arrived: after it there is no empty segment."""
    sends_pieces(tcp, 3)
    acks(tcp, 9000, (10000, 12000))
    tcp.frames.clear()
    tcp.passes(0.4)
    tcp.frames.clear()
    acks(tcp, 9500, (10000, 12000))
    while tcp.frames:
        assert tcp.taken().packet.payload[20:], "an empty segment"


def test_a_guest_that_never_offered_it_is_not_believed(family: int) -> None:
    guest = Guest(family).established()
    sends_pieces(guest, 6)
    for end in (11000, 12000, 13000, 14000, 15000):
        acks(guest, 9000, (10000, end))
    assert not (guest.connection.recovery and guest.connection.recovery.sacked)


# -- probes -------------------------------------------------------------------------------------------


def test_a_lost_tail_is_probed_for(tcp: Guest) -> None:
    sends_pieces(tcp, 3)
    tcp.passes(0.049)
    assert resent(tcp) == []
    tcp.passes(0.001)
    assert resent(tcp) == [11000], "the last one"
    acks(tcp, 9000, (11000, 12000))
    assert resent(tcp) == [9000, 10000]
    acks(tcp, 12000)
    tcp.passes(10)
    assert resent(tcp) == []


def test_a_lost_fin_is_probed_for(tcp: Guest) -> None:
    sends_pieces(tcp, 1)
    tcp.shutdown()
    tcp.frames.clear()
    tcp.passes(0.05)
    tcp.sends(FIN | ACK, 10000)


def test_probes_end_in_the_timeout(tcp: Guest) -> None:
    sends_pieces(tcp, 1)
    tcp.passes(200)
    numbers = resent(tcp)
    assert len(numbers) == 2 + 30 + 1
    assert tcp.listener.events[-1] is Closed.TIMED_OUT


def test_without_sack_a_probe_would_show_nothing(family: int) -> None:
    guest = Guest(family).established()
    sends_pieces(guest, 1)
    guest.passes(0.199)
    guest.quiet()


# -- the scoreboard -----------------------------------------------------------------------------------

BASE = 0xFFFFFFF0  # so that the numbers wrap around
spans = st.tuples(st.integers(-5, 70), st.integers(-5, 70))


@given(st.lists(st.lists(spans, max_size=4), max_size=8))
def test_the_scoreboard_is_the_union_of_what_was_told(reports: list[list[tuple[int, int]]]) -> None:
    """Of what lies in flight, lies left out."""
    recovery = Recovery(sending(64, BASE))
    known: set[int] = set()
    for report in reports:
        news = recovery.sack([(add(BASE, start), add(BASE, end)) for start, end in report])
        before = set(known)
        for start, end in report:
            if 0 < start < end <= 64:
                known |= set(range(start, end))
        assert news == (known != before)
        found = [(distance(BASE, start), distance(BASE, end)) for start, end in recovery.sacked]
        assert {number for start, end in found for number in range(start, end)} == known


def test_the_scoreboard_is_bounded() -> None:
    recovery = Recovery(sending(4 * SACKED, 0))
    recovery.sack([(number, number + 1) for number in range(1, 4 * SACKED, 2)])
    assert len(recovery.sacked) == SACKED
    assert list(recovery.sacked)[-1] == (4 * SACKED - 1, 4 * SACKED), "what is furthest is news"


def sending(size: int, iss: int) -> SendHalf:
    """So many bytes are in flight."""
    snd = SendHalf(iss, MSS, Limits(), Memory(1 << 20))
    snd.append(bytes(size))
    return snd


def test_reset_forgets_it_all(tcp: Guest) -> None:
    sends_pieces(tcp, 4)
    acks(tcp, 9000, (11000, 12000))
    tcp.gets(RST, 1000)
    assert tcp.stack.memory.held == 0
