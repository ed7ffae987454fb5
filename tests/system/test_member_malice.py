"""What root in a member does to its links, the hub and the others, without a way out and bounded in time."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from ipaddress import IPv6Address, IPv6Interface

import anyio
import anyio.abc
import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_RA,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptPrefixInfo,
    IPv6,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, LLC, SNAP, Dot3, Ether
from scapy.packet import Packet, Raw

from netns_kit import Member, Namespace, Network
from netns_kit.network import guard
from netns_kit.network.addresses import link_local_of
from tests.support import needs, needs_ipv6, needs_tun
from tests.support.members import network, output, serving, status
from tests.support.servers import bounded

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]
EVERYTHING = 3  # ETH_P_ALL, linux/if_ether.h
ALL_NODES = "33:33:00:00:00:01"
MARK = b"the last one"

FLOOD = """
import os, socket, struct, sys, time
kind, mine, theirs = sys.argv[1], *map(bytes.fromhex, sys.argv[2:4])
source, target = map(socket.inet_aton, ("10.0.2.102", "10.0.2.101"))
arp = struct.pack(">HHBBH", 1, 0x800, 6, 4, 1) + mine + source + bytes(10)
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
link.bind(("eth0", 3))
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
end, number = time.monotonic() + 1, 0
while time.monotonic() < end:
    number += 1
    try:
        if kind == "addresses":  # for the bridge's table
            link.send(theirs + b"\\2" + os.urandom(5) + b"\\x08\\0" + bytes(46))
        elif kind == "unknown":  # to nobody
            link.send(b"\\2" + os.urandom(5) + mine + b"\\x08\\0" + bytes(46))
        elif kind == "ARP":
            link.send(b"\\xff" * 6 + mine + b"\\x08\\6" + arp)
        elif kind == "groups":  # reports of members of groups
            group = b"\\xef" + os.urandom(3)
            ip = struct.pack(">BBHHHBBH", 0x45, 0, 28, 0, 0, 1, 2, 0) + source + group
            raw.sendto(ip + b"\\x16" + bytes(3) + group, (socket.inet_ntoa(group), 0))
        else:  # first fragments
            ip = struct.pack(">BBHHHBBH", 0x45, 0, 1420, number & 0xFFFF, 0x2000, 64, 17, 0) + source + target
            raw.sendto(ip + bytes(1400), ("10.0.2.101", 0))
    except OSError:  # there is no room
        pass
print(number)
"""
ABSTRACT = """
import socket
with socket.socket(socket.AF_UNIX) as sock:
    print(sock.connect_ex("\\0secret"))
"""
OPEN_PORTS = """
import socket, sys
for port in range(1, 65536):
    with socket.socket() as sock:
        sock.settimeout(5)
        if sock.connect_ex((sys.argv[1], port)) == 0:
            print(port)
