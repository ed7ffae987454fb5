"""Addresses that stand for names."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.dns.stand_ins import NETWORK, TTL, StandIns
from netns_kit.domain_names import to_wire

SMALL = IPv4Network("198.18.0.0/28")


CLIENT, OTHER = b"client", b"other"
LONG = TTL + 6  # an address may be given to another name then


def given_to(table: StandIns, name: str, now: float = 0, client: bytes = CLIENT) -> bytes:
    found = table.address_of(to_wire(name), client, now)
    assert found is not None
    return found


def test_each_name_has_an_address_of_its_own() -> None:
    table = StandIns(NETWORK, frozenset)
    first, second = given_to(table, "a.example"), given_to(table, "b.example")
    assert first != second
    assert given_to(table, "a.example", client=OTHER) == first
    assert table.name_of(first) == to_wire("a.example")
    assert IPv4Address(first) in NETWORK
    assert first in table
    assert bytes((192, 0, 2, 1)) not in table
    assert bytes(16) not in table
    assert table.name_of(bytes((198, 19, 0, 1))) is None


def test_an_address_that_is_in_use_is_given_to_no_other_name() -> None:
    used = set[bytes]()
    table = StandIns(SMALL, lambda: used, most=4)
    used.add(given_to(table, "stays.example"))
    (address,) = used
    for number in range(1, 40):
        assert given_to(table, f"n{number}.example", number * LONG) != address
    assert table.name_of(address) == to_wire("stays.example")
    used.update(given_to(table, "n39.example", 39 * LONG) for _ in range(2))
    assert table.address_of(to_wire("more.example"), CLIENT, 41 * LONG) is None, "all of its are in use"
    used.clear()
    assert table.address_of(to_wire("more.example"), CLIENT, 42 * LONG) is not None


def test_flows_are_not_looked_through_for_each_query() -> None:
    looks: list[set[bytes]] = []

    def used() -> set[bytes]:
        looks.append(set())
        return looks[-1]

    table = StandIns(SMALL, used, most=4)
    for number in range(100):
        table.address_of(to_wire(f"n{number}.example"), CLIENT, LONG)
    assert len(looks) == 1


def test_an_address_is_given_to_no_other_name_before_its_ttl_is_over() -> None:
    """Neither since it was answered, nor since a flow began there."""
    table = StandIns(SMALL, frozenset, most=4)
    first, second = given_to(table, "a.example"), given_to(table, "b.example")
    assert table.address_of(to_wire("c.example"), CLIENT, TTL) is None
    assert given_to(table, "a.example", TTL) == first
    third = given_to(table, "c.example", LONG)
    assert (table.name_of(first), table.name_of(second)) == (to_wire("a.example"), None)
    table.use(first, TTL + 60)
    table.use(third, TTL + 60)
    assert table.address_of(to_wire("d.example"), CLIENT, TTL + 60 + LONG - 2) is None
    assert given_to(table, "d.example", TTL + 60 + LONG)


def test_a_client_that_asks_for_many_names_takes_none_from_another() -> None:
    table = StandIns(NETWORK, frozenset, most=64)
    address = given_to(table, "kept.example")
    for number in range(4000):
        table.address_of(to_wire(f"n{number}.example"), OTHER, number)
        assert table.name_of(address) == to_wire("kept.example"), "although its TTL is over"
    assert given_to(table, "more.example", 4000) != address
    assert given_to(table, "kept.example", 4000) == address
    for client in range(40):
        for number in range(100):
            table.address_of(to_wire(f"n{number}.n{client}.example"), bytes((client,)), 4000)
    assert len(table) == 64
    assert table.address_of(to_wire("another.example"), CLIENT, 4001) is None, (
        "it is full of names asked just now"
    )
    assert given_to(table, "another.example", 4001 + LONG, b"a new one")


def test_an_address_whose_name_made_room_stands_for_none_until_all_were_given() -> None:
    table = StandIns(SMALL, frozenset, most=4)
    first = given_to(table, "first.example")
    others = [given_to(table, f"n{number}.example", number * LONG) for number in range(1, 15)]
    assert first not in others
    assert table.name_of(first) is None
    assert given_to(table, "again.example", 15 * LONG) == first


Told = list[tuple[bytes, bytes, float]]


def several(parts: int, **options: Any) -> tuple[list[StandIns], Told]:
    """The tables of some workers, and what they tell each other."""
    told: Told = []

    def tell(*said: Any) -> None:
        told.append(said)

    tables = [StandIns(NETWORK, frozenset, tell, part=part, parts=parts, **options) for part in range(parts)]
    return tables, told


@pytest.mark.parametrize("parts", [2, 3])
def test_workers_give_addresses_of_their_own_and_know_those_of_others(parts: int) -> None:
    tables, told = several(parts)
    given = {given_to(table, "a.example") for table in tables}
    assert len(given) == parts
    mine, theirs = tables[0], tables[1]
    address = given_to(theirs, "b.example")
    assert told[-1][:2] == (to_wire("b.example"), address)
    mine.learn(*told[-1], 0)
    assert given_to(mine, "b.example") == address
    mine.learn(to_wire("b.example"), bytes((192, 0, 2, 1)), 99, 0)
    assert mine.name_of(bytes((192, 0, 2, 1))) is None, "it is no address of these"
    own = given_to(mine, "own.example")
    mine.learn(to_wire("b.example"), own, 99, 0)
    assert mine.name_of(own) == to_wire("own.example"), "nobody else gives it"


def test_who_uses_an_address_of_another_worker_tells_the_giver_in_time() -> None:
    (giver, user), told = several(2, most=4)
    address = given_to(giver, "a.example")
    user.learn(*told[-1], 0)
    now = 0.0
    for _ in range(10):
        count = len(told)
        user.use(address, now)  # a flow; a query is the same
        assert len(told) == count, "what stays for its TTL need not be said"
        now += 40
        user.use(address, now)
        giver.learn(*told[-1], now)
        for number in range(9):
            giver.address_of(to_wire(f"{now}-{number}.example"), CLIENT, now + 50)
        assert giver.name_of(address) == to_wire("a.example")
    giver.learn(to_wire("a.example"), address, 1e9, now)
    user.learn(to_wire("a.example"), address, 1e9, now)
    assert not user.is_sure(address, now + 2 * LONG), "no address stays for longer, whoever says so"


def test_what_is_not_known_for_sure_is_not_answered() -> None:
    (giver, user), told = several(2, most=4)
    address = given_to(giver, "a.example")
    user.learn(*told[-1], 0)
    assert given_to(user, "a.example", 2 * LONG) != address, "it may be another name's by now"
    user.use(address, 2 * LONG)
    assert not user.is_sure(address, 2 * LONG)
    assert giver.is_sure(address, 2 * LONG)
    user.learn(to_wire("b.example"), address, 3 * LONG, 2 * LONG)
    assert user.name_of(address) == to_wire("b.example")
    assert given_to(user, "a.example", 2 * LONG) not in (address, None)


def test_what_others_say_takes_a_bounded_part_of_memory() -> None:
    (_, user), _ = several(2, most=4)
    start = int(NETWORK.network_address)
    for number in range(100):
        user.learn(to_wire(f"n{number}.example"), IPv4Address(start + number).packed, 99, 0)
    assert sum(user.name_of(IPv4Address(start + number).packed) is not None for number in range(100)) == 8


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.integers(0, 40)), max_size=200),
    st.sets(st.integers(1, 15)),
)
def test_names_and_addresses_are_one_to_one(asked: list[tuple[int, int, int]], kept: set[int]) -> None:
    used = {IPv4Address(int(SMALL.network_address) + number).packed for number in kept}
    table = StandIns(SMALL, lambda: used, most=6)
    before = dict[bytes, bytes]()
    until = dict[bytes, tuple[bytes, int]]()
    now = 0
    for number, client, later in asked:
        now += later
        name = to_wire(f"n{number}.example")
        address = table.address_of(name, bytes((client,)), now)
        if address is not None:
            assert table.name_of(address) == name
            known, when = until.get(address, (name, 0))
            assert known == name or when < now, "within its TTL it stays with its name"
            until[address] = name, now + TTL
            if address in used:
                assert before.setdefault(address, name) == name, "it stays with its name"
        assert len(table) <= 6
