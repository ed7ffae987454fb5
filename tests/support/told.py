"""An uplink that says what it is told to say: nothing of its flows leaves this process."""

from __future__ import annotations

import socket

from netns_kit.arguments import Address
from netns_kit.stack import Refusal, Transport
from netns_kit.uplink.dial import Connected, Dial
from netns_kit.uplink.flow import Flow, Target
from netns_kit.uplink.uplink import Uplink


class Sink(socket.socket):
    """Takes all datagrams, and sends none."""

    def __init__(self) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.bind(("127.0.0.1", 0))
        self.connected: object = None

    def connect(self, address: object) -> None:
        self.connected = address

    def send(self, data: object, flags: int = 0) -> int:
        return 1

    def sendto(self, *_: object) -> int:
        return 1

    def sendmsg(self, *_: object) -> int:
        return 1


class Told(Uplink):
    """Says of each flow what it is told to say, or raises it; nothing leaves this process."""

    def __init__(self, said: Refusal | Target | BaseException | None = None) -> None:
        super().__init__()
        self.said = said
        self.asked: list[Flow] = []
        self.opened: list[tuple[Transport, str, int]] = []
        self.peers: list[socket.socket] = []
        self.sinks: list[Sink] = []
        self.failure: BaseException | None = None

    def route(self, flow: Flow) -> Target | Refusal:
        self.asked.append(flow)
        if isinstance(self.said, BaseException):
            raise self.said
        return Target((flow.destination,)) if self.said is None else self.said

    def open(self, protocol: Transport, target: Address, port: int = 0) -> socket.socket:
        if self.failure is not None:
            raise self.failure
        self.opened.append((protocol, str(target), port))
        self.sinks.append(Sink())
        return self.sinks[-1]

    def dial(self, flow: Flow, target: Target, *, ttl: int = 64, tos: int = 0) -> Dial:
        if self.failure is not None:
            raise self.failure
        self.opened.append(("tcp", str(target.candidates[0].address), target.candidates[0].port))
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.peers.append(theirs)
        return Connected(ours)
