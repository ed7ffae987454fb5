"""The DNS proxy on a manual clock: each test is a diagram, one line per message or per pause."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from math import inf

import pytest
from dnslib import CLASS, EDNS0, QTYPE, RCODE, RR, TXT, DNSRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from netns_kit.dns import Action, Answer, DnsProxy, Manner, Send, Upstream, parse_untrusted
from netns_kit.dns.exchanges import CONDEMNED, HEDGE, PROBE
from netns_kit.dns.manner import DEFAULT_PATIENCE
from netns_kit.dns.message import NXDOMAIN, REFUSED, SERVFAIL, TC
from netns_kit.dns.proxy import LIMIT_MAX, LONGEST_KEPT

A = Upstream("192.0.2.1", 53)
B = Upstream("fe80::1%eth0", 53)
C = Upstream("127.0.0.1", 5353)

NOERROR, FORMERR = 0, 1


def question(name: str = "www.example.org", ident: int = 0x0001) -> bytes:
    """A client's query."""
    record = DNSRecord.question(name)
    record.header.id = ident
    return bytes(record.pack())


def reply(query: bytes, rcode: int = NOERROR, flags: int = 0) -> bytes:
    """A resolver's answer to the query, under the query's id."""
    message = bytes(DNSRecord.parse(query).reply().pack())
    flags |= rcode | int.from_bytes(message[2:4], "big")
    return message[:2] + flags.to_bytes(2, "big") + message[4:]


def counting() -> Callable[[], int]:
    """Predictable ids: 0x1000, 0x1001, ..."""
    return itertools.count(0x1000).__next__


class Scene:
    """A proxy, its clock, and what it wants done."""

    def __init__(
        self,
        *upstreams: Upstream,
        random_id: Callable[[], int] | None = None,
        timeout: float = 1.0,
        attempts: int = 2,
        limit: int = 4096,
    ) -> None:
        self.proxy = DnsProxy(
            random_id=random_id or counting(),
            upstreams=upstreams,
            manner=Manner(timeout, attempts),
            limit=limit,
        )
        self.now = 1000.0
        self.out: list[Action] = []

    def asks(self, query: bytes, client: Hashable = "me") -> None:
        self.out += self.proxy.query(query, parse_untrusted(query)[2], client, self.now)

    def says(self, upstream: Upstream, message: bytes) -> None:
        self.out += self.proxy.response(message, upstream, self.now)

    def fails(self, upstream: Upstream) -> None:
        self.out += self.proxy.upstream_failed(upstream, self.now)

    def waits(self, seconds: float) -> None:
        end = self.now + seconds
        while self.proxy.deadline <= end:
            self.now = self.proxy.deadline
            self.out += self.proxy.handle_timer(self.now)
        self.now = end

    def sends(self, *upstreams: Upstream) -> list[bytes]:
        """It has sent to just these since the last look; the messages."""
        done, self.out = self.out, []
        assert [action[0] if isinstance(action, Send) else action for action in done] == list(upstreams)
        return [action.message for action in done]

    def gets(self, message: bytes, client: Hashable = "me") -> None:
        """The client has got just this since the last look."""
        done, self.out = self.out, []
        assert done == [Answer(client, message)]

    def idle(self) -> None:
        assert self.out == []


def assert_over(proxy: DnsProxy) -> None:
    """No exchange is left, nor any id."""
    assert proxy.stats()["pending"] == 0
    assert proxy.deadline == inf
    assert not any(each.pending for each in proxy._resolvers.values())


# One upstream ----------------------------------------------------------------------------------------


def test_a_query_and_its_answer() -> None:
    dns = Scene(A)
    dns.asks(question(ident=0x0001))
    assert dns.proxy.deadline == 1001.0
    (sent,) = dns.sends(A)
    assert sent == b"\x10\x00" + question()[2:]
    dns.says(A, reply(sent))
    dns.gets(b"\x00\x01" + reply(sent)[2:])
    assert_over(dns.proxy)


def test_all_but_the_id_is_relayed_byte_for_byte() -> None:
    """Unknown types, EDNS with unknown options, odd flags, trailing bytes: as dnslib wrote them."""
    dns = Scene(A)
    asked = DNSRecord.question("_x.example.org", "TXT")
    asked.header.id, asked.header.ad, asked.header.cd = 0xABCD, 1, 1
    asked.add_ar(EDNS0(flags="do", udp_len=1232))
    query = bytes(asked.pack()) + b"trailing"
    dns.asks(query)
    (sent,) = dns.sends(A)
    assert (sent[:2], sent[2:]) == (b"\x10\x00", query[2:])

    answered = DNSRecord.parse(sent).reply()
    answered.add_answer(RR("_x.example.org", QTYPE.TXT, CLASS.IN, 7, TXT([b"\xff" * 255] * 9)))
    answered.add_ar(EDNS0(flags="do", udp_len=512, ext_rcode=1))
    packed = bytes(answered.pack())
    dns.says(A, packed)
    (got,) = dns.out
    assert isinstance(got, Answer)
    assert got.message[2:] == packed[2:]
    parsed = DNSRecord.parse(got.message)
    assert parsed.header.id == 0xABCD
    answered.header.id = 0xABCD
    assert parsed == DNSRecord.parse(answered.pack())


