"""The stack: frames in, frames out, and the tables of flows between them.

`Stack.receive` is the way in for every frame, `Link.emit` the way out; `StackUser` hears of new flows.
It looks like a small router: it answers for its own addresses (ARP, neighbour discovery, echo), and turns everything
else into flows that its user carries on.  IPv6 is spoken if it has an address of that family, else such frames are
only counted.
"""

from __future__ import annotations

from _blake2 import blake2b  # what hashlib has for it, but for OpenSSL, which takes 2 ms to load
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from itertools import count

from . import seq
from .acks import Acks
from .echo import EchoFlow
from .header import FlowHeader
from .limits import Limits
from .link import SMALLEST_MTU, Link
from .offloads import Offloads
from .packets import PacketWriter
from .reassembly import Reassembly
from .router import Router
from .states import SYN_HELD, SYN_SENT, State
from .steering import Steering
from .tcp import TcpConnection
from .time_wait import TimeWait
from .timers import Timers
from .udp import UdpFlow
from .user import IcmpError, LinkDatagram, LinkService, Refusal, StackUser, TcpUser, Watcher
from .windows import Memory
from .wire import BadPacket, BadParameter, checksum, common, ethernet, icmp, ip, ndp, tcp, udp, virtio

ISN_TICKS = 250_000  # per second: RFC 9293 3.4.1's 4-microsecond clock
_DSCP = 0xFC  # the traffic class without ECN's bits (RFC 3168 5)
_ECHO = (bytes((icmp.ECHO,)), bytes((icmp.V6_ECHO,)))
_NAMES = {  # by the length of the addresses
    8: {ip.TCP: "tcp", ip.UDP: "udp", ip.ICMP: "icmp"},
    32: {ip.TCP: "tcp", ip.UDP: "udp", ip.ICMPV6: "icmp"},
}
LONGEST_SERVED = 65000  # bytes of what a service says: over either family there is room for that
MAX_SEGMENTS = 128  # of a UDP super-datagram (linux/udp.h): no kernel makes more, and each costs a call


