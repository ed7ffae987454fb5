"""A published UDP port is the source of all that is sent from the port inside that it leads to, as its peers see it.

They are hops away, see `tests.support.multihop`: H is the host, S and the routers are who its server talks to.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest

from netns_kit import Limits, Network, Uplink
from netns_kit.arguments import Address
from netns_kit.gateway.setup import DriverName
from netns_kit.stack.user import Transport
from tests.support import needs
from tests.support.multihop import (
    GATEWAY,
    GUEST,
    GUEST_6,
    H_6,
    IP_RECVERR,
    PROHIBITED,
    R1,
    S_6,
    H,
    Hops,
    S,
    in_h,
    received,
    told,
)
from tests.support.waiting import eventually, gauge

PORT, OTHER_PORT = (
    50060,
    50070,
)  # a mapping of the guest's own keeps such a port, see `netns_kit.uplink.uplink`
SECOND = "10.1.0.7"  # another address of H, which S has a way to


@asynccontextmanager
async def server(net: Network, port: int = PORT, address: str = GUEST) -> AsyncIterator[socket.socket]:
    """A socket inside."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with await net.namespace.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((address, port))
        yield sock


def local_udp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.bind(("127.0.0.1", 0))
    return sock


async def publish(net: Network, *specs: str) -> None:
    for spec in specs:
        await net.forwarder.add(spec)


async def port_seen(sock: socket.socket, by: socket.socket) -> tuple[str, int]:
    """Where `by` says that a datagram of the guest's has come from."""
    sock.sendto(b"hello", by.getsockname()[:2])
    payload, sender = await received(by)
    assert payload == b"hello"
    return sender[:2]


@in_h()
async def test_what_is_sent_unasked_leaves_by_the_published_port(hops: Hops) -> None:
    async with Network() as net, server(net) as sock:
        await publish(net, f"{PORT}:{PORT}/udp", f"6000:{OTHER_PORT}/udp")
        async with server(net, OTHER_PORT) as other:
            with hops.udp("S") as far, hops.udp("R2") as near:
                assert await port_seen(sock, far) == (H, PORT)
                assert await port_seen(sock, near) == (H, PORT)
                assert await port_seen(other, far) == (H, 6000)
                far.sendto(b"answer", (H, PORT))
                assert await received(sock) == (b"answer", far.getsockname())


@pytest.mark.parametrize("driver", ["loop", "worker"])
@in_h()
async def test_with_every_driver(hops: Hops, driver: DriverName) -> None:
    async with Network(driver=driver) as net, server(net) as sock:
        await net.forwarder.add(f"6000:{PORT}/udp")
        with hops.udp("S") as far:
            assert await port_seen(sock, far) == (H, 6000)


@in_h()
async def test_answers_leave_by_it_also_when_the_flow_has_expired(hops: Hops) -> None:
    limits = Limits(udp_one_way=0.05, udp_stream=0.05)
    async with Network(limits=limits) as net, server(net) as sock:
        await net.forwarder.add(f"6000:{PORT}/udp")
        with hops.udp("S") as far:
            far.sendto(b"question", (H, 6000))
            payload, sender = await received(sock)
            assert (payload, sender) == (b"question", far.getsockname())
            await eventually(net.stack.flows, ())
            assert await port_seen(sock, far) == (H, 6000)


@in_h()
async def test_a_published_port_is_a_full_cone(hops: Hops) -> None:
    """Who was never sent to is heard, from whichever port, and answered from the same one (RFC 4787 4.1, 5)."""
    async with Network() as net, server(net) as sock:
        await net.forwarder.add(f"6000:{PORT}/udp")
        with hops.udp("S") as far, hops.udp("S") as beside, hops.udp("R2") as stranger:
            assert await port_seen(sock, far) == (H, 6000)
            for each in (beside, stranger):
                each.sendto(b"me too", (H, 6000))
                assert await received(sock) == (b"me too", each.getsockname())
                assert await port_seen(sock, each) == (H, 6000)


@in_h()
async def test_a_port_that_is_not_published_has_a_mapping_of_its_own(hops: Hops) -> None:
    """The same port where it is free, and only those in that the guest has sent to."""
    async with Network() as net, server(net, OTHER_PORT) as sock:
        await publish(net, f"6000:{PORT}/udp", f"{OTHER_PORT}:{PORT}/tcp")
        with hops.udp("S") as far, hops.udp("S") as stranger:
            assert await port_seen(sock, far) == (H, OTHER_PORT)
            stranger.sendto(b"unasked", (H, OTHER_PORT))
            far.sendto(b"asked", (H, OTHER_PORT))
            assert await received(sock) == (b"asked", far.getsockname())
            await eventually(lambda: gauge(net, "dropped_udp_filtered"), 1)


@in_h()
async def test_a_port_no_longer_published_has_one_too(hops: Hops) -> None:
    async with Network() as net, server(net) as sock:
        (forward,) = await net.forwarder.add(f"6000:{PORT}/udp")
        with hops.udp("S") as far:
            assert await port_seen(sock, far) == (H, 6000)
            await net.forwarder.remove(forward)
            assert await port_seen(sock, far) == (H, PORT)


