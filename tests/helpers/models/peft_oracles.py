"""Judges answers by several PEFT models of one base, where one cannot hold all adapters."""

from pathlib import Path

import torch

from helpers.models.peft_oracle import Case, PeftOracle


class PeftOracles(PeftOracle):
    """A PeftOracle whose adapters are divided among several models."""

    def __init__(
        self,
        base: Path,
        adapters: Path,
        *,
        groups: list[list[str]],
        resized: dict[str, int] | None = None,
    ) -> None:
        """The first group's model is the base model, too. `resized` adapters have this number of
        tokens, and a model each."""
        resized = resized or {}
        names = [name for group in groups for name in group]
        super().__init__(base, adapters, names=names + list(resized))
        self._oracles = [PeftOracle(base, adapters, names=group) for group in groups]
        self._oracles += [
            PeftOracle(base, adapters, names=[name], num_tokens=num_tokens)
            for name, num_tokens in resized.items()
        ]

    @property
    def vocab_size(self) -> int:
        return self._oracles[0].vocab_size

    def logits(self, case: Case, tokens: list[int]) -> torch.Tensor:
        own = (oracle for oracle in self._oracles if case.adapter in oracle.names)
        return next(own, self._oracles[0]).logits(case, tokens)
