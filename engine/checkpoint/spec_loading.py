"""Loads the spec of a checkpoint on disk."""

import dataclasses
import hashlib
from pathlib import Path

from loraplex.engine.errors import ConfigError
from loraplex.engine.model.spec import ModelSpec


def load_spec(model_path: Path) -> ModelSpec:
    """Reads the spec of a Hugging Face directory or a GGUF file, without its weights.

    Raises:
        ConfigError: the checkpoint is damaged, quantized or of an unsupported architecture.
    """
    if model_path.suffix == ".gguf":
        from loraplex.engine.checkpoint.gguf_config import spec_from_gguf

        spec, header = spec_from_gguf(model_path)
        files = [model_path]
    else:
        from loraplex.engine.checkpoint.hf_config import spec_from_config

        spec, header = spec_from_config(model_path)
        files = sorted(model_path.glob("*.safetensors"))
    return dataclasses.replace(spec, fingerprint=_fingerprint(header, files))


def _fingerprint(header: bytes, files: list[Path]) -> str:
    """Hashes the configuration and the names, sizes and times of the weight files."""
    digest = hashlib.sha256(header)
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error}") from None
        digest.update(f"\0{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()
