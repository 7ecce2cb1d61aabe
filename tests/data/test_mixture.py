"""Mixtures: one tokenizer for all parts, their splits one after another, and their shares of the training windows."""

import json
import shutil
import signal
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_lm.config import TrainConfig, config_hash, with_absolute_paths
from mla_lm.data.config import DataConfig, PartConfig, SplitsConfig, TokenizerConfig
from mla_lm.data.corpus import SPLITS
from mla_lm.data.mixture import MOST_PASSES, in_proportion
from mla_lm.data.open_store import open_store
from mla_lm.data.sources import open_source
from mla_lm.data.tokenizer import decode, encode
from mla_lm.data.windows import Order
from mla_lm.errors import UserError
from mla_lm.runs.report import data_lines
from mla_lm.training.datamodule import TextDataModule
from scripts.soak.runs import check_same
from tests.conftest import ACCUMULATING, SMALL, refused, send_at, succeeded
from tests.data.conftest import STORIES, rows_of, write_rows

WAVES = "".join(f"The {i}th wave broke on the shore.\n" for i in range(900))
GULLS = "".join(f"{i} gulls cried naïvely, ☃" + "!" * (i % 5) + "\n" for i in range(200))


@pytest.fixture
def config(tmp_path):
    """Two parts, plain text and rows; the second is small for its weight."""
    (tmp_path / "waves.txt").write_text(WAVES)
    (tmp_path / "gulls.jsonl").write_text("".join(json.dumps({"cry": line}) + "\n" for line in GULLS.splitlines()))
    return DataConfig(
        source="mixture",
        parts=[
            PartConfig(source="text", files=str(tmp_path / "waves.txt"), weight=0.6),
            PartConfig(source="text", files=str(tmp_path / "gulls.jsonl"), column="cry", weight=0.4),
        ],
        cache_dir=str(tmp_path / "cache"),
        tokenizer=TokenizerConfig(vocab_size=350),
    )


def alone(config, number):
    """The configuration of a part as a corpus of its own."""
    part = config.parts[number]
    return replace(config, source=part.source, files=part.files, column=part.column, parts=[])


def text_of(config, split):
    texts = []
    for number in range(len(config.parts)):
        rows = open_source(alone(config, number)).documents(split)
        texts += [row["text"] + "<|endoftext|>" * row["ends"] for row in rows]
    return "".join(texts)


# tokens


@pytest.mark.parametrize("kind", ["bpe", "bytes", "characters"])
def test_the_splits_are_those_of_the_parts_one_after_another(config, kind):
    config.tokenizer.kind = kind
    store = open_store(config)
    for split in SPLITS:
        assert decode(store.tokenizer, store.tokens(split)[:]) == text_of(config, split)
        assert store.counts[split] == len(store.tokens(split)) == sum(part.counts[split] for _, part in store.parts)
        assert store.text_bytes[split] == len(text_of(config, split).replace("<|endoftext|>", "").encode())
    assert [weight for weight, _ in store.parts] == [0.6, 0.4]
    assert "0.6 1 text file" in store.description
    lines = "\n".join(data_lines(store))
    for counted in (store, *(part for _, part in store.parts)):
        assert f"train {counted.counts['train']:,} tokens" in lines


def test_parts_are_of_any_source(config, folder):
    config.parts[0] = PartConfig("hub", path=str(folder), splits=SplitsConfig(test="validation"), weight=0.6)
    store = open_store(config)
    stories = store.parts[0][1]
    assert decode(store.tokenizer, stories.tokens("test")[:]) == "<|endoftext|>".join([*STORIES[300:320], ""])
    assert "train, validation, test=validation" in store.description


