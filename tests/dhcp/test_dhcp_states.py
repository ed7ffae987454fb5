"""Every state that an address may be in, and every message a client may send about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from netns_kit.dhcp import DhcpServer, StaticLease
from netns_kit.dhcp import message as m
from netns_kit.dhcp.message import Message
from tests.support.dhcp_client import SERVER, Client, brief, host, server

ADDRESS = host(15)
OTHER_MAC = b"\x02\0\0\0\0\x99"
AWAY = host(77)  # of another server


def unknown(me: Client) -> None:
    pass


def offered(me: Client) -> None:
    assert me.discovers().yiaddr == ADDRESS


def bound(me: Client) -> None:
    assert me.leases() == ADDRESS


def expired(me: Client) -> None:
    bound(me)
    me.now += 1000


def released(me: Client) -> None:
    bound(me)
    me.says(m.RELEASE, ciaddr=ADDRESS)


def declined(me: Client) -> None:
    bound(me)
    me.says(m.DECLINE, {m.ADDRESS: ADDRESS.packed})


def revoked(me: Client) -> None:
    bound(me)
    assert me.server.leases.revoke(ADDRESS, me.now)


def taken(me: Client) -> None:
    assert Client(me.server, OTHER_MAC, me.now).leases() == ADDRESS


def reserved(me: Client) -> None:
    bound(me)
    me.server.leases.reserve(StaticLease(ADDRESS, mac=OTHER_MAC.hex(":")))


def full(me: Client) -> None:
    for number in range(4):
        Client(me.server, bytes((2, 0, 0, 0, 1, number)), me.now).leases()


WANTED = {m.ADDRESS: ADDRESS.packed}
MESSAGES: dict[str, Callable[[Client], str]] = {
    "discover": lambda me: brief(me.says(m.DISCOVER, WANTED)),
    "rapid": lambda me: brief(me.says(m.DISCOVER, {**WANTED, m.RAPID_COMMIT: b""})),
    "selecting": lambda me: brief(me.says(m.REQUEST_ADDRESS, {**WANTED, m.SERVER: SERVER.packed})),
    "elsewhere": lambda me: brief(
        me.says(m.REQUEST_ADDRESS, {m.ADDRESS: AWAY.packed, m.SERVER: AWAY.packed})
    ),
    "reboot": lambda me: brief(me.says(m.REQUEST_ADDRESS, WANTED)),
    "foreign": lambda me: brief(me.says(m.REQUEST_ADDRESS, {m.ADDRESS: b"\x0a\x63\0\x01"})),
    "renewing": lambda me: brief(me.says(m.REQUEST_ADDRESS, ciaddr=ADDRESS)),
    "release": lambda me: brief(me.says(m.RELEASE, {m.SERVER: SERVER.packed}, ciaddr=ADDRESS)),
    "decline": lambda me: brief(me.says(m.DECLINE, {**WANTED, m.SERVER: SERVER.packed})),
    "inform": lambda me: brief(me.says(m.INFORM, ciaddr=ADDRESS)),
    "offer": lambda me: brief(me.says(m.OFFER)),
    "nak": lambda me: brief(me.says(m.NAK)),
    "unheard of": lambda me: brief(me.says(77)),
    "of no type": lambda me: brief(me.sends(Message(m.REQUEST, me.xid, me.mac).pack())),
}
STATES = {
    each.__name__: each
    for each in (unknown, offered, bound, expired, released, declined, revoked, taken, reserved, full)
}
MINE = {
    "discover": "offer .15",
    "rapid": "ack .15",
    "selecting": "ack .15",
    "reboot": "ack .15",
    "foreign": "nak",
    "renewing": "ack .15",
    "inform": "ack",
}
NOT_MINE = {
    **MINE,
    "discover": "offer .16",
    "rapid": "ack .16",
    "selecting": "nak",
    "reboot": "nak",
    "renewing": "nak",
}
ANSWERS = {
    "unknown": MINE,
    "offered": MINE,
    "bound": MINE,
    "expired": MINE,
    "released": MINE,
    "declined": NOT_MINE,
    "revoked": NOT_MINE,
    "taken": NOT_MINE,
    "reserved": NOT_MINE,
    "full": {**NOT_MINE, "discover": "-", "rapid": "-"},
}
# What .15 is afterwards, if that is not what it was: "free" or a state.
BECOMES = {
    ("unknown", "discover"): "offered",
    ("expired", "discover"): "offered",
    ("released", "discover"): "offered",
    ("offered", "elsewhere"): "free",
    ("bound", "release"): "free",
    ("offered", "release"): "free",
    ("offered", "decline"): "declined",
    ("bound", "decline"): "declined",
    **{(state, "decline"): "free" for state in ("unknown", "expired", "released")},
    **{
        (state, message): "bound"
        for state in ("unknown", "offered", "expired", "released")
        for message in ("rapid", "selecting", "reboot", "renewing")
    },
    # its client knows now, or says that it does not need it
    **{("revoked", message): "free" for message in ("selecting", "reboot", "renewing", "release")},
    **{
        ("reserved", message): "reserved"
        for message in ("discover", "rapid", "selecting", "reboot", "renewing", "release")
    },
    ("reserved", "decline"): "declined",
}
WAS = {
    "unknown": "free",
    "expired": "free",
    "released": "free",
    "taken": "bound",
    "reserved": "bound",
    "full": "bound",
}


def state_of(server: DhcpServer, now: float) -> str:
    return next((each.state for each in server.leases.list(now) if each.address == ADDRESS), "free")


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("state", STATES)
def test_every_message_in_every_state(state: str, message: str) -> None:
    me = Client(server())
    STATES[state](me)
    before = state_of(me.server, me.now)
    assert before == WAS.get(state, state)
    assert MESSAGES[message](me) == ANSWERS[state].get(message, "-")
    assert state_of(me.server, me.now) == BECOMES.get((state, message), before)


@pytest.mark.parametrize("state", [each for each in STATES if each != "full"])
def test_a_client_turned_away_begins_anew_and_gets_an_address(state: str) -> None:
    me = Client(server())
    STATES[state](me)
    me.says(m.REQUEST_ADDRESS, ciaddr=ADDRESS)
    address = me.leases()
    assert MESSAGES["reboot"](me) == ("ack .15" if address == ADDRESS else "nak")
    mine = [each for each in me.server.leases.list(me.now) if each.mac == me.mac.hex(":")]
    assert [each.address for each in mine if each.state == "bound"] == [address]
