"""A user's mistakes: exit status 2, at most three lines that name what is wrong, nothing written over."""

import gzip
import json
import math

import pytest

from mla_lm.data.config import TokenizerConfig
from mla_lm.data.tokenizer import build_tokenizer
from mla_lm.terminal import cli
from scripts import compare, generate
from tests.conftest import SMALL, call_main, refused, succeeded, summary_of

MISTAKES = [
    (["--cfg=job", "-m"], ["--multirun and --cfg"]),
    (["model=mla_smal"], ["mla_smal", "mla_small"]),
    (["trainer.max_step=3"], ["trainer.max_step", "trainer.max_steps"]),
    (["max_steps=3"], ["max_steps", "trainer.max_steps"]),
    (["+model.attention.ropedim=3"], ["model.attention.ropedim", "model.attention.rope_dim"]),
    (["+_target_=os.system"], ["unknown key _target_"]),
    (["+model._target_=os.system"], ["unknown key model._target_"]),
    (["data=mixture", "data.files=null", "data.parts=[{_target_:os.system,weight:1}]"], ["unknown key _target_"]),
    (["optimizer.lr=abc"], ["optimizer.lr=abc", "takes a number"]),
    (["trainer.max_steps=2.5"], ["trainer.max_steps=2.5", "takes a whole number"]),
    (["compile=maybe"], ["compile=maybe", "takes true or false"]),
    (["tags=x"], ["tags=x", "takes a list"]),
    (["model.attention=3"], ["model.attention=3", "takes keys of its own"]),
    (["model.attention.rope_dim=7"], ["rope_dim=7", "even"]),
    (["trainer.accelerator=gpu"], ["trainer.accelerator=gpu"]),
    (["data.files=nothing/*.txt"], ["nothing/*.txt", "no file"]),
    (["data.files=2024"], ["2024", "no file"]),
    (["data.tokenizer.kind=characters", "data.prompts=[☃]"], ["☃"]),
    (["samples.max_tokens=4", "data.prompts=[" + "word" * 50 + "]"], ["data.prompts", "model.seq_len=32"]),
    (["model.vocab_size=100"], ["model.vocab_size=100"]),
    (["model.document_token=1"], ["model.document_token=1", "data.document_mask"]),
    (["schedule.short_seq_len=10"], ["schedule.short_seq_len=10", "divide model.seq_len=32"]),
    (["schedule.short_seq_len=0"], ["schedule.short_seq_len=0", "at least 1"]),
    (["data.document_mask=true", "compile=true"], ["compile=true", "data.document_mask"]),
    (["trainer.fp8=true"], ["trainer.fp8=true", "32-true", "trainer.precision=bf16-mixed"]),
    (["trainer.fp8=true", "model.seq_len=8"], ["multiple of 16 tokens", "model.seq_len is 8"]),
    (["ckpt_path=a", "init_from=b"], ["a"]),
    (["experiment=foo"], ["experiment=foo"]),
    (["experiment=extend_context"], ["yarn.factor=4.0", "init_from=RUN"]),
    (["seed=1,2"], ["seed", "-m"]),
    (["model"], ["model", "key=value"]),
    (["--nonsense"], ["--nonsense", "--help"]),
    (["hydra.run.dir=/proc/1/none"], ["/proc/1/none"]),
    (["a b"], ["a b"]),
    (["=null"], ["=null", "key=value"]),
    (["model=null"], ["model=null", "option of model"]),
    (["logger=1"], ["logger=1", "option of logger"]),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES, ids=[mistake[0][-1] for mistake in MISTAKES])
