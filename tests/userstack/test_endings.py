"""What events say of a flow: how it has ended, by which rule, and what a policy that only audits would have done."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest

from netns_kit import (
    Ending,
    Endpoint,
    Event,
    FlowEvent,
    FlowInfo,
    Limits,
    Policy,
    ProcessInfo,
    QueryEvent,
    Refusal,
)
from netns_kit.dns.message import NXDOMAIN, TYPES
from netns_kit.domain_names import to_wire
from netns_kit.uplink.sockets import RESET_ON_CLOSE
from netns_kit.userstack.event_log import lines
from netns_kit.userstack.events import Events
from tests.support.bench import Bench, Make, Program, listener, make, opened
from tests.support.packets import GATEWAY, GUEST, datagram, echo_request, syn
from tests.support.told import Told

__all__ = ["listener", "make"]

pytestmark = pytest.mark.usefixtures("leaks")

FAR = bytes((192, 0, 2, 1))
NUMBER = 1


class Watch:
    """A subscriber of a bench's events."""

    def __init__(self, bench: Bench) -> None:
        self.events = Events(bench.gateway, lambda _: None)
        self.events.subscribe(NUMBER)

    def took(self) -> list[Event]:
        return list(self.events.take(NUMBER))

    def flows(self) -> list[FlowEvent]:
        return [event for event in self.took() if isinstance(event, FlowEvent)]


def last(bench: Bench, watch: Watch) -> FlowEvent:
    """The event of the end of the only flow, once it has come."""
    seen: list[FlowEvent] = []

    def is_over() -> bool:
        seen.extend(watch.flows())
        return len(seen) > 1

    bench.until(is_over)
    assert [event.kind for event in seen] == ["opened", "closed"]
    assert seen[0].ended is None
    return seen[1]


def both_close(bench: Bench, program: Program, sock: socket.socket) -> None:
    program.shutdown()
    sock.close()


