"""Layers of the decoder against Hugging Face's, and what the decoder hands to the backends."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from loraplex.engine.checkpoint.weights import fill_random
from loraplex.engine.model.decoder import Decoder
from loraplex.engine.model.layers.norm import RMSNorm
from loraplex.engine.model.layers.rope import RotaryEmbedding, inverse_frequencies
from loraplex.engine.model.shard import shard_of
from loraplex.engine.model.spec import ModelSpec

from helpers.kernels.naive_attention import PagedSequences

SPEC = ModelSpec(
    architecture="Qwen3ForCausalLM",
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=101,
    max_position=512,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    qk_norm=True,
)
SCALINGS = {
    "none": {},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_equals_hugging_face_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    theirs.weight.data.normal_()
    ours = RMSNorm(48, 1e-5, dtype=dtype, device=torch.device("cpu"))
    ours.weight.copy_(theirs.weight.detach())
    ctx = PagedSequences(SPEC, 1, 8, dtype).context([0], [7])
    x, residual = (torch.randn(2, 7, 48) * 30).to(dtype)
    assert torch.equal(ours(x, ctx).x, theirs(x))
    total = residual + x
    assert torch.equal(ours.add(x, residual, ctx).x, theirs(total))
    assert torch.equal(residual, total)


@pytest.mark.parametrize("kind", SCALINGS)
def test_angles_equal_hugging_face(kind: str) -> None:
    spec = replace(SPEC, rope_theta=5e5, head_dim=64, rope_scaling=SCALINGS[kind])
    scaling = {"rope_type": "default", **SCALINGS[kind], "rope_theta": 5e5}
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters=scaling,
        max_position_embeddings=131072,
    )  # fmt: skip
    theirs = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(inverse_frequencies(spec), theirs.inv_freq, rtol=3e-7, atol=0)
    positions = torch.tensor([0, 1, 5, 511, 4096, 131071])
    rope = RotaryEmbedding(spec, torch.device("cpu"))
    cos_sin = torch.empty(6, 64)
    rope.cos_sin(positions, cos_sin)
    # The difference from float64 is the rounding of the angle: half an ulp of 131071.
    angles = positions[:, None].double() * rope.inv_freq.double()
    want = torch.cat((angles.cos(), angles.sin()), dim=1)
    torch.testing.assert_close(cos_sin.double(), want, atol=5e-3, rtol=0)
    if kind != "llama3":  # whose blended frequencies may differ in the last bit
        hf_cos, hf_sin = theirs(torch.zeros(1), positions[None])
        assert torch.equal(cos_sin, torch.cat((hf_cos[0, :, :32], hf_sin[0, :, :32]), dim=1))


def test_unknown_rope_scaling_is_an_error() -> None:
    with pytest.raises(ValueError, match="yarn"):
        inverse_frequencies(replace(SPEC, rope_scaling={"rope_type": "yarn"}))


NAMES = [module.name for module in SPEC.modules]


def _decoder(spec: ModelSpec = SPEC) -> Decoder:
    model = Decoder(spec, dtype=torch.float32, device="cpu")
    fill_random(model, progress=False)
    return model


def test_module_shapes_follow_the_modules() -> None:
    shapes = dict(zip(NAMES, _decoder().module_shapes(), strict=True))
    sizes = {name: (s.in_features, s.out_features) for name, s in shapes.items()}
    assert sizes == {
        "q_proj": (48, 96), "k_proj": (48, 32), "v_proj": (48, 32), "o_proj": (96, 48),
        "gate_proj": (48, 80), "up_proj": (48, 80), "down_proj": (80, 48),
    }  # fmt: skip


def test_shapes_of_a_shard() -> None:
    shapes = dict(zip(NAMES, shard_of(SPEC, worker_rank=1, world_size=2).shapes, strict=True))
    assert (shapes["q_proj"].in_features, shapes["q_proj"].out_features) == (48, 48)
    assert (shapes["down_proj"].in_features, shapes["down_proj"].out_features) == (40, 48)


@torch.inference_mode()
def test_each_layer_asks_for_its_adapters_once_a_group() -> None:
    model = _decoder()
    sequences = PagedSequences(SPEC, 1, 8)
    model.forward(torch.arange(5), sequences.context([0], [5], with_lora=True))
    seen = [
        (layer, tuple(NAMES[m] for m in group.modules), group.out_starts, x, y)
        for layer, group, x, y in sequences.lora.calls
    ]
    want = []
    for layer in range(2):
        want += [
            (layer, ("q_proj", "k_proj", "v_proj"), (0, 96, 128), (5, 48), (5, 160)),
            (layer, ("o_proj",), (0,), (5, 96), (5, 48)),
            (layer, ("gate_proj", "up_proj"), (0, 80), (5, 48), (5, 160)),
            (layer, ("down_proj",), (0,), (5, 80), (5, 48)),
        ]
    assert seen == want
    groups = {id(group) for _, group, _, _ in sequences.lora.calls}
    assert len(groups) == 4  # made once, shared by the layers
    sequences.lora.calls.clear()
    model.forward(torch.arange(5), sequences.context([0], [5]))
    assert sequences.lora.calls == []


@torch.inference_mode()
def test_rows_do_not_depend_on_their_neighbours() -> None:
    model = _decoder()
    tokens = [torch.arange(9), torch.arange(50, 54)]
    together = PagedSequences(SPEC, 2, 12)
    hidden = model.forward(torch.cat(tokens), together.context([0, 0], [9, 4]))
    for part, ids in zip(hidden.split([9, 4]), tokens, strict=True):
        alone = PagedSequences(SPEC, 1, 12)
        want = model.forward(ids, alone.context([0], [len(ids)]))
        torch.testing.assert_close(part, want, atol=1e-5, rtol=0)
    assert hidden.shape == (13, 48)
    logits = model.logits(hidden[:2])
    assert logits.shape == (2, 101) and logits.dtype == torch.float32


@torch.inference_mode()
def test_keys_and_values_land_in_the_pool_rows_of_their_tokens() -> None:
    model = _decoder()
    sequences = PagedSequences(SPEC, 2, 12)
    ctx = sequences.context([0, 0], [5, 3])
    model.forward(torch.arange(8), ctx)
    rows = sequences.kv.flatten(1, 3)  # [layers, rows, kv_heads, head_dim]
    written = torch.cat((ctx.kv_rows, ctx.kv_rows + sequences.block))
    assert rows[:, written].isfinite().all()
    others = torch.ones(rows.shape[1], dtype=torch.bool)
    others[written] = False
    assert rows[:, others].isnan().all()
