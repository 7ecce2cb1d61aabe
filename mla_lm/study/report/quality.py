"""Figures of how well the models predict."""

import math

from mla_lm.charts import Series, Spec, colour, encoded, lines
from mla_lm.inference.evaluate import ranges
from mla_lm.study.report.figures import Figure, tooltip
from mla_lm.study.report.numbers import MEASURES, joined, percent, spread
from mla_lm.study.result import Curve, Result, Row

ACROSS = {  # x axis of the curves: title and format
    "tokens": ("tokens seen", "~s"),
    "seconds": ("seconds of training", ",~f"),
    "FLOPs": ("training FLOPs", "~s"),
}
SIGNED = "datum.value === 0 ? '0' : format(datum.value, '+.2~%')"
MARKS = 12  # large marks on a curve at most


def curves(rows: list[Row], look: dict[str, Series], measure: str) -> Figure | None:
    drawn = [(row, row.curve) for row in rows if row.curve and row.curve.tokens]
    if not drawn:
        return None
    ends = [f"{row.name} ends at {getattr(curve, measure)[-1].mean:.3f}" for row, curve in drawn]
    bands = any(value.low is not None for _, curve in drawn for value in getattr(curve, measure))
    text = f"Validation {MEASURES[measure]} over training{', with 95% intervals over seeds' * bands}: {joined(ends)}."
    charts = {across: _curves_over(across, drawn, look, measure) for across in ACROSS}
    return Figure("curves", "Training curves", text, charts, choice="Horizontal axis")


def _curves_over(across: str, drawn: list[tuple[Row, Curve]], look: dict[str, Series], measure: str) -> Spec:
    points = []
    for row, curve in drawn:
        values, every = getattr(curve, measure), math.ceil(len(curve.tokens) / MARKS)
        for number, (x, value) in enumerate(zip(getattr(curve, across.lower()), values, strict=True)):
            band = {"low": value.low, "high": value.high, "interval": spread(value, ".4f")}
            marked = (len(values) - 1 - number) % every == 0
            points.append({"series": look[row.name].label, "x": x, "y": value.mean, "marked": marked, **band})
    title, form = ACROSS[across]
    x = {"title": title, "axis": {"format": form}}
    y = {"title": f"validation {MEASURES[measure]}", "scale": {"zero": False}}
    fields = tooltip((title, ",.4~s"), (MEASURES[measure], ".4f"))
    fields += [{"field": "interval", "title": "95% interval"}] * any(point["interval"] for point in points)
    return lines(points, [look[row.name] for row, _ in drawn], x, y, fields)


def differences(result: Result, look: dict[str, Series]) -> Figure | None:
    """The paired difference of each row's test loss to its baseline's, in percent of that."""
    points, said = [], []
    for row in result.rows:
        if share := result.relative_difference(row):
            mean, low, high = share.mean, share.low, share.high
            interval = f"{percent(low)} to {percent(high)}" if low is not None and high is not None else ""
            point = {"series": look[row.name].label, "name": row.name, "baseline": row.baseline}
            points.append({**point, "y": mean, "low": low, "high": high, "interval": interval})
            said.append(f"{row.name} {percent(mean)}" + f" ({interval})" * bool(interval))
    if not points:
        return None
    intervals = ", with 95% intervals" * any(point["interval"] for point in points)
    text = (
        f"Paired difference of the test loss to the baseline's, on the same seeds and test windows{intervals}. "
        f"Left of zero is better than {joined(sorted({point['baseline'] for point in points}))}: {joined(said)}."
    )
    spec = _differences(points, [look[point["name"]] for point in points])
    return Figure("differences", "Difference to the baseline", text, {"all": spec}, key=False)


def _differences(points: list[dict], series: list[Series]) -> Spec:
    order = [each.label for each in series]
    y = {"field": "series", "type": "nominal", "sort": order, "title": None, "axis": {"labelLimit": 110, "grid": True}}
    fields = [{"field": name, "title": title} for name, title in (("series", "row"), ("baseline", "baseline"))]
    fields += [{"field": "y", "type": "quantitative", "title": "difference", "format": "+.2%"}]
    fields += [{"field": "interval", "title": "95% interval"}]
    x = {"type": "quantitative", "title": "difference of test loss to the baseline", "axis": {"labelExpr": SIGNED}}
    zero = {"mark": {"type": "rule", "color": colour("muted")}, "encoding": {"x": {"datum": 0, **x}}}
    intervals = {
        "transform": [{"filter": "isValid(datum.low)"}],
        "mark": {"type": "rule", "strokeWidth": 2},
        "encoding": {"y": y, "x": {"field": "low", **x}, "x2": {"field": "high"}, **encoded(series, "color")},
    }
    means = {
        "mark": {"type": "point", "filled": True, "opacity": 1, "size": 110},
        "encoding": {"y": y, "x": {"field": "y", **x}, "tooltip": fields, **encoded(series, "color", "shape")},
    }
    some = any(point["low"] is not None for point in points)
    layers = [zero, intervals, means] if some else [zero, means]
    return {"height": 28 * len(points), "data": {"values": points}, "layer": layers}


def position(rows: list[Row], look: dict[str, Series]) -> Figure | None:
    """Test loss by how many tokens of the window stand before: the mean over ranges that double."""
    rows = [row for row in rows if row.position]
    if not rows:
        return None
    points = []
    for row in rows:
        for start, end in ranges(len(row.position)):
            x, y = (start + end + 1) / 2, sum(row.position[start:end]) / (end - start)
            points.append({"series": look[row.name].label, "x": x, "y": y})
    last = {row.name: [p["y"] for p in points if p["series"] == look[row.name].label][-1] for row in rows}
    text = (
        "Test loss by place in the window: the more tokens stand before, the more a model can use. In the last half of "
        f"the window {joined([f'{name} has {loss:.3f}' for name, loss in last.items()])} nats."
    )
    x = {"title": "place in the window", "scale": {"type": "log", "base": 2}, "axis": {"format": ",.0f"}}
    y = {"title": "test loss (nats per token)", "scale": {"zero": False}}
    spec = lines(points, [look[row.name] for row in rows], x, y, tooltip(("place", ",.0f"), ("loss", ".4f")))
    return Figure("position", "Loss by position", text, {"all": spec})


def rates(rows: list[Row], look: dict[str, Series]) -> Figure | None:
    """Validation loss by learning rate, of the runs that tuned it."""
    rows = [row for row in rows if len(row.tried) > 1]
    if not rows:
        return None
    points, best = [], []
    for row in rows:
        tried = sorted((float(rate), loss) for rate, loss in row.tried.items())
        points += [{"series": look[row.name].label, "x": rate, "y": loss} for rate, loss in tried]
        rate = min(tried, key=lambda pair: pair[1])[0]
        inside = tried[0][0] < rate < tried[-1][0]
        best.append(f"{row.name} at {rate:g}{'' if inside else ', at the end of what was tried'}")
    text = f"Validation loss by learning rate, tuned for each row on a seed of its own. Lowest are {joined(best)}."
    ticks = sorted({point["x"] for point in points})
    room = {"type": "log", "domain": [ticks[0] / 1.2, ticks[-1] * 1.2], "nice": False}
    x = {"title": "learning rate", "scale": room, "axis": {"values": ticks, "format": "~g"}}
    y = {"title": "validation loss (nats per token)", "scale": {"zero": False}}
    spec = lines(points, [look[row.name] for row in rows], x, y, tooltip(("learning rate", "~g"), ("loss", ".4f")))
    return Figure("rates", "Learning rates tried", text, {"all": spec})
