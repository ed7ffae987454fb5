"""Programs inside, workers that were taken over and clients, against published ports."""

from __future__ import annotations

import array
import errno
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress

import anyio
import pytest

from netns_kit import Namespace, Network, Uplink
from netns_kit.child.channel import receive_record
from netns_kit.child.supply import MOST, ORDER, REPLY
from netns_kit.forwarder.ports import Mode, PortForward, UnixSocket
from netns_kit.host.abi import SCM_MAX_FD
from tests.support import ROOT, missing, needs_tun
from tests.support.connections import accepted, exactly, failure, send
from tests.support.servers import bounded, host_address

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

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


# -- programs inside ----------------------------------------------------------------------------------


@bounded
async def test_rules_that_a_program_has_removed_keep_nothing_from_ending(net: Network) -> None:
    (forward,) = await net.forwarder.add("0:53/udp", mode="transparent")
    await net.namespace.run(["ip", "rule", "flush"])
    await net.forwarder.remove(forward)
    await net.forwarder.add("0:53/udp", "0:80", mode="transparent")
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
            await net.namespace.run(["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0"], check=False)
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
        first = b""
        try:
            sock.settimeout(1)
            first = sock.recv(1, socket.MSG_PEEK)
            sock.setblocking(False)
            if first == b"e":
                sock.sendall(sock.recv(64))
                continue
            while True:
                sock.send(bytes(1 << 20))
        except OSError:
            pass
        kept.append(sock)
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
                server = await net.popen([sys.executable, "-c", sys.argv[2]], stdout=-1)
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
    command = [sys.executable, "-W", "ignore", "-c", CROWDED, "thread", SILENT]
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
        with anyio.fail_after(10), calling(LOOPBACK, port) as late:
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
                with anyio.fail_after(3):
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
            with anyio.fail_after(3):
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
