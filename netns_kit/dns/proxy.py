"""The DNS proxy: queries of many clients, relayed to the few resolvers of the host.

Words.  A *client* is a program that has asked, under any hashable name that the driver chooses.  An *upstream* is a
resolver's address, port and transport.  A *route* is a list of upstreams and a `Manner` of asking them, under a name
that the driver chooses: there is one for each domain that has its own resolvers.  An *exchange* is one question under
way: a query begins it, its answer ends it.  `netns_kit.dns.exchanges` has these, and the rules of a resolver's
health.

    client                   DnsProxy                        upstreams
    id 0x0001 --query-->     id 0x8f3a --Send-->             A    no answer within the timeout
                             id 0x21c7 --Send-->             B
    id 0x0001 <--Answer--    id 0x21c7 <--response--         B    (an answer from A would do as well)

Goal.  The guest's resolver library cannot tell the proxy from the host's resolver, except that the proxy survives the
loss of one.  A message passes byte for byte.  Only the id is replaced (RFC 5625), and in an answer the letter case of
the question where it is not the client's.  So EDNS, DNSSEC, TC and unknown types work.  The id is replaced by a
random one because all clients share few sockets: a client's id could clash with another's, or be known to a forger
(RFC 5452).

Joining.  Clients that ask the same, in any letter case, share one exchange, and each gets the answer.  Otherwise a
client could have many copies of one question under way, and a forger would have to guess the id of any of them (RFC
5452 section 5).  A transfer is not shared: a client that joined later would miss its beginning.

Acceptance.  A response belongs to an exchange if upstream, id and question agree; names are compared without regard
to case (RFC 4343).  Letter case serves as a further secret where it can: an upstream that has returned a name in
mixed case unchanged is expected to do so again.  If it does not, it is asked once more under another id, and believed
the second time.  The client sees the name in its own case.  Only an error response may omit the question, as servers
do that could not read it.  Every upstream that was asked may answer until the exchange ends, even after the next one
was asked.

Failover.  The next upstream is asked after a timeout, an error of the socket, SERVFAIL or REFUSED.  Every other
answer is final, NXDOMAIN included.  An upstream that refused or cannot be reached is not asked again in this
exchange.  A silent one is, until each was asked as often as there are attempts.  Then the proxy waits until the
exchange is as old as the route's patience, because a resolver may be slow, and answers with the first SERVFAIL or
REFUSED that came, or with its own SERVFAIL.

Transfers (AXFR, IXFR) over a stream are many messages (RFC 5936 section 2.2).  Each is handed on as it comes, and the
exchange is over when none has come for the time of a timeout.

Limits.  A client's retransmission is one more packet to the same upstream and nothing else.  The number of waiting
clients is limited; beyond it the client that has waited longest is dropped without an answer, because UDP clients
know how to handle loss.  Waits of one length end in the order in which they began, so they are kept in one queue for
each length and need no heap; there are few lengths.

Law of this file: no socket, no clock, no log.  Time comes in as seconds of any monotonic clock.  What comes out is a
list of actions to do now, in order; the tables are consistent before the driver does them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, KeysView, Sequence
from itertools import chain, takewhile
from math import inf
from typing import NamedTuple, TypeAlias

from .exchanges import PROBE, DnsTransport, Exchange, Resolver, Upstream, UpstreamList
from .manner import DEFAULT, Manner
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

LONGEST_KEPT = 4096  # bytes of a message that is kept; RFC 5625 section 4.4.1 asks for no more over UDP
LIMIT_MAX = 0x8000  # clients that wait; half of the ids stay free, so that they stay hard to guess

_TRY_ANOTHER = frozenset({SERVFAIL, REFUSED})
_MAY_OMIT_QUESTION = frozenset({FORMERR, SERVFAIL, NOTIMP, REFUSED})


class Send(NamedTuple):
    """An action: send the message to the upstream now.

    `transfer`: many messages may answer it, and are to be read as fast as the client reads.
    """

    upstream: Upstream
    message: bytes
    transfer: bool = False


class Answer(NamedTuple):
    """An action: hand the message to the client now.  Its exchange is over, unless that is a transfer.

    `shared`: the message is that of the previous answer, for another client that asked the same.
    """

    client: Hashable
    message: bytes
    shared: bool = False


Action: TypeAlias = Send | Answer

COUNTERS = (
    "queries", "joined", "repeated", "answered", "gave_up", "failovers", "probes", "timeouts", "evicted", "malformed",
    "unmatched",
)  # fmt: skip
"""Attributes of `DnsProxy` that count; `netns_kit.gateway.stats.Stats` says what."""


class DnsProxy:
    """A relay of DNS queries to several upstreams, without its sockets.

    The driver calls `DnsProxy.query`, `DnsProxy.response` and `DnsProxy.upstream_failed` when something happens and
    `DnsProxy.handle_timer` at `DnsProxy.deadline`, and does what they return.  None of them raises, whatever a guest
    or an upstream has sent.  The owner of the sockets checks that a response has come from the upstream's own address
    and port, and to where the query was sent from.

    Args:
        random_id: Returns 16 unpredictable bits, 0 to 65535, from the system's random source except in tests.
        upstreams: The upstreams of the route None, see `DnsProxy.set_upstreams`.
        manner: How they are asked.
        limit: How many clients may wait at a time, at most `LIMIT_MAX`.
        unknown: The result code of the answer about a name whose route has no upstream.

    Raises:
        ValueError: The limit is out of range.

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
        unknown: int = SERVFAIL,
    ) -> None:
        if not 1 <= limit <= LIMIT_MAX:
            raise ValueError(f"limit={limit}: expected 1 to {LIMIT_MAX}")
        self.limit = limit
        self._unknown = unknown
        self._random_id = random_id
        self._resolvers: dict[Upstream, Resolver] = {}  # all that may still answer
        self._routes: dict[Hashable, UpstreamList] = {}
        self._exchanges: dict[Hashable, Exchange] = {}  # by what is asked
        self._waiters: OrderedDict[tuple[Hashable, bytes], Exchange] = OrderedDict()  # longest first
        self._waits: dict[float, OrderedDict[Exchange, None]] = {}  # by length, each in order of `due`
        self.transfers = 0
        self.queries = self.joined = self.repeated = self.answered = self.gave_up = self.failovers = 0
        self.probes = self.timeouts = self.evicted = self.malformed = self.unmatched = 0
        self.set_upstreams(upstreams, manner=manner)

    def set_upstreams(
        self, upstreams: Sequence[Upstream], route: Hashable = None, manner: Manner = DEFAULT
    ) -> None:
        """Set the upstreams of a route, in order of preference; duplicates count once.  Nothing is sent now.

        Exchanges under way go on: a former upstream may still answer, and the next one to be asked is one of these.
        """
        known = self._resolvers
        changed = self._routes.setdefault(route, UpstreamList())
        changed.version += 1
        changed.manner = manner
        changed.resolvers = [known.get(each) or Resolver(each) for each in dict.fromkeys(upstreams)]
        found = {each.upstream: each for each in known.values() if each.pending}
        for order in self._routes.values():
            found.update((each.upstream, each) for each in order.resolvers)
        for upstream, each in found.items():
            other: DnsTransport = "tcp" if upstream.transport == "udp" else "udp"
            each.twin = found.get(upstream._replace(transport=other))
        self._resolvers = found

    def awaited(self, upstream: Upstream) -> KeysView[int]:
        """Return the ids of the queries that this upstream may still answer."""
        resolver = self._resolvers.get(upstream)
        return (resolver.pending if resolver else {}).keys()

    @property
    def deadline(self) -> float:
        """The time at which `DnsProxy.handle_timer` is due: the end of the first wait, or infinity."""
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
        """Take a client's query for one of the route's upstreams.

        The message is a query no longer than `LONGEST_KEPT`; its reader has checked that.  `question` is its question
        as `parse_untrusted` returns it.  `transfer`: the answer may be more than one message.

        Returns the query to send on, an answer if the route has no upstream, or nothing if the same query of another
        client is under way.  If the same client sends the same bytes again while the exchange lasts, they are sent
        once more to the upstream that is being asked.
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
        asked = self._routes.get(route) or UpstreamList()
        key = (route, asked.version, identity(message, question), waiter if transfer else None)
        exchange = self._exchanges.get(key)
        if exchange is not None:
            self.joined += 1
            exchange.waiters[waiter] = None
            self._waiters[waiter] = exchange
            return []
        exchange = Exchange(key, message, question, asked, now, transfer)
        resolver = self._choose(exchange)
        if resolver is None:
            self.gave_up += 1
            rcode = SERVFAIL if asked.resolvers or not question else self._unknown
            return [Answer(client, reply(message, question, rcode))]
        asked.turn += asked.manner.rotate
        self._exchanges[key] = self._waiters[waiter] = exchange
        exchange.waiters[waiter] = None
        self.transfers += transfer
        actions: list[Action] = [self._ask(exchange, resolver, now)]
        if len(asked.resolvers) > 1 and not transfer:
            actions += self._probed(exchange, now)
        return actions

    def response(self, message: bytes, upstream: Upstream, now: float) -> list[Action]:
        """Take an upstream's message.  Returns the answers for the clients, or a query to another upstream.

        A message that answers no query to this upstream (forged, repeated or too late) is counted and dropped.
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
        """Take an error of the upstream's socket (ECONNREFUSED, ENETUNREACH).

        Returns a query to another upstream for each exchange that waits for this one, or a SERVFAIL if none is left.
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
        """Give up one query of this upstream, by its id; it may still answer others."""
        resolver = self._resolvers.get(upstream)
        exchange = resolver.pending.get(ident) if resolver else None
        return self._rule_out(exchange, resolver, now) if exchange and resolver else []

    def prolong(self, upstream: Upstream, ident: int, now: float) -> None:
        """Begin the wait for one query again: its client reads the answer more slowly than it could come."""
        resolver = self._resolvers.get(upstream)
        exchange = resolver.pending.get(ident) if resolver else None
        if exchange is not None:
            self._wait(exchange, now, exchange.wait)

    def handle_timer(self, now: float) -> list[Action]:
        """Return a query to the next upstream, or the final answer, for each exchange whose wait is over.

        A call before the deadline returns nothing.  Only exchanges that are due are visited.
        """
        actions: list[Action] = []
        over = [takewhile(lambda each: each.due <= now, waits) for waits in self._waits.values()]
        for exchange in sorted(chain.from_iterable(over), key=lambda each: each.due):
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
        """Return the counters (`COUNTERS`) since the beginning, and the number of clients that wait."""
        return {**{name: getattr(self, name) for name in COUNTERS}, "pending": len(self._waiters)}

    def _choose(self, exchange: Exchange) -> Resolver | None:
        """Return the resolver to ask next, None if none is left: the least asked, then a healthy, then the first."""
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

    def _ask(self, exchange: Exchange, resolver: Resolver, now: float) -> Send:
        """Send to this resolver and begin a wait, a short one if it is doubted and there is another to ask."""
        message = self._under_id(exchange, resolver)
        exchange.resolver = resolver
        exchange.sent = now
        route = exchange.route
        wait = route.manner.timeout
        if resolver.is_slow and any(each not in exchange.tries for each in route.resolvers):
            wait = min(resolver.hedge, wait)
        self._wait(exchange, now, wait)
        return Send(resolver.upstream, message, exchange.is_transfer)

    def _under_id(self, exchange: Exchange, resolver: Resolver) -> bytes:
        """Return the query under an id that no other query which the resolver may still answer has."""
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

    def _probed(self, exchange: Exchange, now: float) -> Iterator[Send]:
        """Ask, beside the one that was chosen, those that are asked last and were not tried for a while."""
        for each in exchange.route.resolvers:
            if each is not exchange.resolver and each.is_last and now >= each.probe_at:
                each.probe_at = now + PROBE
                self.probes += 1
                yield Send(each.upstream, self._under_id(exchange, each))

    def _doubt(self, exchange: Exchange, resolver: Resolver) -> Send:
        """Ask a resolver again whose response has the name in another case than it usually keeps."""
        self.unmatched += 1
        exchange.doubts = resolver
        del resolver.pending[exchange.ids.pop(resolver)]
        return Send(resolver.upstream, self._under_id(exchange, resolver))

    def _wait(self, exchange: Exchange, now: float, wait: float) -> None:
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

    def _rule_out(self, exchange: Exchange, resolver: Resolver, now: float) -> list[Action]:
        """Ask this resolver no more in this exchange; move on if it is the one being waited for."""
        if exchange.transferred:  # cut off: a client that has a part of it sees that the end is missing
            self._end(exchange)
            return []
        del resolver.pending[exchange.ids.pop(resolver)]
        exchange.tries[resolver] = exchange.route.manner.attempts
        if exchange.ids and resolver is not exchange.resolver:
            return []
        return self._move_on(exchange, now)

    def _move_on(self, exchange: Exchange, now: float) -> list[Action]:
        """Ask the next resolver; if none is left, wait for slow answers; if none can come, give up."""
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

    def _answer(self, exchange: Exchange, message: bytes, resolver: Resolver | None = None) -> list[Action]:
        """Return the message for each client that waits; it came from `resolver`, if that is given."""
        if resolver is not None:
            del resolver.pending[exchange.ids.pop(resolver)]
        self._end(exchange)
        self.answered += len(exchange.waiters)
        return list(self._told(exchange, message))

    def _told(self, exchange: Exchange, message: bytes) -> Iterator[Answer]:
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

    def _end(self, exchange: Exchange) -> None:
        """Forget the exchange, the clients that wait for it, and every id it holds."""
        del self._exchanges[exchange.key]
        for waiter in exchange.waiters:
            del self._waiters[waiter]
        del self._waits[exchange.wait][exchange]
        self.transfers -= exchange.is_transfer
        for resolver in exchange.ids:
            resolver.has_ended(exchange)


_QUESTION = 12  # where a message has it


def _is_mixed(name: bytes) -> bool:
    """Return whether the name has letters of both cases."""
    return name != name.lower() and name != name.upper()
