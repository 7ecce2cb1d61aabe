"""What a user may say about data: which text, which tokenizer, where the token cache lives."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from mla_lm.errors import UserError
from mla_lm.keys import HUB_PATH, INCIDENTAL, PATH, check_at_least, check_choice, marked

SOURCES = ("python_stdlib", "python_packages", "text", "characters", "hub")
MIXTURE = "mixture"  # the source that is several others
SMALLEST_WEIGHT = 0.001  # a place in every 1,000 training windows
TOKENIZER_KINDS = ("bpe", "file", "hub", "characters", "bytes")
SMALLEST_BPE = 257  # the 256 bytes and the end-of-text token


@dataclass
class TokenizerConfig:
    kind: str = "bpe"  # bpe (trained on the training split) | file | hub | characters | bytes
    vocab_size: int = 4096  # kind=bpe: at most this many, the end-of-text token included
    file: str | None = marked(None, PATH)  # kind=file: a tokenizer.json
    path: str | None = marked(None, HUB_PATH)  # kind=hub: a model on the Hub, or a folder, with a tokenizer.json
    end_of_text: str | None = None  # name of the token that ends a document; None: look for the usual ones

    def check(self) -> None:
        """Raises: UserError for values that do not exist or do not go together."""
        check_choice("data.tokenizer.kind", self.kind, TOKENIZER_KINDS)
        if self.kind == "file" and not self.file:
            raise UserError("data.tokenizer.kind=file needs data.tokenizer.file, the path of a tokenizer.json")
        if self.kind != "file" and self.file:
            raise UserError(f"data.tokenizer.file is not read by data.tokenizer.kind={self.kind}: set the kind to file")
        if self.kind == "hub" and not self.path:
            raise UserError("data.tokenizer.kind=hub needs data.tokenizer.path: for example openai-community/gpt2")
        if self.kind != "hub" and self.path:
            raise UserError(f"data.tokenizer.path is not read by data.tokenizer.kind={self.kind}: set the kind to hub")
        if self.kind == "bpe" and self.vocab_size < SMALLEST_BPE:
            raise UserError(
                f"data.tokenizer.vocab_size={self.vocab_size} is too small for bpe: "
                f"at least {SMALLEST_BPE}, the 256 bytes and the end-of-text token"
            )


@dataclass
class SplitsConfig:
    """What a dataset of the Hub calls its splits."""

    train: str = "train"
    validation: str | None = None  # None: "validation" where it has one, else carved from the training split
    test: str | None = None  # likewise


@dataclass
class CorpusConfig:
    """Which text."""

    source: str = "python_stdlib"  # python_stdlib | python_packages | text | characters | hub
    files: Any = field(default=None, metadata=PATH)  # a path or glob, or a list of them
    # source=hub: organisation/name of a dataset, or a folder laid out like one
    path: str | None = marked(None, HUB_PATH)
    name: str | None = None  # source=hub: which of the dataset's configurations
    revision: str | None = None  # source=hub: commit, branch or tag; None: the newest when it is first read
    splits: SplitsConfig = field(default_factory=SplitsConfig)  # source=hub
    lines: bool = False  # source=hub: rows are the lines of one text, not documents
    max_characters: int | None = None  # source=hub: stream no more than this of each split; None: download it whole
    column: str = "text"  # of .jsonl, .json and .parquet files and of source=hub

    def check(self) -> None:
        """Raises: UserError for values that do not exist or do not go together."""
        check_choice("data.source", self.source, SOURCES)
        if self.source == "hub":
            self._check_hub()
        elif self._of_hub() != CorpusConfig()._of_hub():
            raise UserError(
                f"data.path, name, revision, splits, lines and max_characters are not read by data={self.source}: "
                "choose data=hub"
            )
        if self.source in ("python_stdlib", "python_packages", "hub") and self.files:
            raise UserError(f"data.files is not read by data={self.source}: choose data=text for your own files")
        if self.source in ("text", "characters") and not self.files:
            raise UserError(f"data={self.source} needs data.files, a path or a glob: for example data.files='my/*.txt'")

    def _check_hub(self) -> None:
        if not self.path:
            raise UserError("data=hub needs data.path, a dataset or a folder: for example roneneldan/TinyStories")
        if self.max_characters is not None and self.max_characters < 1:
            raise UserError(f"data.max_characters={self.max_characters} must be at least 1, or null for all")
        if self.splits.train in (self.splits.validation, self.splits.test):
            raise UserError(
                f"data.splits.train={self.splits.train} is also the validation or test split: name another one, or "
                "null to carve it"
            )

    def _of_hub(self) -> tuple:
        return self.path, self.name, self.revision, self.splits, self.lines, self.max_characters


@dataclass
class PartConfig(CorpusConfig):
    """A corpus of a mixture."""

    weight: float = 0.0  # its share of the training windows; those of all parts sum to 1


@contextlib.contextmanager
def in_part(number: int) -> Iterator[None]:
    """Within, the message of a UserError begins with the part of the mixture that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"data.parts[{number}]: {error}") from error


@dataclass
class DataConfig(CorpusConfig):
    """The text, of one source or (source=mixture) of several, and how it becomes tokens."""

    parts: list[PartConfig] = field(default_factory=list)  # source=mixture
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    document_mask: bool = False  # attention stays within a document, and positions begin anew with it
    val_tokens: int = 65536  # a validation predicts at most this many tokens (but at least one window)
    cache_dir: str = marked("data/cache", INCIDENTAL | PATH)  # token stores
    # processes that load batches; tokens are memory-mapped, so 0 is usually fastest
    num_workers: int = marked(0, INCIDENTAL)
    # what samples are continued from; empty: a new document
    prompts: list[str] = field(default_factory=list, metadata=INCIDENTAL)

    def check(self) -> None:
        """Raises: UserError for values that do not exist or do not go together."""
        check_choice("data.source", self.source, (*SOURCES, MIXTURE))
        self.tokenizer.check()
        if self.source == MIXTURE:
            self._check_mixture()
        else:
            super().check()
            if self.parts:
                raise UserError(f"data.parts is not read by data={self.source}: choose data=mixture")
        check_at_least(1, self, "data.", "val_tokens")
        check_at_least(0, self, "data.", "num_workers")

    def _check_mixture(self) -> None:
        for key in (key.name for key in fields(CorpusConfig) if key.name != "source"):
            if getattr(self, key) != getattr(CorpusConfig(), key):
                raise UserError(f"data.{key} is not read by data=mixture: give it to a part in data.parts")
        if not self.parts:
            raise UserError(
                "data=mixture needs data.parts, for example data.parts='[{source:python_stdlib,weight:0.7},"
                "{source:text,files:my/*.txt,weight:0.3}]'"
            )
        for number, part in enumerate(self.parts):
            with in_part(number):
                part.check()
            if not part.weight >= SMALLEST_WEIGHT:
                raise UserError(
                    f"data.parts[{number}].weight={part.weight:g} must be at least {SMALLEST_WEIGHT}: it is the share "
                    "of the training windows that the part gives"
                )
        weights = [part.weight for part in self.parts]
        total = math.fsum(weights)
        if not abs(total - 1) <= 1e-6:
            right = ", ".join(f"{weight / total:.8g}" for weight in weights)
            raise UserError(
                f"the weights of data.parts sum to {total:.8g}, and must sum to 1: in the same proportions they are "
                f"{right}"
            )
