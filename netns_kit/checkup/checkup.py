"""The checkup: everything that the library needs of a host is tried, and each failure is reported with its cause.

`doctor` executes probe.py, which does each thing as the library does it, in processes of its own, and reports the
outcomes.  `examine` is a pure function that turns them into findings.  The causes are those that the library's
exceptions name, made by the same functions (`diagnosis`).

If something fails, what depends on it is not tried, or not blamed: a host without user namespaces is not reported as
having a bad tun driver.
"""

from __future__ import annotations

import errno
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from netns_kit.child.child import Child
from netns_kit.display.displayed import Displayed
from netns_kit.errors import FeatureUnavailable, IdMapError, NetnsKitError, NotFound
from netns_kit.frozen import field, frozen
from netns_kit.host import diagnosis
from netns_kit.host.diagnosis import Host
from netns_kit.namespace.idmap import map_ranges
from netns_kit.tap.device import OFFLOAD_BITS, OFFLOAD_SETS
from netns_kit.tap.flags import TAP_FLAGS
from netns_kit.uplink.dns_settings import RESOLV_CONF
from netns_kit.uplink.uplink import Uplink

if TYPE_CHECKING:
    from netns_kit.display.view import View

__all__ = ["Finding", "Report", "doctor", "examine"]

Status = Literal["ok", "limited", "missing", "untried"]
Reason = Literal["denied", "absent", "exhausted", "unreachable"]
Outcome = Mapping[str, Any]

HTTP = 80
BUFFER_WANTED, BUFFER_USUAL = 1 << 20, 4 << 20
DESCRIPTORS_WANTED = 1024
_REASONS: Mapping[int | None, Reason] = {
    **dict.fromkeys((errno.EPERM, errno.EACCES, errno.EROFS, errno.EADDRNOTAVAIL), "denied"),
    **dict.fromkeys((errno.ENOSPC, errno.EUSERS, errno.EMFILE, errno.ENOBUFS), "exhausted"),
    **dict.fromkeys((errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED), "unreachable"),
}


@frozen
class Finding:
    """A thing that the library needs of the host, and the outcome of trying it."""

    name: str
    """Name of the finding, like "tun"."""
    status: Literal["ok", "limited", "missing", "untried"]
    """Outcome: it works ("ok"), does not work but is seldom needed ("limited"), does not work and is needed
    ("missing"), or needs something that does not work ("untried")."""
    tried: str
    """Description of the attempt."""
    detail: str
    """Description of the outcome."""
    limits: str
    """Description of what cannot be had without it."""
    error: NetnsKitError | None = None
    """Exception that a user of the library would meet, with the diagnosis in its parts; None if nothing is wrong."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Sysctls that can decide, with their values, even if nothing is wrong."""

    @property
    def reason(self) -> Literal["denied", "absent", "exhausted", "unreachable"] | None:
        """Kind of the failure, None if nothing is wrong.

        "denied" by a policy or a switch, "absent" from the kernel or the machine, "exhausted" if a bound is reached,
        "unreachable" if the network does not lead there.
        """
        if self.error is None:
            return None
        if isinstance(self.error, OSError):
            if self.error.errno in diagnosis.EXHAUSTED and self.error.value == 0:
                return "denied"
            return _REASONS.get(self.error.errno, "absent")
        return "absent" if self.error.value == "unsupported" else "denied"

    def particulars(self) -> list[tuple[str, str]]:
        """Return what there is to say of a finding that is not right: what about it, and that."""
        if self.error is None:
            return []
        told = [] if self.error.knob is None else [("because", f"{self.error.knob} is {self.error.value}")]
        told.append(("so", self.limits))
        return told if self.error.fix is None else [*told, ("to change that", self.error.fix)]

    def record(self) -> dict[str, object]:
        """Return the finding as plain values, for JSON."""
        parts = ("cause", "knob", "value", "fix")
        return {
            "name": self.name, "status": self.status, "reason": self.reason, "tried": self.tried,
            "detail": self.detail, "limits": self.limits,
            **{part: None if self.error is None else getattr(self.error, part) for part in parts},
            "settings": dict(self.settings),
        }  # fmt: skip


