"""PingRelay: connects one echo flow of the stack to one ping socket of the host (icmp(7)).

The kernel sends its own identifier and receives only replies to it; the guest sees its own.  Where ping sockets are
forbidden (net.ipv4.ping_group_range) but raw sockets are not, a raw socket does the same with a random identifier.
"""

from __future__ import annotations

import errno
import os
import socket

from netns_kit.gateway.engine import ERROR, IN, Engine
from netns_kit.stack import EchoFlow
from netns_kit.stack.wire import checksum, flow_key, icmp
from netns_kit.stack.wire.ip import Packet
from netns_kit.uplink.flow import Endpoint
from netns_kit.uplink.sockets import (
    ANCILLARY_SPACE,
    DATAGRAMS_PER_STEP,
    MAX_DATAGRAM,
    Marks,
    ask_for_errors,
    ask_for_marks,
    family_of,
    marks_of,
    read_errors,
    refusal_for,
    socket_address,
)

_IPV4_KINDS, _IPV6_KINDS = (icmp.ECHO, icmp.ECHO_REPLY), (icmp.V6_ECHO, icmp.V6_ECHO_REPLY)


class PingRelay:
    """One echo flow and its socket.

    Raises:
        OSError: The target cannot be reached at all.  The socket stays the caller's then.
    """

    __slots__ = ("_engine", "_flow", "_identifier", "_kinds", "_marks", "_raw", "_socket")

    def __init__(self, engine: Engine, sock: socket.socket, flow: EchoFlow, target: Endpoint) -> None:
        self._kinds = _IPV4_KINDS if family_of(sock) == socket.AF_INET else _IPV6_KINDS
        self._raw = sock.type == socket.SOCK_RAW
        self._identifier = int.from_bytes(os.urandom(2), "big")  # a ping socket replaces it by its own
        self._marks = Marks(sock, exact=True)
        ask_for_errors(sock)
        ask_for_marks(sock)
        sock.connect(socket_address(target.address, 0))
        self._engine = engine
        self._socket = sock
        self._flow = flow
        engine.add(sock.fileno(), self._on_events, IN)
        flow.user = self

    def local(self) -> tuple[str, int]:
        """Return the address of the host's socket, and its identifier."""
        address, identifier, *_ = self._socket.getsockname()
        return address, identifier

    def echo(self, flow: EchoFlow, sequence: int, payload: memoryview, packet: Packet) -> None:
        message = icmp.HEADER.pack(self._kinds[0], 0, 0, self._identifier, sequence) + payload
        if self._raw:
            check = checksum.checksum(checksum.total(message))
            message = icmp.HEADER.pack(self._kinds[0], 0, check, self._identifier, sequence) + payload
        error = self._send(message, packet.marks)
        if error and not self._errors(sequence, payload):
            error = self._send(message, packet.marks)  # the error belonged to an earlier request
            if error and not self._errors(sequence, payload):
                flow.refuse(refusal_for(error), sequence, payload)

    def _send(self, message: bytes, marks: int) -> int:
        try:
            self._marks.carry(marks)
            self._socket.send(message)
        except BlockingIOError:
            return 0  # the request is lost, as a packet may be
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def expired(self, flow: EchoFlow) -> None:
        self._engine.remove(self._socket.fileno())
        self._socket.close()

    def _on_events(self, events: int) -> None:
        if events & ERROR:
            self._errors()
        for _ in range(DATAGRAMS_PER_STEP):
            try:
                message, ancillary, _, _ = self._socket.recvmsg(MAX_DATAGRAM, ANCILLARY_SPACE)
            except OSError:
                return  # there is no more, or an error that the next event reports
            if self._raw and family_of(self._socket) == socket.AF_INET:
                message = message[(message[0] & 15) * 4 :]
            if len(message) < icmp.SIZE:
                continue
            kind, _, _, identifier, sequence = icmp.HEADER.unpack_from(message)
            if kind == self._kinds[1] and (not self._raw or identifier == self._identifier):
                ttl, tos = marks_of(ancillary)
                self._flow.reply(sequence, message[icmp.SIZE :], ttl, self._engine.now, tos=tos)

    def _errors(self, sequence: int = 0, payload: bytes | memoryview = b"") -> bool:
        """Tell the guest the errors in the socket's queue.  Return whether one was about the request that is being
        sent.
        """
        is_about_this = False
        for each in read_errors(self._socket):
            check: int | None = None
            if each.is_local:
                about, quoted, is_about_this = sequence, bytes(payload), True
            elif len(each.quoted) >= icmp.SIZE:
                _, _, summed, identifier, about = icmp.HEADER.unpack_from(each.quoted)
                quoted = each.quoted[icmp.SIZE :]
                if self._kinds is _IPV4_KINDS:  # quoted as the guest has sent it (RFC 1624)
                    check = (summed + identifier - self._flow.identifier) % 0xFFFF
            else:
                continue
            self._flow.refuse(each.for_guest(flow_key.parse(self._flow.key).remote), about, quoted, check)
        return is_about_this
