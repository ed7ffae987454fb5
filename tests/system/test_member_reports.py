"""Faults of other programs for networks of containers, as their users have reported them, tried on members."""

from __future__ import annotations

import socket
import sys
from contextlib import closing, suppress
from functools import partial

import anyio
import anyio.to_thread
import pytest

from netns_kit import ArgumentError, DnsSettings, Member, Uplink
from netns_kit.forwarder.ports import Mode
from netns_kit.namespace.background import beside
from tests.support import needs, needs_ipv6, needs_tun
from tests.support.members import ask, network, output, serving, status
from tests.support.servers import bounded, host_address

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

WATCH = """
import sys, threading
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set())).start()
wrong = 0
print("begun", flush=True)
while not ended.is_set():
    with open("/etc/hosts") as file:
        text = file.read()
    wrong += not ("localhost" in text and text.endswith("\\n") and " watcher\\n" in text)
print(wrong)
"""
"""How often the hosts file was not whole, until the input ends."""
LISTEN = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind(("", 5353))
    for group in "224.0.0.251", "239.1.2.3":
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + bytes(4))
    print("begun", flush=True)
    for _ in range(2):
        print(*sock.recvfrom(99)[1][:1], flush=True)
"""
SAY = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    for group in "224.0.0.251", "239.1.2.3":
        sock.sendto(b"?", (group, 5353))
"""


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


async def answered(member: Member, *question: str) -> tuple[str, list[str]]:
    """The status of the answer to a query, and the values in it."""
    said = await output(member, "dig", "+noall", "+comments", "+answer", *question)
    state = said.partition("status: ")[2].partition(",")[0]
    lines = [line.split() for line in said.splitlines() if line and not line.startswith(";")]
    return state, [line[-1] for line in lines]


@bounded
async def test_a_name_without_a_record_of_that_type_is_a_name_all_the_same() -> None:
    """containers/aardvark-dns#679: NXDOMAIN there, so `host` fails, and so do programs with musl."""
    needs("dig", "host", "busybox")
    uplink = Uplink(dns=DnsSettings([], search=["lab.test"]))
    async with network(uplink=uplink) as net, net.member("db1") as db, net.member("client") as client:
        for name in ("db1", "DB1", "db1.lab.test"):
            assert await answered(client, name, "A") == ("NOERROR", [str(db.address)])
            for kind in ("AAAA", "MX", "SRV", "HTTPS", "TXT"):
                assert await answered(client, name, kind) == ("NOERROR", []), (name, kind)
        assert await status(client, "host", "db1") == 0
        assert await status(client, "busybox", "ping", "-c1", "-W20", "db1") == 0


@bounded
async def test_an_address_is_answered_once() -> None:
    """containers/aardvark-dns#120: twice where there is IPv6, which nginx does not take."""
    needs("dig")
    needs_ipv6()
    async with (
        network(ipv6=True) as net,
        net.member("db1", aliases=["db"]) as db,
        net.member("client") as client,
    ):
        for name in ("db1", "db"):
            assert await answered(client, name, "A") == ("NOERROR", [str(db.address)])
            assert await answered(client, name, "AAAA") == ("NOERROR", [str(db.address6)])
        for address in db.addresses:
            assert await answered(client, "-x", str(address)) == ("NOERROR", ["db1.", "db."])


@bounded
async def test_a_name_is_known_as_soon_as_its_member_is_there() -> None:
    """containers/podman#13983: up to seconds later."""
    needs("dig", "getent")
    async with network() as net, net.member("client") as client:
        for number in range(5):
            member = await net.add_member(f"new{number}")
            assert await answered(client, f"new{number}") == ("NOERROR", [str(member.address)])
            assert str(member.address) in await output(client, "getent", "hosts", f"new{number}")


@bounded
async def test_nobody_sees_half_a_hosts_file() -> None:
    """moby/moby#18214: entries lack when containers start at once; cilium/cilium#48106: it is empty for a moment."""
    async with network() as net, net.member("watcher") as watcher:

        async def come_and_go(name: str) -> None:
            for _ in range(3):
                await net.remove_member(await net.add_member(name))
            await net.add_member(name)

        async with await watcher.popen([sys.executable, "-ISc", WATCH]) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert await process.stdout.receive() == b"begun\n"
            async with anyio.create_task_group() as tasks:
                for number in range(6):
                    tasks.start_soon(come_and_go, f"other{number}")
            await process.stdin.aclose()
            assert await process.stdout.receive() == b"0\n"
        shown = (await watcher.files())["/etc/hosts"]
        assert await output(watcher, "cat", "/etc/hosts") == shown.strip()
        assert {f"other{number}" for number in range(6)} <= set(shown.split())


