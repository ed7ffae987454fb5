"""What a member of a network cannot do to the others, with root in its own namespace and raw frames."""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv6Address
from typing import Any

import anyio
import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from netns_kit import FeatureUnavailable, Member, Network, Uplink
from netns_kit.network.addresses import link_local_of
from tests.support import needs, needs_ipv6, needs_tun
from tests.support.members import FIRST, MARK, arrived, ask, carried, network, output, serving, status, wire
from tests.support.servers import hello, host_address, tcp_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]
OTHER_MAC = "02:00:00:00:00:99"
BROADCAST, ALL_NODES = "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01"

LOOK_ABROAD = """
import socket, struct
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as sock:
    for kind, name in ((18, b""), (16, struct.pack("=HHI", 8, 4, 1400))):  # RTM_GETLINK; RTM_NEWLINK with an MTU
        body = struct.pack("=BxHiII", 0, 0, 1, 0, 0) + struct.pack("=HHi", 8, 46, 0) + name  # IFLA_TARGET_NETNSID
        sock.sendto(struct.pack("=IHHII", 16 + len(body), kind, 1 | 4, 1, 0) + body, (0, 0))
        print(-struct.unpack_from("=i", sock.recv(4096), 16)[0])
"""
SEEN = """
import os
print({os.readlink(f"/proc/{pid}/ns/net") for pid in os.listdir("/proc") if pid.isdigit()})
"""


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


def piece(header: int, offset: int, more: int = 1) -> IPv6ExtHdrFragment:
    """The header of a fragment, which begins at so many times eight bytes."""
    return IPv6ExtHdrFragment(nh=header, offset=offset, m=more, id=7)


