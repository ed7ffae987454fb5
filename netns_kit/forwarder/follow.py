"""Following: host ports that come and go with what listens inside.

`Follower` asks the kernel of the namespace a few times a second what listens there (`SocketDiagnostics`).  As long as
the answer is the same, byte for byte, that is all.  Otherwise `wanted` says which forwards there should be, and
`changes` what has to be done for that.

A server that restarts is gone for a moment, so a forward is removed when its port was missing twice in a row.

What programs inside open is theirs to decide, and they may be hostile.  So an answer has a bound (`DUMP_MAX`), a long
one is asked for less often, and a rule makes `FORWARDS_MAX` forwards at most.  A port that the host does not give is
logged once, and tried again while it listens inside.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv6Address
from typing import NamedTuple

import anyio
import anyio.to_thread

from netns_kit.arguments import Address
from netns_kit.errors import (
    ArgumentError,
    NetnsKitError,
    NotFound,
    PortInUseError,
    PrivilegedPortError,
    StackClosed,
)
from netns_kit.gateway.admission import most_descriptors
from netns_kit.namespace.listening import ListeningSocket, Protocol, SocketDiagnostics
from netns_kit.namespace.namespace import Namespace
from netns_kit.subnet import Subnet

from .ports import Follow, Mode, PortForward, ReverseForward

PAUSE = 0.3  # seconds between two looks: what is missing twice is removed within a second
PAUSE_PER_BYTE = 0.4 / (1 << 20)  # of an answer, so that asking takes 1 % of the time
RETRY = 2.0  # seconds until a port that was refused is tried again
FORWARDS_MAX = 1024  # of each rule, and no more than a quarter of the descriptors: every one is a descriptor
AT_ONCE = 256  # ports that are added between two steps of the engine
EPHEMERAL = "net.ipv4.ip_local_port_range"

logger = logging.getLogger(__name__)


class _Way(NamedTuple):
    """A way to a socket inside: how much of a detour it is, and what a forward needs for it."""

    detour: int
    guest: Address | None
    mode: Mode


def wanted(
    follow: Follow, sockets: Iterable[ListeningSocket], subnet: Subnet, ephemeral: range, most: int
) -> dict[int, PortForward]:
    """Return the forwards that a rule makes of what listens inside, by port.

    Args:
        follow: The rule.
        sockets: What listens.
        subnet: The addresses of the namespace.
        ephemeral: The ports from which the kernel gives one to a socket that asks for none.  A UDP socket there is
            most likely a client's, so the rule has to include the port by its number.
        most: How many there may be.  Of more, the lowest ports have one.
    """
    ways: dict[int, list[_Way]] = {}
    for each in sockets:
        is_client = each.protocol == "udp" and each.port in ephemeral and not follow.include
        if each.protocol == follow.protocol and follow.covers(each.port) and not is_client:
            way = _way(follow, each, subnet)
            if way is not None:
                ways.setdefault(each.port, []).append(way)
    best = {
        port: min(ways[port], key=lambda way: (way.detour, str(way.guest))) for port in sorted(ways)[:most]
    }
    return {
        port: PortForward(follow.protocol, follow.host, port, way.guest, port, follow.device, way.mode)
        for port, way in best.items()
    }


def _way(follow: Follow, sock: ListeningSocket, subnet: Subnet) -> _Way | None:
    """Return how a socket inside is reached, or None if the rule's mode does not reach it."""
    address, mode = sock.address, follow.mode
    near = subnet.of(follow.host) or subnet  # to which a forward without an address leads
    far = subnet.ipv6 if near is subnet else subnet
    if address.is_unspecified:
        versions = {4, 6} if sock.v6only is False else {address.version}
        if near.network.version in versions or mode not in (None, "stack"):
            return _Way(0, None, mode or "stack")
        if far is not None:
            return _Way(1, far.guest, mode or "stack")
        return _Way(2, IPv6Address("::1"), "socket") if mode is None else None
    for detour, network in enumerate((near, far)):
        if network is not None and address in network.network:
            return _Way(detour, address, mode or "stack")
    if mode == "stack" or address.is_multicast or address.is_link_local:
        return None
    if address.is_loopback:
        return _Way(3, address, mode or "socket")
    if sock.protocol == "udp":  # it may be ours, with the address of a client (mode "transparent")
        return None
    return _Way(2, address, mode or "socket")


class Changes(NamedTuple):
    """What has to be done, so that the forwards are those that are wanted."""

    remove: list[int]
    """Ports, first."""
    add: list[PortForward]
    """Forwards, then."""
    missing: set[int]
    """Ports that are to be removed if they are missing the next time."""


