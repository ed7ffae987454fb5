"""From outcomes to findings, without trying anything: each thing broken alone, on hosts of every kind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from netns_kit.checkup.checkup import CHECKS, Finding, Outcome, Report, examine
from netns_kit.errors import FeatureUnavailable, IdMapError, NotFound, TunUnavailable, UserNamespaceDenied
from netns_kit.host.diagnosis import APPARMOR, CLONE, PING_GROUPS, PORT_START, SECCOMP, TUN, Host
from netns_kit.tap.device import OFFLOAD_SETS
from tests.support import ROOT

SETTINGS = {
    CLONE: "0", APPARMOR: "1", PORT_START: "1024", PING_GROUPS: "1 0", "net.ipv4.tcp_rmem": "4096 131072 6291456",
    "net.ipv4.tcp_wmem": "4096 16384 4194304", "user.max_user_namespaces": "7", "net.ipv6.conf.all.disable_ipv6": "1",
}  # fmt: skip
HOST = Host(SETTINGS, release="6.1", gid=1000)
OFF = {"net.ipv6.conf.all.disable_ipv6": "0", "net.ipv6.conf.default.disable_ipv6": "1"}
INSIDE = {
    "tun",
    "files",
    "pids",
    "offloads",
    "queues",
    "sysctls",
    "id-ranges",
    "ipv6-inside",
    "transparent",
    "members",
    "guard",
}


def healthy() -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {name: {"detail": "works"} for name in CHECKS if name != "tcp-buffers"}
    return {**outcomes, "offloads": {"detail": OFFLOAD_SETS[0]}, "descriptors": {"detail": [1024, 4096]}}


def failed(number: int, op: str = "", filename: str | None = None, **more: Any) -> Outcome:
    return {"errno": number, "op": op, "message": os.strerror(number), "filename": filename, **more}


def unwell(report: Report) -> dict[str, Finding]:
    return {finding.name: finding for finding in report if finding.status != "ok"}


def test_a_healthy_host_is_blamed_for_nothing() -> None:
    """Whatever its knobs say: what works is not held against them."""
    report = examine(healthy(), HOST)
    assert unwell(report) == {}
    assert report.ok
    report.require()
    report.require(*CHECKS)
    assert report["user-namespace"].settings == {"user.max_user_namespaces": "7", CLONE: "0", APPARMOR: "1"}


@pytest.mark.parametrize(
    ("name", "outcome", "status", "reason", "knob"),
    [
        ("pidfds", failed(errno.ENOSYS), "missing", "absent", "Linux"),
        ("files", failed(errno.EACCES, "", "/tmp"), "missing", "denied", APPARMOR),
        ("files", failed(errno.ENOSPC, "", "/tmp"), "missing", "exhausted", "user.max_mnt_namespaces"),
        ("files", failed(errno.ENOENT, "", "/etc/resolv.conf"), "missing", "absent", "/etc/resolv.conf"),
        ("pids", failed(errno.EPERM, "mount proc", "mount proc"), "limited", "denied", "/proc"),
        ("pids", failed(errno.ENOSPC, "unshare pids"), "limited", "exhausted", "user.max_pid_namespaces"),
        ("offloads", {"detail": OFFLOAD_SETS[1]}, "limited", "absent", "Linux"),
        ("queues", failed(errno.EINVAL, "", "probe1"), "limited", "absent", "probe1"),
        ("sysctls", failed(errno.EROFS, "", "/proc/sys/x"), "limited", "denied", "/proc/sys/x"),
        ("ping", failed(errno.EACCES), "limited", "denied", PING_GROUPS),
        ("ping6", failed(errno.EACCES), "limited", "denied", PING_GROUPS),
        ("low-ports", failed(errno.EACCES), "limited", "denied", PORT_START),
        ("ipv6", failed(errno.EAFNOSUPPORT), "limited", "absent", "IPv6"),
        ("ipv6", failed(errno.EADDRNOTAVAIL), "limited", "denied", "net.ipv6.conf.all.disable_ipv6"),
        ("ipv6-inside", failed(errno.EACCES, settings=OFF), "limited", "denied", [*OFF][1]),
        ("transparent", failed(errno.EPERM), "limited", "denied", None),
        ("members", failed(errno.EOPNOTSUPP), "limited", "absent", "Linux"),
        ("guard", failed(errno.EPROTONOSUPPORT), "limited", "absent", "Linux"),
        ("udp-gro", failed(errno.ENOPROTOOPT), "limited", "absent", "Linux"),
        ("landlock", {"errno": 0, "op": "landlock", "message": "unsupported"}, "limited", "absent", "landlock"),
        ("landlock", {"errno": 0, "op": "landlock", "message": "disabled"}, "limited", "denied", "landlock"),
        ("sandbox", {"errno": 0, "op": "core", "message": "no"}, "limited", "denied", "core"),
        ("resolver", failed(errno.ENETUNREACH, "", "192.0.2.1"), "limited", "unreachable", "/etc/resolv.conf"),
        ("descriptors", {"detail": [256, 512]}, "limited", "exhausted", "RLIMIT_NOFILE"),
    ],
)  # fmt: skip
def test_what_fails_is_named_and_nothing_else(
    name: str, outcome: Outcome, status: str, reason: str, knob: str | None
) -> None:
    report = examine({**healthy(), name: outcome}, HOST)
    assert list(unwell(report)) == [name]
    finding = report[name]
    assert (finding.status, finding.reason) == (status, reason)
    assert finding.error is not None
    assert finding.error.knob == knob
    assert finding.error.fix
    assert report.ok is (status == "limited")
    with pytest.raises(type(finding.error)):
        report.require(name)


def test_without_user_namespaces_nothing_inside_is_blamed() -> None:
    outcomes = {name: each for name, each in healthy().items() if name not in INSIDE | {"network-namespace"}}
    report = examine({**outcomes, "user-namespace": failed(errno.EPERM, "unshare user")}, HOST)
    assert unwell(report).keys() == INSIDE | {"user-namespace", "network-namespace"}
    assert [each.name for each in report if each.error is not None] == ["user-namespace"]
    assert report["user-namespace"].status == "missing"
    assert {report[name].status for name in INSIDE} == {"untried"}
    assert report["tun"].detail == "it needs user-namespace"
    assert report["queues"].detail == "it needs tun"
    assert not report.ok
    with pytest.raises(UserNamespaceDenied, match=CLONE):
        report.require()
    with pytest.raises(FeatureUnavailable, match="tun: it needs user-namespace"):
        report.require("tun")
    assert "Needed, and not there: user-namespace, network-namespace, tun, files." in str(report)


def test_a_bad_tun_is_blamed_even_if_namespaces_are_bad() -> None:
    outcomes = {name: each for name, each in healthy().items() if name not in INSIDE}
    bad = {
        "network-namespace": failed(errno.ENOSPC, "unshare net"),
        "tun": failed(errno.ENOENT, filename=TUN),
    }
    report = examine({**outcomes, **bad}, HOST)
    assert isinstance(report["tun"].error, TunUnavailable)
    assert report["network-namespace"].reason == "exhausted"


def test_a_bound_of_none_is_a_denial() -> None:
    host = Host({"user.max_user_namespaces": "0"})
    report = examine({"user-namespace": failed(errno.ENOSPC, "unshare user")}, host)
    assert report["user-namespace"].reason == "denied"


def test_a_filter_that_is_seen_comes_before_every_knob() -> None:
    outcome = failed(errno.EPERM, "unshare user", filtered=True)
    error = examine({"user-namespace": outcome}, HOST)["user-namespace"].error
    assert error is not None
    assert error.knob == SECCOMP


def test_small_buffers_are_named_with_what_would_do() -> None:
    host = Host({**SETTINGS, "net.ipv4.tcp_wmem": "4096 16384 65536"})
    finding = examine(healthy(), host)["tcp-buffers"]
    assert finding.error is not None
    assert (finding.status, finding.error.knob) == ("limited", "net.ipv4.tcp_wmem")
    assert finding.error.fix == 'sysctl -w net.ipv4.tcp_wmem="4096 16384 4194304"'
    assert "5 Mbit/s" in finding.detail
    assert examine(healthy(), Host())["tcp-buffers"].status == "untried"


def test_what_was_met_beside_the_probe_counts() -> None:
    outcomes = {name: each for name, each in healthy().items() if name != "id-ranges"}
    error = IdMapError("kit has no subordinate uids", "/etc/subuid", "without a line for kit")
    finding = examine(outcomes, HOST, {"id-ranges": error})["id-ranges"]
    assert (finding.status, finding.error) == ("limited", error)


def test_a_report_for_machines() -> None:
    told = json.loads(examine({**healthy(), "ping": failed(errno.EACCES)}, HOST).json())
    assert told["ok"] is True
    assert told["host"]["kernel"] == "6.1"
    ping = next(each for each in told["findings"] if each["name"] == "ping")
    assert ping.keys() == {
        "name", "status", "reason", "tried", "detail", "limits", "cause", "knob", "value", "fix", "settings",
    }  # fmt: skip
    assert (ping["knob"], ping["value"], ping["settings"]) == (PING_GROUPS, "1 0", {PING_GROUPS: "1 0"})


def test_a_report_for_notebooks_is_escaped() -> None:
    error = IdMapError("<script>", "<b>", "<i>", "&")
    report = examine(healthy(), HOST, {"id-ranges": error})
    html = report._repr_html_()
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt; is &lt;i&gt;" in html
    assert "<script>" not in html
    assert "All that is needed is there." in html


def test_the_repr_of_a_report_has_what_is_not_right() -> None:
    report = examine(healthy(), HOST)
    assert repr(report) == f"<Report of {len(report.findings)} findings: all ok>"
    report = examine({**healthy(), "tun": failed(errno.ENOENT, "open")}, HOST)
    assert repr(report) == f"<Report of {len(report.findings)} findings: tun missing>"


def test_there_is_no_such_finding() -> None:
    with pytest.raises(NotFound, match="there is no finding 'nothing'; choose one of ") as caught:
        examine({}, HOST)["nothing"]
    assert isinstance(caught.value, KeyError)


def test_importing_the_package_does_not_bring_what_only_the_doctor_uses() -> None:
    code = "import sys, netns_kit; print(*{'html', 'platform', 'netns_kit.checkup.checkup'} & sys.modules.keys())"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert child.stdout.split() == []
