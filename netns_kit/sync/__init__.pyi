# `python -m tests.sync_stub` writes this file.
import builtins as _builtins
import os as _os
import socket as _socket
import subprocess as _subprocess
from collections import deque as _deque
from collections.abc import Callable, Iterator
from collections.abc import Callable as _Callable
from collections.abc import Iterable as _Iterable
from collections.abc import Mapping as _Mapping
from collections.abc import Sequence as _Sequence
from ipaddress import IPv4Address as _IPv4Address
from ipaddress import IPv4Interface as _IPv4Interface
from ipaddress import IPv4Network as _IPv4Network
from ipaddress import IPv6Address as _IPv6Address
from ipaddress import IPv6Interface as _IPv6Interface
from subprocess import CompletedProcess as _CompletedProcess
from types import TracebackType as _TracebackType
from typing import Any as _Any
from typing import BinaryIO as _BinaryIO
from typing import Generic, TypeAlias, TypeVar
from typing import Literal as _Literal
from typing import TextIO as _TextIO

from anyio._core._typedattr import T_Attr as _T_Attr
from typing_extensions import Self

from netns_kit import DNS_ELSEWHERE as DNS_ELSEWHERE
from netns_kit import HOST as HOST
from netns_kit import LINK_LOCAL as LINK_LOCAL
from netns_kit import LOOPBACK as LOOPBACK
from netns_kit import METADATA as METADATA
from netns_kit import MULTICAST as MULTICAST
from netns_kit import PRIVATE as PRIVATE
from netns_kit import AddedLink as AddedLink
from netns_kit import AddressError as AddressError
from netns_kit import AddressLike as AddressLike
from netns_kit import AlreadyOpened as AlreadyOpened
from netns_kit import ArgumentError as ArgumentError
from netns_kit import ArgumentTypeError as ArgumentTypeError
from netns_kit import Askable as Askable
from netns_kit import CapturedPacket as CapturedPacket
from netns_kit import CaptureError as CaptureError
from netns_kit import CaptureFilter as CaptureFilter
from netns_kit import CaptureOptions as CaptureOptions
from netns_kit import CaptureProtocol as CaptureProtocol
from netns_kit import ChooserRule as ChooserRule
from netns_kit import ChooserUplink as ChooserUplink
from netns_kit import Command as Command
from netns_kit import CommandFailed as CommandFailed
from netns_kit import CommandOptions as CommandOptions
from netns_kit import Composition as Composition
from netns_kit import Configure as Configure
from netns_kit import Dependency as Dependency
from netns_kit import Device as Device
from netns_kit import DeviceGone as DeviceGone
from netns_kit import DhcpSettings as DhcpSettings
from netns_kit import Dial as Dial
from netns_kit import DnsFault as DnsFault
from netns_kit import DnsQuery as DnsQuery
from netns_kit import DnsRefusal as DnsRefusal
from netns_kit import DnsSettings as DnsSettings
from netns_kit import DomainNameError as DomainNameError
from netns_kit import DriverName as DriverName
from netns_kit import Ending as Ending
from netns_kit import Endpoint as Endpoint
from netns_kit import Event as Event
from netns_kit import EventLogError as EventLogError
from netns_kit import Explanation as Explanation
from netns_kit import FakeQuery as FakeQuery
from netns_kit import FaultDirection as FaultDirection
from netns_kit import FaultOptions as FaultOptions
from netns_kit import Faults as Faults
from netns_kit import FeatureUnavailable as FeatureUnavailable
from netns_kit import FileMode as FileMode
from netns_kit import Finding as Finding
from netns_kit import Flow as Flow
from netns_kit import FlowAnswer as FlowAnswer
from netns_kit import FlowAttribute as FlowAttribute
from netns_kit import FlowEvent as FlowEvent
from netns_kit import FlowEventKind as FlowEventKind
from netns_kit import FlowInfo as FlowInfo
from netns_kit import FlowRequest as FlowRequest
from netns_kit import Flows as Flows
from netns_kit import Follow as Follow
from netns_kit import HasFileno as HasFileno
from netns_kit import Hook as Hook
from netns_kit import Host as Host
from netns_kit import HttpConnectUplink as HttpConnectUplink
from netns_kit import IdMapError as IdMapError
from netns_kit import Ids as Ids
from netns_kit import Impairment as Impairment
from netns_kit import IndirectUplink as IndirectUplink
from netns_kit import Interface as Interface
from netns_kit import InterfaceAddress as InterfaceAddress
from netns_kit import Ipvlan as Ipvlan
from netns_kit import Layer as Layer
from netns_kit import Lease as Lease
from netns_kit import Limits as Limits
from netns_kit import Listen as Listen
from netns_kit import ListeningSocket as ListeningSocket
from netns_kit import LogLine as LogLine
from netns_kit import Macvlan as Macvlan
from netns_kit import Manner as Manner
from netns_kit import MemberOptions as MemberOptions
from netns_kit import MemberPlan as MemberPlan
from netns_kit import MemberState as MemberState
from netns_kit import Mode as Mode
from netns_kit import NamespaceGone as NamespaceGone
from netns_kit import NamespaceSnapshot as NamespaceSnapshot
from netns_kit import NamespaceUplink as NamespaceUplink
from netns_kit import NetnsKitError as NetnsKitError
from netns_kit import NotFound as NotFound
from netns_kit import NotImportable as NotImportable
from netns_kit import NotPrivileged as NotPrivileged
from netns_kit import Offloads as Offloads
from netns_kit import OpenedTap as OpenedTap
from netns_kit import OpenFile as OpenFile
from netns_kit import OwnNamespace as OwnNamespace
from netns_kit import Packets as Packets
from netns_kit import Pids as Pids
from netns_kit import PingNotPermitted as PingNotPermitted
from netns_kit import Policy as Policy
from netns_kit import PolicyError as PolicyError
from netns_kit import PolicyHits as PolicyHits
from netns_kit import PortForward as PortForward
from netns_kit import PortInUseError as PortInUseError
from netns_kit import PortSpecError as PortSpecError
from netns_kit import Preset as Preset
from netns_kit import PrivilegedPortError as PrivilegedPortError
from netns_kit import ProcessInfo as ProcessInfo
from netns_kit import ProxyNames as ProxyNames
from netns_kit import ProxyOptions as ProxyOptions
from netns_kit import ProxyResolvers as ProxyResolvers
from netns_kit import QueryEvent as QueryEvent
from netns_kit import Rcode as Rcode
from netns_kit import Record as Record
from netns_kit import RecordError as RecordError
from netns_kit import Refusal as Refusal
from netns_kit import RefusalName as RefusalName
from netns_kit import Report as Report
from netns_kit import ReverseForward as ReverseForward
from netns_kit import Route as Route
from netns_kit import Rule as Rule
from netns_kit import RuleAction as RuleAction
from netns_kit import RuleHits as RuleHits
from netns_kit import RulePorts as RulePorts
from netns_kit import RuleTarget as RuleTarget
from netns_kit import RunningProcess as RunningProcess
from netns_kit import RunOptions as RunOptions
from netns_kit import SandboxLayer as SandboxLayer
from netns_kit import SandboxUnavailable as SandboxUnavailable
from netns_kit import Socks5Uplink as Socks5Uplink
from netns_kit import StackClosed as StackClosed
from netns_kit import StackCrashed as StackCrashed
from netns_kit import StackOptions as StackOptions
from netns_kit import StandardStream as StandardStream
from netns_kit import StaticLease as StaticLease
from netns_kit import Stats as Stats
from netns_kit import Subnet as Subnet
from netns_kit import Subnet6 as Subnet6
from netns_kit import SysctlError as SysctlError
from netns_kit import TapCounters as TapCounters
from netns_kit import Target as Target
from netns_kit import TcpConversation as TcpConversation
from netns_kit import TcpConversations as TcpConversations
from netns_kit import Transport as Transport
from netns_kit import TunUnavailable as TunUnavailable
from netns_kit import UdpAssociation as UdpAssociation
from netns_kit import UdpFiltering as UdpFiltering
from netns_kit import UdpPorts as UdpPorts
from netns_kit import UnixSocket as UnixSocket
from netns_kit import Uplink as Uplink
from netns_kit import UplinkOptions as UplinkOptions
from netns_kit import UserNamespaceDenied as UserNamespaceDenied
from netns_kit import Verdict as Verdict
from netns_kit import Veth as Veth
from netns_kit import Vlan as Vlan
from netns_kit import Way as Way
from netns_kit import Word as Word
from netns_kit import WrongEventLoop as WrongEventLoop
from netns_kit import activated as activated
from netns_kit import choose as choose
from netns_kit import doctor as doctor
from netns_kit import read_capture as read_capture
from netns_kit.namespace.listening import SocketDiagnostics as _SocketDiagnostics

