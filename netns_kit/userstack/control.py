"""Control: what people may ask of a stack that runs, on the engine's side.

`Control` lives beside the `Gateway`, on the driver's thread or in the worker's process, and has each operation done
by the feature that it belongs to (see `netns_kit.operations`).  Drivers call it between two steps of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from netns_kit.dns import Zone
from netns_kit.forwarder.forwards import Forwards
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.leasing import Leasing
from netns_kit.operations import operations_of

from .events import Events

OPERATIONS = operations_of(Gateway, Leasing, Zone, Forwards, Events)
"""What may be asked for, by name."""


class Control:
    """The features of one stack.

    Args:
        gateway: What the features serve; it is closed with this.
        tell: Called, on the engine's side, with the number of a subscriber for whom there is news.
    """

    def __init__(self, gateway: Gateway, tell: Callable[[int], None]) -> None:
        self.gateway = gateway
        self.forwards = Forwards(gateway)
        self.events = Events(gateway, tell)
        features = (gateway, gateway.leasing, gateway.zone, self.forwards, self.events)
        self._features: dict[str, object] = {type(each).__name__: each for each in features}

    def do(self, name: str, *arguments: object) -> Any:
        """Do the operation of that name.  Raises what it raises, and KeyError if there is none."""
        asked = OPERATIONS[name]
        now = {"now": self.gateway.engine.now} if "now" in asked.__annotations__ else {}
        return asked(self._features[name.partition(".")[0]], *arguments, **now)

    def close(self) -> None:
        """End everything: listeners, connections, sockets."""
        self.events.close()
        self.forwards.close()
        self.gateway.close()
