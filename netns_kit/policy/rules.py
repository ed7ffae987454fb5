"""Rules: what one line of a policy is about, and what it does.

A `Rule` takes what people write and keeps it in one form, so that equal rules are equal.  Whatever it cannot take
raises a `PolicyError` that says what to write instead.

>>> rule = Rule("allow", ["Example.ORG.", "10.1.0.0/16"], ports=[443, "8000-8999"])
>>> print(rule)
allow example.org, 10.1.0.0/16 ports 443, 8000-8999
>>> rule.targets, rule.ports
(('example.org', '10.1.0.0/16'), ((443, 443), (8000, 8999)))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_network,
    summarize_address_range,
)
from typing import Literal, TypeAlias, get_args

from netns_kit import arguments, domain_names
from netns_kit.arguments import LARGEST_PORT, shown
from netns_kit.errors import ArgumentError, DomainNameError, PolicyError
from netns_kit.frozen import frozen
from netns_kit.stack import Transport

from .addresses import AnyNetwork, PortRanges, embedded_network, network_text
from .presets import LOOPBACK, MULTICAST, PRESETS, Preset

RuleAction: TypeAlias = Literal["allow", "deny", "ask"]
"""What a rule does with a flow: let it pass, refuse it, or ask `on_flow`."""
RefusalName: TypeAlias = Literal["prohibited", "reset", "silence", "forbidden"]
"""How a flow is refused.

- prohibited: ICMP administratively prohibited.
- reset: RST, or ICMP port unreachable.
- silence: nothing.
- forbidden: TCP is accepted without a connection to anywhere, and an HTTP request is answered 403, a TLS ClientHello
  by the alert access_denied; whatever else is reset.  For other transports it is "prohibited".
