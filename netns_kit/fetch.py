"""TapFetch: a tap from inside a namespace, for a program of one thread that has no event loop.

A `Namespace` has an agent inside for as long as it is open.  A program that must be one process, and needs nothing
of the namespace but a tap, has a child do that: it goes in, opens the tap, configures the link, passes the descriptor
out and ends.  The child runs the agent's own code, see agent.py, so that there is one way to do each of these things.

It is started at once and waited for later: what its parent imports meanwhile costs no time.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import NamespaceGone
from .tun import GUEST_QUEUE, TAP_FLAGS

if TYPE_CHECKING:
    from .subnet import Subnet

RECORD_MAX = 65536
_STEPS = {  # what the kernel was asked when it said no
    "inspect": "setns(CLONE_NEWNET)",
    "owner": "setns(CLONE_NEWNET)",
    "setns net": "setns(CLONE_NEWNET)",
    "setns user": "setns(CLONE_NEWUSER)",
    "tap": "ioctl(TUNSETIFF)",
}


class TapFetch:
    """A tap called `name` in the network namespace at `path`, being opened; a persistent one is joined.

    With a `subnet` the link is configured: guest addresses, default routes, `mtu`, `mac`, loopback up.  Without
    one it is left as it is, for somebody else to configure.  `userns` is the path of a user namespace to join first,
    as far as that is permitted; the one that owns the network namespace is joined in any case.

    It forks: the program has one thread.
    """

    def __init__(
        self,
        path: str,
        name: str,
        *,
        mtu: int,
        userns: str | None = None,
        subnet: Subnet | None = None,
        mac: str | None = None,
    ) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            self._socket.close()
            _go(
                theirs, path, name, userns, None if subnet is None else _configuration(name, mtu, mac, subnet)
            )
        theirs.close()

    def result(self) -> tuple[int, int]:
        """The tap's descriptor, and the number it had in the child.  To be called once.

        Raises the OSError that the child met, with what it has asked of the kernel for its filename; and
        `NamespaceGone` if it did not live to say it.
        """
        with self._socket:
            data, fds, _, _ = socket.recv_fds(self._socket, RECORD_MAX, 1)
        os.waitpid(self._pid, 0)
        if not data:
            raise NamespaceGone("the child that went into the namespace ended without a word")
        answer: dict[str, Any] = json.loads(data)
        if "errno" in answer:
            step, number = answer["op"], answer["errno"]
            if step == "inspect":  # what is no namespace at all
                number = errno.EINVAL
            raise OSError(number, os.strerror(number), _STEPS.get(step) or answer["filename"] or step)
        os.set_inheritable(fds[0], False)
        return fds[0], answer["fd"]


def _configuration(name: str, mtu: int, mac: str | None, subnet: Subnet) -> dict[str, object]:
    """As the agent's operation wants it."""
    ipv6 = subnet.ipv6
    return {
        "name": name,
        "mtu": mtu,
        "mac": None if mac is None else mac.replace(":", ""),
        "queue": GUEST_QUEUE,
        "address": str(subnet.guest),
        "netmask": str(subnet.network.netmask),
        "gateway": str(subnet.gateway),
        "ipv6": ipv6 and [str(ipv6.guest), ipv6.network.prefixlen, str(ipv6.gateway)],
    }


def _go(
    out: socket.socket, path: str, name: str, userns: str | None, configuration: dict[str, object] | None
) -> NoReturn:
    """The child."""
    try:
        from . import agent

        step = path
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if userns is not None:
                with suppress(OSError):
                    agent.check(
                        agent.libc.setns(os.open(userns, os.O_RDONLY | os.O_CLOEXEC), agent.CLONE_NEWUSER)
                    )
                    agent.become_known()
            agent.attach(fd, out)  # it reports for itself if it fails
            step = "tap"
            _, fds = agent.op_open_tap({"name": name, "flags": TAP_FLAGS, "queues": 1})
            step = "configure"
            if configuration is None:
                with suppress(OSError):
                    agent.set_queue_length(name, GUEST_QUEUE)
            else:
                agent.op_configure_link(configuration)
        except OSError as error:
            answer, fds = agent.failure(error, step), []
            if error.filename == "/dev/net/tun":
                answer["op"] = 'open("/dev/net/tun")'
        else:
            answer = {"fd": fds[0]}
        agent.tell(out, answer, fds)
    finally:
        os._exit(errno.EIO)
