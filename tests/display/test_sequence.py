"""Sequence diagrams of TCP connections: each segment once, in its direction; what is sent again is marked."""

from __future__ import annotations

import re

import pytest

from netns_kit import CapturedPacket, Packets
from netns_kit.display import sequence
from netns_kit.display.dissect import Dissection
from netns_kit.display.packet import dissected
from netns_kit.display.sequence import FIRST, LAST
from netns_kit.display.view import MOST_HTML, MOST_TEXT
from netns_kit.stack.wire import ethernet, ip, tcp
from tests.support.displays import HOSTILE, SVG, checked, picture
from tests.support.packets import GATEWAY, GUEST, packet

SYN, FIN, RST, ACK = tcp.SYN, tcp.FIN, tcp.RST, tcp.ACK
START, OTHER = 0xFFFFFFF0, 1000
"""Initial sequence numbers: that of the guest wraps."""


@pytest.fixture(autouse=True)
def _columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def capture(*segments: tuple[bool, int, int, int, bytes], port: int = 40000) -> list[bytes]:
    frames = []
    for is_out, seq, ack, flags, payload in segments:
        ends = (port, 80) if is_out else (80, port)
        base = (START, OTHER) if is_out else (OTHER, START)
        head = tcp.pack(
            src_port=ends[0], dst_port=ends[1], seq=(base[0] + seq) % 2**32, ack=(base[1] + ack) % 2**32,
            flags=flags, window=9,
        )  # fmt: skip
        addresses = GUEST + GATEWAY if is_out else GATEWAY + GUEST
        frames.append(
            ethernet.pack(bytes(6), bytes(6), ethernet.IPV4) + packet(ip.TCP, addresses, head + payload, 16)
        )
    return frames


def packets(frames: list[bytes], names: dict[str, str] | None = None) -> Packets:
    return Packets.of(
        (CapturedPacket(n, n / 1000, "", each, len(each)) for n, each in enumerate(frames, 1)), names or {}
    )


WHOLE = (
    (True, 0, 0, SYN, b""),
    (False, 0, 1, SYN | ACK, b""),
    (True, 1, 1, ACK, b"x" * 100),
    (True, 1, 1, ACK, b"x" * 100),
    (False, 1, 101, ACK, b"GET / HTTP/1.1\r\n\r\n"),
    (False, 19, 101, FIN | ACK, b""),
    (True, 101, 20, RST, b""),
)


def test_each_segment_has_its_line() -> None:
    [found] = packets(capture(*WHOLE)).tcp()
    assert (found.opener, found.other) == ("10.0.2.100:40000", "10.0.2.2:80")
    lines = str(found).splitlines()
    assert lines[0] == "TCP 10.0.2.100:40000 → 10.0.2.2:80: 7 segments"
    assert lines[3].strip("─>|").startswith("  0.000000  |─ SYN seq 0")
    assert "─ SYN ACK seq 0 ack 1 ─|" in lines[4]
    assert "ACK seq 1 +100 ack 1 ─" in lines[5]
    assert "ACK seq 1 +100 ack 1 again" in lines[6]
    assert "ACK seq 1 +18 ack 101 HTTP: GET / HTTP/1.1" in lines[7]
    assert "FIN ACK seq 19 ack 101" in lines[8]
    assert "RST seq 101" in lines[9]
    assert [line[12:14] for line in lines[3:]] == ["|─", "|<", "|─", "|─", "|<", "|<", "|─"]
    assert len({len(line) for line in lines[3:]}) == 1, "the ends are two straight lines"


def test_the_picture_has_an_arrow_for_each_segment() -> None:
    [found] = packets(capture(*WHOLE), {"10.0.2.2": HOSTILE}).tcp()
    root = picture(checked(found)[1])
    assert len(root.findall(f"{SVG}polygon")) == 7
    arrows = [each for each in root.iter(f"{SVG}line") if each.attrib["y1"] != each.attrib["y2"]]
    directions = [
        float(each.attrib["x1"]) < float(each.attrib["x2"])
        for each in arrows
        if each.attrib["x1"] != each.attrib["x2"]
    ]
    assert directions == [True, False, True, True, False, False, True]
    colours = [each.attrib["fill"] for each in root.findall(f"{SVG}polygon")]
    assert [colours[3], colours[6]] == ["#b8720a", "#d64545"], "sent again, and reset"


def test_a_long_connection_is_cut_in_the_middle() -> None:
    data = [(True, 1 + n, 1, ACK, b"x") for n in range(500)]
    [found] = packets(capture((True, 0, 0, SYN, b""), *data)).tcp()
    lines = str(found).splitlines()
    assert len(lines) == 3 + FIRST + LAST + 1
    assert f"… {501 - FIRST - LAST} segments more …" in lines[3 + FIRST]
    assert "again" not in str(found)
    assert found._repr_html_().count("<polygon") == FIRST + LAST


def test_connections_are_told_apart() -> None:
    ended = capture((True, 0, 0, SYN, b""), (False, 0, 1, RST | ACK, b""))
    frames = [*ended, *capture((True, 0, 0, SYN, b""), port=40001), *ended, *capture((True, 0, 0, SYN, b""))]
    assert [len(each.packets) for each in packets(frames).tcp()] == [2, 1, 2, 1]
    assert packets([]).tcp() == ()


def test_connections_are_shown_as_a_table() -> None:
    frames = [each for n in range(300) for each in capture(*WHOLE, port=40000 + n)]
    text, html = checked(packets(frames, {"10.0.2.2": HOSTILE}).tcp())
    lines = text.splitlines()
    assert lines[0] == "TCP: 300 connections"
    assert lines[2].split() == ["INDEX", "TIME", "FROM", "TO", "NAME", "SEGMENTS"]
    assert re.search(r"^ +1  0.008000  10.0.2.100:40001  10.0.2.2:80 .* 7$", lines[4])
    assert lines[-1] == f"  … and {300 - MOST_TEXT} more"
    assert f"… and {300 - MOST_HTML} more" in html
    assert checked(packets([]).tcp())[0] == "TCP: 0 connections"


def test_each_packet_is_looked_at_once_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def look(seen: CapturedPacket) -> Dissection:
        looks.append(seen)
        return dissected(seen)

    monkeypatch.setattr(sequence, "dissected", look)
    (found,) = packets(capture(*[(True, 0, 0, SYN, b"")] * 50)).tcp()
    assert len(found.packets) == len(looks) == 50


def test_a_connection_that_was_there_before_begins_with_what_is_seen() -> None:
    [found] = packets(capture((False, 500, 70, ACK, b"x" * 10), (True, 70, 510, ACK, b""))).tcp()
    assert found.opener == "10.0.2.2:80"
    assert "ACK seq 0 +10 ack 0" in str(found)
    assert "ACK seq 0 ack 10" in str(found)
