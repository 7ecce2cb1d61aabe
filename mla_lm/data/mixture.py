"""Mixtures of corpora: each gives its share of the training windows, and all share one tokenizer."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

from tokenizers import Tokenizer

from mla_lm.data.config import CorpusConfig, DataConfig, in_part
from mla_lm.data.corpus import SPLITS, Source
from mla_lm.data.hashes import hash_text
from mla_lm.data.sources import open_source
from mla_lm.data.store import VERSION, TokenStore, open_corpus_store, sole_writer
from mla_lm.data.tokenizer import build_tokenizer, load_tokenizer
from mla_lm.errors import UserError
from mla_lm.files import write_atomically

MOST_PASSES = 20  # over a small part, to train the tokenizer, which learns little from more


def open_mixture(config: DataConfig, tokenizer: Tokenizer | None = None) -> TokenStore:
    """Open the token store of every part that `config` names, and mix them; see `open_corpus_store`."""
    configs = [_part(config, number) for number in range(len(config.parts))]
    if tokenizer is None:
        tokenizer = _tokenizer(config, configs)
    stores = []
    for number, part in enumerate(configs):
        with in_part(number):
            stores.append(open_corpus_store(part, tokenizer))
    return mix([part.weight for part in config.parts], stores)


def mix(weights: list[float], stores: list[TokenStore]) -> TokenStore:
    """Combine several stores with the same tokenizer into one. Validation or test text that parts share counts once."""
    of_split = {"train": stores, **{split: _distinct(stores, split) for split in SPLITS[1:]}}
    return replace(
        stores[0],
        fingerprint=hash_text("mixture", *map(repr, weights), *(store.fingerprint for store in stores)),
        description=f"a mixture of {', '.join(f'{w:g} {s.description}' for w, s in zip(weights, stores, strict=True))}",
        skipped=[name for store in stores for name in store.skipped],
        counts={split: sum(store.counts[split] for store in of_split[split]) for split in SPLITS},
        text_bytes={split: sum(store.text_bytes[split] for store in of_split[split]) for split in SPLITS},
        shards={split: [path for store in of_split[split] for path in store.shards[split]] for split in SPLITS},
        mixed=tuple(zip(weights, stores, strict=True)),
    )


def _distinct(stores: list[TokenStore], split: str) -> list[TokenStore]:
    """The stores whose tokens of `split` no store before them has."""
    distinct: dict[tuple[str, ...], TokenStore] = {}
    for store in stores:
        distinct.setdefault(store.hashes[split], store)
    return list(distinct.values())


def _part(config: DataConfig, number: int) -> DataConfig:
    """The configuration of a run on one part alone."""
    part = config.parts[number]
    return replace(config, parts=[], **{key.name: getattr(part, key.name) for key in fields(CorpusConfig)})


def _tokenizer(config: DataConfig, parts: list[DataConfig]) -> Tokenizer:
    """The tokenizer for all parts, made once and then read from the cache."""
    how, weights = config.tokenizer, [part.weight for part in config.parts]
    if how.kind not in ("bpe", "characters"):
        return build_tokenizer(how, [])
    sources = []
    for number, part in enumerate(parts):
        with in_part(number):
            sources.append(open_source(part))
    made_of = [how.kind, *(source.fingerprint for source in sources)]
    if how.kind == "bpe":
        made_of += [str(how.vocab_size), *map(repr, weights)]
    path = Path(config.cache_dir).expanduser() / f"{hash_text(VERSION, *made_of)}.tokenizer.json"
    if not path.is_file():
        with sole_writer(path):
            if not path.is_file():  # check again: another process may have made it meanwhile
                print(f"Making one tokenizer for {len(parts)} parts")
                tokenizer = build_tokenizer(how, _texts(how.kind, sources, weights))
                write_atomically(path, lambda file: file.write(tokenizer.to_str().encode()))
    return load_tokenizer(path)


def _texts(kind: str, sources: list[Source], weights: list[float]) -> Iterator[str]:
    """The texts to make a tokenizer from: all splits for characters, the weighted training splits for bpe."""

    def read(number: int, splits: tuple[str, ...]) -> Iterator[str]:
        with in_part(number):
            yield from (row["text"] for split in splits for row in sources[number].documents(split))

    if kind == "characters":
        return itertools.chain.from_iterable(read(number, SPLITS) for number in range(len(sources)))
    return in_proportion([functools.partial(read, number, ("train",)) for number in range(len(sources))], weights)


def in_proportion(readers: list[Callable[[], Iterator[str]]], weights: list[float]) -> Iterator[str]:
    """Yield texts of several parts so that, at any point, their characters are in proportion to the weights.

    Parts that are short for their weight are read again. It stops once every part has been read to its end, or one of
    them `MOST_PASSES` times.

    Raises:
        UserError: a part has no text.
    """
    streams = [read() for read in readers]
    taken, passes = [0] * len(readers), [0] * len(readers)
    while min(passes) == 0 and max(passes) < MOST_PASSES:
        part = min(range(len(readers)), key=lambda i: taken[i] / weights[i])
        text = next(streams[part], None)
        if text is not None:
            taken[part] += len(text)
            yield text
        elif taken[part]:
            passes[part] += 1
            streams[part] = readers[part]()
        else:
            raise UserError(f"data.parts[{part}] has no text to train on: give more of it")
