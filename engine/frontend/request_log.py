"""Writes one log line for each request that ends, at level info."""

import logging
import math
import time
from dataclasses import dataclass, field

from loraplex.engine.frontend.field_checks import short
from loraplex.engine.frontend.outputs import OutputProcessor
from loraplex.engine.frontend.protocol import GenerateRequest
from loraplex.scheduler.frontend_protocol import SequenceOutput

logger = logging.getLogger("loraplex.requests")


@dataclass(slots=True)
class RequestTimes:
    """The times of a request in seconds after its arrival; -1 until they are known.

    It must end within `timeout_s`.
    """

    timeout_s: float = math.inf
    arrival_time: float = field(default_factory=time.time)  # seconds since 1970
    queued_s: float = -1.0  # when the first of its sequences was admitted
    first_token_s: float = -1.0
    last_token_s: float = -1.0
    _arrived_at: float = field(default_factory=time.monotonic)
    _last_of: dict[int, float] = field(default_factory=dict)  # last output, by sequence

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._arrived_at

    @property
    def is_over(self) -> bool:
        return self.elapsed_s >= self.timeout_s

    def on_output(self, output: SequenceOutput) -> float | None:
        """Note the time of an output that has tokens.

        Returns the seconds since the sequence's last output, None for its first one.
        """
        now_s = self.last_token_s = self.elapsed_s
        if self.first_token_s < 0:
            self.first_token_s = now_s
            self.queued_s = min(output.queued_us / 1e6, now_s)
        last_s = self._last_of.get(output.request_id)
        self._last_of[output.request_id] = now_s
        return None if last_s is None else now_s - last_s

    def to_wire(self) -> dict[str, float | None]:
        """Returns the times for the client; None where there was no token."""
        durations = {
            "queued_s": self.queued_s,
            "first_token_s": self.first_token_s,
            "last_token_s": self.last_token_s,
        }
        known = {name: None if value < 0 else value for name, value in durations.items()}
        return {"arrival_time": self.arrival_time, **known}


def log_end(
    message: GenerateRequest,
    outputs: OutputProcessor | None,
    *,
    reason: str,
    times: RequestTimes,
) -> None:
    """Log the end of a request, as one text or one JSON object.

    Args:
        message: its id, chosen by the client, is quoted and cut, so that it cannot forge lines.
        outputs: None if the prompt was not tokenized yet.
        reason: a finish reason, an error code, or "client left".
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    num_prompt = num_cached = num_output = 0
    if outputs is not None:
        num_prompt = outputs.num_prompt_tokens
        num_cached = outputs.completions[0].num_cached_tokens
        num_output = sum(completion.num_tokens for completion in outputs.completions)
    first = "none" if times.first_token_s < 0 else f"{times.first_token_s * 1e3:.0f} ms"
    known = times.to_wire()
    fields = {
        "event": "request",
        "request_id": message.request_id,
        "adapter": message.adapter_label,
        "tenant": message.tenant,
        "reason": reason,
        "prompt_tokens": num_prompt,
        "cached_tokens": num_cached,
        "output_tokens": num_output,
        **{name: None if value is None else round(value, 6) for name, value in known.items()},
        "total_s": round(times.elapsed_s, 6),
    }
    logger.info(
        "request %s: adapter %s, tokens: prompt %d, cached %d, output %d; first token %s, "
        "total %.0f ms; %s",
        short(message.request_id), message.adapter_label or "none", num_prompt, num_cached,
        num_output, first, times.elapsed_s * 1e3, reason, extra={"fields": fields},
    )  # fmt: skip
