"""Names of adapters as the router knows them: their folders, pins and content."""

import logging
from collections.abc import Iterator
from typing import Any

from msgspec.structs import replace

from loraplex.engine.ipc.messages.frontend import AdapterCommand
from loraplex.engine.router.adapter_log import AdapterLog
from loraplex.scheduler.frontend_protocol import AdapterSource

logger = logging.getLogger("loraplex.router")


class AdapterBook:
    """Repeats what clients have registered to engines that come later."""

    def __init__(self, log: AdapterLog | None = None) -> None:
        """`log` is shared with other routers of the cluster."""
        self._log = log
        self._registered: dict[str, AdapterCommand] = {}  # by name
        self._pins: dict[str, AdapterCommand] = {}
        self._content_hashes: dict[str, str] = {}

    def source(self, name: str) -> AdapterSource | None:
        """Returns the folder that a client has registered under a name."""
        command = self._registered.get(name)
        return command.source if command else None

    def content_hash(self, name: str) -> str:
        """Returns the hash of the name's content, "" while no engine has told it."""
        return self._content_hashes.get(name, "")

    def on_done(self, command: AdapterCommand) -> None:
        """Remembers a command that has succeeded; tells the other routers if it changes a thing."""
        if self._log is None:
            self._apply(command)
        elif not self._is_known(command):
            try:
                self._log.append(command)
            except OSError as error:
                logger.error("the other routers do not learn of %s: %s", command.name, error)
                self._apply(command)
            self.sync()

    def sync(self) -> None:
        """Learns what clients have told other routers, or a former router in this one's place."""
        for command in self._log.read() if self._log is not None else ():
            self._apply(command)

    def _is_known(self, command: AdapterCommand) -> bool:
        match command.op:
            case "load" | "register":
                return command.source is None or self.source(command.name) == command.source
            case "pin":
                return command.name in self._pins
            case "unpin":
                return command.name not in self._pins
        return command.op == "list"

    def _apply(self, command: AdapterCommand) -> None:
        name = command.name
        match command.op:
            case "load" | "register" if command.source is not None:
                if self.source(name) != command.source:
                    self._content_hashes.pop(name, None)
                self._registered[name] = command
            case "unload":
                self._registered.pop(name, None)
                self._content_hashes.pop(name, None)
                self._pins.pop(name, None)
            case "pin":
                self._pins[name] = command
            case "unpin":
                self._pins.pop(name, None)

    def learn(self, row: dict[str, Any]) -> None:
        """Takes the content hash from an engine's description of an adapter."""
        source = self.source(row["name"])
        if row["content_hash"] and (source is None or source.path == row["path"]):
            self._content_hashes[row["name"]] = row["content_hash"]

    def replay(self, command_id: int) -> Iterator[AdapterCommand]:
        """Yields the commands that give a new engine the names and pins, each of its tenant."""
        self.sync()
        for command in self._registered.values():
            yield replace(command, command_id=command_id, op="register")
        for command in self._pins.values():
            yield replace(command, command_id=command_id)
