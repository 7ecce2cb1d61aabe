"""Figures of what the models cost at inference: memory of the KV cache, speed of decoding."""

import math

from mla_lm.charts import Series, Spec, colour
from mla_lm.charts import lines as line_chart
from mla_lm.study.report.figures import Figure, tooltip
from mla_lm.study.report.numbers import joined, tokens
from mla_lm.study.result import Row

GPU_MEMORY = {"8 GiB (RTX 4060)": 8, "24 GiB (RTX 4090)": 24, "80 GiB (H100)": 80, "192 GiB (MI300X)": 192}
GIB = 2**30
BYTES = "datum.value >= 1073741824 ? datum.value / 1073741824 + ' GiB' : datum.value / 1048576 + ' MiB'"
COUNT = (
    "datum.value >= 1048576 ? datum.value / 1048576 + 'M' : "
    "datum.value >= 1024 ? datum.value / 1024 + 'K' : datum.value"
)


def memory(rows: list[Row], look: dict[str, Series]) -> Figure | None:
    """Bytes of KV cache against the tokens in it, as far as the largest GPU goes."""
    per_token = {row.name: b for row in rows if (b := row.figures.get("cache_bytes_per_token"))}
    if not per_token:
        return None
    end = math.ceil(math.log2(max(GPU_MEMORY.values()) * GIB / max(per_token.values()))) + 1
    points = [
        {"series": look[name].label, "x": 2**power, "y": 2**power * size, "mib": f"{2**power * size / 2**20:,.1f} MiB"}
        for name, size in per_token.items()
        for power in range(10, end + 1)
    ]
    for point in points:
        point["marked"] = (point["x"].bit_length() - end) % 4 == 1
    fits = [f"{name} {tokens(80 * GIB / size)}" for name, size in per_token.items()]
    text = (
        "Memory of the KV cache against the tokens in it, over all sequences of a batch, both axes logarithmic. "
        f"80 GiB hold this many tokens: {joined(fits)}."
    )
    x = {
        "title": "tokens in the cache",
        "scale": {"type": "log", "base": 2, "nice": False, "domain": [2**10, 2**end]},
        "axis": {"values": [2**power for power in range(10, end + 1, 4)], "labelExpr": COUNT},
    }
    y = {
        "title": "KV cache",
        "scale": {"type": "log", "base": 2},
        "axis": {"values": [2**power for power in range(20, 46, 5)], "labelExpr": BYTES},
    }
    series = [look[name] for name in per_token]
    spec = line_chart(points, series, x, y, tooltip(("tokens", ",.0f"), ("bytes", ",.0f")))
    spec["layer"][-1]["encoding"]["tooltip"].append({"field": "mib", "title": "cache"})
    spec["layer"] += _gpu_lines(y)
    return Figure("memory", "Cache memory against context", text, {"all": spec})


def _gpu_lines(y: Spec) -> list[Spec]:
    gpus = [{"gpu": name, "memory": size * GIB} for name, size in GPU_MEMORY.items()]
    height = {"y": {"field": "memory", "type": "quantitative", **y}}
    name = {
        "type": "text",
        "align": "left",
        "baseline": "bottom",
        "dx": 4,
        "dy": -2,
        "fontSize": 11,
        "color": colour("muted"),
    }
    return [
        {
            "data": {"values": gpus},
            "mark": {"type": "rule", "color": colour("muted"), "strokeWidth": 0.8, "strokeDash": [3, 3]},
            "encoding": {"x": {"value": 0}, "x2": {"value": "width"}, **height},
        },
        {"data": {"values": gpus}, "mark": name, "encoding": {"x": {"value": 0}, "text": {"field": "gpu"}, **height}},
    ]


def decoding(rows: list[Row], look: dict[str, Series]) -> Figure | None:
    """Tokens per second of one sequence against the tokens that its cache holds."""
    rows = [row for row in rows if row.decoding]
    if not rows:
        return None
    points = [
        {
            "series": look[row.name].label,
            "x": at.context,
            "y": at.tokens_per_second,
            "cache": f"{at.cache_bytes:,} bytes",
        }
        for row in rows
        for at in row.decoding
    ]
    longest = max(point["x"] for point in points)
    speeds = [f"{row.name} {at.tokens_per_second:,.0f}" for row in rows for at in row.decoding if at.context == longest]
    text = (
        "Speed of greedy decoding, one sequence, against the tokens in its cache. Tokens per second after "
        f"{tokens(longest)} tokens: {joined(speeds)}."
    )
    contexts = sorted({point["x"] for point in points})
    x = {
        "title": "tokens in the cache",
        "scale": {"type": "log", "base": 2, "nice": False},
        "axis": {"values": contexts, "labelExpr": COUNT},
    }
    y = {"title": "tokens per second", "axis": {"format": ",~f"}}
    fields = [*tooltip(("context", ",.0f"), ("tokens per second", ",.1f")), {"field": "cache", "title": "cache"}]
    spec = line_chart(points, [look[row.name] for row in rows], x, y, fields)
    return Figure("decoding", "Decoding speed against context", text, {"all": spec})
