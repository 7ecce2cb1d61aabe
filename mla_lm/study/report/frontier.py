"""The figure of test loss against KV cache, with its Pareto front."""

import math

from mla_lm.charts import HEIGHT, Series, Spec, colour, encoded, error_bars
from mla_lm.study.report.figures import Figure, tooltip
from mla_lm.study.report.numbers import MEASURES, joined, spread
from mla_lm.study.result import Row

LABEL_HEIGHT, LETTER = 14, 7  # pixels that the label of a point takes, and each letter of it at most
AWAY, RADIUS = 10, 6  # pixels from a point to its label, and from its middle to its edge
NARROW, WIDE = 220, 560  # pixels between the axes on a phone, and in a picture


def frontier(rows: list[Row], look: dict[str, Series], views: dict[str, list[str]], measure: str) -> Figure | None:
    """Test loss against bytes of KV cache, with the rows that no other beats in both."""
    rows = [row for row in rows if f"test_{measure}" in row.estimates and row.figures.get("cache_bytes_per_token")]
    if not rows:
        return None
    best = pareto(rows, measure)
    text = (
        f"Test {MEASURES[measure]} against bytes of KV cache per token. On the Pareto front, where no other row of the "
        f"size has both less cache and a lower loss, {'is' if len(best) == 1 else 'are'} "
        f"{joined([_point(row, measure) for row in best])}."
    )
    charts = {name: _frontier(members, look, measure) for name, members in choices(rows, views).items()}
    key = any(look[row.name].label != row.name for row in rows)  # else the points are named in the chart
    return Figure("frontier", "Loss against cache", text, charts, choice="Rows", key=key)


def choices(rows: list[Row], views: dict[str, list[str]]) -> dict[str, list[Row]]:
    """The rows of each size, and of what they are matched by, where there are several of these."""
    sizes = list(dict.fromkeys(row.size for row in rows))
    chosen = {}
    for size in reversed(sizes):
        for view, names in (views if len(views) > 1 else {"": [row.name for row in rows]}).items():
            label = [size] * (len(sizes) > 1) + [f"matched by {view}"] * bool(view)
            chosen[", ".join(label) or "all"] = [row for row in rows if row.size == size and row.name in names]
    return {label: members for label, members in chosen.items() if members}


def _point(row: Row, measure: str) -> str:
    value = row.estimates[f"test_{measure}"]
    interval = spread(value, ".3f")
    return (
        f"{row.name} ({row.figures['cache_bytes_per_token']:,.0f} bytes, {value.mean:.3f}{interval and ' '}{interval})"
    )


def pareto(rows: list[Row], measure: str) -> list[Row]:
    """Rows to which no other row of their size is equal or better in both cache and mean, from the least cache on."""

    def cost(row: Row) -> tuple[float, float]:
        return row.figures["cache_bytes_per_token"], row.estimates[f"test_{measure}"].mean

    front: list[Row] = []
    lowest: dict[str, float] = {}
    for row in sorted(rows, key=cost):
        if cost(row)[1] < lowest.get(row.size, math.inf):
            lowest[row.size] = cost(row)[1]
            front.append(row)
    return front


