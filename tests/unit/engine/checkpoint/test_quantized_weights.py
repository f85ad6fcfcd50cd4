"""Quantized checkpoints: what they stand for, what is said about them, and what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex import LLM, SamplingParams
from loraplex.backends.linear.contract import FP8, LinearSpec
from loraplex.backends.linear.torch_linear import TorchLinear
from loraplex.engine.checkpoint.spec_loading import load_spec
from loraplex.engine.checkpoint.weights import load_weights
from loraplex.engine.errors import ConfigError
from loraplex.engine.model.decoder import Decoder
from loraplex.engine.model.shard import shard_of

from helpers.kernels.fp8_oracle import quantize_oracle
from helpers.models.hf_models import make_hf_model
from helpers.models.quantized_files import LAYOUTS, quantize_files

CPU = torch.device("cpu")


def load(path: Path, *, in_fp8: bool = False, ranks: int = 1) -> list[dict[str, torch.Tensor]]:
    """Returns the parameters of each rank."""
    spec = load_spec(path)
    found = []
    for rank in range(ranks):
        linear = TorchLinear(LinearSpec(torch.float32, CPU, FP8)) if in_fp8 else None
        shard = shard_of(spec, worker_rank=rank, world_size=ranks)
        model = Decoder(spec, dtype=torch.float32, device=CPU, shard=shard, linear=linear)
        load_weights(model, path, progress=False)
        found.append(model.parameters())
    return found


def make(path: Path, layout: str, **sizes: Any) -> dict[str, torch.Tensor]:
    make_hf_model("llama", path, seed=4, **sizes)
    return quantize_files(path, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_what_the_files_stand_for(layout: str, tmp_path: Path) -> None:
    meant = make(tmp_path, layout)
    (got,) = load(tmp_path)
    assert got.keys() == meant.keys()
    for name, tensor in meant.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_hold_the_parts(layout: str, tmp_path: Path) -> None:
    """The feed-forward size is odd in ranks: the last one holds padding."""
    make(tmp_path, layout, num_key_value_heads=4, intermediate_size=144)
    (whole,) = load(tmp_path)
    ranks = load(tmp_path, ranks=4)
    assert len(ranks[0]["model.layers.0.mlp.up_proj.weight"]) == 36
    for name, dim in (("mlp.up_proj", 0), ("mlp.down_proj", 1), ("self_attn.o_proj", 1)):
        full = f"model.layers.1.{name}.weight"
        joined = torch.cat([rank[full] for rank in ranks], dim)
        assert torch.equal(joined, whole[full]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_fp8(layout: str, tmp_path: Path) -> None:
    """Weights of e4m3 with a scale a channel or a matrix are kept; all others are rounded."""
    meant = make(tmp_path, layout)
    (got,) = load(tmp_path, in_fp8=True)
    is_kept = layout.startswith(("compressed-fp8", "fp8-static"))
    for name, tensor in meant.items():
        if name.endswith("_proj.weight") and not is_kept:
            tensor = quantize_oracle(tensor).float()
        step = tensor.abs() / 7 if not is_kept else 0 * tensor  # a tie may go either way
        error = (got[name] - tensor).abs()
        assert (error <= step + 1e-6).all(), name
        assert (error > 1e-6).float().mean() < 0.01, name


def answers(path: Path, **options: Any) -> list[Any]:
    with LLM(
        str(path), device="cpu", in_process=True, num_pages=64, skip_tokenizer_init=True, **options
    ) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": list(range(3, 40))}],
            SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False,
                           logprobs=1, prompt_logprobs=1),
            use_tqdm=False,
        )  # fmt: skip
    entries = [*outputs[0].prompt_logprobs[1:], *outputs[0].outputs[0].logprobs]
    return [{token: value.logprob for token, value in entry.items()} for entry in entries]


def test_an_fp8_checkpoint_runs_in_fp8_without_a_flag(tmp_path: Path) -> None:
    """It answers as the checkpoint of its numbers does when that is rounded to fp8."""
    meant = make(tmp_path / "fp8", "compressed-fp8-channel")
    make_hf_model("llama", tmp_path / "plain", seed=4)
    save_file(meant, tmp_path / "plain" / "model.safetensors")
    quantized = answers(tmp_path / "fp8")
    assert quantized == answers(tmp_path / "plain", quantization="fp8")
    assert quantized != answers(tmp_path / "plain")


def test_integers_are_dequantized_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "gptq")
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    assert "4-bit weights are dequantized" in caplog.text and "--quantization fp8" in caplog.text


def test_projections_left_in_16_bits_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "compressed-fp8-channel")
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(file)
    plain = torch.randn(tensors[name].shape)
    save_file(tensors | {name: plain}, file)
    with caplog.at_level(logging.WARNING):
        (got,) = load(tmp_path)
    assert f"1 projections that the checkpoint keeps in 16 bits are rounded to fp8 too: {name}" in (
        caplog.text
    )
    assert torch.equal(got[name], plain)


def test_a_missing_scale_is_named(tmp_path: Path) -> None:
    make(tmp_path / "fp8", "compressed-fp8-channel")
    make(tmp_path / "awq", "awq")
    for folder, kind in (("fp8", "weight_scale"), ("awq", "scales")):
        file = tmp_path / folder / "model.safetensors"
        tensors = load_file(file)
        del tensors[f"model.layers.2.mlp.up_proj.{kind}"]
        save_file(tensors, file)
        with pytest.raises(
            ConfigError, match=r"model\.layers\.2\.mlp\.up_proj.* the checkpoint has"
        ):
            load(tmp_path / folder)


GROUPS = {"quant_method": "compressed-tensors", "format": "int-quantized"}


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 3}, "'gptq' are not supported (3 bits)"),
        ({"quant_method": "gptq"}, "the field 'bits' is missing"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        (GROUPS | {"config_groups": {"a": {"weights": {
            "num_bits": 8, "type": "int", "strategy": "channel"}}}}, "8-bit int, by channel"),
        (GROUPS | {"config_groups": {"a": {"weights": 1}, "b": {"weights": 2}}}, "differently"),
        (GROUPS | {"config_groups": {}}, "differently"),
    ],
)  # fmt: skip
def test_others_are_refused_by_name(
    quantization: dict[str, Any], words: str, tmp_path: Path
) -> None:
    make_hf_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": quantization})
    )
    with pytest.raises(ConfigError) as refusal:
        load_spec(tmp_path)
    text = str(refusal.value)
    assert words in text and "use one of these, the unquantized checkpoint" in text
