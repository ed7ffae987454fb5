"""TcpConversation: the segments of one TCP connection, as a sequence diagram.

Sequence numbers are told from 0 on, as each side's first was; one that goes back over what its side has sent before
is a retransmission.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from netns_kit.frozen import frozen
from netns_kit.stack.wire import tcp

from .displayed import Displayed
from .dissect import Segment, flag_names
from .packet import CapturedPacket, dissected
from .svg import Drawing, Tone
from .text import cut, padded, some, visible, width
from .view import MOST_HTML, Picture, Table, View, count, number

FIRST, LAST = 40, 20  # segments that are drawn of a long connection
_MOD = 1 << 32
_WIDTH, _LEFT, _RIGHT, _STEP, _TOP = 860, 190, 670, 26, 46
_TEXT_LEAST, _TEXT_MOST = 30, 60  # columns between the ends, as text


@frozen
class TcpConversation(Displayed):
    """A TCP connection in a capture.  A notebook shows a sequence diagram of its segments, and `print` as text."""

    opener: str
    """End that has sent the first segment of the capture, address and port."""
    other: str
    """Other end, address and port."""
    names: tuple[str, str]
    """Names of the two ends; empty if they are not known."""
    packets: tuple[CapturedPacket, ...]
    """Packets of the connection."""

    def _view(self) -> View:
        rows = list(_rows(self))
        if len(rows) > FIRST + LAST:
            left_out = len(rows) - FIRST - LAST
            gap = _Row(0.0, True, f"… {some(left_out, 'segment')} more …", "dim", is_gap=True)
            rows = [*rows[:FIRST], gap, *rows[-LAST:]]
        told = count(len(self.packets), "segment")
        return View(
            "TCP", f"{self.opener} → {self.other}", told, [Picture(_drawn(self, rows), _written(self, rows))]
        )


class TcpConversations(Displayed, tuple[TcpConversation, ...]):  # noqa: SLOT001  # a tuple of its own has none
    """A tuple of `TcpConversation`.  A notebook shows it as a table, and `print` as text: one row for each."""

    def _view(self) -> View:
        rows = [
            (
                number(at, str(at)),
                number(began := each.packets[0].time if each.packets else 0.0, f"{began:.6f}"),
                each.opener,
                each.other,
                " → ".join(filter(None, each.names)),
                number(len(each.packets)),
            )
            for at, each in enumerate(self[:MOST_HTML])
        ]
        headings = ("index", "time", "from", "to", "name", "segments")
        table = Table(headings, rows, more=len(self) - len(rows), soft=("name",))
        return View("TCP", "", count(len(self), "connection"), [table] if rows else ())


class _Row(NamedTuple):
    """A segment of the diagram."""

    time: float
    is_out: bool
    """Whether the opener has sent it."""
    text: str
    tone: Tone
    is_gap: bool = False


def conversations(packets: Iterable[CapturedPacket], names: Mapping[str, str]) -> TcpConversations:
    """Return the TCP connections of a capture, in the order in which they begin.

    A SYN that comes after the end of a connection between the same ends begins another one.

    Args:
        packets: The packets.
        names: The names of addresses.
    """
    under_way: dict[frozenset[str], list[CapturedPacket]] = {}
    ended: set[frozenset[str]] = set()
    found: list[tuple[str, str, list[CapturedPacket]]] = []
    for packet in packets:
        seen = dissected(packet)
        if seen.segment is None:
            continue
        ends = frozenset((seen.source, seen.destination))
        is_new = seen.segment.flags & (tcp.SYN | tcp.ACK) == tcp.SYN
        if ends not in under_way or (is_new and ends in ended):
            under_way[ends] = []
            ended.discard(ends)
            found.append((seen.source, seen.destination, under_way[ends]))
        under_way[ends].append(packet)
        if seen.segment.flags & (tcp.FIN | tcp.RST):
            ended.add(ends)

    def name(end: str) -> str:
        return names.get(end.rpartition(":")[0].strip("[]"), "")

    return TcpConversations(
        TcpConversation(source, to, (name(source), name(to)), tuple(those)) for source, to, those in found
    )


def _rows(conversation: TcpConversation) -> Iterator[_Row]:
    first: dict[bool, int] = {}
    sent: dict[bool, int] = {}  # behind the last byte of each side, from 0
    began = conversation.packets[0].time if conversation.packets else 0.0
    for packet in conversation.packets:
        found = dissected(packet)
        segment = found.segment
        if segment is None:
            continue
        is_out = found.source == conversation.opener
        first.setdefault(is_out, segment.seq)
        if segment.flags & tcp.ACK:
            first.setdefault(not is_out, (segment.ack - 1) % _MOD if segment.flags & tcp.SYN else segment.ack)
        seq = (segment.seq - first[is_out]) % _MOD
        length = segment.size + bool(segment.flags & tcp.SYN) + bool(segment.flags & tcp.FIN)
        again = bool(length) and is_out in sent and (seq + length - sent[is_out] - 1) % _MOD >= _MOD // 2
        if length and not again:
            sent[is_out] = (seq + length) % _MOD
        tone: Tone = "bad" if segment.flags & tcp.RST else "warn" if again else ""
        if not tone and segment.flags & (tcp.SYN | tcp.FIN):
            tone = "good"
        said = found.layers[-1]
        data = f" {said.name}: {said.summary}" if said.name in ("TLS", "HTTP", "DNS") else ""
        yield _Row(
            packet.time - began, is_out, _told(segment, seq, first.get(not is_out, 0), again) + data, tone
        )


def _told(segment: Segment, seq: int, first: int, again: bool) -> str:
    parts = [flag_names(segment.flags), f"seq {seq}"]
    if segment.size:
        parts.append(f"+{segment.size}")
    if segment.flags & tcp.ACK:
        parts.append(f"ack {(segment.ack - first) % _MOD}")
    if segment.flags & tcp.SYN:
        parts += (each for each in segment.options if each.startswith(("MSS", "window")))
    if again:
        parts.append("again")
    return " ".join(parts)


def _drawn(conversation: TcpConversation, rows: list[_Row]) -> str:
    drawing = Drawing(_WIDTH, f"the TCP connection from {conversation.opener} to {conversation.other}")
    bottom = _TOP + _STEP * len(rows) + 8
    for x, end, name in (
        (_LEFT, conversation.opener, conversation.names[0]),
        (_RIGHT, conversation.other, conversation.names[1]),
    ):
        drawing.text(x, 14, name or end, 340, anchor="middle", bold=True)
        if name:
            drawing.text(x, 30, end, 340, "dim", anchor="middle")
        drawing.line(x, 36, x, bottom)
    for at, row in enumerate(rows):
        y = _TOP + _STEP * at
        drawing.text((_LEFT + _RIGHT) / 2, y + 9, row.text, _RIGHT - _LEFT - 20, row.tone, anchor="middle")
        if row.is_gap:
            continue
        drawing.text(_LEFT - 92 if row.is_out else _RIGHT + 12, y + 17, f"{row.time:.6f}", 90, "dim")
        x, to = (_LEFT, _RIGHT) if row.is_out else (_RIGHT, _LEFT)
        drawing.line(x, y + 14, to, y + 20, row.tone, arrow=True)
    return drawing.markup()


def _written(conversation: TcpConversation, rows: list[_Row]) -> list[str]:
    between = min(max((width(visible(row.text)) for row in rows), default=0) + 6, _TEXT_MOST)
    between = max(between, _TEXT_LEAST, 2)
    half = between // 2 + 1
    heads = [
        (conversation.opener, conversation.other),
        *([conversation.names] if any(conversation.names) else []),
    ]
    lines = [
        f"{'':10}  {padded(visible(left), half)}{padded(visible(right), half, right=True)}"
        for left, right in heads
    ]
    for row in rows:
        text = cut(visible(row.text), between - 4)
        dashes = between - width(text) - 3
        if row.is_gap:
            lines.append(f"{'':10}  |{padded(text, between)}|")
        elif row.is_out:
            lines.append(f"{row.time:10.6f}  |─ {text} {'─' * (dashes - 1)}>|")
        else:
            lines.append(f"{row.time:10.6f}  |<{'─' * (dashes - 1)} {text} ─|")
    return lines
