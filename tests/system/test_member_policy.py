"""Policies of members: each decides about its member alone, at DNS and at flows."""

from __future__ import annotations

import sys
from contextlib import ExitStack, aclosing

import anyio
import pytest

from netns_kit import (
    ArgumentError,
    Composition,
    DnsSettings,
    Event,
    FlowEvent,
    FlowRequest,
    Member,
    Network,
    Policy,
    PolicyError,
    QueryEvent,
    Uplink,
)
from netns_kit.gateway.setup import DriverName
from tests.support import needs, needs_tun
from tests.support.connections import every_driver
from tests.support.events import followed
from tests.support.members import ask, network, output, serving, status
from tests.support.servers import bounded, dns_server, hello, tcp_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]
CONNECT = "import socket, sys; sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), 20)"
GATEWAY = "10.0.2.2"


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


async def reaches(member: Member | Network, address: str, port: int) -> bool:
    return await status(member, sys.executable, "-ISc", CONNECT, address, str(port)) == 0


@every_driver
async def test_a_members_policy_is_for_that_member(driver: DriverName) -> None:
    with tcp_server(hello) as port, tcp_server(hello) as other:
        uplink = Uplink(allow_host_loopback=True)
        async with (
            network(uplink=uplink, driver=driver) as net,
            net.member("strict", policy=Policy.deny().allow(GATEWAY, ports=[port])) as strict,
            net.member("free") as free,
            serving(free, 80),
        ):
            assert await ask(strict, GATEWAY, port) == "hello"
            assert not await reaches(strict, GATEWAY, other)
            assert await reaches(free, GATEWAY, other)
            assert await reaches(net, GATEWAY, other)
            assert await ask(strict, "10.0.2.102", 80) == "10.0.2.101", "it is about the way out"
            await strict.set_policy(None)
            assert await reaches(strict, GATEWAY, other)
            await free.set_policy(Policy.deny())
            assert not await reaches(free, GATEWAY, port)
            assert await reaches(strict, GATEWAY, port)
            assert (await net.stack.stats())["policy_refused"] >= 1


async def test_it_decides_in_place_of_the_networks() -> None:
    with tcp_server(hello) as port, tcp_server(hello) as other:
        usual_policy = Policy.deny().allow(GATEWAY, ports=[port])
        async with (
            network(uplink=Uplink(allow_host_loopback=True), policy=usual_policy) as net,
            net.member("usual") as usual,
            net.member("own", policy=Policy.deny().allow(GATEWAY, ports=[other])) as own,
        ):
            assert (await reaches(usual, GATEWAY, port), await reaches(usual, GATEWAY, other)) == (
                True,
                False,
            )
            assert (await reaches(own, GATEWAY, port), await reaches(own, GATEWAY, other)) == (False, True)
            await net.remove_member(own)
            async with net.member("next", address=own.address) as after:
                assert await reaches(after, GATEWAY, port), "it is gone with the member"


async def test_a_name_that_one_has_resolved_opens_nothing_for_another() -> None:
    needs("dig")
    with tcp_server(hello) as port, dns_server({"name.tld": "192.0.2.7", "gate.tld": GATEWAY}) as resolver:
        uplink = Uplink(allow_host_loopback=True, dns=DnsSettings([f"127.0.0.1:{resolver}"], search=[]))
        by_name = Policy.deny().allow("gate.tld", ports=[port], private=True)
        async with (
            network(uplink=uplink) as net,
            net.member("one", policy=by_name) as one,
            net.member("two", policy=by_name) as two,
            net.member("three") as three,
        ):
            assert "NXDOMAIN" in await output(one, "dig", "name.tld")
            assert await output(three, "dig", "+short", "name.tld") == "192.0.2.7"
            assert not await reaches(one, GATEWAY, port)
            assert await output(one, "dig", "+short", "gate.tld") == GATEWAY
            assert await reaches(one, GATEWAY, port)
            assert not await reaches(two, GATEWAY, port), "it has not asked"
            assert "one" not in await output(one, "cat", "/etc/hosts"), "names are to be asked for"
            assert "one" in await output(three, "cat", "/etc/hosts")


@bounded
async def test_flows_that_there_are() -> None:
    with tcp_server(_echo) as port:
        async with (
            network(uplink=Uplink(allow_host_loopback=True)) as net,
            net.member("a") as a,
            net.member("b") as b,
        ):
            first, second = [await each.namespace.connect_tcp(GATEWAY, port) for each in (a, b)]
            for stream in (first, second):
                await stream.send(b"there")
                assert await stream.receive() == b"there"
            await a.set_policy(Policy.deny())
            await first.send(b"still")
            assert await first.receive() == b"still"
            await a.set_policy(Policy.deny(), "cut")
            assert await a.flows() == ()
            assert len(await b.flows()) == 1
            await second.send(b"still")
            assert await second.receive() == b"still"
            for stream in (first, second):
                await stream.aclose()


def _echo(sock: object) -> None:
    while data := sock.recv(99):  # type: ignore[attr-defined]  # it is a socket
        sock.sendall(data)  # type: ignore[attr-defined]  # the same


async def test_a_rule_that_asks_takes_somebody_to_ask() -> None:
    asked: list[str] = []

    async def on_flow(request: FlowRequest) -> bool:
        asked.append(str(request.guest.address))
        return True

    with tcp_server(hello) as port:
        uplink = Uplink(allow_host_loopback=True)
        async with (
            network(uplink=uplink, on_flow=on_flow, policy=Policy.allow()) as net,
            net.member("a", policy=Policy.ask()) as a,
        ):
            assert await ask(a, GATEWAY, port) == "hello"
            assert await ask(net, GATEWAY, port) == "hello"
            assert asked == ["10.0.2.101"]
        async with network(uplink=uplink) as net:
            with pytest.raises(PolicyError, match="expected a function to ask"):
                await net.add_member("a", policy=Policy.ask())
            async with net.member("a") as a:
                with pytest.raises(PolicyError, match="expected a function to ask"):
                    await a.set_policy(Policy.ask())
                with pytest.raises(ArgumentError, match="existing='end'"):
                    await a.set_policy(None, "end")  # type: ignore[arg-type]  # that is what it is about
                assert a.policy is None