_T = TypeVar("_T")
_Function = TypeVar("_Function", bound=Callable[..., object])

class Iteration(Iterator[_T], Generic[_T]):
    def __next__(self) -> _T: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

OnFlow: TypeAlias = Callable[[FlowRequest], FlowAnswer]
StreamHandler: TypeAlias = Callable[[SocketStream], object]
TcpGuestHandler: TypeAlias = Callable[[GuestStream], object]
TcpInterceptHandler: TypeAlias = Callable[[InterceptedStream], object]
UdpGuestHandler: TypeAlias = Callable[[GuestDatagrams], object]
UdpInterceptHandler: TypeAlias = Callable[[InterceptedDatagrams], object]

class Application:
    def __init__(
        self,
        composition: Composition,
        *,
        on_line: _Callable[[LogLine], object] | None = ...,
        on_notice: _Callable[[str], object] | None = ...,
    ) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: _TracebackType | None
    ) -> None: ...
    def close(self) -> None: ...
    composition: Composition
    def logs(self, *members: str, follow: bool = ...) -> Iteration[LogLine]: ...
    def member(self, name: str) -> Member: ...
    @property
    def members(self) -> dict[str, Member]: ...
    network: Network
    def open(self) -> Self: ...
    def restart(self, member: str) -> None: ...
    def state(self) -> tuple[MemberState, ...]: ...
    def wait(self) -> dict[str, int]: ...
    def wait_closed(self) -> None: ...

