"""Drains a process that has a frontend, when the supervisor asks for it."""

from loraplex.engine.frontend.frontend import Frontend
from loraplex.engine.ipc.child import Child


class ChildDrain:
    """Closes the frontend's gate, and reports once that nothing is left to do."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._has_reported = False

    def follow(self, frontend: Frontend) -> float | None:
        """Call it in each turn of the loop.

        Returns the seconds until the gate closes, or None if there is nothing to wait for.
        """
        wish, gate = self._child.drain, frontend.gate
        if wish is None or self._has_reported:
            return None
        if not gate.is_closing:
            gate.close_in(wish.grace_s)
        left_s = gate.closes_in_s
        if not left_s and frontend.is_idle:
            self._has_reported = True
            self._child.drained()
        return left_s or None
