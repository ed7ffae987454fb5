"""FakeInternet: an internet in this process, as the uplink of stacks.

Names, addresses and ports are what the program has declared, and handlers of its own answer.  All of it is looked up
when it is asked for, on the event loop of the stack (`netns_kit.userstack.serving`), so that a change is seen by
whatever is asked next.
"""

from __future__ import annotations

import errno
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.display.displayed import Displayed
from netns_kit.dns import Answer, DnsProxy, DnsServer, Rcode, Record, Zone
from netns_kit.dns.message import ANY, NXDOMAIN, PTR, RCODE, TYPES, Rr, parse_untrusted, type_name
from netns_kit.dns.records import DEFAULT_TTL, as_text
from netns_kit.dns.zone import ANYTHING, Lookup
from netns_kit.domain_names import address_of, suffixes, to_text, to_wire
from netns_kit.errors import AddressError, ArgumentError, DomainNameError, NotFound
from netns_kit.forwarder.forwards import Forwards
from netns_kit.frozen import frozen
from netns_kit.gateway.served import Echo, Opened
from netns_kit.gateway.setup import as_record
from netns_kit.policy.policy import Policy
from netns_kit.stack import Refusal, Transport
from netns_kit.uplink.flow import Endpoint, Flow
from netns_kit.uplink.in_memory import InMemoryUplink
from netns_kit.uplink.uplink import is_reachable

from .guest_streams import GuestStream, TcpGuestHandler, UdpGuestHandler
from .serving import GuestServer, Servers
from .userstack import UserStack, check_handler

if TYPE_CHECKING:
    from netns_kit.display.view import View

T = TypeVar("T", bound=Callable[..., Awaitable[object]])
LOG_MOST = 10_000
DOCUMENTATION = ("203.0.113.0/24", "198.51.100.0/24", "192.0.2.0/24")  # RFC 5737
BENCHMARKS = "198.18.0.0/15"  # RFC 2544, when those are used up
NETWORK6 = "2001:db8::/32"  # RFC 3849
_KINDS = {4: TYPES["A"], 6: TYPES["AAAA"]}
_ANY_PORT = 0


@frozen
class FakeQuery:
    """A query for a name that a `FakeInternet` has answered."""

    name: str
    """The name, in lower case."""
    type: str
    """The type of the records, like "A"."""
    rcode: Rcode
    """The result code of the answer."""


@frozen
class FakeFlow:
    """A flow that has reached a `FakeInternet`; of pings, an echo request."""

    protocol: Transport
    """Transport of the flow."""
    guest: Endpoint
    """The namespace's end."""
    remote: Endpoint
    """Endpoint that it leads to.  The port of a ping is its identifier."""
    host: FakeHost | None
    """The host with that address; None: there is none."""
    refused: Refusal | None
    """Refusal of the flow; None: a handler has it, or the ping was answered."""


class _Service:
    """A handler at a port of a host."""

    def __init__(self, host: FakeHost, transport: Literal["tcp", "udp"], port: int, handler: Any) -> None:
        self.host = host
        self.transport = transport
        self.port = port
        self.handler = handler


