import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from mla_lm.data.config import SOURCES, DataConfig, SplitsConfig, TokenizerConfig
from mla_lm.errors import UserError


def test_the_defaults_are_in_order():
    DataConfig().check()


def test_every_yaml_fits_the_schema(request):
    needs = {"text": {"files": "a"}, "characters": {"files": "a"}, "hub": {"path": "a/b"}}
    yamls = list((request.config.rootpath / "conf" / "data").glob("*.yaml"))
    assert len(yamls) > 8
    for path in yamls:
        config = OmegaConf.merge(DataConfig, OmegaConf.load(path), needs.get(path.stem, {}))
        config = OmegaConf.to_object(config)
        assert isinstance(config, DataConfig)
        assert config.source == (path.stem if path.stem in SOURCES else "hub")
        config.check()


@pytest.mark.parametrize("files", ["a.txt", ["a.txt", "b.txt"]])
def test_files_are_a_path_or_a_list(files):
    assert OmegaConf.to_object(OmegaConf.merge(DataConfig, {"files": files})).files == files


@pytest.mark.parametrize(("keys", "error"), [({"colum": "x"}, ConfigKeyError), ({"val_tokens": "x"}, ValidationError)])
def test_unknown_keys_and_wrong_types_are_refused(keys, error):
    with pytest.raises(error):
        OmegaConf.merge(DataConfig, keys)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DataConfig(source="wikipedia"), ["data.source=wikipedia", "python_stdlib, text, characters, hub"]),
        (DataConfig(source="text"), ["data=text", "data.files"]),
        (DataConfig(files="a.txt"), ["data.files", "data=text"]),
        (DataConfig(source="hub"), ["data=hub", "data.path", "roneneldan/TinyStories"]),
        (DataConfig(source="hub", path="a/b", files="a.txt"), ["data.files", "data=hub", "data=text"]),
        (DataConfig(path="a/b"), ["data.path", "data=python_stdlib", "data=hub"]),
        (DataConfig(source="text", files="a", lines=True), ["lines", "data=text", "data=hub"]),
        (DataConfig(source="hub", path="a/b", max_characters=0), ["data.max_characters=0", "null"]),
        (DataConfig(source="hub", path="a/b", splits=SplitsConfig(test="train")), ["data.splits.train=train", "test"]),
        (DataConfig(val_tokens=0), ["data.val_tokens=0", "at least 1"]),
        (DataConfig(num_workers=-1), ["data.num_workers=-1"]),
        (DataConfig(tokenizer=TokenizerConfig(kind="word")), ["data.tokenizer.kind=word", "bpe, file"]),
        (DataConfig(tokenizer=TokenizerConfig(kind="file")), ["data.tokenizer.file", "tokenizer.json"]),
        (DataConfig(tokenizer=TokenizerConfig(file="t.json")), ["data.tokenizer.kind=bpe", "file"]),
        (DataConfig(tokenizer=TokenizerConfig(kind="hub")), ["data.tokenizer.path", "gpt2"]),
        (DataConfig(tokenizer=TokenizerConfig(path="a/b")), ["data.tokenizer.kind=bpe", "hub"]),
        (DataConfig(tokenizer=TokenizerConfig(vocab_size=100)), ["data.tokenizer.vocab_size=100", "257"]),
    ],
)
def test_a_mistake_names_the_key_and_what_would_be_right(config, words):
    with pytest.raises(UserError) as error:
        config.check()
    assert all(word in str(error.value) for word in words)
