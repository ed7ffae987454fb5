"""Flows through proxies: a stack of ours as the guest, and a proxy that behaves as it is told to."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import select
import socket
import threading
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import pytest

from netns_kit import (
    ChooserUplink,
    DnsSettings,
    Endpoint,
    FakeInternet,
    Flow,
    HttpConnectUplink,
    Socks5Uplink,
    Target,
    Uplink,
    choose,
)
from netns_kit.arguments import Address
from netns_kit.domain_names import to_wire
from netns_kit.errors import ArgumentError, ArgumentTypeError, NetnsKitError
from netns_kit.gateway.engine import Engine
from netns_kit.gateway.relay.associated import AssociatedRelay
from netns_kit.policy.policy import Policy
from netns_kit.stack import Closed, Refusal
from netns_kit.stack.wire import icmp, ip
from netns_kit.stack.wire.flow_key import FlowKey
from netns_kit.uplink import socks5
from netns_kit.uplink.dial import Connected, Refused
from netns_kit.uplink.flow import NamedFlow
from netns_kit.uplink.indirect import IndirectUplink
from netns_kit.uplink.socks5 import UDP_ASSOCIATE, Socks5Association, may_be_its_end, talk
from tests.support.bench import Bench, Make, Program
from tests.support.packets import GUEST, echo_request
from tests.support.proxies import Proxy

THERE = bytes((192, 0, 2, 1))
PORT = 443
KINDS: dict[str, Callable[..., IndirectUplink]] = {"socks": Socks5Uplink, "http": HttpConnectUplink}
both = pytest.mark.parametrize("kind", KINDS)


def until_over(bench: Bench, program: Program) -> None:
    bench.until(lambda: program.is_established or program.why)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


@both
@pytest.mark.parametrize("manner", ["fine", "dribbles", "early"])
def test_a_stream_through_a_proxy(make: Make, kind: str, manner: str) -> None:
    with Proxy(kind, manner) as proxy:
        bench = make(KINDS[kind](proxy.at))
        descriptors = bench.engine.descriptors
        program = bench.connect(THERE, PORT)
        bench.until(lambda: program.is_established)
        data = os.urandom(300_000)
        program.send(data)
        program.shutdown()
        bench.until(lambda: program.ended)
        early = b"220 hello\r\n" if manner == "early" else b""
        assert bytes(program.received) == early + data
        bench.until(lambda: program.why)
        assert program.why is Closed.NORMAL
        assert proxy.asked == [("tcp", "192.0.2.1", PORT)]
        bench.until(lambda: bench.engine.descriptors == descriptors)


@both
def test_a_destination_of_ipv6(make: Make, kind: str) -> None:
    address = ip_address("2001:db8::1")
    with Proxy(kind) as proxy:
        uplink = KINDS[kind](proxy.at)
        bench = make(uplink)
        there = Endpoint(address, PORT)
        dial = uplink.dial(
            Flow("tcp", Endpoint("fd00::100", 1), there, bench.gateway.subnet), Target((there,))
        )
        while not isinstance(dial, Connected):
            dial = dial.advance(failed=False)  # type: ignore[union-attr]  # it is not refused
        dial.socket.close()
        assert proxy.asked == [("tcp", "2001:db8::1", PORT)]


SOCKS_REPLIES = {1: 1, 2: 13, 3: 0, 4: 1, 5: None, 6: 1, 7: 13, 8: 0, 77: 1}
HTTP_STATUSES = {403: 13, 502: 1, 503: 1, 504: 1, 500: 1, 302: 1, 405: 13}
"""What the proxy says, and the code of ICMP "unreachable" that the guest is told; None: a reset."""


@pytest.mark.parametrize(
    ("kind", "reply", "code"),
    [("socks", *each) for each in SOCKS_REPLIES.items()]
    + [("http", *each) for each in HTTP_STATUSES.items()],
)
def test_what_the_proxy_refuses_is_refused_so(make: Make, kind: str, reply: int, code: int | None) -> None:
    with Proxy(kind, reply) as proxy:
        bench = make(KINDS[kind](proxy.at))
        descriptors = bench.engine.descriptors
        program = bench.connect(THERE, PORT)
        until_over(bench, program)
        bench.settle()
        assert not program.is_established
        assert codes(bench) == ([] if code is None else [code])
        if code is None:
            assert program.why is Closed.RESET
        bench.until(lambda: bench.engine.descriptors == descriptors)


def codes(bench: Bench) -> list[int]:
    """The codes of ICMP "destination unreachable" that the guest was told."""
    return [
        each.payload[1]
        for each in bench.answers()
        if each.protocol == ip.ICMP and each.payload[0] == icmp.UNREACHABLE
    ]


@both
@pytest.mark.parametrize("manner", ["hangs", "says nothing", "dies", "garbage", "too much", "no proxy"])
def test_a_proxy_that_does_not_do_its_work(
    make: Make, kind: str, manner: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Proxy(kind, manner) as proxy:
        if manner == "no proxy":
            proxy.__exit__()
        bench = make(KINDS[kind](proxy.at, time_limit=2.0))
        descriptors = bench.engine.descriptors
        for source in (40001, 40002):
            program = bench.connect(THERE, PORT, source)
            bench.settle()
            bench.ahead += 1.0
            if manner in ("hangs", "says nothing"):
                bench.settle()
                assert not program.why
                bench.ahead += 1.5
            until_over(bench, program)
            assert not program.is_established
            assert program.why is not None
        assert len(said(caplog)) == 1, "people are told once"
        assert "flows are refused" in said(caplog)[0]
        bench.settle()
        assert set(codes(bench)) == {1}
        bench.until(lambda: bench.engine.descriptors == descriptors)


@both
def test_a_proxy_that_dies_later_ends_the_stream_alone(make: Make, kind: str) -> None:
    with Proxy(kind, "dies later") as proxy:
        bench = make(KINDS[kind](proxy.at))
        descriptors = bench.engine.descriptors
        for source in (40001, 40002):
            program = bench.connect(THERE, PORT, source)
            bench.until(lambda: program.is_established)  # noqa: B023  # it is called at once
            program.send(b"something")
            bench.until(lambda: program.ended or program.why)  # noqa: B023
            program.shutdown()
            bench.until(lambda: program.why)  # noqa: B023
        bench.settle()
        bench.until(lambda: bench.engine.descriptors == descriptors)


@both
def test_a_password(make: Make, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with Proxy(kind, password=("me", "s3cr3t")) as proxy:
        for credentials in ((), ("me", "wr0ng")):
            bench = make(KINDS[kind](proxy.at, *credentials))
            program = bench.connect(THERE, PORT)
            until_over(bench, program)
            assert not program.is_established
            assert "password" in said(caplog)[-1]
        assert not proxy.asked
        uplink = KINDS[kind](proxy.at, "me", "s3cr3t")
        bench = make(uplink)
        program = bench.connect(THERE, PORT)
        bench.until(lambda: program.is_established)
        assert proxy.said[-1] == ("me", "s3cr3t")
        assert not any(each in text for each in ("s3cr3t", "wr0ng") for text in (caplog.text, repr(uplink)))


@both
@pytest.mark.parametrize(
    ("username", "password"),
    [("x" * 256, "y"), ("", "y"), ("s3cr3t\r\nX: y", "y"), ("x", "s3cr3t\0"), ("s3cr3t", None)],
)
def test_credentials_that_cannot_be_sent(kind: str, username: str, password: str | None) -> None:
    with pytest.raises(ArgumentError) as caught:
        KINDS[kind]("192.0.2.1:1080", username, password)
    assert "s3cr3t" not in str(caught.value)


@both
def test_a_guest_that_gives_up_leaves_no_dial_to_a_proxy(make: Make, kind: str) -> None:
    with Proxy(kind, "hangs") as proxy:
        bench = make(KINDS[kind](proxy.at, time_limit=2.0))
        descriptors = bench.engine.descriptors
        program = bench.connect(THERE, PORT)
        bench.settle()
        (flow,) = bench.gateway.flows()
        assert bench.gateway.end_flow(flow.id)
        bench.until(lambda: program.why)
        bench.until(lambda: bench.engine.descriptors == descriptors)
        bench.ahead += 3
        bench.settle()


@both
def test_the_hosts_loopback_is_no_matter_of_the_proxy(make: Make, kind: str) -> None:
    with Proxy(kind) as proxy:
        bench = make(KINDS[kind]("127.0.0.1:9", allow_host_loopback=True))
        program = bench.connect(bytes((10, 0, 2, 2)), int(proxy.at.rpartition(":")[2]))
        bench.until(lambda: program.is_established)


# -- datagrams and pings --------------------------------------------------------------------------------------


def test_datagrams_by_socks(make: Make) -> None:
    with Proxy("socks") as proxy:
        bench = make(Socks5Uplink(proxy.at))
        descriptors = bench.engine.descriptors
        mailbox, flow = bench.socket(THERE, PORT)
        for size in (1, 0, 1400):
            flow.send(bytes(range(256))[: size % 256] + bytes(size - size % 256), bench.now)
        bench.until(lambda: len(mailbox.received) == 3)
        assert [len(each) for each in mailbox.received] == [1, 0, 1400]
        other, second = bench.socket(bytes((192, 0, 2, 9)), PORT)
        second.send(b"abc", bench.now)
        bench.until(lambda: other.received)
        assert other.received == [b"cba"]
        assert [each for each in proxy.asked if each[0] == "udp"] == [("udp", "0.0.0.0", 0)], (
            "one for both flows"
        )
        assert bench.engine.descriptors == descriptors + 2
        proxy.drop_clients()
        bench.until(lambda: bench.engine.descriptors == descriptors)
        assert not bench.gateway.flows()
        flow.send(b"once more", bench.now)
        bench.until(lambda: len(mailbox.received) == 4)
        for each in bench.gateway.flows():
            bench.gateway.end_flow(each.id)
        bench.until(lambda: bench.engine.descriptors == descriptors)


THEIR_OWN = ["10.9.9.9", "127.0.0.9", "0.0.0.0", "169.254.169.254", "168.63.129.16", "fe80::1", "fec0::1"]
IN_DISGUISE = ["::ffff:127.0.0.9", "64:ff9b::7f00:9", "64:ff9b::a09:909", "2002:7f00:9::", "::127.0.0.9"]
MEANT_FOR_MANY = ["224.0.0.251", "239.1.2.3", "ff0e::1", "255.255.255.255"]


@pytest.mark.parametrize(
    "end",
    [*THEIR_OWN, *IN_DISGUISE, *MEANT_FOR_MANY],
)
def test_a_proxy_cannot_lead_datagrams_into_the_hosts_networks(make: Make, end: str) -> None:
    bound: list[tuple[Address | None, int]] = []
    said = talk(UDP_ASSOCIATE, ip_address("0.0.0.0"), 0, None, bound)
    next(said)
    for answer in b"", b"\5\0", b"", b"\5\0\0" + (b"\1" if "." in end else b"\4"), ip_address(end).packed:
        said.send(answer)
    with pytest.raises(StopIteration):
        said.send(b"\x12\x34")
    association = Socks5Association(Socks5Uplink("127.0.0.1"), lambda _: Refused(Refusal.DROP), None, bound)
    with association.open() as sock:
        assert sock.getpeername() == ("127.0.0.1", 0x1234)


def test_a_proxy_cannot_lead_datagrams_to_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where services listen that are bound to all of its addresses, unless the proxy is here itself."""
    ours = ip_address("8.8.4.4")
    monkeypatch.setattr(socks5, "is_host_address", lambda each: each in (ours, ip_address("127.0.0.1")))
    elsewhere = ip_address("8.8.8.8")
    assert not may_be_its_end(ours, elsewhere)
    assert not may_be_its_end(ip_address("64:ff9b::808:404"), elsewhere)
    assert may_be_its_end(ip_address("9.9.9.9"), elsewhere)
    assert may_be_its_end(ours, ip_address("127.0.0.1"))


