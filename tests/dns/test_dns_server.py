"""Who answers a query: each test is a diagram, one line per message or per pause."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from dnslib import CNAME, EDNS0, MX, NS, QTYPE, RCODE, RR, TXT, A, DNSRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from netns_kit import DnsQuery, Rcode, Record
from netns_kit.dns import Action, Answer, DnsProxy, DnsServer, Manner, Send, Upstream, Zone, server
from netns_kit.dns.cache import Cache
from netns_kit.dns.exchanges import DnsTransport
from netns_kit.dns.guard import Refused
from netns_kit.dns.message import TC, BadMessage, expanded, parse_untrusted, walk, without
from netns_kit.dns.proxy import LONGEST_KEPT
from netns_kit.domain_names import to_text

RESOLVER, CORP, OTHER = ("192.0.2.1", 53), ("10.1.0.53", 53), ("192.0.2.2", 5353)
CLIENT = bytes((10, 0, 2, 100))


def question(name: str = "www.example", kind: str = "A", ident: int = 1, size: int = 0) -> bytes:
    """A client's query; `size`: what it says it takes."""
    record = DNSRecord.question(name, kind)
    record.header.id = ident
    if size:
        record.add_ar(EDNS0(udp_len=size))
    return bytes(record.pack())


def reply(query: bytes, *addresses: str, rcode: str = "NOERROR") -> bytes:
    made = DNSRecord.parse(query).reply()
    made.header.rcode = getattr(RCODE, rcode)
    for address in addresses:
        made.add_answer(RR(made.q.qname, QTYPE.A, ttl=60, rdata=A(address)))
    return bytes(made.pack())


class Scene:
    """A server, its clock, and what it wants done."""

    def __init__(
        self,
        *records: Record,
        hook: Any = None,
        cache: bool = False,
        domains: Mapping[str, Sequence[tuple[str, int]]] | None = None,
        resolvers: Sequence[tuple[str, int]] = (RESOLVER,),
    ) -> None:
        self.errors: list[BaseException] = []
        self.asked: list[DnsQuery] = []
        zone = Zone(domains=["internal"], networks=[ip_network("10.0.2.0/24")])
        for record in records:
            zone.add(record)

        def remembering(query: DnsQuery) -> Any:
            self.asked.append(query)
            return hook(query)

        self.server = DnsServer(
            zone,
            DnsProxy(random_id=itertools.count(0x1000).__next__),
            cache=Cache() if cache else None,
            hook=remembering if hook else None,
            failed=self.errors.append,
        )
        self.server.set_upstreams({"": resolvers, **(domains or {})})
        self.now = 1000.0
        self.out: list[Action] = []

    def asks(
        self, query: bytes, client: str = "me", transport: DnsTransport = "udp", address: bytes = CLIENT
    ) -> None:
        self.out += self.server.query(query, client, address, self.now, transport) or []

    def sends(self, *upstreams: Upstream) -> list[bytes]:
        done, self.out = self.out, []
        assert [each.upstream if isinstance(each, Send) else each for each in done] == list(upstreams)
        return [each.message for each in done]

    def says(self, upstream: Upstream, message: bytes) -> None:
        self.out += self.server.response(message, upstream, self.now)

    def answer(self, client: str = "me") -> bytes:
        """What the client has got, and nothing else has happened."""
        (done,), self.out = self.out, []
        assert isinstance(done, Answer)
        assert done.client == client
        return done.message

    def told(self, client: str = "me") -> tuple[str, list[str]]:
        """The code of what the client has got, and its answers."""
        found = DNSRecord.parse(self.answer(client))
        return RCODE[found.header.rcode], [
            f"{each.rname} {QTYPE[each.rtype]} {each.rdata}" for each in found.rr
        ]


UDP, TCP = Upstream(*RESOLVER), Upstream(*RESOLVER, "tcp")


def test_what_is_not_ours_is_passed_on_byte_for_byte() -> None:
    dns = Scene()
    query = question("wWw.example", size=4096)
    dns.asks(query)
    (sent,) = dns.sends(UDP)
    assert sent[2:] == query[2:]
    dns.says(UDP, reply(sent, "192.0.2.9"))
    assert dns.answer() == reply(query, "192.0.2.9")


