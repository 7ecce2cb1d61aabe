"""The plot of scripts.compare: quality over training, and at the end against the size of the KV cache."""

import io
import math
from typing import cast

from mla_lm.attention import KINDS
from mla_lm.errors import UserError
from mla_lm.study.result import Estimate, Row

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


def plot(rows: list[Row], measure: str) -> bytes:
    """A PNG on white, legible in a README on light and dark pages: a line and a point for each row.

    Left the validation over training, right the test against KV-cache bytes; a row of several seeds is drawn as mean
    and 95% interval.

    Args:
        rows: with their curves
        measure: "loss" or "bits_per_byte"
    """
    labels = short_labels(rows)
    columns = max(1, min(len(rows), 110 // (max(len(row.name) for row in rows) + 15)))  # of the legend
    height = 4.5 + 0.25 * math.ceil(len(rows) / columns)
    figure = Figure(
        figsize=(11, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1), facecolor="white"
    )
    left, right = figure.subplots(1, 2)
    several = any(len(row.seeds) > 1 for row in rows)
    left.set(
        title="Validation" + " (mean and 95% interval over seeds)" * several,
        xlabel="tokens seen",
        ylabel=f"validation {MEASURES[measure]}",
    )
    right.set(
        title="Test at the best validation",
        xlabel="KV cache (bytes per token, all layers)",
        ylabel=f"test {MEASURES[measure]}",
    )
    for row, label, colour in zip(rows, labels, colours(len(rows)), strict=True):
        draw_curve(left, row.name if row.name.startswith(label) else f"{label}: {row.name}", row, measure, colour)
        draw_point(right, row, measure, colour)
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (left, right):
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    scale_cache(right, [row.figures["cache_bytes_per_token"] for row in rows])
    points = [(row.figures["cache_bytes_per_token"], tested(row, measure)) for row in rows]
    known = [(label, (x, value.mean)) for label, (x, value) in zip(labels, points, strict=True) if value]
    label_points(right, [label for label, _ in known], [point for _, point in known])
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def colours(count: int) -> list:
    """One for each row: distinct ones, or where these run out, steps of a scale of rising lightness."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [colormaps["viridis"](0.9 * i / count) for i in range(count)]  # its end is pale on white


def draw_curve(axes: Axes, label: str, row: Row, measure: str, colour) -> None:
    curve = row.curve
    values = [] if curve is None else curve.loss if measure == "loss" else curve.bits_per_byte
    tokens = [] if curve is None else curve.tokens
    style = {"color": colour, "linestyle": of_kind(row, LINES), "marker": of_kind(row, MARKERS), "markersize": 4}
    axes.plot(tokens, [value.mean for value in values], label=label, **style)
    lower = [value.mean if value.low is None else value.low for value in values]
    upper = [value.mean if value.high is None else value.high for value in values]
    axes.fill_between(tokens, lower, upper, color=colour, alpha=0.15, linewidth=0)


def draw_point(axes: Axes, row: Row, measure: str, colour) -> None:
    value, x = tested(row, measure), row.figures["cache_bytes_per_token"]
    style = {"fmt": of_kind(row, MARKERS), "color": colour, "capsize": 4, "markersize": 7}
    if value:
        axes.errorbar(x, value.mean, yerr=value.half_width, **style)


def tested(row: Row, measure: str) -> Estimate | None:
    """The test figure; None where it was not measured."""
    return row.estimates.get(f"test_{measure}")


def of_kind(row: Row, styles: tuple[str, ...]) -> str:
    """The style of the row's kind of attention; they come round again where there are more kinds."""
    return styles[list(KINDS).index(row.kind) % len(styles)]


def short_labels(rows: list[Row]) -> list[str]:
    """The attention of each row, numbered where several have the same."""
    kinds = [row.kind for row in rows]
    return [
        kind if kinds.count(kind) == 1 else f"{kind} {kinds[:place].count(kind) + 1}"
        for place, kind in enumerate(kinds)
    ]


def label_points(axes: Axes, labels: list[str], points: list[tuple[float, float]]) -> None:
    """Name each point to its right; higher where another's name is."""
    figure = cast(Figure, axes.figure)
    figure.draw_without_rendering()  # settles where the points are
    placed: list[tuple[float, float]] = []
    for (x, y), label in sorted(zip(points, labels, strict=True), key=lambda labelled: labelled[0][1]):
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
