"""Tokenizers: nothing is lost, bytes add up, training repeats, text never becomes a special token."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mla_lm.data.config import TokenizerConfig
from mla_lm.data.tokenizer import (
    END_OF_TEXT,
    build_tokenizer,
    decode,
    encode,
    encode_batch,
    end_of_text_id,
    load_tokenizer,
    token_bytes,
    tokenizer_hash,
    vocabulary_size,
)
from mla_lm.errors import UserError

CORPUS = [
    f"def f_{i}(x):\n    return x + {i}  # naïve ✓ {END_OF_TEXT}\n\n\nThe ▁ sea's {i} waves\t\n" for i in range(50)
]
CHARACTERS = "".join(sorted(set("".join(CORPUS))))


def build(kind, **keys):
    return build_tokenizer(TokenizerConfig(kind=kind, **keys), CORPUS)


TOKENIZERS = {"bpe": build("bpe", vocab_size=320), "bytes": build("bytes"), "characters": build("characters")}
RELOADED = {name: Tokenizer.from_str(tokenizer.to_str()) for name, tokenizer in TOKENIZERS.items()}


def texts_for(kind):
    """Any text; of a character tokenizer, any text of its characters."""
    return st.text(alphabet=CHARACTERS) if kind == "characters" else st.text() | st.text(alphabet=CHARACTERS)


kinds_and_texts = st.sampled_from(sorted(TOKENIZERS)).flatmap(lambda kind: st.tuples(st.just(kind), texts_for(kind)))


@given(kinds_and_texts)
def test_decode_undoes_encode(kind_and_text):
    kind, text = kind_and_text
    assert decode(TOKENIZERS[kind], encode(TOKENIZERS[kind], text)) == text


@given(kinds_and_texts)
def test_token_bytes_add_up_to_the_text(kind_and_text):
    kind, text = kind_and_text
    lengths = token_bytes(TOKENIZERS[kind])
    assert lengths[encode(TOKENIZERS[kind], text)].sum() == len(text.encode())


@given(kinds_and_texts)
def test_text_never_becomes_the_end_of_text_token(kind_and_text):
    kind, text = kind_and_text
    tokenizer = TOKENIZERS[kind]
    ids = encode(tokenizer, f"{text}{END_OF_TEXT}{text}")
    assert end_of_text_id(tokenizer) not in ids
    assert decode(tokenizer, ids) == f"{text}{END_OF_TEXT}{text}"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_saved_tokenizer_is_the_same_when_loaded(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert end_of_text_id(loaded) == end_of_text_id(tokenizer)
    assert np.array_equal(token_bytes(loaded), token_bytes(tokenizer))
    texts = [*CORPUS, END_OF_TEXT, ""]
    assert [encode(loaded, text) for text in texts] == [encode(tokenizer, text) for text in texts]
    assert encode_batch(loaded, texts) == [encode(tokenizer, text) for text in texts]


def test_sizes():
    assert vocabulary_size(TOKENIZERS["bpe"]) == 320
    assert vocabulary_size(TOKENIZERS["bytes"]) == 257
    assert vocabulary_size(TOKENIZERS["characters"]) == len(CHARACTERS) + 1
    for tokenizer in TOKENIZERS.values():
        assert token_bytes(tokenizer).shape == (vocabulary_size(tokenizer),)
        assert token_bytes(tokenizer)[end_of_text_id(tokenizer)] == 0
    assert encode(TOKENIZERS["bytes"], "aé") == [97, 0xC3, 0xA9]
    assert encode(TOKENIZERS["characters"], CHARACTERS) == list(range(len(CHARACTERS)))


def test_bpe_is_shorter_than_bytes_and_keeps_to_the_given_size():
    text = "".join(CORPUS)
    assert len(encode(TOKENIZERS["bpe"], text)) < len(text.encode()) / 2
    assert vocabulary_size(build("bpe", vocab_size=257)) == 257
    assert vocabulary_size(build("bpe", vocab_size=50_000)) < 2000  # the corpus has no more to merge


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_training_on_the_same_text_gives_the_same_tokenizer(texts):
    first, second = (build_tokenizer(TokenizerConfig(vocab_size=300), iter(texts)) for _ in range(2))
    assert tokenizer_hash(first) == tokenizer_hash(second)


@pytest.mark.e2e
def test_training_repeats_in_another_process_with_one_thread(tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps(CORPUS))
    code = (
        "import json, sys; from mla_lm.data.tokenizer import *; from mla_lm.data.config import TokenizerConfig;"
        "corpus = json.load(open(sys.argv[1]));"
        "print(tokenizer_hash(build_tokenizer(TokenizerConfig(vocab_size=320), corpus)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "corpus.json"],
        env={**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.strip() == tokenizer_hash(TOKENIZERS["bpe"])


def test_an_unknown_character_is_refused_not_dropped():
    with pytest.raises(UserError, match="does not know '中'"):
        encode(TOKENIZERS["characters"], "a中")


def gpt2_like(end_of_text):
    """A tokenizer file of somebody else's: byte-level, with settings of its own."""
    tokenizer = Tokenizer.from_str(TOKENIZERS["bytes"].to_str())
    tokenizer.add_special_tokens([end_of_text])
    tokenizer.add_tokens(["    "])  # an added token that is ordinary text
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20)
    return tokenizer


def test_a_file_is_used_as_it_encodes_text(tmp_path):
    gpt2_like("<stop>").save(str(tmp_path / "their.json"))
    tokenizer = build_tokenizer(TokenizerConfig(kind="file", file=str(tmp_path / "their.json")), [])
    text = "    return x <stop>"
    ids = encode(tokenizer, text)
    assert decode(tokenizer, ids) == text
    assert tokenizer.token_to_id("    ") in ids
    assert tokenizer.token_to_id("<stop>") not in ids
    assert token_bytes(tokenizer)[ids].sum() == len(text)
    assert end_of_text_id(tokenizer, "<stop>") == tokenizer.token_to_id("<stop>")


def test_a_sentencepiece_like_file_counts_its_first_space():
    pieces = ["<unk>", "▁", "▁the", "a", "<0xC3>", "<0xA9>", "é"]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    assert token_bytes(tokenizer).tolist() == [5, 1, 4, 1, 1, 1, 2]


def test_a_missing_end_of_text_token_is_named():
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(UserError, match=r"data\.tokenizer\.end_of_text"):
        end_of_text_id(tokenizer)
    with pytest.raises(UserError, match="<stop>"):
        end_of_text_id(TOKENIZERS["bpe"], "<stop>")


@pytest.mark.parametrize(("data", "words"), [(None, "cannot be read"), (b"{}", "is not a tokenizer.json")])
def test_a_bad_file_is_named(tmp_path, data, words):
    path = tmp_path / "tokenizer.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)
