"""An hour of everything at once, with a clock of its own: several guests' TCP, UDP, pings and fragments, and then
nothing is left.

Two stacks face each other over a link that loses, duplicates, reorders and damages: one plays the guests' kernels,
the other is ours.  Each quarter of the hour begins with traffic and ends in silence, long enough for every timer.
By default the traffic lasts seconds, and the silence is the same; with NETNS_KIT_LONG=1 it lasts eight minutes.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count
from random import Random

import pytest

from netns_kit.stack import Closed, EchoFlow, Limits, Refusal, Stack, TcpConnection, UdpFlow
from netns_kit.stack.wire.ip import Packet
from netns_kit.tap.impairment import BadLink, Impairment
from tests.support import LONG
from tests.support.stack import (
    DNS,
    GATEWAY,
    GUEST,
    GUEST_MAC,
    OUR_MAC,
    SECRET,
    echo_packet,
    fragments,
    udp_packet,
)

PLANS = [
    ("finish", "finish"),
    ("finish", "answer"),
    ("answer", "finish"),
    ("idle", "finish"),
    ("finish", "idle"),
    ("idle", "answer"),
    ("reset", "finish"),
    ("finish", "reset"),
    ("reset", "answer"),
]
SIZES = (0, 1, 500, 5_000, 20_000, 20_000, 100_000)
QUARTER = 900.0
TRAFFIC = 480.0 if LONG else 8.0
"""Seconds of each quarter in which something new begins."""
PER_SECOND = 12  # beginnings
LIMITS = Limits(tcp_idle=120.0, tcp_half_closed=60.0, udp_flows=40, echo_flows=20)
LINK = Impairment(
    loss=0.01, duplicate=0.005, reorder=0.01, corrupt=0.001, delay=0.004, jitter=0.004, queue=5000
)
FAMILIES = (4, 6)
GUESTS = {family: [GUEST[family][:-1] + bytes([last]) for last in range(100, 108)] for family in FAMILIES}
OTHERS = {4: [bytes([192, 0, 2, last]) for last in range(1, 9)], 6: [GATEWAY[6][:-1] + bytes([9])]}
LEAVING = frozenset(GUESTS[family][-1] for family in FAMILIES)
"""Guests that are gone, without a word, when a quarter's traffic ends."""
PERIOD = 1009
WORDS = Random(1).randbytes(PERIOD) * 400
"""What everybody says, from the beginning and over and over."""


class Talker:
    """One end of a connection: it says `size` bytes, then ends as its `plan` has it.

    `finish`: it half-closes, and hears the rest.  `answer`: it says its part when the other has finished.  `idle`:
    it says half, falls silent for a while, and finishes.  `reset`: it gives up after its last word.
    """

    __slots__ = (
        "_at",
        "_takes",
        "connection",
        "guest",
        "heard",
        "idle",
        "other",
        "plan",
        "size",
        "why",
        "world",
    )

    def __init__(self, world: World, guest: bytes, plan: str, size: int) -> None:
        self.world = world
        self.guest = guest
        self.plan = plan
        self.size = size
        self.connection: TcpConnection | None = None
        self.other: Talker | None = None
        self.idle = 0.0
        self.why: Closed | None = None
        self.heard = self._at = 0
        self._takes = True

    def _pump(self) -> None:
        connection, world = self.connection, self.world
        if connection is None:
            return
        target = self.size // 2 if self.idle else self.size
        while self._at < target:
            room = min(connection.room(), target - self._at, 1 << 15)
            if not room:
                connection.wait_for_room(world.now)
                return
            start = self._at % PERIOD
            self._at += room
            connection.send(WORDS[start : start + room], world.now)
        if self.idle:
            idle, self.idle = self.idle, 0.0
            world.later(idle, self._pump)
        elif self.plan == "reset":
            connection.abort(world.now)
            self.closed(Closed.ABORTED)
        else:
            connection.shutdown(world.now)

    def established(self) -> None:
        if self.plan != "answer":
            self._pump()

    def writable(self) -> None:
        self._pump()

    def deliver(self, data: memoryview) -> int:
        if not self._takes:
            return 0
        taken = len(data)
        if self.world.random.random() < 0.02:  # it is busy for a moment
            taken //= 2
            self._takes = False
            self.world.later(self.world.random.uniform(0.01, 1.0), self._take_on)
        start = self.heard % PERIOD
        assert data[:taken] == WORDS[start : start + taken]
        self.heard += taken
        return taken

    def _take_on(self) -> None:
        self._takes = True
        if self.connection is not None:
            self.connection.resume(self.world.now)

    def urgent(self, data: memoryview) -> int:
        return self.deliver(data)

    def keepalive(self, idle: float) -> None:
        pass

    def traffic_class(self, tos: int) -> None:
        pass

    def end(self) -> None:
        if self.plan == "answer":
            self._pump()

    def closed(self, why: Closed) -> None:
        self.why = why
        self.connection = None
        self.world.over(self)