class FakeHost:
    """A host of a `FakeInternet`.  `FakeInternet.host` makes one.

    Ports without a handler refuse: TCP by a reset, UDP by "port unreachable".

    Args:
        world: The internet, as it is to stacks.
        names: The names.
        addresses: The addresses.
    """

    names: tuple[str, ...]
    """The names that lead to it.  Those that `alias` adds are not among them."""
    addresses: tuple[IPv4Address | IPv6Address, ...]
    """The addresses, in the order in which names are answered with them."""
    ping: bool
    """Whether it answers echo requests; if not, they are lost."""

    def __init__(self, world: _World, names: tuple[str, ...], addresses: tuple[Address, ...]) -> None:
        self.names = names
        self.addresses = addresses
        self.ping = True
        self._world = world
        self._down: Refusal | None = None
        self._services: dict[tuple[str, int], _Service | Refusal] = {}

    def __repr__(self) -> str:
        state = "" if self._down is None else ", down"
        return f"<FakeHost {', '.join((*self.names, *map(str, self.addresses)))}{state}>"

    # -- what is served -------------------------------------------------------------------------------

    def serve_tcp(self, port: int | None, handler: TcpGuestHandler) -> None:
        """Answer connections to a port from now on.  Those that another handler has stay there.

        Args:
            port: The port; None: every one that has nothing of its own.
            handler: An async function, called with a `GuestStream` for each connection, as for
                `UserStack.serve_tcp`.

        Raises:
            ArgumentError, ArgumentTypeError: An argument that cannot be used.
        """
        self._serve("tcp", port, handler)

    def serve_udp(self, port: int | None, handler: UdpGuestHandler) -> None:
        """Answer datagrams to a port from now on.

        Args:
            port: The port; None: every one that has nothing of its own.
            handler: An async function, called with a `GuestDatagrams` for each flow, as for `UserStack.serve_udp`.

        Raises:
            ArgumentError, ArgumentTypeError: An argument that cannot be used.
        """
        self._serve("udp", port, handler)

    def tcp(self, port: int | None) -> Callable[[T], T]:
        """Return a decorator that has `serve_tcp` use a function.

        Args:
            port: The port; None: every one that has nothing of its own.

        Raises:
            ArgumentError, ArgumentTypeError: It is no port.
        """
        return self._decorator("tcp", port)

    def udp(self, port: int | None) -> Callable[[T], T]:
        """Return a decorator that has `serve_udp` use a function.

        Args:
            port: The port; None: every one that has nothing of its own.

        Raises:
            ArgumentError, ArgumentTypeError: It is no port.
        """
        return self._decorator("udp", port)

    def refuse_tcp(self, port: int | None, how: Refusal = Refusal.RESET) -> None:
        """Refuse connections to a port from now on.  Those that a handler has stay there.

        Args:
            port: The port; None: every one that has nothing of its own.
            how: How they are refused.

        Raises:
            ArgumentError, ArgumentTypeError: An argument that cannot be used.
        """
        self._refuse("tcp", port, how)

    def refuse_udp(self, port: int | None, how: Refusal = Refusal.RESET) -> None:
        """Refuse datagrams to a port from now on, as `refuse_tcp` does connections.

        Args:
            port: The port; None: every one that has nothing of its own.
            how: How they are refused.

        Raises:
            ArgumentError, ArgumentTypeError: An argument that cannot be used.
        """
        self._refuse("udp", port, how)

    def _decorator(self, transport: Literal["tcp", "udp"], port: int | None) -> Callable[[T], T]:
        number = _port(port)

        def decorate(handler: T) -> T:
            self._serve(transport, number or None, handler)
            return handler

        return decorate

    def _serve(self, transport: Literal["tcp", "udp"], port: int | None, handler: object) -> None:
        number = _port(port)
        check_handler(handler)
        self._services[transport, number] = _Service(self, transport, number, handler)

    def _refuse(self, transport: Literal["tcp", "udp"], port: int | None, how: Refusal) -> None:
        arguments.instance("how", how, Refusal, "a Refusal")
        self._services[transport, _port(port)] = how

    # -- whether it is there --------------------------------------------------------------------------

    @property
    def is_up(self) -> bool:
        """True unless the host is down."""
        return self._down is None

    def down(self, how: Refusal = Refusal.HOST_UNREACHABLE) -> None:
        """Take the host off the internet until `up`: its handlers are cancelled, their connections are reset.

        Args:
            how: What becomes of new flows.  By default a router says that the host is not there; `Refusal.DROP`:
                nobody says anything.

        Raises:
            ArgumentTypeError: It is no Refusal.
        """
        arguments.instance("how", how, Refusal, "a Refusal")
        self._down = how
        self._world.cancel(self)

    def up(self) -> None:
        """Put the host back."""
        self._down = None

    # -- names ----------------------------------------------------------------------------------------

    def alias(self, *names: str) -> None:
        """Give the host further names, by CNAME records that lead to its first one.

        Args:
            names: The names.

        Raises:
            DomainNameError: A name cannot be read.
            ArgumentError: The host has no name that one could lead to.
        """
        first = next((each for each in self.names if not each.startswith("*")), None)
        if first is None:
            raise ArgumentError("expected a host with a name", "names", arguments.shown(names))
        for name in names:
            self._world.names.add(Record(name, first, "CNAME"))

    # -- the namespace as its server ------------------------------------------------------------------

    async def connect_tcp(self, port: int, *, stack: UserStack | None = None) -> GuestStream:
        """Open a connection from this host to a published port, see `Forwarder`.

        The server sees one of this host's addresses as its client's.  No port of the real host is taken: all that a
        stack publishes on this internet is here, whatever address of the host it was to listen on.

        Args:
            port: The published port.
            stack: The stack that publishes it; None: the one whose uplink the internet is.

        Raises:
            ConnectionRefusedError: Nothing is published there, or nothing listens inside.
            TimeoutError: Nothing in the namespace answers.
            ArgumentError: The internet is the uplink of no stack that is open, or of several.
            ArgumentTypeError, OSError, StackClosed: As `UserStack.connect_tcp` raises them.

        Cancellation: There is no connection.
        """
        arguments.port("port", port, 1)
        found = self._world.stack if stack is None else stack
        target = await found.ask(Forwards.target, port)
        if target is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        address, inside = target
        source = next((each for each in self.addresses if each.version == address.version), None)
        return await found.connect_tcp(address, inside, source=source)