"""
DnsRefusal: TypeAlias = Literal["nxdomain", "refused"]
"""How a query is refused: by the result code NXDOMAIN or REFUSED."""
RuleTarget: TypeAlias = (
    "str | Preset | IPv4Address | IPv6Address | IPv4Network | IPv6Network | IPv4Interface | IPv6Interface"
)
"""What a rule is about: a domain name, "*.NAME", an address, a network, a `Preset` or its name."""
RulePorts: TypeAlias = "int | str | Iterable[int | str | tuple[int, int]]"
"""The ports of a rule: 443, "8000-8999", or a list of such."""

_Conflict: TypeAlias = tuple[bool, str, str, str]
"""Whether two settings of a rule are in conflict; the name of one, what was expected, and what to do."""

SERVICES = {
    "amqp": 5672, "amqps": 5671, "domain": 53, "ftp": 21, "ftps": 990, "git": 9418, "http": 80, "https": 443,
    "imap": 143, "imaps": 993, "ldap": 389, "ldaps": 636, "memcached": 11211, "mongodb": 27017, "mqtt": 1883,
    "mqtts": 8883, "mysql": 3306, "nats": 4222, "ntp": 123, "pop3": 110, "pop3s": 995, "postgres": 5432,
    "postgresql": 5432, "redis": 6379, "rediss": 6379, "rsync": 873, "sftp": 22, "smtp": 25, "smtps": 465,
    "ssh": 22, "submission": 587, "telnet": 23, "ws": 80, "wss": 443,
}  # fmt: skip
"""Ports of well-known services, by the scheme of a URL or the name of the service."""

NOWHERE = Preset("", ("fe80::/10", "240.0.0.0/4", "::/16"))
"""Other addresses to which nothing is ever sent.  Those in ::/16 embed IPv4 in obsolete ways: ::a.b.c.d."""

SHOWN = 6  # targets and ports of a rule in messages
NO_NAME = re.compile(r"[^A-Za-z0-9._\-\x80-\U0010ffff]")  # no label is made of
_TWO_WAYS = "\u00df\u03c2\u200c\u200d"  # what IDNA 2003 and 2008 do not agree about (UTS 46 section 7)
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(?:[^/@]*@)?(\[[^\]/]+\]|[^:/?#]+)(?::(\d+))?", re.IGNORECASE)
_HOST_PORT = re.compile(r"(\[[^\]/]+\]|[^:/\[\]]+):(\d+(?:-\d+)?|\*|[a-z]+)")
_RANGE = re.compile(r"\s*([0-9a-f.:]+)\s*-\s*([0-9a-f.:]+)\s*", re.IGNORECASE)
_OCTETS = re.compile(r"((?:\d+\.){1,3})\*(?:\.\*)*")
NUMERIC = re.compile(r"(.*\.)?(\d+|0x[0-9a-f]*)\.?", re.IGNORECASE)
_PORT_RANGE = re.compile(r"\s*(\d{1,5})\s*(?:[-:]\s*(\d{1,5})\s*)?")


@frozen
class Rule:
    """A rule of a policy, its values checked and in one form.

    Args:
        action: "allow", "deny" or "ask".
        targets: What it is about, see `Policy.allow`; none of them: everything.
        ports: The ports, see `Policy.allow`; none of them: all.
        protocol: "tcp", "udp" or "icmp"; None: any.
        refusal: How a flow is refused; None: "reset" of a rule that looks at first bytes, else "prohibited".
        dns: How a query is refused.
        sni, host: Whether the name in the first bytes of a connection is looked at.
        private: Whether answers for these names may have private addresses.
        only: "dns": the rule is about queries only.
        name: What the rule is called in messages; "" for none.

    Raises:
        PolicyError: A value cannot be used, or not together with another one.
    """

    action: RuleAction
    targets: tuple[str, ...]
    ports: tuple[tuple[int, int], ...]
    protocol: Transport | None
    refusal: RefusalName
    dns: DnsRefusal
    sni: bool
    host: bool
    private: bool
    only: Literal["dns"] | None
    name: str

    def __init__(
        self,
        action: RuleAction,
        targets: Iterable[RuleTarget] = (),
        ports: RulePorts | None = None,
        protocol: Transport | None = None,
        refusal: RefusalName | None = None,
        dns: DnsRefusal = "nxdomain",
        sni: bool = False,
        host: bool = False,
        private: bool = False,
        only: Literal["dns"] | None = None,
        name: str = "",
    ) -> None:
        try:
            arguments.one_of("action", action, get_args(RuleAction))
            arguments.items("targets", targets, "a list of targets")
            targets = tuple(dict.fromkeys(map(read_target, targets)))
            refusal = refusal or usual_refusal(sni or host)
            arguments.fill(self, locals(), ports=read_ports(ports))
            self._check_values()
            self._check_together()
        except PolicyError:
            raise
        except ArgumentError as error:
            expected = f"expected {error.cause.removeprefix('expected ')}"
            raise PolicyError(expected, error.knob, error.value, error.fix) from error

    def __str__(self) -> str:
        parts = [self.action, _some(self.targets) or "everything"]
        if self.ports:
            parts.append(f"{'port' if len(self.ports) == 1 else 'ports'} {_some(ports_data(self.ports))}")
        parts.extend(filter(None, (self.protocol, "sni" * self.sni, "host" * self.host)))
        if self.only is not None:
            parts.append("only dns")
        return " ".join(parts)

    @property
    def looks(self) -> bool:
        """True if the first bytes of a connection are looked at."""
        return self.sni or self.host

    @property
    def has_names(self) -> bool:
        """True if one of the targets is a domain name."""
        return any(map(is_name, self.targets))

    @property
    def is_whole(self) -> bool:
        """True if the rule is about all ports of all transports."""
        return not self.ports and self.protocol is None

    @property
    def refuses_queries(self) -> bool:
        """True if queries for the rule's names are refused."""
        return self.action == "deny" and self.is_whole and (self.has_names or not self.targets)

    def _check_values(self) -> None:
        """Check each value alone.  Raises `ArgumentError`."""
        arguments.one_of("protocol", self.protocol, (*get_args(Transport), None))
        arguments.one_of("refusal", self.refusal, get_args(RefusalName))
        arguments.one_of("dns", self.dns, get_args(DnsRefusal))
        for knob in ("sni", "host", "private"):
            arguments.boolean(knob, getattr(self, knob))
        arguments.one_of("only", self.only, ("dns", None))
        arguments.text("name", self.name, "a name for messages, or None")
        if not self.name.isprintable():
            raise ArgumentError("expected printable text", "name", shown(self.name))

    def _check_together(self) -> None:
        """Check what does not go together.  Raises `PolicyError`."""
        ports = _some(ports_data(self.ports))
        if self.protocol == "icmp" and self.ports:
            raise PolicyError(
                "expected no ports, since ICMP has none", "ports", ports, "leave out ports, or the protocol"
            )
        for is_wrong, knob, what, fix in (
            *self._about_bytes(),
            *self._about_names(),
            *self._about_refusals(),
        ):
            if is_wrong:
                given = getattr(self, knob)
                raise PolicyError(f"expected {what}", knob, repr(given), fix)
        if self.action != "deny":
            for target in self.targets:
                self._check_that_something_is_there(target)
        if not self._spaces_are_some():
            expected = "expected a port at which one of the targets is meant"
            raise PolicyError(expected, "ports", ports or self.protocol, "leave out ports and protocol")

    @property
    def _addresses(self) -> list[str]:
        return [each for each in self.targets if not is_name(each)]

    def _about_bytes(self) -> Iterator[_Conflict]:
        """Yield what does not go together with looking at first bytes."""
        if not self.looks:
            return
        look = "sni" if self.sni else "host"
        yield (
            self.action != "allow",
            look, "it on a rule that allows, since it says which names are let pass",
            "leave it out: a deny by name refuses the query",
        )  # fmt: skip
        yield (
            self.protocol not in (None, "tcp"),
            look, f"the protocol tcp: {self.protocol} has no first bytes to look at",
            'write protocol="tcp", or leave out the protocol',
        )  # fmt: skip
        yield (
            not self.has_names or bool(self._addresses),
            look, "targets that are domain names, which the first bytes are compared with",
            "write a rule of its own for addresses",
        )  # fmt: skip
        yield (
            self.only is not None,
            look, 'no only="dns", since such a rule lets no flow pass', "leave out one of them",
        )  # fmt: skip

    def _about_names(self) -> Iterator[_Conflict]:
        """Yield what does not go together with settings that are about queries and their answers."""
        yield (
            self.private and (self.action == "deny" or not self.has_names or bool(self._addresses)),
            "private", "a rule that allows domain names: it is about their answers",
            "leave it out; an address is allowed by itself",
        )  # fmt: skip
        if self.only is not None:
            yield (
                not self.is_whole,
                "only", "no ports and no protocol, which a query does not have",
                'leave out ports and protocol, or only="dns"',
            )  # fmt: skip
            yield (
                bool(self._addresses),
                "only", "domain names, since a query is about a name",
                f"write {', '.join(self._addresses)} into a rule of its own",
            )  # fmt: skip
            yield (
                self.action == "ask",
                "only", "it on a rule that allows or denies: about queries nobody is asked", "leave it out",
            )  # fmt: skip
        yield (
            self.dns != "nxdomain" and not self.refuses_queries,
            "dns", "a deny rule by name for all ports, which refuses queries",
            "leave it out, or leave out ports and protocol",
        )  # fmt: skip

    def _about_refusals(self) -> Iterator[_Conflict]:
        """Yield what does not go together with the way in which flows are refused."""
        yield (
            self.action == "allow" and not self.looks and self.refusal != "prohibited",
            "refusal", "a rule that denies or asks, or one with sni or host", "leave it out",
        )  # fmt: skip
        yield (
            self.looks and self.refusal not in ("reset", "forbidden"),
            "refusal", "'reset' or 'forbidden': first bytes come when TCP is connected",
            "leave it out for 'reset'",
        )  # fmt: skip
        yield (
            self.only is not None and self.refusal != "prohibited",
            "refusal", "no refusal of flows, since the rule is about queries",
            "leave it out; dns says how queries are refused",
        )  # fmt: skip
        yield (
            self.refusal == "forbidden" and self.protocol not in (None, "tcp"),
            "refusal", f"the protocol tcp: {self.protocol} has no HTTP to answer",
            'write refusal="prohibited"',
        )  # fmt: skip

    def _spaces_are_some(self) -> bool:
        return not self.targets or any(
            spaces(self, ranges) for target in self.targets for ranges in ranges_of(target)
        )

    def _check_that_something_is_there(self, target: str) -> None:
        """Check that flows to a target can leave at all.  Raises `PolicyError`."""
        fix = "leave it out"
        if f".{target}".endswith(".localhost") or _is_part_of(target, LOOPBACK):
            fix = "for the host's loopback, allow the gateway's address, or HOST; see Uplink(allow_host_loopback=...)"
        elif not _is_part_of(target, MULTICAST) and not _is_part_of(target, NOWHERE):
            return
        expected = f"expected an address that flows can go to: nothing is ever sent to {target}"
        raise PolicyError(expected, "targets", repr(target), fix)


