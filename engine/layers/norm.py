"""Root-mean-square norm."""

import torch


class RMSNorm:
    """Norm over the last axis. Statistics in float32; rounds before the weight, as Hugging Face.

    Attributes:
        weight: [size].
    """

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.eps = eps
        self.weight = torch.empty(size, dtype=dtype, device=device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] to the same shape and dtype."""
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x32 * scale).to(x.dtype)
