"""The forwarder: ports of the host that lead into the namespace.

`Forwarder` is the caller's object.  The listeners are beside the engine, in whatever thread or process that runs.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count, groupby
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import anyio
import anyio.to_thread

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.display.displayed import Displayed
from netns_kit.errors import (
    ArgumentError,
    ArgumentTypeError,
    FeatureUnavailable,
    NetnsKitError,
    NotFound,
    PortInUseError,
    StackClosed,
)
from netns_kit.host import bound_ports, diagnosis, sysctl
from netns_kit.host.paths import NOTHING_MADE, Made
from netns_kit.host.undo import on_error
from netns_kit.namespace.background import Openable, Supervisor
from netns_kit.namespace.given import HasFileno
from netns_kit.namespace.namespace import Namespace
from netns_kit.subnet import Subnet
from netns_kit.uplink.flow import Endpoint

from .binding import FAMILIES, described, listen_unix
from .conflicts import Claims, place_of
from .follow import Follower
from .forwards import Forwards
from .handed import Handed
from .ports import Follow, Mode, PortForward, ReverseForward, UnixSocket
from .reverse import Reverser, StreamHandler
from .specs import parse_all, parse_end

if TYPE_CHECKING:
    from netns_kit.display.view import View

AT_ONCE = 256  # ports that are added between two steps of the engine

CLOSING_SECONDS = 2.0  # for an engine that does not answer; the listeners then end with the stack

T = TypeVar("T")
_numbers = count()


class Askable(Protocol):
    """A stack as a forwarder needs it: a `UserStack` is one."""

    supervisor: Supervisor
    """The stack's life: whether it is open, and what it failed with.  For parts of the library."""

    @property
    def namespace(self) -> Namespace | None:
        """The namespace that the stack's device is in, if it is known."""

    @property
    def subnet(self) -> Subnet:
        """The addresses of the namespace."""

    async def pass_socket(self, sock: socket.socket) -> int:
        """Have the engine receive a copy of a socket, see `UserStack.pass_socket`.

        Args:
            sock: The socket, which stays the caller's.

        Cancellation: The engine has no copy.
        """

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have the stack do an operation, see `UserStack.ask`.

        Args:
            operation: A method that is marked as one, see `netns_kit.operations`.
            arguments: What it is called with.

        Cancellation: The operation may have been done.
        """


class Forwarder(Displayed, Openable):
    """Ports of the host that lead into the namespace while the object is open.

        async with Forwarder(stack) as forwarder:
            await forwarder.add("127.0.0.1:8080:80/tcp")

    Closing frees the ports; TCP connections that exist go on.  A failure of the stack fails its forwarders.

    Args:
        stack: The `UserStack` that the connections enter.

    Raises:
        ArgumentTypeError: The argument is no stack.
        StackClosed: On opening, if the stack is not open.
    """

    def __init__(self, stack: Askable) -> None:
        if not callable(getattr(stack, "ask", None)):
            raise ArgumentTypeError("expected a UserStack", "stack", arguments.shown(stack))
        self._stack = stack
        self._number = next(_numbers)  # by which its listeners are known
        self._handed = Handed()
        self._claims = Claims()
        self._made: dict[PortForward, Made] = {}  # files of unix sockets
        # held from preparations to the listener that needs them, and while they are taken back
        self._preparing = anyio.Lock()
        self._follower: Follower | None = None
        self._reverser: Reverser | None = None
        self.supervisor = Supervisor(type(self).__name__, StackClosed, stack.supervisor)

    def __repr__(self) -> str:
        return f"<Forwarder of {self._stack!r}: {self.supervisor.condition}>"

    def _view(self) -> View:
        from .display import forwarder_view

        return forwarder_view(self)

    @property
    def known(self) -> tuple[tuple[PortForward, ...], tuple[Follow, ...], tuple[ReverseForward, ...]]:
        """The forwards, the rules and the reverse forwards, as far as they are known without asking the engine.

        After the end there are none.  For displays.
        """
        if self.supervisor.condition != "open":
            return (), (), ()
        follows = () if self._follower is None else tuple(self._follower.follows())
        reverses = () if self._reverser is None else self._reverser.forwards
        return tuple(self._claims.every()), follows, reverses

    async def _open(self) -> None:
        self._stack.supervisor.check()

    async def _close(self) -> None:
        if self._follower is not None:
            self._follower.close()
        if self._reverser is not None:
            self._reverser.close()
        self._handed.close()
        # a stack that has ended has closed them itself
        with anyio.move_on_after(CLOSING_SECONDS, shield=True), suppress(NetnsKitError):
            listening = await self._stack.ask(Forwards.list, self._number)
            await self._stack.ask(Forwards.remove_all, self._number)
            await self._take_back(listening)
        while self._made:
            _, made = self._made.popitem()
            with suppress(OSError):
                made.remove()

    async def add(
        self, *specs: str | PortForward | Follow, mode: Mode | None = None
    ) -> tuple[PortForward, ...]:
        """Listen on ports, and return one forward for each; a range has several.  Either all listen or none.

        A `Follow` is a rule: from now on each port that is listened on inside is forwarded within a second, until
        it is listened on no more.  What is returned has the forwards that the rule has made at once.  A port that the
        host does not give is logged once, and tried again.  One rule forwards 1024 ports at most.

        A port of an optional forward that is taken, or that needs a privilege, is left out.

        Args:
            specs: The ports, as text (see `netns_kit.forwarder.specs`), or as `PortForward` and `Follow` objects.
            mode: How clients of those get inside that do not say it themselves, see `PortForward.settled`.

        Raises:
            PortSpecError, ArgumentError: A specification cannot be understood.
            PrivilegedPortError: A port needs a privilege; raised before anything is bound.
            PortInUseError: Another socket has the port, and the message says whose it is, as far as this process may
                know; or another forward has it, and then nothing was bound.
            AddressError: The host has no such address, or the namespace cannot have the one inside.
            ArgumentTypeError: An argument is neither text nor a PortForward or Follow.
            FeatureUnavailable: The mode cannot be had here, or the kernel does not tell what listens inside.
            StackClosed: The forwarder is not open.
            OSError: Listening failed otherwise.

        Cancellation: The ports may have been added; `list` and `follows` show them.
        """
        asked = [each.settled(mode) for each in parse_all(specs)]
        added = await self._publish([each for each in asked if isinstance(each, PortForward)])
        try:
            return (*added, *await self._follow([each for each in asked if isinstance(each, Follow)]))
        except Exception:
            for forward in added:
                await self._remove(forward)
            raise

    async def _publish(
        self, asked: Sequence[PortForward], *, explain: bool = True
    ) -> tuple[PortForward, ...]:
        """Listen on ports, as `add` does; without `explain`, nobody looks for the owner of a port that is taken."""
        forwards = self._claims.add(_permitted(asked))
        added: list[PortForward] = []
        try:
            async with self._preparing:
                await self._prepare(forwards)
                for (is_handed, on_unix), some in groupby(forwards, _kind):
                    batch = tuple(some)
                    if is_handed:
                        with self.supervisor.guarding():
                            added += self._handed.add(batch)
                        continue
                    for start in range(0, len(batch), 1 if on_unix else AT_ONCE):
                        if on_unix:
                            added += await self._add_unix(batch[start])
                        else:
                            added += await self._ask(Forwards.add, batch[start : start + AT_ONCE])
        except BaseException as error:
            self._claims.discard(forwards)
            if isinstance(error, Exception):
                for forward in added:
                    await self._remove(forward)
            await self._take_back(forwards)
            if isinstance(error, PortInUseError) and explain:
                raise await self._explained(error, forwards) from error
            raise
        if added != forwards:  # some were left out, or have a number now
            self._claims.exchange(forwards, added)
        return tuple(added)

    async def _follow(self, follows: Sequence[Follow]) -> tuple[PortForward, ...]:
        """Follow by these rules, all or none, and return the forwards that they have made at once."""
        if not follows:
            return ()
        if self._follower is None:
            namespace = self._its_namespace("nobody tells what listens there")
            self._follower = Follower(
                namespace,
                lambda: self._stack.subnet,
                lambda: () if self._reverser is None else self._reverser.forwards,
                _permitted,
                partial(self._publish, explain=False),
                self.remove,
                self._explained,
            )
        with self.supervisor.guarding():
            made = await self._follower.add(follows)
        if not self._follower.is_running:
            self._follower.is_running = True
            self.supervisor.start(self._follower.run)
        return made

    async def reverse(
        self,
        inside: str | Endpoint | UnixSocket | ReverseForward,
        to: str | Endpoint | UnixSocket | StreamHandler | None = None,
        *,
        protocol: Literal["tcp", "udp"] = "tcp",
    ) -> ReverseForward:
        """Listen on a port or unix socket inside, and lead its clients out.

            await forwarder.reverse("5432", "127.0.0.1:5432")
            await forwarder.reverse("unix:@bus", "unix:/run/user/1000/bus")
            await forwarder.reverse("80", serve)                    # async def serve(stream): ...

        Each client is connected to `to` from the host, whatever the uplink allows: this grants that one address and
        port, no more.  Where nobody listens there, the client is reset.  A unix socket at a path is in the files that
        commands share with the host, so it is on the host as well, for this user; "@NAME" is of the namespace alone.

        Args:
            inside: Where to listen: [ADDRESS:]PORT, without an address on 127.0.0.1, port 0 for any that is free; or
                unix:PATH, unix:@NAME.  A `ReverseForward` says all.
            to: Where clients are led: [ADDRESS:]PORT or unix:PATH of the host; or an async function, which is given
                each client's stream on this event loop, of 256 at a time.
            protocol: "tcp" or "udp".  Unix sockets and handlers have streams, which is "tcp".

        Raises:
            PortSpecError, ArgumentError: An argument cannot be understood.
            ArgumentTypeError: An argument has another type.
            PortInUseError: Another socket inside has the port, or something is at the path.
            PrivilegedPortError: The port inside is too low.
            FeatureUnavailable: The stack's device is not in a `Namespace`.
            NamespaceGone, StackClosed: The forwarder is not open.
            OSError: Listening failed otherwise, for instance for want of the address.

        Cancellation: The port is not added.
        """
        forward, handler = _reversed(inside, to, protocol)
        if self._reverser is None:
            namespace = self._its_namespace("no socket can listen there")
            self._reverser = Reverser(
                namespace, self.supervisor, self._stack.ask, self._number, self._hand_over
            )
        with self.supervisor.guarding():
            return await self._reverser.add(forward, handler)

    def reverses(self) -> tuple[ReverseForward, ...]:
        """Return the reverse forwards, oldest first.

        Raises:
            StackClosed: The forwarder is not open.
        """
        self.supervisor.check()
        return () if self._reverser is None else self._reverser.forwards

    def _its_namespace(self, otherwise: str) -> Namespace:
        if self._stack.namespace is None:
            raise FeatureUnavailable(
                f"expected a device in a Namespace: {otherwise}", fix="open the device in the namespace"
            )
        return self._stack.namespace

    async def _explained(self, error: PortInUseError, forwards: Sequence[PortForward]) -> PortInUseError:
        """Return the error with the name of the port's owner, if that can be known."""
        for forward in forwards:
            place, host = place_of(forward), forward.host
            if not error.cause.startswith(f"{place} "):
                continue
            if isinstance(host, UnixSocket):
                owner = await anyio.to_thread.run_sync(bound_ports.path_holder, host.path)
            else:
                ask = partial(bound_ports.holder, forward.protocol, host, forward.host_port)
                owner = await anyio.to_thread.run_sync(ask)
            return error if owner is None else PortInUseError(f"{place} is taken by {owner}", fix=error.fix)
        return error

    async def adopt(
        self,
        sock: socket.socket,
        guest_port: int | None = None,
        guest: AddressLike | UnixSocket | None = None,
        *,
        mode: Mode | None = None,
    ) -> PortForward:
        """Publish a socket that listens already, one of `activated` say, and return the forward that does so.

        The forwarder has a copy, and `remove` closes that alone.  As long as others have copies, clients may connect
        and wait.

        Args:
            sock: A TCP, UDP or unix stream socket, which stays the caller's and does not block from now on.  Nobody
                else is to read from it, or to accept.
            guest_port: The port inside, or None for the number that the socket has.
            guest: The address inside, or a unix socket there; None for the namespace's own address.
            mode: How clients get inside, see `PortForward.settled`.

        Raises:
            ArgumentError: The socket does not listen, or is of another kind; or the mode is "fd", for which a command
                is given it by `listen`.
            ArgumentTypeError: The argument is no socket, or another has another type.
            AddressError, PortSpecError: The namespace cannot have what it is to lead to.
            PortInUseError: A forward has that place already, perhaps by the same socket.
            FeatureUnavailable: The mode cannot be had here, or the stack is not in a `Namespace`.
            StackClosed: The forwarder is not open.

        Cancellation: The socket is not published.
        """
        forward = described(sock, guest_port, guest).settled(mode)
        if forward.mode == "fd":
            fix = "give it to a command: popen(..., listen=[sock])"
            raise ArgumentError("expected another mode", "mode", "'fd'", fix)
        self._claims.add([forward])
        try:
            async with self._preparing:
                await self._prepare([forward])
                sock.setblocking(False)  # all copies
                return await self._hand_over(Forwards.adopt, forward, sock)
        except BaseException:
            self._claims.discard([forward])
            await self._take_back([forward])
            raise

    async def _hand_over(
        self, operation: Callable[..., T], forward: PortForward | ReverseForward, sock: socket.socket
    ) -> T:
        """Have the engine do an operation with a copy of a socket.  If this raises or is cancelled, it has none."""
        number = await self._stack.pass_socket(sock)
        try:
            return await self._ask(operation, forward, number)
        except BaseException:
            with anyio.move_on_after(CLOSING_SECONDS, shield=True), suppress(NetnsKitError):
                await self._stack.ask(Forwards.disown, self._number, forward, number)
            raise

    async def _prepare(self, forwards: Sequence[PortForward]) -> None:
        """Have the agent do what these need: the routes of transparent ones, and connections to unix sockets."""
        transparent = [each for each in forwards if each.mode == "transparent"]
        namespace = self._stack.namespace
        if namespace is None:  # then the engine says so
            return
        for forward in forwards:
            if isinstance(forward.guest, UnixSocket):
                await namespace.allow_unix(forward.guest.address, wanted=True)
        if not transparent:
            return
        await namespace.prepare_transparent(ipv6=any(_version(each) == 6 for each in transparent))
        for forward in transparent:
            if _is_routed(forward):
                await namespace.route_answers(FAMILIES[_version(forward)], forward.guest_port, wanted=True)

    async def _add_unix(self, forward: PortForward) -> tuple[PortForward, ...]:
        assert isinstance(forward.host, UnixSocket)
        try:
            sock, made = listen_unix(forward.host)
        except PortInUseError:
            if forward.optional:
                return ()
            raise
        with on_error(made.remove), sock:
            added = await self._hand_over(Forwards.adopt, forward, sock)
        self._made[added] = made
        return (added,)

    async def remove(self, forward: PortForward | Follow | ReverseForward, *, cut: bool = False) -> None:
        """Stop listening on a port.  It is free when this returns.

        A command that has the socket itself, which is mode "fd", keeps that, and the port with it.  A rule ends with
        all forwards that it has made.  One of them, removed alone, stays away for as long as its port is listened on
        inside.

        Args:
            forward: What `add` or `reverse` returned, one of `list`, `follows` or `reverses`.
            cut: True: its TCP connections are reset.  False: those that exist go on.

        Raises:
            NotFound: There is no such forward.
            ArgumentTypeError: The argument is no PortForward, Follow or ReverseForward.
            OSError: The name of its unix socket cannot be removed.
            StackClosed: The forwarder is not open.

        Cancellation: The port may have been freed.
        """
        fix = "give what `add` returned, or one of `list`"
        known = (PortForward, Follow, ReverseForward)
        arguments.instance("forward", forward, known, "a PortForward, a Follow or a ReverseForward", fix)
        if isinstance(forward, PortForward):
            found = await self._remove(forward, cut=cut)
        else:
            with self.supervisor.guarding():
                found = await self._remove_other(forward, cut=cut)
        if not found:
            raise NotFound(f"there is no forward {forward}", fix=fix)

    async def _remove_other(self, forward: Follow | ReverseForward, *, cut: bool) -> bool:
        if isinstance(forward, Follow):
            return self._follower is not None and await self._follower.remove(forward, cut=cut)
        return self._reverser is not None and await self._reverser.remove(forward, cut=cut)

    async def _remove(self, forward: PortForward, *, cut: bool = False) -> bool:
        """Stop listening, see `remove`.  Return whether anybody did listen."""
        self._claims.discard([forward])
        found = True  # or the answer has not come
        try:
            found = self._handed.remove(forward) or await self._ask(Forwards.remove, forward)
            if found and cut:
                await self._stack.ask(Forwards.cut, forward)
        finally:
            if found:
                await self._take_back([forward])
                self._made.pop(forward, NOTHING_MADE).remove()
        return found

    async def _take_back(self, forwards: Sequence[PortForward]) -> None:
        """Take back what `_prepare` has had done, unless another forward needs it; even if we are cancelled."""
        prepared = [each for each in forwards if isinstance(each.guest, UnixSocket) or _is_routed(each)]
        if not prepared or (namespace := self._stack.namespace) is None:
            return
        with anyio.move_on_after(CLOSING_SECONDS, shield=True), suppress(NetnsKitError):
            async with self._preparing:
                others = await self._stack.ask(Forwards.list_all)
                guests = {each.guest for each in others}
                routed = {(_version(each), each.guest_port) for each in others if _is_routed(each)}
                for forward in prepared:
                    if isinstance(forward.guest, UnixSocket):
                        if forward.guest not in guests:
                            await namespace.allow_unix(forward.guest.address, wanted=False)
                    elif (_version(forward), forward.guest_port) not in routed:
                        family = FAMILIES[_version(forward)]
                        await namespace.route_answers(family, forward.guest_port, wanted=False)

    async def list(self) -> tuple[PortForward, ...]:
        """Return the forwards that are listening, oldest first; those of mode "fd" are the last.

        Those that rules have made are among them.

        Raises:
            StackClosed: The forwarder is not open.

        Cancellation: Nothing is changed.
        """
        return (*await self._ask(Forwards.list), *self._handed.list())

    def sockets(self) -> tuple[tuple[str, HasFileno], ...]:
        """Return the sockets of the forwards of mode "fd", oldest first, each with a name like "80/tcp".

        They are what a command is given by `listen`, see `CommandOptions`:

            await net.popen(["server"], listen=net.forwarder.sockets())

        They stay the forwarder's, which closes them.
        """
        return self._handed.named()

    def follows(self) -> dict[Follow, tuple[PortForward, ...]]:
        """Return the rules, oldest first, each with the forwards that it has made.

        Raises:
            StackClosed: The forwarder is not open.
        """
        self.supervisor.check()
        return {} if self._follower is None else self._follower.follows()

    async def _ask(self, operation: Callable[..., T], *arguments: object) -> T:
        with self.supervisor.guarding():
            return await self._stack.ask(operation, self._number, *arguments)


