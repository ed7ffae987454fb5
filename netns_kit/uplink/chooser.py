"""ChooserUplink: flows by several ways, chosen by rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from netns_kit import arguments
from netns_kit.domain_names import is_among, is_host_name, to_wire
from netns_kit.errors import ArgumentError, ArgumentTypeError
from netns_kit.policy.addresses import canonical
from netns_kit.policy.index import Index
from netns_kit.policy.policy import Policy
from netns_kit.policy.rules import Rule, RulePorts, RuleTarget, several
from netns_kit.stack import Refusal, Transport

from .dial import Dial, Refused
from .elsewhere import SocketSource
from .flow import Flow, Target
from .indirect import Carriage, IndirectUplink, UplinkOptions, is_direct
from .uplink import Uplink, is_host_address

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

ChooserRule: TypeAlias = "tuple[RuleTarget | Iterable[RuleTarget] | Rule, IndirectUplink | None]"
"""What a rule of a `ChooserUplink` is about, and the way for it; None: sockets of the host."""


class ChooserUplink(IndirectUplink):
    """The way out that a rule chooses.  The first rule that is about a flow decides.

    Targets are those of a policy's rules: names, networks, presets.  A rule with ports or a transport is given as a
    `Rule`, whose action does not matter: `choose(..., ports=443)` makes one.  Names are known as they are to a proxy:
    our DNS has answered with the address.

    Args:
        rules: Pairs of targets and an uplink through a proxy, or None for sockets of the host.
        default: The way for all other flows.
        options: The settings of any `Uplink`.  They are given here, and not to the uplinks in the rules: dns, policy
            and what may be reached are decided before one of these is chosen.

    Raises:
        ArgumentError: A value cannot be used; an uplink in a rule has a policy or DNS settings of its own.
        ArgumentTypeError: An argument has the wrong type; an uplink in a rule is not through a proxy.
        PolicyError: A target cannot be used.
    """

    def __init__(
        self,
        rules: Iterable[ChooserRule],
        default: IndirectUplink | None = None,
        **options: Unpack[UplinkOptions],
    ) -> None:
        super().__init__(**options)
        arguments.items("rules", rules, "a list of pairs (targets, uplink)")
        made: list[Rule] = []
        ways: list[IndirectUplink | None] = []
        pairs: list[object] = list(rules)
        for number, pair in enumerate(pairs):
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ArgumentTypeError(
                    "expected a pair (targets, uplink)", f"rules[{number}]", arguments.shown(pair)
                )
            targets, way = pair
            made.append(_rule(targets))
            ways.append(_checked(f"rules[{number}]", way))
        self._index = Index(Policy("deny", tuple(made)))
        self._ways = (*ways, _checked("default", default))
        self._rules = tuple(made)
        self.namespaces = tuple(inside for each in self._ways if each for inside in each.namespaces)
        takes = any(each is not None and each.stands_in for each in self._ways)
        self.stands_in = takes and self.dns.servers is None and self._function is None
        self.time_limit = max((each.time_limit for each in self._ways if each), default=self.time_limit)

    def __getstate__(self) -> Mapping[str, object]:
        """Return what a worker and a stack have of it: they know namespaces by their sockets."""
        return {**self.__dict__, "namespaces": ()}

    def __repr__(self) -> str:
        pairs = [f"({rule}, {way!r})" for rule, way in zip(self._rules, self._ways, strict=False)]
        return f"ChooserUplink([{', '.join(pairs)}], {self._ways[-1]!r})"

    def attached(self, tell: Callable[[str], object], sources: Iterator[SocketSource]) -> Self:
        made = super().attached(tell, sources)
        made._ways = tuple(None if each is None else each.attached(tell, sources) for each in self._ways)
        return made

    def way_for(self, flow: Flow) -> IndirectUplink | None:
        """Return the way that is chosen for a flow; None: sockets of the host.

        Args:
            flow: The flow, as the guest opens it.
        """
        address, port = flow.destination
        names = (to_wire(flow.name),) if flow.name is not None and is_host_name(flow.name) else ()
        plain = None if flow.is_by_name else canonical(address.packed)
        number = self._index.flow(
            flow.protocol, plain, port, names, lambda: plain is not None and is_host_address(address)
        ).rule
        return self._ways[-1 if number is None else number]

    def stands_for(self, name: str) -> bool:
        """Return whether programs get a stand-in as the address of a name: all its ways are proxies that resolve it.

        Args:
            name: The name, in small letters.
        """
        return self.stands_in and all(way is not None and way.stands_in for way in self._ways_of(name))

    def _ways_of(self, name: str) -> Iterator[IndirectUplink | None]:
        """Yield the ways that flows to a name may take, whatever its address.

        Args:
            name: The name.
        """
        for number, rule in enumerate(self._rules):
            if not rule.targets or is_among(name, rule.targets):
                yield self._ways[number]
                if not rule.ports and rule.protocol is None:
                    return
        yield self._ways[-1]

    def dial(self, flow: Flow, target: Target, *, ttl: int = 64, tos: int = 0) -> Dial:
        way = self._way(flow, target)
        if isinstance(way, Refusal):
            return Refused(way)
        if way is None:
            return Uplink.dial(self, flow, target, ttl=ttl, tos=tos)
        return way.dial(flow, target, ttl=ttl, tos=tos)

    def dial_resolver(self, flow: Flow, target: Target) -> Dial:
        way = self.way_for(flow)
        return Uplink.dial(self, flow, target) if way is None else way.dial_resolver(flow, target)

    def carriage(self, flow: Flow, target: Target) -> Carriage:
        way = self._way(flow, target)
        return way.carriage(flow, target) if isinstance(way, IndirectUplink) else way

    def _way(self, flow: Flow, target: Target) -> IndirectUplink | Refusal | None:
        """Return the way that a flow takes; None: that of an `Uplink`.  A stand-in leads only to who takes names."""
        if is_direct(flow, target):
            return None
        way = self.way_for(flow)
        by_name = flow.is_by_name and (way is None or not way.takes_names)
        return Refusal.HOST_UNREACHABLE if by_name else way


def choose(*targets: RuleTarget, ports: RulePorts | None = None, protocol: Transport | None = None) -> Rule:
    """Return what a rule of a `ChooserUplink` is about, if it is not about all ports and transports.

    Args:
        targets: Names, networks, presets, see `Policy.allow`.
        ports: The ports; None: all.
        protocol: The transport; None: any.

    Raises:
        PolicyError: A value cannot be used.
    """
    return Rule("allow", targets, ports, protocol)


def _rule(given: Any) -> Rule:
    if isinstance(given, Rule):
        return Rule("allow", given.targets, given.ports, given.protocol)
    return Rule("allow", several(given))


def _checked(knob: str, way: object) -> IndirectUplink | None:
    """Return the way of a rule.

    Raises:
        ArgumentError: It has settings that only the chooser can have.
        ArgumentTypeError: It is no such uplink.
    """
    if way is None:
        return None
    if not isinstance(way, IndirectUplink):
        fix = None
        if isinstance(way, Uplink) and way.is_in_memory:  # it answers all names, and has no socket
            fix = "give the names records (UserStack.add_record), and answer there with UserStack.serve_tcp"
        raise ArgumentTypeError(
            "expected an uplink through a proxy or a namespace, or None for sockets of the host",
            knob,
            arguments.shown(way),
            fix,
        )
    if way.policy is not None or way.dns.servers is not None or way.dns.domains:
        raise ArgumentError(
            "expected an uplink without policy and dns", knob, repr(way), "give them to the ChooserUplink"
        )
    return way