@bounded
async def test_events_are_those_of_the_member() -> None:
    """With the processes in it, and the queries that its policy refuses."""
    needs("dig")
    with tcp_server(hello) as port:
        async with (
            network(uplink=Uplink(allow_host_loopback=True, dns=[])) as net,
            net.member("a", policy=Policy.deny().allow(GATEWAY)) as a,
            net.member("b") as b,
            aclosing(a.events(processes=True)) as events,
        ):
            seen: list[Event] = []

            async def collect() -> None:
                async for event in events:
                    seen.append(event)
                    if isinstance(event, QueryEvent):
                        return

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(collect)
                await anyio.wait_all_tasks_blocked()
                await a.flows()  # what was asked first is answered first: it is subscribed
                assert await ask(b, GATEWAY, port) == "hello"
                assert await ask(a, GATEWAY, port) == "hello"
                await output(a, "dig", "name.tld")
            flows = [event for event in seen if isinstance(event, FlowEvent)]
            assert {str(event.flow.guest.address) for event in flows} == {"10.0.2.101"}
            opened = [event for event in flows if event.kind == "opened" and event.flow.remote.port == port]
            assert len(opened) == 1
            assert [(event.name, str(event.client)) for event in seen if isinstance(event, QueryEvent)] == [
                ("name.tld", "10.0.2.101")
            ]


@bounded
async def test_events_name_the_process_in_the_member() -> None:
    command = [sys.executable, "-ISc", f"{CONNECT}; sys.stdin.read()", GATEWAY]
    with tcp_server(hello) as port:
        async with (
            network(uplink=Uplink(allow_host_loopback=True)) as net,
            net.member("a") as a,
            followed(a, processes=True) as events,
            await a.popen([*command, str(port)]) as process,
        ):
            event = await events.receive()
            assert event.process is not None
            assert event.process.pid == process.pid


CONNECTS = """
import socket, sys
for each in sys.argv[1:]:
    host, _, port = each.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 9).close()
        print("x", end="")
    except OSError as error:
        print(error.errno, end=" ")
"""
"""Says of each target whether it is connected to it."""


@bounded
async def test_names_of_a_member_are_known_to_the_worker_that_gets_the_connection() -> None:
    """Each connection needs a pin that was made a moment ago by the worker which answers names."""
    count = 24
    with ExitStack() as stack:
        ports = [stack.enter_context(tcp_server(hello)) for _ in range(count)]
        names = [f"n{number}.tld" for number in range(count)]
        resolver = stack.enter_context(dns_server(dict.fromkeys(names, GATEWAY)))
        policy = Policy.deny()
        for name, port in zip(names, ports, strict=True):
            policy = policy.allow(name, ports=port, private=True)
        uplink = Uplink(allow_host_loopback=True, dns=[f"127.0.0.1:{resolver}"])
        targets = [f"{name}:{port}" for name, port in zip(names, ports, strict=True)]
        program = sys.executable, "-ISc", CONNECTS
        literals = [f"{GATEWAY}:{port}" for port in ports]
        async with (
            network(uplink=uplink, driver="worker", queues=2, policy=Policy.deny()) as net,
            net.member("a", policy=policy) as a,
            net.member("b", policy=policy) as b,
        ):
            assert "x" not in await output(a, *program, *literals), "not before it is asked for"
            assert await output(a, *program, *targets) == "x" * count
            assert "x" not in await output(b, *program, *literals), "what one has asked for is no other's"
            stats = await net.stack.stats()
            assert (stats["policy_pins"], stats["policy_pins_lost"]) == (2 * count, 0)
            await a.set_policy(Policy.deny(), "cut")
            assert "x" not in await output(a, *program, *literals, *targets)


def test_a_file_has_policies_of_members() -> None:
    policy = Policy.deny().allow("example.com")
    made = Composition.from_dict({"members": {"a": {"policy": policy.as_dict()}, "b": {}}})
    assert [plan.setup.policy for plan in made.members] == [policy, None]
    with pytest.raises(ArgumentError, match=r"members\.a\.policy\.default='maybe'"):
        Composition.from_dict({"members": {"a": {"policy": {"default": "maybe"}}}})


@every_driver
async def test_a_policy_whose_change_is_cancelled_is_the_one_that_is_named(driver: DriverName) -> None:
    with tcp_server(hello) as port:
        async with (
            network(uplink=Uplink(allow_host_loopback=True), driver=driver) as net,
            net.member("a") as a,
        ):
            for place, guest in ((a, a), (net.stack, net)):
                for policy in (Policy.deny(), None):
                    with anyio.CancelScope() as scope:
                        scope.cancel()
                        await place.set_policy(policy)
                    assert place.policy == policy
                    assert await reaches(guest, GATEWAY, port) == (policy is None)


async def test_a_policy_that_the_engine_refuses_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the caller has not waited for that."""
    async with network() as net, net.member("a") as a:

        async def late(*_: object) -> None:
            await anyio.sleep(0.05)
            raise OSError("no room")

        monkeypatch.setattr(net.stack, "ask", late)
        for place in (a, net.stack):
            with pytest.raises(OSError, match="no room"), anyio.move_on_after(0.01):
                await place.set_policy(Policy.deny())
            assert place.policy is None
        monkeypatch.undo()