class Members:
    """Two members and what one of them, `b`, could send as the other, or as the gateway."""

    def __init__(self, a: Member, b: Member) -> None:
        self.a, self.b = a, b
        self.six_a, self.six_b = str(a.address6), str(b.address6)
        self.own = Ether(src=b.mac, dst=a.mac)
        self.wide = Ether(src=b.mac, dst=BROADCAST)
        self.gateway = "10.0.2.2"

    def broadcast(self, mark: bytes) -> bytes:
        """A frame of `b` for all."""
        return bytes(self.wide / IP(src=str(self.b.address), dst="10.0.2.255") / UDP(sport=1, dport=9) / mark)

    def honest(self) -> dict[str, Packet]:
        a, b = str(self.a.address), str(self.b.address)
        local = str(link_local_of(bytes.fromhex(self.b.mac.replace(":", ""))))
        return {
            "UDP": self.own / IP(src=b, dst=a) / UDP(sport=1, dport=9),
            "broadcast": self.wide / IP(src=b, dst="10.0.2.255") / UDP(sport=1, dport=9),
            "a client of DHCP": self.wide / IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67),
            "ARP": self.wide / ARP(op=1, hwsrc=self.b.mac, psrc=b, pdst=a),
            "an ARP probe": self.wide / ARP(op=1, hwsrc=self.b.mac, psrc="0.0.0.0", pdst=a),
            "IPv6": self.own / IPv6(src=self.six_b, dst=self.six_a) / ICMPv6EchoRequest(),
            "link-local": self.own / IPv6(src=local, dst="ff02::1") / ICMPv6EchoRequest(),
            "its own advertisement": self.own / IPv6(src=self.six_b, dst=self.six_a) / ICMPv6ND_NA(tgt=self.six_b),
            "a first piece": self.own / IPv6(src=self.six_b, dst=self.six_a) / piece(17, 0) / Raw(bytes(8)),
            "a later piece": self.own / IPv6(src=self.six_b, dst=self.six_a) / piece(17, 9),
            "the first piece of a ping": self.own / IPv6(src=self.six_b, dst=self.six_a) / piece(58, 0)
            / ICMPv6EchoRequest(),
            "a later piece of a ping": self.own / IPv6(src=self.six_b, dst=self.six_a) / piece(58, 9),
            "a header before a piece": self.own / IPv6(src=self.six_b, dst=self.six_a) / IPv6ExtHdrHopByHop()
            / piece(17, 9),
            "a probe of its own": self.own / IPv6(src="::", dst="ff02::1") / ICMPv6ND_NS(tgt=self.six_b),
        }  # fmt: skip

    def forged(self) -> dict[str, Packet]:
        a, b = str(self.a.address), str(self.b.address)
        local_a = str(link_local_of(bytes.fromhex(self.a.mac.replace(":", ""))))
        six = IPv6(src=self.six_b, dst=self.six_a)
        lladdr = ICMPv6NDOptDstLLAddr(lladdr=self.b.mac)
        claim = Raw(bytes((136, 0, 0, 0, 0x20, 0, 0, 0)))  # the target is in the next piece
        cut = Raw(bytes((58, 2, 1, 20)) + bytes(4))  # a header of options that ends in the next piece
        vlan = Ether(src=self.b.mac, dst=BROADCAST) / Dot1Q(vlan=0, prio=3)
        arp = ARP(op=2, hwsrc=self.b.mac, psrc=b, pdst=a)
        return {
            "its address": self.own / IP(src=a, dst=a) / UDP(sport=1, dport=9),
            "the gateway's address": self.own / IP(src=self.gateway, dst=a) / UDP(sport=53, dport=9),
            "the hub's address": self.own / IP(src="10.0.2.100", dst=a) / UDP(sport=1, dport=9),
            "an address that nobody has": self.own / IP(src="10.0.2.77", dst=a) / ICMP(),
            "an address of elsewhere": self.own / IP(src="192.0.2.1", dst=a) / ICMP(),
            "another link address": Ether(src=OTHER_MAC, dst=self.a.mac) / IP(src=b, dst=a) / ICMP(),
            "its link address": Ether(src=self.a.mac, dst=BROADCAST) / IP(src=b, dst=a) / ICMP(),
            "ARP: its address": self.wide / ARP(op=2, hwsrc=self.b.mac, psrc=a, pdst=a),
            "ARP: the gateway": self.wide / ARP(op=2, hwsrc=self.b.mac, psrc=self.gateway, pdst=a),
            "ARP: its link address": self.wide / ARP(op=2, hwsrc=self.a.mac, psrc=b, pdst=a),
            "ARP in a frame of another": Ether(src=OTHER_MAC, dst=BROADCAST) / ARP(op=2, hwsrc=self.b.mac, psrc=b),
            "its IPv6 address": self.own / IPv6(src=self.six_a, dst=self.six_a) / ICMPv6EchoRequest(),
            "its link-local address": self.own / IPv6(src=local_a, dst="ff02::1") / ICMPv6EchoRequest(),
            "the gateway's IPv6 address": self.own / IPv6(src="fe80::2", dst="ff02::1") / ICMPv6EchoRequest(),
            "NDP: its address": self.own / six / ICMPv6ND_NA(tgt=self.six_a, O=1) / lladdr,
            "NDP: the gateway": self.own / six / ICMPv6ND_NA(tgt="fd00::2", O=1) / lladdr,
            "NDP behind a header": self.own / six / IPv6ExtHdrDestOpt() / ICMPv6ND_NA(tgt=self.six_a) / lladdr,
            "NDP behind headers": self.own / six / IPv6ExtHdrHopByHop() / IPv6ExtHdrRouting() / IPv6ExtHdrDestOpt()
            / ICMPv6ND_NA(tgt=self.six_a) / lladdr,
            "NDP that is one piece": self.own / six / piece(58, 0, 0) / ICMPv6ND_NA(tgt=self.six_b) / lladdr,
            "the first piece of NDP": self.own / six / piece(58, 0) / ICMPv6ND_NA(tgt=self.six_b) / lladdr,
            "a piece of NDP without its target": self.own / six / piece(58, 0) / claim,
            "the same behind a header": self.own / six / IPv6ExtHdrHopByHop() / piece(58, 0) / claim,
            "a solicitation that is one piece": self.own / six / piece(58, 0, 0) / ICMPv6ND_NS(tgt=self.six_a),
            "a router that is sought in a piece": self.own / six / piece(58, 0, 0) / ICMPv6ND_RS(),
            "a first piece without all headers": self.own / six / piece(60, 0) / cut,
            "a later piece of such a one": self.own / six / piece(60, 1),
            "a piece of a piece": self.own / six / piece(44, 0) / piece(58, 0) / claim,
            "a piece of a piece without all headers": self.own / six / piece(44, 0) / piece(60, 0) / cut,
            "a VLAN's ARP": self.wide / Dot1Q(vlan=5) / arp,
            "ARP with a priority": vlan / arp,
            "NDP with a priority": vlan / six / ICMPv6ND_NA(tgt=self.six_a) / lladdr,
            "ARP in two tags": vlan / Dot1Q(vlan=5) / arp,
            "ARP in a tag of a provider": self.wide / Dot1AD(vlan=5) / arp,
            "NDP: a probe for its address": self.own / IPv6(src="::", dst="ff02::1") / ICMPv6ND_NS(tgt=self.six_a),
            "a router": self.own / IPv6(src=self.six_b, dst="ff02::1") / ICMPv6ND_RA(),
            "a redirect": self.own / six / ICMPv6ND_Redirect(tgt=self.six_b, dst="fd00::2"),
            "a DHCP server": self.own / IP(src=b, dst=a) / UDP(sport=67, dport=68),
            "a DHCPv6 server": self.own / six / UDP(sport=547, dport=546),
            "a VLAN": self.own / Dot1Q(vlan=5) / IP(src=b, dst=a) / ICMP(),
            "another protocol": Ether(src=self.b.mac, dst=self.a.mac, type=0x88CC) / Raw(bytes(46)),
            "spanning tree": Ether(src=self.b.mac, dst="01:80:c2:00:00:00", type=0x0026) / Raw(bytes(46)),
        }  # fmt: skip


