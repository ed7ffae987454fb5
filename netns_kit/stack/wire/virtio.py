"""The virtio network header, which a tap puts before each frame (virtio 1.2 section 5.1.6, linux/virtio_net.h).

It lets two kernels leave work to each other.  A packet may be larger than the MTU (generic segmentation offload,
GSO), and its checksum may cover only the pseudo-header (`NEEDS_CSUM`).  Fields are in the byte order of the machine.
"""

from __future__ import annotations

from struct import Struct

SIZE = 10
NEEDS_CSUM = 1  # flag: the checksum field has only the sum of the pseudo-header
DATA_VALID = 2  # flag: the sender has verified the checksum
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4 = 0, 1, 4, 5

_HEADER = Struct("=BBHHHH")
parse = _HEADER.unpack_from  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
pack = _HEADER.pack
SUMMED = NEEDS_CSUM | DATA_VALID  # with one of these flags the checksum need not be verified
NONE = pack(0, GSO_NONE, 0, 0, 0, 0)


def datagram_size(header: memoryview) -> int:
    """Return the size of each datagram in a UDP super-datagram, or 0 if the frame is none."""
    _, gso_type, _, gso_size, _, _ = parse(header)
    return gso_size if gso_type == GSO_UDP_L4 else 0
