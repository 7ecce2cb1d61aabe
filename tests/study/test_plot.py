"""The plot of a comparison: what it draws of which runs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from mla_lm.study import plot
from mla_lm.study.result import Curve, Row
from mla_lm.study.statistics import estimate


def a_row(kind: str, losses: list[float], name: str = "row") -> Row:
    """Of as many seeds as losses, which are those of the last validation and the test; 1 higher at the first one."""
    values = [estimate([loss + higher for loss in losses]) for higher in (1, 0)]
    return Row(
        name=name,
        kind=kind,
        size="4 x 192",
        runs=[],
        seeds=list(range(len(losses))),
        figures={"cache_bytes_per_token": 640},
        estimates={"test_loss": values[1]},
        curve=Curve([256, 512], [1.0, 2.0], [1e6, 2e6], values, values),
    )


def test_curve_and_point_are_mean_and_interval_over_seeds():
    row, axes = a_row("mla", [3.0, 3.2]), Figure().subplots()
    plot.draw_curve(axes, "label", row, "loss", "black")
    tokens, values = axes.lines[0].get_data()
    assert list(tokens) == [256, 512]
    assert list(values) == pytest.approx([4.1, 3.1])
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (pytest.approx(row.curve.loss[1].low), pytest.approx(row.curve.loss[0].high))
    plot.draw_point(axes, row, "loss", "black")
    bar = axes.collections[-1].get_paths()[0].get_extents()
    assert (bar.y0, bar.y1) == (pytest.approx(row.curve.loss[1].low), pytest.approx(row.curve.loss[1].high))


def test_one_seed_has_neither_band_nor_bar():
    row, axes = a_row("mla", [3.0]), Figure().subplots()
    plot.draw_curve(axes, "label", row, "loss", "black")
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (3.0, 4.0)  # of the line itself
    plot.draw_point(axes, row, "loss", "black")
    assert len(axes.collections) == 1


def test_a_figure_that_was_not_measured_is_left_out():
    assert plot.plot([a_row("mla", [3.0]), a_row("mha", [3.0])], "bits_per_byte").startswith(b"\x89PNG")


@settings(max_examples=15)
@given(points=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=2, max_size=9))
def test_labels_of_points_do_not_overlap(points):
    axes = Figure(figsize=(5, 4)).subplots()
    axes.scatter([x for x, _ in points], [y for _, y in points])
    plot.label_points(axes, [f"mla {i}" for i in range(len(points))], points)
    axes.figure.draw_without_rendering()  # puts the names where they are to be
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to the points
    assert not [i for i, box in enumerate(boxes) if box.count_overlaps(boxes[:i])]


def test_a_legend_does_not_say_twice_what_attention_a_row_has(monkeypatch):
    labels, draw = [], plot.draw_curve

    def watched(axes, label, *row) -> None:
        labels.append(label)
        draw(axes, label, *row)

    monkeypatch.setattr(plot, "draw_curve", watched)
    plot.plot([a_row("mla", [3.0, 3.1], "mla, seq"), a_row("mha", [3.2], "run, optimizer.lr=0.001")], "loss")
    assert labels == ["mla, seq", "mha: run, optimizer.lr=0.001"]


def test_as_many_colours_as_rows():
    for count in (1, 7, 8, 40):
        assert len(set(plot.colours(count))) == count
