"""The data of a run as Lightning wants it."""

import bisect
from typing import Any

import lightning as L
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from mla_lm.config import TrainConfig
from mla_lm.data.store import TokenStore
from mla_lm.data.windows import EvaluationWindows, Order, StepBatchSampler, Windows
from mla_lm.errors import UserError

FEW = 8  # windows that are named


class TextDataModule(L.LightningDataModule):
    """Batches of windows, int64 (B, model.seq_len + 1).

    A training batch is what one device contributes to one whole optimizer step, so one batch is one step, and B is
    config.sequences_per_step // world size; in evaluation B is at most config.micro_batch_size. Every rank takes its
    share here: the trainer needs `use_distributed_sampler=False`.

    Set `start_step` before `fit` to go on with a run: its batches begin with those of that step.

    Raises:
        UserError: a split is too short for model.seq_len.
    """

    def __init__(self, config: TrainConfig, store: TokenStore):
        super().__init__()
        seq_len = config.model.seq_len
        self.config, self.store = config, store
        self.start_step = 0
        names = [f"data.parts[{number}] train" for number in range(len(store.mixed))] or ["train"]
        self.parts = [
            Windows(part.tokens("train"), seq_len, name) for (_, part), name in zip(store.parts, names, strict=True)
        ]
        self.train_windows = ConcatDataset(self.parts)
        self.val_windows = EvaluationWindows(store.tokens("validation"), seq_len, config.data.val_tokens)
        self.test_windows = EvaluationWindows(store.tokens("test"), seq_len, split="test")
        if (fewest := min(len(self.val_windows), len(self.test_windows))) < config.world_size:
            raise UserError(
                f"{config.world_size} devices have only {fewest} windows of model.seq_len={seq_len} to evaluate on: "
                "give more text, a larger data.val_tokens or fewer devices"
            )

    def order(self) -> Order:
        """Which windows each step takes."""
        sizes = [len(windows) for windows in self.parts]
        return Order(sizes, [weight for weight, _ in self.store.parts], self.config.seed)

    def places(self, step: int) -> str:
        """Describe where a step's windows begin in the training split: the token positions of the first few."""
        step %= self.config.trainer.overfit_batches or step + 1
        indices = self.order().of_step(step, self.config.sequences_per_step)
        ends = self.train_windows.cumulative_sizes
        words = []
        for index in indices[:FEW].tolist():
            part = bisect.bisect_right(ends, index)
            token = (index - (ends[part - 1] if part else 0)) * self.config.model.seq_len
            words.append(f"data.parts[{part}] {token}" if self.store.mixed else str(token))
        more = f" and {len(indices) - FEW} more" if len(indices) > FEW else ""
        return f"training tokens {', '.join(words)}{more}"

    def train_dataloader(self) -> DataLoader:
        config = self.config
        sampler = StepBatchSampler(
            self.order(),
            config.sequences_per_step,
            config.trainer.max_steps,
            self.start_step,
            self.rank,
            self.world_size,
            config.trainer.overfit_batches,
        )
        return self._loader(self.train_windows, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.val_windows)

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.test_windows)

    def _evaluation_loader(self, windows: EvaluationWindows) -> DataLoader:
        share = Subset(windows, range(self.rank, len(windows), self.world_size))  # no window twice, whatever the world
        return self._loader(share, batch_size=self.config.micro_batch_size)

    def _loader(self, windows: Dataset, **batches: Any) -> DataLoader:
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(windows, num_workers=self.config.data.num_workers, pin_memory=on_cuda, **batches)

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1


def datamodule_of(trainer: L.Trainer) -> TextDataModule:
    """What the trainer was given to fit or test on."""
    return trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue] - Lightning sets it without declaring it
