"""Text generation by a trained run, token by token, as decoded text."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer

from mla_lm.config import TrainConfig
from mla_lm.data.tokenizer import decode, encode, end_of_text_id
from mla_lm.errors import UserError
from mla_lm.hardware import DTYPES, inference_autocast
from mla_lm.inference.generate import NOTHING, generate
from mla_lm.model.transformer import Transformer

NOT_WHOLE = "\N{REPLACEMENT CHARACTER}"  # what an incomplete UTF-8 character decodes to


class Continuation:
    """The text of one prompt as it grows, until the document ends, a stop string appears, or `room` tokens have come.

    Args:
        ids: ids of the prompt
        end: id that ends a document
        room: most new tokens, at least 1
        stops: strings that end the text and are cut off it; one that begins in the prompt does not count
    """

    def __init__(self, tokenizer: Tokenizer, ids: list[int], end: int, room: int, stops: list[str]):
        self.tokenizer, self.end, self.room, self.stops = tokenizer, end, room, stops
        self.ids = list(ids)
        self.text = ""
        # For each new id only the last ids are decoded again, as decoding all would take ever longer. They are the ids
        # since the last whole character, and a few before them, as a tokenizer may drop a text's leading space.
        self._window, self._whole, self._length = 0, 0, 0
        self._decode_window()
        self.prompt_length = len(self.text)
        self.new = 0  # number of new tokens
        self.done = False

    def add(self, token: int) -> None:
        if token == self.end:
            self.done = True
            return
        self.ids.append(token)
        self.new += 1
        self._decode_window()
        found = [self.text.find(stop, self.prompt_length) for stop in self.stops]
        if stopped := [at for at in found if at >= 0]:
            self.text = self.text[: min(stopped)]
        self.done = bool(stopped) or self.new == self.room

    def _decode_window(self) -> None:
        before = decode(self.tokenizer, self.ids[self._window : self._whole])
        now = decode(self.tokenizer, self.ids[self._window :])
        self.text = self.text[: self._length] + now[len(before) :]
        if len(now) > len(before) and not now.endswith(NOT_WHOLE):
            self._window, self._whole, self._length = self._whole, len(self.ids), len(self.text)

    @property
    def stored(self) -> int:
        """Tokens that a cache of the present text holds, including the end-of-text token before it."""
        return len(self.ids) + 1

    @property
    def settled(self) -> str:
        """The text up to what later tokens may change: an incomplete character, or the start of a stop string."""
        text = self.text.rstrip(NOT_WHOLE)
        if self.done:
            return text
        most = len(text) - self.prompt_length
        held = (n for stop in self.stops for n in range(1, len(stop)) if n <= most and text.endswith(stop[:n]))
        return text[: len(text) - max(held, default=0)]


class Decoding:
    """Continues prompts with one run, all in one batch with a KV cache, by one token each per step.

    Args:
        run: the result of `load_run`
        prompts: texts to continue
        max_tokens: most new tokens per prompt; fewer where the model's seq_len is reached first
        stops: see `Continuation`
        generator: random generator, on the model's device
        cache_dtype: by default that of the run's precision
        sampling: options of `generate`

    Raises:
        UserError: a prompt is empty, is too long for the model, or has a character that the tokenizer does not know.
    """

    def __init__(
        self,
        run: tuple[Transformer, Tokenizer, TrainConfig],
        prompts: list[str],
        max_tokens: int,
        stops: list[str],
        generator: torch.Generator,
        cache_dtype: torch.dtype | None = None,
        **sampling: Any,
    ):
        model, tokenizer, config = run
        self.precision, self.device = config.trainer.precision, generator.device
        self.seconds = 0.0  # total time of its steps
        end = end_of_text_id(tokenizer, config.data.tokenizer.end_of_text)
        self.seq_len = seq_len = model.config.seq_len
        self.texts = []
        for prompt in prompts:
            ids = encode(tokenizer, prompt)
            if not ids:
                raise UserError("the prompt is empty: give some text to continue, such as --prompt $'\\n'")
            if len(ids) + 1 >= seq_len:
                raise UserError(f"the prompt has {len(ids) + 1} tokens, the model reads {seq_len}: shorten it")
            room = min(max_tokens, seq_len - len(ids) - 1)
            self.texts.append(Continuation(tokenizer, ids, end, room, stops))
        begun = [torch.tensor([end, *text.ids], device=self.device) for text in self.texts]  # as after another document
        dtype = cache_dtype or DTYPES[self.precision]
        self.steps = generate(model, begun, max_tokens, **sampling, generator=generator, dtype=dtype)
        self.cache_bytes_per_token = model.new_cache(1, 1, dtype).nbytes  # over all layers

    def step(self) -> None:
        """Add the next token to each text that is not done and whose prompt has been read."""
        start = time.perf_counter()
        with inference_autocast(self.device.type, self.precision):
            ids = next(self.steps).tolist()
        self.seconds += time.perf_counter() - start
        for text, token in zip(self.texts, ids, strict=True):
            if token != NOTHING and not text.done:
                text.add(token)

    @property
    def done(self) -> bool:
        return all(text.done for text in self.texts)

    @property
    def full(self) -> bool:
        """Whether a text has reached the model's seq_len."""
        return any(text.stored == self.seq_len for text in self.texts)

    @property
    def new(self) -> int:
        """Number of new tokens in all texts."""
        return sum(text.new for text in self.texts)

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of all steps, including the first, which reads the prompts."""
        return self.new / self.seconds

    @property
    def stored(self) -> int:
        """Tokens that a cache of all present texts holds."""
        return sum(text.stored for text in self.texts)

    @property
    def cache_bytes(self) -> int:
        return self.stored * self.cache_bytes_per_token


def in_turns(*decodings: Decoding) -> Iterator[None]:
    """Step the unfinished decodings one after another until all are done; yield after each round."""
    # Each step opens its own autocast. Inside an outer one, the weights' low-precision copies would outlive the step.
    with torch.autocast(decodings[0].device.type, enabled=False):
        while not all(decoding.done for decoding in decodings):
            for decoding in decodings:
                if not decoding.done:
                    decoding.step()
            yield
