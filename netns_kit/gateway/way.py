"""DatagramWay, WayRelay: the way out of an intercepted UDP flow through a proxy.

To the relay of the proxy's association it is a flow, as one of the guest's.  Its other end is a socket pair, whose
records are those of `netns_kit.gateway.served`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from netns_kit.stack import IcmpError, Refusal
from netns_kit.stack.user import NOBODY, Ending
from netns_kit.uplink.dial import Refused
from netns_kit.uplink.indirect import UdpAssociation

from .engine import IN, Engine
from .relay.associated import AssociatedRelay
from .served import DATAGRAM, DATAGRAMS_PER_STEP, LONGEST

if TYPE_CHECKING:
    from .flow_router import DatagramsTaker


class DatagramWay:
    """One end of a pair, as a flow.

    Args:
        engine: Polls it.
        end: The end of the pair.
        closed: Called with this object when it is over.
    """

    key = b""  # the only one of its relay
    user: Any = NOBODY

    def __init__(self, engine: Engine, end: socket.socket, closed: Callable[[DatagramWay], object]) -> None:
        self._engine = engine
        self._end = end
        self._closed = closed
        engine.add(end.fileno(), self._on_events, IN)

    def _on_events(self, _: int) -> None:
        for _ in range(DATAGRAMS_PER_STEP):
            if self._end.fileno() < 0:
                return
            try:
                record = self._end.recv(LONGEST)
            except BlockingIOError:
                return
            except OSError:
                record = b""
            if not record:
                self.close()
                return
            self.user.datagram(self, memoryview(record)[len(DATAGRAM) :], 0, 0)

    def send(self, payload: memoryview, now: float) -> None:
        """Pass a datagram on to the handler; one that it has no room for is lost, as on any way."""
        with suppress(OSError):
            self._end.sendmsg((DATAGRAM, payload), (), socket.MSG_NOSIGNAL)

    def refuse(self, why: Refusal | IcmpError, payload: bytes) -> None:
        """Do nothing: one datagram is lost."""

    def turn_away(self, why: Refusal) -> None:
        """End the way, since the proxy refuses it."""
        self.close()

    def end(self, _: Ending = "ended") -> None:
        """End the way, as a flow is."""
        self.close()

    def close(self) -> None:
        """End the way.  Calling it again is allowed."""
        if self._end.fileno() >= 0:
            self._engine.remove(self._end.fileno())
            self._end.close()
            user, self.user = self.user, NOBODY
            self._closed(self)
            user.expired(self)


class WayRelay(AssociatedRelay):
    """The association of one `DatagramWay`.

    Args:
        engine: The engine that polls the sockets.
        association: The way through the proxy.
        failed: Called with the exception of a dial that raises.
        way: The flow.
        far: The handler's end of its pair.
        give: Called with that when the proxy lets datagrams through, or with how it refuses them.
    """

    __slots__ = ("_far", "_give")

    def __init__(
        self,
        engine: Engine,
        association: UdpAssociation,
        failed: Callable[[BaseException], Refused],
        way: DatagramWay,
        far: socket.socket,
        give: DatagramsTaker,
    ) -> None:
        super().__init__(engine, association, failed, idle=way.close)
        self._far: socket.socket | None = far
        self._give = give

    def _connected(self, sock: socket.socket) -> None:
        super()._connected(sock)
        far, self._far = self._far, None
        if far is not None:  # else it is refused for lack of a socket
            self._give(far)

    def _refused(self, why: Refusal | IcmpError) -> None:
        if self._far is not None:
            self._far.close()
            self._far = None
            self._give(why if isinstance(why, Refusal) else Refusal.HOST_UNREACHABLE)
        super()._refused(why)

    def close(self) -> None:
        if self._far is not None:
            self._far.close()
            self._far = None
        super().close()
