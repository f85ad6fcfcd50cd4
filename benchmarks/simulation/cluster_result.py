"""Results of one simulated run of a cluster, in virtual seconds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sim_result import SimTimeline


@dataclass(slots=True)
class ClusterResult:
    """Timelines by request, counts, and the engines in use as (second, number) at each change."""

    timelines: list[SimTimeline]
    engines_in_use: list[tuple[float, int]] = field(default_factory=list)
    num_loads: int = 0
    num_loads_first_half: int = 0  # until half of the requests had come
    num_preemptions: int = 0
    num_new_tokens: int = 0
    num_moves: int = 0
    num_recomputed_tokens: int = 0
    num_queued: int = 0  # requests that no engine could take when they came
    end_s: float = 0.0

    @property
    def engine_seconds(self) -> float:
        """Sum over the engines of the seconds in use, starts included."""
        ends = [at for at, _ in self.engines_in_use[1:]] + [self.end_s]
        return sum(
            (end - at) * number for (at, number), end in zip(self.engines_in_use, ends, strict=True)
        )

    def figures(self, objective_s: float) -> dict[str, Any]:
        """Returns the figures of the run. Requests that failed count as late."""
        ttfts = sorted(t.ttft_s for t in self.timelines if t.ttft_s is not None)
        in_time = sum(ttft <= objective_s for ttft in ttfts)
        adapters = [timeline.request.adapter for timeline in self.timelines]
        num_used = count_adapters(adapters)
        return {
            "requests": len(self.timelines),
            "failed": sum(bool(t.error_code) for t in self.timelines),
            "attainment": round(in_time / len(self.timelines), 4),
            "ttft_p50_s": round(percentile(ttfts, 50), 4),
            "ttft_p99_s": round(percentile(ttfts, 99), 4),
            "new_tokens_per_s": round(self.num_new_tokens / self.end_s),
            "adapter_loads": self.num_loads,
            "adapter_loads_second_half": self.num_loads - self.num_loads_first_half,
            "first_uses": num_used,
            "first_uses_second_half": num_used - count_adapters(adapters[: len(adapters) // 2]),
            "preemptions": self.num_preemptions,
            "queued": self.num_queued,
            "moves": self.num_moves,
            "recomputed_tokens": self.num_recomputed_tokens,
            "engine_seconds": round(self.engine_seconds),
            "end_s": round(self.end_s, 1),
        }


def count_adapters(adapters: Iterable[int | None]) -> int:
    """Returns the number of distinct adapters: loads that no placement over empty pools avoids."""
    return len(set(adapters) - {None})


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Returns the value at `percent` of an ordered sequence."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
