"""Copies a worker rank's pieces of a tensor."""

import torch

from loraplex.engine.model.shard import Piece


def copy_pieces(full: torch.Tensor, target: torch.Tensor, pieces: tuple[Piece, ...]) -> None:
    """Copies the pieces of a whole tensor to the start of `target`."""
    part = full[tuple(slice(piece.start, piece.stop) for piece in pieces)]
    target[tuple(map(slice, part.shape))].copy_(part)
