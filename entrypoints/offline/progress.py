"""Shows progress on stderr: lines while an engine starts, a bar while a batch runs."""

import sys
import time
from collections.abc import Callable
from typing import Any

from loraplex.entrypoints.client.outputs import RequestOutput

BarFactory = Callable[..., Any]
"""Makes a progress bar; takes tqdm's keywords."""


def bar_factory(use_tqdm: bool | BarFactory) -> BarFactory:
    """Returns the caller's own function, or tqdm."""
    if callable(use_tqdm):
        return use_tqdm
    from tqdm.auto import tqdm  # a fifth of a script's imports, and few scripts show a bar

    return tqdm


class ProgressLine:
    """Shows the latest text: in place on a terminal, otherwise as lines, at most one in 2 s."""

    def __init__(self, *, terminal_only: bool = False) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._silent = terminal_only and not self._on_terminal
        self._shown_at = float("-inf")
        self._is_open = False

    def __call__(self, text: str) -> None:
        if self._silent:
            return
        if self._on_terminal:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
            self._is_open = True
        elif time.monotonic() - self._shown_at >= 2.0:
            self._shown_at = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clears the line on a terminal."""
        if self._is_open:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._is_open = False


class BatchBar:
    """Counts finished requests and shows prompt and output tokens per second."""

    def __init__(self, num_requests: int, use_tqdm: bool | BarFactory) -> None:
        self._num_prompt_tokens = 0
        self._num_new_tokens = 0
        self._started_at = time.monotonic()
        self._bar: Any = None
        if use_tqdm:
            self._bar = bar_factory(use_tqdm)(
                total=num_requests, desc="Processed prompts", dynamic_ncols=True, postfix=""
            )

    def add(self, output: RequestOutput) -> None:
        if self._bar is None:
            return
        self._num_prompt_tokens += len(output.prompt_token_ids or ())
        self._num_new_tokens += sum(len(o.token_ids) for o in output.outputs)
        elapsed = max(time.monotonic() - self._started_at, 1e-6)
        self._bar.postfix = (
            f"est. speed input: {self._num_prompt_tokens / elapsed:.2f} toks/s, "
            f"output: {self._num_new_tokens / elapsed:.2f} toks/s"
        )
        self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