def test_a_proxy_that_talks_without_end_on_the_stream_of_an_association_ends_it() -> None:
    reads, ended = [], []

    class Endless(socket.socket):
        def recv(self, size: int, flags: int = 0) -> bytes:
            reads.append(size)
            assert len(reads) < 100, "it is listened to without an end"
            return b"?" * size

    engine = Engine()
    try:
        association = Socks5Association(
            Socks5Uplink("127.0.0.1"), lambda _: Refused(Refusal.DROP), None, [(None, 9)]
        )
        relay = AssociatedRelay(engine, association, lambda _: Refused(Refusal.DROP), lambda: ended.append(1))
        relay.begin(Connected(Endless()))
        relay._on_events(select.EPOLLIN)
        assert ended
    finally:
        engine.close()


def test_a_head_without_an_end_costs_few_reads(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy must not hold up the engine by what it says."""
    reads, plain, here = [], socket.socket.recv, threading.get_ident()

    def counted(self: socket.socket, *arguments: int) -> bytes:
        if threading.get_ident() == here:
            reads.append(arguments)
        return plain(self, *arguments)

    with Proxy("http", "too much") as proxy:
        bench = make(HttpConnectUplink(proxy.at))
        monkeypatch.setattr(socket.socket, "recv", counted)
        until_over(bench, bench.connect(THERE, PORT))
        assert len(reads) < 200


@pytest.mark.parametrize("manner", ["hangs", "dies", 7])
def test_datagrams_that_a_proxy_does_not_take(make: Make, manner: str | int) -> None:
    with Proxy("socks", manner) as proxy:
        bench = make(Socks5Uplink(proxy.at, time_limit=2.0))
        descriptors = bench.engine.descriptors
        _, flow = bench.socket(THERE, PORT)
        flow.send(b"abc", bench.now)
        bench.settle()
        if manner == "hangs":
            assert bench.gateway.flows()
            bench.ahead += 2.5
        bench.until(lambda: not bench.gateway.flows())
        bench.settle()
        assert codes(bench) == [13 if manner == 7 else 1]
        bench.until(lambda: bench.engine.descriptors == descriptors)


@pytest.mark.parametrize("uplink", [HttpConnectUplink("192.0.2.7"), Socks5Uplink("192.0.2.7", udp=False)])
def test_datagrams_that_cannot_pass_are_refused(make: Make, uplink: IndirectUplink) -> None:
    bench = make(uplink)
    _, flow = bench.socket(THERE, PORT)
    flow.send(b"abc", bench.now)
    bench.settle()
    assert codes(bench) == [13]
    assert bench.gateway.router.refused == 1


@both
def test_pings_cannot_pass(make: Make, kind: str) -> None:
    bench = make(KINDS[kind]("192.0.2.7"))
    bench.inject(echo_request(THERE))
    bench.settle()
    assert codes(bench) == [13]


# -- names ----------------------------------------------------------------------------------------------------


def answer_with(bench: Bench, name: str, address: bytes = THERE) -> None:
    """Let our DNS have answered with the address."""
    bench.gateway.router.name_of = lambda asked: name if asked == address else None


def asked_for(make: Make, kind: str, name: str, *, policy: Policy | None = None, **options: str) -> str:
    with Proxy(kind) as proxy:
        bench = make(KINDS[kind](proxy.at, **options))
        answer_with(bench, name)
        if policy is not None:
            bench.gateway.enforcer.set(policy)
            assert bench.gateway.enforcer.pins is not None
            bench.gateway.enforcer.pins.add(to_wire(name), THERE, bench.now + 60)
        program = bench.connect(THERE, PORT)
        bench.until(lambda: program.is_established)
        ((_, host, _),) = proxy.asked
        return host


@both
def test_the_proxy_is_told_the_name(make: Make, kind: str) -> None:
    assert asked_for(make, kind, "www.example.org") == "www.example.org"
    assert asked_for(make, kind, "www.example.org", names="here") == "192.0.2.1"


@both
@pytest.mark.parametrize(
    "name",
    [
        "127.0.0.1",
        "a.0x7f",
        "1.2",
        "localhost",
        "x.localhost",
        "intranet",
        "a b.example",
        "a\\013\\010.example",
        ".",
    ],
)
def test_what_a_proxy_might_take_for_something_else_is_not_told(make: Make, kind: str, name: str) -> None:
    assert asked_for(make, kind, name) == "192.0.2.1"


@both
def test_a_policy_has_decided_about_what_the_proxy_is_told(make: Make, kind: str) -> None:
    by_name = Policy.deny().allow("*.example.org")
    by_address = Policy.deny().allow("192.0.2.0/24")
    assert asked_for(make, kind, "www.example.org", policy=by_name) == "www.example.org"
    assert asked_for(make, kind, "www.example.org", policy=by_address) == "192.0.2.1"
    assert asked_for(make, kind, "www.example.org", policy=Policy.allow()) == "192.0.2.1"


def test_a_policy_decides_once_about_where_a_handler_goes(make: Make) -> None:
    bench = make(Socks5Uplink("127.0.0.1:9"))
    answer_with(bench, "www.example.org")
    enforcer = bench.gateway.enforcer
    enforcer.set(Policy.deny().allow("*.example.org"))
    enforcer.pins.add(to_wire("www.example.org"), THERE, bench.now + 60)
    found = bench.gateway.router.route("tcp", FlowKey(GUEST, THERE, 40000, PORT).pack())
    assert isinstance(found, tuple)
    assert isinstance(found[0], NamedFlow)
    assert found[0].may_be_told
    assert list(enforcer.hits.values()) == [1]


@both
def test_what_the_policy_refuses_is_not_told_at_all(make: Make, kind: str) -> None:
    with Proxy(kind) as proxy:
        bench = make(KINDS[kind](proxy.at))
        bench.gateway.enforcer.set(Policy.deny())
        program = bench.connect(THERE, PORT)
        bench.until(lambda: program.why)
        assert not proxy.asked


# -- choosing -------------------------------------------------------------------------------------------------


def test_a_rule_chooses_the_way(make: Make) -> None:
    with Proxy("socks") as first, Proxy("http") as second:
        uplink = ChooserUplink(
            [
                ("*.example.org", Socks5Uplink(first.at)),
                (["198.51.100.0/24", "another.example"], None),
                (choose("203.0.113.0/24", ports=25, protocol="tcp"), Socks5Uplink(first.at)),
                ("203.0.113.0/24", HttpConnectUplink(second.at)),
                ("203.0.0.0/16", None),
            ],
            HttpConnectUplink(second.at),
        )
        for made in uplink, pickle.loads(pickle.dumps(uplink)):
            bench = make(made)
            chosen = [
                (THERE, PORT, "www.example.org", first),
                (THERE, PORT, "else.example", second),
                (bytes((203, 0, 113, 1)), 25, None, first),
                (bytes((203, 0, 113, 1)), 26, None, second),
                (bytes((192, 0, 2, 9)), PORT, None, second),
            ]
            for number, (address, port, name, proxy) in enumerate(chosen):
                bench.gateway.router.name_of = lambda _: name  # noqa: B023  # it is called in this round
                program = bench.connect(address, port, 41000 + number)
                bench.until(lambda: program.is_established)  # noqa: B023
                assert proxy.asked.pop() == ("tcp", name or str(ip_address(address)), port)
                assert not first.asked + second.asked
            _, flow = bench.socket(bytes((203, 0, 113, 1)), 25)
            flow.send(b"abc", bench.now)
            bench.settle()
            assert codes(bench) == [13], "HTTP takes none"


def test_what_goes_by_the_host_goes_by_the_chooser(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    uplink = ChooserUplink([("198.51.100.0/24", None)], HttpConnectUplink("192.0.2.7"))
    opened: list[tuple[str, str]] = []

    def note(self: Uplink, protocol: str, target: object, port: int = 0) -> socket.socket:
        opened.append((protocol, str(target)))
        raise OSError(errno.ENETUNREACH, "no")

    monkeypatch.setattr(Uplink, "open", note)
    bench = make(uplink)
    there = bytes((198, 51, 100, 1))
    bench.connect(there, PORT)
    bench.socket(there, PORT)[1].send(b"abc", bench.now)
    bench.inject(echo_request(there))
    bench.settle()
    assert opened == [("tcp", "198.51.100.1"), ("udp", "198.51.100.1"), ("icmp", "198.51.100.1")]


@pytest.mark.parametrize(
    "rules",
    [
        [("10.0.0.0/8", Uplink())],
        [("10.0.0.0/8",)],
        [("10.0.0.1/8", None)],
        [("10.0.0.0/8", Socks5Uplink("192.0.2.7", policy=Policy.deny()))],
        [("10.0.0.0/8", Socks5Uplink("192.0.2.7", dns=[]))],
        [("10.0.0.0/8", None), ("10.1.0.0/16", Socks5Uplink("192.0.2.7"))],
    ],
)
def test_rules_that_cannot_choose(rules: Any) -> None:
    with pytest.raises(NetnsKitError):
        ChooserUplink(rules)


# -- resolvers ------------------------------------------------------------------------------------------------

RESOLVER = "198.51.100.53"


def ask(bench: Bench, name: str = "www.example.org") -> None:
    query = bytes.fromhex("123401000001000000000000") + to_wire(name) + bytes.fromhex("00010001")
    _, flow = bench.socket(bytes((10, 0, 2, 3)), 53, 42000)
    flow.send(query, bench.now)


@both
@pytest.mark.parametrize("domains", [{}, {"example.org": ["198.51.100.54"]}])
def test_resolvers_are_asked_through_the_proxy_over_tcp(
    make: Make, kind: str, domains: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    really = Uplink.open

    def note(self: Uplink, protocol: Any, target: Any, port: int = 0) -> socket.socket:
        opened.append(f"{protocol} {target}")
        return really(self, protocol, target, port)

    monkeypatch.setattr(Uplink, "open", note)
    with Proxy(kind) as proxy:
        bench = make(KINDS[kind](proxy.at, dns=DnsSettings([RESOLVER], domains=domains)))
        ask(bench)
        bench.until(lambda: proxy.asked)
        resolver = "198.51.100.54" if domains else RESOLVER
        assert proxy.asked == [("tcp", resolver, 53)]
        assert set(opened) == {"tcp 127.0.0.1"}, "nothing by another way"


@both
def test_a_resolver_of_the_loopback_is_not_asked_unless_the_host_may(
    make: Make, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Proxy(kind) as proxy, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
        resolver.bind(("127.0.0.1", 0))
        resolver.setblocking(False)
        there = "127.0.0.1:" + str(resolver.getsockname()[1])
        bench = make(KINDS[kind](proxy.at, dns=[there]))
        ask(bench)
        bench.until(lambda: said(caplog))
        assert "names are not resolved" in said(caplog)[0]
        assert not proxy.asked
        with pytest.raises(BlockingIOError):
            resolver.recv(512)
        bench = make(KINDS[kind](proxy.at, dns=[there], resolvers="host"))
        ask(bench)
        bench.until(lambda: select.select([resolver], [], [], 0)[0])
        assert b"\3www\7example" in resolver.recv(512)


def test_a_fake_internet_is_no_way_of_a_chooser() -> None:
    with pytest.raises(ArgumentTypeError, match="serve_tcp"):
        ChooserUplink([("*.test", FakeInternet())])  # type: ignore[list-item]  # it is the test
