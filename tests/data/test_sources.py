"""Sources: which documents are in which split, and what a fingerprint depends on."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_lm.data.config import DataConfig
from mla_lm.data.corpus import SPLITS, split_of
from mla_lm.data.hashes import content_hashes
from mla_lm.data.python_stdlib import python_stdlib
from mla_lm.data.sources import open_source
from mla_lm.data.text_files import character_file, cut, find_files, text_files
from mla_lm.errors import UserError


@pytest.fixture
def memory(tmp_path):
    return tmp_path / "cache" / "hashes.json"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def documents(source, split):
    """Whole documents, put together from their pieces."""
    found, text = [], ""
    for row in source.documents(split):
        text += row["text"]
        if row["ends"]:
            found.append(text)
            text = ""
    assert text == ""  # the last document ends
    return found


def all_documents(source):
    return {split: documents(source, split) for split in SPLITS}


# python_stdlib


def test_stdlib_leaves_out_tests_and_reports_what_it_cannot_decode(tmp_path, memory):
    root = tmp_path / "lib"
    write(root / "a.py", "a = 1\n")
    write(root / "json" / "b.py", "# -*- coding: latin-1 -*-\nb = 'é'\n".encode("latin-1"))
    write(root / "empty.py", "")
    write(root / "bad.py", b"c = '\xff'\n")
    write(root / "unknown.py", "# coding: klingon\n")
    write(root / "notes.txt", "not code")
    for folder in ("test", "json/tests", "idlelib/idle_test", "encodings", "site-packages/x"):
        write(root / folder / "d.py", "d = 1\n")
    source = python_stdlib(memory, root)
    texts = [text for split in SPLITS for text in documents(source, split)]
    assert sorted(texts) == ["# -*- coding: latin-1 -*-\nb = 'é'\n", "a = 1\n"]
    assert source.skipped() == ["bad.py", "unknown.py"]


def test_stdlib_splits_by_path(tmp_path, memory):
    root = tmp_path / "lib"
    for i in range(300):
        write(root / f"m{i}.py", f"m{i}.py")
    found = all_documents(python_stdlib(memory, root))
    assert all(split_of(text) == split for split in SPLITS for text in found[split])
    assert sum(map(len, found.values())) == 300
    assert 250 < len(found["train"]) < 290
    assert min(map(len, found.values())) > 3


def test_stdlib_of_this_python_is_megabytes_of_code(tmp_path):
    source = open_source(DataConfig(cache_dir=str(tmp_path)))
    test = documents(source, "test")
    assert sum(map(len, test)) > 100_000
    assert any("def " in text for text in test)


def test_a_folder_without_python_files_is_refused(tmp_path, memory):
    with pytest.raises(UserError, match="data=text"):
        python_stdlib(memory, tmp_path)


# text


def test_few_text_files_are_cut_by_position(tmp_path, memory):
    first, second = "ab" * 300, "cd" * 200
    write(tmp_path / "1.txt", first)
    write(tmp_path / "2.md", second)
    found = all_documents(text_files([f"{tmp_path}/*.txt", f"{tmp_path}/*.md"], "text", memory))
    text = first + second
    assert found == {"train": [first, second[:300]], "validation": [text[900:950]], "test": [text[950:]]}


def test_a_large_file_comes_in_pieces_and_ends_once(tmp_path, memory):
    text = "".join(f"line {i}\n" for i in range(100_000))
    source = text_files(str(write(tmp_path / "large.txt", text)), "text", memory)
    rows = list(source.documents("train"))
    assert len(rows) > 2
    assert [row["ends"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert "".join("".join(documents(source, split)) for split in SPLITS) == text


def test_many_text_files_are_split_by_content(tmp_path, memory):
    for i in range(300):
        write(tmp_path / f"{i}.txt", f"document {i}")
    write(tmp_path / "copy.txt", "document 7")
    found = all_documents(text_files(f"{tmp_path}/*.txt", "text", memory))
    assert sum(map(len, found.values())) == 301
    assert min(map(len, found.values())) > 3
    assert sorted(found[split].count("document 7") for split in SPLITS) == [0, 0, 2]


def test_many_rows_are_split_by_content_and_stay_where_they_are(tmp_path, memory):
    rows = [json.dumps({"body": f"row {i % 400}"}) for i in range(500)]
    before = all_documents(text_files(str(write(tmp_path / "a.jsonl", "\n".join(rows))), "body", memory))
    more = [json.dumps({"body": f"more {i}"}) for i in range(100)]
    after = all_documents(text_files(str(write(tmp_path / "b.jsonl", "\n".join(more + rows))), "body", memory))
    assert sum(map(len, before.values())) == 500
    assert not set(before["train"]) & set(before["validation"] + before["test"])
    assert all(set(before[split]) <= set(after[split]) for split in SPLITS)


def test_few_rows_reach_every_split(tmp_path, memory):
    rows = [{"text": f"row {i}"} for i in range(40)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    found = all_documents(text_files(str(path), "text", memory))
    assert all(found.values())
    assert "".join("".join(found[split]) for split in SPLITS) == "".join(row["text"] for row in rows)


@given(
    texts=st.lists(st.text(min_size=1), min_size=1, max_size=10),
    shares=st.sampled_from([[0, 0.9, 1], [0, 0.9, 0.95, 1]]),
)
def test_parts_by_position_are_the_text(texts, shares):
    total = sum(map(len, texts))
    parts = []
    for start, stop in itertools.pairwise(shares):
        rows = list(cut([(text, True) for text in texts], total, (start, stop)))
        assert not rows or rows[-1]["ends"]
        parts += [row["text"] for row in rows]
        assert len("".join(parts)) == int(total * stop)
    assert "".join(parts) == "".join(texts)


# characters


def test_characters_are_split_as_nanogpt_does(tmp_path, memory):
    text = "To be, or not to be\r\n" * 51
    source = character_file(str(write(tmp_path / "input.txt", text)), memory)
    data = text.replace("\r\n", "\n")
    n = len(data)
    train, val = data[: int(n * 0.9)], data[int(n * 0.9) :]
    assert all_documents(source) == {"train": [train], "validation": [val], "test": [val]}


def test_characters_take_one_plain_file(tmp_path, memory):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "c.jsonl", "{}")
    for files in (f"{tmp_path}/*.txt", f"{tmp_path}/c.jsonl"):
        with pytest.raises(UserError, match="one plain text file"):
            character_file(files, memory)


# finding files


def test_files_are_found_once_and_sorted(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "sub/c.txt", "odd[1].txt"):
        write(tmp_path / name, "x")
    monkeypatch.chdir(tmp_path)
    assert find_files(["*.txt", "a.txt"]) == ([tmp_path / name for name in ("a.txt", "b.txt", "odd[1].txt")], 0)
    assert find_files("**/c.txt") == ([tmp_path / "sub" / "c.txt"], 0)
    assert find_files("odd[1].txt") == ([tmp_path / "odd[1].txt"], 0)


def test_a_link_keeps_its_name(tmp_path):
    write(tmp_path / "blob", "{}")
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "blob")
    assert find_files(str(tmp_path / "rows.jsonl")) == ([tmp_path / "rows.jsonl"], 0)


def test_empty_files_of_a_glob_are_left_out_and_counted(tmp_path, memory):
    """The corpus is the same as without them, and its description tells their number."""
    for name, text in (("a.py", "a = 1\n" * 40), ("b/c.py", "c = 3\n" * 40)):
        write(tmp_path / "src" / name, text)
    without = text_files(f"{tmp_path}/src/**/*.py", "text", memory)
    for name in ("__init__.py", "b/__init__.py"):
        write(tmp_path / "src" / name, "")
    source = text_files([f"{tmp_path}/src/**/*.py", f"{tmp_path}/src/*.py"], "text", memory)
    assert source.fingerprint == without.fingerprint
    assert all_documents(source) == all_documents(without)
    assert source.description.startswith("2 text files: ")
    assert source.description.endswith("; 2 empty ones left out")
    assert "left out" not in without.description


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ("missing.txt", ["missing.txt", "no file", "looked in"]),
        ("*.text", ["*.text", "no file"]),
        ("folder", ["folder", "is a folder", "folder/*.txt"]),
        (["good.txt", "missing.txt"], ["missing.txt"]),
        ("empty.txt", ["empty.txt", "is empty"]),
        (["good.txt", "empty.txt"], ["empty.txt", "is empty"]),
        ("em*.txt", ["em*.txt", "only empty files (1)"]),
        (["good.txt", "em*.txt"], ["em*.txt", "only empty files (1)"]),
        ("table.csv", ["table.csv", "unknown format", ".jsonl"]),
    ],
)
def test_files_that_cannot_be_are_named(tmp_path, memory, monkeypatch, files, words):
    write(tmp_path / "folder" / "a.txt", "a")
    write(tmp_path / "good.txt", "a")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "table.csv", "a,b\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        text_files(files, "text", memory)
    assert all(word in str(error.value) for word in words)


# fingerprints


def test_the_fingerprint_depends_on_content_rule_and_column(tmp_path, memory):
    a = str(write(tmp_path / "a.txt", "some text"))
    same = str(write(tmp_path / "elsewhere" / "b.txt", "some text"))
    other = str(write(tmp_path / "c.txt", "some texts"))
    fingerprint = text_files(a, "text", memory).fingerprint
    assert fingerprint == text_files(same, "text", memory).fingerprint
    others = [
        text_files(other, "text", memory).fingerprint,
        text_files(a, "body", memory).fingerprint,
        text_files([a, same], "text", memory).fingerprint,
        character_file(a, memory).fingerprint,
    ]
    assert len({fingerprint, *others}) == 5


def test_an_edited_file_is_hashed_again(tmp_path, memory):
    path = write(tmp_path / "a.txt", "one")
    before = content_hashes([path], memory)
    assert content_hashes([path], memory) == before
    write(path, "three")
    after = content_hashes([path], memory)
    assert after != before
    memory.write_text("not json")
    assert content_hashes([path], memory) == after


def test_a_memory_that_cannot_be_written_does_no_harm(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    assert content_hashes([path], path / "hashes.json") == content_hashes([path], tmp_path / "hashes.json")
