"""Multiruns: their tables, sweep files, Optuna, launchers, and going on with a stopped one."""

import os
import re
import shlex
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from hydra.core.config_store import ConfigStore

import train as train_script
from mla_lm.config import TrainConfig
from mla_lm.terminal import cli
from scripts import compare
from scripts.soak.programs import before
from tests.conftest import (
    ROOT,
    SHORT,
    SMALL,
    Result,
    TrainCommand,
    call_main,
    plant,
    refused,
    rows_of,
    succeeded,
    summary_of,
    wait_until_stopped,
)

# What SQLAlchemy 1.4 says of itself; optuna 2, which Hydra's plugin needs, works with nothing later.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:optuna.storages._rdb.models")

TINY = (
    "model.num_layers=1",
    "model.induction_init=false",
    "model.seq_len=32",
    "model.ff_hidden=96",
    *SHORT,
    "trainer.max_steps=1",
)


def multirun(train: TrainCommand, *overrides: str) -> Result:
    return train.bare("-m", *SMALL, *train.data, *overrides)


def table_of(result: Result) -> list[dict[str, str]]:
    """The table at the end of a multirun; a cell by its heading."""
    lines = result.stdout.splitlines()
    start = max(n for n, line in enumerate(lines) if line.startswith("run ") and "  status" in line)
    end = lines.index("", start)
    heading, *rows = (re.split("  +", line) for line in lines[start:end])
    return [dict(zip(heading, row, strict=True)) for row in rows]


def command_after(result: Result, word: str) -> list[str]:
    """What comes after `python train.py` or `python -m module` in the line that begins with this word."""
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{word} ")]
    return shlex.split(line.partition("python ")[2])


