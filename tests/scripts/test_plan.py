"""scripts.plan: what it says, and what it refuses."""

import re
import shlex

import pytest
import torch

from mla_lm import AttentionConfig, TransformerConfig
from mla_lm.config import TrainConfig
from mla_lm.model.memory import training_memory
from mla_lm.model.size import model_size
from mla_lm.runs.report import human_bytes
from mla_lm.terminal import cli
from scripts import plan
from tests.conftest import ROOT, Result, call_main, refused, succeeded

BASELINES = ("mla", "mha", "gqa", "mqa")  # the model itself, and those beside it


def call(*arguments: str) -> Result:
    return call_main(lambda: cli.run(plan.main, TrainConfig), ["scripts.plan", *arguments], ROOT)


def test_what_is_printed():
    options = ("model=mla_tiny", "trainer.precision=bf16-mixed", "trainer.accelerator=cpu", "tokens_per_step=32768")
    lines = succeeded(call(*options, "--batch", "3", "--context", "100")).stdout.splitlines()
    attention = AttentionConfig(kind="mla", kv_compressed_dim=40, rope_dim=8, nope_dim=24, value_dim=32)
    config = TransformerConfig(3, 128, 4, 128, 400, attention, vocab_size=4096)
    size, memory = model_size(config), training_memory(config, 64, torch.bfloat16, "cpu", "muon")
    assert lines[1] == f"parameters  {size.parameters:,}, without the embedding {size.non_embedding_parameters:,}"
    assert f"{size.flops_per_token / 1e6:,.1f}M per token" in lines[2]
    assert "32,768 tokens a step in 4 micro-batches, 64 x 128 tokens at once" in lines[4]
    rows = {re.split("  +", line)[0]: re.findall(r"[\d,.]+ [KMGT]?i?B", line) for line in lines}
    assert rows["gradients"] == 2 * [human_bytes(4 * size.parameters)]
    assert rows["activations"] == [human_bytes(memory.activations), human_bytes(memory.checkpointed_activations)]
    assert rows["most at once"] == [human_bytes(memory.peak(checkpointing, 4)) for checkpointing in (False, True)]
    cache = {line[2:8].strip(): line.split() for line in lines if line[2:8].strip() in BASELINES}
    assert set(cache) == set(BASELINES)
    assert cache["mla"] == [">", "mla", str(3 * 48 * 2), *human_bytes(300 * 3 * 48 * 2).split(), "0.188"]
    assert cache["mha"][-1] == "1.000"


def test_the_examples_of_the_help():
    """Each can be run; the published attention caches 576 elements per token and layer (arXiv 2405.04434)."""
    commands = re.findall(r"python -m scripts\.plan((?:[^\n]*\\\n)*[^\n]*)", plan.EXAMPLES)
    outputs = [succeeded(call(*shlex.split(c.replace("\\\n", "")))).stdout for c in commands]
    assert len(outputs) == 4
    for output, layers in zip(outputs[2:], (27, 60), strict=True):
        per_token = int(re.search(r"> mla +([\d,]+)", output)[1].replace(",", ""))
        assert per_token in (layers * 576 * 2, layers * 576 * 4)  # in bf16, or in fp32 on an old CPU


def test_a_sequence_longer_than_a_step_has_tokens():
    output = succeeded(call("model=mla_tiny", "model.seq_len=5120")).stdout
    assert "5,120 tokens a step, 1 x 5,120 tokens at once" in output


def test_a_gpu_is_planned_for_where_there_is_none():
    assert "on each cuda device in bf16-mixed" in succeeded(call("trainer=gpu", "model=mla_tiny")).stdout
    assert "8,192 tokens a step" in succeeded(call("trainer=gpu", "model=mla_small")).stdout
    output = succeeded(call("trainer=gpu", "trainer.precision=16-mixed", "model=mla_tiny")).stdout
    assert "float16" in output


def test_vocabulary(tmp_path):
    for options, size in (
        (("data.tokenizer.vocab_size=999",), "999"),
        (("data.tokenizer.kind=bytes",), "257"),
        (("data=characters", "model.vocab_size=66"), "66"),
    ):
        assert f"vocabulary {size}\n" in succeeded(call("model=mla_tiny", *options)).stdout
    refused(call("data=characters"), "data.tokenizer.kind=characters", "model.vocab_size")
    refused(call("model.vocab_size=0"), "model.vocab_size=0")
    refused(call("data.tokenizer.kind=file", f"data.tokenizer.file={tmp_path / 'missing.json'}"), "missing.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.num_layer=3"], ("unknown key model.num_layer", "model.num_layers")),
        (["+model.width=3"], ("unknown key model.width",)),
        (["model.seq_len=0"], ("model.seq_len=0 must be at least 1",)),
        (["model.num_heads=7"], ("d_model=192", "num_heads=7")),
        (["trainer.devices=0"], ("trainer.devices=0",)),
        (["tokens_per_step=0"], ("tokens_per_step=0",)),
        (["--batch", "0"], ("--batch 0",)),
        (["--batch", "many"], ("--batch", "many")),
        (["--context", "0"], ("--context 0",)),
        (["--context", "1025"], ("--context 1025", "model.seq_len=1024")),
        (["--layers", "3"], ("--layers",)),
        (["mla_small"], ("mla_small", "key=value")),
    ],
    ids=str,
)
def test_mistakes(arguments, words):
    refused(call(*arguments), *words)
