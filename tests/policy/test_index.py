"""Decisions of an index against a plain reading of the rules, one by one."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from itertools import product
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netns_kit import HOST, LINK_LOCAL, METADATA, PRIVATE, Policy, PolicyError, Rule, Transport
from netns_kit.domain_names import to_text, to_wire
from netns_kit.policy.addresses import canonical
from netns_kit.policy.index import Decision, Index
from tests.support.policies import (
    ADDRESSES,
    NAMES,
    PORTS,
    is_address,
    matches_name,
    plain,
    plain_query,
    policies,
    rules,
)


@settings(max_examples=150, deadline=None)
@given(
    policy=policies(),
    flows=st.lists(
        st.tuples(
            st.sampled_from(["tcp", "udp", "icmp"]),
            st.sampled_from([None, *ADDRESSES]),
            st.sampled_from(PORTS),
            st.lists(st.sampled_from(NAMES), max_size=3, unique=True),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    ),
)
def test_a_flow_is_decided_by_the_first_rule_that_matches(
    policy: Policy,
    flows: list[tuple[Transport, IPv4Address | IPv6Address | None, int, list[str], bool]],
) -> None:
    for protocol, address, port, names, host in flows:
        packed = None if address is None else address.packed
        wire = [to_wire(name) for name in names]
        found = policy.index.flow(protocol, packed, port, wire, lambda host=host: host)  # type: ignore[misc]  # mypy cannot infer it
        assert found == plain(policy.default, policy.rules, protocol, address, port, names, host)


@settings(max_examples=50, deadline=None)
@given(policy=policies(), names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=8))
def test_a_query_is_decided_by_the_first_rule_that_may_let_it(policy: Policy, names: list[str]) -> None:
    for name in names:
        found = plain_query(policy.default, policy.rules, name)
        assert policy.index.name(to_wire(name)) == found
        by_name = [
            rule
            for rule in policy.rules
            if any(not is_address(each) and matches_name(each, name) for each in rule.targets)
        ]
        assert policy.index.pins(to_wire(name)) == any(rule.only is None for rule in by_name)
        assert policy.index.hides_keys(to_wire(name)) == any(rule.sni or rule.host for rule in by_name)


@settings(max_examples=200, deadline=None)
@given(policy=policies(), rule=rules())
def test_a_rule_is_called_unreachable_only_if_nothing_reaches_it(policy: Policy, rule: Rule | None) -> None:
    if rule is None or len(rule.targets) > 1:
        return
    try:
        Policy(policy.default, (*policy.rules, rule))
    except PolicyError as error:
        if "decides about all" not in str(error):
            return
    else:
        return
    rules, last = (*policy.rules, rule), len(policy.rules)
    names: list[list[str]] = [[], *([name] for name in NAMES)]
    if rule.only is None:
        for protocol, address, port, given, host in product(
            get_args(Transport), [None, *ADDRESSES], PORTS, names, (False, True)
        ):
            assert plain(policy.default, rules, protocol, address, port, given, host).rule != last
    else:
        assert all(plain_query(policy.default, rules, name).rule != last for name in NAMES)


def flow(policy: Policy, protocol: Transport, address: str, port: int, *names: str) -> Decision:
    found = policy.index.flow(
        protocol, ip_address(address).packed, port, [to_wire(name) for name in names], lambda: False
    )
    assert found == plain(
        policy.default, policy.rules, protocol, ip_address(address), port, names, host=False
    ), "the test's own reading is another"
    return found


def test_a_name_is_looked_for_in_first_bytes_that_only_tcp_has() -> None:
    policy = Policy.deny().allow("example.org", sni=True).allow("*.example.org", host=True, ports=80)
    assert flow(policy, "tcp", "192.0.2.1", 443, "example.org") == Decision("allow", 0, True)
    assert flow(policy, "udp", "192.0.2.1", 443, "example.org") == Decision("deny", 0)
    assert flow(policy, "icmp", "192.0.2.1", 0, "example.org") == Decision("deny", 0)
    assert flow(policy, "udp", "192.0.2.1", 80, "a.example.org") == Decision("deny", 1)
    assert flow(policy, "udp", "192.0.2.1", 443, "a.example.org") == Decision("deny", None)
    assert flow(policy, "tcp", "192.0.2.1", 443) == Decision("deny", None)


def test_a_rule_about_queries_lets_no_flow_pass() -> None:
    policy = Policy.deny().allow("example.org", only="dns").allow("192.0.2.0/24", ports=443)
    assert flow(policy, "tcp", "192.0.2.1", 80, "example.org") == Decision("deny", None)
    assert flow(policy, "tcp", "192.0.2.1", 443, "example.org") == Decision("allow", 1)
    assert policy.index.name(to_wire("example.org")) == Decision("allow", 0)
    assert not policy.index.pins(to_wire("example.org"))
    assert policy.allow("*.org").index.pins(to_wire("example.org")), "another rule is about flows"


def test_dns_elsewhere_is_two_ports_anywhere_and_one_of_known_resolvers() -> None:
    policy = Policy.allow().deny("DNS_ELSEWHERE")
    for protocol in ("tcp", "udp"):
        for address, port in (
            *(("198.51.100.1", 53), ("198.51.100.1", 853), ("2001:db8::1", 53)),
            *(("8.8.8.8", 443), ("9.9.9.9", 443), ("2606:4700:4700::1111", 443)),
        ):
            assert flow(policy, protocol, address, port).action == "deny"
        for address, port in (("198.51.100.1", 443), ("8.8.8.8", 80), ("2001:db8::1", 443)):
            assert flow(policy, protocol, address, port).action == "allow"
    assert flow(policy, "icmp", "8.8.8.8", 53).action == "allow"


def test_the_first_and_the_last_port_of_a_range_count() -> None:
    policy = Policy.deny().allow(ports=["80-90", 443]).deny(ports="85-65535").ask(ports="1-100")
    found = {
        port: flow(policy, "tcp", "192.0.2.1", port).rule for port in (0, 1, 79, 80, 90, 91, 443, 444, 65535)
    }
    assert found == {0: None, 1: 2, 79: 2, 80: 0, 90: 0, 91: 1, 443: 0, 444: 1, 65535: 1}
    one = Policy.deny().allow("192.0.2.1", ports="80-90").allow("192.0.2.2", ports="80-65535")
    assert [flow(one, "tcp", "192.0.2.1", port).rule for port in (79, 80, 90, 91)] == [None, 0, 0, None]
    assert [flow(one, "tcp", "192.0.2.2", port).rule for port in (0, 79, 80, 65535)] == [None, None, 1, 1]


def test_a_star_is_every_name_below_and_not_the_name_itself() -> None:
    policy = Policy.deny().allow("*.example.org").allow("example.net")
    for name, rule in (
        *(("a.example.org", 0), ("b.a.example.org", 0), ("example.org", None), ("org", None)),
        *(
            ("notexample.org", None),
            ("example.net", 1),
            ("a.example.net", None),
            ("example.net.example", None),
        ),
    ):
        assert flow(policy, "tcp", "192.0.2.1", 443, name).rule == rule, name
        assert policy.index.name(to_wire(name)).rule == rule, name


def decided(index: Index, name: str) -> str | None:
    found = index.alias(to_wire(name))
    return None if found is None else index.policy.label(found.rule)


def test_an_alias_is_refused_by_a_deny_of_its_own_only() -> None:
    index = Policy.deny().deny("*.bad.example").allow("example.org").deny("x.example.org", ports=25).index
    assert decided(index, "a.bad.example") == "rule 1: deny *.bad.example"
    assert decided(index, "bad.example") is None, "the default is not asked"
    assert decided(index, "example.org") is None
    assert decided(index, "x.example.org") is None, "its other ports may be had"


def test_the_host_is_asked_for_only_where_it_decides() -> None:
    asked = []

    def is_host() -> bool:
        asked.append(1)
        return True

    index = Policy.deny().allow("192.0.2.1").deny(HOST, ports=22).allow("198.51.100.0/24").index
    assert index.flow("tcp", ip_address("192.0.2.1").packed, 22, (), is_host).rule == 0
    assert index.flow("tcp", ip_address("198.51.100.1").packed, 80, (), is_host).rule == 2
    assert not asked
    assert index.flow("tcp", ip_address("198.51.100.1").packed, 22, (), is_host).rule == 1
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("address", "by_private"),
    [
        ("10.0.0.1", True),
        ("172.31.0.1", True),
        ("100.64.0.1", True),
        ("fd12::1", True),
        ("64:ff9b:1::a00:1", True),
        ("2001:0:1::1", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("::1", False),
        ("::", False),
        ("169.254.1.1", False),
        ("169.254.169.254", False),
        ("fe80::1", False),
        ("100.100.100.200", False),
        ("fd00:ec2::254", False),
        ("224.0.0.251", False),
        ("255.255.255.255", False),
        ("ff02::fb", False),
    ],
)
def test_an_answer_has_no_address_of_its_own_network(address: str, by_private: bool) -> None:
    packed, name = ip_address(address).packed, to_wire("example.org")
    assert not Policy.allow().index.lets_answer(name, packed)
    assert not Policy.deny().allow("example.org").index.lets_answer(name, packed)
    private = Policy.deny().allow("*.example.org").allow("example.org", private=True).index
    assert private.lets_answer(name, packed) is by_private
    assert not private.lets_answer(to_wire("a.example.org"), packed)


def test_an_answer_has_public_addresses() -> None:
    for address in ("192.0.2.1", "9.9.9.9", "2606:4700:4700::1111", "172.32.0.1", "11.0.0.1"):
        assert Policy.deny().index.lets_answer(to_wire("example.org"), ip_address(address).packed)


def test_an_answer_has_what_a_rule_by_address_allows() -> None:
    name = to_wire("example.org")
    index = (
        Policy.deny()
        .deny("10.1.2.0/24")
        .deny("10.1.3.0/24", ports=25)
        .allow("10.1.0.0/16", ports=5432)
        .allow(LINK_LOCAL)
        .allow("0.0.0.0/0", ports=443)
        .index
    )
    assert index.lets_answer(name, IPv4Address("10.1.9.9").packed), "at one port is enough"
    assert index.lets_answer(name, IPv4Address("169.254.169.254").packed)
    assert index.lets_answer(name, IPv4Address("10.1.3.1").packed), "its other ports may be had"
    assert not index.lets_answer(name, IPv4Address("10.1.2.1").packed), "it is denied first"
    assert not index.lets_answer(name, IPv4Address("10.2.0.1").packed), "all addresses are none by address"
    assert Policy.deny().allow(METADATA).index.lets_answer(name, IPv4Address("169.254.169.254").packed)
    assert not Policy.allow().deny(PRIVATE).index.lets_answer(name, IPv4Address("10.0.0.1").packed)


@pytest.mark.parametrize(
    ("given", "leads_to"),
    [
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("64:ff9b::10.0.0.1", "10.0.0.1"),
        ("2002:a00:1::5", "10.0.0.1"),
        ("64:ff9b:1::10.0.0.1", "64:ff9b:1::a00:1"),
        ("2001:db8::1", "2001:db8::1"),
        ("32.2.10.0", "32.2.10.0"),
        ("::1", "::1"),
    ],
)
def test_an_address_is_the_one_where_packets_arrive(given: str, leads_to: str) -> None:
    assert canonical(ip_address(given).packed) == ip_address(leads_to).packed


def test_many_rules_cost_as_few_lookups_as_one() -> None:
    """What is looked up follows the kinds of targets, not their number."""
    policy = Policy.deny()
    for number in range(1000):
        policy = (
            policy.allow(f"host{number}.example.org", ports=443)
            if number % 2
            else policy.allow(IPv4Network((0x0B000000 + number * 256, 24)), ports=5432)
        )
    side = policy.index._sides["tcp"]
    assert len(side.networks._by_size[4]) == 1
    address, name = IPv4Address(0x0B000000 + 998 * 256 + 7).packed, to_wire("host999.example.org")
    assert policy.index.flow("tcp", address, 5432, (), bool) == Decision("allow", 998)
    assert policy.index.flow("tcp", address, 443, (name,), bool) == Decision("allow", 999)
    assert policy.index.flow("tcp", address, 80, (name,), bool) == Decision("deny", None)
    assert to_text(name) == "host999.example.org"
    assert len(side.names.matching(name)) == 1