@asynccontextmanager
async def two(**options: Any) -> AsyncIterator[tuple[Network, Members]]:
    async with network(ipv6=True, **options) as net, net.member("alice") as a, net.member("bob") as b:
        yield net, Members(a, b)


@pytest.mark.parametrize("victim", ["member", "hub"])
async def test_what_a_member_sends_as_another_does_not_arrive(victim: str) -> None:
    """Each frame has a number in its end, by which the others know it."""
    needs_ipv6()
    async with two() as (net, pair), wire(pair.b) as out:
        ear = wire(pair.a) if victim == "member" else wire(net, "br0")
        async with ear as heard:
            await carried(out, pair.broadcast(FIRST), heard)
            sent = {**pair.honest(), **pair.forged()}
            for number, packet in enumerate(sent.values()):
                if victim == "hub" and packet[Ether].dst == pair.a.mac:
                    packet[Ether].dst = net.stack.tap.mac.hex(":") if net.stack.tap.mac else ""
                out.send(bytes(packet / Raw(b"frame %3d" % number)))
            out.send(pair.broadcast(MARK))
            frames = await arrived(heard)
        got = {
            name for number, name in enumerate(sent) if any(b"frame %3d" % number in each for each in frames)
        }
        assert got == pair.honest().keys()


async def test_what_goes_to_one_member_no_other_hears() -> None:
    needs_ipv6()
    async with two() as (net, pair), net.member("c") as c, wire(c) as ear, wire(pair.b) as out:
        await carried(out, pair.broadcast(FIRST), ear)
        for mac in (pair.a.mac, OTHER_MAC, net.subnet.mac.hex(":")):
            packet = (
                Ether(src=pair.b.mac, dst=mac)
                / IP(src=str(pair.b.address), dst="10.0.2.77")
                / UDP()
                / b"secret"
            )
            out.send(bytes(packet))
        out.send(pair.broadcast(MARK))
        assert not [each for each in await arrived(ear) if b"secret" in each]
        assert (await net.stack.stats())["dropped_ethernet_not_ours"] == 0, "nor does the stack"


async def test_without_a_guard_it_would_arrive() -> None:
    """So the frames are such as the kernel carries, and what drops them is the guard."""
    needs_ipv6()
    async with two(guard=False) as (_, pair), wire(pair.a) as heard, wire(pair.b) as out:
        await carried(out, pair.broadcast(FIRST), heard)
        sent = pair.forged()
        for number, packet in enumerate(sent.values()):
            out.send(bytes(packet / Raw(b"frame %3d" % number)))
        out.send(pair.broadcast(MARK))
        frames = await arrived(heard)
        got = {
            name for number, name in enumerate(sent) if any(b"frame %3d" % number in each for each in frames)
        }
        assert sent.keys() - got <= {"spanning tree", "its link address"}, "a bridge keeps these to itself"


async def test_a_member_that_takes_an_address_has_nothing_of_it() -> None:
    needs("ip", "ping")
    async with network() as net, net.member("alice") as a, net.member("bob") as b, net.member("c") as c:
        assert await status(b, "ping", "-c1", "-W5", "c") == 0
        await output(
            b, "sh", "-c", "ip address flush dev eth0; ip address add 10.0.2.101/24 dev eth0; ip route"
        )
        assert await status(b, "ping", "-c1", "-W1", "10.0.2.103") != 0
        assert await status(b, "ping", "-c1", "-W1", "10.0.2.2") != 0
        async with serving(a, 80):
            assert await ask(c, "10.0.2.101", 80) == "10.0.2.103"
        await output(
            b, "sh", "-c", f"ip link set eth0 down; ip link set eth0 address {OTHER_MAC}; ip link set eth0 up"
        )
        assert await status(b, "ping", "-c1", "-W1", "10.0.2.103") != 0