"""


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


@asynccontextmanager
async def wire(member: Member) -> AsyncIterator[socket.socket]:
    """A socket for whole frames on the link of a member."""
    with await member.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERYTHING)) as sock:
        sock.bind(("eth0", EVERYTHING))
        yield sock


@asynccontextmanager
async def three() -> AsyncIterator[tuple[Network, Member, Member, Member]]:
    async with (
        network(ipv6=True, internal=True) as net,
        net.member("alice") as a,
        net.member("bob") as b,
        net.member("carol") as c,
    ):
        yield net, a, b, c


def local(member: Member) -> str:
    """The link-local address of a member."""
    return str(link_local_of(bytes.fromhex(member.mac.replace(":", ""))))


def strange(a: Member, b: Member) -> dict[str, Packet]:
    """Frames of b's that nobody is to see."""
    mine, theirs = str(b.address), str(a.address)
    own, wide = Ether(src=b.mac, dst=a.mac), Ether(src=b.mac, dst="ff:ff:ff:ff:ff:ff")
    old = Dot3(src=b.mac, dst=a.mac)
    nodes = Ether(src=b.mac, dst=ALL_NODES) / IPv6(src=local(b), dst="ff02::1", hlim=255)
    claim = IPv6(src=str(b.address6), dst="ff02::1", hlim=255) / ICMPv6ND_NA(tgt=str(a.address6), O=1, S=0)
    as_a = IP(src=theirs, dst="224.0.0.251")
    redirect = ICMP(type=5, code=1, gw=mine) / IP(src=theirs)
    types = {
        "LLDP": 0x88CC, "LACP": 0x8809, "EAPOL": 0x888E, "PAUSE": 0x8808, "MPLS": 0x8847, "PPPoE": 0x8864,
        "QinQ": 0x88A8, "no protocol": 0x0600,
    }  # fmt: skip
    return {
        **{name: Ether(src=b.mac, dst=a.mac, type=each) / Raw(bytes(46)) for name, each in types.items()},
        "RARP": Ether(src=b.mac, dst=a.mac, type=0x8035) / ARP(op=4, hwsrc=b.mac, psrc=theirs),
        "IPX": old / LLC(dsap=0xE0, ssap=0xE0) / Raw(bytes(40)),
        "IPv4 in SNAP": old / LLC(dsap=0xAA, ssap=0xAA, ctrl=3) / SNAP(code=0x800) / IP(src=theirs),
        "gratuitous ARP": wide / ARP(op=2, hwsrc=b.mac, psrc=theirs, pdst=theirs),
        "ARP of another link": wide / ARP(hwtype=6, hwsrc=b.mac, psrc=theirs, pdst=theirs),
        "gratuitous advertisement": Ether(src=b.mac, dst=ALL_NODES)
        / claim
        / ICMPv6NDOptDstLLAddr(lladdr=b.mac),
        "a router behind a header": nodes / IPv6ExtHdrHopByHop() / ICMPv6ND_RA(),
        "a router in a fragment": nodes / IPv6ExtHdrFragment(nh=58) / ICMPv6ND_RA(),
        "mDNS of another": Ether(src=b.mac, dst="01:00:5e:00:00:fb") / as_a / UDP(sport=5353, dport=5353),
        "LLMNR of another": own / IP(src=theirs, dst=theirs) / UDP(sport=5355, dport=5355),
        "a redirect of the gateway's": own / IP(src="10.0.2.2", dst=theirs) / redirect,
        "the loopback's address": own / IP(src="127.0.0.1", dst=theirs) / UDP(dport=9),
        "the address of all": own / IP(src="255.255.255.255", dst=theirs) / UDP(dport=9),
        "a group's link address": Ether(src="01:00:5e:00:00:05", dst=a.mac)
        / IP(src=mine, dst=theirs)
        / ICMP(),
        "no link address": Ether(src="00:00:00:00:00:00", dst=a.mac) / IP(src=mine, dst=theirs) / ICMP(),
    }


@bounded
async def test_frames_that_nobody_is_to_see() -> None:
    needs_ipv6()
    async with three() as (_, a, b, c), wire(a) as heard, wire(c) as third, wire(b) as out:
        sent = strange(a, b)
        for number, packet in enumerate(sent.values()):
            out.send(bytes(packet / Raw(b"frame %3d" % number)))
        all_of_them = IP(src=str(b.address), dst="10.0.2.255")
        last = Ether(src=b.mac, dst="ff:ff:ff:ff:ff:ff") / all_of_them / UDP(dport=9) / MARK
        out.send(bytes(last))
        for ear in heard, third:
            frames = [b""]
            while MARK not in frames[-1]:
                await anyio.wait_readable(ear)
                frames.append(ear.recv(4096))
            got = [
                name
                for number, name in enumerate(sent)
                if any(b"frame %3d" % number in each for each in frames)
            ]
            assert got == []


BELIEVED = "ip neighbour show nud permanent; ip route; ip -6 route; ip route get 192.0.2.1; ip -brief address"


async def believed(*members: Member) -> list[set[str]]:
    """The neighbours that members were told of, their routes and their addresses."""
    return [set((await output(each, "sh", "-c", BELIEVED)).splitlines()) for each in members]


