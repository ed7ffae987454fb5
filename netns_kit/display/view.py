"""View: what there is to see of an object, as text for a terminal and as HTML for a notebook.

Tables of HTML are sorted by a click on a heading, without a script: each heading has two radio buttons, each row has
its place in every order as a variable of CSS, and a rule orders the rows by it once a button is checked.
Where a browser knows no such rules, or a notebook leaves the style sheet out, the rows stay as they are.

Greys are shares of the page's own colours, and the style sheet sets no background: it fits any theme.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple

from .style import STYLE, sorting
from .svg import Tone
from .text import cut, padded, shown, some, width, wrapped

MOST_HTML, MOST_TEXT = 200, 40  # rows of a table, and facts, that are shown
NARROWEST = 40  # columns of a terminal
_GAP = 2  # columns between those of a table
_LEAST = 8  # columns that a wide cell keeps


class Cell(NamedTuple):
    """What stands in a table, if it is more than text."""

    text: str
    key: float | str | None = None
    """What it is sorted by; None: the text.  Cells that are sorted by a number are aligned at the right."""
    tone: Tone = ""


class Table(NamedTuple):
    """A table."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    title: str = ""
    empty: str = "none"
    """What stands there if there are no rows."""
    more: int = 0
    """Rows that were left out before."""
    soft: Sequence[str] = ()
    """Headings of the columns that text cuts first where there is no room."""

    def text(self, columns: int) -> Iterator[str]:
        """Yield the lines of the table."""
        if self.title:
            yield f"{shown(self.title)}:" if self.rows else f"{shown(self.title)}: {self.empty}"
        if not self.rows:
            return
        left_out, rows = self._cut(MOST_TEXT)
        texts = [[shown(each.text) for each in row] for row in rows]
        widths = [max(map(width, column)) for column in zip(self.headings, *texts, strict=True)]
        soft = [n for n, heading in enumerate(self.headings) if heading in self.soft]
        _narrow(widths, soft, columns - 2)
        _narrow(widths, range(len(widths)), columns - 2)
        numeric = _numeric(rows)
        for line in ([heading.upper() for heading in self.headings], *texts):
            cells = (
                padded(text, n, right=right) for text, n, right in zip(line, widths, numeric, strict=True)
            )
            yield f"  {(' ' * _GAP).join(cells)}".rstrip()
        if left_out:
            yield f"  … and {left_out:,} more"

    def html(self) -> Iterator[str]:
        """Yield the parts of the table."""
        if self.title:
            yield f"<h4>{escape(shown(self.title))}</h4>"
        if not self.rows:
            yield f'<p class="dim">{escape(self.empty)}</p>'
            return
        left_out, rows = self._cut(MOST_HTML)
        is_sortable = len(rows) > 1
        numeric = _numeric(rows)
        orders = [_order([row[n] for row in rows]) for n in range(len(self.headings))] if is_sortable else []
        yield f'<form class="w" style="--n:{len(self.headings)}"><table><thead><tr>'
        for heading, right in zip(self.headings, numeric, strict=True):
            yield f"<th{_class(right)}>{_heading(heading, is_sortable=is_sortable)}</th>"
        yield "</tr></thead><tbody>"
        for at, row in enumerate(rows):
            places = ";".join(f"--k{n}:{order[at]}" for n, order in enumerate(orders))
            yield f'<tr style="{places}">' if places else "<tr>"
            for cell, right in zip(row, numeric, strict=True):
                yield f"<td{_class(right, cell.tone)}>{escape(shown(cell.text))}</td>"
            yield "</tr>"
        yield "</tbody></table></form>"
        if left_out:
            yield f'<p class="dim">… and {left_out:,} more</p>'

    def _cut(self, most: int) -> tuple[int, list[list[Cell]]]:
        """Return how many rows are left out, and the others."""
        rows = [[each if isinstance(each, Cell) else Cell(each) for each in row] for row in self.rows[:most]]
        return self.more + len(self.rows) - len(rows), rows


