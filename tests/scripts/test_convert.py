"""scripts.convert on a real run."""

from pathlib import Path

import pytest
import torch

from mla_lm import load_run
from mla_lm.terminal import cli
from scripts import convert, evaluate, generate
from tests.conftest import SHORT, Result, TrainCommand, call_main, refused, small, succeeded, summary_of

REST = (*SHORT, "trainer.max_steps=20", "val_every_n_steps=20", "optimizer.lr=3e-3", "samples.max_tokens=0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, on_corpus) -> TrainCommand:
    """With an MHA run of 4 heads of 16, `mha`, that has learnt something to lose."""
    train = TrainCommand(tmp_path_factory.mktemp("convert"), on_corpus)
    succeeded(train.bare(*small("mha"), *train.data, *REST, "hydra.run.dir=mha"))
    return train


def run(folder: Path, *arguments: str) -> Result:
    return call_main(lambda: cli.run(convert.main), ["convert", *arguments], folder)


def sizes(kv_compressed_dim: int, rope_dim: int) -> tuple[str, ...]:
    return "--kv-compressed-dim", f"{kv_compressed_dim}", "--rope-dim", f"{rope_dim}"


def bits_per_byte(result: Result) -> list[float]:
    return [float(line.split(" bits per byte")[0].split()[-1]) for line in result.stdout.splitlines()[:2]]


def test_whole_and_small(trained):
    """All of it is the same model; a small one is worse, heals by training, and serves the tools as any run does."""
    folder = trained.folder
    result = succeeded(run(folder, "mha", "whole", *sizes(64, 64)))
    assert bits_per_byte(result)[0] == pytest.approx(bits_per_byte(result)[1], abs=2e-4)
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        logits = [load_run(folder / name)[0](tokens) for name in ("mha", "whole")]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)

    result = succeeded(run(folder, "mha", "small", *sizes(12, 4)))
    assert bits_per_byte(result)[1] > bits_per_byte(result)[0]
    assert "128 bytes of cache per token" in result.stdout.splitlines()[1]  # 2 layers of 16 fp32 elements
    small = call_main(
        lambda: cli.run(generate.main), ["generate", "small", "--prompt", "def", "--max-tokens", "3"], folder
    )
    assert succeeded(small).stdout.startswith("def")
    succeeded(call_main(lambda: cli.run(evaluate.main), ["evaluate", "small"], folder))
    data = [o for o in trained.data if not o.startswith("data.tokenizer")]
    succeeded(trained.bare(*REST, *data, "init_from=small", "optimizer.lr=1e-3", "hydra.run.dir=healed"))
    assert summary_of(folder / "healed")["attention"] == "mla"
    assert summary_of(folder / "healed")["val_bits_per_byte"] < bits_per_byte(result)[1]


def test_files(trained, corpus):
    result = succeeded(run(trained.folder, "mha", "of_files", *sizes(64, 64), "--files", str(corpus)))
    assert bits_per_byte(result)[0] == pytest.approx(bits_per_byte(result)[1], abs=2e-4)


def test_mistakes(trained, tmp_path):
    folder = trained.folder
    refused(run(folder, "mha", "out", *sizes(65, 4)), "kv_compressed_dim=65", "64")
    refused(run(folder, "mha", "out", *sizes(12, 5)), "rope_dim=5", "even")
    refused(run(folder, "nothing", "out", *sizes(12, 4)), "nothing", "run folder")
    refused(run(folder, "mha", "mha", *sizes(12, 4)), "mha", "not empty")
    refused(run(folder, "mha", "out"), "--kv-compressed-dim")
    (tmp_path / "short.txt").write_text("def f(): pass\n")
    refused(
        run(folder, "mha", "out", *sizes(12, 4), "--files", str(tmp_path / "short.txt")), "short.txt", "at least 64"
    )
    assert not (folder / "out").exists()
