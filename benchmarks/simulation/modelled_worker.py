"""A worker that computes nothing: a cost model says how long its steps and loads take."""

from dataclasses import dataclass

from loraplex.scheduler.worker_protocol import LoadAdapter, StepPlan


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds that a worker takes. The defaults are Llama-2-7B in bf16 on one H200.

    step = fixed + decode rows * row + context tokens * kv_token + prompt tokens * prompt_token
           + bytes of the step's distinct adapters / bandwidth
    load = bytes / link; loads run one after the other, while steps run.
    """

    fixed_s: float = 3.33e-3  # measured: all linear layers, 3.7 ms at 32 rows, 6.3 ms at 256
    row_s: float = 11.6e-6
    kv_token_s: float = 0.118e-6  # 524,288 bytes of KV at 4.45 TB/s, measured for 256 rows
    prompt_token_s: float = 26e-6  # assumed: 13 GFLOP at 500 TFLOP/s
    bandwidth: float = 4.28e12  # bytes/s, measured copy
    link: float = 54.8e9  # bytes/s, pinned host memory to device, measured
    page_bytes: int = 8 << 20  # over all layers: 16 tokens, or rank 8 on q, k, v, o in 2 pages


class ModelledWorker:
    """Computes when steps and loads end, from the plans and commands."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self._adapter_of: dict[int, int] = {}  # slot -> adapter slot
        self._bytes_of: dict[int, int] = {}  # adapter slot -> bytes
        self._free_at = 0.0
        self._link_free_at = 0.0

    def load(self, command: LoadAdapter, num_pages: int, now: float) -> float:
        """Start a load of `num_pages`; returns when it ends."""
        num_bytes = num_pages * self.cost.page_bytes
        self._bytes_of[command.adapter_slot] = num_bytes
        self._link_free_at = max(now, self._link_free_at) + num_bytes / self.cost.link
        return self._link_free_at

    def step(self, plan: StepPlan, now: float) -> tuple[float, int]:
        """Start a step; returns when it ends and its number of distinct adapters."""
        for slot in plan.freed_slots:
            self._adapter_of.pop(slot, None)
        for new in plan.new_requests:
            self._adapter_of[new.slot] = new.bindings[0].adapter_slot if new.bindings else -1
        adapters = {self._adapter_of[slot] for slot in plan.slots} - {-1}
        num_decodes = num_context = num_prompt = 0
        for position, num_tokens in zip(plan.positions, plan.num_tokens, strict=True):
            num_context += position + 1
            if num_tokens == 1:
                num_decodes += 1
            else:
                num_prompt += num_tokens
        cost = self.cost
        seconds = (
            cost.fixed_s
            + num_decodes * cost.row_s
            + num_context * cost.kv_token_s
            + num_prompt * cost.prompt_token_s
            + sum(self._bytes_of[adapter] for adapter in adapters) / cost.bandwidth
        )
        self._free_at = max(now, self._free_at) + seconds
        return self._free_at, len(adapters)
