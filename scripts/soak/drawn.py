"""Command lines and data files drawn by hypothesis."""

import gzip
import json

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mla_lm.config import TrainConfig
from mla_lm.terminal.cli import key_names

# Keys whose values may start processes, ask the network, or rightly take long; and those that set where a trial writes.
LEFT_OUT = (
    "compile", "trainer.devices", "trainer.num_nodes", "trainer.max_steps", "trainer.accelerator", "logger.kind",
    "data.num_workers", "data.path", "data.source", "data.tokenizer.path", "data.tokenizer.kind", "data.cache_dir",
    "data.parts", "data.files",
)  # fmt: skip
KEYS = [key for key in key_names(TrainConfig) if key not in LEFT_OUT]
VALUES = (
    "", "null", "true", "-1", "0", "1", "2", "3", "7", "32", "300", "0.5", "1e-3", "-0.0", "nan", "inf", "abc", "''",
    "[]", "{}", "[1,2]", "[a", "{a:1}", "'[a]'", "${seed}", "${nothing}", "${oc.env:HOME}", "???", "../x", "/dev/null",
    "run", "other", "/", "notes.txt", "x y", "é", "1,2", "'1,2'", "a=b", "adamw", "int8", "mha",
)  # fmt: skip
WHOLE = (
    "--help", "--cfg", "--cfg=job", "--info", "--version", "-m", "--nothing", "-", "=", "==", "a", "a=", "=a", "a=b=c",
    "~seed", "~model", "+a=1", "++a=1", "+seed=2", "++seed=2", "model=mha_tiny", "model=nothing", "model=",
    "optimizer=adamw", "schedule=cosine", "experiment=nothing", "debug=limit", "debug=overfit", "data=characters",
    "data=mixture", "hydra=a", "hydra.verbose=true", "hydra.run.dir=", "hydra.run.dir=notes.txt", "hydra.run.dir=other",
    "hydra.run.dir=/proc/x", "hydra/launcher=nothing", "model@a=mha_tiny", "trainer.max_steps=0",
    "trainer.max_steps=-1", "trainer.max_steps=a", "ckpt_path=other", "ckpt_path=notes.txt", "init_from=other",
    "init_from=notes.txt", "data.tokenizer.kind=bytes", "data.tokenizer.kind=characters", "data.tokenizer.kind=file",
    "data.files=nothing", "data.files=[]", "data.files=notes.txt", "logger=nothing", "data.num_workers=-1",
    "trainer.devices=0", "trainer.accelerator=gpu",
)  # fmt: skip
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".txt.gz", ".jsonl.gz", ".csv", "")

values = st.sampled_from(VALUES) | st.text(max_size=8)
arguments = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), values),
    st.sampled_from(WHOLE),
    st.builds("{}={}".format, st.text(max_size=6), values),
).filter(lambda argument: "\0" not in argument and argument.isprintable())
words = st.text(min_size=1, max_size=30)
rows = st.lists(st.dictionaries(st.sampled_from(("text", "body")), st.none() | st.integers() | words), max_size=4)
contents = st.one_of(
    st.builds(lambda text, times: (text * times).encode(errors="surrogatepass"), words, st.sampled_from((1, 50, 3000))),
    st.builds(lambda text, times: text * times, st.binary(max_size=60), st.sampled_from((1, 300))),
    st.builds(lambda lines, times: "\n".join(map(json.dumps, lines * times)).encode(), rows, st.sampled_from((1, 500))),
    st.builds(lambda lines: json.dumps(lines).encode(), rows),
)
names = st.builds("data{}".format, st.sampled_from(SUFFIXES))
files = st.tuples(names, contents, st.booleans()).map(
    lambda file: (file[0], gzip.compress(file[1], mtime=0) if file[0].endswith(".gz") and file[2] else file[1])
)
good_file = ("data.txt", " ".join(f"word {number * number} of many," for number in range(4000)).encode())
# With a good file the arguments are read to their end; with good arguments the file is.
examples_of = st.one_of(
    st.tuples(st.just(good_file), st.lists(arguments, min_size=1, max_size=3)),
    st.tuples(files, st.just([])),
    st.tuples(files, st.lists(arguments, max_size=2)),
)


def examples(count: int, number: int) -> list[tuple[list[str], str, bytes]]:
    """Arguments, a file's name and its content; the same for the same number."""
    drawn: list[tuple[list[str], str, bytes]] = []

    @seed(number)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(examples_of)
    def collect(example: tuple[tuple[str, bytes], list[str]]) -> None:
        (name, content), extra = example
        drawn.append((extra, name, content))

    collect()
    return drawn
