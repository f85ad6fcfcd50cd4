"""A limit for each minute, as a token bucket."""

import math


class TokenBucket:
    """Fills evenly up to one minute's amount, and is full at first.

    So over any time of t seconds at most ``per_minute * (1 + t / 60)`` is taken and not given back.
    The caller passes the time, in seconds by any steady clock.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._filled_at = now

    def set_limit(self, per_minute: int, now: float) -> None:
        """Changes the limit. What was taken stays taken."""
        self._fill(now)
        self._level += per_minute - self.per_minute
        self.per_minute = per_minute

    def wait_s(self, amount: float, now: float) -> float:
        """Returns the seconds until `amount` can be taken, 0 if it can be now.

        A larger amount than `per_minute` can be taken never: the answer is infinite.
        """
        self._fill(now)
        if amount <= self._level:
            return 0.0
        if amount > self.per_minute:
            return math.inf
        return (amount - self._level) * 60 / self.per_minute

    def take(self, amount: float, now: float) -> None:
        """Takes an amount; ask wait_s() before."""
        self._fill(now)
        self._level -= amount

    def give_back(self, amount: float, now: float) -> None:
        """Returns what was taken and not used. A negative amount was used and not taken: the next
        minutes pay for it."""
        self._fill(now)
        self._level = min(self._level + amount, self.per_minute)

    def _fill(self, now: float) -> None:
        level = self._level + (now - self._filled_at) * self.per_minute / 60
        self._level = min(level, self.per_minute)
        self._filled_at = now
