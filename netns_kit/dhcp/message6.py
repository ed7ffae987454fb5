"""DHCPv6 messages (RFC 8415 8, 21).

`parse` reads what hostile clients send and raises `BadDhcpMessage` and nothing else; `Message6.pack` is its inverse.
Options are a list of codes and values in their order, because some occur more than once, and some hold others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv6Address
from struct import Struct
from typing import NamedTuple, TypeAlias

from netns_kit.frozen import frozen

from .errors import BadDhcpMessage

# types
SOLICIT, ADVERTISE, REQUEST, CONFIRM, RENEW, REBIND, REPLY, RELEASE, DECLINE = range(1, 10)
INFORMATION_REQUEST = 11

# options
CLIENT_ID, SERVER_ID, IA_NA, IA_TA, IA_ADDRESS, WANTED, PREFERENCE = 1, 2, 3, 4, 5, 6, 7
STATUS, RAPID_COMMIT, DNS, SEARCH, IA_PD, REFRESH_TIME, FQDN = 13, 14, 23, 24, 25, 32, 39
ASSOCIATIONS = frozenset({IA_NA, IA_TA, IA_PD})

# status codes
SUCCESS, NO_ADDRESSES, NO_BINDING, NOT_ON_LINK, USE_MULTICAST, NO_PREFIX = 0, 2, 3, 4, 5, 6

_DUID = range(3, 131)  # bytes: a type and something of up to 128 (11.1)
_OPTION = Struct("!HH")
_TIMES = Struct("!II")
_LIFETIMES = Struct("!16sII")
_HEADS = {IA_NA: 12, IA_TA: 4, IA_PD: 12}  # bytes of an association before its own options

Option: TypeAlias = tuple[int, bytes]


class Association(NamedTuple):
    """An identity association: one of a client's needs for an address, with the addresses it has or asks for.

    `code` is the option's: IA_NA, IA_TA or IA_PD.  The prefixes in the last are not read.
    """

    code: int
    iaid: bytes
    addresses: tuple[IPv6Address, ...]


@frozen
class Message6:
    """A message between client and server."""

    type: int
    xid: bytes
    options: list[Option]

    def get(self, code: int) -> bytes | None:
        """Return the value of an option that occurs once, None if it is absent."""
        return next((value for each, value in self.options if each == code), None)

    def duid(self, code: int) -> bytes | None:
        """Return the DUID in that option, None if it is absent.  Raises `BadDhcpMessage`."""
        value = self.get(code)
        if value is not None and len(value) not in _DUID:
            raise BadDhcpMessage("duid")
        return value

    def wanted(self) -> tuple[int, ...] | None:
        """Return the option codes that the client requests, None if it has no list.  Raises `BadDhcpMessage`."""
        value = self.get(WANTED)
        if value is None:
            return None
        if len(value) % 2:
            raise BadDhcpMessage("option-length")
        return tuple(int.from_bytes(value[at : at + 2], "big") for at in range(0, len(value), 2))

    def associations(self) -> list[Association]:
        """Return the identity associations of all three kinds.  Raises `BadDhcpMessage`."""
        return [_association(code, value) for code, value in self.options if code in ASSOCIATIONS]

    def pack(self) -> bytes:
        """Encode the message."""
        return bytes((self.type,)) + self.xid + pack_options(self.options)


def parse(data: bytes) -> Message6:
    """Decode a message.  Raises `BadDhcpMessage`, and nothing else."""
    if len(data) < 4:
        raise BadDhcpMessage("truncated")
    return Message6(data[0], data[1:4], list(_options(data[4:])))


def _options(data: bytes) -> Iterator[Option]:
    at = 0
    while at < len(data):
        if at + _OPTION.size > len(data):
            raise BadDhcpMessage("option-length")
        code, length = _OPTION.unpack_from(data, at)
        at += _OPTION.size
        if at + length > len(data):
            raise BadDhcpMessage("option-length")
        yield code, data[at : at + length]
        at += length


def _association(code: int, value: bytes) -> Association:
    head = _HEADS[code]
    if len(value) < head:
        raise BadDhcpMessage("option-length")
    addresses = []
    for each, inner in _options(value[head:]):
        if each == IA_ADDRESS:
            if len(inner) < _LIFETIMES.size:
                raise BadDhcpMessage("option-length")
            addresses.append(IPv6Address(inner[:16]))
    return Association(code, value[:4], tuple(addresses))


def pack_options(options: Iterable[Option]) -> bytes:
    """Encode options, one after the other."""
    return b"".join(_OPTION.pack(code, len(value)) + value for code, value in options)


def pack_association(
    association: Association, options: Iterable[Option], renewal: int = 0, rebinding: int = 0
) -> Option:
    """Make the answer to an association; times are seconds."""
    times = b"" if association.code == IA_TA else _TIMES.pack(renewal, rebinding)
    return association.code, association.iaid + times + pack_options(options)


def pack_address(address: IPv6Address, seconds: int) -> Option:
    """Make the option of an address, preferred and valid for so many seconds."""
    return IA_ADDRESS, _LIFETIMES.pack(address.packed, seconds, seconds)


def pack_status(code: int, text: str) -> Option:
    """Make a status option; the text is for people."""
    return STATUS, code.to_bytes(2, "big") + text.encode()
