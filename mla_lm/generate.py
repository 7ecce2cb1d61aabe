"""Sampling a continuation through the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mla_lm.errors import UserError
from mla_lm.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    tokens: Tensor,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """Yield (B,) next ids, one position at a time, until `max_tokens` or the model's seq_len.

    Args:
        model: in evaluation mode
        tokens: (B, T) ids of the prompts, T at least 1
        max_tokens: fewer come where seq_len ends first; none where the prompts fill it
        temperature: 0 takes the likeliest token
        top_k: sample among this many likeliest tokens only
        generator: on the model's device; the global one unless given
        dtype: of the cache, the weights' unless given

    Raises (at the first id that is asked for):
        UserError (a ValueError): the prompts are longer than the model's seq_len; temperature below 0; top_k below 1.
    """
    prompt, seq_len = tokens.size(1), model.config.seq_len
    if prompt > seq_len:
        raise UserError(f"a prompt of {prompt} tokens is longer than the model's seq_len={seq_len}")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise UserError(f"temperature={temperature} must be at least 0, top_k={top_k} at least 1")
    count = min(max_tokens, seq_len - prompt)
    cache = model.new_cache(tokens.size(0), prompt + count, dtype)
    for _ in range(count):
        last = model.hidden_states(tokens, cache)[:, -1]  # of a whole prompt, only the last position needs logits
        tokens = pick(model.head(last).float(), temperature, top_k, generator).unsqueeze(1)
        yield tokens.squeeze(1)


def pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """(B, V) logits to (B,) ids."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