def _is_part_of(target: str, preset: Preset) -> bool:
    if target in PRESETS or is_name(target):
        return target == preset.name
    network = ip_network(target)
    return any(network.version == each.version and network.subnet_of(each) for each in preset)  # type: ignore[arg-type]  # they are of the same version


# -- targets ----------------------------------------------------------------------------------------------


def is_name(target: str) -> bool:
    """Return whether a target of a rule is a domain name or *.NAME.  Names that end in a number are no targets."""
    last = target.rpartition(".")[2]
    return target not in PRESETS and ":" not in target and "/" not in target and not last.isdigit()


def several(given: RuleTarget | Iterable[RuleTarget]) -> Iterable[RuleTarget]:
    """Return targets as a list, where one may be given alone.

    >>> several("10.0.0.0/8"), several(["a.example", "b.example"])
    (('10.0.0.0/8',), ['a.example', 'b.example'])
    """
    is_one = isinstance(given, str | Preset | IPv4Network | IPv6Network) or not isinstance(given, Iterable)
    return (given,) if is_one else given  # type: ignore[return-value]  # what is no target is refused by the rule


def ranges_of(target: str) -> list[PortRanges]:
    """Return the ports that a target is about by itself: those of a preset's parts."""
    return [ports for _, ports in PRESETS[target].parts] or [()] if target in PRESETS else [()]


