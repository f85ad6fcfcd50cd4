"""Small random Hugging Face models and tokenizers, saved to a folder: the parity oracle."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3": (LlamaConfig, LlamaForCausalLM, {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"rope_theta": 1e6}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"rope_theta": 1e6, "head_dim": 32}),
}
ARCHS = tuple(_CLASSES)

_SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def make_hf_model(
    arch: str, path: Path, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any
) -> PreTrainedModel:
    """Save a random fp32 model of ARCHS to `path` and return it, in eval mode.

    Biases and norms are random too, and the scale is such that the best token stands out.
    `overrides` are fields of the Hugging Face config; a small `max_shard_size` ("100KB") gives
    several files and an index.
    """
    config_class, model_class, defaults = _CLASSES[arch]
    config = config_class(**{**_SIZES, **defaults, **overrides})
    config.dtype = torch.float32
    config._attn_implementation = "eager"
    model = model_class(config).eval().to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


_CORPUS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "A page holds sixteen tokens; an adapter of rank 8 is small but not free.",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 42 1984 2026.",
    "Grüße aus München! ¿Qué tal? 你好，世界。 Привет, мир! 👩‍🚀🚀🎉",
)

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(path: Path, vocab_size: int = 384) -> Tokenizer:
    """Train a byte-level BPE tokenizer and save tokenizer.json and tokenizer_config.json to `path`.

    Ids 0 to 4 are special: <unk>, <s> (BOS, added by default), </s> (EOS), <|im_start|>,
    <|im_end|>. Any text round-trips; the chat template is ChatML.
    """
    path.mkdir(parents=True, exist_ok=True)
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": _CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return tokenizer
