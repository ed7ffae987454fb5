"""Programs inside, workers that were taken over and clients, against published ports."""

from __future__ import annotations

import array
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress

import anyio
import pytest

from netns_kit import Namespace, Network
from netns_kit.child.channel import receive_record
from netns_kit.child.supply import MOST, ORDER, REPLY
from netns_kit.forwarder.ports import PortForward, UnixSocket
from netns_kit.host.abi import SCM_MAX_FD
from tests.support import needs_tun
from tests.support.connections import accepted, send
from tests.support.servers import bounded

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

INET, UNIX, STREAM = int(socket.AF_INET), int(socket.AF_UNIX), int(socket.SOCK_STREAM)
OWN, LOOPBACK = "10.0.2.100", "127.0.0.1"


# -- a worker that was taken over, and has the supply -------------------------------------------------


@pytest.fixture
async def namespace(leaks: None) -> AsyncIterator[Namespace]:
    needs_tun()
    async with Namespace.create() as namespace:
        yield namespace


async def sockets_of(namespace: Namespace) -> int:
    """How many sockets the namespace has, whoever has them open."""
    done = await namespace.run(["cat", "/proc/net/sockstat"], stdout=-1)
    return int(done.stdout.split()[2])


async def has_no_more_sockets_than(namespace: Namespace, number: int) -> None:
    """Closing takes the kernel its time."""
    while await sockets_of(namespace) > number:  # noqa: ASYNC110 - nobody tells
        await anyio.sleep(0.02)


async def answered(supply: socket.socket, order: bytes) -> tuple[int, int]:
    """What an order is answered by: an error, and so many sockets."""
    await anyio.wait_writable(supply)
    supply.send(order)
    await anyio.wait_readable(supply)
    data, fds, _ = receive_record(supply, SCM_MAX_FD)
    for fd in fds:
        socket.socket(fileno=fd).close()
    return REPLY.unpack(data)[3], len(fds)


@pytest.mark.parametrize(
    ("order", "error"),
    [
        (ORDER.pack(INET, STREAM, 0, 255), 0),
        (ORDER.pack(int(socket.AF_NETLINK), int(socket.SOCK_RAW), 0, 1), errno.EINVAL),
        (ORDER.pack(int(socket.AF_PACKET), int(socket.SOCK_RAW), 0, 1), errno.EINVAL),
        (ORDER.pack(INET, int(socket.SOCK_RAW), 0, 1), errno.EINVAL),
        (ORDER.pack(INET, STREAM | 0x80, 0, 1), errno.EINVAL),
        (ORDER.pack(UNIX, STREAM, 0, 255) + b"/run/dbus/system_bus_socket", errno.EACCES),
        (ORDER.pack(UNIX, STREAM, 0, 1) + b"\0abstract", errno.EACCES),
        (ORDER.pack(UNIX, STREAM, 0, 1), errno.EACCES),
        (ORDER.pack(UNIX, STREAM, 0, 1) + b"x" * 4000, errno.EACCES),
        (ORDER.pack(255, 255, 255, 255), errno.EINVAL),
    ],
)
@bounded
async def test_an_order_gets_sockets_of_tcp_and_udp_alone(
    namespace: Namespace, order: bytes, error: int
) -> None:
    supply, owners = await namespace.supply_sockets()
    with supply, owners:
        assert await answered(supply, order) == (error, 0 if error else MOST)
        assert await answered(supply, ORDER.pack(INET, STREAM, 0, 1)) == (0, 1)


@bounded
async def test_orders_whose_answers_nobody_reads_stop_nobody(namespace: Namespace) -> None:
    before = await sockets_of(namespace)
    supply, owners = await namespace.supply_sockets()
    with supply, owners:
        for _ in range(5):
            with suppress(BlockingIOError):
                while True:
                    supply.send(ORDER.pack(INET, STREAM, 0, 255))
            await anyio.sleep(0.05)
        assert await sockets_of(namespace) - before < 16 * MOST
        with await namespace.socket(socket.AF_INET, socket.SOCK_STREAM):
            pass
    await has_no_more_sockets_than(namespace, before)


@pytest.mark.parametrize("garbage", [b"x", b"", bytes(3)])
@bounded
async def test_garbage_costs_the_supply_alone(namespace: Namespace, garbage: bytes) -> None:
    before = await sockets_of(namespace)
    supply, owners = await namespace.supply_sockets()
    with supply, owners:
        supply.send(garbage)
        await namespace.run(["true"])
    supply, owners = await namespace.supply_sockets()
    with supply, owners:
        assert await answered(supply, ORDER.pack(INET, STREAM, 0, 1)) == (0, 1)
    await has_no_more_sockets_than(namespace, before)


@bounded
async def test_descriptors_that_come_with_orders_are_not_kept(namespace: Namespace) -> None:
    supply, owners = await namespace.supply_sockets()
    near, far = socket.socketpair()
    with supply, owners, near:
        with far:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [far.fileno()] * 250))]
            for _ in range(20):
                supply.sendmsg([ORDER.pack(INET, STREAM, 0, 1)], rights)
                await anyio.wait_readable(supply)
                for fd in receive_record(supply, SCM_MAX_FD)[1]:
                    socket.socket(fileno=fd).close()
        near.settimeout(3)
        assert near.recv(1) == b"", "nobody has the other end any more"


# -- clients ------------------------------------------------------------------------------------------


@pytest.fixture(params=["thread", "worker"])
async def net(leaks: None, request: pytest.FixtureRequest) -> AsyncIterator[Network]:
    needs_tun()
    async with Network(driver=request.param) as net:
        yield net


@bounded
async def test_a_burst_of_clients_of_a_unix_socket_all_get_in(every_descriptor: int, net: Network) -> None:
    count = 600
    inner, outer = UnixSocket("@service"), UnixSocket("@published")
    await net.forwarder.add(PortForward("tcp", outer, 0, inner, 0))
    with await net.namespace.socket(socket.AF_UNIX, socket.SOCK_STREAM) as service, ExitStack() as stack:
        service.bind(inner.address)
        service.listen(4096)
        clients = []
        for _ in range(count):
            client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            client.connect(outer.address)
            client.setblocking(False)
            clients.append(client)
        for each in clients:
            await send(each, b"x")
        served = [stack.enter_context(await accepted(service)) for _ in range(count)]
        assert len(served) == count
