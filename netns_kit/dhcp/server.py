"""The DHCPv4 server (RFC 2131) of a link that is entirely ours.

Theory of operation.  `DhcpServer.answer` takes a datagram and returns the answer at once.  An address is free when
`Leases` says so: it is not probed by ICMP first, because nobody else assigns addresses on this link.  For the same
reason the server is authoritative.  A client that wants an address which it cannot have gets a DHCPNAK in any state,
and starts again.  A client that wants a free address gets it, even if the lease is not known: the server may have
been restarted.  RFC 2131 4.3.2 asks for less; this makes clients recover at once.

A client is known by its client identifier, or else by the hardware's type and address (4.2).  Many clients send their
hardware address as the identifier; both forms are the same client.  The Ethernet address in the message must be the
frame's, unless a relay agent has sent it: otherwise a client could name another's address and take over its lease,
and the ports that are forwarded to it.

An answer always has the type, the server, the lease's time and the netmask.  The rest is what the parameter request
list names and the server has, in the list's order, or everything if there is no list.  It is as much as the client
has room for, with the fields of file and server name used for options too.

An answer goes (4.1) to the relay agent, if one has sent the message; to the client's address, if the client has one
and the answer is positive; to everybody, if the client asks for that or the answer is negative; else to the assigned
address, at the client's link address.

A message from any other port than a client's or a relay's is dropped.  Binding such a port takes a privilege in the
namespace, as setting an address does; a program without it could else have ports forwarded elsewhere.

Malformed messages, those for other servers and those that get no answer are counted in `dropped`, by reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from netns_kit.domain_names import is_host_name, pack_compressed

from . import message
from .errors import BadDhcpMessage
from .leases import Client, Leases
from .message import BROADCAST, ETHERNET, NOWHERE, Message, parse
from .settings import CLIENT_ID_MAX, INFINITE, DhcpSettings

SERVER_PORT, CLIENT_PORT = 67, 68
LEAST_SECONDS = 60  # of a lease that a client may ask for
HEADERS = 28  # bytes of IP and UDP, which a client's maximum message size includes
EVERYBODY = IPv4Address("255.255.255.255")
EVERYBODY_MAC = b"\xff" * 6
UNAVAILABLE = b"requested address not available"


class Reply(NamedTuple):
    """A datagram to send from the server's port: packed addresses, the receiver's port and link address."""

    payload: bytes
    source: bytes
    destination: bytes
    port: int
    mac: bytes


class DhcpServer:
    """A DHCPv4 server that assigns the addresses of `pool`, and those of static leases, to clients of `network`.

    `address` belongs to the server and the router, `dns` to the name server; `mtu` is the link's.  Times are seconds
    of any monotonic clock.
    """

    def __init__(
        self,
        settings: DhcpSettings,
        *,
        address: IPv4Address,
        network: IPv4Network,
        pool: Sequence[IPv4Address],
        dns: IPv4Address,
        mtu: int,
    ) -> None:
        self.leases = Leases(pool, [each for each in settings.static if each.address.version == 4])
        self.dropped: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._address = address
        self._network = network
        self._mtu = mtu
        self._seconds = settings.lease_seconds
        # a client that uses these ignores the router option (RFC 3442)
        routes = (*settings.routes, (IPv4Network("0.0.0.0/0"), address))
        parameters = {
            message.NETMASK: network.netmask.packed,
            message.ROUTER: address.packed,
            message.DNS: dns.packed,
            message.DOMAIN: settings.domain.encode(),
            message.MTU: mtu.to_bytes(2, "big"),
            message.SEARCH: pack_compressed(settings.search or ()),
            message.ROUTES: b"".join(_route(*each) for each in routes),
        }
        self._parameters = {code: value for code, value in parameters.items() if value}

    def answer(
        self, payload: bytes, source: bytes, port: int, mac: bytes, destination: bytes, now: float
    ) -> tuple[Reply, ...]:
        """Return the answer to a client's datagram, or nothing.  Never raises."""
        try:
            if port not in (CLIENT_PORT, SERVER_PORT):
                raise BadDhcpMessage("port")
            request = parse(payload)
            room = self._room(request)
            _check_hardware(request, mac)
            answer = self._answer(request, now)
        except BadDhcpMessage as bad:
            self.dropped[bad.reason] += 1
            return ()
        if answer is None:
            return ()
        return (self._reply(request, answer, mac, room),)

    def _answer(self, request: Message, now: float) -> Message | None:
        """Return the answer to a request, None if it gets none.  Raises `BadDhcpMessage`."""
        kind = request.type
        if request.op != message.REQUEST or kind == 0:
            raise BadDhcpMessage("no-request")
        if request.giaddr != NOWHERE and request.giaddr not in self._network:
            raise BadDhcpMessage("relay-foreign")
        client = _client(request)
        ours = request.address(message.SERVER) in (None, self._address)
        match kind:
            case message.DISCOVER:
                return self._discovered(request, client, now)
            case message.REQUEST_ADDRESS if ours:
                return self._requested(request, client, now)
            case message.REQUEST_ADDRESS:  # the client has chosen another server
                self.leases.not_taken(client, now)
                raise BadDhcpMessage("other-server")
            case message.RELEASE if ours:
                self.leases.renounce(client, request.ciaddr, now)
            case message.DECLINE if ours:
                if not self.leases.decline(client, request.address(message.ADDRESS) or NOWHERE, now):
                    raise BadDhcpMessage("no-lease")
            case message.INFORM:
                return self._informed(request, client)
            case message.RELEASE | message.DECLINE:
                raise BadDhcpMessage("other-server")
            case _:
                raise BadDhcpMessage("type")
        return None

    def _discovered(self, request: Message, client: Client, now: float) -> Message:
        wanted = request.address(message.ADDRESS)
        address = self._choose(client, wanted, now)
        if address is None:
            raise BadDhcpMessage("exhausted")
        if message.RAPID_COMMIT in request.options:  # RFC 4039
            return self._granted(request, client, address, now)
        seconds = self._lease_time(request)
        self.leases.offer(client, address, now)
        return self._message(message.OFFER, request, client, address, seconds)

    def _requested(self, request: Message, client: Client, now: float) -> Message:
        """Answer a DHCPREQUEST (RFC 2131 4.3.2): the states of a client differ in where the address stands."""
        wanted = request.address(message.ADDRESS) or request.ciaddr
        if wanted == NOWHERE:
            raise BadDhcpMessage("no-address")
        if self._choose(client, wanted, now) != wanted:
            self.leases.renounce(client, wanted, now)
            return self._message(message.NAK, request, client)
        return self._granted(request, client, wanted, now)

    def _choose(self, client: Client, wanted: IPv4Address | None, now: float) -> IPv4Address | None:
        address = self.leases.choose(client, () if wanted is None else (wanted,), now)
        assert address is None or address.version == 4
        return address

    def _granted(self, request: Message, client: Client, address: IPv4Address, now: float) -> Message:
        seconds = self._lease_time(request)
        until = math.inf if seconds == INFINITE else now + seconds
        self.leases.grant(client, address, until, _hostname(request))
        return self._message(message.ACK, request, client, address, seconds)

    def _informed(self, request: Message, client: Client) -> Message:
        if request.ciaddr not in self._network or request.ciaddr == self._address:
            raise BadDhcpMessage("no-address")
        return self._message(message.ACK, request, client)

    def _lease_time(self, request: Message) -> int:
        asked = request.number(message.LEASE_TIME, 4)
        if asked is None:
            return self._seconds
        return min(max(asked, LEAST_SECONDS), self._seconds)

    def _room(self, request: Message) -> int:
        """Return how many bytes the answer may have."""
        most = request.number(message.MAX_SIZE, 2) or 0
        return max(min(most, self._mtu) - HEADERS, message.MAX_MESSAGE)

    # -- contents of answers ----------------------------------------------------------------------------

    def _message(
        self,
        kind: int,
        request: Message,
        client: Client,
        address: IPv4Address = NOWHERE,
        seconds: int | None = None,
    ) -> Message:
        """Make a message to the client; `seconds` is None if it is about no lease."""
        options = {message.TYPE: bytes((kind,)), message.SERVER: self._address.packed}
        if kind == message.NAK:
            options[message.TEXT] = UNAVAILABLE
        else:
            if seconds is not None:
                options[message.LEASE_TIME] = seconds.to_bytes(4, "big")
            if kind == message.ACK and request.type == message.DISCOVER:
                options[message.RAPID_COMMIT] = b""
        for echoed in message.CLIENT_ID, message.RELAY:  # RFC 6842, RFC 3046 2.2
            if echoed in request.options:
                options[echoed] = request.options[echoed]
        if kind != message.NAK:
            options |= self._parameters_for(request, client, address, seconds)
        flags = request.flags & BROADCAST
        if kind == message.NAK and request.giaddr != NOWHERE:  # the relay agent is to tell all (4.3.2)
            flags |= BROADCAST
        ciaddr = request.ciaddr if kind == message.ACK else NOWHERE
        return Message(
            message.REPLY, request.xid, request.chaddr, request.htype, flags, ciaddr, address, request.giaddr,
            options,
        )  # fmt: skip

    def _parameters_for(
        self, request: Message, client: Client, address: IPv4Address, seconds: int | None
    ) -> dict[int, bytes]:
        """Return the options that the client asks for, in the order of its request."""
        have = dict(self._parameters)
        if hostname := self.leases.hostname(client, request.ciaddr if address == NOWHERE else address):
            have[message.HOSTNAME] = hostname.encode()
        if seconds is not None:
            times = (INFINITE, INFINITE) if seconds == INFINITE else (seconds // 2, seconds * 7 // 8)  # 4.4.5
            have[message.RENEWAL], have[message.REBINDING] = (each.to_bytes(4, "big") for each in times)
        wanted = request.options.get(message.WANTED)
        codes = have if wanted is None else (*wanted, message.NETMASK)
        return {code: have[code] for code in codes if code in have}

    def _reply(self, request: Message, answer: Message, mac: bytes, room: int) -> Reply:
        """Address an answer (RFC 2131 4.1)."""
        kind = answer.type
        self.sent[_NAMES[kind]] += 1
        payload = answer.pack(room)
        if request.giaddr != NOWHERE:
            to, port = request.giaddr, SERVER_PORT
        elif kind == message.NAK:
            to, port, mac = EVERYBODY, CLIENT_PORT, EVERYBODY_MAC
        elif request.ciaddr != NOWHERE:
            to, port = request.ciaddr, CLIENT_PORT
        elif request.flags & BROADCAST:
            to, port, mac = EVERYBODY, CLIENT_PORT, EVERYBODY_MAC
        else:
            to, port = answer.yiaddr, CLIENT_PORT
        return Reply(payload, self._address.packed, to.packed, port, mac)

    def stats(self) -> dict[str, int]:
        """Return how many messages were sent, by type, and how many dropped, by reason."""
        dropped = {
            f"dropped_{reason.replace('-', '_')}": count for reason, count in sorted(self.dropped.items())
        }
        return {**{f"sent_{name}": self.sent[name] for name in _NAMES.values()}, **dropped}


_NAMES = {message.OFFER: "offer", message.ACK: "ack", message.NAK: "nak"}


def _check_hardware(request: Message, mac: bytes) -> None:
    """Raise `BadDhcpMessage` unless the client's Ethernet address is that of the frame."""
    if request.giaddr == NOWHERE and request.htype == ETHERNET and request.chaddr != mac:
        raise BadDhcpMessage("hardware-address")


def _client(request: Message) -> Client:
    """Return the client that has sent the message.  Raises `BadDhcpMessage` for an identifier of a wrong length."""
    identifier = request.options.get(message.CLIENT_ID)
    if identifier is None:
        identifier = bytes((request.htype,)) + request.chaddr
    if not 2 <= len(identifier) <= CLIENT_ID_MAX:  # RFC 2132 9.14
        raise BadDhcpMessage("client-id")
    return Client(identifier, request.chaddr if request.htype == ETHERNET else b"")


def _hostname(request: Message) -> str:
    """Return the client's own name for itself, "" if it is no host name."""
    name = request.options.get(message.HOSTNAME, b"").rstrip(b"\0.").decode("latin-1")
    return name if is_host_name(name) else ""


def _route(network: IPv4Network, router: IPv4Address) -> bytes:
    """Encode a route with only the significant bytes of the network's address (RFC 3442)."""
    significant = (network.prefixlen + 7) // 8
    return bytes((network.prefixlen,)) + network.network_address.packed[:significant] + router.packed
