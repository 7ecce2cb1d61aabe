"""report.html: one file, with the plotting library, the charts and the style in it."""

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files

from mla_lm import charts
from mla_lm.study.report.answer import answer, caveats, further_answers
from mla_lm.study.report.figures import Figure, series_of
from mla_lm.study.report.numbers import MANY
from mla_lm.study.report.table import table_of
from mla_lm.study.result import Result
from mla_lm.terminal.plain_text import printable


def page(result: Result, figures: list[Figure]) -> str:
    """The page. Texts of runs are escaped by Jinja, and no script runs but the two whose hashes the page names."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("mla_lm.study.report")
    script = folder.joinpath("page.js").read_text()
    vega = _vega()
    columns, table = table_of(result)
    specs = {figure.name: {name: charts.drawable(spec) for name, spec in figure.charts.items()} for figure in figures}
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=visible)
    return environment.from_string(folder.joinpath("page.html").read_text()).render(
        result=result,
        answer=answer(result),
        further=further_answers(result),
        caveats=caveats(result),
        figures=figures,
        many=MANY,
        legend=list(series_of(result.rows).values()),
        columns=columns,
        table=table,
        samples=samples_of(result),
        policy=policy(vega, f"\n{script}"),
        colours=Markup(colours()),
        css=Markup(folder.joinpath("page.css").read_text()),
        charts=Markup(in_script(specs)),
        vega=Markup(vega),
        javascript=Markup(script),
    )


def visible(value: object) -> object:
    """Control characters of a text as escapes, before Jinja escapes the text for HTML."""
    return printable(value) if type(value) is str else value  # Markup is a str, and ours


def samples_of(result: Result) -> dict[str, list[tuple[str, str]]]:
    """Under each prompt the rows that continued it, and how."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    for row in result.rows:
        for sample in row.samples:
            prompts.setdefault(sample.prompt, []).append((row.name, sample.text))
    return prompts


def policy(*scripts: str) -> str:
    """A content security policy: nothing is loaded, and of scripts only these run. Vega compiles its expressions."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed} 'unsafe-eval'"


def colours() -> str:
    """The colours of the charts as CSS variables: light ones, and dark ones on a screen that asks for them."""

    def variables(theme: dict[str, str]) -> str:
        return " ".join(f"--{name}: {value};" for name, value in theme.items())

    dark = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(charts.DARK)} }} }}"
    return f":root {{ {variables(charts.LIGHT)} }}\n{dark}"


def in_script(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", r"\u003c")


@cache
def _vega() -> str:
    return charts.javascript()
