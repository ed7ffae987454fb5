"""Packets: those of a capture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import SupportsIndex, overload

from typing_extensions import Self

from .displayed import Displayed
from .packet import CapturedPacket, dissected
from .sequence import TcpConversations, conversations
from .view import MOST_HTML, Cell, Facts, Table, View, count, number


class Packets(Displayed, tuple[CapturedPacket, ...]):  # noqa: SLOT001  # a tuple of its own has none
    """A tuple of `CapturedPacket`: those of a capture.  A notebook shows them as a table, and `print` as text."""

    names: Mapping[str, str] = {}
    """Names of addresses, as the file has them."""

    @classmethod
    def of(cls, packets: Iterable[CapturedPacket], names: Mapping[str, str]) -> Self:
        """Make the tuple; for parts of this library.

        Args:
            packets: The packets.
            names: The names of addresses.
        """
        made = cls(packets)
        made.names = names
        return made

    @overload
    def __getitem__(self, at: SupportsIndex) -> CapturedPacket: ...
    @overload
    def __getitem__(self, at: slice) -> Packets: ...
    def __getitem__(self, at: SupportsIndex | slice) -> CapturedPacket | Packets:
        """Return a packet, or several that are shown in the same way."""
        found = super().__getitem__(at)
        return Packets.of(found, self.names) if isinstance(found, tuple) else found

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
