"""Dissection: what a frame says, layer by layer, for people.

The parsers are those of the stack and its servers.  A frame of which a capture has kept only the beginning is filled
up with zeros, so that its headers can be read; what is not in it is not told.

Every byte may be hostile.  Whatever cannot be read becomes a layer that says so, and nothing is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import islice
from typing import NamedTuple

from netns_kit.dhcp import message as dhcp
from netns_kit.dhcp.errors import BadDhcpMessage
from netns_kit.dns import message as dns
from netns_kit.domain_names import to_text
from netns_kit.stack.wire import arp, ethernet, icmp, ip, ndp, tcp, udp
from netns_kit.stack.wire.errors import BadPacket

from .text import some

# bytes that a cut frame is filled up to: no packet is longer than 64 KiB and its headers
MOST_FILLED = 1 << 17
MOST_ANSWERS = 30  # of a DNS message that are read
_DNS, _DHCP = 53, frozenset({67, 68})
_FLAGS = (
    (tcp.SYN, "SYN"),
    (tcp.FIN, "FIN"),
    (tcp.RST, "RST"),
    (tcp.PSH, "PSH"),
    (tcp.ACK, "ACK"),
    (tcp.URG, "URG"),
)
_ICMP = {0: "echo reply", 3: "unreachable", 8: "echo request", 11: "time exceeded", 12: "parameter problem"}
_ICMP6 = {
    1: "unreachable", 2: "packet too big", 3: "time exceeded", 4: "parameter problem",
    128: "echo request", 129: "echo reply", 130: "listener query", 131: "listener report", 132: "listener done",
    133: "router solicitation", 134: "router advertisement", 135: "neighbour solicitation",
    136: "neighbour advertisement", 143: "listener report",
}  # fmt: skip
_UNREACHABLE = {0: "network", 1: "host", 2: "protocol", 3: "port", 4: "too big", 13: "prohibited"}
_DHCP_TYPES = ("", "discover", "offer", "request", "decline", "ack", "nak", "release", "inform")
_RCODES = ("", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED")
_RECORDS = {20: "change cipher spec", 21: "alert", 22: "handshake", 23: "application data"}
_HANDSHAKES = {1: "ClientHello", 2: "ServerHello", 11: "Certificate"}


class Layer(NamedTuple):
    """A layer of a packet."""

    name: str
    """The protocol, like "IPv4"."""
    summary: str
    """The layer in a line."""
    fields: tuple[tuple[str, str], ...] = ()
    """The fields, with their values."""


class Segment(NamedTuple):
    """A TCP segment, as a diagram of its connection needs it."""

    seq: int
    ack: int
    flags: int
    window: int
    size: int
    options: tuple[str, ...]


class Dissection:
    """What a frame says.

    Args:
        data: The bytes of the frame that were kept.
        size: The bytes that it had.

    Attributes:
        layers: The layers, the outermost first.
        source, destination: Its ends: with ports where it has these; the link addresses if there is nothing else.
        segment: The TCP segment, if it is one.
        payload: The bytes behind the last layer that were kept.
    """

    def __init__(self, data: bytes, size: int) -> None:
        self.layers: list[Layer] = []
        self.source = self.destination = ""
        self.segment: Segment | None = None
        self.payload = b""
        whole = memoryview(data.ljust(min(size, MOST_FILLED), b"\0"))
        self._missing = len(whole) - len(data)
        try:
            self._ethernet(whole)
        except BadPacket as bad:
            self._add("malformed", str(bad))
            self.payload = b""

    @property
    def protocol(self) -> str:
        """The protocol of the last layer that has a name."""
        return self.layers[-1].name if self.layers else "?"

    @property
    def info(self) -> str:
        """The last layer in a line; of data of TCP and UDP also what carries it."""
        return self.layers[-1].summary if self.layers else ""

    def _add(self, name: str, summary: str, *fields: tuple[str, object]) -> None:
        self.layers.append(Layer(name, summary, tuple((key, str(value)) for key, value in fields)))

    def _ethernet(self, view: memoryview) -> None:
        if len(view) < ethernet.SIZE:
            raise BadPacket("ethernet-truncated")
        to, source, kind = ethernet.parse(view)
        self.source, self.destination = source.hex(":"), to.hex(":")
        names = {ethernet.IPV4: "IPv4", ethernet.IPV6: "IPv6", ethernet.ARP: "ARP"}
        told = names.get(kind, f"{kind:#06x}")
        fields = (("source", self.source), ("destination", self.destination), ("type", told))
        self._add("Ethernet", f"{self.source} → {self.destination}", *fields)
        inside = view[ethernet.SIZE :]
        if kind == ethernet.ARP:
            self._arp(inside)
        elif kind in names:
            self._ip(ip.parse_ipv4(inside) if kind == ethernet.IPV4 else ip.parse_ipv6(inside))
        else:
            self._rest(inside)

    def _arp(self, view: memoryview) -> None:
        found = arp.parse(view)
        sender, target, mac = IPv4Address(found.sender), IPv4Address(found.target), found.sender_mac.hex(":")
        is_request = found.operation == arp.REQUEST
        told = f"who has {target}? tell {sender}" if is_request else f"{sender} is at {mac}"
        self._add("ARP", told, ("operation", "request" if is_request else "reply"), ("sender", f"{sender} at {mac}"),
                  ("target", f"{target} at {found.target_mac.hex(':')}"))  # fmt: skip

    def _ip(self, packet: ip.Packet) -> None:
        source, destination = ip_address(packet.source), ip_address(packet.destination)
        self.source, self.destination = str(source), str(destination)
        version = f"IPv{packet.family.version}"
        fields: list[tuple[str, object]] = [
            ("source", source), ("destination", destination), ("TTL", packet.ttl), ("TOS", packet.tos),
            ("protocol", packet.protocol), ("length", len(packet.whole)),
        ]  # fmt: skip
        is_piece = packet.fragment_offset or packet.more_fragments
        if is_piece:
            more = ", more follow" * packet.more_fragments
            fields.append(("fragment", f"{packet.identification:#x} at {packet.fragment_offset}{more}"))
        self._add(
            version, f"{source} → {destination}, TTL {packet.ttl}, {some(len(packet.whole), 'byte')}", *fields
        )
        if is_piece:
            self._add("fragment", f"of packet {packet.identification:#x}, at byte {packet.fragment_offset}")
            self._rest(packet.payload)
        elif packet.protocol == ip.TCP:
            self._tcp(packet.payload, source, destination)
        elif packet.protocol == ip.UDP:
            self._udp(packet.payload, source, destination)
        elif packet.protocol == packet.family.icmp:
            self._icmp(packet.payload, packet.family.version)
        else:
            self._rest(packet.payload)

    def _ends(self, source: object, port: int, destination: object, to_port: int) -> None:
        self.source, self.destination = _with_port(source, port), _with_port(destination, to_port)

    def _tcp(self, view: memoryview, source: object, destination: object) -> None:
        found = tcp.parse(view)
        port, to_port = int.from_bytes(view[:2], "big"), int.from_bytes(view[2:4], "big")
        self._ends(source, port, destination, to_port)
        options, flags, size = tuple(_options(found.options)), flag_names(found.flags), len(found.payload)
        self.segment = Segment(found.seq, found.ack, found.flags, found.window, size, options)
        told = f", {some(size, 'byte')}" * bool(size)
        self._add(
            "TCP", f"{flags}{told}, seq {found.seq}, ack {found.ack}, window {found.window}",
            ("ports", f"{port} → {to_port}"), ("flags", flags), ("sequence number", found.seq),
            ("acknowledged", found.ack), ("window", found.window), ("urgent pointer", found.urgent),
            ("options", ", ".join(options) or "none"), ("data", some(size, "byte")),
        )  # fmt: skip
        if _DNS in (port, to_port) and size > 2:
            self._dns(bytes(found.payload[2:]))
        else:
            self._rest(found.payload)

    def _udp(self, view: memoryview, source: object, destination: object) -> None:
        port, to_port, _, data = udp.parse(view)
        self._ends(source, port, destination, to_port)
        self._add(
            "UDP",
            some(len(data), "byte"),
            ("ports", f"{port} → {to_port}"),
            ("data", some(len(data), "byte")),
        )
        if _DNS in (port, to_port):
            self._dns(bytes(data))
        elif {port, to_port} <= _DHCP:
            self._dhcp(bytes(data))
        else:
            self._rest(data)

    def _icmp(self, view: memoryview, version: int) -> None:
        found = icmp.parse(view)
        names, echoes = (_ICMP, (0, 8)) if version == 4 else (_ICMP6, (128, 129))
        told = names.get(found.type, f"type {found.type}")
        name = "ICMP" if version == 4 else "ICMPv6"
        fields: list[tuple[str, object]] = [("type", f"{found.type}, {told}"), ("code", found.code)]
        rest: memoryview | None = found.payload
        if found.type in echoes:
            fields += [("identifier", found.high), ("sequence number", found.low)]
            told += f", id {found.high}, number {found.low}"
        elif version == 4 and found.type == icmp.UNREACHABLE:
            told = f"{_UNREACHABLE.get(found.code, f'code {found.code}')} {told}"
        elif version == 6 and found.type in ndp.TYPES:
            rest = None
            if found.type in (ndp.SOLICITATION, ndp.ADVERTISEMENT):
                neighbour = ndp.parse(view)
                fields += [
                    ("target", IPv6Address(neighbour.target)),
                    ("link address", neighbour.mac.hex(":") or "none"),
                ]
                told += f" of {IPv6Address(neighbour.target)}"
        self._add(name, told, *fields)
        if rest is not None:
            self._rest(rest)

    def _dns(self, message: bytes) -> None:
        try:
            ident, flags, question = dns.parse_untrusted(message)
            name = to_text(question[:-4]) if question else ""
            kind = dns.type_name(int.from_bytes(question[-4:-2], "big")) if question else ""
            fields = [("id", f"{ident:#06x}"), ("question", f"{name} {kind}")]
            told = f"{kind} {name}?"
            if flags & dns.QR:
                answers = list(islice(_records(message, question), MOST_ANSWERS))
                more = int.from_bytes(message[6:8], "big") - MOST_ANSWERS
                rcode = flags & dns.RCODE
                code = _RCODES[rcode] if rcode < len(_RCODES) else f"code {rcode}"
                told = f"{kind} {name} → {code or ', '.join(answers[:3]) or 'no data'}" + ", …" * (
                    len(answers) > 3
                )
                fields += [("result", code or "no error"), *(("answer", each) for each in answers)]
                fields += [("answers", f"… and {more:,} more")] * (more > 0)
        except dns.BadMessage as bad:
            self._add("DNS", f"malformed: {bad}")
        else:
            self._add("DNS", told, *fields)

    def _dhcp(self, data: bytes) -> None:
        try:
            found = dhcp.parse(data)
            kind = found.type
            told = _DHCP_TYPES[kind] if kind < len(_DHCP_TYPES) else f"type {kind}"
            wanted = found.address(dhcp.ADDRESS)
        except BadDhcpMessage as bad:
            self._add("DHCP", f"malformed: {bad}")
            return
        name = found.options.get(dhcp.HOSTNAME, b"").decode("utf-8", "backslashreplace")
        fields = (
            ("client", found.chaddr.hex(":")),
            ("host name", name),
            ("asks for", wanted or ""),
            ("gets", found.yiaddr),
        )
        address = wanted if found.op == dhcp.REQUEST else found.yiaddr
        self._add(
            "DHCP", f"{told} {address or ''}".rstrip(), *((key, value) for key, value in fields if value)
        )

    def _rest(self, view: memoryview) -> None:
        """Keep the payload, and say what it seems to be."""
        kept = len(view) - min(self._missing, len(view))
        self.payload = bytes(view[:kept])
        told = _guess(self.payload)
        if told is not None:
            self._add(*told)


def flag_names(flags: int) -> str:
    """Return the flags of a TCP segment by their names."""
    return " ".join(name for bit, name in _FLAGS if flags & bit) or "none"


def _with_port(address: object, port: int) -> str:
    return f"[{address}]:{port}" if isinstance(address, IPv6Address) else f"{address}:{port}"


def _options(view: memoryview | None) -> Iterator[str]:
    found = tcp.parse_options(view)
    if found.mss is not None:
        yield f"MSS {found.mss}"
    if found.scale is not None:
        yield f"window scale {found.scale}"
    if found.sack_permitted:
        yield "SACK permitted"
    for first, last in found.sack:
        yield f"SACK {first}-{last}"
    if found.stamp is not None:
        yield f"timestamps {found.stamp[0]}, {found.stamp[1]}"


def _records(message: bytes, question: bytes) -> Iterator[str]:
    """Yield the answers of a DNS message, those of types that are known.  Raises `BadMessage`."""
    reader, shown = dns.NameReader(message), {"A": str, "AAAA": str}
    for found in dns.walk(message, question):
        kind, data = dns.type_name(found.kind), message[found.data : found.end]
        if found.section != 1:
            return
        if kind in shown:
            try:
                yield str((IPv4Address if kind == "A" else IPv6Address)(data))
            except ValueError as error:
                raise dns.BadMessage("no address") from error
        elif found.kind in (dns.CNAME, dns.PTR):
            yield f"{kind} {to_text(reader.at(found.data))}"
        else:
            yield kind


def _guess(data: bytes) -> tuple[str, str] | None:
    """Return a protocol that the data seems to begin with, and its first line."""
    if len(data) > 5 and data[0] in _RECORDS and data[1] == 3 and data[2] < 5:
        told = _RECORDS[data[0]]
        if data[0] == 22:
            told = _HANDSHAKES.get(data[5], told)
        return "TLS", told
    line = data.split(b"\r\n", 1)[0][:120]
    words = line.split(b" ")
    if b"\r\n" in data[:4096] and (words[0].startswith(b"HTTP/1.") or words[-1].startswith(b"HTTP/1.")):
        return "HTTP", line.decode("ascii", "backslashreplace")
    return None


def hexadecimal(data: bytes, most: int = 512) -> list[str]:
    """Return bytes as lines of a dump: offset, bytes, characters."""
    lines = [
        f"{at:04x}  {data[at : at + 16].hex(' '):47}  "
        + "".join(chr(each) if 32 <= each < 127 else "." for each in data[at : at + 16])
        for at in range(0, min(len(data), most), 16)
    ]
    return [*lines, f"… and {len(data) - most:,} more bytes"] if len(data) > most else lines