def test_upstream_is_asked_the_way_the_client_asks() -> None:
    dns = Scene()
    dns.asks(question(), transport="tcp")
    (sent,) = dns.sends(TCP)
    dns.says(UDP, reply(sent, "192.0.2.66"))
    assert dns.out == [], "that is not where it was asked"
    dns.says(TCP, reply(sent, "192.0.2.9"))
    assert dns.told() == ("NOERROR", ["www.example. A 192.0.2.9"])


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_names_of_ours_are_answered_here(transport: DnsTransport) -> None:
    dns = Scene(Record("db.internal", "192.0.2.5"))
    dns.asks(question("db.internal"), transport=transport)
    assert DNSRecord.parse(dns.out[0].message).header.aa
    assert dns.told() == ("NOERROR", ["db.internal. A 192.0.2.5"])
    dns.asks(question("db.internal", "AAAA"), transport=transport)
    assert dns.told() == ("NOERROR", [])
    dns.asks(question("other.internal"), transport=transport)
    assert dns.told() == ("NXDOMAIN", [])
    dns.asks(question("5.2.0.192.in-addr.arpa", "PTR"), transport=transport)
    assert dns.told() == ("NOERROR", ["5.2.0.192.in-addr.arpa. PTR db.internal."])
    dns.asks(question("9.2.0.10.in-addr.arpa", "PTR"), transport=transport)
    assert dns.told() == ("NXDOMAIN", [])
    assert dns.server.stats()["owned"] == 5


def test_an_answer_of_ours_is_cut_for_clients_that_take_little() -> None:
    dns = Scene(*[Record("many.internal", f"192.0.2.{number}") for number in range(60)])
    for size, whole in ((0, False), (600, False), (4096, True)):
        dns.asks(question("many.internal", size=size))
        message = dns.answer()
        assert bool(int.from_bytes(message[2:4], "big") & TC) is not whole
        assert len(message) <= max(size, 512)
    dns.asks(question("many.internal"), transport="tcp")
    assert len(dns.told()[1]) == 60


# -- aliases ----------------------------------------------------------------------------------------------


def test_an_alias_of_ours_leads_to_the_world() -> None:
    dns = Scene(
        Record("one.internal", "two.internal", "CNAME"), Record("two.internal", "www.example", "CNAME")
    )
    query = question("One.internal", size=1400)
    dns.asks(query)
    (sent,) = dns.sends(UDP)
    assert sent[2:] == question("www.example", size=1400)[2:]
    dns.says(UDP, reply(sent, "192.0.2.9"))
    assert dns.out[0].message[:2] == query[:2]
    assert DNSRecord.parse(dns.out[0].message).q == DNSRecord.parse(query).q
    assert dns.told() == (
        "NOERROR",
        ["One.internal. CNAME two.internal.", "two.internal. CNAME www.example.", "www.example. A 192.0.2.9"],
    )


def test_an_alias_of_ours_leads_to_what_is_ours() -> None:
    dns = Scene(Record("one.internal", "two.internal", "CNAME"), Record("two.internal", "192.0.2.5"))
    dns.asks(question("one.internal"))
    assert dns.told() == ("NOERROR", ["one.internal. CNAME two.internal.", "two.internal. A 192.0.2.5"])
    dns.asks(question("one.internal", "MX"))
    assert dns.told() == ("NOERROR", ["one.internal. CNAME two.internal."])


def test_aliases_that_go_round_are_a_failure() -> None:
    dns = Scene(
        Record("one.internal", "two.internal", "CNAME"), Record("two.internal", "one.internal", "CNAME")
    )
    dns.asks(question("one.internal"))
    assert dns.told() == ("SERVFAIL", [])


@pytest.mark.parametrize("rcode", ["NXDOMAIN", "SERVFAIL"])
def test_what_upstream_says_of_an_alias_is_said(rcode: str) -> None:
    dns = Scene(Record("one.internal", "www.example", "CNAME"))
    dns.asks(question("one.internal"))
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent, rcode=rcode))
    assert dns.told() == (rcode, ["one.internal. CNAME www.example."])


def test_upstream_lies_about_an_alias() -> None:
    dns = Scene(Record("one.internal", "www.example", "CNAME"))
    dns.asks(question("one.internal"))
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent, "192.0.2.9")[:-1])
    assert dns.told()[0] == "SERVFAIL"
    assert dns.server.stats()["malformed"] == 1


# -- the hook ---------------------------------------------------------------------------------------------


def test_the_hook_is_told_names_in_small_letters() -> None:
    """A hook that blocks "ads.example" is not to be got round by ADS.example."""
    dns = Scene(hook=lambda query: Rcode.REFUSED if query.name == "ads.example" else None)
    dns.asks(question("ADS.Example"))
    assert dns.server.stats()["hooked"] == 1


def test_the_hook_is_told_what_is_asked() -> None:
    dns = Scene(hook=lambda query: None)
    dns.asks(question("wWw.example", "AAAA"))
    dns.asks(b"\0\1\1\0\0\1" + bytes(6) + b"\3a.b\0\xff\0\0\1", transport="tcp")
    dns.sends(UDP, TCP)
    assert dns.asked == [
        DnsQuery("www.example", "AAAA", ip_address("10.0.2.100"), "udp"),
        DnsQuery(r"a\.b", "TYPE65280", ip_address("10.0.2.100"), "tcp"),
    ]