class FakeInternet(Displayed, InMemoryUplink):
    """An internet of hosts that the program declares, as the uplink of one or several stacks.

        fake = FakeInternet()
        api = fake.host("api.example.com")

        @api.tcp(80)
        async def handler(stream):
            ...

        async with Network(uplink=fake) as net:
            await net.run(["curl", "http://api.example.com"])

    Nothing of the host's network is used: no socket, no resolver, no name of its hosts file.  A policy, events,
    `UserStack.flows` and captures are as with any uplink.  Hosts may be added and changed while stacks use them, on
    their event loop; none of these methods waits.

    Args:
        policy: See `Uplink`.
        any_source: See `Uplink`.
        search: The search list for programs inside.
        unknown: How flows to an address that no host has are refused.  `Refusal.DROP`: they are lost.

    Raises:
        ArgumentError, ArgumentTypeError: An argument that cannot be used.
        DomainNameError: An item of the search list is no domain.
    """

    queries: deque[FakeQuery]
    """The queries for names that were answered here, the oldest first; of very many, the last ones."""
    flows: deque[FakeFlow]
    """The flows that have come here, likewise."""

    def __init__(
        self,
        *,
        policy: Policy | Callable[[Flow], Refusal | None] | None = None,
        any_source: bool = False,
        search: Iterable[str] = (),
        unknown: Refusal = Refusal.NET_UNREACHABLE,
    ) -> None:
        arguments.items("search", search, "a list of domains")
        domains = tuple(search)
        super().__init__(policy, any_source, domains)
        arguments.instance("unknown", unknown, Refusal, "a Refusal")
        self.world: _World = _World(unknown)
        world = self.world
        self.queries, self.flows, self._names = world.queries, world.flows, world.names
        self._settings = policy, any_source, domains
        self._free = {4: _addresses4(), 6: _addresses6()}

    def __reduce__(self) -> tuple[type[InMemoryUplink], tuple[object, ...]]:
        return InMemoryUplink, self._settings  # all that a worker needs

    def __repr__(self) -> str:
        return f"<FakeInternet of {len(self._names.hosts)} names>"

    def _view(self) -> View:
        from .display import internet_view

        return internet_view(self)

    # -- hosts ----------------------------------------------------------------------------------------

    def host(self, *names: str, addresses: Iterable[AddressLike] | None = None) -> FakeHost:
        """Add a host, and return it.

        Args:
            names: Its names.  With `*` as its first label one stands for all names below that nothing else has.
            addresses: Its addresses; None: one of each family that no other host has.  They are of the networks for
                documentation, and of 198.18.0.0/15 when there are more than 750 hosts, which a policy counts as
                `PRIVATE`.

        Raises:
            DomainNameError: A name cannot be read.
            AddressError: An address cannot be a host's, or another one has it.
            ArgumentError: Another host has a name; or there are no addresses.
            ArgumentTypeError: An argument of another type.
        """
        hosts = self._names.hosts
        wires = [_wire_of(name) for name in names]
        for wire in wires:
            if wire in hosts:
                raise ArgumentError("expected a name that no other host has", "names", to_text(wire))
        if addresses is None:
            found = tuple(self._next_free(version) for version in (4, 6))
        else:
            arguments.items("addresses", addresses, "a list of addresses, or None")
            found = tuple(map(self._checked, addresses))
            if not found:
                raise ArgumentError("expected an address", "addresses", "()")
            if len(set(found)) < len(found):
                raise AddressError("expected each address once", "addresses", arguments.shown(found))
        made = FakeHost(self.world, tuple(map(to_text, wires)), found)
        self._names.add_host(made, wires)
        return made

    def remove(self, host: FakeHost) -> None:
        """Remove a host with its names and addresses, but for what `FakeHost.alias` and `add_record` have added.

        Its handlers are cancelled.

        Args:
            host: The host.

        Raises:
            NotFound: There is no such host.
        """
        if host not in self._names.by_address.values():
            raise NotFound(f"there is no {host!r}", fix="`host` adds one")
        self.world.cancel(host)
        self._names.remove_host(host)

    def __getitem__(self, name: AddressLike) -> FakeHost:
        """Return the host with a name of `FakeHost.names`, or with an address.

        Args:
            name: The name, or the address.

        Raises:
            NotFound: There is none; it is a KeyError.
        """
        names = self._names
        found = names.hosts.get(to_wire(name).lower()) if isinstance(name, str) else None
        if found is None:
            with suppress(AddressError):
                found = names.by_address.get(arguments.address(name).packed)
        if found is None:
            raise NotFound(f"there is no host {name}", fix="`host` adds one")
        return found

    def _checked(self, given: AddressLike) -> Address:
        address = arguments.address(given, "addresses")
        if not is_reachable(address):
            raise AddressError("expected an address that packets are sent to", "addresses", str(address))
        if address.packed in self._names.by_address:
            raise AddressError("expected an address that no other host has", "addresses", str(address))
        return address

    def _next_free(self, version: int) -> Address:
        for address in self._free[version]:
            if address.packed not in self._names.by_address:
                return address
        raise ArgumentError("expected fewer hosts", "addresses", "None", "give addresses")

    # -- records --------------------------------------------------------------------------------------

    def add_record(self, record: str | Record) -> Record:
        """Answer queries with one record more, of any type and for any name, and return it.

        Args:
            record: Text like NAME=ADDRESS, or a `Record`.

        Raises:
            DomainNameError, RecordError: The record makes no sense.
            ArgumentTypeError: The argument is neither text nor a Record.
        """
        made = as_record(record)
        self._names.add(made)
        return made

    def remove_record(self, name: str, *, type: str = "", value: AddressLike = "") -> None:
        """Remove records that `add_record` or `FakeHost.alias` has added.

        Args:
            name: Their name.
            type: Their type, like "A"; empty: any.
            value: Their value, as `Record.value`; empty: any.

        Raises:
            NotFound: There is no such record; it is a KeyError.
            DomainNameError: The name is none.
            ArgumentTypeError: An argument of another type.
        """
        arguments.text("type", type, "the type of a record, like 'A'")
        if not self._names.remove(name, type, as_text(value)):
            raise NotFound(f"there is no record of {name}", fix="`add_record` adds one")


