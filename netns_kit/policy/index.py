"""Index: a policy made fast to ask.

The rules of a policy are taken apart by what they are about: a network, a domain name, all names below one, the host,
everything.  Each of these has, for each transport, the ports at which another rule begins to be the first, and which
one that is.  A decision looks up all that a flow is about, and takes the lowest number: rules are in order.  So its
cost follows the number of different prefix lengths and of labels, not the number of rules.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from heapq import heappop, heappush
from ipaddress import ip_network
from itertools import islice
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeAlias, TypeVar

from netns_kit import domain_names
from netns_kit.stack import Transport

from .addresses import AnyNetwork, NetworkTable, PortRanges
from .presets import HOST, LINK_LOCAL, LOOPBACK, METADATA, MULTICAST, PRESETS, PRIVATE
from .rules import Rule, RuleAction, Spaces, is_name, spaces

if TYPE_CHECKING:
    from .policy import Policy

NAMES_KEPT = 16384  # names whose rules were looked up, and are kept
_TRANSPORTS: tuple[Transport, ...] = ("tcp", "udp", "icmp")
_FIRST_PORT, _AFTER_PORTS = 0, 65536

V = TypeVar("V")


class Decision(NamedTuple):
    """What a policy says of a flow or a query."""

    action: RuleAction
    """The action of the rule that decides, or of the default."""
    rule: int | None
    """Number of that rule in `Policy.rules`, from 0; None: the default."""
    looks: bool = False
    """Whether the first bytes must be looked at before the flow may pass."""


class NameTable(Generic[V]):
    """Values of targets that are names, found by a name which they match."""

    __slots__ = ("_below", "_exact")

    def __init__(self) -> None:
        self._exact: dict[bytes, V] = {}
        self._below: dict[bytes, V] = {}

    def get_or_set(self, target: str, value: V) -> V:
        """Return the target's value, which is `value` if it has none yet."""
        table = self._below if target.startswith("*.") else self._exact
        return table.setdefault(domain_names.to_wire(target.removeprefix("*.")), value)

    def matching(self, name: bytes) -> list[V]:
        """Return the values of all targets that a name matches.

        Args:
            name: The name in wire form, in lower case.
        """
        below = self._below
        found = [below[each] for each in islice(domain_names.suffixes(name), 1, None) if each in below]
        if name in self._exact:
            found.append(self._exact[name])
        return found

    def covering(self, target: str) -> list[V]:
        """Return the values of all targets that match whatever a target matches."""
        wire = domain_names.to_wire(target.removeprefix("*."))
        if not target.startswith("*."):
            return self.matching(wire)
        return [self._below[each] for each in domain_names.suffixes(wire) if each in self._below]


_Firsts: TypeAlias = "tuple[list[int], list[int]]"
"""Ports in order, and the first rule from each of them up to the next."""


class _Side:
    """What the rules say of the flows of one transport."""

    __slots__ = ("_kept", "decisions", "everything", "host", "names", "networks")

    def __init__(self, decisions: tuple[Decision, ...]) -> None:
        default = len(decisions) - 1
        self.decisions = decisions
        """Those of the rules, and behind them that of the default."""
        self.everything: _Firsts = ([_FIRST_PORT], [default])
        self.host: _Firsts = ([_FIRST_PORT], [default])
        self.networks: NetworkTable[_Firsts] = NetworkTable()
        self.names: NameTable[_Firsts] = NameTable()
        self._kept: dict[bytes, list[_Firsts]] = {}

    def decide(
        self, address: bytes | None, port: int, names: Collection[bytes], is_host: Callable[[], bool]
    ) -> Decision:
        """Return the decision of the first rule that matches.  Without an address, none by address does."""
        starts, firsts = self.everything
        found = firsts[bisect_right(starts, port) - 1]
        if address is not None:
            for starts, firsts in self.networks.containing(address):
                first = firsts[bisect_right(starts, port) - 1]
                if first < found:  # noqa: PLR1730  # a call of min costs more
                    found = first
        for name in names:
            kept = self._kept.get(name)
            for starts, firsts in self._of_name(name) if kept is None else kept:
                first = firsts[bisect_right(starts, port) - 1]
                if first < found:  # noqa: PLR1730  # the same
                    found = first
        starts, firsts = self.host
        first = firsts[bisect_right(starts, port) - 1]
        if first < found and is_host():
            found = first
        return self.decisions[found]

    def _of_name(self, name: bytes) -> list[_Firsts]:
        if len(self._kept) >= NAMES_KEPT:
            self._kept.clear()
        self._kept[name] = found = self.names.matching(name)
        return found


