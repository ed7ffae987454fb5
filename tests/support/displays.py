"""What is asked of every display: hostile text stays text, and pictures are well-formed."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

HOSTILE = "<script>alert('x')</script>\x1b[2J\u202e&\"\ud800"
"""What a program inside may be called, for all that we know."""
SVG = "{http://www.w3.org/2000/svg}"


class Tags(HTMLParser):
    """The elements of a text, each of which has to be closed; and its text."""

    VOID = frozenset({"input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, "each element ends"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(shown: object) -> tuple[str, str]:
    """The text and the HTML of a displayed object, in which nothing can do anything."""
    text, html = str(shown), shown._repr_html_()  # type: ignore[attr-defined]
    found = Tags(html)
    assert "script" not in {tag for tag, _ in found.seen}
    assert not [name for _, given in found.seen for name in given if name.startswith("on")]
    for each in (text, html):
        assert not re.search("[\x1b\u202e\ud800]", each)
    return text, html


def picture(html: str) -> ElementTree.Element:
    """The picture in the HTML of an object, as XML."""
    return ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])


def texts(html: str) -> list[str]:
    """The lines of text in that picture, with what is only shown to who points at it."""
    return ["".join(each.itertext()) for each in picture(html).iter(f"{SVG}text")]
