"""What a program inside may try against a policy (docs/security.md): each is tried, by a program, on each driver.

Nothing leads out (`world`).  A test has its program do the same twice: without a policy, where what it sends arrives,
and with one, where of all packets that reach the world or home's loopback none is but of the flows that the policy
allows.  In the same breath the program does what is allowed, which works: so what was stopped was not stopped by
chance, and had its turn, since frames of one tap are read in their order.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address
from typing import Any

import anyio
import pytest

from netns_kit import DNS_ELSEWHERE, HOST, LOOPBACK, NetnsKitError, Policy, PolicyError, StackCrashed, Uplink
from netns_kit.namespace.background import beside
from tests.support import attacks, needs, uplinks
from tests.support.attacks import DNS, GATEWAY
from tests.support.servers import SECONDS
from tests.support.waiting import eventually
from tests.support.world import (
    DRIVERS,
    ELSEWHERE,
    ELSEWHERE_6,
    EVIL,
    EVIL_6,
    HOME,
    HOME_6,
    METADATA,
    METADATA_6,
    PRIVATE,
    PRIVATE_6,
    QUEUES,
    RESOLVER,
    WEB,
    WEB_6,
    World,
    in_world,
)

POLICY = Policy.deny().allow("example.org", "*.example.org", ports=443)
ALLOWED = [("tcp", WEB, 443), ("tcp", WEB_6, 443)]
"""What arrives of what `POLICY` allows."""
WORKS = ("tcp", "example.org", 443)
"""A step that it allows, and that is answered "hello"."""
PROHIBITED, PROHIBITED_6 = "EHOSTUNREACH", "EACCES"
"""What a socket is told of ICMP's "administratively prohibited"."""

Arrivals = Collection[tuple[str, str, int]]
on_each = pytest.mark.parametrize("driver", DRIVERS)
on_each_and_two_queues = pytest.mark.parametrize("driver", QUEUES)


async def stopped(
    world: World,
    driver: str,
    steps: Sequence[Sequence[object]],
    would: Arrivals,
    *,
    policy: Policy = POLICY,
    expected: Arrivals = ALLOWED,
) -> list[Any]:
    """Return how `steps` go under `policy`: nothing but `expected` arrives.  Without it all of `would` does."""
    async with world.network(driver) as net:
        await world.tries(net, *steps, WORKS)
    came = {(each.protocol, each.target, each.port) for each in world.arrivals()}
    assert came >= set(would), "without a policy it arrives"
    world.forget()
    async with world.network(driver, policy=policy) as net:
        *outcomes, works = await world.tries(net, *steps, WORKS)
    assert works == "hello", "what is allowed works"
    assert world.strays(*expected) == []
    assert all(name.endswith("example.org") for name in world.names_asked())
    return outcomes


# -- other resolvers ----------------------------------------------------------------------------------


@on_each
@in_world
async def test_dig_at_another_resolver(world: World, driver: str) -> None:
    needs("dig")
    dig = ["dig", "+tries=1", f"+time={SECONDS // 3}", "+short", "another.example"]
    async with world.network(driver) as net:
        done = await net.run([*dig, f"@{ELSEWHERE}"])
        assert done.stdout.strip() == EVIL.encode()
    world.forget()
    async with world.network(driver, policy=POLICY) as net:
        for server in (f"@{ELSEWHERE}", f"@{ELSEWHERE_6}", "+tcp"):
            done = await net.run([*dig, server], check=False)
            assert EVIL.encode() not in done.stdout
        assert await world.tries(net, WORKS) == ["hello"]
    assert world.strays(*ALLOWED) == []
    assert "another.example" not in world.names_asked()


@on_each
@in_world
async def test_another_resolver_over_udp_tcp_dot_doq_and_doh(world: World, driver: str) -> None:
    steps: list[Sequence[object]] = []
    would: list[tuple[str, str, int]] = []
    for server in (ELSEWHERE, ELSEWHERE_6):
        steps += [
            ("ask", server, "example.org", "A", protocol) for protocol in ("udp", "tcp")
        ]  # even an allowed name
        steps += [
            ("tls", server, port, "example.org") for port in (853, 443)
        ]  # DoT, and DoH by a name that is allowed
        steps += [("udp", server, port) for port in (853, 443)]  # DoQ, and DoH over HTTP/3
        would += [(protocol, server, port) for protocol in ("udp", "tcp") for port in (53, 443, 853)]
    outcomes = await stopped(world, driver, steps, would)
    assert outcomes == [PROHIBITED] * 6 + [PROHIBITED_6] * 6, "and at once"


