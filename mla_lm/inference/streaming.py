"""Text that a trained run continues, token by token."""

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

NOT_WHOLE = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no whole character decode to


class Continuation:
    """One prompt's text as it grows: up to the end of the document, the first stop string, or `room` new tokens.

    Args:
        ids: of the prompt
        end: id that ends a document
        room: new tokens at most, at least 1
        stops: texts that end it; they are not shown, and one that begins in the prompt does not count
    """

    def __init__(self, tokenizer: Tokenizer, ids: list[int], end: int, room: int, stops: list[str]):
        self.tokenizer, self.end, self.room, self.stops = tokenizer, end, room, stops
        self.ids = list(ids)
        self.text = ""
        # Only the last ids are decoded again for a new one, as all would take ever longer: those since the last whole
        # character, and the few before that, as a tokenizer may drop the space that its text begins with.
        self._window, self._whole, self._length = 0, 0, 0
        self._decode_window()
        self.prompt_length = len(self.text)
        self.new = 0  # tokens that came
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
        """Tokens to be stored for it as it is, the end-of-text token before it included."""
        return len(self.ids) + 1

    @property
    def settled(self) -> str:
        """All but what later tokens may change: a character that is not whole, and the beginning of a stop string."""
        text = self.text.rstrip(NOT_WHOLE)
        if self.done:
            return text
        most = len(text) - self.prompt_length
        held = (n for stop in self.stops for n in range(1, len(stop)) if n <= most and text.endswith(stop[:n]))
        return text[: len(text) - max(held, default=0)]


class Decoding:
    """Prompts as one run continues them: all in one batch, through its KV cache, a token of each at a step.

    Args:
        run: what `load_run` gives
        prompts: texts to continue
        max_tokens: new tokens of each at most; fewer where the model's seq_len ends first
        stops: see `Continuation`
        generator: on the model's device
        cache_dtype: that of the run's precision unless given
        sampling: options of `generate`

    Raises:
        UserError: a prompt is empty, too long for the model, or has a character that the tokenizer does not know.
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
        self.seconds = 0.0  # that its steps took
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
        begun = [torch.tensor([end, *text.ids], device=self.device) for text in self.texts]  # after a document's end
        dtype = cache_dtype or DTYPES[self.precision]
        self.steps = generate(model, begun, max_tokens, **sampling, generator=generator, dtype=dtype)
        self.cache_bytes_per_token = model.new_cache(1, 1, dtype).nbytes  # all layers

    def step(self) -> None:
        """Give each text its next token, if its prompt has been read and it is not done."""
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
        """Whether a text has come to the model's seq_len."""
        return any(text.stored == self.seq_len for text in self.texts)

    @property
    def new(self) -> int:
        """Tokens that came, of all texts."""
        return sum(text.new for text in self.texts)

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the time of all steps, the first among them, which reads the prompt."""
        return self.new / self.seconds

    @property
    def stored(self) -> int:
        """Tokens to be stored for the texts as they are."""
        return sum(text.stored for text in self.texts)

    @property
    def cache_bytes(self) -> int:
        return self.stored * self.cache_bytes_per_token


def in_turns(*decodings: Decoding) -> Iterator[None]:
    """Step those that are not done, one after another, until all are; yields after each round."""
    # Every step has an autocast of its own; within another one, the weights' copies in low precision outlive it.
    with torch.autocast(decodings[0].device.type, enabled=False):
        while not all(decoding.done for decoding in decodings):
            for decoding in decodings:
                if not decoding.done:
                    decoding.step()
            yield