@frozen
class Report(Displayed):
    """The findings of `doctor`, in order, and by name as in `report["tun"]`.  A notebook shows them as a table."""

    host: Host
    """Settings and limits of the host."""
    findings: tuple[Finding, ...]
    """Findings in the order in which they were tried."""

    @property
    def ok(self) -> bool:
        """True if everything that is needed works; a "limited" finding does not count."""
        return all(finding.status in ("ok", "limited") for finding in self.findings if _needed(finding))

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __getitem__(self, name: str) -> Finding:
        found = {finding.name: finding for finding in self.findings}
        if name not in found:
            raise NotFound(f"there is no finding {name!r}", fix=f"choose one of {', '.join(found)}")
        return found[name]

    def require(self, *names: str) -> None:
        """Raise the error of the first of these findings that does not work.

        Args:
            names: Names of findings; by default all that are needed.

        Raises:
            NetnsKitError: The exception that a user of the library would meet, `Finding.error`.
            FeatureUnavailable: It could not be tried.
            NotFound: A KeyError: there is no finding of that name.
        """
        for name in names or [finding.name for finding in self.findings if _needed(finding)]:
            finding = self[name]
            if finding.error is not None:
                raise finding.error
            if finding.status == "untried":
                raise FeatureUnavailable(f"{name}: {finding.detail}")

    def json(self) -> str:
        """Return the report as a JSON object."""
        host = {
            "kernel": self.host.release, "python": platform.python_version(), "uid": os.geteuid(),
            "gid": self.host.gid, "seccomp": self.host.seccomp, "no_new_privs": self.host.no_new_privs,
            "label": self.host.label,
        }  # fmt: skip
        findings = [finding.record() for finding in self.findings]
        return json.dumps({"ok": self.ok, "host": host, "findings": findings}, indent=1)

    def __repr__(self) -> str:
        others = ", ".join(f"{each.name} {each.status}" for each in self.findings if each.status != "ok")
        return f"<Report of {len(self.findings)} findings: {others or 'all ok'}>"

    def __str__(self) -> str:
        lines = [self.title, ""]
        for finding in self.findings:
            lines.append(f"{finding.status:9}{finding.name:19}{finding.detail}")
            lines += [f"{'':9}  {name:17}{text}" for name, text in finding.particulars()]
        return "\n".join([*lines, "", self.verdict])

    def _view(self) -> View:
        from .display import report_view

        return report_view(self)

    @property
    def title(self) -> str:
        """The host, in a line."""
        confined = f", {self.host.label}" if self.host.label else ""
        filtered = ", under a seccomp filter" if self.host.seccomp else ""
        return (
            f"Linux {self.host.release}, Python {platform.python_version()}, uid {os.geteuid()}"
            f"{confined}{filtered}"
        )

    @property
    def verdict(self) -> str:
        """The outcome, in a sentence."""
        bad = [each.name for each in self.findings if _needed(each) and each.status in ("missing", "untried")]
        return f"Needed, and not there: {', '.join(bad)}." if bad else "All that is needed is there."


# From outcomes to findings


class Check(NamedTuple):
    """A check: what is tried, what cannot be had without it, why it has failed, and the checks that it depends on.

    `knobs` are the sysctls that have a say.
    """

    tried: str
    limits: str
    why: Callable[[Outcome, Host], NetnsKitError]
    after: tuple[str, ...] = ()
    needed: bool = False
    knobs: tuple[str, ...] = ()


def _os_error(outcome: Outcome) -> OSError:
    number, message, filename = outcome["errno"], outcome["message"], outcome.get("filename")
    return OSError(number, message, filename) if filename else OSError(number, message)


def _namespace(outcome: Outcome, host: Host) -> NetnsKitError:
    return diagnosis.user_namespace(
        outcome["errno"], outcome["op"], host, filtered=outcome.get("filtered", False)
    )


def _files(outcome: Outcome, host: Host) -> NetnsKitError:
    number, name = outcome["errno"], outcome.get("filename")
    if number in diagnosis.DENIED | diagnosis.EXHAUSTED:
        return diagnosis.user_namespace(number, "mount", host)
    cause = f"no file of a command's own: {name}: {outcome['message']}"
    fix = f"make {name} a file, if an empty one"
    return FeatureUnavailable(cause, name, "not to be covered", fix, number)


def _pids(outcome: Outcome, host: Host) -> NetnsKitError:
    step = outcome["op"] or "unshare pids"  # a trial that was killed says none
    return diagnosis.pid_namespace(outcome["errno"], step, host, filtered="signal" in outcome)


def _feature(what: str, since: str, calls: str) -> Callable[[Outcome, Host], NetnsKitError]:
    return lambda outcome, host: diagnosis.feature(what, _os_error(outcome), since, calls, host)


def _layer(name: str) -> Callable[[Outcome, Host], NetnsKitError]:
    return lambda outcome, _: diagnosis.layer(outcome["op"] or name, outcome["message"])


