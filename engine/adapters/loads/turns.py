"""The order of the loads that all worker ranks finish together."""

from collections.abc import Iterator

from loraplex.engine.adapters.loads.load import Load


class Turns:
    """Puts the loads that all ranks finish together into one order on all ranks."""

    def __init__(self) -> None:
        self._next = 0
        self._early: dict[int, Load] = {}

    def add(self, load: Load) -> Iterator[Load]:
        """Yields the loads whose turn it is now; of those without a turn the load itself."""
        if load.turn < 0:
            yield load
            return
        self._early[load.turn] = load
        while self._next in self._early:
            self._next += 1
            yield self._early.pop(self._next - 1)