def backwards(key: bytes) -> bytes:
    """A flow as its other end names it."""
    size = (len(key) - 4) // 2
    return key[size : 2 * size] + key[:size] + key[-2:] + key[-4:-2]


class Program:
    """What has datagrams to send, and hears the answers."""

    def __init__(self, world: World) -> None:
        self.world = world

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        self.world.seen["udp answers"] += 1

    def expired(self, flow: UdpFlow | EchoFlow) -> None:
        pass


class Server(Program):
    """Answers most, and every ping."""

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        self.world.seen["udp questions"] += 1
        if self.world.random.random() < 0.8:
            flow.send(bytes(payload), self.world.now)

    def echo(self, flow: EchoFlow, sequence: int, payload: memoryview, packet: Packet) -> None:
        self.world.seen["pings"] += 1
        flow.reply(sequence, bytes(payload), 64, self.world.now)


class Side:
    """The user of one of the two stacks."""

    def __init__(self, world: World, *, ours: bool) -> None:
        self._world = world
        self._ours = ours

    def tcp_opened(self, connection: TcpConnection) -> None:
        world = self._world
        key = connection.key if self._ours else backwards(connection.key)
        talker = world.expected.pop(key, None)
        if talker is None:  # a SYN that has been repeated, and comes when all is over
            connection.refuse(Refusal.RESET)
            return
        talker.connection, connection.user = connection, talker
        if world.random.random() < 0.5:
            connection.accept(world.now)
        else:  # it takes a moment to find out
            world.later(world.random.uniform(0.01, 0.5), lambda: connection.accept(world.now))

    def udp_opened(self, flow: UdpFlow) -> Refusal | None:
        if not self._ours or self._world.random.random() < 0.1:
            return Refusal.RESET
        flow.user = self._world.server
        return None

    def echo_opened(self, flow: EchoFlow) -> Refusal | None:
        flow.user = self._world.server
        return None