@pytest.mark.parametrize(("rcode", "flags"), [(NOERROR, TC), (NXDOMAIN, 0), (FORMERR, 0), (4, 0), (9, 0)])
def test_these_answers_are_final(rcode: int, flags: int) -> None:
    dns = Scene(A, B)
    dns.asks(question())
    (sent,) = dns.sends(A)
    dns.says(A, reply(sent, rcode, flags))
    dns.gets(b"\x00\x01" + reply(sent, rcode, flags)[2:])
    assert_over(dns.proxy)


def test_answers_find_their_clients_in_any_order() -> None:
    dns = Scene(A)
    for client, name in (("one", "a.example"), ("two", "b.example"), ("two", "c.example")):
        dns.asks(question(name, ident=7), client)
    first, second, third = dns.sends(A, A, A)
    assert len({first[:2], second[:2], third[:2]}) == 3
    for sent, client in ((third, "two"), (first, "one"), (second, "two")):
        dns.says(A, reply(sent))
        dns.gets(b"\x00\x07" + reply(sent)[2:], client)
    assert_over(dns.proxy)


def test_a_repeated_query_is_sent_again_to_the_same_upstream_under_the_same_id() -> None:
    dns = Scene(A, B)
    dns.asks(question())
    first = dns.sends(A)
    dns.waits(0.5)
    dns.asks(question())
    assert dns.sends(A) == first
    assert dns.proxy.stats()["pending"] == dns.proxy.stats()["queries"] == 1
    dns.waits(0.5)  # repeating does not prolong the wait
    (sent,) = dns.sends(B)
    dns.asks(question())
    assert dns.sends(B) == [sent]
    assert dns.proxy.stats()["repeated"] == 2
    dns.says(B, reply(sent))
    dns.gets(b"\x00\x01" + reply(sent)[2:])
    assert_over(dns.proxy)


def test_the_same_question_of_many_is_asked_once_and_told_to_each() -> None:
    """RFC 5452 section 5: whoever may ask has no second copy under way, whatever he does to the case."""
    dns = Scene(A)
    asked = {
        ("one", 1): question("www.example.org", 1),
        ("two", 1): question("www.example.org", 1),
        ("two", 2): question("WWW.example.ORG", 2),
    }
    for (client, _), message in asked.items():
        dns.asks(message, client)
    (sent,) = dns.sends(A)
    dns.asks(asked["two", 2], "two")
    assert dns.sends(A) == [sent], "he repeats it"
    dns.says(A, reply(sent))
    told = [(each.client, each.message) for each in dns.out if isinstance(each, Answer)]
    assert told == [(client, reply(message)) for (client, _), message in asked.items()]
    assert [each.shared for each in dns.out if isinstance(each, Answer)] == [False, True, True]
    assert_over(dns.proxy)
    stats = dns.proxy.stats()
    assert (stats["queries"], stats["joined"], stats["answered"]) == (3, 2, 3)


@pytest.mark.parametrize("verdict", ["silence", "failure", "refusal"])
def test_who_has_joined_hears_of_a_failure_too(verdict: str) -> None:
    dns = Scene(A)
    for client in ("one", "two"):
        dns.asks(question(), client)
    (sent,) = dns.sends(A)
    if verdict == "silence":
        dns.waits(DEFAULT_PATIENCE)
        dns.out = [each for each in dns.out if isinstance(each, Answer)]
    elif verdict == "failure":
        dns.fails(A)
    else:
        dns.says(A, reply(sent, REFUSED))
    assert [each.client for each in dns.out if isinstance(each, Answer)] == ["one", "two"]
    assert_over(dns.proxy)


def other_words() -> dict[str, bytes]:
    """Queries that need another answer than `question()`, or may."""
    asked = question()
    about = DNSRecord.parse(asked)
    about.add_ar(EDNS0(udp_len=1232))
    return {
        "another type": asked[:-4] + b"\0\x1c\0\1",
        "a type that is the letter of another": asked[:-4] + b"\0\x61\0\1",
        "another class": asked[:-1] + b"\3",
        "CD": asked[:3] + b"\x10" + asked[4:],
        "EDNS": bytes(about.pack()),
        "more": asked + b"\0",
    }


@pytest.mark.parametrize("words", other_words())
def test_what_may_have_another_answer_is_not_joined(words: str) -> None:
    dns = Scene(A)
    dns.asks(question()[:-4] + b"\0\x41\0\1" if "letter" in words else question(), "one")
    dns.asks(other_words()[words], "two")
    assert len({sent[:2] for sent in dns.sends(A, A)}) == 2


def test_nobody_joins_what_is_asked_of_former_upstreams() -> None:
    dns = Scene(A)
    dns.asks(question(), "one")
    (to_a,) = dns.sends(A)
    dns.proxy.set_upstreams([B])
    dns.asks(question(), "two")
    (to_b,) = dns.sends(B)
    dns.says(A, reply(to_a))
    dns.gets(reply(question()), "one")
    dns.says(B, reply(to_b))
    dns.gets(reply(question()), "two")


def test_a_transfer_is_not_joined() -> None:
    """Who comes later would miss its beginning."""
    stream = A._replace(transport="tcp")
    dns = Scene(stream)
    for client in ("one", "two"):
        dns.out += dns.proxy.query(question(), question()[12:], client, dns.now, transfer=True)
    assert [each.transfer for each in dns.out if isinstance(each, Send)] == [True, True]
    first, second = dns.sends(stream, stream)
    for sent, client in ((first, "one"), (second, "two"), (first, "one")):
        dns.says(stream, reply(sent))
        dns.gets(reply(question()), client)
    dns.waits(0.9)
    dns.proxy.prolong(stream, int.from_bytes(first[:2], "big"), dns.now)
    dns.waits(0.9)
    assert list(dns.proxy.awaited(stream)) == [int.from_bytes(first[:2], "big")]
    assert dns.proxy.query_failed(stream, int.from_bytes(first[:2], "big"), dns.now) == []
    assert_over(dns.proxy)
    assert dns.proxy.transfers == 0