@pytest.mark.parametrize("transport", ["udp", "tcp"])
@pytest.mark.parametrize("rcode", Rcode)
def test_the_hook_refuses(rcode: Rcode, transport: DnsTransport) -> None:
    dns = Scene(Record("db.internal", "192.0.2.5"), hook=lambda query: rcode)
    for name in ("db.internal", "www.example"):
        dns.asks(question(name), transport=transport)
        assert dns.told() == (rcode.name, [])


def test_the_hook_answers() -> None:
    records = [
        Record("x", "192.0.2.7", ttl=5),
        Record("x", "2001:db8::7"),
        Record("x", "1 mail.example", "MX"),
    ]
    dns = Scene(hook=lambda query: records)
    for kind, value in ("A", "192.0.2.7"), ("AAAA", "2001:db8::7"), ("MX", "1 mail.example."):
        dns.asks(question("www.example", kind))
        assert dns.told() == ("NOERROR", [f"www.example. {kind} {value}"])
    dns.asks(question("www.example", "TXT"))
    assert dns.told() == ("NOERROR", [])
    dns.asks(question("www.example", "ANY"))
    assert len(dns.told()[1]) == 3
    assert dns.server.stats()["hooked"] == 5


def test_the_hook_has_another_name_looked_up() -> None:
    dns = Scene(
        Record("db.internal", "192.0.2.5"), hook=lambda query: {"a": "db.internal", "b": "c"}[query.name]
    )
    dns.asks(question("a"))
    assert dns.told() == ("NOERROR", ["a. CNAME db.internal.", "db.internal. A 192.0.2.5"])
    dns.asks(question("b"))
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent, "192.0.2.9"))
    assert dns.told() == ("NOERROR", ["b. CNAME c.", "c. A 192.0.2.9"])


@pytest.mark.parametrize("wrong", [7, b"www", [1], "a..b", ["192.0.2.1"], True, object()])
def test_a_hook_that_says_what_it_must_not(wrong: object) -> None:
    dns = Scene(hook=lambda query: wrong)
    dns.asks(question())
    assert dns.told() == ("SERVFAIL", [])
    assert len(dns.errors) == 1


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), RecursionError(), GeneratorExit()])
def test_a_hook_that_raises(error: BaseException) -> None:
    def hook(_: DnsQuery) -> None:
        raise error

    dns = Scene(hook=hook)
    dns.asks(question())
    assert dns.told() == ("SERVFAIL", [])
    assert dns.errors == [error]


def test_no_opcode_gets_past_the_hook() -> None:
    dns = Scene(hook=lambda query: Rcode.REFUSED)
    for opcode in range(16):
        message = bytearray(question())
        message[2] |= opcode << 3
        dns.asks(bytes(message))
        assert dns.told()[0] == "REFUSED"


# -- domains ----------------------------------------------------------------------------------------------


def test_domains_have_resolvers_of_their_own() -> None:
    dns = Scene(domains={"corp.example": [CORP], "Lab.corp.example.": [OTHER]})
    for name, whose in {
        "www.example": RESOLVER,
        "notcorp.example": RESOLVER,
        "corp.example": CORP,
        "a.CORP.example": CORP,
        "a.b.lab.corp.example": OTHER,
    }.items():
        dns.asks(question(name))
        dns.sends(Upstream(*whose))
        dns.asks(question(name), transport="tcp")
        dns.sends(Upstream(*whose, "tcp"))


def test_a_domain_without_resolvers_is_not_asked_about() -> None:
    dns = Scene(domains={"ads.example": []})
    dns.asks(question("x.ads.example"))
    assert dns.told() == ("SERVFAIL", [])


def test_new_resolvers_are_asked_from_now_on() -> None:
    dns = Scene(domains={"corp.example": [CORP]}, cache=True)
    dns.asks(question())
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent, "192.0.2.9"))
    dns.answer()
    dns.server.set_upstreams({"": [OTHER]})
    dns.asks(question())
    dns.sends(Upstream(*OTHER))
    dns.asks(question("corp.example"))
    dns.sends(Upstream(*OTHER))


# -- the cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_what_upstream_has_said_is_said_again(transport: DnsTransport) -> None:
    dns = Scene(cache=True)
    upstream = UDP if transport == "udp" else TCP
    dns.asks(question(), transport=transport)
    (sent,) = dns.sends(upstream)
    dns.says(upstream, reply(sent, "192.0.2.9"))
    dns.answer()
    dns.asks(question(ident=2), "other", "tcp")
    assert dns.answer("other") == reply(question(ident=2), "192.0.2.9")
    dns.now += 60
    dns.asks(question(ident=3), transport=transport)
    dns.sends(upstream)
    assert dns.server.stats()["cached"] == 1