def _kind(forward: PortForward) -> tuple[bool, bool]:
    """Return what decides who listens: whether a command has the socket, and whether it is a unix socket."""
    return forward.mode == "fd", isinstance(forward.host, UnixSocket)


def _is_routed(forward: PortForward) -> bool:
    """Return whether answers need a route of their port's, see `Namespace.route_answers`."""
    return (forward.mode, forward.protocol) == ("transparent", "udp")


def _reversed(
    inside: str | Endpoint | UnixSocket | ReverseForward,
    to: str | Endpoint | UnixSocket | StreamHandler | None,
    protocol: Literal["tcp", "udp"],
) -> tuple[ReverseForward, StreamHandler | None]:
    """Return the forward that arguments of `reverse` mean, and the handler if they have one."""
    if isinstance(inside, ReverseForward):
        if inside.to is None and callable(to):
            return inside, to
        if inside.to is None or to is not None:
            expected = "expected a function beside a ReverseForward for a handler, and nothing beside another"
            raise ArgumentError(expected, "to", arguments.shown(to))
        return inside, None
    start = _end("inside", inside, 0)
    if callable(to):
        return ReverseForward(protocol, *start, None), to
    return ReverseForward(protocol, *start, *_end("to", to, 1)), None


def _end(name: str, given: object, least: int) -> tuple[Address | UnixSocket, int]:
    """Return an end of a reverse forward, as an argument of that name means it."""
    if isinstance(given, UnixSocket):
        return given, 0
    if isinstance(given, Endpoint):
        return given
    expected = "text, an Endpoint or a UnixSocket" + (" or an async function" if name == "to" else "")
    arguments.text(name, given, expected, 'write it like "127.0.0.1:5432"')
    return parse_end(name, str(given), least)


def _version(forward: PortForward) -> int:
    """Return the version of IP that a forward's clients use."""
    return 4 if isinstance(forward.host, UnixSocket) else forward.host.version


def _permitted(forwards: Sequence[PortForward]) -> Sequence[PortForward]:
    """Return those whose ports may be bound: all, but for optional ones.

    Raises:
        PrivilegedPortError: The port of one that is not optional needs a privilege.
    """
    (start,) = sysctl.numbers(diagnosis.PORT_START)
    low = [each for each in forwards if 0 < each.host_port < start]
    if not low or bound_ports.may_bind(low[0].host_port):
        return forwards
    needed = next((each for each in low if not each.optional), None)
    if needed is not None:
        raise diagnosis.privileged_port(needed.host_port, "of the host", start)
    return [each for each in forwards if not 0 < each.host_port < start]
