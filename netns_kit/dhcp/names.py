"""Domain names as DHCP carries them (RFC 1035 3.1).

>>> pack_all(["eng.example.com", "example.com"]).hex()
'03656e67076578616d706c6503636f6d00c004'
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from netns_kit import arguments
from netns_kit.errors import AddressError

from .errors import BadMessage

NAME_MAX, LABEL_MAX = 255, 63  # bytes, RFC 1035 2.3.4
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_POINTER = 0xC000  # of 14 bits, RFC 1035 4.1.4


def is_name(text: str) -> bool:
    """Whether it is the name of a host or a domain, which programs inside may print and put into commands."""
    return len(text) <= NAME_MAX - 2 and all(map(_LABEL.fullmatch, text.split(".")))


def check(text: str) -> str:
    """`text`, a dot at its end left out.  Raises `AddressError` for what is no name, `ArgumentTypeError` for what is
    no text."""
    arguments.text("domain", text, "a domain name")
    name = text.removesuffix(".")
    if not is_name(name):
        raise AddressError(
            f"{text!r} is no domain name",
            fix="labels are 1 to 63 letters, digits, hyphens, with dots between",
        )
    return name


def pack(name: str) -> bytes:
    """One name, complete."""
    return b"".join(bytes((len(label),)) + label.encode() for label in name.split(".")) + b"\0"


def pack_all(names: Iterable[str]) -> bytes:
    """A list of names, each as short as those before it let it be (RFC 3397 2)."""
    packed = bytearray()
    at: dict[tuple[str, ...], int] = {}
    for name in names:
        labels = tuple(name.lower().split("."))
        while labels and labels not in at:
            at[labels] = len(packed)
            packed += bytes((len(labels[0]),)) + labels[0].encode()
            labels = labels[1:]
        packed += (_POINTER | at[labels]).to_bytes(2, "big") if labels else b"\0"
    return bytes(packed)


def parse(data: bytes) -> str:
    """The one name of an option, which may end without the root (RFC 4704 4.2).  Raises `BadMessage`."""
    labels = []
    at = 0
    while at < len(data) and data[at]:
        label = data[at + 1 : at + 1 + data[at]]
        if data[at] > LABEL_MAX or len(label) != data[at]:
            raise BadMessage("name")
        labels.append(label.decode("latin-1"))
        at += 1 + data[at]
    name = ".".join(labels)
    if at < len(data) - 1 or not is_name(name):
        raise BadMessage("name")
    return name