def read_target(given: object) -> str:
    """Return a target in the form that rules keep.  Raises `PolicyError`."""
    if isinstance(given, Preset):
        return given.name
    if isinstance(given, IPv4Network | IPv6Network):
        return _network(given, given)
    if isinstance(given, IPv4Interface | IPv6Interface):
        return _network(given.ip, ip_network(given.ip))
    if isinstance(given, IPv4Address | IPv6Address):
        return _network(given, ip_network(given))
    if not isinstance(given, str):
        fix = None
        if isinstance(given, Iterable) and not isinstance(given, bytes):
            fix = "write the targets one after another, or *targets"
        raise _no_target(given, fix)
    if given in PRESETS:
        return given
    return _read_text(given)


def _network(given: object, network: AnyNetwork) -> str:
    if getattr(network.network_address, "scope_id", None) is not None:
        raise PolicyError("expected an address without a zone", "targets", shown(str(given)))
    inner = embedded_network(network)
    if inner is not None:
        raise PolicyError(
            "expected an address that embeds no other: what is sent there arrives at an IPv4 address",
            "targets", shown(str(given)), f'write "{network_text(inner)}", which covers it',
        )  # fmt: skip
    return network_text(network)


def _no_target(given: object, fix: str | None = None, but: str = "") -> PolicyError:
    expected = f"expected a domain name, *.NAME, an address, a network, or a preset{but}"
    return PolicyError(expected, "targets", shown(given), fix)


