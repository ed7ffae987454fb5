"""Real connectivity for unprivileged network namespaces, in pure Python.

`Namespace`, `TapDevice`, `UserStack`, `Uplink` and `Forwarder` are the parts; `Network` wires them:

    async with Network(ports=["127.0.0.1:8080:80"]) as net:
        await net.run(["curl", "http://example.com"])
"""

from .control import FlowEvent
from .dhcp import DhcpSettings, Lease, StaticLease
from .dns import DnsQuery, Rcode, Record
from .errors import (
    AddressError,
    IdMapError,
    NamespaceGone,
    NetnsKitError,
    NotImportable,
    NotPrivileged,
    PortInUseError,
    PortSpecError,
    PrivilegedPortError,
    RecordError,
    SandboxUnavailable,
    StackClosed,
    StackCrashed,
    SysctlError,
    TunUnavailable,
    UserNamespaceDenied,
)
from .forwarder import Forwarder
from .gateway import FlowInfo
from .impairment import Impairment
from .namespace import Namespace
from .network import Network
from .ports import PortForward
from .process import Process
from .stack import Limits, Refusal
from .subnet import Subnet, Subnet6
from .tap import DeviceGone, TapDevice
from .uplink import Endpoint, Flow, Target, Uplink
from .userstack import UserStack

__version__ = "0.1.0"

__all__ = [
    "AddressError",
    "DeviceGone",
    "DhcpSettings",
    "DnsQuery",
    "Endpoint",
    "Flow",
    "FlowEvent",
    "FlowInfo",
    "Forwarder",
    "IdMapError",
    "Impairment",
    "Lease",
    "Limits",
    "Namespace",
    "NamespaceGone",
    "NetnsKitError",
    "Network",
    "NotImportable",
    "NotPrivileged",
    "PortForward",
    "PortInUseError",
    "PortSpecError",
    "PrivilegedPortError",
    "Process",
    "Rcode",
    "Record",
    "RecordError",
    "Refusal",
    "SandboxUnavailable",
    "StackClosed",
    "StackCrashed",
    "StaticLease",
    "Subnet",
    "Subnet6",
    "SysctlError",
    "TapDevice",
    "Target",
    "TunUnavailable",
    "Uplink",
    "UserNamespaceDenied",
    "UserStack",
]
