"""The policy at flows: who is refused and how, whose first bytes are looked at, and what a new policy ends."""

from __future__ import annotations

import gc
import logging
import os
import socket
import tracemalloc
from collections.abc import Iterator, Mapping
from functools import partial
from ipaddress import ip_address
from typing import Literal, get_args

import pytest

from netns_kit.child.codec import DecodeError, dump
from netns_kit.dns import Record
from netns_kit.domain_names import to_wire
from netns_kit.gateway.enforcer import ruling_of
from netns_kit.gateway.relay import PingRelay, TcpRelay, UdpRelay, forbidden, peek
from netns_kit.gateway.relay.peek import PeekingRelay
from netns_kit.policy.first_bytes import FIRST_BYTES_MAX
from netns_kit.policy.pins import NAMES_MAX
from netns_kit.policy.policy import Policy
from netns_kit.policy.rules import RefusalName
from netns_kit.stack import AnyFlow, Closed, Limits, Refusal, Transport
from netns_kit.stack.wire import flow_key, icmp, ip
from netns_kit.uplink.dial import Dial
from netns_kit.uplink.flow import Endpoint, Target
from tests.support.bench import Bench, Make, Program, readable
from tests.support.hellos import ACCESS_DENIED, client_hello
from tests.support.packets import GATEWAY, GUEST, PORT, RESOLVER, datagram, echo_request
from tests.support.told import Told

pytestmark = pytest.mark.usefixtures("leaks")

FAR, ELSEWHERE = bytes((192, 0, 2, 1)), bytes((198, 51, 100, 1))
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)
REQUEST = b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"
BY_NAME = Policy.deny().allow("example.org", name="web")
LOOKS = Policy.deny().allow("example.org", sni=True, host=True, name="web")


@pytest.fixture
def uplink(leaks: None) -> Iterator[Told]:
    uplink = Told()
    yield uplink
    for peer in uplink.peers:
        peer.close()


@pytest.fixture
def bench(make: Make, uplink: Told) -> Bench:
    bench = make(uplink)
    bench.stop_the_clock()
    return bench


def govern(bench: Bench, policy: Policy | None, **pinned: bytes) -> None:
    """Let that policy decide, and DNS have given these addresses for these names (with _ for .)."""
    bench.gateway.enforcer.set(policy)
    pins = bench.gateway.enforcer.pins
    for name, address in pinned.items():
        pins.add(to_wire(name.replace("_", ".")), address, bench.now + 100)


def flows(bench: Bench, transport: Transport) -> Mapping[bytes, AnyFlow]:
    stack = bench.gateway.stack
    found: dict[str, Mapping[bytes, AnyFlow]] = {"tcp": stack.tcp, "udp": stack.udp, "icmp": stack.echo}
    return found[transport]


def begin(bench: Bench, transport: Transport, address: bytes = FAR) -> Program | None:
    """The guest opens a flow."""
    if transport == "tcp":
        return bench.connect(address, 80)
    bench.inject(datagram(address, 80) if transport == "udp" else echo_request(address))
    return None


def told(bench: Bench) -> list[int | str]:
    """What the guest is told: the code of "unreachable", or "reset"."""
    bench.settle()
    found: list[int | str] = []
    for answer in bench.answers():
        if answer.protocol == ip.TCP:
            found += ["reset"] if answer.payload[13] & 4 else []
        elif (message := icmp.parse(answer.payload)).type == icmp.UNREACHABLE:
            found.append(message.code)
    return found


