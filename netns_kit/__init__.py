"""Real connectivity for unprivileged network namespaces, in pure Python.

`Namespace`, `TapDevice`, `UserStack`, `Uplink` and `Forwarder` are the parts; `Network` wires them:

    async with Network(ports=["127.0.0.1:8080:80"]) as net:
        await net.run(["curl", "http://example.com"])
"""

TYPE_CHECKING = False  # as type checkers know it, without importing `typing`

if TYPE_CHECKING:
    from .arguments import AddressLike as AddressLike
    from .checkup.checkup import Finding as Finding
    from .checkup.checkup import Report as Report
    from .checkup.checkup import doctor as doctor
    from .dhcp import DhcpSettings as DhcpSettings
    from .dhcp import Lease as Lease
    from .dhcp import StaticLease as StaticLease
    from .display.dissect import Layer as Layer
    from .display.packet import CapturedPacket as CapturedPacket
    from .display.packets import Packets as Packets
    from .display.sequence import TcpConversation as TcpConversation
    from .display.sequence import TcpConversations as TcpConversations
    from .dns import DnsQuery as DnsQuery
    from .dns import Hook as Hook
    from .dns import Manner as Manner
    from .dns import Rcode as Rcode
    from .dns import Record as Record
    from .dns import Verdict as Verdict
    from .errors import *  # noqa: F403 - all of `__all__`
    from .forwarder.forwarder import Askable as Askable
    from .forwarder.forwarder import Forwarder as Forwarder
    from .forwarder.ports import Follow as Follow
    from .forwarder.ports import Mode as Mode
    from .forwarder.ports import PortForward as PortForward
    from .forwarder.ports import ReverseForward as ReverseForward
    from .forwarder.ports import UnixSocket as UnixSocket
    from .forwarder.reverse import StreamHandler as StreamHandler
    from .gateway.asking import FlowAnswer as FlowAnswer
    from .gateway.asking import FlowRequest as FlowRequest
    from .gateway.asking import OnFlow as OnFlow
    from .gateway.capture_filter import CaptureFilter as CaptureFilter
    from .gateway.capture_filter import CaptureProtocol as CaptureProtocol
    from .gateway.faults import DnsFault as DnsFault
    from .gateway.faults import FaultDirection as FaultDirection
    from .gateway.faults import FaultOptions as FaultOptions
    from .gateway.faults import Faults as Faults
    from .gateway.gateway import FlowInfo as FlowInfo
    from .gateway.setup import Configure as Configure
    from .gateway.setup import DriverName as DriverName
    from .gateway.setup import SandboxLayer as SandboxLayer
    from .gateway.setup import StackOptions as StackOptions
    from .gateway.stats import Stats as Stats
    from .host.activation import activated as activated
    from .host.diagnosis import Host as Host
    from .namespace.added_links import AddedLink as AddedLink
    from .namespace.added_links import Ipvlan as Ipvlan
    from .namespace.added_links import Macvlan as Macvlan
    from .namespace.added_links import Veth as Veth
    from .namespace.added_links import Vlan as Vlan
    from .namespace.given import FileMode as FileMode
    from .namespace.given import HasFileno as HasFileno
    from .namespace.given import Listen as Listen
    from .namespace.given import OpenFile as OpenFile
    from .namespace.given import Word as Word
    from .namespace.listening import ListeningSocket as ListeningSocket
    from .namespace.namespace import Ids as Ids
    from .namespace.namespace import Namespace as Namespace
    from .namespace.namespace import NamespaceSnapshot as NamespaceSnapshot
    from .namespace.namespace import Pids as Pids
    from .namespace.namespace_links import Interface as Interface
    from .namespace.namespace_links import InterfaceAddress as InterfaceAddress
    from .namespace.namespace_links import OpenedTap as OpenedTap
    from .namespace.namespace_links import Route as Route
    from .namespace.process import Command as Command
    from .namespace.process import CommandFailed as CommandFailed
    from .namespace.process import CommandOptions as CommandOptions
    from .namespace.process import Process as Process
    from .namespace.process import RunOptions as RunOptions
    from .namespace.process import StandardStream as StandardStream
    from .namespace.process_info import ProcessInfo as ProcessInfo
    from .namespace.process_info import RunningProcess as RunningProcess
    from .network.application import Application as Application
    from .network.application import LogLine as LogLine
    from .network.application import MemberState as MemberState
    from .network.composition import Composition as Composition
    from .network.composition import Dependency as Dependency
    from .network.composition import MemberPlan as MemberPlan
    from .network.member_options import MemberOptions as MemberOptions
    from .network.members import Member as Member
    from .network.network import Network as Network
    from .network.network_route import NetworkRoute as NetworkRoute
    from .policy.explanation import Explanation as Explanation
    from .policy.hits import PolicyHits as PolicyHits
    from .policy.hits import RuleHits as RuleHits
    from .policy.policy import Policy as Policy
    from .policy.presets import DNS_ELSEWHERE as DNS_ELSEWHERE
    from .policy.presets import HOST as HOST
    from .policy.presets import LINK_LOCAL as LINK_LOCAL
    from .policy.presets import LOOPBACK as LOOPBACK
    from .policy.presets import METADATA as METADATA
    from .policy.presets import MULTICAST as MULTICAST
    from .policy.presets import PRIVATE as PRIVATE
    from .policy.presets import Preset as Preset
    from .policy.rules import DnsRefusal as DnsRefusal
    from .policy.rules import RefusalName as RefusalName
    from .policy.rules import Rule as Rule
    from .policy.rules import RuleAction as RuleAction
    from .policy.rules import RulePorts as RulePorts
    from .policy.rules import RuleTarget as RuleTarget
    from .stack import Ending as Ending
    from .stack import Limits as Limits
    from .stack import Offloads as Offloads
    from .stack import Refusal as Refusal
    from .stack import Transport as Transport
    from .subnet import Subnet as Subnet
    from .subnet import Subnet6 as Subnet6
    from .tap.device import TapDevice as TapDevice
    from .tap.frame_device import Device as Device
    from .tap.frame_device import TapCounters as TapCounters
    from .tap.impaired import ImpairedTap as ImpairedTap
    from .tap.impairment import Impairment as Impairment
    from .uplink.chooser import ChooserRule as ChooserRule
    from .uplink.chooser import ChooserUplink as ChooserUplink
    from .uplink.chooser import choose as choose
    from .uplink.dial import Dial as Dial
    from .uplink.dns_settings import DnsSettings as DnsSettings
    from .uplink.flow import Endpoint as Endpoint
    from .uplink.flow import Flow as Flow
    from .uplink.flow import Target as Target
    from .uplink.flow import Way as Way
    from .uplink.http_connect import HttpConnectUplink as HttpConnectUplink
    from .uplink.indirect import IndirectUplink as IndirectUplink
    from .uplink.indirect import ProxyNames as ProxyNames
    from .uplink.indirect import ProxyOptions as ProxyOptions
    from .uplink.indirect import ProxyResolvers as ProxyResolvers
    from .uplink.indirect import UdpAssociation as UdpAssociation
    from .uplink.indirect import UplinkOptions as UplinkOptions
    from .uplink.namespace import NamespaceUplink as NamespaceUplink
    from .uplink.socks5 import Socks5Uplink as Socks5Uplink
    from .uplink.uplink import UdpFiltering as UdpFiltering
    from .uplink.uplink import UdpPorts as UdpPorts
    from .uplink.uplink import Uplink as Uplink
    from .userstack.answers import Flows as Flows
    from .userstack.capture import Capture as Capture
    from .userstack.capture import CaptureOptions as CaptureOptions
    from .userstack.capture_reader import read_capture as read_capture
    from .userstack.events import Event as Event
    from .userstack.events import FlowEvent as FlowEvent
    from .userstack.events import FlowEventKind as FlowEventKind
    from .userstack.events import QueryEvent as QueryEvent
    from .userstack.fake_internet import FakeFlow as FakeFlow
    from .userstack.fake_internet import FakeHost as FakeHost
    from .userstack.fake_internet import FakeInternet as FakeInternet
    from .userstack.fake_internet import FakeQuery as FakeQuery
    from .userstack.faults import FaultsBlock as FaultsBlock
    from .userstack.guest_streams import FlowAttribute as FlowAttribute
    from .userstack.guest_streams import GuestDatagrams as GuestDatagrams
    from .userstack.guest_streams import GuestStream as GuestStream
    from .userstack.guest_streams import TcpGuestHandler as TcpGuestHandler
    from .userstack.guest_streams import UdpGuestHandler as UdpGuestHandler
    from .userstack.interception import InterceptedDatagrams as InterceptedDatagrams
    from .userstack.interception import InterceptedStream as InterceptedStream
    from .userstack.interception import Interceptor as Interceptor
    from .userstack.interception import TcpInterceptHandler as TcpInterceptHandler
    from .userstack.interception import UdpInterceptHandler as UdpInterceptHandler
    from .userstack.interception import UpstreamDatagrams as UpstreamDatagrams
    from .userstack.interception import UpstreamStream as UpstreamStream
    from .userstack.serving import GuestServer as GuestServer
    from .userstack.userstack import UserStack as UserStack

