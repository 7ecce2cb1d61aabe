"""Windows of tokens, and the order in which training reads them, a pure function of the seed and the step."""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mla_lm.data.shards import Tokens
from mla_lm.errors import UserError
from mla_lm.model.loss import IGNORE

BLOCK = 1000  # windows in a row in which every part of the data has exactly its share


class Windows(Dataset):
    """Consecutive windows of a split for training: item i is tokens[i * seq_len : (i + 1) * seq_len + 1].

    Neighbours share one token, the last target of one and the first input of the next. So every token but the first is
    predicted once per pass. A remainder shorter than seq_len is left out. Items are int64 (seq_len + 1,).

    Args:
        tokens: `Tokens` or an array of ids, (count,)
        split: name of the split in the error message

    Raises:
        UserError: the split is too short for one window.
    """

    def __init__(self, tokens: Tokens | np.ndarray, seq_len: int, split: str = "train"):
        if len(tokens) <= seq_len:
            raise UserError(
                f"the {split} split has {len(tokens)} tokens, less than one window of model.seq_len={seq_len} and the "
                "token after it: give more text or a smaller model.seq_len"
            )
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> Tensor:
        return _window(self.tokens, index, self.seq_len)


class EvaluationWindows(Dataset):
    """Windows of a split for evaluation: those of `Windows`, and one more for the remainder, so that no target is lost.

    The last window is padded with -100. As targets these do not count; as inputs they stand for any token. If
    `max_tokens` is less than the number of targets, only whole windows (at least one) are used, spread evenly over the
    split and always the same. Items are int64 (seq_len + 1,).

    Args:
        tokens: `Tokens` or an array of ids, (count,)
        max_tokens: predict at most this many tokens; None: all
        split: name of the split in the error message

    Raises:
        UserError: the split has fewer than two tokens, so there is nothing to predict.
    """

    def __init__(
        self, tokens: Tokens | np.ndarray, seq_len: int, max_tokens: int | None = None, split: str = "validation"
    ):
        targets = len(tokens) - 1
        if targets < 1:
            raise UserError(f"the {split} split has {len(tokens)} tokens, nothing to predict: give more text")
        self.tokens, self.seq_len = tokens, seq_len
        whole = targets // seq_len
        if max_tokens is None or max_tokens >= targets or whole == 0:
            self.indices = range(-(-targets // seq_len))
        else:
            taken = max(1, max_tokens // seq_len)
            self.indices = [i * whole // taken for i in range(taken)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        window = _window(self.tokens, self.indices[index], self.seq_len)
        return torch.nn.functional.pad(window, (0, self.seq_len + 1 - len(window)), value=IGNORE)


def _window(tokens: Tokens | np.ndarray, index: int, seq_len: int) -> Tensor:
    return torch.from_numpy(tokens[index * seq_len : (index + 1) * seq_len + 1].astype(np.int64))


def most_documents(windows: Tensor, document_token: int, length: int, together: int) -> int:
    """How many documents the micro-batch with the most of them holds, rounded up to a power of two.

    NumPy counts them on the CPU, before the windows go to a device that would have to be waited for. The rounding
    leaves few different numbers, so that few shapes of tensors follow from them.

    Args:
        windows: (B, seq_len + 1) ids on the CPU; the last id of each is only a target
        document_token: id that begins a document; a window begins one too
        length: tokens of the shorter windows that each window is cut into, a divisor of seq_len
        together: windows in a micro-batch, a divisor of B
    """
    begins = windows.numpy()[:, :-1] == document_token
    begins[:, ::length] = True
    most = int(begins.reshape(len(begins) // together, -1).sum(1).max())
    return 2 ** (most - 1).bit_length()


class Order:
    """The window that training reads at each place of a run, a pure function of the seed and the place.

    In each block of 1,000 consecutive places, every part of the data has as many places as its weight says, in an order
    drawn for that block. Each part passes over its own windows again and again, every pass in a new order: its u-th use
    is entry u % n of the permutation of pass u // n, where n is its number of windows.

    Args:
        sizes: number of windows of each part; windows are numbered through all parts, one part after another
        weights: share of each part; they sum to 1
    """

    def __init__(self, sizes: list[int], weights: list[float], seed: int):
        self.sizes, self.places, self.seed = sizes, places_in_block(weights), seed
        self.firsts = np.cumsum([0, *sizes[:-1]])
        # places are visited in order, so keeping the last draw is enough
        self._block = functools.lru_cache(maxsize=1)(self._draw_block)
        self._passes = [
            functools.lru_cache(maxsize=1)(functools.partial(_permutation, size, seed, part))
            for part, size in enumerate(sizes)
        ]

    def of_step(self, step: int, sequences_per_step: int) -> np.ndarray:
        """Indices of the windows of one optimizer step over all devices, int64 (sequences_per_step,)."""
        return np.array([self._window(step * sequences_per_step + i) for i in range(sequences_per_step)], np.int64)

    def _window(self, place: int) -> int:
        parts, uses = self._block(place // BLOCK)
        part, use = parts[place % BLOCK], int(uses[place % BLOCK])
        return self.firsts[part] + self._passes[part](use // self.sizes[part])[use % self.sizes[part]]

    def _draw_block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The part of each place in a block, and the number of that part's use, (1000,) each."""
        order = _permutation(BLOCK, self.seed, len(self.sizes), number)  # the stream that follows those of the parts
        parts = np.repeat(np.arange(len(self.sizes)), self.places)[order]
        uses = np.empty(BLOCK, np.int64)
        for part, places in enumerate(self.places):
            uses[parts == part] = number * places + np.arange(places)
        return parts, uses


def places_in_block(weights: list[float]) -> list[int]:
    """The number of places per 1,000 for each part: its share rounded down; the rest go to the largest remainders."""
    shares = BLOCK * np.array(weights)
    places = np.floor(shares).astype(np.int64)
    largest = np.argsort(places - shares, kind="stable")
    places[largest[: BLOCK - places.sum()]] += 1
    return places.tolist()


def _permutation(size: int, seed: int, stream: int, number: int) -> np.ndarray:
    # Stream 0 adds nothing to the seed, so a single corpus has the order of a mixture's first part.
    # RandomState is frozen: NumPy promises the same permutation in every version, so any version can resume a run.
    bits = np.random.MT19937(np.random.SeedSequence((seed, number, stream)))
    return np.random.RandomState(bits).permutation(size)


class StepBatchSampler(Sampler[list[int]]):
    """Yields this rank's window indices for every optimizer step from `start_step` on, a whole step at a time.

    The windows of a step do not depend on the number of ranks: rank r of n takes every n-th of them, from r on. With
    `overfit_batches`, the windows of the first so many steps repeat. `len()` is max_steps even with a later start,
    since Lightning adds the steps already done to those it counts.
    """

    def __init__(
        self,
        order: Order,
        sequences_per_step: int,
        max_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        overfit_batches: int | None = None,
    ):
        self.order, self.sequences_per_step = order, sequences_per_step
        self.start_step, self.max_steps = start_step, max_steps
        self.rank, self.world_size = rank, world_size
        self.overfit_batches = overfit_batches or max_steps

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.max_steps):
            indices = self.order.of_step(step % self.overfit_batches, self.sequences_per_step)
            yield indices[self.rank :: self.world_size].tolist()
