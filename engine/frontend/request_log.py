"""Writes one log line for each request that ends, at level info."""

import logging
import time
from dataclasses import dataclass, field

from loraplex.engine.frontend.field_checks import short
from loraplex.engine.frontend.outputs import OutputProcessor

logger = logging.getLogger("loraplex.requests")


@dataclass(slots=True)
class RequestTimes:
    """Seconds by the monotonic clock."""

    arrived_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None

    def on_output(self) -> None:
        """Note the time of the first output. Later calls change nothing."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()


def log_end(
    request_id: str,
    adapter: str,
    outputs: OutputProcessor | None,
    *,
    reason: str,
    times: RequestTimes,
) -> None:
    """Log the end of a request.

    Args:
        request_id: chosen by the client; it is quoted and cut, so that it cannot forge lines.
        adapter: registered name; empty for the base model.
        outputs: None if the prompt was not tokenized yet.
        reason: a finish reason, an error code, or "client left".
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    now = time.monotonic()
    num_prompt = num_cached = num_output = 0
    if outputs is not None:
        num_prompt = outputs.num_prompt_tokens
        num_cached = outputs.completions[0].num_cached_tokens
        num_output = sum(completion.num_tokens for completion in outputs.completions)
    first = "none"
    if times.first_token_at is not None:
        first = f"{(times.first_token_at - times.arrived_at) * 1e3:.0f} ms"
    logger.info(
        "request %s: adapter %s, tokens: prompt %d, cached %d, output %d; first token %s, "
        "total %.0f ms; %s",
        short(request_id), adapter or "none", num_prompt, num_cached, num_output, first,
        (now - times.arrived_at) * 1e3, reason,
    )  # fmt: skip
