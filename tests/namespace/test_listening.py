"""What the kernel says of sockets that listen, byte by byte."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.diag import MarshalDiag, inet_diag_msg, inet_diag_req

from netns_kit.child.codec import DecodeError
from netns_kit.errors import FeatureUnavailable
from netns_kit.host.abi import NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, TCP_LISTEN
from netns_kit.namespace.listening import _REQUEST, ListeningSocket, SocketDiagnostics, _failure, parse
from tests.support.servers import bounded

KINDS = [
    ("tcp", socket.AF_INET, "127.0.0.1", None),
    ("tcp", socket.AF_INET6, "::1", True),
    ("udp", socket.AF_INET, "10.0.2.100", None),
    ("udp", socket.AF_INET6, "::", False),
]


def message(protocol: str, family: int, address: str, port: int, v6only: bool | None = None) -> bytes:
    """A socket as pyroute2 writes it."""
    packed = socket.inet_pton(family, address).ljust(16, b"\0")
    made = inet_diag_msg()
    made["header"]["type"] = SOCK_DIAG_BY_FAMILY
    made["header"]["sequence_number"] = socket.IPPROTO_TCP if protocol == "tcp" else socket.IPPROTO_UDP
    made.update(idiag_family=family, idiag_state=TCP_LISTEN, idiag_sport=port, idiag_dport=0)
    made.update(idiag_src=struct.unpack(">4I", packed), idiag_dst=(0, 0, 0, 0))
    made["attrs"] = [("INET_DIAG_TOS", "07")]
    if v6only is not None:
        made["attrs"].append(("INET_DIAG_SKV6ONLY", int(v6only)))
    made.encode()
    return bytes(made.data)


def test_a_socket_is_read_as_pyroute2_writes_it() -> None:
    sent = b"".join(message(kind, family, where, 8080, only) for kind, family, where, only in KINDS)
    assert list(parse(sent)) == [
        ListeningSocket("tcp", IPv4Address("127.0.0.1"), 8080),
        ListeningSocket("tcp", IPv6Address("::1"), 8080, v6only=True),
        ListeningSocket("udp", IPv4Address("10.0.2.100"), 8080),
        ListeningSocket("udp", IPv6Address("::"), 8080, v6only=False),
    ]


def test_an_ipv6_socket_for_ipv4_alone_is_an_ipv4_one() -> None:
    (found,) = parse(message("tcp", socket.AF_INET6, "::ffff:127.0.0.1", 80, v6only=False))
    assert found.address == IPv4Address("127.0.0.1")


def test_a_request_is_what_pyroute2_writes() -> None:
    theirs = inet_diag_req()
    theirs["header"].update(type=SOCK_DIAG_BY_FAMILY, flags=0x301, sequence_number=6)
    theirs.update(sdiag_family=socket.AF_INET6, sdiag_protocol=6, idiag_states=1 << TCP_LISTEN)
    theirs.encode()
    assert bytes(theirs.data) == _REQUEST.pack(
        _REQUEST.size, SOCK_DIAG_BY_FAMILY, 0x301, 6, 0, socket.AF_INET6, 6, 1 << TCP_LISTEN
    )


_SENT = message("tcp", socket.AF_INET6, "::1", 80, v6only=True) + message(
    "udp", socket.AF_INET, "127.0.0.1", 80
)


@given(
    st.binary(max_size=400)
    | st.builds(
        lambda at, byte: bytes([*_SENT[:at], byte, *_SENT[at + 1 :]]),
        st.integers(0, 207),
        st.integers(0, 255),
    )
)
def test_whatever_comes_is_read_or_refused(data: bytes) -> None:
    with suppress(DecodeError):
        assert all(0 <= each.port < 65536 for each in parse(data))


@pytest.mark.anyio
@bounded
async def test_the_kernel_is_understood_as_pyroute2_understands_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        diagnostics = SocketDiagnostics(
            socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, NETLINK_SOCK_DIAG),
            AssertionError,
        )
        try:
            pieces = await diagnostics.dump(("tcp", "udp"))
            found = await diagnostics.parse(pieces)
        finally:
            diagnostics.close()
        for protocol, sock in ("tcp", server), ("udp", udp):
            assert any((each.protocol, each.port) == (protocol, sock.getsockname()[1]) for each in found)
    marshal = MarshalDiag()
    theirs = [each for data in pieces for each in marshal.parse(data) if isinstance(each, inet_diag_msg)]
    assert [each["idiag_sport"] for each in theirs] == [each.port for each in found]
    assert [IPv6Address(each["idiag_src"]) for each in theirs if each["idiag_family"] == socket.AF_INET6] == [
        each.address if isinstance(each.address, IPv6Address) else IPv6Address(f"::ffff:{each.address}")
        for each in found
        if each.v6only is not None
    ]


def test_a_kernel_without_diagnostics_is_named() -> None:
    assert isinstance(_failure(struct.pack("=i", -2)), FeatureUnavailable)
    assert type(_failure(struct.pack("=i", -12))) is OSError
