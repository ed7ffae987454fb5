"""The command that slirp4netns is, for the programs that start it: `netns-kit slirp4netns`, `netns-kit-slirp4netns`.

Options, descriptors, messages, exit statuses and API are slirp4netns's, so that podman, rootlesskit and Buildah are
told its path and nothing else.  All that it does is the library's: it opens a tap (`TapFetch`), joins `Engine`,
`Gateway`, `Uplink` and `Control`, serves the API (`ApiSocket`), enters the sandbox, and drives the engine.

It is one process, with one thread, and that for its callers' sake: they kill the very pid they have started, or have
the kernel do it (PR_SET_PDEATHSIG).  Signals have their default action.  Callers wait for it with every container, so
it imports little, and most of that while a child of it opens the tap.  What is written on standard output stays in
its buffer until the end, unless that is a terminal: callers have their own output there.

Where the original stops, crashes or spins this does not: an API client that says nothing, a request without its
"proto", a tap that is removed.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from getopt import GetoptError, gnu_getopt
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from typing import TYPE_CHECKING, Any, NoReturn

from netns_kit import __version__

from .errors import NetnsKitError
from .subnet import DEFAULT_CIDR, SMALLEST_IPV6_MTU, Subnet

if TYPE_CHECKING:
    from .engine import Engine

VERSION = "1.3.2"  # of slirp4netns: what callers who look at it may expect
CONFIG_VERSION = (
    4  # of libslirp's configuration, by which some tell whether --outbound-addr and --disable-dns work
)
MTU_MAX = 65521
API_PATH_MAX = 107
LOG_MAX = 4000  # bytes of a line: a pipe that takes any takes so many
SHORT = "ce:r:m:6a:hv"
LONG = [
    *("configure", "exit-fd=", "ready-fd=", "mtu=", "enable-ipv6", "api-socket=", "cidr="),
    *("disable-host-loopback", "no-host-loopback", "netns-type=", "userns-path=", "enable-sandbox"),
    *("create-sandbox", "enable-seccomp", "outbound-addr=", "outbound-addr6=", "disable-dns", "macaddress="),
    *("target-type=", "help", "version"),
]
SAME = {
    "-c": "--configure", "-e": "--exit-fd", "-r": "--ready-fd", "-m": "--mtu", "-6": "--enable-ipv6",
    "-a": "--api-socket", "-h": "--help", "-v": "--version",
    "--no-host-loopback": "--disable-host-loopback", "--create-sandbox": "--enable-sandbox",
}  # fmt: skip
USAGE = """\
Usage: {0} [OPTION]... PID|PATH|FD [TAPNAME]
Connectivity for a network namespace, by netns_kit's own TCP/IP stack.

-c, --configure          set address, route, MTU and loopback up
-e, --exit-fd=FD         end when the other end of this pipe is closed
-r, --ready-fd=FD        write "1" to this pipe as soon as all is ready
-m, --mtu=MTU            of the interface (default=1500, max=65521)
-6, --enable-ipv6        IPv6 too, where the MTU is 1280 or more: fd00::/64
-a, --api-socket=PATH    listen here for requests to forward ports
--cidr=CIDR              network of the namespace (default=10.0.2.0/24)
--disable-host-loopback  keep the gateway's address from meaning the host's 127.0.0.1
--netns-type=TYPE        what the first argument is: path, pid or tapfd (default=pid)
--userns-path=PATH       user namespace to join before the network namespace
--enable-sandbox         open no file but what names resolvers; keep no privilege but CAP_NET_BIND_SERVICE and
                         CAP_NET_RAW
--enable-seccomp         have few system calls
--outbound-addr=IPv4     send from this address, or from that of an interface of this name
--outbound-addr6=IPv6    the same for IPv6
--disable-dns            ask none of the host's resolvers
--macaddress=MAC         of the interface (only with -c)
--target-type=TYPE       netns, or bess: PATH is a SOCK_SEQPACKET socket to listen at (default=netns)
-h, --help               show this and exit
-v, --version            show the version and exit
"""


class Wrong(Exception):
    """The command line is; with the usage or without."""

    def __init__(self, text: str, *, usage: bool = True) -> None:
        super().__init__(text)
        self.usage = usage


class Failed(Exception):
    """What cannot be had, as perror(3) says it, and then whose failure that was."""


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    target: str
    tap: str
    kind: str  # "pid", "path", "tapfd" or "bess"
    subnet: Subnet
    mtu: int
    configure: bool
    exit_fd: int | None
    ready_fd: int | None
    api: str | None
    userns: str | None
    mac: str | None
    outbound: dict[int, str]  # by the version of IP
    loopback: bool
    dns: bool
    sandbox: bool
    seccomp: bool


def executable() -> NoReturn:
    """`netns-kit-slirp4netns`."""
    main(sys.argv[1:], sys.argv[0])


def main(words: Sequence[str], program: str) -> NoReturn:
    """Be slirp4netns, with these arguments."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(line_buffering=False, write_through=False)  # whatever PYTHONUNBUFFERED says
    status = run(words, program)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status)  # what Python does at its end takes longer than all else at ours


