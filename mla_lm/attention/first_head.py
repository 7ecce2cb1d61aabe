"""Sets the weights of a layer's first head from what it reads, attends to and writes; see mla_lm/model/induction.py."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mla_lm.attention.rope import RotaryEmbedding

FAST = 0.03  # radians per position from which a pair tells one position from the next
SLOW = 0.01  # radians per position up to which a pair hardly turns within a hundred tokens
MARGIN = 3.2  # by which the score of the token before lies above that of its neighbours


@dataclass
class FirstHead:
    """What a head reads, what it attends to, and where it writes; its input is the normalised residual stream.

    It attends by content, or to the token before. Here n is the number of numbers that it matches and copies.

    Attributes:
        value: (n, d_model), what it reads of a token
        out: (d_model, n), where it writes the n numbers, each of size 1
        constant: (1, d_model), a direction in which all inputs are alike
        match: (n, d_model) each, what a query reads and what a key does; None: it attends to the token before
        score: of a query and a key that are equal
    """

    value: Tensor
    out: Tensor
    constant: Tensor
    match: tuple[Tensor, Tensor] | None = None
    score: float = 0.0

    def strength(self, scale: float) -> float:
        """The size of each of the n numbers of a query, and of a key, where `scale` multiplies their product."""
        return (self.score / scale / len(self.value)) ** 0.5


def unit(rows: Tensor, x: Tensor) -> Tensor:
    """Scale rows, (n, d_model), such that their products with the inputs x, (B, T, d_model), have a size of 1."""
    return rows / rms(x @ rows.mT)


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def rotated_head(head: FirstHead, x: Tensor, rope: RotaryEmbedding, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the queries, keys and values of a head that is rotated as a whole, (rope.dim, d_model) each."""
    q, k, v = x.new_zeros(3, rope.dim, x.size(-1))
    if head.match is None:
        query, key = looking_back(rope, scale)
        q, k = (vector[:, None] * unit(head.constant, x) for vector in (query, key))
    else:
        slow = slow_rows(rope)[: len(head.value)]
        q[slow], k[slow] = (head.strength(scale) * unit(rows, x) for rows in head.match)
    v[: len(head.value)] = unit(head.value, x)
    return q, k, v


def looking_back(rope: RotaryEmbedding, scale: float) -> tuple[Tensor, Tensor]:
    """A query and a key, both the same at every position, which rotation alone makes attend to the token before.

    The key is rotated by its position and the query by its own less one, so that the score is a sum of
    cos(angle * (distance - 1)) over the pairs that turn fast.

    Returns:
        (rope.dim,) each
    """
    angle = angles(rope)
    fast = (angle >= FAST).float()
    amplitude = (MARGIN / scale / (fast * (1 - angle.cos())).sum()) ** 0.5
    query = torch.cat((fast * angle.cos(), -fast * angle.sin()))
    return amplitude * query, amplitude * torch.cat((fast, torch.zeros_like(fast)))


def angles(rope: RotaryEmbedding) -> Tensor:
    """By how many radians each pair turns from one position to the next, (dim / 2,)."""
    return torch.atan2(rope.sin[1], rope.cos[1])


def slow_rows(rope: RotaryEmbedding) -> list[int]:
    """The rows of a head, of `rope.dim` rows, that rotation leaves nearly as they are."""
    slow = [pair for pair, radians in enumerate(angles(rope).tolist()) if radians <= SLOW]
    return slow + [rope.dim // 2 + pair for pair in slow]
