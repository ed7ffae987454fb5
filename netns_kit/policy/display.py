"""How a policy is shown: its rules in order, and how often each has decided."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netns_kit.display.svg import Tone
from netns_kit.display.text import some
from netns_kit.display.view import Cell, Table, View, number

from .rules import Rule, RuleAction, ports_data

if TYPE_CHECKING:
    from .hits import RuleHits
    from .policy import Policy

_TONES: dict[RuleAction, Tone] = {"allow": "good", "deny": "bad", "ask": "warn"}


def policy_view(policy: Policy, hits: tuple[RuleHits, ...] | None = None) -> View:
    """Return the view of a policy, with what it has decided if that is known."""
    headings = ["rule", "action", "targets", "ports", "protocol", "more"]
    if hits is not None:
        headings += ["flows", "DNS refused"]
    rows: list[list[Cell | str]] = []
    for at, rule in enumerate((*policy.rules, policy.rule(None))):
        row: list[Cell | str] = [
            Cell(str(at + 1) if at < len(policy.rules) else "default", at),
            Cell(rule.action, tone=_TONES[rule.action]),
            ", ".join(rule.targets) or "everything",
            ", ".join(map(str, ports_data(rule.ports))) or "all",
            rule.protocol or "any",
            _more(rule),
        ]
        if hits is not None:
            row += [number(hits[at].flows), number(hits[at].queries)]
        rows.append(row)
    told = Cell("audits only", tone="warn") if policy.audit else None
    return View(
        "Policy",
        f"{some(len(policy.rules), 'rule')}, then {policy.default}",
        told,
        [Table(headings, rows, soft=("targets", "more"))],
    )


def _more(rule: Rule) -> str:
    """Return what else a rule says, but for what is usual."""
    looks = [name for name in ("sni", "host", "private") if getattr(rule, name)]
    refusal = "" if rule.action == "allow" and not rule.looks else rule.refusal
    dns = rule.dns if rule.refuses_queries else ""
    parts = (
        f'"{rule.name}"' if rule.name else "",
        *looks,
        f"only {rule.only}" if rule.only else "",
        refusal,
        dns,
    )
    return ", ".join(filter(None, parts))
