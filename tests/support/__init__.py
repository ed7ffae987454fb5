"""What a test needs of the machine, and what it must leave as it found it.

The `needs` functions are called in the body of a test or of a fixture.  What is missing skips the test with
the reason on a laptop, and fails it where the environment variable CI is set: there everything must be there.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "netns_kit"

SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")

LONG = bool(os.environ.get("NETNS_KIT_LONG"))
"""Whether soaks, storms and what is drawn at random are to be of full size."""

GRACE = 20.0
"""Seconds that what is already on its way out gets to be gone."""

_UNSHARE = """
import ctypes, fcntl, os, struct
libc = ctypes.CDLL(None, use_errno=True)
uid, gid = os.geteuid(), os.getegid()
if libc.unshare(0x10000000 | 0x40000000):  # CLONE_NEWUSER | CLONE_NEWNET
    raise OSError(ctypes.get_errno(), "unshare: " + os.strerror(ctypes.get_errno()))
for name, text in ("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1"):
    with open("/proc/self/" + name, "w") as file:
        file.write(text)
"""
_TUN = """
tap = os.open("/dev/net/tun", os.O_RDWR)
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"probe", IFF_TAP | IFF_NO_PI))
"""
_PING = """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
"""
_CONGESTION = """
import socket
socket.socket().setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, {!r})
"""
_IPV6 = """
import socket
socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).bind(("::1", 0))
"""


@cache
def files() -> tuple[str, ...]:
    """Every module of the package, as a path inside it."""
    top = ROOT / PACKAGE
    return tuple(sorted(str(path.relative_to(top)) for path in top.rglob("*.py")))


@cache
def dotted(file: str) -> str:
    """The module that a path inside the package is: `stack/seq.py` is netns_kit.stack.seq."""
    parts = Path(file).with_suffix("").parts
    return ".".join([PACKAGE, *(part for part in parts if part != "__init__")])


def missing(reason: str) -> NoReturn:
    """Skip the running test with `reason`, or fail it in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (in CI everything must be there)", pytrace=False)
    pytest.skip(reason)


def needs(*commands: str) -> None:
    """Require the programs that the running test starts.

    They are sought in `PATH` as it is, which the programs of a test inherit; see `see_administrators_programs`.
    """
    absent = [command for command in commands if shutil.which(command) is None]
    if absent:
        missing(f"not installed: {', '.join(absent)}")


def see_administrators_programs() -> None:
    """Append to `PATH` the directories of programs that an ordinary user's lacks, such as dnsmasq and dhclient.

    From then on the tests and whatever they start look for programs in the same places.
    """
    path = os.environ.get("PATH", os.defpath).split(":")
    os.environ["PATH"] = ":".join([*path, *(sbin for sbin in SBIN if sbin not in path)])


@cache
def _refusal(code: str) -> str:
    """What a child process that runs `code` dies of, or nothing."""
    command = [sys.executable, "-I", "-S", "-c", code]
    child = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    return child.stderr.strip().rpartition("\n")[2] if child.returncode else ""


def _needs_probe(what: str, code: str) -> None:
    if refusal := _refusal(code):
        missing(f"{what}: {refusal}")


def needs_ipv6() -> None:
    """The running test uses the host's ::1."""
    _needs_probe("no IPv6 loopback", _IPV6)


def needs_userns() -> None:
    """The running test makes user and network namespaces."""
    _needs_probe("no user and network namespace", _UNSHARE)


def needs_tun() -> None:
    """The running test opens a tap in a namespace it made."""
    _needs_probe("no tap in a new namespace", _UNSHARE + _TUN)


def subids() -> tuple[int, int] | None:
    """Return the first subordinate uid of this user and how many there are (subuid(5)), or None."""
    name = pwd.getpwuid(os.geteuid()).pw_name
    with suppress(FileNotFoundError):
        for line in Path("/etc/subuid").read_text().splitlines():
            who, first, count = line.split(":")
            if who == name:
                return int(first), int(count)
    return None


def needs_subids() -> None:
    """Require subordinate ids and who maps them; the running test is not root's, who needs neither."""
    needs("newuidmap", "newgidmap")
    if subids() is None:
        missing("no range for this user in /etc/subuid")


_KEYS = """
import ctypes, os, sys
from netns_kit.host.abi import KEYCTL_JOIN_SESSION_KEYRING, SYS_KEYCTL, SYS_KEYCTL_ELSEWHERE
keyctl = SYS_KEYCTL.get(os.uname().machine, SYS_KEYCTL_ELSEWHERE)
libc = ctypes.CDLL(None)
if libc.syscall(keyctl, KEYCTL_JOIN_SESSION_KEYRING, None) < 0:
    sys.exit(99)
assert libc.syscall(keyctl - 2, b"user", b"netns_kit", b"secret", 6, -3) > 0  # add_key(2), to the session keyring

import anyio
from netns_kit import Namespace

SEARCH = f"import ctypes; print(ctypes.CDLL(None).syscall({keyctl}, 10, -3, b'user', b'netns_kit', 0) > 0)"

async def main():
    async with NAMESPACE as ns:
        done = await ns.run(["/usr/bin/env", "python3", "-ISc", SEARCH], stderr=None)
        print(done.stdout.decode().strip())

anyio.run(main)
"""


