"""Faults of a whole network, as iperf3, ping and curl see them; and that all drivers have them.

A measured value is compared with what was asked for, or with what the block has counted.  Every chance comes from a
seed, so a count that follows from the number of packets alone is the same in each run.
"""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import anyio
import pytest

from netns_kit import ArgumentError, Faults, FaultsBlock, Network, Policy, StackClosed, Uplink
from tests.support import missing, needs, needs_tun
from tests.support.connections import dial, outcome
from tests.support.multihop import echo_request, received
from tests.support.servers import SECONDS, closed_port, dns_server
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.usefixtures("leaks")]

HOST = "10.0.2.2"
DRIVERS: dict[str, dict[str, Any]] = {
    "thread": {"driver": "thread"},
    "loop": {"driver": "loop"},
    "worker": {"driver": "worker"},
}
BODY = bytes(1 << 20)


@pytest.fixture(params=DRIVERS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    needs_tun()
    return {"uplink": Uplink(allow_host_loopback=True), **DRIVERS[request.param]}


@pytest.fixture
async def net(options: dict[str, Any]) -> AsyncIterator[Network]:
    async with Network(**options) as net:
        yield net


@pytest.fixture
async def quick() -> AsyncIterator[Network]:
    """A network on one driver, for what is measured over time."""
    needs_tun()
    async with Network(uplink=Uplink(allow_host_loopback=True)) as net:
        yield net


@pytest.fixture
def web() -> Iterator[int]:
    """The port of a web server of the host, whose page is a megabyte; another is short."""

    class Pages(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = b"short" if self.path == "/short" else BODY
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def handle(self) -> None:
            with suppress_resets():
                super().handle()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class suppress_resets:
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, ConnectionError)


async def curl(net: Network, url: str, *words: str) -> dict[str, Any]:
    """What curl says of one request: its exit status, and its times in seconds."""
    needs("curl")
    command = ["curl", "-s", "-o", "/dev/null", "-w", "%{json}", "--max-time", "60", *words, url]
    done = await net.run(command, check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "status": done.returncode}


@asynccontextmanager
async def pinging(net: Network) -> AsyncIterator[Pings]:
    with await net.namespace.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.connect((HOST, 0))
        yield Pings(sock)


class Pings:
    """Echo requests to the host: as many answers are waited for as are to come, and no other may have come."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sent: dict[int, float] = {}

    async def send(self, count: int) -> None:
        """Send so many, a few milliseconds apart."""
        for number in range(len(self._sent), len(self._sent) + count):
            self._sent[number] = anyio.current_time()
            self._sock.send(echo_request(7, number))
            await anyio.sleep(0.005)

    async def times(self, count: int) -> list[float]:
        """The round trips of the next `count` answers, in seconds."""
        found = []
        with anyio.fail_after(SECONDS):
            for _ in range(count):
                data, _ = await received(self._sock)
                kind, number = data[20], int.from_bytes(data[26:28], "big")
                assert kind == 0, "an echo reply"
                found.append(anyio.current_time() - self._sent.pop(number))
        with pytest.raises(BlockingIOError):
            self._sock.recv(100)
        return found


class Iperf:
    """iperf3 inside, and a server of it on the host."""

    def __init__(self, net: Network, port: int) -> None:
        self._net = net
        self._port = str(port)

    async def __call__(self, *words: str) -> dict[str, Any]:
        command = ["iperf3", "-c", HOST, "-p", self._port, "-J", *words]
        done = await self._net.run(command, check=False)
        found: dict[str, Any] = json.loads(done.stdout)
        assert "error" not in found, found["error"]
        end: dict[str, Any] = found["end"]
        return end


@asynccontextmanager
async def iperf(net: Network) -> AsyncIterator[Iperf]:
    needs("iperf3")
    port = closed_port()
    command = ["iperf3", "-s", "-B", "127.0.0.1", "-p", str(port), "--forceflush"]
    async with await anyio.open_process(command, stdin=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            text = b""
            while b"listening" not in text:
                text += await server.stdout.receive()
            yield Iperf(net, port)
        finally:
            server.kill()


# -- what is measured -----------------------------------------------------------------------------------


async def test_pings_are_late_and_lost_as_asked_for(net: Network) -> None:
    async def late() -> bool:
        async with pinging(net) as pings:
            await pings.send(5)
            least = min(await pings.times(5))
            async with net.faults(delay=0.05) as block:
                await pings.send(10)
                times = await pings.times(10)
                assert (await block.counts())["in_frames"] == 10
        assert min(times) >= 0.1
        return min(times) <= 0.1 + least + 0.05

    await eventually(late)  # a busy machine may make all of ten later still
    async with pinging(net) as pings:
        async with net.faults(loss=0.3, direction="out", protocol="icmp", seed=1) as block:
            await pings.send(200)

            async def sent() -> int:
                return (await block.counts())["out_frames"]

            await eventually(sent, 200)
            lost = (await block.counts())["out_lost"]
            await pings.times(200 - lost)
        assert 0.27 <= lost / 200 <= 0.33
    async with pinging(net) as pings:
        await pings.send(5)
        await pings.times(5)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_datagrams_are_lost_as_asked_for(quick: Network) -> None:
    async with iperf(quick) as run:
        for way in ((), ("-R",)):
            here = "in" if way else "out"
            for _ in range(5):  # a machine that is busy otherwise loses datagrams too
                async with quick.faults(loss=0.05, protocol="udp", seed=3) as block:
                    found = (await run("-u", "-b", "4M", "-l", "400", "-n", "3M", *way))["sum"]
                counts = await block.counts()
                lost = counts[f"{here}_lost"]
                # beyond the last datagram that comes, iperf3 does not see what is lost
                if abs(found["lost_packets"] - lost) <= max(3, 0.1 * lost):
                    break
            assert 0.045 <= lost / counts[f"{here}_frames"] <= 0.055
            assert abs(found["lost_packets"] - lost) <= max(3, 0.1 * lost)


async def most(run: Iperf, rate: int, *words: str) -> float:
    """The most Mbit/s on the wire of a few runs: a machine that is busy otherwise keeps iperf3 from sending."""
    found = 0.0
    for _ in range(6):
        received = (await run(*words))["sum_received"]["bits_per_second"] / 1e6 * 1514 / 1448
        found = max(found, received)
        if found > 0.95 * rate:
            break
    return found


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("way", ["out", "in"])
async def test_a_rate_is_what_iperf3_measures(quick: Network, way: str) -> None:
    """Of two rates, one is twice the other, and neither is more than was asked for."""
    reverse = ("-R",) if way == "in" else ()
    tcp, udp = [], []
    async with iperf(quick) as run:
        for rate in (8, 16):
            async with quick.faults(rate=f"{rate} Mbit/s"):
                tcp.append(await most(run, rate, "-t", "3", "-O", "1", *reverse))
                udp.append(await most(run, rate, "-u", "-b", f"{2 * rate}M", "-t", "2", *reverse))
    for slow, fast in (tcp, udp):
        assert 0.9 * 2 <= fast / slow <= 1.1 * 2, (tcp, udp)
        assert slow <= 1.1 * 8
        assert fast <= 1.1 * 16


async def test_curl_takes_the_time_that_rate_and_delay_say(net: Network, web: int) -> None:
    url = f"http://{HOST}:{web}/"
    fast = await curl(net, url)
    async with net.faults(rate="8 Mbit/s", to=HOST, ports=web):
        slow = await curl(net, url)
    seconds = len(BODY) * 8 / 8e6 * 1514 / 1448
    took = slow["time_total"] - slow["time_starttransfer"]
    assert slow["size_download"] == fast["size_download"] == len(BODY)
    assert slow["speed_download"] < fast["speed_download"] / 2
    assert took >= 0.9 * seconds
    async with net.faults(delay=0.1, to=HOST):
        late = await curl(net, f"{url}short")
    assert late["time_connect"] >= 0.2
    assert late["time_starttransfer"] - late["time_connect"] >= 0.2


# -- flows and names ------------------------------------------------------------------------------------


async def test_flows_are_refused_reset_and_swallowed(net: Network, web: int) -> None:
    url = f"http://{HOST}:{web}/"
    async with net.faults(refuse=True, to="10.0.2.0/24", ports=web) as block:
        assert (await curl(net, url))["status"] == 7
        assert (await block.counts())["refused"] == 1
    async with net.faults(reset_after=100_000, to=HOST, direction="in") as block:
        found = await curl(net, url)
        assert found["status"] == 56
        assert (await block.counts())["reset"] == 1
    async with net.faults(blackhole=True, ports=web):
        assert (await curl(net, url, "--connect-timeout", "0.5"))["status"] == 28
    assert (await curl(net, url))["size_download"] == len(BODY)


async def test_a_name_is_disturbed_and_no_other(net: Network, web: int) -> None:
    await net.stack.add_record(f"api.example.org={HOST}")
    await net.stack.add_record("www.example.net=10.0.2.3")
    url = f"http://api.example.org:{web}/short"
    async with net.faults(refuse=True, to="*.example.org"):
        assert (await curl(net, url))["status"] == 7
    async with net.faults(refuse=True, to="*.example.net"):
        assert (await curl(net, url))["status"] == 0


QUERY = """
import socket, sys, time
name = sys.argv[1]
wire = b"".join(bytes([len(each)]) + each.encode() for each in name.split(".")) + bytes(1)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(float(sys.argv[2]))
    sock.connect(("10.0.2.3", 53))
    begin = time.monotonic()
    sock.send(bytes.fromhex("000101000001000000000000") + wire + bytes.fromhex("00010001"))
    try:
        print(sock.recv(512)[3] & 15, time.monotonic() - begin)
    except TimeoutError:
        print(-1, 0)
"""


async def rcode(net: Network, name: str, seconds: float = 20.0) -> tuple[int, float]:
    done = await net.run([sys.executable, "-c", QUERY, name, str(seconds)])
    code, took = done.stdout.split()
    return int(code), float(took)


async def test_queries_fail_and_are_slow(net: Network) -> None:
    name = "host.containers.internal"
    async with net.faults(dns="nxdomain", to=name):
        assert (await rcode(net, name))[0] == 3
        assert (await rcode(net, "gateway.containers.internal"))[0] == 0
    async with net.faults(dns="servfail"):
        assert (await rcode(net, name))[0] == 2
    async with net.faults(dns="timeout"):
        assert (await rcode(net, name, 0.5))[0] == -1
    async with net.faults(dns_delay=0.3):
        code, took = await rcode(net, name)
    assert code == 0
    assert took >= 0.3
    assert (await rcode(net, name))[0] == 0


async def test_ipv6_has_faults_too(options: dict[str, Any]) -> None:
    async with Network(ipv6=True, **options) as net:
        if net.subnet.ipv6 is None:
            missing("no IPv6")
        gateway = str(net.subnet.ipv6.gateway)
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
            program = (
                "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 20).close()"
            )
            command = [sys.executable, "-c", program, gateway, str(server.getsockname()[1])]
            async with net.faults(delay=0.05, to="fd00::/64", protocol="tcp") as block:
                await net.run(command)
                counts = await block.counts()
            assert counts["out_frames"] >= 2
            assert counts["in_frames"] >= 1
            async with net.faults(refuse=True, to=gateway) as block:
                assert (await net.run(command, check=False)).returncode
                assert (await block.counts())["refused"] == 1


# -- blocks ---------------------------------------------------------------------------------------------


async def test_a_script_runs_without_its_caller(net: Network, web: int) -> None:
    async def connects() -> int:
        with await dial(net.namespace, web, HOST) as sock:
            return await outcome(sock)

    async with net.faults(script=[(0, Faults(refuse=True)), (1.5, Faults())]) as block:
        assert await connects() == errno.ECONNREFUSED
        await eventually(connects, 0)
        assert (await block.counts())["refused"] >= 1


async def test_a_cancelled_block_leaves_nothing(net: Network, web: int) -> None:
    entered: list[FaultsBlock] = []
    with anyio.CancelScope() as scope:
        async with net.faults(refuse=True) as block:
            entered.append(block)
            scope.cancel()
            await anyio.sleep_forever()
    assert entered
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with net.faults(refuse=True):
            await anyio.lowlevel.checkpoint()
    assert (await curl(net, f"http://{HOST}:{web}/short"))["status"] == 0


async def test_the_policy_decides_first(options: dict[str, Any], web: int) -> None:
    async with Network(
        policy=Policy.deny().allow(HOST, ports=web + 1 if web < 65535 else 1), **options
    ) as net:
        async with net.faults(refuse=True, to=HOST) as block:
            await curl(net, f"http://{HOST}:{web}/short")
            assert (await block.counts())["refused"] == 0
        assert (await net.stack.stats())["policy_refused"] >= 1


async def test_what_a_block_is_given_is_checked(net: Network) -> None:
    wrong: list[Any] = [{}, {"loss": 2.0}, {"rate": "10 Mbit"}, {"to": "no name", "loss": 0.1}]
    for given in wrong:
        with pytest.raises(ArgumentError):
            net.faults(**given)
    with pytest.raises(ArgumentError):
        net.faults(Faults(), loss=0.1)
    with pytest.raises(ArgumentError):
        net.faults(0.1)  # type: ignore[arg-type]  # the same


async def test_a_closed_network_has_no_faults(options: dict[str, Any]) -> None:
    async with Network(**options) as net, net.faults(loss=0.1) as block:
        await net.close()
    assert await block.counts() == {}
    with pytest.raises(StackClosed):
        async with net.faults(loss=0.1):
            pass


async def test_several_workers_have_faults(web: int, tmp_path: Path) -> None:
    needs_tun()
    uplink = Uplink(allow_host_loopback=True)
    async with (
        Network(driver="worker", queues=2, uplink=uplink) as net,
        net.faults(refuse=True, to=HOST) as block,
    ):
        for _ in range(8):
            assert (await curl(net, f"http://{HOST}:{web}/short"))["status"] == 7
        assert (await block.counts())["refused"] == 8


@pytest.mark.parametrize("when", ["before", "in the block"])
async def test_a_fault_by_name_is_one_of_each_worker(when: str) -> None:
    """One worker answers for the name, before the block or in it; the connections are of both."""
    needs_tun()
    there = "192.0.2.7"
    with dns_server({"name.tld": there}) as resolver:
        uplink = Uplink(allow_host_loopback=True, dns=[f"127.0.0.1:{resolver}"])
        async with Network(driver="worker", queues=2, uplink=uplink) as net:
            if when == "before":
                await net.run(["getent", "ahostsv4", "name.tld."])
            async with net.faults(refuse=True, to="*.tld") as block:
                if when != "before":
                    await net.run(["getent", "ahostsv4", "name.tld."])
                for number in range(1, 17):
                    with pytest.raises(ConnectionRefusedError), anyio.fail_after(20):
                        await net.namespace.connect_tcp(there, 80)
                    assert (await block.counts())["refused"] == number
