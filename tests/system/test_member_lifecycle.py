"""How networks of several namespaces end: whoever is killed, and however many there are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import anyio
import pytest

from netns_kit import NamespaceGone, Network
from tests.support import GRACE, LONG, ROOT, needs, needs_tun, wait_exit
from tests.support.connections import once
from tests.support.members import ask, echo, network, output, serving, status
from tests.support.servers import bounded, cancelled_at_any_moment

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]
MANY = 100 if LONG else 36
"""More than the kernel's table of neighbours has room for, if each asks for all others."""

PING = """
import socket, struct, sys
packet = struct.pack("!BBHHH", 8, 0, ~0x0800 - 4711 & 0xFFFF, 4711, 0)
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
    sock.settimeout(20)
    for address in sys.argv[1:]:
        sock.sendto(packet, (address, 0))
        while True:
            data, (source, _) = sock.recvfrom(99)
            if source == address and data[20] == 0:
                break
"""
PROGRAM = """
import anyio, json, sys
from netns_kit import Network

async def main():
    async with Network() as net, net.member("a") as a, net.member("b") as b:
        processes = [await each.popen(["sleep", "1000"]) for each in (net, a, b)]
        print(json.dumps([each.pid for each in (*processes, net.namespace, a.namespace, b.namespace)]), flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


def test_a_program_that_is_killed_leaves_nothing() -> None:
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        pids = set(json.loads(program.stdout.readline()))
        program.kill()
    assert len(pids) == 6
    assert wait_exit(pids, time.monotonic() + GRACE) == set()


@bounded
async def test_a_member_whose_agent_is_killed_is_gone_and_the_others_go_on() -> None:
    needs("getent")
    async with network() as net, net.member("db") as db, serving(db, 80, echo):
        web = await net.add_member("web", ports=["127.0.0.1:0:80"])
        stream = await web.namespace.connect_tcp(db.address, 80)
        await stream.aclose()
        process = await web.popen(["sleep", "1000"])
        other = await net.namespace.connect_tcp(db.address, 80)
        os.kill(web.namespace.pid, signal.SIGKILL)
        with pytest.raises(NamespaceGone):
            await process.wait()
        with pytest.raises(NamespaceGone):
            await web.run(["true"])
        while "web" in net.members:  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.01)
        assert await status(db, "getent", "hosts", "web") != 0
        await other.send(b"there")
        assert await other.receive() == b"there"
        await other.aclose()
        await process.aclose()
        links = {each.name for each in await net.namespace.links()}
        assert links == {"lo", "tap0", "br0", "m1"}
        async with net.member("web", address=web.address), serving(db, 81):
            assert net.members.keys() == {"web", "db"}


@bounded
async def test_a_network_whose_agent_is_killed_ends_its_members() -> None:
    net = await Network().open()
    web = await net.add_member("web")
    process = await web.popen(["sleep", "1000"])
    os.kill(net.namespace.pid, signal.SIGKILL)
    with pytest.raises(NamespaceGone):
        await process.wait()
    with pytest.raises(NamespaceGone):
        await web.run(["true"])
    with pytest.raises(NamespaceGone):
        await net.add_member("db")
    await process.aclose()
    with pytest.raises(NamespaceGone):
        await net.close()
    assert web.supervisor.condition.startswith("failed")


@once
async def test_many_members_reach_each_other() -> None:
    needs("ip")
    async with network() as net:
        members = [await net.add_member(f"m{number}") for number in range(MANY)]
        addresses = [str(each.address) for each in members]
        assert len(set(addresses)) == MANY
        for member in members:
            await output(member, sys.executable, "-ISc", PING, *addresses)
        for member in members[::2]:
            await net.remove_member(member)
        assert len(net.members) == MANY // 2
        neighbours = await output(members[1], "ip", "neighbour", "show", "nud", "permanent")
        known = {line.split()[0] for line in neighbours.splitlines()}
        assert known == {"10.0.2.2", "10.0.2.3", "10.0.2.100", *addresses[3::2]}, (
            "and not those that have gone"
        )


@once
@bounded
async def test_a_member_that_is_cancelled_at_any_moment_leaves_nothing() -> None:
    async with network() as net:
        await net.add_member("first")
        before = await net.namespace.links(), await net.stack.records(), await net.stack.leases()
        await cancelled_at_any_moment(lambda: net.member("web", ports=["127.0.0.1:0:80"]))
        assert net.members.keys() == {"first"}
        assert (await net.namespace.links(), await net.stack.records(), await net.stack.leases()) == before
        async with net.member("web") as web:
            assert await status(web, "true") == 0


@bounded
async def test_members_come_and_go_at_once() -> None:
    async with network() as net:
        async with anyio.create_task_group() as tasks:
            for number in range(6):
                tasks.start_soon(net.add_member, f"m{number}")
        assert len({each.address for each in net.members.values()}) == 6
        async with serving(net.members["m0"], 80):
            assert await ask(net.members["m5"], "m0", 80) == str(net.members["m5"].address)
        async with anyio.create_task_group() as tasks:
            for name in net.members:
                tasks.start_soon(net.remove_member, name)
        assert net.members == {}
        assert {each.name for each in await net.namespace.links()} == {"lo", "tap0", "br0"}


@bounded
async def test_a_server_in_a_member_is_reached_from_this_process() -> None:
    async with network() as net, net.member("web") as web, serving(web, 80):
        async with await web.connect_tcp(80) as stream:
            assert await stream.receive() == b"10.0.2.2"
        async with await web.connect_tcp(80, source="192.0.2.7") as stream:
            assert await stream.receive() == b"192.0.2.7"
            assert {str(each.remote.address) for each in await web.flows()} == {"192.0.2.7"}
        with pytest.raises(ConnectionRefusedError):
            await web.connect_tcp(81)
