"""Which process inside has a flow: found by its socket, whoever it is, and in bounded time however many there are."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from netns_kit import ArgumentError, ArgumentTypeError, Namespace, Network, Process, ProcessInfo, Uplink
from netns_kit.namespace.namespace import Pids
from tests.support import needs, needs_ipv6, needs_ping, needs_tun, needs_userns
from tests.support.connections import GATEWAY, driver, every_driver
from tests.support.events import followed
from tests.support.servers import bounded, echo, tcp_server, udp_server

__all__ = ["driver"]  # a fixture

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

LOOPBACK, LOOPBACK6 = "127.0.0.1", "::1"
PRELUDE = """
import os, socket, sys, time
def said(*words):
    print(*words, flush=True)
def wait():
    sys.stdin.read(1)
def udp(family=socket.AF_INET):
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind(("::" if family == socket.AF_INET6 else "", 0))
    return sock
"""


@asynccontextmanager
async def inside(namespace: Namespace, program: str) -> AsyncIterator[tuple[Process, list[int]]]:
    """A program that runs inside, and the numbers that it has said first."""
    command = [sys.executable, "-c", PRELUDE + program]
    async with await namespace.popen(command, stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        said = b""
        while not said.endswith(b"\n"):
            said += await process.stdout.receive()
        yield process, list(map(int, said.split()))


@pytest.fixture
async def namespace(leaks: None) -> AsyncIterator[Namespace]:
    needs_userns()
    async with Namespace.create() as namespace:
        yield namespace


async def of_udp(namespace: Namespace, port: int, address: str = LOOPBACK) -> ProcessInfo | None:
    return await namespace.process_of("udp", (address, port), (address, 9))


@pytest.mark.parametrize("pids", ["own", "host"])
@bounded
async def test_it_is_told_as_both_sides_count_it(leaks: None, pids: Pids) -> None:
    needs_userns()
    program = "sock = udp(); said(sock.getsockname()[1], os.getpid()); wait()"
    async with Namespace.create(pids=pids) as namespace, inside(namespace, program) as (process, said):
        port, inner_pid = said
        found = await of_udp(namespace, port)
    assert found == ProcessInfo(
        process.pid, inner_pid, 0, os.path.basename(sys.executable)[:15], sys.executable
    )
    assert (process.pid == inner_pid) == (pids == "host")


CONNECTED = """
server = socket.create_server(("{address}", 0), family=socket.{family})
client = socket.create_connection(server.getsockname()[:2])
served, _ = server.accept()
said(client.getsockname()[1], server.getsockname()[1])
wait()
"""


@pytest.mark.parametrize(("family", "address"), [("AF_INET", LOOPBACK), ("AF_INET6", LOOPBACK6)])
@bounded
async def test_a_connection_is_found_from_either_end(namespace: Namespace, family: str, address: str) -> None:
    if family == "AF_INET6":
        needs_ipv6()
    program = CONNECTED.format(family=family, address=address)
    async with inside(namespace, program) as (process, (client, server)):
        for local, remote in ((client, server), (server, client)):
            found = await namespace.process_of("tcp", (address, local), (address, remote))
            assert found is not None
            assert found.pid == process.pid
        listens = await namespace.process_of("tcp", (address, server), (address, 9))
        assert listens is None, "who listens has not this flow"


DATAGRAMS = """
wild = udp()
known = udp(); known.connect(("127.0.0.1", 9))
both = udp(socket.AF_INET6); both.sendto(b"x", ("::ffff:127.0.0.1", 9))
bound = udp(); bound.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
said(*(each.getsockname()[1] for each in (wild, known, both, bound)))
wait()
"""


@bounded
async def test_a_socket_of_datagrams_is_found_however_it_is_bound(namespace: Namespace) -> None:
    needs_ipv6()
    async with inside(namespace, DATAGRAMS) as (process, ports):
        found = [await of_udp(namespace, port) for port in ports]
        assert [each and each.pid for each in found] == [process.pid] * 4
        unused = await of_udp(namespace, next(port for port in range(40000, 50000) if port not in ports))
        assert unused is None


@bounded
async def test_what_has_ended_is_not_known(namespace: Namespace) -> None:
    async with inside(namespace, "sock = udp(); said(sock.getsockname()[1]); wait()") as (_, (port,)):
        assert await of_udp(namespace, port) is not None
    assert await of_udp(namespace, port) is None


@bounded
async def test_a_name_of_the_programs_choice_is_text_of_bounded_length(namespace: Namespace) -> None:
    program = """
