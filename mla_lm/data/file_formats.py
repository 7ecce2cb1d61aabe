"""Reads a user's file as documents: plain text in pieces, JSON and Parquet row by row through `datasets`."""

import functools
import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from mla_lm.errors import UserError

BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
LINES = (".jsonl", ".ndjson")  # one row per line
NOT_TEXT = (".csv", ".tsv", ".arrow", ".zip", ".tar", ".tgz", ".zst", ".xz", ".bz2", ".pdf", ".docx", ".bin", ".npy")
PIECE = 2**16  # characters of a plain text file read at once, up to the next line end
ROWS = 1000  # rows of JSON and Parquet read at once
# Limits on gzipped JSON, in bytes. `datasets` holds whole lines in memory, and the whole of a file that is an array or
# has a bad line.
MOST_PER_LINE = 2**28
MOST_UNPACKED = 2**32  # or 100 times the packed size, if that is more; text unpacks to 3 to 20 times its packed size


def check_format(path: Path) -> None:
    """Raise UserError if the file's name tells that its format is not supported."""
    if _suffix(path) in NOT_TEXT or path.name.endswith(".parquet.gz"):
        raise UserError(
            f"{path} is of an unknown format: data.files takes plain text, .jsonl, .json (also .gz) and .parquet"
        )


def is_plain(path: Path) -> bool:
    """Whether a file is a single document of plain text, as opposed to rows with columns."""
    return _suffix(path) not in BUILDERS


def read_file(path: Path, column: str) -> Iterator[tuple[str, bool]]:
    """Yield the documents of a file in pieces: (text, whether the document ends with it). No text is empty.

    Raises:
        UserError: the file is not UTF-8, or not valid JSON or Parquet, or the column is missing or is not text.
    """
    return read_plain(path) if is_plain(path) else ((text, True) for text in _read_rows(path, column))


def read_plain(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield a plain text file in pieces, as `read_file` does; line ends become \\n, a byte order mark is dropped."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            piece = _next_piece(file)
            while piece:
                if "\0" in piece:
                    raise UserError(f"{path} is not text, it has zero bytes: leave it out of data.files")
                following = _next_piece(file)
                yield piece, not following
                piece = following
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path} is not UTF-8 text (byte 0x{byte:02x}): convert it or leave it out") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _next_piece(file) -> str:
    return file.read(PIECE) + file.readline(PIECE)


def _read_rows(path: Path, column: str) -> Iterator[str]:
    """Yield the texts of `column`, without those that are null or empty."""
    return (text for text in column_values(_read_columns(path), column, str(path)) if text)


def column_values(
    batches: Iterable[dict[str, list]], column: str, where: str, names: list[str] | None = None
) -> Iterator[str]:
    """Yield the values of a column that must be text; null becomes "".

    Args:
        batches: columns of `ROWS` rows at a time; the last batch may have fewer
        where: the file or dataset, for error messages
        names: names of all columns, if the batches do not have all of them

    Raises:
        UserError: there is no such column, or it is not text.
    """
    for batch, columns in enumerate(batches):
        names = names or list(columns)
        if column not in columns:
            raise UserError(f"{where} has no column {column}: set data.column to one of {', '.join(names)}")
        for number, text in enumerate(columns[column], start=batch * ROWS + 1):
            if text is not None and not isinstance(text, str):
                raise UserError(
                    f"{where}: column {column} is not text but {type(text).__name__} (row {number}): "
                    f"set data.column to a column of text; there are {', '.join(names)}"
                )
            yield text or ""


def _read_columns(path: Path) -> Iterator[dict[str, list]]:
    """Yield the columns of `ROWS` rows at a time, which is four times as fast as single rows."""
    datasets = import_datasets()
    from pyarrow import ArrowException

    builder = BUILDERS[_suffix(path)]
    try:
        if path.suffix == ".gz":
            _check_unpacked(path)
        rows = datasets.load_dataset(builder, data_files=glob.escape(str(path)), split="train", streaming=True)
        yield from rows.iter(batch_size=ROWS)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except UserError:
        raise
    except (ArrowException, ValueError, TypeError) as error:
        where = _first_bad_line(path) if _suffix(path) in LINES else f"{error}".splitlines()[0]
        raise UserError(f"{path} is not valid {'JSON' if builder == 'json' else 'Parquet'}: {where}") from error


@functools.cache  # a file is checked once, however often it is read
def _check_unpacked(path: Path) -> None:
    """Raise UserError if a gzipped file of rows would fill memory. (Plain text is read in pieces and cannot.)"""
    unpacked = line = 0
    most_unpacked = max(MOST_UNPACKED, 100 * path.stat().st_size)
    most_per_line = MOST_PER_LINE if _suffix(path) in LINES else MOST_UNPACKED
    with gzip.open(path) as file:
        while piece := file.read(2**20):
            unpacked += len(piece)
            line = len(piece) - 1 - piece.rfind(b"\n") + (0 if b"\n" in piece else line)
            if line > most_per_line:
                raise UserError(f"{path} has a line of more than {most_per_line:,} bytes: leave it out of data.files")
            if unpacked > most_unpacked:
                raise UserError(f"{path} unpacks to more than {most_unpacked:,} bytes: leave it out of data.files")
    if not unpacked:
        raise UserError(f"{path} is empty: leave it out of data.files")


def import_datasets() -> ModuleType:
    """Import the `datasets` library. This takes a second, so it happens only where text is read.

    Raises:
        UserError: its cache folder cannot be made; it needs one even if it stores nothing.
    """
    import datasets.config

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised here, in better words than it logs
    try:
        Path(datasets.config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"datasets cannot make its cache folder ({error}): set HF_HOME to one it can write") from error
    return datasets


def _first_bad_line(path: Path) -> str:
    """Name the first bad line of a .jsonl file; the reader's own message counts rows from the start of some block."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    _ = line.isspace() or json.loads(line).keys()
                except (ValueError, AttributeError):
                    return f"line {number} is not one JSON object in UTF-8"
    except (OSError, EOFError, zlib.error) as error:
        return str(error)
    return "its rows do not have the same columns and types"


def _suffix(path: Path) -> str:
    """The extension that tells the format, in lower case: .jsonl for a.jsonl.gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
