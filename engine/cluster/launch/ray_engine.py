"""An engine that runs in an actor of Ray, as the cluster sees it."""

import contextlib
import threading
import time
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    RayError,
    RayTaskError,
)

from loraplex.engine.cluster.launch.engine_actor import RouterNode, StartedEngine
from loraplex.engine.cluster.launch.ray_place import LOOK_S, RayPlace
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import EngineDeadError, LoraplexError
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.processes.engine import STOP_TIMEOUT_S


class RayEngine:
    """Starts one engine at a place, and waits for its end.

    When the actor's process or its node dies, the engine has ended. Ray restarts the actor, and the
    next engine of the place starts there.

    Attributes (once started):
        info: the limits of the model, and the devices and backends of the workers.
        scheduler_endpoint: the address that routers connect to.
        pids: the ids of the engine's processes, and of its "actor", on their node.
    """

    info: EngineInfo
    scheduler_endpoint: str
    pids: dict[str, int]

    def __init__(
        self,
        place: RayPlace,
        config: EngineConfig,
        router: RouterNode,
        worker_command: list[str] | None = None,
    ) -> None:
        self._place = place
        self._router = router
        self._config = config
        self._worker_command = worker_command
        self._actor: Any = None
        self._end: Any = None  # of the engine: how it died, "" if it was stopped
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self.dead_reason: str | None = None

    def start(self, timeout_s: float = 600.0) -> None:
        """Starts the engine; waits for its devices, for its actor, and until it is ready.

        Raises:
            ConfigError: it cannot start as configured, or there are too few devices.
            EngineDeadError: it ended or was not ready in time, or stop() was called.
        """
        deadline = time.monotonic() + timeout_s
        actor = self._actor = self._place.actor()
        started: StartedEngine | None = None
        while started is None:
            call = actor.start.remote(self._config, self._worker_command, self._router)
            started = self._result(call, deadline)
        self.info = started.info
        self.scheduler_endpoint = started.scheduler_endpoint
        self.pids = started.pids
        self._end = actor.wait.remote()

    def _result(self, call: Any, deadline: float) -> StartedEngine | None:
        """Returns a call's result; None if the actor is away and Ray may bring it back."""
        try:
            while not ray.wait([call], timeout=LOOK_S)[0]:
                self._check_start(deadline)
            result: StartedEngine = ray.get(call)
            return result
        except ActorUnavailableError:  # it is started again, or its node's death is not noticed yet
            self._check_start(deadline)
            self._stopping.wait(LOOK_S)
            return None
        except ActorDiedError as error:
            self._place.forget_actor()
            raise EngineDeadError(f"the engine's actor has ended: {first_line(error)}") from None
        except RayTaskError as error:
            if isinstance(error.cause, LoraplexError):
                raise error.cause from None
            raise EngineDeadError(f"the engine's actor failed: {error.cause!r}") from error

    def _check_start(self, deadline: float) -> None:
        if self._stopping.is_set():
            raise EngineDeadError("the engine was stopped while it started")
        if time.monotonic() >= deadline:
            raise EngineDeadError("the engine's actor did not get ready in time")

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Blocks until the engine ends. Returns 0 after stop(), 1 after a death, None if late."""
        if self._end is None:
            return None if not self._ended.wait(timeout_s) else 0
        try:
            reason = ray.get(self._end, timeout=timeout_s)
        except GetTimeoutError:
            return None
        except RayError as error:
            reason = f"the engine's actor has ended: {first_line(error)}"
        if reason and not self._stopping.is_set():
            self.dead_reason = reason
        return 1 if self.dead_reason else 0

    def stop(self) -> None:
        """Ends the engine and waits until it is gone. Idempotent, and allowed during start()."""
        self._stopping.set()
        if self._actor is not None and not self._ended.is_set() and ray.is_initialized():
            with contextlib.suppress(RayError):  # it has ended
                ray.get(self._actor.stop.remote(), timeout=2 * STOP_TIMEOUT_S)
        self._ended.set()


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