def run(words: Sequence[str], program: str) -> int:
    """The exit status."""
    try:
        order = parse(words, program)
    except Wrong as error:
        _say(str(error))
        if error.usage:
            print(USAGE.format(program), end="")
        return 1
    if order is None:
        return 0
    try:
        return serve(order)
    except Failed as error:
        _say(str(error))
    except OSError as error:
        _say(f"{error.filename}: {error.strerror}\nchild failed(1)")
    except NetnsKitError as error:
        _say(f"{error}\ndo_slirp failed\nparent failed")
    return 1


# -- the command line -----------------------------------------------------------------------------------


def parse(words: Sequence[str], program: str) -> Order | None:
    """None: it asked for nothing but to be told.  Raises `Wrong`."""
    try:
        found, arguments = gnu_getopt(list(words), SHORT, LONG)
    except GetoptError as error:
        raise Wrong(f"{program}: {_as_getopt_long(error, words)}") from None
    options = {SAME.get(name, name): value for name, value in found}
    if "--help" in options:
        print(USAGE.format(program), end="")
        return None
    if "--version" in options:
        print(_version())
        return None
    mtu = _integer(options.get("--mtu", "1500"), 1, MTU_MAX, "MTU must be a positive integer (< 65522)")
    fds = {
        name: _integer(options[f"--{name}"], 0, 1 << 30, f"{name} must be a non-negative integer")
        for name in ("exit-fd", "ready-fd")
        if f"--{name}" in options
    }
    if "--macaddress" in options and "--configure" not in options:
        raise Wrong("--macaddr cannot be specified when --configure or -c is not specified")
    kind = _kind(options)
    target, *rest = [*arguments, ""]
    if not target or (not rest[0] and kind in ("pid", "path")):
        raise Wrong("")
    for _ in arguments[2:]:
        print("WARNING: too many arguments")
    if kind == "pid":
        _integer(target, 1, 1 << 30, "PID must be a positive integer")
    elif kind == "tapfd":
        _integer(target, 0, 1 << 30, "TAPFD must a file descriptor")
    elif kind == "path" and not os.path.exists(target):
        raise Wrong(f"existing path expected when --netns-type=path: {os.strerror(errno.ENOENT)}")
    ipv6 = "--enable-ipv6" in options and mtu >= SMALLEST_IPV6_MTU
    subnet = _subnet(options.get("--cidr", DEFAULT_CIDR), ipv6)
    for name, what in {
        "--enable-seccomp": "seccomp",
        "--enable-ipv6": "IPv6",
        "--outbound-addr": "--outbound-addr",
        "--outbound-addr6": "--outbound-addr6",
    }.items():
        if name in options:
            print(f"WARNING: Support for {what} is experimental")
    return Order(
        target=target,
        tap=rest[0],
        kind=kind,
        subnet=subnet,
        mtu=mtu,
        configure="--configure" in options,
        exit_fd=fds.get("exit-fd"),
        ready_fd=fds.get("ready-fd"),
        api=options.get("--api-socket"),
        userns=options.get("--userns-path"),
        mac=_mac(options.get("--macaddress")),
        outbound=_outbound(options),
        loopback="--disable-host-loopback" not in options,
        dns="--disable-dns" not in options,
        sandbox="--enable-sandbox" in options,
        seccomp="--enable-seccomp" in options,
    )


def _as_getopt_long(error: GetoptError, words: Sequence[str]) -> str:
    """What the C library says of the same."""
    name, short = error.opt, f"option -{error.opt} " in f"{error.msg} "
    if short:
        return (
            f"option requires an argument -- '{name}'"
            if "requires" in error.msg
            else f"invalid option -- '{name}'"
        )
    if "requires" in error.msg:
        return f"option '--{name}' requires an argument"
    if "must not have" in error.msg:
        return f"option '--{name}' doesn't allow an argument"
    if "unique" in error.msg:
        others = (f"'--{each.rstrip('=')}'" for each in LONG if each.startswith(name))
        return f"option '--{name}' is ambiguous; possibilities: {' '.join(others)}"
    given = next((word for word in words if word.partition("=")[0] == f"--{name}"), f"--{name}")
    return f"unrecognized option '{given}'"