def test_a_silent_upstream_is_asked_again_and_given_up_on_when_patience_ends() -> None:
    dns = Scene(A)
    dns.asks(question())
    (first,) = dns.sends(A)
    dns.waits(0.999)
    dns.idle()
    dns.waits(0.001)
    assert dns.sends(A) == [first]
    dns.waits(DEFAULT_PATIENCE - 1.001)
    dns.idle()
    dns.waits(0.001)
    dns.gets(reply(question(), SERVFAIL)[:2] + b"\x81\x82" + question()[4:])
    assert_over(dns.proxy)
    assert dns.proxy.stats()["gave_up"] == 1


def test_a_slow_answer_within_patience_is_relayed() -> None:
    dns = Scene(A)
    dns.asks(question())
    dns.waits(DEFAULT_PATIENCE - 0.001)
    sent, again = dns.sends(A, A)
    assert sent == again
    dns.says(A, reply(sent))
    dns.gets(b"\x00\x01" + reply(sent)[2:])
    assert_over(dns.proxy)


def test_without_upstreams_the_answer_is_servfail() -> None:
    dns = Scene()
    dns.asks(question())
    (got,) = dns.out
    assert isinstance(got, Answer)
    assert RCODE[DNSRecord.parse(got.message).header.rcode] == "SERVFAIL"
    assert_over(dns.proxy)


def test_too_early_a_timer_does_nothing() -> None:
    dns = Scene(A)
    dns.asks(question())
    dns.sends(A)
    assert dns.proxy.handle_timer(dns.now) == []
    assert dns.proxy.handle_timer(dns.proxy.deadline - 0.001) == []
    assert dns.proxy.deadline == 1001.0


# Forgeries -------------------------------------------------------------------------------------------


def forgeries(sent: bytes) -> dict[str, tuple[Upstream, bytes]]:
    """What an attacker might say to the query that was sent to A, knowing all but one thing."""
    good = reply(sent)
    return {
        "wrong id": (A, b"\xde\xad" + good[2:]),
        "client's id": (A, b"\x00\x01" + good[2:]),
        "upstream never asked": (B, good),
        "upstream unknown": (C, good),
        "another port": (Upstream(A.address, 5300), good),
        "another name": (A, reply(sent[:2] + question("www.example.net")[2:])),
        "another type": (A, reply(sent[:-3] + b"\x1c" + sent[-2:])),
        "another class": (A, reply(sent[:-1] + b"\x03")),
        "not a response": (A, sent),
        "no question": (A, good[:4] + bytes(8)),
        "no question, NXDOMAIN": (A, good[:3] + bytes([good[3] | NXDOMAIN]) + bytes(8)),
    }


@pytest.mark.parametrize("forgery", forgeries(question()))
def test_a_forgery_is_counted_and_dropped(forgery: str) -> None:
    dns = Scene(A, B)
    dns.asks(question())
    (sent,) = dns.sends(A)
    dns.says(*forgeries(sent)[forgery])
    dns.idle()
    assert dns.proxy.stats()["unmatched"] == 1
    dns.says(A, reply(sent))
    dns.gets(b"\x00\x01" + reply(sent)[2:])


def test_a_second_answer_is_dropped() -> None:
    dns = Scene(A)
    dns.asks(question())
    (sent,) = dns.sends(A)
    dns.says(A, reply(sent))
    dns.gets(b"\x00\x01" + reply(sent)[2:])
    dns.says(A, reply(sent))
    dns.idle()
    assert dns.proxy.stats()["unmatched"] == 1


def test_a_server_that_could_not_read_the_question_may_omit_it() -> None:
    dns = Scene(A, B)
    dns.asks(question())
    (sent,) = dns.sends(A)
    dns.says(A, sent[:2] + b"\x80\x01" + bytes(8))
    dns.gets(b"\x00\x01\x80\x01" + bytes(8))


def test_an_id_under_way_is_not_given_out_twice() -> None:
    dns = Scene(A, B, random_id=lambda: 0xFFFF)
    for n in range(3):
        dns.asks(question(f"{n}.example"))
    assert [sent[:2].hex() for sent in dns.sends(A, A, A)] == ["ffff", "0000", "0001"]
    dns.waits(1.0)
    assert [sent[:2].hex() for sent in dns.sends(B, B, B)] == ["ffff", "0000", "0001"]  # B's own


def test_a_malformed_response_is_counted_and_dropped() -> None:
    dns = Scene(A)
    dns.asks(question())
    (sent,) = dns.sends(A)
    dns.says(A, reply(sent)[:20])
    dns.idle()
    assert dns.proxy.stats()["malformed"] == 1
    assert dns.proxy.stats()["unmatched"] == 0


# Failover --------------------------------------------------------------------------------------------


def test_silence_moves_on_to_the_next() -> None:
    dns = Scene(A, B)
    dns.asks(question())
    (to_a,) = dns.sends(A)
    dns.waits(1.0)
    (to_b,) = dns.sends(B)
    assert to_a[:2] != to_b[:2]
    assert to_a[2:] == to_b[2:] == question()[2:]
    dns.says(B, reply(to_b))
    dns.gets(b"\x00\x01" + reply(to_b)[2:])
    assert_over(dns.proxy)