def _read_text(text: str) -> str:
    """Return a target that is given as text, but is no preset.  Raises `PolicyError`."""
    if text in ("*", "*.", ""):
        fix = "for everything, leave out the targets, or begin with Policy.allow() or Policy.ask()"
        raise _no_target(text, fix)
    if url := _URL.match(text):
        raise _no_target(text, _as_call(url[2], url[3] or SERVICES.get(url[1].lower())), ", not a URL")
    try:
        network = ip_network(text)
    except ValueError:
        pass
    else:
        return _network(text, network)
    if "/" in text:
        try:
            network = ip_network(text, strict=False)
        except ValueError:
            raise _no_target(
                text, "a network is ADDRESS/BITS, such as 10.0.0.0/8; a URL is no target"
            ) from None
        fix = f'write "{network}", or "{text.partition("/")[0]}" for the one address'
        raise PolicyError("expected a network without host bits", "targets", shown(text), fix)
    if (found := _RANGE.fullmatch(text)) and (networks := _summary(found[1], found[2])):
        raise _no_target(text, f"write {networks}", ", not a range of addresses")
    if found := _OCTETS.fullmatch(text):
        count = found[1].count(".")
        raise _no_target(text, f'write "{found[1]}{".".join("0" * (4 - count))}/{8 * count}"')
    if found := _HOST_PORT.fullmatch(text):
        raise _no_target(text, _as_call(found[1], found[2]), ", without a port")
    if text.startswith("[") and text.endswith("]"):
        raise _no_target(text, f'write "{text[1:-1]}"')
    return _read_name(text)


def _read_name(text: str) -> str:
    """Return a target that is a name or *.NAME.  Raises `PolicyError`."""
    below = text.startswith("*.")
    name = text[2:] if below else text
    fix = None
    short = name.removesuffix(".").upper()
    if "*" in name:
        base = name.rpartition("*")[2].lstrip(".-_")
        fix = f'write "*.{base}"' if "." in base else "a * stands before the first dot, for all names below"
        raise _no_target(text, fix, ", with a * only in front")
    if name.startswith("."):
        fix = f'write "*{name}" for the names below it, "{name[1:]}" for the name itself'
    elif NUMERIC.fullmatch(name):
        fix = "an IPv4 address has four numbers; a network is ADDRESS/BITS, such as 10.0.0.0/8"
    elif not below and short in PRESETS:
        fix = f'write "{short}" for the preset; no domain name is called so'
    elif not below and "." not in name and name.isupper():
        fix = f'presets are {", ".join(PRESETS)}; for the domain name, write "{name.lower()}"'
    elif any(each in name for each in _TWO_WAYS):
        fix = "write it as it is in DNS, with xn--: it is encoded in two ways, which are two names"
    if fix is not None or NO_NAME.search(name):
        raise _no_target(text, fix)
    try:
        plain = domain_names.to_text(domain_names.to_wire(name, "targets")).lower()
        domain_names.check_host_name(plain, "targets")
    except DomainNameError as error:
        raise _no_target(text, error.fix) from error
    return f"*.{plain}" if below else plain


def _as_call(host: str, port: object) -> str:
    """Return how targets and ports are written for a host and a port."""
    target = host[1:-1] if host.startswith("[") else host.lower()
    port = SERVICES.get(str(port), port)
    if port is None or not str(port)[0].isdigit():
        return f'write "{target}"'
    shown_port = port if str(port).isdigit() else f'"{port}"'
    return f'write "{target}" and ports={shown_port}'


def _summary(first: str, last: str) -> str:
    """Return the networks that a range of addresses is made of, as text; "" if it is no range."""
    try:
        low, high = ip_address(first), ip_address(last)
        networks = [network_text(each) for each in summarize_address_range(low, high)]
    except (ValueError, TypeError):
        return ""
    some = ", ".join(f'"{each}"' for each in networks[:6])
    return some if len(networks) <= 6 else f"{some} and so on"


# -- ports ------------------------------------------------------------------------------------------------


