"""The figure of test loss against parameters, with the power law of each kind."""

from dataclasses import replace

from mla_lm.charts import DASHES, Series, Spec, encoded, error_bars, lines
from mla_lm.study.report.figures import Figure, tooltip
from mla_lm.study.report.numbers import MEASURES, MINUS, joined, spread
from mla_lm.study.result import Fit, Result

NO_INTERVAL = "no interval, only two runs"
LOSS = MEASURES["loss"]


def scaling(result: Result, look: dict[str, Series]) -> Figure | None:
    """Test loss against parameters: the rows that were fitted, and the fitted line of each kind with its interval."""
    if not result.fits:
        return None
    kinds = series_of_kinds(result.fits, look)
    points, line = _rows(result), _line(result.fits)
    text = (
        f"Test {LOSS} against parameters, on a logarithmic axis{', with 95% intervals over seeds' * _some(points)}. "
        "A line is the power law, loss = factor x parameters ^ exponent, fitted to the runs of a kind. "
        + "A band is the 95% interval of the line: it covers the spread of the runs about it, not whether loss follows "
        "a power law. "
        * _some(line)
        + f"The exponents: {joined([_exponent(kind, fit) for kind, fit in result.fits.items()])}."
    )
    spec = _scaling(points, line, kinds)
    return Figure("scaling", "Loss against parameters", text, {"all": spec}, legend=kinds)


def series_of_kinds(fits: dict[str, Fit], look: dict[str, Series]) -> list[Series]:
    """A series for each kind, in the colour and shape of its first row. The dash tells lines apart without colour."""
    return [
        replace(look[fit.rows[0]], label=kind, name=kind if fit.low else NO_INTERVAL, dash=DASHES[nth % len(DASHES)])
        for nth, (kind, fit) in enumerate(fits.items())
    ]


def _exponent(kind: str, fit: Fit) -> str:
    mean = f"{fit.exponent.mean:.4f}".replace("-", MINUS)
    return f"{kind} {mean} ({spread(fit.exponent, '.4f') or NO_INTERVAL})"


def _some(points: list[dict]) -> bool:
    return any(point["low"] is not None for point in points)


def _rows(result: Result) -> list[dict]:
    fitted = {name for fit in result.fits.values() for name in fit.rows}
    points = []
    for row in result.rows:
        if row.name in fitted:
            value = row.estimates["test_loss"]
            ends = {"low": value.low, "high": value.high, "interval": spread(value, ".4f")}
            points.append(
                {"series": row.kind, "name": row.name, "x": row.figures["parameters"], "y": value.mean, **ends}
            )
    return points


def _line(fits: dict[str, Fit]) -> list[dict]:
    points = []
    for kind, fit in fits.items():
        nothing = [None] * len(fit.loss)
        for x, y, low, high in zip(fit.parameters, fit.loss, fit.low or nothing, fit.high or nothing, strict=True):
            points.append({"series": kind, "x": x, "y": y, "low": low, "high": high})
    return points


def _scaling(points: list[dict], line: list[dict], kinds: list[Series]) -> Spec:
    sizes = [point["x"] for point in points]
    room = {"type": "log", "domain": [min(sizes) / 1.1, max(sizes) * 1.1], "nice": False}
    x = {"title": "parameters", "scale": room, "axis": {"format": "~s"}}
    y = {"title": f"test {LOSS}", "scale": {"zero": False}}
    fields = [{"field": "name", "title": "row"}, *tooltip(("parameters", ",.0f"), (f"test {LOSS}", ".4f"))[1:]]
    fields += [{"field": "interval", "title": "95% interval"}] * _some(points)
    means = {
        "mark": {"type": "point", "filled": True, "opacity": 1, "size": 55},
        "encoding": {**encoded(kinds, "color", "shape"), "tooltip": fields},
    }
    spec = lines(line, kinds, x, y)
    fitted = spec["layer"][:-1]  # without a mark at every point of a line
    rows = [error_bars(kinds), means] if _some(points) else [means]
    spec["layer"] = [*fitted, *({"data": {"values": points}, **layer} for layer in rows)]
    return spec
