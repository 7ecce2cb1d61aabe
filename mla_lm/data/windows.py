"""Windows of tokens, and the order in which training takes them: a pure function of the seed and the step."""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mla_lm.data.store import Tokens
from mla_lm.errors import UserError
from mla_lm.loss import IGNORE


class Windows(Dataset):
    """Consecutive windows of a split for training: item i is tokens[i * seq_len : (i + 1) * seq_len + 1].

    Neighbours share one token, the last target of one and the first input of the next, so every token but the first
    is predicted once a pass; a rest shorter than seq_len is left out. Items are int64 (seq_len + 1,).

    Args:
        tokens: `Tokens` or an array of ids, (count,)
        split: what to call them in the error

    Raises:
        UserError: there is not even one window.
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
    """Windows of a split for evaluation: as `Windows`, and a last one for the rest, so no target is left out.

    The last window is filled with -100 beyond the end: as targets these do not count, as inputs they stand for any
    token. With `max_tokens` below the targets there are, whole windows (at least one) spread evenly over the split
    are taken: always the same ones. Items are int64 (seq_len + 1,).

    Args:
        tokens: `Tokens` or an array of ids, (count,)
        max_tokens: predict at most this many; None: all
        split: what to call them in the error

    Raises:
        UserError: there is nothing to predict, the split has less than two tokens.
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


def indices_of_step(step: int, sequences_per_step: int, num_windows: int, seed: int) -> np.ndarray:
    """Windows of one optimizer step, over all devices: int64 (sequences_per_step,).

    Passes over the data follow one another without a gap, each in an order of its own: position p of the whole run
    is entry p % num_windows of the permutation of pass p // num_windows.
    """
    positions = np.arange(step * sequences_per_step, (step + 1) * sequences_per_step)
    passes, places = np.divmod(positions, num_windows)
    return np.array([_order(num_windows, seed, int(p))[i] for p, i in zip(passes, places, strict=True)], dtype=np.int64)


@functools.lru_cache(maxsize=2)  # a step may straddle two passes
def _order(num_windows: int, seed: int, pass_number: int) -> np.ndarray:
    # RandomState is frozen: NumPy promises the same permutation in every version, so a run can be resumed in any
    bits = np.random.MT19937(np.random.SeedSequence((seed, pass_number)))
    return np.random.RandomState(bits).permutation(num_windows)


class StepBatchSampler(Sampler[list[int]]):
    """For every optimizer step from `start_step` on, this rank's window indices of that whole step.

    With `overfit_batches` the steps take those of the first so many, again and again.
    The windows of a step over all ranks do not depend on their number: rank r of n takes every n-th, from r on.
    `len()` is max_steps also when started later, since Lightning adds the steps already done to those it counts.
    """

    def __init__(
        self,
        num_windows: int,
        sequences_per_step: int,
        max_steps: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        overfit_batches: int | None = None,
    ):
        self.num_windows, self.sequences_per_step, self.seed = num_windows, sequences_per_step, seed
        self.start_step, self.max_steps = start_step, max_steps
        self.rank, self.world_size = rank, world_size
        self.overfit_batches = overfit_batches or max_steps

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.max_steps):
            indices = indices_of_step(step % self.overfit_batches, self.sequences_per_step, self.num_windows, self.seed)
            yield indices[self.rank :: self.world_size].tolist()
