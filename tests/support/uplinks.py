"""Policies and uplinks that a worker process can import; it is where they do what they do."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from netns_kit import DnsSettings, Flow, Refusal, Uplink
from netns_kit.arguments import Address
from netns_kit.stack.user import Transport
from netns_kit.uplink.flow import Endpoint

# x86_64 and aarch64, asm/unistd.h
_PTRACE, _MOUNT, _UNSHARE, _BPF, _SETNS, _IO_URING = {
    "x86_64": (101, 165, 272, 321, 308, 425),
    "aarch64": (117, 40, 97, 280, 268, 425),
}.get(os.uname().machine, (-1,) * 6)
_libc = ctypes.CDLL(None, use_errno=True)
_OWNER = os.getppid()


def new_file(owner: int) -> str:
    """What the worker of that process must not be able to make."""
    return f"/tmp/netns_kit-worker-of-{owner}"


def _call(number: int, *arguments: int) -> None:
    if _libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "syscall")


def _own(pid: int) -> None:
    """Have the kernel signal that process whenever this socket has something to read."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.fcntl(sock, fcntl.F_SETOWN, pid)


def _connect(address: str) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((address, 53))
        except OSError as error:  # what matters is that the name of the interface is understood
            if isinstance(error, socket.gaierror):
                raise OSError(errno.EPERM, "no such interface") from error


ATTEMPTS: dict[str, Callable[[], object]] = {
    "resolv.conf": lambda: open("/etc/resolv.conf", "rb").close(),
    "a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
    "a zone": lambda: _connect("fe80::1%lo"),
    "its own source": lambda: open(__file__, "rb").close(),
    "its own memory": lambda: open("/proc/self/mem", "r+b").close(),
    "a new file": lambda: open(new_file(_OWNER), "wb").close(),
    "a file of the readable": lambda: open("/etc/resolv.conf", "ab").close(),
    "a unix socket": lambda: socket.socket(socket.AF_UNIX).close(),
    "a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "a packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
    "a fork": os.fork,
    "a thread": lambda: threading.Thread(target=int).start(),
    "a signal to its owner": lambda: os.kill(_OWNER, 0),
    "its owner's pidfd": lambda: os.close(os.pidfd_open(_OWNER)),
    "executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
    "another limit": lambda: __import__("resource").setrlimit(4, (1, 1)),
    "signals by a descriptor": lambda: _own(_OWNER),
    "a memfd": lambda: os.close(os.memfd_create("x")),
}
ALLOWED = {"resolv.conf", "a socket", "a zone"}
FATAL: dict[str, Callable[[], object]] = {
    "execve": lambda: os.execv("/bin/true", ["true"]),
    "ptrace": lambda: _call(_PTRACE, 0, 0, 0, 0),
    "mount": lambda: _call(_MOUNT, 0, 0, 0, 0, 0),
    "unshare": lambda: _call(_UNSHARE, 0x10000000),
    "bpf": lambda: _call(_BPF, 0, 0, 0),
    "setns": lambda: _call(_SETNS, 0, 0),
    "io_uring": lambda: _call(_IO_URING, 1, 0),
}
DEATHS: dict[str, Callable[[], object]] = {
    "SIGSEGV": lambda: ctypes.string_at(0),
    "SIGABRT": os.abort,
    "status 7": lambda: os._exit(7),
}


def out_of_hours(flow: Flow) -> Refusal | None:
    """In the zone of `TZ`, which is somewhere else than Greenwich."""
    return None if time.localtime().tm_gmtoff else Refusal.PROHIBITED


def refuse(flow: Flow) -> Refusal | None:
    """Everything."""
    return Refusal.PROHIBITED


def fails(flow: Flow) -> Refusal | None:
    """A bug."""
    raise LookupError("a bug")


def answers_nonsense(flow: Flow) -> Refusal | None:
    """Neither a refusal nor None."""
    return True  # type: ignore[return-value]  # what it must not return


def attempt(flow: Flow) -> Refusal | None:
    """Try what a sandbox is there to prevent, and tell on standard error how it went."""
    for name, action in ATTEMPTS.items():
        try:
            action()
            outcome = "done"
        except OSError as error:
            outcome = errno.errorcode.get(error.errno or 0, str(error))
        except (RuntimeError, ValueError):  # "can't start new thread", "not allowed to raise maximum limit"
            outcome = "EPERM"
        sys.stderr.write(json.dumps([name, outcome]) + "\n")
    sys.stderr.write(json.dumps(["the end", "done"]) + "\n")
    return Refusal.PROHIBITED


def die(flow: Flow) -> Refusal | None:
    """As the port it goes to says: one that counts `FATAL` from 1000, or `DEATHS` from 2000."""
    port = flow.destination.port
    list((DEATHS if port >= 2000 else FATAL).values())[port % 1000]()
    return None


def chatter(flow: Flow) -> Refusal | None:
    """More than anybody wants to read."""
    for number in range(20000):
        sys.stderr.write(f"\x1b[31m{number:90}\n")
    return Refusal.PROHIBITED


def stuck(flow: Flow) -> Refusal | None:
    """For ever."""
    sys.stderr.write("stuck\n")
    while True:
        pass


class _BrokenSocket(socket.socket):
    def fileno(self) -> int:
        raise LookupError("a bug")


class Broken(Uplink):
    """A bug in the middle of the engine's work: what the uplink has made fails when it is used."""

    def open(self, protocol: Transport, target: Address, port: int = 0) -> socket.socket:
        return _BrokenSocket(socket.AF_INET, socket.SOCK_DGRAM)


@dataclass(frozen=True)
class Saying:
    """A policy that is an object, and cannot change."""

    refusal: Refusal

    def __call__(self, flow: Flow) -> Refusal | None:
        return self.refusal


@dataclass(frozen=True)
class Holding:
    """One that cannot, but for what it holds; its equality does not tell."""

    held: object = field(compare=False)

    def __call__(self, flow: Flow) -> Refusal | None:
        return None


class Changing:
    """One that can."""

    refusal: Refusal | None = None

    def __call__(self, flow: Flow) -> Refusal | None:
        return self.refusal

    def policy(self, flow: Flow) -> Refusal | None:
        return self.refusal


def refuse_ports(ports: Collection[int], flow: Flow) -> Refusal | None:
    """For a `partial`."""
    return Refusal.PROHIBITED if flow.destination.port in ports else None


class Reading(Uplink):
    """Reads resolv.conf, and finds its resolvers at another port than theirs."""

    def __init__(self, resolv_conf: str, port: int) -> None:
        super().__init__(dns=DnsSettings(resolv_conf=resolv_conf))
        self._port = port

    def resolvers(self) -> tuple[Endpoint, ...]:
        return tuple(Endpoint(address, self._port) for address, _ in super().resolvers())


def names_only(flow: Flow) -> Refusal | None:
    """A policy that lets nothing but DNS pass."""
    return None if flow.destination.address in flow.subnet.resolvers else Refusal.PROHIBITED
