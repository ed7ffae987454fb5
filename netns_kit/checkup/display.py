"""How the doctor's report is shown in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netns_kit.display.svg import Tone
from netns_kit.display.view import Cell, Facts, Section, Table, View

if TYPE_CHECKING:
    from .checkup import Report

_TONES: dict[str, Tone] = {"ok": "good", "limited": "warn", "missing": "bad", "untried": "dim"}


def report_view(report: Report) -> View:
    """Return the view of a report: all findings, and what there is to say of those that are not right."""
    rows = [(Cell(each.status, tone=_TONES[each.status]), each.name, each.detail) for each in report]
    wrong = [
        Section(f"{each.name}: {each.status}", [Facts(each.particulars())], is_open=True)
        for each in report
        if each.particulars()
    ]
    told = Cell(report.verdict, tone="good" if report.ok else "bad")
    return View("Doctor", report.title, told, [Table(("status", "what", "outcome"), rows), *wrong])
