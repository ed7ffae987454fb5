"""TapFetch: a tap from inside a namespace, for a program of one thread that has no event loop.

A `Namespace` has an agent inside for as long as it is open.  A program that must be one process, and needs nothing of
the namespace but a tap, has a child for that: it goes in, opens the tap, configures the link, passes the descriptor
out and ends.

Callers wait for the tap, some for a few milliseconds only, so nothing is imported before the child is there.  It is
forked first of all, and what it imports costs its parent no time, nor the other way round.  Then it is told, in two
words: where the tap is to be opened, as soon as that is known, and how the link is configured.  The tap is opened
here, by the least that can do it; all else is done by the agent's own code, see agent.py.
"""

from __future__ import annotations

import errno
import marshal
import os
import sys
from _socket import AF_UNIX, CMSG_LEN, MSG_NOSIGNAL, SCM_RIGHTS, SOCK_SEQPACKET, SOL_SOCKET, socketpair

TYPE_CHECKING = False  # as type checkers know it, without importing `typing`

if TYPE_CHECKING:
    from _socket import socket
    from typing import Any, NoReturn

    from netns_kit.subnet import Subnet

_RECORD_MAX = 65536
_TUN = "/dev/net/tun"
_ENTER, _OPEN = "setns(CLONE_NEWNET)", "ioctl(TUNSETIFF)"  # what the kernel was asked when it said no

# <linux/sched.h>, <linux/nsfs.h>, <linux/if_tun.h>
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_NS_GET_USERNS, _NS_GET_NSTYPE = 0xB701, 0xB703
_TUNSETIFF = 0x400454CA
_PR_SET_DUMPABLE = 4  # <linux/prctl.h>


class TapFetch:
    """A child that waits to be told which tap to fetch.  To be made before anything else, by a program of one thread.

    First `open`, then `configure`, then `result`; or `cancel`, at any time.
    """

    def __init__(self) -> None:
        self._socket, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            self._socket.close()
            _go(theirs)
        theirs.close()

    def open(self, path: str, name: str, userns: str | None) -> None:
        """Have it open a tap called `name` in the network namespace at `path`; a persistent one is joined.

        `userns` is the path of a user namespace to join first, as far as that is permitted; the one that owns the
        network namespace is joined in any case.
        """
        self._tell((path, name, userns))

    def configure(self, subnet: Subnet | None, *, mtu: int, mac: str | None) -> None:
        """Have the link configured: guest addresses, default routes, `mtu`, `mac`, loopback up.  Without a subnet
        it is left as it is, for somebody else to configure.
        """
        self._tell(None if subnet is None else _configuration(subnet, mtu, mac))

    def _tell(self, what: Any) -> None:
        try:
            self._socket.send(marshal.dumps(what), MSG_NOSIGNAL)
        except BrokenPipeError:  # it has failed, and said so
            pass

    def result(self) -> tuple[int, int]:
        """The tap's descriptor, and the number it had in the child.  To be called once.

        Raises the OSError that the child met, with what it has asked of the kernel for its filename; and
        `NamespaceGone` if it did not live to say it.
        """
        data, ancillary, _, _ = self._socket.recvmsg(_RECORD_MAX, CMSG_LEN(4))
        self.cancel()
        if not data:
            from netns_kit.errors import NamespaceGone

            raise NamespaceGone("the child that went into the namespace ended without a word")
        answer = marshal.loads(data)
        if not ancillary:
            number, what = answer
            raise OSError(number, os.strerror(number), what)
        fd = int.from_bytes(ancillary[0][2], sys.byteorder)
        os.set_inheritable(fd, False)
        return fd, answer

    def cancel(self) -> None:
        """Wait until it has ended, which it does at once when nobody is there to tell it anything."""
        self._socket.close()
        os.waitpid(self._pid, 0)


