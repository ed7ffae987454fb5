"""Super-frames, cut: what the pieces carry, and that each is valid by itself."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.stack.wire import checksum, ethernet, ip, tcp, udp, virtio
from netns_kit.tap.super_frames import PIECES_MAX, cut, summed

V4, V6 = (bytes(range(1, 9)), 0x0800), (bytes(range(1, 33)), 0x86DD)
START = {0x0800: ethernet.SIZE + 20, 0x86DD: ethernet.SIZE + 40}


def super_frame(
    way: tuple[bytes, int], payload: bytes, size: int, *, flags: int = 0, of_udp: bool = False
) -> bytes:
    addresses, kind = way
    half = len(addresses) // 2
    if of_udp:
        layer4 = udp.HEADER.pack(1000, 2000, 8 + len(payload), 0) + payload
    else:
        head = tcp.pack(src_port=1, dst_port=2, seq=0xFFFFFF00, ack=7, flags=tcp.ACK | flags, window=9)
        layer4 = head + payload
    protocol = ip.UDP if of_udp else ip.TCP
    if kind == 0x0800:
        network = bytearray(
            b"\x45\0" + (20 + len(layer4)).to_bytes(2, "big") + b"\xff\xff\x40\0\x40" + bytes([protocol])
        )
        network += bytes(2) + addresses
        gso = virtio.GSO_TCPV4
    else:
        network = bytearray(
            b"\x60\0\0\0" + len(layer4).to_bytes(2, "big") + bytes([protocol, 64]) + addresses
        )
        gso = virtio.GSO_TCPV6
    assert len(network) == 12 + 2 * half or kind != 0x0800
    gso = virtio.GSO_UDP_L4 if of_udp else gso
    offset = 6 if of_udp else 16
    vnet = virtio.pack(virtio.NEEDS_CSUM, gso, 0, size, START[kind], offset)
    return vnet + ethernet.pack(b"a" * 6, b"b" * 6, kind) + bytes(network) + layer4


def packet(frame: bytes) -> ip.Packet:
    """The packet of a frame whose checksums are all filled in: reading it verifies them."""
    whole = summed(frame)
    assert whole[: virtio.SIZE] == virtio.NONE
    view = memoryview(whole)[virtio.SIZE + ethernet.SIZE :]
    found = (
        ip.parse_ipv4(view)
        if whole[virtio.SIZE + 12 : virtio.SIZE + 14] == b"\x08\0"
        else ip.parse_ipv6(view)
    )
    pseudo = checksum.pseudo_header(found.addresses, found.protocol, len(found.payload))
    assert (pseudo + checksum.total(found.payload)) % 0xFFFF == 0
    return found


@pytest.mark.parametrize("way", [V4, V6])
@given(
    length=st.integers(1, 65000), size=st.integers(536, 9000), flags=st.sampled_from([0, tcp.FIN, tcp.PSH])
)
def test_a_tcp_super_segment_is_cut(way: tuple[bytes, int], length: int, size: int, flags: int) -> None:
    payload = os.urandom(length)
    pieces = list(cut(super_frame(way, payload, size, flags=flags)))
    got = bytearray()
    for number, piece in enumerate(pieces):
        segment = tcp.parse(packet(piece).payload)
        assert segment.seq == (0xFFFFFF00 + len(got)) & 0xFFFFFFFF
        got += segment.payload
        is_last = number == len(pieces) - 1
        assert segment.flags == tcp.ACK | (flags if is_last else 0)
        assert len(segment.payload) == size or is_last
        if way is V4:
            assert (
                int.from_bytes(piece[virtio.SIZE + 18 : virtio.SIZE + 20], "big")
                == (0xFFFF + number) & 0xFFFF
            )
    assert got == payload


@pytest.mark.parametrize("way", [V4, V6])
def test_a_udp_super_datagram_is_cut(way: tuple[bytes, int]) -> None:
    payload = os.urandom(5000)
    pieces = [packet(each) for each in cut(super_frame(way, payload, 1200, of_udp=True))]
    assert [len(each.payload) for each in pieces] == [1208] * 4 + [208]
    assert b"".join(bytes(each.payload[8:]) for each in pieces) == payload


def test_one_frame_becomes_few() -> None:
    assert len(list(cut(super_frame(V4, bytes(60000), 1)))) == PIECES_MAX
    whole = super_frame(V4, bytes(60000), 1, of_udp=True)
    assert list(cut(whole)) == [whole]


@given(st.binary(min_size=virtio.SIZE, max_size=200))
def test_what_makes_no_sense_stays_whole(text: bytes) -> None:
    assert sum(map(len, cut(text))) >= len(text)
    summed(text)


@given(at=st.integers(0, 70), byte=st.integers(0, 255))
def test_a_damaged_header_raises_nothing(at: int, byte: int) -> None:
    text = bytearray(super_frame(V4, bytes(3000), 1000))
    text[at] = byte
    assert all(map(summed, cut(bytes(text))))
