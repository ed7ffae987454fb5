"""Displays of flows, counters and events, made by hand; and of what is not open, wherever somebody looks."""

from __future__ import annotations

import threading
from typing import get_args

import pytest

from netns_kit import (
    CaptureError,
    Endpoint,
    FakeFlow,
    FakeInternet,
    FakeQuery,
    FlowEvent,
    FlowInfo,
    Flows,
    Namespace,
    Network,
    Policy,
    QueryEvent,
    Rcode,
    Refusal,
    Uplink,
    read_capture,
    sync,
)
from netns_kit.arguments import Address
from netns_kit.display.view import MOST_HTML
from netns_kit.gateway.setup import DriverName
from netns_kit.gateway.stats import Stats, complete
from netns_kit.namespace.process_info import ProcessInfo
from netns_kit.userstack.answers import Counted
from netns_kit.userstack.display import events_view
from tests.support.displays import HOSTILE, checked, texts

GUEST, REMOTE = Endpoint("10.0.2.100", 40000), Endpoint("2001:db8::1", 443)


@pytest.fixture(autouse=True)
def _columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def flow(
    number: int, name: str | None = None, state: str = "ESTABLISHED", rule: str | None = None
) -> FlowInfo:
    return FlowInfo(number, "tcp", GUEST, REMOTE, state, "outbound", None, name, 1234, 5_600_000, 61.0, rule)


def test_flows_are_a_tuple_with_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    flows = Flows.of([flow(1, HOSTILE, rule=HOSTILE), flow(2, state="TIME-WAIT")], {})
    assert flows == (flow(1, HOSTILE, rule=HOSTILE), flow(2, state="TIME-WAIT"))
    text, html = checked(flows)
    head, one, _ = text.splitlines()[2:]
    assert head.split() == ["ID", "PROTO", "GUEST", "REMOTE", "NAME", "STATE", "OUT", "IN", "AGE", "RULE"]
    for each in ("10.0.2.100:40000", "→", "[2001:db8::1]:443", "ESTABLISHED", "1.2 kB", "5.6 MB", "1.0 min"):
        assert each in one
        assert each in html
    assert "RULE" not in str(Flows([flow(1)])), "a column that nothing is in is left out"
    assert checked(Flows())[0] == "Flows: 0 flows"


def test_an_internet_has_its_hosts() -> None:
    async def serve(_: object) -> None: ...

    fake = FakeInternet()
    assert checked(fake)[0].splitlines()[0] == "FakeInternet: 0 hosts"
    api = fake.host("api.example.org", "www.example.org", addresses=["192.0.2.1", "2001:db8::1"])
    api.serve_tcp(80, serve)
    api.serve_udp(None, serve)
    api.refuse_tcp(25, Refusal.DROP)
    fake.host("gone.example.org").down()
    for n in range(300):
        fake.host(f"n{n}.example.org")
    fake.queries.extend(
        [FakeQuery(HOSTILE, "A", Rcode.NXDOMAIN), FakeQuery("api.example.org", "A", Rcode.NOERROR)]
    )
    fake.flows.append(FakeFlow("tcp", GUEST, REMOTE, None, Refusal.RESET))
    text, html = checked(fake)
    assert "302 hosts" in text
    assert f"… and {302 - MOST_HTML} more" in html
    for each in (
        "tcp 80, udp any, tcp 25 DROP",
        "down: HOST_UNREACHABLE",
        "api.example.org, www.example.org",
    ):
        assert each in html
    assert "1, 1 of them refused" in text
    assert "2, 1 of them without an answer" in text
    plain = sync.FakeInternet()
    plain.host("api.example.org")
    assert "api.example.org" in checked(plain)[0]


def test_flows_have_the_members_they_are_of() -> None:
    names: dict[Address, str] = {GUEST.address: "web"}
    assert "MEMBER" in str(Flows.of([flow(1)], names))
    assert " web " in str(Flows.of([flow(1)], names))
    first = Flows.of([flow(1), flow(2)], names)[:1]
    assert first == (flow(1),)
    assert " web " in str(first), "a part is shown in the same way"
    assert first[0] == flow(1)


def stats(**counted: int) -> Stats:
    return complete(counted)


def test_counters_are_those_that_are_not_0_and_what_has_changed() -> None:
    now = stats(tap_received=1500, dropped_ip_ttl=2, udp_flows=0, tcp_connections=3)
    text, _ = checked(Counted(now, None, 0.0))
    assert [line.split() for line in text.splitlines()[2:6]] == [
        ["COUNTER", "VALUE"],
        ["tcp_connections", "3"],
        ["tap_received", "1,500"],
        ["dropped_ip_ttl", "2"],
    ]
    text, html = checked(Counted(now, stats(tap_received=1000, tcp_connections=3, udp_flows=2), 2.0))
    lines = [line.split() for line in text.splitlines()]
    assert ["COUNTER", "VALUE", "IN", "2.0", "S"] in lines
    assert ["tap_received", "1,500", "+500"] in lines
    assert ["tcp_connections", "3"] in lines
    assert ["udp_flows", "0", "-2"] in lines, "it was not 0 before"
    assert 'class="warn">dropped_ip_ttl' in html
    assert Counted(now, None, 0.0) == now


def test_events_are_a_table_of_what_was_refused() -> None:
    process = ProcessInfo(None, 7, 0, HOSTILE, HOSTILE)
    text = events_view(
        [
            FlowEvent("refused", flow(1, HOSTILE, rule=HOSTILE), Refusal.RESET, time=100.0, process=process),
            FlowEvent("closed", flow(2), ended="finished", time=100.5),
            QueryEvent("refused", HOSTILE, "AAAA", GUEST.address, "default: deny", "NXDOMAIN", time=101.25),
        ]
    ).text(200)
    lines = text.splitlines()[3:]
    assert lines[0].split()[:3] == ["+0.000", "s", "refused"]
    assert "reset" in lines[0]
    assert "finished" in lines[1]
    assert lines[2].split()[:5] == ["+1.250", "s", "refused", "dns", "AAAA"]
    assert "NXDOMAIN" in lines[2]
    assert "\x1b" not in text


@pytest.mark.parametrize("driver", get_args(DriverName))
def test_what_is_not_open_is_shown_without_an_event_loop(driver: DriverName) -> None:
    uplink = Uplink(dns=["192.0.2.53"])
    policy = Policy.deny().allow("example.org")
    network = Network(uplink=uplink, policy=policy, ports=["127.0.0.1:0:80"], driver=driver, ipv6=True)
    shown: list[tuple[str, str]] = []
    parts = network.stack, network.forwarder, network.namespace, network.member("web"), Namespace.current()
    capture = network.stack.capture(None, max_bytes=1 << 20)
    everything = network, *parts, capture, policy
    thread = threading.Thread(target=lambda: shown.extend(map(checked, everything)))
    thread.start()
    thread.join()
    texts_ = [text for text, _ in shown]
    assert len(texts_) == len(everything)
    assert all("not open" in each.splitlines()[0] for each in texts_[:-1])
    assert texts_[2] == "Forwarder: not open\n\nPublished ports: none"
    assert "policy: 1 rule, then deny" in texts_[0]
    assert f"driver     {driver}" in texts_[0]
    assert {"way out", "gateway", "namespace", "10.0.2.100"} <= set(texts(shown[0][1]))


def test_no_capture_is_read() -> None:
    with pytest.raises(CaptureError, match="No such file"):
        read_capture("/nowhere/capture.pcapng")
    with pytest.raises(TypeError, match="expected a path"):
        read_capture(7)  # type: ignore[arg-type]  # what is tested
