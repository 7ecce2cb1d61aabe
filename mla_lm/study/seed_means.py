"""The table of means over seeds at the end of a multirun."""

from mla_lm.runs.folder import RunFolder
from mla_lm.study.collect import load, named_rows, same_but_for_seed
from mla_lm.study.compare import shown_estimate
from mla_lm.study.row_figures import row_of
from mla_lm.terminal.tables import table

COLUMNS = (("val_loss", "val loss"), ("val_bits_per_byte", "val bits/byte"), ("test_bits_per_byte", "test bits/byte"))


def seed_means(folders: list[RunFolder]) -> str | None:
    """A row for each setting, best validation first: means over its seeds and half of their 95% intervals.

    None where no two of these finished runs differ in their seed alone.
    """
    groups = named_rows(same_but_for_seed([load(folder) for folder in folders])) if folders else {}
    if all(len(group) == 1 for group in groups.values()):
        return None
    rows = sorted(
        (row_of(name, group) for name, group in groups.items()), key=lambda row: row.estimates["val_loss"].mean
    )
    cells = [["mean over seeds", "seeds", *(heading for _, heading in COLUMNS)]]
    for row in rows:
        figures = [shown_estimate(row.estimates.get(key), "{:.4f}".format) for key, _ in COLUMNS]
        cells.append([row.name, str(len(row.seeds)), *figures])
    return table(cells)
