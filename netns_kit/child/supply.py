"""What is said on a supply: the socket on which an engine orders sockets of a namespace from its agent.

It is a SOCK_SEQPACKET pair.  An order names family, type, whether the sockets are transparent, and how many; one of
AF_UNIX has an address behind it, and is for one socket that is connected to that.  The reply repeats the first three
and has an errno (0: none), with the sockets as descriptors.  A record of another length comes from the engine's
owner, beside the agent: a number, and one socket.

Fact: what is on its way counts against the descriptors of the user, all its programs together (unix(7),
ETOOMANYREFS).  An engine that does not read its replies would keep them from passing any.  So the agent's end has
room for few replies, each has `MOST` sockets at most, and the agent takes no further order meanwhile.
"""

from __future__ import annotations

import struct

ORDER = struct.Struct("=BBBB")
# the type of an order for ping sockets (icmp(7)), which are of type SOCK_DGRAM; no type of socket(2)
PING = 64
REPLY = struct.Struct("=BBBi")
PASSED = struct.Struct("=Q")
MOST = 32  # sockets of one reply
ROOM = 4096  # SO_SNDBUF of the agent's end: for a dozen replies
