"""The report in Weights & Biases: the page, its charts, its table and the sampled texts."""

import sys
from pathlib import Path

import wandb

from mla_lm.study.report.answer import answer
from mla_lm.study.report.table import as_records
from mla_lm.study.result import Result
from mla_lm.terminal.plain_text import say
from mla_lm.terminal.tables import names_of
from mla_lm.training.wandb_run import start_wandb, wandb_mode


def log_report(result: Result, folder: Path, pictures: list[Path], project: str) -> None:
    """Log a report as a wandb run of its own.

    Args:
        folder: has report.html, and gets the files of wandb
        pictures: SVG files
    """
    if wandb_mode() == "disabled":
        return
    run = start_wandb(project=project, name=result.title, job_type="report", dir=str(folder))
    records = as_records(result)
    columns = names_of(records)
    run.log(
        {
            "report": wandb.Html(str(folder / "report.html"), inject=False),
            "rows": wandb.Table(
                columns=[*columns], data=[[record.get(name) for name in columns] for record in records]
            ),
            "samples": wandb.Table(
                columns=["row", "prompt", "continuation"],
                data=[[row.name, sample.prompt, sample.text] for row in result.rows for sample in row.samples],
            ),
            **{f"figures/{picture.stem}": wandb.Html(picture.read_text(), inject=False) for picture in pictures},
        }
    )
    run.summary["answer"] = answer(result)
    offline, path = run.offline, Path(run.dir).parent
    run.finish()
    if offline:
        say(f"wandb has it offline; to upload it: wandb sync {path}", file=sys.stderr)
