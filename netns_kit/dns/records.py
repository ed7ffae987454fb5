"""DNS records of names that we own.

A `Record` is compiled from text once, in the caller's process.  It carries the compiled bytes, so that the process
that answers queries, which may be in a sandbox, reads no text.  Types other than an address or a name are compiled by
dnslib, which is imported for the first of them.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.domain_names import to_text, to_wire
from netns_kit.errors import AddressError, ArgumentError, RecordError
from netns_kit.frozen import field, frozen

from . import hosts
from .message import TYPES, Rr

DEFAULT_TTL = 10  # seconds, so that a removed record is soon gone
TTL_MAX = 0x7FFFFFFF  # RFC 2181 section 8
RDATA_MAX = 0xFFFF

_ADDRESSES = {"A": IPv4Address, "AAAA": IPv6Address}
_NAMES = frozenset({"CNAME", "NS", "PTR"})


@frozen
class Record:
    """A DNS record of a name that we own.

    The reverse name of an address is answered too.  A CNAME may lead to a name of ours or of the world.

    Args:
        name: The domain name.  With `*` as its first label it stands for all names below that have no records.
        value: An address, or what a zone file has for a record of that `type` (RFC 1035 section 5.1) with complete
            names.
        type: The record's type, like "MX".  By default "A" or "AAAA", for an address.
        ttl: Seconds for which the record may be cached.
        wire: Type and data in hexadecimal digits as they are on the wire, by default compiled from `value`.

    Raises:
        DomainNameError: The name, or one that is the value, cannot be read.
        RecordError: There is no such record.
        ArgumentError: The TTL is out of range.
        ArgumentTypeError: An argument has another type.

    >>> Record("db.internal", "192.0.2.5")
    Record(name='db.internal', value='192.0.2.5', type='A', ttl=10)
    >>> str(Record("internal", "10 mail.internal", "MX"))
    'internal 10 MX 10 mail.internal'
    """

    name: str
    value: str
    type: str
    ttl: int
    wire: str = field(repr=False, compare=False)
    """Type and data as they are on the wire, in hexadecimal digits."""

    def __init__(
        self, name: str, value: AddressLike, type: str = "", ttl: int = DEFAULT_TTL, wire: str = ""
    ) -> None:
        wire_name = to_wire(name)
        arguments.text("type", type, "the type of a record, like 'A'")
        arguments.whole_number("ttl", ttl, 0, TTL_MAX)
        arguments.text("wire", wire)
        address = _address(value)
        type = type.upper() or ("AAAA" if isinstance(address, IPv6Address) else "A")
        name, value = to_text(wire_name).lower(), as_text(value)
        wire = wire or _compiled(name, type, value, address).hex()
        arguments.fill(self, locals())

    @classmethod
    def parse(cls, text: str) -> Record:
        """Return the record that NAME=ADDRESS means.

        Args:
            text: A name, an equals sign and an address.

        Raises:
            RecordError: The text has another form.
            DomainNameError: The name cannot be read.
            ArgumentTypeError: The argument is no text.
        """
        arguments.text("record", text, "NAME=ADDRESS or a Record")
        name, _, address = text.partition("=")
        if not name or _address(address) is None:
            raise RecordError("expected NAME=ADDRESS", "record", arguments.shown(text))
        return cls(name, address)

    @classmethod
    def from_hosts(cls, text: str) -> tuple[Record, ...]:
        """Return the records of a hosts file, see hosts(5); invalid lines are left out.

        Args:
            text: The contents of the file.
        """
        made = []
        for entry in hosts.parse(text):
            for name in entry.names:
                try:
                    made.append(cls(name, str(entry.address)))
                except ArgumentError:
                    continue
        return tuple(made)

    def __str__(self) -> str:
        return f"{self.name} {self.ttl} {self.type} {self.value}"


def as_rr(record: Record, owner: bytes) -> Rr:
    """Return the record as it is in a message, for the name `owner`."""
    wire = bytes.fromhex(record.wire)
    return Rr(owner, int.from_bytes(wire[:2], "big"), record.ttl, wire[2:])


def prepare() -> None:
    """Import now what any record or name may need, in a process that cannot import later."""
    Record("prepar\N{LATIN SMALL LETTER E WITH ACUTE}", "0 prepared", "MX")


def as_text(value: AddressLike) -> str:
    """Return a record's value as `Record.value` has it.

    Raises `ArgumentTypeError` unless it is text or an address.
    """
    address = _address(value)
    return str(value if address is None else address)


def _address(value: AddressLike) -> Address | None:
    try:
        address = arguments.address(value, "value")
    except AddressError:
        return None
    return None if isinstance(address, IPv6Address) and address.scope_id else address


def _compiled(name: str, kind: str, value: str, address: Address | None) -> bytes:
    """Return a record's type and data as they are on the wire."""
    if kind in _ADDRESSES:
        if not isinstance(address, _ADDRESSES[kind]):
            raise _no_record(name, kind, value, "an address of that type")
        return TYPES[kind].to_bytes(2, "big") + address.packed
    if kind in _NAMES:
        return TYPES[kind].to_bytes(2, "big") + to_wire(value, "value")
    if "\n" in value or not kind.isalnum():
        raise _no_record(name, kind, value)
    from dnslib import RR, DNSBuffer

    try:
        (made,) = RR.fromZone(f"name. 0 IN {kind} {value}")
        buffer = DNSBuffer()
        made.rdata.pack(buffer)
        data = bytes(buffer.data)
        packed: bytes = made.rtype.to_bytes(2, "big") + data
    except Exception as error:  # dnslib raises what it likes
        raise _no_record(name, kind, value, f"a record of a zone file ({error})") from error
    if len(data) > RDATA_MAX:
        raise _no_record(name, kind, value, f"data of at most {RDATA_MAX} bytes")
    return packed


def _no_record(name: str, kind: str, value: str, expected: str = "a record of a zone file") -> RecordError:
    return RecordError(f"expected {expected}", "value", f"{name} {kind} {arguments.shown(value)}")
