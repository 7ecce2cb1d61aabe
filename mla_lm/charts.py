"""Charts as Vega-Lite specifications, which are plain dictionaries, and their pictures as SVG and PNG.

A specification names its colours as CSS variables. A page gives these one value for a light and one for a dark screen,
without drawing again; a picture takes the light ones. https://vega.github.io/vega-lite/docs/
"""

import json
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mla_lm.errors import UserError

Spec = dict[str, Any]

VEGA_LITE = "6.4"
# Seven series after Okabe and Ito, darker or lighter where theirs have less than 3:1 against the page (WCAG 1.4.11).
LIGHT_SERIES = ("#00509A", "#B04400", "#007657", "#C85FA0", "#B98800", "#3597E0", "#1A1A1A")
DARK_SERIES = ("#4C86DE", "#EC6A3C", "#34CE93", "#D07FB0", "#FFCB50", "#A6D2FA", "#F2F2F2")
LIGHT = {"page": "#FFFFFF", "ink": "#1A1A1A", "muted": "#595959", "grid": "#E4E4E4"}
LIGHT |= {f"series-{number}": value for number, value in enumerate(LIGHT_SERIES)}
DARK = {"page": "#16181C", "ink": "#ECECEC", "muted": "#A9ADB3", "grid": "#33373D"}
DARK |= {f"series-{number}": value for number, value in enumerate(DARK_SERIES)}
SERIES_COLOURS = len(LIGHT_SERIES)
# SVG paths in a square from -1 to 1: Vega draws the marks of a chart with them, a page those of its legend.
SHAPES = (
    "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z",  # circle
    "M-.9,-.9H.9V.9H-.9Z",  # square
    "M0,-1.1L1.1,.9H-1.1Z",  # triangle
    "M0,-1.25L1.25,0L0,1.25L-1.25,0Z",  # diamond
    "M0,1.1L1.1,-.9H-1.1Z",  # triangle on its tip
    "M-.4,-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",  # cross
    "M1.1,0L-.9,1.1V-1.1Z",  # triangle to the right
    "M-1.1,0L.9,1.1V-1.1Z",  # triangle to the left
)
DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [12, 3])  # the first is a whole line
FONT = "Helvetica Neue, Helvetica, Arial, sans-serif"
HEIGHT = 320
LEGEND_LETTERS = 90  # in a line of a picture's legend
PICTURE_WIDTH = 640  # pixels of an SVG; a PNG has twice as many


def colour(name: str) -> str:
    """A colour of LIGHT and DARK, as a specification names it."""
    return f"var(--{name})"


