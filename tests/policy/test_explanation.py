"""Explanations: which rule decides about what people ask for, and why."""

from __future__ import annotations

import pickle

import pytest

from netns_kit import ArgumentError, ArgumentTypeError, Explanation, Policy

POLICY = (
    Policy.deny(dns="refused")
    .deny("PRIVATE")
    .allow("example.org", "*.cdn.example.net", ports=443, name="web")
    .allow("api.example", sni=True)
    .allow("192.0.2.0/24", ports=5432, protocol="tcp")
    .allow("HOST", ports=631)
    .allow("198.51.100.1", protocol="icmp")
    .deny("bad.example")
    .ask("shop.example")
    .allow("names.example", only="dns")
)


@pytest.mark.parametrize(
    ("text", "action", "rule", "said"),
    [
        (
            "https://example.org",
            "allow",
            1,
            "TCP to example.org port 443 is allowed by rule 2 (web): allow ",
        ),
        (
            "https://example.org/path?x=1",
            "allow",
            1,
            "unless its address is one of rule 1: deny PRIVATE, which ",
        ),
        ("https://user:word@EXAMPLE.org:443", "allow", 1, "rule 2 (web)"),
        ("wss://a.cdn.example.net", "allow", 1, "rule 2 (web)"),
        ("example.org:443", "allow", 1, "rule 2 (web)"),
        (
            "http://example.org",
            "deny",
            None,
            "by default: for other ports or protocols there is rule 2 (web)",
        ),
        ("udp://example.org:443", "allow", 1, "UDP to example.org port 443"),
        (
            "https://cdn.example.net",
            "deny",
            None,
            "cannot be had, since queries for cdn.example.net are refused",
        ),
        ("https://api.example", "allow", 2, "if its first bytes say that name"),
        ("quic://api.example:443", "deny", 2, "only TCP has these"),
        ("ssh://bad.example", "deny", 6, "refused (NXDOMAIN) by rule 7: deny bad.example"),
        ("tcp://192.0.2.7:5432", "allow", 3, "TCP to 192.0.2.7 port 5432 is allowed by rule 4"),
        ("postgresql://192.0.2.7/db", "allow", 3, "port 5432"),
        ("redis://192.0.2.7", "deny", None, "port 6379 is refused by default: no rule is about it"),
        ("udp://192.0.2.7:5432", "deny", None, "no rule is about it"),
        ("tcp://10.0.0.1:80", "deny", 0, "by rule 1: deny PRIVATE"),
        ("tcp://[64:ff9b::a00:1]:80", "deny", 0, "which is 10.0.0.1"),
        ("tcp://[2001:db8::1]:631", "deny", None, "unless its address is one of rule 5: allow HOST port 631"),
        ("icmp://198.51.100.1", "allow", 5, "ICMP to 198.51.100.1 is allowed by rule 6"),
        ("https://shop.example", "ask", 7, "is asked about by rule 8"),
        ("https://names.example", "deny", None, "no rule is about it"),
        ("dns:example.org", "allow", 1, "queries for example.org are answered because of rule 2 (web)"),
        ("example.org", "allow", 1, "queries for example.org"),
        ("dns://names.example", "allow", 8, "queries for names.example"),
        (
            "b\u00fccher.example",
            "deny",
            None,
            "xn--bcher-kva.example are refused (REFUSED) by the default",
        ),
    ],
)
def test_what_is_explained(text: str, action: str, rule: int | None, said: str) -> None:
    found = POLICY.explain(text)
    assert (found.action, found.rule, found.label) == (action, rule, POLICY.label(rule))
    assert said in found.why
    assert str(found) == f"{action}: {found.why}"
    assert found.allowed is (action == "allow")


def test_what_is_only_audited_is_said() -> None:
    found = Policy.deny(audit=True).explain("https://example.org")
    assert found.action == "deny"
    assert found.why.endswith("; since the policy only audits, it is let pass and told")
    assert "audits" not in Policy.allow(audit=True).explain("https://example.org").why


def test_where_nothing_is_sent_is_said() -> None:
    for policy in (Policy.allow(), Policy.allow(audit=True), Policy.deny(audit=True)):
        for host in ("224.0.0.251", "[ff02::fb]", "240.0.0.1", "[fe80::1]", "[::192.0.2.1]"):
            found = policy.explain(f"http://{host}")
            assert found.action == "deny"
            assert found.why.endswith("nothing is ever sent there")
    assert "nothing is ever" not in Policy.allow().explain("http://192.0.2.1").why


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]", "localhost", "db.LOCALHOST."]
)
@pytest.mark.parametrize("policy", [Policy.allow(), Policy.deny(), Policy.deny(audit=True)])
def test_the_loopback_of_the_namespace_is_its_own(policy: Policy, host: str) -> None:
    found = policy.explain(f"http://{host}:80")
    assert found.action == "deny"
    assert found.why.endswith(" stays inside: it is the namespace's own loopback")


def test_an_address_may_be_that_of_a_name() -> None:
    found = POLICY.explain("https://192.0.2.7")
    assert found.action == "deny"
    assert "unless our DNS has given it for a name of rule 2 (web): allow example.org" in found.why
    assert "our DNS" not in Policy.deny().allow("example.org", ports=443).explain("smtp://192.0.2.7").why


def test_an_explanation_is_a_record() -> None:
    found = POLICY.explain("example.org")
    assert found == Explanation("allow", 1, POLICY.label(1), found.why)
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10.0.0.1", 'write "tcp://10.0.0.1:PORT"'),
        ("2001:db8::1", 'write "tcp://[2001:db8::1]:PORT"'),
        ("tcp://example.org", 'write "tcp://example.org:PORT"'),
        ("gopher://example.org", 'write "tcp://example.org:PORT"'),
        ("https://example.org:70000", "up to 65535"),
        ("https://", "such as"),
        ("", "such as"),
        ("exa mple.org", "such as"),
        ("a..b", "such as"),
        ("*.example.org", "such as"),
        ("dns:", "such as"),
        ("http://0x7f000001/", "four numbers"),
        ("http://2130706433/", "four numbers"),
        ("10.1:80", "four numbers"),
    ],
)
def test_what_cannot_be_explained(text: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=r"^text=.*: expected ") as caught:
        POLICY.explain(text)
    assert said in str(caught.value)


def test_what_is_no_text() -> None:
    with pytest.raises(ArgumentTypeError):
        POLICY.explain(443)  # type: ignore[arg-type]  # that is what is tried
