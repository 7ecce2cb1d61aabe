"""train.py from the command line to the run folder."""

import json
import math
from itertools import zip_longest
from pathlib import Path

import pytest
import torch

import mla_lm
from mla_lm.attention.kv_cache import ModelCache
from mla_lm.data.open_store import open_store
from mla_lm.data.tokenizer import end_of_text_id
from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.study.compose import train_config
from mla_lm.terminal import cli
from mla_lm.training.datamodule import TextDataModule
from scripts import evaluate, plan
from tests.conftest import ROOT, SMALL, call_main, refused, rows_of, succeeded, summary_of

SUMMARY = [
    "finished",
    "diverged",
    "attention",
    "num_layers",
    "d_model",
    "num_heads",
    "parameters",
    "non_embedding_parameters",
    "seq_len",
    "seed",
    "steps",
    "tokens_seen",
    "train_loss",
    "val_loss",
    "val_perplexity",
    "val_bits_per_byte",
    "test_loss",
    "test_perplexity",
    "test_bits_per_byte",
    "kv_cache_elements_per_token_per_layer",
    "kv_cache_bytes_per_token",
    "kv_cache_bytes_at_seq_len",
    "kv_cache_vs_mha",
    "tokens_per_second",
    "model_flops_utilization",
    "peak_memory_bytes",
    "train_seconds",
    "total_seconds",
    "precision",
    "accelerator",
    "processor",
    "threads",
    "torch_version",
    "git_commit",
    "data_fingerprint",
    "config_hash",
]
METRICS = [
    "train/loss",
    "train/perplexity",
    "train/lr",
    "train/grad_norm",
    "train/tokens",
    "train/tokens_per_second",
    "train/mfu",
    "val/loss",
    "val/perplexity",
    "val/bits_per_byte",
    "test/loss",
    "test/perplexity",
    "test/bits_per_byte",
    "kv_cache/bytes_per_token",
    "kv_cache/mib_at_seq_len",
    "kv_cache/vs_mha",
    "memory/peak_mib",
]


def test_what_a_run_leaves(runs):
    run = runs / "mla"
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    checkpoints = {f"checkpoints/{name}.ckpt" for name in ("last", "last-1", "best")}
    assert files == {"config.yaml", "origin", "tokenizer.json", "metrics.jsonl", "summary.json"} | checkpoints

    summary = summary_of(run)
    assert list(summary) == SUMMARY
    assert summary["finished"] is True
    assert summary["steps"] == 6
    assert summary["tokens_seen"] == 6 * 256
    assert summary["val_perplexity"] == pytest.approx(math.exp(summary["val_loss"]))
    assert all(summary[key] is not None for key in SUMMARY if key != "git_commit")

    rows = rows_of(run)
    assert set().union(*rows) - {"step", "tokens", "seconds"} == set(METRICS)
    assert [row["step"] for row in rows if "val/loss" in row] == [3, 6]
    assert all(row["tokens"] == row["step"] * 256 for row in rows)
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)

    end = (runs / "mla.out").read_text().splitlines()[-4:]
    assert [line.split()[0] for line in end] == ["run", "resume", "sample", "compare"]

    model, tokenizer, config = mla_lm.load_run(run)
    tokens = torch.tensor([tokenizer.encode("def main():").ids])
    with torch.no_grad():
        assert model(tokens).shape == (1, tokens.size(1), config.model.vocab_size)
        cache = model.new_cache(batch_size=1, max_len=16)
        torch.testing.assert_close(model(tokens, cache=cache), model(tokens))
    assert isinstance(cache, ModelCache)
    assert cache.length == tokens.size(1)
    assert cache.nbytes == 16 * summary["kv_cache_bytes_per_token"]


def test_an_int8_cache_is_measured_in_place_of_the_other(train, tmp_path):
    succeeded(train("kv_cache_dtype=int8", "hydra.run.dir=run"))
    summary, per_token = summary_of(tmp_path / "run"), 2 * (20 + 2 * 2)  # two layers, two scales in each
    assert summary["kv_cache_bytes_per_token"] == per_token
    assert summary["kv_cache_bytes_at_seq_len"] == 32 * per_token
    assert summary["kv_cache_vs_mha"] == per_token / (2 * 128 * 4)
    measured = [row["kv_cache/bytes_per_token"] for row in rows_of(tmp_path / "run") if "kv_cache/vs_mha" in row]
    assert measured == [per_token, per_token]
    succeeded(train("ckpt_path=run", "kv_cache_dtype=null", f"trainer.max_steps={summary['steps'] + 1}"))
    assert summary_of(tmp_path / "run")["kv_cache_bytes_per_token"] == 2 * 20 * 4
    refused(train("kv_cache_dtype=int4"), "kv_cache_dtype=int4", "int8")


