"""Who has which address, and until when.

Words.  A *client* is who asks: an identifier, and for DHCPv6 which of its interfaces' needs.  Its *binding* is the
one address it is offered or has.  *Static* is a lease kept for somebody, whether he has it at the moment or not.

    (nothing) --offer--> offered --grant--> bound --release, or time--> past
                                              +---- decline --> declined --time--> past
                                              +---- revoke ---> revoked --time, or its client knows--> past

The table has one entry for an address at most, so the pool and the static leases bound it: a flood of clients gets
what is free, and nothing more is kept of them.  What is past is kept until the address is another's, and its client
gets the same again.  Nothing expires by itself: time is looked at where it is asked about.

An address that was declined is used by somebody who was not given it, and one that was revoked is perhaps still used
by who had it: neither is anybody's for a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from itertools import chain
from typing import Literal, NamedTuple, TypeGuard

from netns_kit.arguments import Address
from netns_kit.frozen import frozen

from .settings import StaticLease

OFFER_SECONDS = 10.0  # that an address is kept for who it was offered to
DECLINE_SECONDS = 600.0  # that one is nobody's which somebody uses unasked


State = Literal["offered", "bound", "declined", "revoked"]


@frozen
class Lease:
    """One address that is not free, for people.

    `state`: "bound", somebody has it; "offered", somebody is to decide whether he wants it; "declined", it was found
    in use by somebody else; "revoked", who had it may use it still; "reserved", it is kept for somebody who does not
    have it.  `client_id` is DHCPv4's client identifier (the hardware's type and address if it sent none) or DHCPv6's
    DUID, in hexadecimal.  `hostname` is what the client calls itself, or is told to.  `seconds` are left; None: no
    end.
    """

    address: IPv4Address | IPv6Address
    state: Literal["offered", "bound", "declined", "revoked", "reserved"]
    client_id: str
    mac: str
    hostname: str
    seconds: int | None


class Client(NamedTuple):
    """Who asks.  `mac` is not what it is known by, but what a static lease may be for."""

    identifier: bytes
    mac: bytes
    association: bytes = b""  # DHCPv6's IAID

    @property
    def key(self) -> tuple[bytes, bytes]:
        """What it is known by."""
        return self.identifier, self.association


class Binding:
    """One address of one client."""

    __slots__ = ("address", "client", "hostname", "state", "until")

    def __init__(self, address: Address, client: Client, state: State, until: float, hostname: str) -> None:
        self.address = address
        self.client = client
        self.state = state
        self.until = until
        self.hostname = hostname


class Leases:
    """The table.  `pool` are the addresses for everybody, in the order in which they are given."""

    def __init__(self, pool: Sequence[Address], static: Iterable[StaticLease]) -> None:
        self._pool = dict.fromkeys(pool)
        self._static: dict[Address, StaticLease] = {}
        self._bindings: dict[Address, Binding] = {}
        self._of: dict[tuple[bytes, bytes], Binding] = {}
        for each in static:
            self.reserve(each)

    def choose(self, client: Client, wanted: Iterable[Address], now: float) -> Address | None:
        """The address for `client`: the one kept for it, the one it has or had, one that it wants, one that nobody
        has had, the one that nobody has had for longest.  None: all are taken.
        """
        candidates = chain(self._kept_for(client), self._had_by(client), wanted, self._by_age())
        return next((each for each in candidates if self._may_have(client, each, now)), None)

    def _kept_for(self, client: Client) -> list[Address]:
        return [each.address for each in self._static.values() if _is_for(each, client)]

    def _had_by(self, client: Client) -> Iterator[Address]:
        if client.key in self._of:
            yield self._of[client.key].address

    def _by_age(self) -> Iterator[Address]:
        bindings = self._bindings
        yield from sorted(
            self._pool, key=lambda each: bindings[each].until if each in bindings else -math.inf
        )

    def _may_have(self, client: Client, address: Address, now: float) -> bool:
        static = self._static.get(address)
        if not (address in self._pool if static is None else _is_for(static, client)):
            return False
        binding = self._bindings.get(address)
        return binding is None or binding.until <= now or self._of.get(client.key) is binding

    def offer(self, client: Client, address: Address, now: float) -> None:
        """Keep a chosen address for a while.  Nothing changes for who has it."""
        binding = self._of.get(client.key)
        if not (_is_bound(binding, now) and binding.address == address):
            self._put(Binding(address, client, "offered", now + OFFER_SECONDS, ""))

    def not_taken(self, client: Client, now: float) -> None:
        """What the client was offered it does not want."""
        binding = self._of.get(client.key)
        if binding is not None and binding.state == "offered":
            binding.until = min(binding.until, now)

    def grant(self, client: Client, address: Address, until: float, hostname: str) -> None:
        """A chosen address is the client's.  What else it had or was offered is not."""
        self._put(Binding(address, client, "bound", until, hostname))

    def renounce(self, client: Client, address: Address, now: float) -> bool:
        """The client does not have it, or will not any more; whether it had.  It is remembered."""
        binding = self._bindings.get(address)
        if binding is None or binding.client.key != client.key or binding.until <= now:
            return False
        if binding.state == "declined":
            return False
        binding.until = now
        return True

    def decline(self, client: Client, address: Address, now: float) -> bool:
        """The client has found it in use; whether it was the client's, who alone can say so."""
        binding = self._of.get(client.key)
        if binding is None or binding.address != address or binding.until <= now:
            return False
        self._put_aside(binding, "declined", now + DECLINE_SECONDS)
        return True

    def _put_aside(self, binding: Binding, state: State, until: float) -> None:
        binding.state, binding.until = state, until
        del self._of[binding.client.key]

    def _put(self, binding: Binding) -> None:
        address, key = binding.address, binding.client.key
        before = self._bindings.pop(address, None)
        if before is not None and self._of.get(before.client.key) is before:
            del self._of[before.client.key]
        other = self._of.pop(key, None)
        if other is not None:
            del self._bindings[other.address]
        self._bindings[address] = self._of[key] = binding  # the newest is the last

    # -- what people ask ------------------------------------------------------------------------------

    def reserve(self, static: StaticLease) -> None:
        """Keep an address for somebody.  Whoever else has it loses it when he renews."""
        self._static[static.address] = static

    def revoke(self, address: Address, now: float) -> bool:
        """Take it away from who has it or for whom it is kept; whether there was anybody.

        It is nobody's until its lease would have ended, or its client has been told.
        """
        static = self._static.pop(address, None)
        binding = self._bindings.get(address)
        alive = binding is not None and binding.until > now and self._of.get(binding.client.key) is binding
        if binding is not None and alive:
            self._put_aside(binding, "revoked", binding.until)
        return static is not None or alive

    def hostname(self, client: Client, address: Address) -> str:
        """The name that a static lease gives the client."""
        static = self._static.get(address)
        return (static.hostname or "") if static is not None and _is_for(static, client) else ""

    def newest(self, now: float, mac: bytes | None) -> Address | None:
        """The address granted last, to that link address if one is given."""
        for binding in reversed(self._bindings.values()):
            if _is_bound(binding, now) and (mac is None or binding.client.mac == mac):
                return binding.address
        return None

    def list(self, now: float) -> tuple[Lease, ...]:
        """What is not free, the oldest first; then what is kept for somebody who does not have it."""
        found = [
            Lease(
                each.address,
                each.state,
                each.client.identifier.hex(":"),
                each.client.mac.hex(":"),
                self.hostname(each.client, each.address) or each.hostname,
                None if each.until == math.inf else math.ceil(each.until - now),
            )
            for each in self._bindings.values()
            if each.until > now
        ]
        taken = {each.address for each in found}
        found += [
            Lease(each.address, "reserved", each.client_id or "", each.mac or "", each.hostname or "", None)
            for each in self._static.values()
            if each.address not in taken
        ]
        return tuple(found)


def _is_bound(binding: Binding | None, now: float) -> TypeGuard[Binding]:
    return binding is not None and binding.state == "bound" and binding.until > now


def _is_for(static: StaticLease, client: Client) -> bool:
    if static.mac is not None:
        return client.mac.hex(":") == static.mac
    return client.identifier.hex(":") == static.client_id
