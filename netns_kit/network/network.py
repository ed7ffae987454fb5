"""Network: the five objects wired, for the common case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import NoneType
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from netns_kit import arguments
from netns_kit.display.displayed import Displayed
from netns_kit.errors import ArgumentError, NamespaceGone, NotFound, StackClosed
from netns_kit.forwarder.forwarder import Forwarder
from netns_kit.forwarder.ports import Follow, PortForward, ReverseForward
from netns_kit.forwarder.specs import parse_all, parse_reverse
from netns_kit.gateway.setup import Setup, StackOptions
from netns_kit.namespace.background import Supervisor
from netns_kit.namespace.namespace import Namespace
from netns_kit.subnet import Subnet
from netns_kit.tap.device import TapDevice
from netns_kit.uplink.uplink import Uplink
from netns_kit.userstack.userstack import UserStack

from .hub import Hub
from .internal import internal_uplink
from .member_options import MemberOptions, MemberSetup
from .members import Member, Members
from .network_route import NetworkRoute
from .place import Place

if TYPE_CHECKING:
    from netns_kit.display.view import View
    from netns_kit.gateway.faults import FaultOptions, Faults
    from netns_kit.userstack.faults import FaultsBlock

DEFAULT_MTU = 1500
DEFAULT_IFNAME = "tap0"


class Network(Displayed, Place):
    """A namespace with real connectivity, while the object is open.

        async with Network(ports=["127.0.0.1:8080:80"]) as net:
            await net.run(["curl", "http://example.com"])

    Opening returns when address, route, DNS and ports work.  The parts are the attributes `namespace`, `tap`, `stack`
    and `forwarder`.

    If the namespace or the stack fails, every call raises that, those under way at once, and so does closing:
    `NamespaceGone`, `DeviceGone` or `StackCrashed`.

    A network may have members, which are further namespaces on the same subnet with names (docs/networks.md):

        async with Network() as net, net.member("web", ports=["8080:80"]) as web, net.member("db") as db:
            await web.run(["psql", "-h", "db"])

    Its own namespace is their hub then: commands in it see all of them, and are to be trusted.

    Args:
        uplink: The way out for flows; None: an `Uplink` without options, by which the host's loopback cannot be
            reached.
        ports: The host ports that are forwarded from the start, see `netns_kit.forwarder.specs`.
        reverse: The ports inside that lead out from the start, like "5432:127.0.0.1:5432": where to listen inside,
            and where that leads, see `Forwarder.reverse`.
        ifname: The name of the interface inside.
        mtu: The MTU of the interface, see `TapDevice.open`.
        queues: The number of queues of the interface, see `TapDevice.open`.
        namespace: A namespace that is not open yet; None: a new one, see `Namespace.create`.
        internal: Whether there is no way out: programs reach each other, what this process answers, and nothing else.
            Published ports lead in all the same.
        isolate: Whether members do not reach each other.
        guard: Whether the kernel drops what a member sends with the address, the link address or the neighbour
            advertisements of another.  It takes nf_tables; a kernel without it raises `FeatureUnavailable` with the
            first member.
        options: The settings of the stack, see `StackOptions`.

    Raises:
        ArgumentError: An argument that cannot be used, or not together with another.
        ArgumentTypeError: An argument of another type.
        AddressError, DomainNameError, NotImportable, PortSpecError, RecordError: As its parts raise them.
        NetnsKitError, OSError: On opening, what its parts raise.
    """

    namespace: Namespace
    """The namespace."""
    tap: TapDevice
    """Its interface."""
    stack: UserStack
    """The stack on the interface."""
    forwarder: Forwarder
    """The ports that lead inside, and those inside that lead out."""
    ports: list[PortForward | Follow]
    """The host ports that were forwarded from the start, as they were given."""
    reverse: list[ReverseForward]
    """The ports inside that led out from the start, as they were given."""

    @arguments.spelled_out(Setup.of)
    def __init__(
        self,
        *,
        uplink: Uplink | None = None,
        ports: Iterable[str | PortForward | Follow] = (),
        reverse: Iterable[str | ReverseForward] = (),
        ifname: str = DEFAULT_IFNAME,
        mtu: int = DEFAULT_MTU,
        queues: int = 1,
        namespace: Namespace | None = None,
        internal: bool = False,
        isolate: bool = False,
        guard: bool = True,
        **options: Unpack[StackOptions],
    ) -> None:
        arguments.items("ports", ports, "a list of ports")
        arguments.instance(
            "namespace", namespace, (Namespace, NoneType), "a Namespace, or None for a new one"
        )
        for name, flag in (("internal", internal), ("isolate", isolate), ("guard", guard)):
            arguments.boolean(name, flag)
        if internal:
            uplink = internal_uplink(uplink)
        self.namespace = namespace or Namespace.create()
        self.tap = TapDevice.open(self.namespace, ifname, mtu=mtu, queues=queues)
        self.stack = UserStack(self.tap, uplink, **options)
        self.forwarder = Forwarder(self.stack)
        self.supervisor = Supervisor(
            type(self).__name__,
            NamespaceGone,
            self.namespace.supervisor,
            self.stack.supervisor,
            one_loop=True,
        )
        self.ports = parse_all(ports)
        arguments.items("reverse", reverse, "a list of reverse forwards")
        self.reverse = [each if isinstance(each, ReverseForward) else parse_reverse(each) for each in reverse]
        self.is_internal = internal
        """Whether there is no way out."""
        self.is_isolated = isolate
        """Whether members do not reach each other."""
        self._hub = Hub(self.tap, isolate=isolate, guarded=guard)
        self._members = Members(self.stack, self.supervisor, self._hub)

    def __repr__(self) -> str:
        ports = f", {len(self.ports)} forwarded" if self.ports else ""
        return f"<Network {self.subnet}{ports}: {self.supervisor.condition}>"

    def _view(self) -> View:
        from .display import network_view

        return network_view(self)

    @property
    def subnet(self) -> Subnet:
        """The addresses of the namespace."""
        return self.stack.subnet

    async def _open(self) -> None:
        await self.namespace.open()
        self.tap = await self.tap
        await self.stack.open()
        await self.forwarder.open()
        self.supervisor.start(self._watch_forwarder)
        await self.forwarder.add(*self.ports)
        for each in self.reverse:
            await self.forwarder.reverse(each)

    async def _watch_forwarder(self) -> None:
        with suppress(StackClosed):
            await self.forwarder.wait_closed()

    async def _close(self) -> None:
        await self._members.close()
        await self._hub.close()
        await self.forwarder.supervisor.end()  # what has failed is raised by our own supervisor
        await self.stack.supervisor.end()
        await self.tap.close()
        await self.namespace.supervisor.end()

    @property
    def members(self) -> dict[str, Member]:
        """The members that are open, or are being opened, by their names."""
        return dict(self._members.by_name)

    @arguments.spelled_out(MemberSetup.of)
    def member(self, name: str, **options: Unpack[MemberOptions]) -> Member:
        """Return a new member of the network, to open: `async with net.member("db") as db`.

        Opening returns when others reach it by its name, and its ports work.  The first member makes a bridge in the
        network's own namespace, which has the namespace's addresses from then on.

        Args:
            name: Its name, by which others reach it.
            options: See `MemberOptions`.

        Raises:
            ArgumentError: An argument that cannot be used; on opening, a name or an interface that there is.
            ArgumentTypeError: An argument of another type.
            AddressError: An address that cannot be used; on opening, one that another has.
            DomainNameError, PortSpecError: As its parts raise them.
            FeatureUnavailable: On opening, for want of bridges, veth or nf_tables in this kernel.
            NotPrivileged: On opening, for a namespace that is another user's.
            NetnsKitError, OSError: On opening, what its parts raise.
        """
        return self.member_of(MemberSetup.of(name, **options))

    def member_of(self, setup: MemberSetup) -> Member:
        """Return a new member with settings that have been checked, as `member` does; for parts of this library.

        Args:
            setup: The settings.

        Raises:
            ArgumentError: The network's own namespace is not configured.
        """
        self._check_configured("with members")
        return Member(self._members, setup)

    def _check_configured(self, what: str) -> None:
        if self.stack.setup.configure is not True:
            expected = f"expected True for a network {what}"
            raise ArgumentError(expected, "configure", repr(self.stack.setup.configure))

    @arguments.spelled_out(MemberSetup.of)
    async def add_member(self, name: str, **options: Unpack[MemberOptions]) -> Member:
        """Return a member that is open.  It ends by `remove_member`, by its `close`, or with the network.

        Args:
            name: Its name.
            options: See `MemberOptions`.

        Raises:
            ArgumentError, AddressError, FeatureUnavailable, NetnsKitError, OSError: As `member` says.

        Cancellation: There is no new member.
        """
        return await self.member(name, **options).open()

    async def remove_member(self, member: str | Member) -> None:
        """End a member: its commands, names and ports, and its addresses.

        Args:
            member: The member, or its name.

        Raises:
            NotFound: There is no such member.

        Cancellation: The member ends all the same, and the cancellation takes effect after that.
        """
        name = member.name if isinstance(member, Member) else member
        found = self._members.by_name.get(name)
        if found is None or (isinstance(member, Member) and found is not member):
            raise NotFound(
                f"there is no member {arguments.shown(name)}", fix="`members` tells which there are"
            )
        await found.supervisor.end()

    def route_to(self, other: Network) -> NetworkRoute:
        """Return a route between the members of this network and those of another, to open.

            async with net.route_to(other): ...
            await net.route_to(other).open()

        It is open for both directions, and ends with either network too.  By it members reach the members and the
        hub of the other network by their addresses, and nothing else: neither its stack, with its way out and its
        names, nor what that network has a route to.

        Args:
            other: The other network, of the same event loop.

        Raises:
            AddressError: The networks have addresses in common.
            ArgumentError: It is the same network; or, on opening, there is a route already.
            ArgumentTypeError: It is no network.
            FeatureUnavailable: On opening, for want of bridges, veth, nf_tables or rules of routing in this kernel.
            NetnsKitError, OSError: On opening, what its parts raise.
        """
        arguments.instance("other", other, Network, "a Network")
        for each in (self, other):
            each._check_configured("with a route")
        return NetworkRoute(self._members, other._members)

    async def files(self) -> dict[str, str]:
        return await self._members.files()

    async def _live_files(self) -> Mapping[str, str]:
        return await self._members.files_for(self.namespace)

    def faults(
        self,
        faults: Faults | None = None,
        *,
        script: Iterable[tuple[float, Faults]] | None = None,
        **options: Unpack[FaultOptions],
    ) -> FaultsBlock:
        """Return faults of the network, to be used in `async with`: see `UserStack.faults`.

        Args:
            faults: The faults.
            script: Faults over time, instead.
            options: The fields of `Faults`, instead.

        Raises:
            ArgumentError, ArgumentTypeError: An argument that cannot be used.
            StackClosed: On entering, the network is not open.

        Cancellation: The faults are over.
        """
        return self.stack.faults(faults, script=script, **options)