class Capture:
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: object, error: object, trace: object) -> None: ...
    def _repr_html_(self) -> str: ...
    def _repr_pretty_(self, printer: _Any, cycle: bool) -> None: ...
    @property
    def condition(self) -> str: ...
    def dump(self, target: str | _os.PathLike[str] | _BinaryIO) -> None: ...
    def end_with_member(self) -> None: ...
    ended: _Literal["bytes", "seconds", "error", "member"] | None
    frames: int
    is_over: bool
    lost: int
    def packets(self) -> Packets: ...
    paths: _deque[str]
    @property
    def size(self) -> int: ...

class FakeFlow:
    guest: Endpoint
    host: FakeHost | None
    protocol: Transport
    refused: Refusal | None
    remote: Endpoint

class FakeHost:
    addresses: tuple[_IPv4Address | _IPv6Address, ...]
    def alias(self, *names: str) -> None: ...
    def connect_tcp(self, port: int, *, stack: UserStack | None = ...) -> GuestStream: ...
    def down(self, how: Refusal = ...) -> None: ...
    @property
    def is_up(self) -> bool: ...
    names: tuple[str, ...]
    ping: bool
    def refuse_tcp(self, port: int | None, how: Refusal = ...) -> None: ...
    def refuse_udp(self, port: int | None, how: Refusal = ...) -> None: ...
    def serve_tcp(self, port: int | None, handler: TcpGuestHandler) -> None: ...
    def serve_udp(self, port: int | None, handler: UdpGuestHandler) -> None: ...
    def tcp(self, port: int | None) -> _Callable[[_Function], _Function]: ...
    def udp(self, port: int | None) -> _Callable[[_Function], _Function]: ...
    def up(self) -> None: ...

class FakeInternet:
    def __init__(
        self,
        *,
        policy: Policy | _Callable[[Flow], Refusal | None] | None = ...,
        any_source: bool = ...,
        search: _Iterable[str] = ...,
        unknown: Refusal = ...,
    ) -> None: ...
    def __getitem__(self, name: AddressLike) -> FakeHost: ...
    def _repr_html_(self) -> str: ...
    def _repr_pretty_(self, printer: _Any, cycle: bool) -> None: ...
    def add_record(self, record: str | Record) -> Record: ...
    flows: _deque[FakeFlow]
    def host(self, *names: str, addresses: _Iterable[AddressLike] | None = ...) -> FakeHost: ...
    queries: _deque[FakeQuery]
    def remove(self, host: FakeHost) -> None: ...
    def remove_record(self, name: str, *, type: str = ..., value: AddressLike = ...) -> None: ...

class FaultsBlock:
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def counts(self) -> dict[str, int]: ...
    def end_with_member(self) -> None: ...
    ended: _Literal["member"] | None
    @property
    def is_over(self) -> bool: ...
    script: tuple[tuple[float, Faults], ...]

class Forwarder:
    def __init__(self, stack: UserStack) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: _TracebackType | None
    ) -> None: ...
    def _repr_html_(self) -> str: ...
    def _repr_pretty_(self, printer: _Any, cycle: bool) -> None: ...
    def add(self, *specs: str | PortForward | Follow, mode: Mode | None = ...) -> tuple[PortForward, ...]: ...
    def adopt(
        self,
        sock: _socket.socket,
        guest_port: int | None = ...,
        guest: AddressLike | UnixSocket | None = ...,
        *,
        mode: Mode | None = ...,
    ) -> PortForward: ...
    def close(self) -> None: ...
    def follows(self) -> dict[Follow, tuple[PortForward, ...]]: ...
    @property
    def known(self) -> tuple[tuple[PortForward, ...], tuple[Follow, ...], tuple[ReverseForward, ...]]: ...
    def list(self) -> tuple[PortForward, ...]: ...
    def open(self) -> Self: ...
    def remove(self, forward: PortForward | Follow | ReverseForward, *, cut: bool = ...) -> None: ...
    def reverse(
        self,
        inside: str | Endpoint | UnixSocket | ReverseForward,
        to: str | Endpoint | UnixSocket | StreamHandler | None = ...,
        *,
        protocol: _Literal["tcp", "udp"] = ...,
    ) -> ReverseForward: ...
    def reverses(self) -> tuple[ReverseForward, ...]: ...
    def sockets(self) -> tuple[tuple[str, HasFileno], ...]: ...
    def wait_closed(self) -> None: ...

class GuestDatagrams:
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: _TracebackType | None,
    ) -> None: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> bytes: ...
    def close(self) -> None: ...
    def extra(self, attribute: _T, default: object = ...) -> _T: ...
    @property
    def extra_attributes(self) -> _Mapping[_Any, _Callable[[], _Any]]: ...
    def receive(self) -> bytes: ...
    def send(self, item: bytes) -> None: ...

class GuestServer:
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def close(self) -> None: ...
    address: _IPv4Address | _IPv6Address | None
    port: int
    transport: _Literal["tcp", "udp"]

