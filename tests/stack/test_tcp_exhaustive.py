"""Every (state, segment) pair, random sequences of everything, and the fast path beside the readable one."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from netns_kit.stack import Limits, State, TcpConnection
from netns_kit.stack.seq import less
from netns_kit.stack.wire import ip
from netns_kit.stack.wire import tcp as wire
from netns_kit.stack.wire.tcp import ACK, FIN, RST, SYN
from tests.support.stack import VNET, Guest, beyond, take_apart

LIMITS = Limits(tcp_receive=4096, tcp_send=8192, tcp_out_of_order=4)
FLAGS = [
    ack | flags for ack in (0, ACK) for flags in (0, FIN, SYN, RST, SYN | FIN, RST | SYN, RST | FIN, 0xEF)
]
# around every edge: before, at, and behind what is expected; the far edge; far away
SEQS = [997, 998, 999, 1000, 1001, 1005, 1000 + 4096, 1000 + 4097, 0, 0x80000000 + 1000]
ACKS = [8998, 8999, 9000, 9001, 9002, 9010, 0x80000000 + 9000]


def sent(guest: Guest) -> list[wire.Segment]:
    packets = [take_apart(data, guest.vnet).packet for data in guest.frames]
    found = [wire.parse(packet.payload) for packet in packets if packet.protocol == ip.TCP]
    guest.frames.clear()
    return found


def check(guest: Guest, connection: TcpConnection) -> None:
    """What holds whatever happens."""
    snd, rcv = connection.snd, connection.rcv
    held = sum(len(data) for data in rcv.unread)
    kept = sum(len(run) for _, run in beyond(connection))
    if connection.state in (State.CLOSED, State.TIME_WAIT):
        assert guest.stack.tcp.get(connection.key) is not connection
        assert [*snd.queue, *rcv.unread, *beyond(connection)] == []
        assert connection.user is None
        assert connection.timer_at == float("inf")
        return
    assert guest.stack.tcp[connection.key] is connection
    assert not less(snd.nxt, snd.una)
    assert not less(snd.max, snd.nxt)
    assert not less(rcv.nxt, rcv.ack)
    assert (rcv.nxt - rcv.ack) % (1 << 32) == held
    assert held + kept <= rcv.wnd
    assert len(beyond(connection)) <= LIMITS.tcp_out_of_order
    for (start, run), (following, _) in pairwise(beyond(connection)):
        assert not less(following, (start + len(run)) % (1 << 32))
    assert not less(rcv.nxt, snd.wl1)
    flight = (snd.max - snd.una) % (1 << 32)
    if snd.queue:
        assert not less(snd.una, snd.queue[0][0])
        for (start, data), (following, _) in zip(snd.queue, list(snd.queue)[1:], strict=False):
            assert (start + len(data)) % (1 << 32) == following
    assert flight <= LIMITS.tcp_send + 1
    if connection.state is not State.SYN_HELD:
        assert connection.timer_at < float("inf"), "nobody will ever look after it"


@pytest.mark.parametrize(
    ("state", "in_flight"),
    [*((state, False) for state in State), (State.ESTABLISHED, True), (State.CLOSE_WAIT, True)],
)
def test_every_segment_in_every_state(state: State, in_flight: bool) -> None:
    for flags, seq, ack, data, window in product(FLAGS, SEQS, ACKS, (b"", b"hello"), (0, 100)):
        guest = Guest(limits=LIMITS).into(state)
        connection = guest.connection
        if in_flight:
            guest.send(b"in flight")
            guest.frames.clear()
        was_in_table = bool(guest.stack.tcp)
        guest.gets(flags, seq, ack, data, window=window)
        replies = sent(guest)
        if flags & RST:
            assert not any(reply.flags & (RST | SYN | FIN) for reply in replies)
            assert len(replies) <= 1  # a challenge at most
            if not was_in_table:
                assert not replies
        check(guest, connection)
        assert len(replies) <= 2
        guest.passes(0.3)  # and its timers
        check(guest, connection)


@pytest.mark.parametrize("state", State)
def test_every_call_of_the_user_in_every_state(state: State) -> None:
    calls = ("room", "shutdown", "resume", "accept", "abort", "wait_for_room")
    for names in product(calls, repeat=3):
        guest = Guest(limits=LIMITS).into(state)
        connection = guest.connection
        for name in names:
            method = getattr(connection, name)
            method(*(() if name == "room" else (guest.now,)))
            check(guest, connection) if name != "abort" else None
        guest.stack.flush()
        sent(guest)
        guest.passes(8000)
        if "abort" in names or state is State.CLOSED:
            assert not guest.stack.tcp


# -- random lives -------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """A guest, a user and the clock do as they please."""

    @initialize(
        family=st.sampled_from([4, 6]),
        offloads=st.sampled_from([None, VNET]),
        we_connect=st.booleans(),
        theirs=st.sampled_from([999, 0xFFFFFFF0]),
        ours=st.sampled_from([8999, 0xFFFFFFF8]),
    )
    def open(self, family: int, offloads: object, we_connect: bool, theirs: int, ours: int) -> None:
        self.guest = Guest(family, limits=LIMITS, offloads=VNET if offloads else None, iss=ours)
        if we_connect:
            self.guest.connecting()
        else:
            self.guest.gets(SYN, theirs)
        self.connection = self.guest.connection
        self.theirs = theirs + 1

    @rule(
        flags=st.sampled_from([ACK] * 8 + FLAGS),
        seq=st.integers(-8, 24),
        ack=st.integers(-8, 24),
        from_una=st.booleans(),
        size=st.sampled_from([0, 0, 1, 5, 20, 3000]),
        window=st.sampled_from([0, 1, 100, 65535]),
        flush=st.booleans(),
    )
    def segment(
        self, flags: int, seq: int, ack: int, from_una: bool, size: int, window: int, flush: bool
    ) -> None:
        connection, guest = self.connection, self.guest
        base = connection.snd.una if from_una else connection.snd.max
        number = (connection.rcv.nxt or self.theirs) + min(seq, 16)
        data = guest.segment(flags, number, base + min(ack, 8), bytes(size), window=window)
        guest.stack.receive(memoryview(data), guest.now)
        if flush:
            guest.stack.flush()
        replies = sent(guest)
        if flags & RST:
            assert not any(reply.flags & RST for reply in replies)

    @rule()
    def accept(self) -> None:
        self.connection.accept(self.guest.now)

    @rule(size=st.sampled_from([1, 100, 8000]))
    def send(self, size: int) -> None:
        room = self.connection.room()
        if room:
            self.connection.send(bytes(min(size, room)), self.guest.now)
        else:
            self.connection.wait_for_room(self.guest.now)

    @rule()
    def shutdown(self) -> None:
        self.connection.shutdown(self.guest.now)

    @rule(room=st.sampled_from([0, 1, 100, None]))
    def resume(self, room: int | None) -> None:
        self.guest.resume(room)

    @rule(name=st.sampled_from(["deliver", "end", "writable", "established", "closed"]))
    def abort_when(self, name: str) -> None:
        connection = self.connection
        self.guest.listener.on[name] = lambda: connection.abort(self.guest.now)

    @rule(seconds=st.sampled_from([0.001, 0.25, 5.0, 300.0]))
    def wait(self, seconds: float) -> None:
        self.guest.passes(seconds)

    @invariant()
    def sane(self) -> None:
        if hasattr(self, "connection"):
            sent(self.guest)
            check(self.guest, self.connection)


Life.TestCase.settings = settings(max_examples=200, stateful_step_count=30)
test_random_lives = Life.TestCase


# -- two paths, one TCP -------------------------------------------------------------------------------


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, tuple[int, ...]]]:
    steps = st.one_of(
        st.tuples(
            st.just("segment"),
            st.tuples(
                st.sampled_from([ACK] * 6 + [FIN | ACK, RST, 0]),
                st.sampled_from([0] * 6 + [-1, 1, 5]),  # from RCV.NXT
                st.sampled_from([0, 0, 1, 5, -1, 1 << 20]),  # from SND.UNA, or all that was sent
                st.sampled_from([0, 1, 5, 1000, 5000]),
                st.sampled_from([0, 1, 10, 512]),
            ),
        ),
        st.tuples(st.just("send"), st.tuples(st.sampled_from([1, 700, 9000]))),
        st.tuples(st.just("take"), st.tuples(st.sampled_from([0, 3, 1 << 30]))),
        st.tuples(st.just("wait"), st.tuples(st.sampled_from([1, 250]))),
    )
    return draw(st.lists(steps, max_size=12))


def live(history: list[tuple[str, tuple[int, ...]]], *, fast: bool) -> list[object]:
    """All that can be seen of a connection after each step."""
    guest = Guest(limits=LIMITS).established()
    connection = guest.connection
    seen: list[object] = []
    for name, numbers in history:
        if name == "segment":
            flags, seq, ack, size, window = numbers
            snd = connection.snd
            acked = snd.max if ack == 1 << 20 else snd.una + ack
            data = guest.segment(flags, connection.rcv.nxt + seq, acked, bytes(size), window=window)
            if fast or connection.key not in guest.stack.tcp:
                guest.stack.receive(memoryview(data), guest.now)
            else:
                segment = wire.parse(take_from_guest(data))
                connection._segment_arrives(segment, guest.now)
        elif name == "send" and (room := connection.room()):
            connection.send(bytes(min(numbers[0], room)), guest.now)
        elif name == "take":
            guest.resume(numbers[0])
        elif name == "wait":
            guest.passes(numbers[0] / 1000)
        guest.stack.flush()
        rcv, snd = connection.rcv, connection.snd
        seen.append(
            (
                list(guest.frames),
                connection.state,
                connection.purpose,
                connection.timer_at,
                connection._idle_since,
                (rcv.nxt, rcv.ack, [bytes(data) for data in rcv.unread], beyond(connection), rcv.fin),
                [getattr(snd, name) for name in type(snd).__slots__ if name not in APART],
                (list(snd.queue), snd.rto.value),
                connection.recovery is None or [getattr(connection.recovery, name) for name in LOSS],
                (bytes(guest.listener.bytes), list(guest.listener.events)),
            )
        )
        guest.frames.clear()
    return seen


def take_from_guest(data: bytes) -> memoryview:
    return memoryview(data)[14 + 20 :]


APART = ("memory", "queue", "rto", "tuner")
LOSS = ("_congestion", "_duplicates", "_point", "_resent", "_resent_at", "probes", "retries")


@settings(max_examples=800)
@given(histories())
def test_the_fast_path_is_the_readable_one_taken_quickly(history: list[tuple[str, tuple[int, ...]]]) -> None:
    assert live(history, fast=True) == live(history, fast=False)
