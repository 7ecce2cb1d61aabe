"""The figures of a report: each a title, a text that says what it shows, and one chart or several to choose from."""

from dataclasses import dataclass

from mla_lm.charts import DASHES, SERIES_COLOURS, SHAPES, Series, Spec
from mla_lm.study.result import Row

SHORT = 16  # characters of a name that a chart has room for


@dataclass
class Figure:
    """
    Attributes:
        name: of its files, and of its place in the page
        title: what it shows
        text: what it says, in words, for those who do not see it
        charts: one chart, or several under the words by which a reader chooses one
        choice: what is chosen; empty with one chart
        key: whether a legend belongs to it
        legend: of its own, where its series are kinds instead of rows
    """

    name: str
    title: str
    text: str
    charts: dict[str, Spec]
    choice: str = ""
    key: bool = True
    legend: list[Series] | None = None


def picture_name(figure: Figure, chart: str) -> str:
    """Of a chart's files, without their ending."""
    return figure.name if len(figure.charts) == 1 else f"{figure.name}-{chart.replace(' ', '-').lower()}"


def series_of(rows: list[Row]) -> dict[str, Series]:
    """How each row looks in all charts, under its name.

    Colours are of the rows while there are enough, else of the kinds. The shape is the kind's, and the dash tells rows
    of one kind apart: nothing hangs on colour alone.
    """
    kinds = list(dict.fromkeys(row.kind for row in rows))
    look, of_kind = {}, dict.fromkeys(kinds, 0)
    short = all(len(row.name) <= SHORT for row in rows)
    several = {kind for kind in kinds if sum(row.kind == kind for row in rows) > 1}
    for number, row in enumerate(rows):
        place, nth = kinds.index(row.kind), of_kind[row.kind]
        of_kind[row.kind] += 1
        numbered = f"{row.kind} {nth + 1}" if row.kind in several else row.kind
        look[row.name] = Series(
            label=row.name if short else numbered,
            name=row.name,
            number=number if len(rows) <= SERIES_COLOURS else place,
            shape=SHAPES[place % len(SHAPES)],
            dash=DASHES[nth % len(DASHES)],
        )
    return look


def tooltip(x: tuple[str, str], y: tuple[str, str]) -> list[Spec]:
    """What pointing at a mark shows: its row, and x and y, each under a title and in a format."""
    fields = [{"field": "series", "title": "row"}]
    for field, (title, form) in (("x", x), ("y", y)):
        fields.append({"field": field, "type": "quantitative", "title": title, "format": form})
    return fields
