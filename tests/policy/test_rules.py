"""Rules: what people may write, in which form it is kept, and what they are told."""

from __future__ import annotations

import pickle
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, ip_address
from typing import Any

import pytest

from netns_kit import LOOPBACK, METADATA, MULTICAST, PRIVATE, ArgumentError, PolicyError, Preset, Rule
from netns_kit.child import codec
from netns_kit.policy.presets import PRESETS


def rule(*targets: Any, **options: Any) -> Rule:
    return Rule(options.pop("action", "allow"), targets, **options)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("example.org", "example.org"),
        ("Example.ORG.", "example.org"),
        ("*.Example.org.", "*.example.org"),
        ("b\u00fccher.example", "xn--bcher-kva.example"),
        ("B\u00dcCHER.example", "xn--bcher-kva.example"),
        ("_sip.example.org", "_sip.example.org"),
        ("db", "db"),
        ("*.org", "*.org"),
        ("10.0.0.1", "10.0.0.1"),
        ("10.0.0.1/32", "10.0.0.1"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("2001:DB8::/32", "2001:db8::/32"),
        ("2001:db8:0::1", "2001:db8::1"),
        ("::/0", "::/0"),
        (IPv4Address("10.0.0.1"), "10.0.0.1"),
        (IPv6Address("2001:db8::1"), "2001:db8::1"),
        (IPv4Interface("10.0.0.1/8"), "10.0.0.1"),
        (IPv4Network("10.0.0.0/8"), "10.0.0.0/8"),
        (PRIVATE, "PRIVATE"),
        ("DNS_ELSEWHERE", "DNS_ELSEWHERE"),
    ],
)
def test_a_target_has_one_form(given: object, kept: str) -> None:
    assert rule(given).targets == (kept,)
    assert rule(kept) == rule(given) == rule(given, kept)


WRONG_TARGETS = [
    ("*", "Policy.allow()"),
    ("", "leave out the targets"),
    ("*.*.example.org", 'write "*.example.org"'),
    ("www.*.example.org", 'write "*.example.org"'),
    ("*example.org", 'write "*.example.org"'),
    ("example.*", "before the first dot"),
    (".example.org", 'write "*.example.org" for the names below it, "example.org" for the name itself'),
    ("example..org", "domain name"),
    ("-a.example.org", "letters, digits and hyphens"),
    ("exa mple.org", "domain name"),
    ("user@example.org", "domain name"),
    ("fa\u00df.example", "xn--"),
    ("example.org:443", 'write "example.org" and ports=443'),
    ("example.org:https", 'write "example.org" and ports=443'),
    ("example.org:*", 'write "example.org"'),
    ("10.0.0.1:8000-8999", 'write "10.0.0.1" and ports="8000-8999"'),
    ("[2001:db8::1]:443", 'write "2001:db8::1" and ports=443'),
    ("[2001:db8::1]", 'write "2001:db8::1"'),
    ("https://example.org/x", 'write "example.org" and ports=443'),
    ("https://user@Example.org:8443/x", 'write "example.org" and ports=8443'),
    ("tcp://[2001:db8::1]:5432", 'write "2001:db8::1" and ports=5432'),
    ("example.org/x", "a URL is no target"),
    ("10.0.0.1/8", 'write "10.0.0.0/8", or "10.0.0.1" for the one address'),
    ("2001:db8::1/32", 'write "2001:db8::/32"'),
    ("10.0.0.0/33", "ADDRESS/BITS"),
    ("10.0.0.1-10.0.0.9", '"10.0.0.1", "10.0.0.2/31", "10.0.0.4/30", "10.0.0.8/31"'),
    ("2001:db8::-2001:db8::ffff", 'write "2001:db8::/112"'),
    ("10.0.0.*", 'write "10.0.0.0/24"'),
    ("10.*.*.*", 'write "10.0.0.0/8"'),
    ("10.0.0", "four numbers"),
    ("1", "four numbers"),
    ("0x7f000001", "four numbers"),
    ("010.0.0.1", "four numbers"),
    ("private", 'write "PRIVATE" for the preset'),
    ("PRIVAT", "presets are LOOPBACK, HOST, PRIVATE, LINK_LOCAL, METADATA, MULTICAST, DNS_ELSEWHERE"),
    ("fe80::1%eth0", "without a zone"),
    ("::ffff:10.0.0.1", 'write "10.0.0.1"'),
    ("64:ff9b::a00:0/104", 'write "10.0.0.0/8"'),
    ("64:ff9b::10.0.0.1", 'write "10.0.0.1"'),
    ("2002:a00:1::/48", 'write "10.0.0.1"'),
    ("2002:a00::/24", 'write "10.0.0.0/8"'),
    ("2002::/16", 'write "0.0.0.0/0"'),
    (443, "domain name"),
    (b"example.org", "domain name"),
    (["a.example", "b.example"], "*targets"),
    (None, "domain name"),
]


