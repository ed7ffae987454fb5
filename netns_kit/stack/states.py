"""States of a connection (RFC 9293 3.3.2), and the purposes of its one timer."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """The state of a connection."""

    SYN_HELD = "SYN-HELD"  # the guest's SYN waits for the user's decision; RFC 9293 has no such state
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

# tuples, not sets: the hash of an Enum member is a call
SENDING = (ESTABLISHED, CLOSE_WAIT)  # the user may still send
RECEIVING = (ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2)  # the guest may still send
HALF_CLOSED = (FIN_WAIT_2, CLOSE_WAIT)
HANDSHAKE = (SYN_HELD, SYN_RECEIVED)  # the guest has sent a SYN, but may not exist


class Purpose(Enum):
    """The purpose of a connection's timer.  No two of them can be due at the same time."""

    NONE = "none"
    PENDING = "pending"
    RETRANSMIT = "retransmit"
    PERSIST = "persist"
    KEEPALIVE = "keepalive"
