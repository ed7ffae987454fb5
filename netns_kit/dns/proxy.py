"""The DNS proxy: queries of many clients, relayed to the few resolvers of the host.

Words.  A *client* is whoever asked, by any hashable name the driver likes.  An *upstream* is a resolver's address
and port, and how it is spoken to.  A *route* is a list of upstreams, by a name of the driver's: one for each domain
that has resolvers of its own, say.  An *exchange* is one query under way: made by a query, ended by its answer.

    client                   DnsProxy                        upstreams
    id 0x0001 --query-->     id 0x8f3a --Send-->             A    no answer within the timeout
                             id 0x21c7 --Send-->             B
    id 0x0001 <--Answer--    id 0x21c7 <--response--         B    (one from A would do as well)

Goal.  The guest's resolver library should not be able to tell us from the host's resolver, except that ours
survives the loss of one.  A message passes byte for byte; we replace the id and nothing else (RFC 5625), so
EDNS, DNSSEC, TC and unknown types just work.  The id is replaced by a random one because all clients share
few sockets: a client's id could clash, or be known to someone who wants to forge an answer (RFC 5452).

Acceptance.  A response belongs to an exchange if upstream, id and question agree, the question byte for byte:
case counts, which a client may use as a further secret, and which we do not change.  Only an error response may omit
it, as servers do which could not read it.  All upstreams asked may answer until the exchange
ends, also those we gave up on.

Failover.  No answer within the timeout, an error of the socket, or SERVFAIL or REFUSED: the next upstream is
asked.  Everything else, NXDOMAIN included, is final.  An upstream that said no, or that cannot be reached,
is not asked again in this exchange; a silent one is, until each was asked as often as there are attempts.
Then we wait until the exchange is `PATIENCE` old, for a resolver may just be slow, and answer with the first
SERVFAIL or REFUSED that came, or a SERVFAIL of ours.

Transfers (AXFR, IXFR) over a stream are many messages (RFC 5936 section 2.2): each is handed on as it comes, and the
exchange is over when none has come for the time of a timeout.

Health.  An upstream that was silent for a whole timeout, towards everybody, is tried last for `HOLD_DOWN`
seconds or until it is heard again: one query pays for its death, the following do not.  One that answers
others meanwhile is slow for this name only and keeps its place, for the order may mean something (split DNS).

Limits.  One exchange per client and query bytes, so a client's retransmission is one more packet to the same
upstream and nothing else.  At most as many exchanges as the limit; over it, the one that falls due first is
dropped in silence: loss is what UDP clients know how to handle.  All waits are equally long, so the table in
the order the waits began is in the order they end as well: it needs no heap.

Law of this file: no socket, no clock, no log.  Time comes in as seconds of any monotonic clock.
What comes out is a list of what to do now, in order; the tables are consistent before the driver does it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, KeysView, Sequence
from itertools import takewhile
from math import inf
from typing import Literal, NamedTuple, TypeAlias

from .message import (
    FORMERR,
    NOTIMP,
    QR,
    RCODE,
    REFUSED,
    SERVFAIL,
    TYPES,
    BadMessage,
    parse_untrusted,
    reply,
    with_id,
)

PATIENCE = 4.0  # seconds; stub resolvers ask again after 5, and they should hear the verdict before that
HOLD_DOWN = 30.0  # seconds a silent or unreachable upstream is tried last
LONGEST_KEPT = 4096  # bytes of a message we store; RFC 5625 section 4.4.1 asks for no more over UDP
LIMIT_MAX = 0x8000  # exchanges; half of the ids stay free, so that they stay hard to guess

_TRY_ANOTHER = frozenset({SERVFAIL, REFUSED})
_MAY_OMIT_QUESTION = frozenset({FORMERR, SERVFAIL, NOTIMP, REFUSED})
_TRANSFERS = frozenset({TYPES["AXFR"], TYPES["IXFR"]})

Transport: TypeAlias = Literal["udp", "tcp"]


class Upstream(NamedTuple):
    """A resolver: its address, with the zone if it has one, and port."""

    address: str
    port: int
    transport: Transport = "udp"


class Send(NamedTuple):
    """Send the message to the upstream now."""

    upstream: Upstream
    message: bytes


class Answer(NamedTuple):
    """Hand the message to the client now; its exchange is over, unless that is a transfer."""

    client: Hashable
    message: bytes


Action: TypeAlias = Send | Answer


class _Resolver:
    """One upstream: what it owes us, and whether it lives."""

    __slots__ = ("down_until", "heard", "pending", "upstream")

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.pending: dict[int, _Exchange] = {}
        self.heard = -inf
        self.down_until = -inf


class _Exchange:
    """One query under way: the resolver asked last and when, and the ids of all that may still answer."""

    __slots__ = (
        "client",
        "due",
        "ids",
        "query",
        "question",
        "refusal",
        "resolver",
        "route",
        "sent",
        "started",
        "transferred",
        "tries",
    )

    resolver: _Resolver
    sent: float
    due: float

    def __init__(self, client: Hashable, query: bytes, question: bytes, route: Hashable, now: float) -> None:
        self.client = client
        self.query = query
        self.question = question
        self.route = route
        self.transferred = False  # more of the answer may come
        self.started = now
        self.ids: dict[_Resolver, int] = {}
        self.tries: dict[_Resolver, int] = {}
        self.refusal = b""  # the first SERVFAIL or REFUSED, for want of better


class DnsProxy:
    """Relay DNS to several upstreams; sans-IO.

    The driver calls `DnsProxy.query`, `DnsProxy.response` and `DnsProxy.upstream_failed` when something
    happens and `DnsProxy.handle_timer` when `DnsProxy.deadline` has come, and does what they return.  None
    of them raises, whatever a guest or an upstream sent.  A response must have come from the named upstream's
    own address and port, and to where the query was sent from: whoever owns the sockets checks that.

    random_id: returns 16 unpredictable bits, 0 to 65535; from the system's random source, but for tests.
    upstreams: of the route None, in order of preference; see `DnsProxy.set_upstreams`.
    timeout: seconds an upstream may take before the next one is asked, default 1.
    attempts: how often a silent upstream is asked for one query, default 2.
    limit: exchanges at a time, default 4096, at most `LIMIT_MAX`.

    Raises ValueError for a timeout, attempts or limit out of range.

    >>> proxy = DnsProxy(random_id=lambda: 0xBEEF, upstreams=[Upstream("192.0.2.1", 53)])
    >>> query = bytes.fromhex("0001 0100 0001 0000 0000 0000 00 0002 0001")        # the root's name servers?
    >>> [(upstream, sent)] = proxy.query(query, "me", now=0.0)
    >>> upstream.address, sent.hex(" ", 2)
    ('192.0.2.1', 'be ef01 0000 0100 0000 0000 0000 0002 0001')
    >>> proxy.deadline
    1.0
    >>> forged = bytes.fromhex("dead 8180 0001 0000 0000 0000 00 0002 0001")
    >>> proxy.response(forged, upstream, now=0.1)
    []
    >>> genuine = b"\\xbe\\xef" + forged[2:]
    >>> proxy.response(genuine, upstream, now=0.2) == [("me", query[:2] + genuine[2:])]
    True
    """

    def __init__(
        self,
        *,
        random_id: Callable[[], int],
        upstreams: Sequence[Upstream] = (),
        timeout: float = 1.0,
        attempts: int = 2,
        limit: int = 4096,
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, not {timeout}")
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, not {attempts}")
        if not 1 <= limit <= LIMIT_MAX:
            raise ValueError(f"limit must be 1 to {LIMIT_MAX}, not {limit}")
        self.timeout = timeout
        self.attempts = attempts
        self.limit = limit
        self._random_id = random_id
        self._resolvers: dict[Upstream, _Resolver] = {}  # these may answer
        self._routes: dict[Hashable, list[_Resolver]] = {}  # of these, the ones to ask
        self._exchanges: OrderedDict[tuple[Hashable, bytes], _Exchange] = OrderedDict()  # by due
        self.queries = 0
        self.repeated = 0
        self.answered = 0
        self.gave_up = 0
        self.failovers = 0
        self.timeouts = 0
        self.evicted = 0
        self.malformed = 0
        self.unmatched = 0
        self.set_upstreams(upstreams)

    def upstreams(self, route: Hashable = None) -> tuple[Upstream, ...]:
        """Whom new queries of that route are sent to, in order of preference."""
        return tuple(resolver.upstream for resolver in self._routes.get(route, ()))

    def set_upstreams(self, upstreams: Sequence[Upstream], route: Hashable = None) -> None:
        """Ask these from now on, in order of preference; duplicates count once.  Nothing is sent now.

        Exchanges under way go on: a former upstream may still answer, the next one asked is one of these.
        """
        known = self._resolvers
        self._routes[route] = [
            known.get(upstream) or _Resolver(upstream) for upstream in dict.fromkeys(upstreams)
        ]
        self._resolvers = {each.upstream: each for each in known.values() if each.pending}
        for order in self._routes.values():
            self._resolvers.update((each.upstream, each) for each in order)

    def awaited(self, upstream: Upstream) -> KeysView[int]:
        """The ids of queries that this upstream may still answer."""
        resolver = self._resolvers.get(upstream)
        return (resolver.pending if resolver else {}).keys()

    @property
    def deadline(self) -> float:
        """When `DnsProxy.handle_timer` wants to be called: the time the oldest wait is over, or infinity."""
        for exchange in self._exchanges.values():
            return exchange.due
        return inf

    def query(self, message: bytes, client: Hashable, now: float, route: Hashable = None) -> list[Action]:
        """A client asks, for one of the route's upstreams.

        Returns the query to send on, or a SERVFAIL if there is no upstream at all.

        The same bytes from the same client while the exchange lasts are sent once more to the upstream
        being asked.  What is no query, or is longer than `LONGEST_KEPT`, is counted and dropped.
        """
        exchange = self._exchanges.get((client, message))
        if exchange is not None:
            self.repeated += 1
            ident = exchange.ids.get(exchange.resolver)
            return [] if ident is None else [Send(exchange.resolver.upstream, with_id(ident, message))]
        try:
            _, flags, question = parse_untrusted(message)
        except BadMessage:
            self.malformed += 1
            return []
        if flags & QR or len(message) > LONGEST_KEPT:
            self.malformed += 1
            return []
        self.queries += 1
        if len(self._exchanges) >= self.limit:
            self.evicted += 1
            self._end(next(iter(self._exchanges.values())))
        exchange = _Exchange(client, message, question, route, now)
        resolver = self._choose(exchange, now)
        if resolver is None:
            self.gave_up += 1
            return [Answer(client, reply(message, question, SERVFAIL))]
        self._exchanges[client, message] = exchange
        return [self._ask(exchange, resolver, now)]

    def response(self, message: bytes, upstream: Upstream, now: float) -> list[Action]:
        """An upstream says something.  Returns the answer for the client, or whom to ask instead.

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
        if (
            resolver is None
            or exchange is None
            or not flags & QR
            or (
                question != exchange.question
                and (question or not (rcode in _MAY_OMIT_QUESTION or exchange.transferred))
            )
        ):
            self.unmatched += 1
            return []
        resolver.heard = now
        resolver.down_until = -inf
        if upstream.transport == "tcp" and not rcode and _kind(exchange.question) in _TRANSFERS:
            exchange.transferred = True
            self._wait(exchange, now)
            return [Answer(exchange.client, exchange.query[:2] + message[2:])]
        if rcode not in _TRY_ANOTHER or exchange.transferred:
            return [self._answer(exchange, message)]
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
        resolver.down_until = now + HOLD_DOWN
        actions: list[Action] = []
        for exchange in list(resolver.pending.values()):
            actions += self._rule_out(exchange, resolver, now)
        return actions

    def handle_timer(self, now: float) -> list[Action]:
        """Time has passed.  Returns the next upstream, or the verdict, for each exchange whose wait is over.

        Too early a call returns nothing.  Visits the exchanges that are due and no others.
        """
        actions: list[Action] = []
        for exchange in list(takewhile(lambda each: each.due <= now, self._exchanges.values())):
            if exchange.transferred:
                self.answered += 1
                self._end(exchange)
                continue
            self.timeouts += 1
            resolver = exchange.resolver
            if resolver.heard < exchange.sent:
                resolver.down_until = now + HOLD_DOWN
            actions += self._move_on(exchange, now)
        return actions

    def stats(self) -> dict[str, int]:
        """The counters since the beginning, and how many exchanges are pending."""
        return {
            "queries": self.queries,  # accepted from clients, repetitions not counted
            "repeated": self.repeated,  # the client asked again while we were waiting
            "answered": self.answered,  # by an upstream, its SERVFAIL or REFUSED included
            "gave_up": self.gave_up,  # a SERVFAIL of our own
            "failovers": self.failovers,  # a further message was sent to an upstream
            "timeouts": self.timeouts,  # waits that ended without an answer
            "evicted": self.evicted,  # dropped for a younger one
            "malformed": self.malformed,  # from either side, never relayed
            "unmatched": self.unmatched,  # from an upstream: forged, repeated or late
            "pending": len(self._exchanges),
        }

    def _choose(self, exchange: _Exchange, now: float) -> _Resolver | None:
        """Whom to ask next: the least asked, then the healthy, then in order."""
        tries = exchange.tries
        return min(
            (each for each in self._routes.get(exchange.route, ()) if tries.get(each, 0) < self.attempts),
            key=lambda each: (tries.get(each, 0), each.down_until > now),
            default=None,
        )

    def _ask(self, exchange: _Exchange, resolver: _Resolver, now: float) -> Send:
        """Send to this one, under an id that no other query it may still answer has; wait anew."""
        ident = exchange.ids.get(resolver)
        if ident is None:
            ident = self._random_id()
            while ident in resolver.pending:
                ident = (ident + 1) & 0xFFFF
            resolver.pending[ident] = exchange
            exchange.ids[resolver] = ident
        exchange.tries[resolver] = exchange.tries.get(resolver, 0) + 1
        exchange.resolver = resolver
        exchange.sent = now
        self._wait(exchange, now)
        return Send(resolver.upstream, with_id(ident, exchange.query))

    def _wait(self, exchange: _Exchange, now: float) -> None:
        exchange.due = now + self.timeout
        self._exchanges.move_to_end((exchange.client, exchange.query))

    def _rule_out(self, exchange: _Exchange, resolver: _Resolver, now: float) -> list[Action]:
        """This one will not help in this exchange; go on if it is the one we were waiting for."""
        if exchange.transferred:  # cut off: who has had a part of it will see that there is no end
            self._end(exchange)
            return []
        del resolver.pending[exchange.ids.pop(resolver)]
        exchange.tries[resolver] = self.attempts
        if exchange.ids and resolver is not exchange.resolver:
            return []
        return self._move_on(exchange, now)

    def _move_on(self, exchange: _Exchange, now: float) -> list[Action]:
        """Ask the next; with nobody left to ask, wait for the slow; with nobody left to wait for, give up."""
        resolver = self._choose(exchange, now)
        if resolver is not None:
            self.failovers += 1
            return [self._ask(exchange, resolver, now)]
        if exchange.ids and now < exchange.started + PATIENCE:
            self._wait(exchange, now)
            return []
        if exchange.refusal:
            return [self._answer(exchange, exchange.refusal)]
        self._end(exchange)
        self.gave_up += 1
        return [Answer(exchange.client, reply(exchange.query, exchange.question, SERVFAIL))]

    def _answer(self, exchange: _Exchange, message: bytes) -> Answer:
        self._end(exchange)
        self.answered += 1
        return Answer(exchange.client, exchange.query[:2] + message[2:])

    def _end(self, exchange: _Exchange) -> None:
        """Forget the exchange and every id it holds."""
        del self._exchanges[exchange.client, exchange.query]
        for resolver, ident in exchange.ids.items():
            del resolver.pending[ident]


def _kind(question: bytes) -> int:
    return int.from_bytes(question[-4:-2], "big")
