"""Blocks of pcapng, byte by byte and read back."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.tap import pcapng
from tests.support.pcapng import read

BEGINNING = pcapng.section("x86_64", "Linux 6.1", "netns-kit") + pcapng.interface(
    "tap0", 1500, mac=bytes(range(6)), system="Linux 6.1", hardware="netns_kit", comment="a note"
)
FRAMES = st.lists(
    st.tuples(
        st.binary(max_size=70),
        st.integers(0, 1 << 18),
        st.integers(0, (1 << 64) - 1),
        st.sampled_from((pcapng.FROM_GUEST, pcapng.TO_GUEST)),
        st.text(max_size=20),
    ),
    max_size=6,
)


def packet(data: bytes, size: int, time: int, direction: int, comment: str) -> bytes:
    head, tail = pcapng.packet_ends(time, len(data), size, direction, comment)
    return head + data + tail


def test_a_packet_byte_by_byte() -> None:
    words = struct.Struct("=IIIIIII").pack(6, 28 + 8 + 8 + 4 + 4, 0, 1, 2, 5, 9)
    flags = struct.pack("=HHI", 2, 4, 1)
    expected = words + b"frame\0\0\0" + flags + bytes(4) + struct.pack("=I", 52)
    assert packet(b"frame", 9, 1 << 32 | 2, pcapng.TO_GUEST, "") == expected


def test_names_byte_by_byte() -> None:
    four = struct.pack("=HH", 1, 8) + bytes((192, 0, 2, 1)) + b"abc\0"
    six = struct.pack("=HH", 2, 19) + bytes(16) + b"ab\0" + b"\0"
    content = four + six + bytes(4)
    length = struct.pack("=I", 12 + len(content))
    expected = struct.pack("=I", 4) + length + content + length
    assert pcapng.names([(bytes((192, 0, 2, 1)), "abc"), (bytes(16), "ab")]) == expected


def test_a_file_is_read_back() -> None:
    found = read(BEGINNING + pcapng.statistics(7 << 32 | 9, 5 << 32 | 3, received=4, accepted=3, dropped=2))
    assert found.section == {2: b"x86_64", 3: b"Linux 6.1", 4: b"netns-kit"}
    assert found.snaplen == 1500
    assert found.interface == {
        1: b"a note",
        2: b"tap0",
        6: bytes(range(6)),
        9: b"\x09",
        12: b"Linux 6.1",
        15: b"netns_kit",
    }
    assert found.statistics[2] == struct.pack("=II", 5, 3)
    assert found.statistics[3] == struct.pack("=II", 7, 9)
    assert [found.counter(code) for code in (4, 5, 6)] == [4, 2, 3]


@given(
    FRAMES,
    st.integers(0, 400),
    st.integers(0, 400),
)
def test_what_is_written_is_read_and_cut_between_blocks(
    packets: list[tuple[bytes, int, int, int, str]], border: int, room: int
) -> None:
    made = [packet(*each) for each in packets]
    found = read(BEGINNING + b"".join(made)).packets
    assert [(each.data, each.size, each.time, each.direction) for each in found] == [
        each[:4] for each in packets
    ]
    assert [each.comment for each in found] == [
        each[4].encode("utf-8", "replace").decode() for each in packets
    ]
    text = b"".join(made)
    pieces = [memoryview(text)[:border], memoryview(text)[border:]]
    fitting = 0
    for each in made:
        if fitting + len(each) > room:
            break
        fitting += len(each)
    assert pcapng.whole_blocks(pieces, room) == fitting
    assert pcapng.whole_blocks([memoryview(b"what is no block")], 100) is None


# -- what the library reads back itself -------------------------------------------------------------------


@given(FRAMES)
def test_frames_are_read_back(frames: list[tuple[bytes, int, int, int, str]]) -> None:
    blocks = b"".join(packet(*each) for each in frames)
    found, names = pcapng.read(BEGINNING + blocks + pcapng.names([(bytes((192, 0, 2, 1)), "abc")]))
    expected = [(*each[:4], each[4].encode("utf-8", "replace").decode()) for each in frames]
    assert [(each.data, each.size, each.time, each.flags, each.comment) for each in found] == expected
    assert names == {"192.0.2.1": "abc"}


def test_a_block_that_is_not_whole_yet_is_not_there() -> None:
    whole = BEGINNING + packet(b"frame", 5, 1, 1, "")
    for cut in range(len(BEGINNING), len(whole)):
        assert pcapng.read(whole[:cut]) == ([], {})
    assert len(pcapng.read(whole)[0]) == 1


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "begins with a section header"),
        (b"\xd4\xc3\xb2\xa1" + bytes(40), "begins with a section header"),
        (BEGINNING.replace(struct.pack("=I", 0x1A2B3C4D), struct.pack("=I", 0x4D3C2B1A)), "byte order"),
        (BEGINNING + struct.pack("=II", 6, 9) + bytes(12), "a block of 9 bytes"),
        (BEGINNING + struct.pack("=III", 6, 12, 12), "too short"),
        (BEGINNING + struct.pack("=IIHHI", 1, 20, 101, 0, 0) + struct.pack("=I", 20), "links of type 101"),
    ],
)
def test_what_is_no_capture_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        pcapng.read(data)


@given(st.binary(max_size=100), st.integers(0, 8))
def test_hostile_bytes_raise_one_error(data: bytes, kind: int) -> None:
    size = len(data) + 12 + -len(data) % 4
    block = struct.pack("=II", kind, size) + data.ljust(size - 12, b"\0") + struct.pack("=I", size)
    for text in (BEGINNING + data, BEGINNING + block, data):
        with suppress(ValueError):
            pcapng.read(text)
