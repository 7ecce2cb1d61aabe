"""Loss, perplexity and bits per byte of a model, measured on windows of tokens."""

import itertools
import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from mla_lm.data.shards import Tokens
from mla_lm.model.loss import IGNORE, linear_cross_entropy
from mla_lm.model.transformer import Transformer
from mla_lm.terminal.tables import table


def losses_of(
    net: Transformer, batch: Tensor, token_bytes: Tensor, first: int = 0, cache_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each target in a batch of windows; arguments as in `sums_by_position`.

    Returns:
        (B, T - first) each: nats, fp32, 0 where nothing is predicted; whether the target counts; its UTF-8 bytes
    """
    targets = batch[:, 1 + first :]
    cache = None if cache_dtype is None else net.new_cache(len(batch), batch.size(1) - 1, cache_dtype)
    # never compiled: for new shapes and without gradients, it would cost more than it gains
    x = net.hidden_states(batch[:, :-1].clamp(min=0), cache)[:, first:]
    nats = linear_cross_entropy(x, net.head.weight, targets, reduction="none")
    return nats, targets != IGNORE, torch.where(targets == IGNORE, 0, token_bytes[targets.clamp(min=0)])


def sums_by_position(
    net: Transformer, batch: Tensor, token_bytes: Tensor, first: int = 0, cache_dtype: torch.dtype | None = None
) -> Tensor:
    """Sum nats, tokens and bytes over the windows of a batch, separately for each position in the window.

    Args:
        batch: (B, T + 1) ids; the inputs are all but the last, the targets all but the first; -100 does not count
        token_bytes: (vocab_size,) UTF-8 bytes that each token stands for, 0 for special tokens
        first: first position whose target counts; the positions before it are context only
        cache_dtype: if given, attention reads each window back from a cache of this dtype, as decoding does

    Returns:
        (3, T - first), fp64 on the CPU: nats, predicted tokens, and UTF-8 bytes of their text
    """
    found = losses_of(net, batch, token_bytes, first, cache_dtype)
    return torch.stack([values.sum(0).cpu().double() for values in found])  # over windows: fp32 is precise enough


def totals_of(net: Transformer, batch: Tensor, token_bytes: Tensor) -> Tensor:
    """`sums_by_position` summed over positions, (3,)."""
    return sums_by_position(net, batch, token_bytes).sum(-1)


def metrics_of(totals: Tensor) -> dict[str, float]:
    """Compute loss (nats per token), perplexity and bits_per_byte from `totals_of`, summed over all batches, (3,)."""
    nats, tokens, text_bytes = totals.tolist()
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # a float overflows beyond exp(709)
        "bits_per_byte": nats / math.log(2) / text_bytes,
    }


class SlidingWindows(Dataset):
    """Windows that start every `stride` tokens, up to the first that reaches the last token.

    The first window predicts all of its targets and each later one its last `stride` targets, so every token but the
    very first is predicted once. The last window is padded with -100. With `stride` equal to `seq_len`, the windows are
    those of `EvaluationWindows`. Items are int64 (seq_len + 1,).

    Args:
        tokens: `Tokens` or an array of ids, (count,)
        stride: tokens between the starts of windows, 1 to seq_len
    """

    def __init__(self, tokens: Tokens | np.ndarray, seq_len: int, stride: int):
        self.tokens, self.seq_len, self.stride = tokens, seq_len, stride

    def __len__(self) -> int:
        beyond_the_first = max(0, len(self.tokens) - 1 - self.seq_len)
        return 1 + -(-beyond_the_first // self.stride)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.stride
        window = torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))
        return torch.nn.functional.pad(window, (0, self.seq_len + 1 - len(window)), value=IGNORE)


def sums_over(
    net: Transformer,
    windows: Dataset,
    token_bytes: Tensor,
    batch_size: int,
    first: int = 0,
    cache_dtype: torch.dtype | None = None,
) -> Tensor:
    """`sums_by_position` summed over all windows, (3, T - first)."""
    sums = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for batch in tqdm(DataLoader(windows, batch_size), desc="evaluating", disable=None):  # None: only on a terminal
            sums = sums + sums_by_position(net, batch.to(token_bytes.device), token_bytes, first, cache_dtype)
    return sums


def evaluate(
    net: Transformer,
    windows: SlidingWindows,
    token_bytes: Tensor,
    batch_size: int,
    cache_dtype: torch.dtype | None = None,
) -> Tensor:
    """Sums of `sums_by_position` over all windows, (3, seq_len), with each target counted once."""
    context = windows.seq_len - windows.stride  # tokens before the targets, in all windows but the first
    sums = sums_over(net, Subset(windows, [0]), token_bytes, batch_size, 0, cache_dtype)
    if len(windows) > 1:
        others = Subset(windows, range(1, len(windows)))
        sums[:, context:] += sums_over(net, others, token_bytes, batch_size, context, cache_dtype)
    return sums


def position_table(columns: dict[str, Tensor]) -> str:
    """Format the mean loss at positions 0, 1, 2 to 3, 4 to 7 and so on as a table.

    Args:
        columns: maps each heading to sums of `sums_by_position`, (3, T)
    """
    first = next(iter(columns.values()))
    rows = [["position", "tokens", *columns]]
    for start, end in ranges(first.shape[1]):
        counts = [sums[:2, start:end].sum(-1).tolist() for sums in columns.values()]
        if all(tokens for _, tokens in counts):
            name = f"{start}" if end == start + 1 else f"{start}-{end - 1}"
            rows.append([name, f"{int(counts[0][1]):,}", *(f"{nats / tokens:.4f}" for nats, tokens in counts)])
    return table(rows)


def ranges(length: int) -> list[tuple[int, int]]:
    """The ranges [0, 1), [1, 2), [2, 4), [4, 8) and so on, up to `length`."""
    edges = [0, *(2**power for power in range(length.bit_length()) if 2**power < length), length]
    return list(itertools.pairwise(edges))


def losses(sums: Tensor) -> list[float | None]:
    """Mean loss in nats at each position, from sums (3, T); None where nothing was predicted."""
    return [nats / tokens if tokens else None for nats, tokens in sums[:2].T.tolist()]
