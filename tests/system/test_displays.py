"""Displays of a network that runs: what is true of it is seen, by member, with each driver; and after its end."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from netns_kit import (
    ArgumentError,
    Follow,
    Namespace,
    NamespaceSnapshot,
    Policy,
    PortForward,
    UnixSocket,
    Uplink,
    read_capture,
)
from netns_kit.gateway.setup import DriverName
from tests.support import needs, needs_tun, needs_userns
from tests.support.connections import every_driver
from tests.support.displays import SVG, checked, picture, texts
from tests.support.members import network, output
from tests.support.servers import bounded, hello, tcp_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

CLIENT = """
import socket, sys
for port in sys.argv[2:]:
    try:
        with socket.create_connection((sys.argv[1], int(port)), 20) as sock:
            print(sock.recv(100).decode())
    except OSError:
        print("refused")
"""
NAMED = """
import ctypes, socket, sys
ctypes.CDLL(None).prctl(15, b"<script>a\\x1b[2J", 0, 0, 0)
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    input()
"""
"""A server with a name that means harm."""


@pytest.fixture(autouse=True)
def _tun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    needs_userns()
    needs_tun()


@every_driver
async def test_all_of_a_network_is_shown_while_it_runs_and_after(driver: DriverName) -> None:
    with tcp_server(hello) as port:
        uplink = Uplink(allow_host_loopback=True)
        web_policy = Policy.deny().allow("HOST", ports=port)
        async with (
            network(uplink=uplink, driver=driver, ports=["127.0.0.1:0:80"], policy=Policy.allow()) as net,
            net.member("web", aliases=["www"], ports=["127.0.0.1:0:8080"], policy=web_policy) as web,
            net.stack.capture(None, max_bytes=4 << 20) as capture,
        ):
            [published] = await net.forwarder.list()
            [of_web] = await web.forwarder.list()
            before = await net.stack.stats()
            assert (
                await output(web, sys.executable, "-ISc", CLIENT, "10.0.2.2", str(port), "9")
                == "hello\nrefused"
            )
            text, html = checked(net)
            for each in (text, "\n".join(texts(html))):
                for line in ("gateway", "DNS 10.0.2.3", "hub", "web", "= www", "10.0.2.101"):
                    assert line in each
                assert f"127.0.0.1:{published.host_port} → 80/tcp" in each
                assert f"127.0.0.1:{of_web.host_port} → 8080/tcp" in each
                assert "policy: 1 rule, then deny" in each
            assert f"127.0.0.1:{of_web.host_port}" in checked(web)[0]
            assert f"127.0.0.1:{published.host_port}" in checked(net.forwarder)[0]
            assert f"driver   {driver}" in checked(net.stack)[0]
            hits = await web.policy_hits()
            assert hits is not None
            assert [each.flows for each in hits.rules] == [1, 1]
            assert [each.flows for each in (await net.stack.policy_hits() or hits).rules] == [0]
            checked(await net.stack.flows())
            seen = await web.flows()
            checked(seen)
            after = await net.stack.stats()
            assert after["policy_refused"] == before["policy_refused"] + 1
            lines = [line.split() for line in checked(after)[0].splitlines()]
            assert ["policy_refused", "1", "+1"] in lines
            packets = await capture.packets()
            [conversation] = [each for each in packets.tcp() if each.other == f"10.0.2.2:{port}"]
            assert "SYN ACK seq 0 ack 1" in checked(conversation)[0]
            checked(packets)
            assert checked(capture)[0].startswith("Capture: open")
        shown = [checked(each)[0] for each in (net, net.stack, net.forwarder, net.namespace, web, capture)]
        assert [each.splitlines()[0].rpartition(": ")[2] for each in shown] == [*["closed"] * 5, "complete"]
        assert not any("127.0.0.1:" in each for each in shown), "no port is published any more"
        assert set(seen.names.values()) == {"web"}, "what was seen stays as it was"
        assert (await capture.packets())[: len(packets)] == packets, "what was kept is there still"


async def test_a_file_is_read_back_as_packets(tmp_path: Path) -> None:
    needs("ping")
    path = tmp_path / "capture.pcapng"
    async with network() as net:
        async with net.stack.capture(path) as capture:
            await net.run(["ping", "-c1", "10.0.2.3"])
        packets = await capture.packets()
        assert len(packets) == capture.frames
        told = [f"{each.direction}: {each.layers[-1].summary}" for each in packets]
        assert [each.partition(", id")[0] for each in told if "echo" in each] == [
            "from guest: echo request",
            "to guest: echo reply",
        ]
        assert read_capture(path) == read_capture(io.BytesIO(path.read_bytes())) == packets
        async with net.stack.capture(io.BytesIO()) as own:
            with pytest.raises(ArgumentError, match="read_capture"):
                await own.packets()


@bounded
async def test_a_namespace_at_one_moment() -> None:
    async with (
        Namespace.create() as namespace,
        await namespace.popen([sys.executable, "-ISc", NAMED, "<script>"], stdin=-1) as server,
    ):
        assert server.stdout is not None
        port = int(await server.stdout.receive())
        found = await namespace.snapshot()
        assert isinstance(found, NamespaceSnapshot)
        assert [link.name for link in found.links] == ["lo"]
        assert [(each.protocol, str(each.address), each.port) for each in found.listening] == [
            ("tcp", "127.0.0.1", port)
        ]
        [process] = found.processes
        assert (process.pid, process.uid, process.command.split()[-1]) == (2, 0, "<script>")
        assert process.memory > 1 << 20
        text, html = checked(found)
        assert r"<script>a\x1b[2J" in text
        assert "127.0.0.1/8" in html
        assert "each other" in checked(namespace)[0]
    assert checked(namespace)[0] == "Namespace create(ids='root'): closed"
    checked(found)


@bounded
async def test_many_processes_are_counted() -> None:
    async with Namespace.create() as namespace:
        forks = "for n in range(230):\n if os.fork() == 0: time.sleep(100)"
        async with await namespace.popen(
            [sys.executable, "-ISc", f"import os, time\n{forks}\nprint('there', flush=True); time.sleep(100)"]
        ) as process:
            assert process.stdout is not None
            await process.stdout.receive()
            found = await namespace.snapshot()
            assert (len(found.processes), found.more_processes) == (200, 31)
            assert f"… and {231 - 40} more" in str(found)


@bounded
@pytest.mark.parametrize("members", [0, 1, 3, 12])
async def test_nothing_overlaps_in_the_picture(members: int) -> None:
    async with network(driver="loop", ports=["127.0.0.1:0:80"], ipv6=True) as net:
        for number in range(members):
            name = f"m{number}" if number % 2 else f"a-name-of-many-characters-{'x' * 30}-{number}"
            await net.add_member(name, ports=[f"127.0.0.1:0:{80 + n}" for n in range(number)])
        text, html = checked(net)
        root = picture(html)
        boxes = [
            tuple(float(each.attrib[name]) for name in ("x", "y", "width", "height"))
            for each in root.iter(f"{SVG}rect")
        ]
        kinds = [each.attrib["class"] for each in root.iter(f"{SVG}rect")]
        assert kinds == ["outside", "gateway", "hub", *["member"] * members]
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for at, (x, y, wide, high) in enumerate(boxes):
            assert x >= 0
            assert x + wide <= width
            assert y + high <= height
            for left, top, broad, tall in boxes[:at]:
                assert x + wide <= left or left + broad <= x or y + high <= top or top + tall <= y
        for each in root.iter(f"{SVG}text"):
            half = len(each.text or "") * 7.3 / 2
            middle, base = float(each.attrib["x"]), float(each.attrib["y"])
            assert any(
                x <= middle - half and middle + half <= x + wide and y < base < y + high
                for x, y, wide, high in boxes
            )
        whole = texts(html)
        assert all(any(name in each for each in whole) for name in net.members), (
            "a name that is cut is in its title"
        )
        assert all(name in text for name in net.members)
        if members == 12:
            assert "… 7 more ports" in whole


async def test_an_internal_network_has_no_way_out_in_its_picture() -> None:
    async with network(internal=True, isolate=True) as net, net.member("a"):
        text, html = checked(net)
        for each in ("no way out", "members do not reach each other"):
            assert each in text
            assert each in texts(html)
        [outside] = [each for each in picture(html).iter(f"{SVG}rect") if each.attrib["class"] == "outside"]
        assert "stroke-dasharray" in outside.attrib


@bounded
async def test_a_network_shows_what_it_has_a_route_to() -> None:
    async with network() as net, network(subnet="10.9.0.0/16") as far:
        async with net.route_to(far):
            assert "routes to  10.9.0.0/16" in checked(net)[0]
            assert "routes to  10.0.2.0/24" in checked(far)[0]
        assert "routes to" not in checked(net)[0]


@bounded
async def test_a_path_that_is_published_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    path = f"{tmp_path}/<script>"
    async with network(driver="loop") as net:
        [forward] = await net.forwarder.add(PortForward("tcp", UnixSocket(path), 0, None, 80))
        await net.forwarder.reverse("7", "127.0.0.1:7")
        await net.forwarder.add(Follow("tcp", "127.0.0.1"))
        for each in (net, net.forwarder):
            text, _ = checked(each)
            assert "<script>" in text
            assert str(forward.guest_port) in text
            assert "127.0.0.1:7 inside -> 127.0.0.1:7/tcp" in text
        await net.forwarder.remove(forward)
        assert "<script>" not in str(net)