@pytest.mark.parametrize("guard", [True, False])
async def test_isolated_members_reach_the_stack_alone(guard: bool) -> None:
    needs("ping", "dig")
    needs_ipv6()
    with tcp_server(hello) as port:
        uplink = Uplink(allow_host_loopback=True)
        async with (
            network(ipv6=True, isolate=True, guard=guard, uplink=uplink) as net,
            net.member("alice", ports=["127.0.0.1:0:80"]) as a,
            net.member("bob") as b,
            serving(a, 80),
            wire(a) as ear,
        ):
            assert await ask(b, "10.0.2.2", port) == "hello"
            assert await output(b, "dig", "+short", "alice") == "10.0.2.101", "it may know the name"
            assert await ask(net, "alice", 80) == "10.0.2.100", "the hub is for those who rule it"
            local = link_local_of(bytes.fromhex(a.mac.replace(":", "")))
            await output(
                b,
                "ip",
                "neighbour",
                "replace",
                "10.0.2.101",
                "lladdr",
                a.mac,
                "dev",
                "eth0",
                "nud",
                "permanent",
            )
            for address in ("10.0.2.101", str(a.address6), f"{local}%eth0"):
                assert await status(b, "ping", "-c1", "-W1", address) != 0, address
            assert await status(b, "ping", "-b", "-c1", "-W1", "10.0.2.255") != 0
            (forward,) = await a.forwarder.list()
            assert await ask(b, "10.0.2.2", forward.host_port) == "10.0.2.2", "what is published is for all"
            ear.setblocking(False)
            heard = []
            while True:
                try:
                    heard.append(Ether(ear.recv(4096)))
                except BlockingIOError:
                    break
            assert b.mac not in {each.src for each in heard}
            assert heard


async def test_an_internal_network_has_no_way_out() -> None:
    needs("dig", "ping")
    host = host_address() or "127.0.0.1"
    with tcp_server(hello, (host, 0)) as port:
        async with network() as net, net.member("alice") as alice:
            assert host == "127.0.0.1" or await ask(alice, host, port) == "hello", "else it would be reached"
        async with (
            network(internal=True) as net,
            net.member("alice", ports=["127.0.0.1:0:80"]) as a,
            net.member("bob") as b,
            serving(a, 80),
        ):
            assert await ask(b, "alice", 80) == "10.0.2.102"
            assert await output(b, "dig", "+short", "alice") == "10.0.2.101"
            assert "status: NXDOMAIN" in await output(b, "dig", "example.com")
            for address in (host, "10.0.2.2", "192.0.2.1"):
                assert await status(b, sys.executable, "-c", _CONNECT, address, str(port)) == 1, address
            assert await status(b, "ping", "-c1", "-W1", "192.0.2.1") != 0
            (forward,) = await a.forwarder.list()
            async with await anyio.connect_tcp("127.0.0.1", forward.host_port) as stream:
                assert await stream.receive() == b"10.0.2.2", "what is published leads in"


_CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 20)"


async def test_root_in_a_member_has_nothing_in_the_hub() -> None:
    """Not by the number under which it has the other end of its link, and not by /proc."""
    async with network() as net, net.member("alice") as a:
        said = await output(a, sys.executable, "-ISc", LOOK_ABROAD)
        assert {int(each) for each in said.split()} <= {errno.EACCES, errno.EPERM, errno.EINVAL}
        hub = await net.namespace.links()
        assert {each.mtu for each in hub if each.name in ("br0", "m1", "tap0")} == {1500}
        others = await output(a, sys.executable, "-ISc", SEEN)
        assert len(others.split(",")) == 1, "its own"
        assert await output(net, "sh", "-c", "readlink /proc/self/ns/net") not in others


async def test_no_name_of_a_network_is_known_in_another() -> None:
    needs("dig", "getent")
    async with (
        network(uplink=Uplink(dns=[])) as net,
        network(uplink=Uplink(dns=[]), subnet="10.0.3.0/24") as other,
        net.member("alice") as a,
        other.member("bob") as b,
    ):
        assert await output(a, "dig", "+short", "alice") == "10.0.2.101"
        assert await output(b, "dig", "+short", "alice") == ""
        assert await output(b, "dig", "+short", "@10.0.2.3", "+time=1", "+tries=1", "alice", "+noall") == ""
        assert await status(b, "getent", "hosts", "alice") != 0


async def test_a_kernel_without_the_rules_refuses_the_first_member(monkeypatch: pytest.MonkeyPatch) -> None:
    async with network() as net:
        real = type(net.namespace).socket

        async def no_filter(self: Any, family: int, kind: int, proto: int = 0) -> socket.socket:
            if family == socket.AF_NETLINK and proto == 12:
                raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")
            return await real(self, family, kind, proto)

        monkeypatch.setattr(type(net.namespace), "socket", no_filter)
        with pytest.raises(FeatureUnavailable, match="no nftables; say guard=False"):
            await net.add_member("alice")
        assert net.members == {}
    async with network(guard=False) as net:
        await net.add_member("alice")


def test_link_local_addresses_are_those_that_this_kernel_makes() -> None:
    assert link_local_of(bytes.fromhex("02000000002a")) == IPv6Address("fe80::ff:fe00:2a")
    assert struct.calcsize("=BxHiII") == 16