class Index:
    """The decisions of a policy.

    Args:
        policy: The policy.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        rules = policy.rules
        default = Decision(policy.default, None)
        self._default = default
        self._last = b"", default  # what `name` has returned last: an answer has many records of one name
        self._sides = {
            each: _Side((*(_decision(rule, number, each) for number, rule in enumerate(rules)), default))
            for each in _TRANSPORTS
        }
        self._queries: NameTable[int] = NameTable()
        self._all_queries = len(rules)
        self._pinned: NameTable[bool] = NameTable()
        self._looked_at: NameTable[bool] = NameTable()
        self._answers: NetworkTable[int] = NetworkTable()
        collected = _Collected()
        for number, rule in enumerate(rules):
            self._add_to_names(number, rule)
            self._add_to_answers(number, rule)
            if rule.only is None:
                collected.add(number, rule)
        collected.into(self._sides, len(rules))

    def _add_to_names(self, number: int, rule: Rule) -> None:
        names = [each for each in rule.targets if is_name(each)]
        if rule.action != "deny" or rule.is_whole:
            for name in names:
                self._queries.get_or_set(name, number)
            if not rule.targets:
                self._all_queries = min(self._all_queries, number)
        for name in names:
            if rule.only is None:
                self._pinned.get_or_set(name, True)
            if rule.looks:
                self._looked_at.get_or_set(name, True)

    def _add_to_answers(self, number: int, rule: Rule) -> None:
        if rule.action == "deny" and not rule.is_whole:
            return
        for target in rule.targets:
            if not is_name(target):
                for network, _ in parts_of(target):
                    if network.prefixlen:  # the whole family names no address
                        self._answers.get_or_set(network, number)

    def flow(
        self,
        protocol: Transport,
        address: bytes | None,
        port: int,
        names: Collection[bytes],
        is_host: Callable[[], bool],
    ) -> Decision:
        """Return what the policy says of a flow.

        Args:
            protocol: The transport.
            address: The destination, packed and canonical; None: it is not known, and no rule by address matches.
            port: The destination's port; for ICMP any number.
            names: The names that the address is pinned for, in wire form and lower case.
            is_host: Tells whether the destination is an address of the host or the gateway's.  It is called only if
                that decides.
        """
        return self._sides[protocol].decide(address, port, names, is_host)

    def name(self, name: bytes) -> Decision:
        """Return whether a query for a name is resolved: unless the action is "deny", it is.

        Args:
            name: The name in wire form, in lower case.
        """
        last, decision = self._last
        if last != name:
            number = min([*self._queries.matching(name), self._all_queries])
            rules = self.policy.rules
            decision = Decision(rules[number].action, number) if number < len(rules) else self._default
            self._last = name, decision
        return decision

    def alias(self, name: bytes) -> Decision | None:
        """Return the rule by name that denies the target of a CNAME, or None.

        Args:
            name: The target in wire form, in lower case.
        """
        number = min(self._queries.matching(name), default=None)
        if number is None or self.policy.rules[number].action != "deny":
            return None
        return Decision("deny", number)

    def lets_answer(self, name: bytes, address: bytes, *, own: bool = False) -> bool:
        """Return whether an answer for a name may have an address.

        Answers with addresses of `LOOPBACK`, `PRIVATE`, `LINK_LOCAL`, `METADATA` and `MULTICAST` are not let pass,
        unless a rule by address allows the address.  Private addresses are if the rule for the name says so.

        Args:
            name: The name that was asked for, in wire form and lower case.
            address: The address, packed and canonical.
            own: Whether it is in a network of the namespace, which counts as `PRIVATE`.
        """
        special = _special_addresses().containing(address)
        if not (special or own):
            return True
        rules = self.policy.rules
        by_address = min(self._answers.containing(address), default=None)
        if by_address is not None and rules[by_address].action != "deny":
            return True
        number = self.name(name).rule
        return all(special) and number is not None and rules[number].private

    def pins(self, name: bytes) -> bool:
        """Return whether the addresses of an answer are to be pinned: some rule about flows is about the name.

        Args:
            name: The name that was asked for, in wire form and lower case.
        """
        return bool(self._pinned.matching(name))

    def hides_keys(self, name: bytes) -> bool:
        """Return whether queries for HTTPS and SVCB records get no data: their keys hide the name in first bytes.

        Args:
            name: The name that was asked for, in wire form and lower case.
        """
        return bool(self._looked_at.matching(name))


def _decision(rule: Rule, number: int, transport: Transport) -> Decision:
    if not rule.looks:
        return Decision(rule.action, number)
    return Decision(rule.action, number, True) if transport == "tcp" else Decision("deny", number)


_Span: TypeAlias = "tuple[int, int, int]"
"""The first port, the one behind the last, and the rule that is about them."""


class _Collected:
    """The ports of all rules by what the rules are about, collected in the order of the rules."""

    def __init__(self) -> None:
        self._of: dict[tuple[Transport, str | AnyNetwork], list[_Span]] = {}

    def add(self, number: int, rule: Rule) -> None:
        for target in rule.targets or ("",):
            if target in PRESETS and target != HOST.name:
                for network, ports in parts_of(target):
                    self._add(network, number, spaces(rule, ports))
            elif is_name(target) or target in ("", HOST.name):
                self._add(target, number, spaces(rule))
            else:
                self._add(ip_network(target), number, spaces(rule))

    def _add(self, key: str | AnyNetwork, number: int, about: Spaces) -> None:
        for transport, ranges in about.items():
            spans = self._of.setdefault((transport, key), [])
            spans.extend((first, last + 1, number) for first, last in ranges)

    def into(self, sides: dict[Transport, _Side], default: int) -> None:
        for (transport, key), spans in self._of.items():
            side, firsts = sides[transport], _first_rules(spans, default)
            if key == "":
                side.everything = firsts
            elif key == HOST.name:
                side.host = firsts
            elif isinstance(key, str):
                side.names.get_or_set(key, firsts)
            else:
                side.networks.get_or_set(key, firsts)


def _first_rules(spans: list[_Span], default: int) -> _Firsts:
    """Return the first rule of each port."""
    if len(spans) == 1:  # as of most keys
        ((start, end, rule),) = spans
        edges = [(_FIRST_PORT, default)] * (start > _FIRST_PORT)
        edges += [(start, rule)] + [(end, default)] * (end < _AFTER_PORTS)
        return [at for at, _ in edges], [first for _, first in edges]
    starts, firsts = [_FIRST_PORT], [default]
    to_come = sorted(spans, reverse=True)
    begun: list[tuple[int, int]] = []  # rules, each with the port behind its last
    for at in sorted({at for start, end, _ in spans for at in (start, end)}):
        while to_come and to_come[-1][0] == at:
            _, end, rule = to_come.pop()
            heappush(begun, (rule, end))
        while begun and begun[0][1] <= at:
            heappop(begun)
        first = begun[0][0] if begun else default
        if at == _FIRST_PORT:
            firsts[0] = first
        elif first != firsts[-1]:
            starts.append(at)
            firsts.append(first)
    return starts, firsts


def parts_of(target: str) -> Iterable[tuple[AnyNetwork, PortRanges]]:
    """Return the networks of a target that is no name, each with the ports that are meant there."""
    return PRESETS[target].parts if target in PRESETS else ((ip_network(target), ()),)


@lru_cache(maxsize=1)
def _special_addresses() -> NetworkTable[bool]:
    """Return the networks that answers may not have; True for those which they may have if a rule by name says so."""
    table: NetworkTable[bool] = NetworkTable()
    for preset in (LOOPBACK, LINK_LOCAL, METADATA, MULTICAST, PRIVATE):
        for network in preset:
            table.get_or_set(network, preset is PRIVATE)
    return table
