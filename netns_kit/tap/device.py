"""TapDevice: a frame descriptor with known capabilities.

One descriptor, whole Ethernet frames: the user-mode end of a tap in a namespace, or one end of a socket pair
that behaves like it.  The *guest* is the kernel (or the program) at the other end.  Before every frame, both
ways, stand `Offloads.vnet_header` bytes of `struct virtio_net_hdr` (linux/virtio_net.h); with them a frame
may be a super-frame of up to 64 KiB, whatever the MTU, and may leave its checksum to the other end.

What the guest's kernel accepts is asked, never assumed: the flags are tried in the order of `TAP_FLAGS`, the
offloads in the order of `OFFLOAD_SETS`, and `TapDevice.offloads` says what it took.

Facts about Linux's tun driver (each a test in tests/laws/test_facts.py):
 - A tap descriptor keeps its network namespace alive; it fails with EBADFD only when the device itself is
   removed.  Who wants to end with the namespace's processes must watch those.
 - The flags of a persistent tap are replaced by whoever attaches; only IFF_MULTI_QUEUE must match its
   creator's.  Its header size and its offloads stay as the last user left them, so both are always set here.
 - Once attached, a descriptor cannot be given other flags.
 - TUNGETIFF says IFF_NO_PI of every tap that has no socket filter: IFF_NOFILTER is the same bit.
 - A write to a tap that is down fails with EIO, one with an impossible vnet header with EINVAL.  A write to a
   tap that is up never blocks: what does not fit is dropped inside.
 - TSO and USO need CSUM.  The largest MTU is 65521.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import socket
import stat
import struct
from array import array
from collections import deque
from typing import TYPE_CHECKING, Any

from netns_kit import arguments
from netns_kit.errors import (
    AddressError,
    ArgumentError,
    ArgumentTypeError,
    DeviceGone,
    NotImportable,
    TunUnavailable,
)
from netns_kit.frozen import replace
from netns_kit.host import abi
from netns_kit.stack.offloads import Offloads

from .flags import GUEST_QUEUE, TAP_FLAGS
from .frame_device import ETHERNET_HEADER, VNET_HEADER, TapCounters

if TYPE_CHECKING:
    from collections.abc import Generator

    from typing_extensions import Self

    from netns_kit.namespace.namespace import Namespace

    from .impaired import ImpairedTap
    from .impairment import Impairment

_FPROG = struct.Struct("HP")  # struct sock_fprog
_ATTACH_FILTER = abi.TUNATTACHFILTER | _FPROG.size << 16
_DETACH_FILTER = abi.TUNDETACHFILTER | _FPROG.size << 16
_PASS_ALL = array("B", struct.pack("HBBI", 0x06, 0, 0, 0xFFFFFFFF))  # classic BPF: return everything
_CSUM, _TSO4, _TSO6, _TSO_ECN, _USO4, _USO6 = OFFLOAD_BITS = (
    *(abi.TUN_F_CSUM, abi.TUN_F_TSO4, abi.TUN_F_TSO6, abi.TUN_F_TSO_ECN, abi.TUN_F_USO4, abi.TUN_F_USO6),
)
_IFREQ = struct.Struct("16sH22x")

_TSO = _CSUM | _TSO4 | _TSO6
OFFLOAD_SETS = (_TSO | _TSO_ECN | _USO4 | _USO6, _TSO | _TSO_ECN, _TSO, _CSUM, 0)
"""The TUN_F_ words given to TUNSETOFFLOAD, best first; USO is in Linux since 6.2."""

QUEUES_MAX = 64
MTU_MIN, MTU_MAX, TAP_MTU_MAX = 68, 0xFFFF, 0xFFFF - ETHERNET_HEADER
TX_QUEUE = 1000
"""Frames kept for a device that pushes back."""
_SEND_BUFFER = 4 << 20

_BUSY = frozenset({errno.EAGAIN, errno.ENOBUFS})  # again when writable
_REFUSED = frozenset({errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.ENOMEM})  # this frame, not the device
_GONE = frozenset(
    {errno.EBADF, errno.EBADFD, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE}
)


class TapDevice:
    """An end of a link that carries Ethernet frames; it owns its descriptor.

    It is made by `open`, `from_fd` or `pair`.  A device made by `open` is opened when it is awaited or entered:

        tap = await TapDevice.open(ns)          # ... and `await tap.close()`, in any task
        async with TapDevice.open(ns) as tap:   # the same in a block, which closes it

    The others are open.  A device is not safe for use by two threads at a time.

    Args:
        name: The interface's name in the guest.
        mtu: The guest's MTU, in bytes, without Ethernet header.
        namespace: The namespace of the device, None for a descriptor that came ready-made.
        mac: The guest's hardware address; the attribute is None where it is unknown.

    Raises:
        AddressError: No interface can have the MAC.
        ArgumentTypeError: An argument has another type.

    `offloads` says what a frame may ask of the other end.  `queues` are the devices of its queues, itself the first:
    they are opened and closed with it.  A frame written to any of them arrives at the same interface, and the guest's
    frames come out of the one to which their flow was last written.  `deadline` is when `advance` is due, on the
    caller's clock: `math.inf`, because a plain device has no timers (see `ImpairedTap`).  `backlog` is True while
    frames wait for the descriptor to become writable; then call `flush`.
    """

    name: str
    mtu: int
    mac: bytes | None
    offloads: Offloads
    namespace: Namespace | None
    deadline: float
    counters: TapCounters
    queues: tuple[TapDevice, ...]
    backlog: bool

    __slots__ = (
        "_backlog", "_fd", "_wanted_mac",
        "backlog", "counters", "deadline", "mac", "mtu", "name", "namespace", "offloads", "queues",
    )  # fmt: skip

    def __init__(
        self, name: str, mtu: int, *, namespace: Namespace | None = None, mac: str | None = None
    ) -> None:
        self.name = name
        self.mtu = mtu
        self.mac = None if mac is None else parse_mac(mac)
        self.offloads = Offloads()
        self.namespace = namespace
        self.deadline = math.inf
        self.counters = TapCounters()
        self.queues = (self,)
        self._wanted_mac = mac
        self._fd = -1
        self._backlog: deque[bytes] = deque()
        self.backlog = False

    @classmethod
    def open(
        cls,
        namespace: Namespace,
        name: str = "tap0",
        *,
        mtu: int = 1500,
        mac: str | None = None,
        queues: int = 1,
    ) -> TapDevice:
        """Return a tap in a namespace, which is made when it is awaited or its `async with` block is entered.

        A persistent tap of that name is attached instead.  Opening sets MTU and MAC and raises the link.

        Args:
            namespace: The namespace, which is open by then.
            name: The interface's name inside.
            mtu: Bytes of a packet, 68 to 65521; below 1280 the guest has no IPv6.
            mac: The guest's address, like 02:00:00:00:00:01.  None: its kernel chooses.
            queues: The number of queues (IFF_MULTI_QUEUE), each for a worker process.

        Raises:
            AddressError: No interface can have the MAC.
            ArgumentError: The name, the MTU or the number of queues is out of range.
            ArgumentTypeError: An argument has another type.
            TunUnavailable: On opening, if taps cannot be made.

        Cancellation: Opening leaves no descriptor and, unless the tap was persistent, no device.
        """
        if not callable(getattr(namespace, "open_tap", None)):
            fix = "make one: Namespace.create()"
            raise ArgumentTypeError("expected a Namespace", "namespace", arguments.shown(namespace), fix)
        check_name(name)
        check_mtu(mtu, TAP_MTU_MAX)
        arguments.whole_number("queues", queues, 1, QUEUES_MAX)
        tap = cls(name, mtu, namespace=namespace, mac=mac)
        tap.queues += tuple(cls(name, mtu, namespace=namespace) for _ in range(queues - 1))
        return tap

    @classmethod
    def from_fd(cls, fd: int, *, mtu: int = 1500, name: str | None = None) -> TapDevice:
        """Take over a descriptor: an attached tap, or a SEQPACKET or DGRAM socket.

        A tap keeps the flags it was attached with; with IFF_VNET_HDR it has every offload that its kernel accepts.  A
        socket carries one plain frame per message, without a header.  The descriptor becomes non-blocking and is
        closed by `close`.

        Args:
            fd: The descriptor.
            mtu: The guest's MTU, 68 to 65535, which a descriptor does not tell.
            name: The name in messages.  None: the interface's.

        Raises:
            ArgumentError: The MTU is out of range, or the descriptor is not open.
            ArgumentTypeError: An argument has another type.
            TunUnavailable: The descriptor carries no Ethernet frames (a tun, a tap without IFF_NO_PI, a stream).  It
                still belongs to the caller.
        """
        check_mtu(mtu, MTU_MAX)
        mode = arguments.descriptor("fd", fd).st_mode
        if name is not None:
            arguments.text("name", name, "text, or None")
        tap = cls(name or f"fd{fd}", mtu)
        if not stat.S_ISSOCK(mode):
            tap._attached(fd)
            tap.name = name or tap.name
        else:
            borrowed = socket.socket(fileno=fd)
            kind = borrowed.type
            borrowed.detach()
            if kind not in (socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
                raise TunUnavailable(
                    "not a frame descriptor",
                    f"fd {fd}",
                    f"a {kind.name} socket",
                    "use SOCK_SEQPACKET or SOCK_DGRAM",
                )
            tap._owns(fd)
        return tap

    @classmethod
    def pair(cls, *, vnet_header: bool = True, mtu: int = 1500) -> tuple[TapDevice, TapDevice]:
        """Return two devices that face each other as two kernels would: a SOCK_SEQPACKET pair, without privilege.

        Args:
            vnet_header: Whether both accept every offload; if not, both carry plain frames.
            mtu: The MTU of both, 68 to 65535.

        Raises:
            ArgumentError: The MTU is out of range.
            ArgumentTypeError: An argument has another type.
        """
        arguments.boolean("vnet_header", vnet_header)
        check_mtu(mtu, MTU_MAX)
        offloads = Offloads(VNET_HEADER, True, True, True, True, True, True) if vnet_header else Offloads()
        ends = cls("pair0", mtu), cls("pair1", mtu)
        for end, sock in zip(ends, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET), strict=True):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)  # wmem_max may say less
            end.offloads = offloads
            end._owns(sock.detach())
        return ends

    def __repr__(self) -> str:
        queues = f" queues={len(self.queues)}" if len(self.queues) > 1 else ""
        return f"<{type(self).__name__} {self.name} mtu={self.mtu}{queues}: {'not open' if self._fd < 0 else 'open'}>"

    def __await__(self) -> Generator[Any, Any, Self]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        if self._fd < 0:
            await self._open()
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.release()
        except DeviceGone:
            if error is None:  # else that is what ended the block
                raise

    async def close(self) -> None:
        """Close the device, from any task; a tap that is not persistent vanishes.  Closing it again does nothing.

        A device made by `open` can be opened again and is then a new one.

        Raises:
            DeviceGone: Other code has closed the descriptor.

        Cancellation: The device is closed: the call does not wait.
        """
        self.release()

    async def _open(self) -> None:
        if self.namespace is None:
            raise DeviceGone(f"{self.name} is closed")
        several = abi.IFF_MULTI_QUEUE if len(self.queues) > 1 else 0
        opened = await self.namespace.open_tap(
            self.name, [flags | several for flags in TAP_FLAGS], len(self.queues)
        )
        unowned = list(opened.fds)
        try:
            for queue in self.queues:
                queue._attached(unowned[0])
                del unowned[0]
            await self.namespace.configure_link(
                self.name, mtu=self.mtu, mac=self._wanted_mac, queue=GUEST_QUEUE
            )
            for queue in self.queues:
                queue.mac = _hardware_address(self._fd)
        except BaseException:
            for fd in unowned:
                os.close(fd)
            self.release()
            raise

    def _attached(self, fd: int) -> None:
        """Own `fd`, a tap that TUNSETIFF has been called on, and learn what it can do."""
        self.name, flags = _interface(fd)
        if flags & (abi.IFF_TAP | abi.IFF_NO_PI) != abi.IFF_TAP | abi.IFF_NO_PI:
            raise TunUnavailable(
                f"{self.name} carries no plain Ethernet frames",
                "TUNSETIFF",
                f"{flags:#06x}",
                "use IFF_TAP|IFF_NO_PI",
            )
        self.offloads = _negotiate(fd, flags)
        self.mac = _hardware_address(fd)
        self._owns(fd)

    def at(self, fd: int) -> TapDevice:
        """Return this device for another process; it can be pickled.

        Args:
            fd: The number of the descriptor there.

        Raises:
            NotImportable: The device is of a class of the caller's own, which would not be the same there.
        """
        if type(self) is not TapDevice:
            raise NotImportable(
                f"a worker process cannot have a {type(self).__name__}", fix='use driver="thread"'
            )
        twin = TapDevice(self.name, self.mtu)
        twin.mac, twin.offloads, twin._fd = self.mac, self.offloads, fd
        return twin

    def _owns(self, fd: int) -> None:
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor to wait on.

        Raises:
            DeviceGone: The device is not open.
        """
        if self._fd < 0:
            raise DeviceGone(f"{self.name} is not open")
        return self._fd

    def read_into(self, buffer: memoryview | bytearray) -> int | None:
        """Read a frame, its vnet header first; return its length, or None if there is none.

        Args:
            buffer: Where the frame is put.  A longer frame loses its end: give it `FRAME_MAX` bytes.

        Raises:
            DeviceGone: No frame will come any more.
        """
        try:
            length = os.readv(self._fd, (buffer,))
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _GONE:
                raise self._gone(error) from error
            raise
        if not length:
            raise DeviceGone(f"{self.name}: closed by its other end")
        self.counters.received += 1
        return length

    def write(self, *buffers: bytes | bytearray | memoryview) -> bool:
        """Send a frame, its vnet header first; never block.

        A frame that the device has no room for is copied and kept for `flush`, at most `TX_QUEUE` of them.

        Args:
            buffers: The pieces of the frame.

        Returns True if it was sent or kept, False if it is lost and counted: the queue is full or the guest refuses
        it.

        Raises:
            DeviceGone: The device takes no frames any more.
        """
        if self.backlog:
            return self._keep(buffers)
        try:
            os.writev(self._fd, buffers)
        except OSError as error:
            return self._is_busy(error) and self._keep(buffers)
        self.counters.sent += 1
        return True

    def flush(self) -> None:
        """Send the frames that wait, until the device pushes back again.

        Raises:
            DeviceGone: The device takes no frames any more.
        """
        while self._backlog:
            try:
                os.write(self._fd, self._backlog[0])
                self.counters.sent += 1
            except OSError as error:
                if self._is_busy(error):
                    return
            self._backlog.popleft()
        self.backlog = False

    def advance(self, now: float) -> None:
        """Let time pass.  It changes nothing in a plain device.

        Args:
            now: The time on the caller's clock.
        """

    def release(self) -> None:
        """Close the descriptors and forget the frames that wait: `close` for a program without an event loop.

        Raises:
            DeviceGone: Other code has closed a descriptor; all others are closed then.
        """
        stolen = False
        for queue in self.queues:
            fd, queue._fd = queue._fd, -1
            queue._backlog.clear()
            queue.backlog = False
            if fd >= 0:
                try:
                    os.close(fd)
                except OSError:
                    stolen = True
        if stolen:
            raise DeviceGone(
                f"{self.name}: somebody else has closed its descriptor",
                fix="a descriptor given to from_fd belongs to the device: close the device instead",
            )

    def impaired(self, transmit: Impairment, receive: Impairment | None = None) -> ImpairedTap:
        """Return this device behind a bad link.

        Args:
            transmit: The impairment of what we write.
            receive: The impairment of what we read.  None: the same as `transmit`, with another seed.

        Raises:
            ArgumentError: The device has several queues.
            ArgumentTypeError: An argument is not an `Impairment`.
        """
        from .impaired import ImpairedTap  # few links are bad: the others need not know how
        from .impairment import Impairment

        arguments.instance("transmit", transmit, Impairment, "an Impairment")
        if receive is not None:
            arguments.instance("receive", receive, Impairment, "an Impairment, or None")
        return ImpairedTap(self, transmit, receive or replace(transmit, seed=transmit.seed + 1))

    def _keep(self, buffers: tuple[bytes | bytearray | memoryview, ...]) -> bool:
        if len(self._backlog) >= TX_QUEUE:
            self.counters.dropped += 1
            return False
        self._backlog.append(b"".join(buffers))
        self.backlog = True
        return True

    def _is_busy(self, error: OSError) -> bool:
        """Whether a write may succeed later; a refused frame is counted, anything else raised."""
        if error.errno in _BUSY:
            return True
        if error.errno in _REFUSED:
            self.counters.refused += 1
            return False
        if error.errno in _GONE:
            raise self._gone(error) from error
        raise error

    def _gone(self, error: OSError) -> DeviceGone:
        return DeviceGone(f"{self.name}: {'closed' if self._fd < 0 else error.strerror}")