def test_figures_are_those_of_the_best_checkpoint(train, tmp_path):
    """test_loss is what the saved weights give on every token of the test split, computed here from scratch."""
    succeeded(train("hydra.run.dir=run", "optimizer.lr=0.01"))
    run = tmp_path / "run"
    model, tokenizer, config = mla_lm.load_run(run)
    tokens = torch.from_numpy(open_store(config.data).tokens("test")[:].astype("int64"))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, config.model.seq_len):
            window = tokens[start : start + config.model.seq_len + 1]
            logits = model(window[None, :-1])[0]
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    targets = [tokenizer.id_to_token(i) for i in tokens[1:].tolist()]
    text_bytes = sum(len(token) for token in targets if token != "<|endoftext|>")  # a byte is written as one sign
    summary = summary_of(run)
    assert summary["test_loss"] == pytest.approx(nats / len(targets), rel=1e-5)
    assert summary["test_bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    best = min((row for row in rows_of(run) if "val/loss" in row), key=lambda row: row["val/loss"])
    assert summary["val_loss"] == best["val/loss"]


def losses_of(run: Path) -> list[float]:
    return [row["train/loss"] for row in rows_of(run) if "train/loss" in row]


def test_accumulation_changes_nothing_but_rounding(train, runs, tmp_path):
    succeeded(train("micro_batch_tokens=64", "hydra.run.dir=run"))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(runs / "mla"), abs=1e-4)


def test_learns(train, tmp_path):
    """debug=overfit: the same batch again and again drives the loss towards 0."""
    succeeded(train("debug=overfit", "trainer.max_steps=60", "optimizer.lr=0.01", "hydra.run.dir=run"))
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < 0.25 * losses[0]


def options() -> list[tuple[str, ...]]:
    """The first option of every group, the second of every group, and so on: each is in one of them."""
    groups = ("optimizer", "schedule", "trainer", "logger", "debug")
    left_out = ("trainer=gpu", "debug=overfit")
    files = (sorted((ROOT / "conf" / group).glob("*.yaml")) for group in groups)
    names = ([f"{file.parent.name}={file.stem}" for file in of_group] for of_group in files)
    together = zip_longest(*([name for name in of_group if name not in left_out] for of_group in names))
    return [tuple(filter(None, chosen)) for chosen in together]


@pytest.mark.parametrize("chosen", options(), ids=" ".join)
def test_every_option(train, tmp_path, chosen):
    succeeded(train(*chosen, "trainer.max_steps=2", "hydra.run.dir=run"))
    assert summary_of(tmp_path / "run")["steps"] == 2
    if "debug=profiler" in chosen:
        assert "run_training_batch" in (tmp_path / "run" / "fit-profile.txt").read_text()
    if "logger=tensorboard" in chosen:
        assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_a_tokenizer_file(train, runs, tmp_path):
    own = f"data.tokenizer.file={runs / 'mla' / 'tokenizer.json'}"
    succeeded(train("data.tokenizer.kind=file", own, "hydra.run.dir=again"))
    assert summary_of(tmp_path / "again")["test_loss"] == summary_of(runs / "mla")["test_loss"]


def test_characters(train, tmp_path):
    succeeded(train("data=characters", "hydra.run.dir=run"))
    assert summary_of(tmp_path / "run")["finished"]


def test_standard_library(train, corpus, tmp_path, monkeypatch):
    """The default corpus and vocabulary, on a small library."""
    library = tmp_path / "library"
    library.mkdir()
    text = corpus.read_text()
    for number in range(60):  # enough for each split to have some
        (library / f"module{number}.py").write_text(text[4000 * number :][:4000])
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    result = succeeded(train.bare("model=mla_tiny", "debug=limit", "trainer.max_steps=2", "data.val_tokens=256",
                                  "tokens_per_step=128", "data.cache_dir=cache", "hydra.run.dir=run"))  # fmt: skip
    assert "Python standard library" in result.stdout
    assert summary_of(tmp_path / "run")["kv_cache_vs_mha"] <= 0.21


