"""A hostile program inside a namespace: `python -m benchmarks.flooder KIND SECONDS PORT`.

It is executed by `benchmarks.floods`, in a namespace whose only way out is a stack of ours in a namespace without a
route.  Frames go out by a packet socket as fast as they can be built; it ends by itself.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from itertools import count, cycle, islice
from random import Random

from netns_kit.stack.wire import checksum, ethernet, icmp, ip, ndp, tcp, udp
from netns_kit.stack.wire.tcp import ACK, RST, SYN

TAP = "tap0"
GATEWAY_MAC = bytes.fromhex("52550a000202")
GATEWAY, DNS, GUEST = bytes((10, 0, 2, 2)), bytes((10, 0, 2, 3)), bytes((10, 0, 2, 100))
MADE_UP = bytes(
    (10, 0, 2)
)  # nobody has the other addresses of the network: nobody resets what is opened from there
FOREIGN = bytes((198, 51, 100))
NDP = "NDP"
BATCH = 4096  # frames that are built before they are sent
ETH_P_ALL = 3


class Link:
    """The tap, by a packet socket."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.socket.bind((TAP, 0))
        self.mac = self.socket.getsockname()[4]

    def frame(self, packet: bytes, kind: int = ethernet.IPV4, to: bytes = GATEWAY_MAC) -> bytes:
        return ethernet.pack(to, self.mac, kind) + packet

    def tcp(self, source: bytes, to: bytes, segment: bytes) -> bytes:
        return self.frame(whole(source + to, ip.TCP, segment, 16))

    def send(self, frame: bytes) -> None:
        with suppress(OSError):  # the queue of the tap is full: that is what it is about
            self.socket.send(frame)

    def answer(self, seconds: float, wanted: Callable[[bytes], bool]) -> bytes:
        """The first frame that is `wanted`.  Raises TimeoutError."""
        self.socket.settimeout(seconds)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            frame = self.socket.recv(65536)
            if wanted(frame):
                return frame
        raise TimeoutError


def whole(addresses: bytes, protocol: int, layer4: bytes, sum_at: int) -> bytes:
    pseudo = 0 if protocol == ip.ICMP else checksum.pseudo_header(addresses, protocol, len(layer4))
    check = checksum.checksum(pseudo, checksum.total(layer4)).to_bytes(2, "big")
    layer4 = layer4[:sum_at] + check + layer4[sum_at + 2 :]
    return ip.pack(addresses, protocol, len(layer4)) + layer4


def segment(source_port: int, port: int, seq: int, ack: int, flags: int, **more: object) -> bytes:
    window = more.pop("window", 65535)
    payload = more.pop("payload", b"")
    assert isinstance(window, int)
    assert isinstance(payload, bytes)
    head = tcp.pack(src_port=source_port, dst_port=port, seq=seq, ack=ack, flags=flags, window=window)
    return head + payload