def test_a_late_answer_from_the_first_upstream_will_do() -> None:
    dns = Scene(A, B)
    dns.asks(question())
    (to_a,) = dns.sends(A)
    dns.waits(1.5)
    (to_b,) = dns.sends(B)
    dns.says(A, reply(to_a))
    dns.gets(b"\x00\x01" + reply(to_a)[2:])
    assert_over(dns.proxy)
    dns.says(B, reply(to_b))
    dns.idle()


def test_the_whole_of_giving_up() -> None:
    dns = Scene(A, B, C)
    dns.asks(question())
    dns.waits(5.999)
    first = dns.sends(A, B, C, A, B, C)
    assert first[:3] == first[3:]
    dns.waits(0.001)
    dns.gets(question()[:2] + b"\x81\x82" + question()[4:])
    assert_over(dns.proxy)
    assert dns.proxy.stats()["timeouts"] == 6
    assert dns.proxy.stats()["failovers"] == 5


def test_a_refused_socket_moves_everybody_on_at_once() -> None:
    dns = Scene(A, B)
    asked = [question(f"{n}.example") for n in range(3)]
    for each in asked:
        dns.asks(each)
    dns.sends(A, A, A)
    dns.fails(A)
    assert [sent[2:] for sent in dns.sends(B, B, B)] == [each[2:] for each in asked]
    dns.asks(question("4.example"))
    dns.sends(B)  # A is asked last
    dns.fails(A)
    dns.idle()


def test_when_every_socket_fails_the_answer_is_servfail_at_once() -> None:
    dns = Scene(A, B)
    dns.asks(question())
    dns.sends(A)
    dns.fails(A)
    dns.sends(B)
    dns.fails(B)
    dns.gets(question()[:2] + b"\x81\x82" + question()[4:])
    assert_over(dns.proxy)
    dns.asks(question(ident=2))  # still asked: it may be back
    dns.sends(A)


def test_a_failed_socket_of_an_earlier_upstream_disturbs_nobody() -> None:
    dns = Scene(A, B)
    dns.asks(question())
    dns.waits(1.0)
    _, to_b = dns.sends(A, B)
    dns.fails(A)
    dns.idle()
    dns.waits(1.0)
    assert dns.sends(B) == [to_b]  # A is ruled out
    dns.fails(Upstream("192.0.2.99", 53))
    dns.idle()


def test_when_the_second_fails_the_silent_first_is_asked_again_at_once() -> None:
    dns = Scene(A, B)
    dns.asks(question())
    dns.waits(1.0)
    to_a, _ = dns.sends(A, B)
    dns.fails(B)
    assert dns.sends(A) == [to_a]


@pytest.mark.parametrize("rcode", [SERVFAIL, REFUSED])
def test_a_refusal_moves_on_and_a_better_answer_wins(rcode: int) -> None:
    dns = Scene(A, B)
    dns.asks(question())
    (to_a,) = dns.sends(A)
    dns.says(A, reply(to_a, rcode))
    (to_b,) = dns.sends(B)
    dns.says(B, reply(to_b, NXDOMAIN))
    dns.gets(b"\x00\x01" + reply(to_b, NXDOMAIN)[2:])
    assert_over(dns.proxy)


def test_the_first_refusal_is_passed_on_if_nobody_does_better() -> None:
    dns = Scene(A, B)
    dns.asks(question())
    (to_a,) = dns.sends(A)
    dns.says(A, reply(to_a, REFUSED))
    (to_b,) = dns.sends(B)
    dns.says(B, reply(to_b, SERVFAIL))
    dns.gets(b"\x00\x01" + reply(to_a, REFUSED)[2:])
    assert_over(dns.proxy)
    assert dns.proxy.stats()["answered"] == 1


def test_a_refusal_is_passed_on_when_the_others_stay_silent() -> None:
    dns = Scene(A, B)
    dns.asks(question())
    (to_a,) = dns.sends(A)
    dns.says(A, reply(to_a, SERVFAIL))
    dns.waits(DEFAULT_PATIENCE - 0.001)
    dns.sends(B, B)  # and A no more: it has said its word
    dns.asks(question())
    dns.sends(B)
    dns.waits(0.001)
    dns.gets(b"\x00\x01" + reply(to_a, SERVFAIL)[2:])
    assert_over(dns.proxy)


def test_a_late_refusal_does_not_disturb_the_wait_for_another() -> None:
    dns = Scene(A, B)
    dns.asks(question())
    dns.waits(1.0)
    to_a, to_b = dns.sends(A, B)
    dns.says(A, reply(to_a, SERVFAIL))
    dns.says(A, reply(to_a, SERVFAIL))
    dns.idle()
    assert dns.proxy.stats()["unmatched"] == 1
    dns.says(B, reply(to_b, REFUSED))
    dns.gets(b"\x00\x01" + reply(to_a, SERVFAIL)[2:])
    assert_over(dns.proxy)


def test_the_last_late_refusal_ends_the_wait() -> None:
    dns = Scene(A, B, attempts=1)
    dns.asks(question())
    dns.waits(1.0)
    to_a, to_b = dns.sends(A, B)
    dns.says(B, reply(to_b, REFUSED))
    dns.asks(question())  # nobody is being asked any more
    dns.idle()
    dns.says(A, reply(to_a, SERVFAIL))
    dns.gets(b"\x00\x01" + reply(to_b, REFUSED)[2:])
    assert_over(dns.proxy)


