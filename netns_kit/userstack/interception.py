"""Interception, on the caller's side: the streams of flows that a handler has before they leave.

An intercepted stream begins when the handler first reads or sends: until then the guest's SYN is on hold, and the
engine has no socket of it.  What was looked at (`peek`) is kept here, and received again.

The way out is a socket that the engine has opened by the stack's uplink, and has handed over: what a handler sends
there does not pass the engine.  Nothing reads ahead of the handler, so that whatever is in the kernel when a stream
is joined is the engine's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import anyio
from anyio.abc import SocketAttribute, UnreliableObjectStream
from anyio.lowlevel import checkpoint

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.child.channel import receive_record
from netns_kit.child.codec import dump
from netns_kit.domain_names import to_text
from netns_kit.errors import ArgumentError, NetnsKitError
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.served import DATAGRAM
from netns_kit.gateway.serving import Serving
from netns_kit.policy.first_bytes import FirstBytes, Seen
from netns_kit.policy.policy import Policy
from netns_kit.policy.rules import Rule

from .guest_streams import (
    AT_ONCE,
    LONGEST_PAYLOAD,
    EndStream,
    GuestDatagrams,
    GuestStream,
    _End,
    _Flow,
    pair_of,
)
from .serving import Claim, Servers, note_failure, numbers

PEEKED_MOST = 65536


class UpstreamStream(EndStream):
    """The way out of an intercepted connection, as a stream of bytes: see `InterceptedStream.connect_upstream`.

    Its attributes are those of anyio's `SocketAttribute`.

    Args:
        sock: The socket, which is connected.
    """

    _way: _Flow | None = None  # the flow of its other end, if that is in this process

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._attributes = _attributes_of(sock)

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return self._attributes

    async def receive(self, max_bytes: int = AT_ONCE) -> bytes:
        """Return the next bytes, as soon as there are any.

        Args:
            max_bytes: How many there are at most.

        Raises:
            anyio.EndOfStream: The server has sent all that it wanted to send.
            anyio.BrokenResourceError: The connection was reset.
            anyio.ClosedResourceError: The stream is closed, or was joined.

        Cancellation: Nothing is lost.
        """
        data = await self._end.receive(max_bytes)
        if not data:
            if self._way is not None and self._way.has_failed:
                raise anyio.BrokenResourceError
            raise anyio.EndOfStream
        return data


class UpstreamDatagrams(UnreliableObjectStream[bytes]):
    """The way out of an intercepted UDP flow.  `InterceptedDatagrams.connect_upstream` returns it.

    Args:
        sock: The socket, which is connected.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._end = _End(sock)
        self._mark = DATAGRAM if sock.family == socket.AF_UNIX else b""
        self._attributes = _attributes_of(sock)

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return self._attributes

    async def receive(self) -> bytes:
        """Return the next datagram, as soon as there is one.

        Raises:
            anyio.BrokenResourceError: An ICMP error has come for what was sent; or the way out has ended: the proxy
                that it led through has, or the handler of a `FakeInternet`.
            anyio.ClosedResourceError: This was closed.

        Cancellation: Nothing is lost.
        """
        record = await self._end.receive(AT_ONCE)
        if not self._mark:
            return record
        if not record:
            raise anyio.BrokenResourceError
        return record[len(self._mark) :]

    async def send(self, item: bytes) -> None:
        """Send a datagram.

        Args:
            item: Its payload.

        Raises:
            anyio.BrokenResourceError: An ICMP error has come for what was sent before, or the payload is too long.
            anyio.ClosedResourceError: This was closed.

        Cancellation: It was not sent.
        """
        if self._mark and len(item) > LONGEST_PAYLOAD:
            raise anyio.BrokenResourceError
        await self._end.send(self._mark + item)

    async def aclose(self) -> None:
        """Close the socket.  Calling this again is allowed.

        Cancellation: The socket is closed all the same.
        """
        await self._end.aclose()


