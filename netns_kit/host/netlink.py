"""Messages of netlink (netlink(7)) about links, by a process that need not be in their namespace.

Fact: the kernel looks at the rights of the sender of a message to a given destination, and not at those of who has
opened the socket (NETLINK_SKB_DST).  So this process may send by a socket of one namespace what concerns another,
as long as it is the owner of both, or has CAP_NET_ADMIN in both; no process inside could.  That is how a pair of veth
comes to stand between namespaces of different user namespaces.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator

from . import abi

KERNEL = (0, 0)
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVE = 1 << 16


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute with its padding."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """Return an attribute that is made of others."""
    return attribute(kind | abi.NLA_F_NESTED, b"".join(attributes))


def text(kind: int, value: str) -> bytes:
    """Return an attribute that is a string."""
    return attribute(kind, os.fsencode(value) + b"\0")


def number(kind: int, value: int) -> bytes:
    """Return an attribute that is a number of 32 bits, as this machine has them."""
    return attribute(kind, struct.pack("=I", value))


def message(kind: int, flags: int, *parts: bytes) -> bytes:
    """Return a message that is to be acknowledged.  Its sequence number is set by `transact`."""
    body = b"".join(parts)
    return _HEADER.pack(_HEADER.size + len(body), kind, flags | abi.NLM_F_REQUEST, 0, 0) + body


def link(index: int = 0, *, up: bool = False) -> bytes:
    """Return the struct ifinfomsg about an interface, by its number or with 0 by its name; `up` brings it up."""
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, abi.IFF_UP * up, abi.IFF_UP * up)


def new_link(kind: str, name: str, *attributes: bytes, data: bytes = b"", up: bool = False) -> bytes:
    """Return the message that makes an interface of that kind, with attributes and with data of its kind."""
    return message(
        abi.RTM_NEWLINK,
        abi.NLM_F_CREATE | abi.NLM_F_EXCL | abi.NLM_F_ACK,
        link(up=up),
        text(abi.IFLA_IFNAME, name),
        *attributes,
        nested(abi.IFLA_LINKINFO, text(abi.IFLA_INFO_KIND, kind), nested(abi.IFLA_INFO_DATA, data)),
    )


def changed(index: int, *attributes: bytes, up: bool = False) -> bytes:
    """Return the message that gives a link other attributes, and may bring it up."""
    return message(abi.RTM_NEWLINK, abi.NLM_F_ACK, link(index, up=up), *attributes)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the kinds and values of attributes that lie one behind the other."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & ~abi.NLA_F_NESTED, data[_ATTRIBUTE.size : length]
        data = data[(max(length, _ATTRIBUTE.size) + 3) & ~3 :]


def transact(sock: socket.socket, messages: Iterable[bytes]) -> list[bytes]:
    """Send messages to the kernel as one, and return the bodies of what it has answered beside acknowledgements.

    The kernel has answered when they are sent, so this never waits for another process; but it may take some
    milliseconds.

    Raises:
        OSError: The kernel refuses one of them.  Those before it may have been done; those of a batch have not.
    """
    numbered = [
        each[:8] + struct.pack("=I", number) + each[12:] for number, each in enumerate(messages, start=1)
    ]
    sock.sendto(b"".join(numbered), KERNEL)
    answers: list[bytes] = []
    error = 0
    while True:
        try:
            data = sock.recv(_RECEIVE)
        except BlockingIOError:
            break
        while data:
            length, kind, *_ = _HEADER.unpack_from(data)
            if kind == abi.NLMSG_ERROR:
                error = error or -struct.unpack_from("=i", data, _HEADER.size)[0]
            else:
                answers.append(data[_HEADER.size : length])
            data = data[(length + 3) & ~3 :]
    if error:
        raise OSError(error, os.strerror(error))
    return answers


def index_of(sock: socket.socket, name: str) -> int:
    """Return the number of an interface of the socket's namespace.

    Raises:
        OSError: ENODEV: there is none of that name.
    """
    (answer,) = transact(sock, [message(abi.RTM_GETLINK, 0, link(), text(abi.IFLA_IFNAME, name))])
    (index,) = struct.unpack_from("=i", answer, 4)
    return int(index)
