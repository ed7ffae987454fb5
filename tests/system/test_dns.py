"""Names, as programs inside see them.  Upstream is dnsmasq, or a server of the test's; the clients are dig and libc.

What must arrive byte for byte is compared with what upstream says to the same message, asked directly.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from dnslib import DNSKEY, EDNS0, QTYPE, RR, RRSIG, TXT, A, DNSRecord

from netns_kit import DnsSettings, Namespace, Network, NotFound, Record, RecordError, Uplink
from netns_kit.dns.exchanges import CONDEMNED
from netns_kit.gateway.setup import DriverName
from tests.support import ROOT, dns_hooks, missing, needs, needs_ipv6, needs_tun
from tests.support.connections import every_driver
from tests.support.servers import SECONDS, bounded, closed_port, dns_server, dnsmasq, tcp_server, udp_server
from tests.support.uplinks import Reading

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

RESOLVER = "10.0.2.3"
NAMES = {"name.tld": "192.0.2.7"}
ZONE = [
    "--local=/test/",
    "--host-record=a.test,192.0.2.1,2001:db8::1",
    "--host-record=b.a.test,192.0.2.2",
    "--host-record=xn--bcher-kva.test,192.0.2.8",
    "--mx-host=m.test,b.a.test,10",
    "--cname=c.test,a.test",
    "--txt-record=t.test,some text",
    f"--txt-record=big.test,{','.join(letter * 250 for letter in 'abcdefghijklmnopqrs')}",
    f"--txt-record=mid.test,{','.join(letter * 250 for letter in 'abcdefghijklm')}",
    "--srv-host=_sip._tcp.test,b.a.test,5060,1,2",
    "--caa-record=a.test,0,issue,ca.test",
    "--dns-rr=u.test,65280,deadbeef",
    "--dns-rr=u.test,64,000100",
    "--naptr-record=n.test,1,2,s,SIP,,_sip._tcp.test",
    "--ptr-record=1.2.0.192.in-addr.arpa,a.test",
]


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


@pytest.fixture
def upstream() -> Iterator[int]:
    needs("dnsmasq", "dig")
    with dnsmasq(*ZONE) as port:
        yield port


@asynccontextmanager
async def network(*resolvers: int, **options: Any) -> AsyncIterator[Network]:
    """A network whose names are resolved on these ports of the host's loopback."""
    uplink = options.pop("uplink", None) or Uplink(dns=[f"127.0.0.1:{port}" for port in resolvers])
    async with Network(uplink=uplink, **options) as net:
        yield net


async def dig(net: Network, *words: str) -> list[str]:
    """The lines of the short answer."""
    return (await net.run(["dig", "+short", "+tries=1", "+time=9", *words])).stdout.decode().split("\n")[:-1]


async def status(net: Network, *words: str) -> str:
    text = (await net.run(["dig", "+tries=1", "+time=9", *words])).stdout.decode()
    return text.partition("status: ")[2].partition(",")[0]


def question(
    name: str, kind: str | int = "A", *, size: int = 0, do: bool = False, flags: int = 0x0100, ident: int = 7
) -> bytes:
    record = DNSRecord.question(name)
    record.q.qtype = kind if isinstance(kind, int) else getattr(QTYPE, kind)
    if size:
        record.add_ar(EDNS0(udp_len=size, flags="do" if do else ""))
    message = bytes(record.pack())
    return struct.pack("!HH", ident, flags) + message[4:]


def by_udp(sock: socket.socket, address: tuple[str, int], message: bytes) -> bytes:
    with sock:
        sock.settimeout(SECONDS)
        sock.connect(address)
        sock.send(message)
        return sock.recv(1 << 16)


def by_tcp(sock: socket.socket, address: tuple[str, int], *messages: bytes) -> list[bytes]:
    """All on one connection, at once; the answers in the order they come."""
    with sock:
        sock.settimeout(SECONDS)
        sock.connect(address)
        sock.sendall(b"".join(len(each).to_bytes(2, "big") + each for each in messages))
        answers = []
        for _ in messages:
            size = int.from_bytes(sock.recv(2, socket.MSG_WAITALL), "big")
            answers.append(sock.recv(size, socket.MSG_WAITALL))
        return answers


def host_socket(kind: int) -> socket.socket:
    return socket.socket(socket.AF_INET, kind)


async def inside(net: Network, kind: int) -> socket.socket:
    return await net.namespace.socket(socket.AF_INET, kind)