class _Intercepted:
    """What an intercepted flow has beside its stream."""

    _flow: _Flow
    is_joined: bool

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._stack = servers.stack
        self._refusals: list[BaseException] = []
        self._ways: list[socket.socket] = []  # that were opened

    async def _do(
        self, operation: Callable[..., Any], *arguments: object, fds: Sequence[int] = (), joins: bool = False
    ) -> None:
        """Have the engine do something with the flow, whatever happens here.

        Args:
            operation, arguments: See `Servers.stack`.
            fds: Descriptors that go with it.
            joins: Whether the flow is the engine's from then on.

        Raises:
            anyio.BrokenResourceError: The flow has gone.
        """
        number = self._flow.opened.id
        with anyio.CancelScope(shield=True):
            if not await self._stack.hand([fds], operation, number, *arguments, flow=number):
                raise anyio.BrokenResourceError
            self.is_joined = self.is_joined or joins

    def _leave_ways(self) -> None:
        """Close what the handler has not closed."""
        for each in self._ways:
            if each.fileno() >= 0:
                anyio.notify_closing(each)
                each.close()

    async def _upstream(
        self, address: AddressLike | None, port: int | None
    ) -> tuple[socket.socket, _Flow | None]:
        where: Address | None = None if address is None else arguments.address(address)
        if port is not None:
            arguments.port("port", port, 1)
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = [far.detach()]
        if self._flow.opened.transport == "udp":
            fds += (each.detach() for each in pair_of(is_tcp=False))
        with near:
            near.setblocking(False)
            await self._do(Serving.dial, where, port, fds=fds)
            await anyio.wait_readable(near)
            try:
                said, came, _ = receive_record(near, 1)
            except OSError as gone:
                raise anyio.BrokenResourceError from gone
        try:
            if came:
                sock = socket.socket(fileno=came[0])
                self._ways = [*(each for each in self._ways if each.fileno() >= 0), sock]
                return sock, self._servers.ways.pop(int(said[1:] or b"0"), None)
        except (OSError, ValueError):  # the engine has sent what is no socket, or no number
            os.close(came[0])
        number = int(said[1:]) if said[1:].isdigit() else 0
        if not number:
            raise anyio.BrokenResourceError
        error = OSError(number, os.strerror(number))
        self._refusals.append(error)
        raise error

    def _is_refusal(self, error: BaseException | None) -> bool:
        """Return whether an error is a refusal of the way out, or was raised for one."""
        parts = getattr(error, "exceptions", None)
        if parts:
            return all(map(self._is_refusal, parts))
        seen = error
        while seen is not None:
            if any(seen is each for each in self._refusals):
                return True
            seen = seen.__cause__
        return False


