"""UdpFlow: one guest endpoint exchanging datagrams with one other endpoint.

With a flow, packets towards the guest need no look-up and no building of headers, and a user is told when the flow
falls idle.  Address translation, filtering and sockets are the user's task.

The timers are those of RFC 4787: short until there is an answer, long afterwards.  A flow to a port whose protocol
has one question and one answer ends soon after the answer.
"""

from __future__ import annotations

from struct import Struct

from .flows import IdleFlow, IdleTable
from .header import DEFAULT_TTL, FlowHeader
from .network_layer import NetworkLayer, to_group
from .user import DatagramUser, IcmpError, LinkDatagram, LinkService, Refusal
from .wire import BadPacket, checksum, common, flow_key, ip, udp, virtio
from .wire.family import IPV6

ONE_SHOT = frozenset({53})  # ports whose protocol has one question and one answer: DNS
LONGEST_SERVED = 65000  # bytes of a service's datagram, which fit into a packet of either family
_PATCH = Struct("!HH").pack_into  # length, checksum
_LENGTH_AT = 4
NOTHING = (-1, 0, 0, 0, 0)


class UdpFlow(IdleFlow):
    """One flow.  `key` is guest address, other address, guest port, other port, as on the wire.

    `host` is the client of an inbound flow, an address as text and a port; it is None if the guest has opened the
    flow.  `answered` tells whether datagrams have crossed in both directions.  `frame_head` and `marks` are for the
    short way (`netns_kit.stack.wire.common`): the head of the guest's frames, and the marks of its packets.
    """

    __slots__ = (
        "_header", "_headers", "_heard", "_laid_out", "_link", "_longest", "_plain", "_segment_size",
        "_spoken", "_super", "answered", "frame_head", "host", "marks"
    )  # fmt: skip

    user: DatagramUser

    def __init__(self, table: UdpTable, key: bytes, now: float, host: tuple[str, int] | None = None) -> None:
        self.answered = self._heard = self._spoken = False
        super().__init__(table, key, now)
        self.host = host
        self.frame_head = b""
        self.marks = 0
        self._link = link = table.link
        self._header = header = FlowHeader(link, key, ip.UDP, udp.SIZE)
        self._longest = header.family.longest_payload
        self._headers = header.family.header_size + udp.SIZE
        self._plain = link.offloads.vnet_header > 0 and link.offloads.csum
        self._super = self._plain and link.uso(header.family)
        self._segment_size = 0  # in the virtio header of `_header`
        # what `_header` fits: length of the payload, TTL, TOS, segment size, `Link.version`
        self._laid_out = NOTHING
        if self._plain:
            self._header.buffer[: virtio.SIZE] = self._header.virtio(udp.CHECKSUM_AT)

    def send(
        self,
        payload: bytes | memoryview,
        now: float,
        *,
        ttl: int = DEFAULT_TTL,
        tos: int = 0,
        segment_size: int = 0,
    ) -> None:
        """Send a datagram to the guest, in fragments if it exceeds the MTU.

        If `segment_size` is not 0, `payload` is several datagrams of that size one after another.  A datagram that is
        too long for the guest's address family is dropped; the sender may be of the other family.
        """
        self.last = now
        link, size = self._link, len(payload)
        layout = size, ttl, tos, segment_size, link.version
        if layout == self._laid_out:
            self.sent += size
            link.emit(self._header.buffer, payload)
        else:
            self._send(payload, now, layout)

    def _send(self, payload: bytes | memoryview, now: float, layout: tuple[int, int, int, int, int]) -> None:
        """Send a datagram that differs from the last one in length or marks, so that the header must be changed."""
        size, ttl, tos, segment_size, _ = layout
        header, link = self._header, self._link
        self._laid_out = NOTHING
        if not self.answered:
            self._spoken = True
            self._note_answer(now)
        if 0 < segment_size < size:
            if link.version != header.version:
                header.look_up()
                header.length = -1
            if not (self._super and header.resolved and self._headers + segment_size <= header.mtu):
                for start in range(0, size, segment_size):
                    self.send(payload[start : start + segment_size], now, ttl=ttl, tos=tos)
                return
            self._segments(segment_size)
        elif self._segment_size:
            self._segments(0)
        if header.marks != ttl << 8 | tos:
            header.mark(ttl, tos)
        self.sent += size
        length = udp.SIZE + size
        at = header.layer4 + _LENGTH_AT
        if length != header.length or link.version != header.version:
            if length > self._longest:
                self._table.dropped["udp-length"] += 1
                return
            header.set_length(length)
        if self._plain and header.resolved and (self._segment_size or self._headers + size <= header.mtu):
            _PATCH(header.buffer, at, length, header.check)
            self._laid_out = layout
            link.emit(header.buffer, payload)
            return
        _PATCH(header.buffer, at, length, 0)
        parts = checksum.total(memoryview(header.buffer)[header.layer4 :]) + checksum.total(payload)
        _PATCH(header.buffer, at, length, checksum.checksum(header.pseudo, length, parts))
        layer4 = bytes(memoryview(header.buffer)[header.layer4 :]) + payload
        self._table.packets.send(header.addresses, ip.UDP, layer4, ttl=ttl, tos=tos)

    def _segments(self, size: int) -> None:
        """Make the guest's kernel split what is sent into datagrams of `size` bytes; 0: it is one datagram."""
        if size != self._segment_size:
            self._segment_size = size
            kind = virtio.GSO_UDP_L4 if size else virtio.GSO_NONE
            self._header.buffer[: virtio.SIZE] = self._header.virtio(udp.CHECKSUM_AT, kind, size)

    def refuse(self, why: Refusal | IcmpError, payload: bytes | memoryview = b"") -> None:
        """Send the guest an ICMP error about a datagram of its own.  `payload` is the known part of that."""
        length = udp.SIZE + len(payload)
        datagram = flow_key.ports(self.key) + length.to_bytes(2, "big") + bytes(2) + payload
        datagram = ip.sum_into(datagram, flow_key.addresses(self.key), ip.UDP, udp.CHECKSUM_AT)
        self._table.packets.error_about(self.key, ip.UDP, datagram, why)

    def heard(self, now: float) -> None:
        """Note a datagram of the guest's, which may be the first answer."""
        self._heard = True
        self._note_answer(now)

    def _note_answer(self, now: float) -> None:
        if self._heard and self._spoken:
            self.answered = True
            self._table.timers.arm(self, now + self.lifetime)

    @property
    def lifetime(self) -> float:
        """Seconds that the flow may be idle."""
        limits = self._table.limits
        if not self.answered:
            return limits.udp_one_way
        return limits.udp_one_shot if flow_key.parse(self.key).remote_port in ONE_SHOT else limits.udp_stream


