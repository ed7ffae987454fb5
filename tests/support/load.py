"""What the tests of load share: a network made of its parts, connections through it, and what a process spends.

The default sizes are short; with NETNS_KIT_LONG=1 in the environment each test runs at its full size.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias

import anyio
import anyio.lowlevel

from netns_kit import Forwarder, Namespace, TapDevice, Uplink, UserStack
from netns_kit.gateway.setup import DriverName
from netns_kit.stack import Limits
from netns_kit.tap.flags import GUEST_QUEUE, TAP_FLAGS
from netns_kit.tap.frame_device import Device
from netns_kit.tap.impaired import ImpairedTap
from netns_kit.tap.impairment import Impairment

GATEWAY, RESOLVER, GUEST = "10.0.2.2", "10.0.2.3", "10.0.2.100"
PORT = 80
MIB = 1 << 20
_PLAIN = TAP_FLAGS[-1:]  # no vnet header, hence no offloads

Way = Literal["out", "in"]
"""Who opens a connection: a program of the guest, or a client of a forwarded port."""
Ends: TypeAlias = tuple[socket.socket, socket.socket]
"""A connection's two sockets, the guest's first, not blocking."""
Door: TypeAlias = Callable[[], Awaitable[Ends]]


@dataclass
class Rig:
    """The parts of a `Network`."""

    namespace: Namespace
    tap: Device
    stack: UserStack
    forwarder: Forwarder

    async def weather(self, impairment: Impairment) -> None:
        """From now on the link, which was impaired from the start, is as bad as this in both directions."""
        tap = self.tap
        assert isinstance(tap, ImpairedTap)

        def change() -> None:
            tap.transmit.impairment = impairment
            tap.receive.impairment = impairment

        await self.stack.local.driver.call(change)

    async def gone(self, seconds: float) -> None:
        """Wait until no flow is left, nor a connection in TIME-WAIT, at most so long."""
        with anyio.move_on_after(seconds):
            while await self.stack.flows() or (await self.stack.stats())["tcp_time_waits"]:  # noqa: ASYNC110 - timers tell nobody
                await anyio.sleep(0.02)
        left = await self.stack.flows()
        assert not left, f"{len(left)} flows are left, the first is {left[0]}"


@asynccontextmanager
async def rig(
    driver: DriverName = "thread",
    *,
    offloads: bool = True,
    impaired: Impairment | None = None,
    uplink: Uplink | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[Rig]:
    """A namespace, its tap at an MTU of 1500, a stack and a forwarder.

    Without `offloads` every frame is what a cable would carry.  With `impaired` the link is that bad from
    the first frame on; without it a link can not become bad later.
    """
    async with AsyncExitStack() as stack:
        namespace = await stack.enter_async_context(Namespace.create())
        if offloads:
            tap: Device = TapDevice.open(namespace)
        else:
            tap = TapDevice.from_fd((await namespace.open_tap("tap0", _PLAIN)).fd)
        if impaired is not None:
            tap = ImpairedTap(tap, impaired, replace(impaired, seed=impaired.seed + 1))
        _ = await stack.enter_async_context(tap)
        assert bool(tap.offloads.vnet_header) is offloads
        user = UserStack(tap, uplink or Uplink(allow_host_loopback=True), driver=driver, limits=limits)
        await stack.enter_async_context(user)
        if not offloads:  # a descriptor that came ready-made does not tell which namespace it is of
            subnet = user.subnet
            await namespace.configure_link(
                "tap0", queue=GUEST_QUEUE, address=subnet.guest_interface, gateway=subnet.gateway
            )
        forwarder = await stack.enter_async_context(Forwarder(user))
        await user.flows()  # by now it has all its own descriptors
        yield Rig(namespace, tap, user, forwarder)


@asynccontextmanager
async def door(rig: Rig, way: Way, *, port: int = PORT, buffer: int = 0) -> AsyncIterator[Door]:
    """What makes connections, one after the other, as many as are asked for.  The caller closes them.

    `buffer` is what each of the four socket buffers holds, in bytes; 0: as the kernel likes.
    """
    one_by_one = anyio.Lock()
    async with AsyncExitStack() as stack:

        def sized(sock: socket.socket) -> socket.socket:
            sock.setblocking(False)
            if buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            return sock

        async def of_guest() -> socket.socket:
            return sized(await rig.namespace.socket(socket.AF_INET, socket.SOCK_STREAM))

        if way == "out":
            listener = stack.enter_context(sized(socket.socket()))
            listener.bind(("127.0.0.1", 0))
            address = (GATEWAY, listener.getsockname()[1])
        else:
            listener = stack.enter_context(await of_guest())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((GUEST, port))
            (forward,) = await rig.forwarder.add(f"127.0.0.1:0:{port}")
            stack.push_async_callback(rig.forwarder.remove, forward)
            address = ("127.0.0.1", forward.host_port)
        listener.listen(512)

        async def connect() -> Ends:
            async with one_by_one:  # so that the next to be accepted is the one that has connected
                client = await of_guest() if way == "out" else sized(socket.socket())
                try:
                    await _connect(client, address)
                    await anyio.wait_readable(listener)
                except BaseException:
                    client.close()
                    raise
                server = sized(listener.accept()[0])
            return (client, server) if way == "out" else (server, client)

        yield connect


async def _connect(sock: socket.socket, address: tuple[str, int]) -> None:
    error = sock.connect_ex(address)
    if error == errno.EINPROGRESS:
        await anyio.wait_writable(sock)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


async def send(sock: socket.socket, data: bytes | memoryview) -> None:
    """All of it."""
    left = memoryview(data)
    while left:
        await anyio.lowlevel.checkpoint()
        try:
            left = left[sock.send(left) :]
        except BlockingIOError:
            await anyio.wait_writable(sock)


async def receive(sock: socket.socket, size: int = 1 << 18) -> bytes:
    """What comes next, at most so much; nothing: the peer has said its last."""
    while True:
        await anyio.lowlevel.checkpoint()
        try:
            return sock.recv(size)
        except BlockingIOError:
            await anyio.wait_readable(sock)


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    """Return the bytes of memory of this process, see proc_pid_statm(5)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def leaked(sizes: Sequence[int]) -> int:
    """Return what each round of some work added to `sizes` at the least: a leak adds to every round.

    What is only made once, such as caches and arenas, adds to the first rounds, or to none if an earlier test has
    made it already.
    """
    return min(later - earlier for earlier, later in pairwise(sizes))
