"""Sampling of continuations with a KV cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mla_lm.attention.kv_cache import ModelCache
from mla_lm.errors import UserError
from mla_lm.inference.cuda_graph import CapturedStep, can_capture
from mla_lm.model.transformer import Transformer

NOTHING = -1  # stands where a row has no id
PREFILL = 1024  # prompt tokens read at once, so that activations do not grow with the prompt
LOWEST_TEMPERATURE = 1e-6  # below it, sampling in fp32 is the same as taking the likeliest token


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Tensor | Sequence[Tensor],
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    cache: ModelCache | None = None,
    compiled: bool = False,
) -> Iterator[Tensor]:
    """Yield the next ids of all rows, (B,), one position at a time, until `max_tokens` or the model's seq_len.

    Prompts of different lengths share a batch, and all begin at position 0. The prompts are first read up to the length
    of the shortest. From there on, each row takes its next id from its own prompt while that lasts, and samples after
    it. So no row is padded or masked, and each attends to exactly what it would attend to alone.

    Args:
        model: in evaluation mode
        prompts: (B, T) ids, or B tensors (T_i,) of them; none is empty
        max_tokens: new tokens per row; fewer where seq_len is reached first, none where the prompt fills it
        temperature: divides the logits; 0 takes the likeliest token
        top_k, top_p, min_p, repetition_penalty: see `token_weights` and `penalize`; all off by default
        generator: random generator for all rows, on the model's device; by default the global one
        dtype: of the cache, by default that of the weights; see `LayerCache`
        cache: holds the first tokens of every prompt, which are not read again, and receives the rest; by default a new
            one of `dtype`
        compiled: compile the steps of one token; the first such step then takes up to a minute. On a CUDA device they
            are captured as one CUDA graph besides, sampling included, with the cache at a fixed position

    Yields:
        (B,) ids; NOTHING (-1) for a row whose prompt is not read to its end, or that already has its max_tokens

    Raises (when the first id is asked for):
        UserError (a ValueError): a prompt is longer than the model's seq_len, the cache already holds all of a prompt,
            or `check_sampling` refuses an option.
        ValueError: the cache has no room left; the step that needs it raises this.
    """
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts, seq_len = list(prompts), model.config.seq_len
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    if longest > seq_len:
        raise UserError(f"a prompt of {longest} tokens is longer than the model's seq_len={seq_len}")
    end = min(longest + max_tokens, seq_len)
    cache = cache or model.new_cache(len(prompts), end, dtype)
    if cache.length >= shortest:
        raise UserError(f"the cache holds {cache.length} tokens, and a prompt has {shortest}: nothing is left to read")
    if shortest == end:
        return
    rows = _Rows(prompts, max_tokens, end, model.head.weight.size(0))

    def choose(logits: Tensor) -> None:
        logits = penalize(logits, rows.seen, repetition_penalty)
        rows.append(pick(logits, temperature, top_k, top_p, min_p, generator))

    captured = compiled and can_capture(rows.given.device)
    read_one = _compiled_read(model) if compiled else _read
    for chunk in rows.given[:, cache.length : shortest].split(PREFILL, dim=1):
        logits = (_read if captured or chunk.size(1) > 1 else read_one)(model, chunk, cache)
    choose(logits)
    yield rows.new.clone()

    def step() -> None:
        choose(read_one(model, rows.last, cache))

    if not captured:
        for _ in range(shortest + 1, end):
            step()
            yield rows.new.clone()
        return
    with cache.fixed(end - 1):  # the last ids are not read
        step = CapturedStep(step, rows.given.device, generator)
        for _ in range(shortest + 1, end):
            cache.reserve(1)
            step()
            yield rows.new.clone()


def _read(model: Transformer, tokens: Tensor, cache: ModelCache) -> Tensor:
    """Append the tokens (B, T) to the cache; return logits of the last position alone, (B, V) in fp32."""
    return model.head(model.hidden_states(tokens, cache)[:, -1]).float()


_COMPILED: WeakKeyDictionary[Transformer, Callable[..., Tensor]] = WeakKeyDictionary()


def _compiled_read(model: Transformer) -> Callable[..., Tensor]:
    """`_read`, compiled for this model alone.

    torch compiles one function's code 8 times at most, and from there on runs it uncompiled. Each model compiles a copy
    of the code, so that the number of models has no limit; one model needs a few, for its caches and batches.
    """
    if model not in _COMPILED:
        _COMPILED[model] = torch.compile(FunctionType(_read.__code__.replace(), globals()), dynamic=True)
    return _COMPILED[model]


class _Rows:
    """The ids of all rows, in tensors that keep their places, so that a CUDA graph can append to them.

    Args:
        prompts: as in `generate`
        max_tokens: new ids of each row
        end: length of the longest row in the end
        vocab_size: V

    Attributes:
        given: (B, end), the prompts' ids, then NOTHING
        position: (1,), of the next ids; at first the length of the shortest prompt
        last: (B, 1), the ids before it
        new: (B,), the same; NOTHING for a row whose prompt is not read to its end, or that already has its max_tokens
        seen: (B, V), true for the ids of a row
    """

    def __init__(self, prompts: list[Tensor], max_tokens: int, end: int, vocab_size: int):
        lengths = [len(prompt) for prompt in prompts]
        given = pad_sequence(prompts, batch_first=True, padding_value=NOTHING)
        self.given = given = F.pad(given, (0, end - given.size(1)), value=NOTHING)
        self.lengths, self.max_tokens = torch.tensor(lengths, device=given.device), max_tokens
        self.position = torch.tensor([min(lengths)], device=given.device)
        self.last, self.new = torch.empty_like(given[:, :1]), torch.empty_like(given[:, 0])
        self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=given.device)
        self.seen.scatter_(1, torch.where(given == NOTHING, given[:, :1], given), True)  # its first id for NOTHING

    def append(self, picked: Tensor) -> None:
        """Append the ids of the prompts at the position, or where a prompt has none, those picked, (B,)."""
        own = self.given.index_select(1, self.position).squeeze(1)
        ids = torch.where(own == NOTHING, picked, own)
        self.last.copy_(ids.unsqueeze(1))
        self.seen.scatter_(1, self.last, True)
        is_new = (self.position >= self.lengths) & (self.position < self.lengths + self.max_tokens)
        self.new.copy_(ids.masked_fill(~is_new, NOTHING))
        self.position.add_(1)


def check_sampling(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> None:
    """Raise UserError (a ValueError) that names an option with an invalid value."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature={temperature} must be at least 0 (0 takes the likeliest token)")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must be above 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise UserError(f"min_p={min_p} must be at least 0 and at most 1")
    if not 0 < repetition_penalty < math.inf:
        raise UserError(f"repetition_penalty={repetition_penalty} must be a number above 0; 1 is none")


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make ids less likely that occur in a row's prompt or continuation (CTRL, arXiv 1909.05858, section 4.1).

    Args:
        logits: (B, V)
        seen: (B, V), true for those ids
        penalty: divides positive logits and multiplies negative ones; above 1 both fall, 1 changes nothing

    Returns:
        (B, V) logits
    """
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def pick(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample one id per row, (B,), from (B, V) logits; below LOWEST_TEMPERATURE, take the likeliest."""
    if temperature < LOWEST_TEMPERATURE:
        return logits.argmax(-1)
    weights = token_weights(logits, temperature, top_k, top_p, min_p)
    # What torch.multinomial draws for the same generator. But it also checks the weights, for which it reads the GPU.
    return (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(-1)


def token_weights(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Sampling probabilities, unnormalised: softmax of the logits, with 0 for the ids that a limit excludes.

    The limits apply one after another, in the order of the arguments.

    Args:
        logits: (B, V)
        temperature: above 0; divides the logits
        top_k: keep the k likeliest ids
        top_p: keep the fewest likeliest ids that hold this share of the remaining probability (arXiv 1904.09751)
        min_p: keep ids at least `min_p` times as likely as the likeliest one (arXiv 2407.01082)

    Returns:
        (B, V)
    """
    weights = (logits / temperature).softmax(-1)
    if top_k is not None:
        kth = weights.topk(min(top_k, weights.size(-1))).values[:, -1:]
        weights = weights.where(weights >= kth, 0)
    if top_p is not None:
        ordered, order = weights.sort(descending=True)
        likelier = ordered.cumsum(-1) - ordered  # probability of all likelier ids
        kept = ordered.where(likelier < top_p * ordered.sum(-1, keepdim=True), 0)
        weights = torch.zeros_like(weights).scatter_(1, order, kept)
    if min_p is not None:
        weights = weights.where(weights >= min_p * weights.amax(-1, keepdim=True), 0)
    return weights
