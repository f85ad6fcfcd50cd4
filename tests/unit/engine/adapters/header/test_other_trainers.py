"""Files of other trainers than PEFT: fused projections, and weights in 8 bits with scales."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from loraplex.engine.adapters.peft_files import WEIGHTS_FILE, read_adapter
from loraplex.engine.errors import AdapterError

from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_folders import Q0, edit_config, edit_weights, make_target

FUSED = {
    "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
}
PARTS = ("lora_B.weight", "lora_magnitude_vector", "lora_B.bias")
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
RANK = {"r": 4, "alpha": 8}


def share_a(tensors: dict[str, torch.Tensor]) -> None:
    """Gives the projections of a fused layer the A of the first one."""
    for key in list(tensors):
        for first, *others in FUSED.values():
            if first in key and "lora_A" in key:
                for other in others:
                    tensors[key.replace(first, other)] = tensors[key]


def fuse(tensors: dict[str, torch.Tensor]) -> None:
    for fused, (first, *others) in FUSED.items():
        for key in [key for key in tensors if first in key]:
            rest = [tensors.pop(key.replace(first, other)) for other in others]
            whole = tensors.pop(key)
            is_row = any(part in key for part in PARTS)
            tensors[key.replace(first, fused)] = torch.cat([whole, *rest]) if is_row else whole


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_fused_layers_are_their_projections(
    hf_model: PreTrainedModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    """The fused file has the content of one that names the projections."""
    targets = [*TARGETS[:5]] if options else TARGETS
    pattern = {"layers.1.self_attn.(q|k|v|qkv)_proj": 3}
    folder = make_adapter(
        hf_model, tmp_path / "a", **RANK, targets=targets, alpha_pattern=pattern, **options
    )
    edit_weights(folder, share_a)
    apart = read_adapter("mine", folder, make_target())
    edit_weights(folder, fuse)
    edit_config(folder, target_modules=["qkv_proj", "gate_up_proj", *targets[5:]])
    fused = read_adapter("mine", folder, make_target())
    assert fused.content_hash == apart.content_hash
    assert torch.equal(fused.data, apart.data)


def test_refused_fused_layers(hf_model: PreTrainedModel, tmp_path: Path) -> None:
    folder = make_adapter(hf_model, tmp_path / "a", **RANK, targets=TARGETS)
    edit_weights(folder, share_a)
    edit_weights(folder, fuse)
    with pytest.raises(AdapterError, match=r"the file has weights of .*q_proj"):
        edit_config(folder, target_modules=["gate_up_proj", "down_proj"])
        read_adapter("mine", folder, make_target())
    edit_config(
        folder,
        target_modules=["qkv_proj", "gate_up_proj", "down_proj"],
        rank_pattern={"qkv_proj": 5},
    )
    with pytest.raises(AdapterError, match="qkv_proj has rank 4 in lora_A and 4 in lora_B, but 5"):
        read_adapter("mine", folder, make_target())
    edit_weights(folder, lambda tensors: tensors.update({Q0.format("B"): torch.zeros(64, 4)}))
    with pytest.raises(AdapterError, match="q_proj.*is there twice, once of .*qkv_proj"):
        read_adapter("mine", folder, make_target())
    edit_weights(folder, lambda tensors: tensors.pop(Q0.format("B")))
    key = Q0.format("B").replace("q_proj", "qkv_proj")
    edit_weights(folder, lambda tensors: tensors.update({key: tensors[key][:100]}))
    with pytest.raises(AdapterError, match="qkv_proj.*100 rows.*have 128"):
        read_adapter("mine", folder, make_target())


@pytest.mark.parametrize("shape", [(), (1,), (-1,), (-1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_with_scales(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            rows = tensors[key]
            largest = rows.abs().amax(dim=1, keepdim=True)
            scale = (largest if -1 in shape else largest.amax()) / 448
            tensors[key] = (rows / scale).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale"] = scale.reshape(shape)

    def dequantize(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if not key.endswith("_scale")]:
            scale = tensors.pop(f"{key}_scale")
            scale = scale.view(-1, 1) if scale.dim() else scale
            tensors[key] = tensors[key].float() * scale

    edit_weights(folder, quantize)
    assert load_file(folder / WEIGHTS_FILE)[Q0.format("A")].dtype is torch.float8_e4m3fn
    quantized = read_adapter("mine", folder, make_target(dtype=dtype))
    edit_weights(folder, lambda t: t[Q0.format("B") + "_scale"].mul_(2))
    other = read_adapter("mine", folder, make_target(dtype=dtype))
    assert other.content_hash != quantized.content_hash
    edit_weights(folder, lambda t: t[Q0.format("B") + "_scale"].mul_(0.5))
    edit_weights(folder, dequantize)
    expected = read_adapter("mine", folder, make_target(dtype=dtype))
    assert torch.equal(quantized.data, expected.data)


def test_scales_that_do_not_fit(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({Q0.format("A") + "_scale": torch.ones(3)}))
    with pytest.raises(AdapterError, match="weight_scale of lora_A is neither one"):
        read_adapter("mine", folder, make_target())
