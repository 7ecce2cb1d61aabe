"""Charts: their colours, their pictures, and what they need."""

import itertools
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from mla_lm import charts
from mla_lm.errors import UserError

SERIES = [charts.Series(f"row {n}", f"row {n}", n, charts.SHAPES[n], charts.DASHES[n]) for n in range(3)]
POINTS = [{"series": f"row {n}", "x": x, "y": n + x} for n in range(3) for x in (1, 2, 4)]


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [charts.LIGHT, charts.DARK])
def test_contrast(theme):
    """WCAG AA: 4.5 for text, 3 for what has to be seen in a chart."""
    for name, colour in theme.items():
        least = {"ink": 4.5, "muted": 4.5, "page": 1, "grid": 1}.get(name, 3)
        assert contrast(colour, theme["page"]) >= least, name
    series = [colour for name, colour in theme.items() if name.startswith("series")]
    assert len(set(series)) == charts.SERIES_COLOURS


def test_light_and_dark_have_the_same_names():
    assert list(charts.LIGHT) == list(charts.DARK)


def test_picture_is_drawn_in_light_colours_on_white():
    picture = charts.svg(charts.lines(POINTS, SERIES, {"title": "across"}, {"title": "up"}))
    assert "var(" not in picture
    root = ElementTree.fromstring(picture)
    texts = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"across", "up", "row 0", "row 1", "row 2"} <= texts
    fills = {element.get("fill") for element in root.iter()}
    assert {"#FFFFFF", *(charts.LIGHT[f"series-{n}"] for n in range(3))} <= fills
    assert charts.png(picture).startswith(b"\x89PNG")


def test_band_only_where_there_are_intervals():
    with_band = [{**point, "low": point["y"] - 1, "high": point["y"] + 1} for point in POINTS]
    assert [len(charts.lines(points, SERIES, {}, {})["layer"]) for points in (POINTS, with_band)] == [2, 3]


def test_rows_are_told_apart_without_colour():
    assert len(set(charts.SHAPES)) == len(charts.SHAPES)
    assert all(one != other for one, other in itertools.combinations(charts.DASHES, 2))


def test_legend_of_a_picture_has_full_names():
    named = charts.Series("mla", "mla_small, optimizer.lr=0.001", 0, charts.SHAPES[0], charts.DASHES[0])
    points = [{"series": "mla", "x": 1, "y": 2}, {"series": "mla", "x": 2, "y": 1}]
    assert "mla_small, optimizer.lr=0.001</text>" in charts.svg(charts.lines(points, [named], {}, {}))


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)  # as Python itself marks what cannot be imported
    with pytest.raises(UserError, match="pip install"):
        charts.svg({"mark": "point"})


@pytest.mark.e2e
def test_importing_the_report_loads_no_library_of_it():
    heavy = "{'vl_convert', 'wandb', 'matplotlib', 'altair'}"
    program = f"import sys, mla_lm.study.report, mla_lm.study.plot; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
