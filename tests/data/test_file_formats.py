"""Reading a user's files, good and bad."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mla_lm.data import file_formats
from mla_lm.data.file_formats import PIECE, check_format, read_file
from mla_lm.errors import UserError

ROWS = [{"text": "one", "n": 1}, {"text": "two\nlines ✓", "n": 2}, {"text": None, "n": 3}, {"text": "", "n": 4}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TEXTS = [("one", True), ("two\nlines ✓", True)]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("a.ndjson", LINES),
        ("array.json", json.dumps(ROWS).encode()),
        ("indented.json", json.dumps(ROWS, indent=2).encode()),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("odd [1]*.jsonl", LINES),
        ("blank.jsonl", LINES.replace(b"\n", b"\n\n")),
    ],
)
def test_json(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert list(read_file(tmp_path / name, "text")) == TEXTS


def test_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(read_file(tmp_path / "a.parquet", "text")) == TEXTS


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.txt", "naïve\n".encode(), "naïve\n"),
        ("bom.txt", b"\xef\xbb\xbfhello", "hello"),
        ("dos.txt", b"a\r\nb\rc\n", "a\nb\nc\n"),
        ("no_extension", b"plain", "plain"),
        ("a.txt.gz", gzip.compress(b"packed", mtime=0), "packed"),
        ("a.md", b"# title\n", "# title\n"),
    ],
)
def test_plain_text(tmp_path, name, data, text):
    (tmp_path / name).write_bytes(data)
    assert list(read_file(tmp_path / name, "text")) == [(text, True)]


@pytest.mark.parametrize("line", ["x" * 80 + "\n", "x"])  # with line ends and without any
@pytest.mark.parametrize("pieces", [1, 2.5])
def test_plain_text_in_pieces(tmp_path, line, pieces):
    text = line * int(pieces * PIECE / len(line))
    (tmp_path / "a.txt").write_text(text)
    found = list(read_file(tmp_path / "a.txt", "text"))
    assert "".join(piece for piece, _ in found) == text
    assert [ends for _, ends in found] == [False] * (len(found) - 1) + [True]
    assert all(0 < len(piece) <= 2 * PIECE for piece, _ in found)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("latin.txt", "café".encode("latin-1"), ["latin.txt", "not UTF-8", "0xe9"]),
        ("zeros.txt", b"ab\0c", ["zeros.txt", "not text"]),
        ("a.txt.gz", b"not packed", ["a.txt.gz", "cannot be read"]),
        ("cut.txt.gz", gzip.compress(b"packed" * 99, mtime=0)[:-9], ["cut.txt.gz", "cannot be read"]),
        ("bad.jsonl", LINES + b'{"text": oops}\n', ["bad.jsonl", "not valid JSON", "line 5"]),
        ("prose.jsonl", b"once upon a time\n", ["prose.jsonl", "not valid JSON", "line 1"]),
        ("latin.jsonl", '{"text": "é"}'.encode("latin-1"), ["latin.jsonl", "not valid JSON", "line 1"]),
        ("cut.json", b'[{"text": "a"},', ["cut.json", "not valid JSON"]),
        ("bad.parquet", b"PAR", ["bad.parquet", "not valid Parquet"]),
        ("other.jsonl", b'{"body": "a", "id": 1}', ["other.jsonl", "no column text", "data.column", "body, id"]),
        ("other.json", b'[{"body": "a", "id": 1}]', ["other.json", "no column text", "body, id"]),
        ("number.jsonl", b'{"text": 1, "body": "a"}', ["number.jsonl", "column text", "not text but int", "body"]),
        ("list.jsonl", b'{"text": ["a"]}', ["list.jsonl", "not text but list"]),
        ("mixed.jsonl", b'{"text": "a"}\n{"text": 2}', ["mixed.jsonl", "not text but int", "row 2"]),
        ("late.jsonl", b'{"text": "a"}\n' * 2500 + b'{"text": 2}', ["late.jsonl", "not text but int", "row 2501"]),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        list(read_file(tmp_path / name, "text"))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_parquet_column_names_those_there_are(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column body.*text, n"):
        list(read_file(tmp_path / "a.parquet", "body"))


@pytest.mark.parametrize("name", ["a.csv", "a.zip", "a.jsonl.zst", "a.parquet.gz", "A.PDF"])
def test_unknown_formats_are_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match="unknown format"):
        check_format(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.rst", "README", "a.jsonl", "a.json.gz", "A.PARQUET", "a.py"])
def test_known_formats_are_not(tmp_path, name):
    check_format(tmp_path / name)


@pytest.mark.e2e
def test_a_cache_folder_that_datasets_cannot_make_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    code = "from mla_lm.data.file_formats import import_datasets; import_datasets()"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "file" / "cache"), "PYTHONPATH": os.getcwd()}
    environment.pop("HF_DATASETS_CACHE", None)
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "UserError: datasets cannot make its cache folder" in process.stderr
    assert "HF_HOME" in process.stderr


# packed to fill all memory


def packed(path, pieces):
    with gzip.open(path, "wb", compresslevel=1) as file:
        for piece in pieces:
            file.write(piece)
    return path


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_a_line_without_end_is_refused_before_it_is_in_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(file_formats, "MOST_PER_LINE", 2**22)
    monkeypatch.setattr(file_formats, "MOST_UNPACKED", 2**22)
    path = packed(tmp_path / name, [b'{"text": "', *[b"a" * 2**20] * 9, b'"}\n'])
    with pytest.raises(UserError, match=f"{name} has a line of more than 4,194,304 bytes"):
        list(read_file(path, "text"))


def test_a_file_that_unpacks_without_end(tmp_path, monkeypatch):
    """With a bad line at its end all of it would be read at once."""
    monkeypatch.setattr(file_formats, "MOST_UNPACKED", 2**22)
    path = packed(tmp_path / "a.jsonl.gz", [b'{"text": "aaaa"}\n' * 2**16] * 9)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz unpacks to more than [\d,]+ bytes"):
        list(read_file(path, "text"))


def test_lines_are_told_apart_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "MOST_PER_LINE", 2**20 + 2**19)
    row = json.dumps({"text": "a" * (2**20 - 100)}).encode() + b"\n"  # ends anywhere in a piece
    assert len(list(read_file(packed(tmp_path / "a.jsonl.gz", [row] * 9), "text"))) == 9


def test_packed_plain_text_is_read_in_pieces(tmp_path):
    """100 MB without a line end, in a few of memory."""
    path = packed(tmp_path / "a.txt.gz", [b"a" * 2**20] * 100)
    tracemalloc.start()
    assert sum(len(text) for text, _ in read_file(path, "")) == 100 * 2**20
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()
