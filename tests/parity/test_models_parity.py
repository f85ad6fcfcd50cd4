"""The decoder against Hugging Face: logits of random models of each architecture."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType

from helpers.models.gguf_files import write_gguf
from helpers.models.hf_models import LLAMA3_ROPE, make_hf_model
from helpers.models.logits import load_decoder, prompt_logits

CASES = {
    "llama-gqa": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mha-biases": ("llama", {"num_key_value_heads": 4, "attention_bias": True,
                                   "mlp_bias": True}),
    "llama-mqa-odd-sizes": ("llama", {"hidden_size": 72, "num_attention_heads": 3,
                                      "num_key_value_heads": 1, "intermediate_size": 100,
                                      "vocab_size": 301}),
    "llama-linear-rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama3-rope": ("llama3", {}),
    "mistral": ("mistral", {"rms_norm_eps": 1e-5}),
    "mistral-head-dim": ("mistral", {"head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
}  # fmt: skip


def _tokens(count: int, vocab_size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count,), generator=generator)


@torch.inference_mode()
def _hf_logits(model: transformers.PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    return model(prompt[None]).logits[0].float()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_hugging_face(case: str, tmp_path: Path) -> None:
    arch, overrides = CASES[case]
    reference = make_hf_model(arch, tmp_path, seed=3, **overrides)
    model = load_decoder(tmp_path)
    prompts = [_tokens(n, model.spec.vocab_size, seed=n) for n in (1, 17, 90)]
    for got, prompt in zip(prompt_logits(model, prompts), prompts, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, _hf_logits(reference, prompt), atol=1e-4, rtol=0)


def test_chunks_and_decode_steps_equal_one_prefill(tmp_path: Path) -> None:
    make_hf_model("llama3", tmp_path)
    model = load_decoder(tmp_path)
    prompts = [_tokens(n, model.spec.vocab_size, seed=n) for n in (23, 9)]
    whole = prompt_logits(model, prompts)
    for chunk in (1, 7):
        for got, want in zip(prompt_logits(model, prompts, chunk), whole, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_bfloat16_stays_within_rounding(arch: str, tmp_path: Path) -> None:
    """Both round at the same places; only the order of sums differs."""
    reference = make_hf_model(arch, tmp_path).to(torch.bfloat16)
    model = load_decoder(tmp_path, torch.bfloat16)
    prompt = _tokens(30, model.spec.vocab_size, seed=1)
    (got,) = prompt_logits(model, [prompt])
    want = _hf_logits(reference, prompt)
    exact = _hf_logits(reference.float(), prompt)
    assert (got - want).abs().max() < 0.1
    assert (got - exact).square().mean() < 2 * (want - exact).square().mean() + 1e-6


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_gguf_logits_equal_hugging_face(
    arch: str, overrides: dict[str, object], tmp_path: Path
) -> None:
    reference = make_hf_model(arch, tmp_path / "hf", **overrides)
    write_gguf(tmp_path / "model.gguf", reference)
    model = load_decoder(tmp_path / "model.gguf")
    prompt = _tokens(40, model.spec.vocab_size, seed=0)
    (got,) = prompt_logits(model, [prompt])
    torch.testing.assert_close(got, _hf_logits(reference, prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0"])
def test_gguf_types_are_dequantized(quantization: str, tmp_path: Path) -> None:
    """The reference takes the same rounded weights, read back through the decoder's parameters."""
    reference = make_hf_model("qwen2", tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", reference, GGMLQuantizationType[quantization])
    model = load_decoder(tmp_path / "model.gguf")
    parameters = model.parameters()
    for name, weight in reference.state_dict().items():
        step = weight.abs().max() / (100 if quantization == "Q8_0" else 200)
        assert (parameters[name] - weight).abs().max() <= step, name
    reference.load_state_dict(parameters)
    prompt = _tokens(12, model.spec.vocab_size, seed=0)
    (got,) = prompt_logits(model, [prompt])
    torch.testing.assert_close(got, _hf_logits(reference, prompt), atol=1e-4, rtol=0)


def test_gguf_rope_divisors_are_llama3_scaling(tmp_path: Path) -> None:
    reference = make_hf_model("llama3", tmp_path / "hf")
    inv_freq = reference.model.rotary_emb.inv_freq.numpy()
    dim = np.arange(0, 16, 2, dtype=np.float32) / 16
    divisors = (1.0 / 5e5**dim / inv_freq).astype(np.float32)
    assert divisors.max() == pytest.approx(LLAMA3_ROPE["factor"])
    write_gguf(tmp_path / "model.gguf", reference, rope_divisors=divisors)
    prompt = _tokens(100, 512, seed=0)
    (got,) = prompt_logits(load_decoder(tmp_path / "model.gguf"), [prompt])
    torch.testing.assert_close(got, _hf_logits(reference, prompt), atol=1e-4, rtol=0)
