"""The last packets of a capture, one line each, for the report of a failure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from ipaddress import ip_address
from struct import Struct

from netns_kit.stack.wire import arp, ethernet, icmp, ip, tcp, udp
from netns_kit.stack.wire.errors import BadPacket
from netns_kit.tap.pcapng import FROM_GUEST, PACKET, PACKET_HEAD

_block, _packet, _option = (
    Struct("=II").unpack_from,
    Struct("=IIIIIII").unpack_from,
    Struct("=HHI").unpack_from,
)
_FLAGS = ("F", tcp.FIN), ("S", tcp.SYN), ("R", tcp.RST), ("P", tcp.PSH), ("A", tcp.ACK)


def last_packets(pcapng: bytes, most: int) -> list[str]:
    """Return the last packets of a capture as lines: seconds since its first packet, direction, what it is.

    Args:
        pcapng: The text of a capture of ours.
        most: How many there are at most.
    """
    found = deque(_packets(pcapng), maxlen=most)
    first = found[0][0] if found else 0
    return [
        f"{(at - first) / 1e9:9.6f} {'>' if out else '<'} {_shown(frame, size)}"
        for at, out, frame, size in found
    ]


def _packets(pcapng: bytes) -> Iterator[tuple[int, bool, memoryview, int]]:
    """Yield time, whether the guest has sent it, frame and size of each packet."""
    at = 0
    while at < len(pcapng):
        kind, length = _block(pcapng, at)
        if kind == PACKET:
            _, _, _, high, low, kept, size = _packet(pcapng, at)
            begin = at + PACKET_HEAD
            _, _, flags = _option(pcapng, begin + (kept + 3 & ~3))
            yield high << 32 | low, flags & 3 == FROM_GUEST, memoryview(pcapng)[begin : begin + kept], size
        at += length


def _shown(frame: memoryview, size: int) -> str:
    _, _, kind = ethernet.parse(frame)
    rest = frame[ethernet.SIZE :]
    try:
        if kind == ethernet.ARP:
            asked = arp.parse(rest)
            what = "who has" if asked.operation == arp.REQUEST else "is at, to"
            return f"ARP {ip_address(asked.sender)} {what} {ip_address(asked.target)}"
        packet = ip.parse_ipv6(rest) if kind == ethernet.IPV6 else ip.parse_ipv4(rest)
        source, target = (str(ip_address(each)) for each in ip.halves(packet.addresses))
        return _of_ip(packet, source, target)
    except BadPacket as error:  # cut short by the capture, super-segments above all
        return f"{size} bytes, {error}"


def _of_ip(packet: ip.Packet, source: str, target: str) -> str:
    if packet.fragment_offset:
        return f"{source} -> {target} a fragment"
    if packet.protocol == ip.TCP:
        segment = tcp.parse(packet.payload)
        ports = int.from_bytes(packet.payload[:2], "big"), int.from_bytes(packet.payload[2:4], "big")
        flags = "".join(letter for letter, bit in _FLAGS if segment.flags & bit)
        said = f"[{flags}] seq {segment.seq} ack {segment.ack} win {segment.window}, {len(segment.payload)} bytes"
        return f"TCP {source}:{ports[0]} -> {target}:{ports[1]} {said}"
    if packet.protocol == ip.UDP:
        source_port, target_port, _, payload = udp.parse(packet.payload)
        return f"UDP {source}:{source_port} -> {target}:{target_port} {len(payload)} bytes"
    if packet.protocol in (ip.ICMP, ip.ICMPV6):
        message = icmp.parse(packet.payload)
        return f"ICMP {source} -> {target} type {message.type} code {message.code}"
    return f"{source} -> {target} protocol {packet.protocol}"
