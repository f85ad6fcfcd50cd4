"""What the flags of `loraplex bench` may name. Loads nothing, so that every command may read it."""

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
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, 8192, 5e5),
    "tiny": (64, 128, 2, 4, 2, 256, 1024, 1e4),
}
"""Fields of config.json by the names in SIZES."""

SETTINGS = {
    "S1": ("llama-2-7b", (8,)),
    "S2": ("llama-2-7b", (64, 32, 16, 8)),
    "S4": ("llama-2-13b", (64, 32, 16)),
}
"""S-LoRA's (arXiv 2311.03285): base model and ranks; adapters are on q, k, v and o."""
