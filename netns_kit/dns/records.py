"""Records: what is said of a name that is ours.

A `Record` is made from text, once, where its owner is: the bytes it stands for go along with it, so that whoever
answers queries, in a sandbox perhaps, reads no text.  Types that are more than an address or a name are made by
dnslib, which is imported for the first of them.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.errors import AddressError, RecordError
from netns_kit.frozen import field, frozen

from . import hosts
from .message import TYPES, Rr
from .names import to_text, to_wire

DEFAULT_TTL = 10  # seconds: whoever removes a record wants to see it gone
TTL_MAX = 0x7FFFFFFF  # RFC 2181 section 8
RDATA_MAX = 0xFFFF

_ADDRESSES = {"A": IPv4Address, "AAAA": IPv6Address}
_NAMES = frozenset({"CNAME", "NS", "PTR"})


@frozen
class Record:
    """What we say of a name.

    `name`: with `*` for its first label, it stands for all names below that have no records of their own.
    `value`: an address, as text or not, or what a zone file has for a record of that `type` (RFC 1035 section 5.1),
    names in it being whole.  `type`: "A" or "AAAA" for an address, if not given.  `ttl`: seconds that it may be kept.

    An address is given its name back: queries for the reverse name are answered too.  A CNAME leads on, to a name of
    ours or of the world.  Raises `RecordError` for what makes no sense, `ArgumentTypeError` for what has no such
    type.

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
    """Type and data as they lie in a message, in hexadecimal digits."""

    def __init__(
        self, name: str, value: AddressLike, type: str = "", ttl: int = DEFAULT_TTL, wire: str = ""
    ) -> None:
        wire_name = to_wire(name)
        arguments.text("type", type, "the type of a record, like 'A'")
        arguments.instance("ttl", ttl, int, "a whole number of seconds")
        arguments.text("wire", wire)
        if not 0 <= ttl <= TTL_MAX:
            raise RecordError(f"{name}: expected a TTL of 0 to {TTL_MAX} seconds, not {ttl!r}")
        address = _address(value)
        kind = type.upper() or ("AAAA" if isinstance(address, IPv6Address) else "A")
        name, value = to_text(wire_name).lower(), as_text(value)
        arguments.fill(
            self,
            name=name,
            value=value,
            type=kind,
            ttl=ttl,
            wire=wire or _compiled(name, kind, value, address).hex(),
        )

    @classmethod
    def parse(cls, text: str) -> Record:
        """Return the record that NAME=ADDRESS means.  Raises `RecordError`, for no text `ArgumentTypeError`."""
        arguments.text("record", text, "NAME=ADDRESS or a Record")
        name, _, address = text.partition("=")
        if not name or _address(address) is None:
            raise RecordError(f"{text!r}: expected NAME=ADDRESS")
        return cls(name, address)

    @classmethod
    def from_hosts(cls, text: str) -> tuple[Record, ...]:
        """The names and addresses of a hosts file's text, see hosts(5); what makes no sense there is left out."""
        made = []
        for entry in hosts.parse(text):
            for name in entry.names:
                try:
                    made.append(cls(name, str(entry.address)))
                except RecordError:
                    continue
        return tuple(made)

    def __str__(self) -> str:
        return f"{self.name} {self.ttl} {self.type} {self.value}"


def as_rr(record: Record, owner: bytes) -> Rr:
    """Return `record` as one of the name `owner` that lies in a message."""
    wire = bytes.fromhex(record.wire)
    return Rr(owner, int.from_bytes(wire[:2], "big"), record.ttl, wire[2:])


def prepare() -> None:
    """Import now what records of any type take, and names in any script, for a process that will not be able to."""
    Record("prepar\N{LATIN SMALL LETTER E WITH ACUTE}", "0 prepared", "MX")


def as_text(value: AddressLike) -> str:
    """Return a record's value as `Record.value` has it.  Raises `ArgumentTypeError` for what is neither text nor
    address.
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
    """Type and data on the wire."""
    if kind in _ADDRESSES:
        if not isinstance(address, _ADDRESSES[kind]):
            raise RecordError(f"{name}: {value!r} is no {kind}: expected an address")
        return TYPES[kind].to_bytes(2, "big") + address.packed
    if kind in _NAMES:
        return TYPES[kind].to_bytes(2, "big") + to_wire(value)
    if "\n" in value or not kind.isalnum():
        raise RecordError(f"{name}: {kind} {value!r} is no record of a zone file")
    from dnslib import RR, DNSBuffer

    try:
        (made,) = RR.fromZone(f"name. 0 IN {kind} {value}")
        buffer = DNSBuffer()
        made.rdata.pack(buffer)
        data = bytes(buffer.data)
        if len(data) > RDATA_MAX:
            raise ValueError("too long")
        packed: bytes = made.rtype.to_bytes(2, "big") + data
    except Exception as error:  # dnslib raises what it likes
        raise RecordError(f"{name}: {kind} {value!r} is no record of a zone file: {error}") from error
    return packed
