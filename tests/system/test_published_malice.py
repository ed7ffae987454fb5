"""Programs inside, workers that were taken over and clients, against published ports."""

from __future__ import annotations

import array
import errno
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from itertools import product
from pathlib import Path

import anyio
import pytest

from netns_kit import ArgumentError, Limits, Namespace, Network, PortInUseError, Uplink
from netns_kit.child.channel import receive_record
from netns_kit.child.supply import MOST, ORDER, REPLY
from netns_kit.errors import NetnsKitError
from netns_kit.forwarder.ports import Mode, PortForward, UnixSocket
from netns_kit.forwarder.socket_listeners import DatagramListener
from netns_kit.gateway.setup import DriverName
from netns_kit.host.abi import SCM_MAX_FD
from tests.support import ROOT, children, missing, needs, needs_tun
from tests.support.connections import accepted, echoes, exactly, failure, kernel_buffers, receive, rest, send
from tests.support.servers import SECONDS, bounded, host_address
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.usefixtures("leaks")]

INET, UNIX, STREAM = int(socket.AF_INET), int(socket.AF_UNIX), int(socket.SOCK_STREAM)
OWN, LOOPBACK = "10.0.2.100", "127.0.0.1"


def host() -> str:
    """An address of the host's own, that is a client's address inside."""
    address = host_address()
    if address is None:
        missing("no address but the loopback's")
    return str(address)


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
        near.settimeout(SECONDS)
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
    inner, outer = (
        UnixSocket("@service"),
        UnixSocket(f"@published-{os.getpid()}"),
    )  # the host's has one of a name
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


# -- programs inside ----------------------------------------------------------------------------------


@bounded
async def test_rules_that_a_program_has_removed_keep_nothing_from_ending(net: Network) -> None:
    needs("ip")
    (forward,) = await net.forwarder.add("0:53/udp", mode="transparent")
    await net.namespace.run(["ip", "rule", "flush"])
    await net.forwarder.remove(forward)
    assert await net.forwarder.list() == ()
    added = await net.forwarder.add("0:53/udp", "0:80", mode="transparent")
    assert await net.forwarder.list() == added
    await net.namespace.run(["ip", "rule", "flush"])


@bounded
async def test_a_client_that_asks_two_ports_hears_each_by_its_own(net: Network) -> None:
    """Both lead to servers that see the client's address, and answer to it."""
    one, two = await net.forwarder.add("0:53/udp", "0:54/udp", mode="transparent")
    with ExitStack() as stack:
        services = []
        for port in (53, 54):
            service = await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
            services.append(stack.enter_context(service))
            service.bind((OWN, port))
        client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        client.bind((host(), 0))
        client.setblocking(False)
        for forward, service in zip((one, two), services, strict=True):
            client.sendto(b"question", (host(), forward.host_port))
            await anyio.wait_readable(service)
            _, asker = service.recvfrom(64)
            service.sendto(b"first", asker)
            await anyio.wait_readable(client)
            assert client.recvfrom(64) == (b"first", (host(), forward.host_port))
        for forward, service in zip((one, two), services, strict=True):
            client.sendto(b"again", (host(), forward.host_port))
            await anyio.wait_readable(service)
            _, asker = service.recvfrom(64)
            service.sendto(b"answer", asker)
            await anyio.wait_readable(client)
            assert client.recvfrom(64) == (b"answer", (host(), forward.host_port))


IMPERSONATING = """
import socket, sys
IP_TRANSPARENT, MARK = 19, 0x6E6B
for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
    for target in (sys.argv[1], "10.0.2.2", "127.0.0.1"):
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
            if len(sys.argv) > 3:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
            sock.bind(("198.51.100.7", 0))
            sock.settimeout(0.3)
            try:
                sock.connect((target, int(sys.argv[2])))
                sock.send(b"it is me, the client")
            except OSError:
                pass
"""


