"""What the tests of data share: a dataset laid out as on the Hub, and code run in a process of its own."""

import gzip
import json
import os
import subprocess
import sys
import textwrap

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings

settings.register_profile("data")  # a busy machine is no failure
settings.load_profile("data")

STORIES = [f"Story {i}: once there were {i} waves, and the sea was calm." for i in range(400)]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def rows_of(texts, column="text"):
    return [{"id": i, column: text} for i, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path):
    """A dataset of parquet shards with a training and a validation split."""
    for shard in range(3):
        write_rows(tmp_path / "set" / "data" / f"train-{shard:05d}-of-00003.parquet", rows_of(STORIES[shard:300:3]))
    write_rows(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet", rows_of(STORIES[300:320]))
    return tmp_path / "set"


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
