"""Real connectivity for unprivileged network namespaces, in pure Python.

`Namespace`, `TapDevice`, `UserStack`, `Uplink` and `Forwarder` are the parts; `Network` wires them:

    async with Network(ports=["127.0.0.1:8080:80"]) as net:
        await net.run(["curl", "http://example.com"])
"""

TYPE_CHECKING = False  # as type checkers know it: `typing` is not for everybody who needs one name of ours

if TYPE_CHECKING:
    from .checkup import Finding, Report, doctor
    from .control import FlowEvent
    from .dhcp import DhcpSettings, Lease, StaticLease
    from .dns import DnsQuery, Rcode, Record
    from .errors import (
        AddressError,
        AlreadyOpened,
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

__version__ = "0.1.0"

__all__ = [
    "AddressError",
    "AlreadyOpened",
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

_HOMES = {
    "checkup": ("Finding", "Report", "doctor"),
    "control": ("FlowEvent",),
    "dhcp": ("DhcpSettings", "Lease", "StaticLease"),
    "dns": ("DnsQuery", "Rcode", "Record"),
    "errors": (
        "AddressError",
        "AlreadyOpened",
        "FeatureUnavailable",
        "IdMapError",
        "NamespaceGone",
        "NetnsKitError",
        "NotImportable",
        "NotPrivileged",
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
    ),
    "forwarder": ("Forwarder",),
    "gateway": ("FlowInfo",),
    "impairment": ("Impairment",),
    "namespace": ("Namespace",),
    "network": ("Network",),
    "ports": ("PortForward",),
    "process": ("Process",),
    "stack": ("Limits", "Refusal"),
    "subnet": ("Subnet", "Subnet6"),
    "tap": ("DeviceGone", "TapDevice"),
    "uplink": ("Endpoint", "Flow", "Target", "Uplink"),
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
