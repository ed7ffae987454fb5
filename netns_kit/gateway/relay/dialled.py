"""Dialled: the common part of relays whose stream the uplink dials.

`Dialled.begin` takes the result of `Uplink.dial`.  While the dial is pending, its descriptor is polled, and the dial
goes on whenever the descriptor is ready.  When it is decided, either `Dialled._connected` or `Dialled._refused` is
called, once.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from netns_kit.gateway.engine import EDGE, ERROR, HANG_UP, IN, OUT, READ_HANG_UP, URGENT, Engine
from netns_kit.stack import IcmpError, Refusal
from netns_kit.uplink.dial import Connected, Dial, Pending, Refused
from netns_kit.uplink.sockets import refusal_for

EVENTS = IN | OUT | READ_HANG_UP | URGENT | EDGE
FAILURE = ERROR | HANG_UP


class Dialled:
    """A relay that waits for its dial.

    A subclass sets the first three attributes itself when it is made: that saves a call for each connection.
    """

    __slots__ = ("_engine", "_failed", "_pending", "_watched")

    _engine: Engine
    # called if a dial raises, and tells how that is refused
    _failed: Callable[[BaseException], Refused] | None
    _pending: Pending | None  # the dial that is under way
    _watched: int  # the descriptor that is polled for `_pending`

    def begin(self, dial: Dial) -> None:
        """Wait for `dial`."""
        if isinstance(dial, Refused):
            self._refused(dial.why)
        elif isinstance(dial, Connected):
            try:
                self._engine.add(dial.socket.fileno(), self._on_events, EVENTS)
            except OSError as failure:
                dial.socket.close()
                self._refused(refusal_for(failure.errno or errno.EIO))
            else:
                self._connected(dial.socket)
        else:
            try:
                watched = dial.fileno()
                self._engine.add(watched, self._while_dialling, EVENTS)
            except OSError as failure:
                dial.close()
                self._refused(refusal_for(failure.errno or errno.EIO))
            except Exception as failure:  # the uplink has returned something else than a dial
                self._refused(self._why(failure))
            else:
                self._pending, self._watched = dial, watched

    def _why(self, failure: BaseException) -> Refusal | IcmpError:
        if self._failed is None:
            raise failure
        return self._failed(failure).why

    def _while_dialling(self, events: int) -> None:
        pending = self._pending
        if pending is None:
            return
        try:
            dial = pending.advance(failed=events & FAILURE != 0)
        except KeyboardInterrupt:
            raise
        except BaseException as failure:
            dial = Refused(self._why(failure))
        if dial is pending:
            return
        self._pending = None
        if isinstance(dial, Connected) and dial.socket.fileno() == self._watched:
            self._engine.replace(self._watched, self._on_events)
            self._connected(dial.socket)
            self._on_events(events)
        else:
            self._engine.remove(self._watched)
            pending.close()
            self.begin(dial)

    @property
    def pending(self) -> Pending | None:
        """The dial that is under way."""
        return self._pending

    def refuse(self, why: Refusal | IcmpError) -> None:
        """Give up the pending dial, as if it had been refused."""
        self._give_up()
        self._refused(why)

    def _give_up(self) -> None:
        """Give up the pending dial, if there is one."""
        if self._pending is not None:
            self._engine.remove(self._watched)
            self._pending.close()
            self._pending = None

    def _connected(self, sock: socket.socket) -> None:
        """Take the connected socket, which is polled with `EVENTS` already."""
        raise NotImplementedError

    def _refused(self, why: Refusal | IcmpError) -> None:
        """Give up, since there is no stream."""
        raise NotImplementedError

    def _on_events(self, events: int) -> None:
        """Handle events of the connected socket."""
        raise NotImplementedError
