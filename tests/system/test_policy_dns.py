"""A policy at DNS, as dig and libc see it, on each driver: upstream is a server of the test's.

tests/policy/test_name_guard.py has what is judged how.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, aclosing, contextmanager
from functools import partial

import anyio
import pytest
from dnslib import QTYPE, RR, DNSRecord

from netns_kit import DnsSettings, Network, Policy, QueryEvent, Record, Uplink
from netns_kit.gateway.setup import DriverName
from tests.support import needs, needs_tun
from tests.support.connections import driver, every_driver, once
from tests.support.dns_hooks import known
from tests.support.servers import bounded, echo, tcp_server, udp_server

__all__ = ["driver"]  # a fixture

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

CHAIN = "".join(f"c{n} 60 IN CNAME c{n + 1}\n" for n in range(8))
ZONES = {
    "www.example": "www.example 60 IN A 192.0.2.1",
    "chain.example": f"chain.example 60 IN CNAME c0\n{CHAIN}c8 60 IN A 192.0.2.2",
    "to-denied.example": "to-denied.example 60 IN CNAME ads.example\nads.example 60 IN A 192.0.2.3",
    "ads.example": "ads.example 60 IN CNAME www.example\nwww.example 60 IN A 192.0.2.1",
    "mixed.example": "mixed.example 60 IN A 192.168.1.1\nmixed.example 60 IN A 192.0.2.4",
    "ttl.example": "ttl.example 0 IN A 192.0.2.5",
    **{
        f"special{n}.example": f"special{n}.example 60 IN {'AAAA' if ':' in value else 'A'} {value}"
        for n, value in enumerate(
            ("127.0.0.1", "10.1.2.3", "169.254.169.254", "10.0.2.2", "fe80::1", "::ffff:7f00:1", "64:ff9b::7f00:1")
        )
    },
}  # fmt: skip
POLICY = (
    Policy.deny()
    .deny("ads.example", "*.ads.example", dns="refused", name="ads")
    .allow("*.example", "*.internal", "c3", ports=[80, 443])
)


@contextmanager
def upstream(asked: list[str] | None = None) -> Iterator[int]:
    """A resolver that knows ZONES, UDP and TCP.  Yields the port."""

    def resolve(message: bytes, protocol: str) -> bytes:
        query = DNSRecord.parse(message)
        name = str(query.q.qname).rstrip(".")
        if asked is not None:
            asked.append(f"{protocol} {name}")
        reply = query.reply()
        for record in RR.fromZone(ZONES.get(name.lower(), "")):
            if record.rtype == query.q.qtype or QTYPE[record.rtype] == "CNAME":
                reply.add_answer(record)
        return bytes(reply.pack())

    def over_tcp(sock: socket.socket) -> None:
        while length := sock.recv(2, socket.MSG_WAITALL):
            message = sock.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
            answer = resolve(message, "tcp")
            sock.sendall(len(answer).to_bytes(2, "big") + answer)

    with ExitStack() as stack:
        port = stack.enter_context(tcp_server(over_tcp))
        stack.enter_context(
            udp_server(
                lambda sock, message, sender: sock.sendto(resolve(message, "udp"), sender),
                ("127.0.0.1", port),
            )
        )
        yield port


def network(
    driver: DriverName,
    port: int,
    policy: Policy | None = POLICY,
    *,
    dns: DnsSettings | None = None,
    queues: int = 1,
) -> Network:
    needs_tun()
    needs("dig")
    uplink = Uplink(dns=dns or [f"127.0.0.1:{port}"], allow_host_loopback=True)
    return Network(
        uplink=uplink, driver=driver, policy=policy, queues=queues, records=["web.internal=10.0.2.2"]
    )


async def dig(net: Network, *words: str) -> str:
    """The status, the addresses and the extended error that dig shows."""
    done = await net.run(["dig", "+tries=1", "+time=9", *words], stdout=subprocess.PIPE)
    lines = done.stdout.decode().splitlines()
    (status,) = [each.partition("status: ")[2].partition(",")[0] for each in lines if "status: " in each]
    found = [
        each.split()[4] for each in lines if each and each[0] != ";" and each.split()[3] in ("A", "AAAA")
    ]
    errors = [each.partition("EDE: ")[2] for each in lines if "EDE: " in each]
    return " ".join([status, *found, *errors])


def blocked(text: str, edns: bool) -> str:
    """What dig shows of an extended error."""
    return f" 15 (Blocked): ({text})" if edns else ""


@every_driver
@bounded
async def test_what_dig_sees(driver: DriverName) -> None:
    asked: list[str] = []
    with upstream(asked) as port:
        async with network(driver, port) as net:
            for words in ([], ["+tcp"], ["+noedns"]):
                ask = partial(dig, net, *words)
                ads, default, edns = POLICY.label(0), "default: deny", words != ["+noedns"]
                assert await ask("www.example") == "NOERROR 192.0.2.1"
                assert await ask("wWw.eXAMPLE") == "NOERROR 192.0.2.1"
                assert await ask("chain.example") == "NOERROR 192.0.2.2"
                assert await ask("ttl.example") == "NOERROR 192.0.2.5"
                assert await ask("mixed.example") == "NOERROR 192.0.2.4"
                assert await ask("web.internal") == "NOERROR 10.0.2.2"
                assert await ask("other.test") == f"NXDOMAIN{blocked(default, edns)}"
                for name in ("ads.example", "x.ADS.example", "to-denied.example"):
                    assert await ask(name) == f"REFUSED{blocked(ads, edns)}"
                for name, zone in ZONES.items():
                    if name.startswith("special"):
                        _, _, _, kind, value = zone.split()
                        canonical = "127.0.0.1" if "::ffff:" in value or "64:" in value else value
                        told = f"{canonical} is no address for a public name"
                        assert await ask(name, kind) == f"NOERROR{blocked(told, edns)}"
            stats = await net.stack.stats()
            assert stats["dns_refused_by_policy"] == 3 * 11
            assert stats["dns_cut"] == 3
            assert stats["policy_pins"] == 5
    assert {each.partition(" ")[2].lower() for each in asked} == ZONES.keys() - {"ads.example"}


@every_driver
@bounded
async def test_another_policy_judges_what_the_cache_has(driver: DriverName) -> None:
    asked: list[str] = []
    with upstream(asked) as port:
        async with network(driver, port, None) as net:
            ask = partial(dig, net, "+nocookie")
            assert await ask("mixed.example") == "NOERROR 192.168.1.1 192.0.2.4"
            await net.stack.set_policy(POLICY)
            assert await ask("mixed.example") == "NOERROR 192.0.2.4"
            await net.stack.set_policy(Policy.deny())
            assert (await ask("mixed.example")).startswith("NXDOMAIN")
            await net.stack.set_policy(Policy.deny().allow("mixed.example", private=True))
            assert await ask("mixed.example") == "NOERROR 192.168.1.1 192.0.2.4"
            await net.stack.set_policy(None)
            assert await ask("mixed.example") == "NOERROR 192.168.1.1 192.0.2.4"
    assert asked == ["udp mixed.example"]


@every_driver
@bounded
async def test_a_policy_that_audits_tells_what_it_would_refuse(driver: DriverName) -> None:
    policy = Policy.deny(audit=True).allow("www.example", "mixed.example")
    with upstream() as port:
        async with network(driver, port, policy) as net, aclosing(net.stack.events()) as events:
            told: list[QueryEvent] = []

            async def listen() -> None:
                async for event in events:
                    if isinstance(event, QueryEvent):
                        told.append(event)
                        if event.name == "mixed.example":
                            break

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listen)
                while not told:  # until somebody listens
                    assert await dig(net, "ads.example") == "NOERROR 192.0.2.1"
                assert await dig(net, "www.example") == "NOERROR 192.0.2.1"
                assert await dig(net, "mixed.example") == "NOERROR 192.168.1.1 192.0.2.4"
    seen = [(each.name, each.type, str(each.client), each.rule, each.rcode, each.audit) for each in told[-2:]]
    assert seen == [
        ("ads.example", "A", "10.0.2.100", "default: deny", "NXDOMAIN", True),
        ("mixed.example", "A", "10.0.2.100", policy.label(0), "NOERROR", True),
    ]


@every_driver
@bounded
async def test_an_answer_of_the_hook_is_pinned(driver: DriverName) -> None:
    hook = partial(known, (Record("hook.internal", "10.0.2.2"),))
    with tcp_server(echo) as port:
        policy = Policy.deny().allow("hook.internal", ports=port)
        async with network(driver, 1, policy, dns=DnsSettings([], hook=hook)) as net:
            done = await net.run([sys.executable, "-c", CONNECT, f"10.0.2.2:{port}"], stdout=subprocess.PIPE)
            assert done.stdout != b"x", "not before it is asked for"
            done = await net.run(
                [sys.executable, "-c", CONNECT, f"hook.internal:{port}"], stdout=subprocess.PIPE
            )
            assert done.stdout == b"x"


CONNECT = """
import socket, sys
for each in sys.argv[1:]:
    host, _, port = each.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), 9) as sock:
            sock.send(b"x")
            print(sock.recv(1).decode(), end="")
    except OSError as error:
        print(error.errno, end=" ")
"""


@once
@bounded
async def test_a_name_is_known_to_the_worker_that_gets_the_connection() -> None:
    """Each connection needs a pin that was made a moment ago by the worker which answers names."""
    count = 24
    with ExitStack() as stack:
        ports = [stack.enter_context(tcp_server(echo)) for _ in range(count)]
        policy = Policy.deny()
        for number, port in enumerate(ports):
            policy = policy.allow(f"n{number}.hook", ports=port)
        records = tuple(Record(f"n{number}.hook", "10.0.2.2") for number in range(count))
        dns = DnsSettings([], hook=partial(known, records))
        async with network("worker", 1, policy, dns=dns, queues=2) as net:
            targets = [f"n{number}.hook:{port}" for number, port in enumerate(ports)]
            literals = [f"10.0.2.2:{port}" for port in ports]
            done = await net.run([sys.executable, "-c", CONNECT, *literals], stdout=subprocess.PIPE)
            assert b"x" not in done.stdout
            done = await net.run([sys.executable, "-c", CONNECT, *targets], stdout=subprocess.PIPE)
            assert done.stdout == b"x" * count
            stats = await net.stack.stats()
            assert stats["policy_pins"] == 2 * count, "each worker has them all"
            assert stats["policy_pins_lost"] == 0
