"""A host with an ordinary user, and another host beside it, for as long as one test runs.

    host: eth0 192.0.2.1 ------ 192.0.2.10 eth0 :other

Each is a network namespace, both of them in one user namespace in which the user has its own uid; `on_host` runs a
test in a child process that makes them and is on the host.  What it executes there is an ordinary user's program,
without a capability; so are `Network`, pasta, slirp4netns and rootlesskit.  The host has a default route, which leads
to nobody: some programs do not start without.  With the child the namespaces are gone.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Concatenate

from pyroute2 import IPRoute
from typing_extensions import ParamSpec

from tests.support import needs_tun
from tests.support.multihop import CLONE_NEWNET, CLONE_NEWUSER, call, in_child

P = ParamSpec("P")

HOST, OTHER, NOBODY = "192.0.2.1", "192.0.2.10", "192.0.2.254"


class TwoHosts:
    """The two network namespaces; the calling thread is on the host."""

    def __init__(self) -> None:
        uid, gid = os.geteuid(), os.getegid()
        call("unshare", CLONE_NEWUSER)
        for file, text in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
            Path("/proc/self", file).write_text(text)
        self._namespaces = {name: self._make() for name in ("host", "other")}
        with self.on("other"), IPRoute() as ip:
            peer = {"ifname": "eth0", "net_ns_fd": self._namespaces["host"]}
            ip.link("add", ifname="eth0", kind="veth", peer=peer)
            self._address(ip, OTHER)
        with self.on("host"), IPRoute() as ip:
            self._address(ip, HOST)
            ip.route("add", dst="0.0.0.0/0", gateway=NOBODY)

    def _make(self) -> int:
        call("unshare", CLONE_NEWNET)
        with IPRoute() as ip:
            ip.link("set", index=1, state="up")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    def _address(self, ip: IPRoute, address: str) -> None:
        (index,) = ip.link_lookup(ifname="eth0")
        ip.addr("add", index=index, address=address, prefixlen=24)
        ip.link("set", index=index, state="up")

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Sockets that this thread makes, and programs that it starts, are those of a host, "host" or "other"."""
        call("setns", self._namespaces[name], CLONE_NEWNET)
        try:
            yield
        finally:
            call("setns", self._namespaces["host"], CLONE_NEWNET)


def on_host(body: Callable[Concatenate[TwoHosts, P], None]) -> Callable[P, None]:
    """The test's body runs on the host: it is given `TwoHosts`, then the fixtures and parameters it names."""

    @wraps(body)
    def test(*args: P.args, **kwargs: P.kwargs) -> None:
        needs_tun()
        in_child(lambda: body(TwoHosts(), *args, **kwargs))

    _, *parameters = inspect.signature(body).parameters.values()
    test.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # pytest goes by it
    return test