def syns(link: Link, sources: bytes, port: int) -> Iterator[bytes]:
    for number in count():
        source = sources + bytes((110 + number % 100,))
        yield link.tcp(source, GATEWAY, segment(1024 + number // 100 % 60000, port, number, 0, SYN))


def strays(link: Link, flags: int, port: int) -> Iterator[bytes]:
    random = Random(1)
    for number in count():
        words = random.getrandbits(32), random.getrandbits(32)
        yield link.tcp(GUEST, GATEWAY, segment(1024 + number % 60000, port, *words, flags))


def fragments(link: Link, _: int) -> Iterator[bytes]:
    """Of packets that will never be whole."""
    for number in count():
        piece = ip.pack_ipv4(
            GUEST + GATEWAY, ip.UDP, 8, identification=number & 0xFFFF, fragment=1 << 13 | (number % 7)
        )
        yield link.frame(piece + bytes(8))


def datagrams(link: Link, _: int) -> Iterator[bytes]:
    """From and to ever other ports."""
    for number in count():
        head = udp.HEADER.pack(1024 + number % 60000, 1024 + number * 7 % 60000, 9, 0) + b"x"
        yield link.frame(whole(GUEST + GATEWAY, ip.UDP, head, 6))


def questions(link: Link, _: int) -> Iterator[bytes]:
    """For ever other names, from ever other ports."""
    for number in count():
        name = b"\x08%08x\x07invalid\x00" % (number & 0xFFFFFFFF)
        query = struct.pack("!HHHHHH", number & 0xFFFF, 0x0100, 1, 0, 0, 0) + name + struct.pack("!HH", 1, 1)
        head = udp.HEADER.pack(1024 + number % 60000, 53, 8 + len(query), 0) + query
        yield link.frame(whole(GUEST + DNS, ip.UDP, head, 6))


def discoveries(link: Link, _: int) -> Iterator[bytes]:
    """DHCPDISCOVER from ever other hardware addresses."""
    for number in count():
        mac = b"\x02\x00" + (number & 0xFFFFFFFF).to_bytes(4, "big")
        message = struct.pack("!BBBBIHH16x", 1, 1, 6, 0, number & 0xFFFFFFFF, 0, 0x8000) + mac + bytes(202)
        message += bytes.fromhex("63825363350101ff")
        head = udp.HEADER.pack(68, 67, 8 + len(message), 0) + message
        packet = whole(bytes(4) + b"\xff" * 4, ip.UDP, head, 6)
        yield ethernet.pack(ethernet.BROADCAST, mac, ethernet.IPV4) + packet


def neighbours(link: Link, _: int) -> Iterator[bytes]:
    """ARP for the gateway, from ever other addresses."""
    for number in count():
        sender = (0x0A000000 | number & 0xFFFFFF).to_bytes(4, "big")
        body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + link.mac + sender + bytes(6) + GATEWAY
        yield link.frame(body, ethernet.ARP, ethernet.BROADCAST)


def solicitations(link: Link, _: int) -> Iterator[bytes]:
    """Neighbour solicitations (RFC 4861) for the gateway, from ever other addresses."""
    target = ip_address("fd00::2").packed
    group = ndp.solicited_node(target)
    message = ndp.pack(ndp.Neighbour(ndp.SOLICITATION, 0, target, link.mac))
    for number in count():
        addresses = target[:8] + (0x1000 + number & 0xFFFFFFFF).to_bytes(8, "big") + group
        sums = checksum.pseudo_header(addresses, ip.ICMPV6, len(message)), checksum.total(message)
        body = message[:2] + checksum.checksum(*sums).to_bytes(2, "big") + message[4:]
        head = ip.pack_ipv6(addresses, ip.ICMPV6, len(body), ttl=ndp.HOP_LIMIT)
        yield link.frame(head + body, ethernet.IPV6, ndp.group_mac(group))


def echoes(link: Link, _: int) -> Iterator[bytes]:
    """Pings of ever other identifiers."""
    for number in count():
        message = icmp.HEADER.pack(icmp.ECHO, 0, 0, number & 0xFFFF, 1) + bytes(8)
        yield link.frame(whole(GUEST + GATEWAY, ip.ICMP, message, 2))


def connected(link: Link, source: bytes, source_port: int, port: int, window: int) -> tuple[int, int]:
    """A connection opened by hand: the next numbers of both sides."""
    link.send(link.tcp(source, GATEWAY, segment(source_port, port, 999, 0, SYN)))
    ends = GATEWAY + source + port.to_bytes(2, "big") + source_port.to_bytes(2, "big")
    frame = link.answer(2, lambda each: each[26:38] == ends and each[47] & 0x12 == 0x12)
    theirs = int.from_bytes(frame[38:42], "big") + 1
    link.send(link.tcp(source, GATEWAY, segment(source_port, port, 1000, theirs, ACK, window=window)))
    return 1000, theirs


def runs(link: Link, port: int) -> Iterator[bytes]:
    """One byte each, out of order, in many connections."""
    opened = []
    for number in range(400):
        source = MADE_UP + bytes((110 + number % 100,))
        try:
            ours, theirs = connected(link, source, 30000 + number, port, 65535)
        except TimeoutError:
            continue
        opened.append((source, 30000 + number, ours, theirs))
    for number in count():
        for source, source_port, ours, theirs in opened:
            data = segment(source_port, port, ours + 2 + 2 * (number % 300), theirs, ACK, payload=b"x")
            yield link.tcp(source, GATEWAY, data)


def shut_windows(link: Link, port: int) -> Iterator[bytes]:
    """Connections that ask for much, and take nothing."""
    for number in count():
        source = MADE_UP + bytes((110 + number % 100,))
        source_port = 1024 + number // 100 % 60000
        try:
            ours, theirs = connected(link, source, source_port, port, 0)
        except TimeoutError:
            continue
        yield link.tcp(
            source, GATEWAY, segment(source_port, port, ours, theirs, ACK, window=0, payload=b"GET")
        )


def connects(_: Link, port: int) -> None:
    """Connect and close, by the kernel."""
    with socket.socket() as sock:
        sock.settimeout(1)
        with suppress(OSError):
            sock.connect(("10.0.2.2", port))


FRAMES: dict[str, Callable[[Link, int], Iterator[bytes]]] = {
    "SYNs, made-up sources": lambda link, port: syns(link, MADE_UP, port),
    "SYNs, foreign sources": lambda link, port: syns(link, FOREIGN, port),
    "RST": lambda link, port: strays(link, RST, port),
    "ACK": lambda link, port: strays(link, ACK, port),
    "runs of one byte": runs,
    "fragments": fragments,
    "shut windows": shut_windows,
    "UDP ports": datagrams,
    "DNS": questions,
    "DHCP": discoveries,
    "ARP": neighbours,
    NDP: solicitations,
    "pings": echoes,
}
CONNECTS = "connect and close"
KINDS = [*FRAMES, CONNECTS]


def main() -> None:
    kind, seconds, port = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    link, sent = Link(), 0
    end = time.monotonic() + seconds
    if kind == CONNECTS:
        while time.monotonic() < end:
            connects(link, port)
            sent += 1
    else:
        frames = FRAMES[kind](link, port)
        built = list(islice(frames, 0 if kind == "shut windows" else BATCH))
        for frame in cycle(built) if built else frames:
            link.send(frame)
            sent += 1
            if not sent & 63 and time.monotonic() > end:
                break
    os.write(1, f"{sent}\n".encode())


if __name__ == "__main__":
    main()
