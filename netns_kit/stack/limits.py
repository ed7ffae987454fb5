"""Limits: all bounds of the stack in one table, each with what happens beyond it."""

from __future__ import annotations

from netns_kit.frozen import frozen, replace

MAX_ACK_DELAY = 0.5  # seconds
_LEAST = {"tcp_receive": 256, "tcp_send": 536, "tcp_memory": 0}


@frozen
class Limits:
    """Bounds on what one guest can make the stack keep.  Sizes are in bytes, times in seconds.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is out of range.
    """

    tcp_connections: int = 16384
    """Number of TCP connections.  Beyond it, a connection whose handshake is not over is given up; if there is none,
    the SYN is reset.
    """
    tcp_pending: int = 4096
    """Number of TCP connections whose handshake is not over.  Beyond it the oldest one is given up."""
    tcp_time_waits: int = 32768
    """Number of connections in TIME-WAIT, 150 bytes each.  Beyond it the oldest one is forgotten."""
    tcp_receive: int = 1 << 20
    """Initial number of bytes of a connection that the host has not taken yet: the first receive window."""
    tcp_receive_max: int = (1 << 24) - 256
    """Bytes to which `tcp_receive` may grow on a long path (RFC 7323, with a scale of 8)."""
    tcp_send: int = 1 << 20
    """Initial number of bytes of a connection in flight to the guest.  Beyond it the host's socket is not read."""
    tcp_send_max: int = 1 << 24
    """Bytes to which `tcp_send` may grow."""
    tcp_memory: int = 256 << 20
    """Bytes that all connections keep.  Beyond it each connection has one burst in flight, and unread bytes are
    dropped.
    """
    tcp_out_of_order: int = 256
    """Number of byte ranges of a connection that are kept beyond a hole.  Others are dropped, and are sent again."""
    udp_flows: int = 4096
    """Number of UDP flows.  Beyond it the flow that has been idle longest is closed."""
    echo_flows: int = 256
    """Number of ping flows.  Beyond it the flow that has been idle longest is closed."""
    fragments: int = 4 << 20
    """Bytes of incomplete packets.  Beyond it the oldest packet is dropped."""
    neighbours: int = 1024
    """Number of remembered link addresses.  Beyond it the oldest one is forgotten."""
    waiting_frames: int = 16
    """Number of frames that wait for one link address, and of such addresses.  Beyond it a frame is dropped, or the
    frames of the oldest address.
    """

    tcp_ack_delay: float = 0.004
    """Seconds that the ACK of a small segment waits for an answer to carry it, at most 0.5.  0: it does not wait."""
    tcp_pending_time: float = 75.0
    """Seconds until a SYN on hold is forgotten.  The guest repeats it within 64 seconds."""
    tcp_time_wait: float = 10.0
    """Seconds in TIME-WAIT (2 MSL).  The MSL of a tap is shorter than that of the Internet."""
    tcp_idle: float = 7200.0
    """Seconds without a segment before keepalive probes (RFC 9293 3.8.4)."""
    tcp_half_closed: float = 240.0
    """Seconds without a segment before keepalive probes, if one side has closed (RFC 5382 REQ-5)."""
    udp_one_way: float = 30.0
    """Seconds that a UDP flow without an answer is kept."""
    udp_stream: float = 180.0
    """Seconds that an answered UDP flow is kept (RFC 4787 REQ-5 requires two minutes)."""
    udp_one_shot: float = 10.0
    """Seconds that an answered UDP flow is kept if its protocol has one question and one answer (REQ-5 a)."""
    echo: float = 60.0
    """Seconds that a ping flow is kept (RFC 5508 REQ-2)."""
    reassembly: float = 30.0
    """Seconds that an incomplete packet is kept."""

    def divided(self, count: int) -> Limits:
        """Return the share of each of several stacks that serve one guest.

        Args:
            count: The number of stacks.
        """
        shares = ("tcp_connections", "tcp_pending", "tcp_time_waits", "tcp_memory")
        return replace(self, **{name: -(-getattr(self, name) // count) for name in shares})

    def __post_init__(self) -> None:
        for name, kind in Limits.__annotations__.items():
            value, least = getattr(self, name), _LEAST.get(name, 0 if kind == "float" else 1)
            if isinstance(value, bool) or not isinstance(value, int | float if kind == "float" else int):
                raise TypeError(f"{name}={value!r}: expected a number{'' if kind == 'float' else ', whole'}")
            if name == "tcp_ack_delay" and value > MAX_ACK_DELAY:
                raise ValueError(f"tcp_ack_delay={value!r}: expected {MAX_ACK_DELAY} or less (RFC 5681 4.2)")
            if not value >= least:
                raise ValueError(
                    f"{name}={value!r}: expected {least} or more; a policy refuses what is not wanted"
                )
