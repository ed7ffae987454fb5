"""Every bound of the stack in one table, each with what happens when it is reached."""

from __future__ import annotations

from netns_kit.frozen import frozen, replace

MAX_ACK_DELAY = 0.5  # seconds
_LEAST = {"tcp_receive": 256, "tcp_send": 536, "tcp_memory": 0}


@frozen
class Limits:
    """Bounds on what one guest can make us hold.  Sizes are in bytes, times in seconds."""

    tcp_connections: int = 16384  # beyond: one whose handshake is not over gives way, or the SYN is reset
    tcp_pending: int = 4096  # of these, whose handshake is not over: the oldest gives way
    tcp_time_waits: int = 32768  # closed ones in TIME-WAIT, 150 bytes each: the oldest is forgotten
    tcp_receive: int = 1 << 20  # per connection, taken from the guest, not yet by the host: the first window
    tcp_receive_max: int = (1 << 24) - 256  # and what it may grow to on a long path (RFC 7323: scaled by 8)
    tcp_send: int = 1 << 20  # per connection, in flight to the guest: the host socket is read no further
    tcp_send_max: int = 1 << 24  # and what that may grow to
    tcp_memory: int = 256 << 20  # of all connections: beyond, one burst in flight each, and nothing held
    tcp_out_of_order: int = 256  # runs of bytes per connection kept beyond a hole: dropped, sent again
    udp_flows: int = 4096  # beyond: the one idle longest is dropped
    echo_flows: int = 256  # beyond: the one idle longest is dropped
    fragments: int = 4 << 20  # bytes of incomplete packets: the oldest packet is dropped
    neighbours: int = 1024  # learnt link addresses: the oldest is forgotten
    waiting_frames: int = 16  # per address not yet resolved: dropped; so many addresses: the oldest's go

    tcp_ack_delay: float = 0.004  # of little, for an answer to take it along; 0: never, 0.5 at most
    tcp_pending_time: float = 75.0  # since the guest last repeated its SYN, which it does within 64 s
    tcp_time_wait: float = 10.0  # 2 MSL; a tap's MSL is not the Internet's
    tcp_idle: float = 7200.0  # then keepalive probes, RFC 9293 3.8.4
    tcp_half_closed: float = 240.0  # the same, when one side has closed (RFC 5382 REQ-5)
    udp_one_way: float = 30.0  # no answer yet
    udp_stream: float = 180.0  # answered at least once (RFC 4787 REQ-5: at least two minutes)
    udp_one_shot: float = 10.0  # answered, and of a protocol of one question and one answer (its REQ-5 a)
    echo: float = 60.0  # RFC 5508 REQ-2
    reassembly: float = 30.0

    def divided(self, count: int) -> Limits:
        """Return the limits of each of `count` stacks that share what all connections may have."""
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