class GuestStream:
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: object, *_: object) -> None: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> bytes: ...
    def close(self) -> None: ...
    def extra(self, attribute: _T, default: object = ...) -> _T: ...
    @property
    def extra_attributes(self) -> _Mapping[_Any, _Callable[[], _Any]]: ...
    def receive(self, max_bytes: int = ...) -> bytes: ...
    def send(self, item: bytes) -> None: ...
    def send_eof(self) -> None: ...

class ImpairedTap:
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: object, error: object, trace: object) -> None: ...
    def advance(self, now: float) -> None: ...
    def at(self, fd: int) -> ImpairedTap: ...
    @property
    def backlog(self) -> bool: ...
    def close(self) -> None: ...
    @property
    def counters(self) -> TapCounters: ...
    @property
    def deadline(self) -> float: ...
    def fileno(self) -> int: ...
    def flush(self) -> None: ...
    @property
    def mac(self) -> bytes | None: ...
    @property
    def mtu(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def namespace(self) -> Namespace | None: ...
    @property
    def offloads(self) -> Offloads: ...
    @property
    def queues(self) -> tuple[TapDevice | ImpairedTap, ...]: ...
    def read_into(self, buffer: memoryview | bytearray) -> int | None: ...
    def release(self) -> None: ...
    def write(self, *buffers: bytes | bytearray | memoryview) -> bool: ...

class InterceptedDatagrams(GuestDatagrams):
    def close(self) -> None: ...
    def connect_upstream(
        self, address: AddressLike | None = ..., port: int | None = ...
    ) -> UpstreamDatagrams: ...
    is_joined: bool
    def join(self) -> None: ...

class InterceptedStream(GuestStream):
    def close(self) -> None: ...
    def asked_name(self) -> str | None: ...
    def connect_upstream(
        self, address: AddressLike | None = ..., port: int | None = ...
    ) -> UpstreamStream: ...
    is_joined: bool
    def join(self, upstream: UpstreamStream | None = ...) -> None: ...
    def peek(self, size: int = ...) -> bytes: ...
    def receive(self, max_bytes: int = ...) -> bytes: ...
    def send(self, item: bytes) -> None: ...
    def send_eof(self) -> None: ...

class Interceptor:
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def close(self) -> None: ...
    rule: Rule
    transport: _Literal["tcp", "udp"]

class Member:
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: _TracebackType | None
    ) -> None: ...
    def _repr_html_(self) -> str: ...
    def _repr_pretty_(self, printer: _Any, cycle: bool) -> None: ...
    @property
    def address(self) -> _IPv4Address: ...
    @property
    def address6(self) -> _IPv6Address | None: ...
    @property
    def addresses(self) -> tuple[_IPv4Address | _IPv6Address, ...]: ...
    aliases: tuple[str, ...]
    def capture(
        self,
        target: str | _os.PathLike[str] | _BinaryIO | None,
        *,
        where: CaptureFilter | RuleTarget | _Iterable[RuleTarget] | None = ...,
        snaplen: int = ...,
        max_bytes: int | None = ...,
        max_seconds: float | None = ...,
        files: int | None = ...,
        processes: bool = ...,
    ) -> Capture: ...
    def close(self) -> None: ...
    def connect_tcp(self, port: int, *, source: AddressLike | None = ...) -> GuestStream: ...
    def events(self, *, processes: bool = ...) -> Iteration[Event]: ...
    def faults(
        self,
        faults: Faults | None = ...,
        *,
        script: _Iterable[tuple[float, Faults]] | None = ...,
        loss: float = ...,
        delay: float = ...,
        jitter: float = ...,
        rate: str | None = ...,
        reorder: float = ...,
        duplicate: float = ...,
        corrupt: float = ...,
        queue: int = ...,
        blackhole: bool = ...,
        refuse: bool = ...,
        reset_after: int | None = ...,
        dns: DnsFault | None = ...,
        dns_delay: float = ...,
        direction: FaultDirection = ...,
        to: RuleTarget | _Iterable[RuleTarget] = ...,
        ports: RulePorts | None = ...,
        protocol: Transport | None = ...,
        seed: int = ...,
    ) -> FaultsBlock: ...
    def files(self) -> dict[str, str]: ...
    def flows(self) -> Flows: ...
    forwarder: Forwarder
    ifname: str
    @property
    def is_attached(self) -> bool: ...
    @property
    def known_addresses(self) -> tuple[_IPv4Address | _IPv6Address, ...]: ...
    link: str
    def log_events(self, target: str | _os.PathLike[str] | _TextIO, *, processes: bool = ...) -> None: ...
    @property
    def mac(self) -> str: ...
    name: str
    namespace: Namespace
    def open(self) -> Self: ...
    policy: Policy | None
    def policy_hits(self) -> PolicyHits | None: ...
    def popen(
        self,
        command: Command,
        *,
        stdin: StandardStream = ...,
        stdout: StandardStream = ...,
        stderr: StandardStream = ...,
        cwd: Word | None = ...,
        env: _Mapping[str, str] | None = ...,
        start_new_session: bool = ...,
        foreground: bool = ...,
        pass_fds: _Sequence[int] = ...,
        files: _Mapping[str, str | bytes] | None = ...,
        listen: Listen | None = ...,
        open_files: _Mapping[str, OpenFile] | None = ...,
        sockets: _Mapping[str, Word] | None = ...,
    ) -> Process: ...
    def run(
        self,
        command: Command,
        *,
        stdin: StandardStream = ...,
        stdout: StandardStream = ...,
        stderr: StandardStream = ...,
        cwd: Word | None = ...,
        env: _Mapping[str, str] | None = ...,
        start_new_session: bool = ...,
        foreground: bool = ...,
        pass_fds: _Sequence[int] = ...,
        files: _Mapping[str, str | bytes] | None = ...,
        listen: Listen | None = ...,
        open_files: _Mapping[str, OpenFile] | None = ...,
        sockets: _Mapping[str, Word] | None = ...,
        input: bytes | None = ...,
        check: bool = ...,
    ) -> _CompletedProcess[bytes]: ...
    def set_policy(self, policy: Policy | None, existing: _Literal["keep", "cut"] = ...) -> None: ...
    @property
    def subnet(self) -> Subnet: ...
    def wait_closed(self) -> None: ...

