"""Serving, on the caller's side: handlers of the guest's flows, and connections to the guest.

Each flow is one end of a pair of unix sockets, whose other end the engine carries (`netns_kit.gateway.serving`).  So
a handler that does not read holds up its guest, and one that is cancelled resets its connection.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from itertools import count
from typing import Any, Literal, Protocol

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled
from typing_extensions import Self

from netns_kit.arguments import Address
from netns_kit.errors import NetnsKitError
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.served import Echo, Ended, EndingSeen, Opened, Question
from netns_kit.gateway.serving import Serving
from netns_kit.operations import Asked
from netns_kit.stack import Refusal
from netns_kit.uplink.flow import Endpoint

from .guest_streams import GuestDatagrams, GuestStream, _Flow, pair_of

FLOWS_MOST = 256  # of a handler at a time: the others wait, with their SYN on hold
ANSWERS_MOST = 64  # to queries and pings, that are on their way to the stack

logger = logging.getLogger(__name__)
numbers = count(1)


class Claim:
    """Flows that this process has, until `aclose`; `async with` calls that.

    Args:
        servers: All that the stack has.
        number: The number under which the stack has this one.
        transport: "tcp" or "udp".
        handler: The function that serves a flow.
    """

    transport: Literal["tcp", "udp"]
    """The transport: "tcp" or "udp"."""

    def __init__(self, servers: Servers, number: int, transport: Literal["tcp", "udp"], handler: Any) -> None:
        self.transport = transport
        self._servers = servers
        self._number = number
        self._handler = handler
        self._room = anyio.Semaphore(FLOWS_MOST)
        self._flows: set[_Flow] = set()
        self._nobody_left = anyio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Serve no more: the handlers are cancelled and their connections reset, and the port is free.

        Calling it again is allowed, also when the stack has been closed.

        Cancellation: It serves no more, but handlers may still be on their way out.
        """
        await self._servers.stop(self._number, self)

    async def _have(self, flow: _Flow) -> None:
        """Have a flow, to its end."""
        number = flow.opened.id
        is_tcp = self.transport == "tcp"
        ours, theirs = pair_of(is_tcp)
        try:
            flow.is_carried = True
            with anyio.CancelScope(shield=True):
                if not await self._servers.stack.hand(
                    [[theirs.detach()]], Serving.accept, number, flow=number
                ):
                    return
            flow.has_handler = True
            stream = GuestStream(flow, ours) if is_tcp else GuestDatagrams(flow, ours)
            try:
                await self._handler(stream)
            except BaseException as error:
                try:
                    await note_failure(error, flow.opened.remote)
                finally:
                    await self._servers.reset(number)
        finally:
            await self._servers.leave(flow, ours)


class GuestServer(Claim):
    """An address and port that this process answers, until `aclose`; `async with` calls that.

    Args:
        servers: All that the stack has.
        number: The number under which the stack has this one.
        transport: "tcp" or "udp".
        address: The address; None: any.
        port: The port.
        handler: The function that serves a flow.
    """

    address: IPv4Address | IPv6Address | None
    """The address; None: any."""
    port: int
    """The port."""

    def __init__(
        self,
        servers: Servers,
        number: int,
        transport: Literal["tcp", "udp"],
        address: Address | None,
        port: int,
        handler: Any,
    ) -> None:
        super().__init__(servers, number, transport, handler)
        self.address = address
        self.port = port


class _Connecting:
    """A connection to the guest that is not decided yet."""

    def __init__(self) -> None:
        self.decided = anyio.Event()
        self.flow: _Flow | None = None
        self.why: EndingSeen | None = None


class World(Protocol):
    """What answers all flows and queries of a stack whose uplink is in memory."""

    def joined(self, servers: Servers) -> None:
        """Note that the flows of a stack come from now on."""

    def left(self, servers: Servers) -> None:
        """Note that no more come."""

    def server(self, servers: Servers, opened: Opened) -> GuestServer | Refusal:
        """Return what serves a flow, or how it is refused."""
        ...

    def resolve(self, servers: Servers, query: bytes) -> bytes:
        """Return the answer to a query for a name, for a stack."""
        ...

    def echo(self, asked: Echo) -> Refusal | None:
        """Return None if an echo request is answered, or how it is refused."""
        ...


