"""AgentCalls: what asks the agent of a namespace, and has its sysctls read and set."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from netns_kit import arguments
from netns_kit.errors import SysctlError
from netns_kit.frozen import frozen
from netns_kit.host import sysctl

from .agent_client import AgentProcess, Conversation, Done
from .background import Openable

T = TypeVar("T")


@frozen
class _Value:
    """The agent's answer: the value of a sysctl."""

    value: str


class AgentCalls(Openable):
    """Base class of what asks the agent of a namespace."""

    _agent: AgentProcess

    @property
    def pid(self) -> int:
        """Process id of a process that holds the namespaces while this is open, as the host counts.

        `/proc/<pid>/ns/net` is the network namespace, and `nsenter --target <pid> --user --net --pid --mount` leads
        to where commands are.

        Raises:
            NamespaceGone: It is not open.
        """
        return self._agent.holder

    async def _converse(self, op: str, fds: Sequence[int] = (), /, **arguments: object) -> Conversation:
        return await self._agent.converse(op, fds, arguments)

    async def _ask(
        self, kind: type[T], op: str, /, *, descriptors: int = 0, fds: Sequence[int] = (), **arguments: object
    ) -> tuple[T, list[int]]:
        with self.supervisor.guarding():
            conversation = await self._converse(op, fds, **arguments)
            try:
                return await conversation.receive(kind, descriptors)
            finally:
                conversation.close()

    async def get_sysctl(self, name: str) -> str:
        """Return the value of a sysctl of the namespace.

        Args:
            name: One of those below `net.`, as sysctl(8) takes it.

        Raises:
            ArgumentTypeError: The name is not text.
            SysctlError: There is no such sysctl, or it is not a network namespace's.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It changes nothing.
        """
        path = _sysctl_path(name)
        with _sysctl_errors(name):
            answer, _ = await self._ask(_Value, "sysctl_get", path=path)
        return answer.value

    async def set_sysctl(self, name: str, value: str | int) -> None:
        """Set a sysctl of the namespace.  The host's stays as it is.

        Args:
            name: One of those below `net.`, as sysctl(8) takes it.
            value: Text or a whole number.

        Raises:
            ArgumentTypeError: The name is not text, or the value neither text nor a whole number.
            SysctlError: There is no such sysctl, it is not a network namespace's, or the kernel refuses the value.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The sysctl may or may not have been set.
        """
        arguments.instance("value", value, (str, int), "text or a whole number")
        path = _sysctl_path(name)
        with _sysctl_errors(name, value):
            await self._ask(Done, "sysctl_set", path=path, value=str(value))


def _sysctl_path(name: str) -> str:
    arguments.text("name", name, "the name of a sysctl, like 'net.ipv4.ip_forward'")
    path = sysctl.path(name)
    if not path.startswith("net/"):
        fix = "only those of net. are a network namespace's; read others by netns_kit.host.sysctl.read"
        raise SysctlError(f"sysctl {name!r} is not of a network namespace", fix=fix, errno=errno.EINVAL)
    return path


@contextmanager
def _sysctl_errors(name: str, value: str | int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        fix = {
            errno.ENOENT: "this kernel has no such sysctl here: look below /proc/sys/net in the namespace",
            errno.EINVAL: "give a value that the kernel takes, see sysctl(8)",
        }.get(exc.errno or 0)
        knob = None if value is None else name
        raise SysctlError(f"sysctl {name}: {exc.strerror}", knob, value, fix, errno=exc.errno) from exc
