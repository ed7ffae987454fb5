"""A proxy of SOCKS5 and HTTP that behaves as it is told to.  Behind it is no network: it echoes what it is sent."""

from __future__ import annotations

import socket
import threading
from base64 import b64decode
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tests.support.servers import SECONDS

if TYPE_CHECKING:
    from typing_extensions import Self


class Proxy:
    """A proxy on the loopback, as a context manager.

    Args:
        kind: "socks" or "http".
        manner: What it does to its clients:
            "fine", "dribbles" (a byte at a time), "early" (the first bytes of the stream come with the answer),
            "hangs", "says nothing" (it lets clients in, and then hangs), "dies" (after the first bytes),
            "garbage", "too much", "dies later" (in the midst of the stream),
            or a number: the reply of SOCKS, or the status of HTTP.
        password: The user name and the password that it wants; None: none.

    Attributes:
        asked: What it was asked for: command, host, port.
        said: The credentials that it was told.
    """

    def __init__(
        self, kind: str, manner: str | int = "fine", password: tuple[str, str] | None = None
    ) -> None:
        self.kind, self.manner, self.password = kind, manner, password
        self.asked: list[tuple[str, str, int]] = []
        self.said: list[tuple[str, str]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self.at = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(SECONDS)
        self.drop_clients()
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()
        for each in self._open:
            each.close()

    def drop_clients(self) -> None:
        """End all connections."""
        for each in self._open[1:]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """Wait until all clients have left."""
        for thread in self._threads[1:]:
            thread.join(SECONDS)
            assert not thread.is_alive(), "a client has stayed"

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(SECONDS)
            self._open.append(sock)
            self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with suppress(OSError, EOFError):
            if self.manner == "hangs":
                sock.recv(1)
                sock.recv(1 << 16)
                sock.recv(1)
            else:
                (self._socks if self.kind == "socks" else self._http)(sock)
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def _answer(self, sock: socket.socket, data: bytes) -> None:
        if self.manner == "dribbles":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for octet in data:
                sock.sendall(bytes((octet,)))
        else:
            sock.sendall(data)

    def _socks(self, sock: socket.socket) -> None:
        _, count = _read(sock, 2)
        methods = _read(sock, count)
        if self.manner == "dies":
            return
        if self.manner in ("garbage", "too much"):
            sock.sendall(b"HTTP/1.1 400 What is that?\r\n" * (1 if self.manner == "garbage" else 10000))
            return
        wanted = 0 if self.password is None else 2
        self._answer(sock, bytes((5, wanted if wanted in methods else 0xFF)))
        if wanted not in methods:
            return
        if wanted:
            _, size = _read(sock, 2)
            name = _read(sock, size).decode()
            self.said.append((name, _read(sock, _read(sock, 1)[0]).decode()))
            right = self.said[-1] == self.password
            self._answer(sock, bytes((1, 0 if right else 1)))
            if not right:
                return
        _, command, _, kind = _read(sock, 4)
        if kind == 3:
            host = _read(sock, _read(sock, 1)[0]).decode()
        else:
            packed = _read(sock, 4 if kind == 1 else 16)
            host = socket.inet_ntop(socket.AF_INET if kind == 1 else socket.AF_INET6, packed)
        port = int.from_bytes(_read(sock, 2), "big")
        self.asked.append(({1: "tcp", 3: "udp"}[command], host, port))
        if self.manner == "says nothing":
            sock.recv(1)
        if isinstance(self.manner, int):
            self._answer(sock, bytes((5, self.manner, 0, 1)) + bytes(6))
            return
        if command == 3:
            self._udp(sock)
            return
        self._answer(sock, bytes((5, 0, 0, 3, 5)) + b"proxy" + bytes(2) + self._early())
        self._stream(sock)

    def _udp(self, sock: socket.socket) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay:
            relay.bind(("127.0.0.1", 0))
            relay.settimeout(0.05)
            self._answer(sock, bytes((5, 0, 0, 1)) + bytes(4) + relay.getsockname()[1].to_bytes(2, "big"))
            sock.settimeout(0)
            while True:
                with suppress(TimeoutError):
                    data, client = relay.recvfrom(65535)
                    if data[3] == 3:
                        start = 7 + data[4]
                        host, head = (
                            data[5 : start - 2].decode(),
                            bytes(3) + b"\1\xc0\0\2\1" + data[start - 2 : start],
                        )
                    else:
                        start, host, head = 10, socket.inet_ntop(socket.AF_INET, data[4:8]), data[:10]
                    self.asked.append(("datagram", host, len(data) - start))
                    relay.sendto(head + data[start:][::-1], client)
                    relay.sendto(bytes(3) + b"\1\xc0\0\2\x63\0\x07of a stranger", client)
                    relay.sendto(b"nonsense"[: len(data) % 9], client)
                with suppress(BlockingIOError):
                    if not sock.recv(1):
                        return

    def _http(self, sock: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += _read(sock, 1)
        if self.manner == "dies":
            return
        if self.manner == "garbage":
            sock.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
            return
        if self.manner == "too much":
            sock.sendall(b"HTTP/1.1 200 OK\r\n" + b"X-More: and more\r\n" * 10000)
            return
        lines = head.decode().split("\r\n")
        method, authority, version = lines[0].split(" ")
        assert (method, version) == ("CONNECT", "HTTP/1.1")
        assert lines[1] == f"Host: {authority}"
        for line in lines:
            if line.startswith("Proxy-Authorization: Basic "):
                name, _, word = b64decode(line.rpartition(" ")[2]).decode().partition(":")
                self.said.append((name, word))
        if self.password is not None and self.password not in self.said[-1:]:
            self._answer(
                sock, b'HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm="x"\r\nContent-Length: 0\r\n\r\n'
            )
            return
        host, _, port = authority.rpartition(":")
        self.asked.append(("tcp", host.strip("[]"), int(port)))
        if self.manner == "says nothing":
            sock.recv(1)
        if isinstance(self.manner, int):
            self._answer(sock, b"HTTP/1.1 %d No\r\nContent-Length: 2\r\n\r\nno" % self.manner)
            return
        answer = b"HTTP/1.1 103 Wait\r\nX: y\r\n\r\nHTTP/1.0 200 Connection established\r\nVia: x\r\n\r\n"
        self._answer(sock, answer + self._early())
        self._stream(sock)

    def _early(self) -> bytes:
        return b"220 hello\r\n" if self.manner == "early" else b""

    def _stream(self, sock: socket.socket) -> None:
        while data := sock.recv(1 << 16):
            sock.sendall(data)
            if self.manner == "dies later":
                return
        sock.shutdown(socket.SHUT_WR)


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data
