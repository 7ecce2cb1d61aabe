"""What decoding keeps of past tokens: a latent per token for MLA, keys and values per head for the others."""

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """Room for `max_len` tokens of one attention layer.

    MLA keeps one tensor, (B, 1, max_len, kv_compressed_dim + rope_dim): the normalised latent beside the rotated
    shared key. MHA, GQA and MQA keep two, keys and values, (B, num_kv_heads, max_len, head_dim) each. The first
    `length` positions are filled.
    """

    def __init__(
        self,
        batch_size: int,
        max_len: int,
        heads_and_dims: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.tensors = [
            torch.zeros(batch_size, heads, max_len, dim, dtype=dtype, device=device) for heads, dim in heads_and_dims
        ]
        self.max_len = max_len
        self.length = 0

    def append(self, *new: Tensor) -> list[Tensor]:
        """Store (B, heads, T, dim) after what is there; return all filled positions as views.

        A cache is for inference: no gradient flows through it, and no graph grows with it.

        Raises:
            ValueError: there is no room for T more tokens; nothing has been stored then.
        """
        end = self.length + new[0].size(2)
        if end > self.max_len:
            raise ValueError(f"the cache has room for {self.max_len} tokens: {self.length} are stored, {end} needed")
        for tensor, entry in zip(self.tensors, new, strict=True):
            tensor[:, :, self.length : end] = entry.detach()
        self.length = end
        return [tensor[:, :, :end] for tensor in self.tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held, the room not yet filled included."""
        return sum(tensor.nbytes for tensor in self.tensors)


class ModelCache:
    """One `LayerCache` for each block of a `Transformer`."""

    def __init__(self, layers: list[LayerCache]):
        self.layers = layers

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' tensors."""
        return sum(layer.nbytes for layer in self.layers)
