"""When a process that died is started again."""

from collections import deque

MAX_DEATHS = 5
WINDOW_S = 60.0
FIRST_DELAY_S = 0.25


class RestartPolicy:
    """Restarts at once, then with delays that double; MAX_DEATHS within WINDOW_S are too many."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque()

    def on_death(self, now: float) -> float | None:
        """Record a death at `now`, in seconds of any clock that does not go back.

        Returns the seconds to wait before the restart, or None if there were too many deaths.
        """
        self._deaths.append(now)
        while self._deaths[0] <= now - WINDOW_S:
            self._deaths.popleft()
        num_deaths = len(self._deaths)
        if num_deaths >= MAX_DEATHS:
            return None
        return 0.0 if num_deaths == 1 else FIRST_DELAY_S * 2 ** (num_deaths - 2)
