"""What the host lacks is told as a network without a way out: nobody was asked, so nobody has refused.

The host is H of `tests.support.multihop`, whose ports and descriptors a test can use up.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from netns_kit import Network, Uplink
from tests.support import descriptors
from tests.support.connections import outcome
from tests.support.multihop import GUEST, IP_RECVERR, S_6, H, Hops, S, in_h, told

FIRST, PORTS = 60000, 4


@contextmanager
def few_ports() -> Iterator[None]:
    """H has so many ports for clients, and no more."""
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    before = path.read_text()
    path.write_text(f"{FIRST} {FIRST + PORTS - 1}")
    yield
    path.write_text(before)


async def connect(net: Network, held: ExitStack, address: str, port: int) -> int:
    """The errno of one more connection."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = held.enter_context(await net.namespace.socket(family, socket.SOCK_STREAM))
    assert sock.connect_ex((address, port)) == errno.EINPROGRESS
    return await outcome(sock)


@pytest.mark.parametrize("address", [S, S_6])
@pytest.mark.parametrize("bound", [False, True])
@in_h(privileged=True)
async def test_without_a_port_for_a_connection_the_network_is_unreachable(
    hops: Hops, address: str, bound: bool
) -> None:
    uplink = Uplink(bind4=H, bind6="fd01:0:0:1::1") if bound else Uplink()
    async with Network(ipv6=True, uplink=uplink) as net:
        with hops.tcp("S", 9, address=address), few_ports(), ExitStack() as held:
            outcomes = [await connect(net, held, address, 9) for _ in range(PORTS + 2)]
    assert outcomes == [0] * PORTS + [errno.ENETUNREACH] * 2


@in_h(privileged=True)
async def test_without_a_port_for_datagrams_too(hops: Hops) -> None:
    async with Network() as net:
        with few_ports(), ExitStack() as held:
            for port in range(FIRST, FIRST + PORTS):
                held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).bind(("", port))
            sock = held.enter_context(await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
            sock.bind((GUEST, FIRST))
            sock.sendto(b"hello", (S, 9))
            assert (await told(sock))[:3] == (errno.ENETUNREACH, 3, 0)


@in_h()
async def test_without_a_descriptor_too(hops: Hops) -> None:
    async with Network() as net:
        with hops.tcp("S", 9), ExitStack() as held:
            assert await connect(net, held, S, 9) == 0
            held.callback(
                resource.setrlimit, resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)
            )
            guests = [await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(2)]
            for guest in guests:
                held.enter_context(guest)
            most = max(descriptors()) + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, most)
            with suppress(OSError):
                while True:
                    held.callback(os.close, os.dup(0))
            for guest in guests:
                assert guest.connect_ex((S, 9)) == errno.EINPROGRESS
                assert os.strerror(await outcome(guest)) == os.strerror(errno.ENETUNREACH)
