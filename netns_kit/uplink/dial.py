"""Dialling: how a TCP flow of the guest gets a stream to its other end.

`Uplink.dial` answers at once, and never blocks:

    Connected(socket)    the stream is connected: the guest's SYN is accepted now
    Refused(why)         it cannot be connected: the guest is told why
    Pending              it is being connected: its descriptor is polled, and `Pending.advance` answers again

Another kind of uplink is a subclass with its own `dial`.  `netns_kit.uplink.direct` connects sockets of the host.  A
proxy's protocol would be spoken in `Pending.advance`.  An uplink in memory returns one end of a socket pair.

TCP connections to DNS resolvers are dialled too.  UDP and pings are not: an uplink that sends these elsewhere
overrides `Uplink.open`.
"""

from __future__ import annotations

import socket
from typing import NamedTuple, Protocol, TypeAlias

from netns_kit.stack import IcmpError, Refusal


class Connected(NamedTuple):
    """A dial that has succeeded."""

    socket: socket.socket
    """A non-blocking stream socket, of TCP or AF_UNIX.  The caller of `Uplink.dial` owns it from now on."""


class Refused(NamedTuple):
    """A dial that has failed."""

    why: Refusal | IcmpError
    """The reason, which the guest is told."""


class Pending(Protocol):
    """A dial that is not decided yet.  Its descriptor is polled, edge-triggered, for input and output."""

    def fileno(self) -> int:
        """Return the descriptor to poll.

        It stays open and the same until `close` is called, or until `advance` returns `Connected` with it.
        """
        ...

    def advance(self, *, failed: bool) -> Dial:
        """Go on, now that the descriptor is ready, and return the state of the dial.

        While nothing is decided that is this object itself.  Another `Pending` takes its place: it is polled instead.

        Args:
            failed: True if the descriptor has an error or a hang-up.
        """
        ...

    def close(self) -> None:
        """Give up: close every descriptor that was not returned in a `Connected`.  Calling it again is allowed."""
        ...


Dial: TypeAlias = "Pending | Connected | Refused"
"""What `Uplink.dial` returns: `Connected`, `Refused`, or a `Pending` dial."""
