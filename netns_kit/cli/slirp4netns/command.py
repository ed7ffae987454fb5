"""The command that slirp4netns is, for the programs that start it: `netns-kit slirp4netns`, `netns-kit-slirp4netns`.

Options, descriptors, messages, exit statuses and API are slirp4netns's, so that podman, rootlesskit and Buildah are
told its path and nothing else.  All that it does is the library's: it opens a tap (`TapFetch`), joins `Engine`,
`Gateway`, `Uplink` and `Control`, serves the API (`ApiSocket`), enters the sandbox, and drives the engine.

It is one process, with one thread, and that for its callers' sake: they kill the very pid they have started, or have
the kernel do it (PR_SET_PDEATHSIG).  Signals have their default action.  What is written on standard output stays in
its buffer until the end, unless that is a terminal: callers have their own output there.

Callers wait for it with every container, and some do not even wait.  So this module imports next to nothing: first
a child is forked, which opens the tap as soon as the command line has been read (see `TapFetch`), and meanwhile all
else is imported.  tests/laws/test_law.py says what may be loaded at which moment.

Where the original stops, crashes, spins or stays behind this does not: an API client that says nothing, a request
without its "proto", a tap that is removed, a namespace whose last process has ended.
"""

from __future__ import annotations

import errno
import os
import sys

from netns_kit import __version__
from netns_kit.cli.program import begin, takes
from netns_kit.frozen import frozen

from .tap_fetch import TapFetch

TYPE_CHECKING = False  # as type checkers know it, without importing `typing`

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

    from netns_kit.gateway.engine import Engine
    from netns_kit.namespace.watch import Watch
    from netns_kit.subnet import Subnet
    from netns_kit.userstack.control import Control

    from .api_socket import ApiSocket

VERSION = "1.3.2"  # of slirp4netns: what callers who look at it may expect
CONFIG_VERSION = (
    4  # of libslirp's configuration, by which some tell whether --outbound-addr and --disable-dns work
)
MTU_MAX = 65521
LOG_MAX = 4000  # bytes of a line: a pipe that takes any takes so many
DEFAULT_CIDR = "10.0.2.0/24"
SMALLEST_IPV6_MTU = 1280  # RFC 8200 5
OPTIONS = (  # letter, name and second name, the value's, and what is said of it
    ("c", "configure", "", "set address, route, MTU and loopback up"),
    ("e", "exit-fd", "FD", "end when the other end of this pipe is closed"),
    ("r", "ready-fd", "FD", 'write "1" to this pipe as soon as all is ready'),
    ("m", "mtu", "MTU", "of the interface (default=1500, max=65521)"),
    ("6", "enable-ipv6", "", "IPv6 too, where the MTU is 1280 or more: fd00::/64"),
    ("a", "api-socket", "PATH", "listen here for requests to forward ports"),
    ("", "cidr", "CIDR", "network of the namespace (default=10.0.2.0/24)"),
    ("", "disable-host-loopback no-host-loopback", "",
     "keep the gateway's address from meaning the host's 127.0.0.1"),
    ("", "netns-type", "TYPE", "what the first argument is: path, pid or tapfd (default=pid)"),
    ("", "userns-path", "PATH", "user namespace to join before the network namespace"),
    ("", "enable-sandbox create-sandbox", "",
     ("have a root directory of its own, with /etc and /run, and open no file but what names\n"
      "resolvers; keep no privilege but CAP_NET_BIND_SERVICE")),
    ("", "enable-seccomp", "", "have few system calls"),
    ("", "outbound-addr", "IPv4", "send from this address, or from that of an interface of this name"),
    ("", "outbound-addr6", "IPv6", "the same for IPv6"),
    ("", "disable-dns", "", "answer nothing at the DNS address"),
    ("", "macaddress", "MAC", "of the interface (only with -c)"),
    ("", "target-type", "TYPE", "netns, or bess: PATH is a SOCK_SEQPACKET socket to listen at (default=netns)"),
    ("h", "help", "", "show this and exit"),
    ("v", "version", "", "show the version and exit"),
)  # fmt: skip
SHORT = {letter: (names.split()[0], bool(value)) for letter, names, value, _ in OPTIONS if letter}
LONG = {name: (names.split()[0], bool(value)) for _, names, value, _ in OPTIONS for name in names.split()}
"""The options as they are written: the name by which they are known, and whether they have a value."""


