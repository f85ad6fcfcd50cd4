"""The places of a cluster's engines, whose number may grow and shrink."""

import threading
from collections.abc import Callable, Iterator

from loraplex.engine.cluster.engine_list import ListedEngine
from loraplex.engine.cluster.engine_slot import EngineSlot
from loraplex.engine.cluster.launch.launcher import EngineHandle, Launcher


class EngineSlots:
    """Adds and removes slots. Iterating goes over those of this moment. Usable from any thread."""

    def __init__(self, launcher: Launcher, on_change: Callable[[], None]) -> None:
        """`on_change` is called when an engine has come or gone, or is to be emptied."""
        self._launcher = launcher
        self._on_change = on_change
        self._lock = threading.Lock()
        self._slots: dict[int, EngineSlot] = {}
        self._num_starts: dict[int, int] = {}  # of slots that were removed
        self._is_stopped = False

    def __iter__(self) -> Iterator[EngineSlot]:
        with self._lock:
            return iter(list(self._slots.values()))

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def engines(self) -> dict[str, EngineHandle]:
        """The engines that are up, by name."""
        return {slot.engine_id: slot.engine for slot in self if slot.engine is not None}

    @property
    def listed(self) -> list[ListedEngine]:
        """The engines that are up, as routers need them."""
        return [listed for slot in self if (listed := slot.listed) is not None]

    def add(self) -> EngineSlot | None:
        """Begins to start an engine at the first free place; returns None after stop()."""
        with self._lock:
            if self._is_stopped:
                return None
            index = next(i for i in range(len(self._slots) + 1) if i not in self._slots)
            slot = EngineSlot(index, self._launcher, self._on_change)
            slot.num_starts = self._num_starts.get(index, 0)  # no name is used twice
            self._slots[index] = slot
        slot.start()
        return slot

    def drain(self, engine_id: str) -> None:
        """Lets routers empty an engine. Raises KeyError if it is unknown."""
        {slot.engine_id: slot for slot in self}[engine_id].is_draining = True
        self._on_change()

    def remove(self, slot: EngineSlot) -> None:
        """Ends a slot's engine and gives its devices back."""
        slot.stop()
        self._launcher.release(slot.index)
        with self._lock:
            self._slots.pop(slot.index, None)
            self._num_starts[slot.index] = slot.num_starts
        self._on_change()

    def stop(self) -> None:
        """Ends all engines and starts no more. Idempotent; waits until they are gone."""
        with self._lock:
            self._is_stopped = True
        for slot in self:
            slot.stop()
        self._launcher.close()
