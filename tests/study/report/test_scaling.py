"""The figure of the fitted power laws."""

import pytest

from mla_lm import charts
from mla_lm.study.report.figures import Figure, series_of
from mla_lm.study.report.scaling import NO_INTERVAL, scaling
from mla_lm.study.report.write import figures_of
from mla_lm.study.result import Result
from mla_lm.study.scaling import fits_of
from tests.study.report.results import a_result

SIZES = ("tiny", "small", "medium")


def figure_of(result: Result) -> Figure:
    figure = scaling(result, series_of(result.rows))
    assert figure
    return figure


def test_line_and_band_are_the_fit_and_points_the_rows():
    result = a_result(("mla", "mha"), sizes=SIZES)
    spec = figure_of(result).charts["all"]
    for kind, fit in result.fits.items():
        line = [point for point in spec["data"]["values"] if point["series"] == kind]
        sizes = [row.figures["parameters"] for row in result.rows if row.kind == kind]
        assert [line[0]["x"], line[-1]["x"]] == pytest.approx([min(sizes), max(sizes)])
        for point in line:
            assert point["y"] == pytest.approx(fit.factor * point["x"] ** fit.exponent.mean)
            assert point["low"] < point["y"] < point["high"]
    assert spec["encoding"]["x"]["scale"]["type"] == "log"
    points = {point["name"]: point for point in spec["layer"][-1]["data"]["values"]}
    assert set(points) == {row.name for row in result.rows}
    for row in result.rows:
        loss = row.estimates["test_loss"]
        found = [points[row.name][key] for key in ("series", "x", "y", "low", "high")]
        assert found == [row.kind, row.figures["parameters"], loss.mean, loss.low, loss.high]


def test_only_where_there_are_fits():
    assert "scaling" not in [figure.name for figure in figures_of(a_result())]
    assert "scaling" in [figure.name for figure in figures_of(a_result(sizes=SIZES))]


def test_rows_that_were_not_fitted_are_not_drawn():
    """As those are that a study matches by cache instead of parameters."""
    result = a_result(("mla", "mha"), sizes=SIZES)
    result.fits = fits_of([row for row in result.rows if row.name not in ("mla_small", "mha_tiny", "mha_small")])
    spec = figure_of(result).charts["all"]
    assert [point["name"] for point in spec["layer"][-1]["data"]["values"]] == ["mla_tiny", "mla_medium"]


def test_a_kind_without_an_interval_says_so():
    """MLA has three runs, MHA two."""
    result = a_result(("mla", "mha"), seeds=1, sizes=SIZES)
    result.rows.pop()
    result.fits = fits_of(result.rows)
    figure = figure_of(result)
    picture = charts.svg(figure.charts["all"])
    assert f"mha: {NO_INTERVAL}</text>" in picture
    assert f"mla: {NO_INTERVAL}" not in picture
    mla, mha = (f"{result.fits[kind].exponent.mean:.4f}".replace("-", "\N{MINUS SIGN}") for kind in ("mla", "mha"))
    assert f"mla {mla} (±" in figure.text
    assert f"mha {mha} ({NO_INTERVAL})" in figure.text
    assert {point["low"] for point in figure.charts["all"]["data"]["values"] if point["series"] == "mha"} == {None}


@pytest.mark.parametrize("kinds", [("mla", "mha"), ("mla", "mha", "gqa", "mqa")])
def test_a_kind_has_one_look_and_the_colour_of_its_first_row(kinds):
    """Six rows have a colour each; of twelve, the rows of a kind share one."""
    result = a_result(kinds, sizes=SIZES)
    look, legend = series_of(result.rows), figure_of(result).legend
    assert legend
    assert [(each.label, each.colour, each.shape) for each in legend] == [
        (kind, look[f"{kind}_tiny"].colour, look[f"{kind}_tiny"].shape) for kind in kinds
    ]
    assert len({each.colour for each in legend}) == len({tuple(each.dash) for each in legend}) == len(kinds)