def test_a_refusal_too_long_to_keep_becomes_ours() -> None:
    dns = Scene(A)
    dns.asks(question())
    (sent,) = dns.sends(A)
    dns.says(A, reply(sent, REFUSED) + bytes(LONGEST_KEPT))
    dns.gets(question()[:2] + b"\x81\x82" + question()[4:])


# Health ----------------------------------------------------------------------------------------------


def unanswered(dns: Scene, name: str, first: Upstream = A, second: Upstream = B) -> float:
    """A query that the first does not answer and the second does; how long the first was waited for."""
    begun = dns.now
    dns.asks(question(name))
    dns.sends(first)
    dns.now = dns.proxy.deadline
    dns.out += dns.proxy.handle_timer(dns.now)
    waited = dns.now - begun
    (sent,) = dns.sends(second)
    dns.says(second, reply(sent))
    dns.out.clear()
    return waited


def test_a_name_without_an_answer_does_not_cost_an_upstream_its_place() -> None:
    """However often it is asked for; but nobody waits long for who has not answered."""
    dns = Scene(A, B)
    waits = [unanswered(dns, "drops.example") for _ in range(9)]
    assert waits == [1.0, *[HEDGE] * 8]
    dns.asks(question("other.example"))
    (sent,) = dns.sends(A)
    dns.says(A, reply(sent))
    dns.out.clear()
    assert unanswered(dns, "drops.example") == 1.0, "it answers others"


def test_who_answers_no_name_at_all_is_asked_last_and_nobody_waits_for_it() -> None:
    dns = Scene(A, B)
    waits = [unanswered(dns, f"{n}.example") for n in range(CONDEMNED)]
    assert waits == [1.0, *[HEDGE] * (CONDEMNED - 1)]
    for n in range(9):
        dns.asks(question(f"later{n}.example"))
        (sent,) = dns.sends(B)
        dns.says(B, reply(sent))
        dns.out.clear()


def test_one_answer_in_between_and_the_count_begins_anew() -> None:
    dns = Scene(A, B)
    for n in range(4 * CONDEMNED):
        if n % CONDEMNED == CONDEMNED - 1:
            dns.asks(question(f"{n}.example"))
            (sent,) = dns.sends(A)
            dns.says(A, reply(sent, NXDOMAIN))
            dns.out.clear()
        else:
            unanswered(dns, f"{n}.example")


def test_who_is_asked_last_is_tried_beside_the_others_and_has_its_place_back_when_heard() -> None:
    dns = Scene(A, B)
    for n in range(CONDEMNED):
        unanswered(dns, f"{n}.example")
    dns.waits(PROBE - 0.1)
    dns.asks(question("too.early"))
    dns.sends(B)
    dns.waits(0.1)
    for heard in (False, True):
        dns.asks(question(f"{heard}.example"))
        to_b, to_a = dns.sends(B, A)
        dns.asks(question(f"{heard}.other"))
        dns.sends(B)  # one is enough
        if heard:
            dns.says(A, reply(to_a))
            dns.gets(b"\x00\x01" + reply(to_a)[2:])
        else:
            dns.says(B, reply(to_b))
            dns.out.clear()
            dns.waits(PROBE)
            dns.out.clear()
    dns.asks(question("next.example"))
    dns.sends(A)
    assert dns.proxy.stats()["probes"] == 2


def test_an_answer_that_comes_too_late_is_not_told_but_proves_life() -> None:
    """It was waited for too short, and is waited for longer; it is not asked last."""
    dns = Scene(A, B)
    waits = []
    for n in range(2 * CONDEMNED):
        begun = dns.now
        dns.asks(question(f"{n}.example"))
        (to_a,) = dns.sends(A)
        dns.now = dns.proxy.deadline
        dns.out += dns.proxy.handle_timer(dns.now)
        waits.append(dns.now - begun)
        (to_b,) = dns.sends(B)
        dns.says(B, reply(to_b))
        dns.gets(b"\x00\x01" + reply(to_b)[2:])
        dns.says(A, reply(to_a))
        dns.idle()
    assert waits == [1.0, 2 * HEDGE, *[1.0] * (2 * CONDEMNED - 2)]


def test_a_forged_late_answer_proves_nothing() -> None:
    dns = Scene(A, B)
    for n in range(CONDEMNED):
        dns.asks(question(f"{n}.example"))
        (to_a,) = dns.sends(A)
        dns.waits(1.0)
        dns.says(B, reply(dns.sends(B)[0]))
        dns.out.clear()
        dns.says(A, b"\xde\xad" + reply(to_a)[2:])
        dns.says(A, reply(to_a[:2] + question("other.example")[2:]))
        dns.says(A, to_a)
    dns.asks(question("next.example"))
    dns.sends(B)


def test_a_failed_socket_costs_its_place_at_once_until_it_is_heard() -> None:
    dns = Scene(A, B)
    dns.asks(question(ident=1))
    dns.sends(A)
    dns.fails(A)
    (to_b,) = dns.sends(B)
    dns.says(B, reply(to_b, SERVFAIL))
    dns.out.clear()
    dns.asks(question(ident=2))
    dns.sends(B)
    dns.waits(1.0)
    (to_a,) = dns.sends(A)
    dns.says(A, reply(to_a))
    dns.out.clear()
    dns.asks(question(ident=3))
    dns.sends(A)


