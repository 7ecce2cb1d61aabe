"""Building a token store: what was interrupted is gone on with, it says how far it is, and memory is bounded."""

import json
import os
import re
import resource

import pytest

from mla_lm.data import store_builder
from mla_lm.data.config import DataConfig, TokenizerConfig
from mla_lm.data.corpus import SPLITS, Source
from mla_lm.data.open_store import open_store
from mla_lm.data.store import sole_writer
from mla_lm.data.store_builder import build_store
from mla_lm.errors import UserError
from tests.data.conftest import run

BYTES = TokenizerConfig(kind="bytes")
# rows of which some are only pieces of a longer document
ROWS = {split: [{"text": f"{split} {i}: " + "waves, " * i, "ends": i % 3 != 1} for i in range(11)] for split in SPLITS}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(store_builder, "BATCH_CHARACTERS", 50)
    monkeypatch.setattr(store_builder, "JOURNAL_BYTES", 200)
    monkeypatch.setattr(store_builder, "SHARD_TOKENS", 333)


def source_of(rows, fingerprint="fingerprint"):
    return Source("a corpus", fingerprint, lambda split: iter(rows[split]))


def stopping(after, error):
    """A source that fails after so many rows of all."""

    def documents(split):
        nonlocal after
        for row in ROWS[split]:
            if after == 0:
                raise error
            after -= 1
            yield row

    return Source("a corpus", "fingerprint", documents)


def files_of(folder):
    """Contents of a store, but for the times of its files."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    meta = json.loads(files["meta.json"])
    for split in SPLITS:
        for shard in meta["splits"][split]["shards"]:
            del shard["mtime_ns"]
    return {**files, "meta.json": meta}


@pytest.fixture
def whole(tmp_path):
    build_store(tmp_path / "whole", source_of(ROWS), BYTES)
    return files_of(tmp_path / "whole")


# interrupted


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from mla_lm.data import store_builder
    from mla_lm.data.store_builder import build_store
    from mla_lm.data.config import DataConfig, TokenizerConfig
    from mla_lm.data.corpus import Source
    from tests.data.test_store_builder import ROWS

    store_builder.BATCH_CHARACTERS, store_builder.JOURNAL_BYTES, store_builder.SHARD_TOKENS = 50, 200, 333
    os.fsync = lambda descriptor: None  # slow, and for power cuts, of which there are none here
    folder = Path(sys.argv[1])
    left = 0

    def step(event="row", arguments=()):
        # every row read, and every file opened, cut, moved or removed, is a place to be killed at
        global left
        if event in ("row", "open", "os.truncate", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            if event == "row" or str(folder) in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    def documents(split):
        for row in ROWS[split]:
            step()
            yield row

    def killed_after(steps, name):
        global left
        if (child := os.fork()) == 0:
            left = steps
            sys.addaudithook(step)
            build_store(folder / name, Source("a corpus", "fingerprint", documents), TokenizerConfig(kind="characters"))
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    point, kills = 1, 0
    while killed_after(point, f"at-{point}"):  # killed once, at each place, and gone on with
        assert not killed_after(0, f"at-{point}")
        point += 5
    for steps in (50, 71):  # killed again and again
        while killed_after(steps, f"each-{steps}"):
            kills += 1
            assert kills < 50, "it does not get on"
    print(point, kills)
"""


@pytest.mark.e2e
def test_a_build_that_is_killed_anywhere_is_gone_on_with(tmp_path):
    (tmp_path / "killed").mkdir()
    build_store(tmp_path / "whole", source_of(ROWS), TokenizerConfig(kind="characters"))
    whole = files_of(tmp_path / "whole")
    result = run(KILLED.replace("sys.argv[1]", repr(str(tmp_path / "killed"))))
    assert result.returncode == 0, result.stderr
    points, kills = map(int, result.stdout.split()[-2:])
    assert points > 100
    assert kills > 3
    stores = list((tmp_path / "killed").iterdir())
    assert len(stores) > 15
    assert all(files_of(store) == whole for store in stores)


@pytest.mark.parametrize("after", [0, 1, 12, 20, 32])
def test_ctrl_c_loses_no_more_than_the_last_rows(tmp_path, whole, after, capsys):
    with pytest.raises(KeyboardInterrupt):
        build_store(tmp_path / "store", stopping(after, KeyboardInterrupt()), BYTES)
    assert not (tmp_path / "store").exists()
    build_store(tmp_path / "store", source_of(ROWS), BYTES)
    assert files_of(tmp_path / "store") == whole
    assert not (tmp_path / "store.tmp").exists()
    done = "its tokenizer" if after < 2 else "0.0 MB of train"
    assert f"Going on with an interrupted build, after {done}" in capsys.readouterr().out


def test_files_are_gone_on_with_in_the_middle_of_a_document(tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_text("".join(f"line {i} of the text\n" for i in range(15_000)))  # five pieces
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "row number {i}"}}\n' for i in range(300)))
    config = DataConfig("text", str(tmp_path / "*.*"), cache_dir=str(tmp_path / "whole"), tokenizer=BYTES)
    (whole,) = {path.parent for paths in open_store(config).shards.values() for path in paths}
    config.cache_dir = str(tmp_path / "stopped")
    save, saves = store_builder._save, 0

    def stopping_save(draft, meta):
        nonlocal saves
        save(draft, meta)
        saves += 1
        if saves in (3, 5, 7):
            raise KeyboardInterrupt

    monkeypatch.setattr(store_builder, "_save", stopping_save)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            open_store(config)
    (stopped,) = {path.parent for paths in open_store(config).shards.values() for path in paths}
    assert files_of(stopped) == files_of(whole)


