"""DHCP with the clients people have, in a namespace whose interface nobody has configured.

Each asks for everything, is held to what it was told, reaches the world, renews its lease, loses it, gets another,
and gives that back.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest

from netns_kit import DhcpSettings, Network, StaticLease, Uplink
from netns_kit.gateway.setup import DriverName
from tests.support import ROOT, needs, needs_ipv6, needs_tun, seen_inside
from tests.support.connections import once
from tests.support.servers import SECONDS, http, tcp_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

MTU = 1400
KEPT, FIRST = IPv4Address("10.0.2.50"), IPv4Address("10.0.2.15")
RICH = DhcpSettings(
    lease_seconds=600,
    domain="eng.example.com",
    search=("eng.example.com", "example.com"),
    routes=((IPv4Network("192.0.2.0/25"), IPv4Address("10.0.2.7")),),
)


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


@pytest.fixture
def driver(anyio_backend_name: str) -> DriverName:
    """Both that matter here: leases are asked for across a process, and within one."""
    return "thread" if anyio_backend_name == "asyncio" else "worker"


@asynccontextmanager
async def unconfigured(**options: Any) -> AsyncIterator[Network]:
    with anyio.fail_after(SECONDS):
        async with Network(configure="link", **options) as net:
            yield net


async def output(net: Network, *command: str) -> str:
    try:
        return (await net.run(command)).stdout.decode().strip()
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"{command}: {error.returncode}\n{error.stderr.decode()}") from error


async def all_is_read(net: Network) -> None:
    """What was sent from inside before has been handled: an answer from the gateway has come after it."""
    done = await net.run(
        ["busybox", "arping", "-D", "-f", "-c", "1", "-w", "10", "-I", "tap0", "10.0.2.2"], check=False
    )
    assert done.returncode == 1, done  # somebody has that address


class Client:
    """One client, running in the foreground; what it does on an event writes the event's variables to a pipe."""

    seconds = 600
    """Of a lease, for a client that renews when its time has come and not when it is told to."""
    bound = frozenset[str]()
    renewed: frozenset[str]
    told: ClassVar[dict[str, str]]
    """What it is told, by its own words."""

    def __init__(self, net: Network, directory: Path, stack: AsyncExitStack) -> None:
        self.net = net
        self.directory = directory
        self.stack = stack

    async def start(self) -> None:
        raise NotImplementedError

    async def event(self, among: frozenset[str]) -> dict[str, str]:
        """The variables of the next event of that name."""
        raise NotImplementedError

    async def renew(self) -> None:
        raise NotImplementedError

    async def release(self) -> None:
        raise NotImplementedError


@contextmanager
def pipe(path: Path) -> Iterator[int]:
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # both, so that it never ends
    try:
        yield fd
    finally:
        os.close(fd)


class WithScript(Client):
    configure = ""

    def __init__(self, net: Network, directory: Path, stack: AsyncExitStack) -> None:
        super().__init__(net, directory, stack)
        self.events = stack.enter_context(pipe(directory / "events"))
        self.text = b""
        self.script = directory / "script"
        self.script.write_text(
            f"#!/bin/sh\nPATH=$PATH:/sbin:/usr/sbin\nevent=${{1:-$reason}}\n{self.configure}\n"
            f"printf 'event=%s\\n%s\\n\\n' \"$event\" \"$(env | grep '^[a-z]' | grep -v ^old_)\" "
            f">{directory}/events\n"
        )
        self.script.chmod(0o755)

    async def start(self) -> None:
        process = await self.net.popen(self.command(), stdout=None, stderr=None)
        self.process = await self.stack.enter_async_context(process)

    def command(self) -> list[str]:
        raise NotImplementedError

    async def event(self, among: frozenset[str]) -> dict[str, str]:
        while True:
            while b"\n\n" not in self.text:
                await anyio.wait_readable(self.events)
                self.text += os.read(self.events, 65536)
            event, _, self.text = self.text.partition(b"\n\n")
            variables = dict(line.split("=", 1) for line in event.decode().split("\n") if "=" in line)
            if variables["event"] in among:
                return variables


