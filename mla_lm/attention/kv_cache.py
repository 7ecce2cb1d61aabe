"""What decoding keeps of past tokens: a latent per token for MLA, keys and values per head for the others."""

from collections.abc import Sequence

import torch
from torch import Tensor

CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}  # by their names in options
LARGEST = 127  # of int8, either side of 0
SMALLEST_SCALE = 1e-30  # of a part that is all zeros, which would be divided by 0


class LayerCache:
    """The past of one attention layer: up to `max_len` tokens, of which the first `length` positions are filled.

    MLA keeps one tensor, (B, 1, room, kv_compressed_dim + rope_dim): the normalised latent beside the rotated shared
    key. MHA, GQA and MQA keep two, keys and values, (B, num_kv_heads, room, head_dim) each. In int8 each of them has a
    second one beside it, of scales: see `quantize`.

    Args:
        batch_size: B
        max_len: tokens it may hold
        shapes: of each tensor, its heads, and its dims as the parts that have a scale each in int8
        dtype: fp32, bf16, fp16 or int8
        device: where it is
        grows: begin without room and double it as tokens come, up to max_len; otherwise all of it is there at once
    """

    def __init__(
        self,
        batch_size: int,
        max_len: int,
        shapes: Sequence[tuple[int, tuple[int, ...]]],
        dtype: torch.dtype,
        device: torch.device,
        grows: bool = False,
    ):
        self.parts = [parts for _, parts in shapes]
        self.quantized = dtype == torch.int8
        room = 0 if grows else max_len
        self.tensors = []
        for heads, parts in shapes:
            self.tensors.append(torch.empty(batch_size, heads, room, sum(parts), dtype=dtype, device=device))
            if self.quantized:
                scales = torch.empty(batch_size, heads, room, len(parts), dtype=torch.bfloat16, device=device)
                self.tensors.append(scales)
        self.max_len = max_len
        self.length = 0

    def append(self, *new: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Store (B, heads, T, dim) after what is there; return all filled positions in `dtype`, or that of `new`.

        They are views of the cache where that is its own dtype, in int8 what it stands for. A cache is for inference:
        no gradient flows through it, and no graph grows with it.

        Raises:
            ValueError: there is no room for T more tokens; nothing has been stored then.
        """
        end = self.length + new[0].size(2)
        if end > self.max_len:
            raise ValueError(f"the cache has room for {self.max_len} tokens: {self.length} are stored, {end} needed")
        if end > self.tensors[0].size(2):
            self._grow(min(self.max_len, max(end, 2 * self.tensors[0].size(2))))
        stored = [tensor.detach() for tensor in new]
        if self.quantized:
            pairs = (quantize(tensor, parts) for tensor, parts in zip(stored, self.parts, strict=True))
            stored = [tensor for pair in pairs for tensor in pair]
        for tensor, entry in zip(self.tensors, stored, strict=True):
            tensor[:, :, self.length : end] = entry
        self.length = end
        filled = [tensor[:, :, :end] for tensor in self.tensors]
        dtype = dtype or new[0].dtype
        if not self.quantized:
            return [tensor.to(dtype) for tensor in filled]
        pairs = zip(filled[::2], filled[1::2], self.parts, strict=True)
        return [dequantize(values, scales, parts, dtype) for values, scales, parts in pairs]

    def _grow(self, room: int) -> None:
        for i, tensor in enumerate(self.tensors):
            self.tensors[i] = tensor.new_empty(*tensor.shape[:2], room, tensor.size(3))
            self.tensors[i][:, :, : self.length] = tensor[:, :, : self.length]

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


def quantize(x: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Each token's parts of these dims as int8, and the bf16 scales that multiply them: the largest value over 127.

    Shapes: x (..., sum(parts)), result (..., sum(parts)) and (..., len(parts)).
    """
    pieces = x.float().split(tuple(parts), dim=-1)
    largest = torch.cat([piece.abs().amax(-1, keepdim=True) for piece in pieces], dim=-1)
    scales = (largest / LARGEST).clamp(min=SMALLEST_SCALE).bfloat16()
    # by the scales as they are stored; one that was rounded down would take the largest value to 128
    steps = [piece / scale for piece, scale in zip(pieces, scales.float().split(1, dim=-1), strict=True)]
    return torch.cat(steps, dim=-1).round().clamp(-LARGEST, LARGEST).to(torch.int8), scales


def dequantize(values: Tensor, scales: Tensor, parts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize`, but for what rounding took."""
    x = values.to(dtype)
    for piece, scale in zip(x.split(tuple(parts), dim=-1), scales.to(dtype).split(1, dim=-1), strict=True):
        piece.mul_(scale)
    return x
