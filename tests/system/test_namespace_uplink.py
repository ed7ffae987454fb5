"""Flows that leave from another namespace: by its interfaces, its policy and its end."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import AsyncExitStack
from errno import ENETUNREACH
from ipaddress import IPv4Interface
from subprocess import PIPE
from typing import Any, get_args

import anyio
import pytest

from netns_kit import (
    AddressError,
    ArgumentError,
    ArgumentTypeError,
    ChooserUplink,
    Namespace,
    NamespaceGone,
    NamespaceUplink,
    Network,
    Policy,
    TapDevice,
    UserStack,
)
from netns_kit.gateway.setup import DriverName
from tests.support import needs, needs_tun
from tests.support.world import DRIVERS, EVIL, QUEUES, RESOLVER, WEB, WEB_6, World, in_world

BOTH = (("tcp", WEB, 23), ("tcp", WEB, 80), ("tcp", WEB_6, 80), ("udp", WEB, 7777), ("udp", WEB_6, 7777))


def middle(world: World, **options: Any) -> Network:
    """The network whose namespace the flows leave from."""
    return world.network(subnet="10.9.0.0/24", **options)


def through(world: World, via: Namespace, driver: str, **options: Any) -> Network:
    return world.network(driver, uplink=NamespaceUplink(via, dns=["10.9.0.3"], **options))


@pytest.mark.parametrize("driver", QUEUES)
@in_world
async def test_flows_leave_from_there(world: World, driver: str) -> None:
    needs("ping")
    async with middle(world) as via, through(world, via.namespace, driver) as net:
        world.forget()
        steps = (*BOTH[1:], ("ping", WEB), ("tcp", "www.example.org", 80))
        assert await world.tries(net, *steps) == ["hello"] * len(steps)
        await net.run(
            ["ping", "-6", "-c", "1", "-W", "20", WEB_6], env={"PATH": os.environ["PATH"]}, stdout=PIPE
        )
        assert world.names_asked() == {"www.example.org"}
        await via.stack.set_policy(Policy.deny(), existing="cut")
        world.forget()
        assert "hello" not in await world.tries(net, *steps)
        assert world.strays() == [], "they leave by no other way"
        assert (await via.stack.stats())["policy_refused"] >= len(steps)
        assert (await net.stack.stats())["flows_refused"] == 0


@pytest.mark.parametrize("driver", DRIVERS)
@in_world
async def test_more_flows_than_sockets_at_first(world: World, driver: str) -> None:
    """More than there are sockets for at first."""
    async with middle(world) as via, through(world, via.namespace, driver) as net:
        steps = [("tcp", WEB, 80), ("udp", WEB, 7777)] * 30

        async def go() -> None:
            assert await world.tries(net, *steps) == ["hello"] * len(steps)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(go)


HOLD = """
import json, socket, sys
held = socket.create_connection((sys.argv[1], 80), timeout=20)
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.settimeout(20)
datagrams.connect((sys.argv[1], 7777))
datagrams.send(b"hello")
print(datagrams.recv(100).decode(), flush=True)
sys.stdin.readline()
told = []
try:
    told.append(str(held.recv(1)))
except OSError as error:
    told.append(type(error).__name__)
for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM:
    try:
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.settimeout(20)
            sock.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR: tell of every ICMP error
            sock.connect((sys.argv[1], 80))
            sock.send(b"hello")
            sock.recv(1)
    except OSError as error:
        told.append(error.errno)
print(json.dumps(told))
"""


@pytest.mark.parametrize("driver", QUEUES)
@in_world
async def test_a_namespace_that_has_ended_is_an_error_by_flow(world: World, driver: str) -> None:
    """The kernel would keep its sockets, and let them wait."""
    address = IPv4Interface("10.77.0.1/24")
    async with AsyncExitStack() as block:
        via = await block.enter_async_context(Namespace.create())
        tap = await block.enter_async_context(await TapDevice.open(via, "tap0"))
        await via.configure_link(tap.name, address=address)
        answer = [await via.socket(socket.AF_INET, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
        for sock, port in zip(answer, (80, 7777), strict=True):
            block.callback(sock.close)
            sock.bind((str(address.ip), port))
        answer[0].listen()
        uplink = ChooserUplink([(str(address.network), NamespaceUplink(via))], dns=[RESOLVER])
        async with world.network(driver, uplink=uplink, ipv6=False) as net:
            command = [sys.executable, "-c", HOLD, str(address.ip)]
            async with await net.popen(command, stdin=PIPE, stdout=PIPE) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                await anyio.wait_readable(answer[1])
                answer[1].sendto(*answer[1].recvfrom(100))
                assert await process.stdout.receive() == b"hello\n"
                await via.close()
                await process.stdin.send(b"\n")
                told = json.loads(await process.stdout.receive())
            assert told == ["ConnectionResetError", ENETUNREACH, ENETUNREACH]
            assert await world.tries(net, ("tcp", EVIL, 80)) == ["hello"], "the other way is still there"


ANSWER = """
import socket
listener = socket.create_server(("127.0.0.1", 53))
print("ready", flush=True)
while True:
    sock, _ = listener.accept()
    query = sock.recv(1000)[2:]
    end = query.index(0, 12) + 5
    is_a = query[end - 3] == 1
    answer = query[:2] + bytes((0x81, 0x80, 0, 1, 0, is_a, 0, 0, 0, 0)) + query[12:end]
    answer += bytes((0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 203, 0, 113, 10)) * is_a
    sock.sendall(len(answer).to_bytes(2, "big") + answer)
    sock.close()
"""


@pytest.mark.parametrize("driver", DRIVERS)
@in_world
async def test_a_resolver_on_the_loopback_of_that_namespace(world: World, driver: str) -> None:
    async with middle(world) as via, await via.popen([sys.executable, "-c", ANSWER], stdout=PIPE) as resolver:
        assert resolver.stdout is not None
        await resolver.stdout.receive()
        uplink = NamespaceUplink(via.namespace, dns=["127.0.0.1"])
        async with world.network(driver, uplink=uplink, ipv6=False) as net:
            assert await world.tries(net, ("tcp", "anything.example", 80)) == ["hello"]
            assert world.names_asked() == set()
        resolver.kill()


BAD: tuple[dict[str, Any], ...] = ({"bind4": "eth0"}, {"bind6": "192.0.2.1"})


@pytest.mark.anyio
async def test_what_it_cannot_be() -> None:
    needs_tun()
    async with Network() as net:
        with pytest.raises(ArgumentTypeError, match="Namespace"):
            NamespaceUplink(net)
        for given in BAD:
            with pytest.raises(AddressError):
                NamespaceUplink(net.namespace, **given)
        own = NamespaceUplink(net.namespace)
        assert repr(own).startswith("NamespaceUplink(<Namespace")
        async with await TapDevice.open(net.namespace, "tap1") as tap:
            with pytest.raises(ArgumentError, match="another namespace"):
                UserStack(tap, own)
    for driver in get_args(DriverName):
        with pytest.raises(NamespaceGone):
            async with Network(uplink=own, driver=driver):
                pass