class InterceptedStream(_Intercepted, GuestStream):
    """A connection of the namespace that was intercepted, as a stream of bytes.

    Handlers of `UserStack.intercept` get it.  It is a `GuestStream`, with the same attributes: `FlowAttribute.local`
    is where the guest wanted to go, and `FlowAttribute.name` the name by which it was intercepted, or by which the
    guest knows it.  The guest's connection is accepted when the first bytes are asked for or sent.

    Args:
        servers: All that the stack has.
        flow: The flow that it belongs to.
        near: The end of the pair.
        far: The other end, for the engine.
    """

    def __init__(self, servers: Servers, flow: _Flow, near: socket.socket, far: socket.socket) -> None:
        _Intercepted.__init__(self, servers)
        GuestStream.__init__(self, flow, near)
        self._far: socket.socket | None = far
        self._ahead = b""
        self.is_joined = False

    async def _begin(self) -> None:
        """Do nothing: the connection is accepted when that is needed."""

    async def _accept(self) -> None:
        """Accept the connection, once.

        Raises:
            anyio.BrokenResourceError: The guest has given it up.
        """
        far, self._far = self._far, None
        if far is None:
            return
        self._flow.is_carried = True
        await self._do(Serving.accept, fds=[far.detach()])

    async def receive(self, max_bytes: int = AT_ONCE) -> bytes:
        if self._ahead:
            self._end.checked()
            await checkpoint()
            taken, self._ahead = self._ahead[:max_bytes], self._ahead[max_bytes:]
            return taken
        await self._accept()
        return await GuestStream.receive(self, max_bytes)

    async def send(self, item: bytes) -> None:
        await self._accept()
        await GuestStream.send(self, item)

    async def send_eof(self) -> None:
        await self._accept()
        await GuestStream.send_eof(self)

    async def peek(self, size: int = 1) -> bytes:
        """Return the next bytes without taking them: at least so many, unless the guest sends no more.

        What was peeked at is received next, or passed on by `join`.

        Args:
            size: How many are waited for, 65536 at most.

        Raises:
            ArgumentError, ArgumentTypeError: The size cannot be used.
            anyio.BrokenResourceError: The connection was reset.
            anyio.ClosedResourceError: The stream is closed, or was joined.

        Cancellation: Nothing is lost.
        """
        arguments.instance("size", size, int, "a number of bytes")
        if not 0 < size <= PEEKED_MOST:
            raise ArgumentError(f"expected 1 to {PEEKED_MOST} bytes", "size", arguments.shown(size))
        await self._accept()
        while len(self._ahead) < size:
            try:
                self._ahead += await GuestStream.receive(self, AT_ONCE)
            except anyio.EndOfStream:
                break
        return self._ahead

    async def asked_name(self) -> str | None:
        """Return the name that the client asks for in its first bytes: in a TLS ClientHello, or in an HTTP/1 request.

        Only first bytes that each server reads alike have a name.  It waits as long as the client says nothing.
        Nothing is taken: this is a `peek`.

        Returns:
            The name, in lower case; None: it is neither protocol, or there is no name that can be relied on.

        Raises:
            anyio.BrokenResourceError: The connection was reset.
            anyio.ClosedResourceError: The stream is closed, or was joined.

        Cancellation: Nothing is lost.
        """
        reader, read = FirstBytes(), 0
        while True:
            data = await self.peek(read + 1)
            if len(data) == read:
                return None
            seen = reader.feed(data[read:])
            read = len(data)
            if seen is not None:
                return to_text(seen.names[0]) if isinstance(seen, Seen) and seen.names else None

    async def connect_upstream(
        self, address: AddressLike | None = None, port: int | None = None
    ) -> UpstreamStream:
        """Connect to where the guest wanted to go, or elsewhere, by the stack's uplink.

        If the handler lets the error pass, the guest is refused as a plain flow would be.

        Args:
            address: Another address, which uplink and policy are asked about as if the guest wanted to go there.
            port: Another port.

        Raises:
            ConnectionRefusedError: Nothing listens there.
            PermissionError: The policy or the uplink refuses it.
            OSError: It cannot be reached.
            AddressError, ArgumentError, ArgumentTypeError: An argument that cannot be used.
            anyio.BrokenResourceError: The guest has gone.
            StackClosed: The stack was closed.

        Cancellation: There is no connection.
        """
        sock, way = await self._upstream(address, port)
        upstream = UpstreamStream(sock)
        upstream._way = way
        return upstream

    async def join(self, upstream: UpstreamStream | None = None) -> None:
        """Hand the rest to the engine: it carries it as it does any flow, and the handler sees no more of it.

        This returns at once; the streams are closed for the handler, and the flow goes on after it has returned.
        What was peeked at, or not received yet, goes on too.

        Args:
            upstream: What `connect_upstream` has returned; None: where the guest wanted to go.  If nothing was read
                or sent yet, this is as if the connection had not been intercepted, and whether the way out is refused
                is told to the guest alone.

        Raises:
            anyio.BrokenResourceError: The guest or the server has gone.
            anyio.ClosedResourceError: One of the streams is closed, or its end was sent.
            OSError: As `connect_upstream` raises it.
            StackClosed: The stack was closed.

        Cancellation: The connection is reset, unless it was not begun to be handed over.
        """
        number = self._flow.opened.id
        sock = self._end.checked()
        if upstream is None and self._far is not None:
            self._flow.is_carried = True
            await self._do(Serving.release, joins=True)
            await self._end.aclose()
            return
        if upstream is None:
            upstream = await self.connect_upstream()
        out = upstream._end.checked()
        if self._eof_sent or upstream._eof_sent:
            raise anyio.ClosedResourceError
        await self._accept()
        try:
            while (state := await self._stack.hand([[]], Serving.hold, number, flow=number)) == "looking":
                await self.peek(len(self._ahead) + 1)
            if state != "held":
                raise anyio.BrokenResourceError
            await self._pass_on(sock, upstream)
            await self._hand_over(out, upstream._way)
        except BaseException:
            if not self.is_joined:  # nothing more is taken from the guest, who would wait for ever
                with anyio.CancelScope(shield=True), suppress(NetnsKitError):
                    await self._stack.ask(Gateway.end_flow, number)
            raise
        await self._end.aclose()

    async def _hand_over(self, out: socket.socket, way: _Flow | None) -> None:
        """Give the way out to the engine; `way` is the flow of its other end, if that is in this process."""
        if way is not None:
            if way.has_failed:
                raise anyio.BrokenResourceError
            way.is_joined = True
        try:
            there = 0 if way is None else way.opened.id
            await self._do(Serving.go_on, there, fds=[out.detach()], joins=True)
        finally:
            if way is not None and not self.is_joined:
                way.end("reset")

    async def _pass_on(self, sock: socket.socket, upstream: UpstreamStream) -> None:
        """Send what the guest has sent and nobody has received."""
        data, self._ahead = self._ahead, b""
        while True:
            if data:
                await upstream.send(data)
            try:
                data = sock.recv(AT_ONCE)
            except BlockingIOError:
                return
            except OSError as error:
                raise anyio.BrokenResourceError from error
            if not data:
                if self._flow.ended.is_set() and self._flow.why != "finished":
                    raise anyio.BrokenResourceError
                await upstream.send_eof()
                return

    async def _finish(self) -> None:
        """Accept the connection that the handler has done nothing with, so that it can be closed."""
        if not self.is_joined and self._end._socket.fileno() >= 0:
            with suppress(anyio.BrokenResourceError):
                await self._accept()

    async def aclose(self) -> None:
        try:
            if self._far is not None and not self.is_joined:
                with anyio.CancelScope(shield=True), suppress(anyio.BrokenResourceError, NetnsKitError):
                    await self._accept()
        finally:
            if self._far is not None:
                self._far.close()
                self._far = None
            await GuestStream.aclose(self)


