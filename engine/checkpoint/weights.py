"""Fills a Decoder with the weights of a checkpoint, or with random weights."""

from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from loraplex.engine.checkpoint.pieces import copy_pieces
from loraplex.engine.errors import ConfigError
from loraplex.engine.model.decoder import Decoder
from loraplex.engine.model.shard import Piece

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
    parameters = model.parameters()
    _check(model, parameters, source.shapes(), model_path)
    with _bar(parameters, progress, f"loading {model_path.name}") as bar:
        for name in source.shapes():
            target, pieces = parameters[name], model.shard.pieces(name)
            if pieces is None or not all(piece.is_whole for piece in pieces):
                target.zero_()  # the padding
            if pieces is not None:
                source.copy_to(name, target, pieces)
            bar.update(target.nbytes)


def fill_random(model: Decoder, *, seed: int = 0, progress: bool = True) -> None:
    """Writes random weights that keep activations near 1.

    Norms are 1, biases 0, matrices normal with variance 1 / fan-in.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    parameters = model.parameters()
    with _bar(parameters, progress, "random weights") as bar:
        for name, tensor in parameters.items():
            if name.endswith("bias"):
                tensor.zero_()
            elif tensor.ndim == 1:
                tensor.fill_(1.0)
            else:
                _fill_normal(tensor, model.shard.pieces(name) or (), generator)
            bar.update(tensor.nbytes)


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
    from loraplex.engine.checkpoint.weights_safetensors import SafetensorsSource

    tied = (model.shard.vocabulary, model.shard.hidden) if model.spec.tie_embeddings else None
    return SafetensorsSource(model_path, tied=tied)


def _check(
    model: Decoder,
    parameters: dict[str, torch.Tensor],
    shapes: dict[str, tuple[int, ...]],
    model_path: Path,
) -> None:
    needed = {name: _full_shape(model, name, tensor) for name, tensor in parameters.items()}
    missing = [name for name in parameters if name not in shapes]
    unknown = [name for name in shapes if name not in parameters]
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


def _full_shape(model: Decoder, name: str, tensor: torch.Tensor) -> tuple[int, ...]:
    """Returns the shape that a checkpoint has of a tensor, of which this rank holds pieces."""
    pieces = model.shard.pieces(name)
    return tuple(piece.total for piece in pieces) if pieces else tuple(tensor.shape)


def _bar(parameters: dict[str, torch.Tensor], progress: bool, title: str) -> tqdm:
    total = sum(tensor.nbytes for tensor in parameters.values())
    disable = None if progress else True  # None hides the bar if stderr is not a terminal
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=disable)
