"""Handed: the host's listening sockets that commands get themselves, which is mode "fd".

They are in the caller's process and not in the engine's, and what comes in by them passes neither.  A command gets
copies by the option `listen`, and has them until it closes them; what is here only keeps them for the next command.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import suppress

from netns_kit.errors import PortSpecError
from netns_kit.frozen import replace
from netns_kit.host.paths import NOTHING_MADE, Made
from netns_kit.namespace.given import HasFileno

from .binding import all_or_none, listen, listen_unix
from .ports import PortForward, UnixSocket


class Handed:
    """The listening sockets of one forwarder, by the forwards that say where they listen."""

    def __init__(self) -> None:
        self._sockets: dict[PortForward, tuple[socket.socket, Made]] = {}

    def add(self, forwards: Iterable[PortForward]) -> tuple[PortForward, ...]:
        """Listen as these forwards say, or as none does.  Return them with the ports that the kernel has chosen.

        An optional one whose port cannot be had is left out.

        Raises:
            PortSpecError: A forward leads to an address, which no listening socket does.
            PortInUseError, AddressError, OSError: A port cannot be had.
        """
        return tuple(all_or_none(forwards, self._listen, self.remove))

    def _listen(self, forward: PortForward) -> PortForward:
        if forward.guest is not None:
            expected = "expected no address inside: the command has the host's socket itself"
            raise PortSpecError(
                expected, "port", str(forward), "leave it out, or choose another mode than fd"
            )
        if isinstance(forward.host, UnixSocket):
            self._sockets[forward] = listen_unix(forward.host)
        else:
            sock = listen(forward)
            forward = replace(forward, host_port=sock.getsockname()[1])
            self._sockets[forward] = sock, NOTHING_MADE
        return forward

    def remove(self, forward: PortForward) -> bool:
        """Close our copy of a socket, and return whether there was one.  A command keeps its own.

        Raises:
            OSError: The name of a unix socket may not be removed.
        """
        if forward not in self._sockets:
            return False
        sock, made = self._sockets.pop(forward)
        sock.close()
        made.remove()
        return True

    def list(self) -> tuple[PortForward, ...]:
        """Return the forwards, oldest first."""
        return tuple(self._sockets)

    def named(self) -> tuple[tuple[str, HasFileno], ...]:
        """Return the sockets, oldest first, each with a name that tells the port inside, like "80/tcp"."""
        return tuple(
            (f"{forward.guest_port}/{forward.protocol}", sock) for forward, (sock, _) in self._sockets.items()
        )

    def close(self) -> None:
        """Close our copies of all sockets."""
        for forward in self.list():
            with suppress(OSError):
                self.remove(forward)