def names_in(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/config.yaml")}


def test_models_and_seeds(train, tmp_path):
    """The table is sorted; the best one's command makes that run again; all can be compared."""
    kinds = ("mla", "mha", "gqa", "mqa")
    models = f"model={','.join(f'{kind}_tiny' for kind in kinds)}"
    result = succeeded(train.bare("-m", models, "seed=1,2", *TINY, *train.data, "hydra.sweep.dir=sweep"))
    table = table_of(result)
    summaries = {name: summary_of(tmp_path / "sweep" / name) for name in names_in(tmp_path / "sweep")}
    assert len(table) == len(summaries) == 8
    jobs = [line.split()[:4] for line in result.stdout.splitlines() if line.startswith("job ")]
    assert jobs[:3] == [
        ["job", "0:", "model=mla_tiny", "seed=1"],
        ["job", "1:", "model=mla_tiny", "seed=2"],
        ["job", "2:", "model=mha_tiny", "seed=1"],
    ]
    assert len(jobs) == 8
    assert "weight_decay" not in result.stdout  # of the whole configuration, which a single run prints
    assert [row["run"] for row in table] == sorted(summaries, key=lambda name: summaries[name]["val_loss"])
    for row in table:
        summary = summaries[row["run"]]
        assert row["status"] == "finished"
        assert (row["model"], int(row["seed"])) == (f"{summary['attention']}_tiny", summary["seed"])
        assert row["val loss"] == f"{summary['val_loss']:.4f}"
        assert row["test bits/byte"] == f"{summary['test_bits_per_byte']:.4f}"
        assert row["cache B/token"] == f"{summary['kv_cache_bytes_per_token']:,.0f}"

    lines = result.stdout.splitlines()
    means = lines[next(n for n, line in enumerate(lines) if line.startswith("mean over seeds ")) + 1 :][:4]
    losses = {kind: [s["val_loss"] for s in summaries.values() if s["attention"] == kind] for kind in kinds}
    ranked = sorted(losses, key=lambda kind: sum(losses[kind]))
    assert [line.split()[:3] for line in means] == [[kind, "2", f"{sum(losses[kind]) / 2:.4f}"] for kind in ranked]

    program, *overrides = command_after(result, "best")
    assert program == "train.py"
    assert "weight_decay" in succeeded(train.bare(*overrides, "hydra.run.dir=alone")).stdout
    best, alone = summaries[table[0]["run"]], summary_of(tmp_path / "alone")
    for key in ("val_loss", "test_loss", "config_hash", "data_fingerprint"):
        assert best[key] == alone[key]

    flag, module, *runs = command_after(result, "compare all")
    assert (flag, module) == ("-m", "scripts.compare")
    compared = succeeded(call_main(lambda: cli.run(compare.main), ["compare", *runs], tmp_path))
    assert len(re.findall("  mla  ", compared.stdout)) == 1


def test_learning_rate(train, tmp_path):
    """Without -m and the list, with them, and with more of the command line."""
    result = succeeded(train("sweep=learning_rate", "trainer.max_steps=1", "hydra.sweep.dir=sweep"))
    rates = [yaml.safe_load((tmp_path / "sweep" / str(n) / "config.yaml").read_text())["optimizer"] for n in range(5)]
    default = yaml.safe_load((ROOT / "conf" / "optimizer" / "muon.yaml").read_text())
    assert [rate["lr"] for rate in rates] == [default["lr"] * 2**n for n in (-2, -1, 0, 1, 2)]
    assert sorted(float(row["optimizer.lr"]) for row in table_of(result)) == [rate["lr"] for rate in rates]
    assert "cache B/token" not in table_of(result)[0]  # it is the same for all

    own = ("sweep=learning_rate", "optimizer.lr=1e-3", "seed=1,2", "trainer.max_steps=1")
    table = table_of(succeeded(multirun(train, *own, "hydra.sweep.dir=own")))
    assert {row["seed"] for row in table} == {"1", "2"}
    assert "optimizer.lr" not in table[0]


def test_latent(train, tmp_path):
    """Every run has nope_dim + rope_dim = value_dim, and its own cache."""
    shape = ("model=mla_small", "model.d_model=64", "model.num_heads=1", *TINY)
    sweep = ("sweep=latent", "model.attention.kv_compressed_dim=20", "hydra.sweep.dir=sweep")
    table = table_of(succeeded(train.bare(*shape, *train.data, *sweep)))
    sizes = set()
    for row in table:
        config = yaml.safe_load((tmp_path / "sweep" / row["run"] / "config.yaml").read_text())["model"]["attention"]
        assert config["nope_dim"] + config["rope_dim"] == config["value_dim"] == 48
        sizes.add((config["kv_compressed_dim"], config["rope_dim"]))
        assert int(row["cache B/token"]) == 4 * (config["kv_compressed_dim"] + config["rope_dim"])
    assert sizes == {(20, 8), (20, 16), (20, 24)}
    preset = yaml.safe_load((ROOT / "conf" / "sweep" / "latent.yaml").read_text())
    assert preset["hydra"]["sweeper"]["params"]["model.attention.kv_compressed_dim"] == "32,64,128"


def interrupt(module) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_stops_the_whole_sweep(train, tmp_path, monkeypatch):
    """Its run is saved, the next is not begun, and the command that is printed goes on with it."""
    plant(monkeypatch, "training_step", [3], interrupt)
    result = multirun(train, "seed=1,2", "hydra.sweep.dir=sweep")
    assert result.returncode == 130
    assert names_in(tmp_path / "sweep") == {"0"}
    assert [row["status"] for row in table_of(result)] == ["interrupted"]
    before = rows_of(tmp_path / "sweep" / "0")
    program, *again = command_after(result, "go on")
    assert program == "train.py"
    result = train.bare(*again, "seed=3")  # of another configuration
    assert result.returncode == 2
    assert f"{tmp_path / 'sweep' / '0'} already holds a run" in result.stderr
    assert [row["status"] for row in table_of(result)] == ["failed"]
    assert rows_of(tmp_path / "sweep" / "0") == before


def test_a_killed_sweep_goes_on(train, tmp_path):
    """Finished jobs are skipped, the one with a checkpoint is resumed, failed and lost ones are run anew."""
    sweep = tmp_path / "sweep"
    command = ("-m", *SMALL, *train.data, "seed=1,2,3,-1,5,6")

    def stop_in_fifth(module) -> None:
        if (sweep / "4").exists() and module.global_step == 4:
            os.kill(os.getpid(), signal.SIGSTOP)

    stopping = lambda: before("training_step", stop_in_fifth)  # noqa: E731
    process = train.start(*command, "hydra.sweep.dir=sweep", prepare=stopping)
    wait_until_stopped(process)
    refused(train.bare(*command, "hydra.sweep.dir=sweep"), f"another process is at work on {sweep.name}")
    process.kill()
    assert names_in(sweep) == {"0", "1", "2", "4"}
    assert not (sweep / "4" / "summary.json").exists()
    shutil.rmtree(sweep / "1" / "checkpoints")  # as if it had been killed before its first checkpoint
    (sweep / "1" / "summary.json").unlink()
    times = {name: (sweep / name / "summary.json").stat().st_mtime_ns for name in "02"}
    begun = rows_of(sweep / "4")[0]

    result = train.bare(*command, "hydra.sweep.dir=sweep")
    assert result.returncode == 2
    assert "1 job failed" in result.stderr
    assert "seed=-1" in result.stderr
    skipped = [line.split("/")[-1] for line in result.stdout.splitlines() if line.startswith("skipped ")]
    assert skipped == ["0: it has finished", "2: it has finished"]
    assert times == {name: (sweep / name / "summary.json").stat().st_mtime_ns for name in "02"}
    for name in "01245":
        assert summary_of(sweep / name)["finished"]
        assert [row["step"] for row in rows_of(sweep / name) if "train/loss" in row] == list(range(1, 7))
    assert rows_of(sweep / "4")[0] == begun  # its `seconds` too: not run again
    table = table_of(result)
    assert {row["run"]: row["status"] for row in table} == {n: "failed" if n == "3" else "finished" for n in "012345"}
    assert table[-1]["run"] == "3"
    losses = [float(row["val loss"]) for row in table[:-1]]
    assert losses == sorted(losses)


def states_in(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as connection:
        return [state for (state,) in connection.execute("select state from trials order by number")]


def test_optuna_goes_on(train, tmp_path, monkeypatch):
    """Trials of an earlier process count, the interrupted one is resumed, and none is drawn twice."""
    sweep = ("sweep=optuna", "hydra.sweep.dir=sweep")
    succeeded(train(*sweep, "hydra.sweeper.n_trials=1"))
    (first,) = names_in(tmp_path / "sweep")
    assert re.fullmatch(r"lr0\.\d{1,6}_wd0\.\d{1,6}", first)  # four digits of each that count
    time_of_first = (tmp_path / "sweep" / first / "summary.json").stat().st_mtime_ns

    with monkeypatch.context() as patch:
        plant(patch, "training_step", [3], interrupt)
        result = train(*sweep, "hydra.sweeper.n_trials=3")
    assert result.returncode == 130
    assert states_in(tmp_path / "sweep" / "optuna.db") == ["COMPLETE", "RUNNING"]
    (second,) = names_in(tmp_path / "sweep") - {first}
    begun = rows_of(tmp_path / "sweep" / second)[0]

    result = succeeded(train.bare(*command_after(result, "go on")[1:]))
    assert states_in(tmp_path / "sweep" / "optuna.db") == ["COMPLETE"] * 3
    assert len(names_in(tmp_path / "sweep")) == 3
    assert (tmp_path / "sweep" / first / "summary.json").stat().st_mtime_ns == time_of_first
    assert rows_of(tmp_path / "sweep" / second)[0] == begun
    table = table_of(result)
    assert len({row["optimizer.lr"] for row in table}) == 3
    assert all(3e-4 <= float(row["optimizer.lr"]) <= 1e-2 for row in table)
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert best["best_value"] == summary_of(tmp_path / "sweep" / table[0]["run"])["val_loss"]


def test_optuna_goes_on_after_failures(train, tmp_path):
    sweep = ("sweep=optuna", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=sweep")
    result = train(*sweep, "model.num_heads=5")
    assert result.returncode == 2
    assert "2 jobs failed" in result.stderr
    assert states_in(tmp_path / "sweep" / "optuna.db") == ["FAIL", "FAIL"]
    refused(train("sweep=optuna", "optimizer.lr=interval(1,0)"), "hydra/sweeper=optuna: ", "low")
    lost = train("sweep=optuna", f"hydra.sweeper.storage=sqlite:///{tmp_path}/no/folder.db")
    refused(lost, "hydra/sweeper=optuna: sqlalchemy", "open")


def test_submitit(tmp_path, train, monkeypatch):
    """Jobs in processes of their own: their results and their failures come from the folders."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rates = ("hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path / 'sweep'}", "optimizer.lr=1e-3,-1")
    command = ["train.py", "-m", *SMALL, *train.data, *rates]
    result = call_main(lambda: cli.run(train_script.main, TrainConfig), command, ROOT)
    assert result.returncode == 2
    assert "1 job failed" in result.stderr
    assert "optimizer.lr" in result.stderr.splitlines()[-1]
    assert {row["run"]: row["status"] for row in table_of(result)} == {"0": "finished", "1": "failed"}
    assert summary_of(tmp_path / "sweep" / "0")["finished"]


def test_slurm_composes(train):
    slurm = ("hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1")
    result = succeeded(train.bare("--cfg", "hydra", "sweep=learning_rate", *slurm))
    composed = yaml.safe_load(result.stdout)["hydra"]
    assert composed["launcher"]["_target_"].endswith(".SlurmLauncher")
    assert composed["launcher"]["partition"] == "gpu"
    assert composed["mode"] == "MULTIRUN"
    assert list(composed["sweeper"]["params"]) == ["optimizer.lr"]


@pytest.mark.parametrize("option", ["sweep=optuna", "hydra/launcher=submitit_slurm", "hydra/launcher=submitit_local"])
def test_missing_plugin(train, monkeypatch, option):
    """Hydra's own complaint where it knows no such option, as it does not where the package is not installed."""
    store = ConfigStore.instance().repo["hydra"]
    folder = store["sweeper" if option == "sweep=optuna" else "launcher"]
    monkeypatch.delitem(folder, f"{option.partition('=')[2]}.yaml")
    refused(train(option), "not installed", "pip install hydra-")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sweep=learningrate"], ["learningrate", "learning_rate", "latent", "optuna"]),
        (["sweep=learning_rate", "ckpt_path=run"], ["ckpt_path", "sweep="]),
        (["sweep=learning_rate", "optimizer.lr=1e-3", "trainer.devices=2"], ["one device", "trainer.devices"]),
        (["sweep=optuna", "hydra.sweep.dir=/proc/1/none"], ["/proc/1/none"]),
        (["sweep=learning_rate", "optimizer.lr=interval(0,1)"], ["BasicSweeper", "INTERVAL"]),
        (["sweep=learning_rate", "optimizer.lr=1e-3", "init_from=nowhere"], ["nowhere", "does not exist"]),
    ],
)
def test_mistakes(train, overrides, words):
    refused(train(*overrides), *words)


def test_a_variable_stays_as_it_was_typed(train, tmp_path, monkeypatch):
    """An escaped one is text; of another, the record of a trial does not tell the value."""
    monkeypatch.setenv("NAME", "hunter2")
    escaped = (r"data.prompts=['a \${HOME}']", "logger.name=${oc.env:NAME}")
    result = succeeded(train.bare("-m", *TINY, *train.data, *escaped, "seed=1,2", "hydra.sweep.dir=sweep"))
    assert "hunter2" not in "".join(path.read_text() for path in (tmp_path / "sweep" / "trials").iterdir())
    succeeded(train.bare(*command_after(result, "best")[1:], "hydra.run.dir=alone"))
    for run in ("sweep/0", "sweep/1", "alone"):
        config = yaml.safe_load((tmp_path / run / "config.yaml").read_text())
        assert config["data"]["prompts"] == ["a ${HOME}"]
        assert config["logger"]["name"] == "hunter2"  # what the user asked for


def test_wandb_finds_the_runs_of_a_sweep(train, tmp_path, monkeypatch):
    """Group and tag are set in a sweep only, change no config_hash, and no file tells the key."""
    key = "5ec2e7" * 6 + "5ec2"
    monkeypatch.setenv("WANDB_API_KEY", key)
    same = ("trainer.max_steps=1", "tags=[mine]", "optimizer.lr=1e-3")
    succeeded(train(*same, "logger=wandb", "sweep=learning_rate", "hydra.sweep.dir=day/time"))
    succeeded(train(*same, "hydra.run.dir=alone"))
    succeeded(multirun(train, *same, "logger.group=given", "hydra.sweep.dir=other"))
    runs = {name: tmp_path / name for name in ("day/time/0", "alone", "other/0")}
    settings = {name: yaml.safe_load((run / "config.yaml").read_text()) for name, run in runs.items()}
    assert [config["logger"]["group"] for config in settings.values()] == ["day/time", None, "given"]
    assert [config["tags"] for config in settings.values()] == [["mine", "learning_rate"], ["mine"], ["mine"]]
    assert len({summary_of(run)["config_hash"] for run in runs.values()}) == 1
    (record,) = (runs["day/time/0"] / "wandb").glob("offline-run-*/*.wandb")
    assert b"day/time" in record.read_bytes()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert record in files
    assert not [path for path in files if key.encode() in path.read_bytes()]