def changes(
    made: Mapping[int, PortForward], wanted: Mapping[int, PortForward], missing: Collection[int]
) -> Changes:
    """Return what has to be done.

    Args:
        made: The forwards that there are, by port.
        wanted: The forwards that there should be.
        missing: What `changes` has returned the last time.
    """
    absent = [port for port in made if port not in wanted]
    moved = [port for port in made if port in wanted and wanted[port] != made[port]]
    remove = [*(port for port in absent if port in missing), *moved]
    add = [forward for port, forward in wanted.items() if made.get(port) != forward]
    return Changes(remove, add, set(absent).difference(remove))


class _Rule:
    """A rule, and what has become of it."""

    def __init__(self, follow: Follow, ephemeral: range) -> None:
        self.follow = follow
        self.ephemeral = ephemeral
        self.made: dict[int, PortForward] = {}
        self.missing: set[int] = set()
        self.refused: dict[int, float] = {}  # when to try again
        self._told: set[object] = set()

    def is_news(self, what: object) -> bool:
        """Return whether this was not asked about the same before."""
        is_news = what not in self._told
        self._told.add(what)
        return is_news

    def tell(self, what: object, message: str, *arguments: object) -> None:
        """Log something once."""
        if self.is_news(what):
            logger.warning(message, *arguments)


