"""IPv6 as programs inside have it: curl, dig, ping, traceroute, the kernel's own SLAAC.  The guest is this kernel."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv6Address, IPv6Interface, IPv6Network, ip_address
from pathlib import Path
from typing import Any

import anyio
import pytest

from netns_kit import (
    AddressError,
    ArgumentError,
    Forwarder,
    Namespace,
    Network,
    Refusal,
    Subnet6,
    TapDevice,
    Uplink,
    UserStack,
)
from netns_kit.gateway.setup import Configure, DriverName
from tests.support import needs, needs_ipv6, needs_ping, needs_tun
from tests.support.connections import every_driver, once
from tests.support.multihop import (
    GATEWAY_6,
    GUEST_6,
    H_6,
    MTU,
    NO_ROUTE_6,
    PROHIBITED_6,
    R1_6,
    R2_6,
    S_6,
    Hops,
    in_h,
    received,
)
from tests.support.servers import SECONDS, dns_server, echo, http, sent_again, tcp_server, udp_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

RTMGRP_IPV6_IFADDR = 0x100  # linux/rtnetlink.h
IPV6_RECVERR, IPV6_UNICAST_HOPS = 25, 16  # linux/in6.h
NAMES = {"name.tld": "2001:db8::7"}


@pytest.fixture(autouse=True)
def _ipv6() -> None:
    needs_tun()
    needs_ipv6()


@asynccontextmanager
async def network(**options: Any) -> AsyncIterator[Network]:
    with anyio.fail_after(SECONDS):
        async with Network(**{"ipv6": True, **options}) as net:
            yield net


async def output(net: Network | Namespace, *command: str) -> str:
    """What a command says, whatever it thinks of it."""
    needs(command[0])
    done = await net.run(command, check=False)
    return done.stdout.decode() + done.stderr.decode()


async def connect(namespace: Namespace, address: str, port: int) -> tuple[int, int]:
    """The errno of a connect inside, and how many more SYN its kernel had to send for it."""
    zone = 0
    if address.startswith("fe80:"):
        [zone] = [link.index for link in await namespace.links() if link.name == "tap0"]
    with await namespace.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
        sock.connect_ex((address, port, 0, zone))
        await anyio.wait_writable(sock)
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), sent_again(sock)


# -- ready means ready --------------------------------------------------------------------------------


@every_driver
async def test_ready_means_ready(driver: DriverName) -> None:
    """At once after entering, with no wait for an address to be found free."""
    needs("curl", "dig", "ping")
    with dns_server(NAMES) as resolver, tcp_server(http, ("::1", 0)) as port:
        uplink = Uplink(allow_host_loopback=[port], dns=[f"127.0.0.1:{resolver}"])
        async with network(uplink=uplink, driver=driver) as net:
            assert await connect(net.namespace, GATEWAY_6, port) == (0, 0)
            assert await output(net, "curl", "-6sSf", f"http://[{GATEWAY_6}]:{port}/peer") == "::1"
            assert await output(net, "curl", "-6sSf", f"http://[fe80::2%25tap0]:{port}/peer") == "::1"
            assert (
                await output(net, "dig", "+short", "AAAA", "@fd00::3", "name.tld")
            ).strip() == "2001:db8::7"
            assert "status: NXDOMAIN" in await output(net, "dig", "+tcp", "AAAA", "@fd00::3", "other.tld")
            for address in (GATEWAY_6, "fd00::3", "fe80::2%tap0"):
                assert " 0% packet loss" in await output(net, "ping", "-6", "-c1", "-W5", address)
            shown = json.loads(await output(net, "ip", "-6", "-j", "address", "show", "dev", "tap0"))
            mine = [each for each in shown[0]["addr_info"] if each["scope"] == "global"]
            assert [(each["local"], each["prefixlen"]) for each in mine] == [(GUEST_6, 64)]
            assert not mine[0].get("tentative")
            assert await net.namespace.get_sysctl("net/ipv6/conf/tap0/accept_ra") == "0"


async def test_off_unless_it_is_asked_for() -> None:
    async with network(ipv6=False, uplink=Uplink(allow_host_loopback=True)) as net:
        assert net.subnet.ipv6 is None
        tap = [found.interface for found in await net.namespace.addresses() if found.index != 1]
        assert [each for each in tap if each.version == 6 and not each.is_link_local] == []
        await output(net, "ip", "-6", "neigh", "add", "fd00::2", "lladdr", "52:55:0a:00:02:02", "dev", "tap0")
        await output(net, "ip", "-6", "address", "add", "fd00::100/64", "dev", "tap0", "nodad")
        with await net.namespace.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"however hard one tries", (GATEWAY_6, 9))
        await output(net, "ping", "-c1", "-W5", "10.0.2.2")  # whose answer comes after
        stats = await net.stack.stats()
        assert stats["dropped_ipv6_off"] > 0
        assert stats["udp_flows"] == 0


async def test_another_prefix() -> None:
    async with network(ipv6=Subnet6("fd12:3456:789a:1::/64"), uplink=Uplink(allow_host_loopback=True)) as net:
        with tcp_server(http, ("::1", 0)) as port:
            url = f"http://[fd12:3456:789a:1::2]:{port}/peer"
            assert await output(net, "curl", "-6sSf", url) == "::1"
        tap = [found.interface for found in await net.namespace.addresses()]
        assert IPv6Interface("fd12:3456:789a:1::100/64") in tap


def test_an_mtu_that_leaves_no_ipv6() -> None:
    with pytest.raises(ArgumentError, match="mtu=1279: expected 1280 or more for IPv6"):
        Network(ipv6=True, mtu=1279)


# -- the host's loopback ------------------------------------------------------------------------------


async def test_the_hosts_loopback_is_by_grant() -> None:
    with tcp_server(echo, ("::1", 0)) as granted, tcp_server(echo, ("::1", 0)) as other:
        async with network(uplink=Uplink(allow_host_loopback=[granted])) as net:
            for address in (GATEWAY_6, "fe80::2"):
                assert (await connect(net.namespace, address, granted))[0] == 0
                assert (await connect(net.namespace, address, other))[0] == errno.EACCES
        async with network() as net:
            assert (await connect(net.namespace, GATEWAY_6, granted))[0] == errno.EACCES


@once
@pytest.mark.parametrize("address", ["fd00::77", "fe80::77%tap0"])
async def test_nobody_else_is_on_the_link(address: str) -> None:
    """Nothing answers for them, so the guest's kernel itself finds that out."""
    async with network() as net:
        await net.namespace.set_sysctl("net/ipv6/neigh/tap0/retrans_time_ms", 100)  # else it asks for 3 s
        said = await output(net, "ping", "-6", "-c1", "-W4", address)
        assert "Address unreachable" in said or "100% packet loss" in said