QUERIES = {
    "A": question("a.test"),
    "AAAA": question("a.test", "AAAA"),
    "another case": question("A.TeSt"),
    "CNAME": question("c.test"),
    "MX": question("m.test", "MX"),
    "TXT": question("t.test", "TXT"),
    "SRV": question("_sip._tcp.test", "SRV"),
    "NAPTR": question("n.test", "NAPTR"),
    "CAA": question("a.test", "CAA"),
    "PTR": question("1.2.0.192.in-addr.arpa", "PTR"),
    "SVCB": question("u.test", 64),
    "unknown": question("u.test", 65280),
    "ANY": question("t.test", "ANY"),
    "no such name": question("nx.test"),
    "no such type": question("t.test", "A"),
    "refused": question("www.example"),
    "another class": question("a.test")[:-1] + b"\3",
    "without RD": question("a.test", flags=0),
    "CD and AD": question("a.test", flags=0x0130),
    "another opcode": question("a.test", flags=0x2100),
    "truncated": question("big.test", "TXT"),
    **{f"EDNS {size}": question("big.test", "TXT", size=size) for size in (512, 1232, 4096, 65535)},
    "in fragments": question("mid.test", "TXT", size=4096),
    "EDNS small": question("a.test", size=4096),
    "DO": question("a.test", size=1232, do=True),
    "an unknown option": question("a.test", size=1232)[:-2] + bytes.fromhex("0008 fde9 0004 01020304"),
}


@every_driver
@bounded
async def test_every_answer_is_upstreams_own_byte_for_byte(upstream: int, driver: DriverName) -> None:
    host = ("127.0.0.1", upstream)
    async with network(upstream, driver=driver, mtu=1500) as net:
        for name, message in QUERIES.items():
            expected = by_udp(host_socket(socket.SOCK_DGRAM), host, message)
            sock = await inside(net, socket.SOCK_DGRAM)
            found = await anyio.to_thread.run_sync(by_udp, sock, (RESOLVER, 53), message)
            assert found == expected, f"{name} over UDP"
            (expected,) = by_tcp(host_socket(socket.SOCK_STREAM), host, message)
            stream = await inside(net, socket.SOCK_STREAM)
            (found,) = await anyio.to_thread.run_sync(by_tcp, stream, (RESOLVER, 53), message)
            assert found == expected, f"{name} over TCP"
        assert (await net.stack.stats())["dns_malformed"] == 0


@every_driver
@bounded
async def test_dig_sees_what_it_sees_outside(upstream: int, driver: DriverName) -> None:
    """Its own EDNS cookies and retries over TCP included."""

    def answers(text: bytes) -> list[bytes]:
        return [line for line in text.splitlines() if line and not line.startswith(b";")]

    async with network(upstream, driver=driver) as net:
        for words in (
            ["a.test"],
            ["AAAA", "a.test"],
            ["m.test", "MX"],
            ["big.test", "TXT"],
            ["big.test", "TXT", "+tcp"],
            ["mid.test", "TXT", "+bufsize=4096", "+ignore"],
            ["-t", "TYPE65280", "u.test"],
            ["a.test", "+dnssec", "+cdflag"],
            ["a.test", "+noedns"],
            ["-x", "192.0.2.1"],
        ):
            command = ["dig", "+tries=1", "+time=9", *words]
            outer = await anyio.run_process([*command, "@127.0.0.1", "-p", str(upstream)])
            inner = await net.run(command)
            assert answers(inner.stdout) == answers(outer.stdout) != [], words
        assert await status(net, "nx.test") == "NXDOMAIN"
        assert await status(net, "www.example") == "REFUSED"


def signed(message: bytes) -> bytes:
    """A server of a signed zone: to who asks for it (DO), signatures, and always a key."""
    query = DNSRecord.parse(message)
    made = query.reply()
    name = str(query.q.qname)
    rdata: Any = A("192.0.2.3")
    if query.q.qtype == QTYPE.DNSKEY:
        rdata = DNSKEY(257, 3, 13, bytes(range(64)))
    made.add_answer(RR(name, query.q.qtype, ttl=60, rdata=rdata))
    if query.ar and query.ar[0].edns_do:
        rrsig = RRSIG(query.q.qtype, 13, 2, 60, 1700000000, 1600000000, 12345, name, bytes(range(64)))
        made.add_answer(RR(name, QTYPE.RRSIG, ttl=60, rdata=rrsig))
        made.add_ar(EDNS0(udp_len=1232, flags="do"))
    return bytes(made.pack())