class Stack:
    """A user-mode TCP/IP stack for one guest link.

    `emit` is called with the buffers of each frame to send.  `addresses` are ours, packed, the first of
    each family being the gateway.  `secret` (16 random bytes) keys RFC 6528's sequence numbers.  `advertised` is what
    router advertisements say; without, there are none.  `sources` are the networks, packed address and prefix length,
    from which guests may open flows; without, from anywhere (RFC 2827 is why not).
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
    ) -> None:
        self.user = user
        self.watcher: Watcher | None = None
        self.steering: Steering | None = None  # while others share the link
        self.services: dict[int, LinkService] = {}  # by UDP port
        self.limits = limits or Limits()
        # the caller's, if it has others to keep beside ours
        self.timers = Timers() if timers is None else timers
        self.acks = Acks(self.limits.tcp_ack_delay, self.timers)
        self.tcp: dict[bytes, TcpConnection] = {}
        self.udp: OrderedDict[bytes, UdpFlow] = OrderedDict()  # the one idle longest first
        self.echo: OrderedDict[bytes, EchoFlow] = OrderedDict()  # likewise
        self.dropped: Counter[str] = Counter()  # by reason
        self.costly = 0  # frames so far that cost many times what others do: of new flows, strays, fragments
        self.addresses = addresses
        self.flow_ids: Iterator[int] = count(1)  # to come; stacks that share a link have their own
        # those the guest opens whose handshake is not over, in SYN-HELD or SYN-RECEIVED, the oldest first
        self.pending: dict[bytes, TcpConnection] = {}
        self.memory = Memory(self.limits.tcp_memory)
        self.link = Link(
            emit,
            mac=mac,
            mtu=mtu,
            offloads=offloads or Offloads(),
            own=addresses,
            limits=self.limits,
            dropped=self.dropped,
            timers=self.timers,
        )
        self._sources = None if sources is None else dict(_masked(*each) for each in sources)
        self._speaks_ipv6 = any(len(address) == 16 for address in addresses)
        self._router = None if advertised is None else Router(self.link, advertised, self.timers)
        self._secret = secret
        self._reassembly = Reassembly(self.limits, self.dropped, self.timers)
        self._packets = PacketWriter(self.link, int.from_bytes(secret[:2], "big"))
        self.time_wait = TimeWait(self.limits, self.dropped, self.timers, self._packets.segment)
        self._frame = memoryview(b"")  # being handled, should it be for another on the link
        self._quoted = memoryview(b"")  # the packet being handled, should an ICMP error quote it
        self._source_mac = b""
        self._checksums_are_left_to_us = self.link.offloads.vnet_header == virtio.SIZE

    # -- frames -------------------------------------------------------------------------------------

    def receive(self, frame: memoryview, now: float) -> None:
        """One frame from the guest, with its virtio header if the link has one.

        `frame` is lent until the return, or for as long as its owner and the users agree.  Nothing a guest can
        send raises: what is malformed is counted in `dropped`, by reason.  ACKs that can wait for more frames are
        sent by `flush`.
        """
        if len(frame) >= common.SIZE and self._checksums_are_left_to_us and self._receive_common(frame, now):
            return
        try:
            self._receive(frame, now)
        except BadPacket as bad:
            self.dropped[bad.reason] += 1

    def receive_known(self, frame: memoryview, now: float) -> bool:
        """Receive a frame if it is of a known flow, and return whether it was.

        Only where the link `knows_at_a_glance`."""
        return len(frame) >= common.SIZE and self._receive_common(frame, now)

    @property
    def knows_at_a_glance(self) -> bool:
        """Whether the link's frames can go the short way."""
        return self._checksums_are_left_to_us

    def _receive_common(self, frame: memoryview, now: float) -> bool:
        """The short way, for frames of known flows with nothing about them to consider.  Whether it was one."""
        size = len(frame)
        (
            flags, gso_type, destination, kind, tos, length, fragment, ttl,
            protocol, addresses, ports, seq, ack, offset_flags, window, urgent, stamp,
        ) = common.parse(frame) if size < common.SIZE_STAMPED else common.parse_stamped(frame)  # fmt: skip
        end = common.IP_AT + length
        if (
            not flags & common.SUMMED
            or kind != common.PLAIN_IPV4
            or fragment & common.PIECE
            or ttl < 2
            or end > size
            or destination != self.link.mac
        ):
            return (
                kind[:2] == common.IPV6 and size >= common.SIZE6 and self._receive_common6(frame, size, now)
            )
        if protocol == ip.TCP:
            connection = self.tcp.get(addresses + ports)
            if (
                connection is None
                or offset_flags & common.OFFSET_OR_SYN != connection.head
                or tos & _DSCP != connection.tos
                or end < (at := connection.text_at)
            ):
                return False
            known = connection.stamp
            payload = frame[at:end]
            if (
                offset_flags & common.CONTROL != tcp.ACK
                or (known and known != stamp and not connection.restamp(stamp, seq, now))
                or not connection.in_order(seq, ack, window, payload, now)
            ):
                options = frame[common.TCP_PAYLOAD : at] or None
                segment = tcp.Segment(seq, ack, offset_flags & 0xFF, window, payload, options, urgent)
                connection.segment_arrives(segment, now)
            return True
        if protocol == ip.UDP and gso_type == virtio.GSO_NONE and seq >> 16 == length - ip.IPV4_SIZE:
            flow = self.udp.get(addresses + ports)
            if flow is not None and flow.user is not None and length >= ip.IPV4_SIZE + udp.SIZE:
                if not flow.answered:
                    flow.heard(now)
                flow.last = now  # as `UdpFlow.used` has it
                self.udp.move_to_end(flow.key)
                flow.received += end - common.UDP_PAYLOAD
                marks = ttl << 16 | tos << 8 | fragment >> 14
                flow.user.datagram(flow, frame[common.UDP_PAYLOAD : end], marks, 0)
                return True
        return False

    def _receive_common6(self, frame: memoryview, size: int, now: float) -> bool:
        """The same for IPv6, spelled out once more: every call in there is one for each frame."""
        (
            flags, gso_type, destination, _, word, length, protocol, ttl,
            addresses, ports, seq, ack, offset_flags, window, urgent, stamp,
        ) = common.parse6(frame) if size < common.SIZE6_STAMPED else common.parse6_stamped(frame)  # fmt: skip
        end = common.IP_AT + ip.IPV6_SIZE + length
        tos = word >> 20 & 0xFF
        if (
            not flags & common.SUMMED
            or word >> 28 != 6
            or ttl < 2
            or end > size
            or destination != self.link.mac
        ):
            return False
        if protocol == ip.TCP:
            connection = self.tcp.get(addresses + ports)
            if (
                connection is None
                or offset_flags & common.OFFSET_OR_SYN != connection.head
                or tos & _DSCP != connection.tos
                or end < (at := connection.text_at)
            ):
                return False
            known = connection.stamp
            payload = frame[at:end]
            if (
                offset_flags & common.CONTROL != tcp.ACK
                or (known and known != stamp and not connection.restamp(stamp, seq, now))
                or not connection.in_order(seq, ack, window, payload, now)
            ):
                options = frame[common.TCP_PAYLOAD6 : at] or None
                segment = tcp.Segment(seq, ack, offset_flags & 0xFF, window, payload, options, urgent)
                connection.segment_arrives(segment, now)
            return True
        if protocol == ip.UDP and gso_type == virtio.GSO_NONE and seq >> 16 == length >= udp.SIZE:
            flow = self.udp.get(addresses + ports)
            if flow is not None and flow.user is not None:
                if not flow.answered:
                    flow.heard(now)
                flow.last = now
                self.udp.move_to_end(flow.key)
                flow.received += end - common.UDP_PAYLOAD6
                flow.user.datagram(flow, frame[common.UDP_PAYLOAD6 : end], ttl << 16 | tos << 8 | 1, 0)
                return True
        return False

    def _receive(self, frame: memoryview, now: float) -> None:
        self._frame = frame
        summed = False
        segment_size = 0
        at = self.link.offloads.vnet_header
        if at:
            if len(frame) < at:
                raise BadPacket("virtio-truncated")
            flags, gso_type, _, gso_size, _, _ = virtio.parse(frame)
            summed = flags & (virtio.NEEDS_CSUM | virtio.DATA_VALID) != 0
            if gso_type == virtio.GSO_UDP_L4:
                segment_size = gso_size
                if len(frame) > at + ethernet.SIZE + ip.IPV6_SIZE + udp.SIZE + gso_size * MAX_SEGMENTS:
                    raise BadPacket("udp-segments")
        if len(frame) < at + ethernet.SIZE:
            raise BadPacket("ethernet-truncated")
        destination, self._source_mac, kind = ethernet.parse(frame, at)
        to_group = destination != self.link.mac
        if to_group and not destination[0] & 1:
            raise BadPacket("ethernet-not-ours")
        if kind == ethernet.IPV4:
            packet = ip.parse_ipv4(frame[at + ethernet.SIZE :])
        elif kind == ethernet.ARP:
            told = self.steering is not None and self.steering.hops > 0
            self.link.arp_arrives(frame[at + ethernet.SIZE :], answered=told)
            if self.steering is not None:
                self.steering.tell(frame)
            return
        elif kind != ethernet.IPV6:
            raise BadPacket("ethernet-type")
        elif self._speaks_ipv6:
            packet = self._parse_ipv6(frame[at + ethernet.SIZE :], to_group)
        else:
            raise BadPacket("ipv6-off")
        if to_group and (packet.protocol != ip.UDP or ip.is_unicast(packet.destination)):
            self._group(packet, summed)
        else:  # a service may want what is to a group
            self._packet(packet, summed, segment_size, now)

    def _parse_ipv6(self, view: memoryview, to_group: bool) -> ip.Packet:
        try:
            return ip.parse_ipv6(view)
        except BadParameter as bad:
            if not to_group:
                self._parameter_problem(view, bad.code, bad.pointer)
            raise

    def _parameter_problem(self, view: memoryview, code: int, pointer: int) -> None:
        """RFC 4443 3.4, as from the destination, which would have said so.  What it is about is no error itself: the
        errors that kernels send have no extension headers."""
        source, destination = bytes(view[8:24]), bytes(view[24:40])
        if ip.is_unicast(source) and source not in self.addresses:
            error = IcmpError(icmp.V6_PARAMETER, code, pointer, offender=destination)
            self._packets.error(view, error, by=destination)

    def _group(self, packet: ip.Packet, summed: bool) -> None:
        """Broadcast and multicast end here, but for neighbour discovery: nobody else is on the link, and the host's
        groups are not the guest's."""
        if self.steering is not None and self.steering.give_to_first(self._frame):
            return
        if packet.protocol == ip.ICMPV6 and len(packet.addresses) == 32:
            message = icmp.parse(packet.payload)
            if message.type in ndp.TYPES or message.type in icmp.V6_GROUPS:
                if not summed:
                    self._verify(packet, ip.ICMPV6, len(packet.payload))
                self._on_link(packet, message)
                return
        name = _NAMES[len(packet.addresses)].get(packet.protocol)
        if name is None:
            raise BadPacket("ip-protocol")
        raise _to_group(packet, name)

    def flush(self) -> None:
        """Send the ACKs that waited for more frames.  Call it after each batch of frames and user calls."""
        self.acks.flush()

    @property
    def deadline(self) -> float:
        """When `handle_timers` is wanted next; infinity: no timer runs."""
        return self.timers.deadline

    def handle_timers(self, now: float) -> None:
        self.timers.expire(now)

    def _learn(self, packet: ip.Packet) -> None:
        """A new flow tells whose link address it comes from, as good as ARP would."""
        self.costly += 1
        source, destination = packet.source, packet.destination
        if source in self.addresses:
            raise BadPacket("ip-source-ours")
        if self._sources is not None:
            mask, network = self._sources[len(source)]
            if int.from_bytes(source, "big") & mask != network and not ip.is_link_local(source):
                raise BadPacket("ip-source-foreign")
        self.link.learn(source, self._source_mac)
        if destination not in self.addresses and len(source) == 16:
            if ip.is_link_local(destination):  # it would be on this link: nobody is
                self._packets.error(self._quoted, Refusal.HOST_UNREACHABLE, by=destination)
                raise BadPacket("ip-link-local")
            if ip.is_link_local(source):  # RFC 4291 2.5.6: not for us to forward
                error = IcmpError(icmp.V6_UNREACHABLE, icmp.V6_BEYOND_SCOPE)
                self._packets.error(self._quoted, error, by=destination)
                raise BadPacket("ip-link-local")

    # -- packets ------------------------------------------------------------------------------------

    def _packet(self, packet: ip.Packet, summed: bool, segment_size: int, now: float) -> None:
        is_fragment = packet.more_fragments or packet.fragment_offset
        if (
            self.steering is not None
            and (is_fragment or packet.protocol != ip.TCP)
            and self.steering.give_to_first(self._frame)
        ):
            return
        if is_fragment:
            self.costly += 1
            whole = self._reassembly.add(packet, now)
            if whole is None:
                return
            packet, summed = whole, False
            ip.put_together(packet)
            if self.steering is not None:
                self._frame = self._in_one(packet)
        protocol = packet.protocol
        self._quoted = packet.whole
        if packet.ttl <= 1 and packet.destination not in self.addresses and ip.is_unicast(packet.destination):
            self._expired(packet)
        if protocol == ip.TCP:
            self._tcp(packet, summed, now)
        elif protocol == ip.UDP:
            self._udp(packet, summed, segment_size, now)
        elif protocol == (ip.ICMP if len(packet.addresses) == 8 else ip.ICMPV6):
            self._icmp(packet, summed, now)
        else:
            if len(packet.addresses) == 32 and protocol != ip.NO_NEXT_HEADER:
                self._parameter_problem(packet.whole, ip.UNKNOWN_HEADER, ip.next_header_at(packet.whole))
            raise BadPacket("ip-protocol")

    def _in_one(self, packet: ip.Packet) -> memoryview:
        """The frame of a packet that came in pieces."""
        size, kind = len(packet.payload), ethernet.IPV4 if len(packet.addresses) == 8 else ethernet.IPV6
        header = ip.pack(packet.addresses, packet.protocol, size, ttl=packet.ttl, tos=packet.tos)
        prefix = virtio.NONE[: self.link.offloads.vnet_header] + ethernet.pack(
            self.link.mac, self._source_mac, kind
        )
        return memoryview(b"".join((prefix, header, packet.payload)))

    def _expired(self, packet: ip.Packet) -> None:
        """A router's answer to a packet that has used up its hops (RFC 1812 5.3.1): we are the first."""
        ipv4 = len(packet.addresses) == 8
        is_error = packet.protocol in (ip.ICMP, ip.ICMPV6) and bytes(packet.payload[:1]) not in _ECHO
        if ip.is_unicast(packet.source) and packet.source not in self.addresses and not is_error:
            kind = icmp.TIME_EXCEEDED if ipv4 else icmp.V6_TIME_EXCEEDED
            self._packets.error(packet.whole, IcmpError(kind, 0), by=packet.destination)
        raise BadPacket("ip-ttl")

    def _verify(self, packet: ip.Packet, protocol: int, length: int) -> None:
        pseudo = checksum.pseudo_header(packet.addresses, protocol, length)
        if (pseudo + checksum.total(packet.payload[:length])) % 0xFFFF:
            raise BadPacket("checksum")

    # -- TCP ----------------------------------------------------------------------------------------

    def _tcp(self, packet: ip.Packet, summed: bool, now: float) -> None:
        segment = tcp.parse(packet.payload)
        if not summed:
            self._verify(packet, ip.TCP, len(packet.payload))
        key = packet.addresses + packet.payload[:4]
        connection = self.tcp.get(key)
        if connection is not None:
            if packet.tos & _DSCP != connection.tos:
                connection.traffic_class(packet.tos & _DSCP)
            connection.segment_arrives(segment, now)
        elif key in self.time_wait.records and self.time_wait.segment_arrives(key, segment, now):
            pass
        elif segment.flags & (tcp.SYN | tcp.ACK | tcp.RST) == tcp.SYN:
            self._open(packet, key, segment, now)
        elif self.steering is None or not self.steering.pass_on(self._frame):
            self._stray(packet, segment)

    def _open(self, packet: ip.Packet, key: bytes, segment: tcp.Segment, now: float) -> None:
        if not (ip.is_unicast(packet.destination) and ip.is_unicast(packet.source)):
            raise BadPacket("tcp-not-unicast")
        if len(self.tcp) >= self.limits.tcp_connections and not self._make_room(now):
            self._learn(packet)
            self._packets.error(self._quoted, Refusal.NET_UNREACHABLE, by=packet.destination)
            return
        self._learn(packet)
        connection = TcpConnection(self, key, self._isn(key, now), SYN_HELD, self.link.mtu - 40)
        connection.opened = now
        connection.ttl, connection.tos = packet.ttl, packet.tos & _DSCP
        connection.syn_arrives(segment, now)
        self.tcp[key] = self.pending[key] = connection
        if self.watcher is not None:
            self.watcher.opened("tcp", connection)
        self.user.tcp_opened(connection)
        if len(self.pending) > self.limits.tcp_pending:
            self.dropped["limit-tcp-pending"] += 1
            next(iter(self.pending.values())).give_way()

    def _make_room(self, now: float) -> bool:
        """Return whether there is room in the table now, which was full: the oldest connection whose handshake is not
        over has given way, unless it has only begun."""
        self.dropped["limit-tcp-connections"] += 1
        oldest = next(iter(self.pending.values()), None)
        if oldest is None or not oldest.may_give_way(now):
            return False
        oldest.give_way()
        return True

    def connect_tcp(
        self, key: bytes, user: TcpUser, now: float, host: tuple[str, int] | None = None
    ) -> TcpConnection:
        """Open a connection to the guest, for a client at `host`.  Raises `KeyError` if that one exists or the table
        is full.
        """
        full = len(self.tcp) >= self.limits.tcp_connections
        if key in self.tcp or (full and not self._make_room(now)):
            raise KeyError(key)
        self.time_wait.discard(key)
        connection = TcpConnection(self, key, self._isn(key, now), SYN_SENT, self.link.mtu - 40)
        connection.user, connection.opened, connection.host = user, now, host
        self.tcp[key] = connection
        if self.watcher is not None:
            self.watcher.opened("tcp", connection)
        connection.connect(now)
        return connection

    def _isn(self, key: bytes, now: float) -> int:
        """RFC 6528"""
        digest = blake2b(key, digest_size=4, key=self._secret).digest()
        return seq.add(int.from_bytes(digest, "big"), int(now * ISN_TICKS))

    def opened(self, connection: TcpConnection) -> None:
        """Its handshake is over, one way or the other."""
        self.pending.pop(connection.key, None)

    def forget(self, connection: TcpConnection) -> None:
        if self.tcp.get(connection.key) is connection:
            del self.tcp[connection.key]
            if self.watcher is not None:
                self.watcher.closed("tcp", connection)

    def refuse(self, connection: TcpConnection, why: Refusal | IcmpError) -> None:
        """The answer to a SYN that has been on hold: the original is gone, but its numbers are known."""
        if self.watcher is not None:
            self.watcher.refused("tcp", connection, why)
        size = (len(connection.key) - 4) // 2
        source, destination = connection.key[:size], connection.key[size : 2 * size]
        irs = seq.add(connection.rcv.nxt, -1)
        if why is Refusal.RESET:
            self._packets.segment(connection.key, 0, connection.rcv.nxt, tcp.RST | tcp.ACK)
        else:
            header = ip.pack(source + destination, ip.TCP, tcp.SIZE, ttl=connection.ttl)
            ports = connection.key[-4:]
            quoted = header + ports + irs.to_bytes(4, "big") + bytes(4) + bytes((0x50, tcp.SYN)) + bytes(6)
            self._packets.error(memoryview(quoted), why, by=destination)

    def refused_inside(self, connection: TcpConnection, why: Refusal | IcmpError) -> None:
        """The guest does not take a connection to it: it says so, or nothing."""
        if self.watcher is not None:
            self.watcher.refused("tcp", connection, why)

    def _stray(self, packet: ip.Packet, segment: tcp.Segment) -> None:
        """3.10.7.1: a segment for no connection."""
        self.dropped["tcp-stray"] += 1
        unicast = ip.is_unicast(packet.source) and ip.is_unicast(packet.destination)
        if segment.flags & tcp.RST or not unicast:
            return
        self._learn(packet)
        key = packet.addresses + packet.payload[:4]
        if segment.flags & tcp.ACK:
            self._packets.segment(key, segment.ack, 0, tcp.RST)
        else:
            number = seq.add(segment.seq, segment.length)
            self._packets.segment(key, 0, number, tcp.RST | tcp.ACK)

    # -- UDP ----------------------------------------------------------------------------------------

    def _udp(self, packet: ip.Packet, summed: bool, segment_size: int, now: float) -> None:
        _, _, check, payload = udp.parse(packet.payload)
        if not summed and (check or len(packet.addresses) != 8):  # over IPv4 zero means none
            self._verify(packet, ip.UDP, udp.SIZE + len(payload))
        key = packet.addresses + packet.payload[:4]
        flow = self.udp.get(key)
        if flow is None:
            if self._is_served(packet, payload, segment_size, now):
                return
            flow = self._open_udp(packet, key, now)
            if flow is None:
                return
        if not flow.answered:
            flow.heard(now)
        flow.used(now)
        flow.received += len(payload)
        if flow.user is not None:
            segment_size = segment_size if segment_size < len(payload) else 0
            flow.user.datagram(flow, payload, packet.marks, segment_size)

    def _is_served(self, packet: ip.Packet, payload: memoryview, segment_size: int, now: float) -> bool:
        """Whether it was for a service."""
        source_port, port, _, _ = udp.HEADER.unpack_from(packet.payload)
        service = self.services.get(port)
        if service is None or segment_size:
            return False
        source, destination = packet.source, packet.destination
        if source in self.addresses or (destination not in self.addresses and ip.is_unicast(destination)):
            return False
        asked = LinkDatagram(bytes(payload), source, source_port, destination, port, self._source_mac)
        return service.datagram(asked, now)

    def send_datagram(self, datagram: LinkDatagram) -> None:
        """Send a datagram of no flow.  One that no packet can carry is dropped and counted."""
        if len(datagram.payload) > LONGEST_SERVED or len(datagram.source) != len(datagram.destination):
            self.dropped["service-reply"] += 1
        else:
            self._packets.datagram(datagram)

    def _open_udp(self, packet: ip.Packet, key: bytes, now: float) -> UdpFlow | None:
        if not ip.is_unicast(packet.destination):
            raise _to_group(packet, "udp")
        if not ip.is_unicast(packet.source):
            raise BadPacket("udp-source")
        self._learn(packet)
        flow = self.add_udp(key, now)
        refusal = self.user.udp_opened(flow)
        if refusal is None:
            return flow
        if self.watcher is not None:
            self.watcher.refused("udp", flow, refusal)
        flow.close()
        self._packets.error(self._quoted, refusal, by=packet.destination)
        return None

    def add_udp(self, key: bytes, now: float, host: tuple[str, int] | None = None) -> UdpFlow:
        """The flow of that key, made if it is not there; the one idle longest makes room.  `host`: the client on the
        host's side that opens it."""
        flow = self.udp.get(key)
        if flow is None:
            if len(self.udp) >= self.limits.udp_flows:
                self.dropped["limit-udp-flows"] += 1
                self.evict_udp()
            flow = self.udp[key] = UdpFlow(self, key, now, host)
            if self.watcher is not None:
                self.watcher.opened("udp", flow)
        return flow

    def evict_udp(self, spare: bytes = b"") -> None:
        """Close the UDP flow that has been idle longest, but for the one named `spare`."""
        next(flow for key, flow in self.udp.items() if key != spare).close()

    def forget_udp(self, flow: UdpFlow) -> None:
        if self.udp.get(flow.key) is flow:  # another may have its name by now
            del self.udp[flow.key]
            if self.watcher is not None:
                self.watcher.closed("udp", flow)

    def refuse_udp(self, flow: UdpFlow, why: Refusal | IcmpError, payload: bytes | memoryview) -> None:
        size = (len(flow.key) - 4) // 2
        length = udp.SIZE + len(payload)
        header = ip.pack(flow.key[: 2 * size], ip.UDP, length)
        datagram = flow.key[-4:] + length.to_bytes(2, "big") + bytes(2) + payload
        pseudo = checksum.pseudo_header(flow.key[: 2 * size], ip.UDP, length)
        check = checksum.checksum(pseudo, checksum.total(datagram))
        quoted = header + datagram[:6] + check.to_bytes(2, "big") + datagram[8:]
        self._packets.error(memoryview(quoted), why, by=flow.key[size : 2 * size])

    def send_udp(self, header: FlowHeader, payload: bytes | memoryview) -> None:
        """A UDP datagram that exceeds the MTU, or whose guest is not resolved yet."""
        layer4 = bytes(memoryview(header.buffer)[header.layer4 :]) + payload
        ttl, tos = header.marks >> 8, header.marks & 0xFF
        self._packets.send(header.addresses, ip.UDP, layer4, ttl=ttl, tos=tos)

    # -- ICMP ---------------------------------------------------------------------------------------

    def _icmp(self, packet: ip.Packet, summed: bool, now: float) -> None:
        message = icmp.parse(packet.payload)
        ipv4 = len(packet.addresses) == 8
        if not summed:
            if not ipv4:
                self._verify(packet, ip.ICMPV6, len(packet.payload))
            elif checksum.total(packet.payload):
                raise BadPacket("checksum")
        if not ipv4 and message.type in ndp.TYPES:
            self._on_link(packet, message)
            return
        if message.type == (icmp.UNREACHABLE if ipv4 else icmp.V6_TOO_BIG) and (
            not ipv4 or message.code == icmp.FRAGMENTATION_NEEDED
        ):
            self._too_big(message, ipv4, now)
            return
        if message.type == (icmp.UNREACHABLE if ipv4 else icmp.V6_UNREACHABLE):
            self._unreachable(message, ipv4)
        if message.type != (icmp.ECHO if ipv4 else icmp.V6_ECHO):
            raise BadPacket("icmp-type")
        if not (ip.is_unicast(packet.destination) and ip.is_unicast(packet.source)):
            raise BadPacket("icmp-not-unicast")
        if packet.destination in self.addresses:
            self._learn(packet)
            self._packets.echo_reply(
                packet.addresses, message.high, message.low, message.payload, tos=packet.tos
            )
            return
        key = packet.addresses + packet.payload[4:6] + bytes(2)
        flow = self.echo.get(key)
        if flow is None:
            self._learn(packet)
            if len(self.echo) >= self.limits.echo_flows:
                self.dropped["limit-echo-flows"] += 1
                next(iter(self.echo.values())).close()
            flow = self.echo[key] = EchoFlow(self, key, now)
            if self.watcher is not None:
                self.watcher.opened("icmp", flow)
            refusal = self.user.echo_opened(flow)
            if refusal is not None:
                if self.watcher is not None:
                    self.watcher.refused("icmp", flow, refusal)
                flow.close()
                self._packets.error(packet.whole, refusal, by=packet.destination)
                return
        flow.used(now)
        flow.received += len(message.payload)
        if flow.user is not None:
            flow.user.echo(flow, message.low, message.payload, packet)

    def _on_link(self, packet: ip.Packet, message: icmp.Message) -> None:
        """Neighbour discovery, which comes from this link and in one piece (RFC 4861 6.1, 7.1; RFC 6980)."""
        if message.type in icmp.V6_GROUPS:
            return  # every group of this link is received here anyway
        if packet.ttl != ndp.HOP_LIMIT or message.code or packet.whole[6] != ip.ICMPV6:
            raise BadPacket("ndp-header")
        neighbour = ndp.parse(packet.payload)
        if neighbour.type == ndp.ADVERTISEMENT and self.steering is not None:
            self.steering.tell(self._frame)
        if neighbour.type != ndp.ROUTER_SOLICITATION:
            self.link.neighbour_arrives(packet, neighbour, self._source_mac)
        elif self._router is not None:
            self._router.solicited(packet, neighbour, self._source_mac)

    def _unreachable(self, message: icmp.Message, ipv4: bool) -> None:
        """What we have sent was not welcome: that ends a connection we are opening."""
        quoted = message.payload
        protocol, key, number = _about(quoted, ipv4)
        if protocol != ip.TCP:
            return
        connection = self.tcp.get(key)
        if connection is None and self.steering is not None:
            self.steering.pass_on(self._frame)
        if connection is not None:
            connection.unreachable(number, IcmpError(message.type, message.code))

    def _too_big(self, message: icmp.Message, ipv4: bool, now: float) -> None:
        """A router behind the guest has no room for what we have sent.  It is believed if we may have."""
        mtu = message.low if ipv4 else message.high << 16 | message.low
        if not mtu:  # said before RFC 1191 there was
            mtu = SMALLEST_MTU[4]
        protocol, key, number = _about(message.payload, ipv4)
        size = 4 if ipv4 else 16
        guest, ours = key[:size], key[size : 2 * size]
        if protocol == ip.TCP:
            connection = self.tcp.get(key)
            if connection is not None:
                connection.too_big(number, mtu, now)
            elif self.steering is not None:
                self.steering.pass_on(self._frame)
        elif key in self.udp or key in self.echo or (ours in self.addresses and guest not in self.addresses):
            self.link.narrow(guest, mtu)

    def forget_echo(self, flow: EchoFlow) -> None:
        if self.echo.get(flow.key) is flow:
            del self.echo[flow.key]
            if self.watcher is not None:
                self.watcher.closed("icmp", flow)

    def refuse_echo(
        self,
        flow: EchoFlow,
        why: Refusal | IcmpError,
        sequence: int,
        payload: bytes | memoryview,
        check: int | None,
    ) -> None:
        size = (len(flow.key) - 4) // 2
        kind, protocol = (icmp.ECHO, ip.ICMP) if size == 4 else (icmp.V6_ECHO, ip.ICMPV6)
        header = ip.pack(flow.key[: 2 * size], protocol, icmp.SIZE + len(payload))
        message = icmp.HEADER.pack(kind, 0, 0, flow.identifier, sequence) + payload
        if check is None:
            pseudo = 0 if size == 4 else checksum.pseudo_header(flow.key[:32], protocol, len(message))
            check = checksum.checksum(pseudo, checksum.total(message))
        quoted = header + message[:2] + check.to_bytes(2, "big") + message[4:]
        self._packets.error(memoryview(quoted), why, by=flow.key[size : 2 * size])

    def reply_echo(
        self, flow: EchoFlow, sequence: int, payload: bytes | memoryview, ttl: int, tos: int
    ) -> None:
        self._packets.echo_reply(flow.key[:-4], flow.identifier, sequence, payload, ttl=ttl, tos=tos)

    def stats(self) -> dict[str, int]:
        """Gauges, those that `Limits` bounds by its names; then counts of what was dropped, by reason."""
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


