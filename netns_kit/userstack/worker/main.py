"""The worker: the process that runs engine, gateway and control for an owner elsewhere, and nothing else.

It is executed by `owner`, with BOOT there for its first words, and has from its owner one end of a `Channel`, a
pidfd of the owner, and on standard input what to do (`Start`), pickled: the owner is trusted.  It makes everything
that needs to open or import something, enters the sandbox, says so, and only then reads a frame.

What it says is never pickled: see `netns_kit.child.codec`.  A message is a pair, of a word and of what belongs to it:
"ready", once, with the layers of the sandbox; "result" or "error", answers to the owner's questions in their order;
"news", the number of a subscriber who has events to take; "failed", the exception that ends the worker.  A question
is the name of an operation of `Control` and its arguments.

Death.  The worker ends when the channel or the owner does (a fork of the owner may hold a copy of the channel), and
resets what is open; PR_SET_PDEATHSIG would not do, it follows the thread that started us.  A bug ends it as any
Python program, with a traceback on standard error, where the owner listens.

The package.  The `netns_kit` of this process is at first an empty one, for its own modules to be found in: what a
caller imports with it, `anyio` first of all, is of no use here and costs more than all else.  Should a policy's
module want a name of it, the package becomes whole.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import pickle
import socket
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

from netns_kit.child.channel import Channel
from netns_kit.child.codec import Failure, decode, dump, load
from netns_kit.dhcp import DhcpSettings
from netns_kit.dns import records
from netns_kit.errors import NetnsKitError, NotImportable
from netns_kit.gateway.engine import IN, OUT, Engine
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.worker_links import Peers
from netns_kit.host import diagnosis
from netns_kit.host.limits import calm_collector, raise_descriptor_limit
from netns_kit.stack import Limits
from netns_kit.subnet import Subnet
from netns_kit.tap.frame_device import Device
from netns_kit.uplink.uplink import Uplink
from netns_kit.userstack import blocking_loop
from netns_kit.userstack.control import OPERATIONS, Control

NAME = __name__.partition(".")[0]  # of the whole package
FIX = 'use a function at the top of a module that can be imported, or driver="thread"'


class Seat(NamedTuple):
    """A worker's place among those that share a namespace, see `Peers`."""

    number: int
    inbox: socket.socket
    outboxes: tuple[socket.socket, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """What to run.  `required` are layers of the sandbox.  `seat` is a `Seat`, with descriptors for its sockets."""

    tap: Device
    uplink: Uplink
    subnet: Subnet
    limits: Limits | None
    dhcp: DhcpSettings | None
    required: tuple[str, ...]
    seat: tuple[int, int, tuple[int, ...]] | None = None

    def peers(self) -> Peers | None:
        """The others, if there are any."""
        if self.seat is None:
            return None
        number, inbox, outboxes = self.seat
        return Peers(
            number, socket.socket(fileno=inbox), tuple(socket.socket(fileno=each) for each in outboxes)
        )


@dataclass(frozen=True, slots=True)
class Order:
    """What comes on standard input: a `Start`, and what it takes to unpickle that: where modules are found, and
    which file each of those it names must be."""

    path: tuple[str, ...]
    modules: dict[str, str | None]
    start: bytes

    def unpack(self) -> Start:
        """Raises `NotImportable`."""
        sys.path[:] = self.path
        _become_whole_when_asked()
        try:
            start: Start = pickle.loads(self.start)
        except Exception as error:
            raise NotImportable(
                f"the worker process cannot import the uplink's parts: {type(error).__name__}: {error}",
                fix=FIX,
            ) from error
        for name, file in self.modules.items():
            found = getattr(sys.modules.get(name), "__file__", None)
            if found != file:
                raise NotImportable(f"the worker process finds {name} elsewhere, in {found}", name, file, FIX)
        return start


def main(control: int, owner: int) -> int:
    """Serve until the owner is gone; the exit status."""
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
    with io.FileIO(0, closefd=False) as given:
        order: Order = pickle.loads(given.readall())
    start = order.unpack()
    raise_descriptor_limit()
    engine = Engine()
    gateway = Gateway(
        engine,
        start.tap,
        start.uplink,
        start.subnet,
        limits=start.limits,
        dhcp=start.dhcp,
        peers=start.peers(),
        tell=_tell,
    )
    desk = Desk(channel, engine, gateway)
    engine.add(owner, desk.on_owner, IN)
    if start.uplink.dns_hook is not None:
        records.prepare()  # what it answers with may want to import something
    from .sandbox import ON, enter

    layers = enter(start.uplink.reads())
    for layer in start.required:
        if layers.get(layer) != ON:
            raise diagnosis.layer(layer, layers.get(layer))
    desk.say("ready", layers)
    calm_collector()
    try:
        blocking_loop.run(engine, lambda: desk.stopping)
    finally:
        desk.control.close()


class Desk:
    """Where the owner's questions are answered, between two handlers of the engine."""

    def __init__(self, channel: Channel, engine: Engine, gateway: Gateway) -> None:
        self.control = Control(gateway, lambda number: self.say("news", number))
        self.stopping = False
        self._channel = channel
        self._engine = engine
        self._events = IN
        engine.add(channel.fileno(), self._on_channel, IN)

    def on_owner(self, _: int) -> None:
        """The owner has ended."""
        self.stopping = True

    def say(self, what: str, content: Any) -> None:
        """Send it, now or when the channel takes it."""
        self._channel.send(dump((what, content)))
        self._watch_channel()

    def _on_channel(self, _: int) -> None:
        self._channel.flush()
        while (question := self._channel.receive()) is not None:
            self._answer(question)
        self._watch_channel()
        if self._channel.ended:
            self.stopping = True

    def _watch_channel(self) -> None:
        events = IN | OUT if self._channel.backlog else IN
        if events != self._events:
            self._events = events
            self._engine.modify(self._channel.fileno(), events)

    def _answer(self, question: bytes) -> None:
        try:
            name, arguments = load(tuple[str, tuple[Any, ...]], question)
            if name not in OPERATIONS:
                raise ValueError(f"{name!r} is no operation")
            operation = getattr(Control, name)
            kinds = [kind for each, kind in get_type_hints(operation).items() if each != "return"]
            result = operation(self.control, *map(decode, kinds, arguments))
            self._channel.send(dump(("result", result)))
        except Exception as error:
            self._channel.send(dump(("error", Failure.of(error))))


def _tell(text: str, error: BaseException | None) -> None:
    """What the gateway has noticed, to standard error, where the owner listens."""
    logging.getLogger(NAME).warning(text, exc_info=error)


def _become_whole_when_asked() -> None:
    """Have `netns_kit`, so far empty, import what it exports as soon as somebody wants one of its names."""
    package = sys.modules[NAME]
    if package.__spec__ is not None:  # it is whole: this is no worker
        return

    def become_whole(name: str) -> Any:
        from importlib.util import spec_from_file_location

        del package.__getattr__
        spec = spec_from_file_location(NAME, os.path.join(package.__path__[0], "__init__.py"))
        assert spec is not None
        assert spec.loader is not None
        package.__spec__, package.__file__ = spec, spec.origin
        spec.loader.exec_module(package)
        return getattr(package, name)

    package.__getattr__ = become_whole  # type: ignore[method-assign]  # a module's own, PEP 562
