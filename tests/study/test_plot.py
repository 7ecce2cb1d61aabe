"""The picture of a comparison: what it draws of which rows."""

import pytest

from mla_lm.study.plot import plot
from mla_lm.study.report.figures import series_of
from mla_lm.study.report.quality import curves
from tests.study.report.results import a_result


def size_of(png: bytes) -> tuple[int, int]:
    return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])


def test_both_halves_are_drawn_of_what_was_measured():
    both = a_result(("mla", "mha")).rows
    without_curves = a_result(("mla", "mha")).rows
    for row in without_curves:
        row.curve = None
    wide, narrow = size_of(plot(both, "loss")), size_of(plot(without_curves, "bits_per_byte"))
    assert 1600 < wide[0] < 2200
    assert narrow[0] < 0.6 * wide[0]


@pytest.mark.parametrize("measure", ["loss", "bits_per_byte"])
def test_curve_is_mean_and_interval_over_seeds(measure):
    (row,) = a_result(("mla",)).rows
    figure = curves([row], series_of([row]), measure)
    assert figure
    for across in ("tokens", "seconds", "FLOPs"):
        points = figure.charts[across]["data"]["values"]
        assert [point["x"] for point in points] == getattr(row.curve, across.lower())
        assert [(p["low"], p["y"], p["high"]) for p in points] == [
            (value.low, value.mean, value.high) for value in getattr(row.curve, measure)
        ]


def test_one_seed_has_no_band():
    (row,) = a_result(("mla",), seeds=1).rows
    figure = curves([row], series_of([row]), "loss")
    assert figure
    assert len(figure.charts["tokens"]["layer"]) == 2
    assert "interval" not in figure.text


def test_rows_of_one_kind_have_one_shape_and_several_dashes():
    rows = a_result(("mla", "mha"), sizes=("tiny", "small")).rows
    look = series_of(rows)
    assert look["mla_tiny"].shape == look["mla_small"].shape != look["mha_tiny"].shape
    assert look["mla_tiny"].dash != look["mla_small"].dash
    assert len({series.colour for series in look.values()}) == 4


def test_long_names_give_way_to_numbered_kinds():
    rows = a_result(("mla", "mha"), sizes=("tiny", "small")).rows
    rows[2].name = "mla_small, optimizer.lr=0.001"
    assert [series.label for series in series_of(rows).values()] == ["mla 1", "mha 1", "mla 2", "mha 2"]