@on_each
@in_world
async def test_the_resolver_that_we_ask(world: World, driver: str) -> None:
    """It is ours to ask."""
    steps: list[Sequence[object]] = [("ask", RESOLVER, "another.example", "A", how) for how in ("udp", "tcp")]
    steps += [("tls", RESOLVER, 853, "example.org"), ("udp", RESOLVER, 7777)]
    would = [("udp", RESOLVER, 53), ("tcp", RESOLVER, 53), ("tcp", RESOLVER, 853), ("udp", RESOLVER, 7777)]
    assert await stopped(world, driver, steps, would) == [PROHIBITED] * 4


@on_each
@in_world
async def test_other_resolvers_where_all_else_is_allowed(world: World, driver: str) -> None:
    policy = Policy.allow().deny(DNS_ELSEWHERE)
    steps: list[Sequence[object]] = [("ask", ELSEWHERE, "example.org", "A", how) for how in ("udp", "tcp")]
    steps += [("tls", ELSEWHERE, 853, "example.org"), ("udp", ELSEWHERE, 853)]
    would = [(protocol, ELSEWHERE, port) for protocol in ("tcp", "udp") for port in (53, 853)]
    assert set(await stopped(world, driver, steps, would, policy=policy)) == {PROHIBITED}


@on_each
@in_world
async def test_mdns_and_llmnr(world: World, driver: str) -> None:
    """To one address, and to groups, which nothing ever leaves for."""
    groups = [("224.0.0.251", 5353), ("ff02::fb%tap0", 5353), ("224.0.0.252", 5355), ("ff02::1:3%tap0", 5355)]
    soon = ("hello", "", "", attacks.SOON)
    steps: list[Sequence[object]] = [("udp", group, port, *soon) for group, port in groups]
    steps += [("udp", ELSEWHERE, port) for port in (5353, 5355)]
    outcomes = await stopped(world, driver, steps, [("udp", ELSEWHERE, 5353), ("udp", ELSEWHERE, 5355)])
    assert outcomes[-2:] == [PROHIBITED] * 2
    assert "hello" not in outcomes


@on_each
@in_world
async def test_another_resolver_where_dns_is_intercepted(world: World, driver: str) -> None:
    """We answer in its place, and of no other names."""
    steps = [
        ("ask", ELSEWHERE, name, "A", protocol)
        for name in ("another.example", "example.org")
        for protocol in ("udp", "tcp")
    ]
    async with world.network(driver, policy=POLICY, intercept_dns=True) as net:
        outcomes = await world.tries(net, *steps, ("udp", ELSEWHERE, 853), WORKS)
    assert outcomes == ["NXDOMAIN", "NXDOMAIN", f"NOERROR {WEB}", f"NOERROR {WEB}", PROHIBITED, "hello"]
    assert world.names_asked() == {"example.org"}
    assert world.strays(*ALLOWED) == []


# -- addresses and ports ------------------------------------------------------------------------------


@on_each
@in_world
async def test_an_address_literal(world: World, driver: str) -> None:
    """Of a host that no rule names, and of one whose name is allowed, but has not been asked for."""
    steps: list[Sequence[object]] = [("spoofed", [attacks.GUEST], EVIL, 443)]  # and a SYN with data
    steps += [(kind, address, 443) for address in (EVIL, EVIL_6, WEB) for kind in ("tcp", "udp")]
    would = [(kind, address, 443) for address in (EVIL, EVIL_6, WEB) for kind in ("tcp", "udp")]
    outcomes = await stopped(world, driver, steps, would)
    assert outcomes[1:] == [PROHIBITED] * 2 + [PROHIBITED_6] * 2 + [PROHIBITED] * 2


@on_each_and_two_queues
@in_world
async def test_an_allowed_name_on_another_port(world: World, driver: str) -> None:
    steps = [("tcp", "example.org", port) for port in (22, 80, 8443)] + [("udp", "example.org", 7777)]
    would = [("tcp", WEB, 22), ("tcp", WEB, 8443), ("udp", WEB, 7777)]
    outcomes = await stopped(world, driver, steps, would)
    assert set(outcomes) == {PROHIBITED}


@on_each
@in_world
async def test_an_ipv4_address_in_the_forms_of_ipv6(world: World, driver: str) -> None:
    """IPv4-mapped, NAT64, 6to4: judged by the address inside, though all else is allowed."""
    nat64, six_to_four = "64:ff9b::cb00:7142", "2002:cb00:7142::1"
    steps: list[Sequence[object]] = [("mapped", EVIL, 7777), ("tcp", f"::ffff:{EVIL}", 443)]
    soon = ("hello", "", "", attacks.SOON)  # the world has no such address to answer a datagram from
    steps += [(kind, address, 443, *soon) for address in (nat64, six_to_four) for kind in ("tcp", "udp")]
    would = [
        ("tcp", EVIL, 443),
        *((kind, address, 443) for address in (nat64, six_to_four) for kind in ("tcp", "udp")),
    ]
    outcomes = await stopped(world, driver, steps, would, policy=Policy.allow().deny(f"{EVIL}/32"))
    assert outcomes[1] == PROHIBITED
    assert "hello" not in outcomes


