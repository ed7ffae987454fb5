"""Member: one namespace of a network of several; and Members, what those of one network have in common.

A member takes its names and addresses first, which nobody else of the network has from then on.  Then its namespace
is opened, if it is not open yet, and its end of a pair of veth is made and configured.  Its records and its ports
come last, so whoever finds its name can reach it.  It ends in the opposite order, also when its namespace does: its
names and addresses are free then.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from itertools import count
from typing import TYPE_CHECKING, Literal, TypeVar

import anyio
from anyio.lowlevel import RunVar

from netns_kit import arguments
from netns_kit.arguments import AddressLike
from netns_kit.child.codec import dump
from netns_kit.dhcp import StaticLease
from netns_kit.display.displayed import Displayed
from netns_kit.dns import Record, Zone
from netns_kit.errors import ArgumentError, NamespaceGone, NetnsKitError
from netns_kit.forwarder.forwarder import Forwarder
from netns_kit.gateway.gateway import NAMES, Gateway
from netns_kit.gateway.setup import check_policy
from netns_kit.namespace.background import Openable, Supervisor, finish
from netns_kit.namespace.given import LiveText
from netns_kit.namespace.namespace import Namespace
from netns_kit.policy.hits import PolicyHits
from netns_kit.policy.policy import Policy
from netns_kit.subnet import Subnet
from netns_kit.userstack.guest_streams import GuestStream
from netns_kit.userstack.userstack import UserStack

from .addresses import AddressPool, address6_of, check_apart, link_local_of, mac_of
from .guard import Port
from .hub import Hub
from .member_forwarder import MemberForwarder
from .member_options import MemberSetup
from .member_views import MemberViews
from .shown import HOSTS, shown_files

if TYPE_CHECKING:
    from netns_kit.display.view import View

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
        self.numbers = count(1)
        self.governed: set[IPv4Address | IPv6Address] = set()
        """Addresses of members that have ended, and had a policy of their own.  It decides about what these have sent
        and the stack has not read yet, until the next member with such an address comes."""
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


class Member(Displayed, MemberViews):
    """A namespace of a network of several, while the object is open.

    `Network.member` and `Network.add_member` make one.  The others of the network reach it by its names, and it has
    their way out, their DNS and host ports of its own.  Commands are run in it as in a `Network`.

    If its namespace ends, so does the member: every call raises `NamespaceGone`, and its names and addresses are
    free.  The network goes on.  If the network fails, so do its members.

    Args:
        members: Those of the network, for parts of this library.
        setup: The settings, which have been checked, for parts of this library.

    Raises:
        ArgumentError, ArgumentTypeError: They have not been.
    """

    name: str
    """Its name in the network."""
    aliases: tuple[str, ...]
    """Its other names."""
    ifname: str
    """The name of its interface."""
    namespace: Namespace
    """Its namespace."""
    policy: Policy | None
    """The policy of its own that was set last; None: that of the network decides."""
    forwarder: Forwarder
    """Its ports, see `Forwarder`."""
    link: str = "veth"
    """What joins it to the network: a pair of veth and a bridge of the kernel."""

    def __init__(self, members: Members, setup: MemberSetup) -> None:
        super().__init__(members.stack)
        self.name = setup.name
        self.aliases = setup.aliases
        self.ifname = setup.ifname or "eth0"
        self.namespace = setup.place()
        self.policy = setup.policy
        self._setup = setup
        self._number = next(members.numbers)  # of what the engine has of it alone
        self._is_kept = self.namespace.supervisor.condition == "open"  # by the caller
        self._members = members
        self._twins: list[Member] = []  # the members that are its namespace, itself included
        self._shown: tuple[Record, ...] = ()
        self._address: IPv4Address | None = None
        self._address6: IPv6Address | None = None
        self._port: Port | None = None
        self._is_linked = self._is_governed = False
        self._setting_policy = anyio.Lock()
        self._records: list[Record] = []
        self.forwarder = MemberForwarder(
            members.stack, self.namespace, lambda: self.subnet, lambda: self.addresses
        )
        self.supervisor = Supervisor(
            type(self).__name__, NamespaceGone, members.supervisor, self.namespace.supervisor, one_loop=True
        )

    def __repr__(self) -> str:
        where = "" if self._address is None else f" {self._address}"
        return f"<Member {self.name}{where}: {self.supervisor.condition}>"

    def _view(self) -> View:
        from .display import member_view

        return member_view(self)

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
    def known_addresses(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """The addresses, as far as it has some; for displays."""
        return () if self._address is None else self.addresses

    @property
    def is_attached(self) -> bool:
        """True if its namespace was open before, and is the caller's."""
        return self._is_kept

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
        return self._stack.subnet.with_guest(self.address, self._address6)

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
        return tuple(record for member in there for record in member._own_records(self._stack))

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
            await self._stack.ask(Zone.show, self._guests, beside)

    async def _open(self) -> None:
        members, stack, hub = self._members, self._stack, self._members.hub
        stack.supervisor.check()
        if self.namespace is stack.namespace:
            expected = "expected another namespace than the network's own, which has the bridge"
            raise ArgumentError(expected, "namespace", repr(self.namespace))
        if self.policy is not None:
            check_policy(self.policy, asks=stack.setup.asks)
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
        stack.guest_names.update(dict.fromkeys(self._guests, self.name))
        if self.policy is not None or not members.governed.isdisjoint(self._guests):  # before a frame passes
            await self._set_policy(self.policy)
            members.governed.difference_update(self._guests)
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
            await stack.revoke(address)  # another may have leased it meanwhile
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
        """Undo what `_open` has done so far, but for the namespace.

        What is of this member ends before another can have its addresses.
        """
        members, stack = self._members, self._stack
        await self._end_blocks()
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
                stack.guest_names.pop(address, None)
            with suppress(NetnsKitError):
                await stack.revoke(self.address)
                await self._end_flows()
                if self._shown:
                    await stack.ask(Zone.show, self._guests, ())
            if self._setup.namespace is not None or not members.is_ending:
                await members.hub.remove(self._port)
            if self._is_governed:
                members.governed.update(self._guests)
            with suppress(NetnsKitError):
                await self._end_flows()  # those that were opened meanwhile
            self._is_linked = False
        if self._address is not None and members.by_name.get(self.name) is self:
            members.pool.release(self._address)
        members.dismiss(self)

    async def _end_flows(self) -> None:
        await self._stack.ask(Gateway.end_flows_of, self._guests)

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
            return await self._stack.connect_tcp(self.address, port, source=source)

    async def set_policy(self, policy: Policy | None, existing: Literal["keep", "cut"] = "keep") -> None:
        """Let another policy decide about this member from now on, as `UserStack.set_policy` does for all.

        Args:
            policy: The policy, which decides in place of the network's; None: that of the network decides.
            existing: What becomes of flows that the member has opened before, as for `UserStack.set_policy`.

        Raises:
            ArgumentError, ArgumentTypeError: An argument that cannot be used.
            PolicyError: A rule asks, and the network has nobody to ask.
            NamespaceGone, StackClosed: The member or the network is not open.

        Cancellation: It takes effect when the policy is set.
        """
        arguments.one_of("existing", existing, ("keep", "cut"))
        if policy is not None:
            check_policy(policy, asks=self._stack.setup.asks)

        async def change() -> None:
            async with self._setting_policy:
                await self._set_policy(policy, existing)
                self.policy = policy
            await self._members.tell()

        with self.supervisor.guarding():
            await finish(change)

    async def policy_hits(self) -> PolicyHits | None:
        """Return how often each rule of the member's policy has decided since it was set.

        Without one of its own, it is that of the network, of all who have none; None: there is no policy.

        Raises:
            NamespaceGone, StackClosed: The member or the network is not open.

        Cancellation: Nothing is changed.
        """
        stack = self._stack
        with self.supervisor.guarding():
            return await stack.hits_of(stack.policy if self.policy is None else self.policy, self.address)

    async def _set_policy(self, policy: Policy | None, existing: Literal["keep", "cut"] = "keep") -> None:
        self._is_governed = self._is_governed or policy is not None
        text = None if policy is None else dump(policy).decode()
        await self._stack.ask(Gateway.set_policy_of, self._number, self._guests, text, existing)

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
