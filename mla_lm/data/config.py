"""What a user may say about data: which text, which tokenizer, where the token cache lives."""

from dataclasses import dataclass, field
from typing import Any

from mla_lm.errors import UserError

SOURCES = ("python_stdlib", "text", "characters")
TOKENIZER_KINDS = ("bpe", "file", "characters", "bytes")
SMALLEST_BPE = 257  # the 256 bytes and the end-of-text token


@dataclass
class TokenizerConfig:
    kind: str = "bpe"  # bpe (trained on the training split) | file | characters | bytes
    vocab_size: int = 4096  # kind=bpe: at most this many, the end-of-text token included
    file: str | None = None  # kind=file: a tokenizer.json
    end_of_text: str | None = None  # name of the token that ends a document; None: look for the usual ones

    def check(self) -> None:
        """Raises: UserError for values that do not exist or do not go together."""
        _check_choice("data.tokenizer.kind", self.kind, TOKENIZER_KINDS)
        if self.kind == "file" and not self.file:
            raise UserError("data.tokenizer.kind=file needs data.tokenizer.file, the path of a tokenizer.json")
        if self.kind != "file" and self.file:
            raise UserError(f"data.tokenizer.file is not read by data.tokenizer.kind={self.kind}: set the kind to file")
        if self.kind == "bpe" and self.vocab_size < SMALLEST_BPE:
            raise UserError(
                f"data.tokenizer.vocab_size={self.vocab_size} is too small for bpe: "
                f"at least {SMALLEST_BPE}, the 256 bytes and the end-of-text token"
            )


@dataclass
class DataConfig:
    source: str = "python_stdlib"  # python_stdlib | text | characters
    files: Any = None  # a path or glob, or a list of them, relative to the working directory
    column: str = "text"  # of .jsonl, .json and .parquet files
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    val_tokens: int = 65536  # a validation predicts at most this many tokens (but at least one window)
    cache_dir: str = "data/cache"  # token stores
    num_workers: int = 0  # processes that load batches; tokens are memory-mapped, so 0 is usually fastest
    prompts: list[str] = field(default_factory=list)  # what samples are continued from; empty: a new document

    def check(self) -> None:
        """Raises: UserError for values that do not exist or do not go together."""
        _check_choice("data.source", self.source, SOURCES)
        self.tokenizer.check()
        if self.source == "python_stdlib" and self.files:
            raise UserError("data.files is not read by data=python_stdlib: choose data=text for your own files")
        if self.source != "python_stdlib" and not self.files:
            raise UserError(f"data={self.source} needs data.files, a path or a glob: for example data.files='my/*.txt'")
        if self.val_tokens < 1:
            raise UserError(f"data.val_tokens={self.val_tokens} must be at least 1")
        if self.num_workers < 0:
            raise UserError(f"data.num_workers={self.num_workers} must be at least 0")


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key}={value} is unknown: one of {', '.join(choices)}")
