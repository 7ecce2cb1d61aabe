"""A token cache that others can write: no link of theirs is followed, and what they built is used only if it holds."""

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from mla_lm.data.config import DataConfig, TokenizerConfig
from mla_lm.data.corpus import Source
from mla_lm.data.open_store import open_store
from mla_lm.data.store import TokenStore, sole_writer
from mla_lm.data.store_builder import build_store
from mla_lm.errors import UserError
from tests.data.test_store_builder import BYTES, ROWS, files_of, source_of, stopping

ANOTHER_USER = 12345
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")


@pytest.fixture
def victim(tmp_path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


@pytest.fixture
def draft(tmp_path, capsys) -> Path:
    """What an interrupted build left."""
    with pytest.raises(KeyboardInterrupt):
        build_store(tmp_path / "store", stopping(20, KeyboardInterrupt()), BYTES)
    capsys.readouterr()
    return tmp_path / "store.tmp"


@pytest.fixture
def config(tmp_path) -> DataConfig:
    (tmp_path / "text.txt").write_text("the sea was calm, and " * 300)
    return DataConfig("text", str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"), tokenizer=BYTES)


def folder_of(store: TokenStore) -> Path:
    return store.shards["train"][0].parent


# links


def test_a_lock_that_is_a_link_is_refused(tmp_path, victim):
    (tmp_path / "store.lock").symlink_to(victim)
    with pytest.raises(UserError, match=r"cannot be written: .*store\.lock"), sole_writer(tmp_path / "store"):
        pass


def test_a_lock_keeps_what_is_in_it(tmp_path):
    """It may be a hard link to a file of somebody's."""
    (tmp_path / "store.lock").write_text("precious")
    with sole_writer(tmp_path / "store"):
        pass
    assert (tmp_path / "store.lock").read_text() == "precious"


@pytest.mark.parametrize("name", ["train-00000.bin", "meta.json", "tokenizer.json"])
def test_a_link_in_a_draft_is_not_followed(draft, victim, name):
    (draft / name).unlink(missing_ok=True)
    (draft / name).symlink_to(victim)
    build_store(draft.with_name("store"), source_of(ROWS), BYTES)
    assert not any(path.is_symlink() for path in draft.with_name("store").iterdir())


def test_a_draft_that_is_a_link_is_not_gone_on_with(draft, tmp_path, capsys):
    draft.rename(tmp_path / "elsewhere")
    draft.symlink_to(tmp_path / "elsewhere")
    before = {path.name: path.read_bytes() for path in draft.iterdir()}
    build_store(tmp_path / "store", source_of(ROWS), BYTES)
    assert "Going on" not in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()} == before
    assert not draft.is_symlink()


def test_a_draft_that_is_a_link_to_a_file(tmp_path, victim):
    (tmp_path / "store.tmp").symlink_to(victim)
    build_store(tmp_path / "store", source_of(ROWS), BYTES)


def test_a_draft_that_others_could_write_is_not_gone_on_with(draft, capsys):
    draft.chmod(0o777)
    build_store(draft.with_name("store"), source_of(ROWS), BYTES)
    assert "Going on" not in capsys.readouterr().out


@needs_root
def test_a_draft_of_another_user_is_not_gone_on_with(draft, capsys):
    os.chown(draft, ANOTHER_USER, ANOTHER_USER)
    build_store(draft.with_name("store"), source_of(ROWS), BYTES)
    assert "Going on" not in capsys.readouterr().out


def test_nobody_else_sees_into_a_draft_and_the_store_is_for_all(draft):
    assert stat.S_IMODE(draft.stat().st_mode) == 0o700
    before = os.umask(0o002)
    build_store(draft.with_name("store"), source_of(ROWS), BYTES)
    os.umask(before)
    assert stat.S_IMODE(draft.with_name("store").stat().st_mode) == 0o775


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '{"PATH": 3}', '{"PATH": [1]}', "nonsense"])
def test_spoiled_hashes_are_made_again(config, content):
    first = open_store(config)
    (Path(config.cache_dir) / "hashes.json").write_text(content.replace("PATH", config.files))
    assert open_store(config).fingerprint == first.fingerprint


@pytest.mark.parametrize("answer", [3, {}, {"commit": 3, "splits": ["train"]}, {"commit": "x", "splits": [[]]}])
def test_a_spoiled_answer_of_the_hub_is_asked_for_again(config, folder, answer):
    config = DataConfig("hub", path=str(folder), cache_dir=config.cache_dir, tokenizer=BYTES)
    first = open_store(config)
    memory = Path(config.cache_dir) / "hub.json"
    memory.write_text(json.dumps(dict.fromkeys(json.loads(memory.read_text()), answer)))
    assert open_store(config).fingerprint == first.fingerprint


