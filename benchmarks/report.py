"""What is made of samples: medians, ratios, tables, a plot, a page, JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from .subjects import HOST, NO_MTU, OURS
from .tasks import Better, Figure

BEST = "best"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
TITLES = {
    "bulk": "TCP bulk: what is received",
    "cpu": "CPU seconds of the program per GiB of TCP, in the bulk task",
    "rr": "TCP request and response, 64 bytes each",
    "crr": "Connect, request, response, close: how often per second",
    "udp_rr": "UDP request and response, 64 bytes each",
    "udp_64": "Datagrams of 64 bytes received per second",
    "udp_1400": "Datagrams of 1400 bytes received per second",
    "udp_gso": "UDP with segmentation offload at both ends (UDP_SEGMENT, UDP_GRO): payload received",
    "forward": "Through a forwarded port",
    "memory": "Memory with idle connections held",
    "start": "From nothing to ready",
    "idle": "CPU with idle connections held",
    "heartbeat": "How late a task of the same event loop is, under bulk load",
    "policy": "What it takes to decide about a new flow",
    "calibrate": "The load generator and others, over the host's loopback",
}
PLOTTED = ("bulk", "rr", "crr", "udp_rr", "udp_64", "udp_1400", "udp_gso", "forward")


@dataclass(frozen=True)
class Sample:
    """One value, or why there is none."""

    round: int
    subject: str
    mtu: int
    table: str
    row: str
    unit: str
    better: Better
    value: float | None = None
    error: str | None = None

    @property
    def figure(self) -> Figure:
        return Figure(self.table, self.row, self.unit, self.better)


@dataclass(frozen=True)
class Line:
    """A row of a table: the medians by subject, of those at `mtu` or each at its best, and what failed."""

    figure: Figure
    mtu: str
    medians: dict[str, float]
    errors: dict[str, str]

    def ratio(self, subject: str) -> float | None:
        """How many times as fast, or as small, as the best peer; None where either is missing."""
        peers = [value for name, value in self.medians.items() if is_peer(name)]
        ours = self.medians.get(subject)
        if not peers or ours is None or self.figure.better == "neither":
            return None
        over, under = (ours, max(peers)) if self.figure.better == "more" else (min(peers), ours)
        return over / under if under else math.inf


def is_ours(subject: str) -> bool:
    return subject.startswith(OURS)


def is_peer(subject: str) -> bool:
    return not is_ours(subject) and subject != HOST


def lines(samples: Sequence[Sample]) -> list[Line]:
    """All rows of all tables, in the order in which they were measured.

    What was measured at several MTUs has two: all at the lowest, and each subject at the one that is best for it.
    What has no MTU is in both.
    """
    found = []
    for figure in dict.fromkeys(sample.figure for sample in samples):
        mine = [sample for sample in samples if sample.figure == figure]
        mtus = sorted({sample.mtu for sample in mine} - {NO_MTU})
        if len(mtus) > 1:
            lowest = [sample for sample in mine if sample.mtu in {NO_MTU, mtus[0]}]
            found += [_line(figure, str(mtus[0]), lowest), _line(figure, BEST, mine)]
        else:
            found.append(_line(figure, str(mtus[0]) if mtus else "-", mine))
    order = list(TITLES)
    return sorted(found, key=lambda each: order.index(each.figure.table))


def _line(figure: Figure, mtu: str, samples: Iterable[Sample]) -> Line:
    values: dict[str, dict[int, list[float]]] = {}
    errors: dict[str, str] = {}
    for sample in samples:
        if sample.value is not None:
            values.setdefault(sample.subject, {}).setdefault(sample.mtu, []).append(sample.value)
        elif sample.error is not None:
            errors.setdefault(
                sample.subject, f"MTU {sample.mtu}: {sample.error}" if sample.mtu else sample.error
            )
    best = min if figure.better == "less" else max
    medians = {subject: best(map(median, by_mtu.values())) for subject, by_mtu in values.items()}
    return Line(figure, mtu, medians, errors)


# Tables


def tables(samples: Sequence[Sample]) -> str:
    """A table for each kind of figure, under its title, and footnotes for what failed."""
    subjects = sorted(
        dict.fromkeys(sample.subject for sample in samples),
        key=lambda name: (not is_ours(name), name == HOST),
    )
    found: dict[str, list[Line]] = {}
    for each in lines(samples):
        found.setdefault(each.figure.table, []).append(each)
    return "\n\n".join(f"### {TITLES[name]}\n\n{_table(rows, subjects)}" for name, rows in found.items())


def _table(rows: Sequence[Line], subjects: Sequence[str]) -> str:
    here = [each for each in subjects if any(each in row.medians or each in row.errors for row in rows)]
    notes: list[str] = []
    text = ["| | MTU | " + " | ".join(here) + " |", "|---" * (len(here) + 2) + "|"]
    for row in rows:
        cells = [_cell(row, subject, notes) for subject in here]
        text.append(f"| {row.figure.row}, {row.figure.unit} | {row.mtu} | " + " | ".join(cells) + " |")
    if notes:
        text += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(text)


def _cell(row: Line, subject: str, notes: list[str]) -> str:
    value = row.medians.get(subject)
    text = "-" if value is None else number(value)
    ratio = row.ratio(subject) if is_ours(subject) else None
    if ratio is not None:
        text += f" (**{ratio:.2f}**)"
    if subject in row.errors:
        note = f"{subject}, {row.errors[subject]}"
        if note not in notes:
            notes.append(note)
        text += f" [{notes.index(note) + 1}]"
    return text


def number(value: float) -> str:
    """Three digits, and no more zeros than that needs."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits)}f}"