@on_each
@in_world
async def test_fragments(world: World, driver: str) -> None:
    """A filter that looks at the first one alone lets the others pass; whatever else is in the way, see `WAYS`."""
    policy = POLICY.allow(WEB, protocol="udp", ports=7777)
    steps: list[Sequence[object]] = [("fragments", way, EVIL, WEB, 7777, 853) for way in attacks.WAYS]
    steps.append(("fragments_6", EVIL_6, 7777))
    would = [("udp", EVIL, 7777), ("udp", EVIL_6, 7777)]
    last = ("fragments", "in order", WEB, WEB, 7777, 853)
    expected = [*ALLOWED, ("udp", WEB, 7777)]
    await stopped(world, driver, [*steps, last], would, policy=policy, expected=expected)
    assert [each for each in world.arrivals() if each.port == 7777], (
        "a datagram that is allowed may be in fragments"
    )


@on_each
@in_world
async def test_another_source_address(world: World, driver: str) -> None:
    """Another guest's, ours, the host's, its loopback's, a foreign one: no name opens a way."""
    sources = ["10.0.2.55", GATEWAY, DNS, "127.0.0.1", "192.0.2.1", RESOLVER, WEB, "0.0.0.0", "10.0.2.255"]
    await stopped(world, driver, [("spoofed", sources, EVIL, 7777)], [("udp", EVIL, 7777), ("icmp", EVIL, 8)])


@on_each
@in_world
async def test_other_protocols_source_routes_and_packets_in_packets(world: World, driver: str) -> None:
    """What leaves is TCP, UDP and echo requests, to the address in the header; not even to whom all is allowed."""
    policy = POLICY.allow(WEB, WEB_6)
    steps = [("other_packets", EVIL, EVIL_6, WEB, WEB_6, 7777), ("udp", WEB, 7777), ("udp", WEB_6, 7777)]
    would = [("udp", WEB, 7777), ("udp", WEB_6, 7777)]
    expected = [*ALLOWED, *would]
    assert (await stopped(world, driver, steps, would, policy=policy, expected=expected))[1:] == [
        "hello",
        "hello",
    ]


@on_each
@in_world
async def test_the_host_by_its_gateway_its_addresses_and_its_loopback(world: World, driver: str) -> None:
    """Though all else is allowed, and the uplink lets the host's loopback be reached."""
    ways = [
        GATEWAY,
        "fd00::2",
        "fe80::2%tap0",
        HOME,
        HOME_6,
    ]
    steps: list[Sequence[object]] = [(kind, way, 443) for way in ways for kind in ("tcp", "udp")]
    steps += [("tcp", f"64:ff9b::{IPv4Address(HOME).packed.hex(':', 2)}", 443)]
    steps += [("ping", HOME), ("spoofed", [attacks.GUEST], "127.0.0.1", 443), ("mapped", "127.0.0.1", 443)]
    would = [(kind, way, 443) for way in ("127.0.0.1", "::1", HOME, HOME_6) for kind in ("tcp", "udp")]
    outcomes = await stopped(world, driver, steps, would, policy=Policy.allow().deny(HOST, LOOPBACK))
    assert "hello" not in outcomes


@on_each
@in_world
async def test_icmp_as_a_tunnel(world: World, driver: str) -> None:
    """Echo requests are flows; nothing else of ICMP leaves, not even for whom may be pinged."""
    policy = POLICY.allow(WEB, protocol="icmp")
    others = [(0, 0), (3, 1), (5, 1), (8, 7), (13, 0), (15, 0), (42, 0)]
    steps: list[Sequence[object]] = [
        ("ping", EVIL),
        *(("ping", WEB, "hello", *each) for each in others),
        ("ping", WEB),
    ]
    would = [("icmp", EVIL, 8), ("icmp", WEB, 8)]
    expected = [*ALLOWED, ("icmp", WEB, 8)]
    outcomes = await stopped(world, driver, steps, would, policy=policy, expected=expected)
    assert (outcomes[0], outcomes[-1]) == ("unreachable 13", "hello")
    assert {each.payload for each in world.arrivals() if each.protocol == "icmp"} == {b"hello"}


