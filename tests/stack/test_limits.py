"""Every bound: what happens when it is reached, and that it is seen in the stack's statistics."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest

from netns_kit.stack import Limits
from netns_kit.stack.windows import OVERHEAD
from netns_kit.stack.wire import ip
from netns_kit.stack.wire.tcp import ACK, RST, SYN
from tests.support.stack import (
    GATEWAY,
    OTHER,
    Guest,
    echo_packet,
    fragment,
    key,
    udp_packet,
)

TABLES = {field.name: field.default for field in fields(Limits) if field.type == "int"}
TIMES = {field.name: field.default for field in fields(Limits) if field.type == "float"}
BYTES = {"tcp_receive", "tcp_receive_max", "tcp_send", "tcp_send_max", "tcp_memory", "fragments"}
OF_A_CONNECTION = {"tcp_receive", "tcp_receive_max", "tcp_send", "tcp_send_max", "tcp_out_of_order"}


def test_what_is_bounded_has_a_gauge_of_that_name() -> None:
    assert set(TABLES) - OF_A_CONNECTION <= set(Guest().stack.stats())


def test_every_limit_is_documented() -> None:
    """With its default as it is."""
    text = (Path(__file__).parents[2] / "docs" / "transport.md").read_text()
    rows = dict(line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `"))
    documented = {name.strip(" `"): value.strip() for name, value in rows.items()}
    for name, default in {**TABLES, **TIMES}.items():
        assert isinstance(default, int | float)
        if name in TIMES:
            assert documented[name] == f"{default:g} s", name
        elif name in BYTES:
            assert documented[name] == f"{default / (1 << 20):.3g} MiB", name
        else:
            assert documented[name] == f"{default}", name


@pytest.mark.parametrize("name", sorted(TABLES))
def test_what_cannot_be_is_refused(name: str) -> None:
    """No ping, say, is a policy; a table without room would be a stack that cannot run."""
    with pytest.raises(ValueError, match=rf"{name}=-1: expected \d+ or more"):
        Limits(**{name: -1})
    if name != "tcp_memory":
        with pytest.raises(ValueError, match=name):
            Limits(**{name: 0})


def syn(guest: Guest, port: int) -> None:
    guest.gets(SYN, 999, ports=key(guest.family, port)[-4:])


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("tcp_connections", 3),
        ("tcp_pending", 3),
        ("tcp_memory", OVERHEAD + 8 * 20),
        ("tcp_time_waits", 3),
        ("udp_flows", 3),
        ("echo_flows", 3),
        ("fragments", 3000),
        ("neighbours", 3),
        ("waiting_frames", 3),
    ],
)
def test_a_bound_holds_and_is_counted(family: int, name: str, bound: int) -> None:
    guest = Guest(family, limits=Limits(**{name: bound}))
    addresses = [OTHER[family][:-1] + bytes((number,)) for number in range(20)]
    if name == "tcp_memory":
        guest.established()
        guest.listener.room = 0
    for number in range(20):
        match name:
            case "tcp_time_waits":
                guest.stack.time_wait.add(key(family, number), 9001, 1001, b"", guest.now)
            case "tcp_connections" | "tcp_pending":
                syn(guest, 1 + number)
            case "tcp_memory":
                guest.gets(ACK, 1000 + number * 20, 9000, bytes(20))
            case "udp_flows":
                guest.gives(udp_packet(family, b"x", port=1 + number))
            case "echo_flows":
                guest.gives(echo_packet(family, identifier=number))
            case "fragments":
                ends = addresses[0] + OTHER[family]
                guest.gives(fragment(ends, 17, 0, bytes(64), more=True, identification=number))
            case "neighbours":
                guest.stack.link.learn(addresses[number], bytes((2, 0, 0, 0, 0, number)))
            case _:
                guest.stack.link.send(addresses[0], guest.stack.link.prefix(addresses[0]))
        assert guest.stack.stats()[name] <= bound
    assert guest.stack.stats()[name] > 0
    assert guest.stack.stats()[f"dropped_limit_{name}"] >= 1


def test_beyond_the_connections_there_is_no_way_out(family: int) -> None:
    """And not a reset: nobody has refused."""
    guest = Guest(family, limits=Limits(tcp_connections=1)).established()
    syn(guest, 2)
    packet = guest.taken().packet
    told = (ip.ICMP, b"\3\0") if family == 4 else (ip.ICMPV6, b"\1\0")
    assert (packet.protocol, bytes(packet.payload[:2])) == told


def test_beyond_the_connections_one_whose_handshake_is_not_over_gives_way(family: int) -> None:
    guest = Guest(family, limits=Limits(tcp_connections=1))
    syn(guest, 1)
    guest.passes(0.1)
    syn(guest, 2)
    guest.quiet()
    assert list(guest.stack.tcp) == [key(family, 2)]
    guest.connection.accept(guest.now)
    guest.frames.clear()
    syn(guest, 3)
    assert guest.taken().packet.protocol in (ip.ICMP, ip.ICMPV6), "it has had no time yet"
    guest.passes(0.1)
    guest.frames.clear()
    syn(guest, 4)
    guest.sends(RST | ACK, 9000)
    assert list(guest.stack.tcp) == [key(family, 4)]


def test_runs_beyond_a_hole_are_bounded(family: int) -> None:
    guest = Guest(family, limits=Limits(tcp_out_of_order=2)).established()
    for start in (1100, 1200, 1300):
        guest.gets(ACK, start, 9000, b"x")
    assert guest.stack.stats()["dropped_limit_tcp_out_of_order"] == 1


def test_a_known_neighbour_needs_no_room(family: int) -> None:
    guest = Guest(family, limits=Limits(neighbours=2))
    for last in (1, 2, 1, 2):
        guest.stack.link.learn(OTHER[family], bytes((2, 0, 0, 0, 0, last)))
    assert "dropped_limit_neighbours" not in guest.stack.stats()


def test_fragments_that_time_out_are_counted(family: int) -> None:
    """And go by themselves: nobody has to ask."""
    guest = Guest(family)
    for number in (1, 2):
        guest.gives(fragment(OTHER[family] + GATEWAY[family], 17, 0, bytes(64), True, number))
        guest.passes(1)
    guest.passes(28.5)
    assert guest.stack.stats()["dropped_fragment_timeout"] == 1
    guest.passes(1)
    assert guest.stack.stats()["dropped_fragment_timeout"] == 2
    assert guest.stack.stats()["fragments"] == 0
    assert guest.stack.deadline == math.inf


def test_an_ack_is_not_delayed_for_longer_than_it_may_be() -> None:
    with pytest.raises(ValueError, match="RFC 5681"):
        Limits(tcp_ack_delay=0.51)
