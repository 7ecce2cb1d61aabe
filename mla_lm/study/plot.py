"""The plot of scripts.compare: quality over training, and at the end against the size of the KV cache."""

import io
import json
import math
from statistics import mean, stdev
from typing import cast

from mla_lm.attention import KINDS
from mla_lm.errors import UserError
from mla_lm.runs.folder import RunFolder

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure  # pyplot would want a display, or be told that there is none
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter
except ImportError as error:
    raise UserError("the plot of --out needs matplotlib: pip install -r requirements.txt") from error

# Okabe and Ito's colours, which colour-blind readers can tell apart, less the yellow that is pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")  # of the kinds of attention, in their order
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MEASURES = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte"}
LABEL_HEIGHT, LABEL_WIDTH = 11, 60  # points that the label of a point takes


def plot(rows: dict[str, list[RunFolder]], measure: str) -> bytes:
    """A PNG on white, legible in a README on light and dark pages: a line and a point for each row.

    Left the validation over training, right the test against KV-cache bytes; a row of several seeds is drawn as mean
    and standard deviation.

    Args:
        rows: the runs of each row, under its name
        measure: "loss" or "bits_per_byte"
    """
    labels = short_labels(list(rows.values()))
    columns = max(1, min(len(rows), 110 // (max(map(len, rows)) + 15)))  # of the legend
    height = 4.5 + 0.25 * math.ceil(len(rows) / columns)
    figure = Figure(
        figsize=(11, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1), facecolor="white"
    )
    left, right = figure.subplots(1, 2)
    several = any(len(runs) > 1 for runs in rows.values())
    left.set(
        title="Validation" + " (mean ± standard deviation over seeds)" * several,
        xlabel="tokens seen",
        ylabel=f"validation {MEASURES[measure]}",
    )
    right.set(
        title="Test at the best validation",
        xlabel="KV cache (bytes per token, all layers)",
        ylabel=f"test {MEASURES[measure]}",
    )
    for (name, runs), label, colour in zip(rows.items(), labels, colours(len(rows)), strict=True):
        draw_curve(left, name if name.startswith(label) else f"{label}: {name}", runs, measure, colour)
        draw_point(right, runs, measure, colour)
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (left, right):
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    scale_cache(right, [runs[0].summary()["kv_cache_bytes_per_token"] for runs in rows.values()])
    label_points(right, labels, [point(runs, measure) for runs in rows.values()])
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def colours(count: int) -> list:
    """One for each row: distinct ones, or where these run out, steps of a scale of rising lightness."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [colormaps["viridis"](0.9 * i / count) for i in range(count)]  # its end is pale on white


def draw_curve(axes: Axes, label: str, runs: list[RunFolder], measure: str, colour) -> None:
    curves = [validations(run, measure) for run in runs]
    tokens = sorted(set.intersection(*map(set, curves)))  # seeds may have been validated at other steps
    values = [[curve[count] for curve in curves] for count in tokens]
    means, deviations = [mean(v) for v in values], [deviation(v) for v in values]
    style = {"color": colour, "linestyle": of_kind(runs, LINES), "marker": of_kind(runs, MARKERS), "markersize": 4}
    axes.plot(tokens, means, label=label, **style)
    lower = [m - d for m, d in zip(means, deviations, strict=True)]
    upper = [m + d for m, d in zip(means, deviations, strict=True)]
    axes.fill_between(tokens, lower, upper, color=colour, alpha=0.15, linewidth=0)


def draw_point(axes: Axes, runs: list[RunFolder], measure: str, colour) -> None:
    x, y, error = point(runs, measure)
    error = error if len(runs) > 1 else None
    axes.errorbar(x, y, yerr=error, fmt=of_kind(runs, MARKERS), color=colour, capsize=4, markersize=7)


def of_kind(runs: list[RunFolder], styles: tuple[str, ...]) -> str:
    """The style of the runs' kind of attention; they come round again where there are more kinds."""
    return styles[list(KINDS).index(runs[0].summary()["attention"]) % len(styles)]


def short_labels(rows: list[list[RunFolder]]) -> list[str]:
    """The attention of each row, numbered where several have the same."""
    kinds = [runs[0].summary()["attention"] for runs in rows]
    return [
        kind if kinds.count(kind) == 1 else f"{kind} {kinds[:place].count(kind) + 1}"
        for place, kind in enumerate(kinds)
    ]


def label_points(axes: Axes, labels: list[str], points: list[tuple[float, float, float]]) -> None:
    """Name each point to its right; higher where another's name is."""
    figure = cast(Figure, axes.figure)
    figure.draw_without_rendering()  # settles where the points are
    placed: list[tuple[float, float]] = []
    for (x, y, _), label in sorted(zip(points, labels, strict=True), key=lambda labelled: labelled[0][1]):
        across, up = axes.transData.transform((x, y)) * 72 / figure.dpi
        height = up
        for other_across, other_height in placed:  # from the lowest on
            if abs(across - other_across) < LABEL_WIDTH and height < other_height + LABEL_HEIGHT:
                height = other_height + LABEL_HEIGHT
        placed.append((across, height))
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6} if height > up else None
        place = {"xytext": (10, height - up), "textcoords": "offset points", "va": "center"}
        axes.annotate(label, (x, y), **place, arrowprops=line, fontsize=9)


def scale_cache(axes: Axes, cache_bytes: list[float]) -> None:
    """A logarithmic axis with room for labels at its right end."""
    axes.set_xscale("log")
    axes.set_xlim(min(cache_bytes) / 1.5, max(cache_bytes) * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def point(runs: list[RunFolder], measure: str) -> tuple[float, float, float]:
    """KV-cache bytes per token, test figure and its deviation."""
    values = [run.summary()[f"test_{measure}"] for run in runs]
    return runs[0].summary()["kv_cache_bytes_per_token"], mean(values), deviation(values)


def deviation(values: list[float]) -> float:
    """Of a sample; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def validations(run: RunFolder, measure: str) -> dict[int, float]:
    """Tokens seen, and the figure of the validation then.

    Raises:
        UserError: metrics.jsonl is damaged.
    """
    try:
        rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"{run.metrics_file} is damaged: {error}") from error
    return {row["tokens"]: row[f"val/{measure}"] for row in rows if f"val/{measure}" in row}
