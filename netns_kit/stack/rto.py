"""RetransmissionTimeout: the retransmission timer of RFC 6298.

The floor is 0.2 s, not the 1 s of (2.4), and the initial value is close to it.  The link is a tap to a kernel on the
same machine, which has this floor itself; RFC 6298 appendix A permits it.  The ceiling is 4 s, not the 60 s of (2.5):
waiting longer would spare no network, and the end of an outage should be noticed soon.

If the guest speaks SACK, probes are sent before the timeout (RFC 8985 section 7), because SACK shows what a probe has
found.
"""

from __future__ import annotations

INITIAL = 0.25  # (2.1) has 1 s
FLOOR = 0.2
CEILING = 4.0
PROBE_FLOOR = 0.05  # longer than a kernel delays an ACK for what it thinks is a dialogue, 0.04 s
FORGET = 10.0  # seconds after which the minimum RTT is looked for anew
_ALPHA, _BETA, _K = 1 / 8, 1 / 4, 4


class RetransmissionTimeout:
    """The length of the timer, in seconds.

    `value` is the timeout.  `first` is the time until the first probe if `probing`, else the timeout.  `smallest` is
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
        """Take the round-trip time of a segment that was sent only once (Karn's algorithm, section 3)."""
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
        """Double the timeout (5.5), until `settle` is called."""
        self.value = min(self.value * 2, ceiling)

    def settle(self) -> None:
        """Undo `back_off`, since the peer has acknowledged something new.

        The RFC would wait for a new sample, to protect congested paths.  A lossy link between two kernels is not
        congested.
        """
        self.value = self._settled