class Wrong(Exception):
    """The command line is; with the usage or without."""

    def __init__(self, text: str, *, usage: bool = True) -> None:
        super().__init__(text)
        self.usage = usage


class Failed(Exception):
    """What cannot be had, as perror(3) says it, and then whose failure that was."""


@frozen
class Order:
    """What the command line asks for."""

    target: str
    tap: str
    kind: str  # "pid", "path", "tapfd" or "bess"
    cidr: str
    ipv6: bool
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

    @property
    def subnet(self) -> Subnet:
        """The namespace's addresses."""
        from netns_kit.subnet import Subnet

        return Subnet.parse(self.cidr, self.ipv6)

    @property
    def has_namespace(self) -> bool:
        """Whether the tap is to be fetched from one: `path`."""
        return self.kind in ("pid", "path")

    @property
    def path(self) -> str:
        """The network namespace."""
        return self.target if self.kind == "path" else f"/proc/{self.target}/ns/net"


def executable() -> NoReturn:
    """`netns-kit-slirp4netns`."""
    main(sys.argv[1:], sys.argv[0])


def main(words: Sequence[str], program: str) -> NoReturn:
    """Be slirp4netns, with these arguments."""
    begin()
    if hasattr(sys.stdout, "reconfigure") and not sys.stdout.isatty():
        sys.stdout.reconfigure(line_buffering=False, write_through=False)  # whatever PYTHONUNBUFFERED says
    status = run(words, program)
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it
        pass
    os._exit(status)  # what Python does at its end takes longer than all else at ours


def run(words: Sequence[str], program: str) -> int:
    """The exit status."""
    fetch = TapFetch()
    try:
        order = parse(words, program)
        if order is None:
            fetch.cancel()
            return 0
    except Wrong as error:
        fetch.cancel()
        _say(str(error))
        if error.usage:
            print(_usage(program))
        return 1
    if order.has_namespace:
        fetch.open(order.path, order.tap, order.userns)
    else:
        fetch.cancel()
    from netns_kit.errors import NetnsKitError

    try:
        return serve(order, fetch)
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
    options, arguments = _read(words, program)
    if "--help" in options:
        print(_usage(program))
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
    cidr = options.get("--cidr", DEFAULT_CIDR)
    if cidr != DEFAULT_CIDR:
        _check_cidr(cidr)
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
        cidr=cidr,
        ipv6="--enable-ipv6" in options and mtu >= SMALLEST_IPV6_MTU,
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


def _read(words: Sequence[str], program: str) -> tuple[dict[str, str], list[str]]:
    """Options by their long names, and arguments, as getopt_long(3) tells them apart, and with its messages."""
    options: dict[str, str] = {}
    arguments: list[str] = []
    rest = list(words)

    def take(name: str, has_value: bool, value: str, wrong: str) -> None:
        if has_value and not value:
            if not rest:
                raise Wrong(f"{program}: {wrong}")
            value = rest.pop(0)
        options[f"--{name}"] = value

    while rest:
        word = rest.pop(0)
        if word == "--":
            arguments += rest
            break
        if word.startswith("--"):
            given, equals, value = word[2:].partition("=")
            written = _whole(given, word, program)
            name, has_value = LONG[written]
            if equals and not has_value:
                raise Wrong(f"{program}: option '--{written}' doesn't allow an argument")
            if equals and not value:
                options[f"--{name}"] = ""
            else:
                take(name, has_value, value, f"option '--{written}' requires an argument")
        elif word.startswith("-") and word != "-":
            letters = word[1:]
            while letters:
                letter, letters = letters[0], letters[1:]
                if letter not in SHORT:
                    raise Wrong(f"{program}: invalid option -- '{letter}'")
                name, has_value = SHORT[letter]
                value, letters = (letters, "") if has_value else ("", letters)
                take(name, has_value, value, f"option requires an argument -- '{letter}'")
        else:
            arguments.append(word)
            if "POSIXLY_CORRECT" in os.environ:
                arguments += rest
                break
    return options, arguments


def _whole(given: str, word: str, program: str) -> str:
    """The name of an option of which that is the beginning."""
    if given in LONG:
        return given
    names = [name for name in LONG if name.startswith(given)]
    if not names:
        raise Wrong(f"{program}: unrecognized option '{word}'")
    if len(names) > 1:
        possible = " ".join(f"'--{name}'" for name in names)
        raise Wrong(f"{program}: option '--{given}' is ambiguous; possibilities: {possible}")
    return names[0]


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


