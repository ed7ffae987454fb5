"""Faults: what goes wrong on the way between a namespace and some of the world, as plain data.

>>> faults = Faults(loss=0.01, rate="10 Mbit/s", to="*.Example.ORG")
>>> faults.to, faults.bytes_per_second
(('*.example.org',), 1250000.0)
>>> Faults(rate="10 Mbit")
Traceback (most recent call last):
    ...
netns_kit.errors.ArgumentError: rate='10 Mbit': expected a number and a unit like "10 Mbit/s"; write "10 Mbit/s"
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias, TypedDict, cast

from netns_kit import arguments
from netns_kit.errors import ArgumentError, ArgumentTypeError, PolicyError
from netns_kit.frozen import frozen
from netns_kit.policy.rules import Rule, RulePorts, RuleTarget, is_name, several
from netns_kit.stack import Transport

FaultDirection: TypeAlias = Literal["both", "in", "out"]
"""The direction of a fault: "out" is from the namespace to the world, "in" is to the namespace."""
DnsFault: TypeAlias = Literal["nxdomain", "servfail", "timeout"]
"""What becomes of a query: it is answered by the result code NXDOMAIN or SERVFAIL, or not at all."""

QUEUE = 4 << 20
QUEUE_MAX = 1 << 28
SECONDS_MAX = 3600.0
STEPS_MAX = 1000

_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMG]i?)?(bit|B)/s\s*")
_ALMOST = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]i?)?\s*(?:(bits?|b)|(bytes?|B))?(?:/s|ps)?\s*")
_WITH_UNIT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|ms|s)\s*")
_UNITS = {"%": 0.01, "ms": 0.001, "s": 1.0}
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class FaultOptions(TypedDict, total=False):
    """The fields of `Faults`, as `UserStack.faults` takes them."""

    loss: float
    """Probability that a packet is lost, 0 to 1."""
    delay: float
    """Seconds that each packet takes, one way."""
    jitter: float
    """Seconds of which an evenly distributed part is added to the delay.  It reorders nothing."""
    rate: str | None
    """Limit of what passes in each direction, with headers, like "10 Mbit/s" or "1.5 MB/s"; None: none."""
    reorder: float
    """Probability that a packet is overtaken by one to three others."""
    duplicate: float
    """Probability that a packet comes twice."""
    corrupt: float
    """Probability that one bit of a packet is another."""
    queue: int
    """Bytes of memory that packets under way may use in each direction.  What is too much is lost."""
    blackhole: bool
    """True if all packets are lost."""
    refuse: bool
    """True if new flows are refused: connections by RST, other flows by ICMP port unreachable."""
    reset_after: int | None
    """Bytes of payload after which a connection is reset, on both sides; None: it is not."""
    dns: DnsFault | None
    """Fate of the queries at our DNS address that are about the names of `to`; None: they are answered."""
    dns_delay: float
    """Seconds that such a query waits before it is looked at."""
    direction: FaultDirection
    """Direction of the packets that are meant.  `refuse` and DNS have none."""
    to: RuleTarget | Iterable[RuleTarget]
    """Targets at the other end: names, addresses, networks and presets, as the rules of a `Policy` have them; one, or
    a list; none: everything.  An address has the names for which our DNS has given it."""
    ports: RulePorts | None
    """Ports at the other end, as of a rule; None: all."""
    protocol: Transport | None
    """Transport, "tcp", "udp" or "icmp"; None: all."""
    seed: int
    """Seed that all chances follow from."""


@frozen
class Faults:
    """A record of what goes wrong in a network; by default nothing does.

    Args:
        loss: Probability that a packet is lost, 0 to 1.
        delay: Seconds that each packet takes, one way.
        jitter: Seconds of which an evenly distributed part is added to the delay.  It reorders nothing.
        rate: Limit of what passes in each direction, with headers, like "10 Mbit/s" or "1.5 MB/s"; None: there is
            none.
        reorder: Probability that a packet is overtaken by one to three others.
        duplicate: Probability that a packet comes twice.
        corrupt: Probability that one bit of a packet is another.
        queue: Bytes of memory that packets under way may use in each direction.  What is too much is lost.
        blackhole: True if all packets are lost.
        refuse: True if new flows are refused: connections by RST, other flows by ICMP port unreachable.
        reset_after: Bytes of payload after which a connection is reset, on both sides; None: it is not.
        dns: Fate of the queries at our DNS address that are about the names of `to`; None: they are answered.
        dns_delay: Seconds that such a query waits before it is looked at.
        direction: Direction of the packets that are meant.  `refuse` and DNS have none.
        to: Targets at the other end: names, addresses, networks and presets, as the rules of a `Policy` have them;
            one, or a list; none: everything.  An address has the names for which our DNS has given it.
        ports: Ports at the other end, as of a rule; None: all.
        protocol: Transport, "tcp", "udp" or "icmp"; None: all.
        seed: Seed that all chances follow from.

    Raises:
        ArgumentError: A value that cannot be used, or not together with another one.
        ArgumentTypeError: An argument of another type.
    """

    loss: float
    delay: float
    jitter: float
    rate: str | None
    reorder: float
    duplicate: float
    corrupt: float
    queue: int
    blackhole: bool
    refuse: bool
    reset_after: int | None
    dns: DnsFault | None
    dns_delay: float
    direction: FaultDirection
    to: tuple[str, ...]
    ports: tuple[tuple[int, int], ...]
    protocol: Transport | None
    seed: int

    def __init__(
        self,
        loss: float = 0.0,
        delay: float = 0.0,
        jitter: float = 0.0,
        rate: str | None = None,
        reorder: float = 0.0,
        duplicate: float = 0.0,
        corrupt: float = 0.0,
        queue: int = QUEUE,
        blackhole: bool = False,
        refuse: bool = False,
        reset_after: int | None = None,
        dns: DnsFault | None = None,
        dns_delay: float = 0.0,
        direction: FaultDirection = "both",
        to: RuleTarget | Iterable[RuleTarget] = (),
        ports: RulePorts | None = None,
        protocol: Transport | None = None,
        seed: int = 0,
    ) -> None:
        if rate is not None:
            _bytes_per_second(rate)
        arguments.whole_number("queue", queue, 1 << 16, QUEUE_MAX)
        arguments.boolean("blackhole", blackhole)
        arguments.boolean("refuse", refuse)
        if reset_after is not None:
            arguments.whole_number("reset_after", reset_after, 0)
        if dns is not None:
            arguments.one_of("dns", dns, ("nxdomain", "servfail", "timeout"))
        arguments.one_of("direction", direction, ("both", "in", "out"))
        arguments.instance("seed", seed, int, "a whole number")
        rule = _rule(to, ports, protocol)
        loss, reorder = _chance("loss", loss), _chance("reorder", reorder)
        duplicate, corrupt = _chance("duplicate", duplicate), _chance("corrupt", corrupt)
        delay, jitter = _seconds("delay", delay), _seconds("jitter", jitter)
        dns_delay = _seconds("dns_delay", dns_delay)
        arguments.fill(self, locals(), to=rule.targets, ports=rule.ports)
        self._check_together()

    def _check_together(self) -> None:
        if self.disturbs_queries and self.to and not self.has_names:
            raise ArgumentError(
                "expected a domain name among them, since a query is about a name",
                "to",
                repr(self.to),
                "leave out to, for all names; or dns and dns_delay",
            )
        if self.reset_after is not None and self.protocol not in (None, "tcp"):
            raise ArgumentError(
                "expected the protocol tcp: nothing else is reset",
                "protocol",
                repr(self.protocol),
                "leave it out",
            )

    @property
    def rule(self) -> Rule:
        """The rule of a policy that is about the same flows."""
        return Rule("allow", self.to, self.ports, self.protocol)

    @property
    def has_names(self) -> bool:
        """True if one of the targets is a domain name."""
        return any(map(is_name, self.to))

    @property
    def disturbs_queries(self) -> bool:
        """True if queries are disturbed at our DNS address."""
        return self.dns is not None or self.dns_delay > 0

    @property
    def impairs(self) -> bool:
        """True if packets are lost, late, changed or doubled."""
        chances = self.loss, self.delay, self.jitter, self.reorder, self.duplicate, self.corrupt
        return any(chances) or self.rate is not None or self.blackhole

    @property
    def bytes_per_second(self) -> float | None:
        """The rate in bytes per second; None: there is no limit."""
        return None if self.rate is None else _bytes_per_second(self.rate)


Script: TypeAlias = tuple[tuple[float, Faults], ...]
"""Faults over time: each is in force from so many seconds after the beginning, until the next one is."""


def read_script(given: object) -> Script:
    """Return a script of faults in the form that an engine takes.

    Raises:
        ArgumentError, ArgumentTypeError: It is no sequence of times in order, each with its `Faults`.
    """
    expected = "a list of (seconds, Faults)"
    arguments.sequence("script", given, expected)
    steps: list[tuple[float, Faults]] = []
    for each in cast("Sequence[object]", given):
        if not (isinstance(each, tuple | list) and len(each) == 2 and isinstance(each[1], Faults)):
            raise ArgumentTypeError(f"expected {expected}", "script", arguments.shown(each))
        seconds = _number(
            "script", each[0], lambda value: 0 <= value < math.inf, "seconds from the beginning"
        )
        if steps and seconds <= steps[-1][0]:
            raise ArgumentError("expected times in order", "script", arguments.shown(given))
        steps.append((seconds, each[1]))
    if not 0 < len(steps) <= STEPS_MAX:
        raise ArgumentError(f"expected 1 to {STEPS_MAX} steps", "script", arguments.shown(given))
    return tuple(steps)


def _rule(to: RuleTarget | Iterable[RuleTarget], ports: RulePorts | None, protocol: Transport | None) -> Rule:
    """Return the rule that is about the same flows.  Raises `ArgumentError`."""
    try:
        return Rule("allow", several(to), ports, protocol)
    except PolicyError as error:
        knob = "to" if error.knob == "targets" else error.knob
        expected = f"expected {error.cause.removeprefix('expected ')}"
        raise ArgumentError(expected, knob, error.value, error.fix) from error


def _number(name: str, value: object, holds: Callable[[float], bool], expected: str) -> float:
    arguments.instance(name, value, (int, float), expected, _as_number(name, value))
    found = cast("float", value)
    if not holds(found):
        raise ArgumentError(f"expected {expected}", name, repr(value))
    return float(found)


def _as_number(name: str, value: object) -> str | None:
    """Return how to write text with a unit, like "1%" or "30ms", as the number that is meant; None: unknown."""
    found = _WITH_UNIT.fullmatch(value) if isinstance(value, str) else None
    return None if found is None else f"write {name}={float(found[1]) * _UNITS[found[2]]:g}"


def _chance(name: str, value: object) -> float:
    return _number(name, value, lambda value: 0 <= value <= 1, "a probability, 0 to 1")


def _seconds(name: str, value: object) -> float:
    return _number(name, value, lambda value: 0 <= value <= SECONDS_MAX, f"seconds, 0 to {SECONDS_MAX:g}")


def _bytes_per_second(given: object) -> float:
    """Return the bytes per second that text like "10 Mbit/s" means.  Raises `ArgumentError`."""
    expected = 'a number and a unit like "10 Mbit/s"'
    fix = None
    if isinstance(given, int | float):
        fix = f'write "{given} bit/s", or "{given} B/s" for bytes'
    arguments.text("rate", given, expected, fix)
    text = cast("str", given)
    found = _RATE.fullmatch(text)
    if found is None:
        almost = _ALMOST.fullmatch(text)
        if almost is not None and (almost[3] or almost[4]):
            prefix = almost[2] or ""
            prefix = "k" + prefix[1:] if prefix[:1] in ("k", "K") else prefix.capitalize()
            unit = "bit" if almost[3] else "B"
            fix = f'write "{almost[1]} {prefix}{unit}/s"'
        elif almost is not None:
            fix = f'write "{text.strip()}bit/s", or "{text.strip()}B/s" for bytes'
        raise ArgumentError(f"expected {expected}", "rate", arguments.shown(given), fix)
    amount = float(found[1]) * _FACTORS[found[2] or ""] / (8 if found[3] == "bit" else 1)
    if not 1 <= amount < math.inf:
        raise ArgumentError(f"expected {expected}, of one byte or more", "rate", arguments.shown(given))
    return amount
