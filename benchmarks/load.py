"""The load generator: one end of one measurement.

    python -S -E -I load.py KIND END OPTIONS

KIND is a function of `KINDS`, END is "server" or "client", OPTIONS a JSON object (see `Options`).  A server prints
its port when it listens.  The end that measures prints one JSON object and ends; the other goes on until it is
killed.

Law of this file: a script of its own, the standard library only.  It must not be the bottleneck, so one connection is
blocking calls on buffers made once, with no poll between them; several are one epoll and one thread, for threads
would wait for each other's interpreter lock.  Timeouts of blocking calls are the kernel's own (SO_RCVTIMEO).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

UDP_SEGMENT, UDP_GRO = 103, 104  # <linux/udp.h>
BLOCK = 1 << 18  # bytes of one send
GSO_MAX = 60_000  # payload of one send with UDP_SEGMENT
PATIENCE = (
    5.0  # seconds that whoever does not measure outlives the time, and that a silent peer is waited for
)
LIFETIME = 300  # seconds; nobody waits longer
POLL = 0.1  # seconds after which a blocking call is left to look at the clock
MEBIBYTE = 1 << 20
clock = time.perf_counter

Figures = dict[str, float]


class Options:
    """What OPTIONS may have, with its defaults."""

    address = "127.0.0.1"
    port = 0
    count = 1  # connections
    size = 64  # bytes of a message or a datagram
    seconds = 1.0
    warm_up = 0.3
    sends = False  # bulk and flood: this end sends, the other measures
    offload = False  # flood: UDP_SEGMENT and UDP_GRO

    def __init__(self, given: dict[str, object]) -> None:
        for name, value in given.items():
            if not hasattr(Options, name):
                raise ValueError(f"unknown option {name!r}")
            setattr(self, name, value)


def say(figures: Figures) -> None:
    print(json.dumps(figures), flush=True)


def every_descriptor() -> None:
    """As many descriptors as this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# Sockets


def tcp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    tcp_options(sock)
    return sock


def tcp_options(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def udp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MEBIBYTE)
    return sock