class Udhcpc(WithScript):
    bound, renewed = frozenset({"bound"}), frozenset({"renew"})
    configure = """
case $event in
bound|renew) ip addr replace $ip/$mask dev $interface; ip route replace default via $router ;;
deconfig) ip addr flush dev $interface scope global ;;
esac"""
    told: ClassVar[dict[str, str]] = {
        "ip": str(KEPT),
        "subnet": "255.255.255.0",
        "mask": "24",
        "router": "10.0.2.2",
        "dns": "10.0.2.3",
        "hostname": "web",
        "domain": "eng.example.com",
        "search": "eng.example.com example.com",
        "mtu": str(MTU),
        "lease": "600",
        "serverid": "10.0.2.2",
        "opt53": "05",
        "opt58": "0000012c",
        "opt59": "0000020d",
        "staticroutes": "192.0.2.0/25 10.0.2.7 0.0.0.0/0 10.0.2.2",
    }

    def command(self) -> list[str]:
        asked = [word for name in ("search", "staticroutes", "mtu", "58", "59") for word in ("-O", name)]
        return ["busybox", "udhcpc", "-f", "-i", "tap0", "-s", str(self.script), *asked]

    async def renew(self) -> None:
        self.process.send_signal(signal.SIGUSR1)

    async def release(self) -> None:
        self.process.send_signal(signal.SIGUSR2)
        await self.event(frozenset({"deconfig"}))
        self.process.terminate()
        await self.process.wait()


class Dhclient(WithScript):
    family = "-4"
    seconds = 6
    bound, renewed = frozenset({"BOUND"}), frozenset({"RENEW"})
    configure = """
case $event in
BOUND|RENEW|REBIND|REBOOT)
    ip addr replace $new_ip_address/24 dev $interface; ip route replace default via $new_routers ;;
EXPIRE|FAIL|RELEASE|STOP) ip addr flush dev $interface scope global ;;
esac"""
    told: ClassVar[dict[str, str]] = {
        "new_ip_address": str(KEPT),
        "new_subnet_mask": "255.255.255.0",
        "new_routers": "10.0.2.2",
        "new_domain_name_servers": "10.0.2.3",
        "new_host_name": "web",
        "new_domain_name": "eng.example.com",
        "new_domain_search": "eng.example.com. example.com.",
        "new_interface_mtu": str(MTU),
        "new_dhcp_lease_time": "6",
        "new_dhcp_renewal_time": "3",
        "new_dhcp_rebinding_time": "5",
        "new_dhcp_server_identifier": "10.0.2.2",
        "new_dhcp_message_type": "5",
        "new_rfc3442_classless_static_routes": "25 192 0 2 0 10 0 2 7 0 10 0 2 2",
    }
    CONFIGURATION = """
option rfc3442-classless-static-routes code 121 = array of unsigned integer 8;
request subnet-mask, routers, domain-name-servers, host-name, domain-name, domain-search, interface-mtu,
    dhcp-renewal-time, dhcp-rebinding-time, rfc3442-classless-static-routes;
"""

    def command(self) -> list[str]:
        (self.directory / "conf").write_text(self.CONFIGURATION)
        (self.directory / "leases").touch()
        where = {"-cf": "conf", "-lf": "leases", "-pf": "pid"}
        paths = [word for option, name in where.items() for word in (option, f"{self.directory}/{name}")]
        self.words = ["dhclient", self.family, *paths, "-sf", str(self.script), "tap0"]
        return [*self.words[:-1], "-d", "-q", "tap0"]

    async def renew(self) -> None:
        """It does so when half of its lease is over."""

    async def release(self) -> None:
        await output(self.net, *self.words[:-1], "-r", "tap0")
        await self.process.wait()


class Dhcpcd(WithScript):
    family, renewal = "-4", "-n"
    bound, renewed = frozenset({"BOUND"}), frozenset({"RENEW"})
    told: ClassVar[dict[str, str]] = {
        "new_ip_address": str(KEPT),
        "new_subnet_mask": "255.255.255.0",
        "new_subnet_cidr": "24",
        "new_routers": "10.0.2.2",
        "new_domain_name_servers": "10.0.2.3",
        "new_host_name": "web",
        "new_domain_name": "eng.example.com",
        "new_domain_search": "eng.example.com example.com",
        "new_interface_mtu": str(MTU),
        "new_dhcp_lease_time": "600",
        "new_dhcp_renewal_time": "300",
        "new_dhcp_rebinding_time": "525",
        "new_dhcp_server_identifier": "10.0.2.2",
        "new_dhcp_message_type": "5",
        "new_classless_static_routes": "192.0.2.0/25 10.0.2.7 0.0.0.0/0 10.0.2.2",
    }
    CONFIGURATION = """
duid
option subnet_mask, routers, domain_name_servers, host_name, domain_name, domain_search, interface_mtu
option dhcp_renewal_time, dhcp_rebinding_time, classless_static_routes
require dhcp_server_identifier
nodelay
noarp
noipv4ll
"""
    # its directories are another's: it has its own, and so has who speaks to it
    OWN = "mount -t tmpfs none /var/lib/dhcpcd && mount -t tmpfs none /run && mkdir -p /run/dhcpcd && exec "

    def command(self) -> list[str]:
        conf = self.directory / "conf"
        conf.write_text(self.CONFIGURATION)
        words = f"dhcpcd {self.family} -B -f {conf} -c {self.script} tap0"
        return ["unshare", "-m", "sh", "-c", f"{self.OWN} {words}"]

    async def tell(self, option: str) -> None:
        inside = seen_inside(self.process.pid)
        await output(self.net, "nsenter", "-m", f"-t{inside}", "dhcpcd", self.family, option, "tap0")

    async def renew(self) -> None:
        await self.tell(self.renewal)

    async def release(self) -> None:
        await self.tell("-k")
        await self.process.wait()


