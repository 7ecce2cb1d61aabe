"""What a report consists of, written into a folder."""

from pathlib import Path

import yaml

from mla_lm import charts
from mla_lm.files import write_atomically
from mla_lm.study.report.answer import answer, caveats, further_answers
from mla_lm.study.report.cost import decoding, memory
from mla_lm.study.report.figures import Figure, picture_name, series_of
from mla_lm.study.report.frontier import frontier
from mla_lm.study.report.numbers import measure_of
from mla_lm.study.report.page import page
from mla_lm.study.report.quality import curves, differences, position, rates
from mla_lm.study.report.scaling import scaling
from mla_lm.study.report.table import as_csv, table_of
from mla_lm.study.result import Result
from mla_lm.terminal.plain_text import printable
from mla_lm.terminal.tables import markdown


def write_report(result: Result, folder: Path) -> Path:
    """Write report.html, report.md, report.csv and figures/*.svg and *.png into a folder; return the page's path.

    Where the runs of the result were logged with wandb, the report is logged there too.

    Raises:
        UserError: the plotting library is not installed, before anything is written; or a file cannot be written.
    """
    figures = figures_of(result)
    pictures = {}
    for figure in figures:
        for name, spec in figure.charts.items():
            path = f"figures/{picture_name(figure, name)}"
            picture = charts.svg(spec)
            pictures |= {f"{path}.svg": picture.encode(), f"{path}.png": charts.png(picture)}
    texts = {
        "report.md": as_markdown(result, figures),
        "report.csv": as_csv(result),
        "report.html": page(result, figures),
    }
    for name, content in (pictures | {name: text.encode() for name, text in texts.items()}).items():
        write_atomically(folder / name, lambda file, content=content: file.write(content))
    if project := wandb_project(result):
        from mla_lm.study.report.wandb_report import log_report  # takes a second, as wandb does

        log_report(result, folder, [folder / name for name in pictures if name.endswith(".svg")], project)
    return folder / "report.html"


def wandb_project(result: Result) -> str | None:
    """The project of the first run that was logged with `logger=wandb`; None if no run was."""
    loggers = [yaml.safe_load(config).get("logger") or {} for config in result.configs.values()]
    return next((logger["project"] for logger in loggers if logger.get("kind") == "wandb"), None)


def figures_of(result: Result) -> list[Figure]:
    """The figures that the result has numbers for."""
    rows, look, measure = result.rows, series_of(result.rows), measure_of(result)
    figures = [
        frontier(rows, look, result.views, measure),
        scaling(result, look),
        differences(result, look),
        curves(rows, look, measure),
        memory(rows, look),
        decoding(rows, look),
        position(rows, look),
        rates(rows, look),
    ]
    return [figure for figure in figures if figure]


def as_markdown(result: Result, figures: list[Figure]) -> str:
    """The report to read in a terminal or on a code host: sentences, table, pictures and what they say."""
    columns, table = table_of(result)
    cells = [[f"{cell.text} {cell.small}".strip() or "-" for cell in row] for row in table]
    lines = [f"# {result.title}", "", answer(result), ""]
    lines += [f"- {sentence}" for sentence in further_answers(result)]
    lines += [f"- {line}" for line in caveats(result)] + [f"- Failed or unfinished: {line}" for line in result.failed]
    lines += ["", markdown([[column.heading for column in columns], *cells], left=4)] if cells else []
    for figure in figures:
        first = picture_name(figure, next(iter(figure.charts)))
        lines += ["", f"## {figure.title}", "", f"![{figure.title}](figures/{first}.svg)", "", figure.text]
    lines += ["", f"{result.date}, made by", "", f"    {result.command}", ""]
    return printable("\n".join(lines))
