"""`intercept_dns`: whichever resolver a program asks, the answer is ours."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import get_args

import anyio
import pytest

from netns_kit import DriverName, Network, Subnet6, Uplink
from netns_kit.domain_names import to_wire
from tests.support import needs_tun, needs_userns, uplinks
from tests.support.servers import bounded, dns_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

ELSEWHERE = {4: "203.0.113.53", 6: "2001:db8::53"}
RECORDS = ["ours.internal=192.0.2.5"]

Ask = Callable[[Network, str, str], Awaitable[bytes]]


def query(name: str) -> bytes:
    return bytes.fromhex("0007 0100 0001 0000 0000 0000") + to_wire(name) + bytes.fromhex("0001 0001")


async def by_datagram(net: Network, address: str, name: str) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with await net.namespace.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((address, 53))  # so that it is from there that the answer comes
        while True:
            sock.send(query(name))  # as resolver libraries do when a datagram was lost
            with anyio.move_on_after(2):
                await anyio.wait_readable(sock)
                return sock.recv(4096)


async def by_stream(net: Network, address: str, name: str) -> bytes:
    async with await net.namespace.connect_tcp(address, 53) as stream:
        message = query(name)
        await stream.send(len(message).to_bytes(2, "big") + message)
        answer = b""
        while len(answer) < 2 or len(answer) < 2 + int.from_bytes(answer[:2], "big"):
            answer += await stream.receive()
        return answer[2:]


@pytest.mark.parametrize("ask", [by_datagram, by_stream])
@pytest.mark.parametrize("driver", get_args(DriverName))
@bounded
async def test_whoever_is_asked_we_answer(driver: DriverName, ask: Ask) -> None:
    needs_userns()
    needs_tun()
    asked: list[str] = []
    with dns_server({"theirs.test": "192.0.2.6"}, asked) as port:
        uplink = Uplink(dns=[f"127.0.0.1:{port}"], policy=uplinks.names_only)
        async with Network(
            uplink=uplink, driver=driver, ipv6=Subnet6(), records=RECORDS, intercept_dns=True
        ) as net:
            for address in (*ELSEWHERE.values(), str(net.subnet.dns)):
                assert (await ask(net, address, "ours.internal")).endswith(bytes((192, 0, 2, 5)))
                assert (await ask(net, address, "theirs.test")).endswith(bytes((192, 0, 2, 6)))
    assert {each.split()[1] for each in asked} == {"theirs.test"}, "our resolver, of what is not ours"


@pytest.mark.parametrize("ask", [by_datagram, by_stream])
@bounded
async def test_unasked_for_it_is_a_flow_like_any_other(ask: Ask) -> None:
    needs_userns()
    needs_tun()
    async with Network(uplink=Uplink(dns=[], policy=uplinks.refuse), records=RECORDS) as net:
        with pytest.raises(OSError, match="No route to host"):
            await ask(net, ELSEWHERE[4], "ours.internal")