@pytest.mark.parametrize(
    "extra",
    [
        ("compile=true",),
        ("trainer.precision=bf16-mixed",),
        ("model.tie_embeddings=false", "model.use_bias=true"),
        ("model.activation_checkpointing=true", "model.attention.q_compressed_dim=24"),
    ],
)
def test_variants(train, tmp_path, extra):
    succeeded(train(*extra, "trainer.max_steps=2", "hydra.run.dir=run"))
    assert summary_of(tmp_path / "run")["finished"]


@pytest.mark.parametrize("size", ["tiny", "small", "medium"])
def test_overfitting_takes_every_size(size):
    train_config(ROOT / "conf", [f"model=mla_{size}", "debug=overfit"]).check()


SHORT_FIRST = ("schedule.short_seq_len=8", "schedule.short_fraction=0.5", "model.dropout=0", "trainer.max_steps=6")


@torch.no_grad()
def test_training_begins_on_short_windows(train, tmp_path):
    """The same tokens in the same order, cut so that attention sees no further than its piece."""
    succeeded(train(*SHORT_FIRST, "optimizer.lr=1e-9", "hydra.run.dir=run"))  # the weights stay as they are
    model, _, config = mla_lm.load_run(tmp_path / "run")
    data = TextDataModule(config, open_store(config.data))
    logged = [row["train/loss"] for row in rows_of(tmp_path / "run") if "train/loss" in row]
    for step, loss in enumerate(logged):
        batch = torch.stack([data.train_windows[i] for i in data.order().of_step(step, config.sequences_per_step)])
        inputs, targets = batch[:, :-1], batch[:, 1:]
        cut = model(inputs.reshape(-1, 8), targets.reshape(-1, 8)).item()
        whole = model(inputs, targets).item()
        assert abs(cut - whole) > 1e-4
        assert loss == pytest.approx(cut if step < 3 else whole, abs=2e-6)


def test_document_mask(train, tmp_path, corpus):
    """It reaches training, evaluation, and whoever loads the run; a new run from its weights decides for itself."""
    lines = [line for line in corpus.read_text().splitlines() if line.strip()]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = ("data.files=lines.jsonl", "trainer.max_steps=2")
    succeeded(train(*data, "data.document_mask=true", "hydra.run.dir=masked"))
    succeeded(train(*data, "hydra.run.dir=plain"))
    model, tokenizer, _ = mla_lm.load_run(tmp_path / "masked")
    assert model.config.document_token == end_of_text_id(tokenizer)
    masked, plain = (summary_of(tmp_path / name) for name in ("masked", "plain"))
    assert masked["train_loss"] != plain["train_loss"]
    assert masked["test_loss"] != plain["test_loss"]
    result = call_main(lambda: cli.run(evaluate.main), ["evaluate", "masked", "--json", "out.json"], tmp_path)
    succeeded(result)
    assert json.loads((tmp_path / "out.json").read_text())["loss"] == pytest.approx(masked["test_loss"], abs=1e-6)
    succeeded(train.bare("ckpt_path=masked", "trainer.max_steps=3"))
    data = [o for o in (*train.data, *data) if not o.startswith("data.tokenizer")]
    rest = ("trainer.accelerator=cpu", "logger=none", "tokens_per_step=64", "samples.max_tokens=0")
    succeeded(train.bare(*data, *rest, "init_from=masked", "hydra.run.dir=tuned"))
    assert mla_lm.load_run(tmp_path / "tuned")[0].config.document_token is None


def test_wandb_keeps_one_run_over_a_resume(train, tmp_path):
    run = tmp_path / "run"
    result = succeeded(train("logger=wandb", "tags=[a,b]", "hydra.run.dir=run"))
    assert result.stdout.splitlines()[-1].startswith("upload      wandb sync ")
    identity = (run / "wandb_id").read_text().strip()
    (first,) = (run / "wandb").glob("offline-run-*")
    resumed = succeeded(train.bare(f"ckpt_path={run}", "trainer.max_steps=8"))
    assert (run / "wandb_id").read_text().strip() == identity
    paths = sorted((run / "wandb").glob("offline-run-*"))
    folders = [path.name for path in paths]
    assert len(folders) == 2
    assert all(identity in name for name in folders)
    # what is not uploaded yet is named, in the order in which it was made
    assert resumed.stdout.splitlines()[-1] == f"upload      wandb sync {paths[0]} {paths[1]}"
    next(first.glob("*.wandb")).with_suffix(".wandb.synced").touch()  # as wandb sync marks it
    again = succeeded(train.bare(f"ckpt_path={run}", "trainer.max_steps=10"))
    assert str(first) not in again.stdout.splitlines()[-1]
    assert all(list((run / "wandb" / name).glob("*.wandb")) for name in folders)