def test_what_came_over_tcp_may_be_too_long_for_udp() -> None:
    dns = Scene(cache=True)
    dns.asks(question(), transport="tcp")
    (sent,) = dns.sends(TCP)
    dns.says(TCP, reply(sent, *[f"192.0.2.{number}" for number in range(60)]))
    dns.answer()
    dns.asks(question())
    dns.sends(UDP)


def test_without_a_cache_each_is_asked() -> None:
    dns = Scene()
    for _ in range(3):
        dns.asks(question())
        (sent,) = dns.sends(UDP)
        dns.says(UDP, reply(sent, "192.0.2.9"))
        dns.answer()


def test_what_is_cached_is_the_answer_to_an_alias_as_well() -> None:
    dns = Scene(Record("one.internal", "www.example", "CNAME"), cache=True)
    dns.asks(question("www.example"))
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent, "192.0.2.9"))
    dns.answer()
    dns.asks(question("one.internal"))
    assert dns.told() == ("NOERROR", ["one.internal. CNAME www.example.", "www.example. A 192.0.2.9"])


def test_a_failure_is_not_kept() -> None:
    dns = Scene(cache=True)
    dns.asks(question())
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent, rcode="SERVFAIL"))
    assert dns.told()[0] == "SERVFAIL"
    dns.asks(question(ident=2))
    dns.sends(UDP)


# -- transfers --------------------------------------------------------------------------------------------


def test_a_transfer_is_as_many_messages_as_it_takes() -> None:
    dns = Scene()
    query = question("example", "AXFR", ident=5)
    dns.asks(query, transport="tcp")
    (sent,) = dns.sends(TCP)
    for text in (b"one", b"two", b"three"):
        made = DNSRecord.parse(sent).reply()
        made.add_answer(RR("example", QTYPE.TXT, ttl=60, rdata=TXT(text)))
        if text != b"one":
            made.questions.clear()  # RFC 5936 section 2.2.1
        packed = bytes(made.pack())
        dns.now += 0.9
        dns.says(TCP, packed)
        assert dns.answer() == query[:2] + packed[2:]
    dns.now = dns.server.deadline
    assert dns.server.handle_timer(dns.now) == []
    assert dns.server.stats()["pending"] == 0
    dns.says(TCP, packed)
    assert dns.out == []


def test_a_transfer_over_udp_is_one_message() -> None:
    dns = Scene()
    dns.asks(question("example", "IXFR"))
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent))
    dns.answer()
    assert dns.server.stats()["pending"] == 0


def test_a_transfer_that_is_refused_or_cut_off() -> None:
    dns = Scene(resolvers=[RESOLVER, OTHER])
    dns.asks(question("example", "AXFR"), transport="tcp")
    (sent,) = dns.sends(TCP)
    dns.says(TCP, reply(sent, rcode="REFUSED"))
    (sent,) = dns.sends(Upstream(*OTHER, "tcp"))
    dns.says(Upstream(*OTHER, "tcp"), reply(sent))
    dns.answer()
    assert dns.server.upstream_failed(Upstream(*OTHER, "tcp"), dns.now) == []
    assert dns.server.stats()["pending"] == 0


# -- whatever comes ---------------------------------------------------------------------------------------


def test_what_is_no_query_is_counted_and_not_answered() -> None:
    dns = Scene(hook=lambda query: Rcode.REFUSED)
    for message in (b"", b"x", reply(question()), question()[:-1], question() + bytes(LONGEST_KEPT)):
        dns.asks(message)
    assert dns.out == []
    assert dns.asked == []
    assert dns.server.stats()["malformed"] == 5


def test_an_old_resolvers_answer_is_not_kept() -> None:
    """It was under way when others were set."""
    dns = Scene(cache=True)
    dns.asks(question())
    (sent,) = dns.sends(UDP)
    dns.server.set_upstreams({"": [OTHER]})
    dns.says(UDP, reply(sent, "192.0.2.66"))
    assert dns.told() == ("NOERROR", ["www.example. A 192.0.2.66"])
    dns.asks(question())
    dns.sends(Upstream(*OTHER))


def test_many_who_come_by_aliases_are_asked_for_once_and_told_by_their_own_names() -> None:
    dns = Scene(
        Record("one.internal", "www.example", "CNAME"),
        Record("two.internal", "www.example", "CNAME"),
        cache=True,
    )
    names = {
        "a": "one.internal",
        "b": "ONE.internal",
        "c": "two.internal",
        "d": "www.example",
        "e": "Www.example",
    }
    for number, (client, name) in enumerate(names.items()):
        dns.asks(question(name, ident=number), client)
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent, "192.0.2.9"))
    answers, dns.out = dns.out, []
    for number, (action, (client, name)) in enumerate(zip(answers, names.items(), strict=True)):
        assert isinstance(action, Answer)
        assert action.client == client
        found = DNSRecord.parse(action.message)
        assert (found.header.id, str(found.q.qname)) == (number, f"{name}.")
        assert [str(each.rname).lower() for each in found.rr][-1] == "www.example."
        assert len(found.rr) == 1 + name.lower().endswith("internal")
    assert dns.server.stats()["cache_entries"] == 1


