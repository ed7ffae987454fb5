"""The table of leases: which client has which address, and until when.

Words.  A *client* is an identifier, and for DHCPv6 also one of its identity associations.  Its *binding* is the one
address that it is offered or has.  A *static* lease is reserved for one client, whether that has it at the moment or
not.

    (nothing) --offer--> offered --grant--> bound --release, or time--> past
                                              +---- decline --> declined --time--> past
                                              +---- revoke ---> revoked --time, or its client knows--> past

The table has at most one entry for each address, so the pool and the static leases bound it: a flood of clients gets
the free addresses and makes the table no larger.  A past binding is kept until another client gets the address, so
that its client gets the same address again.  No timer is needed: each call is given the time and compares.

A declined address is in use by somebody who was not given it, and a revoked one may still be in use by its former
client.  Neither is given to anybody for a time.
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

OFFER_SECONDS = 10.0  # for which an offered address is kept for its client
DECLINE_SECONDS = 600.0  # for which a declined address is given to nobody

State = Literal["offered", "bound", "declined", "revoked"]


@frozen
class Lease:
    """An address that is not free, and the client it belongs to."""

    address: IPv4Address | IPv6Address
    """The address."""
    state: Literal["offered", "bound", "declined", "revoked", "reserved"]
    """State of the lease: the client has the address ("bound"), has not answered the offer yet ("offered"), found the
    address in use by somebody else ("declined"), may still use it after it was taken away ("revoked"), or does not
    have it though it is kept for it ("reserved")."""
    client_id: str
    """DHCPv4's client identifier (hardware type and address if the client sent none), or DHCPv6's DUID, in
    hexadecimal digits."""
    mac: str
    """The client's MAC address, "" if it is not known."""
    hostname: str
    """The name that a static lease gives the client, else the client's own name for itself, else ""."""
    seconds: int | None
    """Seconds that are left; None if the lease does not end."""


class Client(NamedTuple):
    """A client, known by its identifier and association.  A static lease may also be for its `mac`."""

    identifier: bytes
    mac: bytes
    association: bytes = b""  # DHCPv6's IAID

    @property
    def key(self) -> tuple[bytes, bytes]:
        """The key of the client in the table."""
        return self.identifier, self.association


class Binding:
    """An address of one client."""

    __slots__ = ("address", "client", "hostname", "state", "until")

    def __init__(self, address: Address, client: Client, state: State, until: float, hostname: str) -> None:
        self.address = address
        self.client = client
        self.state = state
        self.until = until
        self.hostname = hostname


class Leases:
    """The table of one subnet's leases.  `pool` has the addresses for any client, in the order of assignment."""

    def __init__(self, pool: Sequence[Address], static: Iterable[StaticLease]) -> None:
        self._pool = dict.fromkeys(pool)
        self._static: dict[Address, StaticLease] = {}
        self._bindings: dict[Address, Binding] = {}
        self._of: dict[tuple[bytes, bytes], Binding] = {}
        for each in static:
            self.reserve(each)

    def choose(self, client: Client, wanted: Iterable[Address], now: float) -> Address | None:
        """Return an address for the client, None if all are taken.

        In this order: the one reserved for it; the one it has or had; one that it asks for; one that nobody has had;
        the one that has been free for longest.
        """
        kept = (each.address for each in self._static.values() if _is_for(each, client))
        had = self._of.get(client.key)
        candidates = chain(kept, () if had is None else (had.address,), wanted, self._by_age())
        return next((each for each in candidates if self._may_have(client, each, now)), None)

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
        """Keep a chosen address for the client for a while.  A client that has it already is not affected."""
        binding = self._of.get(client.key)
        if not (_is_bound(binding, now) and binding.address == address):
            self._put(Binding(address, client, "offered", now + OFFER_SECONDS, ""))

    def not_taken(self, client: Client, now: float) -> None:
        """Withdraw the client's offer: it has taken another server's."""
        binding = self._of.get(client.key)
        if binding is not None and binding.state == "offered":
            binding.until = min(binding.until, now)

    def grant(self, client: Client, address: Address, until: float, hostname: str) -> None:
        """Give a chosen address to the client, in place of whatever it had or was offered."""
        self._put(Binding(address, client, "bound", until, hostname))

    def renounce(self, client: Client, address: Address, now: float) -> bool:
        """End the client's binding of an address, and remember it; return whether the client had it."""
        binding = self._bindings.get(address)
        if binding is None or binding.client.key != client.key or binding.until <= now:
            return False
        if binding.state == "declined":
            return False
        binding.until = now
        return True

    def decline(self, client: Client, address: Address, now: float) -> bool:
        """Set an address aside that its client has found in use; return False if it is not that client's."""
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

    # -- calls by the owner of the namespace ------------------------------------------------------------

    def reserve(self, static: StaticLease) -> None:
        """Reserve an address for a client.  Another client that has it loses it at its next renewal."""
        self._static[static.address] = static

    def revoke(self, address: Address, now: float) -> bool:
        """Take an address away from its client and end its reservation; return whether it had any of the two.

        Nobody gets it until its lease would have ended, or its client has learnt of it.
        """
        static = self._static.pop(address, None)
        binding = self._bindings.get(address)
        alive = binding is not None and binding.until > now and self._of.get(binding.client.key) is binding
        if binding is not None and alive:
            self._put_aside(binding, "revoked", binding.until)
        return static is not None or alive

    def hostname(self, client: Client, address: Address) -> str:
        """Return the name that a static lease gives the client, "" if none does."""
        static = self._static.get(address)
        return (static.hostname or "") if static is not None and _is_for(static, client) else ""

    def newest(self, now: float, mac: bytes | None) -> Address | None:
        """Return the bound address that was granted last, to that link address if one is given; None if none was."""
        for binding in reversed(self._bindings.values()):
            if _is_bound(binding, now) and (mac is None or binding.client.mac == mac):
                return binding.address
        return None

    def list(self, now: float) -> tuple[Lease, ...]:
        """Return the leases that are not free, oldest first, and then the reservations that no client has taken."""
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
