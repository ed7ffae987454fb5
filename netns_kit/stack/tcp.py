"""TcpConnection: TCP between the guest and one user of ours (RFC 9293; section numbers without a name are its own).

The *guest* is the namespace's end of the connection.  The *user* (RFC 9293's word) is our end, usually a socket of
the host.  `ReceiveHalf` has the bytes that the user has not taken.  `SendHalf` has the bytes that the guest has not
acknowledged.  `Recovery` knows what is lost.  `TcpConnection` connects these parts, and it alone sends.

Promises.  A guest's SYN is answered when the user calls `TcpConnection.accept`, never earlier.  Until then the
connection is in SYN-HELD.  Only bytes that the user has taken are acknowledged.  The window begins at the
acknowledged number, and it never shrinks.  If the guest retransmits unread bytes, it is shown a window of zero.  Its
retransmissions then become window probes, so that it waits for as long as the user does.

Sending.  We read from the user only as much as the guest's window has room for, so everything that is queued is in
flight.  There is no congestion control: the link is a tap into a kernel on this machine, which drops nothing.

Timestamps (RFC 7323) are used if the guest offers them, and we offer them too.  They detect old segments (PAWS).  A
kernel also needs them to reuse the port of a connection in TIME-WAIT (tcp_tw_reuse).  Our values come from the
machine's clock, so that they continue the values of any other stack, worker or earlier run.  The clock is read when
the guest's timestamp has changed, at most 10 ms after the last time while we send, and before anything is sent again.

Urgent data (3.8.5) is handled as kernels do it: the urgent pointer points to the byte after the urgent one (RFC 6093
3.1), and only the latest urgent byte counts.

The timer.  When something is sent, the timer is set for the retransmission.  An ACK does not stop it.  When it
expires and everything has been acknowledged, it becomes the keepalive's.

Law of this file: no socket, no clock, no log.  `state` is set only in `_enter`.  Segments are sent only by `_emit`.
Time is an argument.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from . import seq as sequence
from .acks import AT_ONCE, MUCH, NOT_OWED, QUICK
from .receive_half import ReceiveHalf
from .recovery import Piece, Recovery
from .rto import CEILING
from .segments import SegmentWriter
from .send_half import SendHalf
from .seq import MASK, add, distance, less
from .states import (
    CLOSE_WAIT,
    CLOSED,
    CLOSING,
    ESTABLISHED,
    FIN_WAIT_1,
    FIN_WAIT_2,
    HALF_CLOSED,
    HANDSHAKE,
    LAST_ACK,
    RECEIVING,
    SENDING,
    SYN_HELD,
    SYN_RECEIVED,
    SYN_SENT,
    TIME_WAIT,
    Purpose,
    State,
)
from .user import Closed, Ending, IcmpError, Refusal, TcpUser
from .wire import common, icmp, tcp
from .wire.tcp import ACK, FIN, PSH, RST, SYN, URG, Segment

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable, Iterator

    from .acks import Acks
    from .limits import Limits
    from .link import Link
    from .time_wait import TimeWait
    from .timers import Timers
    from .windows import Memory

WINDOW_SCALE = 8  # of our window, which thus moves in steps of 256 bytes
PORT_UNREACHABLE = ((icmp.UNREACHABLE, icmp.PORT), (icmp.V6_UNREACHABLE, 4))  # types and codes
SYN_RETRIES = 7
SYN_CEILING = 32.0  # seconds between repetitions at most; all together take 64
RETRIES = 30  # they take 106 s with the timer's floor and ceiling; R2 of 3.8.3 is 100 s at least
TIMING_INTERVAL = 0.01  # seconds between two timed round trips, at least
LOSS_PROBES = 2  # probes before the timeout
PROMPT = 0.1  # seconds after which a handshake that is not over may be given up for others
PROBES = 5  # unanswered keepalive probes after which the guest has gone
PROBE_INTERVAL = 30.0
STAMP_VALID = 24 * 86400.0  # seconds of silence after which TS.Recent is outdated (RFC 7323 5.5)
KEEPALIVE = 0.9  # seconds of silence before a keepalive probe, at least; kernels count whole seconds
_CONTROL = SYN | FIN | RST | ACK | URG  # of these, an ordinary segment has only ACK


class Table(Protocol):
    """What a connection needs of the stack."""

    link: Link
    limits: Limits
    timers: Timers
    memory: Memory
    dropped: Counter[str]
    acks: Acks
    time_wait: TimeWait
    flow_ids: Iterator[int]

    def opened(self, connection: TcpConnection) -> None: ...

    def forget(self, connection: TcpConnection) -> None: ...

    def refuse(self, connection: TcpConnection, why: Refusal | IcmpError) -> None: ...

    def refused(self, connection: TcpConnection, why: Refusal | IcmpError) -> None: ...


class TcpConnection:
    """A connection.  `key` is guest address, other address, guest port, other port, as on the wire.

    `id` is a number that no other flow ever has.  `opened` is the time when the connection was made.  `inbound` tells
    whether a client outside has opened it.  `ttl` is the TTL of the guest's SYN, and `tos` the traffic class of the
    guest's segments.  `host` is the endpoint on the host, an address as text and a port; the user sets it.
    `ruling` is what the owner of the stack has decided about the connection; it is not set before.  `recovery` is
    None unless there is a loss.

    Four attributes are for the short way (`netns_kit.stack.wire.common`):

    - `frame_head` is the head of the guest's frames.
    - `head` is the offset and flags field of an ordinary segment: one with ACK, and with no options but timestamps.
    - `text_at` is the offset of the text in such a frame.
    - `stamp` is the beginning of its options: the kind of the timestamps, and TS.Recent.  It is empty if timestamps
      are not used.

    The user calls `accept`, `refuse`, `room`, `send`, `shutdown`, `resume` and `abort`.  The guest's segments arrive
    by `segment_arrives`, changes of its traffic class by `traffic_class`.  Time arrives by `handle_timer`.
    """

    __slots__ = (
        "_asked_at", "_idle_since", "_probes", "_quick", "_table", "_writer", "ack_at", "ack_is_listed", "ending",
        "frame_head", "head", "host", "id", "inbound", "key", "opened", "purpose", "rcv", "recovery", "ruling", "snd",
        "stamp", "state", "text_at", "timer_at", "timer_entry", "tos", "ttl", "user"
    )  # fmt: skip

    ending: Ending
    ruling: Any

    def __init__(self, table: Table, key: bytes, iss: int, state: State, mss: int) -> None:
        self._table = table
        self.key = key
        self.state = state
        self.user: TcpUser | None = None
        self.id = next(table.flow_ids)
        self.opened = 0.0
        self.inbound = state is SYN_SENT
        self.host: tuple[str, int] | None = None
        self.ttl, self.tos = 64, 0
        self.stamp = b""
        self._writer = SegmentWriter(table.link, key)
        self.head, self.text_at = common.PLAIN, common.TEXT_AT[self._writer.family.version]
        self.frame_head = b""
        limits, memory = table.limits, table.memory
        self.snd = SendHalf(iss, mss, limits, memory)
        self.rcv = ReceiveHalf(limits.tcp_receive, memory)
        self.recovery: Recovery | None = None
        self.purpose = Purpose.NONE
        self.timer_at = self.timer_entry = math.inf
        self.ack_at = NOT_OWED
        self.ack_is_listed = False
        self._quick = 0 if table.acks.delay else math.inf  # number of ACKs that are not delayed
        self._idle_since = 0.0
        self._probes = 0  # unanswered probes, the last one sent at `_asked_at`
        self._asked_at = -math.inf

    # -- opening ------------------------------------------------------------------------------------

    def syn_arrives(self, seg: Segment, now: float) -> None:
        """Handle the SYN that has made this connection, or that replaces its SYN (3.10.7.2).  `accept` will answer
        it.
        """
        snd = self.snd
        self._options(tcp.parse_options(seg.options), now)
        self.rcv.start(seg.seq, now)
        snd.wnd = snd.wnd_max = seg.window
        snd.wl1 = seg.seq
        self._idle_since = now
        self._arm(Purpose.PENDING, now + self._table.limits.tcp_pending_time)

    def connect(self, now: float) -> None:
        """Open the connection to the guest (3.10.1).  The SYN is sent, or waits for the guest's link address."""
        self.rcv.set_scale(WINDOW_SCALE)
        self.rcv.sack = True
        self._negotiate(self.snd.mss)
        self._open(SYN, now)

    def accept(self, now: float) -> None:
        """Answer the guest's SYN with SYN|ACK, since the user is ready."""
        if self.state is SYN_HELD:
            self._enter(SYN_RECEIVED)
            self._open(SYN | ACK, now)

    def refuse(self, why: Refusal | IcmpError) -> None:
        """End a connection on hold, and tell the guest why."""
        if self.state is SYN_HELD:
            self.user = None
            self._table.refuse(self, why)
            self._enter(CLOSED)

    def give_way(self, ending: Ending = "made room") -> None:
        """End a connection that nobody waits for, or whose place is needed.

        If its SYN is on hold it is forgotten, as if the SYN had been lost.  If it is half open it is reset.
        """
        if self.state is SYN_HELD:
            self.ending = ending
            self._close(Closed.TIMED_OUT)
        elif self.state is SYN_RECEIVED:
            self._give_up(ending)

    @property
    def is_on_hold(self) -> bool:
        """Whether the user has not decided about the guest's SYN yet."""
        return self.state is SYN_HELD

    def may_give_way(self, now: float) -> bool:
        """Return whether its place may be taken: its handshake is not over, and has had enough time."""
        return self.state in HANDSHAKE and now - self._idle_since >= PROMPT

    def unreachable(self, seq: int, why: IcmpError) -> None:
        """Handle an ICMP error of the guest about our SYN with that number, such as a REJECT of its firewall."""
        if self.state is SYN_SENT and seq == self.snd.iss:
            self._table.refused(self, why)
            is_of_port = (why.type, why.code) in PORT_UNREACHABLE
            self._close(Closed.RESET if is_of_port else Closed.UNREACHABLE)

    def too_big(self, seq: int, mtu: int, now: float) -> None:
        """Reduce the MSS, since a router behind the guest has dropped the segment with that number.

        What is in flight is sent again (RFC 1191 6.4, RFC 8201 5.4).  The report is ignored unless it is about
        something in flight (RFC 5927 7.2) and reduces the MSS, so that nobody can make us send again and again.
        """
        snd = self.snd
        if self.state is SYN_HELD or distance(snd.una, seq) >= snd.flight:
            return
        before = snd.mss
        snd.mss, snd.burst = self._writer.narrow(mtu)
        if snd.mss < before and self.state not in (SYN_SENT, SYN_RECEIVED):
            recovery = self._recovering()
            snd.timed = None
            snd.nxt = snd.una
            self._resume(recovery, now)

    # -- the user's calls ---------------------------------------------------------------------------

    def room(self) -> int:
        """Return how many bytes `send` takes now.  After 0, `TcpUser.writable` is called when there is room.

        Silly windows are avoided (3.8.6.2.1): while data is in flight, less than a segment does not count as room.
        """
        snd = self.snd
        flight = (snd.max - snd.una) & MASK
        memory, window = snd.memory, snd.wnd
        room = snd.burst if memory.held >= memory.limit else snd.limit
        if room > window:  # noqa: PLR1730 - a call to min() costs as much as all of this
            room = window
        room -= flight
        if (
            snd.nxt == snd.max
            and self.state in SENDING
            and (room >= snd.mss or (room > 0 and (room >= snd.wnd_max >> 1 or not flight)))
        ):
            return room
        snd.blocked = True
        return 0

    def send(self, data: bytes | memoryview, now: float) -> None:
        """Send at most `room` bytes.  They are kept until they are acknowledged.  A view must come from
        `Memory.take`.
        """
        snd = self.snd
        if snd.una == snd.max:
            at = now + snd.rto.first
            if at < self.timer_entry:
                self._table.timers.arm(self, at)
            self.purpose, self.timer_at = Purpose.RETRANSMIT, at
        seq = snd.append(data)
        if snd.timed is None and now - snd.timed_at >= TIMING_INTERVAL:
            snd.timed, snd.timed_at = snd.max, now
            if self.stamp:
                self._tick(now)
        if len(data) <= snd.burst and snd.urgent is None:
            self._emit(seq, ACK | PSH, data)
        else:
            self._segments(seq, data)

    def send_urgent(self, data: bytes, now: float) -> None:
        """Send `data`, whose last byte is urgent."""
        self.snd.urgent = add(self.snd.max, len(data))
        self.send(data, now)

    def wait_for_room(self, now: float) -> None:
        """Probe the window as long as it stays zero (3.8.6.1), since the user has data but `room` returned 0."""
        if self.state in SENDING and self.snd.una == self.snd.max and self.purpose is not Purpose.PERSIST:
            self._persist(now)

    def shutdown(self, now: float) -> None:
        """Send FIN (3.10.4), since the user has no more data.  Call it only after `TcpUser.established`."""
        if self.state is ESTABLISHED:
            self._enter(FIN_WAIT_1)
        elif self.state is CLOSE_WAIT:
            self._enter(LAST_ACK)
        else:
            return
        snd = self.snd
        if self.purpose is not Purpose.RETRANSMIT or snd.una == snd.max:
            self._arm(Purpose.RETRANSMIT, now + snd.rto.value)
        snd.fin = snd.max
        snd.max = add(snd.max, 1)
        if self.stamp:
            self._tick(now)
        if snd.nxt == snd.fin:
            snd.nxt = snd.max
            self._emit(snd.fin, FIN | ACK)

    def resume(self, now: float) -> None:
        """Deliver the unread bytes and acknowledge them, since the user can take more."""
        rcv, user = self.rcv, self.user
        unread = rcv.unread
        before = rcv.ack
        while unread and user is not None:
            size = len(unread[0])
            taken = self._deliver(user, memoryview(unread[0]))
            if not self._alive:
                return
            rcv.take(taken)
            if taken < size:
                break
        if rcv.over_limit:
            rcv.over_limit = False
            self._accept_out_of_order()
            if not self._alive:
                return
            self._owe_ack(MUCH)
        elif rcv.ack != before:
            self._owe_ack(MUCH)
        self._end_if_due(now)

    def abort(self, now: float, ending: Ending = "ended") -> None:
        """Reset the connection (3.10.5).  Queued data is dropped.  `ending` is what the watcher is told."""
        self.ending = ending
        if self.state in (SYN_RECEIVED, ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT):
            self._emit(self.snd.max, RST | ACK)
        elif self.state is SYN_HELD:
            self._table.refuse(self, Refusal.NET_UNREACHABLE)
        self.user = None
        self._enter(CLOSED)

    def traffic_class(self, tos: int) -> None:
        """Note a new traffic class of the guest's segments."""
        self.tos = tos
        if self.user is not None:
            self.user.traffic_class(tos)

    # -- the guest's segments -----------------------------------------------------------------------

    def segment_arrives(self, seg: Segment, now: float) -> None:
        """Handle any segment.

        If every check of 3.10.7.4 would pass and nothing special is going on, `in_order` handles it; if not,
        `_segment_arrives`, which has the text of the RFC.
        """
        if (
            seg.flags & _CONTROL != ACK
            or ((seg.options is not None or self.stamp) and not self._is_plain(seg, now))
            or not self.in_order(seg.seq, seg.ack, seg.window, seg.payload, now)
        ):
            self._segment_arrives(seg, now)

    def _is_plain(self, seg: Segment, now: float) -> bool:
        """Return whether a segment has no options but a timestamp that is not old, if timestamps are used."""
        if seg.options is None or not self.stamp:
            return False
        stamp = bytes(seg.options[: len(self.stamp)])
        plain = len(seg.options) == tcp.STAMP_SIZE
        return plain and (stamp == self.stamp or self.restamp(stamp, seg.seq, now))

    def restamp(self, stamp: bytes, seq: int, now: float) -> bool:
        """Handle the timestamp of a segment.  Return False if it has none or an old one.

        `stamp` are the first bytes of the segment's options, and `seq` is its sequence number.  TS.Recent is only
        updated by a segment that begins where our next ACK will end (RFC 7323 4.3), so that the first segment is
        echoed which that ACK is for.  Otherwise a forged segment with a new timestamp would make all following ones
        look old.
        """
        value = int.from_bytes(stamp[len(tcp.STAMP) :], "big")
        if not stamp.startswith(tcp.STAMP) or less(value, self._recent):
            return False
        if self.ack_at == NOT_OWED and seq == self.rcv.ack:
            self.stamp = stamp
            self._tick(now)
        return True

    @property
    def _recent(self) -> int:
        """TS.Recent: the last timestamp of the guest."""
        return int.from_bytes(self.stamp[len(tcp.STAMP) :], "big")

    def _tick(self, now: float) -> None:
        """Read our clock for the timestamps that are sent from now on."""
        self._writer.stamp(tcp.ticks(now), self._recent)

    def in_order(self, seq: int, ack: int, window: int, payload: memoryview, now: float) -> bool:
        """Handle an ordinary segment: with ACK, perhaps PSH, and no options but a valid timestamp.

        Return False if it is one for `segment_arrives`.
        """
        if self.state is not ESTABLISHED:
            return False
        rcv, snd = self.rcv, self.snd
        acked, flight = (ack - snd.una) & MASK, (snd.max - snd.una) & MASK
        size = len(payload)
        if not (
            seq == rcv.nxt == rcv.ack
            and self.recovery is None
            and rcv.out_of_order is None
            and rcv.urgent is None
            and size <= rcv.wnd
            and acked <= flight
            and (acked or size or not flight)
        ):
            return False
        self._idle_since = now
        snd.wl1 = seq
        snd.wnd = window = window << snd.scale
        if window > snd.wnd_max:  # noqa: PLR1730 - likewise
            snd.wnd_max = window
        if acked:
            snd.acknowledge(ack, now)
            if acked != flight:
                self._arm(Purpose.RETRANSMIT, now + snd.rto.first)
            elif snd.blocked:
                self._persist(now)
        if size and self.user is not None:
            taken = self.user.deliver(payload)
            if taken == size:
                rcv.nxt = rcv.ack = (seq + size) & MASK
            else:
                rcv.ack = (seq + taken) & MASK
                rcv.nxt = (rcv.ack + (rcv.hold(payload[taken:]) if self._alive else 0)) & MASK
            if rcv.over_limit:
                self._turn_away()
            elif taken and self.ack_at != AT_ONCE:
                self._owe_ack(taken)
            if now >= rcv.tuner.due:
                self._tune(now)
        if snd.blocked:
            self._unblock()
        return True

    def _segment_arrives(self, seg: Segment, now: float) -> None:
        """Handle a segment as 3.10.7.3 and 3.10.7.4 say, in their order."""
        if self.state is SYN_HELD:
            self._while_on_hold(seg, now)
        elif self.state is SYN_SENT:
            self._in_syn_sent(seg, now)
        elif (
            (not self.stamp or self._is_timely(seg, now))
            and self._sequence_ok(seg, now)
            and (not seg.flags & RST or self._not_reset(seg))
            and (not seg.flags & SYN or self._not_syn(seg))
            and self._ack_ok(seg, now)
        ):
            if self.state in RECEIVING:
                self._text(seg, now)
            if self.snd.blocked:
                self._unblock()

    def _while_on_hold(self, seg: Segment, now: float) -> None:
        """Handle a segment while the guest's SYN is on hold.

        If it is the same SYN, nothing is done: it will be answered.  If it is another SYN, the guest has given up the
        first one without a word, as kernels do, and begins again.  If it is RST, the guest has given up.
        """
        if seg.flags & RST:
            if seg.seq == self.rcv.nxt:
                self.ending = "reset by guest"
                self._close(Closed.RESET)
        elif seg.flags & (SYN | ACK) == SYN:
            self.syn_arrives(seg, now)

    def _in_syn_sent(self, seg: Segment, now: float) -> None:
        """Handle a segment that may answer our SYN (3.10.7.3)."""
        snd = self.snd
        ack_ok = bool(seg.flags & ACK) and seg.ack == snd.max
        if seg.flags & ACK and not ack_ok:
            if not seg.flags & RST:
                self._emit(seg.ack, RST)
        elif seg.flags & RST:
            if ack_ok:
                self._table.refused(self, Refusal.RESET)
                self._close(Closed.RESET)
        elif seg.flags & SYN:
            self._options(tcp.parse_options(seg.options), now)
            self.rcv.start(seg.seq, now)
            snd.wnd = snd.wnd_max = seg.window
            snd.wl1 = seg.seq
            self._idle_since = now
            if ack_ok:
                self._owe_ack(MUCH)
                self._establish(now)
            else:  # simultaneous open, 3.5 figure 7
                self._enter(SYN_RECEIVED)
                self._syn(SYN | ACK, now)

    def _is_timely(self, seg: Segment, now: float) -> bool:
        """Check the timestamp before everything else (RFC 7323 5.3, R1 to R3).  An old one shows an old duplicate.

        A segment without timestamp is dropped too (3.2): the guest's segments all have one.
        """
        if seg.flags & RST:
            return True
        stamp = tcp.parse_options(seg.options).stamp
        if stamp is None:
            self._table.dropped["tcp-no-timestamp"] += 1
            return False
        if now - self._idle_since > STAMP_VALID:
            self.stamp = tcp.pack_stamp(*stamp)[: len(self.stamp)]
        if not self.restamp(tcp.pack_stamp(*stamp)[: len(self.stamp)], seg.seq, now):
            self._table.dropped["tcp-old-timestamp"] += 1
            self._emit(self.snd.nxt, ACK)
            return False
        return True

    def _sequence_ok(self, seg: Segment, now: float) -> bool:
        """Check the sequence number (first)."""
        rcv = self.rcv
        window = (rcv.wnd - distance(rcv.ack, rcv.nxt)) & MASK
        if (seg.seq == rcv.nxt and window) or sequence.acceptable(seg.seq, seg.length, rcv.nxt, window):
            return True
        if seg.flags & RST or not seg.length:
            # the guest takes our ACK for RCV.NXT: our window begins there for it, and a segment that opens its own
            # window has that number while ours is zero
            if sequence.in_window(seg.seq, rcv.ack, distance(rcv.ack, rcv.nxt)):
                return True
            if seg.flags & RST:
                return False
        if self.state is SYN_RECEIVED and seg.flags & SYN:
            if not seg.flags & ACK:
                self._syn(SYN | ACK, now)  # our SYN|ACK was lost
            elif self._ack_ok(seg, now) and self._alive:
                self._owe_ack(MUCH)  # simultaneous open, 3.5 figure 7
        else:
            self._ack_at_once()
            if seg.seq == add(rcv.nxt, -1) and seg.length <= 1 and rcv.ack == rcv.nxt:
                self._is_kept_alive(now)
            # its ACK still counts: a guest that probes may send nothing else
            if seg.flags & ACK and 0 < distance(self.snd.una, seg.ack) <= self.snd.flight:
                self._ack_ok(seg, now)
                if self.snd.blocked:
                    self._unblock()
        return False

    def _turn_away(self) -> None:
        """Show a window of zero, since memory is full.  The guest keeps its bytes, and probes the window."""
        self._table.dropped["limit-tcp-memory"] += 1
        self._emit(self.snd.nxt, ACK, window=0)

    def _is_kept_alive(self, now: float) -> None:
        """Pass a keepalive probe on to the user (3.8.4).

        A segment is one if the connection was silent for longer than retransmissions wait.
        """
        idle = now - self._idle_since
        if idle >= KEEPALIVE and self.snd.una == self.snd.max and self.user is not None:
            self._idle_since = now
            self.user.keepalive(idle)

    def _ack_at_once(self) -> None:
        """Acknowledge a segment that had arrived before.  If it is unread, the guest is told to wait."""
        rcv = self.rcv
        self._emit(self.snd.nxt, ACK, window=0 if rcv.ack != rcv.nxt else None)

    def _not_reset(self, seg: Segment) -> bool:
        """Handle a RST as RFC 5961 3.2 says (second).  Return False: the segment is done with."""
        if seg.seq in (self.rcv.nxt, self.rcv.ack):
            self.ending = "reset by guest"
            self._close(Closed.RESET)
        else:
            self._emit(self.snd.nxt, ACK)  # a challenge
        return False

    def _not_syn(self, seg: Segment) -> bool:
        """Handle a SYN as RFC 5961 4.2 says (fourth).  Return False: the segment is done with."""
        self._emit(self.snd.nxt, ACK)
        return False

    def _ack_ok(self, seg: Segment, now: float) -> bool:
        """Check the ACK field (fifth)."""
        snd = self.snd
        if not seg.flags & ACK:
            return False
        acked, flight = (seg.ack - snd.una) & MASK, snd.flight
        if self.state is SYN_RECEIVED:
            if not 0 < acked <= flight:
                self._emit(seg.ack, RST)
                return False
            snd.wnd = snd.wnd_max = seg.window << (0 if seg.flags & SYN else snd.scale)
            self._idle_since = now
            self._establish(now)
            return self._alive
        if acked > flight and less(snd.una, seg.ack):  # something never sent
            self._emit(snd.nxt, ACK)
            return False
        self._idle_since = now
        if acked > flight:
            return True  # an old ACK: only the text is of interest
        if acked:
            if self.recovery is None:
                snd.acknowledge(seg.ack, now)
            else:
                self._repaired(self.recovery, seg, now)
            self._acknowledged(now)
        if self._is_told(seg) or self._is_duplicate(seg, acked, flight):
            self._pieces(self._recovering().duplicate())
        if not less(seg.seq, snd.wl1):
            snd.wnd = seg.window << snd.scale
            snd.wnd_max = max(snd.wnd_max, snd.wnd)
            snd.wl1 = self.rcv.ack if less(self.rcv.ack, seg.seq) else seg.seq
        if self.recovery is not None:
            if snd.nxt != snd.max:
                self._resume(self.recovery, now)
            if self.recovery.is_over:
                self.recovery = None
        return snd.fin is None or self._fin_acknowledged(now)

    def _repaired(self, recovery: Recovery, seg: Segment, now: float) -> None:
        """Handle an ACK of something new while there is a loss."""
        partial = recovery.is_partial(seg.ack)
        if self.snd.timed is None and self.stamp and recovery.may_be_timed(seg.ack):
            self._time_by_stamp(seg, now)
        recovery.acknowledge(seg.ack, now)
        if partial and not self.rcv.sack:
            self._pieces(recovery.first())  # RFC 6582: the next hole

    def _time_by_stamp(self, seg: Segment, now: float) -> None:
        """Time the round trip by the echoed timestamp.  What was sent again has no other timing (RFC 7323 4.1)."""
        stamp = tcp.parse_options(seg.options).stamp
        if stamp is not None and stamp[1]:
            ticks = distance(stamp[1], tcp.ticks(now))
            if ticks < CEILING * tcp.TICKS:
                self.snd.rto.sample(max(ticks, 1) / tcp.TICKS, now)

    def _is_told(self, seg: Segment) -> bool:
        """Return whether SACK reports something new."""
        snd = self.snd
        if seg.options is None or not self.rcv.sack or snd.una == snd.max:
            return False
        blocks = tcp.parse_options(seg.options).sack
        return bool(blocks) and self._recovering().sack(blocks)

    def _is_duplicate(self, seg: Segment, acked: int, flight: int) -> bool:
        """Return whether a segment is a duplicate ACK (RFC 5681 section 2).

        With SACK no segment counts as one: the blocks report more precisely what is missing (RFC 6675 section 2).
        """
        snd = self.snd
        return (
            not acked
            and flight > 0
            and not self.rcv.sack
            and not seg.payload
            and not seg.flags & FIN
            and snd.wnd == seg.window << snd.scale
        )

    def _fin_acknowledged(self, now: float) -> bool:
        """Change the state if our FIN is acknowledged.  Return whether the connection goes on."""
        snd = self.snd
        if snd.una == snd.max:
            if self.state is FIN_WAIT_1:
                self._enter(FIN_WAIT_2)
                self._keepalive(now)
            elif self.state is CLOSING:
                self._time_wait(now)
            elif self.state is LAST_ACK:
                self._close(Closed.NORMAL)
                return False
        return True

    def _text(self, seg: Segment, now: float) -> None:
        """Handle the text and the FIN bit of a segment (seventh and eighth)."""
        rcv = self.rcv
        data, seq, fin = seg.payload, seg.seq, bool(seg.flags & FIN)
        if not data and not fin:
            return
        if seg.flags & URG and seg.urgent:  # sixth; urgent data is handled on delivery
            rcv.set_urgent_pointer(add(seq, seg.urgent - 1))
        edge = distance(rcv.nxt, add(rcv.ack, rcv.wnd))
        if seq != rcv.nxt and less(rcv.nxt, seq):
            keep = data[: max(edge - distance(rcv.nxt, seq), 0)]
            limit = self._table.limits.tcp_out_of_order
            if rcv.keep(seq, keep, fin and len(keep) == len(data), limit):
                self._report_hole()
                return
            full = rcv.memory.full
            self._table.dropped["limit-tcp-memory" if full else "limit-tcp-out-of-order"] += 1
            self._emit(self.snd.nxt, ACK)  # a duplicate ACK; nothing of the text may be there to be reported
            return
        again = seq != rcv.nxt or rcv.fin
        self._accept_text(seq, data, fin, edge)
        if rcv.out_of_order is not None:
            self._accept_out_of_order()
        if not self._alive:
            return
        if data and now >= rcv.tuner.due:
            self._tune(now)
        if rcv.over_limit:
            self._turn_away()
        elif again:
            self._ack_at_once()
        elif rcv.out_of_order is not None:
            self._report_hole()
        self._end_if_due(now)

    def _accept_out_of_order(self) -> None:
        """Accept the out-of-order text that is now in order."""
        rcv = self.rcv
        while not rcv.over_limit and (piece := rcv.next_piece()) is not None:
            self._accept_text(*piece, distance(rcv.nxt, add(rcv.ack, rcv.wnd)))

    def _accept_text(self, seq: int, data: memoryview, fin: bool, edge: int) -> None:
        """Accept the part of a text that is new and within the window.  It begins at or before RCV.NXT."""
        rcv = self.rcv
        old = distance(seq, rcv.nxt)
        if old > len(data) or rcv.fin:
            return
        fresh = data[old : old + edge]
        fin = fin and old + len(fresh) == len(data)
        taken = 0
        if fresh and not rcv.unread and self.user is not None:
            taken = self._deliver(self.user, fresh)
        if not self._alive:
            return
        rcv.ack = add(rcv.ack, taken)
        kept = rcv.hold(fresh[taken:]) if taken < len(fresh) else 0
        rcv.nxt = add(rcv.nxt, taken + kept)
        if taken:
            self._owe_ack(taken)
        rcv.fin = fin and taken + kept == len(fresh)

    def _deliver(self, user: TcpUser, data: memoryview) -> int:
        """Deliver bytes from RCV.ACK on to the user.  An urgent byte among them is delivered as such."""
        rcv = self.rcv
        if rcv.urgent is None:
            return user.deliver(data)
        before = distance(rcv.ack, rcv.urgent)
        if before >= len(data):
            if less(rcv.urgent, rcv.ack):
                rcv.urgent = None
            return user.deliver(data)
        taken = user.deliver(data[:before]) if before else 0
        if taken == before and self._alive and user.urgent(data[before : before + 1]):
            rcv.urgent = None
            taken += 1
            if taken < len(data) and self._alive:
                taken += user.deliver(data[taken:])
        return taken

    def _end_if_due(self, now: float) -> None:
        """Handle the guest's FIN, once all bytes before it have been taken."""
        rcv = self.rcv
        if not rcv.fin or rcv.unread or self.state not in RECEIVING:
            return
        rcv.nxt = rcv.ack = add(rcv.nxt, 1)
        self._owe_ack(0)  # our FIN may carry it
        if self.state is ESTABLISHED:
            self._enter(CLOSE_WAIT)
            if self.purpose is Purpose.KEEPALIVE:
                self._keepalive(now)  # the time is shorter when half-closed
        elif self.state is FIN_WAIT_1:  # the FINs have crossed
            self._enter(CLOSING)
        if self.user is not None:
            self.user.end()
        if self.state is FIN_WAIT_2:
            self._time_wait(now)

    # -- acknowledging and sending ------------------------------------------------------------------

    def _owe_ack(self, size: int) -> None:
        """Owe an ACK for `size` bytes that have just arrived: see `netns_kit.stack.acks`."""
        if size >= MUCH or self._quick:
            if size < MUCH:
                self._quick -= 1
            if self.ack_at != AT_ONCE:
                self.ack_at = AT_ONCE
                self._table.acks.at_once.append(self)
        elif self.ack_at == NOT_OWED:
            acks = self._table.acks
            self.ack_at = self._idle_since + acks.delay
            if not self.ack_is_listed:
                acks.wait(self)

    def _report_hole(self) -> None:
        """Owe an ACK that reports what has arrived beyond a hole (RFC 5681 4.2).

        With SACK it is sent when the device has been read once more, since one ACK reports all.  Often the hole is
        filled by then: a guest on two processors, behind a pair of veth, sends frames in the wrong order.  Without
        SACK the guest counts duplicate ACKs.
        """
        if self.rcv.sack:
            self._table.acks.report_later(self)
        else:
            self._emit(self.snd.nxt, ACK)

    def report_hole(self) -> None:
        """Send the ACK that reports a hole, if there is one still."""
        if self.rcv.out_of_order is not None:
            self.send_ack()

    def send_ack(self) -> None:
        """Send the ACK that is owed."""
        if self.state is not CLOSED:
            self._emit(self.snd.nxt, ACK)

    def ack_is_overdue(self) -> None:
        """Send the ACK, which no segment has carried.  The next ones are not delayed."""
        self._quick = QUICK
        self.send_ack()

    def _acknowledged(self, now: float) -> None:
        """Set the timer again, since the guest has acknowledged something."""
        snd = self.snd
        if snd.una != snd.max:
            self._arm(Purpose.RETRANSMIT, now + snd.rto.first)
        elif snd.blocked and self.state in SENDING:  # the window may be zero
            self._persist(now)

    def _recovering(self) -> Recovery:
        """Return the `Recovery`, which begins now if this is the first sign of a loss."""
        if self.recovery is None:
            self.recovery = Recovery(self.snd)
        return self.recovery

    def _pieces(self, pieces: Iterable[Piece]) -> None:
        """Send the pieces that a `Recovery` has chosen."""
        for seq, data in pieces:
            if data is None:
                self._emit(seq, FIN | ACK)
            else:
                self._segments(seq, data)

    def _unblock(self) -> None:
        """Tell the user, which waits for room, if there is room."""
        snd = self.snd
        snd.blocked = False
        if self.user is not None and self.room():
            self.user.writable()

    def _resume(self, recovery: Recovery, now: float) -> None:
        """Send what follows SND.NXT, as far as the window and the recovery allow."""
        snd = self.snd
        if self.stamp:
            self._tick(now)
        self._pieces(recovery.resume_from_nxt())
        if self.purpose is not Purpose.RETRANSMIT and snd.una != snd.max:
            self._arm(Purpose.RETRANSMIT, now + snd.rto.value)

    def _segments(self, seq: int, data: bytes | memoryview) -> None:
        """Send `data` as one super-segment, or cut to the MSS if the link takes no super-segments."""
        size = len(data)
        # the pieces of a super-segment would all have the urgent pointer
        step = self.snd.burst if self.snd.urgent is None else self.snd.mss
        if size <= step:
            self._emit(seq, ACK | PSH, data)
            return
        view = memoryview(data)
        for start in range(0, size, step):
            flags = ACK | PSH if start + step >= size else ACK
            self._emit(add(seq, start), flags, view[start : start + step])

    def _emit(
        self, seq: int, flags: int, payload: bytes | memoryview = b"", *, window: int | None = None
    ) -> None:
        """Send a segment.  Nothing else sends.  `window` is the value of the field, by default RCV.WND."""
        rcv = self.rcv
        if window is None:
            window = rcv.field
        self.ack_at = NOT_OWED
        if rcv.out_of_order is not None and rcv.sack and flags == ACK and not payload:
            self._writer.write_sack(seq, rcv.ack, window, rcv.out_of_order.blocks())
            return
        urgent = 0
        if self.snd.urgent is not None and 0 < distance(seq, self.snd.urgent) <= 0xFFFF:
            urgent = distance(seq, self.snd.urgent)
            flags |= URG
        self._writer.write(seq, rcv.ack if flags & ACK else 0, flags, window, payload, urgent)

    def _open(self, flags: int, now: float) -> None:
        """Send SYN or SYN|ACK for the first time.  It occupies one sequence number."""
        snd = self.snd
        snd.nxt = snd.max = snd.timed = add(snd.iss, 1)
        snd.timed_at = now
        snd.tuner.begin(snd.iss, now)
        self._arm(Purpose.RETRANSMIT, now + snd.rto.value)
        self._syn(flags, now)

    def _syn(self, flags: int, now: float) -> None:
        """Send SYN or SYN|ACK.  Its window is never scaled."""
        rcv = self.rcv
        stamp = None
        if self.stamp or flags == SYN:
            stamp = tcp.ticks(now), self._recent if flags & ACK else 0
        scale = WINDOW_SCALE if rcv.scale or flags == SYN else None
        ack, window = rcv.ack if flags & ACK else 0, min(rcv.wnd, 0xFFFF)
        self._writer.write_syn(
            self.snd.iss, ack, flags, window, scale=scale, sack_permitted=rcv.sack, stamp=stamp
        )

    # -- options, timers, states --------------------------------------------------------------------

    def _options(self, offered: tcp.Options, now: float) -> None:
        """Handle the options of the guest's SYN.

        Window scaling, SACK and timestamps are used if both ends offer them (RFC 7323 2.2, 3.2; RFC 2018).
        """
        if self.stamp or offered.stamp is not None:
            self._speak_timestamps(offered.stamp, now)
        if offered.scale is not None:
            self.snd.scale = offered.scale
            self.rcv.set_scale(WINDOW_SCALE)
        else:
            self.rcv.set_scale(0)
        self.rcv.sack = self.snd.rto.probing = offered.sack_permitted
        self._negotiate(offered.mss or self._writer.family.default_mss)

    def _speak_timestamps(self, offered: tuple[int, int] | None, now: float) -> None:
        """Begin to use timestamps, with the guest's first one; or do not use them, if it is None."""
        self._writer.speak_timestamps(offered is not None)
        self.stamp = b"" if offered is None else tcp.pack_stamp(*offered)[: -len(tcp.STAMP)]
        self.head, self.text_at = common.PLAIN, common.TEXT_AT[self._writer.family.version]
        if self.stamp:
            self.head, self.text_at = common.STAMPED, self.text_at + tcp.STAMP_SIZE
            self._tick(now)

    def _tune(self, now: float) -> None:
        """Let the receive window grow with the path.  Without scaling it must fit into the field."""
        most = self._table.limits.tcp_receive_max if self.rcv.scale else 0xFFFF
        self.rcv.tune(now, self.snd.rto.smallest, most)

    def _negotiate(self, mss: int) -> None:
        """Limit the MSS to what the guest takes."""
        self.snd.mss, self.snd.burst = self._writer.limit(mss)

    def _establish(self, now: float) -> None:
        """Enter ESTABLISHED, since our SYN is acknowledged."""
        snd = self.snd
        if self.recovery is None:
            snd.acknowledge(snd.max, now)
        else:  # our SYN was lost
            self.recovery.acknowledge(snd.max, now)
            self.recovery = None
        self._enter(ESTABLISHED)
        self._keepalive(now)
        if self.user is not None:
            self.user.established()

    def _enter(self, state: State) -> None:
        """Change the state.  Nothing else sets `state`."""
        if self.state in HANDSHAKE and state not in HANDSHAKE:
            self._table.opened(self)
        self.state = state
        if state is CLOSED or state is TIME_WAIT:
            self.purpose, self.timer_at = Purpose.NONE, math.inf
            self.recovery = None
            self.snd.clear()
            self.rcv.clear()
            self._table.forget(self)

    def _close(self, why: Closed) -> None:
        """End the connection, and tell the user."""
        user, self.user = self.user, None
        self._enter(CLOSED)
        if user is not None:
            user.closed(why)

    def _time_wait(self, now: float) -> None:
        """End the connection, since both ends have closed.  A record in `TimeWait` acknowledges a repeated FIN."""
        self._enter(TIME_WAIT)
        self._table.time_wait.add(self.key, self.snd.nxt, self.rcv.nxt, self.stamp, now)
        user, self.user = self.user, None
        if user is not None:
            user.closed(Closed.NORMAL)

    def _arm(self, purpose: Purpose, at: float) -> None:
        """Set the timer."""
        self.purpose = purpose
        if at < self.timer_entry:
            self._table.timers.arm(self, at)
        else:
            self.timer_at = at

    def _persist(self, now: float) -> None:
        """Probe a window of zero while the user waits, because the segment that opens the window may get lost."""
        self._arm(Purpose.PERSIST, now + self.snd.rto.value)

    def _keepalive(self, now: float) -> None:
        """Probe the guest after a long silence, so that a connection to a guest which has gone ends."""
        self._arm(Purpose.KEEPALIVE, now + self._idle_time)

    @property
    def carried(self) -> tuple[int, int]:
        """Numbers of bytes that the user has taken, and that the guest has acknowledged."""
        rcv, snd = self.rcv, self.snd
        taken, acknowledged = rcv.tuner.crossed(rcv.ack), snd.tuner.crossed(snd.una)
        if rcv.fin and rcv.ack == rcv.nxt:
            taken -= 1
        if acknowledged:  # our SYN does not count
            acknowledged -= 1 + (snd.fin is not None and snd.una == snd.max)
        return max(taken, 0), acknowledged

    @property
    def _alive(self) -> bool:
        """Whether the user has not aborted the connection.  It must be checked after each call of the user."""
        return self.state is not CLOSED

    @property
    def _idle_time(self) -> float:
        """Seconds that the guest may be silent before it is probed."""
        limits = self._table.limits
        return limits.tcp_half_closed if self.state in HALF_CLOSED else limits.tcp_idle

    def handle_timer(self, now: float) -> None:
        """Do what the timer was set for."""
        purpose, self.purpose = self.purpose, Purpose.NONE
        if self.stamp:
            self._tick(now)
        if purpose is Purpose.RETRANSMIT and self.snd.una != self.snd.max:
            self._retransmission_timeout(now)
        elif purpose is Purpose.PERSIST:
            self._persist_timeout(now)
        elif purpose is Purpose.KEEPALIVE or purpose is Purpose.RETRANSMIT:
            self._keepalive_timeout(now)
        elif purpose is Purpose.PENDING:
            self.give_way("timed out")

    def _retransmission_timeout(self, now: float) -> None:
        """Probe for a loss, or send again what is not acknowledged (RFC 6298 (5.4) to (5.7))."""
        snd, recovery = self.snd, self._recovering()
        opening = self.state is SYN_SENT or self.state is SYN_RECEIVED
        if (
            snd.rto.probing
            and recovery.probes < LOSS_PROBES
            and snd.wnd
            and snd.nxt == snd.max
            and not opening
        ):
            self._pieces(recovery.probe())
            self._arm(Purpose.RETRANSMIT, now + min(snd.rto.first * 2**recovery.probes, snd.rto.value))
            return
        # 3.8.6.1: a window may stay zero for as long as the guest answers
        recovery.retries = recovery.retries + 1 if snd.wnd or opening else self._unanswered(now)
        if recovery.retries > (SYN_RETRIES if opening else RETRIES):
            self._give_up()
            return
        snd.rto.back_off(SYN_CEILING if opening else CEILING)
        snd.timed = None
        if opening:
            self._syn(SYN if self.state is SYN_SENT else SYN | ACK, now)
            self._arm(Purpose.RETRANSMIT, now + snd.rto.value)
            return
        recovery.go_back()
        if snd.wnd:
            self._resume(recovery, now)
        elif snd.una != snd.fin:
            self._emit(snd.una, ACK, snd.at(snd.una)[:1])  # its window is zero: one byte as a probe
        else:
            self._emit(snd.una, FIN | ACK)
        self._arm(Purpose.RETRANSMIT, now + snd.rto.value)

    def _persist_timeout(self, now: float) -> None:
        """Send an old sequence number; the guest must answer with an ACK that shows its window (3.8.6.1)."""
        snd = self.snd
        if not snd.blocked or self.state not in SENDING:
            self._keepalive(now)
        elif self._unanswered(now) > RETRIES:
            self._give_up()
        else:
            self._emit(add(snd.nxt, -1), ACK)
            snd.rto.back_off()
            self._arm(Purpose.PERSIST, now + snd.rto.value)

    def _keepalive_timeout(self, now: float) -> None:
        """Probe a guest that has been silent for long, or give up one that does not answer (3.8.4)."""
        due = self._idle_since + self._idle_time
        if due > now:
            self._arm(Purpose.KEEPALIVE, due)
        elif self._unanswered(now) > PROBES:
            self._give_up()
        else:
            self._emit(add(self.snd.nxt, -1), ACK)
            self._arm(Purpose.KEEPALIVE, now + PROBE_INTERVAL)

    def _unanswered(self, now: float) -> int:
        """Return the number of unanswered probes in a row, counting the one that is about to be sent."""
        self._probes = self._probes + 1 if self._idle_since < self._asked_at else 1
        self._asked_at = now
        return self._probes

    def _give_up(self, ending: Ending = "timed out") -> None:
        """End the connection, since the guest has not answered for too long."""
        self.ending = ending
        if self.state is SYN_SENT:
            self._table.refused(self, Refusal.DROP)
        else:
            self._emit(self.snd.max, RST | ACK)
        self._close(Closed.TIMED_OUT)
