"""Rotary position embedding (RoFormer, arXiv 2104.09864) and its extension to long context (YaRN, arXiv 2309.00071)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mla_lm.errors import UserError


@dataclass
class YarnConfig:
    """YaRN as DeepSeek-V2 uses it (arXiv 2405.04434, section 3.1.4): it slows down the low frequencies only.

    A pair that makes more than `beta_fast` turns within the trained length keeps its frequency. The frequency of a pair
    that makes fewer than `beta_slow` turns is divided by `factor`. In between, a linear ramp blends the two.
    """

    factor: float = 1.0  # seq_len over the trained length; 1 is plain RoPE
    original_seq_len: int | None = None  # the trained length, in tokens; None: seq_len / factor
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0  # sharpens attention over longer context: scores times (0.1 mscale ln(factor) + 1)^2
    mscale_all_dim: float = 1.0  # the same for the dimensions that are not rotated; DeepSeek sets both alike

    def check(self) -> None:
        """Raise UserError (a ValueError) for invalid values."""
        if not 1 <= self.factor < math.inf:
            raise UserError(f"yarn.factor={self.factor} must be at least 1 (1 turns YaRN off)")
        if self.original_seq_len is not None and self.original_seq_len < 1:
            raise UserError(f"yarn.original_seq_len={self.original_seq_len} must be at least 1")
        if not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise UserError(
                f"yarn.beta_slow={self.beta_slow} and beta_fast={self.beta_fast} must be above 0, beta_slow the smaller"
            )

    @property
    def score_scale(self) -> float:
        """Factor on all attention scores."""
        return sharpening(self.factor, self.mscale_all_dim) ** 2

    @property
    def amplitude(self) -> float:
        """Factor on the cosines and sines."""
        return sharpening(self.factor, self.mscale) / sharpening(self.factor, self.mscale_all_dim)

    def trained_length(self, seq_len: int) -> float:
        """The trained length in tokens, where the model now has `seq_len`."""
        return self.original_seq_len or seq_len / self.factor

    def slow_down(self, frequency: Tensor, base: float, seq_len: int) -> Tensor:
        """Turn plain RoPE's frequencies, (D/2,) radians per position, into YaRN's (arXiv 2309.00071, section 3.2)."""
        if self.factor == 1:
            return frequency
        dim = 2 * len(frequency)
        trained = self.trained_length(seq_len)

        def pair_that_turns(times: float) -> float:
            return dim * math.log(trained / (2 * math.pi * times)) / (2 * math.log(base))

        first = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        last = min(math.ceil(pair_that_turns(self.beta_slow)), dim - 1)
        pair = torch.arange(len(frequency), dtype=frequency.dtype, device=frequency.device)
        slowed = ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)
        return frequency * (1 - slowed) + frequency / self.factor * slowed


def sharpening(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor on queries and on keys for longer context (arXiv 2309.00071; `mscale` is DeepSeek's)."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of the last dimension, if it has any, by its position's angle (RoFormer, eq. 34).

    Args:
        x: (B, T, H, D)
        cos, sin: (T, D/2) or (B, T, D/2), in fp32

    Returns:
        (B, T, H, D), in x's dtype
    """
    if x.size(-1) == 0:  # which chunk does not halve
        return x
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position below `seq_len`, in fp32 whatever dtype the model is cast to."""

    def __init__(
        self,
        dim: int,
        seq_len: int,
        base: float = 10000.0,
        yarn: YarnConfig | None = None,
        frequencies: list[float] | None = None,  # (dim/2,) radians per position; None: base^(-2i / rotated)
        rotated: int | None = None,  # how many dimensions turn, those of the first pairs; None: all. YaRN sharpens all
    ):
        super().__init__()
        self.dim, self.seq_len, self.base, self.yarn = dim, seq_len, base, yarn or YarnConfig()
        self.frequencies, self.rotated = frequencies, dim if rotated is None else rotated
        self.register_buffer("cos", torch.empty(seq_len, dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(seq_len, dim // 2), persistent=False)
        self._fill()

    def _fill(self) -> None:
        device = self.cos.device
        if device.type == "meta":  # sizes are counted on this device, and often
            return
        angle = torch.outer(torch.arange(self.seq_len, dtype=torch.float64, device="cpu"), self.frequency())
        self.cos, self.sin = ((self.yarn.amplitude * t).float().to(device) for t in (angle.cos(), angle.sin()))

    def frequency(self) -> Tensor:
        """By how many radians each pair turns from one position to the next, (dim/2,) in fp64 on the CPU."""
        if self.frequencies is not None:
            return torch.tensor(self.frequencies, dtype=torch.float64, device="cpu")
        exponent = torch.arange(0, self.rotated, 2, dtype=torch.float64, device="cpu") / self.rotated
        turning = self.yarn.slow_down(self.base**-exponent, self.base, self.seq_len)
        return torch.nn.functional.pad(turning, (0, (self.dim - self.rotated) // 2))

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) would round the tables and .to_empty() would lose them: compute them again on the new device.
        super()._apply(fn, recurse)
        self._fill()
        return self

    def forward(self, start: int | Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin of positions start .. start + length - 1, (length, dim/2) each.

        Args:
            start: as a tensor, (1,) int64: a single position on the device, which cannot be compared with `seq_len`

        Raises:
            ValueError: a position lies beyond `seq_len`.
        """
        if isinstance(start, Tensor):
            return self.cos.index_select(0, start), self.sin.index_select(0, start)
        end = start + length
        if end > self.seq_len:
            raise ValueError(f"a sequence of {end} tokens is longer than seq_len={self.seq_len}")
        return self.cos[start:end], self.sin[start:end]
