"""The clock of the throughput."""

import time

from mla_lm.callbacks import Metrics
from mla_lm.config import TrainConfig


def test_pauses_are_left_out():
    metrics = Metrics(TrainConfig(), flops_per_token=1.0, peak_flops=1.0)
    start = time.perf_counter()
    metrics.on_train_start(None, None)
    time.sleep(0.02)
    metrics.pause()
    metrics.pause()  # a save within a validation
    time.sleep(0.5)
    metrics.on_train_batch_start(None, None)
    time.sleep(0.02)
    assert 0.04 <= metrics.train_seconds <= time.perf_counter() - start - 0.5
    resumed = Metrics(TrainConfig(), 1.0, 1.0)
    resumed.load_state_dict(metrics.state_dict())
    assert resumed.train_seconds >= 0.04