@pytest.mark.parametrize("rcode", [SERVFAIL, REFUSED])
def test_who_refuses_keeps_its_place(rcode: int) -> None:
    """The order may mean something: it may be the only one that knows the next name."""
    dns = Scene(A, B)
    for n in range(9):
        dns.asks(question(f"{n}.example"))
        (to_a,) = dns.sends(A)
        dns.says(A, reply(to_a, rcode))
        (to_b,) = dns.sends(B)
        dns.says(B, reply(to_b, NXDOMAIN))
        dns.out.clear()
    dns.asks(question("corp.example"))
    (to_a,) = dns.sends(A)
    dns.says(A, reply(to_a))
    dns.gets(b"\x00\x01" + reply(to_a)[2:])


def test_with_nobody_else_to_ask_a_doubted_one_has_its_time() -> None:
    dns = Scene(A)
    dns.asks(question("one.example"))
    dns.waits(DEFAULT_PATIENCE)
    dns.out.clear()
    dns.asks(question("two.example"))
    dns.sends(A)
    dns.waits(0.999)
    dns.idle()
    dns.waits(0.001)
    dns.sends(A)


def test_one_slow_name_does_not_cost_a_living_upstream_its_place() -> None:
    dns = Scene(A, B)
    dns.asks(question("slow.example"))
    dns.waits(0.5)
    dns.asks(question("fast.example"))
    _, fast = dns.sends(A, A)
    dns.says(A, reply(fast))
    dns.out.clear()
    dns.waits(0.5)
    dns.sends(B)
    dns.asks(question("next.example"))
    dns.sends(A)


def test_to_have_been_heard_before_it_was_asked_proves_nothing() -> None:
    dns = Scene(A, B)
    dns.asks(question("one.example"))
    (sent,) = dns.sends(A)
    dns.says(A, reply(sent))
    dns.out.clear()
    assert [unanswered(dns, f"{n}.example") for n in range(2)] == [1.0, HEDGE]


# UDP and TCP of one server ---------------------------------------------------------------------------


BOTH = {
    "udp": (A, B),
    "tcp": (A._replace(transport="tcp"), B._replace(transport="tcp")),
}


class Ways(Scene):
    """Two servers, each spoken to both ways."""

    def __init__(self) -> None:
        super().__init__()
        for way, upstreams in BOTH.items():
            self.proxy.set_upstreams(upstreams, way)

    def asks_by(self, way: str, name: str) -> Upstream:
        """A query, and who is asked."""
        self.out += self.proxy.query(question(name), question(name)[12:], "me", self.now, way)
        found = [each.upstream for each in self.out if isinstance(each, Send)]
        return found[0]

    def silence(self, way: str) -> None:
        """The first server says nothing that way."""
        for n in range(CONDEMNED):
            self.asks_by(way, f"{n}.{way}.example")
            self.out.clear()
            self.now = self.proxy.deadline
            (move,) = self.proxy.handle_timer(self.now)
            assert isinstance(move, Send)
            self.proxy.response(reply(move.message), move.upstream, self.now)


@pytest.mark.parametrize(("way", "other"), [("udp", "tcp"), ("tcp", "udp")])
def test_a_host_that_is_silent_one_way_is_not_waited_for_the_other_way(way: str, other: str) -> None:
    dns = Ways()
    dns.silence(way)
    assert dns.asks_by(other, "next.example") == BOTH[other][1]
    _, probe = dns.out
    assert isinstance(probe, Send)
    assert probe.upstream == BOTH[other][0], "it is tried beside"
    dns.says(probe.upstream, reply(probe.message))
    dns.out.clear()
    assert dns.asks_by(other, "again.example") == BOTH[other][0], "it answers that way"
    dns.out.clear()
    assert dns.asks_by(way, "still.example") == BOTH[way][1], "and the other way it does not"


def test_who_is_doubted_one_way_is_doubted_the_other_way() -> None:
    dns = Ways()
    dns.asks_by("udp", "one.example")
    dns.waits(1.0)
    dns.out.clear()
    dns.asks_by("tcp", "two.example")
    dns.waits(HEDGE)
    assert [each.upstream for each in dns.out if isinstance(each, Send)] == list(BOTH["tcp"])


def test_a_port_that_is_closed_one_way_says_nothing_of_the_other() -> None:
    dns = Ways()
    dns.asks_by("tcp", "one.example")
    dns.out.clear()
    dns.fails(BOTH["tcp"][0])
    dns.out.clear()
    assert dns.asks_by("tcp", "two.example") == BOTH["tcp"][1]
    dns.out.clear()
    assert dns.asks_by("udp", "three.example") == BOTH["udp"][0]


def test_who_has_answered_the_other_way_since_is_believed_there() -> None:
    """Datagrams do not get through, connections do."""
    dns = Ways()
    dns.silence("udp")
    dns.waits(0.1)
    dns.asks_by("tcp", "one.example")
    _, probe = dns.out
    assert isinstance(probe, Send)
    dns.says(probe.upstream, reply(probe.message))
    dns.out.clear()
    for n in range(3):
        assert dns.asks_by("tcp", f"{n}.example") == BOTH["tcp"][0]
        dns.out.clear()


# Letter case -----------------------------------------------------------------------------------------


