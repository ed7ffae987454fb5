"""Member: one namespace of a network of several; and Members, what those of one network have in common.

A member takes its names and addresses first, which nobody else of the network has from then on.  Then its namespace
is opened, if it is not open yet, and its end of a pair of veth is made and configured.  Its records and its ports
come last, so whoever finds its name can reach it.  It ends in the opposite order, also when its namespace does: its
names and addresses are free then.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from typing import TYPE_CHECKING, BinaryIO, Literal, TextIO, TypeVar

import anyio
from anyio.abc import TaskStatus
from anyio.lowlevel import RunVar
from typing_extensions import Unpack

from netns_kit import arguments
from netns_kit.arguments import AddressLike
from netns_kit.child.codec import dump
from netns_kit.dhcp import StaticLease
from netns_kit.dns import Record, Zone
from netns_kit.errors import ArgumentError, NamespaceGone, NetnsKitError, StackClosed
from netns_kit.forwarder.forwarder import Forwarder
from netns_kit.gateway.gateway import NAMES, FlowInfo, Gateway
from netns_kit.gateway.setup import check_policy
from netns_kit.namespace.background import Openable, Supervisor, finish
from netns_kit.namespace.given import LiveText
from netns_kit.namespace.namespace import Namespace
from netns_kit.policy.policy import Policy
from netns_kit.subnet import Subnet
from netns_kit.userstack.capture import Capture, CaptureOptions
from netns_kit.userstack.events import Event
from netns_kit.userstack.serving import GuestStream
from netns_kit.userstack.userstack import Follower, UserStack

from .addresses import AddressPool, address6_of, check_apart, link_local_of, mac_of
from .guard import Port
from .hub import Hub
from .member_forwarder import MemberForwarder
from .member_options import MemberSetup
from .place import Place
from .shown import HOSTS, shown_files

if TYPE_CHECKING:
    from netns_kit.gateway.faults import FaultOptions, Faults
    from netns_kit.userstack.faults import FaultsBlock

T = TypeVar("T")
logger = logging.getLogger(__name__)
TTL = 0  # of the records of members, which come and go
_twins: RunVar[dict[tuple[int, int], list[Member]]] = RunVar(
    "members by the device and inode of their namespace"
)
RESERVED = frozenset({"localhost", *NAMES})


class Members:
    """The members of one network, by their names, and what they have in common."""

    def __init__(self, stack: UserStack, supervisor: Supervisor, hub: Hub) -> None:
        self.stack = stack
        self.supervisor = supervisor
        self.hub = hub
        self.by_name: dict[str, Member] = {}
        self.pool = AddressPool(stack.subnet)
        self.routes: dict[Members, Openable] = {}
        """The routes, by the members of the other network."""
        self._readers: dict[Namespace, Member | None] = {}  # where commands may see names
        self._telling = anyio.Lock()
        self.is_ending = False
        """Whether the network ends, and with it all that the kernel has of its members."""

    def admit(self, member: Member) -> None:
        """Take a member in by its names.

        Raises:
            ArgumentError: Another has one of them.
        """
        aliases = {alias for each in self.by_name.values() for alias in each.aliases}
        if member.name in RESERVED or member.name in aliases or member.name in self.by_name:
            raise ArgumentError("expected a name that nobody has in this network", "name", repr(member.name))
        for alias in member.aliases:
            if alias in RESERVED or alias in self.by_name:
                expected = "expected aliases that are not the name of another"
                raise ArgumentError(expected, "aliases", repr(alias))
        self.by_name[member.name] = member

    def dismiss(self, member: Member) -> None:
        """Forget a member."""
        if self.by_name.get(member.name) is member:
            del self.by_name[member.name]

    async def files(self, member: Member | None = None) -> dict[str, str]:
        """Return the files that commands see in the hub, or in a member.

        Raises:
            StackClosed: The stack is not open.
        """
        if member is None:
            return await shown_files(self.stack)
        files = await shown_files(self.stack, member.policy, member._beside)
        if (first := member._first) is not member:  # both write the same hosts file
            files[HOSTS] = (await first.files())[HOSTS]
        return files

    async def files_for(self, namespace: Namespace, member: Member | None = None) -> dict[str, str]:
        """Return the files for a command in a namespace, where the hosts file changes with the members from now on.

        Raises:
            StackClosed: The stack is not open.
        """
        self._readers.setdefault(namespace, member)
        files = await self.files(member)
        return {**files, HOSTS: LiveText(files[HOSTS])}

    def forget(self, namespace: Namespace) -> None:
        """Tell a namespace of no names any more."""
        self._readers.pop(namespace, None)

    async def tell(self, *others: Member) -> None:
        """Have all commands and queries see the names that there are now.

        Args:
            others: Members of other networks that may have seen names of this one, beside those that do now.
        """
        seeing = {self, *(each._members for each in others)}
        seeing.update(each._members for member in self.by_name.values() for each in member._twins)
        for members in seeing:
            await members._tell()

    async def _tell(self) -> None:
        async with self._telling:
            for member in list(self.by_name.values()):
                with suppress(NetnsKitError):  # the stack has ended
                    await member._show_names()
            texts: dict[object, str] = {}
            for namespace, reader in list(self._readers.items()):
                first = None if reader is None else reader._first
                sees = None if first is None else (first._members, first.policy, first._beside)
                with suppress(NetnsKitError):  # one of them has ended
                    if sees not in texts:
                        texts[sees] = (await self.files(reader))[HOSTS]
                    await namespace.rewrite_files({HOSTS: texts[sees]})

    async def close(self) -> None:
        """End all routes and members."""
        for route in list(self.routes.values()):
            await route.supervisor.end()
        self.is_ending = True
        async with anyio.create_task_group() as tasks:
            for member in list(self.by_name.values()):
                tasks.start_soon(member.supervisor.end)


class Member(Place):
    """A namespace of a network of several, while the object is open.

    `Network.member` and `Network.add_member` make one.  The others of the network reach it by its names, and it has
    their way out, their DNS and host ports of its own.  Commands are run in it as in a `Network`.

    If its namespace ends, so does the member: every call raises `NamespaceGone`, and its names and addresses are
    free.  The network goes on.  If the network fails, so do its members.

    Args:
        members: Those of the network.
        setup: The settings.
    """

    link = "veth"
    """What joins it to the network: a pair of veth and a bridge of the kernel."""

    def __init__(self, members: Members, setup: MemberSetup) -> None:
        self.name = setup.name
        """Its name in the network."""
        self.aliases = setup.aliases
        """Its other names."""
        self.ifname = setup.ifname or "eth0"
        """The name of its interface."""
        self.namespace = setup.namespace or Namespace.create(ids=setup.ids)
        """Its namespace."""
        self.policy = setup.policy
        """The policy of its own that was set last; None: that of the network decides."""
        self._setup = setup
        self._is_kept = self.namespace.supervisor.condition == "open"  # by the caller
        self._members = members
        self._twins: list[Member] = []  # the members that are its namespace, itself included
        self._shown: tuple[Record, ...] = ()
        self._address: IPv4Address | None = None
        self._address6: IPv6Address | None = None
        self._port: Port | None = None
        self._is_linked = False
        self._records: list[Record] = []
        self.forwarder: Forwarder = MemberForwarder(
            members.stack, self.namespace, lambda: self.subnet, lambda: self.addresses
        )
        """Its ports, see `Forwarder`."""
        self.supervisor = Supervisor(
            type(self).__name__, NamespaceGone, members.supervisor, self.namespace.supervisor, one_loop=True
        )

    def __repr__(self) -> str:
        where = "" if self._address is None else f" {self._address}"
        return f"<Member {self.name}{where}: {self.supervisor.condition}>"

    @property
    def address(self) -> IPv4Address:
        """The IPv4 address.

        Raises:
            NamespaceGone: The member has not been opened.
        """
        return self._opened(self._address)

    @property
    def address6(self) -> IPv6Address | None:
        """The IPv6 address; None if the network has no IPv6."""
        return self._address6

    @property
    def addresses(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """The addresses, that of IPv4 first.

        Raises:
            NamespaceGone: The member has not been opened.
        """
        return self.address, *([] if self._address6 is None else [self._address6])

    @property
    def mac(self) -> str:
        """The link address of its interface.

        Raises:
            NamespaceGone: The member has not been opened.
        """
        return self._opened(self._port).mac.hex(":")

    @property
    def _guests(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """All addresses that it may send with, that of its link included."""
        return self._opened(self._port).addresses

    def _opened(self, value: T | None) -> T:
        if value is None:
            raise NamespaceGone(
                "the Member is not open", fix="enter it with `async with`, or await its open() first"
            )
        return value

    @property
    def subnet(self) -> Subnet:
        """The addresses of the network, with the member's own as that of the guest."""
        return self._members.stack.subnet.with_guest(self.address, self._address6)

    @property
    def _first(self) -> Member:
        """The member that says what is in the hosts file of its namespace."""
        alike = (each for each in self._twins if each.namespace is self.namespace)
        return next((each for each in alike if each._members.stack.supervisor.condition == "open"), self)

    @property
    def _beside(self) -> tuple[Record, ...]:
        """The records of the other networks that its namespace is of."""
        others = (each._members for each in self._twins if each is not self)
        there = (member for each in others for member in each.by_name.values() if member._is_named)
        return tuple(record for member in there for record in member._own_records(self._members.stack))

    @property
    def _is_named(self) -> bool:
        """Whether others find it by its names."""
        return bool(self._records)

    async def _show_names(self) -> None:
        """Have its queries be answered with the names beside.

        Raises:
            StackClosed: The stack is not open.
        """
        if (beside := self._beside) != self._shown:
            self._shown = beside
            await self._members.stack.ask(Zone.show, self._guests, beside)

    async def _open(self) -> None:
        members, stack, hub = self._members, self._members.stack, self._members.hub
        stack.supervisor.check()
        if self.namespace is stack.namespace:
            expected = "expected another namespace than the network's own, which has the bridge"
            raise ArgumentError(expected, "namespace", repr(self.namespace))
        if self.policy is not None:
            self._check_policy(self.policy)
        await hub.open(stack.subnet)
        members.admit(self)
        pool, subnet, ipv6 = members.pool, stack.subnet, stack.subnet.ipv6
        self._address = address = (
            pool.lease() if self._setup.address is None else pool.claim(self._setup.address)
        )
        mac = self._setup.mac or mac_of(address)
        self._port = Port(hub.port(), mac, (address,))
        if ipv6 is not None:
            self._address6 = address6_of(address, subnet, ipv6)
            self._port = self._port._replace(addresses=(address, self._address6, link_local_of(mac)))
        if not self._is_kept:
            await self.namespace.open()
        self._twins = _join(self)
        self._is_linked = True
        stack.guests.update(dict.fromkeys(self._guests, self.namespace))
        if self.policy is not None:  # before a frame passes
            await stack.ask(Gateway.set_policy_of, self._guests, dump(self.policy).decode(), "keep")
        self.ifname = await hub.add(self._port, self.namespace, self._setup.ifname, self.name)
        missing = await self.namespace.configure_link(
            self.ifname,
            address=IPv4Interface((address, subnet.network.prefixlen)),
            gateway=subnet.gateway,
            address6=None if ipv6 is None else IPv6Interface((self._address6, ipv6.network.prefixlen)),
            gateway6=None if ipv6 is None else ipv6.gateway,
            neighbours=subnet.neighbours,
        )
        there = self._port
        if missing is not None:
            self._address6 = None
            there = self._port._replace(addresses=(address,))
            logger.warning("the member %s has IPv4 only: %s", self.name, missing)
        guest = (
            None if self._setup.namespace is None else self.subnet
        )  # else all of its traffic is of this network
        await hub.ready(there, self.namespace, self.ifname, guest)
        if stack.setup.dhcp is not None:
            await stack.reserve(StaticLease(address, mac.hex(":")))
        for record in self._own_records(stack):
            self._records.append(record)
            await stack.add_record(record)
        await members.tell()
        await self.forwarder.open()
        await self.forwarder.add(*self._setup.ports)
        self.supervisor.start(self._watch)

    def _own_records(self, stack: UserStack) -> list[Record]:
        """Return the records of the member.

        These are each name alone, and in every domain of the search list.

        Args:
            stack: The stack that answers with them.
        """
        domains = [domain for domain in stack.uplink.search() if domain != "."]
        names = (self.name, *self.aliases)
        spelled = [name for each in names for name in (each, *(f"{each}.{domain}" for domain in domains))]
        return [Record(name, address, ttl=TTL) for name in spelled for address in self.addresses]

    async def _watch(self) -> None:
        """End when the namespace does, whoever holds this object."""
        with suppress(NetnsKitError):
            await self.namespace.wait_closed()
        self._members.supervisor.start(self.supervisor.end)
        raise NamespaceGone(f"the namespace of the member {self.name!r} has ended")

    async def _close(self) -> None:
        await self._leave()
        if not self._is_kept:
            await self.namespace.supervisor.end()

    async def _leave(self) -> None:
        """Undo what `_open` has done so far, but for the namespace."""
        members, stack = self._members, self._members.stack
        await self.forwarder.supervisor.end()
        while self._records:
            record = self._records[-1]
            with suppress(NetnsKitError):  # the stack may have ended
                await stack.remove_record(record.name, type=record.type, value=record.value)
            self._records.pop()
        members.forget(self.namespace)
        others = _leave(self)
        if others or not members.is_ending:
            with suppress(NetnsKitError):
                await members.tell(*others)
        if self._is_linked and self._port is not None:
            for address in self._guests:
                stack.guests.pop(address, None)
            with suppress(NetnsKitError):
                await stack.revoke(self.address)
                await stack.ask(Gateway.end_flows_of, self._guests)
                if self._shown:
                    await stack.ask(Zone.show, self._guests, ())
                await stack.ask(Gateway.set_policy_of, self._guests, None, "keep")
            if self._setup.namespace is not None or not members.is_ending:
                await members.hub.remove(self._port)
            self._is_linked = False
        if self._address is not None and members.by_name.get(self.name) is self:
            members.pool.release(self._address)
        members.dismiss(self)

    async def connect_tcp(self, port: int, *, source: AddressLike | None = None) -> GuestStream:
        """Connect to a server in the member, through the stack and without a socket of the host.

        Sockets of the member's own, to connect and to listen with, are those of `namespace`.

        Args:
            port: The port.
            source: The address that the server sees as its client's; None: the gateway's.

        Raises:
            ConnectionRefusedError: Nothing listens there.
            TimeoutError: Nothing in the member answers.
            AddressError, ArgumentError, ArgumentTypeError: An argument that cannot be used.
            OSError: There is no room for the connection.
            NamespaceGone, StackClosed: The member or the network is not open.

        Cancellation: There is no connection.
        """
        with self.supervisor.guarding():
            return await self._members.stack.connect_tcp(self.address, port, source=source)

    async def flows(self) -> tuple[FlowInfo, ...]:
        """Return the flows of this member that the stack carries, see `UserStack.flows`.

        Those between members are the kernel's, and not among them.

        Raises:
            NamespaceGone, StackClosed: The member or the network is not open.

        Cancellation: Nothing is changed.
        """
        with self.supervisor.guarding():
            flows = await self._members.stack.flows()
        return tuple(flow for flow in flows if flow.guest.address in self._guests)

    async def events(self, *, processes: bool = False) -> AsyncGenerator[Event, None]:
        """Yield what happens to the flows of this member, and what its policy refuses, see `UserStack.events`.

        The end of the member ends the generator.

        Args:
            processes: Whether to find out which process in the member has opened each flow.

        Raises:
            NamespaceGone, StackClosed: The member or the network is not open yet, or was closed.

        Cancellation: The generator has ended, and keeps no more events.
        """
        self.supervisor.check()
        stack = self._members.stack
        with suppress(NamespaceGone, StackClosed):
            async with Follower(stack, processes, self._guests, self.supervisor) as follower:
                while True:
                    await follower.wait()
                    for event in await follower.take():
                        yield event

    async def log_events(
        self,
        target: str | os.PathLike[str] | TextIO,
        *,
        processes: bool = False,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Write the events of this member to a file, as `UserStack.log_events` does with all.

        The end of the member ends it.

        Args:
            target: The path of a file that is made or appended to; or a file that is open for text, which stays open.
            processes: Whether to find out which process in the member has opened each flow.
            task_status: What a task group is told by when no event is missed any more: `await tasks.start(...)`.

        Raises:
            EventLogError: The file cannot be opened or written.
            ArgumentTypeError: The target is neither a path nor a file for text.
            NamespaceGone, StackClosed: The member or the network is not open yet, or was closed.

        Cancellation: As for `UserStack.log_events`.
        """
        self.supervisor.check()
        with suppress(NamespaceGone):
            follower = Follower(self._members.stack, processes, self._guests, self.supervisor)
            await follower.log(target, task_status)

    @arguments.spelled_out(UserStack.capture)
    def capture(
        self, target: str | os.PathLike[str] | BinaryIO | None, **options: Unpack[CaptureOptions]
    ) -> Capture:
        """Return a capture of the frames between this member and the stack: see `UserStack.capture`.

        These are the frames that have its link address, and those that go to everybody.  Those between members are
        the kernel's, and not among them.

        Args:
            target: The file; None: memory.
            options: As for `UserStack.capture`.

        Raises:
            ArgumentError, ArgumentTypeError, PolicyError: An argument that cannot be used.
            CaptureError, OSError: As for `UserStack.capture`.
            NamespaceGone, StackClosed: On entering, the member or the network is not open.

        Cancellation: The file is complete.
        """
        stack = self._members.stack
        return Capture(_Seen(stack, self), target, options, lambda: self.mac)

    def faults(
        self,
        faults: Faults | None = None,
        *,
        script: Iterable[tuple[float, Faults]] | None = None,
        **options: Unpack[FaultOptions],
    ) -> FaultsBlock:
        """Return faults on the way between this member and the stack, to be used in `async with`.

        They are as `UserStack.faults` has them, the queries that this member sends to our DNS included.  Packets
        between members are the kernel's, and pass without.

        Args:
            faults: The faults.
            script: Faults over time, instead.
            options: The fields of `Faults`, instead.

        Raises:
            ArgumentError, ArgumentTypeError: An argument that cannot be used.
            NamespaceGone, StackClosed: On entering, the member or the network is not open.

        Cancellation: The faults are over.
        """
        from netns_kit.userstack.faults import FaultsBlock  # few need it

        return FaultsBlock(self._members.stack, faults, script, options, lambda: self._guests)

    async def set_policy(self, policy: Policy | None, existing: Literal["keep", "cut"] = "keep") -> None:
        """Let another policy decide about this member from now on, as `UserStack.set_policy` does for all.

        Args:
            policy: The policy, which decides in place of the network's; None: that of the network decides.
            existing: What becomes of flows that the member has opened before, as for `UserStack.set_policy`.

        Raises:
            ArgumentError, ArgumentTypeError: An argument that cannot be used, or a network with several queues.
            PolicyError: A rule asks, and the network has nobody to ask.
            NamespaceGone, StackClosed: The member or the network is not open.

        Cancellation: It takes effect when the policy is set.
        """
        arguments.one_of("existing", existing, ("keep", "cut"))
        if policy is not None:
            self._check_policy(policy)
        text = None if policy is None else dump(policy).decode()

        async def change() -> None:
            await self._members.stack.ask(Gateway.set_policy_of, self._guests, text, existing)
            self.policy = policy
            await self._members.tell()

        with self.supervisor.guarding():
            await finish(change)

    def _check_policy(self, policy: Policy) -> None:
        stack = self._members.stack
        check_policy(policy, asks=stack.setup.asks)
        if len(stack.tap.queues) > 1:
            expected = "expected one queue, where members have policies of their own"
            raise ArgumentError(expected, "queues", len(stack.tap.queues))

    async def files(self) -> dict[str, str]:
        return await self._members.files(self)

    async def _live_files(self) -> Mapping[str, str]:
        return await self._members.files_for(self.namespace, self)


def _join(member: Member) -> list[Member]:
    """Note a member, and return all that are its namespace, in the order in which they came.  The list lives.

    Raises:
        AddressError: Two of their networks have an address in common.
        ArgumentError: It is a member of the network already.
    """
    known = _twins.get({})
    _twins.set(known)
    status = os.stat(f"/proc/{member.namespace.pid}/ns/net")
    twins = known.setdefault((status.st_dev, status.st_ino), [])
    for each in twins:
        if each._members is member._members:
            expected = f"expected a namespace that is no member of the network yet: this one is {each.name!r}"
            raise ArgumentError(expected, "namespace", repr(member.namespace))
        check_apart(member._members.stack.subnet, each._members.stack.subnet)
    twins.append(member)
    return twins


def _leave(member: Member) -> list[Member]:
    """Forget a member, and return the others.  Doing it again is fine."""
    twins = member._twins
    if member in twins:
        twins.remove(member)
    if not twins and (known := _twins.get({})):
        for key in [key for key, each in known.items() if each is twins]:
            del known[key]
    return list(twins)


class _Seen:
    """The stack as a capture of a member needs it, which sees the flows of the member alone."""

    def __init__(self, stack: UserStack, member: Member) -> None:
        self._member = member
        self.tap = stack.tap
        self.supervisor = stack.supervisor
        self.ask, self.hand = stack.ask, stack.hand
        self.events, self.flows = member.events, member.flows
