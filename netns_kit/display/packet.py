"""CapturedPacket: a packet of a capture, which is decoded when somebody looks at it."""

from __future__ import annotations

from typing import Literal

from netns_kit.frozen import field, frozen

from .displayed import Displayed
from .dissect import Dissection, Layer, hexadecimal
from .text import octets
from .view import Cell, Facts, Lines, Section, View


@frozen
class CapturedPacket(Displayed):
    """A packet of a capture.  A notebook shows its layers, and `print` as text."""

    number: int
    """Number in its capture, from 1."""
    time: float
    """Seconds since the first packet."""
    direction: Literal["from guest", "to guest", ""]
    """Direction; empty if the file does not tell."""
    data: bytes = field(repr=False)
    """Bytes of the frame that were kept."""
    size: int
    """Bytes that the frame had."""
    comment: str = ""
    """Comment in the file."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, the outermost first."""
        return tuple(dissected(self).layers)

    def _view(self) -> View:
        found = dissected(self)
        parts: list[Section] = [
            Section(
                f"{layer.name}: {layer.summary}", [Facts(layer.fields)] if layer.fields else (), is_open=True
            )
            for layer in found.layers
        ]
        if found.payload:
            parts.append(
                Section(f"payload: {octets(len(found.payload))}", [Lines(hexadecimal(found.payload))])
            )
        told = " ".join(filter(None, (f"{self.time:.6f} s", self.direction, self.comment)))
        return View("Packet", str(self.number), Cell(told, tone="dim"), parts)


def dissected(packet: CapturedPacket) -> Dissection:
    """Return what the frame of a packet says."""
    return Dissection(packet.data, packet.size)