class Namespace:
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: _TracebackType | None
    ) -> None: ...
    def _repr_html_(self) -> str: ...
    def _repr_pretty_(self, printer: _Any, cycle: bool) -> None: ...
    def add_link(self, name: str, link: AddedLink) -> None: ...
    def addresses(self) -> tuple[InterfaceAddress, ...]: ...
    def allow_unix(self, address: str, *, wanted: bool) -> None: ...
    @classmethod
    def attach(
        cls,
        *,
        pid: int | None = ...,
        path: str | _os.PathLike[str] | None = ...,
        fd: int | None = ...,
        pids: Pids | None = ...,
        allow_current: bool = ...,
    ) -> Namespace: ...
    def close(self) -> None: ...
    def configure_link(
        self,
        name: str,
        *,
        mtu: int | None = ...,
        mac: str | None = ...,
        queue: int | None = ...,
        address: _IPv4Interface | None = ...,
        gateway: _IPv4Address | None = ...,
        address6: _IPv6Interface | None = ...,
        gateway6: _IPv6Address | None = ...,
        neighbours: _Mapping[_IPv4Address | _IPv6Address, bytes] | None = ...,
    ) -> str | None: ...
    def connect_tcp(self, host: AddressLike, port: int) -> SocketStream: ...
    @classmethod
    def create(cls, *, ids: Ids = ..., pids: Pids | None = ...) -> Namespace: ...
    @classmethod
    def current(cls) -> Namespace: ...
    def diagnostics(self) -> _SocketDiagnostics: ...
    def get_sysctl(self, name: str) -> str: ...
    def links(self) -> tuple[Interface, ...]: ...
    def listen_tcp(
        self, host: AddressLike = ..., port: int = ..., *, backlog: int = ...
    ) -> SocketListener: ...
    def listening(self) -> tuple[ListeningSocket, ...]: ...
    def listening_socket(
        self, protocol: _Literal["tcp", "udp"], host: AddressLike, port: int, *, backlog: int = ...
    ) -> _socket.socket: ...
    def move_link_in(self, name: str) -> None: ...
    def open(self) -> Self: ...
    def open_tap(self, name: str, flags: _Sequence[int], queues: int = ...) -> OpenedTap: ...
    @property
    def origin(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def pids(self) -> Pids: ...
    def popen(
        self,
        command: Command,
        *,
        stdin: StandardStream = ...,
        stdout: StandardStream = ...,
        stderr: StandardStream = ...,
        cwd: Word | None = ...,
        env: _Mapping[str, str] | None = ...,
        start_new_session: bool = ...,
        foreground: bool = ...,
        pass_fds: _Sequence[int] = ...,
        files: _Mapping[str, str | bytes] | None = ...,
        listen: Listen | None = ...,
        open_files: _Mapping[str, OpenFile] | None = ...,
        sockets: _Mapping[str, Word] | None = ...,
    ) -> Process: ...
    def prepare_transparent(self, *, ipv6: bool) -> None: ...
    def process_of(
        self,
        protocol: _Literal["tcp", "udp", "icmp"],
        local: tuple[AddressLike, int],
        remote: tuple[AddressLike, int],
    ) -> ProcessInfo | None: ...
    def rewrite_files(self, files: _Mapping[str, str]) -> None: ...
    def route_answers(self, family: int, port: int, *, wanted: bool) -> None: ...
    def routes(self) -> tuple[Route, ...]: ...
    def run(
        self,
        command: Command,
        *,
        input: bytes | None = ...,
        check: bool = ...,
        stdin: StandardStream = ...,
        stdout: StandardStream = ...,
        stderr: StandardStream = ...,
        cwd: Word | None = ...,
        env: _Mapping[str, str] | None = ...,
        start_new_session: bool = ...,
        foreground: bool = ...,
        pass_fds: _Sequence[int] = ...,
        files: _Mapping[str, str | bytes] | None = ...,
        listen: Listen | None = ...,
        open_files: _Mapping[str, OpenFile] | None = ...,
        sockets: _Mapping[str, Word] | None = ...,
    ) -> _subprocess.CompletedProcess[bytes]: ...
    def set_sysctl(self, name: str, value: str | int) -> None: ...
    def snapshot(self) -> NamespaceSnapshot: ...
    def socket(self, family: int, type: int, proto: int = ...) -> _socket.socket: ...
    def wait_closed(self) -> None: ...

class Network:
    def __init__(
        self,
        *,
        uplink: Uplink | FakeInternet | None = ...,
        ports: _Iterable[str | PortForward | Follow] = ...,
        reverse: _Iterable[str | ReverseForward] = ...,
        ifname: str = ...,
        mtu: int = ...,
        queues: int = ...,
        namespace: Namespace | None = ...,
        internal: bool = ...,
        isolate: bool = ...,
        guard: bool = ...,
        subnet: str | _IPv4Network = ...,
        ipv6: bool | Subnet6 = ...,
        driver: DriverName = ...,
        configure: Configure = ...,
        limits: Limits | None = ...,
        dhcp: DhcpSettings | None = ...,
        require: _Iterable[SandboxLayer] = ...,
        records: _Iterable[str | Record] = ...,
        intercept_dns: bool = ...,
        name: str | None = ...,
        policy: Policy | None = ...,
        on_flow: OnFlow | None = ...,
        on_flow_timeout: float = ...,
    ) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: _TracebackType | None
    ) -> None: ...
    def _repr_html_(self) -> str: ...
    def _repr_pretty_(self, printer: _Any, cycle: bool) -> None: ...
    def add_member(
        self,
        name: str,
        *,
        aliases: _Iterable[str] = ...,
        address: AddressLike | None = ...,
        mac: str | None = ...,
        ports: _Iterable[str | PortForward | Follow] = ...,
        policy: Policy | None = ...,
        ifname: str | None = ...,
        ids: Ids = ...,
        namespace: Namespace | None = ...,
    ) -> Member: ...
    def close(self) -> None: ...
    def faults(
        self,
        faults: Faults | None = ...,
        *,
        script: _Iterable[tuple[float, Faults]] | None = ...,
        loss: float = ...,
        delay: float = ...,
        jitter: float = ...,
        rate: str | None = ...,
        reorder: float = ...,
        duplicate: float = ...,
        corrupt: float = ...,
        queue: int = ...,
        blackhole: bool = ...,
        refuse: bool = ...,
        reset_after: int | None = ...,
        dns: DnsFault | None = ...,
        dns_delay: float = ...,
        direction: FaultDirection = ...,
        to: RuleTarget | _Iterable[RuleTarget] = ...,
        ports: RulePorts | None = ...,
        protocol: Transport | None = ...,
        seed: int = ...,
    ) -> FaultsBlock: ...
    def files(self) -> dict[str, str]: ...
    forwarder: Forwarder
    def member(
        self,
        name: str,
        *,
        aliases: _Iterable[str] = ...,
        address: AddressLike | None = ...,
        mac: str | None = ...,
        ports: _Iterable[str | PortForward | Follow] = ...,
        policy: Policy | None = ...,
        ifname: str | None = ...,
        ids: Ids = ...,
        namespace: Namespace | None = ...,
    ) -> Member: ...
    @property
    def members(self) -> dict[str, Member]: ...
    namespace: Namespace
    def open(self) -> Self: ...
    def popen(
        self,
        command: Command,
        *,
        stdin: StandardStream = ...,
        stdout: StandardStream = ...,
        stderr: StandardStream = ...,
        cwd: Word | None = ...,
        env: _Mapping[str, str] | None = ...,
        start_new_session: bool = ...,
        foreground: bool = ...,
        pass_fds: _Sequence[int] = ...,
        files: _Mapping[str, str | bytes] | None = ...,
        listen: Listen | None = ...,
        open_files: _Mapping[str, OpenFile] | None = ...,
        sockets: _Mapping[str, Word] | None = ...,
    ) -> Process: ...
    ports: _builtins.list[PortForward | Follow]
    def remove_member(self, member: str | Member) -> None: ...
    reverse: _builtins.list[ReverseForward]
    def route_to(self, other: Network) -> NetworkRoute: ...
    def run(
        self,
        command: Command,
        *,
        stdin: StandardStream = ...,
        stdout: StandardStream = ...,
        stderr: StandardStream = ...,
        cwd: Word | None = ...,
        env: _Mapping[str, str] | None = ...,
        start_new_session: bool = ...,
        foreground: bool = ...,
        pass_fds: _Sequence[int] = ...,
        files: _Mapping[str, str | bytes] | None = ...,
        listen: Listen | None = ...,
        open_files: _Mapping[str, OpenFile] | None = ...,
        sockets: _Mapping[str, Word] | None = ...,
        input: bytes | None = ...,
        check: bool = ...,
    ) -> _CompletedProcess[bytes]: ...
    stack: UserStack
    @property
    def subnet(self) -> Subnet: ...
    tap: TapDevice
    def wait_closed(self) -> None: ...

