"""Members of a network beside what they could be had from otherwise.

    python -m benchmarks.members [--rounds 3] [--seconds 1] [--count 100] [--write docs/networks.md]

What is compared stands at the same time, and takes turns within each round: members beside a bare pair of veth and
bridge, the way out of a member beside that of a lone namespace, and a container's namespace with a published port
beside slirp4netns and pasta.  Quoted are medians of the rounds, and of the ratios within a round.  CPU is that of
both iperf3, and of the program between them, if there is one.

Then a network of many members is made, each pings each, and all ends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import anyio
import anyio.to_thread

from netns_kit import Member, Namespace, Network, Uplink

from .processes import Child, Failed, child, cpu_seconds, family, line
from .report import machine
from .subjects import GUEST_PORT, LOOPBACK, PATIENCE, find, free_port

BEGIN, END = "<!-- members: begin -->", "<!-- members: end -->"
TRIES = 10
SUPER = 65520  # the MTU that podman gives to slirp4netns and pasta
BARE = """
mount -t tmpfs none /run && ip link add br0 up type bridge || exit
for i in 1 2; do
    ip netns add m$i && ip link add v$i up master br0 type veth peer name eth0 netns m$i || exit
    ip -n m$i addr add 10.9.0.$i/24 dev eth0; ip -n m$i link set eth0 up; ip -n m$i link set lo up
done
for t in iptables ip6tables arptables; do
    [ ! -e /proc/sys/net/bridge/bridge-nf-call-$t ] || echo 0 >/proc/sys/net/bridge/bridge-nf-call-$t
done
ip netns exec m2 iperf3 -s >/dev/null 2>&1 &
until ip netns exec m2 ss -Hltn | grep -q 5201; do sleep .05; done
echo ready; exec cat
"""
PING = """
import socket, struct, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
sock.settimeout(10)
echo = struct.pack("!BBHI", 8, 0, 0xF7FF, 0)  # a checksum of zeros
for address in sys.argv[1].split(","):
    sock.sendto(echo, (address, 0))
    while True:
        data, (source, _) = sock.recvfrom(2000)
        if data[20] == 0 and source == address:
            break