@bounded
async def test_what_members_believe_stays() -> None:
    """Neighbour discovery in fragments, also for a kernel that takes it; redirects; queries for groups."""
    needs("ping")
    needs("ip", "ping")
    needs_ipv6()
    async with three() as (_, a, b, c), wire(b) as out:
        for member in a, c:
            await output(member, "sh", "-c", "echo 0 >/proc/sys/net/ipv6/conf/eth0/suppress_frag_ndisc")
            assert await status(member, "ping", "-c1", "-W20", "-s", "4000", str(b.address6)) == 0, (
                "in fragments"
            )
        other = str(c.address6)
        await output(a, *"ip neighbour replace dev eth0 nud reachable lladdr".split(), c.mac, "to", other)
        before = await believed(a, c)
        forged = ICMPv6NDOptDstLLAddr(lladdr=b.mac)
        prefix = ICMPv6NDOptPrefixInfo(prefix="2001:db8::", prefixlen=64)
        for source, target, mac, said in (
            (local(b), "ff02::1", ALL_NODES, ICMPv6ND_RA(routerlifetime=1800, prf=1) / prefix),
            (str(b.address6), str(a.address6), a.mac, ICMPv6ND_NA(tgt=other, R=0, O=1) / forged),
            (str(b.address6), str(a.address6), a.mac, ICMPv6ND_NA(tgt="fd00::2", R=1, O=1) / forged),
        ):
            head = Ether(src=b.mac, dst=mac) / IPv6(src=source, dst=target, hlim=255)
            message = bytes(IPv6(bytes(IPv6(src=source, dst=target, hlim=255) / said)).payload)
            options = bytes((58, 0, 1, 4, 0, 0, 0, 0))  # a header of destination options, without any
            out.send(bytes(head / IPv6ExtHdrFragment(nh=60, offset=0, m=1, id=7) / Raw(options)))
            out.send(bytes(head / IPv6ExtHdrFragment(nh=60, offset=1, m=0, id=7) / Raw(message)))
            out.send(bytes(head / IPv6ExtHdrFragment(nh=58, offset=0, m=1, id=8) / Raw(message[:8])))
            out.send(bytes(head / IPv6ExtHdrFragment(nh=58, offset=1, m=0, id=8) / Raw(message[8:])))
        own = Ether(src=b.mac, dst=a.mac) / IP(src=str(b.address), dst=str(a.address))
        about = IP(src=str(a.address), dst="192.0.2.1") / UDP()
        out.send(bytes(own / ICMP(type=5, code=1, gw=str(b.address)) / about))
        query = IP(src=str(b.address), dst="224.0.0.1", ttl=1, proto=2) / Raw(b"\x11\x64\xee\x9b" + bytes(4))
        out.send(bytes(Ether(src=b.mac, dst="01:00:5e:00:00:01") / query))  # IGMP: who is in any group?
        for member in a, c:
            assert await status(member, "ping", "-c1", "-W20", "bob") == 0, "it has read what came before"
            assert await status(member, "ping", "-c1", "-W20", "fd00::2") == 0
        assert await believed(a, c) == before
        assert c.mac in await output(a, "ip", "neighbour", "show", other)


@bounded
async def test_what_a_member_does_to_its_link_is_its_own_affair() -> None:
    needs("ip", "ping", "unshare")
    async with network(internal=True) as net, net.member("alice") as a, net.member("bob") as b:
        carol = await net.add_member("carol")
        await output(carol, "ip", "link", "set", "eth0", "promisc", "on")
        async with wire(carol) as ear, serving(a, 80, swallow):
            async with await b.namespace.connect_tcp(a.address, 80) as stream:
                await stream.send(b"a secret")
                await stream.send_eof()
                assert await stream.receive() == b"heard"
            await output(b, "ping", "-c1", "-W20", "carol")
            frames = [b""]
            while not (frames[-1][:6].hex(":") == carol.mac and frames[-1][23:24] == b"\1"):  # ICMP
                await anyio.wait_readable(ear)
                frames.append(ear.recv(4096))
            assert not any(b"a secret" in each for each in frames), "promiscuous or not"
        for change in (
            "ip link set eth0 mtu 65000; ping -c1 -W1 -s 9000 alice",
            "ip link set eth0 down; ip link set eth0 name x0; ip link set x0 up",
            "unshare --net sleep 1000 & ip link set x0 netns $!; kill $!",
        ):
            await status(carol, "sh", "-c", change)
            assert await status(b, "ping", "-c1", "-W20", "alice") == 0, change
        address = carol.address
        await net.remove_member(carol)
        again = await net.add_member("carol", address=address)
        assert await status(b, "ping", "-c1", "-W20", str(again.address)) == 0


async def swallow(stream: anyio.abc.SocketStream) -> None:
    """Read all, and say so."""
    async with stream:
        async for _ in stream:
            pass
        await stream.send(b"heard")


async def known(net: Network) -> list[str]:
    """What the bridge knows of link addresses that are not its own."""
    lines = (await output(net, "bridge", "fdb")).splitlines()
    return sorted(line for line in lines if "permanent" not in line)


