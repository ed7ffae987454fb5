"""What is by member besides its policy: events, flows, captures and faults, each of that member alone."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import aclosing
from ipaddress import IPv4Address

import anyio
import pytest

from netns_kit import (
    ArgumentError,
    FlowRequest,
    InterceptedStream,
    Member,
    NamespaceGone,
    Network,
    Policy,
    QueryEvent,
    Uplink,
)
from netns_kit.gateway.setup import DriverName
from tests.support import needs, needs_ipv6, needs_tun
from tests.support.connections import every_driver
from tests.support.events import followed
from tests.support.members import ask, network, output, serving, status
from tests.support.pcapng import INBOUND, Contents, read
from tests.support.servers import dns_server, echo, hello, tcp_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]
GATEWAY = "10.0.2.2"
A, B = IPv4Address("10.0.2.101"), IPv4Address("10.0.2.102")
HOLD = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20):
    sys.stdin.read()
"""
"""Has a connection until its standard input ends."""
BY_LINK = """
import socket, sys, time
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
    sock.settimeout(2)
    while True:
        try:
            sock.bind((sys.argv[1], 0, 0, socket.if_nametoindex("eth0")))
            break
        except OSError:  # the kernel asks others first whether they have it
            time.sleep(0.05)
    try:
        sock.sendto(bytes.fromhex("123401000001000000000000046e616d6503746c640000010001"), (sys.argv[2], 53))
        print(sock.recv(512)[3] & 15)
    except OSError as error:
        print(error)
"""
"""What a program asks our DNS about name.tld with the address of its link."""


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


async def python(member: Member | Network, text: str, *given: str) -> str:
    return await output(member, sys.executable, "-ISc", text, *given)


def talks(found: Contents, address: IPv4Address) -> bool:
    return any(address.packed in each.data[14:42] for each in found.packets)


# -- events -------------------------------------------------------------------------------------------------


@every_driver
async def test_events_of_a_member_are_its_own(driver: DriverName) -> None:
    with tcp_server(hello) as port, tcp_server(echo) as stays:
        uplink = Uplink(allow_host_loopback=True)
        async with (
            network(uplink=uplink, driver=driver) as net,
            net.member("a") as a,
            net.member("b") as b,
            followed(a, processes=True) as seen,
            followed(net.stack) as everything,
        ):
            assert await ask(b, GATEWAY, port) == "hello"
            program = sys.executable, "-ISc", HOLD, GATEWAY, str(stays)
            async with await a.popen(program, stdin=subprocess.PIPE) as process:
                opened = await seen.receive()
                assert (opened.kind, opened.flow.guest.address) == ("opened", A)
                assert opened.process is not None, "it is found in the namespace of the member"
                assert [each.id for each in await a.flows()] == [opened.flow.id]
                assert process.stdin is not None
                await process.stdin.aclose()
                assert await process.wait() == 0
            assert await ask(b, GATEWAY, port) == "hello"
            closed = await seen.receive()
            assert (closed.kind, closed.flow.id) == ("closed", opened.flow.id)
            guests = [(await everything.receive()).flow.guest.address for _ in range(6)]
            assert sorted(guests) == [A, A, B, B, B, B]
            assert await a.flows() == ()


async def test_a_query_that_its_policy_refuses_is_an_event_of_its_own() -> None:
    async with (
        network(policy=Policy.deny()) as net,
        net.member("a", policy=Policy.deny().allow("known.tld")) as a,
        net.member("b") as b,
        aclosing(a.events()) as events,
    ):
        first: list[QueryEvent] = []

        async def follow() -> None:
            async for event in events:
                assert (event.client if isinstance(event, QueryEvent) else event.flow.guest.address) == A
                if isinstance(event, QueryEvent):
                    first.append(event)
                    break

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            await anyio.wait_all_tasks_blocked()
            await a.flows()
            for member, name in ((b, "of-b.tld"), (a, "of-a.tld")):
                assert await status(member, "getent", "ahostsv4", name) != 0
        assert first[0].name == "of-a.tld"