def test_mistake(train, tmp_path, overrides, words):
    refused(train(*overrides), *words)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_compiling_with_a_compiler_that_fails(train, tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        "case $1 in *version) echo 'g++ (GCC) 12.2.0'; exit;; esac\n"
        "echo 'a.h:1:10: fatal error: Python.h: No such file' >&2; exit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    result = train.process(*SMALL, *train.data, "compile=true")  # torch asks for CXX once in a process
    refused(result, "compile=true", "Python.h: No such file", "CXX=")


def test_files_of_others_are_left_alone(train, tmp_path):
    (tmp_path / "tokenizer.json").write_text("mine")
    refused(train("hydra.run.dir=."), "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_text() == "mine"


def test_a_folder_without_a_checkpoint_can_be_begun_again(train, tmp_path):
    fails = ("optimizer.lr=1e30", "optimizer.gradient_clip=0", "schedule.warmup_fraction=0")
    result = train(*fails, "checkpoint.every_n_steps=6", "val_every_n_steps=6", "hydra.run.dir=run")
    assert result.returncode == 1
    assert "resume  " not in result.stdout  # there is nothing to go on from
    refused(train.bare(f"ckpt_path={tmp_path / 'run'}"), "before its first checkpoint", "hydra.run.dir=")
    succeeded(train("hydra.run.dir=run"))


def test_a_damaged_configuration(train, run):
    (run / "config.yaml").write_text("a: [1")
    refused(train.bare(f"ckpt_path={run}"), "config.yaml")


def test_summaries_that_are_no_runs(train, run, tmp_path):
    """compare names what is wrong in one; a run goes on without it."""
    file = run / "summary.json"
    whole = json.loads(file.read_text())
    spoiled = [{**whole, "kv_cache_vs_mha": {}}, {**whole, "val_loss": math.inf}, {**whole, "parameters": "many"}]
    for summary in [{k: v for k, v in whole.items() if k != "data_fingerprint"}, *spoiled]:
        file.write_text(json.dumps(summary))
        refused(call_main(lambda: cli.run(compare.main), ["compare", "run"], tmp_path), "summary.json", "damaged")
    result = succeeded(train.bare("ckpt_path=run", "trainer.max_steps=7"))
    assert "summary.json is damaged" in result.stderr
    assert summary_of(run)["finished"]


def test_a_run_whose_precision_was_never_settled(run, tmp_path):
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("precision: 32-true", "precision: auto"))
    result = call_main(lambda: cli.run(generate.main), ["generate", "run", "--prompt", "a"], tmp_path)
    refused(result, "config.yaml", "trainer.precision=auto")


def test_a_tokenizer_of_another_model(run, tmp_path):
    build_tokenizer(TokenizerConfig(kind="bytes"), []).save(str(run / "tokenizer.json"))
    result = call_main(lambda: cli.run(generate.main), ["generate", "run", "--prompt", "a"], tmp_path)
    refused(result, "tokenizer.json", "257 entries", "300")


def test_empty_packed_file(train, tmp_path):
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b"", mtime=0))
    refused(train("data.files=empty.jsonl.gz"), "empty.jsonl.gz", "empty")


def test_text_shorter_than_a_window(train, tmp_path):
    (tmp_path / "short.txt").write_text("A few words, not enough to train on.\n" * 4)
    refused(train("data.files=short.txt", "model.seq_len=128", "tokens_per_step=128"), "train", "model.seq_len=128")


def test_column_that_is_not_text(train, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": 3, "body": "text"}\n' * 10)
    refused(train("data.files=rows.jsonl"), "rows.jsonl", "column text", "not text but int", "body")


HUB = (*SMALL, "data=hub", "data.cache_dir=cache")


def test_wrong_split(train, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "a few words"}\n' * 10)
    refused(train.bare(*HUB, "data.path=set", "data.splits.validation=dev"), "no split dev", "data.splits.validation")


def test_no_network(train, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    refused(train.bare(*HUB, "data.path=org/none"), "data.path=org/none", "cannot be reached", "data=text")


MIXTURE = "data.parts=[{{source:text,files:'{0}',weight:0.5}},{{source:text,files:'{0}',{1}}}]"


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ("weight:0.4", ["data.parts", "sum to 0.9", "0.55555556, 0.44444444"]),
        ("wieght:0.5", ["wieght", "data.parts", "did you mean weight"]),
        ("weight: half", ["data.parts", "half"]),
        ("weight:0.5,splits:{dev:a}", ["dev", "data.parts"]),
        ("weight:0.5,path:org/none", ["data.parts[1]", "data.path", "data=text"]),
    ],
)
def test_mixture(train, corpus, second, words):
    refused(train.bare(*SMALL, "data=mixture", MIXTURE.format(corpus, second)), *words)


def test_unwritable_folder(train, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    refused(train("hydra.run.dir=file/run"), "file")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_unwritable_token_cache(train, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    refused(train("data.cache_dir=file/cache"), "data.cache_dir")


def test_diverged(train, tmp_path):
    """A loss that is no number ends the run with status 1; the checkpoint from before stays."""
    result = train("optimizer.lr=1e30", "optimizer.gradient_clip=0", "schedule.warmup_fraction=0", "hydra.run.dir=run")
    assert result.returncode == 1
    assert "diverged" in result.stderr
    assert summary_of(tmp_path / "run")["diverged"] is True
    assert "optimizer.lr" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 3
    succeeded(train("hydra.run.dir=other"))
