"""DHCPv4 messages (RFC 2131 2, RFC 2132).

`parse` reads what hostile clients send and raises `BadDhcpMessage` and nothing else; `Message.pack` is its inverse.
Options are a dictionary of values by code.  An option in several pieces (RFC 3396), and options in the fields of boot
file and server name (overload, option 52), are joined when they are read and split when they are packed.

>>> discover = Message(op=REQUEST, xid=7, chaddr=bytes(6), options={TYPE: b"\\x01", CLIENT_ID: b"\\x01me"})
>>> parse(discover.pack()) == discover
True
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address
from struct import Struct

from netns_kit.frozen import field, frozen

from .errors import BadDhcpMessage

REQUEST, REPLY = 1, 2  # op
ETHERNET = 1  # htype
BROADCAST = 0x8000  # flags

# types, of option 53
DISCOVER, OFFER, REQUEST_ADDRESS, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)

# options
PAD, END = 0, 255
NETMASK, ROUTER, DNS, HOSTNAME, DOMAIN, MTU = 1, 3, 6, 12, 15, 26
ADDRESS, LEASE_TIME, OVERLOAD, TYPE, SERVER, WANTED, TEXT, MAX_SIZE = 50, 51, 52, 53, 54, 55, 56, 57
RENEWAL, REBINDING, CLIENT_ID, RAPID_COMMIT, RELAY, SEARCH, ROUTES = 58, 59, 61, 80, 82, 119, 121

NOWHERE = IPv4Address(0)
SMALLEST = 300  # bytes of a message that we send: BOOTP's, RFC 1542 2.1
MAX_MESSAGE = 576 - 28  # bytes that every client takes (RFC 2131 2), without the headers below
_MAGIC = 0x63825363
_FIXED = Struct("!BBBBIHH4s4s4s4s16s64s128sI")
_FILE, _SNAME = 1, 2  # bits of option 52: which fields hold options; read in this order (RFC 3396 5)
_LONGEST = 255


@frozen
class Message:
    """A message, its fields named as in RFC 2131; `options` are packed in their order."""

    op: int
    xid: int
    chaddr: bytes
    htype: int = ETHERNET
    flags: int = 0
    ciaddr: IPv4Address = NOWHERE
    yiaddr: IPv4Address = NOWHERE
    giaddr: IPv4Address = NOWHERE
    options: dict[int, bytes] = field(default_factory=dict)

    @property
    def type(self) -> int:
        """The DHCP message type, 0 for a BOOTP message.  Raises `BadDhcpMessage`."""
        return self.number(TYPE, 1) or 0

    def number(self, option: int, size: int) -> int | None:
        """Return an option that is a number of `size` bytes, None if it is absent.  Raises `BadDhcpMessage`."""
        value = self.options.get(option)
        if value is None:
            return None
        if len(value) != size:
            raise BadDhcpMessage("option-length")
        return int.from_bytes(value, "big")

    def address(self, option: int) -> IPv4Address | None:
        """Return an option that is an address, None if it is absent.  Raises `BadDhcpMessage`."""
        number = self.number(option, 4)
        return None if number is None else IPv4Address(number)

    def pack(self, most: int = MAX_MESSAGE) -> bytes:
        """Encode the message in at most `most` bytes, 548 or more, without the last options that do not fit."""
        fields, file, sname = _lay(self.options, most - _FIXED.size)
        fixed = _FIXED.pack(
            self.op, self.htype, len(self.chaddr), 0, self.xid, 0, self.flags, self.ciaddr.packed,
            self.yiaddr.packed, NOWHERE.packed, self.giaddr.packed, self.chaddr, sname, file, _MAGIC,
        )  # fmt: skip
        return (fixed + fields).ljust(SMALLEST, b"\0")


def _lay(options: Mapping[int, bytes], room: int) -> tuple[bytes, bytes, bytes]:
    """Lay options out: behind the fixed fields, in `room` bytes, and in the two fields that may hold options."""
    areas, rooms = [bytearray(), bytearray(), bytearray()], [room - 4, 128 - 1, 64 - 1]  # 52, and the ends
    for code, value in options.items():
        packed = b"".join(_pieces(code, value))
        for area, most in zip(areas, rooms, strict=True):
            if len(area) + len(packed) <= most:
                area += packed
                break
    fields, file, sname = areas
    overload = _FILE * bool(file) | _SNAME * bool(sname)
    if overload:
        fields += bytes((OVERLOAD, 1, overload))
    return tuple(bytes(area) + bytes((END,)) if area else b"" for area in (fields, file, sname))  # type: ignore[return-value]  # three


def _pieces(code: int, value: bytes) -> Iterator[bytes]:
    for at in range(0, len(value) or 1, _LONGEST):
        piece = value[at : at + _LONGEST]
        yield bytes((code, len(piece))) + piece


def parse(data: bytes) -> Message:
    """Decode a message.  Raises `BadDhcpMessage`, and nothing else."""
    if len(data) < _FIXED.size:
        raise BadDhcpMessage("truncated")
    op, htype, hlen, _, xid, _, flags, ciaddr, yiaddr, _, giaddr, chaddr, sname, file, magic = (
        _FIXED.unpack_from(data)
    )
    if magic != _MAGIC:
        raise BadDhcpMessage("magic")
    if hlen > len(chaddr):
        raise BadDhcpMessage("hardware-length")
    found: dict[int, bytearray] = {}
    _read(data[_FIXED.size :], found)
    overload = bytes(found.pop(OVERLOAD, b"\0"))
    if len(overload) != 1 or overload[0] > _FILE | _SNAME:
        raise BadDhcpMessage("overload")
    for bit, area in (_FILE, file), (_SNAME, sname):
        if overload[0] & bit:
            _read(area, found)
    found.pop(OVERLOAD, None)  # there it means nothing
    options = {code: bytes(value) for code, value in found.items()}
    client, yours, relay = map(IPv4Address, (ciaddr, yiaddr, giaddr))
    return Message(op, xid, chaddr[:hlen], htype, flags, client, yours, relay, options)


def _read(area: bytes, found: dict[int, bytearray]) -> None:
    """Add the options of `area` to `found`; several with the same code are pieces of one."""
    at, end = 0, len(area)
    while at < end:
        code = area[at]
        at += 1
        if code == PAD:
            continue
        if code == END:
            return
        if at == end or at + 1 + area[at] > end:
            raise BadDhcpMessage("option-length")
        found.setdefault(code, bytearray()).extend(area[at + 1 : at + 1 + area[at]])
        at += 1 + area[at]
