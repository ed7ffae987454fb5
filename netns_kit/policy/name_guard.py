"""NameGuard: a policy at DNS.

    question --> name refused? ---------------> NXDOMAIN or REFUSED, as the rule says
             --> keys would be told? ---------> no data (HTTPS, SVCB)
    answer   --> question refused by now? an alias denied by a rule? unreadable? --> refused
             --> of each address: do the aliases lead to it? may the name have it?
                     both: it is pinned for the name that was asked for
                     else: it is cut

An address passes only in the answer to the question for its name.  So addresses in the additional section, and those
of names that no alias leads to, are cut: a client that needs them asks for that name, and then they are pinned.  An
address in special space (`Index.lets_answer`) is cut wherever it is, in the hints of HTTPS and SVCB records too, so
that no public name can be bound again to a private address.  If no address is left then, there is no data, and the
answer says why.

Records of our own, of the zone and of the hook, are pinned and never cut.

A zone transfer has records of many names.  Those of names that the policy refuses are cut, special addresses too, and
nothing is pinned.

In audit mode nothing is refused or cut.  What would be is told, and is not pinned.

Law of this file: hostile bytes raise nothing, and take time bounded by their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import TypeAlias

from netns_kit.dns.guard import Refused
from netns_kit.dns.message import (
    CNAME,
    IN,
    NXDOMAIN,
    REFUSED,
    SERVFAIL,
    TYPES,
    BadMessage,
    NameReader,
    RecordSpan,
    after_name,
    parse_untrusted,
    same_question,
    ttl_at,
    walk,
    without,
    without_records,
)

from .addresses import NetworkTable, canonical
from .index import Decision, Index
from .pins import PINS_PER_ANSWER, Pin, Pins

CHAIN_MAX = 128  # names; resolvers follow some 16, and each is judged
LONGEST_TTL = 7 * 86400  # seconds; nobody should keep a record for longer (RFC 8767 section 4)

_IN = IN.to_bytes(2, "big")
_SIZES = {TYPES["A"]: 4, TYPES["AAAA"]: 16}  # of addresses, by the type of their record
_HINTS = {4: 4, 6: 16}  # of the addresses in a parameter, by its key (RFC 9460 section 14.3.2)
_AROUND = frozenset({TYPES["CNAME"], TYPES["DNAME"], TYPES["RRSIG"]})  # no data by themselves
_SERVICES = frozenset({TYPES["HTTPS"], TYPES["SVCB"]})
_TRANSFERS = frozenset({TYPES["AXFR"], TYPES["IXFR"]})
_RCODES = {"nxdomain": NXDOMAIN, "refused": REFUSED}
_NO_QUESTION = Refused(REFUSED, "only questions about one name, and nothing else, are answered")
_UNREADABLE = Refused(SERVFAIL, "the answer cannot be read")

_Found: TypeAlias = tuple[Refused, str]
"""A refusal, and the rule behind it."""


class NameGuard:
    """The `Guard` of a policy, for one namespace.

    Args:
        index: The policy.
        pins: What is pinned here.
        own: The namespace's networks.  Their addresses count as private.
        told: Called with what is refused or cut, or would be but for audit mode: the name asked for, on the wire and
            in lower case; the type; the client's packed address; the refusal; and the rule.
        pinned: Called with what an answer has pinned, before the answer is sent, for the other workers: see
            `WorkerLinks.send_pins`.
    """

    def __init__(
        self,
        index: Index,
        pins: Pins,
        *,
        own: Iterable[IPv4Network | IPv6Network] = (),
        told: Callable[[bytes, int, bytes, Refused, str], object] = lambda *_: None,
        pinned: Callable[[list[Pin]], object] = lambda _: None,
    ) -> None:
        self._index = index
        self._policy = index.policy
        self._audit = index.policy.audit
        self._pins = pins
        self._own = NetworkTable[bool]()
        for network in own:
            self._own.get_or_set(network, True)
        self._told = told
        self._pinned = pinned

    def question(self, name: bytes, kind: int, client: bytes) -> Refused | None:
        """Return how a query is refused, or None: see `Guard.question`."""
        name = name.lower()
        found = self._question(name, kind)
        if found is None:
            return None
        self._told(name, kind, client, *found)
        return None if self._audit else found[0]

    def alias(self, name: bytes, kind: int, client: bytes) -> Refused | None:
        """Return how a query is refused that an alias of ours leads to this name, or None: see `Guard.alias`."""
        name = name.lower()
        denied = self._index.alias(name)
        if denied is None or self._audit:  # then the answer is told of
            return None
        refused, label = self._by_rule(denied)
        self._told(name, kind, client, refused, label)
        return refused

    def answer(
        self, question: bytes, message: bytes, now: float, client: bytes, *, ours: bool
    ) -> bytes | Refused:
        """Return the answer that may be sent: see `Guard.answer`."""
        name, kind = question[:-4].lower(), int.from_bytes(question[-4:-2], "big")
        answer: bytes | Refused
        found = self._question(name, kind)
        if found is not None:
            if self._audit:  # the question was told of
                return message
            answer = found[0]  # the policy was another one when the question came
        else:
            try:
                reading = _Reading(message, question)
                found = self._denied(reading)
                answer, found = (found[0], found) if found else self._sifted(reading, kind, now, ours=ours)
            except BadMessage:
                answer = without_records(message, question) or _UNREADABLE  # the client asks again over TCP
        if found is not None:
            self._told(name, kind, client, *found)
        return message if self._audit else answer

    def _question(self, name: bytes, kind: int) -> _Found | None:
        """Return how a query is refused, or None."""
        decision = self._index.name(name)
        if decision.action == "deny":
            return self._by_rule(decision)
        if not kind:
            return _NO_QUESTION, self._policy.label(decision.rule)
        if kind in _SERVICES and self._hides_keys(name):
            label = self._policy.label(decision.rule)
            return Refused(0, f"the name must be seen in the first bytes: {label}"), label
        return None

    def _by_rule(self, decision: Decision) -> _Found:
        label = self._policy.label(decision.rule)
        return Refused(_RCODES[self._policy.rule(decision.rule).dns], label), label

    def _hides_keys(self, name: bytes) -> bool:
        """Return whether no keys may be told of the host that a name is about: _8443._https.NAME is about NAME."""
        while name[1:2] == b"_":
            name = name[1 + name[0] :]
        return self._index.hides_keys(name)

    def _denied(self, reading: _Reading) -> _Found | None:
        """Return the rule that denies the target of an alias, if there is one."""
        for name in reading.chain:
            if name != reading.name and (denied := self._index.alias(name)) is not None:
                return self._by_rule(denied)
        return None

    def _sifted(
        self, reading: _Reading, kind: int, now: float, *, ours: bool
    ) -> tuple[bytes | Refused, _Found | None]:
        """Pin addresses, and return the answer without what is cut, and what there is to tell.

        Raises `BadMessage`, before anything is pinned.
        """
        name, transfer = reading.name, kind in _TRANSFERS
        pins = not transfer and self._index.pins(name)
        cut, pinned, special = set[int](), list[Pin](), b""
        for number, each in enumerate(reading.records):
            asked = reading.owner(each) if transfer else name
            if transfer and self._index.name(asked).action == "deny":
                cut.add(number)
            elif each.kind in _SIZES:
                address = canonical(reading.data(each))
                if not (transfer or reading.leads_to(each)) or not reading.is_address(each):
                    cut.add(number)
                elif not (ours or self.lets(asked, address)):
                    cut.add(number)
                    special = special or address
                elif pins and len(pinned) >= PINS_PER_ANSWER:
                    cut.add(number)
                elif pins:
                    until = now + min(ttl_at(reading.message, each.ttl), LONGEST_TTL) + self._policy.grace
                    pinned.append((name, address, until, ours))
            elif each.kind in _SERVICES:
                if self._hides_keys(asked) or self._hides_keys(reading.owner(each)):
                    cut.add(number)
                for address in map(canonical, reading.hints(each)):
                    if not self.lets(asked, address):
                        cut.add(number)
                        special = special or address
                        break
        answer: bytes | Refused = reading.message
        if cut and not ours:
            answer = without(reading.message, reading.asked, cut)
        for pin in pinned:
            self._pins.add(*pin[:3])
        if pinned:
            self._pinned(pinned)
        if not special or ours:
            return answer, None
        refused = Refused(0, f"{ip_address(special)} is no address for a public name")
        left = any(
            each.section == 1 and each.kind not in _AROUND and number not in cut
            for number, each in enumerate(reading.records)
        )
        return answer if left else refused, (refused, self._policy.label(self._index.name(name).rule))

    def names(self, name: bytes, address: bytes) -> bool:
        """Return whether people may be told that an address is a name's: see `Guard.names`."""
        return self._audit or self.lets(name.lower(), canonical(address))

    def lets(self, name: bytes, address: bytes) -> bool:
        """Return whether an answer for a name, both as in `Pins`, may have an address."""
        return self._index.lets_answer(name, address, own=bool(self._own.containing(address)))


