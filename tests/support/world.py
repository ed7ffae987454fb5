"""A small internet without a way out, for as long as one test runs: what a program inside may try against a policy.

    a namespace of ours --- home: eth0 192.0.2.1 ------ 192.0.2.10 eth0: the world, which has all other addresses

Home and the world are the two hosts of `two_hosts`, and `in_world` runs a test in a child process that is at home.
The world answers at every address of `ADDRESSES`: TCP on `TCP_PORTS` (DNS on 53, else HTTP if it hears that, else
what it hears), UDP on `UDP_PORTS`, ping.  Home answers the same on its loopback.  Both of the world's resolvers know
the same names, `World.answers`.

What a test goes by is not what a program inside is told: `World.arrivals` are the packets that came to the world's
interface and to home's loopback, each of them, whether or not somebody listens there, and `World.asked` the questions
that a resolver had.
"""

from __future__ import annotations

import inspect
import json
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import wraps
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from subprocess import PIPE
from typing import Any, Concatenate, NamedTuple

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream
from dnslib import QTYPE, RCODE, RR, DNSError, DNSRecord
from pyroute2 import IPRoute
from typing_extensions import ParamSpec

from netns_kit import Member, Network, Process, Uplink
from tests.support import attacks, needs_tun
from tests.support.multihop import IFA_F_NODAD, drop_network_capabilities, in_child
from tests.support.servers import SECONDS, port_of
from tests.support.two_hosts import HOST, OTHER, TwoHosts

P = ParamSpec("P")

HOME, NEIGHBOUR = HOST, OTHER
HOME_6, NEIGHBOUR_6 = "2001:db8:2::1", "2001:db8:2::10"
RESOLVER, RESOLVER_6 = "198.51.100.53", "2001:db8:53::53"
"""Whom our DNS asks."""
ELSEWHERE, ELSEWHERE_6 = "203.0.113.53", "2001:db8:53::99"
"""A resolver that answers in every way: UDP, TCP, DoT, DoQ, DoH, mDNS, LLMNR."""
WEB, WEB_6 = "203.0.113.10", "2001:db8:80::10"
"""example.org, www.example.org, api.example.net and evil.example share it."""
EVIL, EVIL_6 = "203.0.113.66", "2001:db8:80::66"
"""another.example, which no policy of a test allows."""
PRIVATE, PRIVATE_6 = "10.1.2.3", "fd12:3456::3"
METADATA, METADATA_6 = "169.254.169.254", "fd00:ec2::254"
ADDRESSES = (RESOLVER, ELSEWHERE, WEB, EVIL, PRIVATE, METADATA)
ADDRESSES_6 = (RESOLVER_6, ELSEWHERE_6, WEB_6, EVIL_6, PRIVATE_6, METADATA_6)
DISGUISES = ("64:ff9b::/96", "2002::/16")
"""NAT64 and 6to4: all of it leads to the world."""
TCP_PORTS = (22, 25, 53, 80, 443, 853, 5432, 8443)
UDP_PORTS = (53, 443, 853, 5353, 5355, 7777)
DRIVERS = ("thread", "loop", "worker")
QUEUES = (*DRIVERS, "worker-2")
"""With a worker for each of two queues: what one has learnt of a name the other knows."""
SHARED = ("example.org", "www.example.org", "api.example.net", "evil.example")

_SYSCTLS = {
    "net/ipv4/ip_unprivileged_port_start": "0",
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
}
_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath)}
_ETH_P_ALL, _PACKET_OUTGOING = 3, 4  # linux/if_ether.h, linux/if_packet.h
_IPV6_RECVPKTINFO, _IPV6_PKTINFO = 49, 50  # linux/in6.h
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp"}
_NEIGHBOURS = range(130, 144)  # MLD and NDP: kernels' own talk


_ATTACK = (
    f"import sys; sys.path.append({str(Path(attacks.__file__).parent)!r}); import attacks; attacks.main()"
)
"""Imported, since a program that is executed is compiled each time."""


class Arrival(NamedTuple):
    """A packet that came to somebody, and what it carries above its transport's header."""

    protocol: str
    source: str
    target: str
    port: int
    """The port it is for, or an ICMP message's type; 0 of a fragment that is not the first."""
    payload: bytes


