"""Stopping on a signal: at the end of a step, with everything saved."""

import os
import signal
from contextlib import suppress
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch import distributed as dist

from mla_lm.config import TrainConfig
from mla_lm.errors import Interrupted
from mla_lm.training.checkpointing import Checkpoints
from mla_lm.training.module import LanguageModel

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # USR1: what Slurm sends before a time limit


class StopOnSignal(Callback):
    """On a signal: finish the step (and the validation due at it), save, and raise `Interrupted`.

    Works inside a `with` block, over training and testing. Signals that whoever started the process has it ignore, as
    nohup does with SIGHUP, stay ignored. A second Ctrl-C ends the process at once; other signals may come several
    times, as a closed terminal sends SIGHUP and a scheduler SIGTERM after SIGUSR1.
    """

    def __init__(self, checkpoints: Checkpoints, config: TrainConfig):
        self.checkpoints, self.config = checkpoints, config
        self.received = 0
        self.before: dict[int, Any] = {}
        self.asked: tuple[Any, Tensor] | None = None  # with several processes: what the others had received

    def __enter__(self) -> None:
        handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self.before = {signum: handler for signum, handler in handlers.items() if handler is not signal.SIG_IGN}
        self._listen()

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _listen(self, *_: Any, **__: Any) -> None:
        for signum in self.before:
            signal.signal(signum, self._receive)

    on_test_start = _listen  # Lightning has put its own handler for SIGTERM before it by then

    def on_train_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self._listen()
        if trainer.world_size > 1:
            # Lightning would ask all devices at each step whether one has had a SIGTERM, and wait for the answer. No
            # option of its leaves that out; `_received_anywhere` does it without waiting.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = self._ask_nobody
            self.group = dist.new_group(backend="gloo")  # on the CPU: a GPU goes on computing meanwhile

    @staticmethod
    def _ask_nobody() -> None:
        """In place of Lightning's question to the other devices."""

    def _receive(self, signum: int, frame: Any) -> None:
        if self.received and signum == signal.SIGINT:
            os._exit(128 + signum)
        if not self.received:
            self.received = signum
            # Not by print: a stream that this signal has interrupted takes no other call.
            with suppress(OSError):
                name = signal.Signals(signum).name
                os.write(2, f"\n{name}: stopping after this step; another Ctrl-C ends at once\n".encode())

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        step = trainer.global_step
        if step % self.config.val_every_n_steps and step != self.config.trainer.max_steps:
            self._stop_if_received(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self._stop_if_received(trainer, module)

    def _stop_if_received(self, trainer: L.Trainer, module: LanguageModel) -> None:
        if received := self._received_anywhere(trainer):
            self.checkpoints.save_now(trainer, module)
            raise Interrupted(received)

    def on_test_batch_end(self, trainer: L.Trainer, module: LanguageModel, *_: Any) -> None:
        if self.received and trainer.world_size == 1:  # the last step is saved; several processes test to the end
            raise Interrupted(self.received)

    def _received_anywhere(self, trainer: L.Trainer) -> int:
        """What any process had received a step ago, so that all stop at the same step and none waits for the others."""
        if trainer.world_size == 1:
            return self.received
        received = 0
        if self.asked:
            work, flag = self.asked
            work.wait()
            received = int(flag)
        flag = torch.tensor(self.received)
        self.asked = dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True), flag
        return received