def test_an_answer_in_another_case_is_an_answer() -> None:
    """RFC 4343.  The client sees its own, also in what points there."""
    dns = Scene(A, B)
    asked = question("wWw.example.ORG")
    dns.asks(asked)
    (sent,) = dns.sends(A)
    lowered = reply(sent[:2] + question("www.example.org")[2:])
    dns.says(A, lowered)
    dns.gets(reply(asked))
    dns.waits(60.0)
    dns.idle()
    dns.asks(question("another.example"))
    dns.sends(A)
    assert dns.proxy.stats()["unmatched"] == 0


def test_who_has_kept_the_case_is_asked_again_when_it_does_not() -> None:
    """A forger has to guess a second id; a server that has changed its ways is believed then."""
    dns = Scene(A, B)
    mixed = "wWw.example.ORG"
    dns.asks(question(mixed))
    (sent,) = dns.sends(A)
    dns.says(A, reply(sent))
    dns.gets(reply(question(mixed)))

    dns.asks(question(mixed, ident=2))
    (sent,) = dns.sends(A)
    dns.says(A, reply(sent[:2] + question(mixed.lower())[2:]))
    (again,) = dns.sends(A)
    assert again[:2] != sent[:2]
    assert dns.proxy.stats()["unmatched"] == 1
    dns.says(A, reply(sent))
    dns.idle()  # that id is worth nothing any more
    dns.says(A, reply(again[:2] + question(mixed.lower())[2:]))
    dns.gets(reply(question(mixed, ident=2)))
    assert_over(dns.proxy)

    dns.asks(question(mixed, ident=3))
    (sent,) = dns.sends(A)
    dns.says(A, reply(sent[:2] + question(mixed.lower())[2:]))
    dns.gets(reply(question(mixed, ident=3)))


@pytest.mark.parametrize("name", ["www.example.org", "WWW.EXAMPLE.ORG", "1.2.3.4"])
def test_a_name_of_one_case_shows_nothing(name: str) -> None:
    dns = Scene(A)
    dns.asks(question(name))
    (sent,) = dns.sends(A)
    dns.says(A, reply(sent))
    dns.out.clear()
    dns.asks(question("wWw.example"))
    (sent,) = dns.sends(A)
    dns.says(A, reply(sent[:2] + question("www.example")[2:]))
    dns.gets(reply(question("wWw.example")))


# How they are asked ----------------------------------------------------------------------------------


def test_they_take_turns_if_told_so() -> None:
    dns = Scene()
    dns.proxy.set_upstreams([A, B, C], manner=Manner(rotate=True))
    for n, first in enumerate((A, B, C, A, B)):
        dns.asks(question(f"{n}.example"))
        (sent,) = dns.sends(first)
        dns.says(first, reply(sent))
        dns.out.clear()
    dns.asks(question("last.example"))
    dns.waits(2.0)
    dns.sends(C, A, B)


def test_waits_of_different_lengths_end_in_their_own_time() -> None:
    dns = Scene(A)
    dns.proxy.set_upstreams([B, C], "slow", Manner(timeout=5.0, attempts=1, patience=10.0))
    slow = question("slow.example")
    dns.out += dns.proxy.query(slow, slow[12:], "me", dns.now, "slow")
    dns.asks(question("fast.example"))
    dns.sends(B, A)
    dns.waits(1.0)
    dns.sends(A)
    dns.waits(3.0)
    dns.gets(question("fast.example")[:2] + b"\x81\x82" + question("fast.example")[4:])
    dns.waits(0.999)
    dns.idle()
    dns.waits(0.001)
    dns.sends(C)


# A changed resolv.conf -------------------------------------------------------------------------------


def test_an_exchange_survives_new_upstreams() -> None:
    dns = Scene(A)
    dns.asks(question())
    (to_a,) = dns.sends(A)
    dns.proxy.set_upstreams([B, B])
    assert [each.upstream for each in dns.proxy._routes[None].resolvers] == [B]
    dns.idle()
    dns.says(A, reply(to_a))
    dns.gets(b"\x00\x01" + reply(to_a)[2:])
    dns.proxy.set_upstreams([C])
    assert list(dns.proxy._resolvers) == [C]  # nothing is kept of those that owe nothing


def test_an_exchange_moves_on_to_the_new_upstreams() -> None:
    dns = Scene(A)
    dns.asks(question())
    (to_a,) = dns.sends(A)
    dns.proxy.set_upstreams([B])
    dns.proxy.set_upstreams([B, C])
    dns.waits(1.0)
    (to_b,) = dns.sends(B)
    dns.says(A, reply(to_a))
    dns.gets(b"\x00\x01" + reply(to_a)[2:])
    dns.says(B, reply(to_b))
    dns.idle()
    assert_over(dns.proxy)


def test_the_new_list_remembers_who_is_down() -> None:
    dns = Scene(A, B)
    dns.asks(question())
    dns.fails(A)
    dns.sends(A, B)
    dns.proxy.set_upstreams([A, C])
    dns.asks(question(ident=2))
    dns.sends(C)


def test_without_upstreams_a_pending_exchange_still_waits_for_the_old_one() -> None:
    dns = Scene(A)
    dns.asks(question())
    dns.sends(A)
    dns.proxy.set_upstreams([])
    dns.waits(DEFAULT_PATIENCE - 0.001)
    dns.idle()
    dns.waits(0.001)
    dns.gets(question()[:2] + b"\x81\x82" + question()[4:])
    assert_over(dns.proxy)


# Limits ----------------------------------------------------------------------------------------------


