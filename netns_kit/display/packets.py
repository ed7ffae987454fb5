"""Packets: those of a capture."""

from __future__ import annotations

from collections.abc import Mapping

from .named import Named
from .packet import CapturedPacket, dissected
from .sequence import TcpConversations, conversations
from .view import MOST_HTML, Cell, Facts, Table, View, count, number


class Packets(Named[str, CapturedPacket]):
    """A tuple of `CapturedPacket`: those of a capture.  A notebook shows them as a table, and `print` as text."""

    names: Mapping[str, str]
    """Names of addresses, as the file has them."""

    def tcp(self) -> TcpConversations:
        """Return the TCP connections that have packets here, in the order in which they begin."""
        return conversations(self, self.names)

    def _view(self) -> View:
        return packets_view(self)


def packets_view(packets: Packets) -> View:
    """Return the view of packets."""
    rows: list[list[Cell | str]] = []
    for packet in packets[:MOST_HTML]:
        found = dissected(packet)
        sign = {"from guest": "→", "to guest": "←"}.get(packet.direction, "")
        row: list[Cell | str] = [
            number(packet.number, str(packet.number)),
            number(packet.time, f"{packet.time:.6f}"),
            sign,
            found.source,
            found.destination,
            found.protocol,
            number(packet.size),
            found.info,
        ]
        rows.append(row)
    headings = ("no.", "time", "", "source", "destination", "proto", "bytes", "what it says")
    table = Table(headings, rows, more=len(packets) - len(rows), soft=headings[-1:])
    names = Facts(tuple(packets.names.items()))
    return View("Packets", "", count(len(packets), "packet"), [table, names] if rows else ())
