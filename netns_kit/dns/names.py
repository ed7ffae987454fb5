"""Domain names, as people write them and as they lie on the wire (RFC 1035 section 3.1).

On the wire a name is its labels, each behind its length, to the empty one of the root; here never compressed.  The
same without regard to case (RFC 4343) is the same after `bytes.lower`: no length is a letter.

>>> to_wire("db.Internal")
b'\\x02db\\x08Internal\\x00'
>>> to_text(b"\\x02db\\x03a.b\\x00")
'db.a\\\\.b'
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

from netns_kit import arguments
from netns_kit.errors import RecordError

NAME_MAX = 255  # RFC 1035 section 2.3.4, length octets and the root's included
LABEL_MAX = 63  # above: a compression pointer, or a reserved type

_REVERSE_4 = b"\7in-addr\4arpa\0"
_REVERSE_6 = b"\3ip6\4arpa\0"
_NIBBLES = 32


def to_wire(name: str) -> bytes:
    """The name that `name` spells, a dot at its end or not; what is not ASCII as IDNA has it.

    Raises `RecordError` for an empty or too long label or name, spaces, control characters and backslashes;
    `ArgumentTypeError` for what is no text.
    """
    arguments.text("name", name, "a domain name")
    text = name.removesuffix(".")
    wire = b""
    for label in text.split(".") if text else ():
        try:
            encoded = label.encode("ascii" if label.isascii() else "idna")
        except UnicodeError:
            encoded = b""
        if not 0 < len(encoded) <= LABEL_MAX or any(each <= 32 or each in b"\\\x7f" for each in encoded):
            raise RecordError(f"{name!r} is no domain name")
        wire += bytes((len(encoded),)) + encoded
    if len(wire) >= NAME_MAX:
        raise RecordError(f"{name!r} is too long for a domain name")
    return wire + b"\0"


def labels(wire: bytes) -> Iterator[bytes]:
    """The labels of a name, the root's left out."""
    at = 0
    while length := wire[at]:
        yield wire[at + 1 : at + 1 + length]
        at += 1 + length


def suffixes(wire: bytes) -> Iterator[bytes]:
    """The name, what it lies in, and so on, up to the root, which is left out."""
    at = 0
    while length := wire[at]:
        yield wire[at:]
        at += 1 + length


def to_text(wire: bytes) -> str:
    r"""The name as a zone file has it, without a dot at its end; "." is the root.

    No two names are the same text: a dot in a label is `\.`, and what is no visible ASCII `\DDD`.
    """
    return ".".join("".join(map(_shown, label)) for label in labels(wire)) or "."


def _shown(octet: int) -> str:
    if octet in b".\\":
        return "\\" + chr(octet)
    return chr(octet) if 32 < octet < 127 else f"\\{octet:03}"


def address_of(wire: bytes) -> IPv4Address | IPv6Address | None:
    """The address whose reverse name this is (RFC 1035 section 3.5, RFC 3596 section 2.5); None: of no one."""
    name = wire.lower()
    try:
        if name.endswith(_REVERSE_4):
            *parts, _, _ = labels(name)
            return IPv4Address(b".".join(reversed(parts)).decode())
        if name.endswith(_REVERSE_6):
            *parts, _, _ = labels(name)
            digits = b"".join(reversed(parts)).decode()
            if len(parts) == len(digits) == _NIBBLES and digits.isalnum():
                return IPv6Address(int(digits, 16))
    except ValueError:
        pass
    return None
