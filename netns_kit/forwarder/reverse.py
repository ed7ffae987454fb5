"""The caller's side of reverse forwards: ports and unix sockets inside that lead out.

This side makes the listening socket, which is one of the namespace, and the engine accepts on a copy of it.  What
leads to Python code is served here, on the caller's event loop.  So is what leads to a unix socket, where the engine
is in a sandbox that has no unix sockets.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel
from anyio.abc import SocketListener, SocketStream, TaskGroup

from netns_kit.frozen import replace
from netns_kit.host.paths import NOTHING_MADE, Made
from netns_kit.host.undo import on_error
from netns_kit.namespace.background import Supervisor
from netns_kit.namespace.namespace import Namespace

from .binding import BACKLOG, listen_unix
from .forwards import Forwards
from .ports import ReverseForward, UnixSocket

CLIENTS_MOST = 256  # of a handler at a time: the others wait in the kernel's queue
PAUSE = 1.0  # seconds without accepting when the process is out of descriptors

StreamHandler: TypeAlias = Callable[[SocketStream], Awaitable[object]]
"""A function that serves one client, whose connection is closed when it returns."""

logger = logging.getLogger(__name__)


class Reverser:
    """The reverse forwards of one forwarder.

    Args:
        namespace: Where they listen.
        supervisor: Whose background tasks serve what leads to Python code.
        ask: Has the engine do an operation.
        owner: The forwarder, as the engine knows it.
        hand_over: Has the engine do an operation with a forward and a copy of a socket.
    """

    def __init__(
        self,
        namespace: Namespace,
        supervisor: Supervisor,
        ask: Callable[..., Awaitable[Any]],
        owner: int,
        hand_over: Callable[..., Awaitable[Any]],
    ) -> None:
        self._namespace = namespace
        self._supervisor = supervisor
        self._ask = ask
        self._owner = owner
        self._hand_over = hand_over
        self._parts: dict[ReverseForward, tuple[Service | None, Made]] = {}

    @property
    def forwards(self) -> tuple[ReverseForward, ...]:
        """The reverse forwards, oldest first."""
        return tuple(self._parts)

    async def add(self, forward: ReverseForward, handler: StreamHandler | None) -> ReverseForward:
        """Listen, and return the forward with the port that it has.  Raises as `Forwarder.reverse` does."""
        sock, made = await _listen_inside(self._namespace, forward)
        with on_error(sock.close, made.remove):
            if not isinstance(forward.inside, UnixSocket):
                forward = replace(forward, inside_port=sock.getsockname()[1])
            if handler is None and not await self._lead_by_engine(forward, sock):
                assert isinstance(forward.to, UnixSocket)
                handler = to_unix(forward.to)
        service = None
        if handler is not None:
            service = Service(sock, handler)
            self._supervisor.start(service.run)
        else:
            sock.close()  # the engine has its own
        self._parts[forward] = service, made
        return forward

    async def _lead_by_engine(self, forward: ReverseForward, sock: socket.socket) -> bool:
        """Have the engine accept; return False if it may have no unix sockets."""
        try:
            await self._hand_over(Forwards.reverse, forward, sock)
        except PermissionError:
            if not isinstance(forward.to, UnixSocket):
                raise
            return False
        return True

    async def remove(self, forward: ReverseForward, *, cut: bool) -> bool:
        """Stop listening, and return whether there was such a forward."""
        if forward not in self._parts:
            return False
        service, made = self._parts.pop(forward)
        made.remove()
        if service is not None:
            await service.stop(cut=cut)
        else:
            await self._ask(Forwards.remove, self._owner, forward)
            if cut:
                await self._ask(Forwards.cut, forward)
        return True

    def close(self) -> None:
        """Remove the files that were made.  The listening sockets end with the engine's part, and with the tasks."""
        while self._parts:
            _, (_, made) = self._parts.popitem()
            with suppress(OSError):
                made.remove()


class Service:
    """A listening socket whose clients are served by a handler, on the event loop.

    Args:
        sock: The socket, which is this object's from now on.
        handler: Serves one client.
    """

    def __init__(self, sock: socket.socket, handler: StreamHandler) -> None:
        self._socket = sock
        self._handler = handler
        self._accepting = anyio.CancelScope()
        self._serving = anyio.CancelScope()
        self._closed = anyio.Event()

    async def run(self) -> None:
        """Serve until the socket is closed and the last client has gone."""
        try:
            with self._serving:
                async with anyio.create_task_group() as tasks:
                    with self._accepting:
                        async with await SocketListener.from_socket(self._socket) as listener:
                            await self._accept(listener, tasks)
                    self._closed.set()
        finally:
            self._socket.close()
            self._closed.set()

    async def _accept(self, listener: SocketListener, tasks: TaskGroup) -> None:
        room = anyio.Semaphore(CLIENTS_MOST)
        while True:
            await room.acquire()
            try:
                stream = await listener.accept()
            except OSError:  # out of descriptors, or that client has gone again
                room.release()
                await anyio.sleep(PAUSE)
            else:
                tasks.start_soon(self._serve, stream, room)

    async def _serve(self, stream: SocketStream, room: anyio.Semaphore) -> None:
        try:
            async with stream:
                await self._handler(stream)
        except (anyio.BrokenResourceError, ConnectionError):  # the client's end, or no server
            pass
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            await anyio.lowlevel.checkpoint_if_cancelled()  # else what the handler waited for was cancelled
            logger.error("the handler of a reverse forward has failed", exc_info=error)
        finally:
            room.release()

    async def stop(self, *, cut: bool = False) -> None:
        """Accept nobody any more; with `cut`, end those that are being served.  The port is free then."""
        self._accepting.cancel()
        if cut:
            self._serving.cancel()
        await self._closed.wait()


async def _listen_inside(namespace: Namespace, reverse: ReverseForward) -> tuple[socket.socket, Made]:
    """Return the listening socket of a reverse forward, and the file that was made for it.

    Raises:
        PortInUseError: Another socket has the port, or something is at the path.
        PrivilegedPortError: The port is too low.
        NamespaceGone: The namespace has ended, or is not open.
        OSError: As the kernel says.
    """
    where = reverse.inside
    if not isinstance(where, UnixSocket):
        port = reverse.inside_port
        sock = await namespace.listening_socket(reverse.protocol, where, port, backlog=BACKLOG)
        return sock, NOTHING_MADE
    if not where.path.startswith("@"):
        return listen_unix(where)  # files are the host's: the commands' as well
    return listen_unix(where, await namespace.socket(socket.AF_UNIX, socket.SOCK_STREAM))


def to_unix(where: UnixSocket) -> StreamHandler:
    """Return a handler that joins its clients to a unix socket of the host."""

    async def handle(stream: SocketStream) -> None:
        async with await anyio.connect_unix(where.address) as other, anyio.create_task_group() as tasks:
            tasks.start_soon(_carry, stream, other, tasks)
            await _carry(other, stream, tasks)

    return handle


async def _carry(source: SocketStream, sink: SocketStream, tasks: TaskGroup) -> None:
    """Carry what one side says to the other; where either breaks off, end both directions."""
    try:
        async for data in source:
            await sink.send(data)
        await sink.send_eof()
    except (anyio.BrokenResourceError, OSError):
        tasks.cancel_scope.cancel()
