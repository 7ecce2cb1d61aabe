"""Test losses of a finished run, window by window and position by position.

`window_losses` measures them once, with the best checkpoint on the whole test split, and keeps them in the run folder
as test_windows.safetensors. They count for the checkpoint whose hash stands in the file; with another, they are
measured again.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.utils.data import DataLoader
from tqdm import tqdm

from mla_lm.data.hashes import hash_file
from mla_lm.data.shards import Tokens
from mla_lm.data.tokenizer import end_of_text_id, token_bytes
from mla_lm.data.windows import EvaluationWindows
from mla_lm.errors import UserError
from mla_lm.files import write_atomically
from mla_lm.hardware import choose_accelerator, inference_autocast
from mla_lm.inference.evaluate import losses_of
from mla_lm.inference.texts import tokens_of_split
from mla_lm.runs.folder import RunFolder, find_best
from mla_lm.runs.load import LoadedRun, load_run
from mla_lm.terminal.plain_text import say


class WindowLosses(NamedTuple):
    """Sums over the test split, as arrays of numpy: W windows of T positions."""

    nats: np.ndarray  # (W,) fp64
    tokens: np.ndarray  # (W,) int64, predicted ones
    text_bytes: np.ndarray  # (W,) int64, UTF-8, of their text
    documents: np.ndarray  # (W,) int64: number of the document that each window begins in
    position_nats: np.ndarray  # (T,) fp64
    position_tokens: np.ndarray  # (T,) int64

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / self.tokens.sum())


def window_losses(run: RunFolder, trusted: bool = False) -> WindowLosses:
    """Read the losses that the run folder keeps, or measure them and keep them there.

    Args:
        trusted: whether the paths of a run that was made elsewhere may be opened

    Raises:
        UserError: they cannot be measured: the run has no data of its own, its data have changed, or it was made
            elsewhere and is not trusted.
    """
    _, checkpoint = find_best(run.path)
    if not checkpoint.is_file():
        raise UserError(f"no checkpoint at {checkpoint}")
    digest, file = hash_file(checkpoint), run.path / "test_windows.safetensors"
    kept = _read(file, digest, run.config().model.seq_len)
    if kept is not None:
        return kept
    device, _ = choose_accelerator("auto")
    loaded = load_run(run.path, device)
    tokens = tokens_of_split(str(run.path), "test", loaded.tokenizer, loaded.config, trusted)
    losses = measure(loaded, tokens, device)
    content = save(losses._asdict(), {"checkpoint": digest})
    try:
        write_atomically(file, lambda out: out.write(content))
    except UserError as error:  # a folder of others, or a full disk: the next comparison measures again
        say(f"warning: {error}", file=sys.stderr)
    return losses


def measure(run: LoadedRun, tokens: Tokens | np.ndarray, device: str) -> WindowLosses:
    """Measure the losses of a loaded run, in the precision it was trained in, on all windows of a split."""
    net, config = run.model, run.config
    lengths = torch.from_numpy(token_bytes(run.tokenizer)).to(device)
    end = end_of_text_id(run.tokenizer, config.data.tokenizer.end_of_text)
    windows = EvaluationWindows(tokens, config.model.seq_len, split="test")
    parts, positions, ended = [], torch.zeros(2, config.model.seq_len, dtype=torch.float64), 0
    with torch.no_grad(), inference_autocast(device, config.trainer.precision):
        for batch in tqdm(DataLoader(windows, config.evaluation_batch_size), desc="evaluating", disable=None):
            found = [values.double().cpu() for values in losses_of(net, batch.to(device), lengths)]
            positions += torch.stack([values.sum(0) for values in found[:2]])
            ends = (batch[:, :-1] == end).sum(1)
            documents = ended + ends.cumsum(0) - ends + (batch[:, 0] == end)
            ended += int(ends.sum())
            parts.append([values.sum(1) for values in found] + [documents])
    nats, counted, text_bytes, documents = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return WindowLosses(
        nats,
        counted.astype(np.int64),
        text_bytes.astype(np.int64),
        documents,
        positions[0].numpy(),
        positions[1].numpy().astype(np.int64),
    )


def _read(file: Path, digest: str, seq_len: int) -> WindowLosses | None:
    """The losses in a file if they are whole and of this checkpoint; it may come from anybody."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="numpy") as content:
            if (content.metadata() or {}).get("checkpoint") != digest:
                return None
            losses = WindowLosses._make(content.get_tensor(name) for name in WindowLosses._fields)
    except (SafetensorError, OSError, ValueError):
        return None
    windows = losses.tokens.shape
    shapes = [values.shape for values in losses]
    sound = shapes == [windows] * 4 + [(seq_len,)] * 2 and len(windows) == 1 and np.isfinite(losses.nats).all()
    return losses if sound and losses.tokens.min(initial=0) >= 0 and losses.tokens.sum() > 0 else None