def _integer(text: str, least: int, most: int, message: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise Wrong(message) from None
    if not least <= number <= most:
        raise Wrong(message)
    return number


def _kind(options: dict[str, str]) -> str:
    target, kind = options.get("--target-type", "netns"), options.get("--netns-type", "pid")
    if target not in ("netns", "bess"):
        raise Wrong('--target-type must be either "netns" or "bess"')
    return "bess" if target == "bess" else kind if kind in ("pid", "tapfd") else "path"


def _subnet(cidr: str, ipv6: bool) -> Subnet:
    address, slash, prefix = cidr.partition("/")
    if not slash or not prefix.isdigit() or len(prefix) > 2:
        raise Wrong(f"invalid CIDR: {cidr}", usage=False)
    try:
        network = IPv4Network((IPv4Address(address), int(prefix)), strict=False)
    except AddressValueError:
        raise Wrong(f"invalid network address: {address}", usage=False) from None
    except ValueError:
        raise Wrong("prefix length needs to be 1-25", usage=False) from None
    if not 1 <= network.prefixlen <= 25:
        raise Wrong("prefix length needs to be 1-25", usage=False)
    if str(network.network_address) != address:
        raise Wrong(
            f"CIDR needs to be a network address like {network}, not like {address}/{prefix}", usage=False
        )
    try:
        return Subnet.parse(str(network), ipv6)
    except NetnsKitError as error:
        raise Wrong(str(error), usage=False) from None


def _mac(text: str | None) -> str | None:
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) != 6 or not all(len(part) == 2 and _is_hex(part) for part in parts):
        raise Wrong(
            f'"{text}" is an invalid MAC address.\nmacaddress has to be a valid MAC address (hex string, 6 bytes, '
            "each byte separated by a ':').",
            usage=False,
        )
    return text


def _is_hex(text: str) -> bool:
    return all(character in "0123456789abcdefABCDEF" for character in text)


def _outbound(options: dict[str, str]) -> dict[int, str]:
    found = {}
    for version, name in ((4, "--outbound-addr"), (6, "--outbound-addr6")):
        if name in options:
            from .uplink import source_address

            try:
                found[version] = source_address(options[name], version)
            except NetnsKitError:
                raise Wrong(
                    f"{name[2:]} has to be valid ipv{version} address or interface name.", usage=False
                ) from None
    return found


def _version() -> str:
    ours = f"netns-kit {__version__}"
    return (
        f"slirp4netns version {VERSION}\ncommit: {ours}\nlibslirp: none, {ours}\n"
        f"SLIRP_CONFIG_VERSION_MAX: {CONFIG_VERSION}\nlibseccomp: none, {ours}"
    )


# -- the work -------------------------------------------------------------------------------------------


def serve(order: Order) -> int:
    """Until the exit pipe is closed; the exit status.  Raises `Failed`, OSError and what the parts raise."""
    fd = _tap(order)

    from . import pump
    from .control import Control
    from .engine import Engine
    from .gateway import Gateway, raise_descriptor_limit
    from .hostfwd import ApiSocket, HostForwards
    from .tap import TapDevice
    from .uplink import Uplink

    tap = TapDevice.from_fd(fd(), mtu=order.mtu, name=order.tap or None)
    print(_banner(order))
    raise_descriptor_limit()
    uplink = Uplink(
        allow_host_loopback=order.loopback,
        bind4=order.outbound.get(4),
        bind6=order.outbound.get(6),
        dns=None if order.dns else (),
    )
    engine = Engine()
    control = Control(Gateway(engine, tap, uplink, order.subnet), lambda _: None)
    api = None
    if order.api is not None:
        try:
            api = ApiSocket(engine, HostForwards(control), order.api, _trace)
        except OSError as error:
            what = "the specified API socket path is too long (>= 108)"
            if error.errno != errno.ENAMETOOLONG:
                what = f"api_bindlisten: bind: {error.strerror}"
            raise Failed(f"{what}\ndo_slirp is exiting\ndo_slirp failed\nparent failed") from error
    ended = _Ended(engine, order.exit_fd)
    _sandbox(order, uplink.reads())
    if order.ready_fd is not None:
        with suppress(OSError):  # who has closed it has no need to know
            os.write(order.ready_fd, b"1")
            os.close(order.ready_fd)
    try:
        pump.run(engine, lambda: ended.is_set)
    finally:
        if api is not None:
            api.close()
        control.close()
    _trace("do_slirp is exiting")
    return 0


