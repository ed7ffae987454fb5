"""ProcessInfo: the process inside that has a flow; and RunningProcess: one of those that there are."""

from __future__ import annotations

from netns_kit.frozen import frozen


@frozen
class ProcessInfo:
    """A process in a namespace, as it was when somebody asked.

    `name` and `command` are what that process says of itself.  They are printable, and have 64 and 256 characters at
    most.
    """

    pid: int | None
    """Process id, as the host counts: that of `Process.pid`.  None if the process has ended since."""
    inner_pid: int
    """Process id, as the commands in the namespace count."""
    uid: int
    """User id that has made the socket, as the namespace counts."""
    name: str
    """Name of the process (comm, see proc(5))."""
    command: str
    """First word of its command line; empty if it has none."""


@frozen
class RunningProcess:
    """A process in a namespace, as `Namespace.snapshot` finds it.

    `name` and `command` are what that process says of itself.
    """

    pid: int
    """Process id, as the commands in the namespace count."""
    uid: int
    """User id, as the namespace counts."""
    name: str
    """Name of the process (comm, see proc(5))."""
    command: str
    """Command line; empty if it has none."""
    memory: int
    """Bytes of memory that it has in use (VmRSS)."""
