"""The zone: names that we own, which no resolver is asked about.

A name is ours if it has a record, if it is in a domain that is entirely ours, or if it is the reverse name of an
address in our networks.  If one of our names has no record of the type asked for, it has none at all.  Any other name
is declined, and a resolver is asked.

The addresses of a name take turns in being the first of an answer (RFC 1794).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from itertools import islice
from typing import NamedTuple

from netns_kit.domain_names import address_of, suffixes, to_wire
from netns_kit.operations import operation, same

from .message import ADDRESSES, ANY, ANY_CLASS, CNAME, IN, NXDOMAIN, PTR, Rr
from .records import Record, as_rr

ANYTHING = b"\1*"


class Owned(NamedTuple):
    """A record as it is in a message, and the `Record` that it was made of."""

    rr: Rr
    record: Record


class Lookup(NamedTuple):
    """The zone's answer for a name.  `alias`: the target of a CNAME, if another type was asked for."""

    rcode: int
    records: tuple[Rr, ...]
    alias: bytes = b""


class Zone:
    """The names that are ours.

    `domains`: all names in these are ours.  `networks`: so are the reverse names of all addresses in these.

    >>> zone = Zone(domains=["internal"])
    >>> zone.add(Record("db.internal", "192.0.2.5"))
    >>> question = to_wire("DB.internal") + bytes.fromhex("0001 0001")
    >>> zone.find(question).records[0].data.hex()
    'c0000205'
    >>> zone.find(to_wire("db.internal") + bytes.fromhex("001c 0001"))
    Lookup(rcode=0, records=(), alias=b'')
    >>> zone.find(to_wire("other.internal") + bytes.fromhex("0001 0001")).rcode
    3
    >>> zone.find(to_wire("example.com") + bytes.fromhex("0001 0001")) is None
    True
    """

    def __init__(
        self, *, domains: Iterable[str] = (), networks: Iterable[IPv4Network | IPv6Network] = ()
    ) -> None:
        self._domains = {to_wire(domain).lower() for domain in domains}
        self._networks = tuple(networks)
        self._names: dict[bytes, list[Owned]] = {}
        self._records: dict[Record, None] = {}
        self._by_address: dict[bytes, list[bytes]] = {}
        self._shown: dict[bytes, Zone] = {}  # by the packed address of a client

    @operation(same)
    def add(self, record: Record) -> None:
        """Add a record.  It replaces an equal one, whose TTL may differ."""
        self.remove(record.name, record.type, record.value)
        self._records[record] = None
        for name, owned in _entries(record):
            self._names.setdefault(name, []).append(owned)
        for name, address in _addressed(record):
            self._by_address.setdefault(address, []).append(name)

    @operation(same)
    def remove(self, name: str, kind: str = "", value: str = "") -> int:
        """Remove the records of a name, all or only those of that type and value; return how many there were.

        Raises `DomainNameError` for what is no name.
        """
        wanted = to_wire(name).lower()
        gone = {
            each.record: None
            for each in self._names.get(wanted, ())
            if to_wire(each.record.name) == wanted  # it is none of a reverse name
            and kind.upper() in ("", each.record.type)
            and value in ("", each.record.value)
        }
        for record in gone:
            del self._records[record]
            for each, _ in _entries(record):
                self._names[each] = [owned for owned in self._names[each] if owned.record != record]
                if not self._names[each]:
                    del self._names[each]
            for alias, address in _addressed(record):
                self._by_address[address].remove(alias)
                if not self._by_address[address]:
                    del self._by_address[address]
        return len(gone)

    @operation()
    def records(self) -> tuple[Record, ...]:
        """Return the records that were added, oldest first."""
        return tuple(self._records)

    @operation(same)
    def show(self, clients: tuple[IPv4Address | IPv6Address, ...], records: tuple[Record, ...]) -> None:
        """Answer the clients with these addresses by records that nobody else has, in place of those shown before.

        What the zone knows itself comes first.
        """
        shown = Zone()
        for record in records:
            shown.add(record)
        for client in clients:
            if records:
                self._shown[client.packed] = shown
            else:
                self._shown.pop(client.packed, None)

    def name_of(self, address: bytes) -> bytes | None:
        """Return the first name that was given to a packed address, None if it has none."""
        owned = self._names.get(to_wire(ip_address(address).reverse_pointer))
        return owned[0].rr.data if owned else None

    def names_of(self, address: bytes) -> tuple[bytes, ...]:
        """Return all names that our records give to a packed address, but for wildcards."""
        return tuple(self._by_address.get(address, ()))

    def find(self, question: bytes, client: bytes = b"") -> Lookup | None:
        """Return the answer for the name in a question of the client with that address, None if it is not ours."""
        asked = question[:-4]
        kind, kind_of_class = int.from_bytes(question[-4:-2], "big"), int.from_bytes(question[-2:], "big")
        if kind_of_class not in (IN, ANY_CLASS):
            return None
        name = asked.lower()
        known = self._names.get(name)
        if known is None:
            for suffix in islice(suffixes(name), 1, None):
                known = self._names.get(ANYTHING + suffix)
                if known is not None:
                    break
            else:
                shown = self._shown.get(client)
                found = None if shown is None else shown.find(question)
                return self._unknown(name) if found is None else found
        records = tuple(
            owned.rr._replace(owner=asked) for owned in known if owned.rr.kind in (kind, CNAME) or kind == ANY
        )
        if records and kind not in (CNAME, ANY) and records[0].kind == CNAME:
            return Lookup(0, records[:1], records[0].data)
        if len(records) > 1 and kind in ADDRESSES:  # who takes the first shall not always get the same
            first = next(owned for owned in known if owned.rr.kind == kind)
            known.remove(first)
            known.append(first)
        return Lookup(0, records)

    def _unknown(self, name: bytes) -> Lookup | None:
        if name in self._domains:
            return Lookup(0, ())
        if self._domains and any(suffix in self._domains for suffix in suffixes(name)):
            return Lookup(NXDOMAIN, ())
        address = address_of(name)
        if address is not None and any(address in network for network in self._networks):
            return Lookup(NXDOMAIN, ())
        return None


def _addressed(record: Record) -> Iterator[tuple[bytes, bytes]]:
    """Yield the name, in lower case, and the packed address of a record that gives a name an address."""
    name = to_wire(record.name).lower()
    if record.type in ("A", "AAAA") and not name.startswith(ANYTHING):
        yield name, as_rr(record, name).data


def _entries(record: Record) -> Iterator[tuple[bytes, Owned]]:
    """Yield the names and records that a record makes: itself, and the reverse of an address."""
    name = to_wire(record.name)
    rr = as_rr(record, name)
    yield name, Owned(rr, record)
    if record.type in ("A", "AAAA") and not name.startswith(ANYTHING):
        reverse = to_wire(ip_address(rr.data).reverse_pointer)
        yield reverse, Owned(Rr(reverse, PTR, record.ttl, name), record)