class Servers:
    """The caller's side of all flows of one stack that end in this process.

    Args:
        stack: The stack.

    Attributes:
        stack: The stack.
        ways: The ways out of intercepted flows that end in this process, until their other end knows them.
    """

    def __init__(self, stack: Asked) -> None:
        self.stack = stack
        self._news = anyio.Event()
        self._services: dict[int, Claim | _Connecting | World] = {}
        self._flows: dict[int, _Flow] = {}
        self._world: World | None = None
        self._claims: set[Claim] = set()  # that have flows
        self.ways: dict[int, _Flow] = {}
        self._is_closing = False
        self._kept: list[socket.socket] = []  # until the engine has ended, which sees no end of a stream so
        self._answers = anyio.Semaphore(ANSWERS_MOST)

    def set(self) -> None:
        """Note that something has happened to flows."""
        self._news.set()

    async def run(self, number: int) -> None:
        """Serve until this is cancelled, or the stack is closed.

        Args:
            number: The number by which the stack knows this subscriber.
        """
        try:
            async with anyio.create_task_group() as tasks:
                try:
                    with suppress(NetnsKitError):  # the stack has ended, and others tell why
                        await self.stack.ask(Serving.listen, number)
                        while True:
                            for each in await self.stack.ask(Serving.take):
                                if isinstance(each, Question | Echo):
                                    await self._answers.acquire()
                                    tasks.start_soon(self._answer, each)
                                else:
                                    self._take(each, tasks)
                            await self._news.wait()
                            self._news = anyio.Event()
                finally:
                    self._is_closing = True
                    for claim in self._claims:
                        self.cut(claim)
                tasks.cancel_scope.cancel()
        finally:
            for flow in self._flows.values():
                flow.end("closed here")
            self._flows.clear()
            if self._world is not None:
                self._world.left(self)

    def close(self) -> None:
        """Close the ends of the streams that were cut when the stack was closed: the engine has ended."""
        for each in self._kept:
            each.close()
        self._kept.clear()

    def _take(self, news: Opened | Ended, tasks: TaskGroup) -> None:
        service = self._services.get(news.service)
        if isinstance(news, Ended):
            if isinstance(service, _Connecting) and service.flow is None:
                service.why = news.why
                service.decided.set()
            elif news.id in self._flows:
                self.ways.pop(news.id, None)
                self._flows.pop(news.id).end(news.why)
        elif isinstance(service, _Connecting):
            flow = self._flows[news.id] = service.flow = _Flow(news)
            flow.is_carried = True
            service.decided.set()
        elif service is not None:
            found = service if isinstance(service, Claim) else service.server(self, news)
            if isinstance(found, Refusal):
                tasks.start_soon(self._decided, Serving.refuse, news.id, found)
            else:
                flow = self._flows[news.id] = _Flow(news)
                if news.within:
                    self.ways[news.id] = flow
                found._flows.add(flow)
                self._claims.add(found)
                tasks.start_soon(self._serve, found, flow)

    # -- an uplink in memory --------------------------------------------------------------------------

    async def attach(self, world: World) -> None:
        """Have a world answer all that the uplink of the stack carries, an uplink in memory."""
        number = next(numbers)
        self._world = self._services[number] = world
        await self.stack.ask(Serving.carry, number)
        world.joined(self)

    def made(self, transport: Literal["tcp", "udp"], port: int, handler: Any) -> GuestServer:
        """Return a new server for flows of a world.  It has no address and port of the stack to itself."""
        return GuestServer(self, 0, transport, None, port, handler)

    def cut(self, server: Claim) -> None:
        """Cancel the handlers of a server, so that their connections are reset.  New ones are served."""
        for flow in server._flows:
            flow.cut()

    async def _answer(self, asked: Question | Echo) -> None:
        world = self._world
        try:
            if world is None:
                return
            if isinstance(asked, Echo):
                await self._decided(Serving.echoed, asked.id, asked.sequence, world.echo(asked))
            else:
                with suppress(ValueError):  # a worker may say anything
                    answer = world.resolve(self, bytes.fromhex(asked.message))
                    await self._decided(Serving.resolved, asked.id, answer.hex())
        finally:
            self._answers.release()

    async def _decided(self, operation: Callable[..., None], number: int, *arguments: object) -> None:
        """Tell the stack what becomes of a flow or a query."""
        with suppress(NetnsKitError):  # the stack has ended, and others tell why
            await self.stack.hand([()], operation, number, *arguments, flow=number)

    # -- flows of the guest ---------------------------------------------------------------------------

    async def serve(
        self, transport: Literal["tcp", "udp"], address: Address | None, port: int, handler: Any
    ) -> GuestServer:
        """Serve an address and port.  Raises as `UserStack.serve_tcp` does."""
        number = next(numbers)
        server = GuestServer(self, number, transport, address, port, handler)
        await self.claim(number, server, Serving.serve, transport, address, port)
        return server

    async def claim(
        self, number: int, claim: Claim, operation: Callable[..., None], *arguments: object
    ) -> None:
        """Have the engine claim flows.

        Args:
            number: The number under which it tells of them.
            claim: What has them.
            operation: What claims them, called with the number.
            arguments: The further arguments.

        Raises what the operation raises.
        """
        self._services[number] = claim
        try:
            with anyio.CancelScope(shield=True):
                await self.stack.ask(operation, number, *arguments)
        except BaseException:
            del self._services[number]
            raise

    async def stop(self, number: int, server: Claim) -> None:
        """Serve no more, as `GuestServer.aclose` says."""
        if self._services.pop(number, None) is not None:
            self.cut(server)
            with anyio.CancelScope(shield=True), suppress(NetnsKitError):
                await self.stack.ask(Serving.stop, number)
        await checkpoint()
        if server._flows:
            await server._nobody_left.wait()

    async def _serve(self, server: Claim, flow: _Flow) -> None:
        try:
            with flow.scope:
                async with server._room:
                    await server._have(flow)
        except NetnsKitError:  # the stack has ended, and others tell why
            pass
        except OSError:  # out of descriptors
            await self.reset(flow.opened.id)
        finally:
            server._flows.discard(flow)
            if flow.opened.within and not flow.is_joined:
                self._flows.pop(flow.opened.id, None)  # of which the engine knows nothing
            if not server._flows:
                self._claims.discard(server)
                server._nobody_left.set()
                server._nobody_left = anyio.Event()

    async def leave(self, flow: _Flow, end: socket.socket) -> None:
        """Close the handler's end of a flow, which was reset before if it was cut."""
        if flow.is_cut and self._is_closing:
            self._kept.append(end)
            return
        if flow.is_cut:
            await self.reset(flow.opened.id)
        if end.fileno() >= 0:
            anyio.notify_closing(end)
            end.close()

    async def reset(self, number: int) -> None:
        """End a flow; a connection is reset."""
        flow = self._flows.get(number)
        if flow is not None and flow.opened.within:
            flow.has_failed = True
            if not flow.is_joined:
                return
            number = flow.opened.within
        with anyio.CancelScope(shield=True), suppress(NetnsKitError):
            await self.stack.ask(Gateway.end_flow, number)

    # -- connections to the guest ---------------------------------------------------------------------

    async def connect(self, address: Address, port: int, source: Address | None) -> GuestStream:
        """Open a connection to the guest.  Raises as `UserStack.connect_tcp` does."""
        number, id = next(numbers), 0
        connecting = self._services[number] = _Connecting()
        ours, theirs = pair_of(is_tcp=True)
        try:
            with anyio.CancelScope(shield=True):
                id = await self.stack.hand(
                    [[theirs.detach()]], Serving.connect, number, address, port, source
                )
            await connecting.decided.wait()
            if connecting.flow is None:
                raise _refusal(connecting.why)
            return GuestStream(connecting.flow, ours)
        except BaseException:
            ours.close()
            if id and connecting.why is None:
                await self.reset(id)
            raise
        finally:
            del self._services[number]