class Pyroute2(Client):
    bound = renewed = frozenset({"5"})
    told: ClassVar[dict[str, str]] = {
        "yiaddr": str(KEPT),
        "message_type": "5",
        "server_id": "10.0.2.2",
        "lease_time": "600",
        "subnet_mask": "255.255.255.0",
        "router": "['10.0.2.2']",
        "name_server": "['10.0.2.3']",
        "renewal_time": "300",
        "rebinding_time": "525",
    }

    async def start(self) -> None:
        lease = "pyroute2.dhcp.leases.JSONStdoutLease"
        command = [sys.executable, "-u", "-m", "pyroute2.dhcp.cli", "--lease-type", lease, "tap0"]
        process = await self.net.popen(command, stderr=None, cwd=self.directory)
        self.process = await self.stack.enter_async_context(process)
        self.text = ""

    async def event(self, among: frozenset[str]) -> dict[str, str]:
        assert self.process.stdout is not None
        while "\n}\n" not in self.text:
            self.text += (await self.process.stdout.receive()).decode()
        event, _, self.text = self.text.partition("\n}\n")
        ack = json.loads(event + "}")["ack"]
        variables = {**ack["options"], "yiaddr": ack["yiaddr"]}
        return {name: str(value) for name, value in variables.items()}

    async def renew(self) -> None:
        self.process.send_signal(signal.SIGUSR1)

    async def release(self) -> None:
        self.process.send_signal(signal.SIGINT)
        await self.process.wait()


CLIENTS: dict[str, tuple[type[Client], tuple[str, ...]]] = {
    "udhcpc": (Udhcpc, ("busybox",)),
    "dhclient": (Dhclient, ("dhclient",)),
    "dhcpcd": (Dhcpcd, ("dhcpcd", "unshare", "nsenter")),
    "pyroute2": (Pyroute2, ()),
}


@once
@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("name", CLIENTS)
async def test_a_client_gets_renews_loses_and_releases_a_lease(
    name: str, tmp_path: Path, driver: DriverName
) -> None:
    kind, programs = CLIENTS[name]
    needs("curl", "ip", "busybox", *programs)
    settings = DhcpSettings(kind.seconds, RICH.domain, RICH.search, RICH.routes)
    with tcp_server(http) as port:
        uplink = Uplink(allow_host_loopback=[port])
        async with (
            unconfigured(uplink=uplink, dhcp=settings, mtu=MTU, driver=driver) as net,
            AsyncExitStack() as stack,
        ):
            assert net.tap.mac is not None
            mac = net.tap.mac.hex(":")
            await net.stack.reserve(StaticLease(KEPT, mac=mac, hostname="web"))
            client = kind(net, tmp_path, stack)

            async def reaches_the_world() -> None:
                assert await output(net, "curl", "-sSf", f"http://10.0.2.2:{port}/peer") == "127.0.0.1"

            await client.start()
            said = await client.event(client.bound)
            assert {word: said.get(word) for word in client.told} == client.told
            (lease,) = await net.stack.leases()
            assert (lease.address, lease.state, lease.mac, lease.hostname) == (KEPT, "bound", mac, "web")
            assert lease.seconds is not None
            assert 0 < lease.seconds <= client.seconds
            await reaches_the_world()

            before = (await net.stack.stats())["dhcp_sent_ack"]
            await client.renew()
            said = await client.event(client.renewed)
            assert {word: said.get(word) for word in client.told} == client.told
            assert (await net.stack.stats())["dhcp_sent_ack"] > before

            await client.release()
            await all_is_read(net)
            assert [each.state for each in await net.stack.leases()] == ["reserved"]

            await client.start()
            assert str(KEPT) in (await client.event(client.bound)).values()
            assert await net.stack.revoke(KEPT)
            await client.renew()
            assert str(FIRST) in (await client.event(client.bound)).values()
            assert (await net.stack.stats())["dhcp_sent_nak"] == 1
            assert [each.address for each in await net.stack.leases()] == [FIRST]
            await reaches_the_world()


