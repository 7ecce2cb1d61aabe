"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

import torch
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of the last dimension by its position's angle (RoFormer, eq. 34).

    Args:
        x: (B, T, H, D)
        cos, sin: (T, D/2) or (B, T, D/2), in fp32

    Returns:
        (B, T, H, D), in x's dtype
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position below `seq_len`, in fp32 whatever the model is cast to."""

    def __init__(self, dim: int, seq_len: int, base: float = 10000.0):
        super().__init__()
        self.dim, self.seq_len, self.base = dim, seq_len, base
        self.register_buffer("cos", torch.empty(seq_len, dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(seq_len, dim // 2), persistent=False)
        self._fill()

    def _fill(self) -> None:
        device = self.cos.device
        frequency = self.base ** (-torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu") / self.dim)
        angle = torch.outer(torch.arange(self.seq_len, dtype=torch.float64, device="cpu"), frequency)
        self.cos, self.sin = angle.cos().float().to(device), angle.sin().float().to(device)

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) would round the angles, .to_empty() lose them: make them anew where the module now is.
        super()._apply(fn, recurse)
        self._fill()
        return self

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin of positions start .. start + length - 1, (length, dim/2) each.

        Raises:
            ValueError: a position lies beyond `seq_len`.
        """
        end = start + length
        if end > self.seq_len:
            raise ValueError(f"a sequence of {end} tokens is longer than seq_len={self.seq_len}")
        return self.cos[start:end], self.sin[start:end]
