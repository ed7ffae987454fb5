"""Socks5Uplink: flows through a SOCKS5 proxy (RFC 1928, RFC 1929).

TCP is CONNECT.  UDP is UDP ASSOCIATE: as long as a stream to the proxy stays open, the proxy relays datagrams, each
with a header in front.  Its answers have the sender's address.  So the proxy is told addresses of UDP; a name that
has a stand-in for its address has an association of its own, whose answers are all from there.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.policy.addresses import canonical
from netns_kit.policy.presets import METADATA, PRIVATE
from netns_kit.stack import Refusal

from .dial import Dial
from .flow import Endpoint, Flow, Target
from .indirect import (
    Carriage,
    Fault,
    IndirectUplink,
    ProxyOptions,
    ProxyUplink,
    Read,
    Send,
    Talk,
    host_of,
    is_direct,
)
from .sockets import socket_address
from .uplink import Uplink, is_host_address, is_reachable

if TYPE_CHECKING:
    from typing_extensions import Unpack

SOCKS_PORT = 1080
VERSION, PASSWORD_VERSION = 5, 1
CONNECT, UDP_ASSOCIATE = 1, 3
NO_PASSWORD, WITH_PASSWORD, NO_METHOD = 0, 2, 0xFF
IPV4, NAME, IPV6 = 1, 3, 4
_SIZES = {IPV4: 4, IPV6: 16}
_REFUSALS = {
    1: Refusal.HOST_UNREACHABLE,  # general failure
    2: Refusal.PROHIBITED,  # not allowed by its rules
    3: Refusal.NET_UNREACHABLE,
    4: Refusal.HOST_UNREACHABLE,
    5: Refusal.RESET,  # the destination has refused
    6: Refusal.HOST_UNREACHABLE,  # the TTL ran out
    7: Refusal.PROHIBITED,  # no such command
    8: Refusal.NET_UNREACHABLE,  # no such kind of address
}
_TOLD = {2: "does not allow some of them", 7: "does not know the command"}


class Socks5Uplink(ProxyUplink):
    """The way out through a SOCKS5 proxy.

    Pings are refused, since SOCKS has none.

    Args:
        proxy: Address and port of the proxy; the port is 1080 if it is left out.
        username, password: What the proxy is told if it wants to know.  They are in no message and no repr.
        udp: Whether UDP is carried by UDP ASSOCIATE.  False: UDP flows are refused.
        names, resolvers, time_limit: See `IndirectUplink`.
        options: The settings of any `Uplink`.

    Raises:
        AddressError: The proxy is no address with a port.
        ArgumentError: A value cannot be used.
        ArgumentTypeError: An argument has the wrong type.
    """

    kind = "SOCKS proxy"
    takes_names = True

    @arguments.spelled_out(IndirectUplink.__init__)
    def __init__(
        self,
        proxy: AddressLike | Endpoint,
        username: str | None = None,
        password: str | None = None,
        *,
        udp: bool = True,
        **options: Unpack[ProxyOptions],
    ) -> None:
        super().__init__(proxy, SOCKS_PORT, username, password, **options)
        arguments.boolean("udp", udp)
        self._has_udp = udp

    def dial(self, flow: Flow, target: Target, *, ttl: int = 64, tos: int = 0) -> Dial:
        if is_direct(flow, target):
            return Uplink.dial(self, flow, target, ttl=ttl, tos=tos)
        host, port = host_of(flow, target, names=self.wants_names), target.candidates[0].port
        return self._through(talk(CONNECT, host, port, self._credentials, []), tos)

    def carriage(self, flow: Flow, target: Target) -> Carriage:
        if is_direct(flow, target):
            return None
        if flow.protocol == "udp" and self._has_udp:
            host = host_of(flow, target, names=True) if flow.is_by_name else None
            alone = (host, flow.destination) if isinstance(host, str) else None
            return Socks5Association(self, self._through, self._credentials, [], alone)
        return Refusal.PROHIBITED


class Socks5Association:
    """A `UdpAssociation` by UDP ASSOCIATE.

    Args:
        uplink: The uplink that it belongs to.
        through: Begins to talk to the proxy.
        secret: User name and password.
        bound: Gets what the proxy tells of its end for datagrams.
        alone: The name of the only destination, and what stands for it.
    """

    def __init__(
        self,
        uplink: Socks5Uplink,
        through: Callable[[Talk], Dial],
        secret: tuple[bytes, bytes] | None,
        bound: list[tuple[Address | None, int]],
        alone: tuple[str, Endpoint] | None = None,
    ) -> None:
        self._alone = alone
        self._sender: tuple[bytes, int] | None = None
        self._uplink = uplink
        self._through = through
        self._secret = secret
        self._bound = bound

    @property
    def proxy(self) -> Endpoint:
        return self._uplink.proxy

    def dial(self) -> Dial:
        return self._through(talk(UDP_ASSOCIATE, IPv4Address(0), 0, self._secret, self._bound))

    def open(self) -> socket.socket:
        address, port = self._bound[0]
        proxy = self._uplink.proxy.address
        if address is None or not may_be_its_end(address, proxy):  # as it is seen from there, or a trap
            address = proxy
        sock = self._uplink.open("udp", address)
        try:
            sock.connect(socket_address(address, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def header(self, destination: Endpoint) -> bytes:
        host = destination.address if self._alone is None else self._alone[0]
        return bytes(3) + _packed(host, destination.port)

    def parse(self, datagram: bytes) -> tuple[tuple[bytes, int], memoryview] | None:
        kind, length = int.from_bytes(datagram[3:4], "big"), int.from_bytes(datagram[4:5], "big")
        size = 1 + length if kind == NAME and self._alone is not None else _SIZES.get(kind)
        if size is None or datagram[2] or len(datagram) < 6 + size:  # a fragment, a name, or nonsense
            return None
        sender = datagram[4 : 4 + size], int.from_bytes(datagram[4 + size : 6 + size], "big")
        if self._alone is not None:
            address, port = self._alone[1]
            self._sender = self._sender or (sender if sender[1] == port else None)
            if sender != self._sender:  # where the name leads is known by the first that answers
                return None
            sender = address.packed, port
        return sender, memoryview(datagram)[6 + size :]


def may_be_its_end(address: Address, proxy: Address) -> bool:
    """Return whether a proxy may have its end for datagrams at an address: on the internet, and not on this host.

    Args:
        address: What the proxy has told.
        proxy: The proxy's address.
    """
    plain = ip_address(canonical(address.packed))
    if not (plain.is_global and is_reachable(plain)) or any(plain in each for each in (PRIVATE, METADATA)):
        return False
    return is_host_address(proxy) or not any(map(is_host_address, {address, plain}))


def talk(
    command: int,
    host: str | Address,
    port: int,
    secret: tuple[bytes, bytes] | None,
    bound: list[tuple[Address | None, int]],
) -> Talk:
    """Ask a SOCKS5 proxy for something.

    Args:
        command: CONNECT or UDP_ASSOCIATE.
        host, port: The destination.
        secret: User name and password.
        bound: Gets the address and port that the proxy tells.
    """
    methods = bytes((NO_PASSWORD,)) if secret is None else bytes((NO_PASSWORD, WITH_PASSWORD))
    yield Send(bytes((VERSION, len(methods))) + methods)
    version, method = yield Read(2)
    if version != VERSION:
        raise _nonsense()
    if method == NO_METHOD and secret is None:
        raise Fault(Refusal.PROHIBITED, "wants a user name and a password")
    if method not in methods:
        raise Fault(Refusal.PROHIBITED, "wants another kind of proof than a user name and a password")
    if method == WITH_PASSWORD and secret is not None:
        yield Send(
            bytes((PASSWORD_VERSION, len(secret[0]))) + secret[0] + bytes((len(secret[1]),)) + secret[1]
        )
        _, status = yield Read(2)
        if status:
            raise Fault(Refusal.PROHIBITED, "does not accept the user name and the password")
    yield Send(bytes((VERSION, command, 0)) + _packed(host, port))
    version, reply, _, kind = yield Read(4)
    if version != VERSION:
        raise _nonsense()
    if reply:
        raise Fault(_REFUSALS.get(reply, Refusal.HOST_UNREACHABLE), _TOLD.get(reply, ""))
    if kind == NAME:
        (size,) = yield Read(1)
        yield Read(size)
        address = None
    elif kind in _SIZES:
        address = ip_address((yield Read(_SIZES[kind])))
    else:
        raise _nonsense()
    bound.append((address, int.from_bytes((yield Read(2)), "big")))


def _nonsense() -> Fault:
    return Fault(Refusal.HOST_UNREACHABLE, "does not speak SOCKS5")


def _packed(host: str | Address, port: int) -> bytes:
    if isinstance(host, str):
        name = host.encode("ascii")
        return bytes((NAME, len(name))) + name + port.to_bytes(2, "big")
    kind = IPV6 if isinstance(host, IPv6Address) else IPV4
    return bytes((kind,)) + host.packed + port.to_bytes(2, "big")