# -- IPv6 -----------------------------------------------------------------------------------------------

KEPT6, FIRST6 = IPv6Address("fd00::50"), IPv6Address("fd00::1000")


class Dhclient6(Dhclient):
    family = "-6"
    bound, renewed = frozenset({"BOUND6"}), frozenset({"RENEW6"})
    configure = """
case $event in
BOUND6|RENEW6|REBIND6)
    ip -6 addr replace $new_ip6_address/128 dev $interface nodad
    ip -6 route replace default via fe80::2 dev $interface ;;
RELEASE6|EXPIRE6|STOP6) ip -6 addr del $old_ip6_address/128 dev $interface ;;
esac"""
    told: ClassVar[dict[str, str]] = {
        "new_ip6_address": str(KEPT6),
        "new_ip6_prefixlen": "128",
        "new_max_life": "6",
        "new_preferred_life": "6",
        "new_renew": "3",
        "new_rebind": "4",
        "new_dhcp6_name_servers": "fd00::3",
        "new_dhcp6_domain_search": "eng.example.com. example.com.",
        "new_dhcp6_server_id": "0:3:0:1:52:55:a:0:2:2",
        "new_fqdn_fqdn": "me.example",
    }
    CONFIGURATION = """
request dhcp6.name-servers, dhcp6.domain-search, dhcp6.fqdn;
send fqdn.fqdn "me.example.";
"""


class Dhcpcd6(Dhcpcd):
    family, renewal = "-6", "-N"
    bound, renewed = frozenset({"BOUND6"}), frozenset({"RENEW6"})
    told: ClassVar[dict[str, str]] = {
        "new_dhcp6_ia_na1_ia_addr1": str(KEPT6),
        "new_dhcp6_ia_na1_ia_addr1_pltime": "600",
        "new_dhcp6_ia_na1_ia_addr1_vltime": "600",
        "new_dhcp6_ia_na1_t1": "300",
        "new_dhcp6_ia_na1_t2": "480",
        "new_dhcp6_name_servers": "fd00::3",
        "new_dhcp6_domain_search": "eng.example.com example.com",
    }
    CONFIGURATION = """
duid
noipv6rs
ia_na 1
option dhcp6_name_servers, dhcp6_domain_search
nodelay
"""


@pytest.mark.parametrize("anyio_backend", ["trio"])  # with a worker
@pytest.mark.parametrize("kind", [Dhclient6, Dhcpcd6])
async def test_a_client_of_ipv6_gets_renews_and_releases_a_lease(
    kind: type[WithScript], tmp_path: Path, driver: DriverName
) -> None:
    needs("curl", "ip", "busybox", "dhclient", "dhcpcd", "unshare", "nsenter")
    needs_ipv6()
    settings = DhcpSettings(kind.seconds, search=RICH.search)
    with tcp_server(http, ("::1", 0)) as port:
        uplink = Uplink(allow_host_loopback=[port])
        async with (
            unconfigured(uplink=uplink, dhcp=settings, ipv6=True, driver=driver) as net,
            AsyncExitStack() as stack,
        ):
            await net.namespace.set_sysctl("net.ipv6.conf.tap0.accept_ra", 0)
            await output(net, "ip", "addr", "add", "fe80::5/64", "dev", "tap0", "nodad")
            assert net.tap.mac is not None
            await net.stack.reserve(StaticLease(KEPT6, mac=net.tap.mac.hex(":")))
            client = kind(net, tmp_path, stack)

            await client.start()
            said = await client.event(client.bound)
            assert {word: said.get(word) for word in client.told} == client.told
            (lease,) = await net.stack.leases()
            assert (lease.address, lease.state) == (KEPT6, "bound")
            if kind is Dhcpcd6:
                await output(net, "ip", "route", "add", "default", "via", "fe80::2", "dev", "tap0")
            assert await output(net, "curl", "-g", "-sSf", f"http://[fd00::2]:{port}/peer") == "::1"

            before = (await net.stack.stats())["dhcp6_sent_reply"]
            await client.renew()
            said = await client.event(client.renewed)
            assert {word: said.get(word) for word in client.told} == client.told
            assert (await net.stack.stats())["dhcp6_sent_reply"] > before

            await client.release()
            await all_is_read(net)
            assert [each.state for each in await net.stack.leases()] == ["reserved"]

            assert await net.stack.revoke(KEPT6)
            await client.start()
            said = {}
            while (
                str(FIRST6) not in said.values()
            ):  # who remembers the other address is told when it renews it
                said = await client.event(client.bound | client.renewed)


