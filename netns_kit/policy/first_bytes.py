"""The first bytes of a TCP client: the name that a TLS ClientHello or an HTTP/1 request asks for.

    feed(bytes) --> None: more is needed
                    Seen("tls" | "http", names): the name asked for, or no name and why there is none
                    Nothing(why): neither TLS nor HTTP/1

The result depends on the bytes alone, not on the segments and records in which they come.  Some servers read
leniently, some strictly; where two of them could see two names in the same bytes, no name is seen.  So a request with
two Host fields, a folded or bare line, or a target that contradicts its Host has none, and neither has a ClientHello
with two names.

TLS is read as RFC 8446 section 4.1.2 and RFC 6066 section 3 have it, up to the end of the ClientHello.  The name is
the outer one: with Encrypted Client Hello (RFC 9849) the real one cannot be seen, and `Seen.ech` says that there may
be another.  HTTP is read as RFC 9112 has it, up to the end of the first request's header.  Later requests of the
connection are not looked at.

At most `FIRST_BYTES_MAX` bytes are read and kept, in linear time.  Bytes are hostile: none raises an exception.

>>> reader = FirstBytes()
>>> reader.feed(b"GET / HTTP/1.1\\r\\nHost: Example.org:8080\\r\\n") is None
True
>>> reader.feed(b"\\r\\n")
Seen(kind='http', names=(b'\\x07example\\x03org\\x00',), why='', ech=False)
>>> FirstBytes().feed(b"SSH-2.0-OpenSSH_10.0\\r\\n")
Nothing(why='it is neither TLS nor HTTP/1')
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from netns_kit.domain_names import is_host_name, to_wire

FIRST_BYTES_MAX = 16384

_HANDSHAKE = 22  # a record's type
_RECORD_HEADER = 5  # type, version, length
_CLIENT_HELLO = 1  # a handshake message's type
_MESSAGE_HEADER = 4  # type, length
_VERSION_MAJOR = 3  # of SSL 3 and every TLS
_RANDOM = 32
_SERVER_NAME = 0  # an extension; so are the next two
_ECH = 0xFE0D
_ESNI = 0xFFCE  # what became ECH
_HOST_NAME = 0  # a type of server name
_SPACE = 0x20
_METHOD_MAX = 32  # letters of a method: the longest that is registered has 17

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_METHOD = re.compile(_TOKEN)
_REQUEST = re.compile(rb"(" + _TOKEN + rb") ([!-~\x80-\xff]+) HTTP/1\.[0-9]")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):([\t -~\x80-\xff]*)")
_ABSOLUTE = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*).*", re.DOTALL)
_AUTHORITY = re.compile(rb"([A-Za-z0-9._-]+)(:[0-9]*)?")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")

_NEITHER = "it is neither TLS nor HTTP/1"


class Seen(NamedTuple):
    """The beginning of a TLS connection or an HTTP/1 request."""

    kind: Literal["tls", "http"]
    names: tuple[bytes, ...]
    """The name asked for, in wire form and lower case; empty if there is none that can be relied on."""
    why: str = ""
    """Why there is no name."""
    ech: bool = False
    """Whether the ClientHello has the extension of Encrypted Client Hello, of a real or a made-up inner one."""


class Nothing(NamedTuple):
    """The beginning of something else."""

    why: str


class FirstBytes:
    """A reader of what one client says first."""

    __slots__ = ("_at", "_found", "_held", "_host", "_message", "_target")

    def __init__(self) -> None:
        self._held = bytearray()
        self._at = 0  # of TLS: the next record; of HTTP: the next line
        self._message = bytearray()  # of TLS: the ClientHello without its records
        self._target: bytes | None = None  # of HTTP: the request's
        self._host: bytes | None = None
        self._found: Seen | Nothing | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> Seen | Nothing | None:
        """Read the next bytes; return what they are the beginning of, or None if more are needed to tell.

        Bytes behind those that told are ignored: the result stays.
        """
        if self._found is None and len(data):
            held = self._held
            held += data[: FIRST_BYTES_MAX - len(held)]
            is_tls = held[0] == _HANDSHAKE
            try:
                self._found = self._tls() if is_tls else self._http()
            except ValueError as error:
                self._found = Seen("tls" if is_tls else "http", (), str(error))
            if self._found is None and len(held) == FIRST_BYTES_MAX:
                why = f"it has more than {FIRST_BYTES_MAX} bytes"
                self._found = Seen("tls" if is_tls else "http", (), why)
        return self._found

    # -- TLS --------------------------------------------------------------------------------------------

    def _tls(self) -> Seen | Nothing | None:
        """Put the ClientHello together.  Raises ValueError for one that is malformed."""
        held, message = self._held, self._message
        if len(held) > 1 and held[1] != _VERSION_MAJOR:
            return Nothing(_NEITHER)
        while len(held) - self._at >= _RECORD_HEADER:
            start = self._at + _RECORD_HEADER
            size = int.from_bytes(held[start - 2 : start], "big")
            if held[self._at] != _HANDSHAKE or held[self._at + 1] != _VERSION_MAJOR or not size:
                raise ValueError("the ClientHello is interrupted")
            if len(held) < start + size:
                break
            message += held[start : start + size]
            self._at = start + size
            if message[0] != _CLIENT_HELLO:
                raise ValueError("the first message is no ClientHello")
            end = _MESSAGE_HEADER + int.from_bytes(message[1:_MESSAGE_HEADER], "big")
            if len(message) >= max(end, _MESSAGE_HEADER):
                return _client_hello(bytes(message[_MESSAGE_HEADER:end]))
        return None

    # -- HTTP -------------------------------------------------------------------------------------------

    def _http(self) -> Seen | Nothing | None:
        """Read the lines that are complete.  Raises ValueError for a request without a name."""
        held = self._held
        if not self._at:
            found = _METHOD.match(held)
            size = found.end() if found else 0
            if not 0 < size <= _METHOD_MAX or (size < len(held) and held[size] != _SPACE):
                return Nothing(_NEITHER)
        while (end := held.find(b"\n", self._at)) >= 0:
            line, self._at = bytes(held[self._at : end]), end + 1
            is_whole, line = line.endswith(b"\r"), line.removesuffix(b"\r")
            if self._target is None:
                request = _REQUEST.fullmatch(line)
                if request is None:
                    return Nothing(_NEITHER)
                if request[1] == b"CONNECT":
                    raise ValueError("CONNECT asks for a tunnel")
                self._target = request[2]
            elif is_whole and not line:
                return Seen("http", (self._name(),))
            else:
                self._field(line)
            if not is_whole:
                raise ValueError("a line of the request's header does not end in CR LF")
        return None

    def _field(self, line: bytes) -> None:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise ValueError("a line of the request's header is malformed or folded")
        if field[1].lower() == b"host":
            if self._host is not None:
                raise ValueError("the request has several Host fields")
            self._host = field[2].strip(b" \t")

    def _name(self) -> bytes:
        """Return the name that the whole header asks for."""
        if self._host is None:
            raise ValueError("the request has no Host field")
        name = _name_of(_host_of(self._host), "Host")
        target = self._target or b""
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is not None:
            if _name_of(_host_of(absolute[1]), "the request's target") != name:
                raise ValueError("the request's target has another name than Host")
        elif not target.startswith(b"/") and target != b"*":
            raise ValueError("the request's target is no path and no URL")
        return name


def _host_of(authority: bytes) -> bytes:
    """Return the host of "host[:port]"; nothing, for all that is no name either."""
    found = _AUTHORITY.fullmatch(authority)
    return found[1] if found else b""


def _name_of(host: bytes, where: str) -> bytes:
    """Return a name in wire form and lower case.  Raises ValueError for an address and for what is no host name."""
    text = host.decode("latin-1").lower().removesuffix(".")
    if not is_host_name(text) or _NUMBER.fullmatch(text.rpartition(".")[2]):
        raise ValueError(f"{where} is no domain name")
    return to_wire(text)


# -- the ClientHello ------------------------------------------------------------------------------------


class _Fields:
    """A reader of TLS's vectors, each behind its length.  Raises ValueError where one is cut short."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def has_more(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise ValueError("the ClientHello is malformed")
        return self._data[start : self._at]

    def number(self, size: int) -> int:
        """Return a number of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> _Fields:
        """Return the content of a vector whose length has `size` bytes."""
        return _Fields(self.take(self.number(size)))


def _client_hello(body: bytes) -> Seen:
    """Read the name of a whole ClientHello.  Raises ValueError for one that is malformed."""
    hello = _Fields(body)
    if hello.number(1) != _VERSION_MAJOR:
        raise ValueError("the ClientHello is malformed")
    hello.take(1 + _RANDOM)
    for length in (1, 2, 1):  # the session, cipher suites, compression methods
        hello.vector(length)
    extensions: dict[int, _Fields] = {}
    if hello.has_more:
        listed = hello.vector(2)
        while listed.has_more:
            kind = listed.number(2)
            if kind in extensions:
                raise ValueError("the ClientHello has an extension twice")
            extensions[kind] = listed.vector(2)
    if hello.has_more:
        raise ValueError("the ClientHello is malformed")
    ech = _ECH in extensions or _ESNI in extensions
    try:
        names = (_server_name(extensions),)
    except ValueError as error:
        return Seen("tls", (), str(error), ech)
    return Seen("tls", names, ech=ech)


def _server_name(extensions: dict[int, _Fields]) -> bytes:
    if _SERVER_NAME not in extensions:
        raise ValueError("the ClientHello has no server_name")
    extension = extensions[_SERVER_NAME]
    listed = extension.vector(2)
    kind = listed.number(1)
    name = listed.take(listed.number(2))
    if kind != _HOST_NAME or listed.has_more or extension.has_more:
        raise ValueError("server_name is not one host name")
    return _name_of(name, "server_name")
