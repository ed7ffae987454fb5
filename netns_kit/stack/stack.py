"""Stack: frames in, frames out, and the tables of flows between them.

Every frame enters by `Stack.receive` and leaves by `Link.emit`.  `StackUser` is told of new flows.  The stack looks
like a small router.  It answers for its own addresses (ARP, neighbour discovery, echo), and makes everything else
into flows, which its user carries.  IPv6 is only spoken if one of the addresses is an IPv6 address; otherwise its
frames are counted and dropped.

A frame is handled in one of two ways.  On the *long way* it passes the modules of each layer: it becomes an
`ip.Packet`, which is passed to the table of its transport.  The *short way* is for most frames: those of a known flow
whose headers have not changed (`netns_kit.stack.wire.common`).  One function then has the same effect as the long
way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from .control_messages import ControlMessages
from .echo import EchoTable
from .limits import Limits
from .link import Link
from .network_layer import NetworkLayer, to_group
from .offloads import Offloads
from .packets import PacketWriter
from .reassembly import Reassembly
from .router import Router
from .states import State
from .steering import Steering
from .tcp import TcpConnection
from .tcp_table import TcpTable
from .timers import Timers
from .udp import UdpFlow, UdpTable
from .user import IcmpError, LinkDatagram, LinkService, StackUser, TcpUser, Watcher
from .wire import BadPacket, BadParameter, ethernet, icmp, ip, ndp, virtio
from .wire.common import (
    IP_AT,
    LAYER4_AT,
    LAYER4_AT6,
    OFFSET_OR_SYN,
    ONE_DATAGRAM,
    PLAIN_MASK,
    SIZE,
    SIZE6,
    SIZE6_STAMPED,
    SIZE_STAMPED,
    SUMMED,
    VERSION_4,
    parse,
    parse6,
    parse6_stamped,
    parse_stamped,
)
from .wire.family import IPV6, family_of
from .wire.ip import TCP, UDP
from .wire.tcp import SIZE as TCP_SIZE
from .wire.tcp import Segment
from .wire.udp import SIZE as UDP_SIZE

MAX_SEGMENTS = 128  # in a UDP super-datagram (linux/udp.h): no kernel makes more, and each costs a call
_LONGEST_OVERHEAD = ethernet.SIZE + ip.IPV6_SIZE + UDP_SIZE
_TRANSPORTS = {TCP: "tcp", UDP: "udp"}


class Stack:
    """A user-mode TCP/IP stack for one guest link.

    Args:
        user: The user, which is told of each new flow.
        emit: Called with the buffers of each frame that is sent.
        addresses: Our packed addresses, with the gateway's first in each family.
        mac: Our link address.
        mtu: The MTU of the link, in bytes.
        secret: 16 random bytes, the key of the initial sequence numbers (RFC 6528).
        offloads: The work that the other end of the link does for us; None: none.
        limits: Bounds on what the guest can make us keep.
        timers: The timers of the caller, which are then shared; None: the stack has its own.
        advertised: The content of router advertisements; None: there are none.
        sources: The networks from which guests may open flows, each as packed address and prefix length.  None allows
            any source; RFC 2827 explains why it should be checked.
        steering: Tells which of several stacks on the link this is; None: it is the only one.
    """

    def __init__(
        self,
        user: StackUser,
        emit: Callable[..., object],
        *,
        addresses: tuple[bytes, ...],
        mac: bytes,
        mtu: int,
        secret: bytes,
        offloads: Offloads | None = None,
        limits: Limits | None = None,
        timers: Timers | None = None,
        advertised: ndp.Advertisement | None = None,
        sources: tuple[tuple[bytes, int], ...] | None = None,
        steering: Steering | None = None,
    ) -> None:
        self.addresses = addresses
        self.limits = limits = limits or Limits()
        self.timers = timers = Timers() if timers is None else timers
        self.dropped: Counter[str] = Counter()  # by reason
        self.link = link = Link(
            emit,
            mac=mac,
            mtu=mtu,
            offloads=offloads or Offloads(),
            own=addresses,
            limits=limits,
            dropped=self.dropped,
            timers=timers,
        )
        self._packets = PacketWriter(link, int.from_bytes(secret[:2], "big"))
        self.network = network = NetworkLayer(
            user,
            link,
            self._packets,
            limits=limits,
            timers=timers,
            dropped=self.dropped,
            steering=steering or Steering(0, 1),
            sources=sources,
        )
        router = None if advertised is None else Router(link, advertised, timers)
        self._reassembly = Reassembly(limits, self.dropped, timers)
        self.tcp = TcpTable(network, secret)
        self.udp = UdpTable(network)
        self.echo = EchoTable(network)
        self.acks, self.memory, self.time_wait = self.tcp.acks, self.tcp.memory, self.tcp.time_wait
        self.pending = self.tcp.pending
        self._icmp = ControlMessages(network, self.tcp, self.udp, self.echo, router)
        self._parsers = {ethernet.IPV4: ip.parse_ipv4}
        if any(family_of(address) is IPV6 for address in addresses):
            self._parsers[ethernet.IPV6] = ip.parse_ipv6
        self._ethernet_at = link.offloads.vnet_header
        self.has_short_way = link.offloads.vnet_header == virtio.SIZE
        """Whether frames may take the short way: the link has virtio headers, which vouch for checksums."""

    @property
    def steering(self) -> Steering:
        """The part of this stack among several on the link."""
        return self.network.steering

    @property
    def watcher(self) -> Watcher:
        """The observer of all flows; `UNWATCHED` if there is none."""
        return self.tcp.watcher

    @watcher.setter
    def watcher(self, watcher: Watcher) -> None:
        self.tcp.watcher = self.udp.watcher = self.echo.watcher = watcher

    @property
    def services(self) -> dict[int, LinkService]:
        """The link services by UDP port."""
        return self.udp.services

    @services.setter
    def services(self, services: dict[int, LinkService]) -> None:
        self.udp.services = services

    # -- the short way ------------------------------------------------------------------------------

    def receive(self, frame: memoryview, now: float) -> None:
        """Receive a frame from the guest, with its virtio header if the link has one.

        `frame` is lent until this returns, or for longer if its owner and the users have agreed so.  Nothing that a
        guest sends makes this raise: malformed frames are counted in `dropped`, by reason.  ACKs that can wait for
        more frames are sent by `flush`.
        """
        if self.has_short_way and self.receive_known(frame, now):
            return
        try:
            self._receive(frame, now)
        except BadPacket as bad:
            self.dropped[bad.reason] += 1

    def receive_known(self, frame: memoryview, now: float) -> bool:
        """Receive a frame if it may take the short way, and return whether it could.

        Call it only if `has_short_way`.
        """
        size = len(frame)
        if size < SIZE:
            return False
        if frame[IP_AT] == VERSION_4:
            (
                vnet, head, length, rest, protocol, key, seq, ack, offset_flags, window, urgent, stamp
            ) = parse(frame) if size < SIZE_STAMPED else parse_stamped(frame)  # fmt: skip
            at, end = LAYER4_AT, IP_AT + length
        elif size >= SIZE6:
            (
                vnet, head, length, protocol, rest, key, seq, ack, offset_flags, window, urgent, stamp
            ) = parse6(frame) if size < SIZE6_STAMPED else parse6_stamped(frame)  # fmt: skip
            at, end = LAYER4_AT6, LAYER4_AT6 + length
        else:
            return False
        if protocol == TCP:
            connection = self.tcp.get(key)
            if (
                connection is None
                or head + rest != connection.frame_head
                or not vnet & SUMMED
                or not connection.text_at <= end <= size
            ):
                return False
            payload, known = frame[connection.text_at : end], connection.stamp
            if (
                offset_flags & PLAIN_MASK != connection.head
                or (known and known != stamp and not connection.restamp(stamp, seq, now))
                or not connection.in_order(seq, ack, window, payload, now)
            ):
                if (offset_flags ^ connection.head) & OFFSET_OR_SYN:
                    return False
                options = frame[at + TCP_SIZE : connection.text_at] or None
                segment = Segment(seq, ack, offset_flags & 0xFF, window, payload, options, urgent)
                connection.segment_arrives(segment, now)
            return True
        if protocol == UDP and vnet in ONE_DATAGRAM:
            flow = self.udp.get(key)
            if flow is None or end > size or head + rest != flow.frame_head:
                return False
            payload = frame[at + UDP_SIZE : end]
            size = len(payload)
            if seq >> 16 != UDP_SIZE + size:
                return False
            flow.last = now
            flow.received += size
            flow.user.datagram(flow, payload, flow.marks, 0)
            return True
        return False

    # -- the long way -------------------------------------------------------------------------------

    def _receive(self, frame: memoryview, now: float) -> None:
        at, summed = self._ethernet_at, False
        if at:
            if len(frame) < at:
                raise BadPacket("virtio-truncated")
            flags, gso_type, _, gso_size, _, _ = virtio.parse(frame)
            summed = flags & virtio.SUMMED != 0
            if (
                gso_type == virtio.GSO_UDP_L4
                and len(frame) > at + _LONGEST_OVERHEAD + gso_size * MAX_SEGMENTS
            ):
                raise BadPacket("udp-segments")
        if len(frame) < at + ethernet.SIZE:
            raise BadPacket("ethernet-truncated")
        destination, source, kind = ethernet.parse(frame, at)
        is_to_group = destination != self.link.mac
        if is_to_group and not destination[0] & 1:
            raise BadPacket("ethernet-not-ours")
        view = frame[at + ethernet.SIZE :]
        if kind not in self._parsers:
            self._no_packet_arrives(kind, view, frame)
            return
        try:
            packet = self._parsers[kind](view)
        except BadParameter as bad:
            if not is_to_group:
                self._parameter_problem(view, bad.code, bad.pointer)
            raise
        packet.frame, packet.source_mac, packet.summed = frame, source, summed
        if is_to_group and (packet.protocol != UDP or ip.is_unicast(packet.destination)):
            self._group_packet_arrives(packet)
        else:  # a link service may want a datagram to a group
            self._packet_arrives(packet, now)

    def _no_packet_arrives(self, kind: int, view: memoryview, frame: memoryview) -> None:
        """Handle a frame that has no IP packet: ARP, or a type that we do not know."""
        if kind != ethernet.ARP:
            raise BadPacket("ipv6-off" if kind == ethernet.IPV6 else "ethernet-type")
        self.link.arp_arrives(view, answered=self.steering.hops > 0)
        self.steering.tell(frame)

    def _group_packet_arrives(self, packet: ip.Packet) -> None:
        """Drop a packet to a group, except neighbour discovery.

        We are the only other host on the link, and the host's groups are not the guest's.
        """
        if self.steering.give_to_first(packet.frame):
            return
        is_icmp = packet.protocol == packet.family.icmp
        if is_icmp and packet.family is IPV6 and self._icmp.group_packet_arrives(packet):
            return
        name = "icmp" if is_icmp else _TRANSPORTS.get(packet.protocol)
        if name is None:
            raise BadPacket("ip-protocol")
        raise to_group(packet, name)

    def _packet_arrives(self, packet: ip.Packet, now: float) -> None:
        """Pass a packet to its transport, after reassembly if it is a fragment."""
        protocol = packet.protocol
        is_fragment = packet.more_fragments or packet.fragment_offset
        if is_fragment or protocol != TCP:
            steering = self.network.steering
            if steering.give_to_first(packet.frame):
                return
            if is_fragment:
                self.network.costly_frames += 1
                whole = self._reassembly.add(packet, now)
                if whole is None:
                    return
                ip.put_together(whole)
                whole.frame, whole.source_mac, whole.summed = packet.frame, packet.source_mac, False
                packet, protocol = whole, whole.protocol
                if steering.count > 1:
                    packet.frame = self._in_one(packet)
        if packet.ttl <= 1 and packet.destination not in self.link.own and ip.is_unicast(packet.destination):
            self._expired(packet)
        if protocol == TCP:
            self.tcp.packet_arrives(packet, now)
        elif protocol == UDP:
            self.udp.packet_arrives(packet, now)
        elif protocol == packet.family.icmp:
            self._icmp.packet_arrives(packet, now)
        else:
            if packet.family is IPV6 and protocol != ip.NO_NEXT_HEADER:
                self._parameter_problem(packet.whole, ip.UNKNOWN_HEADER, ip.next_header_at(packet.whole))
            raise BadPacket("ip-protocol")

    def _in_one(self, packet: ip.Packet) -> memoryview:
        """Return a frame with a reassembled packet, in case it is for another stack on the link."""
        header = ip.pack(
            packet.addresses, packet.protocol, len(packet.payload), ttl=packet.ttl, tos=packet.tos
        )
        prefix = virtio.NONE[: self._ethernet_at]
        prefix += ethernet.pack(self.link.mac, packet.source_mac, packet.family.ether_type)
        return memoryview(b"".join((prefix, header, packet.payload)))

    def _expired(self, packet: ip.Packet) -> None:
        """Answer a packet whose TTL has run out, as the first router does (RFC 1812 5.3.1)."""
        family = packet.family
        is_error = packet.protocol == family.icmp and packet.payload[:1] != bytes((family.echo,))
        if ip.is_unicast(packet.source) and packet.source not in self.link.own and not is_error:
            self._packets.error(packet.whole, IcmpError(family.time_exceeded, 0), by=packet.destination)
        raise BadPacket("ip-ttl")

    def _parameter_problem(self, view: memoryview, code: int, pointer: int) -> None:
        """Tell the sender of a bad IPv6 packet what is wrong (RFC 4443 3.4), in the name of its destination.

        The packet cannot be an ICMP error itself: kernels send these without extension headers.
        """
        source, destination = ip.source_of(view), ip.destination_of(view)
        if ip.is_unicast(source) and source not in self.link.own:
            error = IcmpError(icmp.V6_PARAMETER, code, pointer, offender=destination)
            self._packets.error(view, error, by=destination)

    # -- what users ask -----------------------------------------------------------------------------

    def connect_tcp(
        self, key: bytes, user: TcpUser, now: float, host: tuple[str, int] | None = None
    ) -> TcpConnection:
        """Open a connection to the guest, for a client at `host`.

        Raises:
            KeyError: There is such a connection, or the table is full.
        """
        return self.tcp.connect(key, user, now, host)

    def add_udp(self, key: bytes, now: float, host: tuple[str, int] | None = None) -> UdpFlow:
        """Return the UDP flow with that key, which is made if there is none.  The flow idle longest makes room for
        it.

        `host` is the client on the host's side; None if the flow answers a flow of the guest's.
        """
        return self.udp.open(key, now, host)

    def flush(self) -> None:
        """Send the ACKs that have waited for more frames.  Call it after each batch of frames and of user calls."""
        self.acks.flush()
        self.acks.report_holes()

    def send_datagram(self, datagram: LinkDatagram) -> None:
        """Send a datagram that belongs to no flow.  If it is too long for a packet, it is dropped and counted."""
        self.udp.send_datagram(datagram)

    @property
    def deadline(self) -> float:
        """The time at which `handle_timers` is due; infinity: no timer is set."""
        return self.timers.deadline

    def handle_timers(self, now: float) -> None:
        """Run the timers that are due."""
        self.timers.expire(now)

    def stats(self) -> dict[str, int]:
        """Return gauges, named as their bounds in `Limits`, and counters of what was dropped, by reason."""
        states = Counter(connection.state for connection in self.tcp.values())
        return {
            "tcp_connections": len(self.tcp),
            **{f"tcp_{state.name.lower()}": states[state] for state in State if states[state]},
            "tcp_pending": len(self.pending),
            "tcp_time_waits": len(self.time_wait),
            "tcp_memory": self.memory.held,
            "udp_flows": len(self.udp),
            "echo_flows": len(self.echo),
            "fragments": self._reassembly.held,
            **self.link.stats(),
            **{
                f"dropped_{reason.replace('-', '_')}": count for reason, count in sorted(self.dropped.items())
            },
        }