def test_validation_and_test_that_parts_share_count_once(config, tmp_path):
    """A part with the same validation and test text, but another training split, adds only that."""
    for split in SPLITS:
        write_rows(tmp_path / "other" / "data" / f"{split}-00000-of-00001.parquet", rows_of([f"{split} of both"]))
    shutil.copytree(tmp_path / "other", tmp_path / "set")
    write_rows(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", rows_of(STORIES))
    config.parts = [PartConfig("hub", path=str(tmp_path / name), weight=0.25) for name in ("set", "other", "other")]
    config.parts.append(replace(config.parts[0], source="text", path=None, files=str(tmp_path / "waves.txt")))
    store = open_store(config)
    waves = store.parts[3][1]
    for split in ("validation", "test"):
        text = f"{split} of both<|endoftext|>" + decode(waves.tokenizer, waves.tokens(split)[:])
        assert decode(store.tokenizer, store.tokens(split)[:]) == text
        assert store.counts[split] == len(store.tokens(split))
        assert store.text_bytes[split] == len(text.replace("<|endoftext|>", ""))
    assert store.counts["train"] == sum(part.counts["train"] for _, part in store.parts)


def test_a_corpus_alone_is_one_part_with_all_the_weight(config):
    store = open_store(alone(config, 0))
    assert store.parts == ((1.0, store),)
    assert len(data_lines(store)) == 2


def test_a_second_start_makes_nothing(config, capsys):
    first = open_store(config)
    made = capsys.readouterr().out
    assert made.count("Making one tokenizer") == 1
    assert made.count("Tokenizing") == 2
    again = open_store(config)
    assert capsys.readouterr().out == ""
    assert again.fingerprint == first.fingerprint
    config.parts.reverse()  # with the tokenizer given, the tokens of the parts are there as well
    open_store(config, first.tokenizer)
    assert capsys.readouterr().out == ""


def test_the_fingerprint_depends_on_contents_weights_order_and_tokenizer_but_not_on_the_place(config, tmp_path):
    fingerprints = [open_store(config).fingerprint]
    config.parts[0].weight, config.parts[1].weight = 0.5, 0.5
    fingerprints.append(open_store(config).fingerprint)
    config.tokenizer.vocab_size = 340
    fingerprints.append(open_store(config).fingerprint)
    config.tokenizer.kind = "bytes"
    fingerprints.append(open_store(config).fingerprint)
    shutil.move(tmp_path / "waves.txt", tmp_path / "moved.txt")
    config.parts[0].files = str(tmp_path / "moved.txt")
    assert open_store(config).fingerprint == fingerprints[-1]
    config.parts.reverse()
    fingerprints.append(open_store(config).fingerprint)
    (tmp_path / "moved.txt").write_text(WAVES + "more")
    fingerprints.append(open_store(config).fingerprint)
    assert len(set(fingerprints)) == 6


# one tokenizer


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    shares=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    length=st.integers(1, 9),
)
def test_texts_for_the_tokenizer_are_in_proportion_at_any_point(sizes, shares, length):
    weights = [share / sum(shares[: len(sizes)]) for share in shares[: len(sizes)]]
    parts = [["abcd"[i] * length] * size for i, size in enumerate(sizes)]
    taken = dict.fromkeys("abcd"[: len(sizes)], 0)
    for text in in_proportion([lambda part=part: iter(part) for part in parts], weights):
        taken[text[0]] += len(text)
        total = sum(taken.values())
        most = len(sizes) * length  # of one text each
        assert all(abs(count - w * total) <= most for count, w in zip(taken.values(), weights, strict=True))
    passes = [count / (length * size) for count, size in zip(taken.values(), sizes, strict=True)]
    assert max(passes) == MOST_PASSES or (min(passes) == 1 and max(passes) < MOST_PASSES)


def test_a_part_without_text_is_named():
    with pytest.raises(UserError, match=r"data\.parts\[1\] has no text"):
        list(islice(in_proportion([lambda: iter(["a"]), lambda: iter([])], [0.5, 0.5]), 100))


def test_the_weights_decide_what_the_tokenizer_knows(config):
    """With nearly all the weight on the gulls, their words become tokens; with little, the waves' do."""
    config.tokenizer.vocab_size = 300
    lengths = []
    for weight in (0.02, 0.98):
        config.parts[0].weight, config.parts[1].weight = 1 - weight, weight
        tokenizer = open_store(config).tokenizer
        lengths.append([len(encode(tokenizer, text)) for text in ("gulls cried naïvely", "wave broke on the shore")])
    assert lengths[0][0] > lengths[1][0]
    assert lengths[0][1] < lengths[1][1]


# training


def test_training_windows_come_from_the_parts(config):
    run = TrainConfig(tokens_per_step=40 * 16, seed=5, data=config)
    run.model.seq_len = 16
    store = open_store(config)
    module = TextDataModule(run, store)
    batches = list(islice(module.train_dataloader(), 50))  # two blocks of a thousand windows
    waves, gulls = (part.tokens("train")[:].tolist() for _, part in store.parts)
    of_waves = [tuple(waves[i : i + 17]) for i in range(0, len(waves) - 16, 16)]
    of_gulls = [tuple(gulls[i : i + 17]) for i in range(0, len(gulls) - 16, 16)]
    windows = [tuple(window) for batch in batches for window in batch.tolist()]
    order = Order([len(of_waves), len(of_gulls)], [0.6, 0.4], seed=5)
    everything = of_waves + of_gulls
    assert windows == [everything[i] for step in range(50) for i in order.of_step(step, 40)]
    assert not set(of_waves) & set(of_gulls)
    assert sum(window in set(of_gulls) for window in windows) == 800
    assert len(of_gulls) < 400  # and was repeated