def test_a_hostile_answer_to_many_aliases_is_taken_apart_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bytes] = []

    def counting(message: bytes, asked: bytes) -> Any:
        taken.append(message)
        return expanded(message, asked)

    monkeypatch.setattr(server, "expanded", counting)
    dns = Scene(Record("one.internal", "www.example", "CNAME"))
    for number in range(100):
        dns.asks(question("one.internal", ident=number), f"client {number}")
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent, "192.0.2.9"))
    assert len(dns.out) == 100
    assert len(taken) == 1


@pytest.mark.parametrize(("size", "cut"), [(0, True), (1232, True), (4096, False)])
def test_what_is_too_long_for_a_datagram_is_cut_when_it_came_by_a_stream(size: int, cut: bool) -> None:
    dns = Scene()
    dns.server.set_upstreams({"": [RESOLVER]}, Manner(streams=True))
    asked = question(size=size)
    dns.asks(asked)
    (sent,) = dns.sends(TCP)
    long = reply(sent, *(f"192.0.2.{n}" for n in range(200)))
    dns.says(TCP, long)
    told = dns.answer()
    assert bool(int.from_bytes(told[2:4], "big") & TC) is cut
    assert told == asked[:2] + long[2:] or len(told) <= max(size, 512)


# -- the guard --------------------------------------------------------------------------------------------

BAD = "192.0.2.66"


class Strict:
    """A guard that refuses names with "bad" in them, and cuts the address BAD; it remembers what it is asked."""

    def __init__(self, *, bad: str = "bad") -> None:
        self.questions: list[tuple[str, int, bytes]] = []
        self.answers: list[tuple[str, bool]] = []
        self._bad = bad

    def question(self, name: bytes, kind: int, client: bytes) -> Refused | None:
        self.questions.append((to_text(name), kind, client))
        return self.alias(name, kind, client) if kind else Refused(5, "no question")

    def alias(self, name: bytes, kind: int, client: bytes) -> Refused | None:
        return Refused(3, "rule 7 (ads)") if self._bad in to_text(name).lower() else None

    def answer(
        self, question: bytes, message: bytes, now: float, client: bytes, *, ours: bool
    ) -> bytes | Refused:
        if question == bytes(5):
            return Refused(5, "no question")
        name = to_text(question[:-4])
        self.answers.append((name, ours))
        _, _, asked = parse_untrusted(message)
        assert asked in (question, b""), "the answer is in the client's words"
        assert client == CLIENT
        refused = self.alias(question[:-4], 0, client)
        if refused is not None:
            return refused
        bad = {
            n for n, each in enumerate(walk(message, asked)) if message[each.data : each.end][-1:] == b"\x42"
        }
        return without(message, asked, bad) if bad and not ours else message

    def names(self, name: bytes, address: bytes) -> bool:
        return address[-1:] != b"\x42"


class Tolerant(Strict):
    """The same, but answers that cannot be read are refused."""

    def answer(
        self, question: bytes, message: bytes, now: float, client: bytes, *, ours: bool
    ) -> bytes | Refused:
        try:
            return super().answer(question, message, now, client, ours=ours)
        except BadMessage:
            return Refused(2, "unreadable")


def guarded(*records: Record, **options: Any) -> Scene:
    dns = Scene(*records, **options)
    dns.server.guard = Strict()
    return dns


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_the_guard_is_asked_before_all_others(transport: DnsTransport) -> None:
    dns = guarded(
        Record("bad.internal", "192.0.2.5"), hook=lambda query: [Record("x", "192.0.2.6")], cache=True
    )
    for name in ("bad.internal", "bAd.example"):
        for kind in ("A", "AAAA", "ANY", "AXFR", "IXFR", "TXT"):
            dns.asks(question(name, kind), transport=transport)
            assert dns.told() == ("NXDOMAIN", [])
    assert not dns.asked
    guard = dns.server.guard
    assert isinstance(guard, Strict)
    assert guard.questions[0] == ("bad.internal", 1, CLIENT)
    assert dns.server.stats()["refused_by_policy"] == 12


def test_a_refusal_says_why_to_whom_it_can_be_said() -> None:
    dns = guarded()
    dns.asks(question("bad.example", size=1232))
    message = dns.answer()
    assert message.endswith(b"\0\x0f\0\x0e\0\x0frule 7 (ads)"), (
        "RFC 8914: an option, its code Blocked, a text"
    )
    (option,) = DNSRecord.parse(message).ar[0].rdata
    assert (option.code, option.data) == (15, b"\0\x0frule 7 (ads)")
    dns.asks(question("bad.example"))
    assert not DNSRecord.parse(dns.answer()).ar