__version__ = "0.1.0"

_HOMES = {
    "arguments": "AddressLike",
    "checkup.checkup": "Finding Report doctor",
    "dhcp": "DhcpSettings Lease StaticLease",
    "display.dissect": "Layer",
    "display.packet": "CapturedPacket",
    "display.packets": "Packets",
    "display.sequence": "TcpConversation TcpConversations",
    "dns": "DnsQuery Hook Manner Rcode Record Verdict",
    "errors": (
        "AddressError AlreadyOpened ArgumentError ArgumentTypeError CaptureError DeviceGone DomainNameError "
        "EventLogError FeatureUnavailable IdMapError NamespaceGone NetnsKitError NotFound NotImportable "
        "NotPrivileged OwnNamespace PingNotPermitted PolicyError PortInUseError PortSpecError PrivilegedPortError "
        "RecordError "
        "SandboxUnavailable StackClosed StackCrashed SysctlError TunUnavailable UserNamespaceDenied "
        "WrongEventLoop"
    ),
    "forwarder.forwarder": "Askable Forwarder",
    "forwarder.ports": "Follow Mode PortForward ReverseForward UnixSocket",
    "forwarder.reverse": "StreamHandler",
    "gateway.asking": "FlowAnswer FlowRequest OnFlow",
    "gateway.capture_filter": "CaptureFilter CaptureProtocol",
    "gateway.faults": "DnsFault FaultDirection FaultOptions Faults",
    "gateway.gateway": "FlowInfo",
    "gateway.setup": "Configure DriverName SandboxLayer StackOptions",
    "gateway.stats": "Stats",
    "host.activation": "activated",
    "host.diagnosis": "Host",
    "namespace.added_links": "AddedLink Ipvlan Macvlan Veth Vlan",
    "namespace.given": "FileMode HasFileno Listen OpenFile Word",
    "namespace.listening": "ListeningSocket",
    "namespace.namespace": "Ids Namespace NamespaceSnapshot Pids",
    "namespace.namespace_links": "Interface InterfaceAddress OpenedTap Route",
    "namespace.process": "Command CommandFailed CommandOptions Process RunOptions StandardStream",
    "namespace.process_info": "ProcessInfo RunningProcess",
    "network.application": "Application LogLine MemberState",
    "network.composition": "Composition Dependency MemberPlan",
    "network.member_options": "MemberOptions",
    "network.members": "Member",
    "network.network": "Network",
    "network.network_route": "NetworkRoute",
    "policy.explanation": "Explanation",
    "policy.hits": "PolicyHits RuleHits",
    "policy.policy": "Policy",
    "policy.presets": "DNS_ELSEWHERE HOST LINK_LOCAL LOOPBACK METADATA MULTICAST PRIVATE Preset",
    "policy.rules": "DnsRefusal RefusalName Rule RuleAction RulePorts RuleTarget",
    "stack": "Ending Limits Offloads Refusal Transport",
    "subnet": "Subnet Subnet6",
    "tap.device": "TapDevice",
    "tap.frame_device": "Device TapCounters",
    "tap.impaired": "ImpairedTap",
    "tap.impairment": "Impairment",
    "uplink.chooser": "ChooserRule ChooserUplink choose",
    "uplink.dial": "Dial",
    "uplink.dns_settings": "DnsSettings",
    "uplink.flow": "Endpoint Flow Target Way",
    "uplink.http_connect": "HttpConnectUplink",
    "uplink.indirect": "IndirectUplink ProxyNames ProxyOptions ProxyResolvers UdpAssociation UplinkOptions",
    "uplink.namespace": "NamespaceUplink",
    "uplink.socks5": "Socks5Uplink",
    "uplink.uplink": "UdpFiltering UdpPorts Uplink",
    "userstack.answers": "Flows",
    "userstack.capture": "Capture CaptureOptions",
    "userstack.capture_reader": "read_capture",
    "userstack.events": "Event FlowEvent FlowEventKind QueryEvent",
    "userstack.fake_internet": "FakeFlow FakeHost FakeInternet FakeQuery",
    "userstack.faults": "FaultsBlock",
    "userstack.guest_streams": "FlowAttribute GuestDatagrams GuestStream TcpGuestHandler UdpGuestHandler",
    "userstack.interception": (
        "InterceptedDatagrams InterceptedStream Interceptor TcpInterceptHandler UdpInterceptHandler "
        "UpstreamDatagrams UpstreamStream"
    ),
    "userstack.serving": "GuestServer",
    "userstack.userstack": "UserStack",
}


def load_ipython_extension(shell: object) -> None:
    """Load the magics of `netns_kit.notebook`: IPython calls this for `%load_ext netns_kit`."""
    from importlib import import_module

    import_module(f"{__name__}.notebook.magics").load(shell)


if not TYPE_CHECKING:  # to a type checker, a module with a __getattr__ has every name
    __all__ = [name for names in _HOMES.values() for name in names.split()]

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used: importing all of them is slow."""
        from importlib import import_module

        for home, names in _HOMES.items():
            if name in names.split():
                value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
