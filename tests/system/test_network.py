"""Network: programs inside reach the world.  The guest is this kernel, the clients are curl, dig and ping."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import anyio
import pytest

from netns_kit import (
    AddressError,
    ArgumentError,
    Namespace,
    Network,
    PortInUseError,
    PortSpecError,
    Uplink,
)
from netns_kit.gateway.setup import DriverName
from tests.support import LONG, ROOT, missing, needs, needs_ping, needs_tun
from tests.support.connections import every_driver
from tests.support.servers import SECONDS, closed_port, dns_server, echo, host_address, http, tcp_server
from tests.support.servers import digest as expected

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

RESOLV_CONF = Path("/etc/resolv.conf")
NAMES = {"name.tld": "192.0.2.7"}

CONNECT = """
import json, socket, struct, sys
sock = socket.socket()
sock.settimeout(20)
try:
    sock.connect((sys.argv[1], int(sys.argv[2])))
    error = 0
except OSError as exc:
    error = exc.errno
print(json.dumps([error, *struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 100)]))
"""


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


@asynccontextmanager
async def network(seconds: float = SECONDS, **options: Any) -> AsyncIterator[Network]:
    """With a bound on all waiting in it."""
    with anyio.fail_after(seconds):
        async with Network(**options) as net:
            yield net


async def output(net: Network, *command: str) -> str:
    try:
        return (await net.run(command)).stdout.decode().strip()
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"{command}: {error.returncode}\n{error.stderr.decode()}") from error


async def connect(net: Network, address: str, port: int) -> tuple[int, int]:
    """What a program inside gets for its connect, the errno, and how many more SYN its kernel had to send for it."""
    error, again = json.loads(await output(net, sys.executable, "-ISc", CONNECT, address, str(port)))
    return error, again


@pytest.mark.parametrize("driver", get_args(DriverName))
async def test_ready_means_ready(driver: DriverName) -> None:
    """At once after entering: address, route, gateway, DNS, and a page."""
    needs("curl", "dig", "ping")
    with dns_server(NAMES) as resolver, tcp_server(http) as port:
        uplink = Uplink(allow_host_loopback=True, dns=[f"127.0.0.1:{resolver}"])
        async with network(uplink=uplink, driver=driver) as net:
            assert await output(net, "curl", "-sSf", f"http://10.0.2.2:{port}/peer") == "127.0.0.1"
            assert await output(net, "dig", "+short", "name.tld") == "192.0.2.7"
            assert await output(net, "dig", "+short", "+tcp", "name.tld") == "192.0.2.7"
            assert "status: NXDOMAIN" in await output(net, "dig", "other.tld")
            assert (await output(net, "getent", "ahostsv4", "name.tld")).startswith("192.0.2.7")
            assert " 0% packet loss" in await output(net, "ping", "-c1", "-W5", "10.0.2.2")
            assert " 0% packet loss" in await output(net, "ping", "-c1", "-W5", "10.0.2.3")
            tap = [str(found.interface) for found in await net.namespace.addresses() if found.index != 1]
            assert "10.0.2.100/24" in tap


@every_driver
async def test_a_big_file_comes_and_goes(
    driver: DriverName,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    anyio_backend_name: str,
) -> None:
    needs("curl")
    full = (driver, anyio_backend_name) == ("thread", "asyncio")
    mebibytes = (2048 if LONG else 256) if full else 64
    path = tmp_path / "file"
    wanted = await anyio.to_thread.run_sync(expected, mebibytes)
    with tcp_server(http) as port:
        uplink = Uplink(allow_host_loopback=[port])
        async with network(600, uplink=uplink, driver=driver) as net:
            url, rate = f"http://10.0.2.2:{port}/{mebibytes}", "%{stderr}%{time_total}"
            down = await net.run(["curl", "-sSf", "-w", rate, "-o", str(path), url])
            up = await net.run(["curl", "-sSf", "-w", rate, "-T", str(path), url])
    for name, done in ("down", down), ("up", up):
        record_property(f"{name}_gbit_s", mebibytes * 8 / 953.67 / float(done.stderr))
    assert await anyio.to_thread.run_sync(_sha256, path) == wanted
    assert up.stdout.decode() == wanted
    path.unlink()


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


@every_driver
async def test_two_hundred_downloads_at_once(driver: DriverName, tmp_path: Path) -> None:
    """All are under way before one is served."""
    needs("curl")
    count, mebibytes = 200, 10 if LONG else 1
    everybody = threading.Barrier(count)

    def serve(sock: socket.socket) -> None:
        everybody.wait(SECONDS)
        http(sock)

    with tcp_server(serve) as port:
        uplink = Uplink(allow_host_loopback=True)
        async with network(300, uplink=uplink, driver=driver) as net:
            await output(
                net, "curl", "-sSf", "-Z", "--parallel-immediate", "--parallel-max", str(count),
                f"http://10.0.2.2:{port}/{mebibytes}?[1-{count}]", "-o", f"{tmp_path}/#1",
            )  # fmt: skip
            assert (await net.stack.stats()).get("tcp_established", 0) < count
    files = [tmp_path / name for name in os.listdir(tmp_path)]
    assert len(files) == count
    assert {_sha256(path) for path in files} == {expected(mebibytes)}
    for path in files:
        os.unlink(path)


# -- names ---------------------------------------------------------------------------------------------


async def test_resolv_conf_inside_is_ours_and_the_hosts_untouched() -> None:
    before = _seen(RESOLV_CONF)
    async with network() as net:
        assert await output(net, "cat", str(RESOLV_CONF)) == "nameserver 10.0.2.3"
        async with await net.popen(
            ["sh", "-c", f"cat {RESOLV_CONF}; echo changed >{RESOLV_CONF}"]
        ) as process:
            assert process.stdout is not None
            assert await process.stdout.receive() == b"nameserver 10.0.2.3\n"
            await process.wait()
        assert await output(net, "cat", str(RESOLV_CONF)) == "nameserver 10.0.2.3"
        with_ours = await net.run(["cat", "/etc/hostname"], files={"/etc/hostname": "inside\n"})
        assert with_ours.stdout == b"inside\n"
    assert _seen(RESOLV_CONF) == before


def _seen(path: Path) -> tuple[bytes, int]:
    return path.read_bytes(), path.stat().st_mtime_ns


async def test_another_network() -> None:
    needs("ping")
    with tcp_server(http) as port:
        uplink = Uplink(allow_host_loopback=True)
        async with network(uplink=uplink, subnet="172.30.9.128/25", mtu=9000) as net:
            assert await output(net, "cat", str(RESOLV_CONF)) == "nameserver 172.30.9.131"
            assert " 0% packet loss" in await output(net, "ping", "-c1", "-W5", "-s", "8000", "172.30.9.130")
            assert (await connect(net, "172.30.9.130", port))[0] == 0
            assert next(link.mtu for link in await net.namespace.links() if link.name == "tap0") == 9000


# -- what may be reached -------------------------------------------------------------------------------


@every_driver
async def test_ping_goes_out(driver: DriverName) -> None:
    needs("ping")
    needs_ping()
    address = host_address()
    if address is None:
        missing("no address but the loopback's")
    async with network(driver=driver) as net:
        text = await output(net, "ping", "-c2", "-i0.05", "-w20", "-s1000", str(address))
        assert re.findall(rf"1008 bytes from {address}: icmp_seq=(\d+)", text)[:2] == ["1", "2"], text


@every_driver
async def test_the_hosts_loopback_is_not_reachable_unasked(driver: DriverName) -> None:
    reached: list[socket.socket] = []
    with tcp_server(reached.append) as port:
        async with network(driver=driver) as net:
            assert await connect(net, "10.0.2.2", port) == (errno.EHOSTUNREACH, 0)
    assert reached == []


async def test_one_port_of_the_hosts_loopback() -> None:
    with tcp_server(echo) as granted, tcp_server(echo) as other:
        async with network(uplink=Uplink(allow_host_loopback=[granted])) as net:
            assert (await connect(net, "10.0.2.2", granted))[0] == 0
            assert (await connect(net, "10.0.2.2", other))[0] == errno.EHOSTUNREACH


async def test_nobody_else_lives_there() -> None:
    needs("ip")
    async with network() as net:
        await net.run(["ip", "neighbour", "add", "10.0.2.77", "lladdr", "52:55:0a:00:02:02", "dev", "tap0"])
        assert await connect(net, "10.0.2.77", 80) == (errno.EHOSTUNREACH, 0)


# -- the object ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ports": ["80:80:80"]}, PortSpecError),
        ({"subnet": "10.0.2.0/30"}, AddressError),
        ({"mtu": 67}, ArgumentError),
        ({"mtu": 65522}, ArgumentError),
    ],
)
async def test_bad_arguments_raise_before_anything_is_made(
    options: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(error):
        Network(**options)


async def test_a_port_that_cannot_be_had_leaves_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        spec = f"127.0.0.1:{taken.getsockname()[1]}:80"
        free = closed_port()
        with pytest.raises(PortInUseError, match=spec.removesuffix(":80")):
            async with network(ports=[f"127.0.0.1:{free}:81", spec]):
                pass
    with socket.create_server(("127.0.0.1", free)):
        pass


async def test_a_namespace_of_the_callers_choice() -> None:
    with tcp_server(http) as port:
        uplink = Uplink(allow_host_loopback=True)
        async with network(uplink=uplink, namespace=Namespace.create(ids="same")) as net:
            assert await output(net, "id", "-u") == str(os.geteuid())
            assert (await connect(net, "10.0.2.2", port))[0] == 0


async def test_networks_side_by_side() -> None:
    """Six, on every driver, on one loop; each has its own stack."""
    with tcp_server(http) as port:

        async def one(driver: DriverName) -> None:
            async with network(uplink=Uplink(allow_host_loopback=True), driver=driver) as net:
                assert (await connect(net, "10.0.2.2", port))[0] == 0

        async with anyio.create_task_group() as tasks:
            for driver in ("thread", "loop", "worker", "thread", "loop", "worker"):
                tasks.start_soon(one, driver)


SCRIPT = """
import sys, threading
import anyio
from netns_kit import Network, Uplink

stop = threading.Event()

def busy():
    while not stop.wait(0.001):
        sum(range(1000))

async def main():
    async with Network(uplink=Uplink(allow_host_loopback=True)) as net:
        print((await net.run([sys.executable, "-ISc", sys.argv[2], "10.0.2.2", sys.argv[3]])).stdout.decode())

threads = [threading.Thread(target=busy) for _ in range(4)]
for thread in threads:
    thread.start()
try:
    anyio.run(main, backend=sys.argv[1])
finally:
    stop.set()
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_in_a_script_that_has_other_threads(backend: str) -> None:
    with tcp_server(http) as port:
        command = [sys.executable, "-W", "error", "-c", SCRIPT, backend, CONNECT, str(port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)[0] == 0