open("/proc/self/comm", "w").write("\\x1b[2J\\nend")
sock = udp()
said(sock.getsockname()[1])
wait()
"""
    async with inside(namespace, program) as (_, (port,)):
        found = await of_udp(namespace, port)
    assert found is not None
    assert found.name.isprintable()
    assert found.name.endswith("end")
    needs("bash")
    program = PRELUDE + "sock = udp(); said(sock.getsockname()[1]); wait()"
    called = ["bash", "-c", 'exec -a "$1" "$2" -c "$3"', "bash", "\x1b" + "x" * 300, sys.executable, program]
    async with await namespace.popen(called, stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        found = await of_udp(namespace, int(await process.stdout.receive()))
    assert found is not None
    assert found.command == "\N{REPLACEMENT CHARACTER}" + "x" * 255


MANY = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
null = os.open("/dev/null", os.O_RDONLY)
sock = udp()
for number in range({processes}):
    if os.fork() == 0:
        for _ in range({descriptors}):
            os.dup(null)
        os.write(1, b".")
        time.sleep(1000)
said()
said(sock.getsockname()[1])
wait()
"""


@bounded
async def test_hostile_programs_cost_bounded_time(namespace: Namespace) -> None:
    """They may hide what is theirs, and keep nobody waiting: the agent does nothing else meanwhile."""
    async with inside(namespace, "sock = udp(); said(sock.getsockname()[1]); wait()") as (honest, (port,)):
        program = MANY.format(processes=10, descriptors=900)
        async with await namespace.popen(
            [sys.executable, "-c", PRELUDE + program], stdin=-1, stdout=-1
        ) as hostile:
            assert hostile.stdout is not None
            said = b""
            while said.count(b".") < 10 or said.count(b"\n") < 2:
                said += await hostile.stdout.receive()
            found = [await of_udp(namespace, port) for _ in range(10)]
            assert honest.pid in [each and each.pid for each in found], "first come the first of each process"


@bounded
async def test_what_is_wrong_is_told(namespace: Namespace) -> None:
    with pytest.raises(ArgumentError, match="protocol"):
        await namespace.process_of("sctp", (LOOPBACK, 1), (LOOPBACK, 2))  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="local"):
        await namespace.process_of("tcp", LOOPBACK, (LOOPBACK, 2))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="remote_port"):
        await namespace.process_of("tcp", (LOOPBACK, 1), (LOOPBACK, 65536))
    assert await namespace.process_of("tcp", (LOOPBACK, 1), (LOOPBACK, 2)) is None


# -- of flows -----------------------------------------------------------------------------------------

CLIENT = """
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
connection.send(b"x"); connection.recv(1)
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.sendto(b"x", (sys.argv[1], int(sys.argv[3]))); sock.recv(1)
said(os.getpid())
wait()
"""


@every_driver
@bounded
async def test_events_have_it_from_the_first_to_the_last(driver: str) -> None:
    needs_tun()
    with tcp_server(echo) as port, udp_server() as other:
        async with (
            Network(uplink=Uplink(allow_host_loopback=True), driver=driver) as net,  # type: ignore[arg-type]
            followed(net.stack, processes=True) as events,
            followed(net.stack) as without,
        ):
            command = [sys.executable, "-c", PRELUDE + CLIENT, GATEWAY, str(port), str(other)]
            async with await net.popen(command, stdin=-1, stdout=-1) as client:
                assert client.stdout is not None
                await client.stdout.receive()
                opened = [await events.receive() for _ in range(2)]
                for flow in await net.stack.flows():
                    await net.stack.end_flow(flow.id)
                closed = [await events.receive() for _ in range(2)]
            assert [event.kind for event in (*opened, *closed)] == ["opened"] * 2 + ["closed"] * 2
            for event in (*opened, *closed):
                assert event.process is not None, event
                assert event.process.pid == client.pid
            assert (await without.receive()).process is None


@every_driver
@bounded
async def test_a_ping_has_one_too(driver: str) -> None:
    needs("ping")
    needs_ping()
    needs_tun()
    async with (
        Network(uplink=Uplink(allow_host_loopback=True), driver=driver) as net,  # type: ignore[arg-type]
        followed(net.stack, processes=True) as events,
        await net.popen(["ping", "-c3", "-i0.2", "192.0.2.1"], stdout=-1) as ping,
    ):
        event = await events.receive()
        assert event.flow.protocol == "icmp"
        assert event.process is not None
        assert (event.process.pid, event.process.name) == (ping.pid, "ping")
