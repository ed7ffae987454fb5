"""Policies drawn at random, and their rules read one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from hypothesis import strategies as st

from netns_kit import Policy, PolicyError, Rule, Transport
from netns_kit.policy.index import Decision
from netns_kit.policy.presets import PRESETS
from netns_kit.policy.rules import RuleAction

NAMES = [
    "example.org",
    "a.example.org",
    "b.a.example.org",
    "example.net",
    "org",
    "db",
    "xn--bcher-kva.example",
]
NAME_TARGETS = [*NAMES, "*.example.org", "*.a.example.org", "*.org", "*.example.net"]
ADDRESS_TARGETS = [
    *("192.0.2.1", "192.0.2.0/24", "192.0.2.0/25", "192.0.0.0/8", "0.0.0.0/0", "10.1.0.0/16", "10.1.2.3"),
    *("2001:db8::/32", "2001:db8::1", "::/0", "fd00::/8", "PRIVATE", "METADATA", "HOST", "DNS_ELSEWHERE"),
]
ADDRESSES = [
    ip_address(text)
    for text in (
        *("192.0.2.1", "192.0.2.200", "192.9.9.9", "10.1.2.3", "10.200.0.1", "169.254.169.254", "1.1.1.1"),
        *("198.51.100.1", "100.100.100.200", "2001:db8::1", "2001:db8::2", "fd00::1", "fd00:ec2::254"),
        *("2606:4700:4700::1111", "2600::1"),
    )
]
PORTS = [0, 22, 53, 80, 443, 853, 8080, 65535]


def read(target: str) -> list[tuple[object, list[tuple[int, int]]]]:
    """Return the networks of a target, each with its ports."""
    if target not in PRESETS:
        return [(ip_network(target), [])]
    return [(network, list(ports)) for network, ports in PRESETS[target].parts]


def matches_name(target: str, name: str) -> bool:
    return name.endswith(target[1:]) if target.startswith("*.") else name == target


def is_address(target: str) -> bool:
    with suppress(ValueError):
        return target in PRESETS or bool(ip_network(target))
    return False


def among(port: int, ranges: Collection[tuple[int, int]]) -> bool:
    return not ranges or any(first <= port <= last for first, last in ranges)


def plain(
    default: RuleAction,
    rules: Iterable[Rule],
    protocol: Transport,
    address: IPv4Address | IPv6Address | None,
    port: int,
    names: Collection[str],
    host: bool,
) -> Decision:
    """Read the rules from the first to the last."""
    for number, rule in enumerate(rules):
        if rule.only == "dns" or rule.protocol not in (None, protocol):
            continue
        if rule.ports and (protocol == "icmp" or not among(port, rule.ports)):
            continue
        found = not rule.targets
        for target in rule.targets:
            if target == "HOST":
                found |= host
            elif not is_address(target):
                found |= any(matches_name(target, name) for name in names)
            elif address is not None:
                found |= any(
                    address in network and not (ports and protocol == "icmp") and among(port, ports)  # type: ignore[operator]  # a network
                    for network, ports in read(target)
                )
        if found and (rule.sni or rule.host):
            return Decision("deny", number) if protocol != "tcp" else Decision(rule.action, number, True)
        if found:
            return Decision(rule.action, number)
    return Decision(default, None)


def plain_query(default: RuleAction, rules: Iterable[Rule], name: str) -> Decision:
    for number, rule in enumerate(rules):
        named = any(not is_address(each) and matches_name(each, name) for each in rule.targets)
        if (named or not rule.targets) and not (rule.action == "deny" and (rule.ports or rule.protocol)):
            return Decision(rule.action, number)
    return Decision(default, None)


port_ranges = st.tuples(st.sampled_from(PORTS[1:]), st.sampled_from(PORTS[1:])).map(sorted).map(tuple)


@st.composite
def rules(draw: st.DrawFn) -> Rule | None:
    """A rule, or None if what was drawn does not go together."""
    kind = draw(st.sampled_from(["names", "addresses", "both", "everything"]))
    pool = {"names": NAME_TARGETS, "addresses": ADDRESS_TARGETS, "both": NAME_TARGETS + ADDRESS_TARGETS}
    targets = draw(st.lists(st.sampled_from(pool.get(kind, [""])), min_size=1, max_size=3, unique=True))
    options: dict[str, object] = draw(
        st.sampled_from([{}, {}, {"sni": True}, {"host": True}, {"private": True}, {"only": "dns"}])
    )
    if "only" not in options:
        ports = st.one_of(st.none(), st.lists(port_ranges, min_size=1, max_size=2))
        protocol = st.sampled_from([None, None, "tcp", "udp", "icmp"])
        options = {**options, "ports": draw(ports), "protocol": draw(protocol)}
    action = draw(st.sampled_from(["allow", "allow", "deny", "ask"]))
    with suppress(PolicyError):
        return Rule(action, [] if kind == "everything" else targets, **options)  # type: ignore[arg-type]  # any
    return None


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """A policy of the rules that may stand where they are."""
    policy = Policy(draw(st.sampled_from(["allow", "deny", "deny", "deny", "ask"])))
    for rule in draw(st.lists(rules(), min_size=1, max_size=12)):
        if rule is not None:
            with suppress(PolicyError):
                policy = Policy(policy.default, (*policy.rules, rule))
    return policy
