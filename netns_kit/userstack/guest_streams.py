"""Streams of the guest's flows: the caller's end of a pair of unix sockets, whose other end the engine carries."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import anyio
from anyio.abc import ByteStream, SocketAttribute, UnreliableObjectStream
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint, checkpoint_if_cancelled

from netns_kit.gateway.served import DATAGRAM, LONGEST, EndingSeen, Opened
from netns_kit.uplink.flow import Endpoint

AT_ONCE_MOST = 16  # times that a stream is received from or sent to without another task having its turn
AT_ONCE = 1 << 18  # bytes that are received at once: each time costs as much as copying so many
ROOM = 1 << 20  # bytes that wait for the other end
LONGEST_PAYLOAD = 65507  # of a UDP datagram over IPv4

T = TypeVar("T")


class FlowAttribute(anyio.TypedAttributeSet):
    """The attributes of a `GuestStream` and of `GuestDatagrams`, for `extra`."""

    flow_id: int = anyio.typed_attribute()
    """Number of the flow, see `FlowInfo.id`."""
    local: Endpoint = anyio.typed_attribute()
    """Address and port of this end: what the guest has dialled, or what it sees as its client."""
    remote: Endpoint = anyio.typed_attribute()
    """The guest's end."""
    name: str | None = anyio.typed_attribute()
    """The name of `local`: of a record of ours, or the one that our DNS has answered the guest; None: unknown."""


class _Flow:
    """A flow that a handler has, or will have."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.scope = anyio.CancelScope(shield=True)  # `cut` comes before any cancellation
        self.is_carried = False
        self.is_cut = False
        self.has_handler = False
        self.has_failed = False  # its handler, if this is a way out that ends in this process
        self.is_joined = False  # to the guest, if it is such a way: the engine tells how it ends
        self.ended = anyio.Event()
        self.why: EndingSeen | None = None

    def end(self, why: EndingSeen) -> None:
        self.why = why
        self.ended.set()
        if not self.is_carried:
            self.scope.cancel()

    def cut(self) -> None:
        """Cancel the handler, which cannot end its stream any more: the guest is to see a reset."""
        self.is_cut = True
        self.scope.cancel()

    @property
    def attributes(self) -> Mapping[Any, Callable[[], Any]]:
        opened = self.opened
        local, remote = opened.remote, opened.guest
        family = socket.AF_INET if local.address.version == 4 else socket.AF_INET6
        return {
            SocketAttribute.family: lambda: family,
            SocketAttribute.local_address: lambda: (str(local.address), local.port),
            SocketAttribute.local_port: lambda: local.port,
            SocketAttribute.remote_address: lambda: (str(remote.address), remote.port),
            SocketAttribute.remote_port: lambda: remote.port,
            FlowAttribute.flow_id: lambda: opened.id,
            FlowAttribute.local: lambda: local,
            FlowAttribute.remote: lambda: remote,
            FlowAttribute.name: lambda: opened.name,
        }


class _End:
    """One end of a pair, which nothing reads ahead, so that what nobody takes holds up the other end."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._at_once = 0

    def checked(self) -> socket.socket:
        """Return the socket.

        Raises:
            anyio.ClosedResourceError: It is closed.
        """
        if self._socket.fileno() < 0:
            raise anyio.ClosedResourceError
        return self._socket

    async def receive(self, size: int) -> bytes:
        return await self._do(lambda: self.checked().recv(size), anyio.wait_readable)

    async def send(self, data: bytes | memoryview) -> int:
        return await self._do(lambda: self.checked().send(data), anyio.wait_writable)

    async def _do(self, function: Callable[[], T], ready: Callable[[socket.socket], Awaitable[None]]) -> T:
        await checkpoint_if_cancelled()
        while True:
            try:
                done = function()
            except BlockingIOError:
                self._at_once = 0
                await ready(self._socket)
            except OSError as error:
                raise anyio.BrokenResourceError from error
            else:
                self._at_once += 1
                if self._at_once >= AT_ONCE_MOST:  # others have their turn
                    self._at_once = 0
                    await cancel_shielded_checkpoint()
                return done

    async def aclose(self) -> None:
        if self._socket.fileno() >= 0:
            anyio.notify_closing(self._socket)
            self._socket.close()
        await checkpoint()


