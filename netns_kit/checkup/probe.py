"""The doctor's probe: everything that this library needs of a host, tried by doing it.

It is a program that a `Child` executes, with one end of a `Channel`.  The first message is a JSON object, the order.
Each *trial* is a fork of this process, which has one thread: what it changes goes with it, a filter that kills ends
nothing else, and an alarm bounds it.  A namespace is entered as the agent enters one and a sandbox as a worker
does, by their own functions.  The last message has the outcomes by the names of the trials: a detail, of what worked,
or what failed in the words of the agent, with the signal for a trial that was killed.  What could not be tried
because something else failed has no outcome.

Before it, the message `{"map": PID}` may come: the reader then maps subordinate ids to that process, and answers.

Law of this file: that of the agent.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import traceback
from collections.abc import Callable, Mapping
from ctypes import c_size_t
from typing import Any

from netns_kit.child.channel import Channel
from netns_kit.host import abi
from netns_kit.host.libc import check, libc
from netns_kit.host.netlink import new_link, transact
from netns_kit.namespace.agent import op_sysctl_get, op_sysctl_set
from netns_kit.namespace.agent_common import failure
from netns_kit.namespace.agent_files import show_files
from netns_kit.namespace.agent_namespaces import create, mount_proc
from netns_kit.namespace.links import configure_ipv6, configure_link, open_tap
from netns_kit.network.guard import batch, ruleset
from netns_kit.userstack.worker.sandbox import ON, enter

Outcome = Mapping[str, Any]

SECONDS = 5  # for each trial
TUN = "/dev/net/tun"
QUERY = bytes.fromhex("0001 0100 0001 0000 0000 0000 00 0002 0001")  # RFC 1035: the root's name servers


def report(function: Callable[..., object], *arguments: object) -> Outcome:
    """Return what comes of it in this process: the result of `function` is the detail."""
    try:
        return {"detail": function(*arguments)}
    except Exception as exc:
        return failure(exc, "")


def trial(function: Callable[[], object]) -> Any:
    """Return the result of `function`, of values that JSON has, from a fork; None if that ends without one.

    A fork that is killed makes an outcome.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(SECONDS)
            os.close(reading)
            os.write(writing, json.dumps(function()).encode())
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        why = {signal.SIGSYS: errno.EPERM, signal.SIGALRM: errno.ETIMEDOUT}.get(
            signal.Signals(number), errno.EIO
        )
        return {"errno": why, "op": "", "message": signal.strsignal(number), "signal": number}
    return json.loads(text) if text else None


def attempt(function: Callable[..., object], *arguments: object) -> Outcome:
    """A trial of one thing."""
    outcome: Outcome = trial(lambda: report(function, *arguments))
    return outcome


# On the host


def pidfds() -> str:
    fd = os.pidfd_open(os.getpid())
    signal.pidfd_send_signal(fd, 0)
    return "opened, and signalled through"


def memfds() -> str:
    fd = os.memfd_create("probe")
    os.write(fd, b"x")
    return "made, and written to"


def ping(family: int, protocol: int, loopback: str) -> str:
    try:
        kind, sock = "ping", socket.socket(family, socket.SOCK_DGRAM, protocol)
    except PermissionError as exc:
        try:
            kind, sock = "raw", socket.socket(family, socket.SOCK_RAW, protocol)
        except PermissionError:
            raise exc from None
    with sock:
        sock.connect((loopback, 0))
    return f"a {kind} socket"


def low_port(port: int) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:  # which comes after permission
                raise
    return f"port {port} may be listened on"


def ipv6() -> str:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind(("::1", 0))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("2001:db8::1", 9))
        except OSError as exc:
            return f"a socket of ::1; to the world: {exc.strerror}"
    return "a socket of ::1, and a route to the world"


def segments(*, together: bool) -> str:
    """Two datagrams leave by one call; and come in by one, if that is asked for."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("127.0.0.1", 0))
        if together:
            receiver.setsockopt(socket.SOL_UDP, abi.UDP_GRO, 1)
        size = struct.pack("H", 100)
        sender.sendmsg([bytes(200)], [(socket.SOL_UDP, abi.UDP_SEGMENT, size)], 0, receiver.getsockname())
        return f"two datagrams of 100 bytes, {len(receiver.recv(1000))} of which are read at a time"


def bind_device() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    return "bound to lo"


def resolver(address: str, port: int) -> str:
    """Nothing is sent to another machine: a route to it is enough."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            numeric = socket.AI_NUMERICHOST
            try:
                found = socket.getaddrinfo(address, port, family, socket.SOCK_DGRAM, flags=numeric)
            except socket.gaierror as exc:  # its zone is no interface
                raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH)) from exc
            sock.connect(found[0][4])
            if sock.getsockname()[0] != sock.getpeername()[0] and not address.startswith("127."):
                return f"a route to {address}"
            sock.settimeout(1)
            sock.send(QUERY)
            sock.recv(2000)
        except TimeoutError:
            return f"something at {address}"
        except OSError as exc:
            exc.filename = address
            raise
    return f"an answer of {address}"