def _ping(outcome: Outcome, host: Host) -> NetnsKitError:
    return diagnosis.ping(outcome["errno"], host)


def _low_ports(outcome: Outcome, host: Host) -> NetnsKitError:
    start = host.number(diagnosis.PORT_START)
    return diagnosis.privileged_port(_low_port(host), "of the host", start)


def _resolver(outcome: Outcome, _: Host) -> NetnsKitError:
    cause = f"no resolver of {RESOLV_CONF} is there: {outcome['filename']}: {outcome['message']}"
    fix = "go online, have it name one that runs, or name one: Uplink(dns=[...]), --dns"
    return FeatureUnavailable(cause, RESOLV_CONF, outcome["filename"], fix, outcome["errno"])


def _offloads(outcome: Outcome, host: Host) -> NetnsKitError:
    cause = f"the tap does without {' '.join(outcome['lacking'])}"
    return FeatureUnavailable(cause, "Linux", host.release, "Linux 6.2 or newer has all", errno.EINVAL)


def _buffers(outcome: Outcome, host: Host) -> NetnsKitError:
    knob = min(_BUFFERS, key=lambda name: _largest(host, name))
    low, usual, _ = host.settings[knob].split()
    fix = f'sysctl -w {knob}="{low} {usual} {BUFFER_USUAL}"'
    cause = f"small buffers: {outcome['rate']:.0f} Mbit/s over 100 ms"
    return FeatureUnavailable(cause, knob, host.settings[knob], fix, errno.ENOBUFS)


def _descriptors(outcome: Outcome, _: Host) -> NetnsKitError:
    fix = f"raise the hard limit (ulimit -Hn, LimitNOFILE=) to {DESCRIPTORS_WANTED} or more"
    return FeatureUnavailable("few descriptors", "RLIMIT_NOFILE", outcome["limit"], fix, errno.EMFILE)


def _ipv6(outcome: Outcome, host: Host) -> NetnsKitError:
    return diagnosis.ipv6(outcome["errno"], outcome.get("settings", host.settings))


