"""TcpTable: the TCP connections of a stack.

It finds the connection that a segment belongs to, and decides which connection is given up when there are too many.
While the guest opens a connection, it is in `TcpTable.pending` too, until its handshake is over.  Beyond a limit the
oldest of these is given up, so that half-open connections do not keep others out.
"""

from __future__ import annotations

from _blake2 import blake2b  # as in hashlib, without OpenSSL, which takes 2 ms to load

from . import seq
from .acks import Acks
from .flows import FlowTable
from .network_layer import NetworkLayer
from .states import SYN_HELD, SYN_SENT, State
from .tcp import TcpConnection
from .time_wait import TimeWait
from .user import IcmpError, Refusal, TcpUser
from .windows import Memory
from .wire import BadPacket, common, flow_key, ip, tcp
from .wire.family import IPV4

MSS_OVERHEAD = IPV4.header_size + tcp.SIZE  # bytes of the smallest headers
ISN_TICKS = 250_000  # per second: RFC 9293 3.4.1's 4-microsecond clock
DSCP = 0xFC  # the traffic class without ECN's bits (RFC 3168 5)


class TcpTable(FlowTable[TcpConnection]):
    """The TCP connections of a stack by their keys.  `secret` keys the initial sequence numbers (RFC 6528)."""

    def __init__(self, network: NetworkLayer, secret: bytes) -> None:
        limits, timers = network.limits, network.timers
        super().__init__("tcp", network, limits.tcp_connections)
        self.pending: dict[bytes, TcpConnection] = {}
        """Those that the guest opens, in SYN-HELD or SYN-RECEIVED, the oldest first."""
        self.acks = Acks(limits.tcp_ack_delay, timers)
        self.memory = Memory(limits.tcp_memory)
        self.time_wait = TimeWait(limits, network.dropped, timers, network.packets.segment)
        self._secret = secret

    def packet_arrives(self, packet: ip.Packet, now: float) -> None:
        """Handle a segment of the guest's.

        Raises:
            BadPacket: It is malformed, or would open a connection that is not allowed.
        """
        segment = tcp.parse(packet.payload)
        if not packet.summed:
            packet.verify(len(packet.payload))
        key = packet.addresses + packet.payload[:4]
        connection = self.get(key)
        if connection is not None:
            if packet.tos & DSCP != connection.tos:
                connection.traffic_class(packet.tos & DSCP)
            connection.frame_head = common.head_of(packet) if packet.summed else b""
            connection.segment_arrives(segment, now)
        elif key in self.time_wait.records and self.time_wait.segment_arrives(key, segment, now):
            pass
        elif segment.flags & (tcp.SYN | tcp.ACK | tcp.RST) == tcp.SYN:
            self._syn_arrives(packet, key, segment, now)
        elif not self.network.steering.pass_on(packet.frame):
            self._stray(packet, segment)

    def _syn_arrives(self, packet: ip.Packet, key: bytes, segment: tcp.Segment, now: float) -> None:
        if not (ip.is_unicast(packet.destination) and ip.is_unicast(packet.source)):
            raise BadPacket("tcp-not-unicast")
        if len(self) >= self.limit and not self._make_room(now):
            self.network.admit(packet)
            self.packets.error(packet.whole, Refusal.NET_UNREACHABLE, by=packet.destination)
            return
        self.network.admit(packet)
        connection = self._made(key, SYN_HELD, now)
        connection.ttl, connection.tos = packet.ttl, packet.tos & DSCP
        connection.frame_head = common.head_of(packet) if packet.summed else b""
        connection.syn_arrives(segment, now)
        self.pending[key] = connection
        self.add(connection)
        self.network.user.tcp_opened(connection)
        if len(self.pending) > self.limits.tcp_pending:
            self.dropped["limit-tcp-pending"] += 1
            next(iter(self.pending.values())).give_way()

    def _made(self, key: bytes, state: State, now: float) -> TcpConnection:
        connection = TcpConnection(self, key, self.isn(key, now), state, self.link.mtu - MSS_OVERHEAD)
        connection.opened = now
        return connection

    def _make_room(self, now: float) -> bool:
        """Give up the oldest connection whose handshake is not over, unless it has only just begun.

        Return whether there is room in the table now.
        """
        self.dropped["limit-tcp-connections"] += 1
        oldest = next(iter(self.pending.values()), None)
        if oldest is None or not oldest.may_give_way(now):
            return False
        oldest.give_way()
        return True

    def connect(
        self, key: bytes, user: TcpUser, now: float, host: tuple[str, int] | None = None
    ) -> TcpConnection:
        """Open a connection to the guest, for a client at `host`.

        Raises:
            KeyError: There is such a connection, or the table is full.
        """
        full = len(self) >= self.limit
        if key in self or (full and not self._make_room(now)):
            raise KeyError(key)
        self.time_wait.discard(key)
        connection = self._made(key, SYN_SENT, now)
        connection.user, connection.host = user, host
        self.add(connection)
        connection.connect(now)
        return connection

    def isn(self, key: bytes, now: float) -> int:
        """Return the initial sequence number of a connection (RFC 6528)."""
        digest = blake2b(key, digest_size=4, key=self._secret).digest()
        return seq.add(int.from_bytes(digest, "big"), int(now * ISN_TICKS))

    def opened(self, connection: TcpConnection) -> None:
        """Note that the handshake of a connection is over, or has failed."""
        self.pending.pop(connection.key, None)

    def refuse(self, connection: TcpConnection, why: Refusal | IcmpError) -> None:
        """Refuse a SYN on hold.  The packet is gone, but its numbers are known, so that it can be quoted."""
        self.refused(connection, why)
        key, irs = connection.key, seq.add(connection.rcv.nxt, -1)
        if why is Refusal.RESET:
            self.packets.segment(key, 0, connection.rcv.nxt, tcp.RST | tcp.ACK)
        else:
            ports = flow_key.ports(key)
            syn = ports + irs.to_bytes(4, "big") + bytes(4) + bytes((0x50, tcp.SYN)) + bytes(6)
            self.packets.error_about(key, ip.TCP, syn, why, ttl=connection.ttl)

    def _stray(self, packet: ip.Packet, segment: tcp.Segment) -> None:
        """Answer a segment that belongs to no connection with a reset (3.10.7.1)."""
        self.dropped["tcp-stray"] += 1
        unicast = ip.is_unicast(packet.source) and ip.is_unicast(packet.destination)
        if segment.flags & tcp.RST or not unicast:
            return
        self.network.admit(packet)
        key = packet.addresses + packet.payload[:4]
        if segment.flags & tcp.ACK:
            self.packets.segment(key, segment.ack, 0, tcp.RST)
        else:
            number = seq.add(segment.seq, segment.length)
            self.packets.segment(key, 0, number, tcp.RST | tcp.ACK)
