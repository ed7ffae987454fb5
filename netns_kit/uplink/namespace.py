"""NamespaceUplink: flows leave from another namespace, by sockets that are opened there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from netns_kit import arguments
from netns_kit.errors import ArgumentTypeError

from .dial import Dial
from .direct import DirectDial
from .elsewhere import AwaitedDial, NamespaceSockets, SocketSource
from .flow import Endpoint, Flow, Target
from .indirect import IndirectUplink, ProxyResolvers, UplinkOptions, is_direct
from .uplink import Uplink

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class NamespaceUplink(IndirectUplink):
    """The way out from another namespace: its interfaces, routes and addresses are those of the flows.

    The gateway's address still stands for the loopback of this host.  For pings, `net.ipv4.ping_group_range` of that
    namespace gets the group of its agent, if no group has been chosen there.

    Args:
        namespace: The `Namespace` that the flows leave from.  It must be open when the stack is opened.  When it has
            ended, the flows through it are ended and new ones refused; the stack goes on.
        resolvers: "proxy", the default: resolvers are asked from there, over TCP.  "host": from the host.
        options: The settings of any `Uplink`.  bind4, bind6 and device are of that namespace.

    Raises:
        AddressError: The argument bind4 or bind6 is no address: the interfaces of that namespace are not looked up by
            name.
        ArgumentError: A value cannot be used.
        ArgumentTypeError: An argument has the wrong type.
    """

    def __init__(
        self, namespace: Any, *, resolvers: ProxyResolvers = "proxy", **options: Unpack[UplinkOptions]
    ) -> None:
        module = sys.modules.get("netns_kit.namespace.namespace")  # whoever has one has imported it
        namespace = getattr(namespace, "_wrapped", namespace)  # of a `netns_kit.sync.Namespace`
        if module is None or not isinstance(namespace, module.Namespace):
            fix = "of a Network it is its `namespace`"
            raise ArgumentTypeError("expected a Namespace", "namespace", arguments.shown(namespace), fix)
        for version, knob, given in (4, "bind4", options.get("bind4")), (6, "bind6", options.get("bind6")):
            if given is not None:
                arguments.address(given, knob, version=version)
        super().__init__(names="here", resolvers=resolvers, **options)
        self.namespaces = (namespace,)
        self._shown = repr(namespace)
        self._sockets: NamespaceSockets | None = None

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"({self._shown}, ", 1).replace(", )", ")")

    def __getstate__(self) -> Mapping[str, object]:
        """Return what a worker and a stack have of it: they know the namespace by its sockets."""
        return {**self.__dict__, "namespaces": ()}

    def attached(self, tell: Callable[[str], object], sources: Iterator[SocketSource]) -> Self:
        made = super().attached(tell, sources)
        made._sockets = NamespaceSockets(next(sources), made._leaves_from, made._kept_ports)
        return made

    def check(self) -> None:
        """Check nothing: what the namespace has is seen when flows leave from there."""

    def ipv6_missing(self) -> str | None:
        return None  # a flow of IPv6 learns it

    def dial(self, flow: Flow, target: Target, *, ttl: int = 64, tos: int = 0) -> Dial:
        if is_direct(flow, target):
            return Uplink.dial(self, flow, target, ttl=ttl, tos=tos)
        there, destination = self._there(), flow.destination.address
        awaited = AwaitedDial(
            there,
            target.candidates[0],
            lambda: DirectDial(there.open, target.candidates, destination, ttl, tos).begin(),
        )
        return awaited.begin()

    def dial_resolver(self, flow: Flow, target: Target) -> Dial:
        if self.resolvers_by == "proxy" and target.candidates[0] in self._own_resolvers():
            return self.dial(flow, target)  # on its loopback, too
        return super().dial_resolver(flow, target)

    def _own_resolvers(self) -> tuple[Endpoint, ...]:
        """Return the resolvers that were given, and are not the host's."""
        return (*(self.dns.servers or ()), *(each for found in self.dns.domains.values() for each in found))

    def carriage(self, flow: Flow, target: Target) -> NamespaceSockets | None:
        return None if is_direct(flow, target) else self._there()

    def _there(self) -> NamespaceSockets:
        assert self._sockets is not None, "the stack has attached it"
        return self._sockets
