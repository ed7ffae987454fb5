"""The DHCPv6 server (RFC 8415) of a link that is entirely ours.

Theory of operation.  It works as `DhcpServer` does: each message is answered at once from a table of leases, and the
server is authoritative, so a client that renews an address gets it, known or not, if it can be a client's.  Each
IA_NA of a client has one address.  Temporary addresses and prefixes are not available: their associations are
answered with the status that says so.

Clients with and without addresses (INFORMATION-REQUEST) learn the name server (option 23), the search domains (24),
and their own name as they gave it (39), if it is a host name; no DNS is updated with it.  A client that says what it
wants (option 6) gets that, any other gets everything.

Malformed messages, those for other servers and those that get no answer (16) are counted in `dropped`, by reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from ipaddress import IPv6Address, IPv6Network

from netns_kit.domain_names import read_host_name, to_wire

from . import message6
from .errors import BadDhcpMessage
from .leases import Client, Leases
from .message6 import Association, Message6, Option, pack_address, pack_association, pack_status, parse
from .server import Reply
from .settings import INFINITE, DhcpSettings

SERVER_PORT, CLIENT_PORT = 547, 546
ALL_SERVERS = IPv6Address("ff02::1:2")
MOST_ASSOCIATIONS = 8  # of one message
REFRESH_SECONDS = 86400  # until a client without a lease asks anew (21.23)
_DUID_LL = b"\0\x03\0\x01"  # followed by an Ethernet address (11.4)
_NAMES = {message6.ADVERTISE: "advertise", message6.REPLY: "reply"}
_GIVING_UP = frozenset({message6.RELEASE, message6.DECLINE})
_TO_THIS_SERVER = _GIVING_UP | {message6.REQUEST, message6.RENEW}
_TO_ALL_SERVERS = frozenset({message6.SOLICIT, message6.CONFIRM, message6.REBIND})
_FROM_CLIENTS = _TO_THIS_SERVER | _TO_ALL_SERVERS | {message6.INFORMATION_REQUEST}
_NO_ADDRESSES = pack_status(message6.NO_ADDRESSES, "all addresses are taken")
_NO_BINDING = pack_status(message6.NO_BINDING, "no such lease")
_NOT_ON_LINK = pack_status(message6.NOT_ON_LINK, "that is another network's")
_REFUSED = {
    message6.IA_TA: pack_status(message6.NO_ADDRESSES, "no temporary addresses here"),
    message6.IA_PD: pack_status(message6.NO_PREFIX, "no prefixes here"),
}
_NOT_UPDATED, _OVERRIDDEN, _SERVER_UPDATES = 4, 2, 1  # flags of a name, RFC 4704 4.1


class Dhcp6Server:
    """A DHCPv6 server that assigns the addresses of `pool`, and those of static leases, to clients of `network`.

    `address` is the server's link-local address, `mac` its link address, which identifies it.  `dns` is the name
    server's address.  Times are seconds of any monotonic clock.
    """

    def __init__(
        self,
        settings: DhcpSettings,
        *,
        address: IPv6Address,
        mac: bytes,
        network: IPv6Network,
        pool: Sequence[IPv6Address],
        dns: IPv6Address,
    ) -> None:
        self.leases = Leases(pool, [each for each in settings.static if each.address.version == 6])
        self.dropped: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._address = address
        self._network = network
        self._duid = _DUID_LL + mac
        self._seconds = settings.lease_seconds
        self._renewal, self._rebinding = (
            (INFINITE, INFINITE)
            if self._seconds == INFINITE
            else (self._seconds // 2, self._seconds * 4 // 5)  # 14.2
        )
        self._parameters: dict[int, bytes] = {message6.DNS: dns.packed}
        if settings.search or settings.domain:
            domains = settings.search or (settings.domain,)
            self._parameters[message6.SEARCH] = b"".join(map(to_wire, domains))

    def answer(
        self, payload: bytes, source: bytes, port: int, mac: bytes, destination: bytes, now: float
    ) -> tuple[Reply, ...]:
        """Return the answer to a client's datagram, or nothing.  Never raises."""
        try:
            if port != CLIENT_PORT:  # see `netns_kit.dhcp.server`
                raise BadDhcpMessage("port")
            request = parse(payload)
            answer = self._answer(request, mac, destination == ALL_SERVERS.packed, now)
        except BadDhcpMessage as bad:
            self.dropped[bad.reason] += 1
            return ()
        self.sent[_NAMES[answer.type]] += 1
        return (Reply(answer.pack(), self._address.packed, source, CLIENT_PORT, mac),)

    def _answer(self, request: Message6, mac: bytes, to_all: bool, now: float) -> Message6:
        """Return the answer to a request.  Raises `BadDhcpMessage` if it gets none."""
        self._check(request, to_all)
        duid = request.duid(message6.CLIENT_ID)
        head = [] if duid is None else [(message6.CLIENT_ID, duid)]
        rapid = request.get(message6.RAPID_COMMIT) is not None
        offer = to_all and request.type == message6.SOLICIT and not rapid
        kind = message6.ADVERTISE if offer else message6.REPLY
        options = [*head, (message6.SERVER_ID, self._duid)]
        answer = Message6(kind, request.xid, options)
        if not to_all:  # 18.3: no client was allowed to send unicast
            options.append(pack_status(message6.USE_MULTICAST, "use multicast"))
            return answer
        if offer:
            options.append((message6.PREFERENCE, b"\xff"))  # no use in waiting for others
        elif request.type == message6.SOLICIT:
            options.append((message6.RAPID_COMMIT, b""))
        name, wanted = _name(request), request.wanted()
        match request.type:
            case message6.CONFIRM:
                options.append(self._confirmed(request))
                return answer
            case message6.RELEASE | message6.DECLINE:
                options.append(pack_status(message6.SUCCESS, "done"))
        for each in request.associations():
            client = Client(duid or b"", mac, each.iaid)
            match request.type:
                case message6.SOLICIT:
                    options.append(self._assigned(each, client, name, now, offer=offer))
                case message6.REQUEST:
                    options.append(self._requested(each, client, name, now))
                case message6.RENEW | message6.REBIND:
                    options.append(self._renewed(each, client, name, now))
                case message6.RELEASE | message6.DECLINE:
                    declined = request.type == message6.DECLINE
                    options += self._given_up(each, client, now, declined=declined)
        if request.type not in _GIVING_UP:
            options += self._parameters_for(request, wanted)
        return answer

    def _check(self, request: Message6, to_all: bool) -> None:
        """Raise `BadDhcpMessage` unless the request gets an answer (16)."""
        kind = request.type
        server = request.duid(message6.SERVER_ID)
        associations = request.associations()
        if kind not in _FROM_CLIENTS:
            raise BadDhcpMessage("type")
        if len(associations) > (0 if kind == message6.INFORMATION_REQUEST else MOST_ASSOCIATIONS):
            raise BadDhcpMessage("associations")
        if kind != message6.INFORMATION_REQUEST and request.duid(message6.CLIENT_ID) is None:
            raise BadDhcpMessage("no-client-id")
        if kind in _TO_ALL_SERVERS and server is not None:
            raise BadDhcpMessage("server-id")
        if server != self._duid and (kind in _TO_THIS_SERVER or server is not None):
            raise BadDhcpMessage("other-server")
        if not to_all and kind not in _TO_THIS_SERVER:
            raise BadDhcpMessage("unicast")

    # -- answers to associations ------------------------------------------------------------------------

    def _assigned(
        self, association: Association, client: Client, name: str, now: float, *, offer: bool = False
    ) -> Option:
        """Answer an association of a SOLICIT or a REQUEST (18.3.1) with an address."""
        if association.code in _REFUSED:
            return pack_association(association, [_REFUSED[association.code]])
        address = self._choose(association, client, now)
        if address is None:
            self.dropped["exhausted"] += 1
            return pack_association(association, [_NO_ADDRESSES])
        if offer:
            self.leases.offer(client, address, now)
        else:
            self._grant(client, address, name, now)
        return self._given(association, [pack_address(address, self._seconds)])

    def _requested(self, association: Association, client: Client, name: str, now: float) -> Option:
        """Answer an association of a REQUEST (18.3.2)."""
        if association.code == message6.IA_NA and not self._on_link(association.addresses):
            return pack_association(association, [_NOT_ON_LINK])
        return self._assigned(association, client, name, now)

    def _renewed(self, association: Association, client: Client, name: str, now: float) -> Option:
        """Answer an association of a RENEW or REBIND (18.3.4, 18.3.5).

        An address that the client must not keep ends now, and the client gets another.
        """
        if association.code in _REFUSED:
            return pack_association(association, [_NO_BINDING])
        address = self._choose(association, client, now)
        lost = [each for each in association.addresses if each != address]
        for each in lost:
            self.leases.renounce(client, each, now)
        options = [pack_address(each, 0) for each in lost]
        if address is not None:
            self._grant(client, address, name, now)
            options.append(pack_address(address, self._seconds))
        return self._given(association, options or [_NO_BINDING])

    def _given_up(
        self, association: Association, client: Client, now: float, *, declined: bool
    ) -> list[Option]:
        """Answer an association of a RELEASE or DECLINE (18.3.7, 18.3.8): only an unknown one is mentioned."""
        give_up = self.leases.decline if declined else self.leases.renounce
        if any(give_up(client, each, now) for each in association.addresses):
            return []
        return [pack_association(association, [_NO_BINDING])]

    def _confirmed(self, request: Message6) -> Option:
        """Answer a CONFIRM (18.3.3).  Raises `BadDhcpMessage` if it has no address."""
        addresses = [address for each in request.associations() for address in each.addresses]
        if not addresses:
            raise BadDhcpMessage("no-address")
        return pack_status(message6.SUCCESS, "") if self._on_link(addresses) else _NOT_ON_LINK

    def _on_link(self, addresses: Iterable[IPv6Address]) -> bool:
        return all(each in self._network for each in addresses)

    def _choose(self, association: Association, client: Client, now: float) -> IPv6Address | None:
        address = self.leases.choose(client, association.addresses, now)
        assert address is None or address.version == 6
        return address

    def _grant(self, client: Client, address: IPv6Address, name: str, now: float) -> None:
        until = math.inf if self._seconds == INFINITE else now + self._seconds
        self.leases.grant(client, address, until, name)

    def _given(self, association: Association, options: list[Option]) -> Option:
        return pack_association(association, options, self._renewal, self._rebinding)

    # -- other options ----------------------------------------------------------------------------------

    def _parameters_for(self, request: Message6, wanted: tuple[int, ...] | None) -> list[Option]:
        """Return the options that the client asks for, in the order of its request."""
        have = dict(self._parameters)
        if request.type == message6.INFORMATION_REQUEST:
            have[message6.REFRESH_TIME] = REFRESH_SECONDS.to_bytes(4, "big")
        given = request.get(message6.FQDN)
        if given and (len(given) == 1 or _name(request)):  # without a name the client asks for one
            overridden = _OVERRIDDEN if given[0] & _SERVER_UPDATES else 0
            have[message6.FQDN] = bytes((_NOT_UPDATED | overridden,)) + given[1:]
        codes = have if wanted is None else dict.fromkeys(wanted)
        return [(code, have[code]) for code in codes if code in have]

    def stats(self) -> dict[str, int]:
        """Return how many messages were sent, by type, and how many dropped, by reason."""
        dropped = {
            f"dropped_{reason.replace('-', '_')}": count for reason, count in sorted(self.dropped.items())
        }
        return {**{f"sent_{name}": self.sent[name] for name in _NAMES.values()}, **dropped}


def _name(request: Message6) -> str:
    """Return the client's own name for itself (RFC 4704), "" if it is no host name."""
    return read_host_name((request.get(message6.FQDN) or b"")[1:])
