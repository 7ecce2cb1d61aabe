"""A run as a model of EleutherAI's lm-evaluation-harness, in batches and with the KV cache.

It gives the same numbers as the harness's own HFLM for the exported run (`scripts.export`): prompts begin with the
end-of-text token, and whatever is too long for the model is cut in the same way.
"""

# pyright: reportMissingImports=false
# The harness is optional: requirements-eval.txt.

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from mla_lm.attention.kv_cache import ModelCache
from mla_lm.config import MICRO_BATCH_TOKENS, TrainConfig
from mla_lm.data.tokenizer import encode, end_of_text_id
from mla_lm.errors import UserError
from mla_lm.hardware import DTYPES, inference_autocast
from mla_lm.inference.generate import NOTHING, generate
from mla_lm.inference.streaming import Continuation
from mla_lm.model.transformer import Transformer

SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")  # generation_kwargs that `generate` takes unchanged
POSITIONS = 1024  # positions whose logits exist at once
Answer = tuple[float, bool]  # log-probability of a continuation, and whether it is the greedy one


class Scored(NamedTuple):
    """A request to score its last `count` ids, each predicted from the ids before it."""

    number: int
    ids: list[int]
    count: int


class Group(NamedTuple):
    """Requests with a common context, `shared`; their own ids follow it."""

    shared: tuple[int, ...]
    members: list[Scored]

    @property
    def width(self) -> int:
        return len(self.shared) + max(len(member.ids) for member in self.members)


