"""Ports of the host that lead into the namespace, as records.  `netns_kit.forwarder.specs` reads them from text.

>>> forward = PortForward("tcp", "127.0.0.1", 8080, None, 80)
>>> print(forward, forward.spec)
127.0.0.1:8080 -> 80/tcp 127.0.0.1:8080:80/tcp
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from types import NoneType
from typing import Any, Literal, TypeAlias, get_args

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.errors import ArgumentError, PortSpecError
from netns_kit.frozen import frozen, replace

Mode: TypeAlias = Literal["stack", "socket", "transparent", "fd"]
"""How a connection gets inside.

- stack: through the tap, from the client's address.
- socket: by a socket inside, which a kernel connects to the service; it reaches the loopback addresses there.
- transparent: by such a socket that has the client's address.
- fd: the command has the listening socket of the host itself.
"""

ANY = IPv4Address("0.0.0.0")
PROTOCOLS = ("tcp", "udp")
MODES: tuple[Mode, ...] = get_args(Mode)
LONGEST_PATH = 107  # bytes, with a null behind them in sun_path (unix(7))
_PATH = re.compile(r"[/@][^\0\ud800-\udc7f\udd00-\udfff]+")  # what the file system's encoding can have
_SPECIAL = re.compile(r"[%:,\0-\x20\x7f]|/(?=(?:tcp|udp)[46]?\Z)")  # what would end a path in a specification
_DEVICE = re.compile(r"[^:/\s\0]{1,15}")  # dev_valid_name() of the kernel


@frozen
class UnixSocket:
    """A unix stream socket, on either side of a forward.

    Args:
        path: An absolute path, or "@" and the name of an abstract socket.

    Raises:
        ArgumentError: The path is neither, or is longer than the kernel takes.
        ArgumentTypeError: The path is not text.
    """

    path: str

    def __post_init__(self) -> None:
        arguments.text("path", self.path, "a path, or @ and the name of an abstract socket")
        if not _PATH.fullmatch(self.path) or len(self.path.encode(errors="surrogateescape")) > LONGEST_PATH:
            expected = f"expected an absolute path or @NAME (at most {LONGEST_PATH} bytes, no null)"
            raise ArgumentError(expected, "path", arguments.shown(self.path))

    @property
    def address(self) -> str:
        """The address that `bind` and `connect` of a socket take."""
        return f"\0{self.path[1:]}" if self.path.startswith("@") else self.path

    def __str__(self) -> str:
        return "unix:" + _SPECIAL.sub(lambda found: f"%{ord(found[0]):02X}", self.path)


@frozen
class PortForward:
    """A port or unix socket of the host that leads to one inside.

    Args:
        protocol: "tcp" or "udp".
        host: The host's address to listen on, or a unix socket that is made on the host.
        host_port: The port to listen on, or 0: the kernel chooses, and what `Forwarder.add` returns has the number.
            Beside a unix socket it is 0.
        guest: The address inside, or a unix socket there; None for the namespace's own address.
        guest_port: The port inside, from 1.  Beside a unix socket it is 0.
        device: The host's interface to listen on, None for all.
        mode: How a connection gets inside; None for the mode that `settled` chooses.
        freebind: Whether to listen also on an address that the host does not have yet.
        optional: Whether the forward is left out, without an error, if its port is taken or needs a privilege.

    Raises:
        PortSpecError: A port is out of range, or a unix socket does not go with another argument.
        AddressError: An address cannot be read.
        ArgumentError: There is no such protocol or mode, or no interface can have the name.
        ArgumentTypeError: An argument has another type.
    """

    protocol: Literal["tcp", "udp"]
    host: IPv4Address | IPv6Address | UnixSocket
    host_port: int
    guest: IPv4Address | IPv6Address | UnixSocket | None
    guest_port: int
    device: str | None
    mode: Mode | None
    freebind: bool
    optional: bool

    def __init__(
        self,
        protocol: Literal["tcp", "udp"],
        host: AddressLike | UnixSocket,
        host_port: int,
        guest: AddressLike | UnixSocket | None,
        guest_port: int,
        device: str | None = None,
        mode: Mode | None = None,
        freebind: bool = False,
        optional: bool = False,
    ) -> None:
        _check(protocol, device, mode)
        for name, port in (("host_port", host_port), ("guest_port", guest_port)):
            if type(port) is not int:
                arguments.instance(name, port, int, "a port, as a number")
        for name, flag in (("freebind", freebind), ("optional", optional)):
            if flag is not False:
                arguments.boolean(name, flag)
        no_address = (UnixSocket, NoneType)
        host = host if isinstance(host, UnixSocket) else arguments.address(host, "host")
        guest = guest if isinstance(guest, no_address) else arguments.address(guest, "guest")
        arguments.fill(self, locals())
        if not 0 <= host_port < 65536 or not (0 < guest_port < 65536 or isinstance(guest, UnixSocket)):
            raise PortSpecError("expected ports from 1 to 65535, and on the host also 0", "port", str(self))
        if self._has_path:
            self._check_paths()

    @property
    def listens_on(self) -> str:
        """The host's side, as messages show it."""
        if isinstance(self.host, UnixSocket):
            return str(self.host)
        return f"{_shown(self.host, self.device)}:{self.host_port}"

    @property
    def leads_to(self) -> str:
        """The side inside, as messages show it."""
        if isinstance(self.guest, UnixSocket):
            return str(self.guest)
        return f"{self.guest_port}" if self.guest is None else f"{_shown(self.guest)}:{self.guest_port}"

    def __str__(self) -> str:
        return f"{self.listens_on} -> {self.leads_to}/{self.protocol}"

    @property
    def spec(self) -> str:
        """The specification that means this forward."""
        protocol = "" if isinstance(self.guest, UnixSocket) else f"/{self.protocol}"
        freebind, optional = ",freebind" * self.freebind, ",optional" * self.optional
        return f"{self.listens_on}:{self.leads_to}{protocol}{_option(self.mode)}{freebind}{optional}"

    def settled(self, mode: Mode | None = None) -> PortForward:
        """Return the forward with a mode: its own, else `mode`, else the one that reaches what it leads to.

        That is "socket" where either side is a unix socket and where the address inside is a loopback address, which
        no packet reaches from outside; "stack" for all others.

        Args:
            mode: The mode of forwards that have none.

        Raises:
            PortSpecError: A unix socket does not go with the mode.
            ArgumentError: There is no such mode.
            ArgumentTypeError: The mode is not text.
        """
        if self.mode is not None:
            return self
        if mode is None:
            mode = "socket" if self._has_path or _is_loopback(self.guest) else "stack"
        return replace(self, mode=mode)

    @property
    def _has_path(self) -> bool:
        return isinstance(self.host, UnixSocket) or isinstance(self.guest, UnixSocket)

    def _check_paths(self) -> None:
        """Check what stands beside a unix socket.  Raises `PortSpecError`."""
        modes = (None, "socket") if isinstance(self.guest, UnixSocket) else (None, "socket", "fd")
        checks: list[tuple[str, tuple[object, ...], str]] = [
            ("protocol", ("tcp",), "tcp (a unix socket carries streams)"),
            ("mode", modes, "the mode socket (for a unix socket)"),
        ]
        if isinstance(self.host, UnixSocket):
            checks.append(("host_port", (0,), "0 beside a unix socket"))
            checks.append(("device", (None,), "no device beside a unix socket"))
            checks.append(("freebind", (False,), "no freebind beside a unix socket"))
        if isinstance(self.guest, UnixSocket):
            checks.append(("guest_port", (0,), "0 beside a unix socket"))
        for name, allowed, expected in checks:
            value = getattr(self, name)
            if value not in allowed:
                raise PortSpecError(f"expected {expected}", name, arguments.shown(value))