def finds_the_callers_keys(namespace: str) -> str:
    """Tell whether a command in `namespace`, an expression, finds a key in the session keyring of its caller's."""
    argv = [sys.executable, "-c", _KEYS.replace("NAMESPACE", namespace)]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False, timeout=60)
    if done.returncode == 99:
        missing("no session keyring here")
    done.check_returncode()
    return done.stdout.strip()


def needs_ping() -> None:
    """The running test opens an unprivileged ping socket (icmp(7), ping_group_range)."""
    _needs_probe("no ping socket", _PING)


def needs_congestion_control(name: str) -> None:
    """Require a congestion control that the running test chooses (tcp_allowed_congestion_control, tcp(7))."""
    _needs_probe(f"no TCP congestion control {name}", _CONGESTION.format(name.encode()))


def descriptors() -> dict[int, str]:
    """The open descriptors of this process and what each refers to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor that listed the directory
            continue
    return found


def _stat(pid: int) -> tuple[str, str]:
    """The name of a process and its state (proc_pid_stat(5)); the state of one that is gone is X."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "", "X"
    return text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2]


PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Become the parent of whatever this process's descendants orphan (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def child_pids() -> set[int]:
    """The child processes of this process, also those that have ended and for which nobody has waited."""
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # the thread has just ended
            pids.update(map(int, (task / "children").read_text().split()))
    return pids


def children() -> dict[int, str]:
    """The names of the child processes of this process, by pid.

    Not those that have ended: an orphan that came to us may do so at any time, and Python warns of a child
    that nobody waits for.
    """
    named = {pid: _stat(pid) for pid in child_pids()}
    return {pid: name for pid, (name, state) in named.items() if state not in "ZX"}


def reap(before: Collection[int]) -> None:
    """Wait for the children that have ended, but for those of `before`, which somebody else may wait for.

    Nobody else waits for an orphan that came to us.  What is not waited for makes every later look at the children
    of this process dearer.
    """
    for pid in child_pids().difference(before):
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def seen_inside(pid: int) -> int:
    """The pid that a process has in the PID namespace it is in."""
    return int(
        re.findall(r"^NSpid:\t(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0].split()[-1]
    )


def seen_outside(pid: int, holder: int) -> int:
    """The pid here of what has `pid` in the PID namespace of the process `holder`."""
    where = os.stat(f"/proc/{holder}/ns/pid")
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            numbers = re.search(r"^NSpid:\t(.*)$", status.read_text(), re.MULTILINE)
            there = os.stat(status.with_name("ns") / "pid")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if os.path.samestat(where, there) and numbers and int(numbers[1].split()[-1]) == pid:
            return int(status.parent.name)
    raise ProcessLookupError(pid)


def threads() -> set[threading.Thread]:
    """The threads of this process, but for the idle workers that an event loop keeps for a while."""
    return {
        thread
        for thread in threading.enumerate()
        if not thread.name.startswith(("AnyIO worker", "Trio thread"))
    }


def wait_exit(pids: set[int], deadline: float) -> set[int]:
    """Wait until these child processes have ended; return those which have not when the time is over."""
    running = set()
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                running.add(pid)
        finally:
            os.close(pidfd)
    return running


def wait_new_children(before: Collection[int], deadline: float) -> set[int]:
    """Wait until this process has no children but these; return the others when the time is over.

    A child that ends hands its own children to this process, which are waited for too.
    """
    while new := children().keys() - set(before):
        if running := wait_exit(new, deadline):
            return running
    return set()


@dataclass
class Possessions:
    """What this process has: descriptors, child processes, threads."""

    descriptors: dict[int, str] = field(default_factory=descriptors)
    children: dict[int, str] = field(default_factory=children)
    threads: set[threading.Thread] = field(default_factory=threads)

    def difference(self) -> list[str]:
        """What this process has come to hold or has lost since, one line each.

        What is already ending gets `GRACE` seconds.
        """
        deadline = time.monotonic() + GRACE
        running = wait_new_children(self.children, deadline)
        for thread in threads() - self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        now = Possessions()
        left = now.descriptors.items() - self.descriptors.items()
        lost = self.descriptors.items() - now.descriptors.items()
        return [
            *(f"descriptor left: {fd} -> {name}" for fd, name in sorted(left)),
            *(f"descriptor lost: {fd} -> {name}" for fd, name in sorted(lost)),
            # not what `now` has more: while others end, proc_pid_children(5) leaves some out, which show later
            *(f"process left: {pid} {now.children[pid]}" for pid in running if pid in now.children),
            *(f"thread left: {thread.name}" for thread in now.threads - self.threads),
        ]