class RunLM(TemplateLM):
    """A run behind the harness's interface for models.

    Args:
        run: what `load_run` gives
    """

    def __init__(self, run: tuple[Transformer, Tokenizer, TrainConfig]):
        super().__init__()
        self.model, self.tokenizer, config = run
        self.precision, self.max_length = config.trainer.precision, config.model.seq_len
        tokens = min(config.micro_batch_tokens or MICRO_BATCH_TOKENS, MICRO_BATCH_TOKENS)
        self.batch_size = max(1, tokens // self.max_length)
        self.end = end_of_text_id(self.tokenizer, config.data.tokenizer.end_of_text)
        self.cut = 0  # requests whose context was too long for the model
        self._device = self.model.head.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with the end-of-text token in front unless `add_special_tokens` is False."""
        ids = encode(self.tokenizer, string)
        return ids if add_special_tokens is False else [self.end, *ids]

    # log-probabilities

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Score each (context, continuation); an empty continuation has log-probability 0."""
        return self._loglikelihood_tokens([(r.args, *self._encode_pair(*r.args)) for r in requests])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of the context, and ids that the continuation adds to them."""
        alone = self.tok_encode(continuation, add_special_tokens=False)
        if not context:
            return [self.end], alone
        context_ids, ids = super()._encode_pair(context, continuation)
        # The continuation may merge into the context's last token and add no id; HFLM would score that as certain.
        return context_ids, ids or alone

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, in windows of seq_len tokens.

        HFLM's tokenizer puts an end-of-text token before a text, and HFLM another one before that, so it predicts one
        token more per text. This does the same, to be comparable. `scripts.evaluate --files` predicts only the text.
        """
        texts = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(self.tok_encode(text), self.end, self.max_length, context_len=1)
            ]
            for (text,) in (request.args for request in requests)
        ]
        answers = iter(self._loglikelihood_tokens([(None, *window) for windows in texts for window in windows]))
        return [sum(next(answers)[0] for _ in windows) for windows in texts]

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Answer]:
        """Score each (anything, context ids, continuation ids); a context that is too long is cut from the left."""
        answers = [(0.0, True)] * len(requests)
        scored = []
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(f"a continuation has {len(continuation)} tokens, the model reads {self.max_length}")
            if continuation:
                ids = context + continuation  # the last id is predicted, not read
                self.cut += len(ids) > self.max_length + 1
                scored.append(Scored(number, ids[-self.max_length - 1 :], len(continuation)))
        with tqdm(total=len(scored), desc="reading", disable=None) as bar:  # None: only on a terminal
            for batch in in_batches(by_context(scored), self.batch_size * self.max_length):
                for number, answer in self._score(batch):
                    answers[number] = answer
                    bar.update()
        return answers

    def _score(self, batch: list[Group]) -> Iterator[tuple[int, Answer]]:
        """Yield the number of each request in a batch and its answer."""
        members = [member for group in batch for member in group.members]
        rows = [torch.tensor(member.ids, device=self.device) for member in members]
        counts = [member.count for member in members]
        # Padding on the right changes nothing, since no position attends to later ones.
        inputs = pad_sequence([row[:-1] for row in rows], batch_first=True)
        with inference_autocast(self.device.type, self.precision):
            cache = self._read_contexts(batch, inputs.size(1)) if batch[0].shared else None
            x = self.model.hidden_states(inputs, cache)
            predicting = [
                hidden[len(row) - 1 - count : len(row) - 1] for hidden, row, count in zip(x, rows, counts, strict=True)
            ]
            targets = torch.cat([row[-count:] for row, count in zip(rows, counts, strict=True)])
            logprobs, likeliest = self._predictions(torch.cat(predicting), targets)
        for member, logprob, likely in zip(members, logprobs.split(counts), likeliest.split(counts), strict=True):
            yield member.number, (logprob.sum().item(), bool(likely.all()))

    def _read_contexts(self, batch: list[Group], room: int) -> ModelCache:
        """Read each context once; return a cache with one row per request, which holds its context."""
        contexts = torch.tensor([group.shared for group in batch], device=self.device)
        cache = self.model.new_cache(len(batch), contexts.size(1) + room, DTYPES[self.precision])
        self.model.hidden_states(contexts, cache)
        rows = torch.tensor([i for i, group in enumerate(batch) for _ in group.members], device=self.device)
        for layer in cache.layers:
            layer.tensors = [tensor[rows] for tensor in layer.tensors]
        return cache

    def _predictions(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """From hidden states (N, d_model): log-probabilities of targets (N,), and whether each is the likeliest id."""
        logprobs, likeliest = [], []
        for part, target in zip(x.split(POSITIONS), targets.split(POSITIONS), strict=True):
            logits = self.model.head(part).float()
            logprobs.append(logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1))
            likeliest.append(logits.argmax(-1) == target)
        return torch.cat(logprobs).cpu().double(), torch.cat(likeliest).cpu()

    # generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each (context, generation_kwargs) up to the first of its stop strings."""
        prompts = [(self.tok_encode(context), options) for context, options in (r.args for r in requests)]
        # Prompts of similar length share a batch, since `generate` reads only the shortest one's length at once.
        order = Collator(prompts, sort_fn=lambda p: -len(p[0]), group_by="gen_kwargs", group_fn=lambda p: p[1])
        texts = []
        with tqdm(total=len(prompts), desc="generating", disable=None) as bar:
            for batch in order.get_batched(n=self.batch_size):
                texts += self._continue([ids for ids, _ in batch], batch[0][1])
                bar.update(len(batch))
        return order.get_original(texts)

    def _continue(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        options = dict(normalize_gen_kwargs(options))
        until, max_tokens = [stop for stop in options.pop("until") if stop], options.pop("max_gen_toks")
        do_sample, temperature = options.pop("do_sample"), options.pop("temperature", 0.0)
        if unknown := sorted(set(options) - set(SAMPLING)):
            raise UserError(f"generation_kwargs of a task has {', '.join(unknown)}: it may have {', '.join(SAMPLING)}")
        room = self.max_length - max_tokens  # for the prompt
        if room < 1:
            raise UserError(f"a task has max_gen_toks={max_tokens}, the model reads {self.max_length} tokens")
        self.cut += sum(len(ids) > room for ids in prompts)
        prompts = [ids[-room:] for ids in prompts]
        texts = [Continuation(self.tokenizer, ids, self.end, max_tokens, until) for ids in prompts]
        begun = [torch.tensor(ids, device=self.device) for ids in prompts]
        with inference_autocast(self.device.type, self.precision):
            temperature = temperature if do_sample else 0
            for step in generate(self.model, begun, max_tokens, temperature, **options, dtype=DTYPES[self.precision]):
                for text, token in zip(texts, step.tolist(), strict=True):
                    if token != NOTHING and not text.done:
                        text.add(token)
                if all(text.done for text in texts):
                    break
        new = [self.tokenizer.decode(text.ids[len(ids) :]) for ids, text in zip(prompts, texts, strict=True)]
        return [postprocess_generated_text(text, until, None) for text in new]


def by_context(requests: Iterable[Scored]) -> list[Group]:
    """Group the requests that share all but the last token of their context; every other one is a group of its own."""
    alike = defaultdict(list)
    for request in requests:
        alike[tuple(request.ids[: -request.count - 1])].append(request)
    groups = []
    for shared, members in alike.items():
        if shared and len(members) > 1:  # the context's last token is read by each member, to predict from it
            groups.append(Group(shared, [Scored(n, ids[len(shared) :], count) for n, ids, count in members]))
        else:
            groups += [Group((), [member]) for member in members]
    return groups


def in_batches(groups: list[Group], most: int) -> Iterator[list[Group]]:
    """Batch groups whose contexts are equally long, up to `most` ids in all; a larger group is a batch of its own."""
    batch, rows = [], 0
    for group in sorted(groups, key=lambda group: (len(group.shared), group.width), reverse=True):
        rows += len(group.members)
        if batch and (len(group.shared) != len(batch[0].shared) or rows * batch[0].width > most):
            yield batch
            batch, rows = [], len(group.members)
        batch.append(group)
    if batch:
        yield batch
