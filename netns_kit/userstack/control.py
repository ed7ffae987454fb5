"""Control: the operations that may be asked of a running stack, on the engine's side.

`Control` lives beside the `Gateway`, on the driver's thread or in the worker's process.  It passes each operation to
the feature that it belongs to (see `netns_kit.operations`).  Drivers call it between two steps of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from netns_kit.dns import Zone
from netns_kit.forwarder.forwards import Forwards
from netns_kit.gateway.asking import Asking
from netns_kit.gateway.captures import Captures
from netns_kit.gateway.fault_blocks import FaultBlocks
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.leasing import Leasing
from netns_kit.gateway.serving import Serving
from netns_kit.operations import operations_of

from .events import Events

if TYPE_CHECKING:
    from netns_kit.gateway.interception import Interception

OPERATIONS = operations_of(Gateway, Leasing, Zone, Asking, Forwards, Events, Serving, Captures, FaultBlocks)
"""The operations by name."""


class Control:
    """The features of one stack.

    Args:
        gateway: The gateway that the features serve.  It is closed together with this object.
        tell: Called by the engine's driver, with the number of a subscriber that has events to take.
    """

    def __init__(self, gateway: Gateway, tell: Callable[[int], None]) -> None:
        self.gateway = gateway
        self.forwards = Forwards(gateway)
        self.events = Events(gateway, tell)
        self.captures = Captures(gateway)
        self.faults = FaultBlocks(gateway)
        gateway.asking.tell = tell
        self.serving = Serving(gateway, tell, _intercepting)
        features = (
            gateway,
            gateway.leasing,
            gateway.zone,
            gateway.asking,
            self.forwards,
            self.events,
            self.serving,
            self.captures,
            self.faults,
        )
        self._features: dict[str, object] = {type(each).__name__: each for each in features}

    def do(self, name: str, *arguments: object, fds: Sequence[int] = ()) -> Any:
        """Do the operation of that name.

        Args:
            name: The name.
            arguments: The arguments of the operation.
            fds: Descriptors that are the operation's from now on; one that takes none does not get any.

        Raises:
            KeyError: There is no such operation.  Other errors are those of the operation.
        """
        asked = OPERATIONS[name]
        given: dict[str, Any] = {}
        if "now" in asked.__annotations__:
            given["now"] = self.gateway.engine.now
        if "fds" in asked.__annotations__:
            given["fds"] = list(fds)
        return asked(self._features[name.partition(".")[0]], *arguments, **given)

    def close(self) -> None:
        """Close all listeners, connections and sockets."""
        self.faults.close()
        self.captures.close()
        self.events.close()
        self.serving.close()
        self.forwards.close()
        self.gateway.close()


def _intercepting(serving: Serving) -> Interception:
    from netns_kit.gateway.interception import Interception  # few need it

    return Interception(serving)
