"""Reads the weights of a Hugging Face directory from one or more safetensors files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplex.engine.errors import ConfigError
from loraplex.engine.model.shard import Piece

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("F64", "F32", "F16", "BF16")
_E4M3 = "F8_E4M3"
_QUANTIZED_DTYPES = (*_DTYPES, _E4M3, "I64", "I32")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_IGNORED = ".rotary_emb.inv_freq"  # a buffer in old checkpoints that the config defines too


class SafetensorsSource:
    """Implements WeightSource for safetensors; leaves out a head that equals a tied embedding.

    The sources of quantized checkpoints read through it.

    The files are mapped, and each tensor is copied from the mapping to its target.

    Raises:
        ConfigError: there is no safetensors file, one is missing or damaged, or a tensor does not
            hold floats.
    """

    def __init__(
        self, model_path: Path, *, tied: tuple[Piece, ...] | None, is_quantized: bool = False
    ) -> None:
        """Opens the files.

        Args:
            tied: the pieces that this rank holds of an embedding which is the head too; it compares
                these alone. None: the head has weights of its own.
            is_quantized: accept e4m3 and integers.
        """
        self._path = model_path
        self._dtypes = _QUANTIZED_DTYPES if is_quantized else _DTYPES
        self._files: dict[str, Any] = {}  # tensor name to the open file that holds it
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in _find_files(model_path):
            self._open(path)
        if tied is not None and _HEAD in self._files:
            self._drop_tied_head(tied)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def copy_to(self, name: str, target: torch.Tensor, pieces: tuple[Piece, ...]) -> None:
        if all(piece.is_whole for piece in pieces):
            target.copy_(self.tensor(name))
            return
        part = self._part(name, pieces)
        target[tuple(map(slice, part.shape))].copy_(part)

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a whole tensor as it is stored, on the CPU."""
        found: torch.Tensor = self._files[name].get_tensor(name)
        return found

    def is_e4m3(self, name: str) -> bool:
        return bool(self._files[name].get_slice(name).get_dtype() == _E4M3)

    def scales(self, name: str, pieces: tuple[Piece, ...]) -> torch.Tensor | None:
        return None

    def _part(self, name: str, pieces: tuple[Piece, ...]) -> torch.Tensor:
        index = tuple(slice(piece.start, piece.stop) for piece in pieces)
        return self._files[name].get_slice(name)[index]

    def _drop_tied_head(self, pieces: tuple[Piece, ...]) -> None:
        if _EMBEDDING in self._files and not self._are_equal(_HEAD, _EMBEDDING, pieces):
            raise ConfigError(
                f"{self._path}: tie_word_embeddings is set, but {_HEAD} differs from "
                f"{_EMBEDDING}; set it to false in config.json"
            )
        del self._files[_HEAD], self._shapes[_HEAD]

    def _are_equal(self, one: str, other: str, pieces: tuple[Piece, ...]) -> bool:
        if self._shapes[one] != self._shapes[other]:
            return False
        return torch.equal(self._part(one, pieces), self._part(other, pieces))

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt", device="cpu")
            for name in file.offset_keys():
                if name.endswith(_IGNORED):
                    continue
                header = file.get_slice(name)
                if header.get_dtype() not in self._dtypes:
                    raise ConfigError(
                        f"{path}: {name} has dtype {header.get_dtype()}, which config.json does "
                        "not explain: it has no quantization_config of a kind that stores it"
                    )
                self._files[name] = file
                self._shapes[name] = tuple(header.get_shape())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from None


def _find_files(model_path: Path) -> list[Path]:
    """Returns a whole model.safetensors, else the files of the index, as transformers does."""
    if (model_path / _SINGLE).is_file():
        return [model_path / _SINGLE]
    index = model_path / _INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} is damaged: {error}") from None
        for name in names:
            if Path(name).name != name:
                raise ConfigError(f"{index} names a file outside its folder: {name}")
        files = [model_path / name for name in sorted(names)]
        absent = [path.name for path in files if not path.is_file()]
        if absent:
            raise ConfigError(f"{model_path}: the index names files that are missing: {absent}")
        return files
    pickles = [path.name for pattern in _PICKLES for path in model_path.glob(pattern)]
    if pickles:
        raise ConfigError(
            f"{model_path} has only pickle weights ({', '.join(sorted(pickles)[:3])}), which can "
            "run code and are refused; convert them to safetensors"
        )
    raise ConfigError(
        f"{model_path} has no {_SINGLE} and no {_INDEX}; --load-format dummy runs without weights"
    )
