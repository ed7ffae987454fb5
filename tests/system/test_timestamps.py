"""What timestamps are for in a guest's kernel: ports of connections in TIME-WAIT are used again."""

from __future__ import annotations

import json
import sys
from subprocess import PIPE

import pytest

from netns_kit import Namespace, Network, TapDevice, Uplink, UserStack
from netns_kit.gateway.setup import DriverName
from tests.support.connections import GATEWAY, network, once
from tests.support.servers import bounded, tcp_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

FIRST, PORTS, CONNECTIONS = 40000, 4, 8

# Run inside.  The client ends first, and so keeps the port for a minute, but for tcp_tw_reuse, which takes what was
# last heard of a second ago or longer.  It prints how many connections it has made, and how often it found no port.
PROGRAM = """
import errno, json, socket, sys, time
host, port, connections = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
end, made, without = time.monotonic() + 20, 0, 0
while made < connections and time.monotonic() < end:
    with socket.socket() as sock:
        try:
            sock.connect((host, port))
        except OSError as error:
            assert error.errno == errno.EADDRNOTAVAIL, error
            without += 1
            time.sleep(0.05)
            continue
        sock.send(b"question")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(9) == b""
        made += 1
print(json.dumps([made, without]))
"""


async def connections(net: Network, port: int) -> tuple[int, int]:
    await net.namespace.set_sysctl("net.ipv4.tcp_tw_reuse", 1)
    await net.namespace.set_sysctl("net.ipv4.ip_local_port_range", f"{FIRST} {FIRST + PORTS - 1}")
    command = [sys.executable, "-ISc", PROGRAM, GATEWAY, str(port), str(CONNECTIONS)]
    done = await net.namespace.run(command, stdout=PIPE)
    made, without = json.loads(done.stdout)
    return made, without


@once
@bounded
async def test_ports_in_time_wait_are_used_again(driver: DriverName) -> None:
    """All connections are made, where the ports are for half of them."""
    with tcp_server(lambda sock: sock.recv(100) and sock.recv(100)) as port:
        async with network(driver) as net:
            made, without = await connections(net, port)
    assert made == CONNECTIONS
    assert without, "the ports were used up meanwhile"


@once
@bounded
async def test_also_by_a_stack_that_was_not_there_before(driver: DriverName) -> None:
    """The clock is the machine's: another stack's timestamps are newer than those that the kernel remembers."""
    with tcp_server(lambda sock: sock.recv(100) and sock.recv(100)) as port:
        async with Namespace.create() as namespace, TapDevice.open(namespace, "tap0") as tap:
            await namespace.set_sysctl("net.ipv4.tcp_tw_reuse", 1)
            await namespace.set_sysctl("net.ipv4.ip_local_port_range", f"{FIRST} {FIRST + PORTS - 1}")
            for _ in range(2):
                async with UserStack(tap, Uplink(allow_host_loopback=True), driver=driver):
                    command = [sys.executable, "-ISc", PROGRAM, GATEWAY, str(port), str(PORTS)]
                    done = await namespace.run(command, stdout=PIPE)
                    assert json.loads(done.stdout)[0] == PORTS
