"""InMemoryUplink: an uplink without a socket, whose flows and names the caller's process answers.

The stack asks the caller's side what becomes of each flow and each query (`netns_kit.gateway.in_memory`), so this
object has only what can be decided without it: what no packet may be sent to.  A worker gets one that is no more than
its settings.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, NamedTuple

from netns_kit.dns import Manner, ResolvConf
from netns_kit.stack import Refusal, Transport

from .dial import Dial, Refused
from .dns_settings import DnsSettings
from .flow import DNS_PORT, Endpoint, Flow, Target, Way
from .uplink import Uplink, is_reachable

if TYPE_CHECKING:
    from netns_kit.policy.policy import Policy

RESOLVERS = (Endpoint("192.0.2.53", DNS_PORT),)  # which stand for the caller's side; nothing is sent to them
MANNER = Manner(timeout=30, attempts=1, patience=30)


class Waiting(NamedTuple):
    """A dial without a descriptor: the caller's side says what becomes of it, and brings a socket."""

    target: Endpoint
    """Where the flow leads."""

    def fileno(self) -> int:
        """Return no descriptor: only relays of `netns_kit.gateway.in_memory` can wait for this dial."""
        return -1

    def advance(self, *, failed: bool) -> Dial:
        """Return this."""
        return self

    def close(self) -> None:
        """Do nothing."""


class InMemoryUplink(Uplink):
    """The settings of an uplink whose flows the caller's process has.

    Args:
        policy: See `Uplink`.
        any_source: See `Uplink`.
        search: The search list for programs inside.

    Attributes:
        world: What answers on the caller's side; None in a worker.
    """

    is_in_memory = True
    world: Any = None

    def __init__(
        self,
        policy: Policy | Callable[[Flow], Refusal | None] | None = None,
        any_source: bool = False,
        search: Iterable[str] = (),
    ) -> None:
        super().__init__(
            policy=policy, any_source=any_source, dns=DnsSettings(RESOLVERS, search=tuple(search))
        )

    def _target(self, flow: Flow) -> Target | Refusal:
        address, port = flow.destination
        local = flow.subnet.of(address)
        if local is None:
            return Refusal.NET_UNREACHABLE
        if address == local.dns:
            if port == DNS_PORT and flow.protocol != "icmp":
                return Target(RESOLVERS)
            return Target() if flow.served else Refusal.RESET
        if flow.served:
            return Target()
        if not is_reachable(address):
            return Refusal.PROHIBITED
        return Target((flow.destination,))

    def dial(self, flow: Flow, target: Target, *, ttl: int = 64, tos: int = 0) -> Dial:
        return Waiting(target.candidates[0]) if target.candidates else Refused(Refusal.HOST_UNREACHABLE)

    def open(self, protocol: Transport, target: IPv4Address | IPv6Address, port: int = 0) -> socket.socket:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    def dns_manner(self) -> Manner:
        return MANNER

    def way_by(
        self, host: IPv4Address | IPv6Address, device: str | None, target: IPv4Address | IPv6Address
    ) -> Way | None:
        return None

    def ipv6_missing(self) -> str | None:
        return None

    def _host_conf(self) -> ResolvConf:
        return self._conf  # no file: the host has no part in this
