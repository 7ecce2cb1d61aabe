"""scripts.compare over several seeds."""

from statistics import mean, stdev

from mla_lm import cli
from scripts import compare
from tests.conftest import SMALL, call_main, refused, succeeded, summary_of


def test_seeds_of_a_multirun_become_one_row(train, tmp_path):
    grid = ("seed=1,2", "optimizer.lr=1e-3,2e-3", "trainer.max_steps=2", "hydra.sweep.dir=sweep")
    result = succeeded(train.bare("-m", *SMALL, *train.data, *grid))
    assert result.stdout.splitlines()[-1].endswith(f"scripts.compare {tmp_path / 'sweep'}")

    def run(*arguments: str):
        return call_main(lambda: cli.run(compare.main), ["compare", *arguments], tmp_path)

    lines = succeeded(run("sweep")).stdout.splitlines()
    assert len(lines) == 4  # heading, rule, and a row for each learning rate
    figures = {seed: [] for seed in ("rate 1e-3", "rate 2e-3")}
    for job in range(4):  # Hydra varies the last key fastest
        figures[("rate 1e-3", "rate 2e-3")[job % 2]].append(
            summary_of(tmp_path / "sweep" / str(job))["test_bits_per_byte"]
        )
    for line, values in zip(lines[2:], figures.values(), strict=True):
        assert "+ 1 seeds" in line
        assert f"{mean(values):.4f} ± {stdev(values):.4f}" in line
    assert "seeds" not in succeeded(run("sweep/0", "sweep/1")).stdout
    refused(run("."), "no run folder")