_OFFLOADS = dict(zip(("CSUM", "TSO4", "TSO6", "TSO_ECN", "USO4", "USO6"), OFFLOAD_BITS, strict=True))
_INSIDE = ("user-namespace", "network-namespace")
_BUFFERS = (diagnosis.TCP_RECEIVE, diagnosis.TCP_SEND)
CHECKS: Mapping[str, Check] = {
    "pidfds": Check(
        "pidfd_open(2), pidfd_send_signal(2)",
        "no namespace can be held: Namespace, Network, netns-kit run",
        _feature("pidfds", "5.3", "pidfd_open"), needed=True,
    ),
    "user-namespace": Check(
        "unshare(CLONE_NEWUSER), own uid and gid mapped to 0",
        "no namespace can be made: Namespace.create, Network, netns-kit run",
        _namespace, needed=True, knobs=("user.max_user_namespaces", diagnosis.CLONE, diagnosis.APPARMOR),
    ),
    "network-namespace": Check(
        "unshare(CLONE_NEWNET), its loopback set up",
        "no namespace can be made: Namespace.create, Network, netns-kit run",
        _namespace, ("user-namespace",), needed=True, knobs=("user.max_net_namespaces",),
    ),
    "tun": Check(
        "in there, /dev/net/tun opened, TUNSETIFF, an address and a route",
        "no tap: TapDevice.open, Network, netns-kit run",
        lambda outcome, _: diagnosis.tun(_os_error(outcome), "probe0"), _INSIDE, needed=True,
    ),
    "files": Check(
        "in a mount namespace, /etc/resolv.conf replaced for one command",
        "commands have no resolv.conf of their own: Network.run, netns-kit run, files=",
        _files, _INSIDE, needed=True, knobs=("user.max_mnt_namespaces",),
    ),
    "pids": Check(
        "in there, unshare(CLONE_NEWPID), and a /proc mounted for it",
        "commands can signal the caller's processes, and outlive the block by stopping the agent (docs/security.md)",
        _pids, ("files",), knobs=("user.max_pid_namespaces",),  # with the files comes a mount namespace
    ),
    "offloads": Check(
        "TUNSETOFFLOAD",
        "more packets, and smaller ones, for the same bytes",
        _offloads, ("tun",),
    ),
    "queues": Check(
        "TUNSETIFF with IFF_MULTI_QUEUE, twice",
        "one worker for each namespace: queues=1",
        lambda outcome, _: diagnosis.tun(_os_error(outcome), "probe1"), ("tun",),
    ),
    "sysctls": Check(
        "in there, net.ipv4.ip_default_ttl set",
        "sysctls of a namespace stay what they are: Namespace.set_sysctl",
        _feature("sysctls of a namespace", "3.0", "openat"), _INSIDE,
    ),
    "id-ranges": Check(
        "newuidmap and newgidmap, with the ranges of /etc/subuid and /etc/subgid",
        'one uid and one gid in a namespace: no ids="subids", so no images with several users',
        lambda outcome, host: _namespace({"op": "map", **outcome}, host), _INSIDE,
    ),
    "ping": Check(
        "a ping socket (icmp(7)), then a raw one",
        "the namespace cannot ping beyond the gateway, nor be told why by traceroute -I",
        _ping, knobs=(diagnosis.PING_GROUPS,),
    ),
    "ping6": Check(
        "the same, of ICMPv6",
        "the namespace cannot ping over IPv6",
        _ping, ("ipv6",), knobs=(diagnosis.PING_GROUPS,),
    ),
    "low-ports": Check(
        "a port below 1024 bound on 127.0.0.1",
        "ports below that number cannot be published: Forwarder.add, -p",
        _low_ports, knobs=(diagnosis.PORT_START,),
    ),
    "bind-device": Check(
        "SO_BINDTODEVICE",
        "traffic cannot be bound to an interface: Uplink(device=), --device",
        _feature("SO_BINDTODEVICE", "5.7", "setsockopt"),
    ),
    "ipv6": Check(
        "a socket bound to ::1",
        "no IPv6 through the host",
        _ipv6, knobs=("net.ipv6.conf.all.disable_ipv6", "net.ipv6.conf.lo.disable_ipv6"),
    ),
    "ipv6-inside": Check(
        "in a namespace, an address and a route of a tap",
        "no IPv6 in namespaces: Network(ipv6=True), --ipv6",
        _ipv6, ("tun",),
    ),
    "transparent": Check(
        "in a namespace, IP_TRANSPARENT, and an address bound that is not its own",
        "a server inside does not see its client's address where ports are forwarded by sockets",
        _feature("IP_TRANSPARENT", "2.6.28", "setsockopt"), _INSIDE,
    ),
    "members": Check(
        "in a namespace, a bridge and a pair of veth made",
        "no network of several namespaces: Network.member, netns-kit up",
        _feature("bridges and pairs of veth", "2.6.24", "sendto"), _INSIDE,
    ),
    "guard": Check(
        "in a namespace, rules of nftables for a bridge made",
        "members of a network may take each other's addresses: Network(guard=False)",
        _feature("nftables for bridges", "3.18", "sendto"), _INSIDE,
    ),
    "udp-segment": Check(
        "two datagrams sent by one call (UDP_SEGMENT)",
        "datagrams leave one by one",
        _feature("UDP_SEGMENT", "4.18", "sendmsg"),
    ),
    "udp-gro": Check(
        "two datagrams read by one call (UDP_GRO)",
        "datagrams come in one by one",
        _feature("UDP_GRO", "5.0", "setsockopt"), ("udp-segment",),
    ),
    "memfds": Check(
        "memfd_create(2)",
        'no workers, no large requests: driver="worker", commands with long arguments or files=',
        _feature("memfds", "3.17", "memfd_create"),
    ),
    "landlock": Check(
        "a worker's sandbox entered",
        "a worker that was taken over could read files",
        _layer("landlock"),
    ),
    "seccomp": Check(
        "the same",
        "a worker that was taken over could make any system call",
        _layer("seccomp"),
    ),
    "sandbox": Check(
        "the same: core dumps, ptrace, capabilities, no_new_privs",
        "a worker that was taken over could keep what it had",
        _layer("sandbox"),
    ),
    "resolver": Check(
        f"connected to what {RESOLV_CONF} names, and asked if it is on this machine",
        "no names in the namespace",
        _resolver,
    ),
    "tcp-buffers": Check(
        "read",
        "a connection over a long path is slower than the path",
        _buffers, knobs=_BUFFERS,
    ),
    "descriptors": Check(
        "getrlimit(RLIMIT_NOFILE)",
        "few connections at a time: each has a descriptor",
        _descriptors,
    ),
}  # fmt: skip


