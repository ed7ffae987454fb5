"""What is said on a supply: the socket on which an engine orders sockets of a namespace from its agent.

It is a SOCK_SEQPACKET pair.  An order names family, type, whether the sockets are transparent, and how many; one of
AF_UNIX has an address behind it, and is for one socket that is connected to that.  The reply repeats the first three
and has an errno (0: none), with the sockets as descriptors.  A record of another length comes from the engine's
owner, beside the agent: a number, and one socket.
"""

from __future__ import annotations

import struct

ORDER = struct.Struct("=BBBB")
REPLY = struct.Struct("=BBBi")
PASSED = struct.Struct("=Q")
