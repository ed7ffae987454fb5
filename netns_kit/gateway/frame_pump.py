"""FramePump: carries frames between a device and the stack, a bounded number in each step.

Frames are read into one buffer, which the pump owns and lends to the stack.  Relays of datagrams may keep views of it
until the pump calls `Outbox.flush`, which it does before it reuses the buffer.

Crowds.  The descriptors that are ready have their turns one after another.  Of thousands, the device's would come
after many milliseconds, and the kernel keeps a thousand frames for it and drops the others.  So in a crowd the device
is read every `PATIENCE` seconds, whether or not it is its turn.

Floods.  A frame that opens a flow costs many times as much as a frame of a known flow.  If frames of new flows have
made every step late for `FLOODED` seconds, the device's queue is emptied in each late step.  Frames of known flows
are received.  The others wait for their turn, and are dropped if too many wait.

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
CROWDED = 32  # steps within which everything has its turn; of more there is a crowd
PATIENCE = 0.5e-3  # seconds that a device waits in a crowd
FRAMES_IN_CROWD = 64  # frames that are read then
FLOODED = 0.1  # seconds of late steps after which a flood is assumed
CALM = 0.5  # seconds without a late step after which the flood is over
DRAINED = 256  # frames that are read at most in a late step of a flood
STRANGE_FRAMES = 256  # frames of no known flow that wait at most in a flood; more are dropped


class FramePump:
    """The reader of a device.  It lives as long as the engine.

    Args:
        engine: The engine that polls the device.
        tap: The device.
        stack: The stack that receives the frames.
        outbox: The relays that have kept views of the buffer.

    Attributes:
        tap: The device, or what stands before it at the moment.
    """

    def __init__(self, engine: Engine, tap: Device, stack: Stack, outbox: Outbox) -> None:
        self._engine = engine
        self.tap = tap
        self._stack = stack
        self._outbox = outbox
        self._buffer = memoryview(bytearray(2 * FRAME_MAX))
        self._budget = ReadBudget(engine)
        self._late, self._late_since, self._flooded_until = NEVER, math.inf, -math.inf
        self._strange: deque[bytes] = deque()  # frames that wait, in a flood
        self._acks = stack.acks
        self._is_in_crowd = False
        self._read_at = -math.inf  # when frames were read last, in a crowd
        self._is_behind = False  # whether frames wait for the device to be writable
        self.timer_at = self.timer_entry = math.inf
        engine.add(tap.fileno(), self._on_tap, IN)
        engine.after_step.append(self._end_of_step)

    def _on_tap(self, events: int) -> None:
        if events & OUT:
            self.tap.flush()
        self.read_frames(self._budget.size(FRAMES_PER_STEP))
        if self._engine.around > CROWDED:
            self._read_at = self._engine.now
            if not self._is_in_crowd:
                self._is_in_crowd = True
                self._engine.after_step.insert(0, self._end_of_crowded_step)

    def _end_of_crowded_step(self) -> None:
        engine = self._engine
        if engine.around <= CROWDED:
            self._is_in_crowd = False
            engine.after_step = [each for each in engine.after_step if each != self._end_of_crowded_step]
        elif engine.now - self._read_at > PATIENCE:
            self._read_at = engine.now
            self.read_frames(FRAMES_IN_CROWD)

    def read_frames(self, most: int) -> None:
        """Receive up to `most` frames of the device."""
        if self._strange:  # these have come earlier
            self._drain()
            return
        stack, outbox, now = self._stack, self._outbox, self._engine.now
        read, receive, network = self.tap.read_into, stack.receive, stack.network
        free = buffer = self._buffer
        costly = network.costly_frames
        for _ in range(most):
            size = read(free)
            if size is None:
                self._budget.exhausted()
                break
            receive(free[:size], now)
            if outbox.relays:  # these keep views of the buffer until `flush`
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
        """Note that a step is late because of new flows.  In a flood, empty the device's queue, so that no known flow
        suffers.
        """
        engine, now = self._engine, self._engine.now
        if engine.steps > self._late + engine.around:
            self._late_since = now
        self._late = engine.steps
        if now - self._late_since > FLOODED:
            self._flooded_until = now + CALM
        if now < self._flooded_until and self._stack.has_short_way:
            self._drain()

    def _drain(self) -> None:
        """Empty the device's queue, up to `DRAINED` frames.

        Frames of known flows are received.  The others wait for `_receive_strange`, or are dropped if too many wait.
        """
        buffer, outbox, stack, strange = self._buffer, self._outbox, self._stack, self._strange
        has_waited = bool(strange)
        for _ in range(DRAINED):
            if outbox.relays:
                outbox.flush()
            size = self.tap.read_into(buffer)
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
        """Receive frames that wait, at least one, until the step has used up its time."""
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
        tap = self.tap
        if self._acks.at_once:
            self._acks.flush()
            if self._acks.holes:
                self._engine.again(self._acks.report_holes)
        if tap.deadline != NO_DEADLINE:
            self._engine.timers.arm(self, tap.deadline)
        if tap.backlog is not self._is_behind:
            self._is_behind = not self._is_behind
            self._engine.modify(tap.fileno(), IN | OUT if self._is_behind else IN)

    def handle_timer(self, now: float) -> None:
        """Let time pass for an impaired device, and read the frames that have arrived."""
        self.tap.advance(now)
        self.read_frames(FRAMES_PER_STEP)


class LinkPump:
    """The receiver of frames and connections that other workers hand over.

    Args:
        engine: The engine that polls the links.
        links: The links to the other workers.
        stack: The stack that receives the frames.
        outbox: The relays that have kept views of the buffer.
        accepted: Called with the key of a flow and the connection that is to become this flow.
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