class _Ended:
    """Whether the other end of the exit pipe is closed.  What is written to it means nothing."""

    def __init__(self, engine: Engine, fd: int | None) -> None:
        self.is_set = False
        if fd is not None:
            try:
                engine.add(fd, self._on_hang_up, 0)
            except PermissionError:  # a file, say, which is never closed by anybody
                pass
            except OSError as error:
                raise Failed(f"exit-fd: {error.strerror}\ndo_slirp failed\nparent failed") from error

    def _on_hang_up(self, _: int) -> None:
        self.is_set = True
        _trace("exitfd event")


def _tap(order: Order) -> Callable[[], int]:
    """What waits for the descriptor, which is being opened."""
    if order.kind == "tapfd":
        return lambda: int(order.target)
    if order.kind == "bess":
        return lambda: accept_frames(order.target)
    from .fetch import TapFetch

    path = order.target if order.kind == "path" else f"/proc/{order.target}/ns/net"
    fetch = TapFetch(
        path,
        order.tap,
        mtu=order.mtu,
        userns=order.userns,
        subnet=order.subnet if order.configure else None,
        mac=order.mac,
    )

    def result() -> int:
        fd, there = fetch.result()
        _say(f"sent tapfd={there} for {order.tap}\nreceived tapfd={fd}")
        return fd

    return result


def accept_frames(path: str) -> int:
    """Wait at a SOCK_SEQPACKET socket at `path` for one peer who speaks a frame per record, as BESS does and
    user-mode Linux; his descriptor.  A socket that was left there is replaced.  Raises OSError.
    """
    with suppress(OSError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        try:
            listener.bind(path)
            listener.listen(0)
            peer, _ = listener.accept()
        except OSError as error:
            error.filename = path
            raise
    return peer.detach()


def _banner(order: Order) -> str:
    subnet = order.subnet
    lines: list[tuple[str, Any]] = [
        ("MTU", order.mtu),
        ("Network", subnet.network.network_address),
        ("Netmask", subnet.network.netmask),
        ("Gateway", subnet.gateway),
        ("DNS", subnet.dns),
        ("DHCP begin", subnet.pool[0]),
        ("DHCP end", subnet.pool[-1]),
        ("Recommended IP", subnet.guest),
        ("API Socket", order.api),
        ("Outbound IPv4", _wider(order.outbound.get(4))),
        ("Outbound IPv6", _wider(order.outbound.get(6))),
        ("MAC address", order.mac),
    ]
    text = "\n".join(f"* {f'{name}:':<16} {value}" for name, value in lines if value is not None)
    if order.loopback:
        text += (
            f"\nWARNING: 127.0.0.1:* on the host is accessible as {subnet.gateway} (set --disable-host-loopback to "
            "prohibit connecting to 127.0.0.1:*)"
        )
    return f"Starting slirp\n{text}"


def _wider(address: str | None) -> str | None:
    """These two stand one column further to the right."""
    return None if address is None else f" {address}"


def _sandbox(order: Order, readable: Sequence[str]) -> None:
    """Enter what is asked for.  Raises `Failed` where this host does not give it."""
    wanted = [
        *(["core", "dumpable", "capabilities", "no_new_privs", "landlock"] if order.sandbox else ()),
        *(["no_new_privs", "landlock", "seccomp"] if order.seccomp else ()),
    ]
    if not wanted:
        return
    from .sandbox import FATAL, ON, enter

    if order.seccomp:
        print(
            "seccomp: The following syscalls are blocked: all but those of netns_kit's list; fatal:",
            *FATAL,
        )
    layers = enter(readable, set(wanted))
    if order.sandbox and (lacking := [name for name in wanted if name != "seccomp" and layers[name] != ON]):
        why = ", ".join(f"{name} is {layers[name]}" for name in lacking)
        raise Failed(f"create_sandbox failed: {why}\ndo_slirp failed\nparent failed")
    if order.seccomp and layers["seccomp"] != ON:
        raise Failed(f"enable_seccomp failed: {layers['seccomp']}\ndo_slirp failed\nparent failed")


def _say(text: str) -> None:
    """Told on standard error while the caller waits."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode() if text else b"")


def _trace(text: str) -> None:
    """The same when traffic would wait too: it is lost if standard error takes no more."""
    from .engine import takes

    with suppress(OSError):
        if takes(2):
            os.write(2, f"{text}\n".encode()[:LOG_MAX])