@frozen
class Follow:
    """A rule that forwards whatever ports are listened on inside, each to the same number, for as long as they are.

    Args:
        protocol: "tcp" or "udp".
        host: The host's address to listen on.
        device: The host's interface to listen on, None for all.
        include: The ports that may be forwarded, as pairs of the first and the last; none of them for all ports.
        exclude: The ports that are not forwarded, in the same way.
        mode: How a connection gets inside, see `PortForward`.

    Raises:
        PortSpecError: A pair is no range of ports, or the mode is "fd".
        AddressError: The address cannot be read.
        ArgumentError: There is no such protocol or mode, or no interface can have the name.
        ArgumentTypeError: An argument has another type.
    """

    protocol: Literal["tcp", "udp"]
    host: IPv4Address | IPv6Address
    device: str | None
    include: tuple[tuple[int, int], ...]
    exclude: tuple[tuple[int, int], ...]
    mode: Mode | None

    def __init__(
        self,
        protocol: Literal["tcp", "udp"],
        host: AddressLike = ANY,
        device: str | None = None,
        include: Iterable[tuple[int, int]] = (),
        exclude: Iterable[tuple[int, int]] = (),
        mode: Mode | None = None,
    ) -> None:
        _check(protocol, device, mode)
        if mode == "fd":
            expected = "expected another mode for 'auto': a command is given its sockets when it starts"
            raise PortSpecError(expected, "mode", repr(mode), "name the ports, or leave the mode out")
        host = arguments.address(host, "host")
        include, exclude = _pairs("include", include), _pairs("exclude", exclude)
        arguments.fill(self, locals())

    def covers(self, port: int) -> bool:
        """Return whether a port that is listened on inside is forwarded.

        Args:
            port: The number of the port.
        """
        included = not self.include or is_among(port, self.include)
        return included and not is_among(port, self.exclude)

    def settled(self, mode: Mode | None = None) -> Follow:
        """Return the rule with its own mode, else with `mode`; without either, each port has what reaches it.

        Args:
            mode: The mode of rules that have none.

        Raises:
            ArgumentError: There is no such mode.
            ArgumentTypeError: The mode is not text.
        """
        return self if self.mode is not None else replace(self, mode=mode)

    @property
    def spec(self) -> str:
        """The specification that means this rule."""
        return f"{self}{_option(self.mode)}"

    def __str__(self) -> str:
        kept = [
            *map(_range_shown, self.include),
            *(f"~{_range_shown(pair)}" for pair in self.exclude),
            "auto",
        ]
        return f"{_shown(self.host, self.device)}:{','.join(kept)}/{self.protocol}"