CONFIG: Spec = {
    "background": None,
    "font": FONT,
    "aria": False,  # the page describes a chart as a whole; a mark for each point would be read one by one
    "view": {"stroke": None},
    "axis": {
        "domainColor": colour("muted"),
        "gridColor": colour("grid"),
        "labelColor": colour("muted"),
        "labelFontSize": 12,
        "labelOverlap": True,
        "tickColor": colour("muted"),
        "titleColor": colour("ink"),
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
    "axisX": {"grid": False, "titlePadding": 8},
    # The title of the y axis stands above it and reads from left to right.
    "axisY": {
        "domain": False,
        "labelPadding": 6,
        "tickCount": 6,
        "ticks": False,
        "titleAlign": "left",
        "titleAnchor": "end",
        "titleAngle": 0,
        "titleBaseline": "bottom",
        "titleX": -36,
        "titleY": -10,
    },
    "text": {"color": colour("ink"), "fontSize": 12},
    "title": {"color": colour("ink"), "fontSize": 13, "fontWeight": "normal"},
}
PICTURE_LEGEND = {
    "labelColor": colour("ink"),
    "labelFontSize": 12,
    "labelLimit": 0,
    "symbolOpacity": 1,
    "orient": "bottom",
    "symbolSize": 90,
    "symbolStrokeWidth": 0,  # an edge would be broken as the line is
    "title": None,
}


@dataclass
class Series:
    """What a row of a comparison looks like in every chart.

    Attributes:
        label: short and unique
        name: the full name, for a legend
        number: of its colour
        shape: an SVG path out of SHAPES
        dash: lengths of line and gap in pixels, out of DASHES
    """

    label: str
    name: str
    number: int
    shape: str
    dash: list[int]

    @property
    def colour(self) -> str:
        return colour(f"series-{self.number % SERIES_COLOURS}")


def encoded(series: list[Series], *channels: str) -> Spec:
    """The channels out of color, shape and strokeDash, by which the field `series` tells rows apart."""
    ranges = {
        "color": [each.colour for each in series],
        "shape": [each.shape for each in series],
        "strokeDash": [each.dash for each in series],
    }
    domain = [each.label for each in series]
    names = {
        each.label: each.name if each.name.startswith(each.label) else f"{each.label}: {each.name}" for each in series
    }
    longest = max(map(len, names.values()))
    legend = {
        "labelExpr": f"{json.dumps(names)}[datum.label]",
        "columns": max(1, min(len(series), LEGEND_LETTERS // (longest + 4))),
    }
    return {
        channel: {
            "field": "series",
            "type": "nominal",
            "scale": {"domain": domain, "range": ranges[channel]},
            "legend": legend,
        }
        for channel in channels
    }


def lines(points: list[dict], series: list[Series], x: Spec, y: Spec, tooltip: list[Spec] | None = None) -> Spec:
    """A line with marks for each series.

    Args:
        points: series, x and y; low and high, or None, for a band around the line; marked where a mark is drawn large
        x: the axis' type, scale and so on, without its field
        y: likewise
        tooltip: fields that pointing at a mark shows
    """
    marks = {"condition": {"test": "datum.marked !== false", "value": 55}, "value": 14}
    colours = encoded(series, "color")
    band = {
        "transform": [{"filter": "isValid(datum.low)"}],  # of one seed there is no interval
        "mark": {"type": "area", "opacity": 0.15},
        "encoding": {"y": {"field": "low", **y}, "y2": {"field": "high"}, **colours},
    }
    line = {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": encoded(series, "color", "strokeDash")}
    point = {
        "mark": {"type": "point", "filled": True, "opacity": 1},
        "encoding": {**encoded(series, "color", "shape"), "size": marks, "tooltip": tooltip or []},
    }
    return {
        "data": {"values": points},
        "encoding": {
            "x": {"field": "x", "type": "quantitative", **x},
            "y": {"field": "y", "type": "quantitative", **y},
        },
        "layer": [band, line, point] if any(p.get("low") is not None for p in points) else [line, point],
    }


def error_bars(series: list[Series]) -> Spec:
    """A layer with the interval of each point that has one, under low and high."""
    return {
        "transform": [{"filter": "isValid(datum.low)"}],
        "mark": {"type": "errorbar", "ticks": {"size": 8}},
        "encoding": {
            "y": {"title": "", "field": "low", "type": "quantitative"},
            "y2": {"field": "high"},
            **encoded(series, "color"),
        },
    }


def vertical_line(x: float, label: str) -> list[Spec]:
    """Layers for a line across the chart, and its label to the left of it."""
    place = {"data": {"values": [{"x": x}]}}
    across = {"x": {"field": "x", "type": "quantitative"}}
    grey = {"color": colour("muted")}
    text = {"type": "text", "text": label, "align": "right", "baseline": "top", "dx": -5, **grey}
    return [
        {
            **place,
            "mark": {"type": "rule", **grey},
            "encoding": {**across, "y": {"value": 0}, "y2": {"value": "height"}},
        },
        {**place, "mark": text, "encoding": {**across, "y": {"value": 2}}},
    ]


def drawable(spec: Spec) -> Spec:
    """A specification that fills the width of the element it is drawn in, and leaves the legend to the page."""
    bare = json.loads(json.dumps(spec), object_hook=lambda part: part | {"legend": None} if "legend" in part else part)
    sizes = {"width": "container", "height": HEIGHT, "autosize": {"type": "fit-x", "contains": "padding"}}
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", **sizes, **bare, "config": CONFIG}


def svg(spec: Spec) -> str:
    return _vega().vegalite_to_svg(_picture(spec), vl_version=VEGA_LITE, allowed_base_urls=[])


def png(picture: str) -> bytes:
    """Of an SVG, with twice as many pixels."""
    return _vega().svg_to_png(picture, scale=2)


def javascript() -> str:
    """Vega, Vega-Lite and vega-embed in one script of 0.9 MB, which takes some seconds to put together."""
    return _vega().javascript_bundle(vl_version=VEGA_LITE)


def _picture(spec: Spec) -> str:
    """With a legend, a fixed size and the colours of LIGHT on white, legible on any page."""
    config = {**CONFIG, "background": colour("page"), "padding": 16, "legend": PICTURE_LEGEND}
    sizes = {} if "hconcat" in spec else {"width": PICTURE_WIDTH, "height": HEIGHT}
    text = json.dumps({**sizes, **spec, "config": config})
    return re.sub(r"var\(--([a-z0-9-]+)\)", lambda found: LIGHT[found[1]], text)


def _vega() -> ModuleType:
    """Vega-Lite with a JavaScript engine around it, which needs neither a browser nor a network."""
    try:
        import vl_convert
    except ImportError as error:
        raise UserError("charts need vl-convert-python: pip install -r requirements.txt") from error
    return vl_convert