class Program:
    """One inside that speaks by lines of JSON."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._lines = process.stdin, BufferedByteReceiveStream(process.stdout)

    async def said(self) -> Any:
        """What it says next."""
        return json.loads(await self._lines.receive_until(b"\n", 1 << 20))

    async def goes_on(self, what: object = None) -> None:
        """Give it the word that it waits for."""
        await self._stdin.send(json.dumps(what).encode() + b"\n")


def _program(steps: Sequence[object]) -> list[str]:
    return [sys.executable, "-I", "-c", _ATTACK, json.dumps(steps)]


class World(TwoHosts):
    """Home and the world; the calling thread is at home, an ordinary user without a capability over networks."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str, str]] = []
        """Protocol, name and type of each question to a resolver."""
        self.answers: dict[str, list[list[str]]] = {}
        """By name, what its next questions of type A are answered with, and what all after them.  An answer is lines
        of a zone file; one of another type than asked for is left out, unless it is a CNAME."""
        for name in SHARED:
            self.says(name, f"{name} 60 IN A {WEB}", f"{name} 60 IN AAAA {WEB_6}")
        self.says(
            "another.example", f"another.example 60 IN A {EVIL}", f"another.example 60 IN AAAA {EVIL_6}"
        )
        self._lock = threading.Lock()
        self._arrivals: list[Arrival] = []
        self._wires: list[socket.socket] = []
        for name in ("host", "other"):
            with self.on(name):
                self._prepare(name)
        drop_network_capabilities()

    def _prepare(self, name: str) -> None:
        group = os.getegid()  # the only one that is mapped
        for key, value in {**_SYSCTLS, "net/ipv4/ping_group_range": f"{group} {group}"}.items():
            with suppress(FileNotFoundError):
                Path("/proc/sys", key).write_text(value)
        with IPRoute() as ip:
            (eth0,) = ip.link_lookup(ifname="eth0")
            address = HOME_6 if name == "host" else NEIGHBOUR_6
            ip.addr("add", index=eth0, address=address, prefixlen=64, flags=IFA_F_NODAD)
            if name == "host":
                ip.route("replace", dst="0.0.0.0/0", gateway=NEIGHBOUR)
                ip.route("add", dst="::/0", gateway=NEIGHBOUR_6)
            else:
                for each in ADDRESSES:
                    ip.addr("add", index=1, address=each, prefixlen=32)
                for each in ADDRESSES_6:
                    ip.addr("add", index=1, address=each, prefixlen=128, flags=IFA_F_NODAD)
                for each in DISGUISES:
                    ip.route("add", dst=each, oif=1, type="local", table=255)
        wire = socket.socket(
            socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, socket.htons(_ETH_P_ALL)
        )
        wire.bind(("lo" if name == "host" else "eth0", _ETH_P_ALL))
        self._wires.append(wire)
        for port in TCP_PORTS:
            listener = socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64
            )
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        for port in UDP_PORTS:
            sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
            sock.bind(("::", port))
            threading.Thread(target=self._datagrams, args=(sock, port), daemon=True).start()

    # -- those who answer --------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            sock.settimeout(SECONDS)
            threading.Thread(target=self._stream, args=(sock, port_of(sock)), daemon=True).start()

    def _stream(self, sock: socket.socket, port: int) -> None:
        with sock, suppress(OSError):
            while data := sock.recv(1 << 16):
                if port == 53:
                    data = b"".join(self._resolve_all(data))
                elif b" HTTP/1.1\r\n" in data:
                    data = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nwelcome\n"
                sock.sendall(data)

    def _datagrams(self, sock: socket.socket, port: int) -> None:
        while True:
            data, ancillary, _, sender = sock.recvmsg(1 << 16, 256)
            if port == 53:
                data = self._resolve(data, "udp")
            came_to = [each for each in ancillary if each[1] == _IPV6_PKTINFO]
            with suppress(OSError):
                sock.sendmsg([data], came_to, 0, sender)

    def _resolve_all(self, queries: bytes) -> Iterator[bytes]:
        """Yield the answers to queries that have come together, each behind its length."""
        while queries:
            size = int.from_bytes(queries[:2], "big")
            answer = self._resolve(queries[2 : 2 + size], "tcp")
            yield len(answer).to_bytes(2, "big") + answer
            queries = queries[2 + size :]

    def _resolve(self, message: bytes, protocol: str) -> bytes:
        try:
            query = DNSRecord.parse(message)
        except DNSError:
            return b"what?"
        name, kind = str(query.q.qname).rstrip(".").lower(), QTYPE[query.q.qtype]
        reply = query.reply()
        with self._lock:
            self.asked.append((protocol, name, kind))
            answers = self.answers.get(name)
            lines = (answers.pop(0) if kind == "A" and len(answers) > 1 else answers[0]) if answers else []
        for line in lines:
            for record in RR.fromZone(line):
                if record.rtype in (query.q.qtype, QTYPE.CNAME):
                    reply.add_answer(record)
        if answers is None:
            reply.header.rcode = RCODE.NXDOMAIN
        packed: bytes = reply.pack()
        return packed

    # -- what a test does, says and sees ----------------------------------------------------------------------

    def says(self, name: str, *lines: str, then: Sequence[str] = ()) -> None:
        """The resolvers answer `lines` for `name`; if `then` is given, to the first question of type A alone."""
        self.answers[name] = [list(lines), list(then)] if then else [list(lines)]

    def network(self, driver: str = "thread", **options: Any) -> Network:
        """One at home, whose uplink lets through all it can, so that only a policy stops what it stops.

        `driver` is one of `DRIVERS`.
        """
        driver, _, queues = driver.partition("-")
        uplink = Uplink(dns=[RESOLVER], allow_host_loopback=True)
        options = {"uplink": uplink, "ipv6": True, "driver": driver, "queues": int(queues or 1), **options}
        return Network(**options)

    async def tries(self, net: Network | Member, *steps: Sequence[object]) -> list[Any]:
        """How each of these steps of `tests.support.attacks` went, as far as the program inside can tell."""
        done = await net.run(_program(steps), env=_ENVIRONMENT, stderr=None)
        answers: list[Any] = json.loads(done.stdout)
        return answers

    @asynccontextmanager
    async def starts(self, net: Network | Member, *steps: Sequence[object]) -> AsyncIterator[Program]:
        """A program that waits for a word in the middle of a step, such as `tests.support.attacks.held`."""
        async with await net.popen(_program(steps), env=_ENVIRONMENT, stdin=PIPE, stderr=None) as process:
            yield Program(process)

    def wait_listening(self, port: int) -> None:
        """Wait until a program in the world listens on that port of TCP."""
        end = time.monotonic() + SECONDS
        with self.on("other"):
            while True:
                with socket.socket() as sock:
                    if sock.connect_ex((NEIGHBOUR, port)) == 0:
                        return
                assert time.monotonic() < end, "it does not listen"
                time.sleep(0.02)

    def arrivals(self) -> list[Arrival]:
        """All packets that have come to the world and to home's loopback since `forget`, but those of kernels."""
        with self._lock:
            for wire in self._wires:
                with suppress(BlockingIOError):
                    while True:
                        packet, (_, protocol, kind, *_) = wire.recvfrom(1 << 16)
                        arrival = None if kind == _PACKET_OUTGOING else _parse(packet, protocol)
                        if arrival is not None:
                            self._arrivals.append(arrival)
            return self._arrivals.copy()

    async def keep_reading(self) -> None:
        """Read what arrives, all the time: the queues have room for some hundred packets."""
        while True:
            self.arrivals()
            await anyio.sleep(0.005)

    def strays(self, *expected: tuple[str, str, int]) -> list[Arrival]:
        """The arrivals but those at our resolvers and at `expected`: protocols, addresses and ports."""
        ours = {(protocol, RESOLVER, port) for protocol, port in (("udp", 53), ("tcp", 53), ("icmp", 3))}
        return [
            each
            for each in self.arrivals()
            if (each.protocol, each.target, each.port) not in ours.union(expected)
        ]

    def forget(self) -> None:
        """From now on nothing has arrived and nothing been asked."""
        self.arrivals()
        self._arrivals.clear()
        self.asked.clear()

    def names_asked(self) -> set[str]:
        """The names that a resolver was asked for."""
        return {name for _, name, _ in self.asked}


