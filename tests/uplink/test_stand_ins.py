"""Names that a proxy resolves: programs get addresses that stand for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network, ip_address

import pytest

from netns_kit import ChooserUplink, DnsSettings, HttpConnectUplink, Policy, Record, Socks5Uplink, choose
from netns_kit.child.codec import dump
from netns_kit.dns.message import NXDOMAIN, RCODE, SERVFAIL, TYPES
from netns_kit.dns.stand_ins import NETWORK, TTL
from netns_kit.domain_names import to_wire
from netns_kit.gateway import stand_in_names
from netns_kit.gateway.worker_links import connect
from netns_kit.stack.wire import icmp, ip
from netns_kit.uplink.indirect import IndirectUplink
from tests.support.bench import Bench, Make
from tests.support.packets import GUEST, GUEST_MAC, RESOLVER, echo_request
from tests.support.proxies import Proxy

PORT = 443
KINDS: dict[str, Callable[..., IndirectUplink]] = {"socks": Socks5Uplink, "http": HttpConnectUplink}
both = pytest.mark.parametrize("kind", KINDS)
HEADER = bytes.fromhex("0001 0100 0001 0000 0000 0000")
NOT_IMPLEMENTED = 4
OTHER = bytes((*GUEST[:3], GUEST[3] + 1))
_sources = iter(range(30000, 60000))


def ask(bench: Bench, name: str, kind: str = "A", client: bytes = GUEST) -> tuple[int, list[bytes]]:
    """Ask our DNS, and return the result code and the data of the records."""
    mailbox, flow = bench.socket(RESOLVER, 53, next(_sources), client)
    question = to_wire(name) + TYPES[kind].to_bytes(2, "big") + b"\0\1"
    flow.send(HEADER + question, bench.now)
    bench.until(lambda: mailbox.received)
    message, found = mailbox.received[0], []
    at = len(HEADER) + len(question)
    for _ in range(int.from_bytes(message[6:8], "big")):
        at += 12  # a pointer, type, class, TTL, length
        size = int.from_bytes(message[at - 2 : at], "big")
        found.append(message[at : at + size])
        at += size
    return message[3] & RCODE, found


def address_of(bench: Bench, name: str) -> bytes:
    rcode, (found,) = ask(bench, name)
    assert rcode == 0
    assert ip_address(found) in NETWORK
    return found


def connects(bench: Bench, address: bytes, port: int = PORT) -> bool:
    program = bench.connect(address, port, next(_sources))
    bench.frames.clear()
    bench.until(
        lambda: program.is_established or program.why or any(each[23] == ip.ICMP for each in bench.frames)
    )
    return program.is_established


@both
def test_a_name_is_resolved_by_the_proxy_alone(make: Make, kind: str) -> None:
    with Proxy(kind) as proxy:
        bench = make(KINDS[kind](proxy.at))
        address = address_of(bench, "www.Example.org")
        assert not proxy.asked, "nobody was asked"
        program = bench.connect(address, PORT)
        bench.until(lambda: program.is_established)
        assert proxy.asked == [("tcp", "www.example.org", PORT)]
        assert [each.name for each in bench.gateway.flows() if each.protocol == "tcp"] == ["www.example.org"]
        assert address_of(bench, "www.example.org") == address


def test_what_is_answered_of_a_name(make: Make) -> None:
    bench = make(Socks5Uplink("127.0.0.1:9"))
    address = address_of(bench, "www.example.org")
    for kind in "AAAA", "HTTPS", "SVCB":
        assert ask(bench, "www.example.org", kind) == (0, [])
    for kind in "MX", "TXT", "SRV", "NS":
        assert ask(bench, "www.example.org", kind) == (NOT_IMPLEMENTED, [])
    reverse = ip_address(address).reverse_pointer
    assert ask(bench, reverse, "PTR") == (0, [to_wire("www.example.org")])
    for other in "1.2.0.192.in-addr.arpa", "9.9.19.198.in-addr.arpa":
        assert ask(bench, other, "PTR") == (NXDOMAIN, [])
    for name in "intranet", "localhost", "x.localhost", "127.1", "a.0x7f", ".":
        assert ask(bench, name) == (NXDOMAIN, []), "a proxy might take it for something else"
    bench.gateway.zone.add(Record("ours.example", "192.0.2.7"))
    assert ask(bench, "ours.example") == (0, [bytes((192, 0, 2, 7))])
    bench.gateway.zone.add(Record("alias.example", type="CNAME", value="www.example.org"))
    assert ask(bench, "alias.example")[1][-1] == address


def test_an_address_that_stands_for_no_name_leads_nowhere(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with Proxy("socks") as proxy:
        bench = make(Socks5Uplink(proxy.at))
        address = address_of(bench, "www.example.org")
        assert not connects(bench, bytes((198, 19, 3, 3)))
        assert not connects(bench, bytes((*address[:3], address[3] + 1)))
        bench.frames.clear()
        bench.inject(echo_request(address))
        bench.settle()
        assert [each.payload[0] for each in bench.answers() if each.protocol == ip.ICMP] == [icmp.UNREACHABLE]
        assert not proxy.asked
        assert not caplog.records, "it is as any other flow that is refused"


def test_datagrams_to_a_name(make: Make) -> None:
    """Each name has an association of its own, so that its answers are known."""
    with Proxy("socks") as proxy:
        bench = make(Socks5Uplink(proxy.at))
        mailboxes = []
        for name in "a.example", "b.example":
            mailbox, flow = bench.socket(address_of(bench, name), PORT)
            flow.send(name.encode(), bench.now)
            mailboxes.append(mailbox)
        bench.until(lambda: all(each.received for each in mailboxes))
        bench.settle()
        assert [each.received for each in mailboxes] == [[b"elpmaxe.a"], [b"elpmaxe.b"]]
        assert sorted(each[1] for each in proxy.asked if each[0] == "datagram") == ["a.example", "b.example"]


@both
def test_a_policy_by_name_sees_the_name(make: Make, kind: str) -> None:
    with Proxy(kind) as proxy:
        bench = make(KINDS[kind](proxy.at))
        before = address_of(bench, "other.example")
        policy = Policy.deny().deny("PRIVATE").allow("www.example.org", ports=PORT)
        bench.gateway.set_policy(dump(policy).decode(), "keep")
        assert ask(bench, "other.example") == (NXDOMAIN, [])
        assert not connects(bench, before), "it was asked for before"
        address = address_of(bench, "www.example.org")
        assert not connects(bench, address, 80)
        assert connects(bench, address)
        assert proxy.asked == [("tcp", "www.example.org", PORT)]


def test_a_rule_about_addresses_has_a_say_in_the_address(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A name that no rule is about is resolved as without stand-ins: here by nobody."""
    with Proxy("socks") as proxy:
        bench = make(Socks5Uplink(proxy.at, dns=DnsSettings(resolv_conf="/nowhere")))
        address = address_of(bench, "www.example.org")
        bench.gateway.set_policy(dump(Policy.allow().deny("PRIVATE")).decode(), "keep")
        assert ask(bench, "www.example.org")[1] == []
        assert not connects(bench, address)
        assert not [each for each in proxy.asked if each[2] == PORT]
        assert not [each for each in caplog.records if each.exc_info], (
            "it is as any other flow that is refused"
        )


