"""The DHCPv4 server (RFC 2131), for one link that is all ours.

Theory of operation.  `DhcpServer.answer` takes a datagram and returns what is to be sent, at once: an address is free
when `Leases` says so, nobody is asked by ICMP first, for nobody else gives addresses away here.  For the same reason
we are authoritative.  A client that wants an address it cannot have hears so (DHCPNAK) whatever state it is in, and
begins anew; one that wants an address it can have gets it, also if we have never heard of the lease: we may have been
restarted.  That is more than RFC 2131 4.3.2 asks for, and what makes clients recover at once.

Who is who: the client identifier, or else the hardware's type and address (4.2).  A client that sends its hardware
address as the identifier, as many do, is the same as without.  An Ethernet address is that of the frame, but for what
a relay agent sends: who has another's in the message would have its lease, and the ports that are forwarded there.

What is sent: always the type, the server, the lease's time and the netmask; else what the parameter request list
names and we have, in its order, or all without one.  As much as the client has room for, in the fields of file and
server name too.

Where to (4.1): to the relay agent, if one has sent it; to the client's address, if it has one and hears of good; to
all, if it asks for that or hears of bad; else to the address it is to have, at its link address.

Who asks from another port than a client's or a relay's is nobody's client: it takes privilege in the namespace to
have one, as it takes to give an interface the address.  Programs without could else have ports forwarded elsewhere.

What is malformed, for others, or not to be answered is counted in `dropped`, by reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from . import message, names
from .errors import BadMessage
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
    """A datagram to send, from our port: packed addresses, the other's port and link address."""

    payload: bytes
    source: bytes
    destination: bytes
    port: int
    mac: bytes


class DhcpServer:
    """Gives the addresses of `pool`, and those of static leases, to the clients of `network`.

    `address` is ours and the router's, `dns` the name server's, `mtu` the link's.  Times are seconds of any clock
    that is not set back.
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
        routes = (
            *settings.routes,
            (IPv4Network("0.0.0.0/0"), address),
        )  # who obeys these ignores the router (RFC 3442)
        parameters = {
            message.NETMASK: network.netmask.packed,
            message.ROUTER: address.packed,
            message.DNS: dns.packed,
            message.DOMAIN: settings.domain.encode(),
            message.MTU: mtu.to_bytes(2, "big"),
            message.SEARCH: names.pack_all(settings.search or ()),
            message.ROUTES: b"".join(_route(*each) for each in routes),
        }
        self._parameters = {code: value for code, value in parameters.items() if value}

    def answer(
        self, payload: bytes, source: bytes, port: int, mac: bytes, destination: bytes, now: float
    ) -> tuple[Reply, ...]:
        """The answer to a client's datagram, if there is one.  Never raises."""
        try:
            if port not in (CLIENT_PORT, SERVER_PORT):
                raise BadMessage("port")
            request = parse(payload)
            room = self._room(request)
            _check_hardware(request, mac)
            answer = self._answer(request, now)
        except BadMessage as bad:
            self.dropped[bad.reason] += 1
            return ()
        if answer is None:
            return ()
        return (self._reply(request, answer, mac, room),)

    def _answer(self, request: Message, now: float) -> Message | None:
        """Raises `BadMessage`."""
        kind = request.type
        if request.op != message.REQUEST or kind == 0:
            raise BadMessage("no-request")
        if request.giaddr != NOWHERE and request.giaddr not in self._network:
            raise BadMessage("relay-foreign")
        client = _client(request)
        ours = request.address(message.SERVER) in (None, self._address)
        match kind:
            case message.DISCOVER:
                return self._discovered(request, client, now)
            case message.REQUEST_ADDRESS if ours:
                return self._requested(request, client, now)
            case message.REQUEST_ADDRESS:  # the client has chosen another server
                self.leases.not_taken(client, now)
                raise BadMessage("other-server")
            case message.RELEASE if ours:
                self.leases.renounce(client, request.ciaddr, now)
            case message.DECLINE if ours:
                if not self.leases.decline(client, request.address(message.ADDRESS) or NOWHERE, now):
                    raise BadMessage("no-lease")
            case message.INFORM:
                return self._informed(request, client)
            case message.RELEASE | message.DECLINE:
                raise BadMessage("other-server")
            case _:
                raise BadMessage("type")
        return None

    def _discovered(self, request: Message, client: Client, now: float) -> Message:
        wanted = request.address(message.ADDRESS)
        address = self._choose(client, wanted, now)
        if address is None:
            raise BadMessage("exhausted")
        if message.RAPID_COMMIT in request.options:  # RFC 4039
            return self._granted(request, client, address, now)
        seconds = self._lease_time(request)
        self.leases.offer(client, address, now)
        return self._message(message.OFFER, request, client, address, seconds)

    def _requested(self, request: Message, client: Client, now: float) -> Message:
        """Whatever state the client is in (RFC 2131 4.3.2): they differ in where the address stands."""
        wanted = request.address(message.ADDRESS) or request.ciaddr
        if wanted == NOWHERE:
            raise BadMessage("no-address")
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
            raise BadMessage("no-address")
        return self._message(message.ACK, request, client)

    def _lease_time(self, request: Message) -> int:
        asked = request.number(message.LEASE_TIME, 4)
        if asked is None:
            return self._seconds
        return min(max(asked, LEAST_SECONDS), self._seconds)

    def _room(self, request: Message) -> int:
        """Bytes that the answer may have."""
        most = request.number(message.MAX_SIZE, 2) or 0
        return max(min(most, self._mtu) - HEADERS, message.MAX_MESSAGE)

    # -- what is said -----------------------------------------------------------------------------------

    def _message(
        self,
        kind: int,
        request: Message,
        client: Client,
        address: IPv4Address = NOWHERE,
        seconds: int | None = None,
    ) -> Message:
        """`seconds` None: of no lease."""
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
        """What the client asks for, in the order of its asking."""
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
        """RFC 2131 4.1."""
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
        """What was sent, by its type, and what was not answered, by reason."""
        dropped = {
            f"dropped_{reason.replace('-', '_')}": count for reason, count in sorted(self.dropped.items())
        }
        return {**{f"sent_{name}": self.sent[name] for name in _NAMES.values()}, **dropped}


_NAMES = {message.OFFER: "offer", message.ACK: "ack", message.NAK: "nak"}


def _check_hardware(request: Message, mac: bytes) -> None:
    """Hold the client's Ethernet address against the frame's.  Raises `BadMessage`."""
    if request.giaddr == NOWHERE and request.htype == ETHERNET and request.chaddr != mac:
        raise BadMessage("hardware-address")


def _client(request: Message) -> Client:
    """Who it is.  Raises `BadMessage` for nobody."""
    identifier = request.options.get(message.CLIENT_ID)
    if identifier is None:
        identifier = bytes((request.htype,)) + request.chaddr
    if not 2 <= len(identifier) <= CLIENT_ID_MAX:  # RFC 2132 9.14
        raise BadMessage("client-id")
    return Client(identifier, request.chaddr if request.htype == ETHERNET else b"")


def _hostname(request: Message) -> str:
    """What the client calls itself, if that is a name."""
    name = request.options.get(message.HOSTNAME, b"").rstrip(b"\0.").decode("latin-1")
    return name if names.is_name(name) else ""


def _route(network: IPv4Network, router: IPv4Address) -> bytes:
    """RFC 3442: no more of the network's address than counts."""
    significant = (network.prefixlen + 7) // 8
    return bytes((network.prefixlen,)) + network.network_address.packed[:significant] + router.packed
