"""Packets of a guest in 10.0.2.0/24, made by hand: what no kernel would send among them."""

from __future__ import annotations

from netns_kit.stack.wire import checksum, icmp, ip, tcp, udp

GUEST, GATEWAY, RESOLVER = (bytes((10, 0, 2, last)) for last in (100, 2, 3))
GUEST_MAC = bytes.fromhex("020000000064")
GATEWAY_MAC = b"\x52\x55" + GATEWAY
PORT = 40000
"""The guest's, unless a test says another."""


def packet(protocol: int, addresses: bytes, layer4: bytes, sum_at: int) -> bytes:
    pseudo = checksum.pseudo_header(addresses, protocol, len(layer4)) if protocol != ip.ICMP else 0
    check = checksum.checksum(pseudo, checksum.total(layer4)).to_bytes(2, "big")
    layer4 = layer4[:sum_at] + check + layer4[sum_at + 2 :]
    return ip.pack(addresses, protocol, len(layer4)) + layer4


def syn(destination: bytes, port: int, source: bytes = GUEST) -> bytes:
    segment = tcp.pack(src_port=PORT, dst_port=port, seq=1, ack=0, flags=tcp.SYN, window=65535)
    return packet(ip.TCP, source + destination, segment, 16)


def datagram(
    destination: bytes, port: int, payload: bytes = b"x", source: bytes = GUEST, *, source_port: int = PORT
) -> bytes:
    header = udp.HEADER.pack(source_port, port, udp.SIZE + len(payload), 0)
    return packet(ip.UDP, source + destination, header + payload, 6)


def echo_request(destination: bytes) -> bytes:
    return packet(ip.ICMP, GUEST + destination, icmp.HEADER.pack(icmp.ECHO, 0, 0, 7, 1) + b"ping", 2)
