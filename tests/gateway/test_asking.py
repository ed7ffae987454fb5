"""Flows that wait for an answer: nothing leaves meanwhile, each answer has its effect, and others end the waiting."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator, Mapping
from typing import get_args

import pytest

from netns_kit.gateway import asking
from netns_kit.gateway.asking import FlowAnswer, FlowRequest, HeldDatagrams
from netns_kit.gateway.enforcer import ruling_of
from netns_kit.policy.policy import Policy
from netns_kit.stack import AnyFlow, Refusal, Transport
from netns_kit.stack.wire import icmp, ip, tcp
from netns_kit.uplink.flow import Endpoint
from tests.support.bench import Bench, Make
from tests.support.packets import GUEST, PORT, RESOLVER, datagram, echo_request, packet, syn
from tests.support.told import Sink, Told

pytestmark = pytest.mark.usefixtures("leaks")

FAR = bytes((192, 0, 2, 1))
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)
TIMEOUT = 30.0
SUBSCRIBER = 7
ASKS = Policy.ask()


class Recorder(Sink):
    """Keeps what is sent."""

    def __init__(self, sent: list[bytes]) -> None:
        super().__init__()
        self.sent = sent

    def send(self, data: object, flags: int = 0) -> int:
        self.sent.append(bytes(data))  # type: ignore[call-overload]  # a buffer
        return 1

    def sendto(self, *arguments: object) -> int:
        return self.send(arguments[0])

    def sendmsg(self, *arguments: object) -> int:
        for each in arguments[0]:  # type: ignore[attr-defined]  # buffers
            self.send(each)
        return 1


class Recorded(Told):
    """Remembers the payloads that leave."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def open(self, protocol: Transport, target: object, port: int = 0) -> Recorder:
        super().open(protocol, target, port).close()  # type: ignore[arg-type]  # an address
        self.sinks[-1] = recorder = Recorder(self.sent)
        return recorder


@pytest.fixture
def uplink(leaks: None) -> Iterator[Recorded]:
    uplink = Recorded()
    yield uplink
    for peer in uplink.peers:
        peer.close()


@pytest.fixture
def bench(make: Make, uplink: Recorded) -> Bench:
    bench = make(uplink)
    bench.stop_the_clock()
    ask(bench)
    return bench


def ask(bench: Bench, policy: Policy = ASKS) -> list[int]:
    """Let that policy decide; return who was told that there are questions, as long as this goes on."""
    told: list[int] = []
    gateway = bench.gateway
    gateway.enforcer.set(policy)
    gateway.asking.timeout, gateway.asking.tell = TIMEOUT, told.append
    gateway.asking.listen(SUBSCRIBER)
    return told


def begin(bench: Bench, transport: Transport, port: int = 80) -> None:
    """The guest opens a flow: of TCP by a SYN alone, whose answer it does not know."""
    if transport == "tcp":
        bench.inject(syn(FAR, port))
    else:
        bench.inject(datagram(FAR, port) if transport == "udp" else echo_request(FAR))
    bench.settle()


def flows(bench: Bench, transport: Transport) -> Mapping[bytes, AnyFlow]:
    stack = bench.gateway.stack
    found: dict[str, Mapping[bytes, AnyFlow]] = {"tcp": stack.tcp, "udp": stack.udp, "icmp": stack.echo}
    return found[transport]


def asked(bench: Bench) -> FlowRequest:
    [request] = bench.gateway.asking.take()
    assert isinstance(request, FlowRequest)
    return request


def answer(bench: Bench, number: int, given: FlowAnswer) -> bool:
    """Answer, and let happen what then happens."""
    found = bench.gateway.asking.answer(number, given)
    bench.settle()
    return found