async def test_a_policy_is_asked_about_ipv6_as_well() -> None:
    asked = []

    def policy(flow: Any) -> Refusal | None:
        asked.append(str(flow.destination))
        return Refusal.RESET

    async with network(uplink=Uplink(policy=policy)) as net:
        assert (await connect(net.namespace, "2001:db8::1", 80))[0] == errno.ECONNREFUSED
        assert asked == ["[2001:db8::1]:80"]


# -- datagrams ----------------------------------------------------------------------------------------


async def test_datagrams_larger_than_the_link() -> None:
    """In fragments, both ways."""
    with udp_server(address=("::1", 0)) as port:
        async with network(uplink=Uplink(allow_host_loopback=True)) as net:
            assert net.tap.mtu == 1500
            with await net.namespace.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                for size in (0, 1, 1452, 1453, 3000, 65507):
                    sent = os.urandom(size)
                    sock.sendto(sent, (GATEWAY_6, port))
                    assert (await received(sock))[0] == sent
            stats = await net.stack.stats()
            assert stats["fragments"] == 0
            said = await output(net, "ping", "-6", "-c1", "-W5", "-s", "3000", GATEWAY_6)
            assert "3008 bytes from" in said


# -- a path of several hops ---------------------------------------------------------------------------


@in_h()
async def test_traceroute(hops: Hops) -> None:
    needs("traceroute")
    needs_ping()
    path = [GATEWAY_6, R1_6, R2_6, S_6]
    async with Network(ipv6=True) as net:
        for kind in ((), ("-I",), ("-T", "-p", "9")):
            said = await output(net, "traceroute", "-6", "-n", "-q1", "-w3", *kind, S_6)
            assert re.findall(r"^ *\d+ +(\S+)", said, re.MULTILINE) == path, said


