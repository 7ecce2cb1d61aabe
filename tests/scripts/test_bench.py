"""scripts.bench at tiny sizes: what is compared is the same work, and the JSON has what it should. No rates."""

import json
import math
import os
from argparse import Namespace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mla_lm.data.config import DataConfig, TokenizerConfig
from mla_lm.data.open_store import open_store
from mla_lm.errors import UserError
from mla_lm.model.size import model_size
from mla_lm.runs.folder import RunFolder
from mla_lm.terminal import cli
from scripts.bench import __main__ as program
from scripts.bench import loader, measure, peers, shakespeare
from scripts.bench import train as bench_train
from scripts.bench.loader import TimedLoader
from scripts.bench.train import Contender, our_config
from tests.conftest import Result, call_main, refused, rows_of, succeeded

WORK = ("--layers=2", "--d-model=64", "--heads=4", "--seq-len=32", "--sequences=3", "--no-compile", "--repeats=2")
NANOGPT = os.environ.get("NANOGPT")
with_nanogpt = pytest.mark.skipif(not NANOGPT, reason="needs nanoGPT: set NANOGPT to the folder of a clone")
DEFAULT = Namespace(layers=6, d_model=384, heads=6, seq_len=256, sequences=16, vocab_size=65)
TINY = Namespace(
    layers=1, d_model=32, heads=2, seq_len=64, sequences=32, vocab_size=8192, device="cpu", optimizer="adamw"
)


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 1e-9)  # one step each


def call(folder: Path, *arguments: str) -> Result:
    return call_main(lambda: cli.run(program.main), ["scripts.bench", *arguments], folder)


def figures(folder: Path, *arguments: str) -> dict:
    out = folder / "out.json"
    result = succeeded(call(folder, *arguments, f"--json={out}"))
    written = json.loads(out.read_text())
    assert {"setup", "arguments", "tokens_per_second", "model_flops_utilization", "ratios", "rows"} <= set(written)
    assert written["setup"]["threads"] == torch.get_num_threads()
    assert all(name in result.stdout for name in written["rows"][0])
    return written


# train


def test_train(tmp_path):
    written = figures(tmp_path, "train", *WORK, "--precision=32-true")
    rows = {row["who"]: row for row in written["rows"]}
    assert list(rows) == ["mla", "mha", "transformers"]
    assert rows["mla"]["parameters"] == rows["transformers"]["parameters"]
    # the same weights on the same tokens; other tokens or other weights differ from the second digit on
    assert rows["mla"]["first loss"] == pytest.approx(rows["transformers"]["first loss"], rel=1e-5)
    assert rows["mha"]["first loss"] == pytest.approx(math.log(65), rel=0.05)
    assert written["tokens_per_second"] == rows["mla"]["tokens/s"]
    assert written["ratios"] == {
        "nanogpt": None,
        "transformers": rows["transformers"]["ours / it"],
        "mha": rows["mha"]["ours / it"],
    }
    assert written["peak_memory_ratios"] == dict.fromkeys(("nanogpt", "transformers", "mha"))


@with_nanogpt
def test_train_beside_nanogpt(tmp_path):
    rows = figures(tmp_path, "train", *WORK, "--precision=bf16-mixed", f"--nanogpt={NANOGPT}")["rows"]
    assert [(row["who"], row["precision"]) for row in rows[2:4]] == [
        ("nanogpt", "32-true"),
        ("nanogpt", "bf16-mixed"),
    ]
    assert rows[2]["first loss"] == pytest.approx(rows[3]["first loss"], rel=1e-2)
    assert rows[2]["first loss"] == pytest.approx(math.log(65), rel=0.05)


def test_train_in_fp8(tmp_path):
    rows = figures(tmp_path, "train", *WORK, "--precision=bf16-mixed", "--fp8")["rows"]
    assert [(row["who"], row["precision"]) for row in rows[:3]] == [
        ("mla", "bf16-mixed"),
        ("mha", "bf16-mixed"),
        ("mla", "bf16-mixed fp8"),
    ]
    assert rows[2]["first loss"] == pytest.approx(rows[0]["first loss"], rel=1e-2)
    assert rows[2]["first loss"] != rows[0]["first loss"]
    refused(call(tmp_path, "train", *WORK, "--precision=32-true", "--fp8"), "trainer.precision=bf16-mixed")


