"""How a network and its members are shown: what is joined to what, as a picture and as a tree of lines.

      way out                   the uplink, and the policy before it
         |
      gateway                   the stack: its addresses
 +-------+------+------+        the bridge, if there are members
hub     web     db    ...       four in a row, each with addresses and published ports
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from netns_kit.display.svg import Drawing, Tone
from netns_kit.display.text import some
from netns_kit.display.view import Cell, Facts, Picture, View, condition
from netns_kit.forwarder.display import published
from netns_kit.userstack.display import policy_of, way_out

if TYPE_CHECKING:
    from netns_kit.forwarder.forwarder import Forwarder

    from .members import Member
    from .network import Network

MOST_BOXES, MOST_PORTS = 24, 5
WIDTH, PER_ROW = 960, 4
_LINE, _MARGIN, _GAP = 16, 12, 16  # heights and widths in the picture
_TRUNK = 8  # where the line runs that joins the rows


class _Line(NamedTuple):
    """A line of text in a box."""

    text: str
    tone: Tone = ""


class _Place(NamedTuple):
    """A namespace of the network: its lines, the first of which is its name."""

    kind: str
    lines: Sequence[_Line]
    tone: Tone
    is_dashed: bool


def network_view(network: Network) -> View:
    """Return the view of a network."""
    stack = network.stack
    facts: list[tuple[str, Cell | str]] = [
        ("way out", "none: the network is internal" if network.is_internal else way_out(stack.uplink)),
        ("policy", policy_of(stack.policy)),
        ("interface", f"{network.tap.name}, MTU {network.tap.mtu:,}"),
        ("driver", stack.setup.driver),
    ]
    if routes := network._members.routes:
        facts.append(("routes to", ", ".join(str(far.stack.subnet) for far in routes)))
    places = [_own_place(network), *map(_place_of, network.members.values())]
    left_out = len(places) - MOST_BOXES
    places = places[:MOST_BOXES]
    more = f"… and {left_out:,} more members" if left_out > 0 else ""
    picture = Picture(_drawn(network, places, more), [*_tree(network, places), *([more] if more else [])])
    return View(
        "Network", str(network.subnet), condition(network.supervisor.condition), [picture, Facts(facts)]
    )


def member_view(member: Member) -> View:
    """Return the view of a member."""
    facts: list[tuple[str, Cell | str]] = [
        ("also called", ", ".join(member.aliases) or "nothing else"),
        ("addresses", ", ".join(map(str, member.known_addresses)) or "none yet"),
        ("interface", member.ifname),
        ("policy", "the network's" if member.policy is None else policy_of(member.policy)),
        ("namespace", f"{member.namespace!r}{', the caller’s' * member.is_attached}"),
        ("more", "flows(), policy_hits(), namespace.snapshot()"),
    ]
    ports = published(member.forwarder.known[0])
    return View("Member", member.name, condition(member.supervisor.condition), [Facts(facts), ports])


def _own_place(network: Network) -> _Place:
    """Return the network's own namespace, which is the hub of the members."""
    subnet, ports = network.subnet, _ports(network.forwarder)
    has_members = bool(network.members)
    name = "hub" if has_members else "namespace"
    lines = [_Line(name), *(_Line(str(each.guest)) for each in subnet.families), *ports]
    return _Place("hub", lines, "", has_members)


def _place_of(member: Member) -> _Place:
    lines = [_Line(member.name)]
    if member.aliases:
        lines.append(_Line(f"= {', '.join(member.aliases)}", "dim"))
    lines += (_Line(str(each)) for each in member.known_addresses)
    told = member.supervisor.condition
    if told != "open":
        lines.append(_Line(told, "bad" if told.startswith("failed") else "warn"))
    if member.policy is not None:
        lines.append(_Line(f"policy: {policy_of(member.policy)}", "dim"))
    lines += _ports(member.forwarder)
    return _Place("member", lines, "" if told == "open" else "warn", member.is_attached)


def _ports(forwarder: Forwarder) -> list[_Line]:
    """Return the ports that lead in and out, as lines of a box."""
    forwards, follows, reverses = forwarder.known
    lines = [_Line(f"⇠ {each.listens_on} → {each.leads_to}/{each.protocol}", "good") for each in forwards]
    lines += (_Line(f"⇠ {each}", "good") for each in follows)
    lines += (_Line(f"⇢ {each}", "good") for each in reverses)
    if len(lines) > MOST_PORTS:
        lines[MOST_PORTS - 1 :] = [_Line(f"… {len(lines) - MOST_PORTS + 1} more ports", "dim")]
    return lines


