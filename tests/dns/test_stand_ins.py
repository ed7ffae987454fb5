"""Addresses that stand for names."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.dns.stand_ins import NETWORK, StandIns
from netns_kit.domain_names import to_wire

SMALL = IPv4Network("198.18.0.0/28")


def given_to(table: StandIns, name: str) -> bytes:
    found = table.address_of(to_wire(name))
    assert found is not None
    return found[0]


def test_each_name_has_an_address_of_its_own() -> None:
    table = StandIns(NETWORK, frozenset)
    first, second = given_to(table, "a.example"), given_to(table, "b.example")
    assert first != second
    assert table.address_of(to_wire("a.example")) == (first, False)
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
    for number in range(40):
        assert given_to(table, f"n{number}.example") != address
    assert table.name_of(address) == to_wire("stays.example")
    used.update(given_to(table, f"n{number}.example") for number in range(37, 40))
    assert table.address_of(to_wire("more.example")) is None, "all are in use"
    used.clear()
    assert table.address_of(to_wire("more.example")) is not None


def test_an_address_whose_name_made_room_stands_for_none_until_all_were_given() -> None:
    table = StandIns(SMALL, frozenset, most=4)
    first = given_to(table, "first.example")
    others = [given_to(table, f"n{number}.example") for number in range(14)]
    assert first not in others
    assert table.name_of(first) is None
    assert given_to(table, "again.example") == first


def test_what_was_used_last_makes_room_last() -> None:
    table = StandIns(SMALL, frozenset, most=3)
    first, second = given_to(table, "a.example"), given_to(table, "b.example")
    given_to(table, "c.example")
    table.use(first)
    given_to(table, "d.example")
    assert (table.name_of(first), table.name_of(second)) == (to_wire("a.example"), None)


@pytest.mark.parametrize("parts", [2, 3])
def test_workers_give_addresses_of_their_own_and_know_those_of_others(parts: int) -> None:
    tables = [StandIns(NETWORK, frozenset, part=part, parts=parts) for part in range(parts)]
    given = {given_to(table, "a.example") for table in tables}
    assert len(given) == parts
    mine, theirs = tables[0], tables[1]
    address = given_to(theirs, "b.example")
    mine.learn(to_wire("b.example"), address)
    assert mine.address_of(to_wire("b.example")) == (address, False)
    mine.learn(to_wire("b.example"), bytes((192, 0, 2, 1)))
    assert mine.name_of(bytes((192, 0, 2, 1))) is None, "it is no address of these"


@given(st.lists(st.integers(0, 30), max_size=200), st.sets(st.integers(1, 15)))
def test_names_and_addresses_are_one_to_one(asked: list[int], kept: set[int]) -> None:
    used = {IPv4Address(int(SMALL.network_address) + number).packed for number in kept}
    table = StandIns(SMALL, lambda: used, most=6)
    before = dict[bytes, bytes]()
    for number in asked:
        name = to_wire(f"n{number}.example")
        found = table.address_of(name)
        if found is not None:
            address, _ = found
            assert table.name_of(address) == name
            if address in used:
                assert before.setdefault(address, name) == name, "it stays with its name"
        assert len(table) <= 6