@with_nanogpt
def test_nanogpt_has_the_size_of_our_mha():
    model = peers.nanogpt(Path(NANOGPT), n_layer=6, n_embd=384, n_head=6, block_size=256, vocab_size=65)
    mha = model_size(our_config("mha", DEFAULT))
    positions = 256 * 384
    assert sum(p.numel() for p in model.parameters()) == mha.parameters + positions
    assert peers.nanogpt_flops_per_token(model) == mha.flops_per_token


@pytest.mark.parametrize(("d_model", "heads", "vocab_size"), [(384, 6, 65), (384, 6, 32768), (768, 12, 50257)])
def test_mla_has_the_parameters_of_mha(d_model, heads, vocab_size):
    args = Namespace(**{**vars(DEFAULT), "d_model": d_model, "heads": heads, "vocab_size": vocab_size})
    mla, mha = model_size(our_config("mla", args)), model_size(our_config("mha", args))
    assert mla.parameters == pytest.approx(mha.parameters, rel=0.01)
    assert mla.flops_per_token == pytest.approx(mha.flops_per_token, rel=0.01)
    assert mla.cache_elements_per_token_per_layer <= 0.21 * mha.cache_elements_per_token_per_layer


@pytest.mark.parametrize(
    ("kind", "optimizer"), [("mla", "adamw"), ("mla", "muon"), ("mha", "adamw"), ("transformers", "adamw")]
)
def test_each_learns(kind, optimizer):
    """A step that did nothing would be fast."""
    args = Namespace(**{**vars(TINY), "sequences": 4, "seq_len": 16, "vocab_size": 65, "optimizer": optimizer})
    training, later = (bench_train.build(Contender(kind, "32-true", False), args) for _ in range(2))
    training.run(40)  # the rate is still on its way up
    model, trained = (t.module.net if kind != "transformers" else t.model for t in (later, training))
    model.load_state_dict(trained.state_dict())
    later.run(1)
    assert later.first_loss < training.first_loss - 0.1


def test_peak_memory_of_a_process_of_its_own():
    """transformers holds the logits of all tokens, in the precision of the model and in fp32."""
    logits = 4 * 64 * 32 * 8192
    peak = measure.in_own_process(bench_train.peak_memory, Contender("transformers", "32-true", False), TINY)
    assert 2 * logits < peak < 8 * logits


def test_resident_bytes():
    before = measure.resident_bytes()
    block = torch.ones(2**28, dtype=torch.uint8)
    assert measure.resident_bytes() - before == pytest.approx(len(block), rel=0.1)
    del block
    assert measure.resident_bytes() - before < 2**25
    assert measure.resident_bytes(peak=True) - before > 0.9 * 2**28


# loader


def test_loader(tmp_path, corpus):
    arguments = (f"--files={corpus}", f"--cache-dir={tmp_path}", "--vocab-size=300")
    written = figures(tmp_path, "loader", *WORK, *arguments)
    alone, training = written["rows"]
    assert written["tokens_per_second"] == alone["tokens/s"]
    assert written["ratios"]["training"] == alone["over training"]
    assert written["stall"] == training["stall"]
    assert 0 < written["stall"] < 1
    assert written["tokenized_megabytes_per_second"] > 0


def test_waiting_for_a_loader_is_noted():
    clock = count()  # which each look at it advances by a second

    def slow():
        for batch in range(3):
            for _ in range(batch):
                next(clock)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        timed = TimedLoader(slow())
        assert list(timed) == [0, 1, 2]
    assert timed.waits == [1, 2, 3, 1]


# shakespeare


def test_our_validation_split_is_nanogpts_and_the_end_of_text(tmp_path, corpus):
    text = corpus.read_text()
    data = DataConfig(
        "characters", files=str(corpus), tokenizer=TokenizerConfig(kind="characters"), cache_dir=str(tmp_path)
    )
    store = open_store(data)
    ids = {character: store.tokenizer.token_to_id(character) for character in sorted(set(text))}
    theirs = [ids[character] for character in text[int(len(text) * 0.9) :]]
    assert store.tokens("validation")[:].tolist() == [*theirs, store.end_of_text_id]


def test_losses_so_far(run, tmp_path):
    run = RunFolder(run)
    expected = [row["val/loss"] for row in rows_of(run.path) if "val/loss" in row]
    assert len(expected) == 2
    assert shakespeare.losses_of(run) == expected
    whole = run.metrics_file.read_text()
    run.metrics_file.write_text(whole + '{"step": 7, "val/lo')  # as a reader may find it
    assert shakespeare.losses_of(run) == expected
    assert shakespeare.losses_of(RunFolder(tmp_path / "none")) == []


