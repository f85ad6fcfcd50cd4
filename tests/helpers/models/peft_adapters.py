"""Real PEFT adapters with random weights, saved to a folder as PEFT saves them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
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
    save_embedding_layers: bool | str = False,
    saved_tokens: tuple[int, ...] = (),
    **options: Any,
) -> Path:
    """Save an adapter of `hf_model` to `path`; the model itself comes back unchanged.

    A and B are both random, and scaled so that each update B A is `strength` times as large as
    the weight it is added to: outputs differ plainly from the base's. Magnitudes and biases differ
    as plainly from those at the start of training. `options` are further fields of LoraConfig;
    of its modules_to_save, the rows of `saved_tokens` alone are changed.
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
    embedding, head = hf_model.get_input_embeddings(), hf_model.get_output_embeddings()
    peft_model = get_peft_model(hf_model, config)
    generator = torch.Generator().manual_seed(seed)
    try:
        for module in peft_model.modules():
            if isinstance(module, LoraLayer):
                _randomise(module, strength, generator)
            elif isinstance(module, TrainableTokensLayer):
                _randomise_rows(module.trainable_tokens_delta[NAME], generator)
            elif isinstance(module, ModulesToSaveWrapper):
                _randomise_some(module.modules_to_save[NAME].weight, saved_tokens, generator)
        peft_model.save_pretrained(str(path), save_embedding_layers=save_embedding_layers)
    finally:
        peft_model.unload()  # leaves the trained copies of modules_to_save in the model
        hf_model.set_input_embeddings(embedding)
        hf_model.set_output_embeddings(head)
        if hasattr(hf_model, "peft_config"):
            del hf_model.peft_config
        with torch.no_grad():
            for name, bias in biases.items():
                hf_model.get_parameter(name).copy_(bias).requires_grad_(False)
    return Path(path)


def _randomise_rows(rows: torch.Tensor, generator: torch.Generator) -> None:
    with torch.no_grad():
        rows.copy_(rows.std() * torch.randn(rows.shape, generator=generator))


def _randomise_some(
    matrix: torch.Tensor, tokens: tuple[int, ...], generator: torch.Generator
) -> None:
    with torch.no_grad():
        for token in tokens:
            row = torch.randn(matrix.shape[1], generator=generator)
            matrix[token] = matrix.std() * row


def _randomise(layer: LoraLayer, strength: float, generator: torch.Generator) -> None:
    if NAME in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME]
        target = strength * layer.get_base_layer().weight.float().std()
        with torch.no_grad():
            a.copy_(torch.randn(a.shape, generator=generator))
            scale = target / (abs(layer.scaling[NAME]) * len(a) ** 0.5)
            b.copy_(torch.randn(b.shape, generator=generator) * scale)
        return
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
