"""A reader of pcapng files, written from the format's description and not from our writer."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ipaddress import ip_address
from typing import NamedTuple

SECTION, INTERFACE, NAMES, STATISTICS, PACKET = 0x0A0D0D0A, 1, 4, 5, 6
OUTBOUND, INBOUND = 2, 1


class Packet(NamedTuple):
    """An enhanced packet block."""

    time: int
    size: int
    data: bytes
    direction: int
    comment: str
    flags: int


class Contents(NamedTuple):
    """A file."""

    section: dict[int, bytes]
    snaplen: int
    interface: dict[int, bytes]
    packets: list[Packet]
    names: dict[str, str]
    statistics: dict[int, bytes]

    def counter(self, code: int) -> int:
        """One of the statistics."""
        return int(struct.unpack("=Q", self.statistics[code])[0])


def blocks(text: bytes) -> Iterator[tuple[int, bytes]]:
    """The blocks: type and content."""
    at = 0
    while at < len(text):
        kind, length = struct.unpack_from("=II", text, at)
        assert length % 4 == 0
        assert length >= 12
        assert text[at + length - 4 : at + length] == struct.pack("=I", length), (
            "the length stands at both ends"
        )
        yield kind, text[at + 8 : at + length - 4]
        at += length
    assert at == len(text)


def options(text: bytes) -> dict[int, bytes]:
    """The options at the end of a block."""
    found: dict[int, bytes] = {}
    at = 0
    while True:
        code, length = struct.unpack_from("=HH", text, at)
        if code == 0:
            assert length == 0
            assert at + 4 == len(text)
            return found
        assert code not in found
        found[code] = text[at + 4 : at + 4 + length]
        at += 4 + (length + 3 & ~3)


def read(text: bytes) -> Contents:
    """The contents of a file with one interface."""
    (kind, section), *rest = blocks(text)
    assert kind == SECTION
    assert struct.unpack_from("=IHHq", section) == (0x1A2B3C4D, 1, 0, -1)
    kind, interface = rest.pop(0)
    assert kind == INTERFACE
    link, reserved, snaplen = struct.unpack_from("=HHI", interface)
    assert (link, reserved) == (1, 0)
    packets, names, statistics = list[Packet](), dict[str, str](), dict[int, bytes]()
    for kind, content in rest:
        if kind == PACKET:
            number, high, low, kept, size = struct.unpack_from("=IIIII", content)
            assert number == 0
            told = options(content[20 + (kept + 3 & ~3) :])
            packets.append(
                Packet(
                    high << 32 | low,
                    size,
                    content[20 : 20 + kept],
                    struct.unpack("=I", told[2])[0] & 3,
                    told.get(1, b"").decode(),
                    struct.unpack("=I", told[2])[0] & ~3,
                )
            )
        elif kind == NAMES:
            at = 0
            while (record := struct.unpack_from("=HH", content, at)) != (0, 0):
                value = content[at + 4 : at + 4 + record[1]]
                size = {1: 4, 2: 16}[record[0]]
                names[str(ip_address(value[:size]))] = value[size:].rstrip(b"\0").decode()
                at += 4 + (record[1] + 3 & ~3)
            assert at + 4 == len(content)
        elif kind == STATISTICS:
            assert not statistics
            statistics.update(options(content[12:]))
        else:
            raise AssertionError(f"a block of type {kind}")
    return Contents(options(section[16:]), snaplen, options(interface[8:]), packets, names, statistics)