async def note_failure(error: BaseException, remote: Endpoint) -> None:
    """Log that a handler has failed, unless its guest or the server that it has asked has gone.

    Args:
        error: What it has raised.
        remote: What the guest has dialled.

    Raises what is meant for the program, or for this task: KeyboardInterrupt, and the cancellation of the task.  A
    cancellation that the handler has from elsewhere is a failure of its own, and so is SystemExit.
    """
    if isinstance(error, KeyboardInterrupt):
        raise error
    if not isinstance(error, Exception):
        await checkpoint_if_cancelled()
    if not is_of_the_peer(error):
        logger.error("the handler of %s has failed", remote, exc_info=error)


def is_of_the_peer(error: BaseException) -> bool:
    """Return whether a handler has failed since its guest, or the server that it has asked, has gone."""
    parts = getattr(error, "exceptions", None)  # an ExceptionGroup, or that of Python 3.10
    if parts:
        return all(map(is_of_the_peer, parts))
    return isinstance(error, anyio.EndOfStream | anyio.BrokenResourceError | ConnectionError)


_NUMBERS = {"refused": errno.ECONNREFUSED, "unreachable": errno.EHOSTUNREACH, "timed out": errno.ETIMEDOUT}


def _refusal(why: EndingSeen | None) -> OSError:
    number = _NUMBERS.get(why or "", errno.ECONNABORTED)
    return OSError(number, os.strerror(number))
