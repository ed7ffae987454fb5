"""The DNS server: it decides what answers a query.

The first of these that has an answer gives it:

- the *hook*, a function of the caller's: it may answer, refuse, or have another name looked up instead;
- the `Zone`: names we own;
- stand-ins, if somebody else resolves names (`netns_kit.dns.stand_ins`);
- the `Cache`: recent answers of upstreams;
- the upstreams of the longest domain that the name is in, or else those of all others, through `DnsProxy`.

A `Guard`, if there is one, is asked about every question before the hook, and about every answer that leaves, by
whoever it was given: at that moment, so that a guard that is set while a query is under way judges its answer.

Aliases.  The target of a CNAME of ours, and a name that the hook returns, are looked up in the same order, without
the hook.  The CNAMEs are put in front of the answer, so that it begins at the name that was asked for.

A query gets the same answer over UDP and TCP; an answer that does not fit is truncated (RFC 1035 section 4.2.1).
Upstreams are asked over the client's transport, unless their `Manner` says TCP.

Law of this file: no socket, no clock, no log, and hostile bytes raise nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Literal, NamedTuple, Protocol, TypeAlias

from netns_kit.domain_names import suffixes, to_text, to_wire
from netns_kit.frozen import frozen

from .cache import Cache
from .exchanges import DnsTransport, Upstream
from .guard import Guard, Refused
from .manner import DEFAULT, Manner
from .message import (
    AA,
    ANY,
    CNAME,
    OPCODE,
    PLAIN_SIZE,
    QR,
    RCODE,
    SERVFAIL,
    TC,
    TYPES,
    BadMessage,
    Rcode,
    Rr,
    answering,
    edns,
    expanded,
    identity,
    is_bare,
    parse_untrusted,
    reply,
    type_name,
    with_name,
)
from .proxy import LONGEST_KEPT, Action, Answer, DnsProxy
from .records import DEFAULT_TTL, Record, as_rr
from .zone import Lookup, Zone

ALIASES = 8  # names of ours that a query may be led through
TRANSFERS = 8  # zone transfers at a time: each has a connection of its own
_TRANSFERS = frozenset({TYPES["AXFR"], TYPES["IXFR"]})


@frozen
class DnsQuery:
    """A query, as a hook gets it."""

    name: str
    """The name in small letters, without a dot at its end; "." is the root.  Unusual bytes are escaped as in a zone
    file."""
    type: str
    """The record type, like "AAAA"; "TYPE65280" for one without a name."""
    client: IPv4Address | IPv6Address
    """The client's address."""
    transport: Literal["udp", "tcp"]
    """The transport by which the query came."""


Verdict: TypeAlias = "Sequence[Record] | Rcode | str | None"
"""A hook's answer: records, of which those of the type asked for are returned under the name asked for; an `Rcode`;
the name to look up instead; or None, to have the query answered as if there were no hook."""

Hook: TypeAlias = Callable[[DnsQuery], Verdict]
"""A plain function that is called with each query first."""


class _Asked(NamedTuple):
    """A query under way, and the client that waits for its answer.

    `original` is the client's own query, if that has another name: `aliases` lead from it to this one.  `epoch` tells
    which set of upstreams is asked.  `address` is the client's, packed.
    """

    client: Hashable
    query: bytes
    question: bytes
    limit: int
    original: bytes
    aliases: tuple[Rr, ...]
    epoch: int
    address: bytes


class Standing(Protocol):
    """What has addresses that stand for names."""

    def find(self, question: bytes, client: bytes) -> Lookup | None:
        """Return the answer to a question, or None: resolvers are asked.

        Args:
            question: The question.
            client: The packed address of the client.
        """

    def name_of(self, address: bytes) -> bytes | None:
        """Return the name that a packed address stands for, None for none."""