def resolvers(endpoints: list[tuple[str, int]]) -> Outcome:
    """The first that is there, or what is wrong with the last."""
    outcome: Outcome = {}
    for address, port in endpoints:
        outcome = attempt(resolver, address, port)
        if "detail" in outcome:
            break
    return outcome


def sandbox(readable: list[str]) -> dict[str, Outcome]:
    """What a worker gives up, layer by layer."""
    outcomes: dict[str, Outcome] = {}
    version = abi.LANDLOCK_CREATE_RULESET_VERSION
    landlock = libc.syscall(abi.SYS_LANDLOCK_CREATE_RULESET, None, c_size_t(0), version)
    for layer, state in enter(readable).items():
        name = layer if layer in {"landlock", "seccomp"} else "sandbox"
        if state != ON:
            outcomes[name] = {"errno": 0, "op": layer, "message": state, "filename": None}
        else:
            outcomes.setdefault(name, {"detail": f"ABI {landlock}" if name == "landlock" else "on"})
    return outcomes


# In a namespace


def offloads(fd: int, flags: int, words: list[int]) -> int:
    """Return the first of the words that the kernel takes."""
    for word in words if flags & abi.IFF_VNET_HDR else []:
        try:
            fcntl.ioctl(fd, abi.TUNSETOFFLOAD, word)
        except OSError:
            continue
        return word
    return 0


def ipv6_inside(name: str) -> Outcome:
    """Try an address and a route of that link; the switches that may be why there is none are in the outcome."""
    outcome = dict(report(configure_ipv6, name, "fd00::100", 64, "fd00::2"))
    if "detail" in outcome and outcome["detail"] is None:
        return {"detail": "an address and a route"}
    settings = {}
    for each in ("all", "default", name):
        with contextlib.suppress(OSError), open(f"/proc/sys/net/ipv6/conf/{each}/disable_ipv6") as file:
            settings[f"net.ipv6.conf.{each}.disable_ipv6"] = file.read().strip()
    outcome.pop("detail", None)  # in words of its own, why not
    return {"errno": errno.EACCES, **outcome, "settings": settings}


def tap(order: dict[str, Any]) -> dict[str, Outcome]:
    """A tap as TapDevice opens it, and what its kernel offers."""
    words = order["tap_flags"]
    try:
        made, fds = open_tap("probe0", words, 1)
        address, netmask, gateway = "10.0.2.100", "255.255.255.0", "10.0.2.2"
        configure_link("probe0", mtu=1500, queue=1000, address=address, netmask=netmask, gateway=gateway)
    except OSError as exc:
        return {"tun": failure(exc, "tun")}
    several = [word | abi.IFF_MULTI_QUEUE for word in words]
    with_ipv6 = {"ipv6-inside": ipv6_inside("probe0")} if order["ipv6"] else {}
    return {
        **with_ipv6,
        "tun": {"detail": "made, with an address and a route"},
        "offloads": report(offloads, fds[0], made["flags"], order["offloads"]),
        "queues": report(lambda: bool(open_tap("probe1", several, 2)) and "two of one tap"),
    }


def files() -> str:
    """As commands get their resolv.conf."""
    text, path = "nameserver 10.0.2.3\n", "/etc/resolv.conf"
    show_files({path: text}, {})
    with open(path, encoding="utf-8") as file:
        if file.read() != text:
            raise OSError(errno.EIO, "another file is seen", path)
    return f"{path} replaced for one command"


def pids() -> Outcome:
    """A PID namespace, whose process 1 has a /proc for it."""
    try:
        check(libc.unshare(abi.CLONE_NEWPID))
    except OSError as exc:
        return failure(exc, "unshare pids")

    def first() -> Outcome:
        try:
            mount_proc()
        except OSError as exc:
            return failure(exc, exc.filename or "unshare mounts")
        return {"detail": f"made, with a /proc: {os.readlink('/proc/self')} is the first process"}

    found: Outcome = trial(first)
    return found


def set_sysctl() -> str:
    path = "net/ipv4/ip_default_ttl"
    op_sysctl_set(path, "63")
    value = op_sysctl_get(path)[0]["value"]
    return f"{path} set to {value}"


def members() -> str:
    """As the members of a network are joined."""
    with contextlib.closing(netlink_socket(abi.NETLINK_ROUTE)) as sock:
        transact(sock, [new_link("bridge", "probe2"), new_link("veth", "probe3")])
    return "made"


