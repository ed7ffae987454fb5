"""Names we own: who may ask for them is not asked, and nobody else is asked about them.

A name is ours if it has a record, if it lies in a domain that is all ours, or if it is the reverse name of an address
within our networks.  What is ours and has no record of the type asked for has none at all; what is not ours is
declined, and somebody else answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address
from itertools import islice
from typing import NamedTuple

from netns_kit.operations import operation, same

from .message import ANY, ANY_CLASS, CNAME, IN, NXDOMAIN, PTR, Rr
from .names import address_of, suffixes, to_wire
from .records import Record, as_rr

_ANYTHING = b"\1*"


class Owned(NamedTuple):
    """One record, as it lies in a message; whose it is."""

    rr: Rr
    record: Record


class Found(NamedTuple):
    """What is known of a name.  `alias` is where a CNAME among the records leads, if that was not asked for."""

    rcode: int
    records: tuple[Rr, ...]
    alias: bytes = b""


class Zone:
    """The names that are ours.

    `domains`: nothing in these is anybody else's.  `networks`: nor are the names of addresses in these.

    >>> zone = Zone(domains=["internal"])
    >>> zone.add(Record("db.internal", "192.0.2.5"))
    >>> question = to_wire("DB.internal") + bytes.fromhex("0001 0001")
    >>> zone.find(question).records[0].data.hex()
    'c0000205'
    >>> zone.find(to_wire("db.internal") + bytes.fromhex("001c 0001"))
    Found(rcode=0, records=(), alias=b'')
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

    @operation(same)
    def add(self, record: Record) -> None:
        """Own the record's name from now on.  Again is fine, and its TTL is then the new one."""
        self.remove(record.name, record.type, record.value)
        self._records[record] = None
        for name, owned in _entries(record):
            self._names.setdefault(name, []).append(owned)

    @operation(same)
    def remove(self, name: str, kind: str = "", value: str = "") -> int:
        """Forget what is said of `name`, all or only of that type and value; how many records that was.

        Raises `RecordError` for what is no name.
        """
        wanted = to_wire(name).lower()
        gone = [
            each
            for each in self._records
            if to_wire(each.name) == wanted and kind.upper() in ("", each.type) and value in ("", each.value)
        ]
        for record in gone:
            del self._records[record]
            for each, _ in _entries(record):
                self._names[each] = [owned for owned in self._names[each] if owned.record != record]
                if not self._names[each]:
                    del self._names[each]
        return len(gone)

    @operation()
    def records(self) -> tuple[Record, ...]:
        """What was added, oldest first."""
        return tuple(self._records)

    def name_of(self, address: bytes) -> bytes | None:
        """The name of a packed address, if it is ours: the first that was given to it."""
        owned = self._names.get(to_wire(ip_address(address).reverse_pointer))
        return owned[0].rr.data if owned else None

    def find(self, question: bytes) -> Found | None:
        """What is known of the name in a question; None: it is not ours."""
        asked = question[:-4]
        kind, kind_of_class = int.from_bytes(question[-4:-2], "big"), int.from_bytes(question[-2:], "big")
        if kind_of_class not in (IN, ANY_CLASS):
            return None
        name = asked.lower()
        known = self._names.get(name)
        if known is None:
            for suffix in islice(suffixes(name), 1, None):
                known = self._names.get(_ANYTHING + suffix)
                if known is not None:
                    break
            else:
                return self._unknown(name)
        records = tuple(
            owned.rr._replace(owner=asked) for owned in known if owned.rr.kind in (kind, CNAME) or kind == ANY
        )
        if records and kind not in (CNAME, ANY) and records[0].kind == CNAME:
            return Found(0, records[:1], records[0].data)
        return Found(0, records)

    def _unknown(self, name: bytes) -> Found | None:
        if name in self._domains:
            return Found(0, ())
        if self._domains and any(suffix in self._domains for suffix in suffixes(name)):
            return Found(NXDOMAIN, ())
        address = address_of(name)
        if address is not None and any(address in network for network in self._networks):
            return Found(NXDOMAIN, ())
        return None


def _entries(record: Record) -> Iterator[tuple[bytes, Owned]]:
    """What `record` says, and of an address its name in return."""
    name = to_wire(record.name)
    rr = as_rr(record, name)
    yield name, Owned(rr, record)
    if record.type in ("A", "AAAA") and not name.startswith(_ANYTHING):
        reverse = to_wire(ip_address(rr.data).reverse_pointer)
        yield reverse, Owned(Rr(reverse, PTR, record.ttl, name), record)