def told(bench: Bench) -> list[int | str]:
    """What the guest is told: the code of "unreachable", "reset" or "accepted"."""
    bench.settle()
    found: list[int | str] = []
    for each in bench.answers():
        if each.protocol == ip.TCP:
            found.append("reset" if each.payload[13] & tcp.RST else "accepted")
        elif (message := icmp.parse(each.payload)).type == icmp.UNREACHABLE:
            found.append(message.code)
    return found


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nothing_leaves_while_a_flow_waits(bench: Bench, uplink: Recorded, transport: Transport) -> None:
    news = ask(bench, Policy.allow().ask("192.0.2.0/24", name="people"))
    begin(bench, transport)
    assert (uplink.opened, uplink.sent, told(bench)) == ([], [], [])
    assert news == [SUBSCRIBER]
    request = asked(bench)
    assert (request.protocol, str(request.remote.address)) == (transport, "192.0.2.1")
    assert str(request.guest.address) == "10.0.2.100"
    assert request.remote.port == (0 if transport == "icmp" else 80)
    assert "people" in str(request.rule)
    [flow] = flows(bench, transport).values()
    assert flow.id == request.id
    [info] = bench.gateway.flows()
    assert info.rule == request.rule
    assert bench.gateway.stats()["flows_asked"] == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_is_answered_happens(bench: Bench, uplink: Recorded, transport: Transport) -> None:
    program = bench.connect(FAR, 80) if transport == "tcp" else None
    if program is None:
        begin(bench, transport)
    bench.settle()
    assert answer(bench, asked(bench).id, True)
    assert [each[:2] for each in uplink.opened] == [(transport, "192.0.2.1")]
    if program is not None:
        assert program.is_established
        assert uplink.opened[0][2] == 80
    else:
        assert len(uplink.sent) == 1
        assert uplink.sent[0].endswith(b"x" if transport == "udp" else b"ping")
    [flow] = flows(bench, transport).values()
    ruling = ruling_of(flow)
    assert ruling is not None
    assert not ruling.refuses
    assert bench.gateway.stats()["flows_asked"] == bench.gateway.router.refused == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("given", [False, *Refusal], ids=str)
def test_a_refusal_is_told_as_it_was_given(
    bench: Bench, uplink: Recorded, transport: Transport, given: FlowAnswer
) -> None:
    """False is the rule's own way."""
    ask(bench, Policy.ask(refusal="reset"))
    begin(bench, transport)
    assert answer(bench, asked(bench).id, given)
    reset: list[int | str] = ["reset"] if transport == "tcp" else [icmp.PORT]
    expected: dict[FlowAnswer, list[int | str]] = {
        False: reset,
        Refusal.RESET: reset,
        Refusal.DROP: [],
        Refusal.PROHIBITED: [icmp.PROHIBITED],
        Refusal.HOST_UNREACHABLE: [icmp.HOST],
        Refusal.NET_UNREACHABLE: [icmp.NET],
    }
    assert told(bench) == expected[given]
    assert (uplink.opened, uplink.sent, bench.gateway.flows()) == ([], [], ())
    assert bench.gateway.router.refused == bench.gateway.stats()["policy_refused"] == 1


@pytest.mark.parametrize("given", [True, False])
def test_nothing_that_has_waited_stays_behind(bench: Bench, uplink: Recorded, *, given: bool) -> None:
    """Not for as long as it might have waited."""
    waited = [datagram(FAR, port, bytes(16384)) for port in range(1, 41)]
    tracemalloc.start()
    try:
        for number, each in enumerate(waited):
            if number == 20:
                before, _ = tracemalloc.get_traced_memory()
            bench.inject(each)
            bench.settle()
            answer(bench, asked(bench).id, given)
            uplink.sent.clear()
            flow = next(iter(bench.gateway.stack.udp.values()), None)
            if flow is not None:
                flow.close()
            del flow
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20 * 16384 // 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_endpoint_is_where_it_goes_instead(bench: Bench, uplink: Recorded, transport: Transport) -> None:
    """Even to the host's loopback, which the uplink is closed for: who answers decides."""
    begin(bench, transport)
    uplink.said = Refusal.PROHIBITED  # nobody asks again
    assert answer(bench, asked(bench).id, Endpoint("127.0.0.1", 8080))
    [(protocol, address, port)] = uplink.opened
    assert (protocol, address) == (transport, "127.0.0.1")
    assert transport != "tcp" or port == 8080
    assert told(bench) == (["accepted"] if transport == "tcp" else [])


def test_datagrams_that_waited_leave_in_order_and_so_do_later_ones(bench: Bench, uplink: Recorded) -> None:
    payloads = [b"%d" % number * (1 + number % 3) for number in range(asking.KEPT_MOST)]
    for payload in payloads:
        bench.inject(datagram(FAR, 80, payload))
    bench.settle()
    assert answer(bench, asked(bench).id, True)
    bench.inject(datagram(FAR, 80, b"later"))
    bench.settle()
    assert uplink.sent == [*payloads, b"later"]


