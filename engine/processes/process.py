"""One child process of an engine: how it is started, what it reports, how it ended."""

import contextlib
import os
import subprocess
import threading
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, cast

import msgspec

from loraplex.engine.errors import ConfigError
from loraplex.engine.ipc.child import child_environment, how_it_ended, write_frame
from loraplex.engine.ipc.messages.lifecycle import (
    ChildBeat,
    ChildFailed,
    ChildReady,
    ChildStart,
)
from loraplex.engine.processes.addresses.shared_address import SharedAddress

Environment = tuple[tuple[str, str], ...]
"""Variables and their values."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process to start. `kind` is "frontend", "http", "router", "scheduler" or "worker"."""

    kind: str
    index: int
    command: list[str]
    environment: Environment = ()  # besides the supervisor's
    host: str = ""  # at which a scheduler listens for other machines
    folder_server: str = ""  # as in ChildStart

    @property
    def name(self) -> str:
        return self.kind if self.kind == "scheduler" else f"{self.kind} {self.index}"


@dataclass(eq=False)
class Process:
    """A started child and its reports.

    Attributes:
        beat: its last sign of life.
        hang: how it hung, if it was killed for that.
        reported_hang: how it hangs, as another process reports; the watchdog judges it.
        is_drained: no client has a request there, and none will be accepted.
    """

    spec: ProcessSpec
    start: ChildStart
    popen: "subprocess.Popen[bytes]"
    reports: BinaryIO
    ready: ChildReady | None = None
    failed: ChildFailed | None = None
    beat: ChildBeat | None = None
    hang: str = ""
    reported_hang: str = ""
    is_drained: bool = False
    exited: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def spawn(
        cls, spec: ProcessSpec, start: ChildStart, address: SharedAddress | None = None
    ) -> "Process":
        """Start the child in a session of its own, so that Ctrl-C reaches the supervisor alone.

        `address` is one that the child shares with others: it inherits a socket bound to it.

        Raises:
            ConfigError: the operating system cannot start it.
        """
        reader, writer = os.pipe()
        listener = None
        try:
            if address is not None:
                listener = address.open()
                start = msgspec.structs.replace(start, listener_fd=listener.fileno())
            fds = (writer,) if listener is None else (writer, listener.fileno())
            popen = subprocess.Popen(
                [*spec.command, str(writer)],
                stdin=subprocess.PIPE,
                stdout=2,  # the caller's own output must not mix with the children's
                pass_fds=fds,
                start_new_session=True,
                env=child_environment() | dict(spec.environment),
            )
        except OSError as error:
            os.close(reader)
            raise ConfigError(f"cannot start {spec.name}: {error}") from None
        finally:
            os.close(writer)
            if listener is not None:
                listener.close()
        process = cls(spec, start, popen, os.fdopen(reader, "rb"))
        process.send(start)
        return process

    def respawn(self, address: SharedAddress | None = None) -> "Process":
        """Start the child again after its end. A frontend gets the address that it had."""
        config = self.start.config
        if self.endpoint:
            bound: dict[str, Any] = {self._address_field: self.endpoint}
            server = replace(config.server, **bound)
            config = replace(config, server=server)
        incarnation = self.start.incarnation + 1
        start = msgspec.structs.replace(self.start, config=config, incarnation=incarnation)
        return Process.spawn(self.spec, start, address)

    @property
    def endpoint(self) -> str:
        """The address that it has bound, or its predecessor had; empty if there is none."""
        if self.ready is not None:
            return self.ready.endpoint
        if not self.start.incarnation:
            return ""
        return str(getattr(self.start.config.server, self._address_field))

    @property
    def _address_field(self) -> str:
        """Field of ServerConfig with the address of a process of this kind."""
        return "http" if self.spec.kind == "http" else "endpoint"

    def send(self, message: object) -> None:
        """Write a message to its control pipe; do nothing if it has ended."""
        with contextlib.suppress(OSError, ValueError):
            write_frame(cast(BinaryIO, self.popen.stdin), message)

    def send_signal(self, number: int) -> None:
        if not self.exited.is_set():
            with contextlib.suppress(ProcessLookupError):
                self.popen.send_signal(number)

    def close(self) -> None:
        """Close its pipes once it has ended; until then the watching thread reads them."""
        if not self.exited.is_set():
            return
        with contextlib.suppress(OSError):
            cast(BinaryIO, self.popen.stdin).close()
        self.reports.close()

    def how_it_ended(self) -> str:
        """Returns the process's name and how it ended, with a worker's place among its ranks."""
        if self.hang:
            how = f"{self.hang}, and was killed"
        elif self.failed is not None:
            how = f"failed: {self.failed.text}"
        else:
            how = how_it_ended(self.popen.returncode)
        num_ranks = self.start.config.parallel.tensor_parallel_size
        if self.spec.kind == "worker" and num_ranks > 1:
            how += f" (worker rank {self.spec.index} of {num_ranks})"
        return f"{self.spec.name} {how}"
