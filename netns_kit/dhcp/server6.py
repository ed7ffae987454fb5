"""The DHCPv6 server (RFC 8415), for one link that is all ours.

Theory of operation.  As `DhcpServer`: an answer to each message at once, from a table of leases; and like it we are
authoritative, so an address that can be a client's is given to who renews it, known or not.  For each IA_NA of a
client there is one address.  Temporary addresses and prefixes are not to be had: their associations are answered with
the status that says so.

With addresses or without (INFORMATION-REQUEST), clients learn the name server (option 23), the domains to look up
names in (24), and their own name as they gave it (39), if it is one: nobody updates a DNS with it.  If a client says
what it wants (option 6), that, and else all.

What is malformed, for others, or not to be answered (16) is counted in `dropped`, by reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from ipaddress import IPv6Address, IPv6Network

from . import message6, names
from .errors import BadMessage
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
    """Gives the addresses of `pool`, and those of static leases, to the clients of `network`.

    `address` is ours, of the link; `mac` too: the server is known by it.  `dns` is the name server's address.  Times
    are seconds of any clock that is not set back.
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
            self._parameters[message6.SEARCH] = b"".join(map(names.pack, domains))

    def answer(
        self, payload: bytes, source: bytes, port: int, mac: bytes, destination: bytes, now: float
    ) -> tuple[Reply, ...]:
        """The answer to a client's datagram, if there is one.  Never raises."""
        try:
            if port != CLIENT_PORT:  # see `netns_kit.dhcp.server`
                raise BadMessage("port")
            request = parse(payload)
            answer = self._answer(request, mac, destination == ALL_SERVERS.packed, now)
        except BadMessage as bad:
            self.dropped[bad.reason] += 1
            return ()
        self.sent[_NAMES[answer.type]] += 1
        return (Reply(answer.pack(), self._address.packed, source, CLIENT_PORT, mac),)

    def _answer(self, request: Message6, mac: bytes, to_all: bool, now: float) -> Message6:
        """Raises `BadMessage`."""
        self._check(request, to_all)
        duid = request.duid(message6.CLIENT_ID)
        head = [] if duid is None else [(message6.CLIENT_ID, duid)]
        answer = Message6(message6.REPLY, request.xid, [*head, (message6.SERVER_ID, self._duid)])
        if not to_all:  # 18.3: nobody was told that he may
            answer.options.append(pack_status(message6.USE_MULTICAST, "use multicast"))
            return answer
        if request.type == message6.SOLICIT:
            if request.get(message6.RAPID_COMMIT) is None:
                answer.type = message6.ADVERTISE
                answer.options.append((message6.PREFERENCE, b"\xff"))  # no use in waiting for others
            else:
                answer.options.append((message6.RAPID_COMMIT, b""))
        name, wanted = _name(request), request.wanted()
        match request.type:
            case message6.CONFIRM:
                answer.options.append(self._confirmed(request))
                return answer
            case message6.RELEASE | message6.DECLINE:
                answer.options.append(pack_status(message6.SUCCESS, "done"))
        for each in request.associations():
            client = Client(duid or b"", mac, each.iaid)
            match request.type:
                case message6.SOLICIT:
                    offer = answer.type == message6.ADVERTISE
                    answer.options.append(self._assigned(each, client, name, now, offer=offer))
                case message6.REQUEST:
                    answer.options.append(self._requested(each, client, name, now))
                case message6.RENEW | message6.REBIND:
                    answer.options.append(self._renewed(each, client, name, now))
                case message6.RELEASE | message6.DECLINE:
                    declined = request.type == message6.DECLINE
                    answer.options += self._given_up(each, client, now, declined=declined)
        if request.type not in _GIVING_UP:
            answer.options += self._parameters_for(request, wanted)
        return answer

    def _check(self, request: Message6, to_all: bool) -> None:
        """Whether it is to be answered (16).  Raises `BadMessage`."""
        kind = request.type
        server = request.duid(message6.SERVER_ID)
        associations = request.associations()
        if kind not in _FROM_CLIENTS:
            raise BadMessage("type")
        if len(associations) > (0 if kind == message6.INFORMATION_REQUEST else MOST_ASSOCIATIONS):
            raise BadMessage("associations")
        if kind != message6.INFORMATION_REQUEST and request.duid(message6.CLIENT_ID) is None:
            raise BadMessage("no-client-id")
        if kind in _TO_ALL_SERVERS and server is not None:
            raise BadMessage("server-id")
        if server != self._duid and (kind in _TO_THIS_SERVER or server is not None):
            raise BadMessage("other-server")
        if not to_all and kind not in _TO_THIS_SERVER:
            raise BadMessage("unicast")

    # -- what becomes of an association ---------------------------------------------------------------

    def _assigned(
        self, association: Association, client: Client, name: str, now: float, *, offer: bool = False
    ) -> Option:
        """18.3.1"""
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
        """18.3.2"""
        if association.code == message6.IA_NA and not self._on_link(association.addresses):
            return pack_association(association, [_NOT_ON_LINK])
        return self._assigned(association, client, name, now)

    def _renewed(self, association: Association, client: Client, name: str, now: float) -> Option:
        """18.3.4, 18.3.5: what the client is not to have any more ends now, and it gets something better."""
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
        """18.3.7, 18.3.8: only what was not the client's is mentioned."""
        give_up = self.leases.decline if declined else self.leases.renounce
        if any(give_up(client, each, now) for each in association.addresses):
            return []
        return [pack_association(association, [_NO_BINDING])]

    def _confirmed(self, request: Message6) -> Option:
        """18.3.3"""
        addresses = [address for each in request.associations() for address in each.addresses]
        if not addresses:
            raise BadMessage("no-address")
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

    # -- what else is said ------------------------------------------------------------------------------

    def _parameters_for(self, request: Message6, wanted: tuple[int, ...] | None) -> list[Option]:
        """What the client asks for, in the order of its asking."""
        have = dict(self._parameters)
        if request.type == message6.INFORMATION_REQUEST:
            have[message6.REFRESH_TIME] = REFRESH_SECONDS.to_bytes(4, "big")
        given = request.get(message6.FQDN)
        if given and _is_domain(given[1:]):
            overridden = _OVERRIDDEN if given[0] & _SERVER_UPDATES else 0
            have[message6.FQDN] = bytes((_NOT_UPDATED | overridden,)) + given[1:]
        codes = have if wanted is None else dict.fromkeys(wanted)
        return [(code, have[code]) for code in codes if code in have]

    def stats(self) -> dict[str, int]:
        """What was sent, by its type, and what was not answered, by reason."""
        dropped = {
            f"dropped_{reason.replace('-', '_')}": count for reason, count in sorted(self.dropped.items())
        }
        return {**{f"sent_{name}": self.sent[name] for name in _NAMES.values()}, **dropped}


def _name(request: Message6) -> str:
    """What the client calls itself (RFC 4704), if that is a name: what is none is no reason not to answer."""
    value = request.get(message6.FQDN)
    return names.parse(value[1:]) if value and value[1:] and _is_domain(value[1:]) else ""


def _is_domain(data: bytes) -> bool:
    """Whether it is a name, or none at all, for us to give one."""
    try:
        return not data or bool(names.parse(data))
    except BadMessage:
        return False