def _check_cidr(cidr: str) -> None:
    from ipaddress import AddressValueError, IPv4Address, IPv4Network

    from netns_kit.errors import NetnsKitError
    from netns_kit.subnet import Subnet

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
        Subnet.parse(cidr)
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
            from netns_kit.errors import NetnsKitError
            from netns_kit.uplink.uplink import source_address

            try:
                found[version] = source_address(options[name], version)
            except NetnsKitError:
                raise Wrong(
                    f"{name[2:]} has to be valid ipv{version} address or interface name.", usage=False
                ) from None
    return found


def _usage(program: str) -> str:
    lines = [
        f"Usage: {program} [OPTION]... PID|PATH|FD [TAPNAME]",
        "Connectivity for a network namespace, by netns_kit's own TCP/IP stack.\n",
    ]
    for letter, names, value, said in OPTIONS:
        option = f"-{letter}, " if letter else ""
        option += f"--{names.split()[0]}" + (f"={value}" if value else "")
        lines.append(f"{option:<25}" + said.replace("\n", f"\n{'':25}"))
    return "\n".join(lines)


def _version() -> str:
    ours = f"netns-kit {__version__}"
    return (
        f"slirp4netns version {VERSION}\ncommit: {ours}\nlibslirp: none, {ours}\n"
        f"SLIRP_CONFIG_VERSION_MAX: {CONFIG_VERSION}\nlibseccomp: none, {ours}"
    )


# -- the work -------------------------------------------------------------------------------------------


def serve(order: Order, fetch: TapFetch) -> int:
    """Until the exit pipe is closed, or nobody is left in the namespace; the exit status.  Raises `Failed`, OSError
    and what the parts raise.
    """
    import gc

    gc.disable()  # while all is new, nothing is garbage
    subnet = order.subnet
    if order.has_namespace:
        fetch.configure(subnet if order.configure else None, mtu=order.mtu, mac=order.mac)

    from netns_kit.gateway.engine import Engine
    from netns_kit.gateway.gateway import Gateway
    from netns_kit.gateway.setup import Setup
    from netns_kit.host.limits import calm_collector, raise_descriptor_limit
    from netns_kit.tap.device import TapDevice
    from netns_kit.userstack import blocking_loop
    from netns_kit.userstack.control import Control

    from .slirp_uplink import SlirpUplink

    engine = Engine()
    ended = _Ended(engine)
    if order.exit_fd is not None:
        ended.watch_pipe(order.exit_fd)
    elif order.has_namespace:
        ended.watch_namespace(order)
    tap = TapDevice.from_fd(_tap(order, fetch), mtu=order.mtu, name=order.tap or None)
    print(_banner(order, subnet))
    raise_descriptor_limit()
    uplink = SlirpUplink(
        loopback=order.loopback, dns=order.dns, bind4=order.outbound.get(4), bind6=order.outbound.get(6)
    )
    setup = Setup.of(tap, uplink, subnet=order.cidr, ipv6=order.ipv6)
    control = Control(Gateway(engine, setup, tell=_tell), lambda _: None)
    api = None if order.api is None else _api_socket(order.api, engine, control)
    _sandbox(order, uplink.reads())
    if order.ready_fd is not None:
        try:
            os.write(order.ready_fd, b"1")
            os.close(order.ready_fd)
        except OSError:  # who has closed it has no need to know
            pass
    calm_collector()
    try:
        blocking_loop.run(engine, lambda: ended.is_set)
    finally:
        if api is not None:
            api.close()
        control.close()
    _trace("do_slirp is exiting")
    return 0


def _api_socket(path: str, engine: Engine, control: Control) -> ApiSocket:
    from .api_socket import ApiSocket, HostForwards

    try:
        return ApiSocket(engine, HostForwards(control), path, _trace)
    except OSError as error:
        what = "the specified API socket path is too long (>= 108)"
        if error.errno != errno.ENAMETOOLONG:
            what = f"api_bindlisten: bind: {error.strerror}"
        raise Failed(f"{what}\ndo_slirp is exiting\ndo_slirp failed\nparent failed") from error


