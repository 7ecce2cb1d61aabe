"""Train a language model: `python train.py model=mla_small`, then any key=value of conf/.

`python train.py --cfg job` prints every key. This file composes the configuration, decides which run it is for, and
trains; what it calls is in mla_lm/.
"""

import os
import sys
import traceback
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mla_lm import cli, sweep, trust
from mla_lm.config import TrainConfig, make_paths_absolute, register_schema
from mla_lm.errors import TrainingFailed, UserError
from mla_lm.plain_text import say
from mla_lm.resume import resumed_config, started_config
from mla_lm.run import RunFolder, find_run


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="train")
def job(composed: DictConfig) -> float | None:
    """One run. Returns its validation loss, which sweepers minimise; None for a failed job of a multirun."""
    hydra_config = HydraConfig.get()
    run = RunFolder(Path(hydra_config.runtime.output_dir))
    trial = sweep.Trial.of_job(hydra_config) if hydra_config.mode == RunMode.MULTIRUN else None
    try:
        if trial:
            trial.write()
        cli.check_keys(composed, TrainConfig)
        return train_run(OmegaConf.to_object(composed), run, sweep.run_overrides(hydra_config))
    except Exception as error:
        named = any(override.startswith("hydra.run.dir=") for override in hydra_config.overrides.hydra)
        if not named and not os.listdir(run.path):
            run.path.rmdir()  # nothing was begun: leave no empty folder behind
        if isinstance(error, UserError | TrainingFailed):
            status = cli.report(error)
        elif trial:
            traceback.print_exc()
        else:
            raise
        if not trial:
            sys.exit(status)
        trial.write(error=str(error) if isinstance(error, UserError | TrainingFailed) else repr(error))
        return None


def train_run(config: TrainConfig, run: RunFolder, overrides: list[str]) -> float:
    """Settle which configuration counts, refuse to write over another run, and train."""
    make_paths_absolute(config)
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    if multirun:
        sweep.label(config, HydraConfig.get())
    if config.ckpt_path and config.init_from:
        raise UserError("ckpt_path goes on with a run, init_from begins a new one: give one of them")
    checkpoint = None
    if config.ckpt_path:
        run, checkpoint = find_run(config.ckpt_path)
        if not checkpoint.is_file() and not run.is_begun:
            raise UserError(f"{run.path} stopped before its first checkpoint: begin it again, hydra.run.dir={run.path}")
        resumed = resumed_config(config, run, overrides)
        config = trust.with_agreed_paths(resumed, run, config.trust, "agree with trust=true", config)
    elif config.init_from:
        config = started_config(config, find_run(config.init_from)[0], overrides)
    config.check()
    if config.world_size > 1 and multirun:
        raise UserError("a multirun trains on one device: start one command for each run with trainer.devices above 1")
    if "TORCHELASTIC_RUN_ID" in os.environ and not any(a.startswith("hydra.run.dir=") for a in sys.argv):
        raise UserError("under torchrun all processes need one run folder: give hydra.run.dir=FOLDER")

    from mla_lm.training import train  # lightning and torch.compile: not needed to refuse a mistake

    if not is_first_process():
        return train(config, run, checkpoint)
    with run.lock():
        if multirun and sweep.is_same_run(config, run):  # a stopped sweep goes on
            if run.summary().get("finished"):
                say(f"skipped     {run.path}: it has finished")
                return run.summary()["val_loss"]
            checkpoint = run.last if run.last.is_file() else None
        if not checkpoint:
            refuse_to_write_over(run, "hydra.sweep.dir" if multirun else "hydra.run.dir")
        return train(config, run, checkpoint)


def refuse_to_write_over(run: RunFolder, key: str) -> None:
    """Raises UserError where the folder of a new run, set by `key`, holds another run, or files that are no run's."""
    if run.is_begun:
        raise UserError(
            f"{run.path} already holds a run: ckpt_path={run.path} goes on with it, another {key} begins a new one"
        )
    if foreign := run.foreign_files():
        raise UserError(f"{run.path} has {', '.join(foreign)}, which a run would write over: choose another {key}")


def is_first_process() -> bool:
    """Whether this is the process, of all that share a run, that writes its folder."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def resume_in_place(arguments: list[str]) -> list[str]:
    """The command line with RUN as Hydra's run folder where it says ckpt_path=RUN, whatever signs the path has."""
    paths = [argument.removeprefix("ckpt_path=") for argument in arguments if argument.startswith("ckpt_path=")]
    path = paths[-1].strip("'\"") if paths else ""
    if path in ("", "null"):
        return arguments
    if not is_first_process() and any(argument.startswith("hydra.run.dir=") for argument in arguments):
        return arguments  # as the first process made them
    if any(argument in ("-m", "--multirun") or argument.startswith("sweep=") for argument in arguments):
        raise UserError("ckpt_path goes on with one run: leave out -m and sweep=")
    if any(argument.startswith("hydra.run.dir=") for argument in arguments):
        raise UserError("ckpt_path goes on in the run's own folder: leave out hydra.run.dir")
    rest = [argument for argument in arguments if not argument.startswith("ckpt_path=")]
    folder = find_run(path)[0].path
    return [*rest, f"ckpt_path={cli.quoted(path)}", f"hydra.run.dir={cli.quoted(folder)}"]


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, which cli.run words, instead of printing them
    warnings.filterwarnings("ignore", module="hydra")
    arguments = sorted(sys.argv[1:], key=lambda a: a not in ("-m", "--multirun"))  # Hydra wants -m before overrides
    cli.check_flags(arguments)
    register_schema()
    sys.argv[1:] = resume_in_place(arguments)
    with sweep.reported(arguments):
        job()


if __name__ == "__main__":
    cli.run(main, TrainConfig)
