"""The plot of a comparison: what it draws of which runs."""

from statistics import mean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from mla_lm.runs.folder import RunFolder
from mla_lm.study import plot
from tests.conftest import rows_of, succeeded, summary_of


def test_curve_and_point_are_mean_and_deviation_over_seeds(train, runs, tmp_path):
    succeeded(train("seed=2", "hydra.run.dir=run"))
    folders = [RunFolder(runs / "mla"), RunFolder(tmp_path / "run")]
    axes = Figure().subplots()
    plot.draw_curve(axes, "label", folders, "bits_per_byte", "black")
    validated = [[row for row in rows_of(folder.path) if "val/loss" in row] for folder in folders]
    (tokens, values) = axes.lines[0].get_data()
    assert list(tokens) == [row["tokens"] for row in validated[0]]
    pairs = [[row["val/bits_per_byte"] for row in rows] for rows in zip(*validated, strict=True)]
    assert list(values) == pytest.approx([mean(pair) for pair in pairs])
    band = axes.collections[0].get_paths()[0].get_extents()
    assert band.y1 == pytest.approx(max(mean(pair) + stdev(pair) for pair in pairs))

    x, y, error = plot.point(folders, "loss")
    losses = [summary_of(folder.path)["test_loss"] for folder in folders]
    assert (x, y, error) == (summary_of(runs / "mla")["kv_cache_bytes_per_token"], mean(losses), stdev(losses))


def test_seeds_validated_at_other_steps_share_the_steps_they_have(runs, run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    validated = [line for line in lines if "val/loss" in line]
    assert len(validated) == 2
    (run / "metrics.jsonl").write_text("".join(line for line in lines if line != validated[0]))
    axes = Figure().subplots()
    plot.draw_curve(axes, "label", [RunFolder(runs / "mla"), RunFolder(run)], "loss", "black")
    assert list(axes.lines[0].get_xdata()) == [6 * 256]


@settings(max_examples=15)
@given(points=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=2, max_size=9))
def test_labels_of_points_do_not_overlap(points):
    axes = Figure(figsize=(5, 4)).subplots()
    axes.scatter([x for x, _ in points], [y for _, y in points])
    plot.label_points(axes, [f"mla {i}" for i in range(len(points))], [(x, y, 0.0) for x, y in points])
    axes.figure.draw_without_rendering()  # puts the names where they are to be
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to the points
    assert not [i for i, box in enumerate(boxes) if box.count_overlaps(boxes[:i])]


def test_a_legend_does_not_say_twice_what_attention_a_row_has(runs, monkeypatch):
    labels, draw = [], plot.draw_curve

    def watched(axes, label, *row) -> None:
        labels.append(label)
        draw(axes, label, *row)

    monkeypatch.setattr(plot, "draw_curve", watched)
    folders = [RunFolder(runs / "mla"), RunFolder(runs / "mla")]
    plot.plot({"mla (2 seeds)": folders, "0, optimizer.lr=0.001": [RunFolder(runs / "mha")]}, "loss")
    assert labels == ["mla (2 seeds)", "mha: 0, optimizer.lr=0.001"]


def test_as_many_colours_as_rows():
    for count in (1, 7, 8, 40):
        assert len(set(plot.colours(count))) == count