def test_watch(tmp_path):
    """The program ends when it has been looked at for the third time."""
    looked = []

    def look(seconds: float) -> None:
        looked.append(seconds)
        if len(looked) == 3:
            (tmp_path / "pipe").write_text("enough")

    os.mkfifo(tmp_path / "pipe")
    program = "import os; assert os.environ['WORD'] == 'a b'; open('pipe').read()"
    seconds = shakespeare.watch(["-c", program], tmp_path, {"WORD": "a b"}, look)
    assert len(looked) >= 3
    assert looked == sorted(looked)
    assert seconds >= looked[2]
    with pytest.raises(UserError, match="status 3: no luck"):
        shakespeare.watch(["-c", "print('no luck'); raise SystemExit(3)"], tmp_path)


@with_nanogpt
def test_shakespeare(tmp_path, corpus):
    before = sorted(Path(NANOGPT).rglob("*"))
    overrides = ("trainer.max_steps=4", "val_every_n_steps=2", "compile=false", "samples.max_tokens=0")
    written = figures(tmp_path, "shakespeare", f"--nanogpt={NANOGPT}", f"--text={corpus}", "--steps=2", *overrides)
    assert sorted(Path(NANOGPT).rglob("*")) == before
    rows = {row["who"]: row for row in written["rows"]}
    assert list(rows) == ["nanogpt", "ours, cold", "ours, warm"]
    assert rows["ours, cold"]["last loss"] == pytest.approx(rows["ours, warm"]["last loss"], rel=1e-3)
    for name, key in (("cold", "nanogpt"), ("warm", "nanogpt_warm")):
        row = rows[f"ours, {name}"]
        reached = row["last loss"] <= rows["nanogpt"]["last loss"]
        assert (written["ratios"][key] is not None) == reached
        assert not reached or row["seconds to nanogpt's loss"] <= row["seconds"]


@with_nanogpt
def test_loss_of_nanogpt_is_over_all_tokens_but_the_first():
    torch.manual_seed(0)
    model = peers.nanogpt(Path(NANOGPT), n_layer=1, n_embd=16, n_head=2, block_size=64, vocab_size=7).eval()
    tokens = np.random.default_rng(0).integers(7, size=200).astype(np.uint16)
    ids = torch.from_numpy(tokens.astype(np.int64))
    nats = [model(x[None], y[None])[1] * len(y) for x, y in zip(ids[:-1].split(64), ids[1:].split(64), strict=True)]
    assert shakespeare.loss_of_nanogpt(model, tokens) == pytest.approx(sum(nats).item() / 199, rel=1e-5)


# what is shared


def test_measurements_take_turns():
    calls = []
    turns = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}
    assert measure.interleaved(turns, 2) == {"a": [4.0, 7.0], "b": [5.0, 8.0], "c": [6.0, 9.0]}
    assert "".join(calls) == "abcabcabc"


def test_a_slow_round_drops_out_of_the_ratio():
    assert measure.median_ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == 2.0


def test_rounds_have_enough_steps(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 2.0)
    assert measure.steps_in_a_round(lambda steps: 0.3 * steps) == 7
    assert measure.steps_in_a_round(lambda steps: 5.0 * steps) == 1


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (True, "yes"), (1234567, "1,234,567"), (0.12345, "0.123"), (54321.7, "54,322")]
)
def test_cells(value, shown):
    assert measure.cell(value) == shown


@pytest.mark.parametrize("command", [("train",), ("shakespeare", "--text=text.txt")])
def test_a_folder_that_is_not_nanogpt(tmp_path, command):
    refused(call(tmp_path, *command, f"--nanogpt={tmp_path}"), f"--nanogpt {tmp_path}", "no model.py")


def test_sizes_that_cannot_be(tmp_path):
    refused(call(tmp_path, "train", "--d-model=10", "--heads=3"), "d_model=10 is not divisible by num_heads=3")
    refused(call(tmp_path, "train", "--device=cuda"), "--device cuda: this machine has none")
    refused(call(tmp_path, "train", "--repeats=0"), "0 must be a whole number above 0")
    refused(call(tmp_path, "trane"), "trane")


def test_every_command_has_help(tmp_path):
    overview = succeeded(call(tmp_path, "--help")).stdout
    for command in program.COMMANDS:
        assert command in overview
        assert "--json" in succeeded(call(tmp_path, command, "--help")).stdout
