"""What the DNS proxy keeps: resolvers with their health, routes, and exchanges under way.

Health.  The order of a route's upstreams may mean something (split DNS), so an upstream loses its place only by
evidence about itself, and not about a name:

- *Doubted*: it was silent for a whole timeout, towards everybody.  Until it answers in time it is waited for `HEDGE`
  seconds only, if there is another to ask; both may answer.  An answer that comes later doubles that time.
- *Last*: `CONDEMNED` different names in a row had no answer, or its socket failed.  It is asked after the others.
  Every `PROBE` seconds a query goes to it as well, and the first answer gives it its place back.
- What UDP says of a server counts for TCP, and the other way round, until the server answers that way itself: a
  silent host is silent both ways.  A closed port is closed in one way only.
- SERVFAIL and REFUSED do not cost an upstream its place: it may know the next name, and the ones behind it may not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from math import inf
from typing import Literal, NamedTuple, TypeAlias

from .manner import DEFAULT, DEFAULT_PATIENCE

HEDGE = 0.25  # seconds that a doubted upstream is waited for, at first
CONDEMNED = 3  # names in a row without an answer
PROBE = 5.0  # seconds between two queries to an upstream that is asked last
LATE = 64  # queries of each upstream whose answer is still recognised when they are over

DnsTransport: TypeAlias = Literal["udp", "tcp"]


class Upstream(NamedTuple):
    """A resolver's address, with the zone if it has one, its port, and the transport."""

    address: str
    port: int
    transport: DnsTransport = "udp"


class Resolver:
    """An upstream: the queries that it may still answer, and its health.

    `heard`: when its last message came.  `silent`: when a wait for it last ended without a message, since when
    `is_doubted`.  `unanswered`: names that had no answer since it was heard.  `hedge`: how long it is waited for
    while doubted.  `twin`: the same server over the other transport.
    """

    __slots__ = (
        "has_failed", "heard", "hedge", "is_doubted", "keeps_case", "late", "pending", "probe_at", "silent",
        "twin", "unanswered", "upstream"
    )  # fmt: skip

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.twin: Resolver | None = None
        self.pending: dict[int, Exchange] = {}
        self.late: OrderedDict[int, bytes] = OrderedDict()  # questions of exchanges that others have ended
        self.keeps_case = False
        self.heard = self.silent = self.probe_at = -inf
        self.is_doubted = self.has_failed = False
        self.unanswered: set[bytes] = set()
        self.hedge = HEDGE

    @property
    def is_last(self) -> bool:
        """True while the others are asked before it."""
        if self.has_failed or len(self.unanswered) == CONDEMNED:
            return True
        twin = self.twin
        return twin is not None and len(twin.unanswered) == CONDEMNED and twin.silent > self.heard

    @property
    def is_slow(self) -> bool:
        """True while it is not waited for as long as the others are."""
        twin = self.twin
        return self.is_doubted or (twin is not None and twin.is_doubted and twin.silent > self.heard)

    def has_answered(self, now: float) -> None:
        """Note a message that came in time for its exchange."""
        self.heard = now
        if self.is_doubted or self.has_failed:
            self.is_doubted = self.has_failed = False
            self.unanswered.clear()
            self.hedge = HEDGE

    def has_answered_late(self, now: float) -> None:
        """Note a message for an exchange that was over."""
        self.heard = now
        self.has_failed = False
        self.unanswered.clear()
        self.hedge = min(2 * self.hedge, DEFAULT_PATIENCE)

    def has_been_silent(self, question: bytes, now: float) -> None:
        """Note the end of a wait in which no message came for any client."""
        self.silent = now
        self.is_doubted = True
        if len(self.unanswered) < CONDEMNED:
            self.unanswered.add(question[:-4].lower())
            if len(self.unanswered) == CONDEMNED:
                self.probe_at = now + PROBE

    def has_ended(self, exchange: Exchange) -> None:
        """Note that the exchange needs no answer any more; a late one still shows that the resolver lives."""
        ident = exchange.ids[self]
        del self.pending[ident]
        if exchange.question:
            self.late[ident] = exchange.question
            if len(self.late) > LATE:
                self.late.popitem(last=False)


class UpstreamList:
    """A list of upstreams, in order of preference, and how they are asked.

    `turn`: which one is asked first.  `version`: grows when the upstreams change, so that no query joins an exchange
    with the former ones.
    """

    __slots__ = ("manner", "resolvers", "turn", "version")

    def __init__(self) -> None:
        self.resolvers: list[Resolver] = []
        self.manner = DEFAULT
        self.turn = 0
        self.version = 0


class Exchange:
    """A question under way: the resolver asked last and when, and the ids of all that may still answer."""

    __slots__ = (
        "doubts", "due", "ids", "is_transfer", "key", "query", "question", "refusal", "resolver", "route",
        "sent", "started", "transferred", "tries", "turn", "wait", "waiters"
    )  # fmt: skip

    resolver: Resolver
    sent: float
    due: float

    def __init__(
        self, key: Hashable, query: bytes, question: bytes, route: UpstreamList, now: float, is_transfer: bool
    ) -> None:
        self.key = key
        self.is_transfer = is_transfer
        self.query = query
        self.question = question
        self.route = route
        self.turn = route.turn
        # the clients, and the bytes of each one's query
        self.waiters: dict[tuple[Hashable, bytes], None] = {}
        self.transferred = False  # more of the answer may come
        self.started = now
        self.wait = 0.0  # length of the present wait; 0: none has begun
        self.ids: dict[Resolver, int] = {}
        self.tries: dict[Resolver, int] = {}
        self.refusal = b""  # the first SERVFAIL or REFUSED, for want of better
        self.doubts: Resolver | None = None  # answered in another letter case, and was asked again
