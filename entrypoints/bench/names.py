"""Names that the flags of benchmarks accept. Imports nothing, so that every command starts fast."""

BASE = "base"
POWER = "power"
POPULARITIES = ("distinct", "uniform", "skewed", "identical")
MODULES = ("q", "k", "v", "o", "gate", "up", "down")

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings", "rope_theta",
)  # fmt: skip
MODELS = {
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, 4096, 1e4),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000, 4096, 1e4),
    "llama-30b": (6656, 17920, 60, 52, 52, 32000, 2048, 1e4),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 32000, 4096, 1e4),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, 8192, 5e5),
    "tiny": (64, 128, 2, 4, 2, 256, 1024, 1e4),
}
"""Values of the fields in SIZES, by model."""