def read_ports(given: object) -> PortRanges:
    """Return ports as ranges in order, which neither overlap nor touch.  Raises `PolicyError`."""
    if given is None or given == ():
        return ()
    if isinstance(given, str) and "," in given:
        parts = [part.strip() for part in given.split(",") if part.strip()]
        inside = ", ".join(part if part.isdigit() else f'"{part}"' for part in parts)
        raise _ports_error(given, f"write [{inside}]")
    if isinstance(given, int | str) or not isinstance(given, Iterable):
        items: list[object] = [given]
    else:
        items = list(given)
    if not items:
        raise _ports_error(given, "leave ports out for all of them")
    merged: list[tuple[int, int]] = []
    for first, last in sorted(map(_port_range, items)):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return tuple(merged)


def _port_range(given: object) -> tuple[int, int]:
    fix = None
    if isinstance(given, int) and not isinstance(given, bool):
        first = last = given
    elif isinstance(given, str) and (found := _PORT_RANGE.fullmatch(given)):
        first, last = int(found[1]), int(found[2] or found[1])
    elif isinstance(given, range) and given.step == 1 and given:
        first, last = given[0], given[-1]
    elif isinstance(given, tuple) and len(given) == 2 and all(type(each) is int for each in given):
        first, last = given
    else:
        if isinstance(given, str) and given.lower() in SERVICES:
            fix = f"write {SERVICES[given.lower()]}"
        raise _ports_error(given, fix)
    if not 0 < first <= LARGEST_PORT or not 0 < last <= LARGEST_PORT:
        raise _ports_error(given, "leave ports out for all of them" if first == 0 else None)
    if first > last:
        raise _ports_error(given, f'write "{last}-{first}"')
    return first, last


def _ports_error(given: object, fix: str | None) -> PolicyError:
    expected = f'expected ports from 1 to {LARGEST_PORT}: 443, "8000-8999", or a list of such'
    return PolicyError(expected, "ports", shown(given), fix)


def ports_data(ports: PortRanges) -> list[int | str]:
    """Return ports as people write them, and files have them."""
    return [first if first == last else f"{first}-{last}" for first, last in ports]


def _some(items: Sequence[object]) -> str:
    """Return a list as messages show it, where it must not be long."""
    left_out = len(items) - SHOWN
    return ", ".join(map(str, items[:SHOWN])) + (f" and {left_out} more" if left_out > 0 else "")


def usual_refusal(looks: bool) -> RefusalName:
    """Return how a rule refuses that does not say it."""
    return "reset" if looks else "prohibited"


# -- what a rule is about, beside its targets -------------------------------------------------------------

ALL_PORTS: PortRanges = ((0, LARGEST_PORT),)
Spaces: TypeAlias = "dict[Transport, PortRanges]"
"""The ports of each transport that a rule is about; of ICMP it is all or none."""


def spaces(rule: Rule, within: PortRanges = ()) -> Spaces:
    """Return the ports that a rule is about, where a target is meant at some ports only."""
    ports = rule.ports or within
    if rule.ports and within:
        ports = tuple(
            (max(first, start), min(last, end))
            for first, last in rule.ports
            for start, end in within
            if max(first, start) <= min(last, end)
        )
        if not ports:
            return {}
    kinds: tuple[Transport, ...] = ("tcp", "udp") if ports else ("tcp", "udp", "icmp")
    return {each: ports or ALL_PORTS for each in kinds if rule.protocol in (None, each)}


def covers(whole: Spaces, part: Spaces) -> bool:
    """Return whether one has all ports of the other."""
    return all(
        any(
            start <= first and last <= end
            for start, end in whole.get(transport, ())
        )
        for transport, ranges in part.items()
        for first, last in ranges
    )  # fmt: skip


def meets(one: Spaces, other: Spaces) -> bool:
    """Return whether two have a port in common."""
    return any(
        max(first, start) <= min(last, end)
        for transport, ranges in one.items()
        for first, last in ranges
        for start, end in other.get(transport, ())
    )