class NetworkRoute:
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: _TracebackType | None
    ) -> None: ...
    def close(self) -> None: ...
    def open(self) -> Self: ...
    def wait_closed(self) -> None: ...

class Process:
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: _TracebackType | None,
    ) -> None: ...
    def close(self) -> None: ...
    def kill(self) -> None: ...
    def pass_on(self, signal: int) -> None: ...
    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def send_signal(self, signal: int) -> None: ...
    def signal_group(self, signal: int) -> bool: ...
    @property
    def stderr(self) -> ByteReceiveStream | None: ...
    @property
    def stdin(self) -> ByteSendStream | None: ...
    @property
    def stdout(self) -> ByteReceiveStream | None: ...
    def terminate(self) -> None: ...
    def wait(self) -> int: ...
    def wait_stopped(self) -> int | None: ...

class TapDevice:
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: object, error: object, trace: object) -> None: ...
    def advance(self, now: float) -> None: ...
    def at(self, fd: int) -> TapDevice: ...
    backlog: bool
    def close(self) -> None: ...
    counters: TapCounters
    deadline: float
    def fileno(self) -> int: ...
    def flush(self) -> None: ...
    @classmethod
    def from_fd(cls, fd: int, *, mtu: int = ..., name: str | None = ...) -> TapDevice: ...
    def impaired(self, transmit: Impairment, receive: Impairment | None = ...) -> ImpairedTap: ...
    mac: bytes | None
    mtu: int
    name: str
    namespace: Namespace | None
    offloads: Offloads
    @classmethod
    def open(
        cls,
        namespace: Namespace,
        name: str = ...,
        *,
        mtu: int = ...,
        mac: str | None = ...,
        queues: int = ...,
    ) -> TapDevice: ...
    @classmethod
    def pair(cls, *, vnet_header: bool = ..., mtu: int = ...) -> tuple[TapDevice, TapDevice]: ...
    queues: tuple[TapDevice, ...]
    def read_into(self, buffer: memoryview | bytearray) -> int | None: ...
    def release(self) -> None: ...
    def write(self, *buffers: bytes | bytearray | memoryview) -> bool: ...

