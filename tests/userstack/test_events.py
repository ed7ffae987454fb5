"""Events of flows: the same from every driver, and nobody's slowness is anybody else's."""

from __future__ import annotations

import socket
from contextlib import aclosing

import anyio
import pytest

from netns_kit import FlowEvent, Forwarder, Limits, Refusal, StackClosed, Uplink, UserStack
from netns_kit.gateway.setup import DriverName
from netns_kit.stack.user import UNWATCHED
from netns_kit.userstack.events import EVENTS_KEPT
from tests.support import uplinks
from tests.support.events import flow_events, followed
from tests.support.packets import GATEWAY, datagram, echo_request, syn
from tests.support.servers import bounded, closed_port
from tests.support.taps import ELSEWHERE, send, stack_of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]


def told(event: FlowEvent) -> tuple[str, str, str]:
    return event.kind, event.flow.protocol, str(event.flow.remote)


@bounded
async def test_a_flow_opens_and_closes(driver: DriverName) -> None:
    async with stack_of(driver, limits=Limits(udp_flows=1)) as (stack, guest), followed(stack) as events:
        for port in (1, 2):
            send(guest, datagram(ELSEWHERE, port))
        got = [await events.receive() for _ in range(3)]
        assert [told(event) for event in got] == [
            ("opened", "udp", "203.0.113.9:1"),
            ("closed", "udp", "203.0.113.9:1"),
            ("opened", "udp", "203.0.113.9:2"),
        ]
        assert str(got[0].flow.guest) == "10.0.2.100:40000"
        assert {event.missed for event in got} == {0}
        assert {event.refusal for event in got} == {None}


@pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp"])
@bounded
async def test_what_a_policy_refuses_is_told_with_how(driver: DriverName, protocol: str) -> None:
    """It is opened and refused, and that is the end of it."""
    packets = {"tcp": syn(ELSEWHERE, 9), "udp": datagram(ELSEWHERE, 9), "icmp": echo_request(ELSEWHERE)}
    policy = uplinks.Saying(Refusal.PROHIBITED)
    async with stack_of(driver, Uplink(policy=policy)) as (stack, guest), followed(stack) as events:
        for _ in range(2):
            send(guest, packets[protocol])
        got = [await events.receive() for _ in range(4)]
        assert [event.kind for event in got] == ["opened", "refused"] * 2
        assert {event.flow.protocol for event in got} == {protocol}
        assert [event.refusal for event in got] == [None, Refusal.PROHIBITED] * 2


@bounded
async def test_so_is_what_the_host_refuses(driver: DriverName) -> None:
    uplink = Uplink(allow_host_loopback=True)
    async with stack_of(driver, uplink) as (stack, guest), followed(stack) as events:
        send(guest, syn(GATEWAY, closed_port()))
        assert (await events.receive()).kind == "opened"
        refused = await events.receive()
        assert (refused.kind, refused.refusal) == ("refused", Refusal.RESET)


@bounded
async def test_a_client_of_a_forwarded_port_opens_a_flow(driver: DriverName) -> None:
    async with (
        stack_of(driver) as (stack, _),
        Forwarder(stack) as forwarder,
        followed(stack) as events,
    ):
        (tcp,) = await forwarder.add("127.0.0.1:0:80")
        (udp,) = await forwarder.add("127.0.0.1:0:53/udp")
        with socket.create_connection(("127.0.0.1", tcp.host_port)):
            opened = await events.receive()
            assert (opened.kind, opened.flow.protocol) == ("opened", "tcp")
            assert str(opened.flow.guest) == "10.0.2.100:80"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", ("127.0.0.1", udp.host_port))
            while (event := await events.receive()).flow.protocol != "udp":
                pass
            assert str(event.flow.guest) == "10.0.2.100:53"


@bounded
async def test_who_is_slow_loses_the_oldest_and_is_told(driver: DriverName) -> None:
    """Two are following: the quick one has them all."""
    kept = EVENTS_KEPT
    more = kept + 100
    async with (
        stack_of(driver, limits=Limits(udp_flows=2 * kept)) as (stack, guest),
        followed(stack) as quick,
        aclosing(flow_events(stack)) as slow,
    ):
        async with anyio.create_task_group() as tasks:
            first: list[FlowEvent] = []

            async def begin() -> None:
                first.append(await anext(slow))

            tasks.start_soon(begin)
            await anyio.wait_all_tasks_blocked()
            await stack.flows()
            send(guest, datagram(ELSEWHERE, more + 1))
        assert first[0].flow.remote.port == more + 1
        await stack.flows()
        await quick.receive()
        for start in range(0, more, 50):  # as many as the device has room for
            some = range(start, min(start + 50, more))
            for number in some:
                send(guest, datagram(ELSEWHERE, 1 + number))
            for number in some:
                assert (await quick.receive()).flow.remote.port == 1 + number
        got = await anext(slow)
        assert got.missed == more - kept
        assert got.flow.remote.port == 1 + more - kept
        assert (await anext(slow)).missed == 0


@pytest.mark.parametrize("driver", ["thread", "loop"])  # a worker cannot be looked into
@bounded
async def test_nobody_follows_nothing_is_done(driver: DriverName) -> None:
    async with stack_of(driver) as (stack, _):
        watched = stack.gateway.stack
        assert watched.watcher is UNWATCHED
        async with followed(stack):
            assert watched.watcher is not UNWATCHED
            async with followed(stack):
                pass
            assert watched.watcher is not UNWATCHED
        assert watched.watcher is UNWATCHED


@bounded
async def test_they_end_with_the_stack(driver: DriverName) -> None:
    ended = False

    async def follow(stack: UserStack) -> None:
        nonlocal ended
        async for _ in stack.events():
            pass
        ended = True

    async with anyio.create_task_group() as tasks, stack_of(driver) as (stack, _):
        tasks.start_soon(follow, stack)
        await anyio.wait_all_tasks_blocked()
        await stack.flows()
    assert ended


async def test_outside_the_block_there_are_none(driver: DriverName) -> None:
    async with stack_of(driver) as (stack, _):
        pass
    with pytest.raises(StackClosed):
        await anext(stack.events())
