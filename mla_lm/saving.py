"""When and how a run is saved: checkpoints, and stopping on a signal."""

import math
import os
import signal
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from mla_lm.callbacks import Metrics, log
from mla_lm.checkpoint import load_checkpoint
from mla_lm.config import TrainConfig
from mla_lm.errors import Interrupted
from mla_lm.files import write_atomically
from mla_lm.lightning_module import LanguageModel
from mla_lm.run import RunFolder

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class BackgroundCheckpointIO(CheckpointIO):
    """How Lightning saves and loads: whole or not at all, as plain data, and by a thread while training goes on.

    A save copies the state into CPU memory that the next save uses again, so a run takes one more copy of its state.
    GPU tensors are copied at once, CPU tensors by the thread: call `wait_until_copied` before they change. One save is
    under way at a time, and what it raises is raised by the next call of `save_checkpoint`, `wait` or `teardown`.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.copied = Event()
        self.copied.set()
        self.written: Future | None = None
        self.memory: dict[tuple, Tensor] = {}  # of the last copy; to ask for it anew takes longer than to copy

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = ()) -> None:
        """Begin to write a checkpoint.

        Args:
            checkpoint: plain data, with tensors in dicts, lists and tuples
            path: the file
            storage_options: files that get the same after it, in this order

        Raises:
            UserError: the save before this one could not be written.
        """
        self.wait()
        state, left = self._copy(checkpoint)
        self.copied.clear()
        # Nothing after this: from here on the thread takes turns with Python code, for milliseconds each.
        self.written = self.thread.submit(_write, left, self.copied, state, [path, *(storage_options or ())])

    def load_checkpoint(self, path: str, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.wait()
        return load_checkpoint(Path(path))

    def remove_checkpoint(self, path: str) -> None:
        self.wait()
        Path(path).unlink(missing_ok=True)

    def wait_until_copied(self) -> None:
        """From here on the state that was saved last may change."""
        self.copied.wait()

    def wait(self) -> None:
        """From here on what was saved is on disk.

        Raises:
            UserError: it cannot be written; the old files are still there.
        """
        written, self.written = self.written, None
        if written:
            written.result()

    def teardown(self) -> None:
        """Lightning's last call, at the end of training and where an exception ends it."""
        self.memory = {}
        self.wait()

    def _copy(self, state: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]:
        """A copy of `state`, and what is left to do for it: (target, source) tensors. Those that are one stay one."""
        memory: dict[tuple, Tensor] = {}
        left: list[tuple[Tensor, Tensor]] = []

        def copy(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
            if key not in memory:
                if key in self.memory:
                    memory[key] = self.memory[key]
                else:
                    memory[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                if tensor.device.type == "cpu":
                    left.append((memory[key], tensor))
                else:
                    memory[key].copy_(tensor)
            return memory[key]

        copied = apply_to_collection(state, Tensor, copy)
        self.memory = memory
        return copied, left


def _copy_tensors(pairs: list[tuple[Tensor, Tensor]]) -> None:
    # By NumPy: a parallel torch operation would give this thread OpenMP workers of its own, and with more workers than
    # cores every parallel operation of training sleeps in the kernel from then on: half the speed, for small models.
    for target, source in pairs:
        bits = BITS[source.itemsize]  # NumPy has no bf16
        np.copyto(target.view(bits).numpy(), source.view(bits).numpy())


def _write(left: list[tuple[Tensor, Tensor]], copied: Event, state: dict[str, Any], paths: list[str | Path]) -> None:
    try:
        _copy_tensors(left)
    finally:  # what went wrong is for who waits for the file
        copied.set()
    for path in paths:
        write_atomically(Path(path), lambda file: torch.save(state, file))


class Checkpoints(Callback):
    """last.ckpt every n steps and at the end; best.ckpt at the validation with the lowest loss so far.

    Where a save and a validation fall on one step, the validation comes first, so that a resumed run never misses
    one. The best loss is part of the state, so it holds wherever the run folder is moved to.
    """

    def __init__(self, run: RunFolder, config: TrainConfig, metrics: Metrics):
        self.run, self.config, self.metrics = run, config, metrics
        self.io = BackgroundCheckpointIO()
        self.best: dict[str, float] = {}  # metrics of the best validation, and its step

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.io.wait_until_copied()

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        step = trainer.global_step
        if step == self.config.trainer.max_steps:
            trainer.should_stop = True  # makes Lightning validate once more, whatever the interval
        elif step % self.config.checkpoint.every_n_steps == 0 and step % self.config.val_every_n_steps:
            self.save(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        step, metrics = trainer.global_step, module.evaluated
        log(trainer, metrics)
        paths = []
        if metrics["val/loss"] < self.best.get("val/loss", math.inf):
            self.best = {**metrics, "step": step}
            paths.append(self.run.best)
        if step % self.config.checkpoint.every_n_steps == 0 or step == self.config.trainer.max_steps:
            paths.append(self.run.last)
        if paths:
            self.save(trainer, module, paths)

    def on_train_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.io.wait()
        trainer.strategy.barrier()  # the other devices read best.ckpt next

    def save(self, trainer: L.Trainer, module: LanguageModel, paths: list[Path] | None = None) -> None:
        """Begin to write last.ckpt, or `paths` in their order, unless the weights are lost."""
        module.stop_if_diverged()
        self.metrics.pause()
        path, *others = paths or [self.run.last]
        trainer.save_checkpoint(path, storage_options=others)


class StopOnSignal(Callback):
    """SIGTERM or Ctrl-C: finish the step (and the validation due at it), save, and raise `Interrupted`.

    Works inside a `with` block, over training and testing. A second signal ends the process at once.
    """

    def __init__(self, checkpoints: Checkpoints, config: TrainConfig):
        self.checkpoints, self.config = checkpoints, config
        self.received = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        self.before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        self._listen()

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _listen(self, *_: Any) -> None:
        for signum in self.before:
            signal.signal(signum, self._receive)

    on_train_start = on_test_start = _listen  # Lightning has put its own handler for SIGTERM before it by then

    def _receive(self, signum: int, frame: Any) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received = signum
        print(f"\n{signal.Signals(signum).name}: stopping after this step", file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        step = trainer.global_step
        if step % self.config.val_every_n_steps and step != self.config.trainer.max_steps:
            self._stop_if_received(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self._stop_if_received(trainer, module)

    def _stop_if_received(self, trainer: L.Trainer, module: LanguageModel) -> None:
        if received := self._received_anywhere(trainer, module):
            self.checkpoints.save(trainer, module)
            self.checkpoints.io.wait()
            raise Interrupted(received)

    def on_test_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        if self.received:  # the last step is saved
            raise Interrupted(self.received)

    def _received_anywhere(self, trainer: L.Trainer, module: LanguageModel) -> int:
        """All ranks stop at the same step."""
        if trainer.world_size == 1:
            return self.received
        tensor = torch.tensor(self.received, device=module.device)
        return int(trainer.strategy.reduce(tensor, reduce_op="max").item())