class UpstreamDatagrams:
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: _TracebackType | None,
    ) -> None: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> bytes: ...
    def close(self) -> None: ...
    def extra(self, attribute: _T, default: object = ...) -> _T: ...
    @property
    def extra_attributes(self) -> _Mapping[_Any, _Callable[[], _Any]]: ...
    def receive(self) -> bytes: ...
    def send(self, item: bytes) -> None: ...

class UpstreamStream:
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: _TracebackType | None,
    ) -> None: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> bytes: ...
    def close(self) -> None: ...
    def extra(self, attribute: _T, default: object = ...) -> _T: ...
    @property
    def extra_attributes(self) -> _Mapping[_Any, _Callable[[], _Any]]: ...
    def receive(self, max_bytes: int = ...) -> bytes: ...
    def send(self, item: bytes) -> None: ...
    def send_eof(self) -> None: ...

class UserStack:
    def __init__(
        self,
        tap: TapDevice | ImpairedTap,
        uplink: Uplink | FakeInternet | None = ...,
        *,
        subnet: str | _IPv4Network = ...,
        ipv6: bool | Subnet6 = ...,
        driver: DriverName = ...,
        configure: Configure = ...,
        limits: Limits | None = ...,
        dhcp: DhcpSettings | None = ...,
        require: _Iterable[SandboxLayer] = ...,
        records: _Iterable[str | Record] = ...,
        intercept_dns: bool = ...,
        name: str | None = ...,
        policy: Policy | None = ...,
        on_flow: OnFlow | None = ...,
        on_flow_timeout: float = ...,
    ) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: _TracebackType | None
    ) -> None: ...
    def _repr_html_(self) -> str: ...
    def _repr_pretty_(self, printer: _Any, cycle: bool) -> None: ...
    def add_record(self, record: str | Record) -> Record: ...
    def capture(
        self,
        target: str | _os.PathLike[str] | _BinaryIO | None,
        *,
        where: CaptureFilter | RuleTarget | _Iterable[RuleTarget] | None = ...,
        snaplen: int = ...,
        max_bytes: int | None = ...,
        max_seconds: float | None = ...,
        files: int | None = ...,
        processes: bool = ...,
    ) -> Capture: ...
    def close(self) -> None: ...
    def connect_tcp(
        self, address: AddressLike | None, port: int, *, source: AddressLike | None = ...
    ) -> GuestStream: ...
    def end_flow(self, number: int) -> bool: ...
    def events(self, *, processes: bool = ...) -> Iteration[Event]: ...
    def faults(
        self,
        faults: Faults | None = ...,
        *,
        script: _Iterable[tuple[float, Faults]] | None = ...,
        loss: float = ...,
        delay: float = ...,
        jitter: float = ...,
        rate: str | None = ...,
        reorder: float = ...,
        duplicate: float = ...,
        corrupt: float = ...,
        queue: int = ...,
        blackhole: bool = ...,
        refuse: bool = ...,
        reset_after: int | None = ...,
        dns: DnsFault | None = ...,
        dns_delay: float = ...,
        direction: FaultDirection = ...,
        to: RuleTarget | _Iterable[RuleTarget] = ...,
        ports: RulePorts | None = ...,
        protocol: Transport | None = ...,
        seed: int = ...,
    ) -> FaultsBlock: ...
    def flows(self) -> Flows: ...
    def hits_of(self, policy: Policy | None, guest: AddressLike) -> PolicyHits | None: ...
    def intercept(
        self,
        targets: RuleTarget | _Iterable[RuleTarget] | Rule,
        handler: TcpInterceptHandler | UdpInterceptHandler,
        *,
        ports: RulePorts | None = ...,
        protocol: _Literal["tcp", "udp"] | None = ...,
    ) -> Interceptor: ...
    def leases(self) -> tuple[Lease, ...]: ...
    def log_events(self, target: str | _os.PathLike[str] | _TextIO, *, processes: bool = ...) -> None: ...
    @property
    def namespace(self) -> Namespace | None: ...
    def namespace_of(self, guest: AddressLike) -> Namespace | None: ...
    def open(self) -> Self: ...
    policy: Policy | None
    def policy_hits(self) -> PolicyHits | None: ...
    def records(self) -> tuple[Record, ...]: ...
    def remove_record(self, name: str, *, type: str = ..., value: AddressLike = ...) -> None: ...
    def reserve(self, static: StaticLease) -> None: ...
    def revoke(self, address: AddressLike) -> bool: ...
    sandbox: _Mapping[str, str]
    def serve_tcp(self, address: AddressLike | None, port: int, handler: TcpGuestHandler) -> GuestServer: ...
    def serve_udp(self, address: AddressLike | None, port: int, handler: UdpGuestHandler) -> GuestServer: ...
    def set_policy(self, policy: Policy | None, existing: _Literal["keep", "cut"] = ...) -> None: ...
    def stats(self) -> Stats: ...
    @property
    def subnet(self) -> Subnet: ...
    tap: TapDevice | ImpairedTap
    uplink: Uplink | FakeInternet
    def wait_closed(self) -> None: ...