@on_each
@in_world
async def test_a_second_interface_made_inside(world: World, driver: str) -> None:
    """It is made, and has an address and a route; what leaves does so by our tap, by whatever name."""
    ports = dict(
        zip(("dummy", "bridge", "veth", *attacks.REACHING), (22, 25, 80, 443, 853, 5353, 5355), strict=True)
    )
    steps = [("beside", kind, EVIL, port) for kind, port in ports.items()]
    would = [("udp", EVIL, ports[kind]) for kind in attacks.REACHING]
    outcomes = await stopped(world, driver, steps, would)
    assert outcomes[-3:] == [[PROHIBITED] * 2] * 3


# -- names --------------------------------------------------------------------------------------------


@on_each_and_two_queues
@in_world
async def test_a_name_that_is_not_allowed_leaves_nothing_with_a_resolver(world: World, driver: str) -> None:
    """Not even the question, in which a program could tell somebody something."""
    names = [
        "another.example",
        "ANOTHER.example",
        "secret.another.example",
        "org",
        "notexample.org",
        "example.org.evil.example",
    ]
    steps: list[Sequence[object]] = [("ask", DNS, name) for name in names]
    steps += [("ask", DNS, "another.example", kind) for kind in ("AAAA", "TXT", "CNAME", "HTTPS", "ANY")]
    steps += [("ask", DNS, "another.example", "A", "tcp"), ("ask", DNS, "66.113.0.203.in-addr.arpa", "PTR")]
    async with world.network(driver) as net:
        await world.tries(net, *steps)
    assert world.names_asked() >= {"another.example", "secret.another.example"}
    world.forget()
    async with world.network(driver, policy=POLICY) as net:
        outcomes = await world.tries(net, *steps, ("tcp", "another.example", 443), WORKS)
    assert outcomes == ["NXDOMAIN"] * len(steps) + ["no name", "hello"]
    assert world.names_asked() == {"example.org"}
    assert world.strays(*ALLOWED) == []


@on_each
@in_world
async def test_a_message_with_a_second_name_in_it(world: World, driver: str) -> None:
    """Two questions, records in a question, text behind it, other operations and classes, a label with dots in it."""
    steps = [("messages", DNS, "example.org", "another.example"), WORKS]
    async with world.network(driver, policy=POLICY) as net:
        assert await world.tries(net, *steps) == ["sent", "hello"]
    assert b"another" not in b"".join(each.payload for each in world.arrivals())
    assert world.strays(*ALLOWED) == []


@on_each_and_two_queues
@in_world
async def test_a_cname_from_an_allowed_name_to_a_denied_one_and_back(world: World, driver: str) -> None:
    policy = Policy.deny().deny("evil.example").allow("*.example", "*.example.org", "example.org", ports=443)
    web = f"60 IN A {WEB}"
    world.says("cdn.example", "cdn.example 60 IN CNAME evil.example", f"evil.example {web}")
    chain = ["far.example 60 IN CNAME a.invalid", "a.invalid 60 IN CNAME evil.example", f"evil.example {web}"]
    world.says("far.example", *chain)
    world.says("evil.example", "evil.example 60 IN CNAME example.org", f"example.org {web}")
    world.says("edge.example", "edge.example 60 IN CNAME edge.invalid", f"edge.invalid {web}")
    names = ["cdn.example", "far.example", "evil.example"]
    steps = [*(("ask", DNS, name) for name in names), *(("tcp", name, 443) for name in names)]
    async with world.network(driver) as net:
        assert await world.tries(net, *steps) == [f"NOERROR {WEB}"] * 3 + ["hello"] * 3
    world.forget()
    async with world.network(driver, policy=policy) as net:
        assert await world.tries(net, *steps) == ["NXDOMAIN"] * 3 + ["no name"] * 3
        assert world.strays() == [], "nothing is pinned by them"
        edge = [("ask", DNS, "edge.example"), ("tcp", WEB, 443), ("ask", DNS, "edge.invalid")]
        assert await world.tries(net, *edge) == [f"NOERROR {WEB}", "hello", "NXDOMAIN"], (
            "no rule is against edge.invalid"
        )
    assert "evil.example" not in world.names_asked()


INTO = {
    "127.0.0.1": "A",
    "127.9.9.9": "A",
    "0.0.0.0": "A",
    PRIVATE: "A",
    METADATA: "A",
    "224.0.0.251": "A",
    GATEWAY: "A",
    "fe80::1": "AAAA",
    "::1": "AAAA",
    "::": "AAAA",
    PRIVATE_6: "AAAA",
    METADATA_6: "AAAA",
    "::ffff:7f00:1": "AAAA",
    "::ffff:a01:203": "AAAA",
    "64:ff9b::7f00:1": "AAAA",
    "64:ff9b::a01:203": "AAAA",
    "2002:a9fe:a9fe::1": "AAAA",
    "fd00::2": "AAAA",
}
"""Addresses that no public name has, and the type of their records."""