class InterceptedDatagrams(_Intercepted, GuestDatagrams):
    """A UDP flow of the namespace that was intercepted, as a stream of datagrams.

    It is a `GuestDatagrams`, with the same attributes.

    Args:
        servers: All that the stack has.
        flow: The flow that it belongs to.
        near: The end of the pair.
        far: The other end, for the engine.
    """

    def __init__(self, servers: Servers, flow: _Flow, near: socket.socket, far: socket.socket) -> None:
        _Intercepted.__init__(self, servers)
        GuestDatagrams.__init__(self, flow, near)
        self._far = far
        self.is_joined = False

    async def _begin(self) -> None:
        """Have the engine put datagrams into the pair."""
        self._flow.is_carried = True
        await self._do(Serving.accept, fds=[self._far.detach()])

    async def connect_upstream(
        self, address: AddressLike | None = None, port: int | None = None
    ) -> UpstreamDatagrams:
        """Open a socket to where the guest wanted to send, or elsewhere, by the stack's uplink.

        Args:
            address: Another address, which uplink and policy are asked about as if the guest wanted to send there.
            port: Another port.

        Raises:
            PermissionError: The policy or the uplink refuses it.
            OSError: It cannot be reached.
            AddressError, ArgumentError, ArgumentTypeError: An argument that cannot be used.
            anyio.BrokenResourceError: The flow has ended.
            StackClosed: The stack was closed.

        Cancellation: There is no socket.
        """
        sock, _ = await self._upstream(address, port)
        return UpstreamDatagrams(sock)

    async def join(self) -> None:
        """Hand the flow to the engine, with what was not received: it carries it as if nobody had intercepted it.

        Raises:
            anyio.BrokenResourceError: The flow has ended.
            anyio.ClosedResourceError: This was closed.
            StackClosed: The stack was closed.

        Cancellation: The flow is handed over, or nothing has happened.
        """
        number = self._flow.opened.id
        near = self._end.checked()
        with anyio.CancelScope(shield=True):
            is_there = await self._stack.hand([[near.detach()]], Serving.release, number, flow=number)
            self.is_joined = True
        if not is_there:
            raise anyio.BrokenResourceError

    async def _finish(self) -> None:
        """Do nothing: the flow is forgotten by closing it."""

    async def aclose(self) -> None:
        self._far.close()
        await GuestDatagrams.aclose(self)


