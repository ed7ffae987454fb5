"""NamespaceSockets: kernel sockets of a namespace, made and looked at from outside."""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import IPv4Address, IPv6Address
from socket import socket as SocketType
from typing import Literal, get_args

import anyio
import anyio.abc
import anyio.to_thread

from netns_kit import arguments
from netns_kit.arguments import AddressLike
from netns_kit.errors import (
    FeatureUnavailable,
    NetnsKitError,
    PortInUseError,
)
from netns_kit.host import bound_ports, diagnosis
from netns_kit.host.abi import NETLINK_SOCK_DIAG
from netns_kit.host.undo import on_error

from .agent_calls import AgentCalls
from .agent_client import Done
from .listening import ListeningSocket, Protocol, SocketDiagnostics
from .process_info import ProcessInfo

_SOCKET_FLAGS = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


class NamespaceSockets(AgentCalls):
    """The sockets of a namespace."""

    async def listening_socket(
        self, protocol: Literal["tcp", "udp"], host: AddressLike, port: int, *, backlog: int = 128
    ) -> socket.socket:
        """Return a non-blocking kernel socket of the namespace that waits for clients; it is the caller's to close.

        Args:
            protocol: "tcp" or "udp".
            host: An address of the namespace.
            port: A port; 0 lets the kernel choose.
            backlog: How many connections of TCP wait to be accepted, as in listen(2).

        Raises:
            AddressError: `host` is no address.
            ArgumentError: There is no such protocol, `port` is no port, or `backlog` no number.
            PortInUseError: Another socket has the port.
            PrivilegedPortError: Commands may not use a port as low as that.
            OSError: That of bind(2) or listen(2).
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It leaves no socket.
        """
        arguments.one_of("protocol", protocol, get_args(Protocol))
        address = arguments.address(host, "host")
        arguments.port("port", port)
        arguments.whole_number("backlog", backlog, 0)
        is_tcp = protocol == "tcp"
        sock = await self.socket(_family(address), socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM)
        try:
            if is_tcp:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((str(address), port))
            if is_tcp:
                sock.listen(backlog)
        except OSError as exc:
            sock.close()
            if exc.errno == errno.EADDRINUSE:
                owner = await anyio.to_thread.run_sync(bound_ports.holder, protocol, address, port, self.pid)
                raise PortInUseError(
                    f"{address} port {port}/{protocol} in the namespace is taken by {owner or 'another socket'}",
                    fix="choose another port, or 0",
                ) from exc
            if exc.errno == errno.EACCES:
                start = int(await self.get_sysctl(diagnosis.PORT_START))
                raise diagnosis.privileged_port(port, "in the namespace", start) from exc
            raise
        return sock

    async def socket(self, family: int, type: int, proto: int = 0) -> socket.socket:
        """Return a non-blocking kernel socket of the namespace, which is the caller's to close.

        Args:
            family, type, proto: Numbers, as socket(2) takes them.

        Raises:
            ArgumentTypeError: One is no number.
            OSError: That of socket(2).
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It leaves no socket.
        """
        for name, number in (("family", family), ("type", type), ("proto", proto)):
            arguments.instance(name, number, int, "a whole number, as socket(2) has it")
        _, (fd,) = await self._ask(
            Done, "socket", descriptors=1, family=int(family), type=int(type), proto=int(proto)
        )
        try:
            sock = socket.socket(fileno=fd)
        except OSError as exc:
            os.close(fd)
            raise self._agent.betrayed("a descriptor that is no socket") from exc
        if (sock.family, sock.type) != (family, type & ~_SOCKET_FLAGS):
            sock.close()
            raise self._agent.betrayed("another socket than was asked for")
        sock.setblocking(False)
        return sock

    async def supply_sockets(self) -> tuple[SocketType, SocketType]:
        """Return a socket on which sockets of the namespace may be ordered, and one to send it others.

        For parts of this library, see `netns_kit.namespace.agent_sockets`.

        Raises:
            NamespaceGone: The namespace has ended, or is not open.
            OSError: There is no room for descriptors.

        Cancellation:
            It leaves nothing.
        """
        engines, agents = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with on_error(engines.close, agents.close):
            await self._ask(Done, "supply", fds=[agents.fileno()])
        for end in (engines, agents):
            end.setblocking(False)
        return engines, agents

    async def allow_unix(self, address: str, *, wanted: bool) -> None:
        """Let an engine have connections to a unix socket, or no more.

        For parts of this library, see `netns_kit.namespace.agent_sockets`.

        Args:
            address: The address, as connect(2) takes it.
            wanted: False: the engine gets none any more.

        Raises:
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The engine may have been let.
        """
        await self._ask(Done, "allow_unix", address=address, wanted=wanted)

    async def prepare_transparent(self, *, ipv6: bool) -> None:
        """Let connections keep the address of their client, which is none of the namespace.

        For parts of this library, see `netns_kit.namespace.agent_sockets`.

        Args:
            ipv6: Whether those of IPv6 are to, beside those of IPv4.

        Raises:
            FeatureUnavailable: The caller may not have that here, or the kernel does not know it.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The routes may have been made.
        """
        try:
            await self._ask(Done, "prepare_transparent", ipv6=ipv6)
        except OSError as exc:
            raise FeatureUnavailable(
                f"no socket in this namespace may have the address of a client: {exc.strerror}",
                fix='use mode="stack", which keeps the address too; this takes CAP_NET_ADMIN in the namespace',
                errno=exc.errno,
            ) from exc

    async def route_answers(self, family: int, port: int, *, wanted: bool) -> None:
        """Have what programs send by UDP from a port go to transparent sockets, or no more.

        For parts of this library, see `netns_kit.namespace.agent_sockets`.

        Args:
            family: The address family, a number.
            port: The port that programs send from.
            wanted: False: the packets leave the namespace again.

        Raises:
            OSError: The kernel does not take the rule.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The rule may have been changed.
        """
        await self._ask(Done, "route_answers", family=int(family), port=port, wanted=wanted)

    async def connect_tcp(self, host: AddressLike, port: int) -> anyio.abc.SocketStream:
        """Connect by TCP from the namespace.

        Args:
            host: An address.  Names mean nothing here.
            port: A port from 1 on.

        Raises:
            AddressError: `host` is no address.
            ArgumentError: `port` is no port.
            OSError: That of connect(2).
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It leaves no socket.
        """
        address = arguments.address(host, "host")
        arguments.port("port", port, 1)
        sock = await self.socket(_family(address), socket.SOCK_STREAM)
        with on_error(sock.close):
            if (error := sock.connect_ex((str(address), port))) == errno.EINPROGRESS:
                with self.supervisor.guarding():
                    await anyio.wait_writable(sock)
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, f"{os.strerror(error)}: {address} port {port}")
            return await anyio.abc.SocketStream.from_socket(sock)

    async def listen_tcp(
        self, host: AddressLike = "127.0.0.1", port: int = 0, *, backlog: int = 128
    ) -> anyio.abc.SocketListener:
        """Listen for TCP connections in the namespace.

        Args:
            host: An address of the namespace.
            port: A port; 0 lets the kernel choose.
            backlog: How many connections wait to be accepted, as in listen(2).

        Raises:
            AddressError: `host` is no address.
            ArgumentError: `port` is no port, or `backlog` no number.
            PortInUseError: Another socket has the port.
            PrivilegedPortError: Commands may not use a port as low as that.
            OSError: That of bind(2) or listen(2).
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It leaves no socket.
        """
        sock = await self.listening_socket("tcp", host, port, backlog=backlog)
        with on_error(sock.close):
            return await anyio.abc.SocketListener.from_socket(sock)

    async def listening(self) -> tuple[ListeningSocket, ...]:
        """Return the sockets of the namespace that wait for clients, of TCP and UDP.

        Raises:
            FeatureUnavailable: This kernel has no socket diagnostics.
            OSError: EMSGSIZE: there are more than about 65,000.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It changes nothing.
        """
        diagnostics = await self.diagnostics()
        try:
            return tuple(await diagnostics.parse(await diagnostics.dump(get_args(Protocol))))
        finally:
            diagnostics.close()

    async def diagnostics(self) -> SocketDiagnostics:
        """Return what tells of the namespace's sockets, for parts of this library.  It is the caller's to close.

        Raises:
            FeatureUnavailable: This kernel has no socket diagnostics.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It leaves no socket.
        """
        try:
            sock = await self.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG)
        except OSError as exc:
            raise diagnosis.feature("socket diagnostics", exc, "3.3", "socket with AF_NETLINK") from exc
        return SocketDiagnostics(sock, self._agent.betrayed)

    async def process_of(
        self,
        protocol: Literal["tcp", "udp", "icmp"],
        local: tuple[AddressLike, int],
        remote: tuple[AddressLike, int],
    ) -> ProcessInfo | None:
        """Return the process inside that has the socket of a flow; None if it is not known.

        It is not known if the socket is closed by now, as that of a short flow mostly is, or its owner is not found
        within 20 ms.  Programs inside decide what they are called, and may hide; see `ProcessInfo`.

        Args:
            protocol: "tcp", "udp" or "icmp".
            local: The end in the namespace, address and port, like `FlowInfo.guest`.  The port of a ping is its
                identifier.
            remote: The other end, as the namespace sees it, like `FlowInfo.remote`.

        Raises:
            ArgumentError, ArgumentTypeError, AddressError: The protocol is none of these, or an end is no address
                and port.
            FeatureUnavailable: This kernel has no socket diagnostics.
            NamespaceGone: The namespace is not open.

        Cancellation: Nothing is changed.
        """
        arguments.one_of("protocol", protocol, ("tcp", "udp", "icmp"))
        ends: dict[str, str | int] = {}
        for name, end in (("local", local), ("remote", remote)):
            arguments.instance(name, end, tuple, "address and port", 'write it like ("10.0.2.100", 40000)')
            address, port = end
            arguments.port(f"{name}_port", port)
            ends |= {name: str(arguments.address(address)).partition("%")[0], f"{name}_port": port}
        with self.supervisor.guarding():
            conversation = await self._converse("process_of", protocol=protocol, **ends)
            try:
                return await conversation.process()
            except OSError as error:
                if isinstance(error, NetnsKitError):
                    raise
                raise diagnosis.feature("socket diagnostics", error, "3.3") from error
            finally:
                conversation.close()


def _family(address: IPv4Address | IPv6Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6