class Facts(NamedTuple):
    """Names with values."""

    pairs: Sequence[tuple[str, Cell | str]]

    def text(self, columns: int) -> Iterator[str]:
        """Yield the lines of the facts."""
        pairs = [(shown(name), value) for name, value in self.pairs[:MOST_TEXT]]
        left = max((width(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            text = shown(value.text if isinstance(value, Cell) else value)
            head = padded(name, left)
            for line in wrapped(text, max(columns - left - 4, NARROWEST // 2)):
                yield f"  {head}  {line}".rstrip()
                head = " " * left
        if len(self.pairs) > MOST_TEXT:
            yield f"  … and {len(self.pairs) - MOST_TEXT:,} more"

    def html(self) -> Iterator[str]:
        """Yield the parts of the facts."""
        yield "<dl>"
        for name, value in self.pairs[:MOST_HTML]:
            cell = value if isinstance(value, Cell) else Cell(value)
            yield f"<dt>{escape(shown(name))}</dt><dd{_class(False, cell.tone)}>{escape(shown(cell.text))}</dd>"
        yield "</dl>"
        if len(self.pairs) > MOST_HTML:
            yield f'<p class="dim">… and {len(self.pairs) - MOST_HTML:,} more</p>'


class Picture(NamedTuple):
    """A picture, and lines that say the same."""

    svg: str
    lines: Sequence[str]

    def text(self, columns: int) -> Iterator[str]:
        """Yield the lines."""
        return (cut(shown(line), columns) for line in self.lines)

    def html(self) -> Iterator[str]:
        """Yield the picture."""
        yield f'<div class="p">{self.svg}</div>'


class Lines(NamedTuple):
    """Text in a monospaced font; `title` stands above it."""

    lines: Sequence[str]
    title: str = ""

    def text(self, columns: int) -> Iterator[str]:
        """Yield the lines."""
        if self.title:
            yield f"{shown(self.title)}:"
        yield from (f"  {cut(shown(line), columns - 2)}" for line in self.lines)

    def html(self) -> Iterator[str]:
        """Yield the text."""
        if self.title:
            yield f"<h4>{escape(shown(self.title))}</h4>"
        yield f"<pre>{escape(chr(10).join(map(shown, self.lines)))}</pre>"


class Section(NamedTuple):
    """Parts below a summary, which HTML can fold."""

    summary: str
    parts: Sequence[Facts | Lines]
    is_open: bool = False

    def text(self, columns: int) -> Iterator[str]:
        """Yield the summary and the parts below."""
        yield cut(shown(self.summary), columns)
        for part in self.parts:
            yield from (f"  {line}" for line in part.text(columns - 2))

    def html(self) -> Iterator[str]:
        """Yield what can be folded."""
        yield f"<details{' open' * self.is_open}><summary>{escape(shown(self.summary))}</summary>"
        for part in self.parts:
            yield from part.html()
        yield "</details>"


Part = Table | Facts | Picture | Lines | Section


class View(NamedTuple):
    """What there is to see of an object."""

    kind: str
    """What it is."""
    name: str
    """Which it is; it may be empty."""
    condition: Cell | None = None
    """What state it is in."""
    parts: Sequence[Part] = ()

    def text(self, columns: int = 100) -> str:
        """Return the view as text.

        Args:
            columns: The width of the terminal.
        """
        columns = max(columns, NARROWEST)
        head = f"{self.kind} {shown(self.name)}".rstrip()
        lines = list(
            wrapped(head if self.condition is None else f"{head}: {shown(self.condition.text)}", columns)
        )
        for part in self.parts:
            if len(lines) > 1 or not isinstance(part, Facts):
                lines.append("")
            lines += part.text(columns)
        return "\n".join(lines).rstrip()

    def html(self) -> str:
        """Return the view as HTML."""
        pieces = list(self._pieces())
        most = max((len(part.headings) for part in self.parts if isinstance(part, Table)), default=0)
        return f'<div class="nk"><style>{STYLE}{sorting(most)}</style>{"".join(pieces)}</div>'

    def _pieces(self) -> Iterator[str]:
        yield f"<header><b>{escape(self.kind)}</b> <code>{escape(shown(self.name))}</code>"
        if self.condition is not None:
            tone = f" {self.condition.tone}".rstrip()
            yield f' <span class="tag{tone}">{escape(shown(self.condition.text))}</span>'
        yield "</header>"
        for part in self.parts:
            yield from part.html()


def condition(text: str) -> Cell:
    """Return the condition of an object that is opened and closed, as a supervisor says it."""
    tones: dict[str, Tone] = {"open": "good", "opening": "warn", "failed": "bad"}
    return Cell(text, tone=tones.get(text.partition(":")[0], "dim"))


def number(value: float, text: str = "", tone: Tone = "") -> Cell:
    """Return a cell with a number, and how that is written."""
    return Cell(text or f"{value:,}", value, tone)


def _numeric(rows: Sequence[Sequence[Cell]]) -> list[bool]:
    """Return which columns have numbers."""
    return [all(isinstance(cell.key, int | float) for cell in column) for column in zip(*rows, strict=True)]


def _order(cells: Iterable[Cell]) -> list[int]:
    """Return the place of each cell in the order of its column: numbers first, then text.  Equal ones share it."""
    keys = [_key(cell) for cell in cells]
    places = {key: place for place, key in enumerate(sorted(set(keys)), 1)}
    return [places[key] for key in keys]


def _key(cell: Cell) -> tuple[bool, float, str]:
    if isinstance(cell.key, int | float):
        return False, cell.key, ""
    return True, 0.0, (cell.text if cell.key is None else cell.key).lower()


def _heading(text: str, *, is_sortable: bool) -> str:
    if not (is_sortable and text):
        return escape(text)
    up, down = (
        f'<label title="sort, {way}">{name}<input type="radio" name="sort" class="{kind}"><i>{sign}</i></label>'
        for way, name, kind, sign in (("ascending", escape(text), "a", "▴"), ("descending", "", "d", "▾"))
    )
    return up + down


def _class(right: bool, tone: Tone = "") -> str:
    names = " ".join(filter(None, ("r" * right, tone)))
    return f' class="{names}"' if names else ""


def _narrow(widths: list[int], those: Sequence[int], columns: int) -> None:
    """Make the widest of some columns narrower until all fit, as far as a cell can be."""
    excess = sum(widths) + _GAP * (len(widths) - 1) - columns
    while excess > 0 and those:
        widest = max(those, key=widths.__getitem__)
        if widths[widest] <= _LEAST:
            return
        widths[widest] -= 1
        excess -= 1


def count(number: int, noun: str, plural: str = "") -> Cell:
    """Return a number with its noun as a condition."""
    return Cell(some(number, noun, plural), tone="dim")
