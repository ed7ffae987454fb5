"""Inside: sockets of the namespace, for an engine that is outside.

A socket belongs to the namespace that it was made in, wherever it is used.  The agent makes them, by the dozen, and
sends them here before they are wanted (see `netns_kit.namespace.agent_sockets`).  By the same way the caller's side
passes sockets that it has made for the engine, each under a number.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from netns_kit.child.channel import receive_record
from netns_kit.child.supply import ORDER, PASSED, PING, REPLY
from netns_kit.host.abi import SCM_MAX_FD

from .admission import most_descriptors
from .engine import IN, Engine

STOCK = 16  # sockets of a kind that are kept, at first; twice as many, whenever there are too few
STOCK_MOST = 128
PASSED_MOST = 1024  # sockets that were passed and wait for their operation
UNIX_AT_ONCE = 8  # orders of unix sockets that may wait for their reply
STOCK_SHARE = 8  # of the descriptors that flows may have, one in so many at most is kept


class Kind(NamedTuple):
    """A kind of sockets: family and type as numbers, and whether they may have a client's address."""

    family: int
    type: int
    transparent: bool = False


UNIX = Kind(int(socket.AF_UNIX), int(socket.SOCK_STREAM))

Taker = Callable[["socket.socket | OSError"], None]


class Source(Protocol):
    """A source of sockets: those of the namespace, or of the host."""

    def take(self, kind: Kind, taker: Taker) -> None:
        """Give a socket to `taker`, now or later, or the error that there is none."""

    def connect_unix(self, address: str, taker: Taker) -> None:
        """Give `taker` a socket that is connected to a unix socket, or the error that there is none."""

    def waiting(self) -> int:
        """Return how many wait for a socket."""


