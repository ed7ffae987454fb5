"""The stack: frames in, frames out, and the tables of flows between them.

`Stack.receive` is the way in for every frame, `Link.emit` the way out; `StackUser` hears of new flows.
It looks like a small router: it answers for its own addresses (ARP, echo), and turns everything else into
flows that its user carries on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from itertools import islice
from typing import TypeVar

from . import seq
from .echo import EchoFlow
from .header import FlowHeader
from .limits import Limits
from .link import Link
from .offloads import Offloads
from .reassembly import Reassembly
from .tcp import LISTEN, SYN_SENT, TIME_WAIT, State, TcpConnection
from .timers import Timers
from .udp import UdpFlow
from .user import Refusal, StackUser, TcpUser
from .wire import BadPacket, checksum, ethernet, icmp, ip, tcp, udp, virtio

ISN_TICKS = 250_000  # per second: RFC 9293 3.4.1's 4-microsecond clock
_ICMP_CODES = {
    Refusal.RESET: icmp.PORT,
    Refusal.NET_UNREACHABLE: icmp.NET,
    Refusal.HOST_UNREACHABLE: icmp.HOST,
    Refusal.PROHIBITED: icmp.PROHIBITED,
}
_FRAGMENT_UNIT = 8
MAX_SEGMENTS = 128  # of a UDP super-datagram (linux/udp.h): no kernel makes more, and each costs a call


class Stack:
    """A user-mode TCP/IP stack for one guest link.

    `emit` is called with the buffers of each frame to send.  `addresses` are ours, packed, the first of
    each family being the gateway.  `secret` (16 random bytes) keys RFC 6528's sequence numbers.
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
    ) -> None:
        self.user = user
        self.limits = limits or Limits()
        self.timers = (
            Timers() if timers is None else timers
        )  # the caller's, if it has others to keep beside ours
        self.acks: list[TcpConnection] = []
        self.tcp: dict[bytes, TcpConnection] = {}
        self.udp: dict[bytes, UdpFlow] = {}
        self.echo: dict[bytes, EchoFlow] = {}
        self.dropped: Counter[str] = Counter()  # by reason
        self.addresses = addresses
        self.link = Link(
            emit,
            mac=mac,
            mtu=mtu,
            offloads=offloads or Offloads(),
            own=addresses,
            neighbour_limit=self.limits.neighbours,
            waiting_limit=self.limits.waiting_frames,
        )
        self._secret = secret
        self._reassembly = Reassembly(self.limits.fragments, self.limits.reassembly)
        self._identification = int.from_bytes(secret[:2], "big")
        self._quoted = memoryview(b"")  # the packet being handled, should an ICMP error quote it
        self._source_mac = b""

    # -- frames -------------------------------------------------------------------------------------

    def receive(self, frame: memoryview, now: float) -> None:
        """One frame from the guest, with its virtio header if the link has one.

        `frame` is lent until the return.  Nothing a guest can send raises: what is malformed is counted
        in `dropped`, by reason.  ACKs that can wait for more frames are sent by `flush`.
        """
        try:
            self._receive(frame, now)
        except BadPacket as bad:
            self.dropped[bad.reason] += 1

    def _receive(self, frame: memoryview, now: float) -> None:
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
        if destination != self.link.mac and not destination[0] & 1:
            raise BadPacket("ethernet-not-ours")
        if kind == ethernet.IPV4:
            packet = ip.parse_ipv4(frame[at + ethernet.SIZE :])
        elif kind == ethernet.ARP:
            self._arp(frame[at + ethernet.SIZE :])
            return
        elif kind == ethernet.IPV6:
            packet = ip.parse_ipv6(frame[at + ethernet.SIZE :])
        else:
            raise BadPacket("ethernet-type")
        self._packet(packet, summed, segment_size, now)

    def flush(self) -> None:
        """Send the ACKs that waited for company.  Call it after each batch of frames and user calls."""
        if self.acks:
            due, self.acks = self.acks, []
            for connection in due:
                connection.flush_ack()

    @property
    def deadline(self) -> float:
        """When `handle_timers` is wanted next; infinity: no timer runs."""
        return self.timers.deadline

    def handle_timers(self, now: float) -> None:
        self.timers.expire(now)

    def _arp(self, frame: memoryview) -> None:
        if self.link.arp_arrives(frame):
            address = bytes(frame[14:18])
            self._neighbour_changed(address, self.link.mac_of(address))

    def _neighbour_changed(self, address: bytes, mac: bytes) -> None:
        flows: list[TcpConnection | UdpFlow] = [*self.tcp.values(), *self.udp.values()]
        for flow in flows:
            if flow.key.startswith(address) and len(flow.key) == 2 * len(address) + 4:
                flow.link_changed(mac)

    def _learn(self, packet: ip.Packet) -> None:
        """A new flow tells whose link address it comes from, as good as ARP would."""
        source = packet.source
        if source in self.addresses:
            raise BadPacket("ip-source-ours")
        if self.link.learn(source, self._source_mac):
            self._neighbour_changed(source, self._source_mac)

    # -- packets ------------------------------------------------------------------------------------

    def _packet(self, packet: ip.Packet, summed: bool, segment_size: int, now: float) -> None:
        if packet.more_fragments or packet.fragment_offset:
            whole = self._reassembly.add(packet, now)
            if whole is None:
                return
            packet, summed = whole, False
        protocol = packet.protocol
        self._quoted = packet.whole
        if protocol == ip.TCP:
            self._tcp(packet, summed, now)
        elif protocol == ip.UDP:
            self._udp(packet, summed, segment_size, now)
        elif protocol == (ip.ICMP if len(packet.addresses) == 8 else ip.ICMPV6):
            self._icmp(packet, summed, now)
        else:
            raise BadPacket("ip-protocol")

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
        if connection is not None and connection.state is TIME_WAIT and self._reopens(connection, segment):
            connection.handle_timer(now)  # RFC 6191: its time is over early
            connection = None
        if connection is not None:
            connection.segment_arrives(segment, now)
        elif segment.flags & (tcp.SYN | tcp.ACK | tcp.RST) == tcp.SYN:
            self._open(packet, key, segment, now)
        else:
            self._stray(packet, segment)

    def _reopens(self, connection: TcpConnection, segment: tcp.Segment) -> bool:
        is_syn = segment.flags & (tcp.SYN | tcp.ACK | tcp.RST) == tcp.SYN
        return is_syn and seq.less(connection.rcv.nxt, segment.seq)

    def _open(self, packet: ip.Packet, key: bytes, segment: tcp.Segment, now: float) -> None:
        if _not_unicast(packet.destination) or _not_unicast(packet.source):
            raise BadPacket("tcp-not-unicast")
        if len(self.tcp) >= self.limits.tcp_connections:
            self.dropped["limit-tcp-connections"] += 1
            self._stray(packet, segment)
            return
        self._learn(packet)
        connection = TcpConnection(self, key, self._isn(key, now), LISTEN, self.link.mtu - 40)
        connection.syn_arrives(segment, now)
        self.tcp[key] = connection
        self.user.tcp_opened(connection)

    def connect_tcp(self, key: bytes, user: TcpUser, now: float) -> TcpConnection:
        """Open a connection to the guest.  Raises `KeyError` if that one exists or the table is full."""
        if key in self.tcp or len(self.tcp) >= self.limits.tcp_connections:
            raise KeyError(key)
        connection = TcpConnection(self, key, self._isn(key, now), SYN_SENT, self.link.mtu - 40)
        connection.user = user
        self.tcp[key] = connection
        connection.connect(now)
        return connection

    def _isn(self, key: bytes, now: float) -> int:
        """RFC 6528"""
        digest = blake2b(key, digest_size=4, key=self._secret).digest()
        return seq.add(int.from_bytes(digest, "big"), int(now * ISN_TICKS))

    def forget(self, connection: TcpConnection) -> None:
        self.tcp.pop(connection.key, None)

    def refuse(self, connection: TcpConnection, refusal: Refusal) -> None:
        """The answer to a SYN that has been on hold: the original is gone, but its numbers are known."""
        size = (len(connection.key) - 4) // 2
        source, destination = connection.key[:size], connection.key[size : 2 * size]
        irs = seq.add(connection.rcv.nxt, -1)
        if refusal is Refusal.RESET:
            self._send_tcp(connection.key, 0, connection.rcv.nxt, tcp.RST | tcp.ACK)
        elif refusal is not Refusal.DROP:
            ports = connection.key[-4:]
            header = ip.pack(source + destination, ip.TCP, tcp.SIZE)
            quoted = header + ports + irs.to_bytes(4, "big") + bytes(4) + bytes((0x50, tcp.SYN)) + bytes(6)
            self._unreachable(memoryview(quoted), refusal, by=destination)

    def _stray(self, packet: ip.Packet, segment: tcp.Segment) -> None:
        """3.10.7.1: a segment for no connection."""
        self.dropped["tcp-stray"] += 1
        if segment.flags & tcp.RST or _not_unicast(packet.source) or _not_unicast(packet.destination):
            return
        self._learn(packet)
        key = packet.addresses + packet.payload[:4]
        if segment.flags & tcp.ACK:
            self._send_tcp(key, segment.ack, 0, tcp.RST)
        else:
            self._send_tcp(key, 0, seq.add(segment.seq, segment.length), tcp.RST | tcp.ACK)

    def _send_tcp(self, key: bytes, number: int, ack: int, flags: int) -> None:
        size = (len(key) - 4) // 2
        source = int.from_bytes(key[-2:], "big")
        target = int.from_bytes(key[-4:-2], "big")
        segment = tcp.pack(src_port=source, dst_port=target, seq=number, ack=ack, flags=flags, window=0)
        self._send(key[size : 2 * size] + key[:size], ip.TCP, segment, sum_at=16)

    # -- UDP ----------------------------------------------------------------------------------------

    def _udp(self, packet: ip.Packet, summed: bool, segment_size: int, now: float) -> None:
        _, _, check, payload = udp.parse(packet.payload)
        if not summed and (check or len(packet.addresses) != 8):  # over IPv4 zero means none
            self._verify(packet, ip.UDP, udp.SIZE + len(payload))
        key = packet.addresses + packet.payload[:4]
        flow = self.udp.get(key)
        if flow is None:
            flow = self._open_udp(packet, key, now)
            if flow is None:
                return
        flow.last = now
        if flow.user is not None:
            flow.user.datagram(flow, payload, packet.ttl, segment_size if segment_size < len(payload) else 0)

    def _open_udp(self, packet: ip.Packet, key: bytes, now: float) -> UdpFlow | None:
        if _not_unicast(packet.source):
            raise BadPacket("udp-source")
        self._learn(packet)
        flow = self.add_udp(key, now)
        refusal = self.user.udp_opened(flow)
        if refusal is None:
            return flow
        flow.close()
        self._unreachable(self._quoted, refusal, by=packet.destination)
        return None

    def add_udp(self, key: bytes, now: float) -> UdpFlow:
        """The flow of that key, made if it is not there; the flow idle longest makes room."""
        flow = self.udp.get(key)
        if flow is None:
            if len(self.udp) >= self.limits.udp_flows:
                self.dropped["limit-udp-flows"] += 1
                _idle_longest(self.udp).close()
            flow = self.udp[key] = UdpFlow(self, key, now)
        return flow

    def forget_udp(self, flow: UdpFlow) -> None:
        self.udp.pop(flow.key, None)

    def refuse_udp(self, flow: UdpFlow, refusal: Refusal) -> None:
        """An ICMP error about a datagram that is gone; its addresses and ports are what counts."""
        size = (len(flow.key) - 4) // 2
        header = ip.pack(flow.key[: 2 * size], ip.UDP, udp.SIZE)
        quoted = header + flow.key[-4:] + udp.SIZE.to_bytes(2, "big") + bytes(2)
        self._unreachable(memoryview(quoted), refusal, by=flow.key[size : 2 * size])

    def send_fragments(self, header: FlowHeader, payload: bytes | memoryview) -> None:
        """A UDP datagram that exceeds the MTU, or whose guest is not resolved yet."""
        layer4 = bytes(memoryview(header.buffer)[header.layer4 :]) + payload
        self._send(header.addresses, ip.UDP, layer4)

    # -- ICMP ---------------------------------------------------------------------------------------

    def _icmp(self, packet: ip.Packet, summed: bool, now: float) -> None:
        message = icmp.parse(packet.payload)
        ipv4 = len(packet.addresses) == 8
        if not summed:
            if not ipv4:
                self._verify(packet, ip.ICMPV6, len(packet.payload))
            elif checksum.total(packet.payload):
                raise BadPacket("checksum")
        if message.type != (icmp.ECHO if ipv4 else icmp.V6_ECHO):
            raise BadPacket("icmp-type")
        if _not_unicast(packet.destination) or _not_unicast(packet.source):
            raise BadPacket("icmp-not-unicast")
        if packet.destination in self.addresses:
            self._learn(packet)
            self._send_echo(packet.addresses, message.high, message.low, message.payload, 64)
            return
        key = packet.addresses + packet.payload[4:6] + bytes(2)
        flow = self.echo.get(key)
        if flow is None:
            self._learn(packet)
            if len(self.echo) >= self.limits.echo_flows:
                self.dropped["limit-echo-flows"] += 1
                _idle_longest(self.echo).close()
            flow = self.echo[key] = EchoFlow(self, key, now)
            refusal = self.user.echo_opened(flow)
            if refusal is not None:
                flow.close()
                self._unreachable(packet.whole, refusal, by=packet.destination)
                return
        flow.last = now
        if flow.user is not None:
            flow.user.echo(flow, message.low, message.payload, packet.ttl)

    def forget_echo(self, flow: EchoFlow) -> None:
        self.echo.pop(flow.key, None)

    def refuse_echo(self, flow: EchoFlow, refusal: Refusal) -> None:
        size = (len(flow.key) - 4) // 2
        ipv4 = size == 4
        kind, protocol = (icmp.ECHO, ip.ICMP) if ipv4 else (icmp.V6_ECHO, ip.ICMPV6)
        header = ip.pack(flow.key[: 2 * size], protocol, icmp.SIZE)
        quoted = header + icmp.HEADER.pack(kind, 0, 0, flow.identifier, 0)
        self._unreachable(memoryview(quoted), refusal, by=flow.key[size : 2 * size])

    def send_echo_reply(self, flow: EchoFlow, sequence: int, payload: bytes | memoryview, ttl: int) -> None:
        self._send_echo(flow.key[:-4], flow.identifier, sequence, payload, ttl)

    def _send_echo(
        self, addresses: bytes, identifier: int, sequence: int, payload: bytes | memoryview, ttl: int
    ) -> None:
        """The reply to a request that had these addresses."""
        size = len(addresses) // 2
        kind = icmp.ECHO_REPLY if size == 4 else icmp.V6_ECHO_REPLY
        message = icmp.HEADER.pack(kind, 0, 0, identifier, sequence) + payload
        protocol = ip.ICMP if size == 4 else ip.ICMPV6
        self._send(addresses[size:] + addresses[:size], protocol, message, sum_at=2, ttl=ttl)

    def _unreachable(self, quoted: memoryview, refusal: Refusal, *, by: bytes) -> None:
        """Destination unreachable for a packet the guest sent (RFC 1812 5.2.7.1, RFC 4443 3.1).

        A closed port is reported by the destination itself, everything else by the gateway.
        """
        if refusal is Refusal.DROP or _not_unicast(by):
            return
        ipv4 = len(by) == 4
        source = by if refusal is Refusal.RESET else self._gateway(len(by))
        code = _ICMP_CODES[refusal]
        guest = bytes(quoted[12:16] if ipv4 else quoted[8:24])
        if ipv4:
            message = icmp.HEADER.pack(icmp.UNREACHABLE, code, 0, 0, 0) + quoted[: (quoted[0] & 15) * 4 + 8]
            self._send(source + guest, ip.ICMP, message, sum_at=2)
        else:
            head = icmp.HEADER.pack(icmp.V6_UNREACHABLE, icmp.V6_CODES[code], 0, 0, 0)
            self._send(source + guest, ip.ICMPV6, head + quoted[: 1280 - 48], sum_at=2)

    def _gateway(self, size: int) -> bytes:
        return next((own for own in self.addresses if len(own) == size), bytes(size))

    # -- packets out, the unhurried way ---------------------------------------------------------------

    def _send(
        self, addresses: bytes, protocol: int, layer4: bytes, *, sum_at: int = -1, ttl: int = 64
    ) -> None:
        """A whole packet, summed here where `sum_at` says, in fragments where it exceeds the MTU."""
        if sum_at >= 0:
            pseudo = 0
            if protocol != ip.ICMP:
                pseudo = checksum.pseudo_header(addresses, protocol, len(layer4))
            check = checksum.checksum(pseudo, checksum.total(layer4))
            layer4 = layer4[:sum_at] + check.to_bytes(2, "big") + layer4[sum_at + 2 :]
        size = len(addresses) // 2
        guest = addresses[size:]
        prefix = self.link.prefix(guest)
        header_size = ip.IPV4_SIZE if size == 4 else ip.IPV6_SIZE
        if header_size + len(layer4) <= self.link.mtu:
            self.link.send(guest, prefix + ip.pack(addresses, protocol, len(layer4), ttl=ttl) + layer4)
            return
        self._identification = (self._identification + 1) & 0xFFFF
        if size != 4:
            header_size += _FRAGMENT_UNIT
        step = (self.link.mtu - header_size) // _FRAGMENT_UNIT * _FRAGMENT_UNIT
        for start in range(0, len(layer4), step):
            piece = layer4[start : start + step]
            more = start + step < len(layer4)
            if size == 4:
                header = ip.pack_ipv4(
                    addresses,
                    protocol,
                    len(piece),
                    ttl=ttl,
                    identification=self._identification,
                    fragment=start >> 3 | more << 13,
                )
            else:
                header = ip.pack_ipv6(addresses, ip.FRAGMENT, _FRAGMENT_UNIT + len(piece), ttl=ttl)
                header += ip.pack_ipv6_fragment(protocol, start, more, self._identification)
            self.link.send(guest, prefix + header + piece)

    def stats(self) -> dict[str, int]:
        """Gauges of the tables, then counts of what was dropped, by reason."""
        states = Counter(connection.state for connection in self.tcp.values())
        return {
            "tcp_connections": len(self.tcp),
            **{f"tcp_{state.name.lower()}": states[state] for state in State if states[state]},
            "udp_flows": len(self.udp),
            "echo_flows": len(self.echo),
            "fragment_bytes": self._reassembly.held,
            **{
                f"dropped_{reason.replace('-', '_')}": count for reason, count in sorted(self.dropped.items())
            },
        }


_FlowT = TypeVar("_FlowT", UdpFlow, EchoFlow)


def _idle_longest(table: dict[bytes, _FlowT]) -> _FlowT:
    """Among the oldest few, so that making room costs the same however large the table is."""
    return min(islice(table.values(), 64), key=lambda flow: flow.last)


def _not_unicast(address: bytes) -> bool:
    """Multicast, broadcast, or no address at all."""
    if len(address) == 4:
        return address[0] >= 224 or address == bytes(4)
    return address[0] == 0xFF or address == bytes(16)