def check_name(name: str, argument: str = "name") -> None:
    """Check the name of an interface, as the kernel's dev_valid_name() does.  `argument` is what the error calls it.

    Raises:
        ArgumentError: No interface can have that name.
    """
    arguments.text(argument, name, "the name of an interface")
    size = len(os.fsencode(name))
    if not 1 <= size <= 15 or name in (".", "..") or any(c in "/:\0" or c.isspace() for c in name):
        raise ArgumentError("expected 1 to 15 bytes without '/', ':' or whitespace", argument, repr(name))


def check_mtu(mtu: int, largest: int) -> None:
    """Check an MTU of `largest` bytes at most.

    Raises:
        ArgumentError: It is out of range.
    """
    arguments.whole_number("mtu", mtu, MTU_MIN, largest)


def parse_mac(mac: str) -> bytes:
    """Return the link address that text means.

    Raises:
        AddressError: No interface can have it.
        ArgumentTypeError: It is no text.
    """
    arguments.text("mac", mac, "a MAC address like '02:00:00:00:00:01', or None")
    with contextlib.suppress(ValueError):
        address = bytes.fromhex(mac.replace(":", ""))
        if len(mac) == 17 and len(address) == 6 and any(address) and not address[0] & 1:
            return address
    raise AddressError("expected an interface's address, like 02:00:00:00:00:01", "mac", repr(mac))