def test_over_the_limit_the_oldest_is_dropped() -> None:
    dns = Scene(A, limit=2)
    for client in ("one", "two", "three"):
        dns.asks(question(f"{client}.example"), client)
        dns.waits(0.1)
    one, two, three = dns.sends(A, A, A)
    assert dns.proxy.stats()["evicted"] == 1
    dns.says(A, reply(one))
    dns.idle()
    dns.says(A, reply(two))
    dns.gets(b"\x00\x01" + reply(two)[2:], "two")
    dns.says(A, reply(three))
    dns.gets(b"\x00\x01" + reply(three)[2:], "three")
    assert_over(dns.proxy)


def test_over_the_limit_the_others_who_ask_the_same_still_wait() -> None:
    dns = Scene(A, limit=2)
    for client in ("one", "two", "three"):
        dns.asks(question(), client)
    (sent,) = dns.sends(A)
    dns.says(A, reply(sent))
    assert [each.client for each in dns.out if isinstance(each, Answer)] == ["two", "three"]
    assert_over(dns.proxy)


def test_a_storm_stays_in_bounds() -> None:
    dns = Scene(A, B, limit=256, random_id=partial(random.Random(1).getrandbits, 16))
    for n in range(10_000):
        dns.asks(question(f"{n}.example", ident=n), client=n)
        dns.waits(0.001)
        assert dns.proxy.stats()["pending"] <= 256
    assert sum(len(each.pending) for each in dns.proxy._resolvers.values()) <= 2 * 256
    assert dns.proxy.stats()["evicted"] == 10_000 - 256
    dns.waits(60.0)
    assert_over(dns.proxy)


@pytest.mark.parametrize("limit", [0, LIMIT_MAX + 1])
def test_a_limit_out_of_range(limit: int) -> None:
    with pytest.raises(ValueError, match="limit"):
        DnsProxy(random_id=int, limit=limit)


@pytest.mark.parametrize(
    "wrong", [{"timeout": 0.0}, {"timeout": float("nan")}, {"attempts": 0}, {"patience": -1.0}]
)
def test_a_manner_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Manner(**wrong)  # type: ignore[arg-type]  # one of them is an int


# Anything at all -------------------------------------------------------------------------------------


@given(st.lists(st.binary() | st.binary().map(question()[:12].__add__)))
def test_no_bytes_of_an_upstream_raise(messages: list[bytes]) -> None:
    dns = Scene(A, B, random_id=lambda: 0)
    for message in messages:
        dns.asks(question())
        dns.says(A, message)
    dns.waits(60.0)
    assert_over(dns.proxy)


STEPS = st.one_of(
    st.tuples(st.just("asks"), st.integers(0, 7), st.integers(0, 1)),
    st.tuples(st.just("says"), st.integers(0, 99), st.sampled_from([NOERROR, SERVFAIL, REFUSED, NXDOMAIN])),
    st.tuples(st.just("fails"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("waits"), st.sampled_from([1, 10, 25, 100, 450]), st.just(0)),
    st.tuples(st.just("set"), st.integers(0, 7), st.just(0)),
)


def spelt(n: int, client: int) -> bytes:
    """Two clients ask the same of some names, each in a case of its own, and different things of others."""
    return question(f"{n}.eXample" if n % 2 else f"{n}{client}.example", ident=n).replace(
        b"eX", b"Ex" if client else b"eX"
    )


@settings(max_examples=300)
@given(st.lists(STEPS, max_size=60))
def test_whatever_happens_each_query_is_answered_once_by_its_own_answer(
    steps: list[tuple[str, int, int]],
) -> None:
    """Each exchange ends in one answer to its client, or in eviction, and all tables are empty at the end."""
    dns = Scene(A, B, random_id=partial(random.Random(7).randrange, 4), limit=4)
    wire: list[tuple[Upstream, bytes]] = []
    answers: Counter[Hashable] = Counter()

    def collect() -> None:
        for action in dns.out:
            if isinstance(action, Send):
                wire.append((action.upstream, action.message))
            else:
                assert isinstance(action.client, tuple)
                n, client = action.client
                ident, _, asked = parse_untrusted(action.message)
                assert (ident, asked) == (n, spelt(n, client)[12:])
                answers[action.client] += 1
        dns.out.clear()
        pending = sum(len(each.pending) for each in dns.proxy._resolvers.values())
        held = sum(len(each.ids) for each in dns.proxy._exchanges.values())
        assert pending == held
        assert sum(map(len, dns.proxy._waits.values())) == len(dns.proxy._exchanges)
        for wait in dns.proxy._waits.values():
            dues = [each.due for each in wait]
            assert dues == sorted(dues)
        waiters = [each for exchange in dns.proxy._exchanges.values() for each in exchange.waiters]
        assert sorted(waiters) == sorted(dns.proxy._waiters)
        assert dns.proxy.deadline == min((each.due for each in dns.proxy._exchanges.values()), default=inf)

    for step, n, m in steps:
        if step == "asks":
            dns.asks(spelt(n, m), (n, m))
        elif step == "says" and wire:
            upstream, sent = wire[n % len(wire)]
            dns.says(upstream, reply(sent, m))
        elif step == "fails":
            dns.fails((A, B, C)[n])
        elif step == "waits":
            dns.waits(n / 100)
        elif step == "set":
            dns.proxy.set_upstreams([each for bit, each in enumerate((A, B, C)) if n >> bit & 1])
        collect()
    dns.waits(60.0)
    collect()
    assert_over(dns.proxy)
    stats = dns.proxy.stats()
    assert stats["answered"] + stats["gave_up"] == answers.total()
    assert stats["queries"] == answers.total() + stats["evicted"]
