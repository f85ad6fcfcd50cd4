"""Fills a Decoder with the weights of a checkpoint, or with random weights."""

import logging
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from loraplex.engine.checkpoint.pieces import copy_pieces
from loraplex.engine.checkpoint.quantization import quantization_of
from loraplex.engine.errors import ConfigError
from loraplex.engine.model.decoder import Decoder
from loraplex.engine.model.shard import Piece
from loraplex.engine.model.weight_slot import WeightSlot

logger = logging.getLogger("loraplex")

_MAX_LISTED = 8


class WeightSource(Protocol):
    """Reads a checkpoint on disk under Hugging Face's tensor names."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor by name, in the order of the files."""
        ...

    def copy_to(self, name: str, target: torch.Tensor, pieces: tuple[Piece, ...]) -> None:
        """Writes the pieces of one tensor to the start of `target`, of any dtype and device.

        It reads no more of the file than the pieces need.

        Args:
            pieces: one for each axis; empty: the whole tensor, whose shape `target` has.
        """
        ...

    def scales(self, name: str, pieces: tuple[Piece, ...]) -> torch.Tensor | None:
        """Returns a factor for each row of a tensor that `copy_to` writes as e4m3.

        Returns:
            float32 [rows of the pieces, 1]; None: the tensor has its own values.
        """
        ...


def load_weights(
    model: Decoder,
    model_path: Path,
    load_format: str = "auto",
    *,
    progress: bool = True,
    seed: int = 0,
) -> None:
    """Writes every weight of `model`, converted to its dtype, on its device.

    Args:
        model_path: a Hugging Face directory or a GGUF file.
        load_format: "auto", "safetensors", "gguf", or "dummy" for random weights without files.
        progress: show a bar.
        seed: seed of the random weights.

    Raises:
        ConfigError: the files are missing or of another format, or a tensor is missing, unknown
            or of another shape; the text names them.
    """
    if load_format == "dummy":
        fill_random(model, seed=seed, progress=progress)
        return
    source = _open_source(model, model_path, load_format)
    slots = model.slots()
    _check(model, slots, source.shapes(), model_path)
    with _bar(slots, progress, f"loading {model_path.name}") as bar:
        for name in source.shapes():
            _load(source, name, slots[name], model.shard.pieces(name))
            bar.update(slots[name].nbytes)


def _load(
    source: WeightSource, name: str, slot: WeightSlot, pieces: tuple[Piece, ...] | None
) -> None:
    """Writes one tensor, or this rank's pieces of it, with zeros around them."""

    def fill(target: torch.Tensor) -> None:
        if pieces is None or not all(piece.is_whole for piece in pieces):
            target.zero_()
        if pieces is not None:
            source.copy_to(name, target, pieces)

    scales = None if pieces is None else source.scales(name, pieces)
    if scales is not None and len(scales) < slot.shape[0]:
        padding = scales.new_ones(slot.shape[0] - len(scales), 1)
        scales = torch.cat((scales, padding))
    slot.write(fill, scales)


def fill_random(model: Decoder, *, seed: int = 0, progress: bool = True) -> None:
    """Writes random weights that keep activations near 1.

    Norms are 1, biases 0, matrices normal with variance 1 / fan-in.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    slots = model.slots()
    with _bar(slots, progress, "random weights") as bar:
        for name, slot in slots.items():
            pieces = model.shard.pieces(name) or ()
            slot.write(partial(_fill_one, name, pieces, generator))
            bar.update(slot.nbytes)


def _fill_one(
    name: str, pieces: tuple[Piece, ...], generator: torch.Generator, tensor: torch.Tensor
) -> None:
    if name.endswith("bias"):
        tensor.zero_()
    elif tensor.ndim == 1:
        tensor.fill_(1.0)
    else:
        _fill_normal(tensor, pieces, generator)


def _fill_normal(
    tensor: torch.Tensor, pieces: tuple[Piece, ...], generator: torch.Generator
) -> None:
    """Writes the pieces of a random matrix, so that all ranks together hold the same matrix as
    one rank would."""
    if all(piece.is_whole for piece in pieces):
        tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
        return
    shape = [piece.total for piece in pieces]
    full = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    full.normal_(0.0, shape[-1] ** -0.5, generator=generator)
    copy_pieces(full, tensor.zero_(), pieces)


def _open_source(model: Decoder, model_path: Path, load_format: str) -> WeightSource:
    is_gguf = model_path.suffix == ".gguf"
    if load_format not in ("auto", "gguf" if is_gguf else "safetensors"):
        raise ConfigError(
            f"load_format {load_format!r} does not fit {model_path}: use auto, or name a model of "
            "that format"
        )
    if is_gguf:
        from loraplex.engine.checkpoint.weights_gguf import GGUFSource

        return GGUFSource(model_path, model.spec)
    from loraplex.engine.checkpoint.weights_quantized import Fp8Source, PackedSource
    from loraplex.engine.checkpoint.weights_safetensors import SafetensorsSource

    tied = (model.shard.vocabulary, model.shard.hidden) if model.spec.tie_embeddings else None
    quantization = quantization_of(model_path)
    files = SafetensorsSource(model_path, tied=tied, is_quantized=quantization is not None)
    if quantization is None:
        return files
    if quantization.is_fp8:
        return Fp8Source(files, quantization)
    logger.warning(
        "%s: %d-bit weights are dequantized while they load, so no memory is saved%s",
        model_path,
        quantization.bits,
        "" if model.holds_fp8 else "; --quantization fp8 keeps 8 bits of them",
    )
    return PackedSource(files, quantization)


def _check(
    model: Decoder,
    slots: dict[str, WeightSlot],
    shapes: dict[str, tuple[int, ...]],
    model_path: Path,
) -> None:
    needed = {name: _full_shape(model, name, slot) for name, slot in slots.items()}
    missing = [name for name in slots if name not in shapes]
    unknown = [name for name in shapes if name not in slots]
    wrong = [
        f"{name} is {list(shapes[name])}, not {list(shape)}"
        for name, shape in needed.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = [
        f"{what} {', '.join(names[:_MAX_LISTED])}"
        + (f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else "")
        for what, names in (
            ("missing:", missing), ("unknown:", unknown), ("of the wrong shape:", wrong)
        )
        if names
    ]  # fmt: skip
    if problems:
        raise ConfigError(
            f"{model_path}: weights do not fit the configuration: tensors {'; '.join(problems)}"
        )


def _full_shape(model: Decoder, name: str, slot: WeightSlot) -> tuple[int, ...]:
    """Returns the shape that a checkpoint has of a tensor, of which this rank holds pieces."""
    pieces = model.shard.pieces(name)
    return tuple(piece.total for piece in pieces) if pieces else slot.shape


def _bar(slots: dict[str, WeightSlot], progress: bool, title: str) -> tqdm:
    total = sum(slot.nbytes for slot in slots.values())
    disable = None if progress else True  # None hides the bar if stderr is not a terminal
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=disable)
