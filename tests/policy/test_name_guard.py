"""What a policy does to questions and answers: messages made by dnslib, and hostile ones."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from itertools import pairwise
from typing import Any
from unittest.mock import Mock, patch

import pytest
from dnslib import CNAME, EDNS0, MX, NS, QTYPE, RD, RR, SRV, TXT, DNSRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from netns_kit import PRIVATE
from netns_kit.dns.guard import Refused
from netns_kit.dns.message import parse_untrusted, walk
from netns_kit.domain_names import to_text, to_wire
from netns_kit.policy.addresses import canonical
from netns_kit.policy.index import NameTable
from netns_kit.policy.name_guard import CHAIN_MAX, LONGEST_TTL, NameGuard
from netns_kit.policy.pins import PINS_PER_ANSWER, Pin, Pins
from netns_kit.policy.policy import Policy

NOW = 1000.0
GRACE = 5.0
CLIENT = bytes((10, 0, 2, 100))
OWN = (ip_network("10.0.2.0/24"), ip_network("192.0.3.0/24"), ip_network("fd00::/64"))
WEB = Policy.deny(grace=GRACE).allow("www.example", "*.cdn.example", ports=443)
EVERYTHING = Policy.allow(grace=GRACE).deny("ads.example", "*.ads.example", only="dns", name="ads")

SPECIAL = [
    "127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254",
    "169.254.1.1", "0.0.0.0", "224.0.0.251", "255.255.255.255", "10.0.2.2", "192.0.3.9",
    "::1", "::", "fe80::1", "fd00::2", "fc00::1", "ff02::fb", "fd00:ec2::254",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:192.0.3.9", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::1",
]  # fmt: skip


class Scene:
    """A guard, what it has told, and what it has pinned for other workers."""

    def __init__(self, policy: Policy = WEB, **options: Any) -> None:
        self.pins = Pins(**options)
        self.told: list[tuple[str, int, str, str]] = []
        self.shared: list[Pin] = []
        self.guard = NameGuard(policy.index, self.pins, own=OWN, told=self._tell, pinned=self.shared.extend)

    def _tell(self, name: bytes, kind: int, client: bytes, refused: Refused, rule: str) -> None:
        assert client == CLIENT
        self.told.append((name.decode("latin-1"), kind, refused.text, rule))

    def asks(self, name: str, kind: str = "A") -> Refused | None:
        return self.guard.question(to_wire(name), number(kind), CLIENT)

    def answer(self, *records: RR, ours: bool = False, **more: Any) -> list[str]:
        """What is left of an answer, as text."""
        found = self._judged(*records, ours=ours, **more)
        assert isinstance(found, bytes)
        return shown(found)

    def refusal(self, *records: RR, ours: bool = False, **more: Any) -> Refused:
        """How an answer is refused."""
        found = self._judged(*records, ours=ours, **more)
        assert isinstance(found, Refused)
        return found

    def _judged(
        self, *records: RR, name: str = "www.example", kind: str = "A", ours: bool, **more: Any
    ) -> bytes | Refused:
        return self.judged(answer(*records, name=name, kind=kind, **more), name, kind, ours=ours)

    def judged(
        self, message: bytes, name: str = "www.example", kind: str = "A", *, ours: bool = False
    ) -> bytes | Refused:
        question = to_wire(name) + number(kind).to_bytes(2, "big") + b"\0\1"
        return self.guard.answer(question, message, NOW, CLIENT, ours=ours)

    def pinned(self, address: str, now: float = NOW) -> list[str]:
        """The names that an address is pinned for."""
        found = self.pins.names(canonical(ip_address(address).packed), now)
        return sorted(map(to_text, found))


def number(kind: str) -> int:
    return int(getattr(QTYPE, kind))


def address(owner: str, value: str, ttl: int = 60) -> RR:
    packed = ip_address(value)
    return RR(owner, QTYPE.A if packed.version == 4 else QTYPE.AAAA, ttl=ttl, rdata=RD(packed.packed))


def alias(owner: str, target: str, ttl: int = 60) -> RR:
    return RR(owner, QTYPE.CNAME, ttl=ttl, rdata=CNAME(target))


def raw(owner: str, kind: int, data: bytes, *, in_class: int = 1) -> RR:
    return RR(owner, kind, rclass=in_class, ttl=60, rdata=RD(data))


def answer(
    *records: RR,
    name: str = "www.example",
    kind: str = "A",
    authority: Iterable[RR] = (),
    additional: Iterable[RR] = (),
) -> bytes:
    made = DNSRecord.question(name, kind).reply()
    made.add_answer(*records)
    made.add_auth(*authority)
    made.add_ar(*additional)
    return bytes(made.pack())


def shown(message: bytes) -> list[str]:
    found = DNSRecord.parse(message)
    return [
        f"{str(each.rname).removesuffix('.')} {QTYPE[each.rtype]} {each.rdata}"
        for each in (*found.rr, *found.auth, *found.ar)
    ]


# -- questions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "name", "refused"),
    [
        (WEB, "www.example", None),
        (WEB, "WWW.Example", None),
        (WEB, "x.y.CDN.example", None),
        (WEB, "cdn.example", Refused(3, "default: deny")),
        (WEB, "other.example", Refused(3, "default: deny")),
        (WEB, "5.2.0.192.in-addr.arpa", Refused(3, "default: deny")),
        (Policy.deny(dns="refused"), "www.example", Refused(5, "default: deny")),
        (EVERYTHING, "www.example", None),
        (EVERYTHING, "ads.example", Refused(3, EVERYTHING.label(0))),
        (EVERYTHING, "X.ADS.Example", Refused(3, EVERYTHING.label(0))),
        (Policy.allow().deny("ads.example", only="dns", dns="refused"), "ads.example", None),
    ],
)
def test_questions(policy: Policy, name: str, refused: Refused | None) -> None:
    if policy.default == "allow" and policy.rules[0].dns == "refused":
        refused = Refused(5, policy.label(0))
    for kind in ("A", "AAAA", "TXT", "ANY", "AXFR"):
        assert Scene(policy).asks(name, kind) == refused


def test_what_is_no_question_about_a_name_is_refused() -> None:
    scene = Scene(Policy.allow())
    told = "only questions about one name, and nothing else, are answered"
    assert scene.guard.question(b"\0", 0, CLIENT) == Refused(5, told)
    assert scene.guard.question(b"\0", 2, CLIENT) is None
    assert isinstance(scene.guard.answer(bytes(5), answer(), NOW, CLIENT, ours=False), Refused)
    audit = Scene(Policy.allow(audit=True))
    assert audit.guard.question(b"\0", 0, CLIENT) is None
    assert audit.guard.answer(bytes(5), b"x", NOW, CLIENT, ours=False) == b"x"


def test_what_is_refused_is_told() -> None:
    scene = Scene(EVERYTHING)
    scene.asks("ADS.example", "AAAA")
    label = EVERYTHING.label(0)
    assert scene.told == [("\3ads\7example\0", 28, label, label)]


@pytest.mark.parametrize("kind", ["HTTPS", "SVCB"])
def test_the_keys_of_names_that_must_be_seen_are_not_told(kind: str) -> None:
    scene = Scene(Policy.deny().allow("www.example", sni=True).allow("*.cdn.example"))
    found = scene.asks("www.example", kind)
    assert found is not None
    assert found.rcode == 0
    assert scene.asks("x.cdn.example", kind) is None
    assert scene.asks("www.example") is None
    scene = Scene(Policy.allow().allow("www.example", sni=True))
    assert scene.asks("_8443._https.www.example", kind) is not None, "they are those of the host"
    assert scene.asks("_https.other.example", kind) is None


# -- answers: pins ----------------------------------------------------------------------------------------


def test_an_address_is_pinned_for_the_name_that_was_asked_for() -> None:
    scene = Scene()
    message = answer(address("www.example", "192.0.2.1", 10), address("www.example", "2001:db8::1", 20))
    assert scene.judged(message) is message, "byte for byte"
    assert scene.pinned("192.0.2.1", NOW + 10 + GRACE - 0.1) == ["www.example"]
    assert scene.pinned("192.0.2.1", NOW + 10 + GRACE) == []
    assert scene.pinned("2001:db8::1", NOW + 20 + GRACE - 0.1) == ["www.example"]
    name = to_wire("www.example")
    assert scene.shared == [
        (name, ip_address("192.0.2.1").packed, NOW + 10 + GRACE, False),
        (name, ip_address("2001:db8::1").packed, NOW + 20 + GRACE, False),
    ]
    assert scene.told == []


def test_the_letter_case_of_a_name_does_not_count() -> None:
    scene = Scene()
    assert scene.answer(
        alias("wWw.eXample", "a.OTHER"), address("A.other", "192.0.2.1"), name="WwW.ExAmPlE"
    ) == ["wWw.eXample CNAME a.OTHER.", "A.other A 192.0.2.1"]
    assert scene.pinned("192.0.2.1") == ["www.example"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_chain_of_aliases_is_followed(order: int) -> None:
    names = ["www.example", *(f"a{n}.other.example" for n in range(8))]
    pairs = list(pairwise(names))[::order]
    scene = Scene()
    assert scene.answer(*(alias(*pair) for pair in pairs), address(names[-1], "192.0.2.1")) == [
        *(f"{one} CNAME {other}." for one, other in pairs),
        f"{names[-1]} A 192.0.2.1",
    ]
    assert scene.pinned("192.0.2.1") == ["www.example"]


def test_an_alias_may_lead_to_what_only_the_default_denies() -> None:
    scene = Scene()
    assert len(scene.answer(alias("www.example", "any.where"), address("any.where", "192.0.2.1"))) == 2


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("kind", ["A", "CNAME", "TXT"])
def test_an_alias_to_what_a_rule_denies_refuses_the_whole_answer(kind: str, ours: bool) -> None:
    scene = Scene(EVERYTHING)
    records = [alias("www.example", "x.example"), alias("x.example", "t.ADS.example")]
    found = scene.refusal(*records, address("t.ads.example", "192.0.2.1"), kind=kind, ours=ours)
    label = EVERYTHING.label(0)
    assert found == Refused(3, label)
    assert scene.told == [("\3www\7example\0", number(kind), label, label)]
    assert len(scene.pins) == 0
    assert scene.guard.alias(to_wire("ADS.example"), 1, CLIENT) == Refused(3, label)
    assert scene.guard.alias(to_wire("x.example"), 1, CLIENT) is None


def test_an_alias_that_nothing_leads_to_refuses_nothing() -> None:
    scene = Scene(EVERYTHING)
    records = [address("www.example", "192.0.2.1"), alias("other.example", "ads.example")]
    assert len(scene.answer(*records)) == 2


def test_aliases_that_go_round_come_to_an_end() -> None:
    scene = Scene()
    assert len(scene.answer(alias("www.example", "b"), alias("b", "www.example"))) == 2


@pytest.mark.parametrize(
    ("ttl", "seconds"), [(0, 0), (1, 1), (0x7FFFFFFF, LONGEST_TTL), (0x80000000, 0), (0xFFFFFFFF, 0)]
)
def test_how_long_a_pin_lasts(ttl: int, seconds: int) -> None:
    scene = Scene()
    scene.answer(address("www.example", "192.0.2.1", ttl))
    assert [until for _, _, until, _ in scene.shared] == [NOW + seconds + GRACE]


def test_of_many_addresses_so_many_pass_as_can_be_pinned() -> None:
    addresses = [f"192.0.2.{n}" for n in range(PINS_PER_ANSWER + 9)]
    scene = Scene()
    found = scene.answer(*(address("www.example", each) for each in addresses))
    assert found == [f"www.example A {each}" for each in addresses[:PINS_PER_ANSWER]]
    assert len(scene.pins) == PINS_PER_ANSWER
    scene = Scene(Policy.allow())
    assert len(scene.answer(*(address("www.example", each) for each in addresses))) == len(addresses)
    assert len(scene.pins) == 0, "no rule needs them"


def test_what_is_resolved_only_is_not_pinned() -> None:
    scene = Scene(Policy.deny().allow("www.example", only="dns").allow("192.0.2.0/24"))
    assert scene.answer(address("www.example", "192.0.2.1")) == ["www.example A 192.0.2.1"]
    assert len(scene.pins) == 0


def test_nat64_addresses_are_pinned_as_what_they_lead_to() -> None:
    scene = Scene()
    scene.answer(address("www.example", "64:ff9b::c000:201"), kind="AAAA")
    assert scene.pinned("192.0.2.1") == scene.pinned("::ffff:192.0.2.1") == ["www.example"]


# -- answers: what is cut ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("policy", [WEB, EVERYTHING], ids=["deny", "allow"])
def test_no_public_name_leads_to_special_space(policy: Policy, value: str) -> None:
    scene = Scene(policy)
    good = address("www.example", "192.0.2.1")
    assert scene.answer(good, address("www.example", value)) == ["www.example A 192.0.2.1"]
    assert len(scene.told) == 1
    found = scene.refusal(address("www.example", value))
    told = f"{ip_address(canonical(ip_address(value).packed))} is no address for a public name"
    assert found == Refused(0, told)
    assert scene.told[-1] == (
        "\3www\7example\0",
        1,
        told,
        policy.label(policy.index.name(to_wire("www.example")).rule),
    )
    assert scene.pinned(value) == []


def test_an_alias_alone_is_no_data() -> None:
    records = [alias("www.example", "b.example"), address("b.example", "10.0.0.1")]
    assert Scene().refusal(*records)


def test_a_rule_may_let_private_addresses_pass() -> None:
    scene = Scene(Policy.deny().allow("www.example", private=True))
    for value in ("10.0.0.1", "192.168.1.1", "fd00::2", "192.0.3.9", "10.0.2.2"):
        assert scene.answer(address("www.example", value)) == [
            f"www.example {'AAAA' if ':' in value else 'A'} {value}"
        ]
        assert scene.pinned(value) == ["www.example"]
    for value in ("127.0.0.1", "169.254.169.254", "fe80::1", "::ffff:127.0.0.1", "224.0.0.1", "0.0.0.0"):
        assert scene.refusal(address("www.example", value))


@pytest.mark.parametrize(
    ("policy", "value", "names"),
    [
        (Policy.ask(), "203.0.113.9", True),
        (Policy.ask(), "10.0.0.1", False),
        (Policy.ask(), "64:ff9b::10.0.0.1", False),
        (Policy.ask(audit=True), "10.0.0.1", True),
        (Policy.ask().ask("www.example", private=True), "10.0.0.1", True),
        (Policy.ask().allow("10.0.0.0/8"), "10.0.0.1", True),
    ],
)
def test_people_are_told_a_name_that_has_been_an_answer(policy: Policy, value: str, *, names: bool) -> None:
    assert Scene(policy).guard.names(to_wire("wWw.example"), ip_address(value).packed) is names


def test_a_rule_by_address_lets_it_pass_and_a_denial_does_not() -> None:
    scene = Scene(Policy.deny().allow("www.example").allow("10.1.0.0/16", "192.0.3.0/28"))
    assert scene.answer(address("www.example", "10.1.2.3")) == ["www.example A 10.1.2.3"]
    assert scene.answer(address("www.example", "192.0.3.9")) == ["www.example A 192.0.3.9"]
    assert scene.refusal(address("www.example", "10.2.2.3"))
    assert scene.refusal(address("www.example", "192.0.3.77"))
    assert Scene(Policy.allow().deny(PRIVATE)).refusal(address("a", "10.1.2.3"), name="a")


def test_addresses_that_were_not_asked_for_are_cut() -> None:
    """A client that would take them for an answer has nothing, and others ask for that name."""
    scene = Scene(EVERYTHING)
    found = scene.answer(
        RR("www.example", QTYPE.MX, ttl=60, rdata=MX("mx.example")),
        address("mx.example", "192.0.2.1"),
        kind="MX",
        authority=[RR("example", QTYPE.NS, ttl=60, rdata=NS("ns.example"))],
        additional=[
            address("mx.example", "192.0.2.2"),
            address("www.example", "10.0.0.1"),
            EDNS0(udp_len=1232),
        ],
    )
    assert found[:2] == ["www.example MX 10 mx.example.", "example NS ns.example."]
    assert len(found) == 3, "and OPT"
    assert len(scene.pins) == 0
    assert scene.told == []


def test_an_address_record_that_is_none_is_cut() -> None:
    scene = Scene()
    good = address("www.example", "192.0.2.1")
    for bad in (
        raw("www.example", QTYPE.A, b"\x7f\0\0"),
        raw("www.example", QTYPE.A, bytes(15) + b"\1"),
        raw("www.example", QTYPE.AAAA, b"\x7f\0\0\1"),
        raw("www.example", QTYPE.A, b""),
        raw("www.example", QTYPE.A, b"\xc0\0\2\2", in_class=3),
    ):
        assert scene.answer(bad, good) == ["www.example A 192.0.2.1"]
    assert len(scene.pins) == 1


def service(*parameters: tuple[int, bytes], owner: str = "www.example", kind: int = QTYPE.HTTPS) -> RR:
    data = b"\0\1\0" + b"".join(
        key.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value for key, value in parameters
    )
    return raw(owner, kind, data)


@pytest.mark.parametrize(
    "hint",
    [(4, "127.0.0.1"), (4, "10.0.0.1"), (6, "::ffff:10.0.0.1"), (6, "fe80::1"), (6, "64:ff9b::7f00:1")],
)
def test_a_hint_does_not_lead_to_special_space(hint: tuple[int, str]) -> None:
    key, value = hint
    packed = ip_address(value).packed
    good = ip_address("192.0.2.1" if key == 4 else "2001:db8::1").packed
    scene = Scene()
    assert scene.refusal(service((1, b"\2h2"), (key, good + packed)), kind="HTTPS")
    message = answer(service((1, b"\2h2"), (key, good)), kind="HTTPS")
    assert scene.judged(message, kind="HTTPS") is message
    assert len(scene.pins) == 0, "a hint is no answer"
    for section in ("authority", "additional"):
        more = [service((key, packed), kind=QTYPE.SVCB)]
        hidden = (
            answer(kind="TXT", authority=more)
            if section == "authority"
            else answer(kind="TXT", additional=more)
        )
        found = scene.judged(hidden, kind="TXT")
        assert isinstance(found, Refused) or shown(found) == []


@pytest.mark.parametrize(
    "data", [b"", b"\0\1", b"\0\1\0\0\4", b"\0\1\0\0\4\0\4\x7f", b"\0\1\0\0\4\0\3\x7f\0\0", b"\0\1\3"]
)
def test_a_service_record_that_cannot_be_read_fails_the_answer(data: bytes) -> None:
    found = Scene().refusal(raw("www.example", QTYPE.HTTPS, data), kind="HTTPS")
    assert found == Refused(2, "the answer cannot be read")


def test_keys_are_cut_wherever_they_come() -> None:
    scene = Scene(Policy.allow().allow("www.example", sni=True))
    keys = (5, b"ech")
    text = RR("www.example", QTYPE.TXT, ttl=60, rdata=TXT("x"))
    assert scene.answer(service(keys), text, kind="ANY") == ['www.example TXT "x"']
    assert scene.answer(text, additional=[service(keys)], kind="TXT") == ['www.example TXT "x"']
    assert scene.answer(service(keys), text, name="other.example", kind="ANY") == ['www.example TXT "x"']
    other = service(keys, owner="other.example")
    assert len(scene.answer(other, name="other.example", kind="HTTPS")) == 1
    records = [alias("other.example", "www.example"), service(keys)]
    assert scene.answer(*records, name="other.example", kind="HTTPS") == ["other.example CNAME www.example."]
    records = [alias("www.example", "other.example"), service(keys, owner="other.example")]
    assert scene.answer(*records, kind="ANY") == ["www.example CNAME other.example."]


def test_a_transfer_has_the_names_that_may_be_resolved() -> None:
    scene = Scene(Policy.deny().allow("example", "*.web.example").deny("*.example", only="dns"))
    found = scene.answer(
        RR("example", QTYPE.NS, ttl=60, rdata=NS("ns.example")),
        address("ns.example", "192.0.2.2"),
        RR("_x.example", QTYPE.SRV, ttl=60, rdata=SRV(1, 2, 3, "secret.example")),
        address("a.web.example", "192.0.2.3"),
        address("a.web.example", "10.0.0.1"),
        name="example",
        kind="AXFR",
    )
    assert found == ["example NS ns.example.", "a.web.example A 192.0.2.3"]
    assert len(scene.pins) == 0
    assert scene.refusal(name="x.example", kind="AXFR")


def test_records_of_ours_are_pinned_and_not_cut() -> None:
    scene = Scene()
    message = answer(
        address("www.example", "10.0.2.2"), address("www.example", "127.0.0.1"), address("else", "10.0.2.3")
    )
    assert scene.judged(message, ours=True) is message
    assert scene.pinned("10.0.2.2") == scene.pinned("127.0.0.1") == ["www.example"]
    assert scene.pinned("10.0.2.3") == []
    assert scene.told == []


# -- when the policy changes, and when it only looks ------------------------------------------------------


def test_an_answer_to_a_question_that_is_refused_by_now() -> None:
    scene = Scene()
    found = scene.refusal(address("other.example", "192.0.2.1"), name="other.example")
    assert found == Refused(3, "default: deny")
    assert len(scene.told) == 1
    assert len(scene.pins) == 0


def test_audit_refuses_and_cuts_nothing_but_tells_of_it() -> None:
    policy = Policy.deny(audit=True).allow("www.example").deny("ads.example", only="dns")
    scene = Scene(policy)
    assert scene.asks("ads.example") is None
    message = answer(address("ads.example", "192.0.2.9"), name="ads.example")
    assert scene.judged(message, "ads.example") is message
    assert [each[2] for each in scene.told] == [policy.label(1)], "once"
    message = answer(address("www.example", "10.0.0.1"), address("www.example", "192.0.2.1"))
    assert scene.judged(message) is message
    assert [each[2] for each in scene.told[1:]] == ["10.0.0.1 is no address for a public name"]
    message = answer(alias("www.example", "ads.example"), address("ads.example", "192.0.2.2"))
    assert scene.judged(message) is message
    assert scene.guard.alias(to_wire("ads.example"), 1, CLIENT) is None
    assert [each[2] for each in scene.told[2:]] == [policy.label(1)]
    assert scene.pinned("192.0.2.1") == ["www.example"]
    assert len(scene.pins) == 1, "what would be refused is not pinned: flows to it are told of too"
    assert scene.judged(b"nonsense") == b"nonsense"


# -- hostile bytes ----------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_a_failure_and_pins_nothing() -> None:
    scene = Scene()
    message = answer(address("www.example", "192.0.2.1"), address("www.example", "192.0.2.2"))
    for end in range(len(message)):
        assert scene.judged(message[:end]) == Refused(2, "the answer cannot be read")
    for name in ("xww.example", "www.examplf"):
        assert isinstance(scene.judged(answer(name=name)), Refused)
    assert len(scene.pins) == 0


def test_a_truncated_answer_that_ends_in_a_record_is_asked_for_again() -> None:
    message = bytearray(answer(address("www.example", "192.0.2.1")))
    message[2] |= 2
    found = Scene().judged(bytes(message[:-1]))
    assert found == bytes(message[:6]) + bytes(6) + bytes(message[12:29])


def test_an_alias_that_is_longer_than_its_record_is_a_failure() -> None:
    """Readers differ in what they take it for."""
    for extra in (b"", b"\0"):
        record = raw("www.example", QTYPE.CNAME, to_wire("other.example") + extra)
        assert isinstance(Scene()._judged(record, ours=False), Refused) is bool(extra)


def test_an_error_without_its_question_is_read() -> None:
    message = b"\0\1\x80\x82" + bytes(8)
    assert Scene().judged(message) == message
    with_address = (
        b"\0\1\x80\x82\0\0\0\1" + bytes(4) + to_wire("www.example") + b"\0\1\0\1\0\0\0\1\0\4\x7f\0\0\1"
    )
    assert isinstance(Scene().judged(with_address), Refused)


def passes(scene: Scene, message: bytes) -> None:
    """Whatever it is: nothing raises, and no special address, or one that is not pinned, is in what is left."""
    found = scene.judged(message)
    if isinstance(found, Refused):
        return
    _, _, asked = parse_untrusted(found)
    for each in walk(found, asked):
        if each.kind in (QTYPE.A, QTYPE.AAAA):
            packed = canonical(found[each.data : each.end])
            assert WEB.index.lets_answer(to_wire("www.example"), packed)
            assert scene.pins.names(packed, NOW) == (to_wire("www.example"),)
            assert ip_address(packed) not in OWN[1]


@given(st.binary(max_size=300))
def test_no_bytes_raise(message: bytes) -> None:
    passes(Scene(), message)
    head = answer()
    passes(Scene(), head[:6] + message[:6].ljust(6, b"\0") + head[12:] + message[6:])


RECORDS = st.sampled_from(
    [
        *(address("www.example", each) for each in (*SPECIAL, "192.0.2.1", "2001:db8::1")),
        *(address("a.other", each) for each in ("10.0.0.1", "192.0.2.2")),
        alias("www.example", "a.other"),
        alias("a.other", "www.example"),
        service((4, bytes((10, 0, 0, 1)))),
        service((6, bytes(16)), owner="a.other"),
        RR("www.example", QTYPE.MX, ttl=60, rdata=MX("a.other")),
        EDNS0(udp_len=1232),
    ]
)


@settings(max_examples=500)
@given(
    st.lists(RECORDS, max_size=6),
    st.lists(RECORDS, max_size=3),
    st.lists(RECORDS, max_size=3),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
)
def test_no_damaged_answer_lets_pass_what_is_special(
    records: list[RR], authority: list[RR], additional: list[RR], damages: list[tuple[int, int]]
) -> None:
    message = bytearray(answer(*records, authority=authority, additional=additional))
    for at, octet in damages:
        if at < len(message):
            message[at] = octet
    passes(Scene(), bytes(message))


def test_a_hostile_answer_is_read_once_however_its_names_are_compressed() -> None:
    """Thousands of aliases, each with a name of 127 labels made of pointers to the one before, to many targets."""
    labels = b"\1x" * 120
    made = bytearray(answer()) + labels + b"\xc0\x0c\0\5\0\1\0\0\0\1\0\2\xc0\x0c"
    count, first = 1, len(answer())
    while len(made) < 0xFFF0:
        owner = (0xC000 | first + 2 * (count % 120)).to_bytes(2, "big")
        target = (0xC000 | first + 2 * (count * 7 % 120)).to_bytes(2, "big")
        made += owner + b"\0\5\0\1\0\0\0\1\0\2" + target
        count += 1
    made[6:8] = count.to_bytes(2, "big")
    scene = Scene()
    calls = 0

    def counted(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(lambda frame, event, _: counted() if event == "call" else None)
    try:
        found = scene.judged(bytes(made))
    finally:
        sys.setprofile(None)
    assert found == bytes(made)
    assert count > 4000
    assert calls < 20 * count


def test_a_chain_of_aliases_without_an_end_is_a_failure() -> None:
    """Each name of it is judged, which takes time."""
    for size, passes in ((CHAIN_MAX - 1, True), (CHAIN_MAX, False)):
        links = [f"{number}.example" for number in range(size)]
        scene, chain = Scene(EVERYTHING), [alias(*each) for each in pairwise(["www.example", *links])]
        message = answer(*chain, address(links[-1], "192.0.2.1"))
        assert scene.judged(message) == (message if passes else Refused(2, "the answer cannot be read"))


@pytest.mark.parametrize("kind", ["A", "HTTPS"])
def test_thousands_of_special_addresses_for_a_long_name_are_judged_by_its_rule_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "x." * 100 + "cdn.example"
    if kind == "A":
        records = [address(name, f"10.0.{number >> 8}.{number & 255}") for number in range(2000)]
    else:
        records = [service((4, ip_address("10.0.0.1").packed * 2000), owner=name)]
    message, scene = answer(*records, name=name, kind=kind), Scene()
    lets = Mock(wraps=scene.guard.lets)
    monkeypatch.setattr(scene.guard, "lets", lets)
    with patch.object(NameTable, "matching", autospec=True, side_effect=NameTable.matching) as looks_up:
        assert isinstance(scene.judged(message, name, kind), Refused)
    assert looks_up.call_count < 10
    assert lets.call_count == len(records), "a record is over with its first"


def test_a_full_table_of_pins_is_no_failure() -> None:
    scene = Scene(limit=2)
    assert len(scene.answer(*(address("www.example", f"192.0.2.{n}") for n in range(3)))) == 3
    assert len(scene.pins) == 2
    assert scene.pins.evicted == 1