def _configuration(subnet: Subnet, mtu: int, mac: str | None) -> dict[str, object]:
    """As the agent's operation wants it, but for the name of the link."""
    ipv6 = subnet.ipv6
    return {
        "mtu": mtu,
        "mac": None if mac is None else mac.replace(":", ""),
        "address": str(subnet.guest),
        "netmask": str(subnet.network.netmask),
        "gateway": str(subnet.gateway),
        "neighbours": {str(each): link.hex() for each, link in subnet.neighbours.items()},
        "ipv6": ipv6 and [str(ipv6.guest), ipv6.network.prefixlen, str(ipv6.gateway)],
    }


# -- the child ------------------------------------------------------------------------------------------


def _go(out: socket) -> NoReturn:
    """What the child does, from its beginning to its end."""
    try:
        order = out.recv(_RECORD_MAX)
        if order:
            _fetch(out, *marshal.loads(order))
    finally:
        os._exit(errno.EIO)


def _fetch(out: socket, path: str, name: str, userns: str | None) -> None:
    try:
        _enter(path, userns)
        tap = _opened(name)
        order = out.recv(_RECORD_MAX)
        if order:
            _configure(name, marshal.loads(order))
    except OSError as error:
        out.send(marshal.dumps((error.errno or errno.EIO, error.filename)), MSG_NOSIGNAL)
    else:
        rights = (SOL_SOCKET, SCM_RIGHTS, tap.to_bytes(4, sys.byteorder))
        out.sendmsg([marshal.dumps(tap)], [rights], MSG_NOSIGNAL)


def _enter(path: str, userns: str | None) -> None:
    """Join the namespaces.  The ids of this process may mean nothing there; for a tap they are not asked."""
    import fcntl

    namespace = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if userns is not None:
        try:
            _join(os.open(userns, os.O_RDONLY | os.O_CLOEXEC), _CLONE_NEWUSER, userns)
        except OSError:
            pass
    try:
        if fcntl.ioctl(namespace, _NS_GET_NSTYPE) != _CLONE_NEWNET:
            raise OSError(errno.EINVAL, "not a network namespace")
        owner = fcntl.ioctl(namespace, _NS_GET_USERNS)
    except OSError as error:
        number = errno.EINVAL if error.errno == errno.ENOTTY else error.errno  # no namespace at all
        raise OSError(number, os.strerror(number or errno.EIO), _ENTER) from error
    if not os.path.sameopenfile(owner, os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)):
        _join(owner, _CLONE_NEWUSER, "setns(CLONE_NEWUSER)")
    _join(namespace, _CLONE_NEWNET, _ENTER)


def _join(namespace: int, kind: int, what: str) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    # programs there may be waiting for us, and we have our caller's memory
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.setns(namespace, kind) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    libc.prctl(
        _PR_SET_DUMPABLE, 0, 0, 0, 0
    )  # other capabilities make us as dumpable as fs.suid_dumpable has it


def _opened(name: str) -> int:
    """The tap, with the first of the flag words that the kernel takes."""
    import fcntl

    from netns_kit.tap.flags import TAP_FLAGS

    packed = os.fsencode(name)
    if not 0 < len(packed) < 16:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), _OPEN)
    try:
        tap = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        error.filename = f'open("{_TUN}")'
        raise
    for flags in TAP_FLAGS:
        request = packed.ljust(16, b"\0") + flags.to_bytes(2, sys.byteorder) + bytes(22)  # struct ifreq
        try:
            fcntl.ioctl(tap, _TUNSETIFF, request)
            break
        except OSError as error:
            if error.errno != errno.EINVAL or flags == TAP_FLAGS[-1]:
                error.filename = _OPEN
                raise
    return tap


def _configure(name: str, configuration: dict[str, object] | None) -> None:
    from netns_kit.namespace import agent
    from netns_kit.tap.flags import GUEST_QUEUE

    if configuration is not None:
        agent.op_configure_link({"name": name, "queue": GUEST_QUEUE, **configuration})
        return
    try:
        agent.set_queue_length(name, GUEST_QUEUE)
    except OSError:  # a kernel may refuse it, and then it is the caller's anyway
        pass
