"""Names that are ours, and what is kept of answers to others."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from dnslib import CLASS, EDNS0, QTYPE, RCODE, RR, SOA, TXT, A, DNSRecord, EDNSOption
from hypothesis import given
from hypothesis import strategies as st

from netns_kit import DomainNameError, Record
from netns_kit.dns import Zone, parse_untrusted
from netns_kit.dns.cache import LONGEST, LONGEST_ABSENCE, LONGEST_TTL, Cache
from netns_kit.dns.message import NXDOMAIN
from netns_kit.dns.zone import Lookup
from netns_kit.domain_names import to_text, to_wire


def asked(name: str, kind: str = "A", kind_of_class: int = CLASS.IN) -> bytes:
    return to_wire(name) + int(getattr(QTYPE, kind)).to_bytes(2, "big") + kind_of_class.to_bytes(2, "big")


def told(found: Lookup | None) -> list[tuple[str, str, bytes]]:
    """Owner, type and data of each record."""
    assert found is not None
    return [(to_text(each.owner), QTYPE[each.kind], each.data) for each in found.records]


@pytest.fixture
def zone() -> Zone:
    made = Zone(domains=["internal"], networks=[ip_network("10.0.2.0/24"), ip_network("fd00::/64")])
    for record in (
        Record("db.internal", "192.0.2.5"),
        Record("db.internal", "192.0.2.6"),
        Record("db.internal", "fd00::5"),
        Record("www.example", "db.internal", "CNAME"),
        Record("*.wild.example", "192.0.2.8"),
        Record("known.wild.example", "2001:db8::8"),
    ):
        made.add(record)
    return made


def test_all_of_a_type(zone: Zone) -> None:
    found = told(zone.find(asked("DB.Internal")))
    assert found == [("DB.Internal", "A", bytes((192, 0, 2, 5))), ("DB.Internal", "A", bytes((192, 0, 2, 6)))]
    assert sorted(kind for _, kind, _ in told(zone.find(asked("db.internal", "ANY")))) == ["A", "A", "AAAA"]
    assert told(zone.find(asked("db.internal", "A", 255))) != []


def test_addresses_take_turns_in_being_the_first(zone: Zone) -> None:
    zone.add(Record("db.internal", "fd00::6"))
    first = [told(zone.find(asked("db.internal", kind)))[0][2] for kind in ["A", "AAAA", "A", "A", "AAAA"]]
    assert [each[-1] for each in first] == [5, 5, 6, 5, 6]
    assert len(told(zone.find(asked("db.internal")))) == 2
    assert zone.name_of(bytes((192, 0, 2, 5))) == to_wire("db.internal")


def test_what_is_ours_and_has_none_of_that_type(zone: Zone) -> None:
    assert zone.find(asked("db.internal", "MX")) == Lookup(0, ())


def test_what_is_not_there_in_a_domain_of_ours(zone: Zone) -> None:
    assert zone.find(asked("other.internal")) == Lookup(NXDOMAIN, ())
    assert zone.find(asked("a.b.other.INTERNAL")) == Lookup(NXDOMAIN, ())
    assert zone.find(asked("internal")) == Lookup(0, ()), "it is there, and empty"


@pytest.mark.parametrize("name", ["example", "wild.example", "notinternal", "a.internal.example", "", "com"])
def test_what_is_not_ours_is_declined(zone: Zone, name: str) -> None:
    assert zone.find(asked(name)) is None


def test_another_class_is_not_ours(zone: Zone) -> None:
    assert zone.find(asked("db.internal", "TXT", 3)) is None


def test_an_alias_leads_on(zone: Zone) -> None:
    found = zone.find(asked("www.example", "AAAA"))
    assert told(found) == [("www.example", "CNAME", to_wire("db.internal"))]
    assert found is not None
    assert found.alias == to_wire("db.internal")
    for kind in ("CNAME", "ANY"):
        itself = zone.find(asked("www.example", kind))
        assert itself is not None
        assert (len(itself.records), itself.alias) == (1, b""), "that was asked for"


def test_a_wildcard_is_for_names_without_records(zone: Zone) -> None:
    for name in ("a.wild.example", "a.b.wild.example"):
        assert told(zone.find(asked(name))) == [(name, "A", bytes((192, 0, 2, 8)))]
    assert zone.find(asked("known.wild.example")) == Lookup(0, ())


def test_addresses_have_their_names_back(zone: Zone) -> None:
    for address in ("5.2.0.192.in-addr.arpa", "fd00::5"):
        name = address if "arpa" in address else "5." + "0." * 27 + "0.0.d.f.ip6.arpa"
        assert told(zone.find(asked(name, "PTR"))) == [(name, "PTR", to_wire("db.internal"))]
    assert zone.find(asked("8.2.0.192.in-addr.arpa", "PTR")) is None, "a wildcard has none"


def test_nobody_else_is_asked_about_our_networks(zone: Zone) -> None:
    assert zone.find(asked("9.2.0.10.in-addr.arpa", "PTR")) == Lookup(NXDOMAIN, ())
    assert zone.find(asked("9." + "0." * 27 + "0.0.d.f.ip6.arpa", "PTR")) == Lookup(NXDOMAIN, ())
    assert zone.find(asked("9.3.0.10.in-addr.arpa", "PTR")) is None
    assert zone.find(asked("2.0.10.in-addr.arpa", "PTR")) is None


def test_what_is_removed_is_gone_with_its_reverse_name(zone: Zone) -> None:
    assert zone.remove("DB.internal", "a", "192.0.2.5") == 1
    assert [data for _, _, data in told(zone.find(asked("db.internal")))] == [bytes((192, 0, 2, 6))]
    assert zone.find(asked("5.2.0.192.in-addr.arpa", "PTR")) is None
    assert zone.remove("db.internal") == 2
    assert zone.find(asked("db.internal")) == Lookup(NXDOMAIN, ())
    assert zone.remove("db.internal") == 0
    assert zone.remove("www.example", "A") == 0
    with pytest.raises(DomainNameError):
        zone.remove("a..b")


def test_all_names_of_an_address() -> None:
    zone = Zone()
    for record in (Record("A.example", "192.0.2.1"), Record("b.example", "192.0.2.1"),
                   Record("*.c.example", "192.0.2.1"), Record("d.example", "b.example", type="CNAME")):  # fmt: skip
        zone.add(record)
    assert zone.names_of(bytes((192, 0, 2, 1))) == (to_wire("a.example"), to_wire("b.example"))
    assert zone.names_of(bytes((192, 0, 2, 2))) == ()


def test_adding_again_changes_the_ttl() -> None:
    zone = Zone()
    zone.add(Record("a.example", "192.0.2.1", ttl=1))
    zone.add(Record("a.example", "192.0.2.1", ttl=99))
    assert [each.ttl for each in zone.records()] == [99]
    for name, kind in ("a.example", "A"), ("1.2.0.192.in-addr.arpa", "PTR"):
        found = zone.find(asked(name, kind))
        assert found is not None
        assert [each.ttl for each in found.records] == [99]


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.sampled_from("123"))))
def test_it_is_empty_when_all_has_been_removed(steps: list[tuple[bool, str, str]]) -> None:
    zone, model = Zone(), dict[Record, None]()
    for adds, name, last in steps:
        record = Record(name, f"192.0.2.{last}")
        if adds:
            zone.add(record)
            model.pop(record, None)
            model[record] = None
        else:
            assert zone.remove(name, "A", record.value) == (record in model)
            model.pop(record, None)
        assert zone.records() == tuple(model)
        for number in "123":
            there = tuple(to_wire(each.name) for each in model if each.value.endswith(number))
            assert zone.names_of(bytes((192, 0, 2, int(number)))) == there
    for record in model:
        zone.remove(record.name, record.type, record.value)
    assert not zone._names
    assert not zone._by_address


# -- the cache --------------------------------------------------------------------------------------------


def query(name: str = "www.example", kind: str = "A", ident: int = 1) -> bytes:
    record = DNSRecord.question(name, kind)
    record.header.id = ident
    return bytes(record.pack())


def answer(message: bytes, *ttls: int, soa: tuple[int, int] | None = None, rcode: str = "NOERROR") -> bytes:
    """With an A record for each TTL; `soa`: its TTL and its minimum."""
    made = DNSRecord.parse(message).reply()
    made.header.rcode = getattr(RCODE, rcode)
    for number, ttl in enumerate(ttls):
        made.add_answer(RR(made.q.qname, QTYPE.A, ttl=ttl, rdata=A(f"192.0.2.{number}")))
    if soa is not None:
        times = (1, 2, 3, 4, soa[1])
        made.add_auth(RR("example", QTYPE.SOA, ttl=soa[0], rdata=SOA("ns.example", "root.example", times)))
    return bytes(made.pack())


class Kept:
    """A cache and its clock."""

    def __init__(self, entries: int = 8) -> None:
        self.cache = Cache(entries)
        self.now = 1000.0

    def put(self, message: bytes, reply: bytes) -> None:
        self.cache.put(message, parse_untrusted(message)[2], reply, self.now)

    def get(self, message: bytes, limit: int = 0xFFFF) -> bytes | None:
        return self.cache.get(message, parse_untrusted(message)[2], self.now, limit=limit)

    def ttls(self, message: bytes) -> list[int]:
        found = self.get(message)
        return [] if found is None else [each.ttl for each in DNSRecord.parse(found).rr]


def test_an_answer_is_told_again_with_less_time_left() -> None:
    kept = Kept()
    kept.put(query(), answer(query(), 60, 30))
    assert kept.get(query(ident=7)) == answer(query(ident=7), 60, 30), "at once, byte for byte"
    kept.now += 29.9
    assert kept.ttls(query()) == [31, 1]
    kept.now += 0.2
    assert kept.get(query()) is None
    assert len(kept.cache) == 0


def test_a_name_is_told_as_it_is_spelt() -> None:
    kept = Kept()
    kept.put(query("www.example"), answer(query("www.example"), 60))
    found = kept.get(query("WWW.exAMPle", ident=9))
    assert found is not None
    assert parse_untrusted(found)[2] == asked("WWW.exAMPle")
    assert DNSRecord.parse(found).header.id == 9


def test_types_whose_numbers_are_letters_are_not_mixed_up() -> None:
    kept = Kept()
    for kind in (65, 97):
        message = query()[:-4] + kind.to_bytes(2, "big") + query()[-2:]
        assert kept.get(message) is None
        reply = answer(query(), 60)
        question = len(query())
        reply = reply[: question - 4] + kind.to_bytes(2, "big") + reply[question - 2 :]
        reply = reply[: question + 2] + kind.to_bytes(2, "big") + reply[question + 4 :]
        kept.put(message, reply)
        assert kept.get(message) == reply


def test_another_query_is_another_answer() -> None:
    kept = Kept()
    kept.put(query(), answer(query(), 60))
    record = DNSRecord.parse(query())
    record.header.cd = 1
    with_do = DNSRecord.parse(query())
    with_do.add_ar(EDNS0(flags="do", udp_len=4096))
    for other in (query(kind="AAAA"), query("www2.example"), bytes(record.pack()), bytes(with_do.pack())):
        assert kept.get(other) is None


@pytest.mark.parametrize(
    ("soa", "rcode", "ttl"),
    [
        ((300, 60), "NXDOMAIN", 60),
        ((60, 300), "NXDOMAIN", 60),
        ((300, 60), "NOERROR", 60),
        ((99999, 99999), "NXDOMAIN", LONGEST_ABSENCE),
        ((300, 0), "NXDOMAIN", 0),
        (None, "NXDOMAIN", 0),
        (None, "NOERROR", 0),
        ((300, 60), "SERVFAIL", 0),
        ((300, 60), "REFUSED", 0),
    ],
)
def test_an_absence_is_kept_as_long_as_its_zone_allows(
    soa: tuple[int, int] | None, rcode: str, ttl: int
) -> None:
    """RFC 2308 section 5"""
    kept = Kept()
    reply = answer(query(), soa=soa, rcode=rcode)
    kept.put(query(), reply)
    assert (kept.get(query()) == reply) == bool(ttl)
    kept.now += ttl - 0.1
    assert (kept.get(query()) is not None) == bool(ttl)
    kept.now += 0.2
    assert kept.get(query()) is None


def test_nothing_is_kept_forever() -> None:
    kept = Kept()
    kept.put(query(), answer(query(), 0x7FFFFFFF))
    kept.now += LONGEST_TTL + 1
    assert kept.get(query()) is None


def with_option() -> bytes:
    record = DNSRecord.parse(query())
    record.add_ar(EDNS0(opts=[EDNSOption(10, b"12345678")]))
    return bytes(record.pack())


def long_answer() -> bytes:
    made = DNSRecord.parse(query("www.example", "TXT")).reply()
    made.add_answer(RR("www.example", QTYPE.TXT, ttl=60, rdata=TXT([b"x" * 255] * (LONGEST // 256))))
    return bytes(made.pack())


@pytest.mark.parametrize(
    ("message", "reply"),
    [
        (query(), answer(query(), 60, 0)),
        (query(), answer(query(), 60, 1 << 31)),
        (query(), answer(query(), 60)[:2] + b"\x83" + answer(query(), 60)[3:]),  # truncated
        (query(), answer(query(), 60)[:-1]),
        (query(), answer(query("www2.example"), 60)),
        (query(), query()),
        (query(kind="ANY"), answer(query(kind="ANY"), 60)),
        (with_option(), answer(with_option(), 60)),
        (query(kind="TXT"), long_answer()),
    ],
)
def test_what_is_not_kept(message: bytes, reply: bytes) -> None:
    kept = Kept()
    kept.put(message, reply)
    assert len(kept.cache) == 0


def test_what_is_too_long_for_a_client() -> None:
    kept = Kept()
    kept.put(query(), answer(query(), *[60] * 40))
    assert kept.get(query(), limit=512) is None
    assert kept.get(query()) is not None


def test_the_one_not_asked_for_the_longest_makes_room() -> None:
    kept = Kept(entries=3)
    for name in "abc":
        kept.put(query(name), answer(query(name), 60))
    assert kept.get(query("a"))
    kept.put(query("d"), answer(query("d"), 60))
    assert [bool(kept.get(query(name))) for name in "abcd"] == [True, False, True, True]
    kept.cache.clear()
    assert len(kept.cache) == 0


@given(st.data())
def test_no_answer_raises(data: st.DataObject) -> None:
    """Cut, or with bytes changed: it is kept or not, and told again if it is."""
    kept = Kept()
    reply = bytearray(answer(query(), 60, 30, soa=(300, 60)))
    for _ in range(data.draw(st.integers(0, 4))):
        reply[data.draw(st.integers(0, len(reply) - 1))] = data.draw(st.integers(0, 255))
    kept.put(query(), bytes(reply[: data.draw(st.integers(0, len(reply)))]))
    kept.now += data.draw(st.floats(0, 100))
    kept.get(query())
