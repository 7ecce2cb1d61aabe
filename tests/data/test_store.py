"""The token store: what goes in comes out, a second start only opens it, and nothing spoils it."""

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from mla_lm.data import store_builder
from mla_lm.data.config import DataConfig, TokenizerConfig
from mla_lm.data.corpus import SPLITS
from mla_lm.data.hashes import hash_file
from mla_lm.data.open_store import open_store
from mla_lm.data.python_stdlib import python_stdlib
from mla_lm.data.shards import ShardWriter, Tokens
from mla_lm.data.sources import open_source
from mla_lm.data.store_builder import build_store
from mla_lm.data.tokenizer import build_tokenizer, decode, encode, load_tokenizer, tokenizer_hash
from mla_lm.errors import UserError

TEXT = "".join(f"The {i}th wave broke on the shore, and the {i % 7} gulls cried naïvely.\n" for i in range(2000))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    return DataConfig(
        source="text",
        files=str(tmp_path / "a.txt"),
        cache_dir=str(tmp_path / "cache"),
        tokenizer=TokenizerConfig(vocab_size=400),
    )


def contents(store):
    return {split: store.tokens(split)[:].tolist() for split in SPLITS}


def folder_of(store):
    return store.shards["train"][0].parent


def in_process(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        text=True,
    )


# what is in it


@pytest.mark.parametrize("kind", ["bpe", "bytes", "characters"])
def test_the_tokens_are_the_text_of_the_split(config, kind):
    config.tokenizer.kind = kind
    store = open_store(config)
    for split in SPLITS:
        text = "".join(row["text"] for row in open_source(config).documents(split))
        tokens = store.tokens(split)[:]
        assert tokens.dtype == np.uint16
        assert decode(store.tokenizer, tokens) == text + "<|endoftext|>"
        assert tokens[-1] == store.end_of_text_id
        assert store.counts[split] == len(tokens) == len(store.tokens(split))
        assert store.text_bytes[split] == len(text.encode())


def test_every_document_ends(config, tmp_path):
    rows = [{"text": f"document number {i}"} for i in range(500)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config.files = str(tmp_path / "a.jsonl")
    store = open_store(config)
    ends = {split: int((store.tokens(split)[:] == store.end_of_text_id).sum()) for split in SPLITS}
    assert sum(ends.values()) == 500
    texts = decode(store.tokenizer, store.tokens("test")[:]).split("<|endoftext|>")
    assert texts == [row["text"] for row in open_source(config).documents("test")] + [""]


def test_a_large_vocabulary_is_stored_in_four_bytes(config):
    tokenizer = build_tokenizer(TokenizerConfig(kind="bytes"), [])
    tokenizer.add_special_tokens([f"<{i}>" for i in range(2**16)])
    store = open_store(config, tokenizer)
    assert store.tokens("train")[:].dtype == np.uint32


def test_files_that_cannot_be_decoded_are_reported(tmp_path, capsys):
    for i in range(300):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}\n" * 10)
    (tmp_path / "bad.py").write_bytes(b"\xff")
    source = python_stdlib(tmp_path / "hashes.json", tmp_path)
    build_store(tmp_path / "store", source, TokenizerConfig(kind="bytes"))
    assert json.loads((tmp_path / "store" / "meta.json").read_text())["skipped"] == ["bad.py"]
    assert "1 files could not be decoded and are left out: bad.py" in capsys.readouterr().out


def test_progress_is_shown_on_a_terminal_only(config, monkeypatch, capsys):
    open_store(config)
    assert "tokenizing" not in capsys.readouterr().err
    config.tokenizer.kind = "bytes"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    open_store(config)
    shown = capsys.readouterr().err
    assert all(f"tokenizing {split}: " in shown for split in SPLITS)
    assert "B/s" in shown


# opened again


