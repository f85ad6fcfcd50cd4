"""Starts a cluster's engines: as child processes, or as actors of Ray."""

from typing import Protocol

from loraplex.engine.ipc.messages.frontend import EngineInfo


class EngineHandle(Protocol):
    """One engine of a cluster, wherever it runs. `Engine` is one.

    Attributes (once started):
        info: the limits of the model, and the devices and backends of the workers.
    """

    info: EngineInfo

    @property
    def scheduler_endpoint(self) -> str:
        """The address that routers connect to."""

    @property
    def pids(self) -> dict[str, int]:
        """The id of each process on the engine's machine, by its name."""

    @property
    def dead_reason(self) -> str | None:
        """How the engine ended; None while it lives or was stopped."""

    def start(self, timeout_s: float = ...) -> None:
        """Starts the engine and waits until it is ready.

        Raises:
            ConfigError: it cannot start as configured; the text says what to change.
            EngineDeadError: it ended or was not ready in time.
        """

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Blocks until the engine ends. Returns 0 after stop(), 1 after a death, None if late."""

    def stop(self) -> None:
        """Ends the engine and waits until it is gone. Idempotent, and allowed during start()."""


class Launcher(Protocol):
    """Places engines on devices. Its methods may be called from several threads."""

    def open(self, num_engines: int) -> None:
        """Prepares for `num_engines` engines.

        Raises ConfigError if the devices are known to be too few; the text says what to change.
        """

    def make_engine(self, index: int) -> EngineHandle:
        """Returns an engine that is not started, on the devices of place `index`.

        A former engine of that place has ended.
        """

    def release(self, index: int) -> None:
        """Gives the devices of place `index` back. Its engine has ended."""

    def close(self) -> None:
        """Gives all devices back. All engines have ended."""

    def describe(self) -> str:
        """Returns where the engines run, in words."""
