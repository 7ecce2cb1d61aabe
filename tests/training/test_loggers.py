"""metrics.jsonl, and what is logged beside it."""

import json
import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mla_lm.runs.folder import RunFolder
from mla_lm.training.loggers import MetricsFile, RunLogger, TensorBoard


def test_rows_past_the_checkpoint_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = MetricsFile(path, 100, 0, time.monotonic() - 50)
    for step in (1, 2, 3):
        logger.log_metrics({"loss": 1.0 / step}, step)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # a kill while writing
    logger = MetricsFile(path, 100, 2, time.monotonic())
    logger.log_metrics({"loss": float("inf")}, 3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["tokens"] for row in rows] == [100, 200, 300]
    assert rows[2]["loss"] is None
    assert rows[2]["seconds"] >= rows[1]["seconds"] >= 50


class Broken:
    """A service that takes nothing."""

    name = "the service"

    def log_metrics(self, metrics, step):
        raise RuntimeError("it is gone")

    log_samples = log_metrics

    def finish(self, summary, error):
        raise RuntimeError("it is gone")


def test_a_service_that_fails_is_told_once_and_metrics_are_kept(tmp_path, capsys):
    logger = RunLogger(MetricsFile(tmp_path / "metrics.jsonl", 100, 0, time.monotonic()), Broken())
    for step in (1, 2):
        logger.log_metrics({"loss": 1.0}, step)
        logger.log_samples([("a", "b")], step)
    assert logger.finish({"finished": True}, None) is None
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert capsys.readouterr().err == "warning: the service could not log (it is gone): training goes on\n"


def test_tensorboard_gets_numbers_and_samples(tmp_path):
    board = TensorBoard(RunFolder(tmp_path))
    board.log_metrics({"train/loss": 2.5}, 3)
    board.log_samples([("def ", "f():\n  pass"), ("", "x")], 3)
    board.finish({}, None)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 2.5)]
    (text,) = events.Tensors("samples/text_summary")
    assert text.tensor_proto.string_val == [b"    def f():\n      pass\n\n    x"]
