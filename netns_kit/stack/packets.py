"""Whole packets to the guest, the unhurried way: ICMP errors, echo replies, resets, fragments.

What a flow sends often leaves by its header template (`netns_kit.stack.header`); what is sent now and then
is built here.
"""

from __future__ import annotations

from .link import Link
from .user import IcmpError, LinkDatagram, Refusal
from .wire import checksum, icmp, ip, tcp, udp

_CODES = {
    Refusal.RESET: icmp.PORT,
    Refusal.NET_UNREACHABLE: icmp.NET,
    Refusal.HOST_UNREACHABLE: icmp.HOST,
    Refusal.PROHIBITED: icmp.PROHIBITED,
}
_FRAGMENT_UNIT = 8
QUOTED = {4: 576 - 28, 16: 1280 - 48}  # of the packet an ICMP error is about: RFC 1812 4.3.2.3, RFC 4443 2.4


class PacketWriter:
    """Writes packets to the guest's `link`."""

    __slots__ = ("_identification", "_link")

    def __init__(self, link: Link, identification: int) -> None:
        self._link = link
        self._identification = identification  # of the last packet that left in fragments

    def error(self, quoted: memoryview, why: Refusal | IcmpError, *, by: bytes) -> None:
        """An ICMP error about a packet that the guest sent to `by`, which `quoted` holds from its IP header on.
        `Refusal.DROP` is none.

        A closed port is reported by the destination itself, what else we refuse by the gateway.
        """
        if not ip.is_unicast(by):
            return
        size = len(by)
        if why is Refusal.DROP:
            return
        if isinstance(why, Refusal):
            why = _told_by(by if why is Refusal.RESET else b"", _CODES[why], size)
        guest = bytes(quoted[12:16] if size == 4 else quoted[8:24])
        source = why.offender or self._link.speaker(guest)
        head = icmp.HEADER.pack(why.type, why.code, 0, why.mtu >> 16, why.mtu & 0xFFFF)
        message = head + quoted[: QUOTED[size]]
        self.send(source + guest, ip.ICMP if size == 4 else ip.ICMPV6, message, sum_at=2, ttl=why.ttl)

    def segment(self, key: bytes, number: int, ack: int, flags: int, options: bytes = b"") -> None:
        """Send a TCP segment that no connection sends; `key` is the guest's, as everywhere."""
        size = (len(key) - 4) // 2
        source, target = int.from_bytes(key[-2:], "big"), int.from_bytes(key[-4:-2], "big")
        segment = tcp.pack(
            src_port=source, dst_port=target, seq=number, ack=ack, flags=flags, window=0, options=options
        )
        self.send(key[size : 2 * size] + key[:size], ip.TCP, segment, sum_at=16)

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
        """The reply to a request that had these addresses."""
        size = len(addresses) // 2
        kind, protocol = (icmp.ECHO_REPLY, ip.ICMP) if size == 4 else (icmp.V6_ECHO_REPLY, ip.ICMPV6)
        message = icmp.HEADER.pack(kind, 0, 0, identifier, sequence) + payload
        self.send(addresses[size:] + addresses[:size], protocol, message, sum_at=2, ttl=ttl, tos=tos)

    def datagram(self, datagram: LinkDatagram) -> None:
        """Send a UDP datagram of no flow."""
        payload, source, source_port, destination, port, mac = datagram
        layer4 = udp.HEADER.pack(source_port, port, udp.SIZE + len(payload), 0) + payload
        self.send(source + destination, ip.UDP, layer4, sum_at=6, mac=mac)

    def send(
        self,
        addresses: bytes,
        protocol: int,
        layer4: bytes,
        *,
        sum_at: int = -1,
        ttl: int = 64,
        tos: int = 0,
        mac: bytes = b"",
    ) -> None:
        """A whole packet, summed here where `sum_at` says, in fragments where it exceeds the MTU."""
        link = self._link
        if sum_at >= 0:
            pseudo = 0
            if protocol != ip.ICMP:
                pseudo = checksum.pseudo_header(addresses, protocol, len(layer4))
            check = checksum.checksum(pseudo, checksum.total(layer4))
            layer4 = layer4[:sum_at] + check.to_bytes(2, "big") + layer4[sum_at + 2 :]
        size = len(addresses) // 2
        guest = addresses[size:]
        prefix = link.prefix(guest, mac)
        header_size = ip.IPV4_SIZE if size == 4 else ip.IPV6_SIZE
        mtu = link.mtu_to(guest)
        if header_size + len(layer4) <= mtu:
            header = ip.pack(addresses, protocol, len(layer4), ttl=ttl, tos=tos)
            link.send(guest, prefix + header + layer4)
            return
        self._identification = (self._identification + 1) & 0xFFFF
        if size != 4:
            header_size += _FRAGMENT_UNIT
        step = (mtu - header_size) // _FRAGMENT_UNIT * _FRAGMENT_UNIT
        for start in range(0, len(layer4), step):
            piece = layer4[start : start + step]
            more = start + step < len(layer4)
            if size == 4:
                header = ip.pack_ipv4(
                    addresses,
                    protocol,
                    len(piece),
                    ttl=ttl,
                    tos=tos,
                    identification=self._identification,
                    fragment=start >> 3 | more << 13,
                )
            else:
                header = ip.pack_ipv6(addresses, ip.FRAGMENT, _FRAGMENT_UNIT + len(piece), ttl=ttl, tos=tos)
                header += ip.pack_ipv6_fragment(protocol, start, more, self._identification)
            link.send(guest, prefix + header + piece)


def _told_by(offender: bytes, code: int, size: int) -> IcmpError:
    if size == 4:
        return IcmpError(icmp.UNREACHABLE, code, offender=offender)
    return IcmpError(icmp.V6_UNREACHABLE, icmp.V6_CODES[code], offender=offender)