@pytest.mark.parametrize(("given", "said"), WRONG_TARGETS, ids=[repr(given) for given, _ in WRONG_TARGETS])
def test_what_is_no_target_is_told_apart(given: object, said: str) -> None:
    with pytest.raises(PolicyError, match=r"^targets=.*: expected ") as caught:
        rule(given)
    assert said in str(caught.value)
    assert caught.value.knob == "targets"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, ()),
        (443, ((443, 443),)),
        ("443", ((443, 443),)),
        ("8000-8999", ((8000, 8999),)),
        ("8000:8999", ((8000, 8999),)),
        ([443, 80, "8000-8999"], ((80, 80), (443, 443), (8000, 8999))),
        ((80, 81, "82-90", 443), ((80, 90), (443, 443))),
        ([(1, 5), (3, 9)], ((1, 9),)),
        ([(1, 9), (3, 5)], ((1, 9),)),
        (range(1, 5), ((1, 4),)),
        ([range(1, 5), 5], ((1, 5),)),
        ({443}, ((443, 443),)),
        ([65535], ((65535, 65535),)),
    ],
)
def test_ports_have_one_form(given: object, kept: tuple[tuple[int, int], ...]) -> None:
    found = rule("example.org", ports=given)
    assert found.ports == kept
    assert rule("example.org", ports=found.ports) == found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0, "leave ports out"),
        (65536, "from 1 to 65535"),
        (-1, "from 1 to 65535"),
        ("0-5", "leave ports out"),
        ("9-5", 'write "5-9"'),
        ("80,443", "write [80, 443]"),
        ("80, 8000-8999", 'write [80, "8000-8999"]'),
        ("https", "write 443"),
        ("", "from 1 to 65535"),
        ([], "leave ports out"),
        (True, "from 1 to 65535"),
        (4.5, "from 1 to 65535"),
        ([None], "from 1 to 65535"),
        ([(1, 2, 3)], "from 1 to 65535"),
        (range(1, 9, 2), None),
    ],
)
def test_what_are_no_ports(given: object, said: str | None) -> None:
    if said is None:
        assert rule("example.org", ports=given).ports == ((1, 1), (3, 3), (5, 5), (7, 7))
        return
    with pytest.raises(PolicyError, match=r"^ports=") as caught:
        rule("example.org", ports=given)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "knob"),
    [
        ({"action": "permit"}, "action"),
        ({"action": 1}, "action"),
        ({"protocol": "sctp"}, "protocol"),
        ({"protocol": "TCP"}, "protocol"),
        ({"action": "deny", "refusal": "drop"}, "refusal"),
        ({"action": "deny", "dns": "servfail"}, "dns"),
        ({"sni": 1}, "sni"),
        ({"only": "flows"}, "only"),
        ({"name": 5}, "name"),
        ({"name": "a\nb"}, "name"),
        # what does not go together
        ({"protocol": "icmp", "ports": 7}, "ports"),
        ({"sni": True, "action": "deny"}, "sni"),
        ({"sni": True, "action": "ask"}, "sni"),
        ({"sni": True, "protocol": "udp"}, "sni"),
        ({"host": True, "protocol": "icmp"}, "host"),
        ({"sni": True, "targets": ["10.0.0.1"]}, "sni"),
        ({"sni": True, "targets": ["example.org", PRIVATE]}, "sni"),
        ({"host": True, "targets": []}, "host"),
        ({"sni": True, "only": "dns"}, "sni"),
        ({"private": True, "action": "deny"}, "private"),
        ({"private": True, "targets": ["10.0.0.1"]}, "private"),
        ({"private": True, "targets": []}, "private"),
        ({"only": "dns", "ports": 443}, "only"),
        ({"only": "dns", "protocol": "udp"}, "only"),
        ({"only": "dns", "targets": ["example.org", "10.0.0.1"]}, "only"),
        ({"only": "dns", "action": "ask"}, "only"),
        ({"dns": "refused"}, "dns"),
        ({"dns": "refused", "action": "deny", "ports": 443}, "dns"),
        ({"dns": "refused", "action": "deny", "targets": ["10.0.0.1"]}, "dns"),
        ({"refusal": "reset"}, "refusal"),
        ({"refusal": "silence", "sni": True}, "refusal"),
        ({"refusal": "forbidden", "action": "deny", "protocol": "udp"}, "refusal"),
        ({"refusal": "reset", "action": "deny", "only": "dns"}, "refusal"),
        ({"targets": ["DNS_ELSEWHERE"], "ports": 80}, "ports"),
        ({"targets": ["DNS_ELSEWHERE"], "protocol": "icmp"}, "ports"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(options: dict[str, Any], knob: str) -> None:
    given = {"action": "allow", "targets": ["example.org"], **options}
    with pytest.raises(PolicyError, match="expected ") as caught:
        Rule(**given)
    assert caught.value.knob == knob
    assert isinstance(caught.value, ArgumentError)


@pytest.mark.parametrize(
    "target",
    [
        *(
            LOOPBACK,
            MULTICAST,
            "127.0.0.1",
            "127.0.0.0/8",
            "0.0.0.0",
            "::1",
            "::",
            "224.0.0.251",
            "ff02::/16",
        ),
        *("255.255.255.255", "240.0.0.0/4", "fe80::1", "localhost", "a.localhost", "*.localhost"),
    ],
)
@pytest.mark.parametrize("action", ["allow", "ask"])
def test_what_nothing_is_sent_to_cannot_be_allowed(action: str, target: object) -> None:
    with pytest.raises(PolicyError, match="nothing is ever sent to"):
        rule(target, action=action)
    assert rule(target, action="deny").targets


def test_deny_by_its_ways_and_looking_rules_refuse() -> None:
    assert rule("example.org").refusal == "prohibited"
    assert rule("example.org", sni=True).refusal == "reset"
    assert rule("example.org", host=True, refusal="forbidden").refusal == "forbidden"
    assert rule("example.org", action="deny", refusal="silence", dns="refused").dns == "refused"
    assert rule(action="deny", dns="refused").refuses_queries
    assert not rule("10.0.0.1", action="deny").refuses_queries


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (rule("a.example", "10.0.0.1", ports=443), "allow a.example, 10.0.0.1 port 443"),
        (rule(ports=[443, "8000-8999"], protocol="udp"), "allow everything ports 443, 8000-8999 udp"),
        (rule("a.example", sni=True, host=True), "allow a.example sni host"),
        (rule("a.example", action="deny", only="dns"), "deny a.example only dns"),
        (rule("a.example", action="ask", name="shop"), "ask a.example"),
        (
            rule(*(f"{letter}.example" for letter in "abcdefgh")),
            "allow a.example, b.example, c.example, d.example, e.example, f.example and 2 more",
        ),
    ],
)
def test_a_rule_as_text(found: Rule, told: str) -> None:
    assert str(found) == told


