"""How a stack is shown, its flows, counters and events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from netns_kit.display.svg import Tone
from netns_kit.display.text import duration, octets, some
from netns_kit.display.view import MOST_HTML, Cell, Facts, Table, View, condition, count, number
from netns_kit.dns import Rcode
from netns_kit.stack import Refusal

from .events import Event, FlowEvent

if TYPE_CHECKING:
    from netns_kit.policy.policy import Policy
    from netns_kit.uplink.uplink import Uplink

    from .answers import Counted, Flows
    from .capture import Capture
    from .fake_internet import FakeHost, FakeInternet
    from .userstack import UserStack

_ENDING = ("TIME-WAIT", "CLOSING", "LAST-ACK", "CLOSE-WAIT", "FIN-WAIT-1", "FIN-WAIT-2", "CLOSED")
_LOSSES = ("dropped", "refused", "lost", "evicted", "malformed", "gave_up", "timeouts")


def stack_view(stack: UserStack) -> View:
    """Return the view of a stack."""
    setup, subnet = stack.setup, stack.subnet
    facts: list[tuple[str, Cell | str]] = [
        ("device", f"{stack.tap.name}, MTU {stack.tap.mtu:,}"),
        ("gateway", ", ".join(str(each.gateway) for each in subnet.families)),
        ("DNS", ", ".join(map(str, subnet.resolvers))),
        ("guest", ", ".join(str(each.guest) for each in subnet.families)),
        ("driver", setup.driver),
        ("way out", way_out(stack.uplink)),
        ("policy", policy_of(stack.policy)),
    ]
    if stack.sandbox:
        off = [f"{name}: {why}" for name, why in stack.sandbox.items() if why != "on"]
        facts.append(("sandbox", Cell("; ".join(off), tone="warn") if off else "on"))
    facts.append(("more", "flows(), stats(), policy_hits(), records(), leases()"))
    return View("UserStack", f"{subnet}", condition(stack.supervisor.condition), [Facts(facts)])


def way_out(uplink: Uplink) -> str:
    """Return what an uplink is, in a few words."""
    kind = type(uplink).__name__
    return "sockets of the host" if kind == "Uplink" else repr(uplink)


def policy_of(policy: Policy | None) -> str:
    """Return what a policy is, in a few words."""
    if policy is None:
        return "none"
    return f"{some(len(policy.rules), 'rule')}, then {policy.default}{', audits only' * policy.audit}"


def flows_view(flows: Flows) -> View:
    """Return the view of flows."""
    has_members = any(flow.guest.address in flows.names for flow in flows)
    has_rules = any(flow.rule for flow in flows)
    headings = ["id", "proto", "guest", "", "remote", "name", "state", "out", "in", "age"]
    headings[2:2] = ["member"] * has_members
    headings += ["rule"] * has_rules
    rows = []
    for flow in flows[:MOST_HTML]:
        row: list[Cell | str] = [
            number(flow.id, str(flow.id)),
            flow.protocol,
            str(flow.guest),
            "→" if flow.direction == "outbound" else "←",
            str(flow.remote),
            flow.name or "",
            Cell(flow.state, tone=_tone(flow.state)),
            number(flow.bytes_from_guest, octets(flow.bytes_from_guest)),
            number(flow.bytes_to_guest, octets(flow.bytes_to_guest)),
            number(flow.age, duration(flow.age)),
        ]
        row[2:2] = [flows.names.get(flow.guest.address, "")] * has_members
        row += [flow.rule or ""] * has_rules
        rows.append(row)
    table = Table(headings, rows, more=len(flows) - len(rows), soft=("name", "rule"))
    return View("Flows", "", count(len(flows), "flow"), [table] if rows else ())


def _tone(state: str) -> Tone:
    if state in ("ESTABLISHED", "open", "established"):
        return "good"
    return "dim" if state in _ENDING else "warn"


def internet_view(internet: FakeInternet) -> View:
    """Return the view of an internet: its hosts, and how much has come to it."""
    hosts = tuple(dict.fromkeys(internet._names.by_address.values()))
    rows: list[list[Cell | str]] = [
        [
            ", ".join(host.names),
            ", ".join(map(str, host.addresses)),
            ", ".join(_services(host)) or "nothing",
            Cell("up", tone="good") if host._down is None else Cell(f"down: {host._down.name}", tone="bad"),
        ]
        for host in hosts[:MOST_HTML]
    ]
    flows, queries = tuple(internet.flows), tuple(internet.queries)
    refused = sum(each.refused is not None for each in flows)
    failed = sum(each.rcode is not Rcode.NOERROR for each in queries)
    facts = Facts([
        ("flows", f"{len(flows):,}, {refused:,} of them refused"),
        ("queries", f"{len(queries):,}, {failed:,} of them without an answer"),
    ])  # fmt: skip
    table = Table(
        ("names", "addresses", "serves", "state"), rows, more=len(hosts) - len(rows), soft=("serves",)
    )
    return View("FakeInternet", "", count(len(hosts), "host"), [table, facts])


def _services(host: FakeHost) -> Iterator[str]:
    for (transport, port), found in host._services.items():
        refused = f" {found.name}" if isinstance(found, Refusal) else ""
        yield f"{transport} {port or 'any'}{refused}"


def stats_view(stats: Counted) -> View:
    """Return the view of counters: those that are not 0, and what has changed."""
    before = stats.before
    rows = []
    for name, value in stats.items():
        change = 0 if before is None else value - before[name]
        if value or change:
            tone: Tone = "warn" if any(each in name for each in _LOSSES) else ""
            row: list[Cell | str] = [Cell(name, tone=tone), number(value)]
            if before is not None:
                row.append(Cell(f"{change:+,}" if change else "", change, tone or "good"))
            rows.append(row)
    headings = ["counter", "value", *([] if before is None else [f"in {duration(stats.seconds)}"])]
    zeros = Facts([("others", f"{len(stats) - len(rows)} are 0")])
    return View("Stats", "", None, [Table(headings, rows), zeros])


def events_view(events: Iterable[Event]) -> View:
    """Return the view of what has happened to flows, and of what was refused."""
    headings = ["time", "event", "proto", "guest", "remote", "name", "how", "out", "in", "rule", "process"]
    rows: list[list[Cell | str]] = []
    began: float | None = None
    for each in events:
        began = each.time if began is None else began
        tone: Tone = "bad" if each.kind == "refused" else ""
        row: list[Cell | str] = [number(each.time, f"{each.time - began:+.3f} s"), Cell(each.kind, tone=tone)]
        if isinstance(each, FlowEvent):
            flow, who = each.flow, each.process
            how = each.ended or ("" if each.refusal is None else each.refusal.name.lower().replace("_", " "))
            row += [flow.protocol, str(flow.guest), str(flow.remote), flow.name or "", how or flow.state]
            row += [number(size, octets(size)) for size in (flow.bytes_from_guest, flow.bytes_to_guest)]
            row += [each.rule or "", "" if who is None else f"{who.name} ({who.inner_pid})"]
        else:
            row += [
                f"dns {each.type}",
                str(each.client),
                "",
                each.name,
                each.rcode,
                "",
                "",
                each.rule or "",
                "",
            ]
        rows.append(row)
    used = [n for n in range(len(headings)) if n < len(headings) - 2 or any(row[n] for row in rows)]
    table = Table(
        [headings[n] for n in used],
        [[row[n] for n in used] for row in rows],
        soft=("name", "rule", "process"),
    )
    return View("Events", "", count(len(rows), "event"), [table] if rows else ())


def capture_view(capture: Capture) -> View:
    """Return the view of a capture: what is known of it without reading it."""
    facts: list[tuple[str, Cell | str]] = [
        ("frames", f"{capture.frames:,}"),
        ("lost", Cell(f"{capture.lost:,}", tone="warn" if capture.lost else "")),
        ("bytes", octets(capture.size if capture.condition != "not open" else 0)),
        ("file", ", ".join(capture.paths) or "memory"),
        ("more", "packets() for what is in it"),
    ]
    return View("Capture", "", condition(capture.condition), [Facts(facts)])
