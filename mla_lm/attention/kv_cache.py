"""KV caches: what each kind of attention keeps of past tokens, and its quantisation to int8."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}  # named as in options
LARGEST = 127  # largest magnitude in int8; -128 is not used
SMALLEST_SCALE = 1e-30  # keeps a part of zeros from being divided by 0


class LayerCache:
    """The cache of one attention layer. It holds up to `max_len` tokens; the first `length` positions are filled.

    MLA keeps one tensor, (B, 1, room, kv_compressed_dim + rope_dim): the normalised latent and the rotated shared key.
    MHA, GQA and MQA keep two, keys and values, (B, num_kv_heads, room, head_dim) each. A layer that reads the keys of
    the one before it keeps none. In int8, each tensor is followed by one of its scales; see `quantize`.

    Args:
        batch_size: B
        max_len: largest number of tokens
        shapes: for each tensor, its number of heads and the widths of its parts; in int8, each part has its own scale
        dtype: fp32, bf16, fp16 or int8
        device: the tensors' device
        grows: start empty and double the room as tokens come, up to max_len; otherwise allocate all of it at once
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
        self.position: Tensor | None = None  # of the next token, (1,) int64, once `fix` has been called

    def append(self, *new: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Store T more tokens, (B, heads, T, dim) per tensor, and return all filled positions of each tensor.

        The result is in `dtype`, by default that of `new`. It is a view of the cache if that is the cache's own dtype;
        int8 is dequantised. At a fixed position, T is 1 and the result is all the room; see `fix`. A cache is for
        inference: no gradient flows through it, and no graph grows with it.

        Raises:
            ValueError: there is no room for T more tokens; nothing is stored in that case.
        """
        filled, dtype = self.store(*new), dtype or new[0].dtype
        if not self.quantized:
            return [tensor.to(dtype) for tensor in filled]
        pairs = zip(filled[::2], filled[1::2], self.parts, strict=True)
        return [dequantize(values, scales, parts, dtype) for values, scales, parts in pairs]

    def store(self, *new: Tensor) -> list[Tensor]:
        """`append` that returns views of all filled positions as they are stored: in int8, values and their scales."""
        if self.position is not None:
            for tensor, entry in zip(self.tensors, self._as_stored(new), strict=True):
                tensor.index_copy_(2, self.position, entry.to(tensor.dtype))
            return self.tensors
        end = self._end(new[0].size(2))
        if end > self.room:
            self._grow(min(self.max_len, max(end, 2 * self.room)))
        for tensor, entry in zip(self.tensors, self._as_stored(new), strict=True):
            tensor[:, :, self.length : end] = entry
        self.length = end
        return [tensor[:, :, :end] for tensor in self.tensors]

    def _as_stored(self, new: Sequence[Tensor]) -> list[Tensor]:
        """What the tensors of the cache get for new tokens."""
        new = [tensor.detach() for tensor in new]
        if not self.quantized:
            return new
        pairs = (quantize(tensor, parts) for tensor, parts in zip(new, self.parts, strict=True))
        return [tensor for pair in pairs for tensor in pair]

    def fix(self, position: Tensor, room: int) -> None:
        """Take the position of the next token from the device, so that a step is the same at every length.

        From here on only single tokens are stored. `position` is shared by all layers, and whoever runs them adds 1 to
        it after each token. `length` does not change, except by `reserve`. The room is fixed too: `room` tokens, or
        max_len if that is less. Positions that are not filled are zeros, for those who read them with a weight of zero.

        Args:
            position: (1,) int64, the number of stored tokens
        """
        if (room := min(room, self.max_len)) > self.room:
            self._grow(room)
        for tensor in self.tensors:
            tensor[:, :, self.length :].zero_()
        self.position = position

    def reserve(self, tokens: int) -> None:
        """Count so many more tokens, which are to be stored at a fixed position.

        Raises:
            ValueError: there is no room for them.
        """
        self.length = self._end(tokens)

    def _end(self, tokens: int) -> int:
        """The length with so many more tokens; ValueError if it is more than max_len."""
        end = self.length + tokens
        if end > self.max_len:
            raise ValueError(f"the cache has room for {self.max_len} tokens: {self.length} are stored, {end} needed")
        return end

    @property
    def room(self) -> int:
        """Number of tokens that the tensors have room for now."""
        return self.tensors[0].size(2) if self.tensors else self.max_len

    def _grow(self, room: int) -> None:
        for i, tensor in enumerate(self.tensors):
            self.tensors[i] = tensor.new_empty(*tensor.shape[:2], room, tensor.size(3))
            self.tensors[i][:, :, : self.length] = tensor[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, including room that is not filled yet."""
        return sum(tensor.nbytes for tensor in self.tensors)


def length(cache: LayerCache | None) -> int | Tensor:
    """Number of tokens stored: 0 without a cache, on the device if the cache has a fixed position."""
    if cache is None:
        return 0
    return cache.length if cache.position is None else cache.position


def position(cache: LayerCache | None) -> Tensor | None:
    """The position of the token that is being read, on the device; None unless the cache has a fixed position."""
    return None if cache is None else cache.position


class ModelCache:
    """One `LayerCache` for each block of a `Transformer`."""

    def __init__(self, layers: list[LayerCache]):
        self.layers = layers

    @property
    def length(self) -> int:
        """Number of tokens stored."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' tensors."""
        return sum(layer.nbytes for layer in self.layers)

    @contextmanager
    def fixed(self, room: int) -> Iterator[None]:
        """A context in which the position of the next token is on the device; see `LayerCache.fix`.

        `Transformer` moves the position on in each step. Before each, the caller counts it by `reserve`.
        """
        first = self.layers[0]
        position = torch.tensor([first.length], device=first.tensors[0].device)
        for layer in self.layers:
            layer.fix(position, room)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.position = None

    def advance(self) -> None:
        """Move a fixed position on by a token."""
        if (position := self.layers[0].position) is not None:
            position.add_(1)

    def reserve(self, tokens: int) -> None:
        """`LayerCache.reserve` in all layers."""
        for layer in self.layers:
            layer.reserve(tokens)


def quantize(x: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Quantise each part of each token to int8, with a bf16 scale that is its largest magnitude over 127.

    Args:
        x: (..., sum(parts))
        parts: widths of the parts

    Returns:
        int8 values (..., sum(parts)), and the scales (..., len(parts)) that multiply them
    """
    pieces = x.float().split(tuple(parts), dim=-1)
    largest = torch.cat([piece.abs().amax(-1, keepdim=True) for piece in pieces], dim=-1)
    scales = (largest / LARGEST).clamp(min=SMALLEST_SCALE).bfloat16()
    # Divide by the scales as stored. Where bf16 rounded a scale down, the largest value may reach 128, so clamp it.
    steps = [piece / scale for piece, scale in zip(pieces, scales.float().split(1, dim=-1), strict=True)]
    return torch.cat(steps, dim=-1).round().clamp(-LARGEST, LARGEST).to(torch.int8), scales


def dequantize(values: Tensor, scales: Tensor, parts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize`, up to rounding; shapes as there."""
    x = values.to(dtype)
    for piece, scale in zip(x.split(tuple(parts), dim=-1), scales.to(dtype).split(1, dim=-1), strict=True):
        piece.mul_(scale)
    return x
