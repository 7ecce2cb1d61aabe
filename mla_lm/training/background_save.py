"""How a run is saved: by a thread that writes the checkpoint while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from mla_lm.errors import ADVICE, Diverged, TrainingFailed, UserError
from mla_lm.files import write_atomically
from mla_lm.runs.checkpoint import load_checkpoint, put_in_front
from mla_lm.runs.folder import RunFolder

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
SaveErrors = dict[Path, UserError | TrainingFailed]  # of the files that could not be written


class BackgroundCheckpointIO(CheckpointIO):
    """Saves and loads checkpoints for Lightning: as plain data, each file whole, by a thread while training goes on.

    A save copies the state into CPU memory that the next save uses again, so a run takes one more copy of its state.
    GPU tensors are copied at once, CPU tensors by the thread: call `wait_until_copied` before they change. One save is
    under way at a time. It raises nothing: ask `failures` or `wait` what became of it.

    Set `copies` before `trainer.save_checkpoint`, which knows of one file only: the files that get the same after it,
    in this order.

    Args:
        keep_last: versions of last.ckpt that are kept, itself included
    """

    def __init__(self, keep_last: int = 1) -> None:
        self.keep_last = keep_last
        self.copies: list[Path] = []
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.copied = Event()
        self.copied.set()
        self.written: Future[SaveErrors] | None = None
        self.memory: dict[tuple, Tensor] = {}  # of the last copy; to ask for it anew takes longer than to copy
        self.loaded: dict[str, Any] = {}  # the checkpoint that training goes on from, where it has been read already

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: None = None) -> None:
        self.save(checkpoint, [Path(path), *self.copies])

    def save(self, checkpoint: dict[str, Any], paths: list[Path]) -> None:
        """Begin to write a checkpoint.

        Args:
            checkpoint: plain data, with tensors in dicts, lists and tuples
            paths: the files, in the order in which they are written
        """
        self.wait()
        state, left = self._copy(checkpoint)
        self.copied.clear()
        # Nothing after this: from here on the thread takes turns with Python code, for milliseconds each.
        self.written = self.thread.submit(self._write, left, state, paths)

    def load_checkpoint(self, path: str, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.wait()
        if not self.loaded:
            return load_checkpoint(Path(path))
        state = dict(self.loaded)
        self.loaded.clear()  # whoever read it holds no tensors from here on
        return state

    def remove_checkpoint(self, path: str) -> None:
        self.wait()
        Path(path).unlink(missing_ok=True)

    def wait_until_copied(self) -> None:
        """Wait until the state of the last save is copied; training may change it then."""
        self.copied.wait()

    def failures(self) -> SaveErrors | None:
        """The errors of the last save, returned once; None while it runs, or if they were returned before."""
        return self.wait() if self.written and self.written.done() else None

    def wait(self) -> SaveErrors | None:
        """Wait for the running save to end, then return what `failures` does."""
        written, self.written = self.written, None
        return written.result() if written else None

    def teardown(self) -> None:
        """Lightning's last call, at the end of training and where an exception ends it."""
        self.memory = {}
        if self.written:
            self.written.exception()  # let it end, and be asked for

    def _copy(self, state: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]:
        """Return a copy of `state`, and the (target, source) tensors still to be copied. Shared tensors stay shared."""
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

    def _write(self, left: list[tuple[Tensor, Tensor]], state: dict[str, Any], paths: list[Path]) -> SaveErrors:
        try:
            _copy_tensors(left)
        finally:
            self.copied.set()
        if name := _not_finite(state):
            failure = Diverged(
                f"{name} has a number that is not finite after step {state.get('global_step')}: nothing is saved.\n"
                f"  {ADVICE}"
            )
            return dict.fromkeys(paths, failure)
        failures: SaveErrors = {}
        for path in paths:
            try:
                _write_file(state, path, self.keep_last)
            except UserError as error:
                failures[path] = error
        return failures


def _write_file(state: dict[str, Any], path: Path, keep_last: int) -> None:
    keep = keep_last if path.name == RunFolder.LAST else 1
    write_atomically(
        path, lambda file: torch.save(state, file), lambda temporary, path: put_in_front(temporary, path, keep)
    )


def _copy_tensors(pairs: list[tuple[Tensor, Tensor]]) -> None:
    # By NumPy: a parallel torch operation would give this thread OpenMP workers of its own, and with more workers than
    # cores every parallel operation of training sleeps in the kernel from then on: half the speed, for small models.
    for target, source in pairs:
        bits = BITS[source.itemsize]  # NumPy has no bf16
        np.copyto(target.view(bits).numpy(), source.view(bits).numpy())


def _not_finite(state: Any, name: str = "") -> str | None:
    """The name of the first tensor in the state that holds NaN or infinity; None if there is none."""
    if isinstance(state, Tensor):
        return name if state.is_floating_point() and not _is_finite(state) else None
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    found = (_not_finite(value, f"{name}.{key}" if name else str(key)) for key, value in items)
    return next((place for place in found if place), None)


def _is_finite(tensor: Tensor) -> bool:
    # By NumPy, as copying. bf16, which it lacks, is the upper half of fp32.
    if tensor.dtype == torch.bfloat16:
        return not ((tensor.view(torch.int16).numpy() & 0x7F80) == 0x7F80).any()
    values = tensor.numpy().reshape(-1)
    return all(np.isfinite(values[start : start + 2**20]).all() for start in range(0, len(values), 2**20))