def the_host_resets(bench: Bench, program: Program, sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    sock.close()


def the_guest_resets(bench: Bench, program: Program, sock: socket.socket) -> None:
    program.abort()


def somebody_ends_it(bench: Bench, program: Program, sock: socket.socket) -> None:
    [flow] = bench.gateway.flows()
    assert bench.gateway.end_flow(flow.id)


def it_is_cut(bench: Bench, program: Program, sock: socket.socket) -> None:
    bench.gateway.enforcer.set(Policy.deny())
    bench.gateway.router.cut()


def the_guest_is_gone(bench: Bench, program: Program, sock: socket.socket) -> None:
    bench.guest.receive = lambda *_: None  # type: ignore[method-assign]  # it is deaf and dumb
    bench.guest.handle_timers = lambda *_: None  # type: ignore[method-assign]
    sock.send(b"hello")
    for _ in range(200):
        bench.ahead += 10
        bench.settle()


def the_descriptors_run_out(bench: Bench, program: Program, sock: socket.socket) -> None:
    bench.gateway.router._give_up()


@pytest.mark.parametrize(
    ("act", "ended"),
    [
        (both_close, "finished"),
        (the_host_resets, "reset by peer"),
        (the_guest_resets, "reset by guest"),
        (somebody_ends_it, "ended"),
        (it_is_cut, "cut by policy"),
        (the_guest_is_gone, "timed out"),
        (the_descriptors_run_out, "made room"),
    ],
)
def test_how_a_connection_has_ended(
    make: Make,
    listener: socket.socket,
    act: Callable[[Bench, Program, socket.socket], None],
    ended: Ending,
) -> None:
    bench = make()
    watch = Watch(bench)
    program, sock = opened(bench, listener)
    with sock:
        bench.settle()
        act(bench, program, sock)
        assert last(bench, watch).ended == ended


@pytest.mark.parametrize(
    ("act", "ended"),
    [
        (lambda bench: setattr(bench, "ahead", 61.0), "idle"),
        (lambda bench: bench.inject(bench.another), "made room"),
        (lambda bench: bench.gateway.end_flow(bench.gateway.flows()[0].id), "ended"),
        (lambda bench: it_is_cut(bench, None, None), "cut by policy"),  # type: ignore[arg-type]  # it uses none
        (lambda bench: bench.gateway.router.close(), "ended"),
    ],
    ids=["idle", "made room", "ended", "cut", "closing"],
)
@pytest.mark.parametrize("protocol", ["udp", "icmp"])
def test_how_a_flow_of_datagrams_has_ended(
    make: Make, protocol: str, act: Callable[[Bench], object], ended: Ending
) -> None:
    bench = make(Told(), limits=Limits(udp_flows=1, echo_flows=1))
    bench.stop_the_clock()
    watch = Watch(bench)
    packet: Callable[[bytes], bytes] = (lambda to: datagram(to, 9)) if protocol == "udp" else echo_request
    bench.another = packet(GATEWAY[:3] + b"\x63")  # type: ignore[attr-defined]  # for one of these
    bench.inject(packet(FAR))
    bench.settle()
    act(bench)
    bench.settle()
    assert next(event.ended for event in watch.flows() if event.kind == "closed") == ended


def test_an_unanswered_syn_has_timed_out(make: Make) -> None:
    bench = make(Told(), limits=Limits(tcp_pending_time=5))
    bench.stop_the_clock()
    bench.gateway.asking.timeout = 3600.0
    bench.gateway.enforcer.set(Policy.ask())
    watch = Watch(bench)
    bench.inject(syn(FAR, 80))
    bench.settle()
    bench.ahead += 6
    assert last(bench, watch).ended == "timed out"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_the_first_event_has_the_rule_already(make: Make, protocol: str) -> None:
    """Although a flow is opened before anybody decides."""
    bench = make(Told())
    policy = Policy.allow().deny("192.0.2.0/24", name="no")
    bench.gateway.enforcer.set(policy)
    watch = Watch(bench)
    bench.inject(syn(FAR, 80) if protocol == "tcp" else datagram(FAR, 80))
    bench.settle()
    seen = watch.flows()
    assert [(event.kind, event.rule) for event in seen] == [
        ("opened", policy.label(0)),
        ("refused", policy.label(0)),
    ]
    assert seen[1].refusal is Refusal.PROHIBITED
    assert seen[1].ended is None


@pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp"])
def test_what_an_audit_would_refuse_is_told_and_goes_on(make: Make, protocol: str) -> None:
    bench = make(uplink := Told())
    bench.gateway.enforcer.set(Policy.deny(refusal="reset", audit=True))
    watch = Watch(bench)
    if protocol == "tcp":
        bench.connect(FAR, 80)
    else:
        bench.inject(datagram(FAR, 80) if protocol == "udp" else echo_request(FAR))
    bench.settle()
    [flow] = bench.gateway.flows()
    bench.gateway.end_flow(flow.id)
    seen = watch.flows()
    assert [(event.kind, event.audit) for event in seen] == [
        ("opened", False),
        ("refused", True),
        ("closed", False),
    ]
    assert seen[1].refusal is Refusal.RESET
    for peer in uplink.peers:
        peer.close()


def test_a_connection_that_is_refused_in_words_ends_once(make: Make) -> None:
    bench = make(Told())
    bench.gateway.enforcer.set(Policy.deny(refusal="forbidden"))
    watch = Watch(bench)
    program = bench.connect(FAR, 80)
    bench.until(lambda: program.is_established)
    program.abort()
    bench.until(lambda: not bench.gateway.stack.tcp)
    assert [event.kind for event in watch.flows()] == ["opened", "refused"]
    assert not watch.events._refused


def test_a_query_that_is_refused_is_told(make: Make) -> None:
    bench = make(Told())
    watch = Watch(bench)
    watcher = bench.gateway.watcher
    assert watcher is not None
    watcher.query_refused(
        to_wire("x.example.org"), TYPES["AAAA"], GUEST, "default: deny", NXDOMAIN, audit=False
    )
    [event] = watch.took()
    assert isinstance(event, QueryEvent)
    assert event.as_dict() == {
        "time": round(event.time, 6),
        "kind": "refused",
        "protocol": "dns",
        "guest": "10.0.2.100",
        "name": "x.example.org",
        "type": "AAAA",
        "rule": "default: deny",
        "rcode": "NXDOMAIN",
        "audit": False,
    }
    watch.events.unsubscribe(NUMBER)
    assert bench.gateway.watcher is None


EVENT = FlowEvent(
    "closed",
    FlowInfo(
        3, "tcp", Endpoint("10.0.2.100", 40000), Endpoint("2001:db8::1", 443), "closed", "outbound", None,
        "example.org", 5, 7, 1.5, "rule 1 (web): allow example.org",
    ),
    process=ProcessInfo(77, 2, 0, "curl", "/usr/bin/curl"),
    ended="finished",
    time=1796000000.25,
)  # fmt: skip


def test_an_event_is_plain_data() -> None:
    assert EVENT.as_dict() == {
        "time": 1796000000.25,
        "kind": "closed",
        "id": 3,
        "protocol": "tcp",
        "direction": "outbound",
        "guest": "10.0.2.100",
        "guest_port": 40000,
        "remote": "2001:db8::1",
        "remote_port": 443,
        "name": "example.org",
        "host": None,
        "host_port": None,
        "rule": "rule 1 (web): allow example.org",
        "refusal": None,
        "audit": False,
        "process": {"pid": 77, "inner_pid": 2, "uid": 0, "name": "curl", "command": "/usr/bin/curl"},
        "bytes_from_guest": 5,
        "bytes_to_guest": 7,
        "age": 1.5,
        "ended": "finished",
    }
    assert EVENT.rule == "rule 1 (web): allow example.org"


def test_a_line_of_a_log_is_ascii_and_what_was_lost_has_one_of_its_own() -> None:
    named = replace(EVENT, missed=12, flow=replace(EVENT.flow, name="\x1b[2J\n\u00e4\udc80"))
    lost, line = lines([named])
    assert json.loads(lost) == {"time": 1796000000.25, "kind": "lost", "count": 12}
    assert line.isascii()
    assert "\x1b" not in line
    assert line.count("\n") == 1
    assert json.loads(line)["name"] == "\x1b[2J\n\u00e4\udc80"