# stores of others


@needs_root
def test_a_store_of_another_user_is_read(config, capsys):
    folder = folder_of(open_store(config))
    for path in (folder, *folder.iterdir()):
        os.chown(path, ANOTHER_USER, ANOTHER_USER)
    capsys.readouterr()
    assert open_store(config).counts["train"] > 5000
    assert capsys.readouterr().out == ""


def change(folder: Path, **changes: object) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_split(folder: Path, **changes: object) -> None:
    splits = json.loads((folder / "meta.json").read_text())["splits"]
    change(folder, splits={**splits, "train": splits["train"] | changes})


def change_shard(folder: Path, **changes: object) -> None:
    shard = json.loads((folder / "meta.json").read_text())["splits"]["train"]["shards"][0]
    change_split(folder, shards=[shard | changes])


def outside(folder: Path) -> None:
    shutil.copy2(folder / "train-00000.bin", folder.parent / "train-00000.bin")
    change_shard(folder, file="../train-00000.bin")


def pipe(folder: Path) -> None:
    (folder / "meta.json").unlink()
    os.mkfifo(folder / "meta.json")


HOSTILE = {
    "dtype": lambda folder: change(folder, dtype="float64"),
    "objects": lambda folder: change(folder, dtype="O"),
    "end of text": lambda folder: change(folder, end_of_text_id=10**6),
    "end of text is text": lambda folder: change(folder, end_of_text_id="0"),
    "description": lambda folder: change(folder, description=[]),
    "skipped": lambda folder: change(folder, skipped=[1]),
    "corpus": lambda folder: change(folder, source_fingerprint="another"),
    "splits": lambda folder: change(folder, splits=[]),
    "nested": lambda folder: (folder / "meta.json").write_text("[" * 100_000),
    "pipe": pipe,
    "outside": outside,
    "more tokens": lambda folder: change_shard(folder, tokens=10**12),
    "no tokens": lambda folder: change_shard(folder, tokens=0),
    "tokens that are no whole number": lambda folder: change_shard(
        folder, tokens=(folder / "train-00000.bin").stat().st_size / 2
    ),
    "no number": lambda folder: change_shard(folder, tokens="many"),
    "hash": lambda folder: change_shard(folder, xxh3=[]),
    "no text": lambda folder: change_split(folder, text_bytes=0),
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_a_store_that_contradicts_itself_is_built_again(config, spoil, capsys):
    first = open_store(config)
    tokens = first.tokens("train")[:]
    spoil(folder_of(first))
    capsys.readouterr()
    again = open_store(config)
    assert "is built again" in capsys.readouterr().out
    assert np.array_equal(again.tokens("train")[:], tokens)
    assert again.end_of_text_id == first.end_of_text_id


def test_a_store_with_another_tokenizer_than_the_runs_is_built_again(config, capsys):
    tokenizer = open_store(config).tokenizer
    store = open_store(config, tokenizer)
    source = Source("a corpus", "another", lambda split: iter(ROWS[split]))
    other = folder_of(store).with_name("other")
    build_store(other, source, TokenizerConfig(kind="characters"))
    fingerprint = json.loads((folder_of(store) / "meta.json").read_text())["source_fingerprint"]
    shutil.rmtree(folder_of(store))
    change(other, source_fingerprint=fingerprint)
    other.rename(folder_of(store))
    capsys.readouterr()
    assert open_store(config, tokenizer).end_of_text_id == store.end_of_text_id
    assert "is built again" in capsys.readouterr().out


def test_a_token_that_the_tokenizer_does_not_have_is_refused(config):
    """The embedding would fail with an error of its own, on a GPU with one that says nothing."""
    path = folder_of(open_store(config)) / "train-00000.bin"
    status, tokens = path.stat(), np.fromfile(path, np.uint16)
    tokens[1000] = 60_000
    tokens.tofile(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    read = open_store(config).tokens("train")
    assert len(read[:1000]) == 1000
    with pytest.raises(UserError, match="60000"):
        read[990:1010]


def test_the_same_store_is_left_by_a_build_that_goes_on(draft):
    build_store(draft.with_name("whole"), source_of(ROWS), BYTES)
    build_store(draft.with_name("store"), source_of(ROWS), BYTES)
    assert files_of(draft.with_name("store")) == files_of(draft.with_name("whole"))