@in_h()
async def test_a_ping_has_its_own_hops(hops: Hops) -> None:
    async with Network(ipv6=True) as net:
        for hop, router in ((1, GATEWAY_6), (2, R1_6), (3, R2_6)):
            said = await output(net, "ping", "-6", "-n", "-c1", "-W5", "-t", str(hop), S_6)
            assert f"From {router}" in said
            assert "Time exceeded: Hop limit" in said
        said = await output(net, "ping", "-6", "-n", "-c1", "-W5", S_6)
        assert f"64 bytes from {S_6}: icmp_seq=1 ttl=61" in said


@in_h(ping=False, privileged=True)
async def test_pings_by_raw_sockets(hops: Hops) -> None:
    """Where ping sockets are closed and raw ones are not."""
    async with Network(ipv6=True) as net:
        said = await output(net, "ping", "-6", "-n", "-c1", "-W5", "-s", "1000", S_6)
        assert f"1008 bytes from {S_6}: icmp_seq=1 ttl=61" in said
        said = await output(net, "ping", "-6", "-n", "-c1", "-W5", "-t", "2", S_6)
        assert f"From {R1_6} icmp_seq=1 Time exceeded: Hop limit" in said


@in_h()
async def test_too_big_is_said_by_whom_it_is_too_big_for(hops: Hops) -> None:
    async with Network(ipv6=True) as net:
        said = await output(net, "ping", "-6", "-n", "-c1", "-W5", "-M", "do", "-s", "1452", S_6)
        assert f"From {R1_6} icmp_seq=1 Packet too big: mtu={MTU}" in said
        said = await output(net, "tracepath", "-6", "-n", "-m6", S_6)
        assert f"pmtu {MTU}" in said
        assert f"{S_6} " in said
        with (
            hops.udp("S", 9, address=S_6) as server,
            await net.namespace.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock,
        ):
            sent = os.urandom(3000)
            sock.sendto(sent, (S_6, 9))
            payload, sender = await received(server)
            assert payload == sent
            server.sendto(sent[:1000], sender)
            assert (await received(sock))[0] == sent[:1000]


@in_h()
async def test_errors_have_their_type_code_and_offender(hops: Hops) -> None:
    async with Network(ipv6=True) as net:
        for address, expected in (
            (S_6, (errno.ECONNREFUSED, 1, 4, S_6)),
            (PROHIBITED_6, (errno.EACCES, 1, 1, R1_6)),
            (NO_ROUTE_6, (errno.ENETUNREACH, 1, 0, R1_6)),
        ):
            with await net.namespace.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
                sock.sendto(b"question", (address, 9))
                await anyio.wait_readable(sock)
                payload, ((_, _, data),), _, to = sock.recvmsg(1 << 16, 512, socket.MSG_ERRQUEUE)
                number, kind, code = int.from_bytes(data[:4], "little"), data[5], data[6]
                offender = str(IPv6Address(data[24:40]))
                assert (number, kind, code, offender) == expected
                assert (payload, to[:2]) == (b"question", (address, 9))
        for address, number in ((S_6, errno.ECONNREFUSED), (NO_ROUTE_6, errno.ENETUNREACH)):
            assert (await connect(net.namespace, address, 9))[0] == number