def test_a_failed_job_leaves_no_wandb_run_to_the_next(train, tmp_path):
    """A job that diverges within training, then one that does not, each with its own wandb run."""
    result = train.bare("-m", *SMALL, *train.data, "logger=wandb", "optimizer.lr=1e30,1e-3", "hydra.sweep.dir=sweep",
                        "optimizer.gradient_clip=0", "schedule.warmup_fraction=0")  # fmt: skip
    assert result.returncode == 2
    assert "diverged" in result.stderr
    for job in ("0", "1"):
        identity = (tmp_path / "sweep" / job / "wandb_id").read_text().strip()
        assert [identity in path.name for path in (tmp_path / "sweep" / job / "wandb").glob("offline-run-*")] == [True]


def test_init_from(train, tmp_path):
    """Weights, tokenizer and model come from the other run, what the command line names does not."""
    succeeded(train("hydra.run.dir=first"))
    overrides = ("init_from=first", "model.seq_len=64", "optimizer.lr=1e-9", "hydra.run.dir=second")
    small = [o for o in train.data if not o.startswith("data.tokenizer")]
    common = ("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_steps=1", "tokens_per_step=128",
              "logger=none", "samples.max_tokens=0")  # fmt: skip
    succeeded(train.bare(*common, *small, *overrides))
    first, second = (mla_lm.load_run(tmp_path / name) for name in ("first", "second"))
    assert second[2].model.seq_len == 64
    assert second[2].model.d_model == first[2].model.d_model
    assert (first[2].schedule.short_seq_len, second[2].schedule.short_seq_len) == (256, None)
    assert {second[2].window_length(0), second[2].mean_window_length} == {64}
    succeeded(train.bare(*common, *small, *overrides[:-1], "schedule.short_seq_len=16", "schedule.short_fraction=1",
                          "hydra.run.dir=third"))  # fmt: skip
    assert mla_lm.load_run(tmp_path / "third")[2].window_length(0) == 16
    assert second[1].to_str() == first[1].to_str()
    torch.testing.assert_close(first[0].state_dict(), second[0].state_dict(), rtol=0, atol=1e-6)
    refused(train.bare(*common, *small, "init_from=first", "model.num_layers=3"), "another model")
    refused(train.bare(*common, *small, "init_from=nowhere"), "does not exist")


def test_a_run_that_began_as_an_induction_circuit_is_loaded_resumed_and_planned_like_any_other(train, tmp_path):
    begun = ("model.induction_init=true", "optimizer.residual_lr=0.1")
    succeeded(train(*begun, "hydra.run.dir=run"))
    succeeded(train("hydra.run.dir=plain"))
    first, plain = (load_checkpoint(tmp_path / name / "checkpoints" / "last-1.ckpt") for name in ("run", "plain"))
    assert not torch.equal(first["state_dict"]["embedding.weight"], plain["state_dict"]["embedding.weight"])
    model = mla_lm.load_run(tmp_path / "run")[0]
    assert model.config.induction_init
    whole = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    succeeded(train.bare("ckpt_path=run/checkpoints/last-1.ckpt"))
    resumed = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    succeeded(call_main(lambda: cli.run(plan.main), ["plan", *SMALL, *train.data, *begun], tmp_path))
    refused(
        train("model.induction_init=true", "model.attention.rope_dim=0"),
        "not made for model.attention.kind=mla of these sizes",
    )


def test_multirun_goes_on_after_a_failure(train, runs, tmp_path):
    """The job with a wrong size fails, is named, and changes nothing for the one after it."""
    result = train.bare("-m", *SMALL, *train.data, "model.num_heads=5,4", "hydra.sweep.dir=sweep")
    assert result.returncode == 2
    assert "num_heads=5" in result.stderr
    assert "1 job failed" in result.stderr
    assert not (tmp_path / "sweep" / "0").exists()
    assert losses_of(tmp_path / "sweep" / "1") == losses_of(runs / "mla")