class _Reading:
    """An answer that can be read, and the names that its aliases lead to.  Making it raises `BadMessage`.

    Attributes:
        message: The answer.
        asked: Its question, empty if it has none.
        name: The name that was asked for, in lower case.
        records: All its records.
        chain: The name that was asked for, and those that aliases lead to from there, in lower case.
    """

    def __init__(self, message: bytes, question: bytes) -> None:
        _, _, asked = parse_untrusted(message)
        if asked and not same_question(asked, question):
            raise BadMessage("another question")
        self.message = message
        self.asked = asked
        self.name = question[:-4].lower()
        self.records = list(walk(message, asked))
        self._names = NameReader(message)
        targets: dict[bytes, list[bytes]] = {}
        for each in self.records:
            if each.kind == CNAME and each.section == 1:
                if after_name(message, each.data) != each.end:
                    raise BadMessage("an alias of another length than its record")
                targets.setdefault(self.owner(each), []).append(self._names.at(each.data).lower())
        self.chain: dict[bytes, None] = {self.name: None}
        waiting = [self.name]
        while waiting and targets:
            for target in targets.pop(waiting.pop(), ()):
                if target not in self.chain:
                    if len(self.chain) >= CHAIN_MAX:
                        raise BadMessage("too many aliases")
                    self.chain[target] = None
                    waiting.append(target)

    def owner(self, record: RecordSpan) -> bytes:
        """Return the name that a record is about, in lower case.  Raises `BadMessage`."""
        return self._names.at(record.owner).lower()

    def data(self, record: RecordSpan) -> bytes:
        return self.message[record.data : record.end]

    def leads_to(self, record: RecordSpan) -> bool:
        """Return whether a record is in the answer for the name that was asked for.  Raises `BadMessage`."""
        return record.section == 1 and self.owner(record) in self.chain

    def is_address(self, record: RecordSpan) -> bool:
        """Return whether an address record has an address of the internet in it."""
        is_in = self.message[record.ttl - 2 : record.ttl] == _IN
        return is_in and record.end - record.data == _SIZES[record.kind]

    def hints(self, record: RecordSpan) -> Iterator[bytes]:
        """Yield the addresses in an HTTPS or SVCB record.  Raises `BadMessage` for one that cannot be read."""
        message, end = self.message, record.end
        at = after_name(message, record.data + 2)
        while at < end:
            key = int.from_bytes(message[at : at + 2], "big")
            begin = at + 4
            at = begin + int.from_bytes(message[at + 2 : begin], "big")
            size = _HINTS.get(key)
            if size is not None and at <= end:
                if (at - begin) % size:
                    raise BadMessage("a part of an address")
                for here in range(begin, at, size):
                    yield message[here : here + size]
        if at != end:
            raise BadMessage("parameters beyond their record")
