"""The worker: a process that only runs engine, gateway and control for its owner, which is another process.

It is a program that a `Child` executes.  The owner gives it one end of a `Channel`, a pidfd of the owner, the tap,
and the sockets to the other workers.  The first message is its input (see `input`).  The worker first does everything
that opens or imports something, then enters the sandbox, then reports that it is ready, and only then reads frames.

Its messages are never pickled: see `netns_kit.child.codec`.  A message is a pair of a word and its content:

    ready     once: the layers of the sandbox
    result    the result of a question, in the order of the questions
    error     the exception of a question, likewise
    news      the number of a subscriber that has events to take
    failed    the exception that ends the worker

A question is the name of an operation of `Control`, and its arguments.  A socket may come with it.

Death.  The worker ends when the channel ends or the owner ends, and resets all connections.  Both are needed: a fork
of the owner may hold a copy of the channel.  PR_SET_PDEATHSIG would not do, because it follows the thread that has
started the worker.  A bug ends it like any Python program, with a traceback on standard error, which the owner reads.
"""

from __future__ import annotations

import faulthandler
import signal
import socket
import sys
import traceback
from contextlib import suppress
from typing import Any

from netns_kit.child.channel import Channel
from netns_kit.child.codec import Failure, decode, dump, load
from netns_kit.dns import records
from netns_kit.errors import NetnsKitError
from netns_kit.gateway.engine import IN, OUT, Engine
from netns_kit.gateway.gateway import Gateway
from netns_kit.host import diagnosis
from netns_kit.host.limits import calm_collector, raise_descriptor_limit
from netns_kit.operations import types_of
from netns_kit.userstack import blocking_loop
from netns_kit.userstack.control import OPERATIONS, Control

from .input import decode as decode_input

DESCRIPTORS = 3
"""Descriptors that come with a question at most."""


def main(control: int, owner: int, *_: int) -> int:
    """Serve until the owner has gone, and return the exit status."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    faulthandler.enable()
    channel = Channel(socket.socket(fileno=control))
    try:
        _serve(channel, owner)
    except NetnsKitError as error:
        channel.send(dump(("failed", Failure.of(error))))
        return 1
    finally:
        channel.finish()
        sys.stderr.flush()
    return 0


def _serve(channel: Channel, owner: int) -> None:
    given = channel.wait()
    if given is None:
        return
    setup, peers = decode_input(given)
    raise_descriptor_limit()
    engine = Engine()
    gateway = Gateway(engine, setup, peers=peers, tell=_tell)
    server = ControlServer(channel, engine, gateway)
    engine.add(owner, server.on_owner, IN)
    if setup.uplink.dns.hook is not None:
        records.prepare()  # its answers may need to import something
    from netns_kit.gateway import (  # noqa: F401 - no module can be found later
        answered_names,
        faults,
        faulty_path,
        frame_capture,
        interception,
    )
    from netns_kit.gateway.relay import forbidden, peek  # noqa: F401 - likewise
    from netns_kit.policy import name_guard, policy  # noqa: F401 - a policy may be set later

    if setup.supply is not None:
        import netns_kit.forwarder.reverse_listeners
    if setup.uplink.is_in_memory:
        import netns_kit.forwarder.in_memory_listeners  # noqa: F401 - likewise
    from .sandbox import ON, enter

    layers = enter(setup.uplink.reads())
    for layer in setup.require:
        if layers.get(layer) != ON:
            raise diagnosis.layer(layer, layers.get(layer))
    server.say("ready", layers)
    calm_collector()
    try:
        blocking_loop.run(engine, lambda: server.stopping)
    finally:
        server.control.close()


class ControlServer:
    """The part that answers the owner's questions, between two handlers of the engine."""

    def __init__(self, channel: Channel, engine: Engine, gateway: Gateway) -> None:
        self.control = Control(gateway, lambda number: self.say("news", number))
        self.stopping = False
        self._channel = channel
        self._engine = engine
        self._events = IN
        engine.add(channel.fileno(), self._on_channel, IN)

    def on_owner(self, _: int) -> None:
        """Note that the owner has ended."""
        self.stopping = True

    def say(self, what: str, content: Any) -> None:
        """Send a message, now or as soon as the channel takes it."""
        self._channel.send(dump((what, content)))
        self._watch_channel()

    def _on_channel(self, _: int) -> None:
        self._channel.flush()
        while (received := self._channel.receive_with(DESCRIPTORS)) is not None:
            self._answer(*received)
        self._watch_channel()
        if self._channel.ended:
            self.stopping = True

    def _watch_channel(self) -> None:
        events = IN | OUT if self._channel.backlog else IN
        if events != self._events:
            self._events = events
            self._engine.modify(self._channel.fileno(), events)

    def _answer(self, question: bytes, fds: list[int]) -> None:
        try:
            name, arguments = load(tuple[str, tuple[Any, ...]], question)
            kinds, _ = types_of(OPERATIONS[name])
            result = self.control.do(name, *map(decode, kinds, arguments), fds=fds)
            self._channel.send(dump(("result", result)))
        except Exception as error:
            self._channel.send(dump(("error", Failure.of(error))))


def _tell(text: str, error: BaseException | None) -> None:
    """Write a warning of the gateway to standard error, which the owner reads."""
    lines = [] if error is None else traceback.format_exception(error)
    with suppress(OSError):  # nobody may read it any more
        sys.stderr.write("".join([f"{text}\n", *lines]))  # importing `logging` would take 3 ms of each start