@in_h()
async def test_where_flows_come_from(hops: Hops) -> None:
    """`bind6` and `device`."""
    needs("ip", "ping")
    await anyio.run_process(["ip", "address", "add", "fd01:0:0:1::77/64", "dev", "R1", "nodad"])
    sources = []
    for uplink in (Uplink(bind6=H_6), Uplink(bind6="fd01:0:0:1::77"), Uplink(device="R1")):
        async with Network(ipv6=True, uplink=uplink) as net:
            with hops.tcp("S", 9, address=S_6) as server, hops.udp("S", 9, address=S_6) as datagrams:
                assert (await connect(net.namespace, S_6, 9))[0] == 0
                server.setblocking(False)
                await anyio.wait_readable(server)
                sock, client = server.accept()
                sock.close()
                with await net.namespace.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                    sock.sendto(b"from whom?", (S_6, 9))
                    assert (await received(datagrams))[1][0] == client[0]
                assert " 0% packet loss" in await output(net, "ping", "-6", "-n", "-c1", "-W5", S_6)
                sources.append(client[0])
    assert sources[:2] == [H_6, "fd01:0:0:1::77"]


@in_h()
async def test_a_forwarded_port_shows_who_is_there(hops: Hops) -> None:
    """Clients of IPv6 come with their address; of IPv4, and of the host's loopback, from the gateway's."""
    async with Network(ipv6=True, ports=["[::]:8080:80", "tcp:9000:[fd00::100]:80"]) as net:
        with await net.namespace.socket(socket.AF_INET6, socket.SOCK_STREAM) as listener:
            listener.bind(("::", 80))
            listener.listen()
            for where, family, to, source in (
                ("S", socket.AF_INET6, ("fd01:0:0:1::1", 8080), S_6),
                ("H", socket.AF_INET6, ("::1", 8080), GATEWAY_6),
                ("S", socket.AF_INET, ("10.1.0.1", 9000), GATEWAY_6),
            ):
                with hops.at(where):
                    client = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                with client:
                    client.connect_ex(to)
                    await anyio.wait_readable(listener)
                    sock, peer = listener.accept()
                    with sock:
                        assert (peer[0], peer[1]) == (source, client.getsockname()[1])
        await net.forwarder.add("[::]:5353:53/udp")
        with await net.namespace.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
            server.bind(("::", 53))
            with hops.udp("S", address=S_6) as asker:
                asker.sendto(b"question", ("fd01:0:0:1::1", 5353))
                question, sender = await received(server)
                assert (question, sender[:2]) == (b"question", asker.getsockname()[:2])
                server.sendto(b"answer", sender)
                answer, answerer = await received(asker)
                assert (answer, answerer[:2]) == (b"answer", ("fd01:0:0:1::1", 5353))


async def test_ports_that_cannot_lead_there() -> None:
    async with network() as net:
        for guest in (
            "fe80::5",
            "ff02::1",
            "::",
            GATEWAY_6,
            "fd00::3",
            "fe80::2",
            "::ffff:10.0.2.100",
        ):
            with pytest.raises(AddressError, match="expected an address that the namespace can have"):
                await net.forwarder.add(f"127.0.0.1:0:[{guest}]:80")


# -- configured by itself -----------------------------------------------------------------------------


@asynccontextmanager
async def unconfigured(
    ipv6: Subnet6, mtu: int = 1500, **options: Any
) -> AsyncIterator[tuple[Namespace, UserStack]]:
    """The namespace's kernel has to find its addresses out."""
    with anyio.fail_after(SECONDS):
        async with (
            Namespace.create() as ns,
            TapDevice.open(ns, "tap0", mtu=mtu) as tap,
            UserStack(tap, ipv6=ipv6, configure=False, **options) as stack,
        ):
            yield ns, stack


async def usable(ns: Namespace, wanted: Callable[[IPv6Interface], object]) -> IPv6Interface:
    """The first address of tap0 that is wanted, as soon as the kernel lets it be used."""
    with await ns.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as news:
        news.bind((0, RTMGRP_IPV6_IFADDR))
        while True:
            shown = json.loads(await output(ns, "ip", "-6", "-j", "address", "show", "dev", "tap0"))
            for each in shown[0]["addr_info"]:
                address = IPv6Interface(f"{each['local']}/{each['prefixlen']}")
                if wanted(address) and not each.get("tentative"):
                    return address
            await anyio.wait_readable(news)
            news.recv(1 << 16)


