"""Tokenizers. Every kind is a `tokenizers.Tokenizer`, so the tokenizer.json of all runs has the same format."""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mla_lm.data.config import TokenizerConfig
from mla_lm.data.network import tokenizer_file
from mla_lm.errors import UserError
from mla_lm.files import read_text

END_OF_TEXT = "<|endoftext|>"
USUAL_END_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
BPE_TRAINING_CHARACTERS = 2**28  # merges have settled long before, and a corpus of any size trains in minutes
MOST_ENTRIES = 2**24
TOKENIZER_BYTES = 2**29  # largest tokenizer.json; one with 250,000 entries has 30 MB

# Pieces of text that BPE never merges across, for code and prose alike: a word with one sign or space before it; up to
# three digits; a run of signs with the line end and indentation after it; blank lines with the next indentation;
# spaces. On held-out Python with 4096 entries, this gives 3.92 bytes per token, GPT-2's pattern 3.56.
PIECES = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*[ \t]*"
    r"|\s*[\r\n]+[ \t]*"
    r"|\s+(?!\S)"
    r"|\s+"
)


def build_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Make the tokenizer that `config` asks for.

    Only kind=bpe and kind=characters read `texts`: pass bpe the training split, and characters all splits, so that each
    character of the corpus has a token.

    Raises:
        UserError: the file of kind=file is not a tokenizer, or the one of kind=hub is not available.
    """
    if config.kind == "file":
        assert config.file is not None  # ensured by TokenizerConfig.check
        return load_tokenizer(Path(config.file).expanduser())
    if config.kind == "hub":
        assert config.path is not None  # likewise
        return load_tokenizer(tokenizer_file(config.path))
    if config.kind == "bpe":
        tokenizer = _train_bpe(texts, config.vocab_size)
    elif config.kind == "bytes":
        tokenizer = Tokenizer(models.BPE(vocab=_byte_symbols(), merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        characters = sorted(set().union(*texts))
        tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
        tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _ready(tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json; the tokenizer encodes as the saved one did.

    Raises:
        UserError: the file is missing, far too large, or not a tokenizer.
    """
    try:
        text = read_text(Path(path), TOKENIZER_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the tokenizer {path} cannot be read: {error}") from error
    try:
        return _ready(Tokenizer.from_str(text))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text`, without added tokens; "<|endoftext|>" in it is ordinary text, never the special token.

    Raises:
        UserError: the text has a character that a character tokenizer does not know.
    """
    return encode_batch(tokenizer, [text])[0]


def encode_batch(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """`encode` for several texts, on all cores."""
    if _is_characters(tokenizer):
        for text in texts:
            _check_known_characters(tokenizer, text)
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of token ids, with special tokens written by name."""
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def end_of_text_id(tokenizer: Tokenizer, name: str | None = None) -> int:
    """Id of the token after every document: that of `name`, or of the first usual name that the tokenizer has.

    Raises:
        UserError: there is no such token.
    """
    names = USUAL_END_OF_TEXT if name is None else (name,)
    for candidate in names:
        if (token_id := tokenizer.token_to_id(candidate)) is not None:
            return token_id
    raise UserError(
        f"the tokenizer has no end-of-text token {' or '.join(names)}: "
        "set data.tokenizer.end_of_text to the name of the one it has"
    )


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Number of rows that an embedding needs: the highest id plus one, since a tokenizer may leave ids unused.

    Raises:
        UserError: there are none, or so many that the embedding would fill memory.
    """
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not 0 < size <= MOST_ENTRIES:
        raise UserError(f"the tokenizer has {size:,} entries by its highest id; there must be 1 to {MOST_ENTRIES:,}")
    return size


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes of text that each id stands for: int64 (vocabulary_size,), 0 for special tokens.

    Their sum over `encode(text)` is the size of the text in bytes. It is exact for byte-level and character tokenizers;
    with SentencePiece-like ones, it includes the space that they put before a text.
    """
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        length = len  # one symbol per byte
    elif _is_characters(tokenizer):
        length = _utf8_length
    else:
        length = _length_of_piece
    lengths = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        lengths[token_id] = length(token)
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        lengths[token_id] = 0 if token.special else _utf8_length(token.content)
    return lengths


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Hex xxh3_128 of everything that decides how the tokenizer encodes."""
    return xxhash.xxh3_128_hexdigest(tokenizer.to_str().encode())


def _ready(tokenizer: Tokenizer) -> Tokenizer:
    """Apply settings that a tokenizer.json does not keep, or keeps for other purposes than ours."""
    tokenizer.encode_special_tokens = True  # special tokens are put in by id, never found in text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the end-of-text token is added last
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_first_characters(texts, BPE_TRAINING_CHARACTERS), trainer)
    return tokenizer


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def _byte_symbols() -> dict[str, int]:
    """Map byte-level tokenizers' symbols to bytes: printable bytes are themselves, the rest lie from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    symbols = {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}
    return {symbol: byte for byte, symbol in sorted(symbols.items())}


def _is_characters(tokenizer: Tokenizer) -> bool:
    return tokenizer.pre_tokenizer is None and isinstance(tokenizer.decoder, decoders.Fuse)


def _check_known_characters(tokenizer: Tokenizer, text: str) -> None:
    """Raise UserError for unknown characters, which the library would drop silently."""
    unknown = sorted(c for c in set(text) if tokenizer.token_to_id(c) is None)
    if unknown:
        raise UserError(
            f"the character tokenizer does not know {', '.join(map(repr, unknown[:5]))}: "
            "it knows the characters of its training corpus only; data.tokenizer.kind=bpe knows every text"
        )


def _utf8_length(text: str) -> int:
    return len(text.encode())


def _length_of_piece(token: str) -> int:
    """UTF-8 bytes of a token that is written as by SentencePiece or WordPiece."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return 1
    return _utf8_length(token.replace("▁", " ").removeprefix("##"))