print(len(sys.argv[1].split(",")))
"""
Run = Callable[[Sequence[str]], Awaitable[str]]


@dataclass
class Way:
    """A client's way to a server.

    `run` runs a command at the client's end, `pid` is the program between the two, if one is (0: this process).
    """

    run: Run
    to: tuple[str, ...]
    pid: int | None = None
    found: dict[str, list[float]] = field(default_factory=dict)

    async def measure(self, seconds: float, tests: Sequence[str]) -> None:
        for test in tests:
            if test == "ping":
                text = await self.run(["ping", "-q", "-c1000", "-i0.001", self.to[0]])
                self._note("ping, us", 1e3 * float(text.rpartition("=")[2].split("/")[1]))
                continue
            words = ["iperf3", "-J", "-4", "-C", "cubic", f"-t{seconds}", "-c", *self.to, *OPTIONS[test]]
            for _ in range(TRIES):  # a server may not have noticed yet that the one before has ended
                before = self._used()
                said = json.loads(await self.run(words))
                if "sum_received" in (end := said["end"]):
                    break
                await anyio.sleep(0.5)
            else:
                raise Failed(said.get("error", "iperf3 says nothing"))
            received, cpu = end["sum_received"], end["cpu_utilization_percent"]
            used = self._used() - before
            used += (cpu["host_total"] + cpu["remote_total"]) / 100 * received["seconds"]
            self._note(f"{test}, Gbit/s", received["bits_per_second"] / 1e9)
            self._note(f"{test}, CPU s/GB", used / (received["bytes"] / 1e9))

    def _used(self) -> float:
        if self.pid is None:
            return 0.0
        return cpu_seconds(self.pid) if self.pid else time.process_time()

    def _note(self, row: str, value: float) -> None:
        self.found.setdefault(row, []).append(value)


OPTIONS = {"one stream": [], "four streams": ["-P4"], "back": ["-R"]}


def from_host(enter: Sequence[str] = ()) -> Run:
    """What runs commands of the host, or after `enter`."""

    async def run(words: Sequence[str]) -> str:
        done = await anyio.run_process([*enter, *words], check=False)
        if done.returncode and not done.stdout.startswith(b"{"):
            raise Failed((done.stdout + done.stderr).decode(errors="replace"))
        return done.stdout.decode()

    return run


def inside(where: Member | Network) -> Run:
    async def run(words: Sequence[str]) -> str:
        done = await where.run(words, stdout=subprocess.PIPE, check=words[0] != "iperf3")
        return str(done.stdout.decode())

    return run


async def serve(stack: AsyncExitStack, member: Member) -> None:
    process = await member.popen(["iperf3", "-s"], stdout=subprocess.DEVNULL)
    await stack.enter_async_context(process)
    stack.callback(process.kill)
    while not await member.namespace.listening():  # noqa: ASYNC110 - nobody tells us
        await anyio.sleep(0.02)


def serving(stack: AsyncExitStack, words: Sequence[str]) -> Child:
    """A server of iperf3 that has said that it listens."""
    process = stack.enter_context(child(*words))
    while "listening" not in line(process, PATIENCE):
        pass
    return process


async def containers(stack: AsyncExitStack, count: int) -> list[Namespace]:
    """Namespaces of others, in user namespaces that are not ours."""
    words = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo; exec cat"]
    found = []
    for _ in range(count):
        process = stack.enter_context(child(*words))
        await anyio.to_thread.run_sync(line, process, PATIENCE)
        found.append(Namespace.attach(pid=process.pid))
    return found


async def between(rounds: int, seconds: float) -> dict[str, Way]:
    """Member to member."""
    async with AsyncExitStack() as stack:
        words = ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", BARE]
        bare = stack.enter_context(child(*words))
        await anyio.to_thread.run_sync(line, bare, PATIENCE)
        enter = ["nsenter", "-U", "-n", "-m", "--preserve-credentials", "-t", str(bare.pid)]
        ways = {"bare": Way(from_host([*enter, "ip", "netns", "exec", "m1"]), ("10.9.0.2",))}
        net = await stack.enter_async_context(Network())
        theirs = await containers(stack, 2)
        kinds: dict[str, Sequence[Namespace | None]] = {"members": [None, None], "attached": theirs}
        for kind, namespaces in kinds.items():
            one, two = [
                await net.add_member(f"{kind}{i}", namespace=each) for i, each in enumerate(namespaces)
            ]
            await serve(stack, two)
            ways[kind] = Way(inside(one), (str(two.address),))
        return await take_turns(ways, rounds, seconds, ["one stream", "four streams", "ping"])


async def out(rounds: int, seconds: float) -> dict[str, Way]:
    """Out to a server of the host's."""
    async with AsyncExitStack() as stack:
        port = free_port()
        serving(stack, ["iperf3", "-s", "--forceflush", "-B", LOOPBACK, "-p", str(port)])
        to = "10.0.2.2", "-p", str(port)
        lone, net = [
            await stack.enter_async_context(Network(uplink=Uplink(allow_host_loopback=True))) for _ in "12"
        ]
        member = await net.add_member("member")
        ways = {"lone": Way(inside(lone), to, 0), "member": Way(inside(member), to, 0)}
        return await take_turns(ways, rounds, seconds, ["one stream", "four streams", "back", "ping"])


async def published(rounds: int, seconds: float) -> dict[str, Way]:
    """Into a container, by a port of the host's."""
    async with AsyncExitStack() as stack:
        ways = {}
        for subject in find({}):
            if subject.name in {"slirp4netns", "pasta"}:
                running = stack.enter_context(subject.start(SUPER))
                serving(stack, [*running.enter, "iperf3", "-s", "--forceflush"])
                to = LOOPBACK, "-p", str(running.forwarded[0])
                ways[subject.name] = Way(from_host(), to, running.pid)
        net = await stack.enter_async_context(Network(mtu=SUPER))
        (theirs,) = await containers(stack, 1)
        port = free_port()
        ports = [f"{LOOPBACK}:{port}:{GUEST_PORT}"]
        member = await net.add_member("attached", namespace=theirs, ports=ports)
        await serve(stack, member)
        ways["attached"] = Way(from_host(), (LOOPBACK, "-p", str(port)), 0)
        return await take_turns(ways, rounds, seconds, ["one stream", "four streams", "back"])