@pytest.mark.parametrize("marked", [(), ("marked",)])
@bounded
async def test_nobody_inside_speaks_to_the_host_as_a_client(marked: tuple[str, ...]) -> None:
    """Not with IP_TRANSPARENT and not by the mark: what would leave is dropped, the policy is not even asked."""
    needs_tun()
    asked: list[object] = []
    uplink = Uplink(policy=asked.append, allow_host_loopback=True)
    with (
        socket.create_server((LOOPBACK, 0)) as stream,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        port = stream.getsockname()[1]
        datagrams.bind((LOOPBACK, port))
        for sock in (stream, datagrams):
            sock.setblocking(False)
        async with Network(uplink=uplink) as net:
            await net.forwarder.add("0:80", "0:53/udp", mode="transparent")
            await net.namespace.set_sysctl("net.ipv4.conf.all.rp_filter", "0")
            command = [sys.executable, "-c", IMPERSONATING, host(), str(port), *marked]
            await net.namespace.run(command)
            dropped = (await net.stack.stats())["dropped_ip_source_foreign"]
        assert asked == []
        assert marked or dropped
        for sock in (stream, datagrams):
            with pytest.raises(BlockingIOError):
                sock.accept() if sock is stream else sock.recv(64)


HIDING = """
ip route flush table 28267; ip rule flush; ip rule add lookup main; ip addr flush dev lo; ip link set lo down
ip addr del 10.0.2.100/24 dev tap0; ip route replace default dev tap0; ip neigh flush dev tap0
echo 0 > /proc/sys/net/ipv4/tcp_fwmark_accept; echo 0 > /proc/sys/net/ipv4/fwmark_reflect
"""


@pytest.mark.parametrize("mode", ["socket", "transparent"])
@bounded
async def test_a_program_that_takes_addresses_and_routes_away_harms_its_own_port(
    net: Network, mode: Mode
) -> None:
    """What would leave the namespace then meets the policy, as all that leaves; the stack goes on, and is closed."""
    needs("ip")
    async with listening(net) as _:
        tcp, udp = await net.forwarder.add("0:80", "0:53/udp", mode=mode)
        await net.namespace.run(["sh", "-c", HIDING], stderr=subprocess.DEVNULL, check=False)
        for address in (LOOPBACK, host()):
            with calling(address, tcp.host_port) as client, suppress(OSError):
                client.send(b"hello")
                with anyio.move_on_after(0.3):
                    await failure(client)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"hello", (address, udp.host_port))
        await anyio.sleep(0.1)
        assert set(await net.forwarder.list()) == {tcp, udp}
        await net.forwarder.remove(tcp, cut=True)
        await net.forwarder.remove(udp)


@asynccontextmanager
async def listening(net: Network, backlog: int = 128) -> AsyncIterator[socket.socket]:
    with await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((OWN, 80))
        sock.listen(backlog)
        yield sock


def calling(address: str, port: int) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    assert sock.connect_ex((address, port)) == errno.EINPROGRESS
    return sock


# -- descriptors --------------------------------------------------------------------------------------

SILENT = """
import socket
with socket.create_server(("10.0.2.100", 80), backlog=512) as listener:
    print("ready", flush=True)
    kept = []
    while True:
        sock, _ = listener.accept()
        sock.setblocking(False)
        try:
            while True:
                sock.send(bytes(1 << 20))
        except OSError:
            pass
        kept.append(sock)
"""

ECHOING = """
import socket
with socket.create_server(("10.0.2.100", 80), backlog=512) as listener:
    print("ready", flush=True)
    while True:
        with listener.accept()[0] as sock:
            sock.settimeout(5)
            try:
                sock.sendall(sock.recv(4))
            except OSError:
                pass
"""

CROWDED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))
import anyio
from netns_kit import Network

async def main():
    async with Network(driver=sys.argv[1]) as net:
        server = await net.popen([sys.executable, "-c", sys.argv[2]], stdout=-1)
        await server.stdout.receive()
        (forward,) = await net.forwarder.add("127.0.0.1:0:80", mode="socket")
        print(forward.host_port, flush=True)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            if line == "another server\\n":
                server.kill()
                await server.wait()
                server = await net.popen([sys.executable, "-c", sys.argv[3]], stdout=-1)
                await server.stdout.receive()
            try:
                mine = [os.open("/", os.O_RDONLY) for _ in range(64)]
            except OSError as error:
                print(error, flush=True)
            else:
                for fd in mine:
                    os.close(fd)
                print("free", len(os.listdir("/proc/self/fd")) < 200, flush=True)

