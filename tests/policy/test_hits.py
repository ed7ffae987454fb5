"""How often each rule has decided, and how that is shown."""

from __future__ import annotations

import pytest

from netns_kit import PRIVATE, Policy, PolicyHits
from tests.support.displays import checked

POLICY = (
    Policy.deny()
    .allow("example.org", "*.example.net", ports=443, name="web")
    .deny(PRIVATE, protocol="udp", refusal="silence")
    .allow("sni.example.org", ports=443, sni=True)
    .ask("203.0.113.0/24")
)


@pytest.fixture(autouse=True)
def _columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_a_policy_is_a_table_of_its_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text, _ = checked(POLICY)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == "Policy 4 rules, then deny".split()
    assert lines[3] == ["1", "allow", "example.org,", "*.example.net", "443", "any", '"web"']
    assert lines[4] == ["2", "deny", "PRIVATE", "all", "udp", "silence"]
    assert lines[5] == ["3", "allow", "sni.example.org", "443", "any", "sni,", "reset"]
    assert lines[6][:2] == ["4", "ask"]
    assert lines[7] == ["default", "deny", "everything", "all", "any", "prohibited,", "nxdomain"]
    assert "audits only" in str(Policy.deny(audit=True))


def test_what_a_policy_is_called_is_text() -> None:
    assert "<script>" in checked(Policy.deny().allow("example.org", name="<script>&\"'"))[0]


def test_hits_are_told_of_each_rule_and_of_the_default() -> None:
    counted = {
        POLICY.label(0): 3,
        POLICY.label(None): 5,
        f"dns {POLICY.label(None)}": 7,
        "another policy's": 9,
    }
    hits = PolicyHits.of(POLICY, counted)
    assert [(each.flows, each.queries) for each in hits.rules] == [(3, 0), (0, 0), (0, 0), (0, 0), (5, 7)]
    assert [each.rule for each in hits.rules] == [*POLICY.rules, POLICY.rule(None)]
    lines = checked(hits)[0].splitlines()
    assert lines[2].split()[-3:] == ["FLOWS", "DNS", "REFUSED"]
    assert lines[3].split()[-2:] == ["3", "0"]
    assert lines[-1].split()[-2:] == ["5", "7"]