@pytest.mark.e2e
def test_a_second_start_reads_no_text_and_does_not_import_datasets(config):
    config.source, config.files = "python_stdlib", None
    config.tokenizer.kind = "bytes"
    code = """
        import sys, time
        from mla_lm.data.config import DataConfig, TokenizerConfig
        from mla_lm.data.open_store import open_store
        start = time.perf_counter()
        store = open_store(DataConfig(cache_dir=sys.argv[1], tokenizer=TokenizerConfig(kind="bytes")))
        print(store.fingerprint, "datasets" in sys.modules, time.perf_counter() - start < 1)
    """
    first = open_store(config)
    output, _ = in_process(code, config.cache_dir).communicate()
    assert output.split() == [first.fingerprint, "False", "True"]


def test_another_text_or_tokenizer_is_another_store(config, tmp_path):
    first = open_store(config)
    config.tokenizer.vocab_size = 300
    second = open_store(config)
    (tmp_path / "a.txt").write_text(TEXT + "more")
    third = open_store(config)
    assert len({folder_of(s) for s in (first, second, third)}) == 3
    assert len({s.fingerprint for s in (first, second, third)}) == 3
    assert contents(first) != contents(second)


def test_a_given_tokenizer_takes_the_place_of_the_configured_one(config, tmp_path):
    first = open_store(config)
    given_tokenizer = load_tokenizer(folder_of(first) / "tokenizer.json")
    config.tokenizer = TokenizerConfig(kind="bytes")
    again = open_store(config, given_tokenizer)
    assert again.fingerprint == first.fingerprint
    assert contents(again) == contents(first)
    config.tokenizer = TokenizerConfig(kind="file", file=str(folder_of(first) / "tokenizer.json"))
    assert contents(open_store(config)) == contents(first)
    assert folder_of(open_store(config)) == folder_of(again)


def test_a_changed_tokenizer_file_is_noticed(config, tmp_path):
    path = tmp_path / "t.json"
    config.tokenizer = TokenizerConfig(kind="file", file=str(path))
    stores = []
    for size in (300, 320):
        build_tokenizer(TokenizerConfig(vocab_size=size), [TEXT]).save(str(path))
        stores.append(open_store(config))
    assert tokenizer_hash(stores[0].tokenizer) != tokenizer_hash(stores[1].tokenizer)


def test_a_store_moved_to_another_folder_is_used(config, tmp_path, capsys):
    first = open_store(config)
    shutil.copytree(config.cache_dir, tmp_path / "copy", copy_function=shutil.copy)  # with new modification times
    config.cache_dir = str(tmp_path / "copy")
    capsys.readouterr()
    assert contents(open_store(config)) == contents(first)
    assert capsys.readouterr().out == ""


# spoiled


def overwrite(path, data, keep_time=False):
    status = path.stat()
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