@on_each_and_two_queues
@in_world
async def test_an_answer_into_loopback_private_link_local_and_metadata_space(
    world: World, driver: str
) -> None:
    steps: list[Sequence[object]] = []
    for number, (address, kind) in enumerate(INTO.items()):
        name = f"n{number}.example.org"
        world.says(name, f"{name} 60 IN {kind} {address}")
        steps.append(("ask", DNS, name, kind))
    names = [
        ("tcp", f"n{number}.example.org", 443, "hello", "", "", attacks.SOON) for number in range(len(INTO))
    ]
    async with world.network(driver) as net:
        assert all(each.startswith("NOERROR ") for each in await world.tries(net, *steps))
        await world.tries(net, *names)
    came = {(each.target, each.port) for each in world.arrivals()}
    assert came >= {(PRIVATE, 443), (METADATA, 443), (PRIVATE_6, 443), ("127.0.0.1", 443)}
    world.forget()
    literals = [
        ("tcp", address, 443, "hello", "", "", attacks.SOON)
        for address in INTO
        if address not in ("::1", "127.0.0.1")
    ]
    world.says(
        "mixed.example.org", *(f"mixed.example.org 60 IN A {each}" for each in (PRIVATE, WEB, "127.0.0.1"))
    )
    async with world.network(driver, policy=POLICY) as net:
        outcomes = await world.tries(net, *steps, *names, ("ask", DNS, "mixed.example.org"))
        assert outcomes == ["NOERROR"] * len(steps) + ["no name"] * len(names) + [f"NOERROR {WEB}"]
        assert "hello" not in await world.tries(net, *literals)
        assert await world.tries(net, WORKS) == ["hello"]
    assert world.strays(*ALLOWED) == []


@on_each_and_two_queues
@in_world
async def test_ttl_0_and_another_answer_between_the_question_and_the_connection(
    world: World, driver: str
) -> None:
    """What was looked at is what is connected to, whatever the name says in the meantime (DNS rebinding)."""
    name = "rebind.example.org"
    steps = [
        ("ask", DNS, name),
        ("tcp", PRIVATE, 443),
        ("tcp", GATEWAY, 443),
        ("ask", DNS, name),
        ("tcp", PRIVATE, 443),
    ]

    def fresh() -> None:
        world.says(
            name, f"{name} 0 IN A {WEB}", then=[f"{name} 0 IN A {PRIVATE}", f"{name} 0 IN A 127.0.0.1"]
        )

    fresh()
    async with world.network(driver) as net:
        outcomes = await world.tries(net, *steps)
    assert outcomes == [f"NOERROR {WEB}", "hello", "hello", f"NOERROR {PRIVATE} 127.0.0.1", "hello"]
    world.forget()
    fresh()
    async with world.network(driver, policy=POLICY) as net:
        outcomes = await world.tries(net, steps[0], ("tcp", WEB, 443), *steps[1:], ("tcp", name, 443))
    assert outcomes == [f"NOERROR {WEB}", "hello", PROHIBITED, PROHIBITED, "NOERROR", PROHIBITED, "no name"]
    assert world.strays(*ALLOWED) == []


@on_each_and_two_queues
@in_world
async def test_an_address_whose_answer_has_run_out(world: World, driver: str) -> None:
    world.says("example.org", f"example.org 1 IN A {WEB}")
    policy = Policy.deny(grace=0.0).allow("example.org", ports=443)
    async with world.network(driver, policy=policy) as net:
        steps = [("ask", DNS, "example.org"), ("until_refused", WEB, 443, SECONDS / 2), WORKS]
        assert await world.tries(net, *steps) == [f"NOERROR {WEB}", PROHIBITED, "hello"]
    assert world.strays(*ALLOWED) == []


@on_each_and_two_queues
@in_world
async def test_records_that_nobody_asked_for(world: World, driver: str) -> None:
    """An allowed name's answer opens that name's addresses, and no others that are in it."""
    lines = [
        f"example.org 60 IN A {WEB}",
        f"another.example 60 IN A {EVIL}",
        "example.org.evil 60 IN A 198.51.100.99",
    ]
    world.says("example.org", *lines)
    steps = [("ask", DNS, "example.org"), ("tcp", EVIL, 443)]
    outcomes = await stopped(world, driver, steps, [("tcp", EVIL, 443)])
    assert outcomes[1] == PROHIBITED


@on_each_and_two_queues
@in_world
async def test_an_answer_that_a_program_inside_forges(world: World, driver: str) -> None:
    """In our name, and in that of resolvers, to whomever may believe it."""
    steps = [("forged_answer", "example.org", EVIL), ("tcp", EVIL, 443)]
    outcomes = await stopped(world, driver, steps, [("tcp", EVIL, 443)])
    assert outcomes[1] == PROHIBITED