class Interceptor(Claim):
    """A rule whose flows a handler of this process has, until `aclose`; `async with` calls that.

    Flows that were handed back to the engine go on.

    Args:
        servers: All that the stack has.
        number: The number under which the stack has this one.
        rule: What it is about.
        handler: The function that has a flow.
    """

    rule: Rule
    """The rule: what it is about."""

    def __init__(self, servers: Servers, number: int, rule: Rule, handler: Any) -> None:
        super().__init__(servers, number, "udp" if rule.protocol == "udp" else "tcp", handler)
        self.rule = rule

    async def _have(self, flow: _Flow) -> None:
        number, servers, is_tcp = flow.opened.id, self._servers, self.transport == "tcp"
        kind = InterceptedStream if is_tcp else InterceptedDatagrams
        ours, theirs = pair_of(is_tcp)
        flow.has_handler = True
        stream = kind(servers, flow, ours, theirs)
        try:
            await stream._begin()
            await self._handler(stream)
            await stream._finish()
        except BaseException as error:
            if stream._is_refusal(error):
                with anyio.CancelScope(shield=True):
                    await servers.stack.hand([[]], Serving.turn_back, number, flow=number)
                return
            try:
                await note_failure(error, flow.opened.remote)
            finally:
                if not stream.is_joined:
                    await servers.reset(number)
        finally:
            stream._leave_ways()
            try:
                await stream.aclose()
            finally:
                if not stream.is_joined:  # else it is the engine's
                    await servers.leave(flow, ours)


async def intercept(servers: Servers, rule: Rule, handler: Any) -> Interceptor:
    """Intercept what a rule is about.  Raises as `UserStack.intercept` does."""
    number = next(numbers)
    interceptor = Interceptor(servers, number, rule, handler)
    text = dump(Policy("deny", (rule,))).decode()
    await servers.claim(number, interceptor, Serving.intercept, text)
    return interceptor


TcpInterceptHandler: TypeAlias = Callable[[InterceptedStream], Awaitable[object]]
"""A function that has one intercepted connection."""
UdpInterceptHandler: TypeAlias = Callable[[InterceptedDatagrams], Awaitable[object]]
"""A function that has one intercepted UDP flow."""


def _attributes_of(sock: socket.socket) -> Mapping[Any, Callable[[], Any]]:
    attributes: dict[Any, Callable[[], Any]] = {
        SocketAttribute.family: lambda: sock.family,
        SocketAttribute.raw_socket: lambda: sock,
    }
    if sock.family != socket.AF_UNIX:
        remote: tuple[str, int] = ("", 0)
        with suppress(OSError):  # the server has gone
            remote = sock.getpeername()[:2]
        local: tuple[str, int] = sock.getsockname()[:2]
        attributes[SocketAttribute.remote_address] = lambda: remote
        attributes[SocketAttribute.remote_port] = lambda: remote[1]
        attributes[SocketAttribute.local_address] = lambda: local
        attributes[SocketAttribute.local_port] = lambda: local[1]
    return attributes
