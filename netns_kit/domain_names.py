"""Domain names as text and on the wire (RFC 1035 section 3.1): the only code that checks or encodes one.

On the wire a name is its labels, each behind its length, up to the empty label of the root; it is never compressed
here, but for `pack_compressed`.  Two names that differ only in letter case are the same (RFC 4343), so they are equal
after `bytes.lower`: no length byte is a letter.

Two kinds of name are told apart:

- A *domain name* is whatever DNS carries: any bytes in up to 63 per label.  `to_wire` reads it from text, `to_text`
  shows it.
- A *host name* has only letters, digits, hyphens and underscores in its labels, so a program inside may print it or
  put it into a command.  `check_host_name` holds what a caller gives to that, `read_host_name` what a client sends.

>>> to_wire("db.Internal")
b'\\x02db\\x08Internal\\x00'
>>> to_text(b"\\x02db\\x03a.b\\x00")
'db.a\\\\.b'
>>> pack_compressed(["eng.example.com", "example.com"]).hex()
'03656e67076578616d706c6503636f6d00c004'
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address

from . import arguments
from .errors import DomainNameError

NAME_MAX = 255  # RFC 1035 section 2.3.4, length bytes and the root's included
LABEL_MAX = 63  # a larger length byte is a compression pointer, or of a reserved type
POINTER = 0xC000  # the two high bits of a compression pointer (RFC 1035 section 4.1.4)
EXPECTED = f"expected a domain name of at most {NAME_MAX - 2} bytes, in labels of 1 to {LABEL_MAX}"

_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_REVERSE_4 = b"\7in-addr\4arpa\0"
_REVERSE_6 = b"\3ip6\4arpa\0"
_NIBBLES = 32


def to_wire(name: str, argument: str = "name") -> bytes:
    """Encode a domain name, with or without a dot at its end; labels that are not ASCII are encoded by IDNA.

    Raises `DomainNameError` for an empty or too long label, a name that is too long, and for spaces, control
    characters and backslashes; `ArgumentTypeError` for what is not text.  `argument` is what the error calls it.
    """
    arguments.text(argument, name, "a domain name")
    text = name.removesuffix(".")
    wire = b""
    for label in text.split(".") if text else ():
        try:
            encoded = label.encode("ascii" if label.isascii() else "idna")
        except UnicodeError:
            encoded = b""
        if not 0 < len(encoded) <= LABEL_MAX or any(each <= 32 or each in b"\\\x7f" for each in encoded):
            raise DomainNameError(EXPECTED, argument, arguments.shown(name))
        wire += bytes((len(encoded),)) + encoded
    if len(wire) >= NAME_MAX:
        raise DomainNameError(EXPECTED, argument, arguments.shown(name))
    return wire + b"\0"


def labels(wire: bytes) -> Iterator[bytes]:
    """Yield the labels of a name without the root's."""
    at = 0
    while length := wire[at]:
        yield wire[at + 1 : at + 1 + length]
        at += 1 + length


def suffixes(wire: bytes) -> Iterator[bytes]:
    """Yield the name, its parent domain, and so on; the root is left out."""
    at = 0
    while length := wire[at]:
        yield wire[at:]
        at += 1 + length


def to_text(wire: bytes) -> str:
    r"""Return the name as a zone file has it, without a dot at its end; "." is the root.

    Two different names never have the same text: a dot in a label is `\.`, and a byte that is no visible ASCII
    `\DDD`.
    """
    return ".".join("".join(map(_shown, label)) for label in labels(wire)) or "."


def _shown(octet: int) -> str:
    if octet in b".\\":
        return "\\" + chr(octet)
    return chr(octet) if 32 < octet < 127 else f"\\{octet:03}"


def address_of(wire: bytes) -> IPv4Address | IPv6Address | None:
    """Return the address whose reverse name this is (RFC 1035 section 3.5, RFC 3596 section 2.5), else None."""
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


# -- host names -------------------------------------------------------------------------------------------


def is_host_name(text: str) -> bool:
    """Return whether the text is a host name, without a dot at its end."""
    return len(text) <= NAME_MAX - 2 and all(map(_LABEL.fullmatch, text.split(".")))


def check_host_name(given: str, argument: str) -> str:
    """Return a host name without the dot at its end.

    Raises `DomainNameError` for text that is not a host name, `ArgumentTypeError` for what is not text.
    """
    arguments.text(argument, given, "a domain name")
    name = given.removesuffix(".")
    if not is_host_name(name):
        raise DomainNameError(
            "expected a domain name", argument, arguments.shown(given),
            f"write labels of 1 to {LABEL_MAX} letters, digits and hyphens, with dots between",
        )  # fmt: skip
    return name


def search_list(given: Iterable[str] | None) -> tuple[str, ...] | None:
    """Return the search domains of a setting that is called so; None stays None.

    Raises as `check_host_name` does, and `ArgumentTypeError` for what is not a list.
    """
    if given is None:
        return None
    arguments.items("search", given, "a list of domains, or None")
    return tuple(check_host_name(each, "search") for each in given)


def read_host_name(data: bytes) -> str:
    """Return the one host name of a DHCP option, which may end without the root (RFC 4704 4.2).

    Returns an empty string, and never raises, for bytes that are anything else.
    """
    found = []
    at = 0
    while at < len(data) and data[at]:
        label = data[at + 1 : at + 1 + data[at]]
        if len(label) != data[at]:
            return ""
        found.append(label.decode("latin-1"))
        at += 1 + data[at]
    name = ".".join(found)
    return name if at >= len(data) - 1 and is_host_name(name) else ""


def pack_compressed(names: Iterable[str]) -> bytes:
    """Encode a list of host names, each as short as the names before it allow (RFC 3397 section 2)."""
    packed = bytearray()
    at: dict[bytes, int] = {}
    for name in names:
        for suffix in suffixes(to_wire(name.lower())):
            if suffix in at:
                packed += (POINTER | at[suffix]).to_bytes(2, "big")
                break
            at[suffix] = len(packed)
            packed += suffix[: 1 + suffix[0]]
        else:
            packed += b"\0"
    return bytes(packed)


def is_among(name: str | None, names: Iterable[str]) -> bool:
    """Return whether a name is one of several, or below one of the form *.NAME.  All are in small letters.

    >>> is_among("www.example.org", ["*.example.org"]), is_among("example.org", ["*.example.org"])
    (True, False)
    """
    return name is not None and any(
        name == each or (each.startswith("*.") and name.endswith(each[1:])) for each in names
    )
