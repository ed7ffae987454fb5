"""Real connectivity for unprivileged network namespaces, in pure Python.

`Namespace`, `TapDevice`, `UserStack`, `Uplink` and `Forwarder` are the parts; `Network` wires them:

    async with Network(ports=["127.0.0.1:8080:80"]) as net:
        await net.run(["curl", "http://example.com"])
"""

from typing import TYPE_CHECKING

from .control import FlowEvent
from .dhcp import DhcpSettings, Lease, StaticLease
from .dns import DnsQuery, Rcode, Record
from .errors import (
    AddressError,
    FeatureUnavailable,
    IdMapError,
    NamespaceGone,
    NetnsKitError,
    NotImportable,
    NotPrivileged,
    PingNotPermitted,
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

if TYPE_CHECKING:
    from .checkup import Finding, Report, doctor

__version__ = "0.1.0"

__all__ = [
    "AddressError",
    "DeviceGone",
    "DhcpSettings",
    "DnsQuery",
    "Endpoint",
    "FeatureUnavailable",
    "Finding",
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
    "PingNotPermitted",
    "PortForward",
    "PortInUseError",
    "PortSpecError",
    "PrivilegedPortError",
    "Process",
    "Rcode",
    "Record",
    "RecordError",
    "Refusal",
    "Report",
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
    "doctor",
]


def __getattr__(name: str) -> object:
    if name in ("Finding", "Report", "doctor"):  # nothing else has a use for what they import
        from . import checkup

        return getattr(checkup, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
