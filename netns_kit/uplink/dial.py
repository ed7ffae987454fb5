"""Dialling: how a TCP flow of the guest gets a stream to its other end.

`Uplink.dial` answers at once, and never blocks:

    Connected(socket)    the stream is there: the guest's SYN is accepted now
    Refused(why)         it is not to be had: the guest is told why
    Pending              it is under way: its descriptor is polled, and `Pending.advance` answers again

A kind of uplink is a class with a `dial` of its own.  `netns_kit.uplink.direct` connects sockets of the host; a
proxy's protocol would be spoken in `Pending.advance`; an uplink in memory returns one end of a socket pair.

DNS over TCP to resolvers, UDP and pings do not dial: an uplink that sends these elsewhere overrides `Uplink.open`.
"""

from __future__ import annotations

import socket
from typing import NamedTuple, Protocol, TypeAlias

from netns_kit.stack import IcmpError, Refusal


class Connected(NamedTuple):
    """A dial that has succeeded."""

    socket: socket.socket
    """A non-blocking stream socket, of TCP or AF_UNIX.  Whoever has dialled owns and closes it."""


class Refused(NamedTuple):
    """A dial that has failed."""

    why: Refusal | IcmpError
    """What the guest is told."""


class Pending(Protocol):
    """A dial under way.  It is polled edge-triggered, for input and output."""

    def fileno(self) -> int:
        """Return the descriptor to poll.  It stays the same and open until `close`, or is the connected socket's."""
        ...

    def advance(self, *, failed: bool) -> Dial:
        """Do what can be done now that the descriptor is ready; return what has become of the dial.

        That is itself while nothing is decided.  Another `Pending` is polled in its place.

        Args:
            failed: whether the descriptor tells of an error or a hang-up.
        """
        ...

    def close(self) -> None:
        """Give up, and close every descriptor that no `Connected` has been given.  Calling it again is fine."""
        ...


Dial: TypeAlias = "Pending | Connected | Refused"
"""What `Uplink.dial` returns: `Connected`, `Refused`, or a `Pending` dial."""