def test_what_is_kept_is_bounded_in_number_and_in_bytes(bench: Bench, uplink: Recorded) -> None:
    for number in range(asking.KEPT_MOST + 2):
        bench.inject(datagram(FAR, 80, b"%02d" % number))
    bench.settle()
    assert answer(bench, asked(bench).id, True)
    assert uplink.sent == [b"%02d" % number for number in range(asking.KEPT_MOST)]
    assert bench.gateway.stats()["dropped_limit_held"] == 2


def test_so_are_its_bytes(bench: Bench, uplink: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "KEPT_BYTES", 1000)
    for size in (600, 600, 400):
        bench.inject(datagram(FAR, 80, bytes(size)))
    bench.settle()
    assert answer(bench, asked(bench).id, True)
    assert list(map(len, uplink.sent)) == [600, 400]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_an_answer_in_time_it_is_refused(
    bench: Bench, uplink: Recorded, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        begin(bench, transport)
        request = asked(bench)
        bench.ahead += TIMEOUT - 1
        bench.settle()
        assert told(bench) == []
        bench.ahead += 1
        assert told(bench) == [icmp.PROHIBITED]
        assert bench.gateway.asking.take() == (request.id,)
        assert not answer(bench, request.id, True), "too late"
    assert (uplink.opened, bench.gateway.flows()) == ([], ())
    [record] = caplog.records
    assert "has not answered within 30 s" in record.getMessage()
    assert ASKS.label(None) in record.getMessage()


@pytest.mark.parametrize("transport", ["udp", "icmp"])
def test_a_flow_that_waits_is_not_idle(bench: Bench, transport: Transport) -> None:
    bench.gateway.asking.timeout = 100.0
    begin(bench, transport)
    bench.ahead += 99
    bench.settle()
    assert len(flows(bench, transport)) == 1
    assert answer(bench, asked(bench).id, True)
    assert len(flows(bench, transport)) == 1
    lifetime = 30 if transport == "udp" else 60
    bench.ahead += lifetime - 1
    bench.settle()
    assert len(flows(bench, transport)) == 1
    bench.ahead += 2
    bench.settle()
    assert len(flows(bench, transport)) == 0


def test_a_guest_that_gives_up_takes_its_question_back(bench: Bench) -> None:
    reset = tcp.pack(src_port=PORT, dst_port=80, seq=2, ack=0, flags=tcp.RST, window=0)
    for is_taken in (False, True):
        begin(bench, "tcp")
        request = asked(bench) if is_taken else None
        bench.inject(packet(ip.TCP, GUEST + FAR, reset, 16))
        bench.settle()
        assert len(bench.gateway.asking) == 0
        assert bench.gateway.asking.take() == (() if request is None else (request.id,))


@pytest.mark.parametrize("transport", ["udp", "icmp"])
@pytest.mark.parametrize("end", ["yes", "no", "flow"])
def test_first_datagrams_are_not_kept_when_the_waiting_is_over(
    bench: Bench, transport: Transport, end: str
) -> None:
    """The timers have what has waited until its time is over, and that may be a day."""
    begin(bench, transport)
    [flow] = flows(bench, transport).values()
    held, request = flow.user, asked(bench)
    assert isinstance(held, HeldDatagrams)
    assert len(held._kept) == 1
    if end == "flow":
        bench.gateway.end_flow(request.id)
    else:
        answer(bench, request.id, end == "yes")
    assert held._kept == []


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_who_ends_the_flow_ends_the_question(bench: Bench, uplink: Recorded, transport: Transport) -> None:
    begin(bench, transport)
    request = asked(bench)
    assert bench.gateway.end_flow(request.id)
    assert bench.gateway.asking.take() == (request.id,)
    assert not answer(bench, request.id, True)
    assert uplink.opened == []


def test_a_syn_that_is_repeated_is_not_asked_about_again(bench: Bench) -> None:
    for _ in range(3):
        begin(bench, "tcp")
    assert isinstance(asked(bench), FlowRequest)


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_no_more_than_so_many_wait(
    bench: Bench, transport: Transport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(asking, "HELD_MAX", 2)
    for port in range(1, 5):
        begin(bench, transport, port)
    assert len(bench.gateway.asking) == 2
    assert told(bench) == [icmp.PROHIBITED] * 2
    assert bench.gateway.router.refused == 2
    [record] = caplog.records
    assert "2 wait for on_flow already" in record.getMessage()
    [first, _] = bench.gateway.asking.take()
    assert isinstance(first, FlowRequest)
    answer(bench, first.id, False)
    begin(bench, transport, 9)
    assert len(bench.gateway.asking) == 2, "there is room again"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_where_nobody_answers_it_is_refused_at_once(bench: Bench, transport: Transport) -> None:
    bench.gateway.asking.timeout = None
    begin(bench, transport)
    assert told(bench) == [icmp.PROHIBITED]
    assert len(bench.gateway.asking) == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_policy_set_meanwhile_has_the_last_word(
    bench: Bench, uplink: Recorded, transport: Transport
) -> None:
    begin(bench, transport)
    bench.gateway.enforcer.set(Policy.deny(refusal="reset"))
    assert answer(bench, asked(bench).id, True)
    assert told(bench) == (["reset"] if transport == "tcp" else [icmp.PORT])
    assert uplink.opened == []
    assert bench.gateway.stats()["policy_refused"] == 1
    bench.gateway.enforcer.set(ASKS)
    begin(bench, transport)
    bench.gateway.enforcer.set(Policy.allow())
    assert answer(bench, asked(bench).id, True)
    assert len(uplink.opened) == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_cut_ends_what_waits_only_where_it_may_not_pass(
    bench: Bench, uplink: Recorded, transport: Transport
) -> None:
    begin(bench, transport)
    request = asked(bench)
    bench.gateway.enforcer.set(Policy.ask(refusal="reset"))
    bench.gateway.router.cut()
    assert len(bench.gateway.asking) == 1
    bench.gateway.enforcer.set(Policy.deny())
    bench.gateway.router.cut()
    assert bench.gateway.asking.take() == (request.id,)
    assert (bench.gateway.flows(), uplink.opened) == ((), [])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_cannot_be_carried_after_the_answer_is_refused(
    bench: Bench, uplink: Recorded, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(bench, transport)
    uplink.failure = LookupError("a bug of the uplink")
    answer(bench, asked(bench).id, True)
    assert told(bench) == [icmp.PROHIBITED if transport == "tcp" else icmp.HOST]
    uplink.failure = None
    begin(bench, transport)
    monkeypatch.setattr(bench.gateway.router.admission, "admit", lambda _: False)
    answer(bench, asked(bench).id, True)
    assert told(bench) == [icmp.NET]
    assert bench.gateway.flows() == ()


def test_a_flow_that_waits_gives_no_way_for_a_descriptor(bench: Bench) -> None:
    """It has none."""
    begin(bench, "tcp")
    bench.ahead += 20
    assert not bench.gateway.router._evict(b"")
    assert len(bench.gateway.asking) == 1


def test_our_dns_is_not_asked_about(bench: Bench) -> None:
    program = bench.connect(RESOLVER, 53)
    bench.until(lambda: program.is_established)
    assert bench.gateway.asking.take() == ()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_closing_lets_nothing_pass(make: Make, uplink: Recorded, transport: Transport) -> None:
    bench = make(uplink)
    ask(bench)
    begin(bench, transport)
    bench.gateway.close()
    assert (uplink.opened, len(bench.gateway.asking)) == ([], 0)


def test_questions_before_anybody_listens_wait_for_that(make: Make, uplink: Recorded) -> None:
    bench = make(uplink)
    bench.stop_the_clock()
    news: list[int] = []
    bench.gateway.enforcer.set(ASKS)
    bench.gateway.asking.timeout, bench.gateway.asking.tell = TIMEOUT, news.append
    begin(bench, "tcp")
    assert news == []
    bench.gateway.asking.listen(SUBSCRIBER)
    assert news == [SUBSCRIBER]
    assert isinstance(asked(bench), FlowRequest)


def test_a_refusal_in_words_is_one_after_the_answer_too(bench: Bench) -> None:
    ask(bench, Policy.ask(refusal="forbidden"))
    program = bench.connect(FAR, 80)
    bench.settle()
    answer(bench, asked(bench).id, False)
    bench.until(lambda: program.is_established)
    program.send(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
    bench.until(lambda: program.ended)
    assert program.received.startswith(b"HTTP/1.1 403 ")