@in_h()
async def test_a_port_that_the_guest_has_itself_can_be_published(hops: Hops) -> None:
    """It has sent from it before, and so has the same port of the host: no other program is in the way."""
    async with Network() as net, server(net) as sock:
        with hops.udp("S") as far, hops.udp("R2") as stranger:
            assert await port_seen(sock, far) == (H, PORT)
            await net.forwarder.add(f"{PORT}:{PORT}/udp")
            stranger.sendto(b"hello", (H, PORT))
            assert await received(sock) == (b"hello", stranger.getsockname())
            assert await port_seen(sock, far) == (H, PORT)
            far.sendto(b"answer", (H, PORT))
            assert await received(sock) == (b"answer", far.getsockname())


@in_h()
async def test_icmp_errors_about_it_reach_the_server(hops: Hops) -> None:
    async with Network() as net, server(net) as sock:
        await net.forwarder.add(f"6000:{PORT}/udp")
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        for target, error, code, offender in (
            ((PROHIBITED[R1], 9), errno.EHOSTUNREACH, 13, R1),
            ((S, 9), errno.ECONNREFUSED, 3, S),
        ):
            sock.sendto(b"hello", target)
            found = await told(sock)
            assert found[:3] == (error, 3, code)
            assert (found.offender, found.sent_to) == (offender, target)


@in_h(privileged=True)
async def test_of_several_the_one_that_the_host_would_send_from(hops: Hops) -> None:
    """Published on two addresses of the host and on its loopback."""
    await second_address()
    async with Network(uplink=Uplink(allow_host_loopback=True)) as net, server(net) as sock:
        await publish(net, f"127.0.0.1:6001:{PORT}/udp", f"{SECOND}:6002:{PORT}/udp", f"{H}:6003:{PORT}/udp")
        with hops.udp("S") as far, local_udp() as local:
            assert await port_seen(sock, far) == (H, 6003)
            sock.sendto(b"hello", (GATEWAY, local.getsockname()[1]))
            assert await received(local) == (b"hello", ("127.0.0.1", 6001))


@in_h(privileged=True)
async def test_bound_to_an_address_it_leaves_from_that(hops: Hops) -> None:
    await second_address()
    async with Network() as net, server(net) as sock:
        await net.forwarder.add(f"{SECOND}:6000:{PORT}/udp")
        with hops.udp("R1") as near:
            assert await port_seen(sock, near) == (SECOND, 6000)


@pytest.mark.parametrize("driver", ["loop", "worker"])
@in_h(privileged=True)
async def test_the_uplinks_own_address_and_interface_stand(hops: Hops, driver: DriverName) -> None:
    """What leaves by a published port is bound to them too; one that is published elsewhere is not its way."""
    await second_address()
    async with Network(uplink=Uplink(bind4=SECOND, device="R1"), driver=driver) as net, server(net) as sock:
        await net.forwarder.add(f"6000:{PORT}/udp")
        async with server(net, OTHER_PORT) as other:
            await net.forwarder.add(f"{H}:7000:{OTHER_PORT}/udp")
            with hops.udp("R1") as near:
                assert await port_seen(sock, near) == (SECOND, 6000)
                assert await port_seen(other, near) == (SECOND, OTHER_PORT)


@in_h(privileged=True)
async def test_published_on_an_interface_it_is_the_way_where_that_leads(hops: Hops) -> None:
    async with Network(uplink=Uplink(allow_host_loopback=True)) as net, server(net) as sock:
        await net.forwarder.add(f"0.0.0.0%R1:6000:{PORT}/udp")
        async with server(net, OTHER_PORT) as other:
            await net.forwarder.add(f"0.0.0.0%lo:7000:{OTHER_PORT}/udp")
            with hops.udp("S") as far:
                assert await port_seen(sock, far) == (H, 6000)
                assert await port_seen(other, far) == (H, OTHER_PORT)
            with local_udp() as local:
                other.sendto(b"hello", (GATEWAY, local.getsockname()[1]))
                assert await received(local) == (b"hello", ("127.0.0.1", 7000))


@in_h()
async def test_ipv6(hops: Hops) -> None:
    async with Network(ipv6=True) as net, server(net, address=GUEST_6) as sock:
        await publish(net, f"[::]:6000:{PORT}/udp", f"7000:{PORT}/udp")
        with hops.udp("S", address=S_6) as far, hops.udp("S") as far4:
            assert await port_seen(sock, far) == (H_6, 6000)
            async with server(net) as sock4:
                assert await port_seen(sock4, far4) == (H, 7000)


@in_h(privileged=True)
async def test_ipv6_bound_to_the_uplinks_address_and_interface(hops: Hops) -> None:
    async with Network(ipv6=True, uplink=Uplink(bind6=H_6, device="R1")) as net:
        await net.forwarder.add(f"[::]:6000:{PORT}/udp")
        async with server(net, address=GUEST_6) as sock:
            with hops.udp("S", address=S_6) as far:
                assert await port_seen(sock, far) == (H_6, 6000)


class Counting(Uplink):
    """Opens its sockets itself."""

    opened = 0

    def open(self, protocol: Transport, target: Address, port: int = 0) -> socket.socket:
        self.opened += 1
        return super().open(protocol, target, port)


@in_h()
async def test_an_uplink_of_another_kind_is_never_passed_by(hops: Hops) -> None:
    uplink = Counting()
    async with Network(uplink=uplink) as net, server(net) as sock:
        await net.forwarder.add(f"6000:{PORT}/udp")
        with hops.udp("S") as far:
            assert await port_seen(sock, far) == (H, PORT)
            assert uplink.opened == 1


async def second_address() -> None:
    needs("ip")
    await anyio.run_process(["ip", "address", "add", f"{SECOND}/24", "dev", "R1"])