SPOILERS = {
    "cut": lambda folder: os.truncate(folder / "train-00000.bin", 100),
    "cut, same time": lambda folder: overwrite(folder / "train-00000.bin", b"xx", keep_time=True),
    "other bytes": lambda folder: overwrite(
        folder / "test-00000.bin", bytes((folder / "test-00000.bin").stat().st_size)
    ),
    "shard gone": lambda folder: (folder / "validation-00000.bin").unlink(),
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "half a meta": lambda folder: overwrite(folder / "meta.json", (folder / "meta.json").read_bytes()[:200]),
    "other meta": lambda folder: overwrite(folder / "meta.json", b'{"tokens": 3}'),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "another tokenizer": lambda folder: build_tokenizer(TokenizerConfig(kind="bytes"), []).save(
        str(folder / "tokenizer.json")
    ),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_a_spoiled_store_is_built_again_and_said_so(config, spoil, capsys):
    config.tokenizer.kind = "characters"
    before = contents(open_store(config))
    folder = folder_of(open_store(config))
    spoil(folder)
    capsys.readouterr()
    store = open_store(config)
    assert contents(store) == before
    assert capsys.readouterr().out.splitlines()[0].startswith(f"The token cache {folder} is built again: ")


def test_what_a_killed_build_left_is_cleaned(config):
    folder = folder_of(open_store(config))
    draft = folder.with_name(folder.name + ".tmp")
    folder.rename(draft)  # as if killed before the move
    (draft / "train-00007.bin").write_bytes(b"half")
    store = open_store(config)
    assert not draft.exists()
    assert {path.name for path in folder_of(store).iterdir()} == {
        "meta.json", "tokenizer.json", *(f"{split}-00000.bin" for split in SPLITS)
    }  # fmt: skip


@pytest.mark.e2e
def test_processes_that_start_together_build_once(config):
    code = """
        import sys
        from mla_lm.data.config import DataConfig, TokenizerConfig
        from mla_lm.data.open_store import open_store
        tokenizer = TokenizerConfig(vocab_size=400)
        store = open_store(DataConfig(source="text", files=sys.argv[1], cache_dir=sys.argv[2], tokenizer=tokenizer))
        print("tokens", store.fingerprint, store.tokens("train")[:].astype(int).sum())
    """
    processes = [in_process(code, config.files, config.cache_dir) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len({output[output.index("tokens ") :].splitlines()[-1] for output in outputs}) == 1
    assert sum("Tokenizing" in output for output in outputs) == 1


# refused


def test_a_cache_folder_that_cannot_be_made_is_named(config):
    config.cache_dir = f"{config.files}/cache"  # below a file
    with pytest.raises(UserError, match=r"data\.cache_dir=.*cannot be written"):
        open_store(config)


def test_a_corpus_without_text_for_every_split_is_refused(config, tmp_path):
    (tmp_path / "a.txt").write_text("ten chars!")
    with pytest.raises(UserError, match="no text for the validation split"):
        open_store(config)
    assert [path for path in Path(config.cache_dir).iterdir() if path.is_dir()] == []


def test_a_tokenizer_that_loses_text_is_refused(config):
    tokenizer = build_tokenizer(TokenizerConfig(kind="bytes"), [])
    tokenizer.normalizer = normalizers.Replace(" ", "")
    with pytest.raises(UserError, match=r"does not keep the text.*byte-level"):
        open_store(config, tokenizer)


def test_a_character_tokenizer_refuses_a_text_with_others(config):
    tokenizer = build_tokenizer(TokenizerConfig(kind="characters"), ["abc"])
    with pytest.raises(UserError, match="does not know"):
        open_store(config, tokenizer)


# shards


@given(
    batches=st.lists(st.lists(st.integers(0, 999), max_size=20), max_size=8),
    shard_tokens=st.integers(1, 15),
    start=st.integers(-5, 200),
    length=st.integers(0, 60),
)
@settings(max_examples=50)
def test_slices_across_shards(tmp_path_factory, batches, shard_tokens, start, length):
    folder = tmp_path_factory.mktemp("shards")
    arrays = [np.array(batch, dtype=np.int64) for batch in batches if batch]
    shards: list[dict] = []
    for array in arrays:  # each by a writer of its own, as if the one before had been interrupted
        writer = ShardWriter(folder, "train", "uint16", shard_tokens, shards)
        writer.write(array)
        writer.sync()
    whole = np.array(list(itertools.chain(*batches)), dtype=np.uint16)
    assert [shard["tokens"] for shard in shards[:-1]] == [shard_tokens] * (len(shards) - 1)
    assert [hash_file(folder / shard["file"]) for shard in shards] == [shard["xxh3"] for shard in shards]
    tokens = Tokens([folder / shard["file"] for shard in shards], "uint16", 1000)
    assert len(tokens) == len(whole)
    part = slice(start, start + length if start >= 0 else None)
    for view in (tokens, pickle.loads(pickle.dumps(tokens))):
        assert np.array_equal(view[part], whole[part])
        assert view[part].dtype == np.uint16


def test_batches_are_bounded(config, monkeypatch):
    whole = open_store(config)
    config.cache_dir += "2"
    monkeypatch.setattr(store_builder, "BATCH_CHARACTERS", 1)
    monkeypatch.setattr(store_builder, "SHARD_TOKENS", 1000)
    parts = open_store(config)
    assert contents(parts) == contents(whole)
    assert len(list(folder_of(parts).glob("train-*.bin"))) > 5
    assert encode(parts.tokenizer, TEXT) == encode(whole.tokenizer, TEXT)
