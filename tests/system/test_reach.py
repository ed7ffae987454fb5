"""What a guest may reach of the host by default, what takes that away, and whose name a guest may speak in.

In a host of its own, with a server on every address: nothing here leads out.
"""

from __future__ import annotations

import errno
import socket
from ipaddress import IPv4Address, ip_network

import anyio
import anyio.to_thread

from netns_kit import Flow, Network, Uplink
from tests.support import needs
from tests.support.multihop import GUEST, H_6, S_6, H, Hops, S, in_h
from tests.support.waiting import eventually, gauge

FORGED = "198.51.100.7"


async def reached(net: Network, host: str, port: int) -> int:
    """0, or the error with which connecting there fails."""
    try:
        stream = await net.namespace.connect_tcp(host, port)
    except OSError as error:
        return error.errno or -1
    await stream.aclose()
    return 0


@in_h(ping=False)
async def test_the_hosts_own_addresses_are_reached_unless_they_are_refused(hops: Hops) -> None:
    with hops.at("S"):
        elsewhere = socket.create_server((S, 0))
    with elsewhere, socket.create_server(("0.0.0.0", 0)) as own:
        port, other = own.getsockname()[1], elsewhere.getsockname()[1]
        async with Network() as net:
            assert await reached(net, H, port) == 0, "so it is by default: docs/security.md"
        async with Network(uplink=Uplink(allow_host_addresses=False)) as net:
            assert await reached(net, H, port) == errno.EHOSTUNREACH
            assert await reached(net, S, other) == 0
            assert (await net.stack.stats())["flows_refused"] == 1


@in_h(ping=False)
async def test_the_hosts_own_addresses_of_ipv6(hops: Hops) -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6) as own:
        port = own.getsockname()[1]
        async with Network(ipv6=True, uplink=Uplink(allow_host_addresses=False)) as net:
            assert await reached(net, H_6, port) == errno.EACCES
            assert await reached(net, f"2002:{IPv4Address(H).packed.hex(':', 2)}::1", port) == errno.EACCES


@in_h(ping=False, privileged=True)
async def test_what_else_of_ipv6_is_delivered_to_the_host(hops: Hops) -> None:
    """What no socket may be bound to, but who listens on "::" hears: local routes, a router's anycast addresses."""
    needs("ip")
    await anyio.run_process(["ip", "-6", "route", "add", "local", "2001:db8:77::/64", "dev", "lo"])
    anycast = str(ip_network(f"{H_6}/64", strict=False).network_address)
    with socket.create_server(("::", 0), family=socket.AF_INET6) as own:
        port = own.getsockname()[1]
        async with Network(ipv6=True) as net:
            assert await reached(net, "2001:db8:77::5", port) == 0, "it is the host's"
        async with Network(ipv6=True, uplink=Uplink(allow_host_addresses=False)) as net:
            assert await reached(net, "2001:db8:77::5", port) == errno.EACCES
            assert await reached(net, anycast, port) == errno.EACCES
            with hops.at("S"):
                elsewhere = socket.create_server((S_6, 0), family=socket.AF_INET6)
            with elsewhere:
                assert await reached(net, S_6, elsewhere.getsockname()[1]) == 0


@in_h(ping=False, privileged=True)
async def test_nobody_speaks_in_anothers_name(hops: Hops) -> None:
    """Unless it is allowed, for guests that route for others."""
    needs("ip")
    with hops.at("S"):
        server = socket.create_server((S, 0))
    with server:
        for allowed in (False, True):
            asked: list[Flow] = []
            async with Network(uplink=Uplink(any_source=allowed, policy=asked.append)) as net:

                async def has_dropped(net: Network = net) -> bool:
                    return await gauge(net, "dropped_ip_source_foreign") > 0

                await net.run(["ip", "address", "add", f"{FORGED}/32", "dev", "lo"])
                for source in (GUEST, FORGED):
                    with await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
                        sock.bind((source, 0))
                        sock.connect_ex(server.getsockname())
                        if source == FORGED and not allowed:
                            await eventually(has_dropped)
                        else:
                            client, _ = await anyio.to_thread.run_sync(server.accept)
                            client.close()
            sources = [str(each.source.address) for each in asked]
            assert sources == ([GUEST, FORGED] if allowed else [GUEST])
