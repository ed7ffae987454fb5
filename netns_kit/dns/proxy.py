"""The DNS proxy: queries of many clients, relayed to the few resolvers of the host.

Words.  A *client* is whoever asked, by any hashable name the driver likes.  An *upstream* is a resolver's address
and port, and how it is spoken to.  A *route* is a list of upstreams and a `Manner` of asking them, by a name of the
driver's: one for each domain that has resolvers of its own, say.  An *exchange* is one question under way: made by a
query, ended by its answer.

    client                   DnsProxy                        upstreams
    id 0x0001 --query-->     id 0x8f3a --Send-->             A    no answer within the timeout
                             id 0x21c7 --Send-->             B
    id 0x0001 <--Answer--    id 0x21c7 <--response--         B    (one from A would do as well)

Goal.  The guest's resolver library should not be able to tell us from the host's resolver, except that ours
survives the loss of one.  A message passes byte for byte; we replace the id and nothing else (RFC 5625), and in an
answer the question's letter case where it is not the client's.  So EDNS, DNSSEC, TC and unknown types just work.
The id is replaced by a random one because all clients share
few sockets: a client's id could clash, or be known to someone who wants to forge an answer (RFC 5452).

Joining.  Clients that ask the same, in whatever letter case, share one exchange, and each gets the answer.  Otherwise
whoever may ask could have many copies of one question under way, and a forged answer would have to guess the id of
any of them (RFC 5452 section 5).  A transfer is not shared: who came later would miss its beginning.

Acceptance.  A response belongs to an exchange if upstream, id and question agree; names compare without regard to
case (RFC 4343).  Case is a further secret where it can be one: an upstream that has sent back a name of mixed case as
it was is expected to do so again.  If it does not, it is asked once more under another id, and believed the second
time.  The client sees the name in its own case.  Only an error response may omit the question, as servers do which
could not read it.  All upstreams asked may answer until the exchange ends, also those we gave up on.

Failover.  No answer within the timeout, an error of the socket, or SERVFAIL or REFUSED: the next upstream is
asked.  Everything else, NXDOMAIN included, is final.  An upstream that said no, or that cannot be reached,
is not asked again in this exchange; a silent one is, until each was asked as often as there are attempts.
Then we wait until the exchange is as old as the route's patience, for a resolver may just be slow, and answer with
the first SERVFAIL or REFUSED that came, or a SERVFAIL of ours.

Transfers (AXFR, IXFR) over a stream are many messages (RFC 5936 section 2.2): each is handed on as it comes, and the
exchange is over when none has come for the time of a timeout.

Health.  The order of upstreams may mean something (split DNS), so one loses its place only on evidence about itself,
not about a name:

- *Doubted*: it was silent for a whole timeout, towards everybody.  Until it answers in time it is waited for `HEDGE`
  seconds only, if there is another to ask; both may answer.  An answer that comes later doubles that time.
- *Last*: `CONDEMNED` different names in a row had no answer, or its socket failed.  It is asked after the others; but
  every `PROBE` seconds a query goes to it as well, and the first answer gives it its place back.
- What UDP says of a server counts for TCP, and the other way round, until the server answers that way itself: a
  silent host is silent both ways.  A port that is closed is closed in one way only.
- SERVFAIL and REFUSED do not cost an upstream its place: it may know the next name, and the ones behind it may not.

Limits.  A client's retransmission is one more packet to the same upstream and nothing else.  At most as many clients
wait as the limit says; over it, the one that has waited longest is dropped in silence: loss is what UDP clients know
how to handle.  Waits of one length end in the order they began, so they are kept by length and need no heap; there
are few lengths.

Law of this file: no socket, no clock, no log.  Time comes in as seconds of any monotonic clock.
What comes out is a list of what to do now, in order; the tables are consistent before the driver does it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, KeysView, Sequence
from itertools import takewhile
from math import inf
from typing import Literal, NamedTuple, TypeAlias

from .manner import DEFAULT, PATIENCE, Manner
from .message import (
    FORMERR,
    NOTIMP,
    QR,
    RCODE,
    REFUSED,
    SERVFAIL,
    BadMessage,
    answering,
    identity,
    parse_untrusted,
    reply,
    same_question,
    with_id,
)

HEDGE = 0.25  # seconds that a doubted upstream is waited for, at first
CONDEMNED = 3  # names in a row without an answer
PROBE = 5.0  # seconds between two attempts at an upstream that is asked last
LATE = 64  # queries of each upstream whose answer is still recognised when they are over
LONGEST_KEPT = 4096  # bytes of a message we store; RFC 5625 section 4.4.1 asks for no more over UDP
LIMIT_MAX = 0x8000  # clients that wait; half of the ids stay free, so that they stay hard to guess

_TRY_ANOTHER = frozenset({SERVFAIL, REFUSED})
_MAY_OMIT_QUESTION = frozenset({FORMERR, SERVFAIL, NOTIMP, REFUSED})

DnsTransport: TypeAlias = Literal["udp", "tcp"]


class Upstream(NamedTuple):
    """A resolver: its address, with the zone if it has one, and port."""

    address: str
    port: int
    transport: DnsTransport = "udp"


class Send(NamedTuple):
    """Send the message to the upstream now.  `transfer`: many messages may answer it, as fast as the client reads."""

    upstream: Upstream
    message: bytes
    transfer: bool = False


class Answer(NamedTuple):
    """Hand the message to the client now; its exchange is over, unless that is a transfer.

    `shared`: it is the message of the answer before, for another client that asked the same.
    """

    client: Hashable
    message: bytes
    shared: bool = False


Action: TypeAlias = Send | Answer


class _Resolver:
    """One upstream: what it owes us, and what is known of it.

    `heard`: when anything came from it last.  `silent`: when a wait for it last ended without; `is_doubted` since.
    `unanswered`: names that had no answer since it was heard.  `hedge`: how long it is waited for while doubted.
    `twin`: the same server, spoken to the other way.
    """

    __slots__ = (
        "has_failed",
        "heard",
        "hedge",
        "is_doubted",
        "keeps_case",
        "late",
        "pending",
        "probe_at",
        "silent",
        "twin",
        "unanswered",
        "upstream",
    )

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.twin: _Resolver | None = None
        self.pending: dict[int, _Exchange] = {}
        self.late: OrderedDict[int, bytes] = OrderedDict()  # questions, of exchanges that others ended
        self.keeps_case = False
        self.heard = self.silent = self.probe_at = -inf
        self.is_doubted = self.has_failed = False
        self.unanswered: set[bytes] = set()
        self.hedge = HEDGE

    @property
    def is_last(self) -> bool:
        """Whether the others are asked before it."""
        if self.has_failed or len(self.unanswered) == CONDEMNED:
            return True
        twin = self.twin
        return twin is not None and len(twin.unanswered) == CONDEMNED and twin.silent > self.heard

    @property
    def is_slow(self) -> bool:
        """Whether it is not waited for as long as others are."""
        twin = self.twin
        return self.is_doubted or (twin is not None and twin.is_doubted and twin.silent > self.heard)

    def has_answered(self, now: float) -> None:
        """A message has come, in time for its exchange."""
        self.heard = now
        if self.is_doubted or self.has_failed:
            self.is_doubted = self.has_failed = False
            self.unanswered.clear()
            self.hedge = HEDGE

    def has_answered_late(self, now: float) -> None:
        """A message has come for an exchange that was over."""
        self.heard = now
        self.has_failed = False
        self.unanswered.clear()
        self.hedge = min(2 * self.hedge, PATIENCE)

    def has_been_silent(self, question: bytes, now: float) -> None:
        """A wait is over in which nothing came, for anybody."""
        self.silent = now
        self.is_doubted = True
        if len(self.unanswered) < CONDEMNED:
            self.unanswered.add(question[:-4].lower())
            if len(self.unanswered) == CONDEMNED:
                self.probe_at = now + PROBE

    def has_ended(self, exchange: _Exchange) -> None:
        """The exchange needs no answer of its any more; one that comes tells that it lives."""
        ident = exchange.ids[self]
        del self.pending[ident]
        if exchange.question:
            self.late[ident] = exchange.question
            if len(self.late) > LATE:
                self.late.popitem(last=False)


class _Route:
    """The upstreams of a route, in order of preference, and how they are asked.

    `turn`: which is asked first.  `version`: grows when they are others, so that nobody shares what is being asked of
    those before.
    """

    __slots__ = ("manner", "resolvers", "turn", "version")

    def __init__(self) -> None:
        self.resolvers: list[_Resolver] = []
        self.manner = DEFAULT
        self.turn = 0
        self.version = 0


class _Exchange:
    """One question under way: the resolver asked last and when, and the ids of all that may still answer."""

    __slots__ = (
        "doubts",
        "due",
        "ids",
        "is_transfer",
        "key",
        "query",
        "question",
        "refusal",
        "resolver",
        "route",
        "sent",
        "started",
        "transferred",
        "tries",
        "turn",
        "wait",
        "waiters",
    )

    resolver: _Resolver
    sent: float
    due: float

    def __init__(
        self,
        key: Hashable,
        query: bytes,
        question: bytes,
        route: _Route,
        now: float,
        is_transfer: bool,
    ) -> None:
        self.key = key
        self.is_transfer = is_transfer
        self.query = query
        self.question = question
        self.route = route
        self.turn = route.turn
        self.waiters: dict[tuple[Hashable, bytes], None] = {}  # who has asked, and in which words
        self.transferred = False  # more of the answer may come
        self.started = now
        self.wait = 0.0  # how long the present one is; 0: it has not begun
        self.ids: dict[_Resolver, int] = {}
        self.tries: dict[_Resolver, int] = {}
        self.refusal = b""  # the first SERVFAIL or REFUSED, for want of better
        self.doubts: _Resolver | None = None  # has answered in another case, and was asked again


class DnsProxy:
    """Relay DNS to several upstreams; sans-IO.

    The driver calls `DnsProxy.query`, `DnsProxy.response` and `DnsProxy.upstream_failed` when something
    happens and `DnsProxy.handle_timer` when `DnsProxy.deadline` has come, and does what they return.  None
    of them raises, whatever a guest or an upstream sent.  A response must have come from the named upstream's
    own address and port, and to where the query was sent from: whoever owns the sockets checks that.

    random_id: returns 16 unpredictable bits, 0 to 65535; from the system's random source, but for tests.
    upstreams, manner: of the route None; see `DnsProxy.set_upstreams`.
    limit: clients that wait at a time, default 4096, at most `LIMIT_MAX`.

    Raises ValueError for a limit out of range.

    >>> proxy = DnsProxy(random_id=lambda: 0xBEEF, upstreams=[Upstream("192.0.2.1", 53)])
    >>> query = bytes.fromhex("0001 0100 0001 0000 0000 0000 00 0002 0001")        # the root's name servers?
    >>> [(upstream, sent, _)] = proxy.query(query, query[12:], "me", now=0.0)
    >>> upstream.address, sent.hex(" ", 2)
    ('192.0.2.1', 'be ef01 0000 0100 0000 0000 0000 0002 0001')
    >>> proxy.deadline
    1.0
    >>> forged = bytes.fromhex("dead 8180 0001 0000 0000 0000 00 0002 0001")
    >>> proxy.response(forged, upstream, now=0.1)
    []
    >>> genuine = b"\\xbe\\xef" + forged[2:]
    >>> proxy.response(genuine, upstream, now=0.2) == [Answer("me", query[:2] + genuine[2:])]
    True
    """

    def __init__(
        self,
        *,
        random_id: Callable[[], int],
        upstreams: Sequence[Upstream] = (),
        manner: Manner = DEFAULT,
        limit: int = 4096,
    ) -> None:
        if not 1 <= limit <= LIMIT_MAX:
            raise ValueError(f"limit must be 1 to {LIMIT_MAX}, not {limit}")
        self.limit = limit
        self._random_id = random_id
        self._resolvers: dict[Upstream, _Resolver] = {}  # these may answer
        self._routes: dict[Hashable, _Route] = {}  # of these, the ones to ask
        self._exchanges: dict[Hashable, _Exchange] = {}  # by what is asked
        self._waiters: OrderedDict[tuple[Hashable, bytes], _Exchange] = OrderedDict()  # longest first
        self._waits: dict[float, OrderedDict[_Exchange, None]] = {}  # by length, each by due
        self.transfers = 0
        self.queries = 0
        self.joined = 0
        self.repeated = 0
        self.answered = 0
        self.gave_up = 0
        self.failovers = 0
        self.probes = 0
        self.timeouts = 0
        self.evicted = 0
        self.malformed = 0
        self.unmatched = 0
        self.set_upstreams(upstreams, manner=manner)

    def upstreams(self, route: Hashable = None) -> tuple[Upstream, ...]:
        """Whom new queries of that route are sent to, in order of preference."""
        known = self._routes.get(route)
        return () if known is None else tuple(resolver.upstream for resolver in known.resolvers)

    def set_upstreams(
        self, upstreams: Sequence[Upstream], route: Hashable = None, manner: Manner = DEFAULT
    ) -> None:
        """Ask these from now on, in order of preference; duplicates count once.  Nothing is sent now.

        Exchanges under way go on: a former upstream may still answer, the next one asked is one of these.
        """
        known = self._resolvers
        changed = self._routes.setdefault(route, _Route())
        changed.version += 1
        changed.manner = manner
        changed.resolvers = [known.get(each) or _Resolver(each) for each in dict.fromkeys(upstreams)]
        found = {each.upstream: each for each in known.values() if each.pending}
        for order in self._routes.values():
            found.update((each.upstream, each) for each in order.resolvers)
        for upstream, each in found.items():
            other: DnsTransport = "tcp" if upstream.transport == "udp" else "udp"
            each.twin = found.get(upstream._replace(transport=other))
        self._resolvers = found

    def awaited(self, upstream: Upstream) -> KeysView[int]:
        """The ids of queries that this upstream may still answer."""
        resolver = self._resolvers.get(upstream)
        return (resolver.pending if resolver else {}).keys()

    @property
    def deadline(self) -> float:
        """When `DnsProxy.handle_timer` wants to be called: the time the first wait is over, or infinity."""
        deadline = inf
        for waits in self._waits.values():
            for exchange in waits:
                deadline = min(deadline, exchange.due)
                break
        return deadline

    def query(
        self,
        message: bytes,
        question: bytes,
        client: Hashable,
        now: float,
        route: Hashable = None,
        *,
        transfer: bool = False,
    ) -> list[Action]:
        """A client asks, for one of the route's upstreams.

        `question`: that of the message, by `parse_untrusted`.  The message is a query, and no longer than
        `LONGEST_KEPT`: whoever has read it sees to that.

        Returns the query to send on, or a SERVFAIL if there is no upstream at all.  Nothing, if the same is
        under way for another client.

        The same bytes from the same client while the exchange lasts are sent once more to the upstream
        being asked.

        transfer: the answer may be more than one message.
        """
        waiter = client, message
        exchange = self._waiters.get(waiter)
        if exchange is not None:
            self.repeated += 1
            ident = exchange.ids.get(exchange.resolver)
            if ident is None:
                return []
            return [Send(exchange.resolver.upstream, with_id(ident, exchange.query), transfer)]
        self.queries += 1
        if len(self._waiters) >= self.limit:
            self._evict()
        asked = self._routes.get(route) or _Route()
        key = (route, asked.version, identity(message, question), waiter if transfer else None)
        exchange = self._exchanges.get(key)
        if exchange is not None:
            self.joined += 1
            exchange.waiters[waiter] = None
            self._waiters[waiter] = exchange
            return []
        exchange = _Exchange(key, message, question, asked, now, transfer)
        resolver = self._choose(exchange)
        if resolver is None:
            self.gave_up += 1
            return [Answer(client, reply(message, question, SERVFAIL))]
        asked.turn += asked.manner.rotate
        self._exchanges[key] = self._waiters[waiter] = exchange
        exchange.waiters[waiter] = None
        self.transfers += transfer
        actions: list[Action] = [self._ask(exchange, resolver, now)]
        if len(asked.resolvers) > 1 and not transfer:
            actions += self._probed(exchange, now)
        return actions

    def response(self, message: bytes, upstream: Upstream, now: float) -> list[Action]:
        """An upstream says something.  Returns the answers for the clients, or whom to ask instead.

        What answers nothing we asked this upstream (forged, repeated, or too late) is counted and dropped.
        """
        try:
            ident, flags, question = parse_untrusted(message)
        except BadMessage:
            self.malformed += 1
            return []
        resolver = self._resolvers.get(upstream)
        exchange = resolver.pending.get(ident) if resolver else None
        rcode = flags & RCODE
        if resolver is None or exchange is None or not flags & QR:
            self.unmatched += 1
            late = resolver.late.get(ident) if resolver else None
            if resolver is not None and late is not None and flags & QR and same_question(late, question):
                del resolver.late[ident]
                resolver.has_answered_late(now)
            return []
        if question != exchange.question:
            if question and same_question(question, exchange.question):
                if resolver.keeps_case and exchange.doubts is not resolver:
                    return [self._doubt(exchange, resolver)]
                resolver.keeps_case = False
            elif question or not (rcode in _MAY_OMIT_QUESTION or exchange.transferred):
                self.unmatched += 1
                return []
        elif not resolver.keeps_case and upstream.transport == "udp":
            resolver.keeps_case = _is_mixed(question[:-4])
        resolver.has_answered(now)
        if exchange.is_transfer and not rcode:
            exchange.transferred = True
            self._wait(exchange, now, exchange.route.manner.timeout)
            return list(self._told(exchange, message))
        if rcode not in _TRY_ANOTHER or exchange.transferred:
            return self._answer(exchange, message, resolver)
        if not exchange.refusal and len(message) <= LONGEST_KEPT:
            exchange.refusal = message
        return self._rule_out(exchange, resolver, now)

    def upstream_failed(self, upstream: Upstream, now: float) -> list[Action]:
        """The upstream's socket reported an error (ECONNREFUSED, ENETUNREACH): whoever waits for it goes on.

        Returns whom to ask instead, for each exchange; SERVFAIL for those that have nobody left.
        """
        resolver = self._resolvers.get(upstream)
        if resolver is None:
            return []
        resolver.has_failed = True
        resolver.probe_at = now + PROBE
        actions: list[Action] = []
        for exchange in list(resolver.pending.values()):
            actions += self._rule_out(exchange, resolver, now)
        return actions

    def query_failed(self, upstream: Upstream, ident: int, now: float) -> list[Action]:
        """This upstream will not answer the query of that id any more, whatever it does about others."""
        resolver = self._resolvers.get(upstream)
        exchange = resolver.pending.get(ident) if resolver else None
        return self._rule_out(exchange, resolver, now) if exchange and resolver else []

    def prolong(self, upstream: Upstream, ident: int, now: float) -> None:
        """Wait anew for the query of that id: its answer is not taken as fast as it could come."""
        resolver = self._resolvers.get(upstream)
        exchange = resolver.pending.get(ident) if resolver else None
        if exchange is not None:
            self._wait(exchange, now, exchange.wait)

    def handle_timer(self, now: float) -> list[Action]:
        """Time has passed.  Returns the next upstream, or the verdict, for each exchange whose wait is over.

        Too early a call returns nothing.  Visits the exchanges that are due and no others.
        """
        actions: list[Action] = []
        over = [
            exchange
            for waits in self._waits.values()
            for exchange in takewhile(lambda each: each.due <= now, waits)
        ]
        over.sort(key=lambda each: each.due)
        for exchange in over:
            if exchange.transferred:
                self.answered += 1
                self._end(exchange)
                continue
            self.timeouts += 1
            resolver = exchange.resolver
            if resolver.heard <= exchange.sent:
                resolver.has_been_silent(exchange.question, now)
            actions += self._move_on(exchange, now)
        return actions

    def stats(self) -> dict[str, int]:
        """The counters since the beginning, and how many clients wait."""
        return {
            "queries": self.queries,  # accepted from clients, repetitions not counted
            "joined": self.joined,  # of these, the same was being asked for another
            "repeated": self.repeated,  # the client asked again while we were waiting
            "answered": self.answered,  # by an upstream, its SERVFAIL or REFUSED included
            "gave_up": self.gave_up,  # a SERVFAIL of our own
            "failovers": self.failovers,  # a further message was sent to an upstream
            "probes": self.probes,  # a copy was sent, to see whether an upstream is back
            "timeouts": self.timeouts,  # waits that ended without an answer
            "evicted": self.evicted,  # dropped for a younger one
            "malformed": self.malformed,  # from an upstream, never relayed
            "unmatched": self.unmatched,  # from an upstream: forged, repeated or late
            "pending": len(self._waiters),
        }

    def _choose(self, exchange: _Exchange) -> _Resolver | None:
        """Whom to ask next: the least asked, then the healthy, then in order."""
        tries, route = exchange.tries, exchange.route
        resolvers, attempts = route.resolvers, route.manner.attempts
        if route.manner.rotate and resolvers:
            first = exchange.turn % len(resolvers)
            resolvers = resolvers[first:] + resolvers[:first]
        best, least = None, (attempts, False)
        for each in resolvers:
            rank = tries.get(each, 0), each.is_last
            if rank < least:
                best, least = each, rank
        return best

    def _ask(self, exchange: _Exchange, resolver: _Resolver, now: float) -> Send:
        """Send to this one, and wait anew: not long for one that is doubted, if there is another to ask."""
        message = self._under_id(exchange, resolver)
        exchange.resolver = resolver
        exchange.sent = now
        route = exchange.route
        wait = route.manner.timeout
        if resolver.is_slow and any(each not in exchange.tries for each in route.resolvers):
            wait = min(resolver.hedge, wait)
        self._wait(exchange, now, wait)
        return Send(resolver.upstream, message, exchange.is_transfer)

    def _under_id(self, exchange: _Exchange, resolver: _Resolver) -> bytes:
        """The query, under an id that no other query this one may still answer has."""
        ident = exchange.ids.get(resolver)
        if ident is None:
            ident = self._random_id()
            while ident in resolver.pending:
                ident = (ident + 1) & 0xFFFF
            resolver.late.pop(ident, None)
            resolver.pending[ident] = exchange
            exchange.ids[resolver] = ident
        exchange.tries[resolver] = exchange.tries.get(resolver, 0) + 1
        return with_id(ident, exchange.query)

    def _probed(self, exchange: _Exchange, now: float) -> Iterator[Send]:
        """Ask, beside the one that was chosen, those that are asked last and were not tried for a while."""
        for each in exchange.route.resolvers:
            if each is not exchange.resolver and each.is_last and now >= each.probe_at:
                each.probe_at = now + PROBE
                self.probes += 1
                yield Send(each.upstream, self._under_id(exchange, each))

    def _doubt(self, exchange: _Exchange, resolver: _Resolver) -> Send:
        """A response has the name in another case, from one who has kept it: ask again, and believe it then."""
        self.unmatched += 1
        exchange.doubts = resolver
        del resolver.pending[exchange.ids.pop(resolver)]
        return Send(resolver.upstream, self._under_id(exchange, resolver))

    def _wait(self, exchange: _Exchange, now: float, wait: float) -> None:
        waits = self._waits.get(wait)
        if waits is None:
            waits = self._waits[wait] = OrderedDict()
        if exchange.wait != wait:
            if exchange.wait:
                del self._waits[exchange.wait][exchange]
            exchange.wait = wait
            waits[exchange] = None
        else:
            waits.move_to_end(exchange)
        exchange.due = now + wait

    def _rule_out(self, exchange: _Exchange, resolver: _Resolver, now: float) -> list[Action]:
        """This one will not help in this exchange; go on if it is the one we were waiting for."""
        if exchange.transferred:  # cut off: who has had a part of it will see that there is no end
            self._end(exchange)
            return []
        del resolver.pending[exchange.ids.pop(resolver)]
        exchange.tries[resolver] = exchange.route.manner.attempts
        if exchange.ids and resolver is not exchange.resolver:
            return []
        return self._move_on(exchange, now)

    def _move_on(self, exchange: _Exchange, now: float) -> list[Action]:
        """Ask the next; with nobody left to ask, wait for the slow; with nobody left to wait for, give up."""
        resolver = self._choose(exchange)
        if resolver is not None:
            self.failovers += 1
            return [self._ask(exchange, resolver, now)]
        manner = exchange.route.manner
        if exchange.ids and now < exchange.started + manner.patience:
            self._wait(exchange, now, manner.timeout)
            return []
        if exchange.refusal:
            return self._answer(exchange, exchange.refusal)
        self._end(exchange)
        self.gave_up += len(exchange.waiters)
        return list(self._told(exchange, reply(exchange.query, exchange.question, SERVFAIL)))

    def _answer(self, exchange: _Exchange, message: bytes, resolver: _Resolver | None = None) -> list[Action]:
        """What is told to everybody who waits; `resolver` has said it."""
        if resolver is not None:
            del resolver.pending[exchange.ids.pop(resolver)]
        self._end(exchange)
        self.answered += len(exchange.waiters)
        return list(self._told(exchange, message))

    def _told(self, exchange: _Exchange, message: bytes) -> Iterator[Answer]:
        shared = False
        for client, query in exchange.waiters:
            question = query[_QUESTION : _QUESTION + len(exchange.question)]
            yield Answer(client, answering(query, question, message), shared)
            shared = True

    def _evict(self) -> None:
        """Forget the client that has waited longest."""
        self.evicted += 1
        waiter, exchange = self._waiters.popitem(last=False)
        del exchange.waiters[waiter]
        if not exchange.waiters:
            self._end(exchange)

    def _end(self, exchange: _Exchange) -> None:
        """Forget the exchange, who waits for it, and every id it holds."""
        del self._exchanges[exchange.key]
        for waiter in exchange.waiters:
            del self._waiters[waiter]
        del self._waits[exchange.wait][exchange]
        self.transfers -= exchange.is_transfer
        for resolver in exchange.ids:
            resolver.has_ended(exchange)


_QUESTION = 12  # where a message has it


def _is_mixed(name: bytes) -> bool:
    """Whether it has letters of both cases."""
    return name != name.lower() and name != name.upper()