# -- who shares an address with an allowed name -----------------------------------------------------------


def said(world: World) -> bytes:
    """All that was said to the world's web server."""
    return b"".join(each.payload for each in world.arrivals() if each.target in (WEB, WEB_6))


@on_each_and_two_queues
@in_world
async def test_a_server_name_that_lies(world: World, driver: str) -> None:
    policy = Policy.deny().allow("example.org", ports=443, sni=True)
    lies: list[Sequence[object]] = [
        ("tls", "example.org", 443, "evil.example"),
        ("tls", "example.org", 443, "evil.example", 40),
        ("tls", "example.org", 443, "example.org.evil.example"),
        ("tls", "example.org", 443, None),
        ("tcp", "example.org", 443, "plain text\r\n\r\n"),
        ("tcp", "example.org", 443, "an unfinished word", "", "", attacks.SOON),
        ("http", "example.org", 443, ["example.org"]),
        ("tls", EVIL, 443, "example.org"),
    ]
    async with world.network(driver) as net:
        await world.tries(net, *lies)
    assert b"evil.example" in said(world)
    assert b"plain text" in said(world)
    assert world.strays(*ALLOWED) != []
    world.forget()
    async with world.network(driver, policy=policy) as net:
        true = [("tls", "example.org", 443, "example.org", pieces) for pieces in (1, 40)]
        outcomes = await world.tries(net, *lies, *true)
    assert "heard" not in outcomes[: len(lies)]
    assert outcomes[len(lies) :] == ["heard", "heard"]
    heard = said(world)
    assert heard.count(b"example.org") == 2, "the two that are true"
    assert b"evil.example" not in heard
    assert b"plain text" not in heard
    assert b"word" not in heard
    assert b"GET" not in heard
    assert world.strays(*ALLOWED) == []


@on_each_and_two_queues
@in_world
async def test_a_host_that_lies(world: World, driver: str) -> None:
    policy = Policy.deny().allow("example.org", ports=80, host=True)
    lies: list[Sequence[object]] = [
        ("http", "example.org", 80, ["evil.example"]),
        ("tcp", "example.org", 80, "GET / HTTP/1.1\r\nHost: example.org\r\nHost: evil.example\r\n\r\n"),
        ("tcp", "example.org", 80, "GET http://evil.example/ HTTP/1.1\r\nHost: example.org\r\n\r\n"),
        ("tcp", "example.org", 80, "GET / HTTP/1.1\r\nHost : evil.example\r\n\r\n"),
        (
            "tcp",
            "example.org",
            80,
            "GET / HTTP/1.1\r\nX: a\r\n Host: example.org\r\nHost: evil.example\r\n\r\n",
        ),
        ("tcp", "example.org", 80, "plain text\r\n\r\n"),
        ("tcp", "example.org", 80, "an unfinished word", "", "", attacks.SOON),
        ("tls", "example.org", 80, "evil.example"),
        ("http", EVIL, 80, ["example.org"]),
    ]
    async with world.network(driver) as net:
        await world.tries(net, *lies)
    assert b"evil.example" in said(world)
    assert b"plain text" in said(world)
    world.forget()
    async with world.network(driver, policy=policy) as net:
        outcomes = await world.tries(net, *lies, ("http", "example.org", 80, ["example.org"]))
    assert outcomes[-1] == "HTTP/1.1 200"
    assert b"evil.example" not in said(world)
    assert b"plain text" not in said(world)
    assert b"word" not in said(world)
    assert world.strays(("tcp", WEB, 80), ("tcp", WEB_6, 80)) == []


@on_each_and_two_queues
@in_world
async def test_quic_where_the_server_name_is_looked_at(world: World, driver: str) -> None:
    """It is refused, so that clients fall back to TCP; and nobody gets keys by which to hide the name (ECH)."""
    policy = Policy.deny().allow("example.org", ports=443, sni=True)
    steps = [
        ("udp", "example.org", 443, "quic"),
        ("ask", DNS, "example.org", "HTTPS"),
        ("ask", DNS, "example.org", "SVCB"),
    ]
    async with world.network(driver) as net:
        assert (await world.tries(net, *steps))[0] == "quic"
    assert ("udp", "example.org", "HTTPS") in world.asked
    world.forget()
    async with world.network(driver, policy=policy) as net:
        outcomes = await world.tries(net, *steps, ("tls", "example.org", 443, "example.org"))
    assert outcomes == ["ECONNREFUSED", "NOERROR", "NOERROR", "heard"]
    assert {kind for _, _, kind in world.asked} == {"A", "AAAA"}
    assert world.strays(*ALLOWED) == []


