"""Loading weights: what is read, what is refused, and the words of each refusal."""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loraplex.engine.checkpoint.gguf_file import GGUFFile
from loraplex.engine.checkpoint.spec_loading import load_spec
from loraplex.engine.checkpoint.weights import load_weights
from loraplex.engine.checkpoint.weights_gguf import hf_name, unpermute
from loraplex.engine.errors import ConfigError
from loraplex.engine.model.decoder import Decoder

from helpers.models.gguf_files import write_gguf
from helpers.models.hf_models import make_hf_model


def _load(
    path: Path, dtype: torch.dtype = torch.float32, load_format: str = "auto", **options: Any
) -> Decoder:
    model = Decoder(load_spec(path), dtype=dtype, device="cpu")
    load_weights(model, path, load_format, progress=False, **options)
    return model


def _edit_weights(path: Path, drop: str = "", **tensors: torch.Tensor) -> None:
    """Rewrite model.safetensors; `__` stands for a dot in the names."""
    file = path / "model.safetensors"
    weights = load_file(file)
    weights.pop(drop, None)
    weights.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})
    save_file(weights, file)


def _edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_is_the_checkpoints(dtype: torch.dtype, tmp_path: Path) -> None:
    reference = make_hf_model("qwen2", tmp_path).state_dict()
    parameters = _load(tmp_path, dtype).parameters()
    assert parameters.keys() == reference.keys()
    for name, tensor in parameters.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, reference[name].to(dtype)), name