@contextmanager
def resolver(answer: Callable[[bytes], bytes]) -> Iterator[int]:
    """A server of the test's own, UDP and TCP on one port."""

    def over_tcp(sock: socket.socket) -> None:
        while length := sock.recv(2, socket.MSG_WAITALL):
            reply = answer(sock.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
            sock.sendall(len(reply).to_bytes(2, "big") + reply)

    def over_udp(sock: socket.socket, message: bytes, sender: tuple[str, int]) -> None:
        sock.sendto(answer(message), sender)

    with ExitStack() as stack:
        port = stack.enter_context(tcp_server(over_tcp))
        stack.enter_context(udp_server(over_udp, ("127.0.0.1", port)))
        yield port


@bounded
async def test_dnssec_passes() -> None:
    needs("dig")
    messages = [
        question("signed.test", kind, size=1232 if do else 0, do=do, flags=flags)
        for kind in ("A", "DNSKEY")
        for do in (True, False)
        for flags in (0x0100, 0x0110)
    ]
    with resolver(signed) as port:
        async with network(port) as net:
            for message in messages:
                for _ in range(2):  # the second from the cache
                    sock = await inside(net, socket.SOCK_DGRAM)
                    found = await anyio.to_thread.run_sync(by_udp, sock, (RESOLVER, 53), message)
                    assert found[:4] == signed(message)[:4]
                    assert DNSRecord.parse(found).rr == DNSRecord.parse(signed(message)).rr
                stream = await inside(net, socket.SOCK_STREAM)
                (found,) = await anyio.to_thread.run_sync(by_tcp, stream, (RESOLVER, 53), message)
                assert len(found) == len(signed(message))
            assert len(await dig(net, "+dnssec", "signed.test")) == 2
            assert (await net.stack.stats())["dns_cached"] == 2 * len(messages)


@every_driver
@bounded
async def test_five_hundred_at_once(upstream: int, driver: DriverName) -> None:
    """From 50 ports, ten queries each before the first answer is taken; and as many on five connections."""
    host = ("127.0.0.1", upstream)
    messages = [
        question("a.test", ("A", "AAAA", "MX", "CAA")[n % 4], ident=n, size=512 + n) for n in range(500)
    ]
    expected = [by_udp(host_socket(socket.SOCK_DGRAM), host, each) for each in messages]
    async with network(
        driver=driver, uplink=Uplink(dns=DnsSettings([f"127.0.0.1:{upstream}"], cache=False))
    ) as net:
        assert await dig(net, "a.test")  # a kernel that does not know who 10.0.2.3 is loses some of a burst
        sockets = [await inside(net, socket.SOCK_DGRAM) for _ in range(50)]
        found = []
        for sock in sockets:
            sock.connect((RESOLVER, 53))
        for number, message in enumerate(messages):
            await anyio.wait_writable(sockets[number % 50])
            sockets[number % 50].send(message)
        for sock in sockets:
            with sock:
                for _ in range(10):
                    await anyio.wait_readable(sock)
                    found.append(sock.recv(1 << 16))
        assert sorted(found) == sorted(expected)
        found.clear()
        async with anyio.create_task_group() as tasks:

            async def ask(batch: list[bytes]) -> None:
                stream = await inside(net, socket.SOCK_STREAM)
                found.extend(await anyio.to_thread.run_sync(partial(by_tcp, stream, (RESOLVER, 53), *batch)))

            for start in range(0, 500, 100):
                tasks.start_soon(ask, messages[start : start + 100])
        assert sorted(found) == sorted(expected)


# -- which resolver is asked ------------------------------------------------------------------------------


@bounded
async def test_a_dead_resolver_is_waited_for_a_few_times_and_then_no_more(upstream: int) -> None:
    """The first query waits for one timeout, which is 1 s, and those that follow not even that."""
    with udp_server(lambda *_: None) as silent:
        async with network(silent, upstream) as net:
            for name, address in {
                "a.test": "192.0.2.1",
                "b.a.test": "192.0.2.2",
                "c.test": "192.0.2.1",
            }.items():
                found = (await net.run(["dig", "+short", "+tries=1", "+time=9", name])).stdout
                assert found.decode().split()[-1] == address
            for name in ("t.test", "m.test", "n.test", "big.test", "mid.test"):
                await dig(net, "ANY", name)
            stats = await net.stack.stats()
            assert (stats["dns_timeouts"], stats["dns_failovers"]) == (CONDEMNED, CONDEMNED)


@bounded
async def test_a_name_that_is_dropped_costs_the_others_nothing(upstream: int) -> None:
    """A resolver that does not answer for one name keeps all others, however often that is asked for."""
    asked: list[str] = []

    def dropping(sock: socket.socket, message: bytes, sender: tuple[str, int]) -> None:
        query = DNSRecord.parse(message)
        asked.append(str(query.q.qname))
        if asked[-1] != "dropped.test.":
            made = query.reply()
            made.add_answer(RR(query.q.qname, ttl=60, rdata=A("192.0.2.77")))
            sock.sendto(made.pack(), sender)

    with udp_server(dropping) as first:
        async with network(first, upstream) as net:
            for _ in range(2 * CONDEMNED):
                assert await status(net, "dropped.test") == "NXDOMAIN", "the second says so"
            assert await dig(net, "a.test") == ["192.0.2.77"]
            assert (await net.stack.stats())["dns_pending"] == 0


@every_driver
@bounded
async def test_a_resolver_that_changes_the_case_is_heard(driver: DriverName) -> None:
    """By the C library and by dig, with names of any case, at once and without another's help."""
    needs("dig", "getent")

    def lowering(message: bytes) -> bytes:
        query = DNSRecord.parse(message)
        query.q.qname = str(query.q.qname).lower()
        made = query.reply()
        if query.q.qtype == QTYPE.A:
            made.add_answer(RR(query.q.qname, ttl=60, rdata=A("192.0.2.7")))
        return bytes(made.pack())

    with resolver(lowering) as port:
        async with network(port, driver=driver) as net:
            for name in ("NAME.tld", "nAmE.tld", "name.TLD"):
                assert await dig(net, name) == await dig(net, "+tcp", name) == ["192.0.2.7"]
                found = await net.run(["getent", "ahostsv4", name])
                assert found.stdout.startswith(b"192.0.2.7 ")
            assert (await net.stack.stats())["dns_timeouts"] == 0


@pytest.mark.parametrize("rcode", ["SERVFAIL", "REFUSED"])
@bounded
async def test_the_next_is_asked_over_tcp_too(upstream: int, rcode: str) -> None:
    with dns_server({"a.test": ""}, rcode=rcode) as failing:
        async with network(closed_port(), failing, upstream) as net:
            assert await dig(net, "+tcp", "a.test") == ["192.0.2.1"]
            assert await dig(net, "a.test") == ["192.0.2.1"]


@bounded
async def test_no_such_name_is_final(upstream: int) -> None:
    asked: list[str] = []
    with dns_server(NAMES, asked) as other:
        async with network(upstream, other) as net:
            assert await status(net, "nx.test") == "NXDOMAIN"
            assert await status(net, "+tcp", "nx.test") == "NXDOMAIN"
    assert asked == []


@every_driver
@bounded
async def test_a_new_resolv_conf_counts_for_the_next_query(
    driver: DriverName, tmp_path: Path, upstream: int
) -> None:
    """Also where it is a symbolic link that is put elsewhere.  The cache is that of the old resolvers."""
    for name, address in {"one": "127.0.0.99", "two": "127.0.0.1"}.items():
        (tmp_path / name).write_text(f"nameserver {address}\n")
    conf = tmp_path / "resolv.conf"
    conf.symlink_to("one")
    async with network(uplink=Reading(str(conf), upstream), driver=driver) as net:
        assert await status(net, "a.test") == "SERVFAIL", "nobody is there"
        (tmp_path / "new").symlink_to("two")
        (tmp_path / "new").rename(conf)
        assert await dig(net, "a.test") == ["192.0.2.1"]
        (tmp_path / "two").write_text("nameserver 127.0.0.98\n")
        assert await status(net, "+tcp", "a.test") == "SERVFAIL"


@bounded
async def test_an_ipv6_resolver_serves_ipv4_clients() -> None:
    needs("dig")
    needs_ipv6()

    def serve(sock: socket.socket, message: bytes, sender: tuple[str, int]) -> None:
        made = DNSRecord.parse(message).reply()
        made.add_answer(RR(made.q.qname, QTYPE.TXT, ttl=60, rdata=TXT(sender[0])))
        sock.sendto(made.pack(), sender)

    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind(("::1", 0))
        port = sock.getsockname()[1]
        sock.settimeout(SECONDS)

        def once() -> None:
            message, sender = sock.recvfrom(1 << 16)
            serve(sock, message, sender[:2])

        async with network(uplink=Uplink(dns=[f"[::1]:{port}"])) as net, anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, once)
            assert await dig(net, "TXT", "who.am.i") == ['"::1"']


