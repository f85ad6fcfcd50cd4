"""A worker that runs step by step and records what each step computed, and how."""

from pathlib import Path

import torch

from loraplex.engine.config import EngineConfig, GraphConfig
from loraplex.engine.worker.graphs.capture import GraphStep
from loraplex.engine.worker.model_runner import ModelRunner
from loraplex.engine.worker.worker import Worker
from loraplex.scheduler.worker_protocol import int_array

from helpers.running.step_driver import Sequence, StepDriver

STEPS: list[tuple[str, int]] = [
    ("x", 3), ("xy", 40), ("xy", 40), ("xyz", 1), ("xyz", 17), ("xyzw", 64), ("xyzw", 64),
    ("xyzwu", 30), ("u", 8), ("xyzwu", 40), ("xyzwuv", 200), ("xyzwuv", 1), ("xyzwuv", 1),
]  # fmt: skip
"""(sequences of make_sequences that a step feeds, most tokens of each)."""


def make_sequences(slots: dict[str, int]) -> dict[str, Sequence]:
    """Returns prompts of adapters a and b and of the base model. All answers are token 4, so that
    later inputs do not depend on rounding."""
    generator = torch.Generator().manual_seed(2)
    of_sequence = {
        "x": (2, ""), "y": (75, "a"), "z": (33, "b"), "w": (61, "a"), "u": (50, ""), "v": (110, "b")
    }  # fmt: skip
    bias = {"bias_token_ids": int_array([4]), "bias_values": torch.tensor([1e4]).numpy()}
    scores = {"num_logprobs": 2, "num_prompt_logprobs": 1}
    return {
        key: Sequence(
            torch.randint(3, 512, (n,), generator=generator).tolist(),
            slots[name],
            bias | (scores if key in "yz" else {}),
        )
        for key, (n, name) in of_sequence.items()
    }


class StepRunner:
    """Adapters a and b are resident.

    Attributes:
        said: of the capture, on a CPU.
        hidden: hidden states [T, hidden_size] of each `step`; None of those that were one graph.
        kernels: StepResult.kernels of each `step`.
        used: (size, kind, tokens) of each step that ran in pieces.

    Args:
        adapters: their folder.
        capture: on a CPU, which does not by itself; see helpers.fakes.fake_graphs.
    """

    def __init__(self, config: EngineConfig, adapters: Path, capture: bool = False) -> None:
        worker = Worker(config)
        block_tokens, max_num_seqs = config.memory.block_tokens, config.scheduler.max_num_seqs
        self.close = worker.close
        self.runner: ModelRunner = worker.parts.runner
        self.pool = self.runner.pool.pages
        self.driver = StepDriver(worker, block_tokens=block_tokens, max_num_seqs=max_num_seqs)
        self.slots = {"": -1, **{name: self.driver.load(name, adapters / name) for name in "ab"}}
        if capture:
            max_num_tokens = config.scheduler.max_num_batched_tokens
            self.said = self.runner.capture_graphs(GraphConfig(), max_num_tokens)
        self.mixed = self.runner._mixed_graphs
        self._last: torch.Tensor | None = None
        self.hidden: list[torch.Tensor | None] = []
        self.kernels: list[str] = []
        self.used: list[tuple[int, str | None, int]] = []
        self._watch()

    def _watch(self) -> None:
        run_eagerly = self.runner._run_eagerly
        self.runner._run_eagerly = lambda *args: self._remember(run_eagerly(*args))
        if self.mixed is not None:
            replay = self.mixed.replay

            def watched(step: GraphStep, num_tokens: int) -> torch.Tensor:
                self.used.append((step.size, step.kind, num_tokens))
                return self._remember(replay(step, num_tokens))

            self.mixed.replay = watched

    def _remember(self, hidden: torch.Tensor) -> torch.Tensor:
        self._last = hidden.clone()
        return hidden

    @property
    def static_buffers(self) -> list[torch.Tensor]:
        activations, mixed = self.mixed._activations, self.mixed
        return [
            activations.residual, activations.cos_sin, activations.q, activations.attended,
            mixed._hidden, mixed._inputs._inputs,
        ]  # fmt: skip

    @torch.inference_mode()
    def poison(self) -> None:
        """Spoil the shared buffers: a step must not read what the previous one left there."""
        for tensor in self.static_buffers:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1)

    def step(self, sequences: list[Sequence], chunk: int) -> None:
        self._last = None
        self.kernels.append(self.driver.step(sequences, chunk).kernels)
        self.hidden.append(self._last)
