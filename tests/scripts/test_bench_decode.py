"""scripts.bench decode at a tiny size: what it compares is the same, and its JSON is as promised."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from mla_lm import AttentionConfig, Transformer
from mla_lm.attention import cpu_kernel
from mla_lm.inference.generate import generate
from mla_lm.model.size import model_size
from mla_lm.terminal import cli
from scripts.bench import __main__ as bench
from scripts.bench import decode, measure
from tests.conftest import call_main, refused, succeeded

TINY = {"num_layers": 2, "d_model": 48, "ff_hidden": 64, "vocab_size": 61}


@pytest.fixture
def tiny(monkeypatch):
    attention = AttentionConfig(kind="mla", kv_compressed_dim=16, rope_dim=16, nope_dim=4, value_dim=8)
    monkeypatch.setattr(decode, "MLA", replace(decode.MLA, **TINY, attention=attention))
    monkeypatch.setattr(decode, "MHA", replace(decode.MHA, **TINY))
    monkeypatch.setattr(decode, "LARGE", 2**20)


def call(folder, *arguments):
    return call_main(lambda: cli.run(bench.main), ["bench", "decode", *arguments], folder)


def test_rows_and_ratios(tiny, tmp_path):
    sizes = ("--context", "5,60", "--batch", "2,1", "--precision", "fp32,bf16", "--repeats", "2")
    result = succeeded(call(tmp_path, *sizes, "--json", "out.json"))
    figures = json.loads((tmp_path / "out.json").read_text())
    rows = figures["rows"]
    assert [(row["precision"], row["batch"], row["context"]) for row in rows] == [
        (precision, batch, context) for precision in ("fp32", "bf16") for batch in (2, 1) for context in (5, 60)
    ]
    assert all(row["same tokens"] for row in rows if row["precision"] == "fp32")
    for peer in ("transformers", "mha"):
        assert figures["ratios"][peer] == [row[f"over {peer}"] for row in rows[:2]]
    assert all(row[f"over {peer}"] > 0 for row in rows for peer in decode.PEERS)
    assert figures["tokens_per_second"] == [row["tokens/s"] for row in rows[:2]]
    assert rows[3]["cache MiB"] == rows[1]["cache MiB"] / 2  # one sequence, not two
    assert "over transformers" in result.stdout


def test_a_cache_of_int8_beside_ours(tiny, tmp_path):
    sizes = ("--context", "60", "--batch", "1", "--precision", "bf16", "--repeats", "1", "--cache", "int8")
    succeeded(call(tmp_path, *sizes, "--json", "out.json"))
    row = json.loads((tmp_path / "out.json").read_text())["rows"][0]
    assert row["int8 over ours"] > 0
    assert row["int8 over mha"] > 0
    # a latent and a key of 16 each, and their two scales of two bytes
    assert row["ours, int8 MiB"] == row["cache MiB"] * (32 + 2 * 2) / (2 * 32)


@pytest.mark.slow
def test_compiled_it_makes_the_same_tokens(tiny, tmp_path, monkeypatch):
    asked = set()

    def watched(model, *args, **options):
        asked.add((model.config.attention.kind, options["compiled"]))
        return generate(model, *args, **options)

    monkeypatch.setattr(decode, "generate", watched)
    counters.clear()
    cpu_kernel._functions.cache_clear()
    sizes = ("--context", "5", "--batch", "1", "--precision", "fp32", "--repeats", "1")
    succeeded(call(tmp_path, *sizes, "--compile", "--json", "out.json"))
    assert asked == {("mla", True), ("mha", True)}
    assert counters["stats"]["unique_graphs"] >= 2
    assert cpu_kernel._functions.cache_info().currsize == 1  # MLA's step has called it
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["same tokens"]


@torch.no_grad()
def test_their_cache_is_what_they_would_have_stored(tiny):
    torch.manual_seed(0)
    model = Transformer(replace(decode.MLA, seq_len=32)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    given = decode.Theirs(model, batch=2, context=20)
    tokens = torch.arange(20).expand(2, -1)
    stored = given.model(tokens, use_cache=True).past_key_values
    for ours, own in zip(given.cache.layers, stored.layers, strict=True):
        torch.testing.assert_close(ours.keys, own.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, own.values, rtol=1e-4, atol=1e-4)
    before = [layer.keys for layer in given.cache.layers]
    prompts = torch.cat((tokens, torch.tensor([[3], [4]])), dim=1)
    for decoded in (given.decode, given.step):
        assert torch.equal(decoded(prompts, 5), decode.Ours(model, 2, 20, 5).decode(prompts, 5))
        assert all(torch.equal(a, layer.keys) for a, layer in zip(before, given.cache.layers, strict=True))


@torch.no_grad()
def test_transformers_has_nothing_to_warn_of(tiny, caplog):
    """A prompt may end with id 0."""
    theirs = decode.Theirs(Transformer(replace(decode.MLA, seq_len=32)).eval(), batch=2, context=20)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # which passes nothing on to the root, where caplog listens
    try:
        theirs.decode(torch.zeros(2, 21, dtype=torch.int64), 5)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_bytes_of_a_step(tiny):
    """Each weight once, the embedding's not, the head's though it is the same matrix; the cache without its room."""
    model = Transformer(replace(decode.MLA, seq_len=32)).eval()
    size = model_size(model.config)
    weights = size.parameters - TINY["vocab_size"] * TINY["d_model"] + model.head.weight.numel()
    with torch.no_grad():
        given = decode.Ours(model, batch=3, context=20, room=5)
    assert given.bytes_read == 4 * (weights + TINY["num_layers"] * 3 * 20 * (16 + 16))


def test_share_of_the_bytes_time(tiny, tmp_path, monkeypatch):
    """32 steps take as long as reading a MiB: so many of their bytes are a share of it."""
    monkeypatch.setattr(measure, "interleaved", lambda turns, repeats: {name: [3.0] for name in turns})
    monkeypatch.setattr(decode.Ours, "bytes_read", 2**12)
    succeeded(call(tmp_path, "--context", "20", "--batch", "1", "--precision", "fp32", "--json", "out.json"))
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["of the bytes' time"] == 32 * 2**12 / 2**20


def test_mha_has_as_many_parameters():
    mla, mha = (model_size(replace(config, seq_len=64)).parameters for config in (decode.MLA, decode.MHA))
    assert mha == pytest.approx(mla, rel=0.01)


@pytest.mark.parametrize(
    "arguments", [("--context", "0"), ("--context", "8,x"), ("--batch", "-1"), ("--precision", "fp32,int4")]
)
def test_refused(arguments, tmp_path):
    refused(call(tmp_path, *arguments), arguments[0])


def test_compiling_without_a_compiler(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(call(tmp_path, "--compile"), "--compile", "no-such-compiler", "CXX=")
