"""Text for terminals: which characters may be shown, how wide they are, and amounts for people."""

from __future__ import annotations

import re
from collections.abc import Iterator
from unicodedata import category, combining, east_asian_width

_UNFIT = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Categories of characters that control the terminal, turn the direction of writing, or have no glyph."""
_MARKS = frozenset({"Mn", "Me"})
_PLAIN = re.compile(r"[ -~]*")
_LONGEST = 2000  # characters
_UNITS = ("kB", "MB", "GB", "TB", "PB")
_TIMES = ((86400, "d"), (3600, "h"), (60, "min"))


def visible(text: str) -> str:
    """Return `text` in one line, with escapes in place of what is not to be shown as it is.

    >>> print(visible("a\\x1b[2Jb\\u202ec"))
    a\\x1b[2Jb\\u202ec
    """
    if _PLAIN.fullmatch(text):
        return text
    return "".join(
        each.encode("unicode_escape").decode() if category(each) in _UNFIT else each for each in text
    )


def shown(text: str) -> str:
    """Return `text` as `visible` does, and of a very long one the beginning."""
    return visible(text) if len(text) <= _LONGEST else f"{visible(text[:_LONGEST])}…"


def width(text: str) -> int:
    """Return how many columns of a terminal a visible text takes."""
    return len(text) if text.isascii() else sum(map(_width, text))


def _width(character: str) -> int:
    if combining(character) or category(character) in _MARKS:
        return 0
    return 2 if east_asian_width(character) in "WF" else 1


def cut(text: str, columns: int) -> str:
    """Return a visible text in that many columns: all of it, or its beginning and an ellipsis.

    >>> cut("example.org", 11), cut("example.org", 5)
    ('example.org', 'exam…')
    """
    if width(text) <= columns:
        return text
    kept, room = "", columns - 1
    for each in text:
        room -= _width(each)
        if room < 0:
            break
        kept += each
    return f"{kept}…" if columns > 0 else ""


def padded(text: str, columns: int, *, right: bool = False) -> str:
    """Return a visible text in exactly that many columns, at the left or at the right."""
    text = cut(text, columns)
    space = " " * (columns - width(text))
    return space + text if right else text + space


def wrapped(text: str, columns: int) -> Iterator[str]:
    """Yield the lines of a visible text that has words, each in that many columns."""
    line = ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if line and width(longer) > columns:
            yield line
            longer = word
        line = longer
    yield line


def octets(number: int) -> str:
    """Return a number of bytes for people.

    >>> octets(999), octets(1500), octets(12_345_678)
    ('999 B', '1.5 kB', '12.3 MB')
    """
    if number < 1000:
        return f"{number} B"
    amount, units = number / 1000, iter(_UNITS)
    unit = next(units)
    while amount >= 999.95 and unit != _UNITS[-1]:
        amount, unit = amount / 1000, next(units)
    return f"{amount:.1f} {unit}"


def duration(seconds: float) -> str:
    """Return a time for people.

    >>> duration(0.0123), duration(5.25), duration(90), duration(100_000)
    ('12 ms', '5.2 s', '1.5 min', '1.2 d')
    """
    for unit, name in _TIMES:
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s" if seconds >= 0.9995 else f"{seconds * 1000:.0f} ms"


def some(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun.

    >>> some(1, "rule"), some(2000, "rule"), some(0, "query", "queries")
    ('1 rule', '2,000 rules', '0 queries')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
