"""The process inside: holds a namespace, opens things there and passes the descriptors out.

It is a program that a `Child` executes, with a control socket and a pidfd of its owner.  The first message on the
control socket is a JSON object that says which namespace; a descriptor of it, if it exists, is the third.  The agent
enters the namespace, says so with one message, and then serves requests until its owner is gone.

Words.  A *request* is one record on the control socket: JSON and descriptors.  The first descriptor is the far end of
a new socketpair, the *conversation*, on which the answer goes; so requests need no numbers, no lock and no order, and
a client that loses interest closes its end.  A request of 32 KiB or more is the byte `@`, with its text in a memfd,
the last descriptor: many clients share the control socket, so no request is more than one record.  A *command* is a
child made by `spawn`; its conversation stays open: the first message out says that it runs, the last how it ended.
If the client closes or shuts down its end in between, the command and its descendants are killed.  A record in is one
byte: the number of a signal that the client has received and passes on, or `FOLLOW_STOPS`, and then a message goes
out each time that the command has been stopped.

Signals.  The agent is in its client's process group, as a command is unless it has gone to another, and reads the
signals that come to it from a signalfd.  These were sent to the group, by a terminal or by kill(2): the command has
them already, and one that the client passes on is not sent a second time.

Hostile commands.  A command may be root of the user namespace, and have the owner's own uid outside, so the agent
counts on nothing that such a program could reach.  It is not dumpable (prctl(2)), from before the first command or
the first step into somebody else's namespace: to read its memory, environment or descriptors takes CAP_SYS_PTRACE in
the user namespace it was executed in, which nobody inside has.  Commands live in a PID namespace where the agent has
no number, so that no signal reaches it either, and are in sessions of their own, as the holder is, without the
owner's process group and terminal.  A fork of the agent that becomes a command enters the mounts of commands while it
still has what is the agent's, so it loads nothing from there (`load_nothing`).

    parent                the process that the owner has executed: it does nothing but end when one of the two ends
      agent               process 1 of a PID namespace, and what this file is about
        holder            process 1 of a PID namespace below that, and of the mount namespace with its /proc
        command, ...      in the holder's PID namespace and mount namespace

The agent has PR_SET_PDEATHSIG, so it is killed with its parent however that dies; and the kernel kills everything in
a PID namespace, and in those below it, with its process 1.  No command can see either, so none can prevent this.
The holder owns nothing and is open to all: it is the process by which others find the namespaces (`nsenter
--target`), it inherits orphans, and as process 1 it takes no signal from a command.

With `pids` "host" there is no PID namespace and no parent: the holder is a child of the agent beside the commands.
They have PR_SET_PDEATHSIG, which a command can take back; and a command with the agent's uid can stop or kill the
agent.

Death.  Two things end the agent: end of file on the control socket, and the owner's pidfd (a fork of the owner may
hold a copy of the socket).  PR_SET_PDEATHSIG alone would not do, since it follows the thread that has started the
agent; its signal is SIGCONT, so that an agent that was stopped wakes up and finds the owner gone.  As a child
subreaper an agent that is not process 1 inherits every orphan below it, so it kills children until there are none.

Law of the agent's modules (those that this one imports): the standard library only, cheap imports only, one poll
loop, one thread.  A bad request or a failing operation is answered with its errno; it never ends the agent.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress

from netns_kit.child.channel import RECORD, receive_record, records, send_record
from netns_kit.host import abi
from netns_kit.host.libc import check, libc

from .agent_command import ECHO, RunningCommand, become_command, kill_tree
from .agent_common import FOLLOW_STOPS, IN_MEMFD, children_of, failure, to_bytes, write_file
from .agent_files import make_place, remove_place, show_again
from .agent_namespaces import Quarters, attach, create, hide, open_quarters
from .agent_processes import process_of, processes
from .agent_sockets import Supply, allow_unix, prepare_transparent, route_answers
from .links import configure_link, open_tap

TYPE_CHECKING = False  # as type checkers know it: `typing` takes longer than all imports here

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

BLOCKED = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
WATCHED = abi.IN_MOVED_FROM | abi.IN_MOVED_TO | abi.IN_CREATE | abi.IN_DELETE
SIGINFO = 128  # bytes, signalfd(2)


# Operations that answer at once: arguments -> answer, descriptors to pass out


def op_socket(family: int, type: int, proto: int) -> tuple[dict[str, object], list[int]]:
    return {}, [socket.socket(family, type, proto).detach()]


def op_configure_link(name: str, **settings: Any) -> tuple[dict[str, object], list[int]]:
    return {"without_ipv6": configure_link(name, **settings)}, []


def op_sysctl_get(path: str) -> tuple[dict[str, object], list[int]]:
    with open("/proc/sys/" + path, "rb") as file:
        return {"value": file.read().decode("utf-8", "surrogateescape").removesuffix("\n")}, []


def op_sysctl_set(path: str, value: str) -> tuple[dict[str, object], list[int]]:
    write_file("/proc/sys/" + path, value + "\n")
    return {}, []


OPERATIONS: dict[str, Callable[..., tuple[dict[str, object], list[int]]]] = {
    "socket": op_socket,
    "open_tap": open_tap,
    "configure_link": op_configure_link,
    "sysctl_get": op_sysctl_get,
    "sysctl_set": op_sysctl_set,
    "allow_unix": allow_unix,
    "prepare_transparent": prepare_transparent,
    "route_answers": route_answers,
    "process_of": process_of,
    "processes": processes,
}


class Agent:
    """The poll loop.  Handlers tolerate being called for nothing, as a descriptor's number may be reused."""

    def __init__(
        self, control: socket.socket, owner: int, quarters: Quarters, restore: dict[signal.Signals, Any]
    ) -> None:
        self.control = control
        self.owner = owner
        self.quarters = quarters
        self.restore = restore
        self.commands: dict[int, RunningCommand] = {}
        self.places: dict[str, tuple[int, int]] = {}  # made by us, for commands to be shown files at
        self.live: dict[str, str] = {}  # texts of files that change while commands see them
        self.changes = -1  # an inotify descriptor, once there are files
        self.handlers: dict[int, Callable[[], None]] = {}
        self.poll = select.poll()
        blocked = sum(1 << (number - 1) for number in BLOCKED).to_bytes(128, sys.byteorder)  # sigset_t
        self.signals: int = libc.signalfd(-1, blocked, os.O_CLOEXEC | os.O_NONBLOCK)
        check(self.signals)
        self.watch(control.fileno(), self.serve)
        self.watch(owner, self.end)
        self.watch(self.signals, self.on_signal)

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        self.handlers[fd] = handler
        self.poll.register(fd, select.POLLIN)

    def forget(self, fd: int) -> None:
        if self.handlers.pop(fd, None) is not None:
            self.poll.unregister(fd)

    def run(self) -> NoReturn:
        while True:
            for fd, _ in self.poll.poll():
                if handler := self.handlers.get(fd):
                    handler()

    def end(self) -> NoReturn:
        """Kill everything below the agent and end.

        As process 1 it kills by ending; else what it may not kill (setuid programs) stays.
        """
        for target, identity in self.places.items():
            remove_place(target, identity)
        if self.quarters.mounts is not None:
            os._exit(0)
        while children := children_of(os.getpid()):
            if not sum(kill_tree(pid) for pid in children):
                break
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        os._exit(0)

    def serve(self) -> None:
        """Take one request and answer it."""
        try:
            data, fds, complete = receive_record(self.control, abi.SCM_MAX_FD)
        except BlockingIOError:
            return
        except ConnectionError:
            self.end()
        if not data:
            self.end()
        try:
            if fds:
                conversation = socket.socket(fileno=fds[0])
                del fds[0]
                self.answer(conversation, data, fds, complete=complete)
        except OSError:
            pass  # not a socket: nobody to answer to
        finally:
            for fd in fds:
                os.close(fd)

    def answer(self, conversation: socket.socket, data: bytes, fds: list[int], *, complete: bool) -> None:
        """Do what is asked; the caller closes the descriptors.  Not `complete`: there was no room for all of them."""
        op = "request"
        conversation.setblocking(False)
        try:
            if not complete:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if data == IN_MEMFD:
                data = os.pread(fds[-1], os.fstat(fds[-1]).st_size, 0)
            request = json.loads(data)
            op = request.pop("op")
            if op == "spawn":
                self.spawn(conversation, request, fds)
                return
            reply, out = (
                self.supply(fds[0])
                if op == "supply"
                else self.rewrite_files(**request)
                if op == "rewrite_files"
                else OPERATIONS[op](**request)
            )
        except Exception as exc:
            reply, out = failure(exc, str(op)), []
        try:
            if untold := tell(conversation, reply, out):
                tell(conversation, failure(untold, op))
        finally:
            conversation.close()
            for fd in out:
                os.close(fd)

    def supply(self, fd: int) -> tuple[dict[str, object], list[int]]:
        """Take orders for sockets from now on, see `agent_sockets`."""
        number = os.dup(fd)
        supply = Supply(socket.socket(fileno=number))

        def on_order() -> None:
            if (events := supply.serve()) == 0:
                self.forget(number)
            else:
                self.poll.modify(number, events)

        self.watch(number, on_order)
        return {}, []

    def rewrite_files(self, files: dict[str, str]) -> tuple[dict[str, object], list[int]]:
        """Change the texts of files, for commands that run and for those to come."""
        self.live.update(files)
        for command in self.commands.values():
            command.rewrite(files)
        return {}, []

    def spawn(self, conversation: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
        done, report = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        done.setblocking(False)
        files = [*request["files"], *request["sockets"]]
        request["files"].update((path, self.live[path]) for path in request["live"] if path in self.live)
        self.make_places(files)
        self.on_signal()  # what has come until now, the new command has not had
        try:
            pid = os.fork()
            if pid == 0:
                become_command(request, fds, report, self.quarters, self.restore)
            try:
                command = self.commands[pid] = RunningCommand(
                    pid, conversation, done, files, leads=request["foreground"]
                )
            except OSError:  # out of descriptors
                os.kill(pid, signal.SIGKILL)
                raise
        except BaseException:
            if self.quarters.is_ending:  # then nothing is forked any more
                self.end()
            done.close()
            self.remove_places()
            raise
        finally:
            report.close()
        self.watch_files(files)
        self.watch(done.fileno(), lambda: self.started(command))
        self.watch(conversation.fileno(), lambda: self.hear(command))

    def started(self, command: RunningCommand) -> None:
        """Tell the client that the command's exec has happened, or failed."""
        if command.report is None:
            return
        try:
            said, fds, _ = receive_record(command.report, abi.SCM_MAX_FD)
            if said and "shown" in (record := json.loads(said)):
                command.take(record["shown"], fds, record["live"])
                command.rewrite(self.live)  # what has changed since the fork
                said = command.report.recv(RECORD)
        except BlockingIOError:
            return
        except ConnectionError:
            said = b""
        self.forget(command.report.fileno())
        command.report.close()
        command.report = None
        if said:
            self.drop(command, json.loads(said))
        elif untold := tell(command.conversation, {"pid": command.pid}, [command.pidfd]):
            kill_tree(command.pid)
            self.drop(command, failure(untold, "answer"))
        os.close(command.pidfd)

    def hear(self, command: RunningCommand) -> None:
        """Pass on a signal.  If the client has hung up, or wants the command killed, kill it.

        The client may still wait for the status then.
        """
        self.on_signal()
        if command.pid not in self.commands:
            return
        try:
            said = command.conversation.recv(1)
        except BlockingIOError:
            return
        except ConnectionError:
            said = b""
        if not said:
            self.forget(command.conversation.fileno())
            kill_tree(command.pid)
        elif said[0] == FOLLOW_STOPS:
            command.told, command.follows = False, True
            self.tell_stop(command)
        else:
            command.pass_on(said[0])

    def tell_stop(self, command: RunningCommand) -> None:
        if command.follows and command.stop:
            tell(command.conversation, {"stopped": command.stop})
            command.told = True

    def stopped(self, command: RunningCommand, number: int) -> None:
        command.stop = number
        if command.report is None:
            self.tell_stop(command)
        else:  # before its exec, for which the client waits
            os.kill(command.pid, signal.SIGCONT)

    def continued(self, command: RunningCommand) -> None:
        """Continue a client that has stopped itself with the command, whoever has continued that."""
        command.stop = 0
        if command.told:
            with suppress(OSError):  # not ours to signal
                if self.quarters.parent is None:
                    signal.pidfd_send_signal(self.owner, signal.SIGCONT)
                else:
                    os.write(self.quarters.parent, b" ")
                command.note(ECHO if command.has_own_group else signal.SIGCONT)
        command.told = False

    def on_signal(self) -> None:
        """Note the signals that have come to the process group, and look after children if there is news of them."""
        child = False
        with suppress(BlockingIOError):
            while data := os.read(self.signals, SIGINFO * 32):
                for number, _, code in struct.iter_unpack(f"=Iii{SIGINFO - 12}x", data):
                    child = child or number == signal.SIGCHLD
                    for command in self.commands.values() if code <= 0 or number != signal.SIGCHLD else ():
                        command.note(number)
        if child:
            self.reap()

    def reap(self) -> None:
        """Collect every child that has ended: commands, and orphans that this process has inherited."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.quarters.holder and not os.WIFSTOPPED(status) and not os.WIFCONTINUED(status):
                self.end()
            if command := self.commands.get(pid):
                self.started(command)  # if it was quick: its start is told before its end
                if os.WIFSTOPPED(status):
                    self.stopped(command, os.WSTOPSIG(status))
                elif os.WIFCONTINUED(status):
                    self.continued(command)
                elif pid in self.commands:
                    if os.WIFSIGNALED(status) and self.quarters.is_ending:
                        self.end()
                    self.drop(command, {"status": status})

    def drop(self, command: RunningCommand, last: dict[str, object]) -> None:
        del self.commands[command.pid]
        self.remove_places()
        self.forget(command.conversation.fileno())
        tell(command.conversation, last)
        command.close()

    def make_places(self, files: Sequence[str]) -> None:
        for path in files:
            if not os.path.exists(path) and (made := make_place(path)):
                self.places[made[0]] = made[1]

    def remove_places(self) -> None:
        """Remove the files that were made for commands and that none needs any more."""
        needed = {os.path.realpath(path) for command in self.commands.values() for path in command.files}
        for target in self.places.keys() - needed:
            remove_place(target, self.places.pop(target))

    def watch_files(self, files: Sequence[str]) -> None:
        if not files:
            return
        if self.changes < 0:
            self.changes = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
            if self.changes < 0:  # the user has too many: then files are not shown again
                return
            self.watch(self.changes, self.on_change)
        for path in files:
            for name in (path, os.path.realpath(path)):
                directory = to_bytes(os.path.dirname(name))
                libc.inotify_add_watch(self.changes, directory, WATCHED)

    def on_change(self) -> None:
        """Show files again where something has happened beside one, or to it."""
        names = set()
        with suppress(BlockingIOError):
            while data := os.read(self.changes, RECORD):
                while data:
                    _, _, _, size = struct.unpack_from("=iIII", data)
                    names.add(data[16 : 16 + size].rstrip(b"\0").decode("utf-8", "surrogateescape"))
                    data = data[16 + size :]
        for command in list(self.commands.values()):
            concerned = {
                os.path.basename(name) for path in command.files for name in (path, os.path.realpath(path))
            }
            if command.shown and names & concerned:
                self.show_again(command)

    def show_again(self, command: RunningCommand) -> None:
        """Show the command again what it does not see any more.

        One child at a time does that, since each mount can be used once; another looks after this one.
        """
        command.looks_again = command.is_being_shown
        if not command.is_being_shown:
            with suppress(OSError):  # out of descriptors or processes: it is not shown again
                self.begin_to_show(command)

    def begin_to_show(self, command: RunningCommand) -> None:
        self.make_places(command.files)
        self.watch_files(command.files)  # a link may lead elsewhere now
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                child = os.fork()
            except OSError:
                ours.close()
                raise
            if child == 0:
                show_again(theirs, command.mounts, command.shown)

        def shown() -> None:
            with suppress(BlockingIOError):
                data, fds, _ = receive_record(ours, abi.SCM_MAX_FD)
                if self.commands.get(command.pid) is command and data:
                    command.take(json.loads(data)["shown"], fds)
                else:
                    for fd in fds:
                        os.close(fd)
                self.forget(ours.fileno())
                ours.close()
                command.is_being_shown = False
                if command.looks_again and self.commands.get(command.pid) is command:
                    self.show_again(command)

        command.is_being_shown = True
        self.watch(ours.fileno(), shown)


def tell(conversation: socket.socket, reply: dict[str, object], fds: Sequence[int] = ()) -> OSError | None:
    """Send one message, and return the error that has prevented it, if any.

    The client may have gone; and the kernel takes no descriptors if there are too many on their way already.
    """
    try:
        for record in records(json.dumps(reply).encode()):
            send_record(conversation, record, fds)
            fds = ()
    except OSError as exc:
        return exc
    return None


def raise_descriptor_limit() -> ctypes.Array[ctypes.c_ulong]:
    """Raise the soft limit on descriptors to the hard one: each command takes some.

    Return the limits as they were, which are for commands.
    """
    before = (ctypes.c_ulong * 2)()
    check(libc.getrlimit(abi.RLIMIT_NOFILE, before))
    check(libc.setrlimit(abi.RLIMIT_NOFILE, (ctypes.c_ulong * 2)(before[1], before[1])))
    return before


def main(control_fd: int, owner: int, namespace: int = -1) -> NoReturn:
    for fd in (control_fd, owner, namespace):
        if fd >= 0:
            os.set_inheritable(fd, False)
    control = socket.socket(fileno=control_fd)
    signal.pthread_sigmask(signal.SIG_SETMASK, BLOCKED)
    # A command has the defaults, but what was ignored before (nohup) stays ignored for it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    restore = {  # Python ignores two for itself, and the agent wants to know of its children
        signal.SIGPIPE: signal.SIG_DFL,
        signal.SIGXFSZ: signal.SIG_DFL,
        signal.SIGCHLD: signal.signal(signal.SIGCHLD, signal.SIG_DFL),
    }
    check(libc.prctl(abi.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    order = control.recv(RECORD)
    if not order:  # the owner has ended already
        os._exit(0)
    start = json.loads(order)
    stranger = False
    if start["mode"] == "create":
        create(start["ids"], control)
    elif start["mode"] == "attach":
        stranger = attach(namespace, control)
    else:
        hide()
    limits = raise_descriptor_limit()  # before anybody is told that the agent is ready, and may set another
    quarters = open_quarters(start["pids"], control, owner)
    quarters.of_stranger, quarters.limits = stranger, limits
    agent = Agent(control, owner, quarters, restore)
    if quarters.mounts is None:
        check(libc.prctl(abi.PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0))
    control.setblocking(False)
    agent.run()