anyio.run(main)
"""


@bounded
async def test_clients_who_read_nothing_leave_descriptors_to_the_program() -> None:
    """Each may cost two sockets, and a pipe for each direction that stands still."""
    needs_tun()
    command = [sys.executable, "-W", "ignore", "-c", CROWDED, "thread", SILENT, ECHOING]
    with (
        subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) as process,  # noqa: ASYNC220
        ExitStack() as stack,
    ):
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None
        port = int(stdout.readline())

        def told(what: str = "") -> str:
            stdin.write(f"{what}\n")
            stdin.flush()
            return stdout.readline()

        assert told() == "free True\n"
        clients = [stack.enter_context(calling(LOOPBACK, port)) for _ in range(150)]
        for _ in range(20):
            for each in clients:
                with suppress(OSError):
                    each.send(b"x" * (1 << 20))
            await anyio.sleep(0.05)
        assert told() == "free True\n"
        for each in clients:
            each.close()
        assert told("another server") == "free True\n"
        with anyio.fail_after(20), calling(LOOPBACK, port) as late:
            await send(late, b"echo")
            assert await exactly(late, 4) == b"echo"
        process.kill()


FORKING = """
import os, socket, struct, sys
import anyio
from netns_kit import Network

RESET = struct.pack("ii", 1, 0)

async def main():
    async with Network(driver="thread") as net:
        (forward,) = await net.forwarder.add("127.0.0.1:0:80", mode="socket")
        with await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind(("10.0.2.100", 80))
            listener.listen(0)
            clients = []
            for _ in range(4):  # more than the queue takes
                client = socket.create_connection(("127.0.0.1", forward.host_port))
                client.setblocking(False)
                clients.append(client)
            await anyio.sleep(0.2)
            reader, writer = os.pipe()
            ours, theirs = socket.socketpair()
            child = os.fork()
            if not child:
                theirs.send(b"x")
                os.close(writer)
                os.read(reader, 1)
                os._exit(0)
            ours.recv(1)
            await net.forwarder.remove(forward, cut=True)
            for client in clients:
                with anyio.fail_after(20):
                    await anyio.wait_readable(client)
                try:
                    assert client.recv(1) == b""
                except ConnectionResetError:
                    pass
            (forward,) = await net.forwarder.add("127.0.0.1:0:80", mode="socket")
            listener.listen(64)
            listener.setblocking(False)
            try:
                while True:
                    listener.accept()[0].close()
            except BlockingIOError:
                pass
            with socket.create_connection(("127.0.0.1", forward.host_port)) as client:
                await anyio.wait_readable(listener)
                served, _ = listener.accept()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            served.setblocking(False)
            with anyio.fail_after(20):
                await anyio.wait_readable(served)
            try:
                assert served.recv(1) == b""
            except ConnectionResetError:
                print("reset")
            os.close(writer)
            os.waitpid(child, 0)