def rules() -> str:
    """As what a member sends is checked."""
    with contextlib.closing(netlink_socket(abi.NETLINK_NETFILTER)) as sock:
        transact(sock, batch(ruleset()))
    return "taken"


def netlink_socket(family: int) -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, family)


def transparent() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_IP, abi.IP_TRANSPARENT, 1)
        sock.bind(("192.0.2.1", 0))
    return "bound to 192.0.2.1, which is nobody's"


def inside(order: dict[str, Any]) -> dict[str, Outcome]:
    """Try what there is in a namespace of one's own."""
    outcomes: dict[str, Outcome] = {
        "user-namespace": {"detail": "made, and ids mapped"},
        "network-namespace": {"detail": "made"},
    }
    tried = trial(lambda: tap(order))
    outcomes.update({"tun": tried} if "signal" in tried else tried)
    outcomes["files"] = attempt(files)
    if "detail" in outcomes["files"]:
        outcomes["pids"] = trial(pids)
    outcomes["sysctls"] = attempt(set_sysctl)
    outcomes["transparent"] = attempt(transparent)
    outcomes["members"] = attempt(members)
    outcomes["guard"] = attempt(rules)
    return outcomes


def namespace(order: dict[str, Any]) -> dict[str, Outcome]:
    """Try all that needs a namespace.  `create` itself tells why it fails, in place of a result."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)

    def enter() -> dict[str, Outcome]:
        create("root", theirs)
        signal.alarm(SECONDS * 4)
        return inside(order)

    outcomes = trial(enter)
    if outcomes is None:
        failed = json.loads(ours.recv(1 << 16))
        in_network = failed["op"] in {"unshare net", "loopback"}
        outcomes = {"network-namespace" if in_network else "user-namespace": failed}
        if in_network:
            outcomes["user-namespace"] = {"detail": "made, and ids mapped"}
    elif "signal" in outcomes:
        filtered = outcomes["signal"] == signal.SIGSYS
        outcomes = {"user-namespace": {**outcomes, "op": "unshare user", "filtered": filtered}}
    found: dict[str, Outcome] = outcomes
    return found


def id_ranges(channel: Channel) -> Outcome | None:
    """Try a namespace with the ids that the reader maps; if that fails, the outcome is the reader's to make."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(SECONDS)
            ours.close()
            create("subids", theirs)
        finally:
            os._exit(0)
    theirs.close()
    outcome: Outcome | None = None
    with ours:
        message = ours.recv(1 << 16)
        if message and json.loads(message)["state"] == "map":
            channel.send(json.dumps({"map": pid}).encode())
            if channel.wait() == b"mapped":
                with open(f"/proc/{pid}/uid_map", encoding="ascii") as file:
                    outcome = {"detail": f"{sum(int(line.split()[2]) for line in file)} uids mapped"}
                ours.send(b"mapped")
                message = ours.recv(1 << 16)
            else:
                message = b""
        if message:
            outcome = json.loads(message)
    os.waitpid(pid, 0)
    return outcome


def main(control: int) -> int:
    """Try everything, and return the exit status."""
    channel = Channel(socket.socket(fileno=control))
    for number in (signal.SIGCHLD, signal.SIGALRM):  # whatever our caller does with them
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    order = json.loads(channel.wait() or b"{}")
    outcomes: dict[str, Outcome] = {
        "pidfds": attempt(pidfds),
        "memfds": attempt(memfds),
        "ping": attempt(ping, socket.AF_INET, socket.IPPROTO_ICMP, "127.0.0.1"),
        "low-ports": attempt(low_port, order["low_port"]),
        "ipv6": attempt(ipv6),
        "udp-segment": attempt(lambda: segments(together=False)),
        "bind-device": attempt(bind_device),
        "descriptors": report(resource.getrlimit, resource.RLIMIT_NOFILE),
        "resolver": resolvers(order["resolvers"]),
    }
    if "detail" in outcomes["ipv6"]:
        outcomes["ping6"] = attempt(ping, socket.AF_INET6, socket.IPPROTO_ICMPV6, "::1")
    if "detail" in outcomes["udp-segment"]:
        outcomes["udp-gro"] = attempt(lambda: segments(together=True))
    order["ipv6"] = outcomes["ipv6"].get("errno") != errno.EAFNOSUPPORT
    layers = trial(lambda: sandbox(order["readable"]))
    outcomes.update({"seccomp": layers} if "signal" in layers else layers)
    outcomes.update(namespace(order))
    if "detail" in outcomes.get("network-namespace", {}):
        ranges = id_ranges(channel)
        outcomes.update({} if ranges is None else {"id-ranges": ranges})
    else:
        node = report(os.open, TUN, os.O_RDWR)  # what is wrong with it is wrong anyhow
        outcomes.update({} if "detail" in node else {"tun": node})
    channel.send(json.dumps({"outcomes": outcomes}).encode())
    channel.finish()
    return 0
