"""Reads rows of a checkpoint's token embedding and head, without its other weights."""

from pathlib import Path

import torch

from loraplex.engine.checkpoint.spec_loading import load_spec
from loraplex.engine.checkpoint.weights_safetensors import SafetensorsSource
from loraplex.engine.errors import ConfigError
from loraplex.engine.model.shard import Piece

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class TokenRows:
    """The rows of a checkpoint, which is opened once."""

    def __init__(self, model_path: Path) -> None:
        """Raises ConfigError if the checkpoint cannot be read."""
        if model_path.suffix == ".gguf":
            from loraplex.engine.checkpoint.weights_gguf import GGUFSource

            self._source: GGUFSource | SafetensorsSource
            self._source = GGUFSource(model_path, load_spec(model_path))
        else:
            self._source = SafetensorsSource(model_path, tied=None, is_quantized=True)
        self._shapes = self._source.shapes()

    def read(self, module: str, tokens: range, dtype: torch.dtype) -> torch.Tensor:
        """Returns the rows of consecutive tokens, [len(tokens), hidden_size], rounded to `dtype`.

        Args:
            module: "model.embed_tokens" or "lm_head", which is the embedding if it is tied to it.

        Raises:
            ConfigError: the checkpoint stores the rows as integers.
        """
        name = f"{module}.weight"
        if name == _HEAD and _HEAD not in self._shapes:
            name = _EMBEDDING
        if name not in self._shapes:
            raise ConfigError(f"the base model's {module} is quantized: it has no rows to compare")
        num_tokens, width = self._shapes[name]
        rows = torch.empty(len(tokens), width, dtype=dtype)
        piece = Piece(tokens.start, tokens.stop, len(tokens), num_tokens)
        self._source.copy_to(name, rows, (piece, Piece(0, width, width, width)))
        return rows