def _interface(fd: int) -> tuple[str, int]:
    """Return name and flags of an attached tun or tap.

    They are asked for under a filter that lets everything pass: without one the kernel says IFF_NO_PI of any tap.
    """
    with contextlib.suppress(OSError):  # a tun takes no filter, and what is no tun at all fails below
        fcntl.ioctl(fd, _ATTACH_FILTER, _FPROG.pack(1, _PASS_ALL.buffer_info()[0]))
    try:
        answer = fcntl.ioctl(fd, abi.TUNGETIFF, bytes(40))
    except OSError as error:
        fix = "use an attached tap or a frame socket"
        raise TunUnavailable(f"fd {fd} is no tap", "TUNGETIFF", error.strerror, fix, error.errno) from error
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _DETACH_FILTER, _FPROG.pack(0, 0))
    name, flags = _IFREQ.unpack_from(answer)
    return os.fsdecode(name.rstrip(b"\0")), flags


def _negotiate(fd: int, flags: int) -> Offloads:
    """Have the kernel leave as much work to the other end as it can, and return what it can."""
    if not flags & abi.IFF_VNET_HDR:
        fcntl.ioctl(fd, abi.TUNSETOFFLOAD, 0)
        return Offloads()
    fcntl.ioctl(fd, abi.TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER))
    for word in OFFLOAD_SETS:
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, abi.TUNSETOFFLOAD, word)
            return Offloads(VNET_HEADER, *(bool(word & bit) for bit in OFFLOAD_BITS))
    return Offloads(VNET_HEADER)


def _hardware_address(fd: int) -> bytes:
    answer = fcntl.ioctl(fd, abi.SIOCGIFHWADDR, bytes(40))
    return answer[18:24]
