"""The picture of a comparison: quality over training, and at the end against the size of the KV cache."""

from mla_lm import charts
from mla_lm.study.report.figures import series_of
from mla_lm.study.report.frontier import frontier
from mla_lm.study.report.quality import curves
from mla_lm.study.result import Row

WIDTH = 440  # pixels between the axes of each half


def plot(rows: list[Row], measure: str) -> bytes:
    """A PNG on white, legible in a README on light and dark pages: a line and a point for each row.

    Left the validation over training, right the test against KV-cache bytes, with 95% intervals over seeds.

    Args:
        rows: with their curves
        measure: "loss" or "bits_per_byte"
    """
    look = series_of(rows)
    halves = (curves(rows, look, measure), frontier(rows, look, {}, measure))
    specs = [next(iter(figure.charts.values())) for figure in halves if figure]
    parts = [{**spec, "width": WIDTH, "height": charts.HEIGHT} for spec in specs]
    return charts.png(charts.svg({"hconcat": parts, "spacing": 40}))
