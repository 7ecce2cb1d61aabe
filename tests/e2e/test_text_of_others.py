"""Names and texts of others reach a terminal as text: what a command prints has no control character but line ends."""

import json
import unicodedata
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mla_lm import AttentionConfig
from mla_lm.terminal import cli
from scripts import compare, convert, evaluate, export, generate, import_hf
from tests.conftest import Result, call_main, refused, succeeded
from tests.interop.hf.models import make_folder, make_run
from tests.interop.hf.test_import import LLAMA

CLEAR, TITLE = "\x1b[2J", "\x1b]0;x\x07"  # clear the screen, set the window's title


def call(program, folder: Path, *arguments: str) -> Result:
    return call_main(lambda: cli.run(program.main), [program.__name__, *arguments], folder)


def harmless(result: Result, *shown: str) -> Result:
    """Nothing that a terminal would obey; what stands for it is there."""
    text = result.stdout + result.stderr
    assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"]
    for word in shown:
        assert word in text
    return result


def test_the_name_of_a_tensor(tmp_path):
    make_folder(tmp_path / "in", LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)))
    weights = tmp_path / "in" / "model.safetensors"
    save_file({**load_file(weights), CLEAR: torch.zeros(2)}, weights, {"format": "pt"})
    refused(harmless(call(import_hf, tmp_path, "in", "run"), r"\x1b[2J"))


def test_columns(train, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({TITLE: "text"}) + "\n")
    refused(harmless(train("data.files=rows.jsonl"), r"\x1b]0;x\x07"), "data.column")
    make_run(tmp_path / "run", AttentionConfig())
    refused(harmless(call(evaluate, tmp_path, "run", "--files", "rows.jsonl"), r"\x1b]0;x\x07"), "--column")
    refused(harmless(train("data.files=rows.jsonl", f"data.column='{CLEAR}'"), r"no column \x1b[2J"))


def test_a_key_of_a_configuration(tmp_path):
    make_run(tmp_path / "run", AttentionConfig())
    file = tmp_path / "run" / "config.yaml"
    whole = yaml.safe_load(file.read_text())
    for keys, shown in (
        ({CLEAR: 1}, r"key \x1b[2J"),
        ({"seed": CLEAR}, r'seed="\e[2J"'),
        ({"data": {"parts": [{f"a\n{TITLE}": 1}]}}, r"\x1b]0;x\x07"),
    ):
        file.write_text(yaml.safe_dump(whole | keys))
        refused(harmless(call(generate, tmp_path, "run", "--prompt", "a"), shown), "config.yaml")


@pytest.fixture
def runs(train, tmp_path, corpus) -> Path:
    """A multirun whose text, run folders and settings have such names."""
    (tmp_path / f"a{CLEAR}b.txt").write_text(corpus.read_text())
    data = [f"data.files='a{CLEAR}b.txt'", f"data.cache_dir='c{TITLE}'", f"data.prompts=['{TITLE}']"]
    names = f"data.tokenizer.kind=bpe,bytes logger.name='{CLEAR}','{TITLE}'".split()
    few = ("trainer.max_steps=1", "val_every_n_steps=1")
    result = succeeded(train("-m", *data, *names, *few, f"hydra.sweep.dir='sweep{CLEAR}'"))
    harmless(result, r"a\x1b[2Jb.txt", r"sweep\x1b[2J", r"c\x1b]0;x\x07", "best ")
    return tmp_path / f"sweep{CLEAR}"


def test_paths_and_settings(runs, train, tmp_path):
    """Of every command, where it succeeds."""
    run, few = runs / "0", ("--prompt", "a", "--max-tokens", "2")
    more = "trainer.max_steps=2"
    harmless(succeeded(train.bare(f"ckpt_path={cli.quoted(run)}", more)), r"sweep\x1b[2J")
    harmless(succeeded(call(compare, tmp_path, str(runs), "--across-data")))
    harmless(succeeded(call(generate, tmp_path, str(run), "--versus", str(run), *few)))
    harmless(succeeded(call(evaluate, tmp_path, str(run))), r"sweep\x1b[2J")
    harmless(succeeded(call(export, tmp_path, str(run), f"out{CLEAR}", "--check")), r"out\x1b[2J")
    harmless(succeeded(call(import_hf, tmp_path, f"out{CLEAR}", f"in{CLEAR}")), r"in\x1b[2J")
    sizes = ("--kv-compressed-dim", "8", "--rope-dim", "4")
    refused(harmless(call(convert, tmp_path, f"in{TITLE}", "out", *sizes), r"in\x1b]0"))
    refused(harmless(call(evaluate, tmp_path, str(run), "--files", f"{TITLE}*")), "--files")
    refused(harmless(call(generate, tmp_path, str(run), f"--{CLEAR}")), "--help")
    refused(harmless(train(f"seed{CLEAR}=1")), "seed")
    refused(harmless(train(f"model='{CLEAR}'")), "model")
