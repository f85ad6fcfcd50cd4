"""Says when a cluster may empty an engine, and when it needs one more."""

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.scheduler.placement.engine_summary import EngineSummary

MIN_SPARE = 0.5  # engines' worth of room, under which one more engine is asked for
RELEASE_MARGIN = 0.5  # engines' worth of room beyond MIN_SPARE that stays after a release


@dataclass(frozen=True, slots=True)
class ScaleDecision:
    """A change of the engines in use and its reason, with the numbers.

    `release` is the engine to empty and let go; otherwise one more is asked for.
    """

    reason: str
    release: str = ""


class ScalePolicy:
    """Keeps spare room between two bounds, with a wait before each release.

    Spare room is counted in engines: a half-empty engine is half a unit. One more engine is asked
    for when less than `MIN_SPARE` is left, when requests queue, or when the objective is missed.
    The emptiest engine is released when the others could take its requests and keep
    `MIN_SPARE + RELEASE_MARGIN`, and there was such room for `hold_s` seconds without a break.
    """

    def __init__(
        self, *, min_engines: int, max_engines: int, hold_s: float, min_attainment: float = 0.99
    ) -> None:
        """Raises ValueError unless 1 <= min_engines <= max_engines."""
        if not 1 <= min_engines <= max_engines:
            raise ValueError(
                f"min_engines ({min_engines}) must be at least 1 and at most max_engines "
                f"({max_engines})"
            )
        self.min_engines = min_engines
        self.max_engines = max_engines
        self._hold_s = hold_s
        self._min_attainment = min_attainment
        self._room_since: float | None = None

    def decide(
        self,
        engines: Sequence[EngineSummary],
        *,
        num_starting: int,
        num_queued: int,
        attainment: float,
        now: float,
    ) -> ScaleDecision | None:
        """Returns what to change now, or None.

        Args:
            engines: all engines that are up; those that drain count as gone.
            num_starting: engines that were asked for and are not up.
            num_queued: requests that no engine can take now.
            attainment: share of the last first tokens that came within the objective.
        """
        active = [engine for engine in engines if not engine.draining]
        num_engines = len(active) + num_starting
        spare = num_starting + sum(1 - engine.fill for engine in active)
        numbers = (
            f"{num_engines} engines, room for {spare:.2f}, {num_queued} queued, "
            f"attainment {attainment:.3f}"
        )
        is_short = spare < MIN_SPARE or num_queued > 0 and not num_starting
        if is_short or (attainment < self._min_attainment and not num_starting):
            self._room_since = None
            return ScaleDecision(numbers) if num_engines < self.max_engines else None
        if num_engines <= self.min_engines or spare - 1 < MIN_SPARE + RELEASE_MARGIN:
            self._room_since = None
            return None
        if self._room_since is None:
            self._room_since = now
        if now - self._room_since < self._hold_s or not active:
            return None
        emptiest = min(active, key=lambda engine: (engine.fill, engine.engine_id))
        return ScaleDecision(numbers, release=emptiest.engine_id)