def _gateway(network: Network) -> list[_Line]:
    subnet, stack = network.subnet, network.stack
    gateways = ", ".join(str(each.gateway) for each in subnet.families)
    lines = [_Line("gateway"), _Line(gateways), _Line(f"DNS {', '.join(map(str, subnet.resolvers))}")]
    if stack.policy is not None:
        lines.append(_Line(f"policy: {policy_of(stack.policy)}", "warn"))
    return lines


def _outside(network: Network) -> list[_Line]:
    if network.is_internal:
        return [_Line("no way out", "bad"), _Line("internal network", "dim")]
    return [_Line("way out"), _Line(way_out(network.stack.uplink))]


# -- as lines ----------------------------------------------------------------------------------------------


def _tree(network: Network, places: Sequence[_Place]) -> list[str]:
    lines = ["  ".join(line.text for line in _outside(network))]
    lines.append(f"└─ {'  '.join(line.text for line in _gateway(network))}")
    if network.is_isolated:
        lines.append("   │  members do not reach each other")
    for at, place in enumerate(places):
        branch, below = ("└─", "  ") if at == len(places) - 1 else ("├─", "│ ")
        ports = [line.text for line in place.lines if line.text[0] in "⇠⇢…"]
        others = [line.text for line in place.lines if line.text[0] not in "⇠⇢…"]
        lines.append(f"   {branch} {'  '.join(others)}")
        lines += (f"   {below}    {text}" for text in ports)
    return lines


# -- as a picture ------------------------------------------------------------------------------------------


def _drawn(network: Network, places: Sequence[_Place], more: str) -> str:
    per_row = min(PER_ROW, len(places))
    width = WIDTH if per_row > 2 else 560
    drawing = Drawing(width, f"the network {network.subnet} with {some(len(places), 'namespace')}")
    middle = width / 2
    top = _box(
        drawing, "outside", _outside(network), (width - 400) / 2, 1, 400, is_dashed=network.is_internal
    )
    drawing.line(
        middle, top, middle, top + 24, "bad" if network.is_internal else "", dashed=network.is_internal
    )
    y = _box(drawing, "gateway", _gateway(network), (width - 400) / 2, top + 24, 400)
    bus = before = y + 20
    drawing.line(middle, y, middle, bus)
    if network.is_isolated:
        drawing.text(middle + 8, y + 14, "members do not reach each other", width, "warn")
    rows = [places[at : at + per_row] for at in range(0, len(places), per_row)]
    side = 2 * _TRUNK if len(rows) > 1 else 2
    box = min((width - 2 * side - _GAP * (per_row - 1)) / per_row, 400)
    for at, row in enumerate(rows):
        lefts = [side + n * (box + _GAP) for n in range(len(row))] if len(places) > 1 else [middle - box / 2]
        ends = [left + box / 2 for left in lefts] + [_TRUNK] * (len(rows) > 1) + [middle] * (not at)
        drawing.line(min(ends), bus, max(ends), bus)
        if at:
            drawing.line(_TRUNK, before, _TRUNK, bus)
        most = max(len(place.lines) for place in row)
        for place, left in zip(row, lefts, strict=True):
            drawing.line(left + box / 2, bus, left + box / 2, bus + 14)
            y = _box(
                drawing,
                place.kind,
                place.lines,
                left,
                bus + 14,
                box,
                most,
                place.tone,
                is_dashed=place.is_dashed,
            )
        before, bus = bus, y + 16
    if more:
        drawing.text(middle, y + 22, more, width, "dim", anchor="middle")
    return drawing.markup()


def _height(lines: int) -> int:
    return lines * _LINE + _MARGIN


def _box(
    drawing: Drawing,
    kind: str,
    lines: Sequence[_Line],
    x: float,
    y: float,
    width: float,
    least: int = 0,
    tone: Tone = "",
    *,
    is_dashed: bool = False,
) -> float:
    """Draw a box with lines in it, and return where it ends."""
    height = _height(max(len(lines), least))
    drawing.box(x, y, width, height, kind, tone, dashed=is_dashed)
    for number, line in enumerate(lines):
        drawing.text(
            x + width / 2,
            y + 17 + number * _LINE,
            line.text,
            width - 8,
            line.tone,
            anchor="middle",
            bold=not number,
        )
    return y + height
