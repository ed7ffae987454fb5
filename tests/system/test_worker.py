"""The worker on a real tap: what only it promises.  What it shares with the other drivers is tested beside them."""

# ruff: noqa: PT012 - what raises is a whole `async with` block

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from netns_kit import Impairment, Network, StackCrashed, TapDevice, Uplink, UserStack
from netns_kit.userstack.worker.sandbox import ON
from tests.support import needs, needs_tun
from tests.support.load import rig
from tests.support.servers import SECONDS, bounded, closed_port, dns_server, echo, tcp_server
from tests.support.uplinks import Reading

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

GATEWAY = "10.0.2.2"
ECHO = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sock, _ = listener.accept()
while data := sock.recv(100):
    sock.sendall(data)
"""
ASK = """
import socket, sys, time
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
until = time.monotonic() + 20
while time.monotonic() < until:
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
    print(time.monotonic(), flush=True)
    time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


@contextmanager
def other_process(code: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-ISc", code], stdout=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


@bounded
async def test_a_runtime_that_holds_its_lock_does_not_stop_the_network() -> None:
    """Server and client are other processes; ours does not let go of the GIL for a while."""
    uplink = Uplink(allow_host_loopback=True)
    with other_process(ECHO) as server:
        assert server.stdout is not None
        port = (await anyio.to_thread.run_sync(server.stdout.readline)).decode().strip()
        async with (
            Network(uplink=uplink, driver="worker") as net,
            await net.popen([sys.executable, "-ISuc", ASK, GATEWAY, port]) as client,
        ):
            assert client.stdout is not None
            assert (await client.stdout.receive()).startswith(b"ready")
            clock, sleep = ctypes.PyDLL(None).clock_gettime, ctypes.PyDLL(None).usleep
            began, ended = (ctypes.c_long * 2)(), (ctypes.c_long * 2)()
            clock(1, began)
            sleep(1_000_000)
            clock(1, ended)
            first, last = (each[0] + each[1] / 1e9 for each in (began, ended))
            told = b""
            while not told or float(told.rpartition(b"\n")[0].rpartition(b"\n")[2] or 0) < last:
                told += await client.stdout.receive()
            meanwhile = [stamp for stamp in map(float, told.split()[:-1]) if first < stamp < last]
            assert len(meanwhile) > 5


@bounded
async def test_resolv_conf_is_followed_from_within(tmp_path: Path) -> None:
    """Wherever it is: it may be replaced, be a link, and the link be put elsewhere."""
    needs("dig")
    await anyio.to_thread.run_sync(_check_resolv_conf, tmp_path)
    conf, real = tmp_path / "resolv.conf", tmp_path / "elsewhere" / "resolv.conf"
    with dns_server({"name.tld": "192.0.2.7"}) as port:
        async with Network(uplink=Reading(str(conf), port), driver="worker") as net:
            assert net.stack.sandbox["landlock"] == ON
            dig = ["dig", "+short", "+tries=1", "+time=20", "name.tld"]
            await net.run(dig, check=False)
            assert (await net.stack.stats())["dns_answered"] == 0, "nobody answers there"
            _replace(real, "nameserver 127.0.0.1\n")
            assert (await net.run(dig)).stdout.strip() == b"192.0.2.7"


def _check_resolv_conf(directory: Path) -> None:
    (directory / "elsewhere").mkdir()
    _replace(directory / "elsewhere" / "resolv.conf", "nameserver 127.0.0.77\n")
    (directory / "resolv.conf").symlink_to("elsewhere/resolv.conf")


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


@bounded
async def test_a_namespace_that_cannot_read_a_file_needs_no_file() -> None:
    """With resolvers given, nothing on the disk is readable to the worker."""
    needs("dig")
    with dns_server({"name.tld": "192.0.2.7"}) as port:
        async with Network(uplink=Uplink(dns=[f"127.0.0.1:{port}"]), driver="worker") as net:
            assert (await net.run(["dig", "+short", "name.tld"])).stdout.strip() == b"192.0.2.7"


@bounded
async def test_a_killed_worker_ends_the_block_and_frees_its_ports() -> None:
    with tcp_server(echo) as port:
        with pytest.raises(StackCrashed, match="SIGKILL"):
            async with Network(uplink=Uplink(allow_host_loopback=True), driver="worker") as net:
                (forward,) = await net.forwarder.add(f"127.0.0.1:{closed_port()}:80")
                async with await net.namespace.connect_tcp(GATEWAY, port) as stream:
                    await stream.send(b"x")
                    assert await stream.receive() == b"x"
                    os.kill(net.stack.workers.processes[0].pid, signal.SIGKILL)
                    await net.wait_closed()
        with socket.create_server(("127.0.0.1", forward.host_port)):
            pass


@bounded
async def test_leaving_resets_what_is_open() -> None:
    with tcp_server(echo) as port:
        async with Network(uplink=Uplink(allow_host_loopback=True)) as outer:
            tap = TapDevice.open(outer.namespace, "tap1")
            async with tap:
                stack = UserStack(
                    tap, Uplink(allow_host_loopback=True), subnet="10.1.0.0/24", driver="worker"
                )
                async with stack:
                    stream = await outer.namespace.connect_tcp("10.1.0.2", port)
                    await stream.send(b"x")
                    assert await stream.receive() == b"x"
                async with stream:
                    with pytest.raises(anyio.BrokenResourceError):
                        await stream.receive()


@bounded
async def test_a_bad_link_goes_along() -> None:
    """An impaired device is impaired there: nothing arrives over one that loses all, so nobody says whose address it
    is, once that is to be asked."""
    needs("ip")
    async with rig("worker", impaired=Impairment(loss=1.0)) as made:
        await made.namespace.run(["ip", "neighbour", "flush", "dev", "tap0", "nud", "permanent"])
        with pytest.raises(OSError, match="route"), anyio.fail_after(SECONDS):
            await made.namespace.connect_tcp(GATEWAY, 9)
        assert (await made.stack.stats())["udp_flows"] == 0
