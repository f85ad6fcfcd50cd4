"""How a model is split: every element is held, once unless replicated, and heads stay whole."""

import pytest
import torch

from loraplex.engine.errors import ConfigError
from loraplex.engine.model.shard import Shard, shard_of, whole
from loraplex.engine.model.spec import ModelSpec


def spec(heads: int, kv_heads: int, inner: int = 24, vocab: int = 50) -> ModelSpec:
    return ModelSpec(
        architecture="LlamaForCausalLM", hidden_size=32, intermediate_size=inner, num_layers=1,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=4, vocab_size=vocab, max_position=64,
        rms_norm_eps=1e-5, rope_theta=1e4,
    )  # fmt: skip


def shards(model: ModelSpec, world_size: int) -> list[Shard]:
    return [shard_of(model, worker_rank=r, world_size=world_size) for r in range(world_size)]


def slice_of(full: torch.Tensor, shard: Shard, name: str) -> torch.Tensor:
    """An independent cut: pads, then takes the piece."""
    pieces = shard.pieces(name)
    assert pieces is not None
    out = torch.zeros([piece.size for piece in pieces])
    index = tuple(slice(p.start, p.stop) for p in pieces)
    kept = full[index]
    out[tuple(slice(0, n) for n in kept.shape)] = kept
    return out


@pytest.mark.parametrize(
    ("heads", "kv_heads", "inner", "vocab", "world_size"),
    [(8, 8, 24, 50, 2), (8, 2, 24, 50, 4), (8, 2, 23, 51, 2), (6, 3, 25, 7, 3), (8, 1, 3, 5, 8)],
)
def test_products_of_all_ranks_add_up(
    heads: int, kv_heads: int, inner: int, vocab: int, world_size: int
) -> None:
    model = spec(heads, kv_heads, inner, vocab)
    torch.manual_seed(world_size)
    x = torch.randn(3, 32, dtype=torch.float64)
    gate = torch.randn(2, inner, 32)
    down = torch.randn(32, inner)
    full = (gate[0].double() @ x.T).T * (gate[1].double() @ x.T).T
    expected = full @ down.double().T
    total = torch.zeros_like(expected)
    for shard in shards(model, world_size):
        own_gate = slice_of(gate[0], shard, "model.layers.0.mlp.gate_proj.weight").double()
        own_up = slice_of(gate[1], shard, "model.layers.0.mlp.up_proj.weight").double()
        own_down = slice_of(down, shard, "model.layers.0.mlp.down_proj.weight").double()
        total += ((x @ own_gate.T) * (x @ own_up.T)) @ own_down.T
    torch.testing.assert_close(total, expected)
    head = torch.randn(vocab, 32)
    logits = [x @ slice_of(head, s, "lm_head.weight").double().T for s in shards(model, world_size)]
    torch.testing.assert_close(torch.cat(logits, 1)[:, :vocab], x @ head.double().T)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_each_query_head_has_its_own_key_head(world_size: int) -> None:
    model = spec(8, 2)
    for shard in shards(model, world_size):
        group = model.num_heads // model.num_kv_heads
        for local in range(shard.num_heads):
            head = shard.query.start // 4 + local
            local_kv = local // (shard.num_heads // shard.num_kv_heads)
            assert shard.key.start // 4 + local_kv == head // group


def test_sizes_are_equal_on_all_ranks() -> None:
    for world_size in (2, 4):
        shapes = {shard.shapes for shard in shards(spec(8, 2, 23, 51), world_size)}
        assert len(shapes) == 1
    assert whole(spec(8, 2)).shapes[1].out_features == 8  # k_proj


def test_bias_of_a_row_parallel_module_is_added_once() -> None:
    first, second = shards(spec(8, 8), 2)
    assert first.pieces("model.layers.0.self_attn.o_proj.bias") == (first.hidden,)
    assert second.pieces("model.layers.0.self_attn.o_proj.bias") is None
    assert second.pieces("model.layers.0.self_attn.q_proj.bias") == (second.query,)
    assert second.pieces("model.norm.weight") == ()


@pytest.mark.parametrize(("heads", "kv_heads", "world_size"), [(9, 3, 2), (8, 2, 3), (12, 4, 6)])
def test_heads_that_cannot_be_dealt_are_refused(heads: int, kv_heads: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match="use one of 1"):
        shard_of(spec(heads, kv_heads), worker_rank=0, world_size=world_size)