class _Ended:
    """Whether there is nothing left to do, and what says so."""

    def __init__(self, engine: Engine) -> None:
        self.is_set = False
        self._engine = engine

    def watch_pipe(self, fd: int) -> None:
        """Until the other end of the exit pipe is closed.  What is written to it means nothing."""
        try:
            self._engine.add(fd, lambda _: self._set("exitfd event"), 0)
        except PermissionError:  # a file, say, which is never closed by anybody
            pass
        except OSError as error:
            raise Failed(f"exit-fd: {error.strerror}\ndo_slirp failed\nparent failed") from error

    def watch_namespace(self, order: Order) -> None:
        """Until no process is in the namespace, or the file that it is known by has gone.  Where that cannot be known
        it goes on for ever, as slirp4netns does.
        """
        try:
            if pid := _pid_of(order):
                from .occupants import Occupants

                Occupants(self._engine, pid, lambda: self._set("the namespace has no process left"))
            elif not os.path.islink(order.path) and not order.sandbox:  # in which the path leads nowhere
                from netns_kit.namespace.watch import Watch

                self._watch_path(Watch(order.path))
        except OSError:
            pass

    def _watch_path(self, watch: Watch) -> None:
        def look(_: int) -> None:
            if not watch.is_there():
                self._set("the namespace's path is gone")

        self._engine.add(watch.fileno(), look, 1)  # EPOLLIN

    def _set(self, why: str) -> None:
        self.is_set = True
        _trace(why)


def _pid_of(order: Order) -> int:
    """The process by which the namespace is named, or 0."""
    parts = order.path.split("/")
    if parts[:2] == ["", "proc"] and parts[3:] == ["ns", "net"] and parts[2].isdigit():
        return int(parts[2])
    return 0


def _tap(order: Order, fetch: TapFetch) -> int:
    """Its descriptor."""
    if order.kind == "tapfd":
        return int(order.target)
    if order.kind == "bess":
        return accept_frames(order.target)
    fd, there = fetch.result()
    _say(f"sent tapfd={there} for {order.tap}\nreceived tapfd={fd}")
    return fd


def accept_frames(path: str) -> int:
    """Wait at a SOCK_SEQPACKET socket at `path` for one peer who speaks a frame per record, as BESS does and
    user-mode Linux; his descriptor.  A socket that was left there is replaced.  Raises OSError.
    """
    import socket

    from netns_kit.host.paths import bind

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        try:
            bind(listener, path).leave()
            listener.listen(0)
            peer, _ = listener.accept()
        except OSError as error:
            error.filename = path
            raise
    return peer.detach()


def _banner(order: Order, subnet: Subnet) -> str:
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
    needed = [
        *(["core", "root", "capabilities", "no_new_privs"] if order.sandbox else ()),
        *(["no_new_privs", "seccomp"] if order.seccomp else ()),
    ]
    if not needed:
        return
    from netns_kit.host.abi import CAP_NET_BIND_SERVICE
    from netns_kit.userstack.worker.sandbox import ALLOWED, FATAL, ON, WATCHING, enter

    if order.seccomp:
        print(
            "seccomp: The following syscalls are blocked: all but those of netns_kit's list; fatal:", *FATAL
        )
    layers = enter(
        readable, {*needed, "landlock"}, kept=1 << CAP_NET_BIND_SERVICE, calls={**ALLOWED, **WATCHING}
    )
    if lacking := [name for name in dict.fromkeys(needed) if layers[name] != ON]:
        what = "create_sandbox" if lacking != ["seccomp"] else "enable_seccomp"
        why = ", ".join(f"{name} is {layers[name]}" for name in lacking)
        raise Failed(f"{what} failed: {why}\ndo_slirp failed\nparent failed")


def _say(text: str) -> None:
    """Told on standard error while the caller waits."""
    try:
        os.write(2, f"{text}\n".encode() if text else b"")
    except OSError:  # there is nobody
        pass


def _trace(text: str) -> None:
    """The same when traffic would wait too: it is lost if standard error takes no more."""
    try:
        if takes(2):
            os.write(2, f"{text}\n".encode()[:LOG_MAX])
    except OSError:
        pass


def _tell(text: str, error: BaseException | None) -> None:
    """What the gateway has noticed."""
    _trace(text if error is None else f"{text}: {error!r}")