class Inside:
    """The sockets of the namespace of one gateway.

    Args:
        engine: Waits for the sockets.
        supply: The socket on which they are ordered; it is closed with this.
        is_free: Returns whether descriptors may be kept that nobody wants yet.

    Attributes:
        ended: Called when the agent has ended.
    """

    def __init__(self, engine: Engine, supply: socket.socket, is_free: Callable[[], bool]) -> None:
        self._engine = engine
        self._is_free = is_free
        self._supply = supply
        self._stocks: dict[Kind, _Stock] = {}
        # connections to unix sockets that are not ordered yet
        self._wanted: deque[tuple[str, Taker]] = deque()
        self._ordered: deque[Taker] = deque()  # and those that are, in the order of their answers
        self._takers = 0  # who wait, in all stocks
        self._passed: dict[int, socket.socket] = {}
        self.ended: Callable[[], object] = _nothing
        engine.add(supply.fileno(), self._on_supply, IN)
        engine.unregistered.append(lambda: [each.fileno() for each in self._kept()])

    def take(self, kind: Kind, taker: Taker) -> None:
        """Give a socket to `taker`, now or when one has come, or the error that there is none."""
        stock = self._stocks.get(kind)
        if stock is None:
            stock = self._stocks[kind] = _Stock()
        if stock.sockets:
            found = stock.sockets.popleft()
            if 2 * len(stock.sockets) < stock.size:
                self._order(kind, stock)
            taker(found)
        else:
            stock.size = max(1, min(2 * stock.size, STOCK_MOST, most_descriptors() // STOCK_SHARE))
            stock.takers.append(taker)
            self._takers += 1
            self._order(kind, stock)

    def fileno(self) -> int:
        """Return the descriptor that is ready when sockets have come; -1: there will be none."""
        return self._supply.fileno()

    def has(self, kind: Kind) -> bool:
        """Return whether a socket is here, so that `take` gives it now."""
        stock = self._stocks.get(kind)
        return stock is not None and bool(stock.sockets)

    def give_back(self, kind: Kind, sock: socket.socket) -> None:
        """Take back a socket that was not used: whoever is next gets it.  When all is closed, so is this."""
        if self._supply.fileno() < 0:
            sock.close()
        else:
            self._stocks[kind].sockets.appendleft(sock)

    def receive(self) -> None:
        """Take all sockets that have come."""
        while self._receive():
            pass

    def connect_unix(self, address: str, taker: Taker) -> None:
        """Give `taker` a socket that is connected to a unix socket, or the error that there is none."""
        self._wanted.append((address, taker))
        self._order_connections()

    def _order_connections(self) -> None:
        while self._wanted and len(self._ordered) < UNIX_AT_ONCE:
            address, taker = self._wanted.popleft()
            try:
                self._supply.send(ORDER.pack(*UNIX, 1) + address.encode(errors="surrogateescape"))
            except OSError as error:  # it is closed
                taker(error)
            else:
                self._ordered.append(taker)

    def waiting(self) -> int:
        """Return how many wait for a socket."""
        return len(self._ordered) + len(self._wanted) + self._takers

    def passed(self, number: int) -> socket.socket:
        """Return the socket that the caller's side has passed under that number, which is the caller's to close.

        Raises:
            OSError: It has not come: there were too many descriptors.
        """
        while number not in self._passed and self._receive():
            pass
        found = self._passed.pop(number, None)
        if found is None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return found

    def close(self) -> None:
        """Close the sockets that nobody has taken, and tell who waits that there is none.  Again is fine."""
        if self._supply.fileno() < 0:
            return
        self._engine.remove(self._supply.fileno())
        self._supply.close()
        stocks = list(self._stocks.values())
        for sock in self._kept():
            sock.close()
        self._passed.clear()
        error = OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))
        for stock in stocks:
            stock.sockets.clear()
            stock.ordered = False
            self._give(stock, error)
        waiting = [*self._ordered, *(taker for _, taker in self._wanted)]
        self._ordered.clear()
        self._wanted.clear()
        for taker in waiting:
            taker(error)

    def _kept(self) -> list[socket.socket]:
        """Return the sockets that nobody has taken."""
        return [*self._passed.values(), *(each for stock in self._stocks.values() for each in stock.sockets)]

    def _order(self, kind: Kind, stock: _Stock) -> None:
        if stock.ordered:
            return
        wanted = len(stock.takers) + (stock.size if self._is_free() else 0)
        wanted = min(wanted, SCM_MAX_FD)
        if wanted <= len(stock.sockets):
            return
        if self._supply.fileno() < 0:
            self._give(stock, OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN)))
            return
        try:
            self._supply.send(ORDER.pack(*kind, wanted - len(stock.sockets)))
            stock.ordered = True
        except OSError as error:
            self._give(stock, error)

    def _give(self, stock: _Stock, error: OSError) -> None:
        """Tell all who wait that there is none.  Those who ask again meanwhile are not told twice."""
        takers, stock.takers = stock.takers, deque()
        self._takers -= len(takers)
        for taker in takers:
            taker(error)

    def _on_supply(self, _: int) -> None:
        self._receive()

    def _receive(self) -> bool:
        """Take what has come next; return whether there was something."""
        if self._supply.fileno() < 0:
            return False
        try:
            data, fds, complete = receive_record(self._supply, SCM_MAX_FD)
        except BlockingIOError:
            return False
        except OSError:
            data, fds, complete = b"", [], True
        if len(data) == PASSED.size:
            (number,) = PASSED.unpack(data)
            self._keep(number, [sock for fd in fds if (sock := _socket(fd)) is not None])
            return True
        if not self._is_answer(data):  # the agent has ended, and so will all else; or it says what none says
            for fd in fds:
                os.close(fd)
            self.close()
            self.ended()
            return False
        family, type_, transparent, failed = REPLY.unpack(data)
        kind = Kind(family, type_, bool(transparent))
        # to ask the kernel what they are would take system calls; what is something else fails as it is used
        made = socket.SOCK_DGRAM if type_ == PING else type_
        sockets = [sock for fd in fds if (sock := _socket(fd, family, made, 0)) is not None]
        error = None
        if failed or not complete or not sockets:
            number = failed or errno.EMFILE
            error = OSError(number, os.strerror(number))
        if kind == UNIX:
            self._ordered.popleft()(error or sockets[0])
            self._order_connections()
            return True
        stock = self._stocks[kind]
        stock.ordered = False
        stock.sockets.extend(sockets)
        while stock.sockets and stock.takers:
            self._takers -= 1
            stock.takers.popleft()(stock.sockets.popleft())
        if error is not None:
            self._give(stock, error)
        elif stock.takers:
            self._order(kind, stock)
        return True

    def _keep(self, number: int, sockets: list[socket.socket]) -> None:
        """Keep the socket that was passed under a number, and close what makes no sense."""
        if sockets and len(self._passed) < PASSED_MOST and number not in self._passed:
            self._passed[number] = sockets.pop(0)
        for sock in sockets:
            sock.close()

    def _is_answer(self, data: bytes) -> bool:
        """Return whether this answers an order of ours."""
        if len(data) != REPLY.size:
            return False
        family, type_, transparent, _ = REPLY.unpack(data)
        kind = Kind(family, type_, bool(transparent))
        return bool(self._ordered) if kind == UNIX else kind in self._stocks and self._stocks[kind].ordered


def _nothing() -> None:
    """Do nothing."""


class _Stock:
    """The sockets of one kind that are here, and those who wait for one."""

    def __init__(self) -> None:
        self.size = STOCK
        self.sockets: deque[socket.socket] = deque()
        self.takers: deque[Taker] = deque()
        self.ordered = False


def _socket(fd: int, family: int = -1, type_: int = -1, protocol: int = -1) -> socket.socket | None:
    """Return the socket of a descriptor, which does not block; or close it and return None if it is none."""
    try:
        sock = socket.socket(family, type_, protocol, fd)
    except OSError:
        os.close(fd)
        return None
    sock.setblocking(False)
    return sock
