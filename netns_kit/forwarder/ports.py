"""Port specifications as text, and what they mean.

    [tcp:|udp:][host address][%device][:]host port[-last][:[guest address:]guest port[-last]][/tcp|/udp]

>>> for forward in parse("127.0.0.1:8080:80/tcp"):
...     print(forward)
127.0.0.1:8080 -> 80/tcp
>>> [str(forward) for forward in parse("udp:5000-5001:10.0.2.100:6000-6001")]
['0.0.0.0:5000 -> 10.0.2.100:6000/udp', '0.0.0.0:5001 -> 10.0.2.100:6001/udp']
>>> str(parse("[::1]%lo:8443")[0])
'[::1]%lo:8443 -> 8443/tcp'
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address
from types import NoneType
from typing import Any, Literal, TypeAlias, cast, get_args

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

SYNTAX = "[tcp:|udp:][ADDRESS:]PORT[-LAST][:[GUEST:]PORT[-LAST]][/PROTO]"
EXAMPLE = "write it like 127.0.0.1:8080:80/tcp"
ANY = IPv4Address("0.0.0.0")
MODES: tuple[Mode, ...] = get_args(Mode)
LONGEST_PATH = 107  # bytes, with a null behind them in sun_path (unix(7))
_PATH = re.compile(r"[/@][^\0\ud800-\udc7f\udd00-\udfff]+")  # what the file system's encoding can have
_SPECIAL = re.compile(
    r"[%:,\s]|[\0-\x1f\x7f]"
)  # what ends a path in a specification, and what is not printed
_DEVICE = re.compile(r"[^:/\s\0]{1,15}")  # dev_valid_name() of the kernel
_PREFIX = re.compile(r"(tcp|udp):(.*)")
_SUFFIX = re.compile(r"(.*)/(tcp|udp)")
_SPEC = re.compile(
    r"""
    (?: (?P<host> \[[^\]]*\] | [0-9]+(?:\.[0-9]+){3} )? (?: %(?P<device>[^:/\s]{1,15}) )? : )?
    (?P<port> [0-9]+ (?: -[0-9]+ )? )
    (?: : (?: (?P<guest> \[[^\]]*\] | [0-9]+(?:\.[0-9]+){3} ) : )? (?P<to> [0-9]+ (?: -[0-9]+ )? ) )?
    """,
    re.VERBOSE,
)


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
            expected = f"expected an absolute path or @NAME, without a null, of at most {LONGEST_PATH} bytes"
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
            arguments.instance(name, port, int, "a port, as a number")
        arguments.boolean("freebind", freebind)
        arguments.boolean("optional", optional)
        no_address = (UnixSocket, NoneType)
        arguments.fill(
            self,
            protocol=protocol,
            host=host if isinstance(host, UnixSocket) else arguments.address(host, "host"),
            host_port=host_port,
            guest=guest if isinstance(guest, no_address) else arguments.address(guest, "guest"),
            guest_port=guest_port,
            device=device,
            mode=mode,
            freebind=freebind,
            optional=optional,
        )
        if expected := self._expected_instead():
            raise PortSpecError(f"expected {expected}", "port", str(self))

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
        reaches: Mode = "socket" if self._has_path or _is_loopback(self.guest) else "stack"
        return replace(self, mode=reaches if mode is None else mode)

    @property
    def _has_path(self) -> bool:
        return isinstance(self.host, UnixSocket) or isinstance(self.guest, UnixSocket)

    def _expected_instead(self) -> str | None:
        """Return what is expected of fields that cannot go together."""
        from_path, to_path = isinstance(self.host, UnixSocket), isinstance(self.guest, UnixSocket)
        if not 0 <= self.host_port < 65536 or not (0 < self.guest_port < 65536 or to_path):
            return "ports from 1 to 65535, and on the host also 0"
        if (from_path and self.host_port) or (to_path and self.guest_port):
            return "port 0 beside a unix socket"
        if from_path and (self.device is not None or self.freebind):
            return "neither a device nor freebind beside a unix socket of the host"
        if self._has_path and self.protocol != "tcp":
            return "tcp: a unix socket carries streams"
        if self._has_path and self.mode not in (None, "socket") and (to_path or self.mode != "fd"):
            return "the mode socket, which unix sockets need"
        return None


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
        PortSpecError: A pair is no range of ports.
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
        arguments.fill(
            self,
            protocol=protocol,
            host=arguments.address(host, "host"),
            device=device,
            include=_pairs("include", include),
            exclude=_pairs("exclude", exclude),
            mode=mode,
        )

    def covers(self, port: int) -> bool:
        """Return whether a port that is listened on inside is forwarded.

        Args:
            port: The number of the port.
        """
        included = not self.include or _is_among(port, self.include)
        return included and not _is_among(port, self.exclude)

    def __str__(self) -> str:
        kept = [
            *map(_range_shown, self.include),
            *(f"~{_range_shown(pair)}" for pair in self.exclude),
            "auto",
        ]
        return f"{_shown(self.host, self.device)}:{','.join(kept)}/{self.protocol}"


def _check(protocol: str, device: str | None, mode: Mode | None) -> None:
    """Check the arguments that every forward has."""
    arguments.one_of("protocol", protocol, ("tcp", "udp"))
    if device is not None:
        arguments.text("device", device, "the name of an interface, or None")
        if not _DEVICE.fullmatch(device):
            raise ArgumentError("expected the name of an interface", "device", arguments.shown(device))
    if mode is not None:
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


def _is_among(port: int, pairs: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= port <= last for first, last in pairs)


def _is_loopback(guest: Address | UnixSocket | None) -> bool:
    return isinstance(guest, IPv4Address | IPv6Address) and guest.is_loopback


def _range_shown(pair: tuple[int, int]) -> str:
    first, last = pair
    return f"{first}" if first == last else f"{first}-{last}"


def _shown(address: Address, device: str | None = None) -> str:
    host = f"[{address}]" if address.version == 6 else f"{address}"
    return host if device is None else f"{host}%{device}"


def parse(spec: str) -> tuple[PortForward, ...]:
    """Return the forwards that `spec` means, one for each port of a range.

    Raises `PortSpecError`, and `ArgumentTypeError` for what is not text.
    """
    arguments.text("port", spec, "text or a PortForward", 'write it like "127.0.0.1:8080:80/tcp"')
    protocol, rest = "tcp", spec
    prefix, suffix = _PREFIX.fullmatch(spec), _SUFFIX.fullmatch(spec)
    if prefix:
        protocol, rest = prefix.groups()
        suffix = None if suffix is None else _SUFFIX.fullmatch(rest)
    if suffix:
        rest, named = suffix.groups()
        if prefix and named != protocol:
            raise _unusable(spec, f"one protocol, not both {protocol} and {named}")
        protocol = named
    found = _SPEC.fullmatch(rest)
    if found is None:
        raise _unusable(spec, f"{SYNTAX}{_hint(rest)}")
    host = ANY if found["host"] is None else _address(spec, found["host"])
    guest = None if found["guest"] is None else _address(spec, found["guest"])
    ports = _range(spec, found["port"], lowest=0)
    targets = ports if found["to"] is None else _range(spec, found["to"], lowest=1)
    if len(ports) != len(targets):
        raise _unusable(spec, f"as many guest ports ({len(targets)}) as host ports ({len(ports)})")
    if targets[0] == 0:
        raise _unusable(
            spec, "a guest port from 1 to 65535, not 0; host port 0 is any that is free, like 0:80"
        )
    kind = cast("Literal['tcp', 'udp']", protocol)
    return tuple(
        PortForward(kind, host, port, guest, target, found["device"])
        for port, target in zip(ports, targets, strict=True)
    )


def _unusable(spec: str, expected: str) -> PortSpecError:
    return PortSpecError(f"expected {expected}", "port", arguments.shown(spec), EXAMPLE)


def _address(spec: str, text: str) -> Address:
    try:
        return ip_address(text.strip("[]"))
    except ValueError as error:
        raise _unusable(spec, f"an address, not {text}") from error


def _hint(rest: str) -> str:
    """Return what is probably wrong with a specification, for frequent mistakes."""
    if found := re.match(r"(?!tcp:|udp:)([A-Za-z][\w.-]*):", rest):
        return f": {found[1]} is no address, and neither tcp nor udp"
    if found := re.search(r"/(?!tcp$|udp$)([^/]*)$", rest):
        return f": {found[1]!r} is neither tcp nor udp"
    if "::" in rest:
        return ": an IPv6 address stands in brackets, like [::1]:8080:80"
    return ""


def _range(spec: str, text: str, *, lowest: int) -> range:
    first, _, last = text.partition("-")
    start, end = int(first), int(last or first)
    if not lowest <= start <= end <= 65535 or (start == 0 and last):
        raise _unusable(spec, f"a port or a range of ports from 1 to 65535, not {text}")
    return range(start, end + 1)