class EndStream(ByteStream):
    """A stream of bytes over one end of a pair, or over a socket.

    Args:
        sock: The socket, which is the stream's from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._end = _End(sock)
        self._eof_sent = False

    async def send(self, item: bytes) -> None:
        """Send bytes, as fast as the other side takes them.

        Args:
            item: The bytes.

        Raises:
            anyio.BrokenResourceError: The connection was reset.
            anyio.ClosedResourceError: The stream is closed, or its end was sent.

        Cancellation: Some of them may have been sent.
        """
        self._end.checked()
        if self._eof_sent:
            raise anyio.ClosedResourceError
        view = memoryview(item)
        if not view:
            await checkpoint()
        while view:
            view = view[await self._end.send(view) :]

    async def send_eof(self) -> None:
        """Send the end: the other side may still send.

        Cancellation: It may have been sent.
        """
        await checkpoint()
        self._eof_sent = True
        with suppress(OSError):  # the other side has gone
            self._end.checked().shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        """Close the connection.  Calling it again is allowed.

        Cancellation: The connection is closed all the same.
        """
        await self._end.aclose()


class GuestStream(EndStream):
    """A TCP connection with a program in the namespace, as a stream of bytes.

    Halves are closed one by one (`send_eof`).  If the guest resets the connection, receiving and sending raise
    `anyio.BrokenResourceError`.  Closing the stream while there are unread bytes resets the connection, as the kernel
    does.  For its attributes see `FlowAttribute`; those of anyio's `SocketAttribute` are there too, but for the
    socket.  Handlers of `UserStack.serve_tcp` get it, and `UserStack.connect_tcp` returns it.

    Args:
        flow: The flow that it belongs to.
        sock: The end of the pair.
    """

    def __init__(self, flow: _Flow, sock: socket.socket) -> None:
        super().__init__(sock)
        self._flow = flow

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return self._flow.attributes

    async def receive(self, max_bytes: int = AT_ONCE) -> bytes:
        """Return the next bytes, as soon as there are any.

        Args:
            max_bytes: How many there are at most.

        Raises:
            anyio.EndOfStream: The guest has sent all that it wanted to send.
            anyio.BrokenResourceError: The connection was reset, or has ended in another way before that.
            anyio.ClosedResourceError: The stream is closed.

        Cancellation: Nothing is lost.
        """
        data = await self._end.receive(max_bytes)
        if not data:
            if self._is_gone():
                await self._flow.ended.wait()  # which it has: the engine tells how
                if self._flow.why != "finished":
                    raise anyio.BrokenResourceError
            raise anyio.EndOfStream
        return data

    def _is_gone(self) -> bool:
        """Return whether the engine's end is closed, or both directions are."""
        if self._flow.opened.within and not self._flow.is_joined:
            return False  # the other end is a handler's
        poll = select.poll()
        poll.register(self._end.checked(), 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))

    async def send_eof(self) -> None:
        """Send the end: the guest may still send.

        Cancellation: It may have been sent.
        """
        if self._flow.is_cut:
            await checkpoint()
        else:
            await super().send_eof()

    async def aclose(self) -> None:
        """Close the connection.  Calling it again is allowed.

        Cancellation: The connection is closed all the same.
        """
        if self._flow.is_cut:
            await checkpoint()
        else:
            await super().aclose()

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is None or not self._flow.has_handler:  # else the guest sees a reset, if the handler fails
            await self.aclose()


class GuestDatagrams(UnreliableObjectStream[bytes]):
    """A UDP flow of the guest, as a stream of datagrams.  It ends when the flow has been idle for its lifetime.

    What is not received in time is dropped when there is no more room.  For its attributes see `FlowAttribute`.

    Args:
        flow: The flow that it belongs to.
        sock: The end of the pair.
    """

    def __init__(self, flow: _Flow, sock: socket.socket) -> None:
        self._flow = flow
        self._end = _End(sock)

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return self._flow.attributes

    async def receive(self) -> bytes:
        """Return the next datagram, as soon as there is one.

        Raises:
            anyio.EndOfStream: The flow has ended.
            anyio.BrokenResourceError: The stack has ended.
            anyio.ClosedResourceError: This was closed.

        Cancellation: Nothing is lost.
        """
        record = await self._end.receive(LONGEST)
        if not record:
            raise anyio.EndOfStream
        return record[len(DATAGRAM) :]

    async def send(self, item: bytes) -> None:
        """Send a datagram to the guest.

        Args:
            item: Its payload, of 65507 bytes at most.

        Raises:
            anyio.BrokenResourceError: The flow has ended.
            anyio.ClosedResourceError: This was closed.
            OSError: The payload is too long.

        Cancellation: It was not sent.
        """
        if len(item) > LONGEST_PAYLOAD:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        await self._end.send(DATAGRAM + item)

    async def aclose(self) -> None:
        """Forget the flow.  Calling this again is allowed.

        Cancellation: The flow is forgotten all the same.
        """
        await self._end.aclose()


TcpGuestHandler: TypeAlias = Callable[[GuestStream], Awaitable[object]]
"""A function that serves one connection.  When it returns, the connection is closed; if it raises, it is reset."""
UdpGuestHandler: TypeAlias = Callable[[GuestDatagrams], Awaitable[object]]
"""A function that serves one UDP flow.  When it returns, the flow is forgotten."""


def pair_of(is_tcp: bool) -> tuple[socket.socket, socket.socket]:
    """Return the handler's end of a flow, and the engine's."""
    kind = socket.SOCK_STREAM if is_tcp else socket.SOCK_SEQPACKET
    pair = socket.socketpair(socket.AF_UNIX, kind)
    if is_tcp:
        for end in pair:  # as much as the kernel lets it have
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
    return pair
