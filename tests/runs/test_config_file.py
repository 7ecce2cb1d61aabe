"""config.yaml: every configuration comes back from it as it was, and a file of others is plain data at most."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mla_lm.config import TrainConfig, with_absolute_paths
from mla_lm.data.config import PartConfig
from mla_lm.errors import UserError
from mla_lm.runs.config_file import MOST_BYTES, changed, read_config, to_yaml
from mla_lm.runs.folder import RunFolder

SPECIAL = (
    "${HOME}",
    "${oc.env:HOME}",
    r"\${HOME}",
    "null",
    "~",
    "1e3",
    "1_0",
    "yes",
    "2024-01-01",
    "1:30",
    "<<",
    "---",
)
texts = (
    st.sampled_from(SPECIAL)
    | st.text(st.characters(codec="utf-8"))
    | st.text("'\"\n\r\t #:-{}[]$\x00\x1b\x85\u2028\u202e\ufeff\ud800😀")
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("config") / "config.yaml"


@given(
    st.lists(texts, max_size=3),
    st.none() | texts | st.lists(texts, max_size=2),
    st.none() | texts,
    st.floats(allow_nan=False),
    st.none() | st.booleans(),
    st.none() | st.integers(-(2**62), 2**62),
)
def test_round_trip(file, prompts, files, text, number, truth, count):
    config = TrainConfig(tags=prompts, compile=truth, init_from=text)
    config.data.prompts, config.data.files, config.logger.name, config.data.cache_dir = prompts, files, text, f"{text}"
    config.optimizer.lr, config.optimizer.betas, config.model.vocab_size = number, [number, 0.0], count
    config.data.parts = [PartConfig(files=files, name=text, weight=number), PartConfig()]
    config.model.attention.rope_frequencies = None if truth else [number]
    RunFolder(file.parent).write_config(config)
    assert RunFolder(file.parent).config() == config
    assert (
        changed(TrainConfig(), {"data.prompts": prompts, "data.files": files, "logger.name": text}).data.files == files
    )


def test_a_variable_is_text(file, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    file.write_text("model: {}\nlogger:\n  name: ${oc.env:SECRET}\ndata:\n  files: [a, '${oc.env:SECRET}']\n")
    config = read_config(file)
    assert config.logger.name == "${oc.env:SECRET}"
    assert config.data.files == ["a", "${oc.env:SECRET}"]
    assert "hunter2" not in to_yaml(changed(with_absolute_paths(config), {"tags": ["x"]}))


def test_what_earlier_versions_wrote(file):
    """They wrote OmegaConf's YAML; keys that came later have their defaults."""
    config = TrainConfig(tags=["1e-3", "yes", "2024-01-01", "a: b"], compile=True)
    config.optimizer.lr, config.data.files = 1e-5, ["a.txt", "é.txt"]
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    del plain["logger"], plain["data"]["prompts"]
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))
    assert read_config(file) == config


@pytest.mark.parametrize(
    ("attention", "kind"),
    [
        ({"kv_compressed_dim": 64, "rope_dim": 16}, "mla"),
        ({"num_kv_heads": None}, "mha"),
        ({"num_kv_heads": 8}, "mha"),
        ({"num_kv_heads": 2}, "gqa"),
        ({"num_kv_heads": 1}, "mqa"),
        ({}, "mha"),
    ],
)
def test_the_kind_of_attention_of_earlier_runs(file, attention, kind):
    """They did not write it down; a run that does is not asked for its sizes."""
    file.write_text(yaml.safe_dump({"model": {"num_heads": 8, "attention": attention}}))
    assert read_config(file).model.attention.kind == kind
    file.write_text(yaml.safe_dump({"model": {"num_heads": 8, "attention": {**attention, "kind": "mqa"}}}))
    assert read_config(file).model.attention.kind == "mqa"


def test_numbers_as_people_write_them(file):
    file.write_text("model: {}\noptimizer: {lr: 1e-3, weight_decay: 0}\nlogger: {group: 2024-01-01}\n")
    config = read_config(file)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.logger.group) == (1e-3, 0.0, "2024-01-01")
    assert type(config.optimizer.weight_decay) is float


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", ["line"]),
        ("", ["not the configuration of a run"]),
        ("seed: 1", ["not the configuration of a run"]),
        ("model: {}\nseed: x", ["seed=x", "a whole number"]),
        ("model: {}\nseed: 1.5", ["seed=1.5", "a whole number"]),
        ("model: {}\nseed: true", ["seed=true", "a whole number"]),
        ("model: {}\nseed: null", ["seed=null", "a whole number"]),
        ("model: {}\nseed: 0x" + "f" * 5000, ["seed", "too large"]),
        ("model: {}\nseed: " + "9" * 5000, ["config.yaml"]),
        ("model: {seq_len: 0x" + "f" * 5000 + "}", ["model.seq_len", "too large"]),
        ("model: {}\noptimizer: {lr: fast}", ["optimizer.lr=fast", "a number"]),
        ("model: {}\noptimizer: {lr: 1" + "0" * 400 + "}", ["optimizer.lr", "large"]),
        ("model: {}\ncompile: maybe", ["compile=maybe", "true or false"]),
        ("model: {}\nlogger: {name: 5}", ["logger.name=5", "a text"]),
        ("model: {}\nlogger: none", ["logger=none", "a group of keys"]),
        ("model: {}\ntags: [a, [b]]", ["tags[1]=[b]", "a text"]),
        ("model: {}\ntags: a", ["tags=a", "a list"]),
        ("model: {}\ndata: {files: {a: b}}", ["data.files={a: b}", "a text or a list"]),
        ("model: {}\ndata: {parts: [{wieght: 1}]}", ["data.parts[0].wieght"]),
        ("model: {_target_: os.system}", ["unknown key model._target_"]),
        ("model: {}\n1: 2", ["unknown key 1"]),
        ("model: {}\n? [a]\n: 2", ["config.yaml"]),
        ("model: {}\nmodel: {}", ["model is there twice"]),
        ("model: {}\ntags: !!python/object/apply:os.system [true]", ["line 2", "tag"]),
        ("model: {}\ntags: &all [a]", ["line 2", "anchor"]),
        ("model: &m {}\ntags: *m", ["anchor"]),
        ("model: *m", ["alias"]),
        ("model: " + "[" * 100_000, ["levels deep"]),
        ("model: {}\n---\nmodel: {}", ["config.yaml"]),
        ("model: {}\n#" + "x" * MOST_BYTES, [f"{MOST_BYTES:,} bytes"]),
    ],
)  # fmt: skip
def test_mistakes_name_the_file_and_the_key(file, text, words):
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_config(file)
    for word in ("config.yaml", *words):
        assert word in str(error.value)
    assert len(str(error.value)) < 500


def test_bytes_that_are_no_text(file):
    file.write_bytes(b"model: \xff")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        read_config(file)