async def take_turns(
    ways: dict[str, Way], rounds: int, seconds: float, tests: Sequence[str]
) -> dict[str, Way]:
    for turn in range(rounds):
        for test in tests:
            for name, way in list(ways.items())[:: -1 if turn % 2 else 1]:
                await way.measure(seconds, [test])
                last = {row: round(values[-1], 3) for row, values in way.found.items() if test in row}
                print(f"round {turn + 1}: {name}: {last}", file=sys.stderr, flush=True)
    return ways


def table(title: str, ways: dict[str, Way], ours: str) -> str:
    """Medians, and ours as a multiple of each other one's."""
    others = [name for name in ways if name != ours]
    head = [title, *ways, *(f"{ours} / {name}" for name in others)]
    rows = [head, ["---"] * len(head)]
    for row, values in ways[ours].found.items():
        medians = [f"{median(way.found[row]):.3g}" for way in ways.values()]
        ratios = [f"{median(map(_ratio, values, ways[name].found[row])):.2f}" for name in others]
        rows.append([row, *medians, *ratios])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs


async def many(count: int) -> str:
    """Make members, let each ping each, and end them."""
    before = _left()
    began = time.perf_counter()
    async with Network() as net:
        members = [await net.add_member(f"m{i}") for i in range(count)]
        made = time.perf_counter()
        addresses = ",".join(str(member.address) for member in members)
        at_once = anyio.Semaphore(2 * (os.cpu_count() or 1))
        answered = []

        async def ping(member: Member) -> None:
            async with at_once:
                done = await member.run([sys.executable, "-ISc", PING, addresses], stdout=subprocess.PIPE)
                answered.append(int(done.stdout))

        async with anyio.create_task_group() as tasks:
            for member in members:
                tasks.start_soon(ping, member)
        pinged = time.perf_counter()
    ended = time.perf_counter()
    left = [now - then for now, then in zip(_left(), before, strict=True)]
    return (
        f"{count} members: made in {made - began:.1f} s, {sum(answered)} pings, each from each, answered in"
        f" {pinged - made:.1f} s, ended in {ended - pinged:.1f} s: {ended - began:.1f} s in all."
        f" Left: {left[0]} processes, {left[1]} descriptors."
    )


def _left() -> tuple[int, int]:
    return len(family(os.getpid())), len(os.listdir("/proc/self/fd"))


async def run(options: argparse.Namespace) -> None:
    about = machine()
    given = options.rounds, options.seconds
    await anyio.to_thread.run_sync(int)  # the thread that it takes is there from now on
    crowd = await many(options.count)
    print(crowd, file=sys.stderr)
    head = (
        f"Medians, rounds: {options.rounds}, of {options.seconds} s each. {about['cores']} cores, Linux"
        f" {about['kernel']}, {about['python']}; load before the run {about['load']}."
    )
    text = "\n\n".join(
        (
            head,
            table("Member to member, MTU 1500", await between(*given), "members"),
            table("Out to the host, MTU 1500", await out(*given), "member"),
            table(f"Published port of a container, MTU {SUPER}", await published(*given), "attached"),
            crowd,
        )
    )
    print(text)
    if options.write is not None:
        before, _, rest = options.write.read_text(encoding="utf-8").partition(BEGIN)
        _, _, tail = rest.partition(END)
        options.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.members",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=1, help="that a sample takes (%(default)s)")
    parser.add_argument("--count", type=int, default=100, help="of members in the crowd (%(default)s)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    anyio.run(run, parser.parse_args())


if __name__ == "__main__":
    main()