anyio.run(main)
"""


@bounded
async def test_a_fork_of_the_program_keeps_no_client_and_no_socket_inside() -> None:
    """Neither those of clients who wait to get in, nor the sockets that have been made for others."""
    needs_tun()
    command = [sys.executable, "-W", "ignore", "-c", FORKING]
    done = await anyio.run_process(command, cwd=ROOT, check=False)
    assert done.stdout == b"reset\n", done.stderr


# -- datagrams ----------------------------------------------------------------------------------------


@bounded
async def test_a_flood_of_datagram_clients_is_bounded_and_spares_who_is_active(
    leaks: None, every_descriptor: int
) -> None:
    needs_tun()
    async with Network(limits=Limits(udp_flows=64)) as net:
        (forward,) = await net.forwarder.add("127.0.0.1:0:53/udp", mode="socket")
        with (
            await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as service,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as active,
        ):
            service.bind((OWN, 53))
            active.setblocking(False)
            active.connect((LOOPBACK, forward.host_port))
            seen = set()
            for _ in range(40):
                active.send(b"active")
                with ExitStack() as stack:
                    for _ in range(25):
                        other = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                        other.sendto(b"other", (LOOPBACK, forward.host_port))
                    for _ in range(26):
                        await anyio.wait_readable(service)
                        data, sender = service.recvfrom(64)
                        if data == b"active":
                            seen.add(sender)
                            service.sendto(b"answer", sender)
                await anyio.wait_readable(active)
                assert active.recv(64) == b"answer"
            assert len(seen) == 1
            assert len(await net.stack.flows()) == 64


@bounded
async def test_datagrams_of_two_networks_do_not_mix(leaks: None) -> None:
    """Each engine has a thread, so they read to buffers of their own; a race would show that once in a million."""
    needs_tun()
    buffers = []
    async with Network() as one, Network() as two:
        for net in (one, two):
            await net.forwarder.add("127.0.0.1:0:53/udp", mode="socket")
            (listener,) = net.stack.local._control.forwards._listeners.values()
            assert isinstance(listener, DatagramListener)
            buffers.append(listener._shared.pipes.buffer)
        assert isinstance(buffers[0], memoryview)
        assert buffers[0].obj is not buffers[1].obj


@bounded
async def test_datagrams_that_are_empty_or_longer_than_the_link(net: Network) -> None:
    needs("ip")
    (forward,) = await net.forwarder.add("127.0.0.1:0:53/udp", mode="socket")
    await net.namespace.run(["ip", "link", "set", "lo", "mtu", "1280"])
    with (
        await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as service,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        service.bind((OWN, 53))
        client.setblocking(False)
        client.connect((LOOPBACK, forward.host_port))
        for size in (0, 1, 1281, 65_507, 0):
            client.send(bytes(size))
            await anyio.wait_readable(service)
            data, sender = service.recvfrom(65536)
            assert data == bytes(size)
            service.sendto(data, sender)
            await anyio.wait_readable(client)
            assert client.recv(65536) == bytes(size)


# -- clients of TCP -----------------------------------------------------------------------------------


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("mode", ["socket", "transparent"])
@bounded
async def test_resets_at_any_moment_leave_nothing(net: Network, mode: Mode) -> None:
    """After accept, while joining, in a splice, at both sides at once; the ports go on."""
    chance = random.Random(15)
    (forward,) = await net.forwarder.add("0:80", mode=mode)
    async with listening(net) as listener:
        listener.setblocking(False)
        ours: list[socket.socket] = []
        theirs: list[socket.socket] = []
        for turn in range(1500):
            match chance.randrange(8):
                case 0 | 1:
                    ours.append(calling(chance.choice((LOOPBACK, host())), forward.host_port))
                case 2 | 3:
                    with suppress(BlockingIOError):
                        theirs.append(listener.accept()[0])
                        theirs[-1].setblocking(False)
                case 4:
                    for sock in chance.sample(ours + theirs, min(8, len(ours + theirs))):
                        with suppress(OSError):
                            sock.send(
                                bytes(chance.choice((1, 100, 300_000))), chance.choice((0, socket.MSG_OOB))
                            )
                case 5:
                    for sock in chance.sample(ours + theirs, min(8, len(ours + theirs))):
                        with suppress(OSError):
                            sock.recv(chance.choice((1, 1 << 20)))
                case 6:
                    with suppress(OSError):
                        chance.choice([*ours, *theirs, listener]).shutdown(socket.SHUT_WR)
                    listener.listen(128)
                case 7:
                    for some in (ours, theirs):
                        if some and chance.random() < 0.7:
                            chance.choice((reset, socket.socket.close))(some.pop(chance.randrange(len(some))))
            if turn % 10 == 0:
                await anyio.sleep(0.001)
        for sock in ours + theirs:
            chance.choice((reset, socket.socket.close))(sock)
        while any(flow.state == "established" for flow in await net.stack.flows()):
            with suppress(BlockingIOError):
                while True:
                    reset(listener.accept()[0])
            await anyio.sleep(0.02)
        with calling(LOOPBACK, forward.host_port) as client:
            await send(client, b"last")
            said = b""
            while said != b"last":
                with await accepted(listener) as served, suppress(OSError):
                    said = await receive(served)
    await eventually(net.stack.flows, ())


@bounded
async def test_both_sides_send_and_neither_reads(net: Network) -> None:
    """What is kept is bounded, and when they read at last all of it is there."""
    (forward,) = await net.forwarder.add("0:80", mode="socket")
    async with listening(net) as listener:
        with calling(LOOPBACK, forward.host_port) as client, await accepted(listener) as served:
            sent = [0, 0]
            quiet = 0
            while quiet < 20:
                quiet += 1
                for number, sock in enumerate((client, served)):
                    with suppress(BlockingIOError):
                        sent[number] += sock.send(bytes(1 << 20))
                        quiet = 0
                await anyio.sleep(0.01)
            assert max(sent) < kernel_buffers() + (4 << 20), "two connections of the kernel, and one pipe"
            client.shutdown(socket.SHUT_WR)
            served.shutdown(socket.SHUT_WR)
            assert [len(await rest(served)), len(await rest(client))] == sent


@bounded
async def test_clients_who_leave_while_the_queue_inside_is_full_take_no_place(net: Network) -> None:
    """The program accepts nobody; who resets is not held until the kernel inside gives up, two minutes later."""
    (forward,) = await net.forwarder.add("0:80", mode="socket")
    async with listening(net, backlog=0):
        clients = [calling(LOOPBACK, forward.host_port) for _ in range(50)]

        async def waiting() -> list[int]:
            return [flow.id for flow in await net.stack.flows() if flow.state == "connecting"]

        async def are_all_but_one_waiting() -> bool:
            return len(await waiting()) == len(clients) - 1

        await eventually(are_all_but_one_waiting)
        assert await net.stack.end_flow((await waiting())[0])
        for each in clients:
            reset(each)
        await eventually(net.stack.flows, ())


def fails(flow: object) -> None:
    raise RuntimeError("the policy fails")


@pytest.mark.parametrize("mode", ["stack", "socket", "transparent"])
@bounded
async def test_a_policy_that_fails_stops_no_client(leaks: None, mode: Mode) -> None:
    needs_tun()
    async with Network(uplink=Uplink(policy=fails)) as net:
        tcp, udp = await net.forwarder.add("0:80", "0:53/udp", mode=mode)
        async with listening(net) as listener:
            with calling(LOOPBACK, tcp.host_port) as client, await accepted(listener) as served:
                await echoes(client, served)
        with (
            await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as service,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            service.bind((OWN, 53))
            client.setblocking(False)
            client.connect((LOOPBACK, udp.host_port))
            client.send(b"question")
            await anyio.wait_readable(service)
            service.sendto(b"answer", service.recvfrom(64)[1])
            await anyio.wait_readable(client)
            assert client.recv(64) == b"answer"


# -- the end of this and that, in the middle of a transfer --------------------------------------------


@pytest.mark.parametrize(
    ("driver", "victim"),
    [
        *product(["thread", "loop", "worker"], ["agent", "forwarder", "stack", "namespace"]),
        ("worker", "worker"),
    ],
)
@bounded
async def test_whoever_ends_first_nothing_is_left(
    leaks: None, driver: DriverName, victim: str, tmp_path: Path
) -> None:
    """Neither a listener nor the file of a unix socket; the fixture looks for all else."""
    needs_tun()
    path = tmp_path / "published"
    with suppress(NetnsKitError):
        async with Network(driver=driver) as net:
            tcp, udp, _ = await net.forwarder.add(
                PortForward("tcp", LOOPBACK, 0, None, 80, mode="transparent"),
                PortForward("udp", LOOPBACK, 0, None, 53, mode="transparent"),
                PortForward("tcp", UnixSocket(str(path)), 0, None, 80),
            )
            async with listening(net) as listener:
                with ExitStack() as stack:
                    clients = [stack.enter_context(calling(LOOPBACK, tcp.host_port)) for _ in range(20)]
                    stack.enter_context(await accepted(listener))
                    for each in clients:
                        with suppress(BlockingIOError):
                            while True:
                                each.send(bytes(1 << 20))
                    match victim:
                        case "agent":
                            os.kill(min(children()), signal.SIGKILL)
                        case "worker":
                            os.kill(net.stack.workers.processes[0].pid, signal.SIGKILL)
                        case "forwarder":
                            await net.forwarder.close()
                        case "stack":
                            await net.stack.close()
                        case _:
                            await net.namespace.close()
                    if victim in ("worker", "stack"):
                        for each in clients:
                            assert await failure(each) in (errno.ECONNRESET, errno.EPIPE, 0)
    for forward, kind in ((tcp, socket.SOCK_STREAM), (udp, socket.SOCK_DGRAM)):
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
            sock.bind((LOOPBACK, forward.host_port))
    assert not path.exists()


# -- paths --------------------------------------------------------------------------------------------


@bounded
async def test_a_path_is_not_followed_or_taken(net: Network, tmp_path: Path) -> None:
    def forward(path: Path) -> PortForward:
        return PortForward("tcp", UnixSocket(str(path)), 0, None, 80)

    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    with pytest.raises(PortInUseError):
        await net.forwarder.add(forward(link))
    with pytest.raises(OSError, match="ermission denied"):
        await net.forwarder.add(forward(closed / "socket"))
    with pytest.raises(FileNotFoundError):
        await net.forwarder.add(forward(tmp_path / "nowhere" / "socket"))
    with pytest.raises(ArgumentError, match="107 bytes"):
        forward(Path("/" + "x" * 107))
    assert not target.exists()
    (added,) = await net.forwarder.add(forward(target))
    target.rename(tmp_path / "elsewhere")
    target.write_text("another's")
    await net.forwarder.remove(added)
    assert target.read_text() == "another's"
    assert await net.forwarder.list() == ()
