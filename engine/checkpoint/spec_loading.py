"""Which architectures there are, and the spec of a checkpoint on disk."""

import dataclasses
import hashlib
from pathlib import Path

from loraplex.engine.errors import ConfigError
from loraplex.engine.model.spec import ModelSpec


def load_spec(model_path: Path) -> ModelSpec:
    """Read the spec of a Hugging Face directory or a GGUF file; no weights are read.

    Raises:
        ConfigError: the checkpoint is of an unsupported architecture, quantized, or damaged.
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
    """Hash of the configuration and of the weight files' names, sizes and times; no full read."""
    digest = hashlib.sha256(header)
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error}") from None
        digest.update(f"\0{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()
