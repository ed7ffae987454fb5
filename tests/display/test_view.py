"""Views as text and as HTML: what is cut, what is aligned, what is escaped, and that HTML needs no script."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.display.displayed import Displayed
from netns_kit.display.style import STYLE, sorting
from netns_kit.display.svg import Drawing
from netns_kit.display.text import cut, padded, visible, width
from netns_kit.display.view import (
    MOST_HTML,
    MOST_TEXT,
    Cell,
    Facts,
    Lines,
    Part,
    Picture,
    Section,
    Table,
    View,
    condition,
    number,
)
from tests.support.displays import HOSTILE, Tags

PARTS: dict[str, Part] = {
    "table": Table(("a", "b"), [(HOSTILE, Cell(HOSTILE))], HOSTILE),
    "facts": Facts([(HOSTILE, HOSTILE), ("b", Cell(HOSTILE))]),
    "lines": Lines([HOSTILE], HOSTILE),
    "section": Section(HOSTILE, [Facts([("a", HOSTILE)])]),
}


def rows(count: int) -> list[tuple[Cell | str, ...]]:
    return [(f"name {n}", number(n * 1000)) for n in range(count)]


@pytest.mark.parametrize("kind", PARTS)
def test_what_is_hostile_is_text(kind: str) -> None:
    view = View("Thing", HOSTILE, Cell(HOSTILE), [PARTS[kind]])
    html, text = view.html(), view.text(100)
    found = Tags(html)
    assert "script" not in {tag for tag, _ in found.seen}
    assert not [name for _, given in found.seen for name in given if name.startswith("on")]
    assert "<script>alert" in found.text, "it is shown as it is"
    for shown in (html, text):
        assert not re.search("[\x1b\u202e\ud800]", shown)
        assert r"\x1b" in shown


@given(st.text())
def test_what_is_printable_is_one_line_of_a_known_width(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable() or not re.search(
        r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", shown
    )
    assert visible(shown) == shown
    for columns in range(12):
        assert width(padded(shown, columns)) == columns
        assert width(cut(shown, columns)) <= columns


def test_wide_characters_have_their_columns() -> None:
    assert (width("日本語"), width("e\u0301")) == (6, 1)
    table = Table(("name", "n"), [("日本語", number(1)), ("e\u0301", number(22)), ("abc", number(333))])
    lines = list(table.text(80))
    assert {width(line) for line in lines} == {width(lines[0])}


def test_a_long_table_is_cut_with_a_count() -> None:
    table = Table(("name", "value"), rows(1000), "Things")
    lines = list(table.text(80))
    assert len(lines) == MOST_TEXT + 3
    assert lines[-1] == f"  … and {1000 - MOST_TEXT:,} more"
    html = "".join(table.html())
    assert html.count("<tr") == MOST_HTML + 1
    assert f"… and {1000 - MOST_HTML:,} more" in html
    short = Table(("name", "value"), rows(2), more=5)
    assert list(short.text(80))[-1] == "  … and 5 more"


def test_many_facts_are_cut_with_a_count() -> None:
    facts = Facts([(f"name {n}", "value") for n in range(1000)])
    lines = list(facts.text(80))
    assert len(lines) == MOST_TEXT + 1
    assert lines[-1] == f"  … and {1000 - MOST_TEXT:,} more"
    html = "".join(facts.html())
    assert html.count("<dt>") == MOST_HTML
    assert f"… and {1000 - MOST_HTML:,} more" in html
    assert "more" not in "".join([*Facts([("a", "b")]).text(80), *Facts([("a", "b")]).html()])


@pytest.mark.parametrize("kind", ["table", "facts", "lines", "section", "picture"])
def test_of_a_long_text_the_beginning_is_shown(kind: str) -> None:
    long = "long" * 100_000
    drawing = Drawing(600, long)
    drawing.text(0, 0, long, 100)
    parts: dict[str, Part] = {
        "table": Table((), [], long),
        "facts": Facts([(long, long)]),
        "lines": Lines([long], long),
        "section": Section(long, []),
        "picture": Picture(drawing.markup(), [long]),
    }
    view = View("Thing", long, Cell(long), [parts[kind], Table(("a", "b"), [(long, Cell(long))])])
    for shown in (view.html(), view.text(100)):
        assert len(shown) < 30_000
        assert "longlong…" in shown


def test_numbers_stand_at_the_right() -> None:
    lines = list(Table(("name", "value"), [("a", number(5)), ("b", number(12345))]).text(80))
    assert lines == ["  NAME   VALUE", "  a          5", "  b     12,345"]
    html = "".join(Table(("name", "value"), rows(3)).html())
    assert html.count('<td class="r">') == 3


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_text_has_the_width_of_the_terminal(columns: int) -> None:
    long = "a word " * 40
    view = View("Thing", long, condition("open"), [
        Table(("one", "two", "three"), [(long, "x", long)], soft=("three",)),
        Facts([("name", long)]),
        Lines([long]),
        Picture("<svg/>", [long]),
        Section(long, [Facts([("name", long)])]),
    ])  # fmt: skip
    assert max(map(width, view.text(columns).splitlines())) <= columns
    assert view.text(1) == view.text(40), "less is no width"


def test_soft_columns_are_cut_first() -> None:
    table = Table(("ends", "name"), [("[2001:db8::1234]:40000", "a" * 20)], soft=("name",))
    assert list(table.text(40))[1] == "  [2001:db8::1234]:40000  aaaaaaaaaaaaa…"


def test_a_table_has_its_rows_in_every_order_without_a_script() -> None:
    given: list[tuple[Cell | str, ...]] = [("b", number(10)), ("C", number(9)), ("a", number(10))]
    html = "".join(Table(("name", "value"), given).html())
    assert re.findall(r'<tr style="--k0:(\d);--k1:(\d)">', html) == [("2", "2"), ("3", "1"), ("1", "2")]
    inputs = [found for tag, found in Tags(html).seen if tag == "input"]
    assert [found["class"] for found in inputs] == ["a", "d", "a", "d"]
    rules = sorting(2)
    assert "th:nth-child(2) .d:checked) tbody tr{order:calc(0 - var(--k1))}" in rules
    assert "nth-child(3)" not in rules
    assert "<input" not in "".join(Table(("name",), [("one",)]).html()), "one row has one order"


def test_each_condition_has_its_tone() -> None:
    tones = [condition(each).tone for each in ("open", "opening", "failed: x: y", "closed", "not open")]
    assert tones == ["good", "warn", "bad", "dim", "dim"]


def test_the_style_sheet_is_for_views_alone_and_paints_no_page() -> None:
    selectors = re.findall(r"([^{}]+)\{", STYLE)
    assert all(each.startswith(".nk.nk.nk") for each in selectors)
    assert "url(" not in STYLE + sorting(9)
    assert set(re.findall(r"background:([^;}]+)", STYLE)) == {"none"}


def test_a_displayed_object_has_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    class Thing(Displayed):
        def _view(self) -> View:
            return View("Thing", "x", None, [Lines(["a" * 300])])

    monkeypatch.setenv("COLUMNS", "50")
    assert max(map(len, str(Thing()).splitlines())) == 50
    assert Thing()._repr_html_().startswith('<div class="nk">')
    shown: list[str] = []
    Thing()._repr_pretty_(SimpleNamespace(text=shown.append), cycle=False)
    assert shown == [str(Thing())], "what IPython writes in a terminal"
    assert "_repr_pretty_" in vars(Thing), "it prefers the __repr__ of a class to what a base has"
    with pytest.raises(NotImplementedError):
        str(Displayed())
