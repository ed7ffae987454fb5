"""The retransmission timer of RFC 6298, and only that.

The floor is 0.2 s, not the 1 s of (2.4), and the initial value is near it.  The link is a tap to a kernel on the
same machine, whose own floor that is, and RFC 6298 appendix A leaves the door open.  The ceiling is not the 60 s of
(2.5) either: waiting longer spares nobody's network, and a link that is back is to be noticed.

Before the timeout come probes (RFC 8985 7) where the guest speaks SACK, which tells what a probe has shown.
"""

from __future__ import annotations

INITIAL = 0.25  # (2.1) has 1 s
FLOOR = 0.2
CEILING = 4.0
PROBE_FLOOR = 0.05  # longer than a kernel delays an ACK for what it thinks is a dialogue, 0.04 s
FORGET = 10.0  # seconds after which the minimum RTT is looked for anew
_ALPHA, _BETA, _K = 1 / 8, 1 / 4, 4


class RetransmissionTimeout:
    """The timer's length, in seconds.

    `value` is the timeout, and `first` the time to the first probe if `probing`, else the timeout too.  `smallest` is
    the minimum RTT of late, 0 before the first sample.
    """

    __slots__ = ("_rttvar", "_settled", "_smallest_at", "_srtt", "first", "probing", "smallest", "value")

    def __init__(self) -> None:
        self._srtt = 0.0
        self._rttvar = 0.0
        self.smallest = 0.0
        self._smallest_at = 0.0  # a path may become longer
        self.probing = False
        self.value = self.first = self._settled = INITIAL

    def sample(self, rtt: float, now: float) -> None:
        """Take the round-trip time of a segment that was sent once (Karn, section 3)."""
        if rtt <= self.smallest or not self.smallest or now - self._smallest_at > FORGET:
            self.smallest, self._smallest_at = rtt, now
        if self._srtt:  # (2.3)
            self._rttvar += _BETA * (abs(self._srtt - rtt) - self._rttvar)
            self._srtt += _ALPHA * (rtt - self._srtt)
        else:  # (2.2)
            self._srtt, self._rttvar = rtt, rtt / 2
        self.value = self.first = self._settled = min(max(self._srtt + _K * self._rttvar, FLOOR), CEILING)
        if self.probing:
            self.first = min(max(2 * self._srtt, PROBE_FLOOR), self.value)

    def back_off(self, ceiling: float = CEILING) -> None:
        """Double the timeout (5.5), until `settle`."""
        self.value = min(self.value * 2, ceiling)

    def settle(self) -> None:
        """Undo `back_off`: the peer has acknowledged something new.

        The RFC would wait for a sample, for the sake of congested paths; a lossy link between two kernels is not one.
        """
        self.value = self._settled