@every_driver
@bounded
async def test_domains_have_their_own_resolvers(upstream: int, driver: DriverName) -> None:
    asked: list[str] = []
    with dns_server(NAMES, asked) as main:
        uplink = Uplink(
            dns=DnsSettings(
                [f"127.0.0.1:{main}"], domains={"test": [f"127.0.0.1:{upstream}"], "none.tld": []}
            )
        )
        async with network(uplink=uplink, driver=driver) as net:
            assert await dig(net, "a.test") == await dig(net, "+tcp", "a.test") == ["192.0.2.1"]
            assert await dig(net, "name.tld") == ["192.0.2.7"]
            assert await status(net, "x.none.tld") == "SERVFAIL"
    assert asked == ["udp name.tld"]


# -- the options of the host's resolv.conf ----------------------------------------------------------------


class Noting:
    """A resolver on several addresses of the loopback, UDP and TCP, that notes what it is asked and by whom."""

    def __init__(self) -> None:
        self.queries: list[DNSRecord] = []
        self.senders: list[tuple[str, int]] = []
        self.asked: list[str] = []  # by what, and at which address

    def _answer(self, message: bytes) -> bytes:
        query = DNSRecord.parse(message)
        self.queries.append(query)
        made = query.reply()
        made.header.ad = 1
        if query.q.qtype == QTYPE.A:
            made.add_answer(RR(query.q.qname, ttl=60, rdata=A("192.0.2.7")))
        elif query.q.qtype == QTYPE.TXT:
            made.add_answer(RR(query.q.qname, QTYPE.TXT, ttl=60, rdata=TXT([b"x" * 250] * 8)))
        return bytes(made.pack())

    @contextmanager
    def serving(self, *addresses: str) -> Iterator[int]:
        """The port, which is the same everywhere."""
        with ExitStack() as stack:
            port = 0
            for address in addresses:

                def over_tcp(sock: socket.socket, address: str = address) -> None:
                    while length := sock.recv(2, socket.MSG_WAITALL):
                        self.asked.append(f"tcp {address}")
                        made = self._answer(sock.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
                        sock.sendall(len(made).to_bytes(2, "big") + made)

                def over_udp(
                    sock: socket.socket, message: bytes, sender: tuple[str, int], address: str = address
                ) -> None:
                    self.asked.append(f"udp {address}")
                    self.senders.append(sender)
                    sock.sendto(self._answer(message), sender)

                port = stack.enter_context(tcp_server(over_tcp, (address, port)))
                stack.enter_context(udp_server(over_udp, (address, port)))
            yield port


@asynccontextmanager
async def with_options(
    tmp_path: Path, port: int, options: str, *addresses: str, **more: Any
) -> AsyncIterator[Network]:
    """A network of a host whose resolv.conf has these options."""
    conf = tmp_path / "resolv.conf"
    servers = "".join(f"nameserver {each}\n" for each in addresses or ("127.0.0.1",))
    conf.write_text(f"{servers}options {options}\n")
    async with network(uplink=Reading(str(conf), port), **more) as net:
        yield net


@every_driver
@bounded
async def test_use_vc_asks_over_tcp_whatever_is_asked_in_datagrams(
    tmp_path: Path, driver: DriverName
) -> None:
    """The host's resolver hears of no datagram; what does not fit the client's is asked for by a stream."""
    needs("dig", "getent")
    noting = Noting()
    with noting.serving("127.0.0.1") as port:
        async with with_options(tmp_path, port, "use-vc timeout:25", driver=driver) as net:
            assert (await net.run(["getent", "ahostsv4", "a.test"])).stdout.startswith(b"192.0.2.7 ")
            assert await dig(net, "a.test") == ["192.0.2.7"]
            cut = (await net.run(["dig", "+tries=1", "+ignore", "+bufsize=1232", "TXT", "b.test"])).stdout
            assert b"flags: qr tc" in cut
            assert len((await dig(net, "TXT", "b.test"))[0]) > 2000
            assert b"use-vc" not in (await net.run(["cat", "/etc/resolv.conf"])).stdout
            assert (await net.stack.stats())["dns_timeouts"] == 0
    assert set(noting.asked) == {"tcp 127.0.0.1"}


@bounded
async def test_rotate_asks_one_after_the_other(tmp_path: Path) -> None:
    needs("dig")
    noting, addresses = Noting(), ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    with noting.serving(*addresses) as port:
        async with with_options(tmp_path, port, "rotate", *addresses) as net:
            for number in range(6):
                assert await dig(net, f"n{number}.test") == ["192.0.2.7"]
    assert noting.asked == 2 * [f"udp {each}" for each in addresses]


@bounded
async def test_the_hosts_timeout_and_attempts_are_ours(tmp_path: Path) -> None:
    """One attempt of one second, at each of two that are silent."""
    needs("dig")
    with udp_server(lambda *_: None) as silent:
        options = "timeout:1 attempts:1"
        async with with_options(tmp_path, silent, options, "127.0.0.1", driver="worker") as net:
            assert await status(net, "a.test") == "SERVFAIL"
            assert (await net.stack.stats())["dns_timeouts"] == 1
            found = (await net.run(["cat", "/etc/resolv.conf"])).stdout
            assert found.endswith(b"options timeout:2 attempts:1\n")


@pytest.mark.parametrize(
    ("options", "sees"),
    [
        ("", "A AAAA"),
        ("no-aaaa", "A"),
        ("edns0", "A+opt AAAA+opt"),
        ("trust-ad", "A+ad AAAA+ad"),
        ("single-request", "A AAAA"),
        ("single-request-reopen", "A AAAA"),
    ],
)
@bounded
async def test_options_for_programs_are_theirs(tmp_path: Path, options: str, sees: str) -> None:
    """What the C library makes of them, seen by the host's resolver."""
    needs("getent")
    if os.confstr("CS_GNU_LIBC_VERSION") is None:
        missing("not the GNU C library")
    noting = Noting()
    with noting.serving("127.0.0.1") as port:
        async with with_options(tmp_path, port, options) as net:
            found = await net.run(["getent", "ahosts", "a.test"])
            assert found.stdout.startswith(b"192.0.2.7 ")
    seen = [QTYPE[each.q.qtype] + "+ad" * each.header.ad + "+opt" * bool(each.ar) for each in noting.queries]
    assert sorted(seen) == sees.split()
    if options.startswith("single-request"):
        assert len(set(noting.senders)) == 2, "from a port each"


@bounded
async def test_the_authentic_bit_passes(tmp_path: Path) -> None:
    """To whoever asks for it, from the resolver and from the cache."""
    noting = Noting()
    with noting.serving("127.0.0.1") as port:
        async with with_options(tmp_path, port, "trust-ad") as net:
            for _ in range(2):
                sock = await inside(net, socket.SOCK_DGRAM)
                asked = question("a.test", flags=0x0120)
                found = await anyio.to_thread.run_sync(by_udp, sock, (RESOLVER, 53), asked)
                assert found[3] & 0x20
    assert len(noting.queries) == 1


LINK_LOCAL = """
import socket, sys, threading
import anyio
from dnslib import RR, A, DNSRecord
from pyroute2 import IPRoute
from netns_kit import DnsSettings, Network, Uplink

with IPRoute() as ip:
    ip.link("set", index=1, state="up")
    ip.addr("add", index=1, address="fe80::53", prefixlen=64, flags=2)  # IFA_F_NODAD

def serve(sock):
    while True:
        message, sender = sock.recvfrom(512)
        made = DNSRecord.parse(message).reply()
        made.add_answer(RR(made.q.qname, ttl=60, rdata=A("192.0.2.7")))
        sock.sendto(made.pack(), sender)

def serve_streams(listener):
    while True:
        with listener.accept()[0] as sock:
            length = sock.recv(2, socket.MSG_WAITALL)
            made = DNSRecord.parse(sock.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)).reply()
            made.add_answer(RR(made.q.qname, ttl=60, rdata=A("192.0.2.8")))
            packed = made.pack()
            sock.sendall(len(packed).to_bytes(2, "big") + packed)

def bound(kind):
    sock = socket.socket(socket.AF_INET6, kind)
    sock.bind(("fe80::53", 5353, 0, 1))
    return sock

datagrams, streams = bound(socket.SOCK_DGRAM), bound(socket.SOCK_STREAM)
streams.listen()
threading.Thread(target=serve, args=(datagrams,), daemon=True).start()
threading.Thread(target=serve_streams, args=(streams,), daemon=True).start()

async def main():
    uplink = Uplink(dns=DnsSettings(["[fe80::53%lo]:5353"], cache=False))
    async with Network(uplink=uplink, driver=sys.argv[1]) as net:
        for way in "+notcp", "+tcp":
            command = ["dig", "+short", "+tries=1", "+time=9", way, "a.test"]
            print((await net.run(command)).stdout.decode().strip())

anyio.run(main)
"""


@every_driver
@bounded
async def test_a_resolver_on_the_link_is_asked_there(driver: DriverName) -> None:
    """Its address has a zone.  The host is a namespace whose loopback has a link-local address."""
    needs("dig")
    needs_ipv6()
    async with Namespace.create() as host:
        found = await host.run([sys.executable, "-c", LINK_LOCAL, driver], cwd=str(ROOT), check=False)
    assert (found.stdout.split(), found.stderr) == ([b"192.0.2.7", b"192.0.2.8"], b"")


# -- names of our own -------------------------------------------------------------------------------------


@every_driver
@bounded
async def test_records_come_and_go(driver: DriverName) -> None:
    needs("dig", "getent")
    records = [
        "db.internal=192.0.2.5",
        Record("db.internal", "2001:db8::5"),
        Record("in.internal", "5 db.internal", "MX"),
    ]
    async with network(closed_port(), records=records, driver=driver, name="web") as net:
        assert await dig(net, "db.internal") == await dig(net, "+tcp", "db.internal") == ["192.0.2.5"]
        assert await dig(net, "AAAA", "db.internal") == ["2001:db8::5"]
        assert await dig(net, "-x", "192.0.2.5") == ["db.internal."]
        assert await dig(net, "MX", "in.internal") == ["5 db.internal."]
        assert await dig(net, "web") == ["10.0.2.100"]
        assert await dig(net, "-x", "10.0.2.100") == ["web."]
        assert await dig(net, "host.containers.internal") == ["10.0.2.2"]
        assert await status(net, "no.containers.internal") == "NXDOMAIN"
        assert await status(net, "-x", "10.0.2.50") == "NXDOMAIN"
        assert await status(net, "www.example") == "SERVFAIL"

        added = await net.stack.add_record("late.internal=192.0.2.6")
        assert added in await net.stack.records()
        assert await dig(net, "late.internal") == await dig(net, "+tcp", "late.internal") == ["192.0.2.6"]
        resolved = (await net.run(["getent", "ahostsv4", "late.internal"])).stdout
        assert resolved.startswith(b"192.0.2.6 ")
        await net.stack.remove_record("late.internal")
        assert await status(net, "late.internal") == await status(net, "+tcp", "late.internal") == "SERVFAIL"
        await net.stack.add_record("b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.internal=192.0.2.6")
        assert await dig(net, "xn--bcher-kva.internal") == ["192.0.2.6"]
        await net.stack.remove_record("B\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.internal")
        assert await status(net, "xn--bcher-kva.internal") == "SERVFAIL"
        with pytest.raises(NotFound, match=r"there is no record of late\.internal; ") as caught:
            await net.stack.remove_record("late.internal")
        assert isinstance(caught.value, KeyError)
        with pytest.raises(NotFound, match=r"there is no record of a\.internal TXT x; "):
            await net.stack.remove_record("a.internal", type="TXT", value="x")
        with pytest.raises(RecordError):
            await net.stack.add_record("late.internal")


@bounded
async def test_every_worker_knows_the_names() -> None:
    """Connections are served by one of several."""
    needs("dig")
    async with network(closed_port(), records=["db.internal=192.0.2.5"], driver="worker", queues=2) as net:
        await net.stack.add_record("late.internal=192.0.2.6")
        for _ in range(8):
            assert await dig(net, "+tcp", "db.internal") == ["192.0.2.5"]
            assert await dig(net, "+tcp", "late.internal") == ["192.0.2.6"]
        await net.stack.remove_record("late.internal")
        for _ in range(8):
            assert await status(net, "+tcp", "late.internal") == "SERVFAIL"


@every_driver
@bounded
async def test_the_hook_is_asked_first(upstream: int, driver: DriverName) -> None:
    uplink = Uplink(dns=DnsSettings([f"127.0.0.1:{upstream}"], hook=dns_hooks.hook))
    async with network(uplink=uplink, driver=driver) as net:
        for transport in ("+notcp", "+tcp"):
            assert await dig(net, transport, "renamed.example") == ["a.test.", "192.0.2.1"]
            assert await dig(net, transport, "idna.example") == ["xn--bcher-kva.test.", "192.0.2.8"]
            assert await status(net, transport, "refused.example") == "REFUSED"
            assert await dig(net, transport, "answered.example") == ["192.0.2.99"]
            assert await dig(net, transport, "MX", "answered.example") == ["5 mail.example."]
            assert await status(net, transport, "boom.example") == "SERVFAIL"
            assert await status(net, transport, "bad.example") == "SERVFAIL"
            assert await dig(net, transport, "a.test") == ["192.0.2.1"]


@every_driver
@bounded
async def test_over_ipv6(upstream: int, driver: DriverName) -> None:
    """The same at fd00::3, with an upstream that has IPv4 only; the gateway has its names there too."""
    needs_ipv6()
    records = [Record("db.internal", "2001:db8::5")]
    async with network(upstream, driver=driver, ipv6=True, records=records, name="web") as net:
        for transport in ("+notcp", "+tcp"):
            assert await dig(net, "@fd00::3", transport, "a.test") == ["192.0.2.1"]
            assert await dig(net, "@fd00::3", transport, "AAAA", "db.internal") == ["2001:db8::5"]
            assert await dig(net, "@fd00::3", transport, "AAAA", "host.containers.internal") == ["fd00::2"]
        assert await dig(net, "AAAA", "web") == ["fd00::100"]
        assert await dig(net, "-x", "fd00::100") == ["web."]
        assert await status(net, "-x", "fd00::77") == "NXDOMAIN"
        resolv_conf = (await net.run(["cat", "/etc/resolv.conf"])).stdout.decode()
        assert resolv_conf.splitlines()[:2] == [f"nameserver {RESOLVER}", "nameserver fd00::3"]


# -- the files inside -------------------------------------------------------------------------------------


@bounded
async def test_the_files_inside(tmp_path: Path, upstream: int) -> None:
    needs("getent")
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in map(Path, ("/etc/hosts", "/etc/resolv.conf"))
    }
    machine = os.uname().nodename
    uplink = Uplink(dns=DnsSettings([f"127.0.0.1:{upstream}"], search=["a.test", "nowhere.test"]))
    async with network(uplink=uplink, records=["db.internal=192.0.2.5"]) as net:
        resolv_conf = (await net.run(["cat", "/etc/resolv.conf"])).stdout.decode()
        assert resolv_conf == f"nameserver {RESOLVER}\nsearch a.test nowhere.test\n"
        hosts = (await net.run(["cat", "/etc/hosts"])).stdout.decode().splitlines()
        assert hosts[0] == f"127.0.0.1 localhost {machine}"
        assert "192.0.2.5 db.internal" in hosts
        assert "10.0.2.2 host.containers.internal" in hosts
        for name, address in {
            "localhost": "127.0.0.1",
            machine: "127.0.0.1",
            "db.internal": "192.0.2.5",
        }.items():
            found = (await net.run(["getent", "ahostsv4", name])).stdout.decode()
            assert found.split()[0] == address, name
        assert (await net.run(["getent", "ahostsv4", "b"])).stdout.startswith(b"192.0.2.2 "), (
            "by the search list"
        )
        other = await net.run(["cat", "/etc/hosts"], files={"/etc/hosts": "mine\n"})
        assert other.stdout == b"mine\n"
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}


@bounded
async def test_the_search_list_is_the_hosts(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 127.0.0.53\nsearch lan corp.example\noptions ndots:3 rotate\n")
    async with network(uplink=Uplink(dns=DnsSettings(resolv_conf=str(conf)))) as net:
        found = (await net.run(["cat", "/etc/resolv.conf"])).stdout.decode()
        assert found == f"nameserver {RESOLVER}\nsearch lan corp.example\noptions ndots:3\n"
    async with network(uplink=Uplink(dns=DnsSettings(resolv_conf=str(conf), search=["."]))) as net:
        assert (
            await net.run(["cat", "/etc/resolv.conf"])
        ).stdout.decode() == f"nameserver {RESOLVER}\nsearch .\n"