class DnsServer:
    """A DNS server without its sockets.

    It is driven as `DnsProxy` is, and returns the same actions.  Nothing that a guest, an upstream or the hook does
    makes it raise.

    Args:
        zone: The names that are ours.
        proxy: The proxy that asks the upstreams, whose routes are set here.
        cache: The cache, None for none.
        hook: The hook, None for none.  If it raises, or returns no `Verdict`, the query is answered with SERVFAIL.
        failed: Called with the exception when the hook fails.

    Attributes:
        guard: The guard, None for none.  It may be set at any time.
        stands: What has stand-ins for names, None for nothing.
        refused_by_policy: The number of answers that the guard has refused.
        cut: The number of answers that the guard has cut records from.
    """

    def __init__(
        self,
        zone: Zone,
        proxy: DnsProxy,
        *,
        cache: Cache | None = None,
        hook: Hook | None = None,
        failed: Callable[[BaseException], object] = lambda _: None,
    ) -> None:
        self.zone = zone
        self.proxy = proxy
        self._cache = cache
        self._hook = hook
        self._failed = failed
        self._upstreams: dict[str, tuple[tuple[str, int], ...]] = {}
        self._manner = DEFAULT
        self._epoch = 0
        self._domains: frozenset[bytes] = frozenset()
        self.guard: Guard | None = None
        self.stands: Standing | None = None
        self.hooked = 0
        self.owned = 0
        self.cached = 0
        self.malformed = 0
        self.refused_by_policy = 0
        self.cut = 0

    def name_of(self, address: bytes) -> str | None:
        """Return the name of a packed address: that of our record, or the last one answered with it; else None.

        What the guard has cut out of answers gives no name.
        """
        found, guard = self.zone.name_of(address), self.guard
        if found is None and self.stands is not None:
            found = self.stands.name_of(address)
        if found is None and self._cache is not None:
            found = self._cache.name_of(address)
            if found is not None and guard is not None and not guard.names(found, address):
                return None
        return None if found is None else to_text(found).lower()

    def addresses(self) -> tuple[bytes, ...]:
        """Return the packed addresses of answers whose names are remembered."""
        return () if self._cache is None else self._cache.addresses()

    def set_upstreams(
        self,
        resolvers: Mapping[str, Iterable[tuple[str, int]]],
        manner: Manner = DEFAULT,
        domain_manner: Manner = DEFAULT,
    ) -> None:
        """Set the upstreams by domain; those of "" are asked about all other names, in that manner.

        The cache is cleared if they have changed.  Raises `DomainNameError` for what is no domain.
        """
        upstreams = {domain: tuple(found) for domain, found in resolvers.items()}
        if (upstreams, manner) == (self._upstreams, self._manner):
            return
        self._upstreams, self._manner = upstreams, manner
        self._epoch += 1
        if self._cache is not None:
            self._cache.clear()
        names = {to_wire(domain).lower(): found for domain, found in upstreams.items()}
        for gone in self._domains - names.keys():
            for transport in ("udp", "tcp"):
                self.proxy.set_upstreams((), (gone, transport))
        self._domains = frozenset(names) - {_ROOT}
        for name, found in names.items():
            how = manner if name == _ROOT else domain_manner
            streams = [Upstream(*each, "tcp") for each in found]
            datagrams = [Upstream(*each) for each in found]
            self.proxy.set_upstreams(streams if how.streams else datagrams, (name, "udp"), how)
            self.proxy.set_upstreams(streams, (name, "tcp"), how)

    @property
    def deadline(self) -> float:
        """The time at which `DnsServer.handle_timer` is due, or infinity."""
        return self.proxy.deadline

    def query(
        self, message: bytes, client: Hashable, address: bytes, now: float, transport: DnsTransport = "udp"
    ) -> list[Action] | None:
        """Take a query of a client with that packed address.

        Returns what to send, which may be nothing; None if the message is no query.
        """
        try:
            _, flags, question = parse_untrusted(message)
        except BadMessage:
            flags = QR
        if flags & QR or len(message) > LONGEST_KEPT:
            self.malformed += 1
            return None
        limit = 0xFFFF
        if transport == "udp" and question:
            about = edns(message, question)
            limit = PLAIN_SIZE if about is None else about.size
        asked = _Asked(client, message, question, limit, b"", (), self._epoch, address)
        if self.guard is not None:
            name, kind = question[:-4] or _ROOT, int.from_bytes(question[-4:-2], "big")
            if flags & OPCODE or not is_bare(message, question):
                kind = 0
            if (refused := self.guard.question(name, kind, address)) is not None:
                return [self._refuse(asked, refused)]
        if not question:  # not about any name
            return self._ask(asked, _ROOT, now, transport)
        if self._hook is not None:
            try:
                judged = self._judged(self._hook, asked, address, transport)
            except KeyboardInterrupt:  # that is for the program
                raise
            except BaseException as error:  # even what ends a task or a program: it ends no stack
                self._failed(error)
                judged = self._answer(asked, SERVFAIL)
            if isinstance(judged, Answer):
                return [self._told(asked, judged.message, now, ours=True)]
            asked = judged
            if asked.aliases and (refused := self._refused_alias(asked)) is not None:
                return [self._refuse(asked, refused)]
        return self._look_up(asked, now, transport)

    def _judged(self, hook: Hook, asked: _Asked, address: bytes, transport: DnsTransport) -> _Asked | Answer:
        """Return the hook's answer, or the query to go on with.

        Raises what the hook raises, and TypeError for what it must not return.
        """
        name, kind = asked.question[:-4], int.from_bytes(asked.question[-4:-2], "big")
        verdict = hook(DnsQuery(to_text(name).lower(), type_name(kind), ip_address(address), transport))
        if verdict is None:
            return asked
        self.hooked += 1
        if isinstance(verdict, Rcode):
            return self._answer(asked, verdict.value)
        if isinstance(verdict, str):
            return _renamed(asked, to_wire(verdict), DEFAULT_TTL)
        records = [as_rr(_checked(record), name) for record in verdict]
        return self._answer(asked, 0, [each for each in records if each.kind in (kind, CNAME) or kind == ANY])

    def _look_up(self, asked: _Asked, now: float, transport: DnsTransport) -> list[Action]:
        for _ in range(ALIASES):
            found = self.zone.find(asked.question, asked.address)
            if found is None:
                break
            if not found.alias:
                self.owned += 1
                return self._ours(asked, found, now, flags=AA)
            asked = _renamed(asked, found.alias, found.records[0].ttl)
            if (refused := self._refused_alias(asked)) is not None:
                return [self._refuse(asked, refused)]
        else:
            return [self._answer(asked._replace(aliases=()), SERVFAIL)]
        if self.stands is not None and self._domain_of(asked.question[:-4].lower()) == _ROOT:
            stood = self.stands.find(asked.question, asked.address)
            if stood is not None:
                return self._ours(asked, stood, now)
        if self._cache is not None:
            known = self._cache.get(asked.query, asked.question, now, limit=asked.limit)
            if known is not None:
                self.cached += 1
                return [self._told(asked, self._aliased(asked, known) if asked.aliases else known, now)]
        return self._ask(asked, self._domain_of(asked.question[:-4].lower()), now, transport)

    def _ours(self, asked: _Asked, found: Lookup, now: float, *, flags: int = 0) -> list[Action]:
        answer = self._answer(asked, found.rcode, found.records, flags=flags)
        return [self._told(asked, answer.message, now, ours=True)]

    def _domain_of(self, name: bytes) -> bytes:
        """Return the longest domain with its own resolvers that the name is in."""
        if not self._domains:
            return _ROOT
        return next((each for each in suffixes(name) if each in self._domains), _ROOT)

    def _ask(self, asked: _Asked, domain: bytes, now: float, transport: DnsTransport) -> list[Action]:
        transfer = transport == "tcp" and int.from_bytes(asked.question[-4:-2], "big") in _TRANSFERS
        if transfer and self.proxy.transfers >= TRANSFERS:
            return [self._answer(asked, SERVFAIL)]
        route = domain, transport
        actions = self.proxy.query(asked.query, asked.question, asked, now, route, transfer=transfer)
        return self._answered(actions, now)

    def response(self, message: bytes, upstream: Upstream, now: float) -> list[Action]:
        """Do as `DnsProxy.response` does."""
        return self._answered(self.proxy.response(message, upstream, now), now)

    def upstream_failed(self, upstream: Upstream, now: float) -> list[Action]:
        """Do as `DnsProxy.upstream_failed` does."""
        return self._answered(self.proxy.upstream_failed(upstream, now), now)

    def query_failed(self, upstream: Upstream, ident: int, now: float) -> list[Action]:
        """Do as `DnsProxy.query_failed` does."""
        return self._answered(self.proxy.query_failed(upstream, ident, now), now)

    def handle_timer(self, now: float) -> list[Action]:
        """Do as `DnsProxy.handle_timer` does."""
        return self._answered(self.proxy.handle_timer(now), now)

    def _answered(self, actions: list[Action], now: float) -> list[Action]:
        """Turn the proxy's answers into those that the clients wait for."""
        # of one message, which may be long, by query and guest
        told: dict[tuple[bytes, bytes], bytes] | None = None
        for index, action in enumerate(actions):
            if isinstance(action, Answer) and isinstance(asked := action.client, _Asked):
                message = action.message
                if not action.shared:  # else it was handled for the previous client
                    told = None
                    if self._cache is not None and asked.epoch == self._epoch:
                        self._cache.put(asked.query, asked.question, message, now)
                if asked.aliases or self.guard is not None:
                    query = asked.original or asked.query
                    _, _, question = parse_untrusted(query)
                    key = identity(query, question), asked.address
                    told = {} if told is None else told
                    if key not in told:
                        made = (
                            self._aliased(asked, message) if asked.aliases else self._fitting(asked, message)
                        )
                        told[key] = self._told(asked, made, now).message
                    message = answering(query, question, told[key])
                elif len(message) > asked.limit:
                    message = self._fitting(asked, message)
                actions[index] = Answer(asked.client, message)
        return actions

    def _fitting(self, asked: _Asked, message: bytes) -> bytes:
        """Return an upstream's answer, truncated if it came in a stream and is too long for the client."""
        if len(message) > asked.limit and self._manner.streams:
            return self._answer(asked, message[3] & RCODE, flags=TC).message
        return message

    def _aliased(self, asked: _Asked, message: bytes) -> bytes:
        """Return an upstream's answer with the aliases in front."""
        try:
            _, flags, question = parse_untrusted(message)
            answers, authority = expanded(message, question)
        except BadMessage:
            self.malformed += 1
            return self._answer(asked, SERVFAIL).message
        return self._answer(asked, flags & RCODE, answers, authority, flags=flags & TC).message

    def _answer(
        self,
        asked: _Asked,
        rcode: int,
        answers: Iterable[Rr] = (),
        authority: Iterable[Rr] = (),
        *,
        flags: int = 0,
        blocked: str = "",
    ) -> Answer:
        """Make our own answer to the client's original query."""
        query = asked.original or asked.query
        _, _, question = parse_untrusted(query)
        records = (*asked.aliases, *answers)
        message = reply(
            query, question, rcode, records, authority, flags=flags, limit=asked.limit, blocked=blocked
        )
        return Answer(asked.client, message)

    # -- the guard ----------------------------------------------------------------------------------

    def _told(self, asked: _Asked, message: bytes, now: float, *, ours: bool = False) -> Answer:
        """Return the answer to the client's original query, as far as the guard lets it pass now."""
        guard = self.guard
        if guard is None:
            return Answer(asked.client, message)
        _, _, question = parse_untrusted(asked.original or asked.query)
        found = guard.answer(question or _ROOT + bytes(4), message, now, asked.address, ours=ours)
        if isinstance(found, Refused):
            return self._refuse(asked, found)
        if found != message:
            self.cut += 1
            if len(found) > asked.limit:
                return self._answer(asked._replace(aliases=()), found[3] & RCODE, flags=TC)
        return Answer(asked.client, found)

    def _refused_alias(self, asked: _Asked) -> Refused | None:
        """Return how the guard refuses the name that an alias of ours has led to, or None."""
        if self.guard is None:
            return None
        return self.guard.alias(
            asked.question[:-4], int.from_bytes(asked.question[-4:-2], "big"), asked.address
        )

    def _refuse(self, asked: _Asked, refused: Refused) -> Answer:
        self.refused_by_policy += 1
        return self._answer(asked._replace(aliases=()), refused.rcode, blocked=refused.text)

    def stats(self) -> dict[str, int]:
        """Return the counters of `DnsProxy.stats` and the server's own."""
        found = self.proxy.stats()
        found["malformed"] += self.malformed
        return {
            **found,
            "hooked": self.hooked,  # the hook has answered, refused or renamed
            "owned": self.owned,  # names of ours
            "cached": self.cached,  # answered from the cache
            "refused_by_policy": self.refused_by_policy,
            "cut": self.cut,
            "cache_entries": 0 if self._cache is None else len(self._cache),
        }


_ROOT = b"\0"


def _checked(record: object) -> Record:
    if not isinstance(record, Record):
        raise TypeError(f"the hook returned {record!r} among others: expected a Record")
    return record


def _renamed(asked: _Asked, name: bytes, ttl: int) -> _Asked:
    """Return the query for another name, with an alias that leads there."""
    alias = Rr(asked.question[:-4], CNAME, ttl, name)
    return _Asked(
        asked.client,
        with_name(asked.query, asked.question, name),
        name + asked.question[-4:],
        asked.limit,
        asked.original or asked.query,
        (*asked.aliases, alias),
        asked.epoch,
        asked.address,
    )
