"""The filter of system calls, run by an interpreter of classic BPF as seccomp has it, for every machine."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from itertools import product

import pytest

from netns_kit.userstack.worker import sandbox
from netns_kit.userstack.worker.sandbox import _BOUNDED, _OPENING, ALLOWED, FATAL, MACHINES, program

ALLOW, KILL, DENY = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
MOST = 4096  # BPF_MAXINSNS


def run(code: bytes, number: int, arguments: tuple[int, ...] = (), architecture: int = 0) -> int:
    data = struct.pack("=iIQ6Q", number, architecture, 0, *arguments, *(0,) * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("=HBBI", code))
    at = accumulator = 0
    while True:
        operation, true, false, k = instructions[at]
        at += 1
        if operation == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif operation == 0x54:  # BPF_ALU | BPF_AND | BPF_K
            accumulator &= k
        elif operation == 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
            at += true if accumulator == k else false
        elif operation == 0x35:  # BPF_JMP | BPF_JGE | BPF_K
            at += true if accumulator >= k else false
        else:
            assert operation == 0x06, "BPF_RET | BPF_K"
            return int(k)


class Filter:
    def __init__(self, name: str) -> None:
        self.machine = MACHINES[name]
        self.code = program(self.machine)

    def __call__(self, number: int | None, *arguments: int) -> int:
        assert number is not None
        return run(self.code, number, arguments, self.machine.architecture)

    def bounded(self, name: str, *arguments: int) -> int:
        return self({**_BOUNDED, **_OPENING}[name][self.machine.column], *arguments)


@pytest.fixture(params=MACHINES)
def judge(request: pytest.FixtureRequest) -> Filter:
    return Filter(request.param)


def test_what_is_on_a_list_is_judged_by_it(judge: Filter) -> None:
    column = judge.machine.column
    for table, verdict in (ALLOWED, ALLOW), (FATAL, KILL):
        for name, numbers in table.items():
            if numbers[column] is not None:
                assert judge(numbers[column]) == verdict, name


def test_all_else_is_denied(judge: Filter) -> None:
    listed = {
        numbers[judge.machine.column]
        for numbers in [
            *ALLOWED.values(),
            *FATAL.values(),
            *_BOUNDED.values(),
            *_OPENING.values(),
        ]
    }
    assert {judge(number) for number in range(600) if number not in listed} == {DENY}


def test_no_number_is_on_two_lists(judge: Filter) -> None:
    numbers = [
        numbers[judge.machine.column]
        for table in (ALLOWED, FATAL, _BOUNDED, _OPENING)
        for numbers in table.values()
        if numbers[judge.machine.column] is not None
    ]
    assert len(numbers) == len(set(numbers))


def test_other_machines_calls_are_not_judged_but_ended(judge: Filter) -> None:
    assert run(judge.code, 0, architecture=0x40000003) == KILL, "i386"
    assert judge(0x40000000) == KILL, "x32"
    assert len(judge.code) // 8 <= MOST


def test_memory_never_becomes_executable(judge: Filter) -> None:
    for name, protection in product(("mmap", "mprotect"), range(16)):
        assert judge.bounded(name, 0, 4096, protection) == (DENY if protection & 4 else ALLOW)


def test_sockets_are_of_the_internet(judge: Filter) -> None:
    allowed = [family for family in range(64) if judge.bounded("socket", family) == ALLOW]
    assert allowed == [2, 10]


def test_limits_can_be_read_and_are_its_own(judge: Filter) -> None:
    assert judge.bounded("prlimit64", 0, 7, 0, 1 << 47) == ALLOW
    assert judge.bounded("prlimit64", 1, 7, 0, 1 << 47) == DENY
    for pointer in (1, 1 << 32, 1 << 47):
        assert judge.bounded("prlimit64", 0, 7, pointer) == DENY


def test_it_may_abort_itself_alone(judge: Filter) -> None:
    assert judge.bounded("tgkill", os.getpid(), 1, 6) == ALLOW
    assert judge.bounded("tgkill", os.getppid(), 1, 6) == DENY


def test_few_ioctls(judge: Filter) -> None:
    assert judge.bounded("ioctl", 5, 0x8905) == ALLOW, "SIOCATMARK"
    for request in (0x5412, 0x541C, 0x400454CA, 0x8914):
        assert judge.bounded("ioctl", 5, request) == DENY, "TIOCSTI, TIOCLINUX, TUNSETIFF, SIOCSIFFLAGS"


def test_this_machine_is_known() -> None:
    assert os.uname().machine in MACHINES


def test_what_is_read_leaves_its_directory_readable_and_little_else() -> None:
    assert sandbox._readable([]) == set(), "nothing to read, nothing readable"
    readable = sandbox._readable(["/somewhere/resolv.conf"])
    assert {"/etc", "/somewhere"} <= readable
    assert not {"/", "/run", "/home"} & readable


def test_files_are_opened_to_read(judge: Filter) -> None:
    for flags, verdict in (
        (os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY, ALLOW),
        (os.O_WRONLY, DENY),
        (os.O_RDWR, DENY),
        (os.O_CREAT, DENY),
        (os.O_TRUNC, DENY),
        (os.O_TMPFILE, DENY),
    ):
        assert judge.bounded("openat", 0, 0, flags) == verdict


def test_without_landlock_no_file_is_opened(judge: Filter) -> None:
    judge.code = program(judge.machine, files=False)
    assert judge.bounded("openat", 0, 0, os.O_RDONLY) == DENY


def test_no_signals_by_a_descriptor(judge: Filter) -> None:
    assert judge.bounded("fcntl", 0, fcntl.F_GETFL) == ALLOW
    assert judge.bounded("fcntl", 0, fcntl.F_SETOWN) == DENY
