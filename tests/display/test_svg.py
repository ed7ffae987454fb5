"""Pictures: well-formed, with all of their parts, readable on any page, and no text beyond its room."""

from __future__ import annotations

from xml.etree import ElementTree

from netns_kit.display.svg import CHARACTER, Drawing
from netns_kit.display.text import width
from tests.support.displays import HOSTILE, SVG


def test_what_is_drawn_is_in_the_picture() -> None:
    drawing = Drawing(300, HOSTILE)
    drawing.box(1, 2, 100, 40, 'a"b', "good", dashed=True)
    drawing.line(0, 0, 50, 60, "bad", arrow=True)
    drawing.text(10, 20, HOSTILE, 80)
    drawing.text(10, 90, "日本語", 200, bold=True)
    root = ElementTree.fromstring(drawing.markup())
    assert [each.tag.removeprefix(SVG) for each in root] == ["rect", "line", "polygon", "text", "text"]
    assert root.attrib["viewBox"] == "0 0 300 95", "as high as what is drawn"
    rect, line, _, cut, whole = root
    assert (rect.attrib["class"], rect.attrib["stroke-dasharray"]) == ('a"b', "4 3")
    assert line.attrib["stroke"] == "#d64545"
    assert width(cut.text or "") * CHARACTER <= 80
    assert "<script>" in (cut[0].text or ""), "all of it is in its title"
    assert (whole.text, whole.attrib["fill"], len(whole)) == ("日本語", "currentColor", 0)


def test_no_colour_is_of_one_theme() -> None:
    drawing = Drawing(10, "")
    drawing.box(0, 0, 5, 5, "x")
    drawing.text(0, 0, "x", 50, "dim")
    assert set(drawing.markup().split('fill="')[1].split('"')[0].split()) == {"currentColor"}
    assert "white" not in drawing.markup()
    assert "black" not in drawing.markup()
