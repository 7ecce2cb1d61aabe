"""Rows of a result from run folders: whose figures count, curves, positions and paired differences."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mla_lm import UserError
from mla_lm.runs.folder import RunFolder
from mla_lm.study.collect import Run, load
from mla_lm.study.row_figures import add_difference, add_position, corpora_of, curve_of, machine_of, row_of
from mla_lm.study.statistics import estimate, paired_difference
from mla_lm.study.window_losses import window_losses
from tests.conftest import rows_of, summary_of


@pytest.fixture
def seeds(runs, tmp_path) -> dict[str, list[Run]]:
    """Two seeds of MLA and of MHA, in folders mla1, mla2, mha1, mha2. The second is the first with other weights."""
    for kind in ("mla", "mha"):
        for seed in (1, 2):
            shutil.copytree(runs / kind, tmp_path / f"{kind}{seed}")
        change(tmp_path / f"{kind}2", seed=2, scale=1.05 if kind == "mla" else 1.1)
    return {kind: [load(RunFolder(tmp_path / f"{kind}{seed}")) for seed in (1, 2)] for kind in ("mla", "mha")}


def change(run: Path, seed: int, scale: float) -> None:
    """Make it a run of another seed: multiply its embedding, and its figures."""
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("seed: 1\n", f"seed: {seed}\n", 1))
    best = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(best)
    checkpoint["state_dict"]["embedding.weight"] *= scale
    torch.save(checkpoint, best)
    edit(run, **{key: value * scale for key, value in summary_of(run).items() if key.startswith(("val_", "test_"))})


def edit(run: Path, **values) -> None:
    """Change entries of summary.json; None deletes one."""
    summary = {**summary_of(run), **values}
    (run / "summary.json").write_text(json.dumps({key: value for key, value in summary.items() if value is not None}))


def of(runs: list[Run]) -> list[Run]:
    """Loaded again."""
    return [load(run.folder) for run in runs]


def test_a_row_has_means_over_its_seeds(seeds):
    row = row_of("name", seeds["mla"])
    summaries = [summary_of(run.folder.path) for run in seeds["mla"]]
    assert (row.kind, row.size, row.seeds) == ("mla", "2 x 64", [1, 2])
    assert row.figures["cache_bytes_per_token"] == summaries[0]["kv_cache_bytes_per_token"]
    assert row.figures["lr"] == seeds["mla"][0].config.optimizer.lr
    for key in ("val_loss", "test_perplexity", "test_bits_per_byte", "tokens_per_second", "peak_memory_bytes"):
        assert row.estimates[key] == estimate([summary[key] for summary in summaries])
    assert row.notes == []
    assert row_of("name", seeds["mla"], "small").size == "small"


def test_one_seed_is_said_to_have_no_interval(seeds):
    row = row_of("name", seeds["mla"][:1])
    assert row.estimates["test_loss"].half_width is None
    assert row.notes == ["one seed: no interval"]


def test_unfinished_runs_count_for_nothing(seeds):
    edit(seeds["mla"][1].folder.path, finished=False)
    row = row_of("name", of(seeds["mla"]))
    assert row.seeds == [1]
    assert row.notes == ["1 of 2 runs is unfinished and left out", "one seed: no interval"]


def test_a_second_run_of_a_seed_counts_for_nothing(seeds):
    """As if it were another seed, equal runs would make an interval of no width."""
    row = row_of("name", [seeds["mla"][0], seeds["mla"][0], seeds["mla"][1]])
    assert row.seeds == [1, 2]
    assert row.notes == ["1 of 3 runs is of a seed that is there already, and left out"]


def test_what_was_not_measured_is_left_out(seeds):
    edit(seeds["mla"][0].folder.path, peak_memory_bytes=None)
    edit(seeds["mla"][1].folder.path, peak_memory_bytes="much")
    row = row_of("name", of(seeds["mla"]))
    assert "peak_memory_bytes" not in row.estimates
    assert "test_loss" in row.estimates


def test_a_difference_is_paired_by_seed_and_window(seeds):
    rows = {kind: row_of(kind, runs) for kind, runs in seeds.items()}
    add_difference(rows["mla"], seeds["mla"], rows["mha"], list(reversed(seeds["mha"])))
    mla, mha = ([window_losses(run.folder) for run in runs] for runs in seeds.values())
    nats = [np.stack([losses.nats for losses in both]) for both in (mla, mha)]
    assert rows["mla"].difference == paired_difference(*nats, mla[0].tokens, mla[0].documents)
    assert rows["mla"].difference.values == pytest.approx([a.loss - b.loss for a, b in zip(mla, mha, strict=True)])
    assert rows["mla"].difference.half_width > 0
    assert rows["mla"].baseline == "mha"


def test_only_seeds_that_both_rows_have_are_paired(seeds):
    rows = {kind: row_of(kind, runs) for kind, runs in seeds.items()}
    one = row_of("mla", seeds["mla"][1:])
    add_difference(one, seeds["mla"][1:], rows["mha"], seeds["mha"])
    expected = [runs[1].figures["test_loss"] for runs in (seeds["mla"], seeds["mha"])]
    assert one.difference == estimate([expected[0] - expected[1]])
    assert one.notes == ["one seed: no interval"]
    assert not (seeds["mla"][1].folder.path / "test_windows.safetensors").exists()  # nothing was measured for it

    other = row_of("mha", seeds["mha"][:1])
    none = row_of("mla", seeds["mla"][1:])
    add_difference(none, seeds["mla"][1:], other, seeds["mha"][:1])
    assert (none.difference, none.baseline) == (None, None)
    assert none.notes[-1] == "no seed in common with mha, so no difference"


def test_a_difference_without_windows_has_no_interval(seeds):
    """As of runs made elsewhere, whose data are not opened unasked."""
    (seeds["mha"][0].folder.path / "origin").unlink()
    rows = {kind: row_of(kind, runs) for kind, runs in seeds.items()}
    add_difference(rows["mla"], seeds["mla"], rows["mha"], seeds["mha"])
    losses = [[run.figures["test_loss"] for run in runs] for runs in seeds.values()]
    assert rows["mla"].difference.values == [a - b for a, b in zip(*losses, strict=True)]
    assert rows["mla"].difference.half_width is None
    assert "no interval of the difference: " in rows["mla"].notes[0]
    assert "not made here by you" in rows["mla"].notes[0]
    add_difference(rows["mla"], seeds["mla"], rows["mha"], seeds["mha"], trusted=True)
    assert rows["mla"].difference.half_width > 0


def test_runs_of_several_processors_are_named(seeds):
    """An older run did not record its own."""
    here = summary_of(seeds["mla"][0].folder.path)
    edit(seeds["mha"][0].folder.path, processor="Another CPU")
    edit(seeds["mha"][1].folder.path, processor=None, threads=None)
    runs = {kind: of(own) for kind, own in seeds.items()}
    rows = {kind: row_of(kind, own) for kind, own in runs.items()}
    named = f"Another CPU, {here['threads']} threads; not recorded, not recorded threads"
    assert rows["mha"].notes == [f"runs of different processors or numbers of threads: {named}"]
    assert rows["mla"].notes == []
    add_difference(rows["mla"], runs["mla"], rows["mha"], runs["mha"])
    (note,) = rows["mla"].notes
    assert here["processor"] in note
    assert "Another CPU" in note
    assert note.endswith("(with mha)")
    machine = machine_of([run for own in runs.values() for run in own])
    assert machine["processor"] == f"{here['processor']}; Another CPU; not recorded"
    assert machine["torch"] == torch.__version__


def test_position_is_the_mean_over_seeds(seeds):
    row = row_of("mla", seeds["mla"])
    add_position(row, seeds["mla"])
    measured = [window_losses(run.folder) for run in seeds["mla"]]
    assert len(row.position) == 32
    means = [sum(one.position_nats[at] / one.position_tokens[at] for one in measured) / 2 for at in range(32)]
    assert row.position == pytest.approx(means)


def test_a_curve_has_the_validations_that_all_seeds_have(seeds):
    run = seeds["mla"][1].folder
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    assert len([line for line in lines if "val/loss" in line]) == 2
    curve = curve_of(seeds["mla"])
    validated = [row for row in rows_of(run.path) if "val/loss" in row]
    assert curve.tokens == [row["tokens"] for row in validated] == [3 * 256, 6 * 256]
    assert curve.loss[1] == estimate([validated[1]["val/loss"]] * 2)
    assert curve.seconds == [row["seconds"] for row in validated]
    assert curve.flops[0] == 3 * 256 * seeds["mla"][0].figures["flops_per_token"]
    first = next(line for line in lines if "val/loss" in line)
    run.metrics_file.write_text("".join(line for line in lines if line != first))
    assert curve_of(seeds["mla"]).tokens == [6 * 256]
    run.metrics_file.write_text("")
    assert curve_of(seeds["mla"]) is None


@pytest.mark.parametrize("line", ['{"step": ', "[1]\n3", '{"val/loss": 3, "tokens": 4}', '{"val/loss": NaN}', "null"])
def test_damaged_metrics(seeds, line):
    run = seeds["mla"][0].folder
    run.metrics_file.write_text(f"{line}\n")
    with pytest.raises(UserError, match="damaged"):
        curve_of(seeds["mla"])


def test_a_corpus_is_described_without_its_files(seeds):
    (described,) = corpora_of(seeds["mla"]).values()
    assert described == "text, tokenizer bpe of 300 tokens"
    assert list(corpora_of(seeds["mla"])) == [summary_of(seeds["mha"][0].folder.path)["data_fingerprint"]]
