"""LiveView: throughput and flows of a network, as widgets that change while it is open."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable
from threading import Event, Thread, main_thread
from typing import TYPE_CHECKING, Any

import anyio
from ipywidgets import HTML, Button, VBox
from matplotlib.figure import Figure

from netns_kit.errors import NetnsKitError
from netns_kit.namespace.background import Openable
from netns_kit.sync.loop_thread import WAKING_SECONDS

if TYPE_CHECKING:
    from netns_kit.gateway.gateway import FlowInfo

LOOKS_KEPT = 120
GREY = "#888888"  # which can be read on dark and on light


class Rates:
    """The throughput between two looks at flows.  The last bytes of a flow that ends between two are not in it."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, int]] = {}

    def look(self, flows: Iterable[FlowInfo], seconds: float) -> tuple[float, float]:
        """Return megabits per second from the guest and to it.

        Args:
            flows: The flows now.
            seconds: The time since the last look.
        """
        now = {flow.id: (flow.bytes_from_guest, flow.bytes_to_guest) for flow in flows}
        nothing = (0, 0)
        out, into = (
            sum(after[side] - self._before.get(number, nothing)[side] for number, after in now.items())
            for side in (0, 1)
        )
        self._before = now
        return out * 8e-6 / seconds, into * 8e-6 / seconds


class LiveView:
    """A view that is there until the network is closed, or until `stop`.

    Args:
        owner: The network or member, synchronous or async.
        stack: What has the flows.
        seconds: The time between two looks.
    """

    def __init__(self, owner: Any, stack: Any, seconds: float = 1.0) -> None:
        self._stack = stack
        self._seconds = max(0.1, seconds)
        self._rates = Rates()
        self._seen: deque[tuple[float, float]] = deque(maxlen=LOOKS_KEPT)
        self._stopped = Event()
        self.chart, self.flows, self.state = HTML(), HTML(), HTML("open")
        button = Button(description="Stop")
        button.on_click(lambda _: self.stop())
        self.widget = VBox([self.chart, self.flows, self.state, button])
        if isinstance(owner, Openable):
            owner.supervisor.start(self._follow)  # it ends with the network
        else:
            # no daemon: the interpreter would abort if it stopped the thread within C++ code of matplotlib
            Thread(target=self._watch, name="netns_kit live view", daemon=False).start()

    def __repr__(self) -> str:
        return f"<LiveView: {self.state.value}; Jupyter shows it as it changes, elsewhere there is %flows>"

    def stop(self) -> None:
        """End the view: it stays as it is."""
        self._stopped.set()

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return {**self.widget._repr_mimebundle_(**options), "text/plain": repr(self)}

    def _watch(self) -> None:
        try:
            while not self._is_over():
                self._show(self._stack.flows())
                left = self._seconds
                while not self._is_over() and left > 0:
                    self._stopped.wait(min(left, WAKING_SECONDS))
                    left -= WAKING_SECONDS
        except NetnsKitError:
            self._stopped.set()  # it was closed
        self.state.value = "ended"

    def _is_over(self) -> bool:
        return self._stopped.is_set() or not main_thread().is_alive()  # the interpreter exits

    async def _follow(self) -> None:
        try:
            while not self._stopped.is_set():
                self._show(await self._stack.flows())
                await anyio.sleep(self._seconds)
        except NetnsKitError:
            pass  # it was closed
        finally:
            self._stopped.set()
            self.state.value = "ended"

    def _show(self, flows: Any) -> None:
        self._seen.append(self._rates.look(flows, self._seconds))
        self.chart.value = drawn(list(self._seen), self._seconds)
        self.flows.value = flows._repr_html_()


def drawn(seen: list[tuple[float, float]], seconds: float) -> str:
    """Return the throughput over time as SVG.

    Args:
        seen: Megabits per second from the guest and to it, the oldest first.
        seconds: The time between two of them.
    """
    figure = Figure(figsize=(7, 2.2), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot(facecolor="none")
    times = [(index + 1 - len(seen)) * seconds for index in range(len(seen))]
    for name, side in ("out", 0), ("in", 1):
        axes.plot(times, [rates[side] for rates in seen], label=name)
    axes.set_xlabel("seconds", color=GREY)
    axes.set_ylabel("Mbit/s", color=GREY)
    axes.set_ylim(bottom=0)
    axes.tick_params(colors=GREY)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.legend(frameon=False, labelcolor=GREY, loc="upper left")
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]
