"""The states of RFC 9293 3.3.2, and the purposes of a connection's one timer."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """The state of a connection."""

    SYN_HELD = "SYN-HELD"  # RFC 9293 has LISTEN: the guest's SYN is on hold until the user can tell
    SYN_SENT = "SYN-SENT"
    SYN_RECEIVED = "SYN-RECEIVED"
    ESTABLISHED = "ESTABLISHED"
    FIN_WAIT_1 = "FIN-WAIT-1"
    FIN_WAIT_2 = "FIN-WAIT-2"
    CLOSE_WAIT = "CLOSE-WAIT"
    CLOSING = "CLOSING"
    LAST_ACK = "LAST-ACK"
    TIME_WAIT = "TIME-WAIT"
    CLOSED = "CLOSED"


(
    SYN_HELD, SYN_SENT, SYN_RECEIVED, ESTABLISHED,
    FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT, CLOSING, LAST_ACK, TIME_WAIT, CLOSED,
) = State  # fmt: skip

# tuples: an Enum's hash is a call, its identity is not
SENDING = (ESTABLISHED, CLOSE_WAIT)  # the user may still send
RECEIVING = (ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2)  # the guest may still send
HALF_CLOSED = (FIN_WAIT_2, CLOSE_WAIT)
HANDSHAKE = (SYN_HELD, SYN_RECEIVED)  # the guest has opened it, and may not be there


class Purpose(Enum):
    """The purpose of a connection's one timer.  No two of these can be due at once."""

    NONE = "none"
    PENDING = "pending"
    RETRANSMIT = "retransmit"
    PERSIST = "persist"
    KEEPALIVE = "keepalive"