def impatient(sock: socket.socket, seconds: float = POLL) -> None:
    """Blocking calls on it raise BlockingIOError after so long."""
    whole = int(seconds)
    duration = struct.pack("ll", whole, int((seconds - whole) * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, duration)


def reset_on_close(sock: socket.socket) -> None:
    """Nothing of it is to disturb the next measurement."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def listen(options: Options) -> socket.socket:
    """A socket that listens; the one that this process was activated with, if it was (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        server = socket.socket(fileno=3)
        server.setblocking(True)
        tcp_options(server)
    else:
        server = tcp()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((options.address, options.port))
        server.listen(4096)
    say({"port": server.getsockname()[1]})
    return server


def accept(server: socket.socket) -> socket.socket:
    return server.accept()[0]  # which has the listener's options


def connect(options: Options) -> socket.socket:
    sock = tcp()
    sock.connect((options.address, options.port))
    return sock


def connections(end: str, options: Options) -> list[socket.socket]:
    if end == "client":
        return [connect(options) for _ in range(options.count)]
    with listen(options) as server:
        return [accept(server) for _ in range(options.count)]


def datagram_socket(end: str, options: Options) -> socket.socket:
    sock = udp()
    if end == "server":
        sock.bind((options.address, options.port))
        say({"port": sock.getsockname()[1]})
    else:
        sock.connect((options.address, options.port))
    return sock


def polling(socks: Iterable[socket.socket], events: int) -> select.epoll:
    epoll = select.epoll()
    for sock in socks:
        sock.setblocking(False)
        epoll.register(sock, events)
    return epoll


# Latencies


class Latencies:
    """Durations of exchanges."""

    def __init__(self, options: Options) -> None:
        self._times = options.warm_up, options.seconds
        self._begin = 0.0
        self._all = array("d")
        self.append = self._all.append

    def phases(self) -> Iterator[float]:
        """Until when to go on: the warm-up, whose durations are forgotten, and what counts."""
        for seconds in self._times:
            del self._all[:]
            self._begin = clock()
            yield self._begin + seconds

    def say(self) -> None:
        found = sorted(self._all)
        if not found:
            raise TimeoutError("nothing came back")
        say(
            {
                "p50": found[len(found) // 2] * 1e6,
                "p99": found[len(found) * 99 // 100] * 1e6,
                "rate": len(found) / (clock() - self._begin),
            }
        )


# Kinds


def bulk(end: str, options: Options) -> None:
    """Bytes, one way, over `count` connections."""
    socks = connections(end, options)
    for sock in socks:
        reset_on_close(sock)
        impatient(sock)
    if options.sends:
        with suppress(ConnectionError):
            send_bulk(socks, clock() + options.warm_up + options.seconds + PATIENCE)
    else:
        receive_bulk(socks, options)


def send_bulk(socks: list[socket.socket], end: float) -> None:
    block = bytes(BLOCK)
    if len(socks) == 1:
        send = socks[0].send
        while clock() < end:
            with suppress(BlockingIOError):
                send(block)
        return
    by_fd = {sock.fileno(): sock.send for sock in socks}
    epoll = polling(socks, select.EPOLLOUT)
    while clock() < end:
        for fd, _ in epoll.poll(POLL):
            with suppress(BlockingIOError):
                by_fd[fd](block)


def receive_bulk(socks: list[socket.socket], options: Options) -> None:
    buffer = memoryview(bytearray(4 * BLOCK))
    begin = clock() + options.warm_up
    end = begin + options.seconds
    total = before = 0
    now = started = 0.0
    one = socks[0].recv_into if len(socks) == 1 else None
    by_fd = {sock.fileno(): sock.recv_into for sock in socks}
    epoll = None if one else polling(socks, select.EPOLLIN)
    while now < end:
        if one:
            try:
                size = one(buffer)
            except BlockingIOError:
                size = -1
            if size == 0:
                raise ConnectionError("the sender has gone")
            total += max(size, 0)
        elif epoll:
            for fd, _ in epoll.poll(POLL):
                size = by_fd[fd](buffer)
                if size == 0:
                    raise ConnectionError("a sender has gone")
                total += size
        now = clock()
        if not started and now >= begin:
            started, before, end = now, total, now + options.seconds
    if not total:
        raise TimeoutError("nothing arrived")
    say({"bytes": total - before, "seconds": now - started, "total": total})


def rr(end: str, options: Options) -> None:
    """Messages of `size` bytes answered by as many, one under way on each of `count` connections."""
    socks = connections(end, options)
    if end == "server":
        echo(socks, options.size)
    elif len(socks) == 1:
        ask(socks[0], options)
    else:
        ask_many(socks, options)


def echo(socks: list[socket.socket], size: int) -> None:
    buffer = memoryview(bytearray(size))
    if len(socks) == 1:
        receive, send = socks[0].recv_into, socks[0].send
        while count := receive(buffer):
            send(buffer[:count])
        return
    by_fd = {sock.fileno(): (sock.recv_into, sock.send) for sock in socks}
    epoll = polling(socks, select.EPOLLIN)
    while True:
        for fd, _ in epoll.poll():
            receive, send = by_fd[fd]
            if not (count := receive(buffer)):
                return
            send(buffer[:count])


def ask(sock: socket.socket, options: Options) -> None:
    impatient(sock, PATIENCE)
    size, message, buffer = options.size, bytes(options.size), memoryview(bytearray(options.size))
    send, receive = sock.send, sock.recv_into
    latencies = Latencies(options)
    append, now = latencies.append, clock()
    for end in latencies.phases():
        while now < end:
            before = clock()
            send(message)
            if receive(buffer) != size:
                raise ConnectionError("half an answer")
            now = clock()
            append(now - before)
    latencies.say()


def ask_many(socks: list[socket.socket], options: Options) -> None:
    message, buffer = bytes(options.size), memoryview(bytearray(options.size))
    by_fd = {sock.fileno(): (sock.recv_into, sock.send) for sock in socks}
    epoll = polling(socks, select.EPOLLIN)
    latencies = Latencies(options)
    append, now = latencies.append, clock()
    asked = dict.fromkeys(by_fd, now)
    for _, send in by_fd.values():
        send(message)
    for end in latencies.phases():
        while now < end:
            events = epoll.poll(PATIENCE)
            if not events:
                raise TimeoutError("no answer")
            for fd, _ in events:
                receive, send = by_fd[fd]
                if receive(buffer) != options.size:
                    raise ConnectionError("half an answer")
                now = clock()
                append(now - asked[fd])
                asked[fd] = now
                send(message)
    latencies.say()


def crr(end: str, options: Options) -> None:
    """Connections, one after the other in each of `count` lanes: a message, its answer, the server's close."""
    if end == "server":
        answer_once(options)
    elif options.count == 1:
        connect_again(options)
    else:
        connect_many(options)


def answer_once(options: Options) -> None:
    buffer = memoryview(bytearray(options.size))
    server = listen(options)
    if options.count == 1:
        while True:
            with accept(server) as sock:
                sock.send(buffer[: sock.recv_into(buffer)])
    epoll = polling([server], select.EPOLLIN)
    listener, by_fd = server.fileno(), dict[int, socket.socket]()
    while True:
        for fd, _ in epoll.poll():
            if fd == listener:
                with suppress(BlockingIOError):
                    sock = accept(server)
                    by_fd[sock.fileno()] = sock
                    epoll.register(sock, select.EPOLLIN)
            else:
                with by_fd.pop(fd) as sock, suppress(ConnectionError):
                    sock.send(buffer[: sock.recv_into(buffer)])


def connect_again(options: Options) -> None:
    message, buffer = bytes(options.size), memoryview(bytearray(options.size))
    latencies = Latencies(options)
    now = clock()
    for end in latencies.phases():
        while now < end:
            before = clock()
            with connect(options) as sock:
                sock.send(message)
                if sock.recv_into(buffer) != options.size or sock.recv_into(buffer):
                    raise ConnectionError("half an answer")
            now = clock()
            latencies.append(now - before)
    latencies.say()


def connect_many(options: Options) -> None:
    message, buffer = bytes(options.size), memoryview(bytearray(options.size))
    epoll, address = select.epoll(), (options.address, options.port)
    under_way: dict[int, tuple[socket.socket, float]] = {}

    def start() -> None:
        sock = tcp()
        sock.setblocking(False)
        sock.connect_ex(address)
        under_way[sock.fileno()] = sock, clock()
        epoll.register(sock, select.EPOLLOUT)

    latencies = Latencies(options)
    now = clock()
    for _ in range(options.count):
        start()
    for end in latencies.phases():
        while now < end:
            events = epoll.poll(PATIENCE)
            if not events:
                raise TimeoutError("no connection")
            for fd, event in events:
                sock, before = under_way[fd]
                if event & select.EPOLLOUT:
                    sock.send(message)
                    epoll.modify(fd, select.EPOLLIN)
                elif not sock.recv_into(buffer):
                    sock.close()
                    del under_way[fd]
                    now = clock()
                    latencies.append(now - before)
                    start()
    latencies.say()


def burst(end: str, options: Options) -> None:
    """`count` connections, all begun before the first is looked at: a message, its answer, the server's close.

    What has no answer after `seconds` is lost.
    """
    every_descriptor()
    if end == "server":
        return answer_once(options)
    message, buffer = bytes(options.size), memoryview(bytearray(options.size))
    epoll, address = select.epoll(), (options.address, options.port)
    under_way: dict[int, socket.socket] = {}
    began = now = clock()
    for _ in range(options.count):
        sock = tcp()
        sock.setblocking(False)
        sock.connect_ex(address)
        under_way[sock.fileno()] = sock
        epoll.register(sock, select.EPOLLOUT)
    answered = 0
    while under_way and now < began + options.seconds:
        for fd, event in epoll.poll(POLL):
            sock = under_way[fd]
            try:
                if event & select.EPOLLOUT:
                    sock.send(message)
                    epoll.modify(fd, select.EPOLLIN)
                    continue
                answered += sock.recv_into(buffer) == options.size
            except OSError:
                pass
            sock.close()
            del under_way[fd]
        now = clock()
    return say({"lost": options.count - answered, "seconds": now - began})


def udp_rr(end: str, options: Options) -> None:
    """Datagrams of `size` bytes answered by as many, one under way."""
    sock = datagram_socket(end, options)
    if end == "client":
        return ask(sock, options)
    buffer = memoryview(bytearray(options.size))
    sock.connect(sock.recvfrom_into(buffer)[1])
    sock.send(buffer)
    return echo([sock], options.size)


def flood(end: str, options: Options) -> None:
    """Datagrams of `size` bytes, one way, as fast as they can be sent."""
    sock = datagram_socket(end, options)
    if not options.sends:
        impatient(sock)
        if options.offload:
            sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        return receive_flood(sock, options, hello=end == "client")
    if end == "server":  # to whoever says something
        sock.connect(sock.recvfrom(64)[1])
    return send_flood(sock, options)


def send_flood(sock: socket.socket, options: Options) -> None:
    size = options.size
    block = bytes(size)
    if options.offload:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
        block = bytes(GSO_MAX // size * size)
    send, end = sock.send, clock() + options.warm_up + options.seconds + PATIENCE
    while clock() < end:
        try:
            for _ in range(32):
                send(block)
        except OSError as error:
            if error.errno == errno.EIO and options.offload:  # until Linux 6.11: no checksum offload below
                sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)
                block = bytes(size)
            # else it is refused, or there is no room


def receive_flood(sock: socket.socket, options: Options, *, hello: bool) -> None:
    buffer = memoryview(bytearray(1 << 16))
    receive = sock.recv_into
    give_up, now = clock() + PATIENCE, clock()
    size = 0
    while not size and now < give_up:  # the first
        try:
            if hello:
                sock.send(b"hello")
            size = receive(buffer)
        except OSError:  # nothing yet
            now = clock()
    for seconds in (options.warm_up, options.seconds):
        count = total = 0
        started = now = clock()
        while now < started + seconds:
            try:
                total += receive(buffer)
                count += 1
            except BlockingIOError:
                pass
            now = clock()
    if not count:
        raise TimeoutError("nothing arrived")
    say({"bytes": total, "datagrams": count, "seconds": now - started})


def hold(end: str, options: Options) -> None:
    """Idle connections: the client opens up to each number it reads, and says so; the server keeps them."""
    every_descriptor()
    held = []
    if end == "server":
        with listen(options) as server:
            while True:
                held.append(accept(server))
    for line in sys.stdin:
        while len(held) < int(line):
            sock = connect(options)
            reset_on_close(sock)
            held.append(sock)
        say({"held": len(held)})


KINDS: dict[str, Callable[[str, Options], None]] = {
    "bulk": bulk,
    "rr": rr,
    "crr": crr,
    "burst": burst,
    "udp_rr": udp_rr,
    "flood": flood,
    "hold": hold,
}


if __name__ == "__main__":
    signal.alarm(LIFETIME)
    kind, end, text = sys.argv[1:]
    KINDS[kind](end, Options(json.loads(text)))
