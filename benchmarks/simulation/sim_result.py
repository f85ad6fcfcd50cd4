"""Requests of a simulation and the results of a run, in virtual seconds."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request of a trace. An adapter of None is the base model."""

    arrival_s: float
    num_prompt_tokens: int
    num_new_tokens: int
    adapter: int | None = None
    tenant: str = ""
    priority: int = 0


@dataclass(slots=True)
class SimTimeline:
    """Times of one request; `error_code` is set if it was given up or refused."""

    request: SimRequest
    start_s: float | None = None
    first_token_s: float | None = None
    end_s: float | None = None
    error_code: str = ""

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.request.arrival_s


@dataclass(frozen=True, slots=True)
class Moment:
    """State after a step, by tenant. Service is weighted by VTC's w_p and w_q."""

    time_s: float
    service: Mapping[str, float]
    num_waiting: Mapping[str, int]


@dataclass(slots=True)
class SimResult:
    timelines: list[SimTimeline]
    moments: list[Moment] = field(default_factory=list)
    step_adapters: list[int] = field(default_factory=list)  # distinct ones of each step
    num_loads: int = 0
    num_preemptions: int = 0
    num_new_tokens: int = 0
    end_s: float = 0.0