@pytest.mark.parametrize(
    "options",
    [
        {"resolvers": "proxy"},
        {"resolvers": "host"},
        {"names": "here"},
        {"dns": []},
        {"policy": lambda _: None},
    ],
)
def test_who_has_chosen_otherwise_has_no_stand_ins(options: dict[str, object]) -> None:
    assert Socks5Uplink("127.0.0.1:9").stands_in
    assert not Socks5Uplink("127.0.0.1:9", **options).stands_in  # type: ignore[arg-type]  # as they come


def test_each_name_has_an_address_so_none_is_looked_for_in_other_domains() -> None:
    made = Socks5Uplink("127.0.0.1:9")
    assert made.search() == (".",)
    assert Socks5Uplink("127.0.0.1:9", dns=DnsSettings(search=["corp.example"])).search() == ("corp.example",)


def test_a_chooser_has_stand_ins_for_what_goes_to_a_proxy(make: Make) -> None:
    with Proxy("socks") as proxy, Proxy("http") as other:
        uplink = ChooserUplink(
            [
                ("*.corp.example", None),
                (choose("mixed.example", ports=25), None),
                ("10.0.0.0/8", None),
                ("*.test", HttpConnectUplink(other.at)),
                ("*.here.example", Socks5Uplink(proxy.at, resolvers="proxy")),
            ],
            Socks5Uplink(proxy.at),
            dns=DnsSettings(resolv_conf="/nowhere"),
        )
        bench = make(uplink)
        names = {"a.corp.example": False, "mixed.example": False, "www.here.example": False, "www.test": True}
        assert {each: uplink.stands_for(each) for each in names} == names
        ported = ChooserUplink([(choose("a.example", ports=PORT), Socks5Uplink(proxy.at))])
        assert not ported.stands_for("a.example"), "its other ports are reached without a proxy"
        assert connects(bench, address_of(bench, "www.test"))
        assert connects(bench, address_of(bench, "www.example.org"))
        assert (other.asked, proxy.asked) == (
            [("tcp", "www.test", PORT)],
            [("tcp", "www.example.org", PORT)],
        )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen addresses, of which eight stand for names."""
    monkeypatch.setattr(stand_in_names, "NETWORK", IPv4Network("198.18.0.0/28"))


@pytest.mark.usefixtures("small")
def test_a_client_that_asks_for_too_many_names_is_told_and_no_other(make: Make) -> None:
    bench = make(Socks5Uplink("127.0.0.1:9"))
    bench.stop_the_clock()
    assert [ask(bench, f"n{number}.example")[0] for number in range(6)] == [0] * 4 + [SERVFAIL] * 2
    assert ask(bench, "n3.example")[0] == 0, "it has that one"
    bench.gateway.stack.link.learn(OTHER, GUEST_MAC)
    assert ask(bench, "another.example", client=OTHER)[0] == 0
    bench.ahead += 2 * TTL
    assert ask(bench, "n5.example")[0] == 0


@pytest.fixture
def benches() -> Iterator[tuple[Proxy, list[Bench]]]:
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy("socks"))
        found = []
        for peers in connect(2, stack):
            bench = Bench(Socks5Uplink(proxy.at), peers=peers)
            stack.callback(bench.close)
            bench.gateway.stack.link.learn(GUEST, GUEST_MAC)
            found.append(bench)
        yield proxy, found


@pytest.mark.usefixtures("leaks")
def test_what_one_worker_has_given_the_other_knows(benches: tuple[Proxy, list[Bench]]) -> None:
    proxy, (first, second) = benches
    second.settle()  # so that it knows the time
    address = address_of(first, "www.example.org")
    program = second.connect(address, PORT)
    second.gateway._pump.read_frames(8)  # the SYN, although its inbox of pins was not looked at
    second.until(lambda: program.is_established)
    assert proxy.asked == [("tcp", "www.example.org", PORT)]
    assert not connects(second, bytes((198, 19, 0, 9)))


@pytest.mark.usefixtures("leaks", "small")
def test_an_address_that_flows_of_another_worker_lead_to_is_given_to_no_other_name(
    benches: tuple[Proxy, list[Bench]],
) -> None:
    proxy, (first, second) = benches
    address = address_of(first, "www.example.org")
    assert connects(second, address)
    for number in range(30):
        for each in benches[1]:
            each.ahead += TTL / 3
            each.settle()
        ask(first, f"n{number}.example")
    assert ask(first, ip_address(address).reverse_pointer, "PTR") == (0, [to_wire("www.example.org")])
    assert connects(second, address)
    assert [each[1] for each in proxy.asked] == 2 * ["www.example.org"]
    second.gateway.end_flows_of((IPv4Address(GUEST),))
    for _ in range(30):
        second.ahead += TTL
        second.settle()
    standing = second.gateway._standing
    assert standing is not None
    assert standing.timer_at == math.inf, "it looks for flows no more"


@pytest.mark.usefixtures("leaks", "small")
def test_a_worker_that_knows_an_address_from_before_learns_whose_it_is_now(
    benches: tuple[Proxy, list[Bench]],
) -> None:
    proxy, (first, second) = benches
    address = address_of(first, "www.example.org")
    second.settle()
    assert connects(second, address)
    second.gateway.end_flows_of((IPv4Address(GUEST),))
    for number in range(30):
        for each in benches[1]:
            each.ahead += 2 * TTL
        second.settle()
        name = f"n{number}.example"
        if address_of(first, name) == address:
            break
    program = second.connect(address, PORT, next(_sources))
    second.gateway._pump.read_frames(8)  # the SYN, although its inbox of pins was not looked at
    second.until(lambda: program.is_established)
    assert [each[1] for each in proxy.asked] == ["www.example.org", name]
