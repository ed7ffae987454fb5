"""The synchronous objects do what the async ones do."""

from __future__ import annotations

import asyncio
import copy
import inspect
import os
import pickle
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import anyio
import pytest
from typing_extensions import assert_type

import netns_kit
from netns_kit import (
    ArgumentTypeError,
    CommandFailed,
    NamespaceGone,
    NotFound,
    PortForward,
    Refusal,
    StackClosed,
    StaticLease,
    WrongEventLoop,
    sync,
)
from tests.support import Possessions, needs_tun, needs_userns
from tests.support.displays import checked

CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as client:
    client.sendall(b"hello")
    client.shutdown(socket.SHUT_WR)
    while data := client.recv(4096):
        sys.stdout.write(data.decode())
"""
ASK = """
import socket, sys
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(20)
client.connect((sys.argv[1], int(sys.argv[2])))
client.send(b"hello")
sys.stdout.write(client.recv(4096).decode())
"""
SERVER = """
import socket
server = socket.create_server(("0.0.0.0", 80))
print("listening", flush=True)
client, _ = server.accept()
client.sendall(client.recv(100).upper())
"""


def client(host: str, port: int) -> list[str]:
    return [sys.executable, "-c", CLIENT, host, str(port)]


def ask(host: str, port: int) -> list[str]:
    return [sys.executable, "-c", ASK, host, str(port)]


# -- commands --------------------------------------------------------------------------------------------


def test_a_command_is_run_with_each_driver(driven: sync.Network) -> None:
    assert driven.run(["cat", "/etc/resolv.conf"]).stdout.startswith(b"nameserver 10.0.2.3")
    assert driven.run("cat", input=b"told").stdout == b"told"
    with pytest.raises(CommandFailed):
        driven.run(["false"])


def test_the_streams_of_a_command(net: sync.Network) -> None:
    with net.popen(["cat"], stdin=PIPE, stdout=PIPE) as command:
        assert command.stdin is not None
        assert command.stdout is not None
        command.stdin.send(b"one")
        assert command.stdout.receive() == b"one"
        command.stdin.send(b"two")
        command.stdin.close()
        assert b"".join(command.stdout) == b"two"
        assert command.wait() == 0
        assert command.returncode == 0


def test_a_command_is_killed_at_the_end_of_its_block(net: sync.Network) -> None:
    with net.popen(["sleep", "600"]) as command:
        assert command.returncode is None
        command.terminate()
        assert command.wait() == -signal.SIGTERM
    with net.popen(["sleep", "600"]) as command:
        pass
    assert command.returncode == -signal.SIGKILL


# -- the five objects, and members -----------------------------------------------------------------------


def test_the_five_objects(left: None) -> None:
    needs_userns()
    needs_tun()
    with (
        sync.Namespace.create() as ns,
        sync.TapDevice.open(ns, "tap7") as tap,
        sync.UserStack(tap, sync.Uplink()) as stack,
        sync.Forwarder(stack) as forwarder,
    ):
        assert [each.name for each in ns.links()] == ["lo", "tap7"]
        assert tap.namespace is ns
        [port] = forwarder.add("127.0.0.1:0:80")
        assert_type(port, PortForward)
        with ns.popen([sys.executable, "-c", SERVER], stdout=PIPE) as server:
            assert server.stdout is not None
            assert server.stdout.receive() == b"listening\n"
            with socket.create_connection(("127.0.0.1", port.host_port), timeout=20) as connection:
                connection.sendall(b"shout")
                assert connection.recv(100) == b"SHOUT"
        with ns.listen_tcp(port=0) as listener:
            number = listener.extra(anyio.abc.SocketAttribute.local_port)
            assert isinstance(listener, sync.SocketListener)
            with ns.connect_tcp("127.0.0.1", number) as one, listener.accept() as other:
                one.send(b"inside")
                one.send_eof()
                assert list(other) == [b"inside"]
        with pytest.raises(NotFound):
            forwarder.remove(PortForward("tcp", port.host, 1, None, 1))


def test_a_pair_of_devices(left: None) -> None:
    ours, theirs = sync.TapDevice.pair()
    with ours, theirs, sync.UserStack(ours) as stack:
        assert isinstance(theirs, sync.TapDevice)
        assert stack.tap is ours
        assert stack.flows() == ()
        assert isinstance(theirs.impaired(netns_kit.Impairment(loss=0.5)), sync.ImpairedTap)


def test_members(net: sync.Network) -> None:
    with net.member("web", ports=["127.0.0.1:0:80"]) as web, net.member("db") as db:
        assert net.members == {"web": web, "db": db}
        assert net.members["web"] is web
        assert str(db.address).encode() in web.run("getent hosts db").stdout
        assert len(web.forwarder.list()) == 1
        kept = net.add_member("kept")
        net.remove_member(kept)
        assert kept not in net.members.values()


def test_the_way_out_of_another_namespace(left: None) -> None:
    needs_userns()
    with sync.Namespace.create() as ns:
        uplink = sync.NamespaceUplink(ns)
        assert isinstance(uplink, netns_kit.NamespaceUplink)
        with sync.Network(uplink=uplink) as net:
            assert net.stack.uplink is uplink


def test_an_application(left: None, tmp_path: Path) -> None:
    needs_userns()
    needs_tun()
    (tmp_path / "app.toml").write_text('[members.one]\ncommand = ["echo", "said"]\n')
    lines = list[str]()
    plan = sync.Composition.load(tmp_path / "app.toml")
    with sync.Application(plan, on_line=lambda line: lines.append(line.text)) as application:
        assert application.wait() == {"one": 0}
        assert [line.text for line in application.logs("one", follow=True)] == ["said"]
        assert [each.status for each in application.state()] == [0]
        assert isinstance(application.network, sync.Network)
        assert application.member("one") is application.members["one"]
    assert lines == ["said"]


# -- what goes through -----------------------------------------------------------------------------------


def test_plain_functions_serve(driven: sync.Network) -> None:
    names = list[str]()

    def serve(stream: sync.GuestStream) -> None:
        names.append(threading.current_thread().name)
        assert str(stream.extra(sync.FlowAttribute.local)) == "10.0.2.2:99"
        assert_type(driven.stack.flows(), netns_kit.Flows)
        [flow] = driven.stack.flows()  # it may call as anybody
        assert flow.id == stream.extra(sync.FlowAttribute.flow_id)
        for chunk in stream:
            stream.send(chunk.upper())

    def answer(datagrams: sync.GuestDatagrams) -> None:
        for each in datagrams:
            datagrams.send(each[::-1])

    with driven.stack.serve_tcp("10.0.2.2", 99, serve) as server:
        assert (server.port, server.transport) == (99, "tcp")
        assert driven.run(client("10.0.2.2", 99)).stdout == b"HELLO"
    with driven.stack.serve_udp("10.0.2.2", 99, handler=answer):
        assert driven.run(ask("10.0.2.2", 99)).stdout == b"olleh"
    assert names
    assert "MainThread" not in names
    assert "netns_kit.sync" not in names


def test_a_function_that_serves_and_fails_resets(net: sync.Network, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: sync.GuestStream) -> None:
        raise ZeroDivisionError

    def leave(_: sync.GuestStream) -> None:
        sys.exit()

    def interrupt(_: sync.GuestStream) -> None:
        raise KeyboardInterrupt

    def give_up(_: sync.GuestStream) -> None:
        pytest.fail("this is no Exception")

    for handler in fail, leave, interrupt, give_up:
        with net.stack.serve_tcp("10.0.2.2", 99, handler):
            assert net.run(client("10.0.2.2", 99), check=False).returncode == 1
    for said in "ZeroDivisionError", "SystemExit", "KeyboardInterrupt", "this is no Exception":
        assert said in caplog.text
    assert net.run(["true"]).returncode == 0, "the event loop is there still"


def test_a_connection_ends_when_its_server_does(net: sync.Network) -> None:
    begun, ended = threading.Event(), threading.Event()

    def serve(stream: sync.GuestStream) -> None:
        begun.set()
        try:
            while True:
                stream.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
            ended.set()

    server = net.stack.serve_tcp("10.0.2.2", 99, serve)
    with net.popen(["bash", "-c", "exec 3<>/dev/tcp/10.0.2.2/99; cat <&3"]) as command:
        assert begun.wait(20)
        server.close()
        assert ended.wait(20)
        assert command.wait() == 1


def test_plain_functions_intercept(net: sync.Network) -> None:
    seen = list[str | None]()

    def handler(stream: sync.InterceptedStream) -> None:
        assert isinstance(stream, sync.GuestStream)
        seen.append(stream.asked_name())
        seen.append(stream.receive().decode())
        stream.send(b"intercepted")

    with net.stack.intercept("192.0.2.1", handler, ports=80, protocol="tcp"):
        assert net.run(client("192.0.2.1", 80)).stdout == b"intercepted"
    assert seen == [None, "hello"]


def test_a_plain_function_decides_about_flows(left: None) -> None:
    needs_userns()
    needs_tun()
    asked = list[str]()

    def on_flow(flow: sync.FlowRequest) -> Refusal:
        asked.append(str(flow.remote))
        return Refusal.RESET

    policy = sync.Policy.deny().ask("192.0.2.0/24")
    with sync.Network(policy=policy, on_flow=on_flow) as net:
        done = net.run(client("192.0.2.1", 80), check=False)
        assert b"ConnectionRefusedError" in done.stderr
    assert asked == ["192.0.2.1:80"]


def test_a_port_inside_that_leads_to_a_plain_function(net: sync.Network) -> None:
    def serve(stream: sync.SocketStream) -> None:
        assert stream.receive() == b"hello"
        stream.send(b"from outside")

    forward = net.forwarder.reverse("127.0.0.1:0", serve)
    assert net.run(client("127.0.0.1", forward.inside_port)).stdout == b"from outside"
    net.forwarder.remove(forward)


def test_a_fake_internet(left: None) -> None:
    needs_userns()
    needs_tun()
    fake = sync.FakeInternet()
    api = fake.host("api.example.org")

    @api.tcp(80)
    def serve(stream: sync.GuestStream) -> None:
        stream.send(stream.receive().upper())

    with sync.Network(uplink=fake, ports=["8000:80"]) as net:
        assert net.run(client("api.example.org", 80)).stdout == b"HELLO"
        assert net.run(client("api.example.org", 81), check=False).returncode == 1
        assert fake["api.example.org"] is api
        assert [flow.host for flow in fake.flows] == [api, api]
        assert {query.name for query in fake.queries} == {"api.example.org"}
        api.ping = False
        assert not api.ping
        api.down()
        assert not api.is_up
        with net.popen([sys.executable, "-c", SERVER], stdout=PIPE) as server:
            assert server.stdout is not None
            server.stdout.receive()
            with api.connect_tcp(8000) as stream:
                stream.send(b"shout")
                assert stream.receive() == b"SHOUT"


def test_events(net: sync.Network) -> None:
    def serve(stream: sync.GuestStream) -> None:
        list(stream)

    kinds = list[str]()
    with (
        net.stack.serve_tcp("10.0.2.2", 99, serve),
        net.stack.events() as events,
        ThreadPoolExecutor(1) as others,
    ):
        following = others.submit(next, events)
        while not kinds:
            net.run(client("10.0.2.2", 99))
            if following.done():
                kinds.append(following.result().kind)
        for event in events:
            kinds.append(event.kind)
            if "closed" in kinds:
                break
    assert kinds[0] == "opened"
    with pytest.raises(StopIteration):
        next(events)


def test_captures_faults_and_figures(net: sync.Network, tmp_path: Path) -> None:
    path = tmp_path / "seen.pcapng"
    with net.stack.capture(path) as capture, net.faults(delay=0.01) as faults:
        net.run(["bash", "-c", "getent hosts host.containers.internal || true"])
        assert faults.counts()["out_frames"] > 0
    assert capture.frames > 0
    assert capture.size == path.stat().st_size
    assert net.stack.stats()["dns_owned"] > 0
    net.stack.reserve(StaticLease("10.0.2.50", mac="52:54:00:12:34:56"))
    assert [str(each.address) for each in net.stack.leases()] == ["10.0.2.50"]
    net.stack.add_record("db.internal=192.0.2.7")
    assert b"192.0.2.7" in net.run("getent hosts db.internal").stdout
    assert net.stack.sandbox == {}


# -- the objects as such ---------------------------------------------------------------------------------


def test_what_they_are(net: sync.Network) -> None:
    assert isinstance(net, sync.Network)
    assert not isinstance(net, netns_kit.Network)
    assert isinstance(net.stack, sync.UserStack)
    assert net.stack is net.stack
    assert repr(net) == "<sync Network 10.0.2.0/24: open>"
    assert "10.0.2.100" in str(net)
    assert "10.0.2.100" in net._repr_html_()
    assert str(net.tap) == repr(net.tap)
    assert {"run", "popen", "stack", "namespace"} <= set(dir(net))
    assert not [name for name in dir(net) if name in ("supervisor", "ask", "guests", "member_of")]
    for act in pickle.dumps, copy.copy, copy.deepcopy:
        with pytest.raises(TypeError, match="cannot pickle or copy a Network: it is in use"):
            act(net)
    with pytest.raises(TypeError, match="a Process is made by calls of other objects"):
        sync.Process()
    with pytest.raises(ArgumentTypeError, match="mtu='big'"):
        sync.Network(mtu="big")  # type: ignore[arg-type]  # a mistake


def test_help_and_completion_see_signatures() -> None:
    signature = inspect.signature(sync.Network.run)
    assert list(signature.parameters)[:4] == ["self", "command", "input", "check"]
    assert signature == inspect.signature(netns_kit.Network.run)
    assert list(inspect.signature(sync.open_network).parameters) == list(
        inspect.signature(netns_kit.Network).parameters
    )
    assert str(inspect.signature(sync.UserStack.events)).endswith("-> 'Iteration[Event]'")
    assert "task_status" not in inspect.signature(sync.UserStack.log_events).parameters
    assert sync.Network.run.__qualname__ == "Network.run"
    assert "Run a command to its end" in str(sync.Network.run.__doc__)
    for each in sync.Network, sync.Network.run, sync.UserStack.serve_tcp, sync.UserStack.capture:
        assert "async" not in str(each.__doc__)
        assert "await" not in str(each.__doc__)
        assert "Cancellation" not in str(each.__doc__)


def test_async_functions_are_refused(net: sync.Network) -> None:
    async def handler(_: object) -> None: ...

    with pytest.raises(ArgumentTypeError, match=r"handler=.*: expected a plain function; write `def`"):
        net.stack.serve_tcp("10.0.2.2", 99, handler)


def test_errors_are_those_of_the_async_objects(left: None) -> None:
    net = sync.Network()
    with pytest.raises(NamespaceGone, match="enter it with `with`, or call its open\\(\\) first"):
        net.run(["true"])
    net.open()
    os.kill(net.namespace.pid, signal.SIGKILL)
    with pytest.raises(NamespaceGone):
        net.wait_closed()  # it happens in the background, and surfaces in the next call
    with pytest.raises(NamespaceGone):
        net.stack.flows()
    with pytest.raises(NamespaceGone):
        net.close()
    net.close()


def test_an_error_of_the_block_comes_first(left: None) -> None:
    needs_userns()
    needs_tun()
    with pytest.raises(ZeroDivisionError), sync.Network() as net:
        raise ZeroDivisionError
    assert "closed" in repr(net)


def test_threads_call_at_the_same_time(net: sync.Network) -> None:
    def run(number: int) -> bytes:
        return net.run(["echo", str(number)]).stdout

    with ThreadPoolExecutor(4) as others:
        assert list(others.map(run, range(12))) == [f"{number}\n".encode() for number in range(12)]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_within_an_event_loop(left: None, backend: str) -> None:
    needs_userns()
    needs_tun()

    async def main() -> bytes:
        with sync.Network() as net:
            return net.run(["echo", "there"]).stdout

    assert anyio.run(main, backend=backend) == b"there\n"


def test_on_its_own_event_loop_a_call_is_refused(net: sync.Network) -> None:
    said = list[BaseException]()

    def policy(_: sync.Flow) -> Refusal:
        try:
            net.stack.flows()
        except WrongEventLoop as error:
            said.append(error)
        return Refusal.RESET

    with sync.Network(uplink=sync.Uplink(policy=policy), driver="loop") as other:
        other.run(client("192.0.2.1", 9), check=False)
    assert "called on the event loop of netns_kit.sync" in str(said[0])


def test_a_forked_child_has_networks_of_its_own(net: sync.Network) -> None:
    reader, writer = os.pipe()
    events = net.stack.events()
    pid = os.fork()
    if not pid:
        try:
            try:
                net.run(["true"])
            except WrongEventLoop as error:
                os.write(writer, f"{error}\n".encode())
            with sync.Network() as another:
                os.write(writer, another.run(["echo", "own"]).stdout)
            events.close()
            net.close()
            os.write(writer, f"{checked(net)[0].splitlines()[0]}\n".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as said:
        refused, own, shown = said.read().splitlines()
    os.waitpid(pid, 0)
    assert refused.startswith("the Network was made before this process was forked; make a new one")
    assert own == "own"
    assert shown == "Network 10.0.2.0/24: open", "nothing of the parent's is closed"
    events.close()
    assert net.run(["echo", "there"]).stdout == b"there\n"


def test_a_lost_iteration_is_closed(loop: None) -> None:
    needs_userns()
    needs_tun()
    before = Possessions()
    with sync.Network() as net, net.stack.events():
        pass
    assert not before.difference()


def test_the_loop_is_asyncio_of_a_thread_of_its_own(net: sync.Network) -> None:
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
    assert "netns_kit.sync" in {each.name for each in threading.enumerate()}


def test_a_block_of_an_open_network_closes_it(left: None) -> None:
    with sync.open_network() as net:
        assert net.run(["echo", "here"]).stdout == b"here\n"
    assert "closed" in repr(net)


def test_closed_twice_and_stack_first(left: None) -> None:
    net = sync.open_network()
    net.stack.close()
    with pytest.raises(StackClosed):
        net.stack.flows()
    net.close()
    net.close()