class _World:
    """What a `FakeInternet` is to stacks: the `World` of their `Servers`."""

    def __init__(self, unknown: Refusal) -> None:
        self.names = _Names()
        self.queries: deque[FakeQuery] = deque(maxlen=LOG_MOST)
        self.flows: deque[FakeFlow] = deque(maxlen=LOG_MOST)
        self._unknown = unknown
        self._dns = DnsServer(self.names, DnsProxy(random_id=lambda: 0))
        self._stacks: dict[Servers, dict[_Service, GuestServer]] = {}

    def joined(self, servers: Servers) -> None:
        """Note that the flows of a stack come from now on."""
        self._stacks[servers] = {}

    def left(self, servers: Servers) -> None:
        """Note that no more come."""
        self._stacks.pop(servers, None)

    def server(self, servers: Servers, opened: Opened) -> GuestServer | Refusal:
        """Return what serves a flow, or how it is refused."""
        host, port = self.names.by_address.get(opened.target.address.packed), opened.target.port
        found = self._unknown if host is None else _found(host, opened.transport, port)
        refused = found if isinstance(found, Refusal) else None
        self.flows.append(FakeFlow(opened.transport, opened.guest, opened.target, host, refused))
        if isinstance(found, Refusal):
            return found
        known = self._stacks.setdefault(servers, {})
        if found not in known:
            known[found] = servers.made(found.transport, found.port, found.handler)
        return known[found]

    def resolve(self, servers: Servers, query: bytes) -> bytes:
        """Return the answer to a query for a name."""
        self.names.has_ipv6 = cast("UserStack", servers.stack).subnet.ipv6 is not None
        [answer] = self._dns.query(query, None, b"", 0.0, "tcp") or [Answer(None, b"")]
        if isinstance(answer, Answer) and answer.message:
            message = answer.message
            _, _, question = parse_untrusted(query)
            if not question:  # a worker may ask nothing
                return message
            kind = int.from_bytes(question[-4:-2], "big")
            code = message[3] & RCODE
            rcode = next((each for each in Rcode if each.value == code), Rcode.SERVFAIL)
            self.queries.append(FakeQuery(to_text(question[:-4]).lower(), type_name(kind), rcode))
            return message
        return b""

    def echo(self, asked: Echo) -> Refusal | None:
        """Return how an echo request is refused, or None if it is answered."""
        host = self.names.by_address.get(asked.target.address.packed)
        refused = self._unknown if host is None else host._down
        if host is not None and refused is None and not host.ping:
            refused = Refusal.DROP
        self.flows.append(FakeFlow("icmp", asked.guest, asked.target, host, refused))
        return refused

    def cancel(self, host: FakeHost) -> None:
        """Cancel the handlers of a host."""
        for servers, known in self._stacks.items():
            for service, server in known.items():
                if service.host is host:
                    servers.cut(server)

    @property
    def stack(self) -> UserStack:
        """The one stack.

        Raises:
            ArgumentError: There is none, or several.
        """
        if len(self._stacks) != 1:
            many = f"this one is the uplink of {len(self._stacks)}"
            raise ArgumentError(f"expected a stack: {many} that are open", "stack", "None")
        [servers] = self._stacks
        return cast("UserStack", servers.stack)


