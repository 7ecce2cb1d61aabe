"""The report in Weights & Biases: the page, its charts, its table and the sampled texts."""

import sys
from pathlib import Path

import wandb
import yaml

from mla_lm.study.report.answer import answer
from mla_lm.study.report.figures import Figure, picture_name
from mla_lm.study.report.table import as_records
from mla_lm.study.result import Result
from mla_lm.terminal.plain_text import say
from mla_lm.training.wandb_run import start_wandb, wandb_mode


def log_report(result: Result, figures: list[Figure], folder: Path) -> None:
    """Log a report as a run of its own, in the project of the result's runs.

    Args:
        folder: has report.html and figures/, and gets the files of wandb
    """
    if wandb_mode() == "disabled":
        return
    project = next(
        config["logger"]["project"]
        for config in map(yaml.safe_load, result.configs.values())
        if config["logger"]["kind"] == "wandb"
    )
    run = start_wandb(project=project, name=result.title, job_type="report", dir=str(folder))
    records = as_records(result)
    columns = list(dict.fromkeys(name for record in records for name in record))
    names = [picture_name(figure, chart) for figure in figures for chart in figure.charts]
    samples = [[row.name, sample.prompt, sample.text] for row in result.rows for sample in row.samples]
    run.log(
        {
            "report": wandb.Html(str(folder / "report.html"), inject=False),
            "rows": wandb.Table(columns=columns, data=[[record.get(name) for name in columns] for record in records]),
            "samples": wandb.Table(columns=["row", "prompt", "continuation"], data=samples),
            **{f"figures/{name}": wandb.Html((folder / "figures" / f"{name}.svg").read_text()) for name in names},
        }
    )
    run.summary["answer"] = answer(result)
    offline, path = run.offline, Path(run.dir).parent
    run.finish()
    if offline:
        say(f"wandb has it offline; to upload it: wandb sync {path}", file=sys.stderr)