class UdpTable(IdleTable[UdpFlow]):
    """The UDP flows of a stack, and the link services by port.  A service is asked before a flow is opened."""

    def __init__(self, network: NetworkLayer) -> None:
        super().__init__("udp", network, network.limits.udp_flows)
        self.services: dict[int, LinkService] = {}

    def open(self, key: bytes, now: float, host: tuple[str, int] | None = None) -> UdpFlow:
        """Return the flow with that key, which is made if there is none.  `host` is the client of an inbound flow."""
        flow = self.get(key)
        return self._made(key, now, host) if flow is None else flow

    def _made(self, key: bytes, now: float, host: tuple[str, int] | None = None) -> UdpFlow:
        if len(self) >= self.limit:
            self.dropped["limit-udp-flows"] += 1
            self.evict()
        flow = UdpFlow(self, key, now, host)
        self.add(flow)
        return flow

    def packet_arrives(self, packet: ip.Packet, now: float) -> None:
        """Handle a datagram of the guest's: it belongs to a flow, is for a service, or opens a flow."""
        _, _, check, payload = udp.parse(packet.payload)
        if not packet.summed and (check or packet.family is IPV6):  # over IPv4 zero means none
            packet.verify(udp.SIZE + len(payload))
        segment_size = virtio.datagram_size(packet.frame) if packet.summed else 0
        key = packet.addresses + packet.payload[:4]
        flow = self.get(key)
        if flow is None:
            if not segment_size and self._is_served(packet, payload, now):
                return
            flow = self._open(packet, key, now)
            if flow is None:
                return
        flow.frame_head = common.head_of(packet) if packet.summed else b""
        flow.marks = packet.marks
        if not flow.answered:
            flow.heard(now)
        flow.last = now
        flow.received += len(payload)
        if segment_size >= len(payload):
            segment_size = 0
        flow.user.datagram(flow, payload, flow.marks, segment_size)

    def _is_served(self, packet: ip.Packet, payload: memoryview, now: float) -> bool:
        """Return whether a link service takes the datagram."""
        source_port, port, _, _ = udp.HEADER.unpack_from(packet.payload)
        service = self.services.get(port)
        if service is None:
            return False
        source, destination, own = packet.source, packet.destination, self.link.own
        if source in own or (destination not in own and ip.is_unicast(destination)):
            return False
        asked = LinkDatagram(bytes(payload), source, source_port, destination, port, packet.source_mac)
        return service.datagram(asked, now)

    def send_datagram(self, datagram: LinkDatagram) -> None:
        """Send a datagram that belongs to no flow.  If it is too long for a packet, it is dropped and counted."""
        if len(datagram.payload) > LONGEST_SERVED or len(datagram.source) != len(datagram.destination):
            self.dropped["service-reply"] += 1
        else:
            self.packets.datagram(datagram)

    def _open(self, packet: ip.Packet, key: bytes, now: float) -> UdpFlow | None:
        if not ip.is_unicast(packet.destination):
            raise to_group(packet, "udp")
        if not ip.is_unicast(packet.source):
            raise BadPacket("udp-source")
        self.network.admit(packet)
        flow = self._made(key, now)
        refusal = self.network.user.udp_opened(flow)
        if refusal is not None:
            self.turn_away(flow, refusal, packet)
            return None
        return flow