# -- around it ------------------------------------------------------------------------------------------

SERVER = """
import socket
listener = socket.create_server(("0.0.0.0", 8000))
print("ready", flush=True)
while True:
    sock, client = listener.accept()
    sock.sendall(repr(sock.getsockname()[0]).encode())
    sock.close()
"""
SCRIPT = """#!/bin/sh
PATH=$PATH:/sbin:/usr/sbin
test "$1" != bound || {
    ip addr replace $ip/$mask dev $interface; ip route replace default via $router
}
"""
ONCE = ("busybox", "udhcpc", "-f", "-n", "-q", "-t", "20", "-T", "1", "-i", "tap0", "-s")


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script"
    path.write_text(SCRIPT)
    path.chmod(0o755)
    return str(path)


async def fetched(port: int) -> str:
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        return (await stream.receive()).decode()


async def test_forwarded_ports_lead_to_the_address_that_was_leased(driver: DriverName, script: str) -> None:
    needs("busybox", "ip")
    async with (
        unconfigured(driver=driver, ports=["127.0.0.1:0:8000", "127.0.0.1:0:10.0.2.15:8000"]) as net,
        await net.popen([sys.executable, "-ISc", SERVER], stderr=None) as server,
    ):
        assert server.stdout is not None
        assert (await server.stdout.receive()).startswith(b"ready")
        await output(net, *ONCE, script)
        for forward in await net.forwarder.list():
            assert await fetched(forward.host_port) == "'10.0.2.15'"


async def test_a_configured_namespace_has_its_server_too(driver: DriverName, script: str) -> None:
    """As slirp4netns has it: what runs inside may be a client of its own, of a bridge say."""
    needs("busybox", "ip")
    with anyio.fail_after(SECONDS):
        async with Network(driver=driver) as net:
            assert await net.stack.leases() == ()
            await output(net, *ONCE, script)
            (lease,) = await net.stack.leases()
            assert (lease.address, lease.state) == (FIRST, "bound")
            found = {str(each.interface) for each in await net.namespace.addresses()}
            assert {"10.0.2.100/24", "10.0.2.15/24"} <= found


async def test_several_workers_have_one_server(script: str) -> None:
    needs("busybox", "ip", "curl")
    with tcp_server(http) as port:
        uplink = Uplink(allow_host_loopback=[port])
        async with unconfigured(driver="worker", queues=3, uplink=uplink) as net:
            await output(net, *ONCE, script)
            assert [each.address for each in await net.stack.leases()] == [FIRST]
            assert await output(net, "curl", "-sSf", f"http://10.0.2.2:{port}/peer") == "127.0.0.1"


@once
async def test_without_a_server_nobody_answers(driver: DriverName, script: str) -> None:
    needs("busybox")
    async with unconfigured(driver=driver, dhcp=None) as net:
        done = await net.run([*ONCE, script, "-t", "2"], check=False)
        assert done.returncode == 1
        await all_is_read(net)
        assert (await net.stack.stats())["dropped_udp_broadcast"] == 2
        assert not any(count for name, count in (await net.stack.stats()).items() if "dhcp" in name)


def test_the_command_line_leaves_the_interface_to_a_client(script: str) -> None:
    needs("busybox", "curl", "ip")
    with tcp_server(http) as port:
        inside = (
            f"ip -4 addr show dev tap0; {' '.join(ONCE)} {script} >/dev/null 2>&1; "
            f"ip -4 -o addr show dev tap0; curl -sSf http://10.0.2.2:{port}/peer"
        )
        done = subprocess.run(
            [sys.executable, "-m", "netns_kit", "run", "--dhcp", f"--host-loopback={port}", "sh", "-c", inside],
            capture_output=True, text=True, timeout=SECONDS, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    address, peer = done.stdout.splitlines()
    assert " 10.0.2.15/24 " in address
    assert peer == "127.0.0.1"