def test_a_long_reason_is_cut_between_letters() -> None:
    dns = guarded()
    dns.server.guard.alias = lambda *_: Refused(0, "x" + "\N{SNOWMAN}" * 999)  # type: ignore[union-attr, method-assign]
    dns.asks(question(".".join(["x" * 60] * 4), size=512))
    message = dns.answer()
    assert len(message) <= 512
    (option,) = DNSRecord.parse(message).ar[0].rdata
    assert option.data[2:].decode() == "x" + "\N{SNOWMAN}" * 66
    assert not DNSRecord.parse(message).header.tc


def test_every_answer_passes_the_guard() -> None:
    """Fresh, for several clients, from the cache, of ours, behind an alias, and of the hook."""
    dns = guarded(
        Record("db.internal", BAD),
        Record("one.internal", "www.example", "CNAME"),
        hook=lambda query: {"hook": [Record("x", BAD)], "renamed": "www.example"}.get(query.name),
        cache=True,
    )
    for client in ("me", "you"):
        dns.asks(question("wWw.example" if client == "you" else "www.example"), client)
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent, "192.0.2.9", BAD))
    first, second = dns.out
    assert isinstance(first, Answer)
    assert isinstance(second, Answer)
    dns.out = [first]
    assert dns.told() == ("NOERROR", ["www.example. A 192.0.2.9"])
    dns.out = [second]
    assert dns.told("you") == ("NOERROR", ["wWw.example. A 192.0.2.9"])
    dns.asks(question())
    assert dns.told() == ("NOERROR", ["www.example. A 192.0.2.9"])
    assert dns.server.stats()["cached"] == 1
    assert dns.server.stats()["cut"] == 2, "the first two are one"
    for name in ("one.internal", "renamed"):
        dns.asks(question(name))
        assert dns.told()[1][-1:] == ["www.example. A 192.0.2.9"]
    for name in ("db.internal", "hook"):
        dns.asks(question(name))
        assert dns.told() == ("NOERROR", [f"{name}. A {BAD}"])
    guard = dns.server.guard
    assert isinstance(guard, Strict)
    assert [each for each in guard.answers if each[1]] == [("db.internal", True), ("hook", True)]


def test_guests_that_wait_for_one_answer_are_judged_each_for_itself() -> None:
    dns = Scene()
    judged: list[bytes] = []

    class Each(Strict):
        def answer(
            self, question: bytes, message: bytes, now: float, client: bytes, *, ours: bool
        ) -> bytes | Refused:
            judged.append(client)
            return message if client == CLIENT else Refused(3, "not for you")

    dns.server.guard = Each()
    other = bytes([10, 0, 2, 102])
    for client, address in (("me", CLIENT), ("you", other), ("me too", CLIENT)):
        dns.asks(question(ident=len(client)), client, address=address)
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent, "192.0.2.9"))
    answers, rcodes = dns.out, {}
    for answer in answers:
        assert isinstance(answer, Answer)
        dns.out = [answer]
        rcodes[answer.client] = dns.told(str(answer.client))[0]
    assert rcodes == {"me": "NOERROR", "you": "NXDOMAIN", "me too": "NOERROR"}
    assert judged == [CLIENT, other], "and once for each"


@pytest.mark.parametrize("counts", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0), (0, 0, 2)])
def test_with_a_guard_a_query_has_nothing_beside_its_question(counts: tuple[int, int, int]) -> None:
    """A record, or what is behind them, could be about a name that the guard is not asked about."""
    dns = guarded()
    query = question()
    extra = b"\3bad\0\0\1\0\1" + bytes(6)
    dns.asks(query[:6] + b"".join(each.to_bytes(2, "big") for each in counts) + query[12:] + extra)
    assert dns.told() == ("REFUSED", [])


def test_with_a_guard_a_query_may_have_what_belongs_to_it() -> None:
    """EDNS; and the old SOA, if it is of IXFR."""
    query, soa = question(kind="IXFR"), b"\xc0\x0c\0\6\0\1" + bytes(6)
    for message in (question(size=1232), query[:8] + b"\0\1" + query[10:] + soa):
        dns = guarded()
        dns.asks(message)
        assert isinstance(dns.out[0], Send)


@pytest.mark.parametrize("kind", ["A", "IXFR"])
@pytest.mark.parametrize(
    "extra",
    [
        b"\3bad\0\0\x29\4\xd0" + bytes(6),
        (b"\0\0\x29\4\xd0" + bytes(6)) * 2,
        b"\3bad\0\0\6\0\1" + bytes(6),
        b"\xc0\x10\0\6\0\1" + bytes(6),
        (b"\xc0\x0c\0\6\0\1" + bytes(6)) * 2,
    ],
)
def test_what_belongs_to_a_query_comes_once_and_has_no_name_of_its_own(kind: str, extra: bytes) -> None:
    dns, query = guarded(), question(kind=kind)
    in_authority, count = extra.find(b"\0\6\0\1") > 0, 2 if len(extra) in (22, 24) else 1
    counts = (count if in_authority else 0, 0 if in_authority else count)
    dns.asks(query[:8] + b"".join(each.to_bytes(2, "big") for each in counts) + query[12:] + extra)
    assert dns.told() == ("REFUSED", [])


