"""Real connectivity for unprivileged network namespaces, in pure Python.

`Namespace`, `TapDevice`, `UserStack`, `Uplink` and `Forwarder` are the parts; `Network` wires them:

    async with Network(ports=["127.0.0.1:8080:80"]) as net:
        await net.run(["curl", "http://example.com"])
"""

TYPE_CHECKING = False  # as type checkers know it: `typing` is not for everybody who needs one name of ours

if TYPE_CHECKING:
    from .arguments import AddressLike
    from .checkup import (
        Finding,
        Report,
        doctor,
    )
    from .dhcp import (
        DhcpSettings,
        Lease,
        StaticLease,
    )
    from .diagnosis import (
        Host,
    )
    from .dns import DnsQuery, Hook, Manner, Rcode, Record, Verdict
    from .errors import (
        AddressError,
        AlreadyOpened,
        ArgumentError,
        ArgumentTypeError,
        DeviceGone,
        DomainNameError,
        FeatureUnavailable,
        IdMapError,
        NamespaceGone,
        NetnsKitError,
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
    from .events import FlowEvent
    from .forwarder import (
        Askable,
        Forwarder,
    )
    from .gateway import (
        FlowInfo,
    )
    from .impairment import (
        Impairment,
    )
    from .namespace import (
        Ids,
        Interface,
        InterfaceAddress,
        Namespace,
        OpenedTap,
        Pids,
        Route,
    )
    from .network import Network
    from .ports import (
        PortForward,
    )
    from .process import (
        Command,
        CommandFailed,
        CommandOptions,
        Process,
        RunOptions,
        StandardStream,
        Word,
    )
    from .setup import (
        Configure,
        DriverName,
        SandboxLayer,
        StackOptions,
    )
    from .stack import (
        Limits,
        Refusal,
    )
    from .stats import Stats
    from .subnet import (
        Subnet,
        Subnet6,
    )
    from .tap import (
        ImpairedTap,
        TapDevice,
    )
    from .uplink import Endpoint, Flow, Target, UdpFiltering, UdpPorts, Uplink, Way
    from .userstack import UserStack

__version__ = "0.1.0"

__all__ = [
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
    "DeviceGone",
    "DhcpSettings",
    "DnsQuery",
    "DomainNameError",
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
    "NotImportable",
    "NotPrivileged",
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
    "RunOptions",
    "SandboxLayer",
    "SandboxUnavailable",
    "StackClosed",
    "StackCrashed",
    "StackOptions",
    "StandardStream",
    "StaticLease",
    "Stats",
    "Subnet",
    "Subnet6",
    "SysctlError",
    "TapDevice",
    "Target",
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
    "checkup": ("Finding", "Report", "doctor"),
    "dhcp": ("DhcpSettings", "Lease", "StaticLease"),
    "diagnosis": ("Host",),
    "dns": ("DnsQuery", "Hook", "Manner", "Rcode", "Record", "Verdict"),
    "errors": (
        "AddressError",
        "AlreadyOpened",
        "ArgumentError",
        "ArgumentTypeError",
        "DeviceGone",
        "DomainNameError",
        "FeatureUnavailable",
        "IdMapError",
        "NamespaceGone",
        "NetnsKitError",
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
    "events": ("FlowEvent",),
    "forwarder": ("Askable", "Forwarder"),
    "gateway": ("FlowInfo",),
    "impairment": ("Impairment",),
    "namespace": ("Ids", "InterfaceAddress", "Interface", "Namespace", "OpenedTap", "Pids", "Route"),
    "network": ("Network",),
    "ports": ("PortForward",),
    "process": (
        "Command",
        "CommandFailed",
        "CommandOptions",
        "Process",
        "RunOptions",
        "StandardStream",
        "Word",
    ),
    "setup": ("Configure", "DriverName", "SandboxLayer", "StackOptions"),
    "stack": ("Limits", "Refusal"),
    "stats": ("Stats",),
    "subnet": ("Subnet", "Subnet6"),
    "tap": ("ImpairedTap", "TapDevice"),
    "uplink": ("Endpoint", "Flow", "Target", "UdpFiltering", "UdpPorts", "Uplink", "Way"),
    "userstack": ("UserStack",),
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