def examine(
    outcomes: Mapping[str, Outcome], host: Host, errors: Mapping[str, NetnsKitError] | None = None
) -> Report:
    """Make a report of the outcomes of the probe on a host.

    Args:
        outcomes: What the probe tells, by the names of the checks.
        host: The host that it ran on.
        errors: Exceptions that were met beside it, by the same names.
    """
    outcomes = {**outcomes, **dict(_weighed(outcomes, host))}
    errors = errors or {}
    findings = []
    for name, check in CHECKS.items():
        error, outcome = errors.get(name), outcomes.get(name)
        status: Status
        if error is None and outcome is None:
            after = [each for each in check.after if "detail" not in outcomes.get(each, {})]
            status, detail = "untried", f"it needs {after[0]}" if after else "the probe did not get that far"
        elif error is None and outcome is not None and "detail" in outcome:
            status, detail = "ok", outcome["detail"]
        else:
            error = error or check.why(outcome or {}, host)
            status, detail = "missing" if check.needed else "limited", error.cause
        settings = {knob: host.settings[knob] for knob in check.knobs if knob in host.settings}
        findings.append(Finding(name, status, check.tried, detail, check.limits, error, settings))
    return Report(host, tuple(findings))


def _weighed(outcomes: Mapping[str, Outcome], host: Host) -> Iterator[tuple[str, Outcome]]:
    """Yield the outcomes of what is a matter of degree: whether it is enough."""
    if "detail" in outcomes.get("offloads", {}):
        word = outcomes["offloads"]["detail"]
        lacking = [name for name, bit in _OFFLOADS.items() if not word & bit]
        yield "offloads", {"lacking": lacking} if lacking else {"detail": " ".join(_OFFLOADS)}
    if "detail" in outcomes.get("descriptors", {}):
        soft, hard = outcomes["descriptors"]["detail"]
        enough = hard < 0 or hard >= DESCRIPTORS_WANTED
        yield "descriptors", {"detail": f"{soft}, at most {hard}"} if enough else {"limit": hard}
    if all(knob in host.settings for knob in _BUFFERS):
        most = min(_largest(host, knob) for knob in _BUFFERS)
        rate = most * 8 * 10 / 1e6
        yield (
            "tcp-buffers",
            {"detail": f"{rate:.0f} Mbit/s over 100 ms"} if most >= BUFFER_WANTED else {"rate": rate},
        )


def _largest(host: Host, knob: str) -> int:
    return int(host.settings[knob].split()[-1])


def _needed(finding: Finding) -> bool:
    return CHECKS[finding.name].needed


def _low_port(host: Host) -> int:
    """Return a port that needs a privilege, if any does."""
    start = host.number(diagnosis.PORT_START) or 0
    return start - 1 if 1 < start <= HTTP else HTTP


# Having it tried


def doctor() -> Report:
    """Try everything that the library needs of this host, and report what is wrong and what would help.

    The attempts are made in processes of their own, as the caller's user and with the calling thread's restrictions.
    They take about a fifth of a second, for which the call blocks: from a coroutine, call `await
    anyio.to_thread.run_sync(doctor)`.  Nothing is changed, no connection is opened and nothing is sent to another
    machine.

    Raises:
        NetnsKitError: The probe itself has failed.
        OSError: The probe could not be executed.
    """
    host = Host.here()
    uplink = Uplink()
    order = {
        "low_port": _low_port(host),
        "resolvers": [(str(each.address), each.port) for each in uplink.resolvers()],
        "readable": uplink.reads(),
        "tap_flags": TAP_FLAGS,
        "offloads": OFFLOAD_SETS,
    }
    errors: dict[str, NetnsKitError] = {}
    probe = Child(f"{__package__}.probe", watched=False, errors=True)
    try:
        said = _converse(probe, json.dumps(order).encode(), errors)
        if "outcomes" not in said:
            end = f"the probe ended with status {probe.wait()}"
            written = (probe.errors.read() or b"").decode(errors="replace").strip()
            raise NetnsKitError(end, value=written or None, fix="please report it")
    finally:
        probe.close()
    return examine(said["outcomes"], host, errors)


def _converse(probe: Child, order: bytes, errors: dict[str, NetnsKitError]) -> dict[str, Any]:
    """Map the ids that the probe asks for, and return its outcomes."""
    said: dict[str, Any] = {}
    probe.channel.send(order)
    while (message := probe.channel.wait()) is not None:
        said = json.loads(message)
        if "map" in said:
            try:
                map_ranges(said["map"])
                answer = b"mapped"
            except IdMapError as error:
                errors["id-ranges"] = error
                answer = b"failed"
            probe.channel.send(answer)
    return said
