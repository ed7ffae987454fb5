"""Place: where commands see a network, in its own namespace or in a member."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from subprocess import CompletedProcess

from typing_extensions import Unpack

from netns_kit import arguments
from netns_kit.namespace.background import Openable
from netns_kit.namespace.namespace import Namespace
from netns_kit.namespace.process import Command, CommandOptions, Process, RunOptions


class Place(Openable):
    """A namespace whose commands have the resolv.conf and the hosts file of a network."""

    namespace: Namespace
    """The namespace."""

    @abstractmethod
    async def files(self) -> dict[str, str]:
        """Return the files that commands see in place of the host's, by path, as they are now.

        These are a resolv.conf with our DNS address and the search list; and a hosts file with localhost, this
        machine's name, the names of the network, and the other names of the host's file, if there is one and the
        uplink is none in memory.  Where the policy has rules by name the names of the network are not in it, so that
        they are asked for: such a rule is about what our DNS has answered.

        Raises:
            StackClosed: The network is not open.

        Cancellation: Nothing is changed.
        """

    @abstractmethod
    async def _live_files(self) -> Mapping[str, str]:
        """Return the files for a command, whose hosts file changes with the members from now on."""

    @arguments.spelled_out(Namespace.run)
    async def run(self, command: Command, **options: Unpack[RunOptions]) -> CompletedProcess[bytes]:
        """Run a command to its end, with the network's own resolv.conf and hosts file, see `files`.

        Args:
            command: The words of the command, or a line for the shell.
            options: See `RunOptions`.

        Raises:
            CommandFailed: The status is not 0, unless `check` is False.
            ArgumentError: An option that cannot be used.
            ArgumentTypeError: An option of another type.
            OSError: The command cannot be executed, as `subprocess` raises it.
            UserNamespaceDenied: `files` cannot be shown.
            NamespaceGone, StackClosed: The network, or the member, is not open.

        Cancellation: The command is killed, and what it has started.
        """
        with self.supervisor.guarding():
            options["files"] = {**await self._live_files(), **(options.get("files") or {})}
            return await self.namespace.run(command, **options)

    @arguments.spelled_out(Namespace.popen)
    async def popen(self, command: Command, **options: Unpack[CommandOptions]) -> Process:
        """Start a command with the network's own resolv.conf and hosts file, see `files`.

        The command has been executed when this returns.  Close the Process, or use it in an `async with`: that kills
        the command if it still runs.

        Args:
            command: The words of the command, or a line for the shell.
            options: See `CommandOptions`.

        Raises:
            ArgumentError: An option that cannot be used.
            ArgumentTypeError: An option of another type.
            OSError: The command cannot be executed, as `subprocess` raises it.
            UserNamespaceDenied: `files` cannot be shown.
            NamespaceGone, StackClosed: The network, or the member, is not open.

        Cancellation: The command is killed if it has been started.
        """
        with self.supervisor.guarding():
            options["files"] = {**await self._live_files(), **(options.get("files") or {})}
            process = await self.namespace.popen(command, **options)
        process.supervisor = self.supervisor
        return process