@once
async def test_the_kernel_configures_itself() -> None:
    """SLAAC, from router advertisements alone; then everything works."""
    needs("ip", "curl", "ping")
    with tcp_server(http, ("::1", 0)) as port:
        uplink = Uplink(allow_host_loopback=True)
        async with unconfigured(Subnet6(), uplink=uplink) as (ns, _):
            address = await usable(ns, lambda each: not each.is_link_local)
            assert address.network == IPv6Network("fd00::/64")
            assert address.ip != IPv6Address(GUEST_6)
            ways = [way for way in await ns.routes() if way.destination == IPv6Network("::/0")]
            assert [str(way.gateway) for way in ways] == ["fe80::2"]
            url = f"http://[{GATEWAY_6}]:{port}/peer"
            assert await output(ns, "curl", "-6sSf", url) == "::1"
            assert " 0% packet loss" in await output(ns, "ping", "-6", "-c1", "-W5", "fd00::3")


@once
async def test_what_the_router_says() -> None:
    needs("rdisc6", "ndisc6", "ip")
    said = Subnet6("fd77::/64", managed=True, other=True, autonomous=False, search=("example.com",))
    async with unconfigured(said, mtu=1400) as (ns, _):
        await usable(ns, lambda each: each.is_link_local)
        told = await output(ns, "rdisc6", "-1", "tap0")
        fields = dict(re.findall(r"^ *(\S.*?) *: +(\S+)", told, re.MULTILINE))
        assert fields["Prefix"] == "fd77::/64", told
        assert (fields["Stateful address conf."], fields["Stateful other conf."]) == ("Yes", "Yes")
        assert (fields["On-link"], fields["Autonomous address conf."]) == ("Yes", "No")
        assert fields["MTU"] == "1400"
        assert fields["Recursive DNS server"] == "fd77::3"
        assert fields["DNS search list"] == "example.com"
        assert "from fe80::2" in told
        assert await ns.get_sysctl("net/ipv6/conf/tap0/mtu") == "1400"
        for address in ("fd77::2", "fd77::3", "fe80::2"):
            assert "52:55:0A:00:02:02" in await output(ns, "ndisc6", "-1", "-n", address, "tap0")
        assert "Timed out" in await output(ns, "ndisc6", "-1", "-r1", "-w300", "fd77::1234", "tap0")


@once
async def test_who_takes_our_address_is_told_that_it_is_taken() -> None:
    needs("ip")
    async with unconfigured(Subnet6()) as (ns, _):
        await usable(ns, lambda each: each.is_link_local)
        with await ns.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as news:
            news.bind((0, RTMGRP_IPV6_IFADDR))
            await ns.run(["ip", "address", "add", f"{GATEWAY_6}/64", "dev", "tap0"])
            while "dadfailed" not in await output(ns, "ip", "-6", "address", "show", "dev", "tap0"):
                await anyio.wait_readable(news)
                news.recv(1 << 16)


LEASED = """#!/bin/sh
env | grep ^new_dhcp6 >> {0}/told
case $reason in BOUND6) ip -6 address replace $new_ip6_address/128 dev tap0 nodad;; esac
"""


@once
async def test_dhcpv6(tmp_path: Path) -> None:
    """The route is from router advertisements, the address from ISC's client; forwarded ports lead there."""
    needs("dhclient", "ip", "curl")
    script = tmp_path / "script"
    script.write_text(LEASED.format(tmp_path))
    script.chmod(0o755)
    words = ["dhclient", "-6", "-lf", f"{tmp_path}/leases", "-pf", f"{tmp_path}/pid", "-sf", str(script)]
    said = Subnet6(managed=True, other=True, autonomous=False)
    with tcp_server(http, ("::1", 0)) as port:
        uplink = Uplink(allow_host_loopback=True)
        async with network(ipv6=said, configure="link", uplink=uplink, ports=["[::1]:0:80"]) as net:
            await usable(net.namespace, lambda each: each.is_link_local)
            await net.run([*words, "-1", "tap0"])
            address = await usable(net.namespace, lambda each: not each.is_link_local)
            assert [lease.address for lease in await net.stack.leases()] == [address.ip]
            assert "new_dhcp6_name_servers=fd00::3" in (tmp_path / "told").read_text()
            assert await output(net, "curl", "-6sSf", f"http://[{GATEWAY_6}]:{port}/peer") == "::1"
            [forward] = await net.forwarder.list()
            async with (
                await net.namespace.listen_tcp(address.ip, 80) as listener,
                await anyio.connect_tcp("::1", forward.host_port),
                await listener.accept(),
            ):
                pass
            await net.run([*words, "-r", "tap0"])
            assert await net.stack.leases() == ()


