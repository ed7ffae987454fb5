"""FramePump: carries frames between a device and the stack, a bounded number in each step.

Frames are read into one buffer that the pump owns and lends to the stack.  Relays of datagrams may keep what they
have been lent, until the pump has them flush it before the buffer is used again.

A flood.  Frames of new flows cost many times what others do.  Where they have made every step late for `FLOODED`
seconds, the device's queue is emptied at once: what belongs to known flows is received, what does not waits its turn,
or is dropped unseen when there is too much of it.

`DeviceGone` passes through the pump to the driver.
"""

from __future__ import annotations

import math
import socket
from collections import deque
from collections.abc import Callable

from netns_kit.stack import Stack
from netns_kit.tap.frame_device import FRAME_MAX, Device

from .engine import IN, NEVER, OUT, Engine, ReadBudget
from .relay import Outbox
from .worker_links import WorkerLinks

NO_DEADLINE = math.inf
FRAMES_PER_STEP = 32
FLOODED = 0.1  # seconds in which new flows made each step late: then it is a flood,
CALM = 0.5  # seconds for which it is taken for one,
DRAINED = 256  # frames that are looked at nevertheless, of a step that is late,
STRANGE_FRAMES = (
    256  # and of these such as belong to no flow yet, which wait for their turn; more are dropped
)


class FramePump:
    """What reads a device, for as long as the engine lasts.

    Args:
        outbox: The relays that keep what they have been lent.
    """

    def __init__(self, engine: Engine, tap: Device, stack: Stack, outbox: Outbox) -> None:
        self._engine = engine
        self._tap = tap
        self._stack = stack
        self._outbox = outbox
        self._buffer = memoryview(bytearray(2 * FRAME_MAX))
        self._budget = ReadBudget(engine)
        self._late, self._late_since, self._flooded_until = NEVER, math.inf, -math.inf
        self._strange: deque[bytes] = deque()  # frames that wait, in a flood
        self._acks = stack.acks
        self._is_behind = False  # there are frames to be written when the device is writable
        self.timer_at = self.timer_entry = math.inf
        engine.add(tap.fileno(), self._on_tap, IN)
        engine.after_step.append(self._end_of_step)

    def _on_tap(self, events: int) -> None:
        if events & OUT:
            self._tap.flush()
        self.read_frames(self._budget.size(FRAMES_PER_STEP))

    def read_frames(self, most: int) -> None:
        """Receive what the device has, `most` frames of it."""
        if self._strange:  # others have come before
            self._drain()
            return
        stack, outbox, now = self._stack, self._outbox, self._engine.now
        read, receive, network = self._tap.read_into, stack.receive, stack.network
        free = buffer = self._buffer
        costly = network.costly_frames
        for _ in range(most):
            size = read(free)
            if size is None:
                self._budget.exhausted()
                break
            receive(free[:size], now)
            if outbox.relays:  # they keep what they have been lent until `flush`
                free = free[size:]
                if len(free) < FRAME_MAX:
                    outbox.flush()
                    free = buffer
            if network.costly_frames != costly:
                costly = network.costly_frames
                if self._engine.is_late:
                    self._look_for_flood()
                    break
        if outbox.relays:
            outbox.flush()

    def _look_for_flood(self) -> None:
        """Empty the guest's queue, if all steps have been late for long, lest what is under way gets lost in it."""
        engine, now = self._engine, self._engine.now
        if engine.steps > self._late + engine.around:
            self._late_since = now
        self._late = engine.steps
        if now - self._late_since > FLOODED:
            self._flooded_until = now + CALM
        if now < self._flooded_until and self._stack.has_short_way:
            self._drain()

    def _drain(self) -> None:
        """Receive what the guest's queue has of known flows.

        What belongs to no flow yet waits for `_receive_strange`, and is dropped unseen if there is too much of it."""
        buffer, outbox, stack, strange = self._buffer, self._outbox, self._stack, self._strange
        has_waited = bool(strange)
        for _ in range(DRAINED):
            if outbox.relays:
                outbox.flush()
            size = self._tap.read_into(buffer)
            if size is None:
                break
            if stack.receive_known(buffer[:size], self._engine.now):
                continue
            if len(strange) < STRANGE_FRAMES:
                strange.append(bytes(buffer[:size]))
            else:
                stack.dropped["flooded"] += 1
        if outbox.relays:
            outbox.flush()
        if strange and not has_waited:
            self._engine.again(self._receive_strange)

    def _receive_strange(self) -> None:
        """Receive what waits, until the step has used up its time: one frame at least."""
        strange, outbox = self._strange, self._outbox
        while strange:
            self._stack.receive(memoryview(strange.popleft()), self._engine.now)
            if self._engine.is_late:
                break
        if outbox.relays:
            outbox.flush()
        if strange:
            self._engine.again(self._receive_strange)

    def _end_of_step(self) -> None:
        tap = self._tap
        if self._acks.at_once:
            self._acks.flush()
        if tap.deadline != NO_DEADLINE:
            self._engine.timers.arm(self, tap.deadline)
        if tap.backlog is not self._is_behind:
            self._is_behind = not self._is_behind
            self._engine.modify(tap.fileno(), IN | OUT if self._is_behind else IN)

    def handle_timer(self, now: float) -> None:
        """Read the frames of an impaired device that have been under way until now."""
        self._tap.advance(now)
        self.read_frames(FRAMES_PER_STEP)


class LinkPump:
    """What receives the frames and connections that other workers hand over.

    Args:
        accepted: Called with the name of a flow, and a connection that is to be that flow.
    """

    def __init__(
        self,
        engine: Engine,
        links: WorkerLinks,
        stack: Stack,
        outbox: Outbox,
        accepted: Callable[[bytes, socket.socket], object],
    ) -> None:
        self._engine = engine
        self._links = links
        self._stack = stack
        self._outbox = outbox
        self._accepted = accepted
        self._buffer = memoryview(bytearray(FRAME_MAX))
        self._budget = ReadBudget(engine)
        engine.add(links.fileno(), self._on_links, IN)

    def _on_links(self, _: int) -> None:
        links, stack, buffer, steering = self._links, self._stack, self._buffer, self._stack.steering
        try:
            for _ in range(self._budget.size(FRAMES_PER_STEP)):
                size = links.read_into(buffer, self._accepted)
                if size is None:
                    self._budget.exhausted()
                    break
                if size:
                    steering.hops = links.hops
                    stack.receive(buffer[:size], self._engine.now)
                    if self._outbox.relays:
                        self._outbox.flush()
        finally:
            steering.hops = 0
