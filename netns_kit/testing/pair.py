"""TapPair: two stacks in memory, of which one is a guest's network and the other stands for the guest.

There is no namespace, no device and no socket of the host, so it needs no privilege.  Both engines are driven by the
event loop of the test, and so follow its clock.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable
from contextlib import AsyncExitStack
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from anyio.streams.buffered import BufferedByteStream
from typing_extensions import Unpack

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.dns.message import NXDOMAIN, RCODE, RD, TYPES, Rcode, expanded, parse_untrusted
from netns_kit.domain_names import to_wire
from netns_kit.errors import AddressError, StackClosed
from netns_kit.namespace.background import Openable, Supervisor
from netns_kit.subnet import Subnet6
from netns_kit.tap.device import TapDevice
from netns_kit.userstack.fake_internet import FakeInternet
from netns_kit.userstack.guest_streams import GuestStream
from netns_kit.userstack.userstack import UserStack

if TYPE_CHECKING:
    import httpx

    from netns_kit.gateway.faults import FaultOptions, Faults
    from netns_kit.userstack.faults import FaultsBlock

DNS_PORT = 53
_MEANINGS = {each.value: each.name for each in Rcode}
_HEAD = (7).to_bytes(2, "big") + RD.to_bytes(2, "big") + b"\0\1" + bytes(6)  # of a query: one question
_IN = b"\0\1"


class TapPair(Openable):
    """A client and a network on two ends of a wire in memory, while the object is open.

    Args:
        internet: The internet that the network leads to.

    Attributes:
        internet: That internet.
        stack: The network's stack, with its `flows`, `set_policy` and `serve_tcp`.
        client: The stack that stands for the guest.
    """

    stack: UserStack
    client: UserStack

    def __init__(self, internet: FakeInternet) -> None:
        self.internet = internet
        self.supervisor = Supervisor(type(self).__name__, StackClosed, one_loop=True)
        self._opened = AsyncExitStack()

    def __repr__(self) -> str:
        return f"<TapPair to {self.internet!r}: {self.supervisor.condition}>"

    async def _open(self) -> None:
        near, far = TapDevice.pair()
        for each in (near, far):
            self._opened.push_async_callback(each.close)
        self.stack = UserStack(near, self.internet, driver="loop", ipv6=True)
        behind = FakeInternet(any_source=True)
        self.client = UserStack(far, behind, driver="loop", subnet="10.9.0.0/24", ipv6=Subnet6("fd00:9::/64"))
        await self._opened.enter_async_context(self.stack)
        await self._opened.enter_async_context(self.client)

    async def _close(self) -> None:
        await self._opened.aclose()

    async def resolve(self, name: str) -> tuple[Address, ...]:
        """Return the addresses of a name, IPv4 first: the network's DNS is asked, as by a program in a namespace.

        Args:
            name: The name.

        Raises:
            socket.gaierror: An OSError: the name does not exist, or has no address, or DNS fails.
            DomainNameError: It is no name.
            StackClosed: The pair is not open.

        Cancellation: Nothing is left.
        """
        self.supervisor.check()
        found: list[Address] = []
        async with await self._connect(self.stack.subnet.dns, DNS_PORT) as stream:
            dns = BufferedByteStream(stream)
            for kind, family in (("A", IPv4Address), ("AAAA", IPv6Address)):
                query = _HEAD + to_wire(name) + TYPES[kind].to_bytes(2, "big") + _IN
                await dns.send(len(query).to_bytes(2, "big") + query)
                answer = await dns.receive_exactly(int.from_bytes(await dns.receive_exactly(2), "big"))
                _, flags, question = parse_untrusted(answer)
                if rcode := flags & RCODE:
                    code = socket.EAI_NONAME if rcode == NXDOMAIN else socket.EAI_AGAIN
                    raise socket.gaierror(code, f"{name}: DNS says {_MEANINGS.get(rcode, rcode)}")
                records, _ = expanded(answer, question)
                found += [family(each.data) for each in records if each.kind == TYPES[kind]]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, f"{name}: the name has no address")
        return tuple(found)

    async def connect_tcp(self, host: AddressLike, port: int) -> GuestStream:
        """Open a connection from the guest to a host of the internet: to the first of its addresses that answers.

        Args:
            host: A name, which the network's DNS is asked about; or an address.
            port: The port.

        Raises:
            socket.gaierror: An OSError: the name has no address.
            ConnectionRefusedError: Nothing listens there.
            OSError: It cannot be reached.
            TimeoutError: Nothing answers, after a minute.
            StackClosed: The pair is not open.

        Cancellation: There is no connection.
        """
        self.supervisor.check()
        last: OSError | None = None
        for address in await self._addresses(host):
            try:
                return await self._connect(address, port)
            except OSError as error:
                last = error
        assert last is not None
        raise last

    async def _addresses(self, host: AddressLike) -> Iterable[Address]:
        try:
            return [arguments.address(host, "host")]
        except AddressError:
            return await self.resolve(str(host))

    async def _connect(self, address: Address, port: int) -> GuestStream:
        ours = self.stack.subnet.of(address)
        assert ours is not None  # the stack has both families
        return await self.client.connect_tcp(address, port, source=ours.guest)

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
            StackClosed: The pair is not open.

        Cancellation: The faults are over.
        """
        self.supervisor.check()
        return self.stack.faults(faults, script=script, **options)

    def httpx_transport(
        self, *, verify: ssl.SSLContext | bool = True, retries: int = 0
    ) -> httpx.AsyncHTTPTransport:
        """Return what an httpx client connects by: `httpx.AsyncClient(transport=tap_pair.httpx_transport())`.

        Args:
            verify: As for `httpx.AsyncHTTPTransport`.
            retries: As for `httpx.AsyncHTTPTransport`.

        Raises:
            ImportError: There is no httpx.
        """
        from .http import transport

        return transport(self.connect_tcp, verify, retries)