class SocketStream:
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: _TracebackType | None,
    ) -> None: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> bytes: ...
    def close(self) -> None: ...
    def extra(self, attribute: _T, default: object = ...) -> _T: ...
    @property
    def extra_attributes(self) -> _Mapping[_Any, _Callable[[], _Any]]: ...
    @classmethod
    def from_socket(cls, sock_or_fd: _socket.socket | int) -> SocketStream: ...
    def receive(self, max_bytes: int = ...) -> bytes: ...
    def send(self, item: bytes) -> None: ...
    def send_eof(self) -> None: ...

class SocketListener:
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: _TracebackType | None,
    ) -> None: ...
    def accept(self) -> SocketStream: ...
    def close(self) -> None: ...
    def extra(self, attribute: _T, default: object = ...) -> _T: ...
    @property
    def extra_attributes(self) -> _Mapping[_Any, _Callable[[], _Any]]: ...
    @classmethod
    def from_socket(cls, sock_or_fd: _socket.socket | int) -> SocketListener: ...

class ByteReceiveStream:
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: _TracebackType | None,
    ) -> None: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> bytes: ...
    def close(self) -> None: ...
    def extra(self, attribute: _T, default: object = ...) -> _T: ...
    @property
    def extra_attributes(self) -> _Mapping[_T_Attr, _Callable[[], _T_Attr]]: ...
    def receive(self, max_bytes: int = ...) -> bytes: ...

class ByteSendStream:
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: _TracebackType | None,
    ) -> None: ...
    def close(self) -> None: ...
    def extra(self, attribute: _T, default: object = ...) -> _T: ...
    @property
    def extra_attributes(self) -> _Mapping[_T_Attr, _Callable[[], _T_Attr]]: ...
    def send(self, item: bytes) -> None: ...

def open_network(
    *,
    uplink: Uplink | FakeInternet | None = ...,
    ports: _Iterable[str | PortForward | Follow] = ...,
    reverse: _Iterable[str | ReverseForward] = ...,
    ifname: str = ...,
    mtu: int = ...,
    queues: int = ...,
    namespace: Namespace | None = ...,
    internal: bool = ...,
    isolate: bool = ...,
    guard: bool = ...,
    subnet: str | _IPv4Network = ...,
    ipv6: bool | Subnet6 = ...,
    driver: DriverName = ...,
    configure: Configure = ...,
    limits: Limits | None = ...,
    dhcp: DhcpSettings | None = ...,
    require: _Iterable[SandboxLayer] = ...,
    records: _Iterable[str | Record] = ...,
    intercept_dns: bool = ...,
    name: str | None = ...,
    policy: Policy | None = ...,
    on_flow: OnFlow | None = ...,
    on_flow_timeout: float = ...,
) -> Network: ...
