"""Tells the operator of a server how it does, as text or as JSON lines."""

import select
import sys
import time
from typing import Any

from loraplex.engine.ipc.json_formatter import json_line
from loraplex.entrypoints.cli.output.service_manager import notify_service_manager
from loraplex.entrypoints.offline.progress import ProgressLine


class ServerOutput:
    """Writes progress to standard error, and the rest to standard output."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._progress = ProgressLine()

    def progress(self, text: str) -> None:
        """Say how far the start has come."""
        if self._as_json:
            print(
                json_line("", "info", event="starting", message=text), file=sys.stderr, flush=True
            )
        else:
            self._progress(text)

    def ready(self, lines: list[str], **fields: Any) -> None:
        """Say that clients may connect, to systemd too; `fields` are the addresses."""
        self.close()
        if self._as_json:
            text = json_line("", "info", event="ready", **fields, message="\n".join(lines))
        else:
            text = "\n".join(lines)
        print(text, flush=True)
        notify_service_manager("READY=1")

    def status(self, text: str) -> None:
        """Write a line now and then, unless standard output is a pipe that nobody reads."""
        if not select.select([], [sys.stdout], [], 0)[1]:
            return
        if self._as_json:
            print(json_line("", "info", event="status", message=text), flush=True)
        else:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def close(self) -> None:
        """End the line of progress on a terminal."""
        self._progress.close()