def mixture(corpus, tmp_path, *weights):
    """Overrides: Python from the corpus, and a small file of waves."""
    (tmp_path / "waves.txt").write_text(WAVES)
    parts = [(corpus, weights[0]), (tmp_path / "waves.txt", weights[1])]
    value = ",".join(f"{{source:text,files:'{path}',weight:{weight}}}" for path, weight in parts)
    cache = f"data.cache_dir={corpus.parent / 'cache'}"
    return "data=mixture", f"data.parts=[{value}]", cache, "data.tokenizer.vocab_size=300", "data.val_tokens=512"


def test_a_run_that_was_killed_is_resumed_exactly(train, tmp_path, corpus):
    train.data = mixture(corpus, tmp_path, 0.7, 0.3)
    succeeded(train(*ACCUMULATING, "hydra.run.dir=whole"))
    command = (*SMALL, *train.data, *ACCUMULATING, "hydra.run.dir=run")
    assert train.start(*command, prepare=send_at(5, signal.SIGKILL)).wait().returncode == -signal.SIGKILL
    succeeded(train.bare("ckpt_path=run"))
    check_same(tmp_path / "run", tmp_path / "whole")


def test_a_run_and_another_from_its_weights(train, tmp_path, corpus):
    train.data = mixture(corpus, tmp_path, 0.7, 0.3)
    result = succeeded(train("hydra.run.dir=run", "trainer.max_steps=2"))
    assert "mixture of 2 parts" in result.stdout
    refused(train.bare(f"ckpt_path={tmp_path / 'run'}", *mixture(corpus, tmp_path, 0.6, 0.4)), "data.parts=", "0.6")
    keys = [key for key in mixture(corpus, tmp_path, 0.2, 0.8) if "tokenizer" not in key]
    keys += ["logger=none", "trainer.accelerator=cpu", "trainer.max_steps=2", "tokens_per_step=256", "compile=false"]
    succeeded(train.bare(*keys, f"init_from={tmp_path / 'run'}", "hydra.run.dir=other"))
    tokenizers = [(tmp_path / name / "tokenizer.json").read_text() for name in ("run", "other")]
    assert tokenizers[0] == tokenizers[1]
    (tmp_path / "waves.txt").write_text(WAVES + "more")
    refused(train.bare(f"ckpt_path={tmp_path / 'run'}", "trainer.max_steps=3"), "data have changed")


# configuration


def test_paths_of_parts_become_absolute_and_are_not_hashed(tmp_path, monkeypatch):
    hashes = []
    for place in ("a", "b"):
        (tmp_path / place / "set").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / place)
        run = TrainConfig()
        run.data.parts = [PartConfig("text", ["x.txt", 3], weight=0.5), PartConfig("hub", path="set", weight=0.5)]
        run = with_absolute_paths(run)
        assert run.data.parts[0].files == [str(tmp_path / place / name) for name in ("x.txt", "3")]
        assert run.data.parts[1].path == str(tmp_path / place / "set")
        hashes.append(config_hash(run))
    run.data.parts[0].weight = 0.6
    hashes.append(config_hash(run))
    run.data.parts[1].path = "org/set"
    hashes.append(config_hash(run))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


# mistakes


@pytest.mark.parametrize("kind", ["bpe", "bytes"])  # found while the tokenizer is made, and while tokens are
def test_a_mistake_in_a_part_names_it(config, tmp_path, kind):
    config.tokenizer.kind = kind
    config.parts[1].column = "body"
    with pytest.raises(UserError, match=r"data\.parts\[1\]: .*gulls\.jsonl has no column body.*cry"):
        open_store(config)
    config.parts[0].files = str(tmp_path / "nothing.txt")
    with pytest.raises(UserError, match=r"data\.parts\[0\]: .*nothing\.txt matches no file"):
        open_store(config)


def test_a_part_shorter_than_a_window_is_named(config):
    run = TrainConfig(tokens_per_step=8192, data=config)
    run.model.seq_len = 8192
    with pytest.raises(UserError, match=r"data\.parts\[1\] train split has .*model\.seq_len=8192"):
        TextDataModule(run, open_store(config))
