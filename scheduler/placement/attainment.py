"""Counts the first tokens that came within the objective, lately."""

from collections import deque

WINDOW_S = 30.0


class Attainment:
    """Remembers the waits for first tokens of the last WINDOW_S seconds.

    Attributes:
        num_in_time: those that came within the objective.
    """

    def __init__(self, objective_s: float) -> None:
        self._objective_s = objective_s
        self._seen: deque[tuple[float, bool]] = deque()  # when, in time
        self.num_in_time = 0

    def __len__(self) -> int:
        return len(self._seen)

    def observe(self, wait_s: float, now: float) -> None:
        """Counts a first token that came now; `now` never goes back."""
        in_time = wait_s <= self._objective_s
        self._seen.append((now, in_time))
        self.num_in_time += in_time
        self.forget(now)

    def forget(self, now: float) -> None:
        """Leaves out what is older than WINDOW_S."""
        while self._seen and self._seen[0][0] < now - WINDOW_S:
            self.num_in_time -= self._seen.popleft()[1]
