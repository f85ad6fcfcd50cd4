"""Options of the scheduler."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of the queues."""

    max_num_seqs: int = field(default=256, metadata={"help": "requests running at one time"})
    max_num_batched_tokens: int = field(
        default=8192, metadata={"help": "token budget of one step, prefill and decode together"}
    )
    max_queue_len: int = field(
        default=16384, metadata={"help": "waiting requests; one more is refused"}
    )
    max_steps_in_flight: int = field(
        default=2,
        metadata={"help": "steps handed to the workers before the first one's result is read"},
    )

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): each running request decodes one token a step"
            )