# The plot

_STYLE = """
text { font: 11px sans-serif; fill: #333; } line { stroke: #ccc; } .one { stroke: #333; }
.s0 { fill: #0b6bcb; } .s1 { fill: #d9480f; } .s2 { fill: #2b8a3e; } .s3 { fill: #9c36b5; }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd; } line { stroke: #444; } .one { stroke: #ddd; }
  .s0 { fill: #4dabf7; } .s1 { fill: #ff922b; } .s2 { fill: #69db7c; } .s3 { fill: #da77f2; }
}
"""
_LEFT, _WIDTH, _ROW, _TOP = 190, 480, 17, 44


def plot(samples: Sequence[Sample]) -> str:
    """Ours as a multiple of the best peer, a row for each figure, each side at its best MTU: an SVG."""
    rows = [row for row in lines(samples) if row.figure.table in PLOTTED and row.mtu in {BEST, "-"}]
    rows = rows or [row for row in lines(samples) if row.figure.table in PLOTTED]
    subjects = list(dict.fromkeys(name for row in rows for name in row.medians if is_ours(name)))
    points = [
        (index, name, ratio)
        for index, row in enumerate(rows)
        for name in subjects
        if (ratio := row.ratio(name)) is not None
    ]
    low = min([-2, *(math.floor(math.log2(ratio)) for _, _, ratio in points)])
    high = max([2, *(math.ceil(math.log2(ratio)) for _, _, ratio in points)])
    low, high = max(low, -5), min(high, 6)

    def across(ratio: float) -> float:
        power = min(max(math.log2(ratio), low), high)
        return _LEFT + (power - low) / (high - low) * _WIDTH

    bottom = _TOP + len(rows) * _ROW
    shapes = []
    for power in range(low, high + 1):
        x = across(2.0**power)
        kind = ' class="one"' if power == 0 else ""
        shapes.append(f'<line{kind} x1="{x:.0f}" y1="{_TOP - 6}" x2="{x:.0f}" y2="{bottom}"/>')
        label = str(2**power) if power >= 0 else f"1/{2**-power}"
        shapes.append(f'<text x="{x:.0f}" y="{_TOP - 10}" text-anchor="middle">{label}</text>')
    for index, row in enumerate(rows):
        y = _TOP + index * _ROW + 11
        label = escape(f"{row.figure.table}: {row.figure.row}")
        shapes.append(f'<text x="{_LEFT - 10}" y="{y}" text-anchor="end">{label}</text>')
    for index, name, ratio in points:
        y = _TOP + index * _ROW + 7
        which = subjects.index(name)
        title = f"<title>{escape(name)}: {ratio:.2f}</title>"
        shapes.append(
            f'<circle class="s{which % 4}" cx="{across(ratio):.1f}" cy="{y}" r="4">{title}</circle>'
        )
    for index, name in enumerate(subjects):
        x = _LEFT + index * _WIDTH / len(subjects)
        shapes.append(f'<circle class="s{index % 4}" cx="{x + 4:.0f}" cy="10" r="4"/>')
        shapes.append(f'<text x="{x + 12:.0f}" y="14">{escape(name)}</text>')
    width, height = _LEFT + _WIDTH + 20, bottom + 8
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    )
    return "\n".join([head, f"<style>{_STYLE}</style>", *shapes, "</svg>", ""])


# Keeping


def machine() -> dict[str, str]:
    """What the figures depend on."""
    models = re.findall(
        r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
    )
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "cpu": models[0] if models else platform.machine(),
        "kernel": platform.release().partition("-")[0],
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def as_json(samples: Sequence[Sample], facts: Mapping[str, object]) -> str:
    """Everything: `facts`, all samples, and what was made of them."""
    medians = [
        {
            "table": row.figure.table,
            "row": row.figure.row,
            "unit": row.figure.unit,
            "mtu": row.mtu,
            "medians": row.medians,
            "ratios": {name: row.ratio(name) for name in row.medians if is_ours(name)},
        }
        for row in lines(samples)
    ]
    whole = {**facts, "samples": [asdict(sample) for sample in samples], "lines": medians}
    return json.dumps(whole, indent=1) + "\n"


def from_json(text: str) -> tuple[list[Sample], dict[str, Any]]:
    """The samples and the facts of `as_json`."""
    whole = json.loads(text)
    del whole["lines"]
    return [Sample(**each) for each in whole.pop("samples")], whole


def write_page(page: Path, samples: Sequence[Sample], facts: Mapping[str, Any]) -> None:
    """Put plot and tables into `page` between its marks, the plot in a file of its own beside it."""
    picture = page.with_suffix(".svg")
    picture.write_text(plot(samples), encoding="utf-8")
    about = facts["machine"]
    versions = "; ".join(facts["versions"].values())
    text = f"""![Ours as a multiple of the best peer; to the right of 1 we are faster]({picture.name})

Medians, rounds: {facts["rounds"]}, of {facts["seconds"]:g} s each. {about["cores"]} cores ({about["cpu"]}),
Linux {about["kernel"]}, {about["python"]}; load before the run {about["load"]}.
Beside us: {versions}.

{tables(samples)}"""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
