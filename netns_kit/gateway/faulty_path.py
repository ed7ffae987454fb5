"""FaultyPath: a wrapper of the device that disturbs what crosses it, and hooks that disturb flows and queries.

    guest --> device --> link of block 1 --> link of block 2 --> stack
    guest <-- device <-- link of block 2 <-- link of block 1 <-- stack

It stands between the stack and the device only while there are blocks, so that without them no frame costs more.  A
frame enters the link of each block that it belongs to, one after another: the blocks are as cables in a row.  Frames
that belong to none pass at once.

Super-frames that belong to a block are cut before they enter its link (`netns_kit.tap.super_frames`), so that a loss
is the loss of one packet, and a rate that of packets.

The end.  The frames that a block holds when it ends go on at once, in their order.  The wrapper goes when the last
block has ended, and what it has for the stack is received.

A hostile guest.  Each link holds a bounded number of bytes, each frame counted with what it costs beside its bytes;
and so do the queries that wait.  What is too much is lost.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Hashable
from heapq import heapify, heappop, heappush
from ipaddress import ip_address
from struct import Struct, error
from typing import TYPE_CHECKING, TypeAlias

from netns_kit.dns import Action, Answer
from netns_kit.dns.message import NXDOMAIN, SERVFAIL, TYPES, BadMessage, parse_untrusted, reply
from netns_kit.policy.addresses import canonical
from netns_kit.policy.index import NameTable
from netns_kit.policy.policy import Policy
from netns_kit.policy.rules import is_name
from netns_kit.stack import AnyFlow, Refusal, TcpConnection, Transport
from netns_kit.stack.wire import ethernet, flow_key, ip
from netns_kit.stack.wire.family import IPV4, IPV6
from netns_kit.tap.frame_device import ETHERNET_HEADER, DeviceWrapper
from netns_kit.tap.impairment import BadLink, Impairment
from netns_kit.tap.super_frames import cut, summed
from netns_kit.uplink.flow import Flow, Target

from .enforcer import is_host

if TYPE_CHECKING:
    from netns_kit.dns.exchanges import DnsTransport

    from .faults import Faults, Script
    from .flow_router import Routed
    from .gateway import Gateway

OUT, IN = 0, 1
DIRECTIONS = "out", "in"
PIECES = 64  # frames that one `read_into` puts into links, about
FLOWS_KNOWN = 4096  # flows whose blocks are remembered
WATCHED_MAX = 1 << 16  # connections of which it is remembered what they had carried before
QUERIES_MAX = 1024  # that wait
QUERY_BYTES_MAX = 1 << 20

_LAYOUT4 = Struct("!HB5xHxB2x12s")  # from the EtherType: version, fragment, protocol, addresses and ports
_LAYOUT6 = Struct("!HB5xBx36s")
_OFFSET_OR_MORE = 0x3FFF
_FRAGMENT6 = 44
_DISCOVERY = range(133, 138)  # types of ICMPv6: routers, neighbours, redirects
_TRANSPORTS: dict[int, Transport] = {ip.TCP: "tcp", ip.UDP: "udp", IPV4.icmp: "icmp", IPV6.icmp: "icmp"}
_ADDRESS_SIZES = {TYPES["A"]: 4, TYPES["AAAA"]: 16}
_RCODES = {"nxdomain": NXDOMAIN, "servfail": SERVFAIL}

Buffer: TypeAlias = "bytes | bytearray | memoryview"
_Found: TypeAlias = "tuple[tuple[Block, ...], tuple[Block, ...]]"
"""The blocks whose links a frame enters, and those that look at its connection."""
_NOTHING: _Found = ((), ())


class _Link(BadLink):
    """A link whose damage is noticed: checksums that were left to others are filled in before."""

    def _damage(self, frame: bytes) -> bytes:
        return super()._damage(summed(frame) if self.overhead else frame)


class Block:
    """A block of faults, with a link for each direction.

    Args:
        path: What it is a part of.
        order: Its place among the blocks.
        script: Its faults over time.
        began: The time of its beginning.
        guests: The packed addresses of the guests that it is about; none: all.
    """

    def __init__(
        self, path: FaultyPath, order: int, script: Script, began: float, guests: Collection[bytes] = ()
    ) -> None:
        self.order = order
        self._guests = guests
        self.timer_at = self.timer_entry = math.inf
        self._path = path
        self._steps = deque((began + seconds, faults) for seconds, faults in script)
        vnet = path.offloads.vnet_header
        protect = vnet + ETHERNET_HEADER
        self.links = tuple(_Link(Impairment(), protect=protect, overhead=vnet) for _ in DIRECTIONS)
        self.frames = [0, 0]
        self.swallowed = [0, 0]
        self.reset = self.refused = self.queries = 0
        self.watched: dict[int, int] = {}  # what connections had carried before, by their id
        self.refuses = _faults_of(script, lambda each: each.refuse)
        self.names = {each for _, faults in script for each in faults.to if is_name(each)}
        self.asks = _faults_of(script, lambda each: each.disturbs_queries)
        self.faults: Faults | None = None
        self._policy: Policy | None = None
        self._names: NameTable[bool] | None = None

    def turn(self, now: float) -> None:
        """Let the faults of this moment be in force."""
        steps, before = self._steps, self.faults
        while steps and steps[0][0] <= now:
            _, self.faults = steps.popleft()
        if steps:
            self._path.timers.arm(self, steps[0][0])
        faults = self.faults
        if faults is None or faults is before:
            return
        is_all = not (faults.to or faults.ports or faults.protocol)
        self._policy = None if is_all else Policy("deny", rules=(faults.rule,))
        self._names = NameTable() if faults.to else None
        for target in filter(is_name, faults.to):
            assert self._names is not None
            self._names.get_or_set(target, True)
        for direction, link in enumerate(self.links):
            link.change(
                Impairment(
                    loss=faults.loss,
                    duplicate=faults.duplicate,
                    reorder=faults.reorder,
                    corrupt=faults.corrupt,
                    delay=faults.delay,
                    jitter=faults.jitter,
                    rate=faults.bytes_per_second,
                    queue=faults.queue,
                    memory=faults.queue,
                    seed=(self._path.worker << 80) + (faults.seed << 1) + direction,
                )
            )

    @property
    def swallows(self) -> bool:
        """True if every packet is lost."""
        return self.faults is not None and self.faults.blackhole

    def handle_timer(self, now: float) -> None:
        """Go on to the next step of the script."""
        self.turn(now)
        self._path.forget()

    def is_of(self, guest: bytes) -> bool:
        """Return whether it is about a guest with this packed address."""
        return not self._guests or guest in self._guests

    def is_about(self, transport: Transport, remote: bytes, port: int) -> bool:
        """Return whether the faults of this moment are about what has this at the other end."""
        if self.faults is None:
            return False
        if self._policy is None:
            return True
        names = self._path.gateway.answered(remote) if self._names is not None else ()
        return (
            self._policy.index.flow(
                transport, canonical(remote), port, names, lambda: self._path.is_host(remote)
            ).action
            == "allow"
        )

    def is_about_name(self, name: bytes) -> bool:
        """Return whether the faults of this moment are about queries for a name, on the wire and in lower case."""
        if self.faults is None or not self.faults.disturbs_queries:
            return False
        return self._names is None or bool(self._names.matching(name))

    def counts(self) -> dict[str, int]:
        """Return what it has done by name."""
        found = {"reset": self.reset, "refused": self.refused, "queries": self.queries}
        for direction, name in enumerate(DIRECTIONS):
            link = self.links[direction]
            found[f"{name}_frames"] = self.frames[direction]
            found[f"{name}_lost"] = link.lost + self.swallowed[direction]
            found[f"{name}_overflowed"] = link.overflowed
            found[f"{name}_duplicated"] = link.duplicated
            found[f"{name}_reordered"] = link.reordered
            found[f"{name}_corrupted"] = link.corrupted
        return found


class FaultyPath(DeviceWrapper):
    """The faults of one gateway, as long as there are blocks.

    Args:
        gateway: The gateway.

    Attributes:
        gateway: The gateway.
        is_over: Whether it stands before the device no more.
    """

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway.device)
        self.gateway = gateway
        self._engine = gateway.engine
        self.timers = gateway.engine.timers
        self.worker = gateway.stack.steering.index
        self.is_over = False
        self.timer_at = self.timer_entry = math.inf
        self._vnet = gateway.device.offloads.vnet_header
        self._at = self._vnet + ethernet.SIZE - 2
        self._needs = self._at + 2 + IPV6.header_size + 4
        self._blocks: dict[int, Block] = {}
        self._order = 0
        self._known: dict[tuple[int, Transport, bytes, int, bytes], _Found] = {}
        self._arrived: deque[bytes] = deque()  # from the guest, and through all links
        self._due = math.inf
        self._seen: dict[TcpConnection, tuple[Block, ...]] = {}  # connections of this step that may be reset
        self._waiting: list[tuple[float, int, _Query, tuple[Block, ...]]] = []  # a heap, by when they go on
        self._waiting_bytes = 0
        self._has_names = False
        self._original_query = gateway.dns.query
        gateway.device = self
        # before deadlines are looked at
        gateway.engine.after_step = [self._end_of_step, *gateway.engine.after_step]

    # -- blocks ---------------------------------------------------------------------------------------

    def begin(self, number: int, script: Script, guests: Collection[bytes]) -> None:
        """Begin a block, about guests with these packed addresses; about all if there are none."""
        self._order += 1
        block = self._blocks[number] = Block(self, self._order, script, self._engine.now, guests)
        block.turn(self._engine.now)
        self._hook()
        self.forget()

    def counts(self, number: int) -> dict[str, int]:
        """Return what a block has done by name; nothing if there is none."""
        return self._blocks[number].counts() if number in self._blocks else {}

    def end(self, number: int) -> dict[str, int]:
        """End a block, and return what it has done by name.  What it holds goes on."""
        block = self._blocks.pop(number, None)
        if block is None:
            return {}
        now = self._engine.now
        self.timers.arm(block, math.inf)
        self.forget()
        counts = block.counts()
        for direction, link in enumerate(block.links):
            for frame in link.clear():
                self._go_on(direction, frame, block.order, now)
        self._let_pass(now)
        self._hook()
        self._let_queries_on(now, block)
        if not self._blocks:
            self._take_away()
        return counts

    def end_all(self) -> None:
        """End all blocks."""
        for number in list(self._blocks):
            self.end(number)

    def forget(self) -> None:
        """Forget which flows belong to which blocks: that has changed."""
        self._known.clear()

    def _hook(self) -> None:
        """Have hooks where the blocks need them, and nowhere else."""
        gateway, blocks = self.gateway, self._blocks.values()
        hooked = vars(gateway.router)  # what stands here is found before the methods
        if any(block.refuses for block in blocks):
            hooked["route"], hooked["proceed"] = self._route, self._proceed
        else:
            hooked.pop("route", None)
            hooked.pop("proceed", None)
        asks = any(block.asks for block in blocks)
        gateway.dns.query = self._query if asks else self._original_query
        names = {name for block in blocks for name in block.names}
        self._has_names = bool(names)
        gateway.want_names(self, names, self.forget)

    def _take_away(self) -> None:
        """Let the gateway have the device again, as soon as nothing waits for the stack any more."""
        if not self._arrived and not self.is_over:
            self.is_over = True
            engine = self._engine
            engine.after_step = [each for each in engine.after_step if each != self._end_of_step]
            self.gateway.withdraw(self)

    # -- the device -----------------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        return min(-math.inf if self._arrived else self._due, self.device.deadline)

    def advance(self, now: float) -> None:
        self.device.advance(now)
        self._let_pass(now)

    def read_into(self, buffer: memoryview | bytearray) -> int | None:
        arrived, view, left = self._arrived, memoryview(buffer), PIECES
        while not arrived:
            size = self.device.read_into(view) if left > 0 else None
            if size is None:
                return None
            links, watching = self._found(OUT, view[:size])
            if watching:
                self._watch(OUT, view[:size], watching)
            if not links:
                return size
            left -= self._enter(OUT, links, bytes(view[:size]))
        frame = arrived.popleft()
        size = min(len(frame), len(view))
        view[:size] = frame[:size]
        return size

    def write(self, *buffers: bytes | bytearray | memoryview) -> bool:
        first = buffers[0]
        if len(first) < self._needs and len(buffers) > 1:
            first = b"".join(buffers)
            buffers = (first,)
        links, watching = self._found(IN, first)
        if watching:
            self._watch(IN, first, watching)
        if not links:
            return self.device.write(*buffers)
        self._enter(IN, links, b"".join(buffers))
        return True

    def _enter(self, direction: int, blocks: tuple[Block, ...], frame: bytes) -> int:
        """Put a frame into the links of blocks, and return in how many pieces."""
        now, number = self._engine.clock(), 0  # the step may have begun before the frame came
        if blocks[0].swallows:
            self._go_on(direction, frame, 0, now)
            return 1
        for piece in cut(frame) if self._vnet else (frame,):
            self._go_on(direction, piece, 0, now)
            number += 1
        self._let_pass(now)
        return number

    def _go_on(self, direction: int, frame: bytes, order: int, now: float) -> None:
        """Put a frame that has passed the blocks up to `order` into the next link, or let it arrive."""
        for block in self._found(direction, frame)[0]:
            if block.order > order:
                block.frames[direction] += 1
                if block.swallows:
                    block.swallowed[direction] += 1
                else:
                    block.links[direction].send(frame, now)
                return
        if direction == OUT:
            self._arrived.append(frame)
        else:
            self.device.write(frame)

    def _let_pass(self, now: float) -> None:
        """Let frames that have reached the end of a link go on."""
        due = math.inf
        for block in list(self._blocks.values()):
            for direction, link in enumerate(block.links):
                if link.deadline <= now:
                    for frame in link.receive(now):
                        self._go_on(direction, frame, block.order, now)
                due = min(due, link.deadline)
        self._due = due

    # -- which blocks ---------------------------------------------------------------------------------

    def _found(self, direction: int, head: Buffer) -> _Found:
        """Return the blocks of a frame."""
        seen = _look(head, self._at, direction)
        if seen is None:
            return _NOTHING
        if self._has_names:
            self.gateway.read_pins()  # which may change the answer
        key = (direction, *seen)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= FLOWS_KNOWN:
                self._known.clear()
            found = self._known[key] = self._blocks_of(*key)
        return found

    def _blocks_of(
        self, direction: int, transport: Transport, remote: bytes, port: int, guest: bytes
    ) -> _Found:
        about = [
            (block, block.faults)
            for block in self._blocks.values()
            if block.faults is not None and block.is_of(guest) and block.is_about(transport, remote, port)
        ]
        here = "both", DIRECTIONS[direction]
        return (
            tuple(block for block, faults in about if faults.impairs and faults.direction in here),
            tuple(block for block, faults in about if faults.reset_after is not None and transport == "tcp"),
        )

    def is_host(self, address: bytes) -> bool:
        """Return whether a packed address is the gateway's, or the host's own."""
        enforcer = self.gateway.enforcer
        return is_host(self.gateway.subnet, ip_address(address), has_host=enforcer.has_host)

    # -- connections ----------------------------------------------------------------------------------

    def _watch(self, direction: int, head: Buffer, blocks: tuple[Block, ...]) -> None:
        """Note the connection of a frame, which may have to be reset at the end of the step."""
        at = self._at + 2
        family = IPV4 if head[at] >> 4 == 4 else IPV6
        start = at + family.header_size - 2 * family.address_size
        parts = bytes(head[start : start + 2 * family.address_size + 4])
        key = parts if direction == OUT else b"".join(flow_key.backwards(parts))
        connection = self.gateway.stack.tcp.get(key)
        if connection is None:
            return
        self._seen[connection] = blocks
        for block in blocks:
            if connection.id not in block.watched:
                if len(block.watched) >= WATCHED_MAX:
                    block.watched.clear()
                block.watched[connection.id] = _carried(connection, block)

    def _reset_some(self) -> None:
        """Reset the connections of this step that have carried enough."""
        seen, self._seen = self._seen, {}
        for connection, blocks in seen.items():
            for block in blocks:
                most = None if block.faults is None else block.faults.reset_after
                before = block.watched.get(connection.id)
                if most is None or before is None or connection.user is None or connection.is_on_hold:
                    continue
                if _carried(connection, block) - before >= most:
                    block.reset += 1
                    del block.watched[connection.id]
                    self.gateway.router.abort(connection, reset=True)
                    break

    def _end_of_step(self) -> None:
        if self._seen:
            self._reset_some()
        if not self._blocks:
            self._take_away()

    # -- flows ----------------------------------------------------------------------------------------

    def _is_refused(self, transport: Transport, key: bytes) -> bool:
        """Return whether a block refuses a new flow, and count it."""
        names = flow_key.parse(key)
        port = 0 if transport == "icmp" else names.remote_port
        for block in self._blocks.values():
            if (
                block.faults is not None
                and block.faults.refuse
                and block.is_of(names.guest)
                and block.is_about(transport, names.remote, port)
            ):
                block.refused += 1
                return True
        return False

    def _route(
        self, transport: Transport, key: bytes, opened: AnyFlow | None = None, *, served: bool = False
    ) -> Routed | Refusal | None:
        """Do as `FlowRouter.route`, and refuse what may pass if a block does."""
        router = self.gateway.router
        found = type(router).route(router, transport, key, opened, served=served)
        return Refusal.RESET if isinstance(found, tuple) and self._is_refused(transport, key) else found

    def _proceed(self, opened: AnyFlow, flow: Flow, target: Target) -> Refusal | None:
        """Do as `FlowRouter.proceed`, unless a block refuses the flow."""
        if self._is_refused(flow.protocol, opened.key):
            return Refusal.RESET
        router = self.gateway.router
        return type(router).proceed(router, opened, flow, target)

    # -- queries --------------------------------------------------------------------------------------

    def _query(
        self, message: bytes, client: Hashable, address: bytes, now: float, transport: DnsTransport = "udp"
    ) -> list[Action] | None:
        """Do as `DnsServer.query`, after the delay of all blocks that are about the query."""
        query = message, client, address, transport
        blocks = self._blocks_asked(message, address)
        if not blocks:
            return self._original_query(message, client, address, now, transport)
        for block in blocks:
            block.queries += 1
        delay = sum(block.faults.dns_delay for block in blocks if block.faults is not None)
        if not delay:
            return self._answer(query, now)
        size = self._waiting_bytes + len(message)
        if len(self._waiting) < QUERIES_MAX and size <= QUERY_BYTES_MAX:
            self._waiting_bytes = size
            self._order += 1
            heappush(self._waiting, (now + delay, self._order, query, blocks))
            self.timers.arm(self, self._waiting[0][0])
        return []

    def _blocks_asked(self, message: bytes, guest: bytes) -> tuple[Block, ...]:
        """Return the blocks that are about a query, the latest first; none if the policy refuses it."""
        try:
            _, _, question = parse_untrusted(message)
        except BadMessage:
            return ()
        name, policy = question[:-4].lower(), self.gateway.enforcer.of(guest).policy
        if not name or (policy is not None and not policy.audit and policy.index.name(name).action == "deny"):
            return ()
        return tuple(
            block
            for block in reversed(self._blocks.values())
            if block.is_of(guest) and block.is_about_name(name)
        )

    def _answer(self, query: _Query, now: float) -> list[Action] | None:
        """Answer a query as the blocks of this moment say."""
        message, client, address, transport = query
        for block in self._blocks_asked(message, address):
            how = None if block.faults is None else block.faults.dns
            if how == "timeout":
                return []
            if how is not None:
                _, _, question = parse_untrusted(message)
                return [Answer(client, reply(message, question, _RCODES[how]))]
        return self._original_query(message, client, address, now, transport)

    def handle_timer(self, now: float) -> None:
        """Answer the queries that have waited long enough."""
        self._let_queries_on(now)

    def _let_queries_on(self, until: float, ended: Block | None = None) -> None:
        """Answer the queries that have waited long enough, or for a block that has ended."""
        waiting, now = self._waiting, self._engine.now
        if ended is not None:
            waiting[:] = [(now if ended in each[3] else each[0], *each[1:]) for each in waiting]
            heapify(waiting)
        while waiting and waiting[0][0] <= until:
            _, _, query, _ = heappop(waiting)
            self._waiting_bytes -= len(query[0])
            self.gateway.dns.act(self._answer(query, now) or [])
        self.timers.arm(self, waiting[0][0] if waiting else math.inf)


_Query: TypeAlias = "tuple[bytes, Hashable, bytes, DnsTransport]"
"""A query, its client, the client's packed address, and its transport."""


