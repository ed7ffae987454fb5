"""The first burst is not lost: who we are need not be asked where we have configured the namespace."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import ip_address

import anyio
import pytest

from netns_kit import Network
from netns_kit.gateway.setup import DriverName
from netns_kit.stack.wire import ethernet, ip
from netns_kit.subnet import Subnet
from tests.support import needs_ipv6
from tests.support.connections import TAP
from tests.support.servers import SECONDS, bounded
from tests.support.wire import ETH_P_ALL, FRAME_MAX, PACKET_OUTGOING

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

BURST = 400  # datagrams: more than a kernel keeps for an address that it has asked for
AT_ONCE = 25  # of them, before we look at the wire, which keeps as many and the answers
SUBNET = Subnet.parse("10.0.2.0/24", ipv6=True)
SOLICITATION = 135  # RFC 4861


def frames(wire: socket.socket) -> Iterator[tuple[bytes, int]]:
    """What the guest has sent since, and its EtherType."""
    while True:
        try:
            frame, (_, kind, way, *_) = wire.recvfrom(FRAME_MAX)
        except BlockingIOError:
            return
        if way == PACKET_OUTGOING:
            yield frame[ethernet.SIZE :], kind


def asks(packet: bytes) -> bool:
    """Whether it asks for a neighbour.

    Not whether anybody has the link-local address that the kernel makes, from the unspecified one (RFC 4862 5.4).
    """
    return packet[6] == ip.ICMPV6 and packet[40] == SOLICITATION and packet[8:24] != bytes(16)


@pytest.mark.parametrize("address", [str(each) for each in SUBNET.neighbours])
@bounded
async def test_a_burst_to_any_address_of_ours(driver: DriverName, address: str) -> None:
    """All of it leaves at once, and nobody is asked for."""
    needs_ipv6()
    family = socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6
    left = asked = 0
    async with Network(ipv6=True, driver=driver) as net:
        [tap] = [link.index for link in await net.namespace.links() if link.name == TAP]
        to = (address, 9) if family == socket.AF_INET else (address, 9, 0, tap)
        with (
            await net.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire,
            await net.namespace.socket(family, socket.SOCK_DGRAM) as sock,
        ):
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            wire.bind((TAP, ETH_P_ALL))
            sent = 0
            with anyio.move_on_after(SECONDS / 2):  # the kernel may send the last ones a moment later
                while left < BURST:
                    for _ in range(min(AT_ONCE, BURST - sent)):
                        sock.sendto(b"burst", to)
                        sent += 1
                    await anyio.wait_readable(wire)
                    for packet, kind in frames(wire):
                        left += packet.endswith(b"burst") and kind in (ethernet.IPV4, ethernet.IPV6)
                        asked += kind == ethernet.ARP
                        asked += kind == ethernet.IPV6 and asks(packet)
    assert (left, asked) == (BURST, 0)
