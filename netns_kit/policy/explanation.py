"""Explanations: what a policy says of a flow or a query, in words for people."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, ip_address
from typing import TYPE_CHECKING, NamedTuple

from netns_kit import arguments, domain_names
from netns_kit.arguments import LARGEST_PORT, shown
from netns_kit.errors import ArgumentError, DomainNameError
from netns_kit.frozen import frozen
from netns_kit.stack import Transport

from .addresses import canonical
from .presets import HOST, LOOPBACK, MULTICAST
from .rules import NO_NAME, NOWHERE, NUMERIC, SERVICES, RuleAction, Spaces, is_name, ranges_of, spaces

if TYPE_CHECKING:
    from .index import Decision
    from .policy import Policy

_URL = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:[^/?#@]*@)?(?P<host>\[[^\]]+\]|[^:/?#]*)(?::(?P<port>\d{1,5}))?(?:[/?#].*)?",
    re.IGNORECASE,
)
_HOST_PORT = re.compile(r"(?P<host>\[[^\]]+\]|[^:/?#\[\]]+):(?P<port>\d{1,5})")
_TRANSPORTS: dict[str, Transport] = {
    "tcp": "tcp",
    "udp": "udp",
    "icmp": "icmp",
    "ping": "icmp",
    "quic": "udp",
    "ntp": "udp",
}


@frozen
class Explanation:
    """The answer of `Policy.explain`.  As text it has the action and the reason."""

    action: RuleAction
    """The action: "allow", "deny" or "ask"."""
    rule: int | None
    """Number of the rule that decides, in `Policy.rules`, from 0; None: the default."""
    label: str
    """The rule as messages call it."""
    why: str
    """The reason, as a sentence."""

    @property
    def allowed(self) -> bool:
        """True if it is let pass without a question."""
        return self.action == "allow"

    def __str__(self) -> str:
        return f"{self.action}: {self.why}"


class _Asked(NamedTuple):
    """A flow or a query that a text describes."""

    protocol: Transport | None  # None: it is a query
    name: bytes | None
    address: bytes | None  # canonical
    port: int
    shown: str


def explain(policy: Policy, text: str) -> Explanation:
    """Return what the policy says of what a text describes.  Raises `ArgumentError`."""
    asked = _read(text)
    index = policy.index
    decision = None if asked.name is None else index.name(asked.name)
    if decision is not None and (asked.protocol is None or decision.action == "deny"):
        why = _why_query(policy, decision, asked)
    else:
        assert asked.protocol is not None
        names = () if asked.name is None else (asked.name,)
        decision = index.flow(asked.protocol, asked.address, asked.port, names, lambda: False)
        why = _why_flow(policy, decision, asked)
    action = decision.action
    if asked.address is not None and _is_nowhere(asked.address):
        action = "deny"
        if LOOPBACK.has(asked.address):
            why = f"{asked.shown} stays inside: it is the namespace's own loopback"
        else:
            why += "; however it be, nothing is ever sent there"
    elif policy.audit and action == "deny":
        why = f"{why}; since the policy only audits, it is let pass and told"
    return Explanation(action, decision.rule, policy.label(decision.rule), why)


# -- sentences --------------------------------------------------------------------------------------------


def _why_query(policy: Policy, decision: Decision, asked: _Asked) -> str:
    assert asked.name is not None
    name = domain_names.to_text(asked.name)
    by = policy.label(decision.rule)
    if decision.rule is None:
        by = f"the default, since no rule is about the name: {policy.default}"
    if decision.action != "deny":
        return f"queries for {name} are answered because of {by}"
    code = policy.rule(decision.rule).dns.upper()
    refused = f"queries for {name} are refused ({code}) by {by}"
    return refused if asked.protocol is None else f"{asked.shown} cannot be had, since {refused}"


def _why_flow(policy: Policy, decision: Decision, asked: _Asked) -> str:
    number, by = decision.rule, policy.label(decision.rule)
    done = {"allow": "allowed", "deny": "refused", "ask": "asked about"}[decision.action]
    why = f"{asked.shown} is {done} by {by}"
    rule = policy.rule(number)
    if number is None:
        why = f"{asked.shown} is {done} by default: no rule is about it"
        others = [policy.label(each) for each in _about_name(policy, asked)]
        if others:
            why = f"{asked.shown} is {done} by default: for other ports or protocols there is {others[0]}"
    elif decision.looks:
        why += ", if its first bytes say that name"
    elif rule.looks:
        why += ", which looks at first bytes: only TCP has these"
    for by_name, number in _before(policy, decision, asked).items():
        where = "our DNS has given it for a name" if by_name else "its address is one"
        why += f", unless {where} of {policy.label(number)}, which comes first"
    return why


def _about_name(policy: Policy, asked: _Asked) -> list[int]:
    """Return the rules by name that are about the name, for whatever ports."""
    if asked.name is None:
        return []
    return [
        number
        for number, rule in enumerate(policy.rules)
        if rule.only is None and any(is_name(each) and matches(each, asked.name) for each in rule.targets)
    ]


def _before(policy: Policy, decision: Decision, asked: _Asked) -> dict[bool, int]:
    """Return the first rules that may decide otherwise: by a name that an address was given for, and by an address.

    Which names and addresses these are is not known here.
    """
    found: dict[bool, int] = {}
    assert asked.protocol is not None
    last = len(policy.rules) if decision.rule is None else decision.rule
    for number, rule in enumerate(policy.rules[:last]):
        unknown = [
            each for each in rule.targets if each == HOST.name or is_name(each) is (asked.address is not None)
        ]
        if rule.only is None and rule.action != decision.action:
            for target in unknown:
                for ports in ranges_of(target):
                    if _has(spaces(rule, ports), asked.protocol, asked.port):
                        found.setdefault(is_name(target), number)
    return found


def matches(target: str, name: bytes) -> bool:
    """Return whether a name matches a target that is a name or *.NAME."""
    wire = domain_names.to_wire(target.removeprefix("*."))
    return name != wire and wire in domain_names.suffixes(name) if target.startswith("*.") else name == wire


def _has(about: Spaces, protocol: Transport, port: int) -> bool:
    return any(first <= port <= last for first, last in about.get(protocol, ()))


def _is_nowhere(address: bytes) -> bool:
    return LOOPBACK.has(address) or MULTICAST.has(address) or NOWHERE.has(address)


# -- what is asked ----------------------------------------------------------------------------------------


def _read(text: str) -> _Asked:
    """Return the flow or the query that a text describes.  Raises `ArgumentError`."""
    arguments.text("text", text, "a URL, HOST:PORT, or a name")
    if text.startswith("dns:"):
        return _query(text[4:].lstrip("/"), text)
    found = _URL.fullmatch(text)
    scheme = found["scheme"].lower() if found else "tcp"
    if found is None:
        found = _HOST_PORT.fullmatch(text)
    if found is None:
        return _query(text, text)
    protocol = _TRANSPORTS.get(scheme, "tcp")
    port = found["port"] or ("0" if protocol == "icmp" else SERVICES.get(scheme))
    if port is None:
        fix = f'write "{scheme if scheme in _TRANSPORTS else "tcp"}://{found["host"]}:PORT"'
        raise ArgumentError("expected a known scheme or a port", "text", shown(text), fix)
    if int(port) > LARGEST_PORT:
        raise ArgumentError(f"expected a port up to {LARGEST_PORT}", "text", shown(text))
    host = found["host"].strip("[]")
    is_local = host.lower().rstrip(".").rpartition(".")[2] == "localhost"  # RFC 6761 section 6.3
    address = IPv4Address("127.0.0.1").packed if is_local else _address(host)
    told = {"tcp": "TCP", "udp": "UDP", "icmp": "ICMP"}[protocol]
    told = f"{told} to {host}" + (f" port {port}" if protocol != "icmp" else "")
    if address is None:
        return _Asked(protocol, _wire_name(host, text), None, int(port), told)
    inner = canonical(address)
    if inner != address:
        told += f", which is {ip_address(inner)},"
    return _Asked(protocol, None, inner, int(port), told)


def _query(host: str, text: str) -> _Asked:
    if _address(host) is not None:
        fix = f'write "tcp://{f"[{host}]" if ":" in host else host}:PORT"'
        raise ArgumentError("expected a port behind an address", "text", shown(text), fix)
    return _Asked(None, _wire_name(host, text), None, 0, host)


def _address(host: str) -> bytes | None:
    try:
        return ip_address(host).packed
    except ValueError:
        return None


def _wire_name(host: str, text: str) -> bytes:
    if NUMERIC.fullmatch(host):  # programs take it for an address, each in its own way
        fix = "an IPv4 address has four numbers"
        raise ArgumentError("expected an address or a name", "text", shown(text), fix)
    try:
        if host and NO_NAME.search(host) is None:
            return domain_names.to_wire(host, "text").lower()
    except DomainNameError:
        pass
    fix = 'such as "https://example.org" or "tcp://10.0.0.1:5432"'
    raise ArgumentError("expected a URL, HOST:PORT, or a name", "text", shown(text), fix)