def _parse(packet: bytes, protocol: int) -> Arrival | None:
    """What `packet` is; None if it is the talk of kernels with their neighbours."""
    source: IPv4Address | IPv6Address
    target: IPv4Address | IPv6Address
    if protocol == 0x0800:
        start, number = (packet[0] & 15) * 4, packet[9]
        source, target = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
        first = not int.from_bytes(packet[6:8], "big") & 0x1FFF
        end = int.from_bytes(packet[2:4], "big") or len(packet)
    elif protocol == 0x86DD:
        start, number, first, end = 40, packet[6], True, len(packet)
        source, target = IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
        if (number == 58 and packet[40] in _NEIGHBOURS) or number == 0:
            return None
    else:
        return None
    above = packet[start:end]
    name = _PROTOCOLS.get(number, str(number))
    if not first or not above or name not in ("tcp", "udp", "icmp"):
        return Arrival(name, str(source), str(target), 0, above)
    header = {"tcp": above[12] >> 4 << 2 if name == "tcp" else 0, "udp": 8, "icmp": 8}[name]
    port = above[0] if name == "icmp" else int.from_bytes(above[2:4], "big")
    return Arrival(name, str(source), str(target), port, above[header:])


Body = Callable[Concatenate[World, P], Awaitable[None]]


def in_world(body: Body[P]) -> Callable[P, None]:
    """The test's body runs at home, on asyncio: it is given `World`, then the fixtures and parameters it names."""

    @wraps(body)
    def test(*args: P.args, **kwargs: P.kwargs) -> None:
        needs_tun()

        async def bounded(world: World) -> None:
            with anyio.fail_after(SECONDS):
                await body(world, *args, **kwargs)

        in_child(lambda: anyio.run(bounded, World()))

    _, *parameters = inspect.signature(body).parameters.values()
    test.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # pytest goes by it
    return test