# -- without IPv6 -------------------------------------------------------------------------------------


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


@every_driver
@pytest.mark.parametrize("knob", ["all", "default"])
async def test_a_namespace_with_ipv6_switched_off(
    knob: str, driver: DriverName, caplog: pytest.LogCaptureFixture
) -> None:
    """IPv4 is served, and it is said once why there is no more."""
    with tcp_server(http) as port, anyio.fail_after(SECONDS):
        async with Namespace.create() as ns:
            await ns.set_sysctl(f"net.ipv6.conf.{knob}.disable_ipv6", 1)
            uplink = Uplink(allow_host_loopback=True)
            async with (
                TapDevice.open(ns, "tap0") as tap,
                UserStack(tap, uplink, ipv6=True, driver=driver) as stack,
                Forwarder(stack) as forwarder,
            ):
                assert stack.subnet.ipv6 is None
                assert await output(ns, "curl", "-sSf", f"http://10.0.2.2:{port}/peer") == "127.0.0.1"
                [forward] = await forwarder.add("[::1]:0:80")
                async with (
                    await ns.listen_tcp("10.0.2.100", 80) as listener,
                    await anyio.connect_tcp("::1", forward.host_port) as client,
                ):
                    await client.send(b"by IPv4, as without the switch")
                    async with await listener.accept() as server:
                        assert await server.receive() == b"by IPv4, as without the switch"
    assert notices(caplog) == ["IPv4 only: the namespace has no IPv6: net.ipv6.conf.tap0.disable_ipv6 is 1"]


@every_driver
@pytest.mark.parametrize("configure", ["link", False])
async def test_one_that_is_left_to_a_client_and_has_none(
    configure: Configure, driver: DriverName, caplog: pytest.LogCaptureFixture
) -> None:
    async with Namespace.create() as ns:
        await ns.set_sysctl("net.ipv6.conf.default.disable_ipv6", 1)
        async with (
            TapDevice.open(ns, "tap0") as tap,
            UserStack(tap, ipv6=True, configure=configure, driver=driver) as stack,
        ):
            assert stack.subnet.ipv6 is None
    assert notices(caplog) == ["IPv4 only: the namespace has no IPv6: net.ipv6.conf.tap0.disable_ipv6 is 1"]


@in_h(privileged=True)
async def test_a_host_with_ipv6_switched_off(hops: Hops, caplog: pytest.LogCaptureFixture) -> None:
    await anyio.Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
    with hops.tcp("S", 9) as server:
        async with Network(ipv6=True, uplink=Uplink(allow_host_loopback=True)) as net:
            server.setblocking(False)
            async with await net.namespace.connect_tcp("10.3.0.2", 9):
                await anyio.wait_readable(server)
                server.accept()[0].close()
            for address in (S_6, GATEWAY_6):
                error, again = await connect(net.namespace, address, 9)
                assert error
                assert not again
            assert " 0% packet loss" in await output(net, "ping", "-6", "-c1", "-W5", GATEWAY_6)
    assert notices(caplog) == ["IPv4 only: the host has no IPv6: net.ipv6.conf.all.disable_ipv6 is 1"]


async def test_all_addresses_are_of_this_network() -> None:
    """What `Subnet6` promises, as the parts see it."""
    async with network() as net:
        subnet = net.subnet.ipv6
        assert subnet is not None
        assert [str(each) for each in net.subnet.resolvers] == ["10.0.2.3", "fd00::3"]
        assert net.subnet.of(ip_address("::1")) is subnet