async def test_events_end_with_the_member() -> None:
    async with network() as net:
        a = net.member("a")
        with pytest.raises(NamespaceGone, match="is not open"):
            await anext(a.events())
        await a.open()
        seen: list[object] = []

        async def follow() -> None:
            async with aclosing(a.events()) as events:
                seen.extend([event async for event in events])
            seen.append("end")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            await anyio.wait_all_tasks_blocked()
            await a.flows()
            await net.remove_member("a")
        assert seen[-1:] == ["end"]
        assert net.stack.guests == {}


async def test_who_is_asked_is_told_the_process_of_the_member() -> None:
    asked: list[FlowRequest] = []

    async def on_flow(request: FlowRequest) -> bool:
        asked.append(request)
        return True

    with tcp_server(hello) as port:
        async with (
            network(uplink=Uplink(allow_host_loopback=True), on_flow=on_flow) as net,
            net.member("a", policy=Policy.ask()) as a,
        ):
            assert await ask(a, GATEWAY, port) == "hello"
        assert asked[0].process is not None


# -- captures -----------------------------------------------------------------------------------------------


@every_driver
async def test_a_capture_of_a_member_has_its_frames_alone(driver: DriverName) -> None:
    with tcp_server(hello) as port:
        uplink = Uplink(allow_host_loopback=True)
        async with (
            network(uplink=uplink, driver=driver) as net,
            net.member("a") as a,
            net.member("b") as b,
            serving(b, 80),
        ):
            ours, everybodys = io.BytesIO(), io.BytesIO()
            async with (
                net.stack.capture(everybodys),
                a.capture(ours, processes=True),
                a.capture(None, max_bytes=1 << 21, where=GATEWAY) as last,
            ):
                for member in (b, a, b):
                    assert await ask(member, GATEWAY, port) == "hello"
                assert await ask(a, "b", 80) == str(A)
                await output(a, "getent", "ahostsv4", "host.containers.internal.")
                await last.dump(filtered := io.BytesIO())
            found, others = read(ours.getvalue()), read(everybodys.getvalue())
            mac = bytes.fromhex(a.mac.replace(":", ""))
            assert all(
                each.data[:6] == mac or each.data[0] & 1
                if each.direction == INBOUND
                else each.data[6:12] == mac
                for each in found.packets
            )
            assert talks(found, A)
            assert not talks(found, B), "what members say to each other is the kernel's"
            assert talks(others, B)
            some = read(filtered.getvalue())
            assert 0 < len(some.packets) < len(found.packets), "the filter is in force besides: no DNS"
            with pytest.raises(ArgumentError, match="snaplen=3"):
                a.capture(ours, snaplen=3)


async def test_a_member_that_is_not_open_is_not_captured() -> None:
    async with network() as net:
        with pytest.raises(NamespaceGone, match="not open"):
            async with net.member("a").capture(io.BytesIO()):
                pass
        with pytest.raises(NamespaceGone, match="not open"):
            async with net.member("a").faults(loss=1.0):
                pass


# -- faults -------------------------------------------------------------------------------------------------


@every_driver
async def test_faults_of_a_member_disturb_no_other(driver: DriverName) -> None:
    with tcp_server(hello) as port, tcp_server(echo) as stays:
        uplink = Uplink(allow_host_loopback=True)
        async with (
            network(uplink=uplink, driver=driver) as net,
            net.member("a") as a,
            net.member("b") as b,
            serving(b, 80),
        ):
            async with a.faults(refuse=True) as refused:
                with pytest.raises(ConnectionRefusedError):
                    await a.namespace.connect_tcp(GATEWAY, port)
                assert await ask(b, GATEWAY, port) == "hello"
                assert await ask(a, "b", 80) == str(A), "members reach each other"
            assert await refused.counts() == {**await refused.counts(), "refused": 1}
            async with a.faults(dns="servfail") as dns:
                assert await status(a, "getent", "ahostsv4", "host.containers.internal.") != 0
                assert await status(b, "getent", "ahostsv4", "host.containers.internal.") == 0
            assert (await dns.counts())["queries"] >= 1
            streams = [await each.namespace.connect_tcp(GATEWAY, stays) for each in (a, b)]
            async with a.faults(blackhole=True) as lost:
                await streams[1].send(b"there")
                assert await streams[1].receive() == b"there"
                await streams[0].send(b"late")
                with anyio.move_on_after(0.3):
                    assert await streams[0].receive() == b"nothing comes"
            assert (await lost.counts())["out_lost"] >= 1
            assert await streams[0].receive() == b"late"
            async with a.faults(reset_after=0):
                await streams[1].send(b"there")
                assert await streams[1].receive() == b"there"
                await streams[0].send(b"gone")
                with pytest.raises((anyio.BrokenResourceError, anyio.EndOfStream)):
                    await streams[0].receive()
            for stream in streams:
                await stream.aclose()


