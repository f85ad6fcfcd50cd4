"""`loraplex serve` in a process of its own, over ZeroMQ and HTTP."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from helpers.running.processes import GUARD_S

COMMAND = [sys.executable, "-P", "-m", "loraplex.entrypoints.cli.main"]
FAKE_COMMAND = [sys.executable, "-P", str(Path(__file__).parents[1] / "fakes" / "fake_cli.py")]
FAKE = (
    "--model", "fake", "--skip-tokenizer-init", "--num-pages", "400", "--max-num-seqs", "64",
    "--max-num-batched-tokens", "512",
)  # fmt: skip
"""A worker without a model, which takes 20 ms a step."""

PROGRESS = re.compile(r"(worker|http|frontend) 0(:| is ready)|scheduler is ready")
ADDRESSES = ("--endpoint", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0")


class ServedCommand:
    """A running `loraplex serve`.

    Attributes:
        endpoint, http: its addresses, as it printed them.
        lines: its standard output so far; complete after wait().
    """

    def __init__(
        self, *arguments: str, command: Sequence[str] = FAKE_COMMAND, **environment: str
    ) -> None:
        """Starts it and returns when it is ready. `environment` has variables besides ours."""
        self.process = subprocess.Popen(
            [*command, "serve", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.lines: list[str] = []
        text = ""
        while "Ctrl-C stops it" not in text and (line := self.process.stdout.readline()):
            self.lines.append(line)
            text += line
        found = re.search(r"ready on (\S+?)[\s\"\\]", text)
        assert found, text + (self.process.stderr.read() if self.process.stderr else "")
        self.endpoint = found[1]
        http = re.search(r"http +(http://[^/\s]+)", text)
        self.http = http[1] if http else ""

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> tuple[int, str]:
        """Returns the exit status and the standard error without the progress of the start."""
        out, err = self.process.communicate(timeout=GUARD_S)
        self.lines += out.splitlines(keepends=True)
        said = [line for line in err.splitlines() if not PROGRESS.match(line)]
        return self.process.returncode, "\n".join(said)

    def is_ready(self) -> int:
        """Returns the status of GET /ready."""
        return httpx.get(f"{self.http}/ready", timeout=GUARD_S, verify=False).status_code


@contextlib.contextmanager
def serving(
    *arguments: str, command: Sequence[str] = FAKE_COMMAND, **environment: str
) -> Iterator[ServedCommand]:
    """Yields a server with free ports. It is killed at the end if it still runs."""
    served = ServedCommand(*arguments, *ADDRESSES, command=command, **environment)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            os.kill(served.process.pid, signal.SIGKILL)
        served.process.communicate()


class HttpStream:
    """A completion in a thread, streamed over HTTP.

    Attributes:
        begun: set when the first event has come.
        events: the events so far.
        status: HTTP status of the answer.
        failure: how the connection broke off; "" if it did not.
    """

    def __init__(self, http: str, body: dict[str, Any]) -> None:
        self.begun = threading.Event()
        self.events: list[Any] = []
        self.status = 0
        self.failure = ""
        self._thread = threading.Thread(target=self._run, args=(http, body), daemon=True)
        self._thread.start()

    @property
    def choices(self) -> list[dict[str, Any]]:
        return [choice for event in self.events for choice in event.get("choices", [])]

    @property
    def finish_reason(self) -> str | None:
        """The last one; None if the stream was cut off."""
        return self.choices[-1]["finish_reason"] if self.choices else None

    def join(self) -> "HttpStream":
        self._thread.join(GUARD_S)
        assert not self._thread.is_alive(), "the stream does not end"
        return self

    def _run(self, http: str, body: dict[str, Any]) -> None:
        url, body = f"{http}/v1/completions", {**body, "stream": True}
        try:
            with httpx.stream("POST", url, json=body, timeout=GUARD_S, verify=False) as response:
                self.status = response.status_code
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        self.events.append(json.loads(line.removeprefix("data: ")))
                        self.begun.set()
        except httpx.HTTPError as error:
            self.failure = repr(error)
        self.begun.set()
