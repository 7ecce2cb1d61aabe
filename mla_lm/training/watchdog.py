"""Giving up a run that no longer moves, so that a scheduler can start it again."""

import faulthandler
import os
import threading
import time
from typing import Any

from lightning.pytorch.callbacks import Callback

STDERR = 2  # the file itself: a thread that hangs may hold the lock of sys.stderr
SLICE = 1.0  # seconds of one wait; one that took far longer was that of a process that had been suspended


class Watchdog(Callback):
    """Ends the process with status 1 where no step, of training or of an evaluation, has ended for `timeout` seconds.

    It writes to stderr where every thread stands: a device that hangs, a process that the others wait for, a file
    system that does not answer.

    Args:
        timeout: seconds; 0 for none
    """

    def __init__(self, timeout: int):
        self.timeout = timeout
        self.alive = 0.0  # time of the last sign
        self.over = threading.Event()

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        if self.timeout:
            self.over = threading.Event()
            self._sign()
            threading.Thread(target=self._watch, args=(self.over,), name="watchdog", daemon=True).start()

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        self._end()

    def on_exception(self, *_: Any) -> None:  # after which Lightning calls no teardown
        self._end()

    def _end(self) -> None:
        self.over.set()

    def _sign(self, *_: Any, **__: Any) -> None:
        self.alive = time.monotonic()

    on_train_batch_end = on_validation_batch_end = on_test_batch_end = _sign
    on_validation_end = on_train_end = _sign

    def _watch(self, over: threading.Event) -> None:
        while (left := self.alive + self.timeout - time.monotonic()) > 0:
            began = time.monotonic()
            if over.wait(min(left, SLICE)):
                return
            if (waited := time.monotonic() - began) > 5 * SLICE:
                self.alive += waited
        reason = f"error: no step has ended for {self.timeout} s (step_timeout), so the run is given up"
        try:
            os.write(STDERR, f"{reason}. Where every thread stands:\n".encode())
            faulthandler.dump_traceback(STDERR)
            os.write(STDERR, f"{reason}: see above where every thread stood\n".encode())
        finally:
            os._exit(1)