def test_a_rule_is_data() -> None:
    found = rule("a.example", ports=443, sni=True, name="shop")
    assert pickle.loads(pickle.dumps(found)) == found
    assert codec.decode(Rule, codec.encode(found)) == found
    assert len({found, rule("A.example", ports="443", sni=True, name="shop")}) == 1


# -- presets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "presets"),
    [
        ("127.0.0.53", "LOOPBACK"),
        ("0.0.0.0", "LOOPBACK"),
        ("0.1.2.3", "LOOPBACK"),
        ("::1", "LOOPBACK"),
        ("::", "LOOPBACK"),
        ("10.255.0.1", "PRIVATE"),
        ("172.16.0.1", "PRIVATE"),
        ("172.32.0.1", ""),
        ("192.168.1.1", "PRIVATE"),
        ("100.127.255.255", "PRIVATE"),
        ("100.128.0.0", ""),
        ("192.0.0.8", "PRIVATE"),
        ("192.0.2.1", ""),
        ("198.19.0.1", "PRIVATE"),
        ("fd12::1", "PRIVATE"),
        ("fec0::1", "PRIVATE"),
        ("64:ff9b:1::1", "PRIVATE"),
        ("2001:0:1::1", "PRIVATE"),
        ("2001:db8::1", ""),
        ("169.254.1.1", "LINK_LOCAL"),
        ("fe80::1", "LINK_LOCAL"),
        ("169.254.169.254", "LINK_LOCAL METADATA"),
        ("169.254.170.2", "LINK_LOCAL METADATA"),
        ("fd00:ec2::254", "PRIVATE METADATA"),
        ("100.100.100.200", "PRIVATE METADATA"),
        ("168.63.129.16", "METADATA"),
        ("224.0.0.251", "MULTICAST"),
        ("255.255.255.255", "MULTICAST"),
        ("ff02::fb", "MULTICAST"),
        ("::ffff:10.0.0.1", "PRIVATE"),
        ("64:ff9b::169.254.169.254", "LINK_LOCAL METADATA"),
        ("2002:7f00:1::", "LOOPBACK"),
        ("1.1.1.1", ""),
    ],
)
def test_what_the_presets_have(address: str, presets: str) -> None:
    found = [
        name for name, each in PRESETS.items() if ip_address(address) in each and name != "DNS_ELSEWHERE"
    ]
    assert sorted(found) == sorted(presets.split())


def test_a_preset_is_what_it_is_called() -> None:
    assert repr(METADATA) == "METADATA"
    assert pickle.loads(pickle.dumps(METADATA)) is METADATA
    assert "169.254.169.254" not in METADATA, "text is no address"
    assert IPv4Network("169.254.169.254") in set(METADATA)
    assert all(isinstance(each, Preset) for each in PRESETS.values())
