"""A guest that is a router itself: what is behind it takes smaller packets than its own link does."""

from __future__ import annotations

import json
import socket
import sys
from subprocess import PIPE
from typing import Any

import pytest

from netns_kit import Network, Uplink
from netns_kit.gateway.setup import DriverName
from tests.support import needs, needs_ipv6
from tests.support.servers import bounded, tcp_server, udp_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

MTU = 1300
ADDRESSES = {4: ("10.0.2.2", "10.0.2.101"), 6: ("fd00::2", "fd00::101")}
SIZE = 1 << 20

# Run inside, as root of it.  The program that follows lives in a namespace of its own, behind a link whose ends take
# 1500 bytes; but the way there takes fewer.
BEHIND = """
set -e
inner=$1 family=$2 bits=$3 mtu=$4; shift 4
export PATH=$PATH:/usr/sbin:/sbin
ip link add outer0 type veth peer name inner0
unshare --net sleep 60 & pid=$!
trap "kill $pid" EXIT
until [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do :; done
ip link set inner0 netns $pid
echo 1 > /proc/sys/net/ipv4/ip_forward
echo 1 > /proc/sys/net/ipv4/conf/outer0/proxy_arp
echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
ip link set outer0 up
ip -$family route add $inner dev outer0 mtu lock $mtu
link=$(ip -br link show outer0 | awk '{print $3}')
nsenter --net=/proc/$pid/ns/net sh -ec "
ip link set inner0 up
ip -$family address add $inner/$bits dev inner0 $([ $family = 6 ] && echo nodad)
ip -$family route add default dev inner0
"
[ $family = 4 ] || for each in fd00::2 fd00::3; do
    nsenter --net=/proc/$pid/ns/net ip -6 neigh add $each lladdr $link dev inner0
done
nsenter --net=/proc/$pid/ns/net "$@"
"""

CLIENT = """
import json, socket, sys
host, stream, datagrams, size = sys.argv[1], *map(int, sys.argv[2:])
family = socket.AF_INET6 if ":" in host else socket.AF_INET
with socket.create_connection((host, stream), 20) as sock:
    received = 0
    while data := sock.recv(1 << 16):
        received += len(data)
asked = 0
with socket.socket(family, socket.SOCK_DGRAM) as sock:
    sock.settimeout(1)
    sock.connect((host, datagrams))
    answer = b""
    while not answer and asked < 10:
        sock.send(b"question")
        asked += 1
        try:
            answer = sock.recv(1 << 16)
        except TimeoutError:
            sock.settimeout(20)
print(json.dumps([received, asked, len(answer)]))
"""


@pytest.mark.parametrize("family", [4, 6])
@bounded
async def test_what_does_not_fit_is_sent_smaller(driver: DriverName, family: int) -> None:
    needs("ip", "unshare", "nsenter")
    needs_ipv6()
    gateway, inner = ADDRESSES[family]
    loopback = ("127.0.0.1" if family == 4 else "::1", 0)

    def say(sock: socket.socket) -> None:
        sock.sendall(bytes(SIZE))

    with tcp_server(say, loopback) as stream, udp_server(answer, loopback) as datagrams:
        async with Network(ipv6=family == 6, uplink=Uplink(allow_host_loopback=True), driver=driver) as net:
            bits = "32" if family == 4 else "128"
            script = ["sh", "-c", BEHIND, "sh", inner, str(family), bits, str(MTU)]
            client = [sys.executable, "-ISc", CLIENT, gateway, str(stream), str(datagrams), str(SIZE)]
            done = await net.namespace.run([*script, *client], stdout=PIPE, check=True)
    received, asked, answered = json.loads(done.stdout)
    assert received == SIZE
    assert (asked, answered) == (2, 1400), "the first has told what the way takes"


def answer(sock: socket.socket, _: bytes, client: Any) -> None:
    sock.sendto(bytes(1400), client)
