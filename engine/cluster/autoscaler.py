"""Starts and releases engines as the routers' load asks for."""

import logging
import threading
import time
from collections.abc import Callable

from loraplex.engine.cluster.engine_list import ScaleCounts
from loraplex.engine.cluster.engine_slot import EngineSlot
from loraplex.engine.cluster.engine_slots import EngineSlots
from loraplex.engine.cluster.scale_signals import SIGNALS_S, ScaleSignals
from loraplex.scheduler.placement.scaling import ScaleDecision, ScalePolicy

EMPTY_TIMEOUT_S = 30.0  # for routers to move an engine's requests before it is ended
RETRY_S = 30.0  # after an engine that could not start

logger = logging.getLogger("loraplex.cluster")


class Autoscaler:
    """Carries out the decisions of a ScalePolicy, one engine at a time.

    Attributes:
        counts: the decisions so far.
    """

    def __init__(
        self,
        slots: EngineSlots,
        policy: ScalePolicy,
        *,
        read_signals: Callable[[], ScaleSignals | None],
        on_change: Callable[[], None],
    ) -> None:
        """`on_change` is called when `counts` has changed."""
        self.counts = ScaleCounts(policy.min_engines, policy.max_engines)
        self._slots = slots
        self._policy = policy
        self._read_signals = read_signals
        self._on_change = on_change
        self._releasing: dict[EngineSlot, float] = {}  # until when its requests may move
        self._not_before = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autoscaler", daemon=True)

    def start(self) -> None:
        """Begins to look at the load."""
        self._thread.start()

    def stop(self) -> None:
        """Decides nothing any more."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(SIGNALS_S):
            signals = self._read_signals()
            if signals is not None:
                self.look(signals, time.monotonic())

    def look(self, signals: ScaleSignals, now: float) -> None:
        """Takes one look at the load; `now` is of any clock that does not go back."""
        self._remove_failed(now)
        self._remove_empty(signals, now)
        known = {engine.engine_id for engine in signals.engines}
        coming = [slot for slot in self._slots if slot.engine_id not in known]
        decision = self._policy.decide(
            signals.engines,
            num_starting=len([slot for slot in coming if slot not in self._releasing]),
            num_queued=signals.num_queued,
            attainment=signals.attainment,
            now=now,
        )
        if decision is None:
            return
        if decision.release:
            self._release(decision, now)
        elif now >= self._not_before and len(self._slots) < self._policy.max_engines:
            self._start(decision)  # a place that is being emptied is not free yet

    def _start(self, decision: ScaleDecision) -> None:
        if self._slots.add() is not None:
            self._tell("started", f"start an engine: {decision.reason}")

    def _release(self, decision: ScaleDecision, now: float) -> None:
        slots = {slot.engine_id: slot for slot in self._slots}
        slot = slots.get(decision.release)
        if slot is None or slot in self._releasing:  # it has ended meanwhile
            return
        self._releasing[slot] = now + EMPTY_TIMEOUT_S
        slot.retire()
        self._tell("released", f"release {decision.release}: {decision.reason}")

    def _remove_failed(self, now: float) -> None:
        """Remove the slots whose engine could not start, or ended too often."""
        for slot in self._slots:
            if slot.failure is not None:
                self._slots.remove(slot)
                self._not_before = now + RETRY_S
                self._tell("failed", f"engine {slot.index} is given up: {slot.failure}")

    def _remove_empty(self, signals: ScaleSignals, now: float) -> None:
        busy = {engine.engine_id for engine in signals.engines if engine.occupancy}
        for slot, deadline in list(self._releasing.items()):
            if slot.engine is None or slot.engine_id not in busy or now >= deadline:
                del self._releasing[slot]
                self._slots.remove(slot)

    def _tell(self, kind: str, text: str) -> None:
        logger.info("%s", text)
        self.counts = self.counts.count(kind, text)
        self._on_change()
