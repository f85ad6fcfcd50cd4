"""Tries grammars in a child process, which can be killed where a thread cannot."""

import select
import subprocess
import sys
import time

import msgspec

from loraplex.scheduler.frontend_protocol import GrammarSpec

TIME_LIMIT_S = 2.0
"""Longest time that a grammar may take to compile."""

START_LIMIT_S = 60.0
"""Longest time that the child may take to start, on a busy machine too."""


class GrammarError(Exception):
    """The grammar cannot be compiled. The text names the cause, for the client."""


class Checked(msgspec.Struct):
    """The child's answer: the grammar as the library takes it, or why there is none."""

    grammar: str = ""
    error: str = ""


class GrammarChecker:
    """Holds one child, started on first use and again after it had to be killed.

    Not thread-safe: each thread that compiles has its own.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def check(self, spec: GrammarSpec) -> str:
        """Returns the grammar as the library takes it, after it was compiled once in the child.

        Raises:
            GrammarError: it is wrong, or it takes too long or too much memory to compile.
        """
        child = self._child or self._start()
        assert child.stdin is not None
        try:
            child.stdin.write(msgspec.json.encode(spec) + b"\n")
            child.stdin.flush()
            line = _read_line(child, TIME_LIMIT_S)
        except BrokenPipeError:
            line = b""
        if not line:
            died = child.poll() is not None
            self.close()
            raise GrammarError(
                "the grammar takes too much memory to compile: make it simpler"
                if died
                else f"the grammar takes more than {TIME_LIMIT_S:g} s to compile: make it simpler"
            )
        answer = msgspec.json.decode(line, type=Checked)
        if answer.error:
            raise GrammarError(answer.error)
        return answer.grammar

    def close(self) -> None:
        """Kill the child. Idempotent; a later check() starts another."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()

    def _start(self) -> "subprocess.Popen[bytes]":
        child = self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "loraplex.engine.grammar.checker_main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if not _read_line(child, START_LIMIT_S):
            self.close()
            raise GrammarError("the grammar checker does not start: see the server's log")
        return child


def _read_line(child: "subprocess.Popen[bytes]", timeout_s: float) -> bytes:
    """Returns the child's next line, b"" if it ends or the time is over."""
    assert child.stdout is not None
    deadline, line = time.monotonic() + timeout_s, b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
        part = child.stdout.read1(1 << 16) if ready else b""  # type: ignore[attr-defined]
        if not part:
            return b""
        line += part
    return line
