"""Real PEFT adapters with random weights, saved to a folder as PEFT saves them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

NAME = "default"


def make_adapter(
    hf_model: PreTrainedModel,
    path: Path,
    *,
    r: int,
    alpha: float,
    targets: list[str] | str,
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    seed: int = 0,
    strength: float = 2.0,
    **options: Any,
) -> Path:
    """Save an adapter of `hf_model` to `path`; the model itself comes back unchanged.

    A and B are both random, and scaled so that each update B A is `strength` times as large as
    the weight it is added to: outputs differ plainly from the base's. Magnitudes and biases differ
    as plainly from those at the start of training. `options` are further fields of LoraConfig.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=targets,
        use_rslora=use_rslora,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        task_type="CAUSAL_LM",
        **options,
    )
    biases = {n: p.clone() for n, p in hf_model.named_parameters() if n.endswith("bias")}
    peft_model = get_peft_model(hf_model, config)
    generator = torch.Generator().manual_seed(seed)
    try:
        for module in peft_model.modules():
            if isinstance(module, LoraLayer):
                _randomise(module, strength, generator)
        peft_model.save_pretrained(str(path), save_embedding_layers=False)
    finally:
        peft_model.unload()
        if hasattr(hf_model, "peft_config"):
            del hf_model.peft_config
        with torch.no_grad():
            for name, bias in biases.items():
                hf_model.get_parameter(name).copy_(bias).requires_grad_(False)
    return Path(path)


def _randomise(layer: LoraLayer, strength: float, generator: torch.Generator) -> None:
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    rank, in_features = a.shape
    target = strength * layer.get_base_layer().weight.float().std()
    b_std = target / (abs(layer.scaling[NAME]) * rank**0.5)
    with torch.no_grad():
        a.copy_(torch.randn(a.shape, generator=generator))
        b.copy_(torch.randn(b.shape, generator=generator) * b_std)
        if NAME in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[NAME].weight
            magnitude.mul_(1 + 0.3 * torch.randn(magnitude.shape, generator=generator))
        bias = layer.get_base_layer().bias
        for trained in (
            layer.lora_B[NAME].bias,
            bias if bias is None or bias.requires_grad else None,
        ):
            if trained is not None:
                trained.copy_(0.3 * torch.randn(trained.shape, generator=generator))