def test_an_answer_that_many_wait_for_is_judged_once() -> None:
    dns = guarded()
    for number in range(50):
        dns.asks(question(ident=number), f"client {number}")
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent, "192.0.2.9", BAD))
    assert [DNSRecord.parse(each.message).header.id for each in dns.out] == list(range(50))
    assert len({each.message[2:] for each in dns.out}) == 1
    guard = dns.server.guard
    assert isinstance(guard, Strict)
    assert guard.answers == [("www.example", False)]


@pytest.mark.parametrize("alias", ["of ours", "of the hook"])
def test_an_alias_of_ours_to_what_is_refused_is_not_asked_about(alias: str) -> None:
    dns = guarded(
        Record("one.internal", "bad.example", "CNAME"),
        hook=lambda query: "bad.example" if query.name == "renamed" else None,
    )
    dns.asks(question("one.internal" if alias == "of ours" else "renamed"))
    assert dns.told() == ("NXDOMAIN", [])


def test_an_answer_is_judged_by_the_guard_of_the_moment() -> None:
    dns = Scene(cache=True)
    dns.asks(question())
    (sent,) = dns.sends(UDP)
    dns.server.guard = Strict(bad="www")
    dns.says(UDP, reply(sent, "192.0.2.9"))
    assert dns.told() == ("NXDOMAIN", []), "it was set while the query was under way"
    dns.server.guard = None
    dns.asks(question())
    assert dns.told() == ("NOERROR", ["www.example. A 192.0.2.9"])
    dns.server.guard = Strict(bad="www")
    dns.server.guard.alias = lambda *_: None  # type: ignore[method-assign]
    dns.asks(question())
    assert dns.told() == ("NOERROR", ["www.example. A 192.0.2.9"])
    assert dns.server.stats()["cached"] == 2


def test_what_the_cache_keeps_is_not_cut() -> None:
    dns = guarded(cache=True)
    dns.asks(question())
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent, BAD))
    assert dns.told() == ("NOERROR", [])
    dns.server.guard = None
    dns.asks(question())
    assert dns.told() == ("NOERROR", [f"www.example. A {BAD}"])


def test_an_address_that_is_cut_has_no_name_of_it() -> None:
    """Else a program would choose what people are told of an address when they are asked about it."""
    dns = guarded(Record("db.internal", "192.0.2.166"), cache=True)
    good, bad, ours = (ip_address(each).packed for each in ("192.0.2.9", BAD, "192.0.2.166"))
    dns.asks(question("wWw.example"))
    (sent,) = dns.sends(UDP)
    dns.says(UDP, reply(sent, "192.0.2.9", BAD))
    assert dns.told()[1] == ["wWw.example. A 192.0.2.9"]
    assert [dns.server.name_of(each) for each in (good, bad, ours)] == ["www.example", None, "db.internal"]
    dns.server.guard = None
    assert dns.server.name_of(bad) == "www.example"


def test_messages_of_a_transfer_pass_the_guard_each() -> None:
    dns = guarded()
    query = question(kind="AXFR")
    dns.asks(query, transport="tcp")
    (sent,) = dns.sends(TCP)
    for _ in range(2):
        dns.says(TCP, reply(sent, "192.0.2.9", BAD))
        assert dns.told() == ("NOERROR", ["www.example. A 192.0.2.9"])
    dns.server.guard = Strict(bad="www")
    dns.says(TCP, reply(sent, "192.0.2.9"))
    assert dns.told() == ("NXDOMAIN", [])


@pytest.mark.parametrize("opcode", range(1, 16))
def test_no_opcode_gets_past_the_guard(opcode: int) -> None:
    dns = guarded()
    message = bytearray(question())
    message[2] |= opcode << 3
    dns.asks(bytes(message))
    assert dns.told()[0] == "REFUSED"


def test_a_query_about_no_name_is_refused() -> None:
    cookie = b"\0\1\1\0" + bytes(7) + b"\1" + b"\0\0\x29\x04\xd0" + bytes(6)
    dns = Scene()
    dns.asks(cookie)
    (sent,) = dns.sends(UDP)
    dns.server.guard = Strict()
    dns.asks(cookie, "you")
    assert dns.answer("you")[3] & 15 == 5
    dns.says(UDP, sent[:2] + b"\x80\x80" + sent[4:])
    assert dns.answer()[3] & 15 == 5, "so is the answer to one that came before"


