"""When a router has heard each of its engines."""

GIVE_UP_S = 5.0  # without a message; from MAX_AGE_SECONDS on an engine is suspect
MAX_LOOK_S = 2.0  # of silence that one look counts
NO_ENGINE_S = 60.0  # that a request waits while there is no engine at all


class EngineWatch:
    """Tells which engines are silent, and since when there is none. Times are of one clock.

    A router that was stopped, or had no time, has heard nobody meanwhile. So the time between two
    looks counts as MAX_LOOK_S at most: no engine is given up for the router's own pause.
    """

    def __init__(self, now: float) -> None:
        self._looked_at = now
        self._heard_at: dict[str, float] = {}
        self._none_since: float | None = now

    def hear(self, engine_id: str, now: float) -> None:
        """Notes a message of an engine, or its beginning."""
        self._heard_at[engine_id] = now

    def remove(self, engine_id: str) -> None:
        """Forgets an engine. Unknown ids do no harm."""
        self._heard_at.pop(engine_id, None)

    def begin_look(self, now: float) -> None:
        """Call it before the messages that have come are heard."""
        pause_s = now - self._looked_at - MAX_LOOK_S
        self._looked_at = now
        if pause_s > 0:
            self._heard_at = {key: at + pause_s for key, at in self._heard_at.items()}

    def silent(self, now: float) -> list[str]:
        """Returns the engines to give up."""
        return [key for key, at in self._heard_at.items() if now - at > GIVE_UP_S]

    def lacks_engine(self, is_open: bool, now: float) -> bool:
        """Takes whether any engine may get requests now; returns whether none has for long."""
        if is_open:
            self._none_since = None
        elif self._none_since is None:
            self._none_since = now
        return self._none_since is not None and now - self._none_since >= NO_ENGINE_S