class Follower:
    """The rules of one forwarder, and the task that keeps up with what listens.

    Args:
        namespace: Where things listen.
        subnet: Returns the addresses of the namespace.
        reverses: Returns the forwards that lead out.  To follow what listens for one would lead in a circle.
        check: Raises `PrivilegedPortError` for forwards that may not be added.
        add: Adds forwards, all or none.
        remove: Removes one forward; `cut` as in `Forwarder.remove`.
        explained: Finds out who has a port of forwards that is taken, which takes its time.
    """

    def __init__(
        self,
        namespace: Namespace,
        subnet: Callable[[], Subnet],
        reverses: Callable[[], Iterable[ReverseForward]],
        check: Callable[[Sequence[PortForward]], object],
        add: Callable[[Sequence[PortForward]], Awaitable[object]],
        remove: Callable[..., Awaitable[object]],
        explained: Callable[[PortInUseError, Sequence[PortForward]], Awaitable[PortInUseError]],
    ) -> None:
        self._namespace = namespace
        self._subnet = subnet
        self._reverses = reverses
        self._check, self._add, self._remove = check, add, remove
        self._explained = explained
        self._rules: dict[Follow, _Rule] = {}
        self._lock = anyio.Lock()
        self._diagnostics: SocketDiagnostics | None = None
        self._seen: list[bytes] | None = None  # by the last look
        self._look_again = math.inf  # the time at which to look closely, even if nothing has changed
        self.is_running = False

    def follows(self) -> dict[Follow, tuple[PortForward, ...]]:
        """Return the rules, oldest first, with the forwards that each has made."""
        return {follow: tuple(rule.made.values()) for follow, rule in self._rules.items()}

    async def add(self, follows: Sequence[Follow]) -> tuple[PortForward, ...]:
        """Follow by more rules, and return the forwards that they have made at once.

        Raises:
            FeatureUnavailable: This kernel has no socket diagnostics.

        Cancellation: The rules may have been added.
        """
        low, high = map(int, (await self._namespace.get_sysctl(EPHEMERAL)).split())
        async with self._lock:
            new = [_Rule(each, range(low, high + 1)) for each in follows if each not in self._rules]
            self._rules |= {rule.follow: rule for rule in new}
            with anyio.CancelScope(shield=True):
                try:
                    await self._look(closely=True)
                except BaseException:
                    for rule in new:
                        await self._end(rule)
                    raise
            return tuple(forward for follow in follows for forward in self._rules[follow].made.values())

    async def remove(self, follow: Follow, *, cut: bool = False) -> bool:
        """End a rule and its forwards.  Return whether there was one like that.

        Args:
            follow: The rule.
            cut: As in `Forwarder.remove`.

        Cancellation: The rule may have ended.
        """
        async with self._lock:
            rule = self._rules.get(follow)
            if rule is None:
                return False
            with anyio.CancelScope(shield=True):
                await self._end(rule, cut=cut)
            return True

    async def _end(self, rule: _Rule, *, cut: bool = False) -> None:
        del self._rules[rule.follow]
        while rule.made:
            await self._remove_one(rule, next(iter(rule.made)), cut=cut)

    async def _remove_one(self, rule: _Rule, port: int, *, cut: bool = False) -> None:
        with suppress(NotFound):  # the user has removed it
            await self._remove(rule.made.pop(port), cut=cut)

    async def run(self) -> None:
        """Keep up with what listens until there are no rules.  Raises what is wrong with the namespace."""
        try:
            while self._rules:
                await anyio.sleep(max(PAUSE, PAUSE_PER_BYTE * sum(map(len, self._seen or ()))))
                async with self._lock:
                    await self._look()
        except StackClosed:  # it has closed the listeners, too
            return
        finally:
            self.is_running = False

    def close(self) -> None:
        """Close what the looks need."""
        if self._diagnostics is not None:
            self._diagnostics.close()
            self._diagnostics = None

    async def _look(self, *, closely: bool = False) -> None:
        """Bring the forwards in line with what listens."""
        seen = await self._dump()
        now = anyio.current_time()
        if seen is None or (seen == self._seen and now < self._look_again and not closely):
            return
        assert self._diagnostics is not None
        ours = {(each.protocol, each.inside, each.inside_port) for each in self._reverses()}
        found = await self._diagnostics.parse(seen)
        sockets = [each for each in found if (each.protocol, each.address, each.port) not in ours]
        self._seen, self._look_again = seen, math.inf
        most = min(FORWARDS_MAX, most_descriptors() // 4)
        for rule in list(self._rules.values()):
            # in a thread: there may be thousands
            goal = await anyio.to_thread.run_sync(
                wanted, rule.follow, sockets, self._subnet(), rule.ephemeral, most + 1
            )
            if len(goal) > most:
                rule.tell("most", "%s: no more than %d ports are forwarded", rule.follow, most)
                goal.popitem()
            await self._apply(rule, goal, now)

    async def _dump(self) -> list[bytes] | None:
        """Return what listens, as the kernel says it; None if that is too much."""
        protocols: list[Protocol] = sorted({follow.protocol for follow in self._rules})
        if self._diagnostics is None:
            self._diagnostics = await self._namespace.diagnostics()
        try:
            return await self._diagnostics.dump(protocols)
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError) or isinstance(error, NetnsKitError):
                raise
            for rule in self._rules.values():
                rule.tell("dump", "what listens inside is not followed at the moment: %s", error)
            return None

    async def _apply(self, rule: _Rule, wanted: dict[int, PortForward], now: float) -> None:
        rule.refused = {port: due for port, due in rule.refused.items() if port in wanted}
        todo = changes(rule.made, wanted, rule.missing)
        for port in todo.remove:
            await self._remove_one(rule, port)
        rule.missing = todo.missing
        if rule.missing:
            self._look_again = now
        forwards = self._allowed(
            rule, [each for each in todo.add if rule.refused.get(each.host_port, now) <= now], now
        )
        for start in range(0, len(forwards), AT_ONCE):
            await self._try(rule, forwards[start : start + AT_ONCE], now)
        self._look_again = min([self._look_again, *rule.refused.values()])

    def _allowed(self, rule: _Rule, forwards: list[PortForward], now: float) -> list[PortForward]:
        """Return those whose port needs no privilege that this process lacks."""
        try:
            self._check(forwards)
        except PrivilegedPortError as error:
            rule.tell("low", "%s: ports that need a privilege are not forwarded: %s", rule.follow, error)
            start = int(str(error.value))
            rule.refused.update({each.host_port: now + RETRY for each in forwards if each.host_port < start})
            return [each for each in forwards if each.host_port >= start]
        return forwards

    async def _try(self, rule: _Rule, forwards: list[PortForward], now: float) -> None:
        """Add forwards: all at once, or else one by one, if another socket has one of the ports."""
        try:
            await self._add(forwards)
            rule.made |= {each.host_port: each for each in forwards}
            return
        except (OSError, ArgumentError) as error:
            if len(forwards) == 1 or not isinstance(error, PortInUseError):
                for each in forwards:
                    rule.refused[each.host_port] = now + RETRY
                await self._tell(rule, forwards[0], error)
                return
        for each in forwards:
            await self._try(rule, [each], now)

    async def _tell(self, rule: _Rule, forward: PortForward, error: OSError | ArgumentError) -> None:
        what = forward.host_port if isinstance(error, PortInUseError) else type(error)
        if rule.is_news(what):
            why = await self._explained(error, [forward]) if isinstance(error, PortInUseError) else error
            logger.warning("%s: not forwarded at the moment: %s", forward, why)
