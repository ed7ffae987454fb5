"""PacketWriter: builds whole packets to the guest: ICMP errors, echo replies, resets, fragments.

These are sent rarely.  What a flow sends often uses its header template instead (`netns_kit.stack.header`).
"""

from __future__ import annotations

from .link import Link
from .user import IcmpError, LinkDatagram, Refusal
from .wire import flow_key, icmp, ip, tcp, udp
from .wire.family import IPV6, family_of

_CODES = {
    Refusal.RESET: icmp.PORT,
    Refusal.NET_UNREACHABLE: icmp.NET,
    Refusal.HOST_UNREACHABLE: icmp.HOST,
    Refusal.PROHIBITED: icmp.PROHIBITED,
}
_FRAGMENT_UNIT = 8


class PacketWriter:
    """A writer of packets to the guest's link."""

    __slots__ = ("_identification", "_link")

    def __init__(self, link: Link, identification: int) -> None:
        self._link = link
        self._identification = identification  # of the last packet that left in fragments

    def error(self, quoted: memoryview, why: Refusal | IcmpError, *, by: bytes) -> None:
        """Send an ICMP error about a packet of the guest's; for `Refusal.DROP` send nothing.

        A closed port is reported as by the destination itself, any other refusal as by the gateway.

        Args:
            quoted: The packet, from its IP header on.
            why: The error.
            by: The destination of the packet.
        """
        if why is Refusal.DROP or not ip.is_unicast(by):
            return
        family = family_of(by)
        if isinstance(why, Refusal):
            code = family.unreachable_codes[_CODES[why]]
            why = IcmpError(family.unreachable, code, offender=by if why is Refusal.RESET else b"")
        guest = ip.source_of(quoted)
        source = why.offender or self._link.speaker(guest)
        head = icmp.HEADER.pack(why.type, why.code, 0, why.mtu >> 16, why.mtu & 0xFFFF)
        message = ip.sum_into(head + quoted[: family.quoted], source + guest, family.icmp, icmp.CHECKSUM_AT)
        self.send(source + guest, family.icmp, message, ttl=why.ttl)

    def error_about(
        self, key: bytes, protocol: int, layer4: bytes, why: Refusal | IcmpError, *, ttl: int = 64
    ) -> None:
        """Send an ICMP error about a packet that is gone.  `layer4` is as much of it as is known, after the IP
        header.
        """
        header = ip.pack(flow_key.addresses(key), protocol, len(layer4), ttl=ttl)
        self.error(memoryview(header + layer4), why, by=flow_key.parse(key).remote)

    def segment(self, key: bytes, number: int, ack: int, flags: int, options: bytes = b"") -> None:
        """Send a TCP segment that belongs to no connection.  `key` is that of the guest's packets."""
        names, (addresses, _) = flow_key.parse(key), flow_key.backwards(key)
        segment = tcp.pack(
            src_port=names.remote_port,
            dst_port=names.guest_port,
            seq=number,
            ack=ack,
            flags=flags,
            window=0,
            options=options,
        )
        self.send(addresses, ip.TCP, ip.sum_into(segment, addresses, ip.TCP, tcp.CHECKSUM_AT))

    def echo_reply(
        self,
        addresses: bytes,
        identifier: int,
        sequence: int,
        payload: bytes | memoryview,
        *,
        ttl: int = 64,
        tos: int = 0,
    ) -> None:
        """Send the reply to an echo request; `addresses` are those of the request."""
        guest, asked = ip.halves(addresses)
        family = family_of(guest)
        message = icmp.HEADER.pack(family.echo_reply, 0, 0, identifier, sequence) + payload
        message = ip.sum_into(message, asked + guest, family.icmp, icmp.CHECKSUM_AT)
        self.send(asked + guest, family.icmp, message, ttl=ttl, tos=tos)

    def datagram(self, datagram: LinkDatagram) -> None:
        """Send a UDP datagram that belongs to no flow."""
        payload, source, source_port, destination, port, mac = datagram
        addresses = source + destination
        layer4 = udp.HEADER.pack(source_port, port, udp.SIZE + len(payload), 0) + payload
        self.send(addresses, ip.UDP, ip.sum_into(layer4, addresses, ip.UDP, udp.CHECKSUM_AT), mac=mac)

    def send(
        self, addresses: bytes, protocol: int, layer4: bytes, *, ttl: int = 64, tos: int = 0, mac: bytes = b""
    ) -> None:
        """Send a packet whose checksum is set, in fragments if it exceeds the MTU."""
        link = self._link
        _, guest = ip.halves(addresses)
        prefix = link.prefix(guest, mac)
        mtu = link.mtu_to(guest)
        family = family_of(guest)
        header_size = family.header_size
        if header_size + len(layer4) <= mtu:
            header = ip.pack(addresses, protocol, len(layer4), ttl=ttl, tos=tos)
            link.send(guest, prefix + header + layer4)
            return
        self._identification = (self._identification + 1) & 0xFFFF
        if family is IPV6:
            header_size += _FRAGMENT_UNIT
        step = (mtu - header_size) // _FRAGMENT_UNIT * _FRAGMENT_UNIT
        for start in range(0, len(layer4), step):
            piece = layer4[start : start + step]
            header = ip.pack_fragment(
                addresses,
                protocol,
                len(piece),
                start,
                more=start + step < len(layer4),
                identification=self._identification,
                ttl=ttl,
                tos=tos,
            )
            link.send(guest, prefix + header + piece)
