"""The table of every number, and the same as CSV."""

import csv
import io

from mla_lm.study.report.numbers import joined, percent, spread, tokens
from mla_lm.study.report.table import as_csv, table_of
from mla_lm.study.result import Estimate
from tests.study.report.results import a_result


def test_cells():
    result = a_result()
    columns, table = table_of(result)
    place = {column.name: number for number, column in enumerate(columns)}
    for row, cells in zip(result.rows, table, strict=True):
        loss = row.estimates["test_loss"]
        cell = cells[place["test_loss"]]
        assert (cell.text, cell.value) == (f"{loss.mean:.4f}", loss.mean)
        assert cell.small == f"±{loss.half_width:.4f}"
        assert cells[place["cache_bytes_per_token"]].value == row.figures["cache_bytes_per_token"]
    assert [cells[place["difference"]].value != "" for cells in table] == [True, False, True, True]
    assert "of mha_small" in table[0][place["difference"]].small


def test_columns_without_a_value_are_left_out():
    result = a_result(("mla", "mqa"), seeds=1)
    for row in result.rows:
        row.decoding = []
        del row.estimates["peak_memory_bytes"]
    names = {column.name for column in table_of(result)[0]}
    assert not {"decoding", "peak_memory_bytes", "difference"} & names
    assert {"test_loss", "tokens_per_second"} <= names


def test_csv_is_unrounded():
    result = a_result()
    rows = list(csv.DictReader(io.StringIO(as_csv(result))))
    for row, line in zip(result.rows, rows, strict=True):
        loss = row.estimates["test_loss"]
        written = [float(line[name]) for name in ("test_loss", "test_loss_low", "test_loss_high")]
        assert written == [loss.mean, loss.low, loss.high]
        assert line["runs"].split() == row.runs


def test_numbers():
    assert [percent(share) for share in (0.0075, 0.0, 0.0004)] == ["+0.8%", "+0.0%", "+0.04%"]
    assert spread(Estimate([1.0], 1.0), ".2f") == ""
    assert spread(Estimate([1.0, 3.0], 2.0, 1.5, 2.5), ".2f") == "±0.50"
    assert spread(Estimate([1.0, 3.0], 2.0, 1.0, 2.5), ".2f") == "1.00 to 2.50"
    assert [tokens(count) for count in (512, 16384, 1.5 * 2**20)] == ["512", "16K", "1.5M"]
    assert joined(["a"]) == "a"
    assert joined(["a", "b", "c"]) == "a, b and c"
    assert joined([str(n) for n in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