class World:
    """Both stacks, the link between them, the clock, and what shall happen when."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = Random(seed)
        self.seen: Counter[str] = Counter()
        self.expected: dict[bytes, Talker] = {}
        self.server = Server(self)
        self.absent: frozenset[bytes] = frozenset()  # guests that are gone, without a word
        self._program = Program(self)
        self._ports = count(1024)
        self._agenda: list[tuple[float, int, Callable[[], object]]] = []
        self._order = count()
        self.links = [BadLink(replace(LINK, seed=2 * seed + side)) for side in (0, 1)]
        self.guests, self.ours = self.stacks = (self._stack(ours=False), self._stack(ours=True))
        for family in FAMILIES:
            for address in GUESTS[family]:
                self.ours.link.learn(address, GUEST_MAC)
            for address in OTHERS[family]:
                self.guests.link.learn(address, OUR_MAC)

    def _stack(self, *, ours: bool) -> Stack:
        own = (GATEWAY[4], DNS[4], GATEWAY[6], DNS[6]) if ours else tuple(GUESTS[4] + GUESTS[6])
        link = self.links[ours]

        def emit(*buffers: bytes) -> None:
            frame = b"".join(buffers)
            addresses = frame[26:34] if frame[12:14] == b"\x08\x00" else frame[22:54]
            half = len(addresses) // 2
            if addresses[half:] not in self.absent and addresses[:half] not in self.absent:
                link.send(frame, self.now)

        return Stack(
            Side(self, ours=ours),
            emit,
            addresses=own,
            mac=OUR_MAC if ours else GUEST_MAC,
            mtu=1500,
            secret=SECRET,
            limits=LIMITS,
        )

    def later(self, seconds: float, what: Callable[[], object]) -> None:
        heappush(self._agenda, (self.now + seconds, next(self._order), what))

    def run(self, until: float) -> None:
        stacks, links, agenda = self.stacks, self.links, self._agenda
        while True:
            due = min(*(link.deadline for link in links), *(stack.deadline for stack in stacks))
            if agenda and agenda[0][0] <= due:
                due = agenda[0][0]
            if due > until:
                self.now = until
                return
            self.now = max(self.now, due)
            while agenda and agenda[0][0] <= self.now:
                heappop(agenda)[2]()
            for side in (0, 1):
                stacks[side].handle_timers(self.now)
                for frame in links[1 - side].receive(self.now):
                    stacks[side].receive(memoryview(frame), self.now)
                stacks[side].flush()

    # -- what happens ---------------------------------------------------------------------------------

    def something_begins(self) -> None:
        begin = self.random.choices((self._connect, self._ask, self._ping, self._fragment), (6, 2, 1, 1))
        begin[0]()

    def _flow(self) -> bytes:
        """The key of a new flow, as ours names it.  Ports come round again, as everywhere."""
        family = self.random.choice(FAMILIES)
        guest, other = self.random.choice(GUESTS[family]), self.random.choice(OTHERS[family])
        port = 1024 + next(self._ports) % 60000
        return guest + other + port.to_bytes(2, "big") + self.random.choice((53, 80, 443)).to_bytes(2, "big")

    def _connect(self) -> None:
        key, random = self._flow(), self.random
        plans = random.choice(PLANS)
        guest = key[: (len(key) - 4) // 2]
        talkers = [Talker(self, guest, plan, random.choice(SIZES)) for plan in plans]
        for talker, other in zip(talkers, talkers[::-1], strict=True):
            talker.other = other
            if talker.plan == "idle":
                talker.idle = random.uniform(10, 200)
        ours = random.random() < 0.3  # from outside: a forwarded port
        stack, name = (self.ours, key) if ours else (self.guests, backwards(key))
        if key in self.expected or name in stack.tcp:
            return
        self.expected[key] = talkers[1]
        talkers[0].connection = stack.connect_tcp(name, talkers[0], self.now)

    def over(self, talker: Talker) -> None:
        """One end has heard that it is over."""
        other = talker.other
        self.seen[f"{talker.plan}: {talker.why}"] += 1
        if other is None or other.why is None:
            return
        talker.other = other.other = None
        self.seen["connections"] += 1
        if "reset" not in (talker.plan, other.plan) and talker.guest not in LEAVING:
            assert (talker.why, other.why) == (Closed.NORMAL, Closed.NORMAL), (talker.plan, other.plan)
            assert (talker.heard, other.heard) == (other.size, talker.size)

    def _ask(self) -> None:
        flow = self.guests.add_udp(backwards(self._flow()), self.now)
        flow.user = self._program
        self._say(flow, self.random.choice((1, 1, 1, 3, 20)))

    def _say(self, flow: UdpFlow, left: int) -> None:
        if flow.user is not None:  # it has not had to make room
            flow.send(WORDS[: self.random.choice((0, 30, 500, 4000))], self.now)
            if left > 1:
                self.later(self.random.uniform(0.1, 20.0), lambda: self._say(flow, left - 1))

    def _ping(self) -> None:
        family = self.random.choice(FAMILIES)
        to = self.random.choice([*OTHERS[family], GATEWAY[family]])
        for sequence in range(self.random.choice((1, 4))):
            packet = echo_packet(
                family, WORDS[:56], identifier=self.random.randrange(99), sequence=sequence, to=to
            )
            self.links[0].send(packet, self.now)

    def _fragment(self) -> None:
        self.fragments(missing=self.random.choice((0, 0, 1)))

    def fragments(self, missing: int) -> None:
        """A datagram in pieces, in any order, and not all of them."""
        family, number = self.random.choice(FAMILIES), self.random.randrange(1 << 16)
        whole = udp_packet(family, WORDS[: self.random.randrange(3000, 9000)], to=OTHERS[family][0], port=9)
        pieces = fragments(whole[14:], 1440, number)
        for piece in self.random.sample(pieces, len(pieces) - missing):
            self.links[0].send(piece, self.now)


@pytest.mark.timeout(600)
def test_an_hour_of_everything() -> None:
    """At the end of each quarter every table is empty, every buffer given back and no timer runs; and the memory of
    the last quarters is that of the one before.
    """
    world = World(3)
    memory = []
    tracemalloc.start()
    try:
        for quarter in range(4):
            start = quarter * QUARTER
            world.absent = frozenset()
            for _ in range(int(PER_SECOND * TRAFFIC)):
                world.later(world.random.uniform(0, TRAFFIC), world.something_begins)
            world.run(start + TRAFFIC)
            assert world.ours.tcp
            assert world.ours.udp
            world.absent = LEAVING
            world.run(start + QUARTER)
            for stack in world.stacks:
                stats = stack.stats()
                assert (stats["tcp_connections"], stats["udp_flows"], stats["echo_flows"]) == (0, 0, 0), stats
                assert (stats["tcp_memory"], stats["fragments"]) == (0, 0), stats
                assert len(stack.timers) == 0
            assert not world.expected
            gc.collect()
            memory.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    for what in ("connections", "udp questions", "udp answers", "pings"):
        assert world.seen[what] > PER_SECOND * TRAFFIC / 10, world.seen
    assert world.seen["finish: Closed.NORMAL"] > world.seen["finish: Closed.TIMED_OUT"] > 0, world.seen
    assert max(memory[2:]) - memory[1] < 16 << 10, memory