@pytest.mark.parametrize("kind", ["addresses", "unknown", "groups", "fragments", "ARP"])
@bounded
async def test_floods_leave_the_others_and_the_bridge_as_they_are(kind: str) -> None:
    needs("ping", "bridge")
    async with network(internal=True) as net, net.member("alice") as a, net.member("bob") as b:
        before = await known(net)
        words = [kind, b.mac.replace(":", ""), a.mac.replace(":", "")]
        async with await b.popen([sys.executable, "-ISc", FLOOD, *words]) as flood:
            while flood.returncode is None:
                assert await status(a, "ping", "-c1", "-W20", "10.0.2.2") == 0
            assert flood.stdout is not None
            assert int(await flood.stdout.receive()) > 100
        assert await known(net) == before
        assert await output(net, "bridge", "mdb") == ""
        assert await status(a, "ping", "-c1", "-W20", "bob") == 0


@bounded
async def test_frames_to_all_are_limited_for_each_member() -> None:
    """Without a limit they fill the queue of the stack's tap, which all share, and pings of others are lost."""
    needs("ip", "ping")
    async with network(internal=True) as net, net.member("alice") as a, net.member("bob") as b:
        words = ["ARP", b.mac.replace(":", ""), a.mac.replace(":", "")]
        before, began = await frames_received(a), time.monotonic()
        sent = int(await output(b, sys.executable, "-ISc", FLOOD, *words))
        most = guard.GROUP_FRAMES * (time.monotonic() - began + 1)
        heard = await frames_received(a) - before
        assert min(sent, guard.GROUP_FRAMES) <= heard <= most + 100
        assert await status(a, "ping", "-c1", "-W20", "bob") == 0


async def frames_received(member: Member) -> int:
    (link,) = json.loads(await output(member, "ip", "-json", "-s", "link", "show", "eth0"))
    return int(link["stats64"]["rx"]["packets"])


@bounded
async def test_the_hub_and_the_gateway_listen_on_nothing_but_dns() -> None:
    async with network(internal=True) as net, net.member("alice") as a:
        assert await net.namespace.listening() == ()
        assert await output(a, sys.executable, "-ISc", OPEN_PORTS, "10.0.2.100") == ""


@bounded
async def test_abstract_sockets_and_sysctls_are_each_members_own() -> None:
    async with network(internal=True) as net, net.member("alice") as a, net.member("bob") as b:
        with await a.namespace.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.bind("\0secret")
            sock.listen()
            said = [await output(each, sys.executable, "-ISc", ABSTRACT) for each in (a, b, net)]
        assert said[0] == "0"
        assert "0" not in said[1:]
        await output(b, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
        for each in a, net:
            assert await output(each, "cat", "/proc/sys/net/ipv4/ip_forward") == "0"


@bounded
async def test_advertisements_while_a_link_is_configured_are_not_believed() -> None:
    needs("ip")
    needs_ipv6()
    said = IPv6(src="fe80::1", dst="ff02::1", hlim=255) / ICMPv6ND_RA(routerlifetime=1800)
    prefix = ICMPv6NDOptPrefixInfo(prefix="2001:db8::", prefixlen=64)
    frame = bytes(Ether(src="02:00:00:00:00:01", dst="33:33:00:00:00:01") / said / prefix)
    address, gateway = IPv6Interface("fd00::100/64"), IPv6Address("fd00::2")
    async with Namespace.create() as namespace:
        for number in range(10):
            ours, theirs = f"a{number}", f"b{number}"
            link = ["ip", "link", "add", ours, "type", "veth", "peer", "name", theirs]
            await namespace.run([*link])
            await namespace.run(["ip", "link", "set", theirs, "up"])
            with await namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
                sock.bind((theirs, 0))
                done = threading.Event()

                def advertise(sock: socket.socket = sock, done: threading.Event = done) -> None:
                    while not done.is_set():
                        with suppress(OSError):  # the other end is down
                            sock.send(frame)

                thread = threading.Thread(target=advertise)
                thread.start()
                try:
                    await namespace.configure_link(ours, address6=address, gateway6=gateway)
                finally:
                    done.set()
                    thread.join()
            shown = await namespace.run(["ip", "-6", "address", "show", "dev", ours])
            routes = await namespace.run(["ip", "-6", "route", "show", "dev", ours])
            assert b"2001:db8" not in shown.stdout
            assert b"proto ra" not in routes.stdout