def test_what_the_guard_leaves_may_be_too_long_for_a_datagram() -> None:
    """Names that were compressed are whole in what is written anew."""
    dns = guarded()
    asked = question(kind="MX")
    dns.asks(asked)
    (sent,) = dns.sends(UDP)
    record = DNSRecord.parse(sent).reply()
    for number in range(20):
        record.add_answer(RR("www.example", QTYPE.MX, ttl=60, rdata=MX(f"m{number}.{'x' * 60}.www.example")))
    record.add_ar(RR("www.example", QTYPE.A, ttl=60, rdata=A(BAD)))
    dns.says(UDP, bytes(record.pack()))
    message = dns.answer()
    assert DNSRecord.parse(message).header.tc
    assert message[4:] == b"\0\1" + bytes(6) + asked[12:]


def test_what_is_left_when_records_are_cut() -> None:
    """Other records are as they were, whatever pointed to names in those that are gone."""
    query = question(size=1232)
    made = DNSRecord.parse(query).reply()
    made.header.ad = 1
    made.add_answer(RR("www.example", QTYPE.CNAME, ttl=7, rdata=CNAME("x.cdn.example")))
    made.add_answer(RR("x.cdn.example", QTYPE.A, ttl=8, rdata=A(BAD)))
    made.add_answer(RR("x.cdn.example", QTYPE.A, ttl=9, rdata=A("192.0.2.9")))
    made.add_auth(RR("cdn.example", QTYPE.NS, ttl=10, rdata=NS("ns.cdn.example")))
    made.add_ar(RR("ns.cdn.example", QTYPE.A, ttl=11, rdata=A("192.0.2.10")))
    made.add_ar(EDNS0(udp_len=1232, ext_rcode=0))
    message = bytes(made.pack())
    everything = [
        "www.example. 7 IN CNAME x.cdn.example.", f"x.cdn.example. 8 IN A {BAD}", "x.cdn.example. 9 IN A 192.0.2.9",
        "cdn.example. 10 IN NS ns.cdn.example.", "ns.cdn.example. 11 IN A 192.0.2.10",
    ]  # fmt: skip
    for gone in range(5):
        found = DNSRecord.parse(without(message, query[12 : 12 + 17], {gone}))
        shown = [" ".join(str(each).split()) for each in (*found.rr, *found.auth, *found.ar[:-1])]
        assert shown == everything[:gone] + everything[gone + 1 :]
        assert found.ar[-1].rclass == 1232
        assert (found.header.ad, found.header.id, found.header.ra) == (0, 1, 1), "what is cut is not verified"
    assert (
        without(message, query[12 : 12 + 17], range(6))
        == message[:3] + b"\x80" + message[4:6] + bytes(6) + query[12:29]
    )


def test_what_becomes_too_long_without_pointers_cannot_be_cut() -> None:
    long = b"\x3f" + b"x" * 63
    asked = long * 3 + b"\0\0\2\0\1"
    record = b"\xc0\x0c\0\2\0\1" + bytes(4) + b"\0\2\xc0\x0c"
    message = b"\0\1\x80\x80\0\1\x10\0" + bytes(4) + asked + record * 4096
    assert len(message) <= 0xFFFF
    with pytest.raises(BadMessage):
        without(message, asked, {0})


@settings(max_examples=300)
@given(st.data())
def test_no_bytes_from_either_side_raise(data: st.DataObject) -> None:
    """Queries and answers with bytes changed, through every part of the server: one answer each at most."""
    dns = Scene(
        Record("one.internal", "www.example", "CNAME"),
        Record("*.wild.example", "192.0.2.1"),
        hook=lambda query: "www.example" if query.name == "renamed" else None,
        cache=True,
        domains={"corp.example": [CORP]},
    )
    if data.draw(st.booleans()):
        dns.server.guard = Tolerant()

    def damaged(message: bytes) -> bytes:
        changed = bytearray(message)
        for _ in range(data.draw(st.integers(0, 3))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        return bytes(changed[: data.draw(st.integers(0, len(changed)) | st.just(len(changed)))])

    for _ in range(data.draw(st.integers(1, 6))):
        name = data.draw(
            st.sampled_from(["one.internal", "renamed", "www.example", "x.wild.example", "corp.example"])
        )
        transport: DnsTransport = data.draw(st.sampled_from(("udp", "tcp")))
        dns.asks(
            damaged(question(name, size=data.draw(st.sampled_from((0, 512, 4096))))), transport=transport
        )
        for action in dns.out:
            if isinstance(action, Send):
                try:
                    answered = reply(action.message, "192.0.2.9")
                except Exception:  # dnslib does not understand what it is asked
                    answered = action.message
                dns.server.response(damaged(answered), action.upstream, dns.now)
        dns.out.clear()
        dns.now += data.draw(st.floats(0, 3))
        dns.server.handle_timer(dns.now)
    dns.server.handle_timer(dns.now + 100)
    assert not dns.errors