def _faults_of(script: Script, has: Callable[[Faults], bool]) -> bool:
    return any(has(faults) for _, faults in script)


def _carried(connection: TcpConnection, block: Block) -> int:
    """Return the bytes of payload that a connection has carried in the directions of a block."""
    out, back = connection.carried
    direction = "both" if block.faults is None else block.faults.direction
    return out + back if direction == "both" else out if direction == "out" else back


def _look(head: Buffer, at: int, direction: int) -> tuple[Transport, bytes, int, bytes] | None:
    """Return a frame's transport, address and port at the other end, and the guest's address; None for what no block
    is about.

    Args:
        head: The beginning of the frame.
        at: Where its EtherType is.
        direction: Its direction.
    """
    try:
        kind, version, fragment, protocol, parts = _LAYOUT4.unpack_from(head, at)
        if kind == ethernet.IPV4:
            half, has_ports = 4, version == 0x45 and not fragment & _OFFSET_OR_MORE
        elif kind == ethernet.IPV6:
            kind, version, protocol, parts = _LAYOUT6.unpack_from(head, at)
            half, has_ports = 16, True
            if protocol == _FRAGMENT6:
                protocol, has_ports = parts[32], False
            elif protocol == IPV6.icmp and parts[32] in _DISCOVERY:
                return None
        else:
            return None
    except error:  # it is too short
        return None
    transport = _TRANSPORTS.get(protocol)
    if transport is None:
        return None
    port, start = 0, half if direction == OUT else 0
    if has_ports and transport != "icmp":
        port_at = 2 * half + (2 if direction == OUT else 0)
        port = parts[port_at] << 8 | parts[port_at + 1]
    inside = half - start
    return transport, parts[start : start + half], port, parts[inside : inside + half]