async def test_a_name_that_its_policy_refuses_has_no_faults() -> None:
    needs("dig")
    with dns_server({"name.tld": "192.0.2.7"}) as resolver:
        async with (
            network(uplink=Uplink(allow_host_loopback=True, dns=[f"127.0.0.1:{resolver}"])) as net,
            net.member("a", policy=Policy.deny().allow("other.tld")) as a,
            net.faults(dns="servfail") as faults,
        ):
            assert "NXDOMAIN" in await output(a, "dig", "name.tld.")
            assert "SERVFAIL" in await output(net, "dig", "name.tld.")
            assert (await faults.counts())["queries"] == 1


@every_driver
async def test_blocks_end_with_the_member_that_they_are_about(driver: DriverName) -> None:
    """The next member with the same addresses has none of it, and the blocks end as ever."""
    with tcp_server(hello) as port:
        async with network(uplink=Uplink(allow_host_loopback=True), driver=driver) as net:
            a = await net.add_member("a", policy=Policy.allow())
            mac, file = a.mac, io.BytesIO()
            async with a.faults(refuse=True) as faults, a.capture(file) as capture:
                with pytest.raises(ConnectionRefusedError):
                    await a.namespace.connect_tcp(GATEWAY, port)
                await net.remove_member(a)
                assert (faults.ended, capture.ended) == ("member", "member")
                assert capture.condition == "complete: its member has ended"
                assert (await faults.counts())["refused"] == 1
                frames = capture.frames
                async with net.member("b", address=A) as b:
                    assert (b.address, b.mac) == (A, mac)
                    assert await ask(b, GATEWAY, port) == "hello"
            assert (await faults.counts())["refused"] == 1
            assert capture.frames == frames == len(read(file.getvalue()).packets) > 0
            for late in (a.faults(refuse=True), a.capture(io.BytesIO())):
                with pytest.raises(NamespaceGone):
                    async with late:
                        pass


async def test_a_block_that_ends_before_its_member_says_so_of_nobody() -> None:
    async with (
        network() as net,
        net.member("a") as a,
        a.faults(refuse=True) as faults,
        a.capture(None, max_bytes=1 << 21) as capture,
    ):
        pass
    assert (faults.ended, capture.ended) == (None, None)


