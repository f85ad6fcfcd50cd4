"""Counts the CPU time of an engine's processes, of those too that were replaced meanwhile."""

from typing import Any

import psutil

from loraplex.engine.processes.engine import Engine


class CpuTimes:
    """Call look() more often than processes are replaced: their last looks are what counts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: dict[int, tuple[str, float]] = {}  # by process id: its name, and seconds
        self.look()
        self._before = dict(self._seen)

    def look(self) -> None:
        for name, pid in self._engine.pids.items():
            try:
                times: Any = psutil.Process(pid).cpu_times()
            except psutil.NoSuchProcess:
                continue  # just killed
            self._seen[pid] = name, times.user + times.system

    def since_start(self) -> dict[str, float]:
        """Returns the seconds that were used from the first look to the last, by name."""
        used: dict[str, float] = {}
        for pid, (name, seconds) in self._seen.items():
            _, before = self._before.get(pid, (name, 0.0))
            used[name] = round(used.get(name, 0.0) + seconds - before, 2)
        return used
