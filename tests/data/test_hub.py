"""Hub datasets: the real code of `datasets` on folders laid out as on the Hub."""

import shutil

import pytest

from mla_lm.data.config import DataConfig, SplitsConfig, TokenizerConfig
from mla_lm.data.corpus import SPLITS, split_of
from mla_lm.data.open_store import open_store
from mla_lm.data.sources import open_source
from mla_lm.errors import UserError
from tests.conftest import SMALL, refused, succeeded, summary_of
from tests.data.conftest import STORIES, rows_of, run, write_rows
from tests.data.test_sources import all_documents, documents


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    """What `datasets` keeps goes to a folder of the tests; the library reads HF_HOME too early to set it here."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
        yield


def config_of(folder, **keys):
    cache = folder.parent / "cache"
    return DataConfig(source="hub", path=str(folder), cache_dir=str(cache), **keys)


# splits


def test_a_missing_split_is_carved_from_training_by_hash_and_said_so(folder):
    source = open_source(config_of(folder))
    found = all_documents(source)
    assert found["validation"] == STORIES[300:320]
    assert sorted(found["train"] + found["test"]) == sorted(STORIES[:300])
    assert found["test"] == [text for text in found["test"] if split_of(text) == "test"]
    assert all(split_of(text) != "test" for text in found["train"])
    assert "train, validation, test carved from train (5% by sha256 of the text)" in source.description


def test_a_dataset_of_training_text_alone_is_carved_twice(tmp_path):
    write_rows(tmp_path / "set" / "train.json.gz", rows_of([*STORIES, None, ""], "body"))
    found = all_documents(open_source(config_of(tmp_path / "set", column="body")))
    assert {split: [text for text in STORIES if split_of(text) == split] for split in SPLITS} == found


def test_splits_of_other_names(tmp_path):
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for name, texts in (("learn", STORIES[:50]), ("dev", STORIES[50:60]), ("final", STORIES[60:70])):
        write_rows(tmp_path / "set" / f"{name}.parquet", rows_of(texts))
        readme += f"  - split: {name}\n    path: {name}.parquet\n"
    (tmp_path / "set" / "README.md").write_text(readme + "---\n")
    config = config_of(tmp_path / "set", splits=SplitsConfig("learn", "dev", "final"))
    assert all_documents(open_source(config)) == {
        "train": STORIES[:50], "validation": STORIES[50:60], "test": STORIES[60:70]
    }  # fmt: skip
    config.splits = SplitsConfig("learn", "devel")
    with pytest.raises(UserError, match=r"no split devel: set data\.splits\.validation to one of learn, dev, final"):
        open_source(config)
    config.splits = SplitsConfig()
    with pytest.raises(UserError, match=r"no split train: set data\.splits\.train to one of learn, dev, final"):
        open_source(config)


@pytest.fixture
def configured(tmp_path):
    """Two configurations with all splits, listed in README.md."""
    readme = "---\nconfigs:\n"
    for number, name in enumerate(("prose", "verse")):
        readme += f"- config_name: {name}\n  data_files:\n"
        for place, split in enumerate(SPLITS):
            texts = STORIES[100 * number + 20 * place :][:20]
            write_rows(tmp_path / "set" / name / f"{split}.parquet", rows_of(texts))
            readme += f"  - split: {split}\n    path: {name}/{split}.parquet\n"
    (tmp_path / "set" / "README.md").write_text(readme + "---\nA card.\n")
    return tmp_path / "set"


def test_configurations(configured):
    assert documents(open_source(config_of(configured, name="verse")), "test") == STORIES[140:160]
    assert documents(open_source(config_of(configured, name="prose")), "validation") == STORIES[20:40]
    with pytest.raises(UserError, match=r"has no configuration data\.name=rhyme: it has prose, verse"):
        open_source(config_of(configured, name="rhyme"))
    with pytest.raises(UserError, match=r"needs data\.name, one of prose, verse"):
        open_source(config_of(configured))


# rows


def test_rows_that_are_lines_make_one_document(configured, tmp_path):
    lines = [" = A title = \n", "", " First paragraph . \n", None, "no line end"]
    for split in SPLITS:
        write_rows(tmp_path / "set" / "verse" / f"{split}.parquet", rows_of(lines))
    source = open_source(config_of(configured, name="verse", lines=True))
    article = " = A title = \n\n First paragraph . \n\nno line end\n"
    assert all_documents(source) == {split: [article] for split in SPLITS}


def test_lines_come_in_pieces_and_are_never_carved(tmp_path, folder):
    with pytest.raises(UserError, match=r"no test split, and lines.*data\.splits\.test to one of train, validation"):
        open_source(config_of(folder, lines=True))
    source = open_source(config_of(folder, lines=True, splits=SplitsConfig(test="validation")))
    write_rows(tmp_path / "set" / "data" / "train-00000-of-00003.parquet", rows_of(["x" * 999] * 200))
    rows = list(open_source(config_of(folder, lines=True, splits=SplitsConfig(test="validation"))).documents("train"))
    assert [row["ends"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert len(rows) > 2
    assert documents(source, "test") == documents(source, "validation")


def test_a_capped_dataset_is_its_beginning(folder):
    whole = open_source(config_of(folder))
    source = open_source(config_of(folder, max_characters=5000))
    found = all_documents(source)
    beginning = sorted(found["train"] + found["test"])
    assert 5000 <= len("".join(beginning)) < 5100
    in_order = [text for shard in range(3) for text in STORIES[shard:300:3]]
    assert beginning == sorted(in_order[: len(beginning)])
    assert "the first 5,000 characters" in source.description
    assert source.fingerprint != whole.fingerprint


def test_a_capped_dataset_is_streamed_once(folder):
    """Three splits and a tokenizer are made of it; from the network each pass would be a download."""
    config = config_of(folder, max_characters=7000, tokenizer=TokenizerConfig(vocab_size=300))
    source = open_source(config)
    first = documents(source, "train")
    for shard in (folder / "data").iterdir():
        shard.unlink()
    assert documents(source, "train") == first


# tokens


@pytest.mark.e2e
def test_the_store_is_opened_again_without_datasets_or_network(folder):
    config = config_of(folder, tokenizer=TokenizerConfig(kind="bytes"))
    store = open_store(config)
    assert store.counts["validation"] == sum(len(text) + 1 for text in STORIES[300:320])
    code = f"""
        import sys
        from mla_lm.data.config import DataConfig, TokenizerConfig
        from mla_lm.data.open_store import open_store
        config = DataConfig(source="hub", path={str(folder)!r}, cache_dir={config.cache_dir!r},
                            tokenizer=TokenizerConfig(kind="bytes"))
        print(open_store(config).fingerprint, "datasets" in sys.modules, "huggingface_hub" in sys.modules)
    """
    assert run(code).stdout.split() == [store.fingerprint, "False", "False"]


def test_the_fingerprint_depends_on_content_column_and_rule_but_not_on_the_place(folder, tmp_path):
    fingerprint = open_source(config_of(folder)).fingerprint
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert open_source(config_of(moved)).fingerprint == fingerprint
    others = [
        open_source(config_of(folder, column="id")).fingerprint,
        open_source(config_of(folder, splits=SplitsConfig(test="validation"))).fingerprint,
    ]
    write_rows(moved / "data" / "validation-00000-of-00001.parquet", rows_of(STORIES[300:321]))
    others.append(open_source(config_of(moved)).fingerprint)
    assert len({fingerprint, *others}) == 4
    assert len(documents(open_source(config_of(moved)), "validation")) == 21


def test_a_run_on_a_dataset(configured, train):
    data = (
        "data=hub", f"data.path={configured}", "data.name=prose", "data.lines=true",
        "data.tokenizer.kind=bytes", f"data.cache_dir={configured.parent / 'cache'}",
    )  # fmt: skip
    succeeded(train.bare(*SMALL, *data, "trainer.max_steps=1", "hydra.run.dir=run"))
    assert summary_of(train.folder / "run")["data_fingerprint"]
    refused(train.bare(*SMALL, *data, "data.column=story"), "no column story", "id, text")


# mistakes


@pytest.mark.parametrize("cap", [None, 1000])
@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("story", ["no column story", "data.column", "id, text"]),
        ("id", ["column id is not text but int", "id, text"]),
    ],
)
def test_a_column_that_is_missing_or_not_text(folder, column, words, cap):
    source = open_source(config_of(folder, column=column, max_characters=cap))
    with pytest.raises(UserError) as error:
        documents(source, "train")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_script_is_never_run(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=r"Python script of its own, which is never run.*Parquet"):
        open_source(config_of(tmp_path / "set"))
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_data(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="no files of a dataset"):
        open_source(config_of(tmp_path / "set"))
    (tmp_path / "set" / "train.parquet").write_bytes(b"PAR1 is not all")
    with pytest.raises(UserError, match="cannot be read") as error:
        documents(open_source(config_of(tmp_path / "set")), "train")
    assert len(str(error.value).splitlines()) <= 3