async def test_what_a_member_has_sent_before_its_end_is_under_its_policy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also what the stack reads only when the member has gone; the next one with its address is free."""
    held: list[bytes] = []
    with tcp_server(hello) as port:
        uplink = Uplink(allow_host_loopback=True)
        async with network(uplink=uplink, driver="loop") as net:
            a = await net.add_member("a", policy=Policy.deny())
            gateway = net.stack.gateway
            receive = gateway.stack.receive

            def hold(frame: memoryview, now: float) -> None:
                held.append(bytes(frame))
                receive(frame, now)

            monkeypatch.setattr(gateway.stack, "receive", hold)
            with pytest.raises(OSError, match="No route to host"):
                await a.namespace.connect_tcp(GATEWAY, port)
            monkeypatch.undo()
            await net.remove_member(a)
            for frame in held:
                receive(memoryview(frame), gateway.engine.now)
            assert await net.stack.flows() == ()
            async with net.member("b", address=A) as b:
                assert await ask(b, GATEWAY, port) == "hello"


# -- policy and names -----------------------------------------------------------------------------------------


async def test_cutting_the_flows_of_one_leaves_the_others() -> None:
    async def on_flow(request: FlowRequest) -> bool:
        return True

    with tcp_server(echo) as port:
        async with (
            network(uplink=Uplink(allow_host_loopback=True), on_flow=on_flow) as net,
            net.member("a") as a,
            net.member("b", policy=Policy.ask()) as b,
        ):
            first, second = [await each.namespace.connect_tcp(GATEWAY, port) for each in (a, b)]
            for stream in (first, second):
                await stream.send(b"there")
                assert await stream.receive() == b"there"
            await a.set_policy(Policy.deny(), "cut")
            assert await a.flows() == ()
            await second.send(b"still")
            assert await second.receive() == b"still"
            for stream in (first, second):
                await stream.aclose()


async def test_the_address_of_its_link_is_under_its_policy_too() -> None:
    needs_ipv6()
    with dns_server({"name.tld": "192.0.2.7"}) as resolver:
        uplink = Uplink(allow_host_loopback=True, dns=[f"127.0.0.1:{resolver}"])
        async with network(uplink=uplink, ipv6=True) as net, net.member("a") as a:
            assert net.subnet.ipv6 is not None
            link = next(str(each) for each in a._guests if each.is_link_local)
            asked = BY_LINK, link, str(net.subnet.ipv6.dns)
            before = await python(a, *asked)
            await a.set_policy(Policy.deny())
            after = await python(a, *asked)
            assert (before, after) == ("0", "3"), "it was answered, and then refused"


async def test_what_intercepts_a_member_dials_under_its_policy() -> None:
    needs_ipv6()
    said: list[str] = []

    async def handler(stream: InterceptedStream) -> None:
        for address in (GATEWAY, "fd00::2"):
            try:
                async with await stream.connect_upstream(address):
                    said.append("connected")
            except OSError as error:
                said.append(type(error).__name__)

    with tcp_server(hello) as port, tcp_server(hello, ("::1", port)):
        async with (
            network(uplink=Uplink(allow_host_loopback=True), ipv6=True) as net,
            net.member("a", policy=Policy.deny().allow(GATEWAY, ports=[port])) as a,
            net.member("b") as b,
            await net.stack.intercept([], handler, ports=[port]),
        ):
            for member in (a, b):
                await ask(member, GATEWAY, port)
        assert said == ["connected", "PermissionError", "connected", "connected"]


async def test_a_foreign_name_is_none_in_an_internal_network() -> None:
    needs("dig")
    async with network(internal=True) as net, net.member("a") as a:
        assert "NXDOMAIN" in await output(a, "dig", "www.example.com.")
        assert await output(a, "dig", "+short", "a.") == str(A)
    async with network(uplink=Uplink(dns=[])) as net:
        assert "SERVFAIL" in await output(net, "dig", "www.example.com.")


@every_driver
async def test_a_log_of_a_member_has_its_events_alone(driver: DriverName) -> None:
    """Also of what is under way when it ends; the end of the member ends it."""
    log = io.StringIO()
    with tcp_server(echo) as port:
        async with (
            network(uplink=Uplink(allow_host_loopback=True), driver=driver) as net,
            net.member("a") as a,
            net.member("b") as b,
        ):
            streams = []
            async with anyio.create_task_group() as tasks:
                await tasks.start(a.log_events, log)
                for each in (b, a):
                    streams.append(await each.namespace.connect_tcp(GATEWAY, port))
                    await streams[-1].send(b"there")
                    assert await streams[-1].receive() == b"there"
                while not log.getvalue():  # noqa: ASYNC110 - nobody tells
                    await anyio.sleep(0.01)
                tasks.cancel_scope.cancel()
            lines = [json.loads(line) for line in log.getvalue().splitlines()]
            assert {each["guest"] for each in lines} == {str(A)}
            assert lines[-1]["kind"] == "open"
            async with anyio.create_task_group() as tasks:
                await tasks.start(b.log_events, io.StringIO())
                await net.remove_member(b)
            with pytest.raises(NamespaceGone):
                await b.log_events(io.StringIO())
            for stream in streams:
                await stream.aclose()