class _Names(Zone):
    """The names of hosts, beside the records of a zone.  All names are answered here."""

    def __init__(self) -> None:
        super().__init__()
        self.hosts: dict[bytes, FakeHost] = {}  # by name, on the wire and in lower case
        self.by_address: dict[bytes, FakeHost] = {}
        self.has_ipv6 = True  # of the stack that asks

    def add_host(self, host: FakeHost, names: Iterable[bytes]) -> None:
        """Add a host under these names."""
        self.hosts.update(dict.fromkeys(names, host))
        self.by_address.update(dict.fromkeys((each.packed for each in host.addresses), host))

    def remove_host(self, host: FakeHost) -> None:
        """Remove a host."""
        for name in host.names:
            del self.hosts[to_wire(name).lower()]
        for address in host.addresses:
            del self.by_address[address.packed]

    def find(self, question: bytes, client: bytes = b"") -> Lookup:
        """Return the answer for the name in a question: a name that nobody has does not exist."""
        asked, kind = question[:-4], int.from_bytes(question[-4:-2], "big")
        name = asked.lower()
        host = self.hosts.get(name)
        known = super().find(question) if host is None or name in self._names else None
        if host is None and known is None:
            above = (self.hosts.get(ANYTHING + each) for each in islice(suffixes(name), 1, None))
            host = next(filter(None, above), None)
        if host is not None:
            own = [
                Rr(asked, _KINDS[each.version], DEFAULT_TTL, each.packed)
                for each in host.addresses
                if kind in (_KINDS[each.version], ANY) and (each.version == 4 or self._is_told_ipv6(host))
            ]
            return Lookup(0, (*own, *(known.records if known is not None else ())))
        if known is not None:
            return known
        address = address_of(name)
        host = None if address is None else self.by_address.get(address.packed)
        named = next((each for each in host.names if not each.startswith("*")), None) if host else None
        if named is None:
            return Lookup(NXDOMAIN, ())
        return Lookup(0, (Rr(asked, PTR, DEFAULT_TTL, to_wire(named)),) if kind in (PTR, ANY) else ())

    def _is_told_ipv6(self, host: FakeHost) -> bool:
        """Return whether the stack that asks is told the IPv6 addresses of a host."""
        return self.has_ipv6 or all(each.version == 6 for each in host.addresses)


def _found(host: FakeHost, transport: Literal["tcp", "udp"], port: int) -> _Service | Refusal:
    """Return what a port has now."""
    services = host._services
    own = services.get((transport, port)) or services.get((transport, _ANY_PORT)) or Refusal.RESET
    return host._down or own


def _wire_of(name: str) -> bytes:
    """Return a name of a host.  Raises `DomainNameError`, also for an address and a URL, which nobody can ask for."""
    wire = to_wire(name, "names")
    if re.search(r"[/:]|\.[0-9]+$", name):
        fix = "an address is given by addresses=[...], a port by serve_tcp(port, handler)"
        raise DomainNameError("expected a domain name", "names", arguments.shown(name), fix)
    return wire.lower()


def _port(given: int | None) -> int:
    """Return a port, or 0 for all.

    Raises:
        ArgumentError, ArgumentTypeError: It is no port.
    """
    if given is None:
        return _ANY_PORT
    arguments.port("port", given, 1)
    return given


def _addresses4() -> Iterator[Address]:
    for text in (*DOCUMENTATION, BENCHMARKS):
        yield from IPv4Network(text).hosts()


def _addresses6() -> Iterator[Address]:
    return IPv6Network(NETWORK6).hosts()
