"""Drawing: a picture as SVG, which takes its colours from the text around it.

Strokes and letters have the colour of the text around (currentColor), so that a picture is readable on a dark page
and on a light one.  Attributes say everything: no style sheet is needed, and none is disturbed.  Nobody measures text
here: it is set in a monospaced font, whose characters are 0.6 em wide or a little less, and is cut to its room.
"""

from __future__ import annotations

from html import escape
from typing import Literal

from .text import cut, shown

Tone = Literal["", "good", "warn", "bad", "dim"]
COLOURS: dict[Tone, str] = {
    "": "currentColor", "dim": "currentColor", "good": "#2b9a56", "warn": "#b8720a", "bad": "#d64545",
}  # fmt: skip
"""Colours that have a contrast of about 4 with white as with black."""
FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace"
SIZE = 12  # of letters
CHARACTER = 7.3  # the width of one


class Drawing:
    """A picture of that width; it becomes as high as what is drawn.

    Args:
        width: The width.
        label: What is in the picture, for people who do not see it.
    """

    def __init__(self, width: int, label: str) -> None:
        self._width = width
        self._label = label
        self._height = 0.0
        self._parts: list[str] = []

    def _reach(self, y: float) -> None:
        self._height = max(self._height, y)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        kind: str,
        tone: Tone = "",
        *,
        dashed: bool = False,
    ) -> None:
        """Draw a box.  `kind` is its class, by which it can be found."""
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(
            f'<rect class="{escape(kind)}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" '
            f'fill="currentColor" fill-opacity="0.05" stroke="{COLOURS[tone]}" stroke-opacity="0.6"{dashes}/>'
        )
        self._reach(y + height + 1)

    def line(
        self,
        x: float,
        y: float,
        to_x: float,
        to_y: float,
        tone: Tone = "",
        *,
        arrow: bool = False,
        dashed: bool = False,
    ) -> None:
        """Draw a line, perhaps with an arrow at its end."""
        colour, dashes = COLOURS[tone], ' stroke-dasharray="4 3"' if dashed else ""
        opacity = 1 if arrow else 0.45
        self._parts.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{colour}" '
            f'stroke-opacity="{opacity:g}"{dashes}/>'
        )
        if arrow:
            self._arrow(x, y, to_x, to_y, colour)
        self._reach(max(y, to_y) + 1)

    def _arrow(self, x: float, y: float, to_x: float, to_y: float, colour: str) -> None:
        length = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5 or 1.0
        along_x, along_y = (to_x - x) / length, (to_y - y) / length
        back_x, back_y = to_x - 8 * along_x, to_y - 8 * along_y
        corners = (
            (to_x, to_y),
            (back_x - 4 * along_y, back_y + 4 * along_x),
            (back_x + 4 * along_y, back_y - 4 * along_x),
        )
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        self._parts.append(f'<polygon points="{points}" fill="{colour}"/>')

    def text(
        self,
        x: float,
        y: float,
        text: str,
        room: float,
        tone: Tone = "",
        *,
        anchor: Literal["start", "middle", "end"] = "start",
        bold: bool = False,
    ) -> None:
        """Write a text whose baseline is `y`, in that room.  If it is cut, pointing at it shows all of it."""
        whole = shown(text)
        fitting = cut(whole, int(room / CHARACTER))
        title = "" if fitting == whole else f"<title>{escape(whole)}</title>"
        weight = ' font-weight="bold"' if bold else ""
        opacity = ' fill-opacity="0.65"' if tone == "dim" else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{COLOURS[tone]}"{opacity}{weight} '
            f'xml:space="preserve">{escape(fitting)}{title}</text>'
        )
        self._reach(y + 5)

    def markup(self) -> str:
        """Return the picture as an element of HTML, which is well-formed XML too."""
        size = f"{self._width:g} {self._height:g}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(shown(self._label))}" '
            f'viewBox="0 0 {size}" width="{self._width:g}" height="{self._height:g}" '
            f'style="max-width:100%;height:auto" font-family="{FONT}" font-size="{SIZE}" stroke-width="1.2">'
            f"{''.join(self._parts)}</svg>"
        )
