"""DHCPv6: the wire, and every message in every state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import dhcp6 as theirs

from netns_kit.dhcp import BadDhcpMessage, Dhcp6Server, DhcpSettings, Reply, StaticLease
from netns_kit.dhcp import message6 as m
from netns_kit.dhcp.leases import DECLINE_SECONDS, OFFER_SECONDS
from netns_kit.dhcp.message6 import Association, Message6, pack_options, parse
from netns_kit.dhcp.server6 import ALL_SERVERS, MOST_ASSOCIATIONS
from netns_kit.dhcp.settings import INFINITE
from netns_kit.domain_names import to_wire

NETWORK = IPv6Network("fd00::/64")
LINK_LOCAL, DNS = IPv6Address("fe80::2"), NETWORK[3]
SERVER_MAC = b"\x52\x55\x0a\0\x02\x02"
SERVER = b"\0\x03\0\x01" + SERVER_MAC
CLIENT = IPv6Address("fe80::1")
MAC = b"\x02\0\0\0\0\x01"
DUID = b"\0\x03\0\x01" + MAC
OTHER = b"\0\x03\0\x01\x02\0\0\0\0\x99"
FOREIGN = IPv6Address("2001:db8::1")
EVERYTHING = b"\0\x17\0\x18\0\x27\0\x20"


def host(number: int) -> IPv6Address:
    return NETWORK[0x100 + number]


ADDRESS = host(0)


def server(settings: DhcpSettings | None = None, *, size: int = 4) -> Dhcp6Server:
    return Dhcp6Server(
        settings or DhcpSettings(lease_seconds=1000),
        address=LINK_LOCAL,
        mac=SERVER_MAC,
        network=NETWORK,
        pool=[host(number) for number in range(size)],
        dns=DNS,
    )


def association(
    *addresses: IPv6Address, code: int = m.IA_NA, iaid: bytes = b"\0\0\0\x07"
) -> tuple[int, bytes]:
    return m.pack_association(
        Association(code, iaid, addresses), [m.pack_address(each, 0) for each in addresses]
    )


class Client:
    """Time stands still until the test sets `now`."""

    def __init__(self, server: Dhcp6Server, duid: bytes = DUID, now: float = 0.0) -> None:
        self.server = server
        self.duid = duid
        self.now = now

    def sends(self, payload: bytes, to: IPv6Address = ALL_SERVERS) -> Reply | None:
        replies = self.server.answer(payload, CLIENT.packed, 546, MAC, to.packed, self.now)
        assert len(replies) <= 1
        for reply in replies:
            assert reply[1:] == (LINK_LOCAL.packed, CLIENT.packed, 546, MAC)
            return reply
        return None

    def says(
        self, kind: int, *options: tuple[int, bytes], known: bool = False, to: IPv6Address = ALL_SERVERS
    ) -> Message6 | None:
        """The answer; `known`: it names the server."""
        head = [(m.CLIENT_ID, self.duid)]
        if known:
            head.append((m.SERVER_ID, SERVER))
        reply = self.sends(Message6(kind, b"abc", [*head, *options]).pack(), to)
        if reply is None:
            return None
        answer = parse(reply.payload)
        assert answer.xid == b"abc"
        assert answer.options[:2] == [(m.CLIENT_ID, self.duid), (m.SERVER_ID, SERVER)]
        return answer

    def leases(self, iaid: bytes = b"\0\0\0\x07") -> IPv6Address:
        answer = self.says(m.SOLICIT, association(iaid=iaid), (m.RAPID_COMMIT, b""))
        assert answer is not None
        return given_in(answer)[0][0]


def given_in(answer: Message6) -> list[tuple[IPv6Address, int]]:
    """The addresses, and how many seconds they are valid."""
    found = []
    for code, value in answer.options:
        if code == m.IA_NA:
            for each, inner in parse(b"\0abc" + value[12:]).options:
                if each == m.IA_ADDRESS:
                    assert inner[16:20] == inner[20:24]
                    found.append((IPv6Address(inner[:16]), int.from_bytes(inner[20:24], "big")))
    return found


def status(value: bytes | None) -> str:
    names = ["success", "", "no addresses", "no binding", "not on link", "use multicast", "no prefix"]
    return "" if value is None else names[int.from_bytes(value[:2], "big")]


def brief(answer: Message6 | None) -> str:
    """ "reply ::100", say; what is no longer valid has a minus; "-" for no answer."""
    if answer is None:
        return "-"
    words = [{m.ADVERTISE: "advertise", m.REPLY: "reply"}[answer.type], status(answer.get(m.STATUS))]
    for code, value in answer.options:
        if code in m.ASSOCIATIONS:
            head = 4 if code == m.IA_TA else 12
            words.append(status(parse(b"\0abc" + value[head:]).get(m.STATUS)))
    words += [f"{'' if seconds else '-'}::{address.packed[15]:x}" for address, seconds in given_in(answer)]
    return " ".join(filter(None, words))


# -- every message in every state -----------------------------------------------------------------------


def unknown(me: Client) -> None:
    pass


def offered(me: Client) -> None:
    assert brief(me.says(m.SOLICIT, association())) == "advertise ::0"


def bound(me: Client) -> None:
    assert me.leases() == ADDRESS


def expired(me: Client) -> None:
    bound(me)
    me.now += 1000


def released(me: Client) -> None:
    bound(me)
    me.says(m.RELEASE, association(ADDRESS), known=True)


def declined(me: Client) -> None:
    bound(me)
    me.says(m.DECLINE, association(ADDRESS), known=True)


def revoked(me: Client) -> None:
    bound(me)
    assert me.server.leases.revoke(ADDRESS, me.now)


def taken(me: Client) -> None:
    assert Client(me.server, OTHER, me.now).leases() == ADDRESS


def reserved(me: Client) -> None:
    bound(me)
    me.server.leases.reserve(StaticLease(ADDRESS, client_id=OTHER.hex()))


def full(me: Client) -> None:
    for number in range(4):
        Client(me.server, OTHER + bytes((number,)), me.now).leases()


def says(kind: int, *addresses: IPv6Address, known: bool = False) -> Callable[[Client], str]:
    return lambda me: brief(me.says(kind, association(*addresses), known=known))


STATES = {
    each.__name__: each
    for each in (unknown, offered, bound, expired, released, declined, revoked, taken, reserved, full)
}
MESSAGES: dict[str, Callable[[Client], str]] = {
    "solicit": says(m.SOLICIT, ADDRESS),
    "rapid": lambda me: brief(me.says(m.SOLICIT, association(ADDRESS), (m.RAPID_COMMIT, b""))),
    "request": says(m.REQUEST, ADDRESS, known=True),
    "request elsewhere": says(m.REQUEST, FOREIGN, known=True),
    "confirm": says(m.CONFIRM, ADDRESS),
    "confirm elsewhere": says(m.CONFIRM, ADDRESS, FOREIGN),
    "renew": says(m.RENEW, ADDRESS, known=True),
    "rebind": says(m.REBIND, ADDRESS),
    "rebind elsewhere": says(m.REBIND, FOREIGN),
    "release": says(m.RELEASE, ADDRESS, known=True),
    "decline": says(m.DECLINE, ADDRESS, known=True),
    "information": lambda me: brief(me.says(m.INFORMATION_REQUEST)),
    "advertise": says(m.ADVERTISE, ADDRESS, known=True),
    "reply": says(m.REPLY, ADDRESS, known=True),
    "reconfigure": says(10, ADDRESS, known=True),
    "relayed": says(12, ADDRESS),
    "unheard of": says(77, ADDRESS),
}
ALWAYS = {
    "request elsewhere": "reply not on link",
    "confirm": "reply success",
    "confirm elsewhere": "reply not on link",
    "information": "reply",
    "release": "reply success no binding",
    "decline": "reply success no binding",
}
MINE = {
    **ALWAYS,
    "solicit": "advertise ::0",
    "rapid": "reply ::0",
    "request": "reply ::0",
    "renew": "reply ::0",
    "rebind": "reply ::0",
    "rebind elsewhere": "reply -::1 ::0",
}
HELD = {**MINE, "release": "reply success", "decline": "reply success"}
NOT_MINE = {
    **ALWAYS,
    "solicit": "advertise ::1",
    "rapid": "reply ::1",
    "request": "reply ::1",
    "renew": "reply -::0 ::1",
    "rebind": "reply -::0 ::1",
    "rebind elsewhere": "reply -::1 ::1",
}
ANSWERS = {
    "unknown": MINE,
    "offered": HELD,
    "bound": HELD,
    "expired": MINE,
    "released": MINE,
    "declined": NOT_MINE,
    "revoked": {**NOT_MINE, "release": "reply success"},
    "taken": NOT_MINE,
    "reserved": {**NOT_MINE, "release": "reply success", "decline": "reply success"},
    "full": {
        **ALWAYS,
        "solicit": "advertise no addresses",
        "rapid": "reply no addresses",
        "request": "reply no addresses",
        "renew": "reply -::0",
        "rebind": "reply -::0",
        "rebind elsewhere": "reply -::1",
    },
}


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("state", STATES)
def test_every_message_in_every_state(state: str, message: str) -> None:
    me = Client(server())
    STATES[state](me)
    assert MESSAGES[message](me) == ANSWERS[state].get(message, "-")


@pytest.mark.parametrize("state", STATES)
def test_after_a_reply_the_address_is_who_has_been_told_so(state: str) -> None:
    me = Client(server())
    STATES[state](me)
    answer = me.says(m.RENEW, association(ADDRESS), known=True)
    assert answer is not None
    mine = [each.address for each in me.server.leases.list(me.now) if each.client_id == me.duid.hex(":")]
    valid = [address for address, seconds in given_in(answer) if seconds]
    assert [each for each in mine if state != "declined" or each != ADDRESS] == valid


def test_what_is_offered_and_declined_is_kept_for_a_while() -> None:
    dhcp = server(size=1)
    me, other = Client(dhcp), Client(dhcp, OTHER)
    offered(me)
    assert brief(other.says(m.SOLICIT, association())) == "advertise no addresses"
    assert dhcp.dropped == {"exhausted": 1}
    other.now = OFFER_SECONDS
    assert brief(other.says(m.SOLICIT, association(), (m.RAPID_COMMIT, b""))) == "reply ::0"
    assert brief(other.says(m.DECLINE, association(ADDRESS), known=True)) == "reply success"
    me.now = OFFER_SECONDS + DECLINE_SECONDS - 1
    assert brief(me.says(m.SOLICIT, association())) == "advertise no addresses"
    me.now += 1
    assert brief(me.says(m.SOLICIT, association())) == "advertise ::0"


# -- what is said ---------------------------------------------------------------------------------------


def test_each_association_has_its_address() -> None:
    me = Client(server())
    answer = me.says(m.SOLICIT, association(), association(iaid=b"2222"), (m.RAPID_COMMIT, b""))
    assert answer is not None
    assert given_in(answer) == [(host(0), 1000), (host(1), 1000)]
    assert [value[:12] for code, value in answer.options if code == m.IA_NA] == [
        iaid + (500).to_bytes(4, "big") + (800).to_bytes(4, "big") for iaid in (b"\0\0\0\x07", b"2222")
    ]


def test_no_temporary_addresses_and_no_prefixes() -> None:
    asked = association(code=m.IA_TA), association(code=m.IA_PD), association()
    me = Client(server())
    assert brief(me.says(m.SOLICIT, *asked)) == "advertise no addresses no prefix ::0"
    assert brief(me.says(m.REQUEST, *asked, known=True)) == "reply no addresses no prefix ::0"
    assert brief(me.says(m.RENEW, *asked, known=True)) == "reply no binding no binding ::0"


def test_leases_without_end() -> None:
    me = Client(server(DhcpSettings(lease_seconds=INFINITE)))
    answer = me.says(m.SOLICIT, association(), (m.RAPID_COMMIT, b""))
    assert answer is not None
    value = answer.get(m.IA_NA)
    assert value is not None
    assert value[4:12] == b"\xff" * 8
    assert given_in(answer) == [(host(0), INFINITE)]
    assert me.server.leases.list(1e12)[0].seconds is None


SETTINGS = DhcpSettings(domain="a.example", search=("b.example", "c.example"))
FQDN = (m.FQDN, b"\x01" + to_wire("me.example"))


@pytest.mark.parametrize(
    ("settings", "wanted", "said"),
    [
        (SETTINGS, (m.WANTED, EVERYTHING), [m.DNS, m.SEARCH, m.FQDN]),
        (SETTINGS, (m.WANTED, b"\0\x18\0\x17\0\x18\0\x99"), [m.SEARCH, m.DNS]),
        (SETTINGS, (99, b""), [m.DNS, m.SEARCH, m.FQDN]),
        (DhcpSettings(), (m.WANTED, EVERYTHING), [m.DNS, m.FQDN]),
    ],
)
def test_what_the_client_asks_for(settings: DhcpSettings, wanted: tuple[int, bytes], said: list[int]) -> None:
    answer = Client(server(settings)).says(m.SOLICIT, association(), wanted, FQDN)
    assert answer is not None
    others = [code for code, _ in answer.options if code not in (1, 2, m.IA_NA, m.PREFERENCE)]
    assert others == said
    assert answer.get(m.DNS) == DNS.packed
    if m.SEARCH in said:
        assert answer.get(m.SEARCH) == b"\x01b\x07example\0\x01c\x07example\0"
    if m.FQDN in said:  # not updated by us, and that is not what it asked for
        assert answer.get(m.FQDN) == b"\x06" + to_wire("me.example")


ODD = {
    "a compressed one": b"\xc0\0",
    "a space": b"\x04m pc\0",
    "a short label": b"\x09me\0",
    "not ASCII": b"\x03m\xfcl\0",
}


@pytest.mark.parametrize("name", ODD.values(), ids=ODD)
@pytest.mark.parametrize("kind", [m.SOLICIT, m.REQUEST, m.RENEW, m.REBIND, m.INFORMATION_REQUEST])
def test_an_odd_name_is_left_out_and_the_client_has_its_answer(kind: int, name: bytes) -> None:
    me = Client(server())
    asked = [(m.WANTED, EVERYTHING), (m.FQDN, b"\x01" + name)]
    if kind != m.INFORMATION_REQUEST:
        asked.append(association(ADDRESS))
    answer = me.says(kind, *asked, known=kind in (m.REQUEST, m.RENEW))
    assert answer is not None
    assert answer.get(m.DNS) == DNS.packed
    assert answer.get(m.FQDN) is None
    assert not any(lease.hostname for lease in me.server.leases.list(0))
    assert not me.server.dropped


def test_a_domain_is_where_names_are_looked_up_if_nothing_else_is_said() -> None:
    answer = Client(server(DhcpSettings(domain="a.example"))).says(m.INFORMATION_REQUEST)
    assert answer is not None
    assert answer.get(m.SEARCH) == b"\x01a\x07example\0"


def test_without_a_lease() -> None:
    me = Client(server(SETTINGS))
    answer = me.says(m.INFORMATION_REQUEST, (m.WANTED, EVERYTHING))
    assert answer is not None
    assert [code for code, _ in answer.options] == [1, 2, m.DNS, m.SEARCH, m.REFRESH_TIME]
    nameless = me.sends(Message6(m.INFORMATION_REQUEST, b"abc", []).pack())
    assert nameless is not None
    assert parse(nameless.payload).options[0] == (m.SERVER_ID, SERVER)


def test_the_first_to_answer_is_preferred() -> None:
    answer = Client(server()).says(m.SOLICIT, association())
    assert answer is not None
    assert answer.get(m.PREFERENCE) == b"\xff"


def test_names_are_told_to_people() -> None:
    me = Client(server())
    me.says(m.SOLICIT, association(), (m.RAPID_COMMIT, b""), FQDN)
    (lease,) = me.server.leases.list(0)
    assert (lease.hostname, lease.mac, lease.client_id) == ("me.example", MAC.hex(":"), DUID.hex(":"))


def test_static_leases_by_duid_and_by_hardware() -> None:
    static = StaticLease(host(50), client_id=DUID.hex()), StaticLease(host(51), mac=MAC.hex(":"))
    me = Client(server(DhcpSettings(static=static)))
    assert me.leases() == host(50)
    assert me.leases(b"2222") == host(51)  # the same hardware
    assert me.leases(b"3333") == host(0)


# -- what is not answered -------------------------------------------------------------------------------

GOOD = (m.CLIENT_ID, DUID)
US = (m.SERVER_ID, SERVER)
HEAD = Message6(m.SOLICIT, b"abc", [GOOD]).pack()


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (m.SOLICIT, [association()], "no-client-id"),
        (m.SOLICIT, [GOOD, US], "server-id"),
        (m.REBIND, [GOOD, US], "server-id"),
        (m.REQUEST, [US, association()], "no-client-id"),
        (m.REQUEST, [GOOD, association()], "other-server"),
        (m.RENEW, [GOOD, (m.SERVER_ID, OTHER)], "other-server"),
        (m.INFORMATION_REQUEST, [(m.SERVER_ID, OTHER)], "other-server"),
        (m.INFORMATION_REQUEST, [GOOD, association()], "associations"),
        (m.CONFIRM, [GOOD, association()], "no-address"),
        (m.SOLICIT, [(m.CLIENT_ID, b"\0\x03")], "duid"),
        (m.SOLICIT, [(m.CLIENT_ID, bytes(131))], "duid"),
        (m.SOLICIT, [GOOD, *([association()] * (MOST_ASSOCIATIONS + 1))], "associations"),
        (m.SOLICIT, [GOOD, (m.IA_NA, bytes(11))], "option-length"),
        (m.SOLICIT, [GOOD, (m.IA_TA, bytes(3))], "option-length"),
        (m.SOLICIT, [GOOD, (m.IA_NA, bytes(12) + b"\0\x05\0\x17" + bytes(23))], "option-length"),
        (m.SOLICIT, [GOOD, (m.IA_NA, bytes(12) + b"\0\x05\0")], "option-length"),
        (m.SOLICIT, [GOOD, association(), (m.WANTED, b"\0")], "option-length"),
    ],
)
def test_what_is_not_answered_is_counted(kind: int, options: list[tuple[int, bytes]], reason: str) -> None:
    me = Client(server())
    assert me.sends(Message6(kind, b"abc", options).pack()) is None
    assert me.server.dropped == {reason: 1}
    assert me.server.leases.list(0) == ()
    assert me.server.stats() == {
        "sent_advertise": 0,
        "sent_reply": 0,
        f"dropped_{reason.replace('-', '_')}": 1,
    }


@pytest.mark.parametrize("kind", [m.REQUEST, m.RENEW, m.RELEASE, m.DECLINE])
def test_who_talks_to_us_alone_is_told_not_to(kind: int) -> None:
    me = Client(server())
    assert brief(me.says(kind, association(ADDRESS), known=True, to=NETWORK[2])) == "reply use multicast"
    assert me.server.leases.list(0) == ()


@pytest.mark.parametrize("kind", [m.SOLICIT, m.CONFIRM, m.REBIND, m.INFORMATION_REQUEST])
def test_who_talks_to_us_alone_too_early_is_not_answered(kind: int) -> None:
    me = Client(server())
    assert me.says(kind, to=NETWORK[2]) is None
    assert me.server.dropped == {"unicast": 1}


def test_only_who_may_have_the_clients_port_is_a_client() -> None:
    dhcp = server()
    for port in (0, 547, 40000):
        assert dhcp.answer(HEAD, CLIENT.packed, port, MAC, ALL_SERVERS.packed, 0) == ()
    assert dhcp.dropped == {"port": 3}


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=200).map(lambda tail: HEAD + tail)))
def test_hostile_bytes_raise_one_exception(data: bytes) -> None:
    with suppress(BadDhcpMessage):
        message = parse(data)
        message.associations()
        message.wanted()
    dhcp = server()
    dhcp.answer(data, CLIENT.packed, 546, MAC, ALL_SERVERS.packed, 0)
    assert sum(dhcp.dropped.values()) + sum(dhcp.sent.values()) >= 1


options = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 14, 25, 39]), st.binary(max_size=60)),
        st.sampled_from([GOOD, US, association(), association(ADDRESS), FQDN, (m.RAPID_COMMIT, b"")]),
    ),
    max_size=8,
)


@given(st.lists(st.tuples(st.integers(0, 14), options), max_size=8))
def test_whatever_is_sent_is_answered_once_or_counted(
    said: list[tuple[int, list[tuple[int, bytes]]]],
) -> None:
    me = Client(server())
    for kind, others in said:
        before = sum(me.server.sent.values())
        reply = me.sends(Message6(kind, b"abc", others).pack())
        assert sum(me.server.sent.values()) - before == (reply is not None)
        assert reply is not None or me.server.dropped
        if reply is not None:
            parse(reply.payload)
        assert len(me.server.leases.list(0)) <= 4


# -- the wire -------------------------------------------------------------------------------------------


@given(
    st.builds(
        Message6,
        type=st.integers(0, 255),
        xid=st.binary(min_size=3, max_size=3),
        options=st.lists(st.tuples(st.integers(0, 65535), st.binary(max_size=60)), max_size=9),
    )
)
def test_what_we_pack_we_parse(message: Message6) -> None:
    assert parse(message.pack()) == message
    assert parse(b"\0abc" + pack_options(message.options)).options == message.options


def test_scapy_reads_the_same() -> None:
    me = Client(server(SETTINGS))
    reply = me.sends(Message6(m.SOLICIT, b"abc", [GOOD, association(), (m.WANTED, EVERYTHING), FQDN]).pack())
    assert reply is not None
    answer = theirs.DHCP6_Advertise(reply.payload)
    assert answer.trid == int.from_bytes(b"abc", "big")
    assert answer[theirs.DHCP6OptServerId].duid.lladdr == SERVER_MAC.hex(":")
    address = answer[theirs.DHCP6OptIAAddress]
    assert (address.addr, address.preflft, address.validlft) == (str(ADDRESS), 86400, 86400)
    assert (answer[theirs.DHCP6OptIA_NA].T1, answer[theirs.DHCP6OptIA_NA].T2) == (43200, 69120)
    assert answer[theirs.DHCP6OptDNSServers].dnsservers == [str(DNS)]
    assert [each.rstrip(".") for each in answer[theirs.DHCP6OptDNSDomains].dnsdomains] == [
        "b.example",
        "c.example",
    ]