def test_a_trained_tokenizer_is_kept(tmp_path):
    passes = []

    def documents(split):
        passes.append(split)
        if len(passes) == 2:  # the tokenizer is trained
            raise KeyboardInterrupt
        return iter(ROWS[split])

    source = Source("a corpus", "fingerprint", documents)
    bpe = TokenizerConfig(vocab_size=300)
    with pytest.raises(KeyboardInterrupt):
        build_store(tmp_path / "store", source, bpe)
    build_store(tmp_path / "store", source, bpe)
    assert passes == ["train", "train", *SPLITS]


@pytest.mark.parametrize(("shard_tokens", "name"), [(10_000, "cache_dir"), (333, "meta.json")])
def test_a_full_disk_is_gone_on_from(tmp_path, monkeypatch, capsys, shard_tokens, name):
    monkeypatch.setattr(store_builder, "SHARD_TOKENS", shard_tokens)
    rows = {split: [{**row, "text": 20 * row["text"]} for row in ROWS[split]] for split in SPLITS}
    build_store(tmp_path / "whole", source_of(rows), BYTES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # no file may be longer: as on a full disk
        with pytest.raises(UserError, match=rf"{name}.*cannot be written.*too large"), sole_writer(tmp_path / "store"):
            build_store(tmp_path / "store", source_of(rows), BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    build_store(tmp_path / "store", source_of(rows), BYTES)
    assert "Going on" in capsys.readouterr().out
    assert files_of(tmp_path / "store") == files_of(tmp_path / "whole")


def test_a_mistake_in_the_text_leaves_no_draft(tmp_path):
    with pytest.raises(UserError, match="row 20"):
        build_store(tmp_path / "store", stopping(20, UserError("row 20 is bad")), BYTES)
    assert list(tmp_path.iterdir()) == []


def spoil_meta(draft, **changes):
    (draft / "meta.json").write_text(json.dumps({**json.loads((draft / "meta.json").read_text()), **changes}))


SPOILERS = {
    "another source": lambda draft: spoil_meta(draft, source_fingerprint="other"),
    "another tokenizer": lambda draft: spoil_meta(draft, tokenizer_hash="other"),
    "no journal": lambda draft: (draft / "meta.json").unlink(),
    "half a journal": lambda draft: os.truncate(draft / "meta.json", 100),
    "no tokenizer": lambda draft: (draft / "tokenizer.json").unlink(),
    "shard gone": lambda draft: (draft / "train-00000.bin").unlink(),
    "shard cut": lambda draft: os.truncate(draft / "train-00000.bin", 100),
    "shard changed": lambda draft: (draft / "train-00000.bin").write_bytes(bytes(666)),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_a_draft_that_is_not_what_was_written_is_begun_anew(tmp_path, whole, spoil, capsys):
    with pytest.raises(KeyboardInterrupt):
        build_store(tmp_path / "store", stopping(20, KeyboardInterrupt()), BYTES)
    spoil(tmp_path / "store.tmp")
    build_store(tmp_path / "store", source_of(ROWS), BYTES)
    assert files_of(tmp_path / "store") == whole
    assert "Going on" not in capsys.readouterr().out


# progress


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    build_store(tmp_path / "quick", source_of(ROWS), BYTES)
    assert "tokenizing" not in capsys.readouterr().out
    monkeypatch.setattr(store_builder, "SECONDS_PER_LINE", 1e-6)
    build_store(tmp_path / "slow", source_of(ROWS), BYTES)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for split in SPLITS:
        size = sum(len(row["text"]) for row in ROWS[split])
        last = [line for line in lines if line.startswith(f"tokenizing {split}: ")][-1]
        assert re.fullmatch(rf"tokenizing {split}: {size}B of text, [\d.]+k?B/s", last)


# memory


@pytest.mark.e2e
def test_memory_does_not_grow_with_the_text(tmp_path):
    """Three times as much text takes as much memory at its peak."""
    code = f"""
        import resource
        from mla_lm.data import store_builder
        from mla_lm.data.config import DataConfig, TokenizerConfig
        from mla_lm.data.open_store import open_store

        store_builder.BATCH_CHARACTERS = 2**16
        path = {str(tmp_path / "a.txt")!r}
        text = "".join(f"The {{i}}th wave broke on the shore, and the {{i % 7}} gulls cried.\\n" for i in range(15000))
        for times in (6, 18):
            with open(path, "w") as file:
                file.writelines([text] * times)
            open_store(DataConfig("text", path, cache_dir=path + ".cache", tokenizer=TokenizerConfig("bytes")))
            print("peak", times * len(text), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    result = run(code, MALLOC_ARENA_MAX="1")  # or the threads of the tokenizer may each keep some
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("peak")]
    more_text, more_memory = (int(b) - int(a) for a, b in zip(lines[0][1:], lines[1][1:], strict=True))
    assert more_text > 10_000_000
    assert more_memory < more_text / 2
