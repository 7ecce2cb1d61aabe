import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from mla_lm.data.config import MIXTURE, SOURCES, DataConfig, PartConfig, SplitsConfig, TokenizerConfig
from mla_lm.errors import UserError


def test_the_defaults_are_in_order():
    DataConfig().check()


def test_every_yaml_fits_the_schema(request):
    needs = {
        "text": {"files": "a"},
        "characters": {"files": "a"},
        "hub": {"path": "a/b"},
        "mixture": {"parts": [{"weight": 1}]},
    }
    yamls = list((request.config.rootpath / "conf" / "data").glob("*.yaml"))
    assert len(yamls) > 8
    for path in yamls:
        config = OmegaConf.merge(DataConfig, OmegaConf.load(path), needs.get(path.stem, {}))
        config = OmegaConf.to_object(config)
        assert isinstance(config, DataConfig)
        assert config.source == (path.stem if path.stem in (*SOURCES, MIXTURE) else "hub")
        config.check()


def mixture(*parts, **keys):
    """As a command line gives it."""
    return OmegaConf.to_object(OmegaConf.merge(DataConfig, {"source": "mixture", "parts": list(parts), **keys}))


def test_a_part_takes_what_its_source_takes():
    stories = {"source": "hub", "path": "a/b", "splits": {"test": "final"}, "max_characters": 9, "weight": 0.75}
    config = mixture(stories, {"source": "text", "files": ["a", "b"], "column": "body", "weight": 0.25})
    config.check()
    assert config.parts[0].splits == SplitsConfig(test="final")
    assert config.parts[1] == PartConfig(source="text", files=["a", "b"], column="body", weight=0.25)


@given(st.lists(st.integers(10, 1000), min_size=1, max_size=12))
def test_the_weights_that_the_message_proposes_are_right(weights):
    weights[0] += sum(weights) == 1000
    with pytest.raises(UserError) as error:
        mixture(*({"weight": weight / 1000} for weight in weights)).check()
    message, _, proposed = str(error.value).rpartition(" they are ")
    assert f"sum to {sum(weights) / 1000:.8g}, and must sum to 1" in message
    proposed = [float(weight) for weight in proposed.split(", ")]
    assert proposed == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-7)
    mixture(*({"weight": weight} for weight in proposed)).check()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], ["data=mixture needs data.parts", "weight:0.7"]),
        ([{"weight": 0.5}, {"weight": 0.4}], ["sum to 0.9", "must sum to 1", "0.55555556, 0.44444444"]),
        ([{"weight": 1}, {"weight": 0}], ["data.parts[1].weight=0 must be at least 0.001"]),
        ([{"weight": 1}, {}], ["data.parts[1].weight=0", "share"]),
        ([{"weight": 2}, {"weight": -1}], ["data.parts[1].weight=-1"]),
        ([{"weight": float("nan")}], ["data.parts[0].weight=nan"]),
        ([{"source": "web", "weight": 1}], ["data.parts[0]: data.source=web", "python_stdlib, python_packages, text"]),
        ([{"source": "mixture", "weight": 1}], ["data.parts[0]: data.source=mixture is unknown"]),
        ([{"weight": 0.5}, {"source": "text", "weight": 0.5}], ["data.parts[1]: data=text needs data.files"]),
        ([{"source": "hub", "weight": 1}], ["data.parts[0]: data=hub needs data.path"]),
        ([{"source": "text", "files": "a", "lines": True, "weight": 1}], ["data.parts[0]", "lines", "data=text"]),
    ],
)
def test_a_mistake_in_a_mixture_names_its_part(parts, words):
    with pytest.raises(UserError) as error:
        mixture(*parts).check()
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("part", "error"),
    [({"wieght": 1}, ConfigKeyError), ({"weight": "x"}, ValidationError), ({"splits": {"dev": "x"}}, ConfigKeyError)],
)
def test_unknown_keys_and_wrong_types_of_a_part_are_refused(part, error):
    with pytest.raises(error):
        mixture(part)


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
        (
            DataConfig(source="wikipedia"),
            ["data.source=wikipedia", "python_stdlib, python_packages, text, characters, hub"],
        ),
        (DataConfig(source="text"), ["data=text", "data.files"]),
        (DataConfig(files="a.txt"), ["data.files", "data=text"]),
        (DataConfig(source="hub"), ["data=hub", "data.path", "roneneldan/TinyStories"]),
        (DataConfig(source="hub", path="a/b", files="a.txt"), ["data.files", "data=hub", "data=text"]),
        (DataConfig(path="a/b"), ["data.path", "data=python_stdlib", "data=hub"]),
        (DataConfig(source="text", files="a", lines=True), ["lines", "data=text", "data=hub"]),
        (DataConfig(source="hub", path="a/b", max_characters=0), ["data.max_characters=0", "null"]),
        (DataConfig(source="hub", path="a/b", splits=SplitsConfig(test="train")), ["data.splits.train=train", "test"]),
        (DataConfig(parts=[PartConfig(weight=1.0)]), ["data.parts", "data=python_stdlib", "data=mixture"]),
        (DataConfig(source="mixture", files="a"), ["data.files", "a part"]),
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
