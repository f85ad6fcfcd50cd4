"""Options of the scheduler."""

import math
from dataclasses import dataclass, field

from loraplex.scheduler.speculation.speculation_config import SpeculationConfig, parse_speculation

POLICY_NAMES = ("fcfs", "priority", "cluster", "abort", "vtc")
FAIR_SHARE_BY = ("tenant", "adapter")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of the queues, and the order of service.

    docs/design/scheduling.md describes the policies.
    """

    max_num_seqs: int = field(default=256, metadata={"help": "requests running at one time"})
    max_num_batched_tokens: int = field(
        default=8192,
        metadata={
            "help": "token budget of one step, prefill and decode; "
            "on a CPU at most 512, or max_num_seqs"
        },
    )
    max_queue_len: int = field(
        default=16384,
        metadata={
            "help": "waiting requests; one more is refused, and so is one of a client or tenant "
            "that has as many waiting as places are free"
        },
    )
    max_adapters_per_tenant: int = field(
        default=16384,
        metadata={"help": "adapter names that one tenant may register; the operator's: any number"},
    )
    max_steps_in_flight: int = field(
        default=2,
        metadata={"help": "steps handed to the workers before the first one's result is read"},
    )
    speculative_config: str = field(
        default="",
        metadata={
            "help": 'drafts that steps verify, in vLLM\'s JSON: {"method": "ngram", '
            '"num_speculative_tokens": 15, "prompt_lookup_max": 3}, or ngram for these values; '
            "empty: none",
            "metavar": "JSON",
        },
    )
    policy: str = field(
        default="fcfs",
        metadata={
            "help": "which waiting request starts next: fcfs (first come, clients in turns, lower "
            "priority number before higher), priority (with gradual ageing), cluster (few adapters "
            "at a time), abort (drop what would miss its first-token objective), vtc (fair shares)",
            "choices": POLICY_NAMES,
        },
    )
    max_wait_s: float = field(
        default=60.0,
        metadata={
            "help": "seconds after which a waiting request goes before all that came later, "
            "under fcfs in turns with the order of priorities; under "
            "priority, what one level is worth; under vtc, how long a client may go unserved"
        },
    )
    max_adapters_per_batch: int = field(
        default=32,
        metadata={
            "help": "cluster: adapters running before requests for others yield to requests for "
            "these; slots that no other request wants are filled all the same"
        },
    )
    ttft_slo_s: float = field(
        default=6.0, metadata={"help": "abort: seconds from arrival to the first token"}
    )
    fair_share_by: str = field(
        default="tenant",
        metadata={
            "help": "vtc: who shares: tenants (without them, salts), or adapters",
            "choices": FAIR_SHARE_BY,
        },
    )
    fair_share_weights: tuple[tuple[str, str], ...] = field(
        default=(),
        metadata={
            "help": "vtc: NAME=WEIGHT of a tenant or adapter, 1 unless given; may be repeated",
            "flag": "--fair-share-weight",
            "metavar": "NAME=WEIGHT",
        },
    )

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs", "max_num_batched_tokens", "max_queue_len", "max_steps_in_flight",
            "max_adapters_per_batch", "max_adapters_per_tenant",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): each running request decodes one token a step"
            )
        for name, allowed in (("policy", POLICY_NAMES), ("fair_share_by", FAIR_SHARE_BY)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        parse_speculation(self.speculative_config)
        for name in ("max_wait_s", "ttft_slo_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name, weight in self.fair_share_weights:
            if not 0 < _number(weight) < math.inf:
                raise ValueError(
                    f"fair_share_weights gives {name!r} {weight!r}; a weight is a positive number"
                )

    @property
    def speculation(self) -> SpeculationConfig | None:
        """`speculative_config`, parsed; None: no speculation."""
        return parse_speculation(self.speculative_config)

    @property
    def weights(self) -> dict[str, float]:
        """`fair_share_weights` as numbers."""
        return {name: float(weight) for name, weight in self.fair_share_weights}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