@frozen
class ReverseForward:
    """A port or unix socket inside that leads out.

    Args:
        protocol: "tcp" or "udp".
        inside: The address inside to listen on, or a unix socket there.
        inside_port: The port to listen on, or 0: the kernel chooses, and what `Forwarder.reverse` returns has the
            number.  Beside a unix socket it is 0.
        to: The address that clients are connected to, or a unix socket of the host; None for a handler.
        to_port: The port that clients are connected to, from 1.  Beside a unix socket, and for a handler, it is 0.

    Raises:
        PortSpecError: A port is out of range, or a unix socket or a handler is to have datagrams.
        AddressError: An address cannot be read.
        ArgumentError: There is no such protocol.
        ArgumentTypeError: An argument has another type.
    """

    protocol: Literal["tcp", "udp"]
    inside: IPv4Address | IPv6Address | UnixSocket
    inside_port: int
    to: IPv4Address | IPv6Address | UnixSocket | None
    to_port: int

    def __init__(
        self,
        protocol: Literal["tcp", "udp"],
        inside: AddressLike | UnixSocket,
        inside_port: int,
        to: AddressLike | UnixSocket | None,
        to_port: int = 0,
    ) -> None:
        _check(protocol, None, None)
        for name, port in (("inside_port", inside_port), ("to_port", to_port)):
            arguments.instance(name, port, int, "a port, as a number")
        inside = inside if isinstance(inside, UnixSocket) else arguments.address(inside, "inside")
        to = to if to is None or isinstance(to, UnixSocket) else arguments.address(to, "to")
        arguments.fill(self, locals())
        if wrong := self._wrong():
            name, expected = wrong
            raise PortSpecError(f"expected {expected}", name, arguments.shown(getattr(self, name)))

    def __str__(self) -> str:
        to = "a handler" if self.to is None else _end_shown(self.to, self.to_port)
        return f"{_end_shown(self.inside, self.inside_port)} inside -> {to}/{self.protocol}"

    def _wrong(self) -> tuple[str, str] | None:
        """Return the name of a field that cannot have its value, and what is expected of it."""
        from_path = isinstance(self.inside, UnixSocket)
        to_address = isinstance(self.to, IPv4Address | IPv6Address)
        if not 0 <= self.inside_port < (1 if from_path else 65536):
            return "inside_port", "0 beside a unix socket" if from_path else "a port from 0 to 65535"
        if to_address and not 0 < self.to_port < 65536:
            return "to_port", "a port from 1 to 65535"
        if not to_address and self.to_port:
            return "to_port", "0 beside a unix socket, and for a handler"
        if self.protocol != "tcp" and (from_path or not to_address):
            return "protocol", "tcp: unix sockets and handlers have streams"
        return None


def _end_shown(end: Address | UnixSocket, port: int) -> str:
    return str(end) if isinstance(end, UnixSocket) else f"{_shown(end)}:{port}"


def _check(protocol: str, device: str | None, mode: Mode | None) -> None:
    """Check the arguments that every forward has."""
    if protocol not in PROTOCOLS:  # asked here, as a range has thousands of forwards
        arguments.one_of("protocol", protocol, PROTOCOLS)
    if device is not None:
        arguments.text("device", device, "the name of an interface, or None")
        if not _DEVICE.fullmatch(device):
            raise ArgumentError("expected the name of an interface", "device", arguments.shown(device))
    if mode is not None and mode not in MODES:
        arguments.one_of("mode", mode, MODES)


def _pairs(name: str, given: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return ranges of ports as a record has them."""
    arguments.items(name, given, "ranges of ports, like [(8000, 8010)]")
    pairs: tuple[Any, ...] = tuple(given)
    for pair in pairs:
        arguments.instance(name, pair, tuple, "ranges of ports, like (8000, 8010)")
        for port in pair:
            arguments.instance(name, port, int, "ports, as numbers")
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] < 65536:
            expected = "expected the first and the last port, from 1 to 65535"
            raise PortSpecError(expected, name, arguments.shown(pair))
    return pairs


def is_among(port: int, pairs: Iterable[tuple[int, int]]) -> bool:
    """Return whether a port is in one of these ranges, given as pairs of the first and the last."""
    return any(first <= port <= last for first, last in pairs)


def _is_loopback(guest: Address | UnixSocket | None) -> bool:
    return isinstance(guest, IPv4Address | IPv6Address) and guest.is_loopback


def _range_shown(pair: tuple[int, int]) -> str:
    first, last = pair
    return f"{first}" if first == last else f"{first}-{last}"


def _shown(address: Address, device: str | None = None) -> str:
    host = f"[{address}]" if address.version == 6 else f"{address}"
    return host if device is None else f"{host}%{device}"


def _option(mode: Mode | None) -> str:
    return "" if mode is None else f",mode={mode}"