@pytest.mark.parametrize("mode", ["stack", "socket"])
@bounded
async def test_a_client_over_udp_reaches_the_next_server_too(mode: Mode) -> None:
    """moby/moby#53384, containernetworking/plugins#123: what it sends goes to the one that has ended."""
    async with network() as net:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client:
            client.bind(("127.0.0.1", 0))
            client.settimeout(20)
            port = 0
            for number in range(3):
                server = await net.add_member("server")
                (forward,) = await server.forwarder.add(f"127.0.0.1:{port}:53/udp", mode=mode)
                port = forward.host_port
                with await server.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.bind(("0.0.0.0", 53))
                    async with beside(answer, sock, b"%d" % number):
                        client.sendto(b"?", ("127.0.0.1", port))
                        assert await anyio.to_thread.run_sync(client.recv, 99) == b"%d" % number
                await net.remove_member(server)
                with suppress(ConnectionRefusedError):
                    client.sendto(b"nobody hears this", ("127.0.0.1", port))


async def answer(sock: socket.socket, text: bytes) -> None:
    """Answer each datagram with a text."""
    while True:
        await anyio.wait_readable(sock)
        sock.sendto(text, sock.recvfrom(99)[1])


@bounded
async def test_an_internal_network_answers_about_strangers_itself_and_at_once() -> None:
    """moby/moby#47538: the host's resolver is asked; moby/moby#46701: programs hang that ask who an address is."""
    needs("dig")
    async with network(internal=True) as net, net.member("db1") as db:
        for question in ("www.example.org", "db1.example.org", "_http._tcp.db1"):
            assert await answered(db, question) == ("NXDOMAIN", [])
        for address in ("10.0.2.77", "192.0.2.1", "2001:db8::1"):
            assert await answered(db, "-x", address) == ("NXDOMAIN", [])
        assert await answered(db, "-x", str(db.address)) == ("NOERROR", ["db1."])


@bounded
async def test_a_member_reaches_its_own_published_port() -> None:
    """moby/libnetwork#1104, rkt/rkt#3751: not by the host's address."""
    host = host_address() or "127.0.0.1"
    uplink = Uplink(allow_host_loopback=True)
    async with (
        network(uplink=uplink) as net,
        net.member("web", ports=[f"{host}:0:80"]) as web,
        serving(web, 80),
    ):
        (forward,) = await web.forwarder.list()
        there = "10.0.2.2" if host == "127.0.0.1" else host
        assert await ask(web, there, forward.host_port)


@bounded
async def test_many_members_are_opened_at_once() -> None:
    """moby/moby#52903: some fail.  The engine, on this event loop, takes no socket before all have been passed."""
    uplink = Uplink(allow_host_loopback=True)
    async with (
        network(driver="loop", uplink=uplink) as net,
        net.member("web", ports=["127.0.0.1:0:80"]) as web,
    ):
        with closing(socket.socket()) as sock:
            async with anyio.create_task_group() as tasks:
                for _ in range(40):
                    tasks.start_soon(net.stack.pass_socket, sock)
        (forward,) = await web.forwarder.list()
        async with serving(web, 80):
            assert await ask(web, "10.0.2.2", forward.host_port)


@bounded
async def test_a_name_of_many_members_has_all_of_them() -> None:
    """docker/for-mac#2160: an answer that is too long for a datagram is lost, and not asked for over TCP."""
    needs("dig", "getent")
    async with network() as net, net.member("client") as client:
        async with anyio.create_task_group() as tasks:
            for number in range(32):
                tasks.start_soon(partial(net.add_member, f"web{number}", aliases=["web"]))
        everybody = {str(each.address) for name, each in net.members.items() if name != "client"}
        assert len(everybody) == 32
        assert "tc" in (await output(client, "dig", "+noedns", "+ignore", "web")).partition("flags: ")[2][:12]
        for options in ("+noedns", "+bufsize=1232"):
            found = (await answered(client, options, "web"))[1]
            assert sorted(found) == sorted(everybody)
        found = (await output(client, "getent", "ahostsv4", "web")).split()
        assert everybody <= set(found)


@bounded
async def test_names_that_differ_in_case_are_one() -> None:
    """moby/moby#28689: two, and neither is found in other letters."""
    needs("getent")
    async with network() as net, net.member("Web_Server") as web:
        for name in ("web_server", "WEB_SERVER"):
            assert str(web.address) in await output(web, "getent", "hosts", name)
            with pytest.raises(ArgumentError, match="a name that nobody has"):
                await net.add_member(name)


@bounded
async def test_members_hear_each_others_multicast() -> None:
    """moby/moby#3043, for programs that find each other by mDNS."""
    async with network() as net, net.member("one") as one, net.member("two") as two:
        async with await one.popen([sys.executable, "-ISc", LISTEN]) as process:
            assert process.stdout is not None
            said = b""
            while b"begun" not in said:
                said += await process.stdout.receive()
            await output(two, sys.executable, "-ISc", SAY)
            async for chunk in process.stdout:
                said += chunk
        assert said.decode().split() == ["begun", str(two.address), str(two.address)]