def test_fused_projections_hold_the_parts_in_order(tmp_path: Path) -> None:
    reference = make_hf_model("qwen2", tmp_path).state_dict()
    layer = _load(tmp_path).layers[1]
    prefix = "model.layers.1."
    qkv = [reference[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layer.attention.qkv.weight, torch.cat(qkv))
    bias = [reference[f"{prefix}self_attn.{name}_proj.bias"] for name in "qkv"]
    assert layer.attention.qkv.bias is not None
    assert torch.equal(layer.attention.qkv.bias, torch.cat(bias))
    gate_up = [reference[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(layer.mlp.gate_up.weight, torch.cat(gate_up))


def test_shards_equal_one_file(tmp_path: Path) -> None:
    make_hf_model("llama", tmp_path / "one")
    make_hf_model("llama", tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = _load(tmp_path / "one").parameters(), _load(tmp_path / "many").parameters()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_checkpoint_in_another_dtype_is_converted(tmp_path: Path) -> None:
    reference = make_hf_model("llama", tmp_path).to(torch.bfloat16)
    reference.save_pretrained(tmp_path)
    model = _load(tmp_path)
    assert model.spec.dtype == torch.bfloat16
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(model.parameters()[name], reference.state_dict()[name].float())


def test_missing_unknown_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    make_hf_model("llama", tmp_path)
    _edit_weights(
        tmp_path,
        drop="model.layers.2.self_attn.k_proj.weight",
        model__layers__0__self_attn__q_proj__bias=torch.zeros(64),
        model__norm__weight=torch.ones(65),
    )
    with pytest.raises(ConfigError) as refusal:
        _load(tmp_path)
    text = str(refusal.value)
    assert "missing: model.layers.2.self_attn.k_proj.weight" in text
    assert "unknown: model.layers.0.self_attn.q_proj.bias" in text
    assert "model.norm.weight is [65], not [64]" in text


def test_long_lists_are_cut(tmp_path: Path) -> None:
    make_hf_model("llama", tmp_path)
    _edit_json(tmp_path / "config.json", num_hidden_layers=5)
    with pytest.raises(ConfigError, match=r"missing: model\.layers\.3.* and 10 more"):
        _load(tmp_path)


def test_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    make_hf_model("llama", tmp_path)
    _edit_weights(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    _load(tmp_path)


def test_head_beside_a_tied_embedding(tmp_path: Path) -> None:
    reference = make_hf_model("llama", tmp_path, tie_word_embeddings=True)
    head = reference.state_dict()["model.embed_tokens.weight"].clone()
    _edit_weights(tmp_path, lm_head__weight=head)
    model = _load(tmp_path)
    assert model.head is model.embedding
    _edit_weights(tmp_path, lm_head__weight=head + 1)
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs"):
        _load(tmp_path)
    _edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    assert torch.equal(_load(tmp_path).head.weight, head + 1)


def test_untied_without_a_head_is_refused(tmp_path: Path) -> None:
    make_hf_model("llama", tmp_path, tie_word_embeddings=True)
    _edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=r"missing: lm_head\.weight"):
        _load(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    make_hf_model("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only pickle weights \(pytorch_model\.bin\)"):
        _load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        _load(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    make_hf_model("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for broken in (content[:-100], content[:5], b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(broken)
        with pytest.raises(ConfigError, match=r"cannot read .*model\.safetensors"):
            _load(tmp_path)


def test_broken_indexes_are_refused(tmp_path: Path) -> None:
    make_hf_model("llama", tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    gone = sorted(set(content["weight_map"].values()))[1]
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=f"missing: .*{gone}"):
        _load(tmp_path)
    content["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="outside its folder"):
        _load(tmp_path)
    index.write_text("[]")
    with pytest.raises(ConfigError, match="is damaged"):
        _load(tmp_path)


@pytest.mark.parametrize("index", ["shards", "stale", "damaged"])
def test_a_whole_file_goes_before_an_index(tmp_path: Path, index: str) -> None:
    """transformers does the same: a merged checkpoint is often saved over a sharded one."""
    make_hf_model("llama", tmp_path, seed=1, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    other = tmp_path / "other"
    make_hf_model("llama", other, seed=2)
    (other / "model.safetensors").rename(tmp_path / "model.safetensors")
    if index != "shards":
        shards[0].unlink()
    if index == "damaged":
        (tmp_path / "model.safetensors.index.json").write_text("{")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in _load(tmp_path).parameters().items():
        assert torch.equal(tensor, reference[name]), name


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    make_hf_model("llama", tmp_path)
    _edit_weights(tmp_path, model__norm__weight=torch.ones(64, dtype=torch.int8))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has dtype I8"):
        _load(tmp_path)


def test_load_format_must_fit_the_files(tmp_path: Path) -> None:
    reference = make_hf_model("llama", tmp_path)
    write_gguf(tmp_path / "m.gguf", reference)
    _load(tmp_path, load_format="safetensors")
    _load(tmp_path / "m.gguf", load_format="gguf")
    with pytest.raises(ConfigError, match="'gguf' does not fit"):
        _load(tmp_path, load_format="gguf")
    with pytest.raises(ConfigError, match="'safetensors' does not fit"):
        _load(tmp_path / "m.gguf", load_format="safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_weights_need_the_config_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    make_hf_model("qwen2", tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    first = _load(tmp_path, dtype, "dummy").parameters()
    again = _load(tmp_path, dtype, "dummy").parameters()
    other = _load(tmp_path, dtype, "dummy", seed=1).parameters()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]) and tensor.isfinite().all()
        if tensor.ndim == 2:
            assert not torch.equal(tensor, other[name])
            assert tensor.float().std() == pytest.approx(tensor.shape[1] ** -0.5, rel=0.1)
        else:
            assert (tensor == (0 if name.endswith("bias") else 1)).all()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_bar_counts_every_byte_on_a_terminal(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,
) -> None:
    make_hf_model("llama", tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    model = Decoder(load_spec(tmp_path), dtype=torch.float32, device="cpu")
    load_weights(model, tmp_path)
    shown = capsys.readouterr().err
    assert ("loading" in shown and "100%" in shown) == is_terminal


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])  # llama's q and k: whole heads
def test_gguf_large_tensors_are_read_in_parts(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = make_hf_model(architecture, tmp_path)
    write_gguf(tmp_path / "m.gguf", reference)
    monkeypatch.setattr("loraplex.engine.checkpoint.weights_gguf._CHUNK_ELEMS", 700)
    parameters = _load(tmp_path / "m.gguf").parameters()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(parameters[name], tensor), name


def test_unpermute_undoes_llama_cpps_order() -> None:
    """Row 2i of a stored head is row i of the original, row 2i + 1 is row i + half."""
    original = torch.arange(3 * 8).view(24, 1) * torch.ones(1, 5)
    stored = torch.empty_like(original)
    for head in range(3):
        for i in range(4):
            stored[head * 8 + 2 * i] = original[head * 8 + i]
            stored[head * 8 + 2 * i + 1] = original[head * 8 + 4 + i]
    assert torch.equal(unpermute(stored, 8), original)
    assert torch.equal(unpermute(stored[:, 0], 8), original[:, 0])


def test_unknown_gguf_tensors_are_named(tmp_path: Path) -> None:
    assert hf_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert hf_name("blk.3.ffn_gate_exps.weight") == "blk.3.ffn_gate_exps.weight"
    assert hf_name("output.weight") == "lm_head.weight"
    reference = make_hf_model("llama", tmp_path, attention_bias=True)
    write_gguf(tmp_path / "m.gguf", reference, llama__block_count=2)
    with pytest.raises(ConfigError, match=r"unknown: model\.layers\.2\."):
        _load(tmp_path / "m.gguf")


def test_gguf_reader_equals_the_gguf_packages(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, make_hf_model("qwen3", tmp_path), gguf.GGMLQuantizationType.Q8_0,
               some__list=[1, 2, 3], some__words=["a", "é", ""], some__flag=True,
               some__float=1.5)  # fmt: skip
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    assert [*ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.type, mine.offset) == (tensor.tensor_type, tensor.data_offset)
        want = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert (ours.read(tensor.name) == want).all()


def test_damaged_gguf_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, make_hf_model("llama", tmp_path, num_hidden_layers=1))
    content = path.read_bytes()
    header = content.index(b"blk.0")
    for size in (0, 3, 10, 24, 60, header - 8, header + 20, len(content) - 64):
        path.write_bytes(content[:size])
        with pytest.raises(ConfigError):
            GGUFFile(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + content[8:])
    with pytest.raises(ConfigError, match="version 1"):
        GGUFFile(path)
    path.write_bytes(content[:8] + b"\xff" * 8 + content[16:])
    with pytest.raises(ConfigError, match="damaged GGUF header"):
        GGUFFile(path)
    with pytest.raises(ConfigError, match="cannot read"):
        GGUFFile(tmp_path / "none.gguf")
