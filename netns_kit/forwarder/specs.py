"""Port specifications as text, and what they mean.  docs/ports.md has the grammar.

>>> for forward in parse("127.0.0.1:8080:80/tcp"):
...     print(forward)
127.0.0.1:8080 -> 80/tcp
>>> [str(forward) for forward in parse("udp:5000-5001:10.0.2.100:6000-6001")]
['0.0.0.0:5000 -> 10.0.2.100:6000/udp', '0.0.0.0:5001 -> 10.0.2.100:6001/udp']
>>> [forward.spec for forward in parse("%lo/22,80:unix:/run/web.sock,freebind")]
['0.0.0.0%lo:22:22/tcp,freebind', '0.0.0.0%lo:80:unix:/run/web.sock,freebind']
>>> parse("80:80x")
Traceback (most recent call last):
    ...
netns_kit.errors.PortSpecError: port='80:80x': expected ',', '/' or the end at character 6, not 'x'; write it \
like 127.0.0.1:8080:80/tcp
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Literal, NamedTuple, TypeVar, cast

from netns_kit import arguments
from netns_kit.arguments import LARGEST_PORT, Address
from netns_kit.dns import hosts
from netns_kit.errors import ArgumentError, PortSpecError
from netns_kit.host import addresses, sysctl
from netns_kit.host.paths import text_of

from .ports import ANY, MODES, Follow, Mode, PortForward, ReverseForward, UnixSocket, is_among

T = TypeVar("T")

SYNTAX = "[tcp:|udp:][ADDRESS[%DEVICE]:]PORT[-LAST][:[GUEST:]PORT[-LAST]][/PROTO][,OPTION]..."
EXAMPLE = "write it like 127.0.0.1:8080:80/tcp"
BRACKETS = "an IPv6 address stands in brackets, like [::1]:8080:80"
HOSTS = "/etc/hosts"
EPHEMERAL = "net.ipv4.ip_local_port_range"
ANY6 = IPv6Address("::")
LOCALHOST, LOCALHOST6 = IPv4Address("127.0.0.1"), IPv6Address("::1")

_END = r"(?![\w.-])"
_PREFIX = re.compile(r"(tcp|udp)([46]?):")
_SUFFIX = re.compile(rf"(tcp|udp)([46]?){_END}")
_KEYWORD = re.compile(rf"(auto|all|none){_END}")
_OPTION = re.compile(rf"mode(?==)|(?:freebind|optional){_END}")
_WORD = re.compile(r"\w*", re.ASCII)
_NUMBER = re.compile(r"[0-9]+")
_SEPARATOR = re.compile(r"[:/]")
_BRACKETED = re.compile(r"[^\]]*")
_BARE_IPV6 = re.compile(rf"[0-9A-Fa-f:.]+(?=(?:%[^:/]*)?/(?!(?:tcp|udp)[46]?{_END}))")
_NAME = re.compile(  # or an address, but neither a port nor a keyword
    rf"""(?! (?:auto|all|none) {_END} | [0-9]+ (?:-[0-9]*)? [:/%,] )
         (?: [A-Za-z_] [\w.-]* | [0-9]+ \. [\w.-]* | [\w.-]+ (?=[:/%]) )""",
    re.VERBOSE | re.ASCII,
)
_DEVICE = re.compile(r"[^:/\s\0]*")
_PATH = re.compile(r"[^:,]*")
_NO_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ESCAPE = re.compile(rb"%(..)")
_PROTOCOL_OF_PATH = re.compile(r"/(?:tcp|udp)[46]?\Z")
_IPV6 = re.compile(r"[0-9A-Fa-f:]*::")  # what looks as if it were one
_SHOWN = re.compile(r"[^:/,%\[\]]+|.|\Z", re.DOTALL)  # what an error quotes


def parse(spec: str) -> tuple[PortForward | Follow, ...]:
    """Return what `spec` means: a forward for each port, or a rule where it says "auto".

    Raises `PortSpecError`, and `ArgumentTypeError` for what is not text.
    """
    arguments.text("port", spec, "text, a PortForward or a Follow", 'write it like "127.0.0.1:8080:80/tcp"')
    return _read("port", spec, lambda parser: tuple(parser.forwards()))


def parse_all(specs: Iterable[str | PortForward | Follow]) -> list[PortForward | Follow]:
    """Return what all of these mean, in order; records mean themselves.

    Raises `PortSpecError`, and `ArgumentTypeError` for what is neither text nor a record.
    """
    return [
        each
        for spec in specs
        for each in ((spec,) if isinstance(spec, PortForward | Follow) else parse(spec))
    ]


def parse_reverse(spec: str) -> ReverseForward:
    """Return what [tcp:|udp:]INSIDE:TO[/PROTO] means, where each end is [ADDRESS:]PORT or unix:PATH.

    Raises `PortSpecError`, and `ArgumentTypeError` for what is not text.

    >>> print(parse_reverse("5432:localhost:5432"))
    127.0.0.1:5432 inside -> 127.0.0.1:5432/tcp
    >>> print(parse_reverse("unix:@bus:unix:/run/bus"))
    unix:@bus inside -> unix:/run/bus/tcp
    """
    arguments.text("reverse", spec, "text", 'write it like "5432:127.0.0.1:5432"')
    return _read("reverse", spec, _Parser.reverse, "write it like 5432:127.0.0.1:5432")


def parse_end(name: str, text: str, least: int) -> tuple[Address | UnixSocket, int]:
    """Return what an end of a reverse forward means, its port being `least` at least; see `parse_reverse`.

    Raises `PortSpecError` about the argument `name`.
    """
    fix = "write it like 127.0.0.1:5432 or unix:/run/socket"
    return _read(name, text, lambda parser: parser.end(least), fix)


def _read(name: str, spec: str, read: Callable[[_Parser], T], fix: str | None = None) -> T:
    """Return what is read of a specification.  Raises `PortSpecError` about the argument `name`."""
    try:
        return read(_Parser(spec))
    except _Unexpected as error:
        expected, usual = error.args
        raise PortSpecError(
            f"expected {expected}", name, arguments.shown(spec), fix or usual
        ) from error.__cause__


class _Unexpected(Exception):
    """An error in a specification: what was expected and where, and what to do about it."""


class _Ports(NamedTuple):
    """An item of the list: ports of the host, and where each of them leads to."""

    host: Sequence[int]
    guest: Address | UnixSocket | None
    inside: Sequence[int]
    target_at: int | None


class _Parser:
    """A reader of one specification; `at` is the character that it has come to."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.at = 0
        self.places: dict[str, int] = {}
        """Where the specification has the arguments of `PortForward` with these names."""
        self.protocol: Literal["tcp", "udp"] = "tcp"
        self.version = ""
        self.hosts: tuple[Address | UnixSocket, ...] = ()
        self.device: str | None = None
        self.listed: list[_Ports] = []
        self.excluded: list[tuple[int, int]] = []
        self.keyword = ""
        self.mode: Mode | None = None

    def forwards(self) -> Iterator[PortForward | Follow]:
        """Yield the forwards.  Raises `_Unexpected`."""
        self._read_protocol(_PREFIX)
        self.places["host"] = self.at
        if self._skip("unix:"):
            self.hosts = (self._read_path(),)
            self._require(":", "':' and what it leads to")
            self._read_target((0,))
        else:
            self._read_host()
            self._read_list()
        expected = "',', '/' or the end"
        if self._skip("/"):
            if not self._read_protocol(_SUFFIX):
                raise self._expected("tcp or udp")
            expected = "',' or the end"
        while self._skip(","):
            self._read_option()
            expected = "',' or the end"
        self._require_end(expected)
        yield from self._follows() if self.keyword == "auto" else self._forwards()

    def reverse(self) -> ReverseForward:
        """Return a reverse forward.  Raises `_Unexpected`."""
        self._read_protocol(_PREFIX)
        inside, inside_port = self._read_end("a port inside", 0)
        self._require(":", "':' and what it leads to")
        to, to_port = self._read_end("a port", 1)
        if self._skip("/") and not self._read_protocol(_SUFFIX):
            raise self._expected("tcp or udp")
        self._require_end("'/' or the end")
        return ReverseForward(self.protocol, inside, inside_port, to, to_port)

    def end(self, least: int) -> tuple[Address | UnixSocket, int]:
        """Return one end of a reverse forward.  Raises `_Unexpected`."""
        end = self._read_end("a port", least)
        self._require_end("the end")
        return end

    def _read_end(self, what: str, least: int) -> tuple[Address | UnixSocket, int]:
        if self._skip("unix:"):
            return self._read_path(), 0
        at, address = self.at, self._read_ipv6()
        if address is None and (found := self._take(_NAME)):
            address = next(iter(_meant(found[0])), None)
            if address is None:
                raise self._expected(f"{what}, an address or a name of {HOSTS}", at)
        if address is not None and not self._skip(":"):
            raise self._expected("':' and a port")
        return address or LOCALHOST, self._read_port(what, least)

    # -- the parts, from left to right ------------------------------------------------------------------

    def _read_protocol(self, pattern: re.Pattern[str]) -> bool:
        """Read a protocol, if there is one.  What was said before must not be contradicted."""
        at = self.at
        if not (found := self._take(pattern)):
            return False
        protocol, version = cast("tuple[Literal['tcp', 'udp'], str]", found.groups())
        if "protocol" in self.places and (
            protocol != self.protocol or (self.version and version not in ("", self.version))
        ):
            raise self._expected(f"{self.protocol}{self.version} (as before the ports)", at)
        self.places.setdefault("protocol", at)
        self.protocol, self.version = protocol, version or self.version
        return True

    def _read_host(self) -> None:
        """Read the address and the device that stand before the list, if any do."""
        at = self.at
        if address := self._read_ipv6():
            self.hosts = (address,)
        elif found := self._take(_NAME):
            self.hosts = _meant(found[0])
            if not self.hosts:
                names = f"an address, localhost, this machine's name or a name of {HOSTS}"
                raise self._expected(names if at else f"tcp: or udp: or {names}", at)
        elif not self.spec.startswith((":", "%"), at):
            return
        if self._skip("%"):
            self.places["device"] = self.at
            self.device = self._take_text(_DEVICE)
            if not 0 < len(self.device) < 16:
                raise self._expected("the name of an interface (1 to 15 characters)", self.places["device"])
        if not self._take(_SEPARATOR):
            raise self._expected("':' and a port")

    def _read_list(self) -> None:
        """Read ports, exclusions and keywords, up to what is none of them."""
        what = "a port"
        while True:
            at = self.at
            if self.keyword == "none":
                raise self._expected("the end behind none")
            if self._skip("~"):
                ports = self._read_range("a port", 1)
                self.excluded.append((ports[0], ports[-1]))
            elif found := self._take(_KEYWORD):
                if (
                    self.keyword
                    or (self.listed and found[1] != "auto")
                    or (self.excluded and found[1] == "none")
                ):
                    raise self._expected("a port or '~'", at)
                self.keyword = found[1]
            elif self.keyword == "all":
                raise self._expected("'~' or an option behind all")
            else:
                self._read_ports(what)
            if not self.spec.startswith(",", self.at) or _OPTION.match(self.spec, self.at + 1):
                return
            self.at += 1
            what = "a port, '~', auto or an option"

    def _read_ports(self, what: str) -> None:
        """Read ports of the host, and what they lead to if that is not the same."""
        if (self.hosts or self.device) and self._skip(":"):
            self._read_target(())
            return
        host = self._read_range(what, 0)
        if self._skip(":"):
            self._read_target(host)
        elif host[0] == 0:
            raise self._expected("':' and a port inside (host port 0 is any that is free)")
        else:
            self.listed.append(_Ports(host, None, host, None))

    def _read_target(self, host: Sequence[int]) -> None:
        """Read what ports of the host lead to; () for as many as there are inside, and any numbers."""
        at = self.at
        guest: Address | UnixSocket | None = None
        inside: Sequence[int] = (0,)
        if self._skip("unix:"):
            guest = self._read_path()
            if found := _PROTOCOL_OF_PATH.search(self.spec[: self.at]):
                fix = "it is tcp; a path that ends like this is written with %2F"
                raise self._expected("',' or the end behind a unix socket", found.start(), fix=fix)
        else:
            if address := self._read_ipv6():
                guest = address
            elif found := self._take(_NAME):
                guest = _address(found[0])
                if guest is None:
                    raise self._expected("an address or a port inside", at)
            if guest is not None and not self._take(_SEPARATOR):
                raise self._expected("':' and a port inside")
            inside = self._read_range("a port inside", 1)
        ports = host or (0,) * len(inside)
        if len(ports) != len(inside):
            expected = "1 port" if len(ports) == 1 else f"{len(ports)} ports"
            raise self._expected(f"{expected} inside (as many as on the host)", at, self.spec[at : self.at])
        self.listed.append(_Ports(ports, guest, inside, at))

    def _read_option(self) -> None:
        at = self.at
        if not (found := self._take(_OPTION)):
            raise self._expected("mode=, freebind or optional")
        name = found[0]
        if name in self.places:
            raise self._expected("another option", at)
        self.places[name] = at
        if self._skip("="):
            self.places[name] = self.at
            mode = self._take_text(_WORD)
            if mode not in MODES:
                raise self._expected("stack, socket, transparent or fd", self.places[name])
            self.mode = mode

    # -- parts of these ---------------------------------------------------------------------------------

    def _read_ipv6(self) -> Address | None:
        """Read an address in brackets, or one before a slash, if there is one."""
        if self._skip("["):
            at, text = self.at, self._take_text(_BRACKETED)
            self._require("]", "']'")
            if (address := _address(text)) is None:
                raise self._expected("an IPv6 address", at, text or None)
            return address
        found = _BARE_IPV6.match(self.spec, self.at)
        if found and (address := _address(found[0])):
            self.at = found.end()
            return address
        return None

    def _read_path(self) -> UnixSocket:
        """Read the path of a unix socket, up to a comma or a colon."""
        at, text = self.at, self._take_text(_PATH)
        if found := _NO_ESCAPE.search(text):
            raise self._expected("two hexadecimal digits", at + found.end())
        raw = _ESCAPE.sub(lambda found: bytes.fromhex(found[1].decode()), os.fsencode(text))
        try:
            return UnixSocket(os.fsdecode(raw))
        except ArgumentError as error:
            raise self._expected(error.cause.removeprefix("expected "), at, text or None) from error

    def _read_range(self, what: str, least: int) -> range:
        first = self._read_port(what, least)
        if first == 0 or not self._skip("-"):
            return range(first, first + 1)
        return range(first, self._read_port("the last port", first) + 1)

    def _read_port(self, what: str, least: int) -> int:
        at = self.at
        if not (found := self._take(_NUMBER)):
            raise self._expected(what)
        number = int(found[0]) if len(found[0]) < 10 else LARGEST_PORT + 1
        if not least <= number <= LARGEST_PORT:
            raise self._expected(f"{what} ({least} to {LARGEST_PORT})", at)
        return number

    def _skip(self, text: str) -> bool:
        follows = self.spec.startswith(text, self.at)
        if follows:
            self.at += len(text)
        return follows

    def _require(self, text: str, what: str) -> None:
        if not self._skip(text):
            raise self._expected(what)

    def _require_end(self, what: str) -> None:
        if self.at < len(self.spec):
            raise self._expected(what)

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        if found := pattern.match(self.spec, self.at):
            self.at = found.end()
        return found

    def _take_text(self, pattern: re.Pattern[str]) -> str:
        """Read what matches; the pattern also matches nothing."""
        found = self._take(pattern)
        return found[0] if found else ""

    def _expected(
        self, what: str, at: int | None = None, given: str | None = None, fix: str | None = None
    ) -> _Unexpected:
        """Return the error that says what was expected at a character, and what is there."""
        place = self.at if at is None else at
        if given is None:
            found = _SHOWN.match(self.spec, place)
            given = found[0] if found else ""
        there = arguments.shown(given) if given else "the end"
        if fix is None:
            fix = BRACKETS if _IPV6.match(self.spec, self.places.get("host", 0)) else EXAMPLE
        return _Unexpected(f"{what} at character {place + 1}, not {there}", fix)

    # -- what it all means ------------------------------------------------------------------------------

    def _listened_on(self) -> tuple[Address | UnixSocket, ...]:
        """Return the host's side: all that was named, of the IP version that the protocol was said to have."""
        if not self.hosts:
            return (ANY6 if self.version == "6" else ANY,)
        if not self.version:
            return self.hosts
        kept = tuple(each for each in self.hosts if f"{getattr(each, 'version', '')}" == self.version)
        if not kept:
            raise self._expected(f"an IPv{self.version} address", self.places["host"])
        return kept

    def _forwards(self) -> Iterator[PortForward]:
        """Yield a forward for each port."""
        everything = self.keyword == "all" or (self.excluded and not self.listed)
        mode, freebind = self.mode, "freebind" in self.places
        optional = bool(everything) or "optional" in self.places
        listed = [_unreserved()] if everything else self.listed
        listened_on = self._listened_on()
        try:
            for host in listened_on:
                for ports, guest, inside, _ in listed:
                    for port, to in zip(ports, inside, strict=True):
                        if not is_among(port, self.excluded):
                            yield PortForward(
                                self.protocol, host, port, guest, to, self.device, mode, freebind, optional
                            )
        except PortSpecError as error:
            raise self._expected(error.cause.removeprefix("expected "), self.places[error.knob]) from error

    def _follows(self) -> Iterator[Follow]:
        """Yield a rule for each address."""
        for each in self.listed:
            if each.target_at is not None:
                raise self._expected("',' or the end (auto keeps the numbers)", each.target_at - 1)
        for name in ("freebind", "optional"):
            if name in self.places:
                raise self._expected("an option that goes with auto", self.places[name])
        include = [(each.host[0], each.host[-1]) for each in self.listed]
        for host in self._listened_on():
            assert not isinstance(host, UnixSocket), "a unix socket has no list"
            yield Follow(self.protocol, host, self.device, include, self.excluded, self.mode)


def _unreserved() -> _Ports:
    """Return all ports but those that the kernel gives to programs that ask for none."""
    first, last = sysctl.numbers(EPHEMERAL)
    ports = [*range(1, first), *range(last + 1, LARGEST_PORT + 1)]
    return _Ports(ports, None, ports, None)


def _address(text: str) -> Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _meant(text: str) -> tuple[Address, ...]:
    """Return the addresses that text means on the host: an address, or a name that is known without asking DNS."""
    if address := _address(text):
        return (address,)
    name, own = text.lower(), addresses.of_host()
    if name == "localhost":
        return (LOCALHOST, *(each for each in own if each == LOCALHOST6))
    if name == os.uname().nodename.lower():
        outer = tuple(each for each in own if not each.is_loopback)
        if outer:
            return outer
    entries = hosts.parse(text_of(HOSTS))
    return tuple(each.address for each in entries if name in map(str.lower, each.names))