def _masked(address: bytes, prefix: int) -> tuple[int, tuple[int, int]]:
    """A network by the size of its addresses: its mask, and its address."""
    bits = 8 * len(address)
    mask = ((1 << prefix) - 1) << (bits - prefix)
    return len(address), (mask, int.from_bytes(address, "big") & mask)


def _about(quoted: memoryview, ipv4: bool) -> tuple[int, bytes, int]:
    """What an ICMP error of the guest's is about, which we have sent: protocol, the flow's key, sequence number.

    Raises `BadPacket`.
    """
    size, header = (4, ip.IPV4_SIZE) if ipv4 else (16, ip.IPV6_SIZE)
    if len(quoted) < header + 8:
        raise BadPacket("icmp-quoted")
    protocol = quoted[9 if ipv4 else 6]
    at = header - 2 * size  # of our address, then the guest's
    if protocol in (ip.ICMP, ip.ICMPV6):  # an echo's reply: its identifier
        ports = bytes(quoted[header + 4 : header + 6]) + bytes(2)
    else:
        ports = bytes(quoted[header + 2 : header + 4]) + bytes(quoted[header : header + 2])
    key = bytes(quoted[at + size : header]) + bytes(quoted[at : at + size]) + ports
    return protocol, key, int.from_bytes(quoted[header + 4 : header + 8], "big")


def _to_group(packet: ip.Packet, name: str) -> BadPacket:
    return BadPacket(f"{name}-multicast" if ip.is_multicast(packet.destination) else f"{name}-broadcast")
