"""Conflicts: which forwards would listen at the same place."""

from __future__ import annotations

from collections.abc import Iterable

from netns_kit.errors import PortInUseError

from .ports import PortForward, UnixSocket


class Claims:
    """The places at which forwards listen, each claimed by one of them.

    >>> from netns_kit.forwarder.ports import PortForward
    >>> claims, here = Claims(), PortForward("tcp", "0.0.0.0", 8080, None, 80)
    >>> claims.add([here]) == [here]
    True
    >>> claims.add([PortForward("tcp", "127.0.0.1", 8080, None, 90)])
    Traceback (most recent call last):
        ...
    netns_kit.errors.PortInUseError: 127.0.0.1:8080/tcp is taken by another forward, which leads to 80; remove that \
one, or choose another host port
    """

    def __init__(self) -> None:
        self._claims: dict[tuple[str, int], list[PortForward]] = {}

    def add(self, forwards: Iterable[PortForward]) -> list[PortForward]:
        """Claim the places of all of these, or of none.

        Return them, without those that are optional and whose place is taken.

        Args:
            forwards: The forwards.  One whose port the kernel is to choose has no place yet.

        Raises:
            PortInUseError: Two of them, or one of them and one that is here, would listen at the same place.
        """
        added: list[PortForward] = []
        for forward in forwards:
            here = self._claims.setdefault((forward.protocol, forward.host_port), [])
            other = next((each for each in here if _overlap(each, forward)), None)
            if other is None:
                if forward.host_port or isinstance(forward.host, UnixSocket):
                    here.append(forward)
                added.append(forward)
            elif not forward.optional:
                self.discard(added)
                raise PortInUseError(
                    f"{place_of(forward)} is taken by another forward, which leads to {other.leads_to}",
                    fix="remove that one, or choose another host port",
                )
        return added

    def every(self) -> list[PortForward]:
        """Return the forwards that have a place."""
        return [forward for here in self._claims.values() for forward in here]

    def exchange(self, old: Iterable[PortForward], new: Iterable[PortForward]) -> None:
        """Give up the places of some forwards, and claim those of others, which listen already.

        Args:
            old: The forwards whose places are given up.
            new: The forwards whose places are claimed.  The kernel has given them, so nothing is checked.
        """
        self.discard(old)
        for forward in new:
            self._claims.setdefault((forward.protocol, forward.host_port), []).append(forward)

    def discard(self, forwards: Iterable[PortForward]) -> None:
        """Give up the places of these.

        Args:
            forwards: The forwards.  Those that are not here are passed over.
        """
        for forward in forwards:
            here = self._claims.get((forward.protocol, forward.host_port), [])
            if forward in here:
                here.remove(forward)


def place_of(forward: PortForward) -> str:
    """Return where a forward listens, as messages name it.

    Args:
        forward: A forward.
    """
    return (
        forward.listens_on
        if isinstance(forward.host, UnixSocket)
        else f"{forward.listens_on}/{forward.protocol}"
    )


def _overlap(one: PortForward, other: PortForward) -> bool:
    """Return whether the kernel gives one port to only one of these.  Ours of IPv6 leave IPv4's ports alone."""
    if one.device and other.device and one.device != other.device:
        return False
    if isinstance(one.host, UnixSocket) or isinstance(other.host, UnixSocket):
        return one.host == other.host
    return one.host == other.host or (
        one.host.version == other.host.version and (one.host.is_unspecified or other.host.is_unspecified)
    )
