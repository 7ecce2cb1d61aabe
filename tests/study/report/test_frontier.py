"""The Pareto front, and the labels of its points."""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from mla_lm.charts import HEIGHT
from mla_lm.study.report.figures import series_of
from mla_lm.study.report.frontier import (
    LABEL_HEIGHT,
    LETTER,
    NARROW,
    choices,
    frontier,
    pareto,
    place_labels,
    x_range_of,
)
from mla_lm.study.result import Estimate, Row
from tests.study.report.results import a_result

POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=9)


def row(number: int, cache: float, loss: float) -> Row:
    figures = {"cache_bytes_per_token": 100.0 * 2**cache}
    return Row(f"row {number}", "mla", "small", [], [1], figures, {"test_loss": Estimate([loss], float(loss))})


@given(POINTS)
def test_front_is_what_nothing_beats(points):
    rows = [row(number, *point) for number, point in enumerate(points)]
    front = [
        (math.log2(r.figures["cache_bytes_per_token"] / 100), r.estimates["test_loss"].mean)
        for r in pareto(rows, "loss")
    ]
    unbeaten = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert set(front) == unbeaten
    assert len(front) == len(unbeaten)


@given(POINTS)
def test_labels_do_not_overlap_even_on_a_phone(points):
    marks = [{"series": f"mla {n}", "x": 100.0 * 2**cache, "y": float(loss)} for n, (cache, loss) in enumerate(points)]
    x_range, y_range = x_range_of(marks), (-1.0, 10.0)
    place_labels(marks, x_range, y_range)
    pixels = HEIGHT / (y_range[1] - y_range[0])
    across = {id(m): NARROW * math.log(m["x"] / x_range[0]) / math.log(x_range[1] / x_range[0]) for m in marks}
    for one, other in itertools.combinations(marks, 2):
        apart = abs(across[id(one)] - across[id(other)]) >= LETTER * len("mla 0")
        assert apart or abs(one["at"] - other["at"]) * pixels >= LABEL_HEIGHT - 1e-6
    assert max(mark["at"] for mark in marks) <= y_range[1]
    assert max(across.values()) + LETTER * len("mla 0") <= NARROW


def test_a_label_does_not_lie_on_another_point():
    """Nor is it moved because of one above or below its own, beside which it begins."""
    marks = [{"series": "mla", "x": 640.0, "y": 3.26}, {"series": "mqa", "x": 720.0, "y": 3.275}]
    marks += [{"series": "mha", "x": 3072.0, "y": y} for y in (3.27, 3.288)]
    place_labels(marks, x_range_of(marks), (3.2, 3.6))
    step = LABEL_HEIGHT / HEIGHT * 0.4
    assert abs(marks[0]["at"] - marks[1]["y"]) >= step - 1e-6
    assert [mark["at"] for mark in marks[2:]] == [3.27, 3.288]


def test_each_size_and_view_can_be_chosen():
    rows = a_result(("mla", "mha"), sizes=("tiny", "small")).rows
    views = {"parameters": [row.name for row in rows], "cache": ["mla_tiny"]}
    assert {name: len(members) for name, members in choices(rows, views).items()} == {
        "small, matched by parameters": 2,
        "tiny, matched by parameters": 2,
        "tiny, matched by cache": 1,
    }
    assert list(choices(rows[:2], {})) == ["all"]


def test_text_names_the_front():
    result = a_result()
    figure = frontier(result.rows, series_of(result.rows), {}, "loss")
    assert figure
    for member in pareto(result.rows, "loss"):
        assert f"{member.name} ({member.figures['cache_bytes_per_token']:,.0f} bytes" in figure.text
    assert frontier([], {}, {}, "loss") is None
