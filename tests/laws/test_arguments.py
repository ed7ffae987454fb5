"""What callers give: one kind of address everywhere, and a typed error for what cannot be used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, ip_interface
from typing import Any

import anyio
import pytest

from netns_kit import (
    ArgumentError,
    DhcpSettings,
    DnsSettings,
    Endpoint,
    Faults,
    Follow,
    Forwarder,
    Impairment,
    Limits,
    Namespace,
    Network,
    NotImportable,
    Policy,
    PortForward,
    Record,
    ReverseForward,
    StaticLease,
    Subnet,
    Subnet6,
    TapDevice,
    Target,
    UnixSocket,
    Uplink,
    UserStack,
)
from netns_kit.arguments import AddressLike, address
from tests.support import needs_tun, needs_userns, uplinks

V4, V6 = IPv4Address("10.0.2.100"), IPv6Address("fd00::100")


def ways(given: IPv4Address | IPv6Address, prefix: int) -> list[AddressLike]:
    """One address, in every way that people have it."""
    return [str(given), given, ip_interface(f"{given}/{prefix}")]


ALIKE = [*ways(V4, 24), *ways(V6, 64)]


@pytest.mark.parametrize("given", ALIKE, ids=repr)
def test_text_addresses_and_interfaces_are_alike(given: AddressLike) -> None:
    found = address(given)
    assert found in (V4, V6)
    assert type(found) in (IPv4Address, IPv6Address), "an interface equals no address"
    assert Endpoint(given, 80) == (found, 80)
    assert Record("db.internal", given).value == str(found)
    assert StaticLease(given, client_id="0102").address == found
    forward = PortForward("tcp", given, 80, given, 80)
    assert (forward.host, forward.guest) == (found, found)
    assert Uplink(dns=[given, Endpoint(given, 5353)]).resolvers() == (
        Endpoint(found, 53),
        Endpoint(found, 5353),
    )
    assert DnsSettings(domains={"corp.example": [given]}).domains == {"corp.example": (Endpoint(found, 53),)}
    if found.version == 4:
        assert repr(Uplink(bind4=given)) == "Uplink(bind4='10.0.2.100')"
        assert DhcpSettings(routes=[("192.0.2.0/24", given)]).routes == ((IPv4Network("192.0.2.0/24"), V4),)
    else:
        assert repr(Uplink(bind6=given)) == "Uplink(bind6='fd00::100')"


def test_the_addresses_of_a_subnet_are_of_one_kind() -> None:
    subnet = Subnet.parse("10.0.2.0/24", ipv6=True)
    assert subnet.ipv6
    for each in (subnet, subnet.ipv6):
        assert len({type(one) for one in (each.gateway, each.dns, each.guest, *each.pool)}) == 1
        assert each.guest in each.network
        assert each.guest_interface.ip == each.guest
        assert each.guest_interface.network == each.network
    assert Subnet.parse(subnet.network) == Subnet.parse("10.0.2.0/24")
    assert Subnet6(subnet.ipv6.network) == subnet.ipv6


@pytest.mark.anyio
@pytest.mark.parametrize("way", [str, IPv4Address, lambda text: IPv4Interface(f"{text}/24")])
async def test_calls_that_reach_the_guest_take_any_address(way: Callable[[str], AddressLike]) -> None:
    needs_userns()
    needs_tun()
    with anyio.fail_after(30):
        async with Network() as net:
            guest = way(str(net.subnet.guest))
            async with await net.namespace.listen_tcp(guest) as listener:
                port = listener.extra(anyio.abc.SocketAttribute.local_port)
                async with await net.namespace.connect_tcp(guest, port):
                    pass
            await net.stack.reserve(StaticLease(way("10.0.2.50"), mac="02:00:00:00:00:01"))
            assert await net.stack.revoke(way("10.0.2.50"))
            await net.stack.add_record(Record("db.internal", way("10.0.2.50")))
            await net.stack.remove_record("db.internal", value=way("10.0.2.50"))


TAP, _ = TapDevice.pair()
NEW = Namespace.create()
EVERYWHERE: list[tuple[Callable[..., Any], tuple[Any, ...] | dict[str, Any], dict[str, list[Any]]]] = [
    # what is called, with which arguments; and for some of its other arguments, what cannot be used
    (Namespace, (), {"prepare": [None, "create"]}),
    (Namespace.create, (), {"ids": ["nobody", None, True], "pids": ["mine", True, 1]}),
    (Namespace.attach, (), {
        "pid": ["1", 0, -1, True, 1.5], "fd": ["0", -1, True], "path": [5, b"/"], "allow_current": [],
        "pids": ["mine"],
    }),
    (TapDevice.open, (NEW,), {
        "name": ["", None, 5, "a" * 16], "mtu": ["1500", 67, True, None], "mac": [5, "mac", b"\1"],
        "queues": [0, "2", True, 65],
    }),
    (TapDevice.open, (), {"namespace": [None, "ns", 5]}),
    (TapDevice.from_fd, (0,), {"mtu": [None, 1, "1500"], "name": [5]}),
    (TapDevice.from_fd, (), {"fd": [-1, "0", True, 1 << 20, 1 << 70, None]}),
    (TapDevice.pair, (), {"mtu": ["1500", 1], "vnet_header": ["yes", 1]}),
    (TAP.impaired, (), {"transmit": [None, 0.5]}),
    (TAP.impaired, (Impairment(),), {"receive": [0.5]}),
    (Impairment, (), {
        **{name: [-0.1, 1.1, "0.5", None, True] for name in ("loss", "duplicate", "reorder", "corrupt")},
        "delay": [-1, "1", float("nan")], "jitter": [-1, None], "rate": [0, "1"], "queue": [0, 1.5],
        "seed": ["a", 1.5], "memory": [0, "1", None],
    }),
    (Faults, (), {
        **{name: [-0.1, 1.1, "0.5", None, True] for name in ("loss", "duplicate", "reorder", "corrupt")},
        **{name: [-1, "1", float("nan"), 1e9] for name in ("delay", "jitter", "dns_delay")},
        "rate": [0, 10, "1", "10 Mbit", "0 bit/s", "fast"], "queue": [0, 1.5, 1 << 40], "blackhole": [1, None],
        "refuse": [1, None], "reset_after": [-1, "1"], "dns": ["lost", 5], "direction": ["up", None],
        "to": [5, "a b", "10.0.0.0/33", [5], [[]]], "ports": [0, "a", [65536]], "protocol": ["sctp", 6],
        "seed": ["a", 1.5],
    }),
    (UserStack, (TAP,), {
        "uplink": ["eth0", 5, Uplink], "subnet": [5, "10.0.2.1", None], "ipv6": ["yes", 1, "fd00::/64"],
        "driver": ["worker thread", None, 5], "configure": ["no", None, 5], "limits": [5, {}],
        "dhcp": [True, {}, "no"],
        "require": ["seccomp", 5, [5], ["armour"], ["seccomp"]], "records": ["a=192.0.2.1", 5, [5], ["a"], [None]],
        "intercept_dns": ["yes", None, 1], "name": [5, ""],
        "policy": ["deny", 5, print, Policy],
        "on_flow": [5, "ask", print, lambda _: True], "on_flow_timeout": [0, -1, "30", True, None, 1e9, float("nan")],
    }),
    (UserStack, (), {"tap": ["tap0", None, 5, TapDevice]}),
    (Network, (), {
        "uplink": ["eth0"], "ports": ["80:80", 8080, [8080], [None], ["a"]], "subnet": [5], "ipv6": ["yes"],
        "ifname": ["", 5, None], "mtu": ["1500", 1, None], "queues": [0, "2"], "namespace": ["ns", 5],
        "driver": ["x"],
        "configure": ["no"], "limits": [5], "dhcp": [True], "require": [5], "records": [5], "name": [5, ""],
        "intercept_dns": [5], "reverse": ["80:80", 80, [80], ["a"], ["80"]], "policy": ["deny"],
        "on_flow": [print], "on_flow_timeout": [0], "internal": ["yes", 1, None], "isolate": [0], "guard": ["nft"],
    }),
    (Network().member, (), {"name": ["", "a b", 5, None, "-a"]}),
    (Network().member, ("web",), {
        "aliases": ["www", 5, [5], ["a b"]], "address": [5, "name", "fd00::7"],
        "mac": [5, "mac", "03:00:00:00:00:01"], "ports": ["80:80", 8080, [None]],
        "ids": ["nobody", 5], "ifname": ["", 5, "a/b"], "namespace": ["ns", 5], "policy": ["deny", 5],
    }),
    (Forwarder, (), {"stack": [None, "stack", 5]}),
    (Uplink, (), {
        "allow_host_loopback": [5432, "5432", None, ["5432"], [0], [True]],
        "bind4": [5, "fd00::1", "no such interface"],
        "bind6": [5, "10.0.2.1"], "device": [5, "", "a" * 16], "dns": ["192.0.2.1", 5, [5], ["name"], [None]],
        "policy": ["policy", 5], "udp_filtering": ["none", None],
        "udp_ports": ["none", None], "any_source": ["no", 1], "allow_host_addresses": ["no", None],
        "allow_link_local": ["no", 0],
    }),
    (DnsSettings, (), {
        "servers": ["192.0.2.1", 5, [5], ["name"], [None]],
        "domains": [[], {"a": "192.0.2.1"}, {"a": [5]}, {5: []}, {"a b": []}],
        "search": ["a", 5, [5], ["a b"]], "hook": ["hook", 5], "cache": ["no", 1], "resolv_conf": [5, None],
        "unknown": ["refused", None],
    }),
    (Endpoint, ("192.0.2.1",), {"port": ["80", -1, 65536, True, None]}),
    (Endpoint, {"port": 80}, {"address": ["name", 5, None]}),
    (Target, (), {"candidates": [[], None, ("192.0.2.1",), Endpoint("192.0.2.1", 80)]}),
    (PortForward, {"host": "127.0.0.1", "host_port": 80, "guest": None, "guest_port": 80, "protocol": "udp"}, {
        "protocol": ["sctp", None, 6], "host": [5, "name", None], "host_port": ["80", -1, True, None],
        "guest": [5, "name"], "guest_port": ["80", 0, None],
    }),
    (PortForward, ("tcp", "127.0.0.1", 80, None, 80), {
        "device": [5, "", "a b", "a" * 16], "mode": ["tunnel", 5], "freebind": ["no", None], "optional": ["no", 1],
    }),
    (UnixSocket, (), {"path": [5, None, "run/x", "/", "@", "/a\0", "/" + "a" * 107, "/\ud800"]}),
    (Follow, {"protocol": "tcp"}, {
        "protocol": ["sctp", None], "host": [5, "name", None], "device": [5, "a/b"], "mode": ["tunnel", 5],
        "include": ["80", 80, [80], [(80,)], [(80, 79)], [(0, 1)], [("80", 81)]], "exclude": [80, [(1, 65536)]],
    }),
    (ReverseForward, ("tcp", "127.0.0.1", 80, "127.0.0.1"), {"to_port": ["80", 0, 65536, None]}),
    (ReverseForward, {"inside": "127.0.0.1", "inside_port": 80, "to": "::1", "to_port": 80, "protocol": "udp"}, {
        "protocol": ["sctp", None], "inside": [5, "name", None], "inside_port": ["80", -1, True], "to": [5, "name"],
    }),
    (Subnet, {}, {"network": ["10.0.2.0/24", None, 5]}),
    (Subnet, (IPv4Network("10.0.2.0/24"),), {"ipv6": [True, "fd00::/64"]}),
    (Subnet.parse, ("10.0.2.0/24",), {"ipv6": ["fd00::/64", 1, None]}),
    (Subnet.parse, (), {"cidr": [5, None, "10.0.2.0", "a", b"10.0.2.0/24"]}),
    (Subnet6, (), {
        "cidr": [5, None, "fd00::", b"fd00::/64"], "search": ["a", 5, [5], ["a b"]],
        **{name: ["yes", 1, None] for name in ("managed", "other", "autonomous")},
    }),
    (StaticLease, ("10.0.2.50",), {"mac": [5, "mac"], "client_id": [5, "x"]}),
    (StaticLease, {"address": "10.0.2.50", "client_id": "0102"}, {"hostname": [5, "a b"]}),
    (StaticLease, (), {"address": [5, None, "a"]}),
    (DhcpSettings, (), {
        "lease_seconds": ["1", 0, 1.5, True, None], "domain": [5, None, "a b"], "search": ["a", 5, [5]],
        "routes": ["a", 5, [5], [("10.0.2.0/24",)], [(5, "10.0.2.2")], [("192.0.2.0/24", 5)]],
        "static": ["a", 5, ["10.0.2.50"]],
    }),
    (Record, ("db.internal",), {"value": [5, None]}),
    (Record, ("db.internal", "192.0.2.5"), {"ttl": ["10", -1, True], "type": [5, None], "wire": [5]}),
    (Record, {"value": "192.0.2.5"}, {"name": [5, None, "a b"]}),
    (Record.parse, (), {"text": [5, None, "a"]}),
    (Limits, (), {"tcp_connections": [0, "5", None, True], "tcp_ack_delay": [-1, 1, "0"]}),
]  # fmt: skip


def parts(value: Any) -> Iterator[Any]:
    """What is in there, however deep."""
    items = [*value.items()] if isinstance(value, dict) else value
    for each in items if isinstance(items, list | tuple) else ():
        yield each
        yield from parts(each)


def mistakes() -> Iterator[Any]:
    for call, given, others in EVERYWHERE:
        for name, values in others.items():
            for value in values:
                shown = repr(value).partition(" at 0x")[0]  # the same in each process that runs tests
                yield pytest.param(call, given, name, value, id=f"{call.__qualname__}({name}={shown})")


@pytest.mark.parametrize(("call", "given", "name", "value"), [*mistakes()])
def test_what_cannot_be_used_is_told_at_once(
    call: Callable[..., Any], given: tuple[Any, ...] | dict[str, Any], name: str, value: Any
) -> None:
    """By an exception that is a ValueError of this library, and tells what was given and what was expected."""
    positional, named = ((), given) if isinstance(given, dict) else (given, {})
    with pytest.raises((ValueError, TypeError)) as told:
        call(*positional, **{**named, name: value})
    text = str(told.value)
    if call is Limits:  # it is pure: what it raises is Python's own
        assert f"{name}={value!r}: expected" in text
        return
    assert isinstance(told.value, ArgumentError | NotImportable), repr(told.value)
    assert "expected" in text or told.value.fix, text
    if value not in ([], "", ["seccomp"]):
        assert any(shown in text for each in (value, *parts(value)) for shown in (repr(each), str(each))), (
            text
        )


def test_every_public_argument_is_tried() -> None:
    """So that a new one is not forgotten.  Flags and callbacks that anything will do for are few."""
    tried: dict[str, set[str]] = {}
    for call, _, others in EVERYWHERE:
        tried.setdefault(call.__qualname__, set()).update(others)
    for call, _, _ in EVERYWHERE:
        there = {name for name in inspect.signature(call).parameters if name not in {"self", "cls", "what"}}
        if call is not Limits:
            assert there - tried[call.__qualname__] == set(), call.__qualname__


def test_a_member_of_the_library_says_what_it_is() -> None:
    """Nothing that is shown in a notebook, or in a traceback, is an address in memory."""
    network = Network(ports=["127.0.0.1:0:80"], ipv6=True)
    shown = [network, network.namespace, network.tap, network.stack, network.forwarder, network.subnet, Uplink(),
             Namespace.attach(pid=12), Namespace.current(), TAP, TAP.impaired(Impairment(loss=0.1))]  # fmt: skip
    for each in shown:
        assert " object at 0x" not in repr(each), repr(each)
    assert repr(network) == ("<Network 10.0.2.0/24 and fd00::/64, 1 forwarded: not open>")
    assert repr(network.tap) == "<TapDevice tap0 mtu=1500: not open>"
    assert repr(network.stack) == "<UserStack on tap0: 10.0.2.0/24 and fd00::/64, driver='thread': not open>"
    policy = uplinks.names_only
    assert repr(Uplink(allow_host_loopback=True, dns=["192.0.2.53"], policy=policy)) == (
        f"Uplink(allow_host_loopback=True, dns=['192.0.2.53:53'], policy={policy!r})"
    )
