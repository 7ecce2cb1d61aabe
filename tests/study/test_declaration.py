"""The declarations in conf/study/, and what is refused of them."""

import pytest
from omegaconf.errors import OmegaConfBaseException

from mla_lm.errors import UserError
from mla_lm.study.declaration import declared, parsed
from tests.conftest import ROOT

CONF = ROOT / "conf"
STUDIES = sorted(file.stem for file in (CONF / "study").glob("*.yaml"))


def test_every_study_there_is():
    assert STUDIES == ["attention", "latent_frontier", "scaling", "smoke"]
    for name in STUDIES:
        assert declared(CONF, name, []).title


def test_keys_of_the_study_of_data_and_of_runs():
    study = declared(CONF, "attention", ["seeds=[7,8]", "model.seq_len=64", "logger=none", "data.val_tokens=512"])
    assert study.seeds == [7, 8]
    assert study.settings == ["model.seq_len=64", "logger=none"]
    assert study.corpus == "data=python_stdlib data.val_tokens=512"
    assert declared(CONF, "smoke", ["data=tinystories"]).corpus == "data=tinystories"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kinds=[mla,mlb]"], ["unknown kind mlb", "mla"]),
        (["kinds=[mla,mha]", "variants=['gpa model.use_bias=true']"], ["unknown kind gpa"]),
        (["kinds=[]"], ["kinds=[]", "empty"]),
        (["sizes=[]"], ["sizes=[]", "empty"]),
        (["seeds=[]"], ["seeds=[]", "empty"]),
        (["more_seeds=[5]", "more_seeds_of=[mla]"], ["more_seeds=[5]", "name 5 more than once"]),
        (["more_seeds_of=[mls]"], ["more_seeds_of", "unknown kind mls"]),
        (["kinds=[mla]"], ["baseline=mha", "kinds"]),
        (["seeds=[1,1]"], ["seeds", "more than once"]),
        (["seeds=[1,1000]"], ["tuning.seed=1000", "among the seeds"]),
        (["tuning.learning_rates=[]"], ["tuning.learning_rates", "at least one"]),
        (["tuning.learning_rates=[1e-3,0]"], ["tuning.learning_rates", "above 0"]),
        (["tuning.most=2"], ["tuning.most=2", "at least 3"]),
        (["tokens=null"], ["tokens", "tokens_per_parameter"]),
        (["tokens=0"], ["tokens=0", "at least 1"]),
        (["views=[size]"], ["views=size", "parameters"]),
        (["seed=1"], ["seed=1", "seeds"]),
        (["trainer.max_steps=5"], ["trainer.max_steps", "tokens"]),
        (["+foo=1"], ["unknown key foo"]),
    ],
)
def test_mistakes(overrides, words):
    with pytest.raises(UserError) as error:
        declared(CONF, "attention", overrides)
    assert all(word in str(error.value) for word in words), error.value
    assert len(str(error.value).splitlines()) <= 3


def test_an_unknown_study_is_answered_with_those_there_are():
    with pytest.raises(UserError, match="did you mean smoke"):
        declared(CONF, "smok", [])


def test_one_seed_is_allowed():
    assert declared(CONF, "attention", ["seeds=[1]"]).seeds == [1]


def test_a_missing_list_is_refused(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "mine.yaml").write_text("defaults: [study_schema, _self_]\ntitle: x\ntokens: 5\n")
    with pytest.raises(OmegaConfBaseException, match="sizes"):
        declared(tmp_path, "mine", [])


def test_labels_of_entries():
    assert parsed("small").label == "small"
    assert parsed("small model.num_layers=8 model.norm_eps=1e-5").label == "small-num_layers8-norm_eps1e_5"
