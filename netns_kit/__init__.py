"""Real connectivity for unprivileged network namespaces, in pure Python.

`Namespace`, `TapDevice`, `UserStack`, `Uplink` and `Forwarder` are the parts; `Network` wires them:

    async with Network(ports=["127.0.0.1:8080:80"]) as net:
        await net.run(["curl", "http://example.com"])
"""

TYPE_CHECKING = False  # as type checkers know it: `typing` is not for everybody who needs one name of ours

if TYPE_CHECKING:
    from .arguments import AddressLike
    from .checkup.checkup import Finding, Report, doctor
    from .dhcp import (
        DhcpSettings,
        Lease,
        StaticLease,
    )
    from .dns import DnsQuery, Hook, Manner, Rcode, Record, Verdict
    from .errors import (
        AddressError,
        AlreadyOpened,
        ArgumentError,
        ArgumentTypeError,
        DeviceGone,
        FeatureUnavailable,
        IdMapError,
        NamespaceGone,
        NetnsKitError,
        NotFound,
        NotImportable,
        NotPrivileged,
        OwnNamespace,
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
        WrongEventLoop,
    )
    from .forwarder.forwarder import Askable, Forwarder
    from .forwarder.ports import PortForward
    from .gateway.gateway import FlowInfo
    from .gateway.stats import Stats
    from .host.diagnosis import Host
    from .namespace.namespace import Ids, Interface, InterfaceAddress, Namespace, OpenedTap, Pids, Route
    from .namespace.process import Command, CommandFailed, Process, StandardStream, Word
    from .network.network import CommandOptions, Network
    from .stack import (
        Limits,
        Offloads,
        Refusal,
        Transport,
    )
    from .subnet import (
        Subnet,
        Subnet6,
    )
    from .tap.device import TapDevice
    from .tap.frame_device import Device, TapCounters
    from .tap.impaired import ImpairedTap
    from .tap.impairment import Impairment
    from .uplink.uplink import METADATA, Endpoint, Flow, Target, UdpFiltering, UdpPorts, Uplink, Way
    from .userstack.control import FlowEvent
    from .userstack.drivers import DriverName
    from .userstack.userstack import Configure, SandboxLayer, UserStack

__version__ = "0.1.0"

__all__ = [
    "METADATA",
    "AddressError",
    "AddressLike",
    "AlreadyOpened",
    "ArgumentError",
    "ArgumentTypeError",
    "Askable",
    "Command",
    "CommandFailed",
    "CommandOptions",
    "Configure",
    "Device",
    "DeviceGone",
    "DhcpSettings",
    "DnsQuery",
    "DriverName",
    "Endpoint",
    "FeatureUnavailable",
    "Finding",
    "Flow",
    "FlowEvent",
    "FlowInfo",
    "Forwarder",
    "Hook",
    "Host",
    "IdMapError",
    "Ids",
    "ImpairedTap",
    "Impairment",
    "Interface",
    "InterfaceAddress",
    "Lease",
    "Limits",
    "Manner",
    "Namespace",
    "NamespaceGone",
    "NetnsKitError",
    "Network",
    "NotFound",
    "NotImportable",
    "NotPrivileged",
    "Offloads",
    "OpenedTap",
    "OwnNamespace",
    "Pids",
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
    "Route",
    "SandboxLayer",
    "SandboxUnavailable",
    "StackClosed",
    "StackCrashed",
    "StandardStream",
    "StaticLease",
    "Stats",
    "Subnet",
    "Subnet6",
    "SysctlError",
    "TapCounters",
    "TapDevice",
    "Target",
    "Transport",
    "TunUnavailable",
    "UdpFiltering",
    "UdpPorts",
    "Uplink",
    "UserNamespaceDenied",
    "UserStack",
    "Verdict",
    "Way",
    "Word",
    "WrongEventLoop",
    "doctor",
]

_HOMES = {
    "arguments": ("AddressLike",),
    "checkup.checkup": ("Finding", "Report", "doctor"),
    "userstack.control": ("FlowEvent",),
    "dhcp": ("DhcpSettings", "Lease", "StaticLease"),
    "host.diagnosis": ("Host",),
    "dns": ("DnsQuery", "Hook", "Manner", "Rcode", "Record", "Verdict"),
    "userstack.drivers": ("DriverName",),
    "errors": (
        "AddressError",
        "AlreadyOpened",
        "ArgumentError",
        "ArgumentTypeError",
        "DeviceGone",
        "FeatureUnavailable",
        "IdMapError",
        "NamespaceGone",
        "NetnsKitError",
        "NotFound",
        "NotImportable",
        "NotPrivileged",
        "OwnNamespace",
        "PingNotPermitted",
        "PortInUseError",
        "PortSpecError",
        "PrivilegedPortError",
        "RecordError",
        "SandboxUnavailable",
        "StackClosed",
        "StackCrashed",
        "SysctlError",
        "TunUnavailable",
        "UserNamespaceDenied",
        "WrongEventLoop",
    ),
    "forwarder.forwarder": ("Askable", "Forwarder"),
    "gateway.gateway": ("FlowInfo",),
    "tap.impairment": ("Impairment",),
    "namespace.namespace": (
        "Ids",
        "InterfaceAddress",
        "Interface",
        "Namespace",
        "OpenedTap",
        "Pids",
        "Route",
    ),
    "network.network": ("CommandOptions", "Network"),
    "forwarder.ports": ("PortForward",),
    "namespace.process": ("Command", "CommandFailed", "Process", "StandardStream", "Word"),
    "stack": ("Limits", "Offloads", "Refusal", "Transport"),
    "gateway.stats": ("Stats",),
    "subnet": ("Subnet", "Subnet6"),
    "tap.device": ("TapDevice",),
    "tap.frame_device": ("Device", "TapCounters"),
    "tap.impaired": ("ImpairedTap",),
    "uplink.uplink": ("METADATA", "Endpoint", "Flow", "Target", "UdpFiltering", "UdpPorts", "Uplink", "Way"),
    "userstack.userstack": ("Configure", "SandboxLayer", "UserStack"),
}


if not TYPE_CHECKING:  # for whom a module with a __getattr__ has every name there is

    def __getattr__(name: str) -> object:
        """A public name, imported when it is first asked for: not everybody needs what all of them need."""
        from importlib import import_module

        for home, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