def _frontier(rows: list[Row], look: dict[str, Series], measure: str) -> Spec:
    front = {row.name for row in pareto(rows, measure)}
    points = []
    for row in rows:
        value = row.estimates[f"test_{measure}"]
        points.append(
            {
                "series": look[row.name].label,
                "size": row.size,
                "x": row.figures["cache_bytes_per_token"],
                "y": value.mean,
                "low": value.low,
                "high": value.high,
                "interval": spread(value, ".4f"),
                "front": "yes" if row.name in front else "no",
            }
        )
    x_range = x_range_of(points)
    ends = [end for p in points for end in (p["low"], p["high"], p["y"]) if end is not None]
    room = 0.08 * (max(ends) - min(ends)) or 0.01 * max(ends)
    y_range = (min(ends) - room, max(ends) + room)
    place_labels(points, x_range, y_range)
    ticks = [digit * 10**power for power in range(1, 9) for digit in (1, 2, 5)]
    x_axis = {"format": ",", "values": [tick for tick in ticks if x_range[0] <= tick <= x_range[1]]}
    x_scale = {"type": "log", "domain": list(x_range), "nice": False}
    y_scale = {"zero": False, "domain": list(y_range), "nice": False}
    series = [look[row.name] for row in rows]
    fields = tooltip(("bytes per token", ",.0f"), (f"test {MEASURES[measure]}", ".4f"))
    fields += [{"field": "interval", "title": "95% interval"}, {"field": "front", "title": "on the Pareto front"}]
    leaders = {  # from a point to its label, where that has been moved
        "transform": [{"filter": "datum.at !== datum.y"}],
        "mark": {"type": "rule", "color": colour("muted"), "strokeWidth": 0.7, "xOffset": 4, "x2Offset": 9},
        "encoding": {"x2": {"field": "x"}, "y2": {"field": "at"}},
    }
    right = {"type": "text", "align": "left", "baseline": "middle", "dx": AWAY}
    layers = [
        {
            "transform": [{"filter": "datum.front === 'yes'"}],
            "mark": {"type": "line", "color": colour("muted"), "strokeWidth": 1, "interpolate": "step-after"},
            "encoding": {"detail": {"field": "size"}},
        },
        {
            "mark": {"type": "point", "filled": True, "opacity": 1, "size": 110},
            "encoding": {**encoded(series, "color", "shape"), "tooltip": fields},
        },
        {"mark": right, "encoding": {"text": {"field": "series"}, "y": quantity("at")}},
    ]
    if any(point["low"] is not None for point in points):
        layers.insert(1, error_bars(series))
    if any(point["at"] != point["y"] for point in points):
        layers.insert(1, leaders)
    return {
        "data": {"values": points},
        "encoding": {
            "x": {"title": "KV cache (bytes per token)", "scale": x_scale, "axis": x_axis, **quantity("x")},
            "y": {"title": f"test {MEASURES[measure]}", "scale": y_scale, **quantity("y")},
        },
        "layer": layers,
    }


def quantity(field: str) -> Spec:
    return {"field": field, "type": "quantitative"}


def x_range_of(points: list[dict]) -> tuple[float, float]:
    """Ends of a logarithmic axis, with room for a label to the right of the last point, even on a phone."""
    start, last = min(point["x"] for point in points) / 1.5, max(point["x"] for point in points)
    label = (LETTER * max(len(point["series"]) for point in points) + AWAY) / NARROW
    return start, last * (last / start) ** (label / (1 - label))


def place_labels(points: list[dict], x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
    """Give each point `at`, the height of its label in units of y: its own, or another where that place is taken.

    Labels move up until they lie on no other label and no other point, and down again where they would leave the chart,
    where they keep clear of labels alone. Labels are as far apart as on a phone, which has the least room. Points have
    a picture's distances: on a phone too many are in the way.
    """
    step = LABEL_HEIGHT * (y_range[1] - y_range[0]) / HEIGHT

    def across(point: dict, width: int = NARROW) -> float:
        return width * math.log(point["x"] / x_range[0]) / math.log(x_range[1] / x_range[0])

    def length(point: dict) -> int:
        return LETTER * len(point["series"])

    def neighbours(point: dict, placed: list[dict]) -> list[dict]:
        """Those whose labels would overlap its own at one height."""
        return [other for other in placed if -length(other) < across(other) - across(point) < length(point)]

    def covered(point: dict) -> list[float]:
        """Heights of the points that its label would lie on."""
        start = across(point, WIDE) + AWAY
        end = start + length(point)
        return sorted(other["y"] for other in points if start - RADIUS < across(other, WIDE) < end + RADIUS)

    placed: list[dict] = []
    for point in sorted(points, key=lambda point: point["y"]):
        point["at"] = max([point["y"], *(other["at"] + step for other in neighbours(point, placed))])
        for taken in covered(point):
            if abs(taken - point["at"]) < step:
                point["at"] = taken + step
        placed.append(point)
    placed = []
    for point in sorted(points, key=lambda point: -point["at"]):
        point["at"] = min([point["at"], y_range[1], *(other["at"] - step for other in neighbours(point, placed))])
        placed.append(point)
