"""Conflicts: which forwards would listen at the same place."""

from __future__ import annotations

from collections.abc import Iterable

from netns_kit.errors import PortInUseError

from .ports import PortForward, UnixSocket


class Claims:
    """The places at which forwards listen, each claimed by one of them.

    >>> from netns_kit.forwarder.specs import parse
    >>> claims = Claims()
    >>> [str(each) for each in claims.add(parse("8080-8081:80-81"))]
    ['0.0.0.0:8080 -> 80/tcp', '0.0.0.0:8081 -> 81/tcp']
    >>> claims.add(parse("127.0.0.1:8081:90"))
    Traceback (most recent call last):
        ...
    netns_kit.errors.PortInUseError: 127.0.0.1:8081/tcp is taken by the forward 0.0.0.0:8081 -> 81/tcp; remove that \
forward, or choose another host port
    """

    def __init__(self) -> None:
        self._claims: dict[tuple[str, int], dict[tuple[object, str | None], PortForward]] = {}

    def add(self, forwards: Iterable[PortForward]) -> list[PortForward]:
        """Claim the places of all of these, or of none.  Return them, without optional ones whose place is taken.

        Args:
            forwards: The forwards.  One whose port the kernel is to choose has no place yet.

        Raises:
            PortInUseError: Two of them, or one of them and one that is here, would listen at the same place.
        """
        claimed: list[PortForward] = []
        for forward in forwards:
            if not forward.host_port:
                claimed.append(forward)
                continue
            here = self._claims.setdefault((forward.protocol, forward.host_port), {})
            other = next((each for each in here.values() if _overlap(each, forward)), None)
            if other is None:
                here[forward.host, forward.device] = forward
                claimed.append(forward)
            elif not forward.optional:
                self.discard(claimed)
                raise PortInUseError(
                    f"{forward.listens_on}/{forward.protocol} is taken by the forward {other}",
                    fix="remove that forward, or choose another host port",
                )
        return claimed

    def discard(self, forwards: Iterable[PortForward]) -> None:
        """Give up the places of these.

        Args:
            forwards: The forwards.  Those that are not here are passed over.
        """
        for forward in forwards:
            here = self._claims.get((forward.protocol, forward.host_port), {})
            here.pop((forward.host, forward.device), None)
            if not here:
                self._claims.pop((forward.protocol, forward.host_port), None)


def _overlap(one: PortForward, other: PortForward) -> bool:
    """Return whether the kernel gives one port to only one of these.  Ours of IPv6 leave IPv4's ports alone."""
    if one.device and other.device and one.device != other.device:
        return False
    hosts = one.host, other.host
    if isinstance(hosts[0], UnixSocket) or isinstance(hosts[1], UnixSocket):
        return hosts[0] == hosts[1]
    same_family = hosts[0].version == hosts[1].version
    return hosts[0] == hosts[1] or (same_family and (hosts[0].is_unspecified or hosts[1].is_unspecified))
