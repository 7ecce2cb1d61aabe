"""The model card and what lies beside it go to strangers: nothing of this machine, nothing that a run could slip in."""

import getpass
import json
from pathlib import Path

import pytest

from mla_lm.config import TrainConfig
from mla_lm.data.config import DataConfig
from mla_lm.interop.hf.card import model_card
from mla_lm.interop.hf.folder import export_run
from mla_lm.model.config import TransformerConfig
from tests.conftest import SMALL, succeeded

DESCRIBED = {"architectures": ["LlamaForCausalLM"]}
EVIL = "x`\n---\nlicense: mit\n---\n<img src=//evil>[click](//evil) | a |\x1b[2J\u202e"


def card(summary: dict, **data: object) -> str:
    config = TrainConfig(model=TransformerConfig(vocab_size=300), data=DataConfig(**data))
    return model_card({"data_fingerprint": "abc"} | summary, config, DESCRIBED)


def test_nothing_of_a_run_is_markup():
    text = card({"precision": EVIL, "data_fingerprint": EVIL}, source="hub", path="org/set", name=EVIL, revision=EVIL)
    plain = card({"precision": "x"}, source="hub", path="org/set", name="x", revision="x")
    assert "`org/set` of the Hugging Face Hub, `x`, `x`." in plain
    assert len(text.splitlines()) == len(plain.splitlines())
    assert text.partition("# A language")[0] == plain.partition("# A language")[0]  # the front matter
    assert "\x1b" not in text
    assert "\u202e" not in text
    for line in text.splitlines():
        if "evil" in line:
            outside = line.split("`")[::2]
            assert not [part for part in outside if "evil" in part]
    assert r"| trained in | `x'\n" in text
    assert r"\| a \|" in text
    assert "| perplexity, test | `<b>` |" in card({"test_perplexity": "<b>"})


@pytest.mark.parametrize("path", ["/home/me/set", "~/set", "../set", "C:\\set", EVIL, None])
def test_a_folder_is_not_named(path):
    text = card({}, source="hub", path=path)
    assert "Text files of the one who trained it." in text
    assert path is None or path not in text


def test_an_export_tells_nothing_of_this_machine(train, tmp_path, monkeypatch):
    """Of a run on a dataset in a folder: no path, no user."""
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "mine").mkdir()
    for split in ("train", "test"):
        rows = "".join(json.dumps({"text": f"def {split}{n}(): return {n}"}) + "\n" for n in range(500))
        (tmp_path / "mine" / f"{split}.jsonl").write_text(rows)
    data = ("data=hub", "data.path=mine", "data.tokenizer.vocab_size=300", "data.val_tokens=512")
    run = ("data.cache_dir=cache", "logger.name=${oc.env:SECRET}", "hydra.run.dir=run")
    succeeded(train.bare(*SMALL, *data, *run))
    export_run(tmp_path / "run", tmp_path / "out")
    private = [str(tmp_path), tmp_path.name, str(Path.home()), "mine", "hunter2"]
    if len(getpass.getuser()) > 4:  # else it may be part of any word
        private.append(getpass.getuser())
    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes()
        assert not [word for word in private if word.encode() in content], file.name
    for name in ("tokenizer.json", "summary.json", "metrics.jsonl", "origin"):
        content = (tmp_path / "run" / name).read_bytes()
        assert not [word for word in private if word.encode() in content], name