@on_each
@in_world
async def test_what_a_rule_by_the_first_bytes_does_not_see(world: World, driver: str) -> None:
    """What docs/security.md says of it: later requests of a connection, and names in a name that is allowed."""
    policy = Policy.deny().allow("example.org", "*.example.org", ports=80, host=True)
    async with world.network(driver, policy=policy) as net:
        steps = [
            ("http", "example.org", 80, ["example.org", "evil.example"]),
            ("ask", DNS, "secret.example.org"),
        ]
        assert await world.tries(net, *steps) == ["HTTP/1.1 200", "NXDOMAIN"]
    assert b"Host: evil.example" in said(world)
    assert "secret.example.org" in world.names_asked()


# -- changes and failures -----------------------------------------------------------------------------


@on_each_and_two_queues
@pytest.mark.parametrize("existing", ["cut", "keep"])
@in_world
async def test_flows_that_are_there_when_the_policy_changes(world: World, driver: str, existing: Any) -> None:
    open_to_it = POLICY.allow(EVIL)
    async with world.network(driver, policy=open_to_it) as net:
        held = [["held", EVIL, 443, 7777]]
        async with world.starts(net, *held) as program:
            assert await program.said() == ["before"] * 3
            await net.stack.set_policy(POLICY, existing=existing)
            world.forget()
            await program.goes_on()
            [[stream, datagrams, ping]] = await program.said()
        steps = [("tcp", EVIL, 443), ("udp", EVIL, 7777), ("ping", EVIL), WORKS]
        outcomes = await world.tries(net, *steps)
    assert outcomes == [PROHIBITED, PROHIBITED, "unreachable 13", "hello"], "of new ones none is allowed"
    if existing == "cut":
        assert (stream, datagrams, ping) == ("ECONNRESET", PROHIBITED, "unreachable 13")
        assert world.strays(*ALLOWED) == []
    else:
        assert (stream, datagrams) == ("after", "after")
        came = [each.payload for each in world.strays(*ALLOWED)]
        assert came.count(b"after") >= 2


@on_each_and_two_queues
@in_world
async def test_no_gap_opens_while_policies_change(world: World, driver: str) -> None:
    """A program tries all the time, while one policy that is against it follows the other."""
    policies = [
        Policy.deny(),
        POLICY,
        Policy.allow().deny(f"{EVIL}/32"),
        Policy.deny(refusal="reset").allow(WEB),
    ]
    async with world.network(driver, policy=POLICY) as net:
        async with world.starts(net, ["insists", EVIL, 443, 7777]) as program:
            await program.said()
            for number in itertools.count():
                existing: Any = ("keep", "cut")[number % 2]
                await net.stack.set_policy(policies[number % len(policies)], existing=existing)
                if number > 100 and (await net.stack.stats())["flows_refused"] > 100:
                    break
        await net.stack.set_policy(POLICY)
        assert await world.tries(net, WORKS) == ["hello"]
    assert world.strays(*ALLOWED) == []