# -- who decides --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("transport", "relay"), [("tcp", TcpRelay), ("udp", UdpRelay), ("icmp", PingRelay)])
def test_what_a_rule_allows_is_carried_and_has_its_ruling(
    bench: Bench, uplink: Told, transport: Transport, relay: type
) -> None:
    govern(bench, BY_NAME, example_org=FAR)
    begin(bench, transport)
    bench.settle()
    [flow] = flows(bench, transport).values()
    assert type(flow.user) is relay
    ruling = ruling_of(flow)
    assert ruling is not None
    assert (ruling.action, ruling.name, ruling.rule) == ("allow", "example.org", BY_NAME.label(0))
    assert "web" in str(ruling.rule)
    assert bench.gateway.stats()["policy_refused"] == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_a_policy_a_flow_has_no_ruling(bench: Bench, transport: Transport) -> None:
    begin(bench, transport)
    bench.settle()
    [flow] = flows(bench, transport).values()
    assert ruling_of(flow) is None


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("refusal", get_args(RefusalName))
def test_a_rule_says_how_a_flow_is_refused(
    bench: Bench, uplink: Told, transport: Transport, refusal: RefusalName
) -> None:
    govern(bench, Policy.allow().deny("192.0.2.0/24", refusal=refusal, name="no"))
    begin(bench, transport)
    expected: Mapping[RefusalName, list[int | str]] = {
        "prohibited": [icmp.PROHIBITED],
        "reset": ["reset" if transport == "tcp" else icmp.PORT],
        "silence": [],
        "forbidden": [] if transport == "tcp" else [icmp.PROHIBITED],
    }
    assert told(bench) == expected[refusal]
    assert uplink.opened == []
    assert bench.gateway.stats()["policy_refused"] == bench.gateway.router.refused == 1
    if refusal != "forbidden" or transport != "tcp":
        assert bench.gateway.flows() == ()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_default_says_how_too(bench: Bench, transport: Transport) -> None:
    govern(bench, Policy.deny(refusal="reset"))
    begin(bench, transport)
    assert told(bench) == ["reset" if transport == "tcp" else icmp.PORT]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_name_lets_its_addresses_pass_for_its_time(bench: Bench, transport: Transport) -> None:
    govern(bench, BY_NAME)
    begin(bench, transport)
    assert told(bench) == [icmp.PROHIBITED], "nobody has asked for the name"
    govern(bench, BY_NAME, example_org=ELSEWHERE, other_example=FAR)
    begin(bench, transport)
    assert told(bench) == [icmp.PROHIBITED], "it has another address"
    govern(bench, BY_NAME, example_org=FAR)
    bench.ahead += 101
    begin(bench, transport)
    assert told(bench) == [icmp.PROHIBITED], "its time is over"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_uplink_is_asked_first_and_both_must_allow(
    bench: Bench, uplink: Told, transport: Transport
) -> None:
    govern(bench, Policy.deny(refusal="reset"))
    uplink.said = Refusal.HOST_UNREACHABLE
    begin(bench, transport)
    assert told(bench) == [icmp.HOST]
    assert bench.gateway.stats()["policy_refused"] == 0
    uplink.said = Target(
        (Endpoint(ip_address(ELSEWHERE), 80),)
    )  # wherever it leads: the guest asked for another
    begin(bench, transport)
    assert told(bench) == ["reset" if transport == "tcp" else icmp.PORT]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_is_refused_takes_nobodys_place(
    bench: Bench, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flow that may not pass needs no descriptor, so that none is closed for it."""
    govern(bench, Policy.deny())
    monkeypatch.setattr(bench.gateway.router.admission, "admit", lambda _: pytest.fail("room is made"))
    begin(bench, transport)
    assert told(bench) == [icmp.PROHIBITED]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_in_audit_it_passes_and_is_counted(bench: Bench, uplink: Told, transport: Transport) -> None:
    govern(bench, Policy.deny(audit=True))
    begin(bench, transport)
    assert told(bench) == []
    [flow] = flows(bench, transport).values()
    ruling = ruling_of(flow)
    assert ruling is not None
    assert (ruling.action, ruling.audit, ruling.rule) == ("deny", True, Policy.deny().label(None))
    stats = bench.gateway.stats()
    assert (stats["policy_audited"], stats["policy_refused"], stats["flows_refused"]) == (1, 0, 0)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_policy_that_fails_refuses_even_in_audit_and_is_told_of_once(
    bench: Bench, transport: Transport, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = (
        Policy.allow(audit=True)
        .allow("192.0.2.2")
        .allow("192.0.2.3")
        .deny("HOST", name="mine")
        .deny("192.0.2.4")
    )
    govern(bench, policy)

    def fail(_: object) -> bool:
        raise LookupError("a bug")

    monkeypatch.setattr("netns_kit.gateway.enforcer.is_host_address", fail)
    for _ in range(2):
        begin(bench, transport)
        assert told(bench) == [icmp.PROHIBITED]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "rule 3 (mine): deny HOST failed to decide about" in record.getMessage()
    assert "192.0.2.1" in record.getMessage()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_interrupt_of_the_policy_is_the_programs(
    make: Make, uplink: Told, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(uplink)
    govern(bench, Policy.allow().deny("HOST"))

    pending = [KeyboardInterrupt()]

    def interrupt(_: object) -> bool:
        if pending:
            raise pending.pop()
        return False

    monkeypatch.setattr("netns_kit.gateway.enforcer.is_host_address", interrupt)
    begin(bench, transport)
    with pytest.raises(KeyboardInterrupt):
        bench.settle()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("address", [GATEWAY, bytes((127, 9, 9, 9))], ids=["the gateway", "its own"])
def test_the_host_is_the_gateway_and_what_is_the_hosts_own(
    bench: Bench, transport: Transport, address: bytes
) -> None:
    govern(bench, Policy.allow().deny("HOST"))
    names = flow_key.FlowKey(GUEST, address, PORT, 80)
    refused = bench.gateway.router.route(transport, names.pack())
    assert refused is Refusal.PROHIBITED
    assert not isinstance(bench.gateway.router.route(transport, names._replace(remote=FAR).pack()), Refusal)


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_our_dns_is_open_to_whom_everything_is_denied(bench: Bench, transport: Transport) -> None:
    """Names are decided one by one, at each query; so it is where queries to others are answered here."""
    bench.gateway.endpoints.redirect(53, (ip_address(RESOLVER),))
    govern(bench, Policy.deny())
    for address in (RESOLVER, FAR):
        if transport == "tcp":
            program = bench.connect(address, 53)
            bench.until(partial(getattr, program, "is_established"))
        else:
            bench.inject(datagram(address, 53))
        assert told(bench) == []
    assert len(flows(bench, transport)) == 2


def test_a_stranger_comes_in_only_where_the_guest_may_go_out(bench: Bench, uplink: Told) -> None:
    uplink.udp_filtering = "endpoint-independent"
    stranger = "127.0.0.1"
    govern(bench, Policy.deny().allow("192.0.2.1"))
    begin(bench, "udp")
    bench.settle()
    [relay] = bench.gateway.router._udp.values()
    uplink.said = Target((Endpoint(ip_address(stranger), 9),))
    guest = (GUEST, PORT, 4, False, None)
    bench.gateway.router._unsolicited(guest, relay, (stranger, 9))
    assert len(bench.gateway.stack.udp) == 1
    assert bench.gateway.stack.dropped["udp-filtered"] == 1
    govern(bench, Policy.deny().allow("192.0.2.1", "10.0.2.2"))
    bench.gateway.router._unsolicited(guest, relay, (stranger, 9))
    assert len(bench.gateway.stack.udp) == 2


def test_datagrams_that_leave_by_a_published_port_are_decided_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    govern(bench, Policy.deny())
    router = bench.gateway.router
    monkeypatch.setattr(router, "_leaves_by_published", lambda *_: pytest.fail("it leaves"))
    begin(bench, "udp")
    assert told(bench) == [icmp.PROHIBITED]


def test_before_a_refusal_the_pins_of_other_workers_are_read(bench: Bench) -> None:
    govern(bench, BY_NAME)
    enforcer = bench.gateway.enforcer
    asked: list[float] = []

    def catch_up() -> bool:
        asked.append(bench.now)
        govern(bench, BY_NAME, example_org=FAR)
        return True

    enforcer.catch_up = catch_up
    begin(bench, "tcp")
    assert told(bench) == []
    begin(bench, "udp")
    assert told(bench) == []
    assert len(asked) == 1, "not for what may pass"
    assert enforcer.refused == 0


def test_a_policy_that_cannot_be_set_leaves_the_old_one(bench: Bench) -> None:
    govern(bench, Policy.deny())

    class Bad:
        audit = False

        @property
        def index(self) -> object:
            raise LookupError("a bug")

    with pytest.raises(LookupError):
        bench.gateway.enforcer.set(Bad())  # type: ignore[arg-type]  # a bug of ours
    begin(bench, "tcp")
    assert told(bench) == [icmp.PROHIBITED]


# -- refused in words ---------------------------------------------------------------------------------

FORBIDS = Policy.deny(refusal="forbidden")


def forbidden_program(bench: Bench, source: int = PORT) -> Program:
    program = bench.connect(FAR, 80, source)
    bench.until(lambda: program.is_established)
    return program


def test_a_request_is_answered_403_without_leaving(bench: Bench, uplink: Told) -> None:
    govern(bench, Policy.allow().deny("192.0.2.0/24", refusal="forbidden", name="lab"))
    program = forbidden_program(bench)
    program.send(REQUEST[:20])
    bench.settle()
    assert program.received == b""
    program.send(REQUEST[20:])
    bench.until(lambda: program.ended)
    head, _, body = bytes(program.received).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 403 Forbidden"
    fields = dict(line.split(": ", 1) for line in lines[1:])
    assert fields["Content-Length"] == str(len(body))
    assert fields["Content-Type"] == "text/plain; charset=utf-8"
    assert fields["Connection"] == "close"
    label = bench.gateway.enforcer.policy.label(0) if bench.gateway.enforcer.policy else ""
    assert fields["X-Netns-Kit-Rule"] == label
    assert "192.0.2.1:80" in body.decode()
    assert label in body.decode()
    program.shutdown()
    bench.settle()
    bench.ahead += 1  # the guest owes an ACK
    bench.until(lambda: program.why is Closed.NORMAL)
    assert uplink.opened == []
    assert not bench.gateway.stack.tcp
    assert len(bench.gateway.router.forbidden or ()) == 0


def test_a_name_that_is_no_ascii_makes_no_header(bench: Bench) -> None:
    govern(bench, Policy.allow().deny("192.0.2.0/24", refusal="forbidden", name="Büro: ‘intern’"))
    program = forbidden_program(bench)
    program.send(REQUEST)
    bench.until(lambda: program.ended)
    head, _, body = bytes(program.received).partition(b"\r\n\r\n")
    assert b"B?ro: ?intern?" in head
    assert "Büro: ‘intern’" in body.decode()


def test_tls_gets_an_alert(bench: Bench) -> None:
    govern(bench, FORBIDS)
    program = forbidden_program(bench)
    program.send(client_hello("example.org"))
    bench.until(lambda: program.ended)
    assert program.received == ACCESS_DENIED


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.2\r\n", b"\0"])
def test_whatever_else_is_said_is_reset(bench: Bench, said: bytes) -> None:
    govern(bench, FORBIDS)
    program = forbidden_program(bench)
    program.send(said)
    bench.until(lambda: program.why is Closed.RESET)
    assert program.received == b""


def test_who_ends_without_a_word_is_reset(bench: Bench) -> None:
    govern(bench, FORBIDS)
    program = forbidden_program(bench)
    program.shutdown()
    bench.until(lambda: program.why is not None)
    assert not bench.gateway.stack.tcp


@pytest.mark.parametrize("said", [b"", REQUEST[:10], REQUEST])
def test_a_forbidden_connection_has_little_time(bench: Bench, said: bytes) -> None:
    """To say something, to go on with it, and to end when it was told."""
    govern(bench, FORBIDS)
    program = forbidden_program(bench)
    program.send(said)
    bench.settle()
    bench.ahead += (forbidden.LINGER if said == REQUEST else forbidden.SECONDS) - 0.1
    bench.settle()
    assert program.why is None
    bench.ahead += 0.2
    bench.until(lambda: program.why is Closed.RESET)


def test_of_too_many_forbidden_connections_the_oldest_is_reset(
    bench: Bench, uplink: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They say nothing, for ever: no more than so many are there at a time."""
    monkeypatch.setattr(forbidden, "FORBIDDEN_MAX", 8)
    govern(bench, FORBIDS)
    programs = [forbidden_program(bench, source) for source in range(2000, 2020)]
    bench.settle()
    assert [program.why for program in programs] == [Closed.RESET] * 12 + [None] * 8
    assert len(bench.gateway.stack.tcp) == 8
    assert bench.gateway.stack.dropped["limit-forbidden"] == 12
    assert uplink.opened == []


def test_a_forbidden_client_with_no_window_gets_its_answer_later(bench: Bench) -> None:
    govern(bench, FORBIDS)
    program = forbidden_program(bench)
    connection = program.connection
    assert connection is not None
    [ours] = bench.gateway.stack.tcp.values()
    ours.snd.wnd = ours.snd.wnd_max = 0
    program.send(REQUEST)
    bench.settle()
    bench.ahead += 1
    bench.until(lambda: program.ended)
    assert program.received.endswith(b"allow it.\n")


# -- looked at ----------------------------------------------------------------------------------------


def looked_at(bench: Bench, policy: Policy = LOOKS, source: int = PORT) -> tuple[Program, socket.socket]:
    """A connection of which no first byte has come, and its server's end."""
    govern(bench, policy, example_org=FAR, other_example=FAR)
    program = bench.connect(FAR, 80, source)
    bench.until(lambda: program.is_established)
    uplink = bench.uplink
    assert isinstance(uplink, Told)
    peer = uplink.peers[-1]
    peer.setblocking(False)
    return program, peer


def relay_of(bench: Bench) -> object:
    [connection] = bench.gateway.stack.tcp.values()
    return connection.user


def heard(peer: socket.socket, bench: Bench) -> bytes:
    bench.settle()
    return peer.recv(1 << 20)


FIRSTS = {"http": REQUEST, "tls": client_hello("example.org")}


@pytest.mark.parametrize("kind", FIRSTS)
@pytest.mark.parametrize("cuts", [1, 2, 7])
def test_the_first_bytes_go_on_and_then_nothing_looks(bench: Bench, kind: str, cuts: int) -> None:
    """In order, none twice, not before all of them are there; and then it is a relay like any other."""
    program, peer = looked_at(bench)
    assert isinstance(relay_of(bench), PeekingRelay)
    first = FIRSTS[kind]
    size = -(-len(first) // cuts)
    for start in range(0, len(first), size):
        assert not readable(peer)
        program.send(first[start : start + size])
        bench.settle()
    assert heard(peer, bench) == first
    assert type(relay_of(bench)) is TcpRelay
    [connection] = bench.gateway.stack.tcp.values()
    ruling = ruling_of(connection)
    assert ruling is not None
    assert (ruling.action, ruling.name, ruling.rule) == ("allow", "example.org", LOOKS.label(0))
    program.send(b"more")
    assert heard(peer, bench) == b"more"
    peer.send(b"answer")
    bench.until(lambda: program.received == b"answer")
    program.shutdown()
    assert heard(peer, bench) == b""
    peer.shutdown(socket.SHUT_WR)
    bench.until(lambda: program.ended)
    bench.ahead += 1  # the guest owes an ACK
    bench.until(lambda: not bench.gateway.stack.tcp)


def test_what_comes_behind_the_first_bytes_stays_behind_them(bench: Bench) -> None:
    program, peer = looked_at(bench)
    program.send(REQUEST + bytes(60_000) + b"end")
    program.shutdown()
    received = bytearray()
    bench.until(lambda: readable(peer))
    while len(received) < len(REQUEST) + 60_003:
        bench.until(lambda: readable(peer))
        received += peer.recv(1 << 20)
    assert received == REQUEST + bytes(60_000) + b"end"
    bench.until(lambda: readable(peer))
    assert peer.recv(1) == b""


def refused_after(program: Program, peer: socket.socket, bench: Bench) -> None:
    """Both ends are reset, and the server has not heard a byte."""
    bench.until(lambda: program.why is Closed.RESET)
    assert readable(peer)
    with pytest.raises(ConnectionResetError):
        raise ConnectionResetError if peer.recv(1) == b"" else AssertionError("it has heard something")
    assert not bench.gateway.stack.tcp
    assert bench.gateway.stats()["policy_refused"] == bench.gateway.router.refused == 1


@pytest.mark.parametrize(
    "first",
    [
        REQUEST.replace(b"example.org", b"other.example"),
        REQUEST.replace(b"example.org", b"third.example"),
        REQUEST.replace(b"Host", b"Most"),
        client_hello("other.example"),
        client_hello(None),
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
)
def test_another_name_and_no_name_are_refused(bench: Bench, first: bytes) -> None:
    program, peer = looked_at(bench)
    program.send(first)
    refused_after(program, peer, bench)


@pytest.mark.parametrize(
    ("policy", "first", "passes"),
    [
        (Policy.deny().allow("example.org", sni=True), FIRSTS["http"], False),
        (Policy.deny().allow("example.org", host=True), FIRSTS["tls"], False),
        (Policy.deny().allow("example.org", host=True), FIRSTS["http"], True),
        (
            Policy.deny().allow("example.org", sni=True).allow("other.example"),
            client_hello("other.example"),
            True,
        ),
        (Policy.deny().allow("example.org", sni=True).allow("192.0.2.1"), client_hello(None), True),
        (Policy.allow(audit=True).allow("example.org", sni=True).deny("192.0.2.1"), client_hello(None), True),
    ],
)
def test_the_kind_counts_and_then_the_other_rules(
    bench: Bench, policy: Policy, first: bytes, passes: bool
) -> None:
    program, peer = looked_at(bench, policy)
    program.send(first)
    if passes:
        assert heard(peer, bench) == first
    else:
        refused_after(program, peer, bench)


def test_a_name_that_our_dns_has_not_answered_with_this_address_counts_as_none(bench: Bench) -> None:
    policy = Policy.deny().allow("*.example.org", sni=True)
    govern(bench, policy, one_example_org=FAR, two_example_org=ELSEWHERE)
    program = bench.connect(FAR, 443)
    bench.until(lambda: program.is_established)
    program.send(client_hello("two.example.org"))
    bench.until(lambda: program.why is Closed.RESET)


@pytest.mark.parametrize(
    "first", [client_hello("bad.example"), b"GET / HTTP/1.1\r\nHost: bad.example\r\n\r\n"]
)
def test_a_flow_has_the_name_that_its_client_has_asked_for(bench: Bench, first: bytes) -> None:
    """It was refused because of this name, and not because of the one that our DNS has told."""
    bench.gateway.zone.add(Record("example.org", "192.0.2.1"))
    program, _ = looked_at(bench, Policy.deny(audit=True).allow("example.org", sni=True, host=True))
    [flow] = bench.gateway.flows()
    assert flow.name == "example.org"
    program.send(first)
    bench.settle()
    [flow] = bench.gateway.flows()
    assert (flow.name, flow.rule) == ("bad.example", "default: deny")


def test_a_flow_has_the_name_that_the_rule_is_about(bench: Bench) -> None:
    bench.gateway.zone.add(Record("first.example", "192.0.2.1"))
    bench.gateway.zone.add(Record("example.org", "192.0.2.1"))
    govern(bench, BY_NAME)
    bench.connect(FAR, 80)
    bench.settle()
    [flow] = bench.gateway.flows()
    assert flow.name == "example.org"


def test_names_without_number_of_one_address_cost_a_flow_no_more_than_a_few(bench: Bench) -> None:
    """As a wildcard of DNS has them; and whoever says its name is found among all of them."""
    govern(bench, Policy.deny().allow("*.example.org", sni=True), first_example_org=FAR)
    govern(bench, bench.gateway.enforcer.policy, **{f"n{n}_example_org": FAR for n in range(3 * NAMES_MAX)})
    program = bench.connect(FAR, 443)
    bench.until(lambda: program.is_established)
    [connection] = bench.gateway.stack.tcp.values()
    ruling = ruling_of(connection)
    assert ruling is not None
    assert len(ruling.names) == NAMES_MAX
    first = client_hello("first.example.org")
    program.send(first)
    assert isinstance(bench.uplink, Told)
    assert heard(bench.uplink.peers[-1], bench) == first


@pytest.mark.parametrize("said", [b"", REQUEST[:-1]])
def test_the_look_is_over_in_time(bench: Bench, said: bytes) -> None:
    program, peer = looked_at(bench)
    program.send(said)
    bench.settle()
    bench.ahead += peek.SECONDS - 0.1
    bench.settle()
    assert program.why is None
    bench.ahead += 0.2
    refused_after(program, peer, bench)


def test_a_guest_that_ends_before_is_refused(bench: Bench) -> None:
    program, peer = looked_at(bench)
    program.send(REQUEST[:-1])
    program.shutdown()
    bench.until(lambda: program.why is not None)
    assert peer.recv(1) == b""


def test_a_guest_that_ends_behind_its_first_bytes_has_them_delivered(bench: Bench) -> None:
    program, peer = looked_at(bench)
    program.send(REQUEST)
    program.shutdown()
    assert heard(peer, bench) == REQUEST
    bench.until(lambda: readable(peer))
    assert peer.recv(1) == b""
    peer.send(b"answer")
    peer.shutdown(socket.SHUT_WR)
    bench.until(lambda: program.ended)
    assert program.received == b"answer"


def test_more_than_is_looked_at_is_refused(bench: Bench) -> None:
    program, peer = looked_at(bench)
    program.send(b"GET / HTTP/1.1\r\nX: " + b"x" * FIRST_BYTES_MAX)
    refused_after(program, peer, bench)


def test_first_bytes_count_as_memory_as_long_as_they_are_looked_at(make: Make, uplink: Told) -> None:
    """When that is full no more are taken, of nobody."""
    bench = make(uplink, limits=Limits(tcp_memory=4 * FIRST_BYTES_MAX))
    bench.stop_the_clock()
    first, _ = looked_at(bench)
    first.send(REQUEST[:-2] + b"X: " + b"x" * (FIRST_BYTES_MAX // 2))
    bench.settle()
    assert bench.gateway.stats()["tcp_memory"] > FIRST_BYTES_MAX
    second, peer = looked_at(bench, source=PORT + 1)
    second.send(REQUEST[:-2] + b"X: " + b"x" * (FIRST_BYTES_MAX - 100))
    bench.settle()
    held = bench.gateway.stats()["tcp_memory"]
    assert held >= 4 * FIRST_BYTES_MAX
    second.send(b"\r\n\r\n")
    bench.settle()
    assert not readable(peer)
    first.abort()
    bench.settle()
    assert bench.gateway.stats()["tcp_memory"] < held - FIRST_BYTES_MAX
    while not readable(peer) and second.why is None:  # the rest is sent again
        bench.ahead += 0.5
        bench.settle()
    assert heard(peer, bench).endswith(b"\r\n\r\n")
    assert bench.gateway.stats()["tcp_memory"] < FIRST_BYTES_MAX


@pytest.mark.parametrize("policy", [LOOKS, Policy.deny(refusal="forbidden")])
def test_nothing_that_was_looked_at_stays_behind_its_connection(bench: Bench, policy: Policy) -> None:
    """Not for as long as it might have been looked at."""
    bad = REQUEST[:-2] + b"X: " + b"x" * (FIRST_BYTES_MAX - 100)
    tracemalloc.start()
    try:
        for number in range(40):
            if number == 20:
                before, _ = tracemalloc.get_traced_memory()
            govern(bench, policy, example_org=FAR)
            program = bench.connect(FAR, 80, PORT + number)
            bench.settle()
            assert program.is_established
            program.send(bad)
            bench.settle()
            program.abort()
            bench.settle()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not bench.gateway.stack.tcp
    assert after - before < 20 * FIRST_BYTES_MAX


def test_what_the_server_says_first_waits(bench: Bench) -> None:
    program, peer = looked_at(bench)
    peer.send(b"220 hello\r\n")
    bench.settle()
    assert program.received == b""
    program.send(REQUEST)
    bench.until(lambda: program.received == b"220 hello\r\n")
    assert heard(peer, bench) == REQUEST


def test_a_server_that_ends_first_has_what_it_said_delivered(bench: Bench) -> None:
    program, peer = looked_at(bench)
    peer.send(b"bye")
    peer.shutdown(socket.SHUT_WR)
    bench.settle()
    assert not program.received
    assert not program.ended
    program.send(REQUEST)
    bench.until(lambda: program.ended)
    assert program.received == b"bye"
    assert heard(peer, bench) == REQUEST


def test_in_audit_a_server_may_speak_first(bench: Bench) -> None:
    program, peer = looked_at(bench, Policy.deny(audit=True).allow("example.org", sni=True))
    peer.send(b"220 hello\r\n")
    bench.until(lambda: program.received == b"220 hello\r\n")
    assert type(relay_of(bench)) is TcpRelay
    stats = bench.gateway.stats()
    assert (stats["policy_audited"], stats["policy_refused"]) == (1, 0)


def test_a_server_that_has_gone_is_told_when_the_look_is_over(bench: Bench, uplink: Told) -> None:
    program, peer = looked_at(bench)
    peer.close()
    bench.settle()
    assert program.why is None
    program.send(REQUEST)
    bench.until(lambda: program.ended or program.why is not None)
    bench.until(lambda: program.why is not None or not bench.engine.timers or True)


def test_a_guest_that_resets_while_it_is_looked_at(bench: Bench) -> None:
    program, peer = looked_at(bench)
    program.send(REQUEST[:9])
    bench.settle()
    program.abort()
    bench.until(lambda: not bench.gateway.stack.tcp)
    assert readable(peer)
    bench.ahead += 2 * peek.SECONDS
    bench.settle()
    assert bench.gateway.stats()["policy_refused"] == 0


def test_a_full_socket_takes_the_first_bytes_bit_by_bit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, peer = looked_at(bench)
    whole = TcpRelay.deliver
    monkeypatch.setattr(
        TcpRelay, "deliver", lambda self, data: whole(self, data[:10]) if len(data) > 10 else 0
    )
    program.send(REQUEST)
    bench.settle()
    assert peer.recv(1 << 16) == REQUEST[:10]
    program.send(b"and more")
    bench.settle()
    relay = relay_of(bench)
    assert isinstance(relay, PeekingRelay)
    monkeypatch.setattr(TcpRelay, "deliver", whole)
    relay._on_events(0)
    assert heard(peer, bench) == REQUEST[10:] + b"and more"
    assert type(relay_of(bench)) is TcpRelay


def test_an_urgent_byte_waits_for_the_look(bench: Bench) -> None:
    program, peer = looked_at(bench)
    connection = program.connection
    assert connection is not None
    connection.send_urgent(b"!", bench.now)
    bench.settle()
    program.send(REQUEST)
    bench.settle()
    assert not readable(peer), "it is in front of the request, and is no part of one"
    bench.ahead += peek.SECONDS
    refused_after(program, peer, bench)


def test_an_urgent_byte_behind_the_first_bytes_is_passed_on(bench: Bench) -> None:
    program, peer = looked_at(bench)
    program.send(REQUEST)
    connection = program.connection
    assert connection is not None
    connection.send_urgent(b"!", bench.now)
    assert heard(peer, bench) == REQUEST + b"!", "a socket of AF_UNIX has it in line"


def test_a_refused_look_may_be_answered_in_words(bench: Bench) -> None:
    policy = Policy.deny(refusal="forbidden").allow("example.org", host=True)
    program, peer = looked_at(bench, policy)
    program.send(REQUEST.replace(b"example.org", b"other.example"))
    bench.until(lambda: program.ended)
    assert program.received.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert readable(peer)
    assert peer.recv(1) == b""
    program.shutdown()
    bench.until(lambda: not bench.gateway.stack.tcp)


def test_quic_is_refused_where_tls_is_looked_at(bench: Bench, uplink: Told) -> None:
    govern(bench, LOOKS, example_org=FAR)
    begin(bench, "udp")
    assert told(bench) == [icmp.PORT]
    begin(bench, "icmp")
    assert told(bench) == [icmp.PORT]
    assert uplink.opened == []


# -- a new policy and the flows that there are ----------------------------------------------------------


def hang(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Dials from now on are never decided; those that are given up."""
    closed: list[object] = []

    class Hanging:
        def __init__(self) -> None:
            self.fd, self._other = os.pipe()

        def fileno(self) -> int:
            return self.fd

        def advance(self, *, failed: bool) -> Dial:
            return self

        def close(self) -> None:
            if self.fd >= 0:
                os.close(self.fd)
                os.close(self._other)
                self.fd = -1
                closed.append(self)

    monkeypatch.setattr(bench.uplink, "dial", lambda *_, **__: Hanging())
    return closed


def set_policy(bench: Bench, policy: Policy | None, existing: Literal["keep", "cut"] = "cut") -> None:
    bench.engine.now = bench.now
    text = None if policy is None else dump(policy).decode()
    bench.gateway.set_policy(text, existing)
    bench.settle()


def test_existing_flows_are_kept_or_cut(bench: Bench, uplink: Told) -> None:
    program = begin(bench, "tcp")
    assert program is not None
    begin(bench, "udp")
    begin(bench, "icmp")
    bench.until(lambda: program.is_established)
    bench.settle()
    set_policy(bench, Policy.deny(), "keep")
    assert [len(flows(bench, each)) for each in TRANSPORTS] == [1, 1, 1]
    set_policy(bench, Policy.deny().allow("192.0.2.1"))
    assert [len(flows(bench, each)) for each in TRANSPORTS] == [1, 1, 1]
    set_policy(bench, Policy.deny(audit=True))
    assert [len(flows(bench, each)) for each in TRANSPORTS] == [1, 1, 1]
    set_policy(bench, Policy.deny())
    assert [len(flows(bench, each)) for each in TRANSPORTS] == [0, 0, 0]
    bench.until(lambda: program.why is Closed.RESET)
    assert readable(uplink.peers[0])
    assert all(sink.fileno() < 0 for sink in uplink.sinks)


def test_what_is_being_dialled_is_cut_and_told_why(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = hang(bench, monkeypatch)
    bench.connect(FAR, 80)
    bench.settle()
    set_policy(bench, Policy.deny(refusal="reset"))
    assert told(bench) == ["reset"]
    assert len(closed) == 1
    assert not bench.gateway.stack.tcp


def test_what_is_looked_at_is_cut_or_goes_on_by_the_new_policy(bench: Bench) -> None:
    program, peer = looked_at(bench)
    set_policy(bench, LOOKS.allow("198.51.100.0/24"))
    assert program.why is None
    set_policy(bench, Policy.deny())
    bench.until(lambda: program.why is Closed.RESET)
    program, peer = looked_at(bench, source=2000)
    set_policy(bench, Policy.allow())
    program.send(b"anything that is a line\n")
    assert heard(peer, bench) == b"anything that is a line\n"


def test_what_was_looked_at_may_go_on_and_what_was_not_is_cut(bench: Bench) -> None:
    program, peer = looked_at(bench)
    program.send(REQUEST)
    assert heard(peer, bench) == REQUEST
    set_policy(bench, LOOKS.allow("198.51.100.0/24"))
    assert program.why is None
    set_policy(bench, Policy.deny().allow("other.example", host=True))
    bench.until(lambda: program.why is Closed.RESET)
    govern(bench, Policy.allow())
    unseen = bench.connect(FAR, 80)
    bench.until(lambda: unseen.is_established)
    set_policy(bench, LOOKS)
    bench.until(lambda: unseen.why is Closed.RESET)


def forget_answers(bench: Bench) -> None:
    """Let the time of all pins be over."""
    pins = bench.gateway.enforcer.pins
    assert pins is not None
    pins.keep(lambda name, address: False)


def test_a_flow_outlives_the_answer_that_has_let_it_in(bench: Bench, uplink: Told) -> None:
    govern(bench, BY_NAME, example_org=FAR)
    program = begin(bench, "tcp")
    assert program is not None
    begin(bench, "udp")
    begin(bench, "icmp")
    bench.until(lambda: program.is_established)
    bench.settle()
    forget_answers(bench)
    set_policy(bench, BY_NAME.allow("198.51.100.0/24"))
    assert [len(flows(bench, each)) for each in TRANSPORTS] == [1, 1, 1]
    bench.connect(FAR, 80, 2000)
    assert told(bench) == [icmp.PROHIBITED], "a new one needs a new answer"
    set_policy(bench, Policy.deny().allow("other.example"))
    assert [len(flows(bench, each)) for each in TRANSPORTS] == [0, 0, 0]


def test_a_flow_that_was_looked_at_outlives_the_answer_too(bench: Bench) -> None:
    program, peer = looked_at(bench)
    program.send(REQUEST)
    assert heard(peer, bench) == REQUEST
    forget_answers(bench)
    set_policy(bench, LOOKS.allow("198.51.100.0/24"))
    assert program.why is None
    set_policy(bench, Policy.deny().allow("example.org", sni=True))
    bench.until(lambda: program.why is Closed.RESET)


def test_a_name_that_may_not_have_the_address_now_keeps_no_flow(bench: Bench, uplink: Told) -> None:
    private = bytes((10, 9, 9, 9))
    govern(bench, Policy.deny().allow("example.org", private=True), example_org=private)
    program = bench.connect(private, 80)
    bench.until(lambda: program.is_established)
    set_policy(bench, Policy.deny().allow("example.org"))
    bench.until(lambda: program.why is Closed.RESET)


def test_what_the_guest_has_not_opened_and_what_we_serve_is_not_cut(
    bench: Bench, listener: socket.socket
) -> None:
    with socket.create_connection(listener.getsockname()):
        near, _ = listener.accept()
        near.setblocking(False)
        inbound = flow_key.FlowKey(GUEST, GATEWAY, 80, 5000).pack()
        bench.gateway.router.tcp_accepted(inbound, near)
        bench.until(lambda: bench.accepted and bench.accepted[0].is_established)
        served = bench.connect(RESOLVER, 53)
        bench.until(lambda: served.is_established)
        bench.inject(datagram(RESOLVER, 53))
        bench.settle()
        set_policy(bench, Policy.deny())
        assert served.why is None
        assert bench.accepted[0].why is None
        assert [len(flows(bench, each)) for each in ("tcp", "udp")] == [2, 1]


def test_a_new_policy_keeps_the_pins_that_it_would_have_made(bench: Bench) -> None:
    """What only the old one let a name have is forgotten, and a name that is ours is none of that."""
    private = bytes((10, 9, 9, 9))
    govern(bench, Policy.deny().allow("*.example", private=True))
    govern(bench, bench.gateway.enforcer.policy, one_example=FAR, two_example=private)
    bench.gateway.zone.add(Record("three.example", "10.9.9.8"))
    for policy, passes in (
        (Policy.deny().allow("*.example", private=True, name="again"), [FAR, private, bytes((10, 9, 9, 8))]),
        (Policy.deny().allow("*.example"), [FAR, bytes((10, 9, 9, 8))]),
    ):
        govern(bench, policy)
        found = []
        for address in (FAR, private, bytes((10, 9, 9, 8))):
            key = flow_key.FlowKey(GUEST, address, PORT, 80).pack()
            if not isinstance(bench.gateway.router.route("udp", key), Refusal):
                found.append(address)
        assert found == passes
    assert len(bench.gateway.enforcer.pins) == 1


def test_names_of_ours_need_no_query(bench: Bench) -> None:
    """Programs have them from their hosts file."""
    govern(bench, BY_NAME)
    bench.gateway.zone.add(Record("Example.org", "192.0.2.1"))
    begin(bench, "udp")
    assert told(bench) == []
    bench.gateway.zone.remove("example.org")
    begin(bench, "tcp")
    assert told(bench) == [icmp.PROHIBITED]


def test_no_policy_any_more(bench: Bench) -> None:
    govern(bench, Policy.deny())
    set_policy(bench, None)
    program = begin(bench, "tcp")
    assert program is not None
    bench.until(lambda: program.is_established)


def test_a_text_that_is_no_policy_leaves_the_old_one(bench: Bench) -> None:
    govern(bench, Policy.deny())
    with pytest.raises(DecodeError):
        bench.gateway.set_policy('["perhaps", [], false, 60.0, "reset", "nxdomain"]', "cut")
    begin(bench, "tcp")
    assert told(bench) == [icmp.PROHIBITED]