@on_each_and_two_queues
@in_world
async def test_nothing_of_a_member_passes_once_its_policy_has_been_set(world: World, driver: str) -> None:
    """While policies are set and cleared a program tries by many flows, which all workers get."""
    policies = [
        Policy.deny(),
        POLICY,
        Policy.allow().deny(f"{EVIL}/32"),
        Policy.deny(refusal="reset").allow(WEB),
    ]
    refused: list[tuple[float, float]] = []
    queues, workers = int(driver.partition("-")[2] or 1), set[int]()
    async with (
        beside(world.keep_reading),
        world.network(driver) as net,
        net.member("free") as free,
        net.member("prober") as member,
    ):

        async def has_refused(count: int) -> bool:
            return (await net.stack.stats())["policy_refused"] >= count

        async with world.starts(member, ["probes", EVIL, 443, 7777]) as program:
            await program.said()
            for number in range(24):
                existing: Any = ("keep", "cut")[number % 2]
                await member.set_policy(policies[number % len(policies)], existing=existing)
                since, stats = time.monotonic(), await net.stack.stats()
                await eventually(partial(has_refused, stats["policy_refused"] + 20))
                refused.append((since, time.monotonic()))
                much = len(world.arrivals()) + 20
                await member.set_policy((None, Policy.allow())[number // 2 % 2])
                await eventually(partial(lambda much: len(world.arrivals()) >= much, much))
                workers.update((each.id - 1) % queues for each in await net.stack.flows())
            await program.goes_on(refused)
            [found] = await program.said()
        assert await world.tries(free, WORKS) == ["hello"]
    assert workers == set(range(queues))
    assert found["passed"] == []
    assert len(found["refused"]) > 100
    assert len(found["allowed"]) > 100
    said = b" ".join(each.payload for each in world.arrivals())
    assert [each for each in found["refused"] if each.encode() in said] == []
    assert all(each.encode() in said for each in found["allowed"])


@on_each
@in_world
async def test_a_policy_that_cannot_be_set_leaves_the_one_before(world: World, driver: str) -> None:
    bad: list[Any] = ["allow", object(), {"default": "allow"}, Policy]
    async with world.network(driver, policy=POLICY) as net:
        for policy in bad:
            with pytest.raises((TypeError, ValueError, NetnsKitError)):
                await net.stack.set_policy(policy)
        with pytest.raises((TypeError, ValueError)):
            await net.stack.set_policy(Policy.allow(), existing="perhaps")  # type: ignore[arg-type]  # what it must not be
        assert await world.tries(net, ("tcp", EVIL, 443), WORKS) == [PROHIBITED, "hello"]
    assert world.strays(*ALLOWED) == []
    world.forget()
    async with world.network(driver, uplink=Uplink(dns=[RESOLVER], policy=POLICY)) as net:
        assert await world.tries(net, ("tcp", EVIL, 443), WORKS) == [PROHIBITED, "hello"], (
            "it may be the uplink's"
        )
    assert world.strays(*ALLOWED) == []
    with pytest.raises(PolicyError, match="rule 2"):
        Policy.deny().allow("10.0.0.0/8").deny("10.1.0.0/16")
    with pytest.raises(TypeError):
        world.network(driver, policy="allow")


@on_each
@in_world
async def test_a_function_beside_the_policy_that_raises(world: World, driver: str) -> None:
    """Both must allow: what one of them cannot decide is refused, though the other allows all."""
    steps = [("tcp", WEB, 443), ("udp", EVIL, 7777), ("ping", EVIL), ("ask", ELSEWHERE, "example.org")]
    async with world.network(driver, policy=Policy.allow()) as net:
        assert (await world.tries(net, *steps))[:3] == ["hello"] * 3
    world.forget()
    for policy in (uplinks.fails, uplinks.answers_nonsense):
        uplink = Uplink(dns=[RESOLVER], policy=policy)
        async with world.network(driver, policy=Policy.allow(), uplink=uplink) as net:
            assert await world.tries(net, *steps) == [PROHIBITED, PROHIBITED, "unreachable 13", PROHIBITED]
    assert world.arrivals() == []


async def _raises(asked: object) -> bool:
    raise LookupError("a bug")


async def _nonsense(asked: object) -> Any:
    return "yes"


async def _nothing(asked: object) -> Any:
    return None


async def _sleeps(asked: object) -> bool:
    await anyio.sleep(SECONDS)
    return True


@on_each_and_two_queues
@in_world
async def test_a_function_that_is_asked_and_raises_sleeps_or_answers_nonsense(
    world: World, driver: str
) -> None:
    policy = POLICY.ask(EVIL)
    steps: list[Sequence[object]] = [("tcp", EVIL, 443), ("udp", EVIL, 7777)]

    async def yes(asked: object) -> bool:
        return True

    async with world.network(driver, policy=policy, on_flow=yes) as net:
        assert await world.tries(net, *steps) == ["hello", "hello"]
    world.forget()
    functions = [each for each in (_raises, _nonsense, _nothing, _sleeps) for _ in steps]

    async def each_in_turn(asked: object) -> Any:
        return await functions.pop(0)(asked)

    async with world.network(driver, policy=policy, on_flow=each_in_turn, on_flow_timeout=0.2) as net:
        tried = [*steps] * 4
        assert await world.tries(net, *tried, WORKS) == [*[PROHIBITED] * len(tried), "hello"]
    assert world.strays(*ALLOWED) == []


@pytest.mark.parametrize(("driver", "victim"), [("worker", 0), ("worker-2", 0), ("worker-2", 1)])
@in_world
async def test_a_worker_that_is_killed_while_flows_run(world: World, driver: str, victim: int) -> None:
    """Its flows end with it, others enforce what they did while they are there, and nothing takes their place."""
    net = world.network(driver, policy=POLICY)
    await net.open()
    try:
        assert await world.tries(net, WORKS) == ["hello"]
        async with world.starts(net, ["insists", EVIL, 443, 7777]) as program:
            assert await program.said() == [PROHIBITED, PROHIBITED]
            os.kill(net.stack.workers.processes[victim].pid, signal.SIGKILL)
            with pytest.raises(StackCrashed, match="SIGKILL"):
                await net.wait_closed()
    finally:
        with suppress(StackCrashed):
            await net.close()
    assert world.strays(*ALLOWED) == []
