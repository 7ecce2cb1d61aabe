"""The Hub as a server that answers like it, and no network at all."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from mla_lm.data.config import TokenizerConfig
from mla_lm.data.network import reach_hub
from mla_lm.data.open_store import open_store
from mla_lm.data.tokenizer import build_tokenizer, tokenizer_hash
from tests.data.conftest import STORIES, rows_of, run, write_rows
from tests.data.hub_server import COMMIT, serve
from tests.data.test_hub import config_of


@pytest.fixture
def silence():
    """An address that never answers: its queue of connections is full."""
    with contextlib.ExitStack() as sockets:
        server = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("endpoint", "offline", "seconds"),
    [
        ("http://127.0.0.1:9", False, 1),  # refuses
        (None, False, 1),
        ("http://hub.invalid", False, 1),  # has no address
        ("http://127.0.0.1:9", True, 1),
    ],
)
def test_no_network_is_noticed_quickly(monkeypatch, silence, endpoint, offline, seconds):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint or silence)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("mla_lm.data.network.PATIENCE", 0.2)
    start = time.monotonic()
    assert not reach_hub()()
    assert time.monotonic() - start < seconds


@pytest.mark.e2e
def test_without_a_network_it_says_so_within_three_seconds(tmp_path, silence):
    code = """
        import time
        from mla_lm.data import network
        from mla_lm.data.config import DataConfig, TokenizerConfig
        from mla_lm.data.sources import open_source
        from mla_lm.data.tokenizer import build_tokenizer
        network.PATIENCE = 0.2
        for read in (
            lambda: open_source(DataConfig(source="hub", path="org/stories", cache_dir="nowhere")),
            lambda: build_tokenizer(TokenizerConfig(kind="hub", path="org/model"), []),
        ):
            start = time.perf_counter()
            try:
                read()
            except ValueError as error:
                print(time.perf_counter() - start, error, sep="\\n", end="\\n\\n")
    """
    result = run(code, HF_HOME=str(tmp_path), HF_ENDPOINT=silence)
    assert result.returncode == 0, result.stderr
    for answer, words in zip(
        result.stdout.strip().split("\n\n"),
        (
            ["data.path=org/stories", str(tmp_path / "datasets"), "data=python_stdlib and data=text"],
            ["data.tokenizer.path=org/model", str(tmp_path / "hub"), "data.tokenizer.kind=bpe"],
        ),
        strict=True,
    ):
        seconds, *message = answer.splitlines()
        assert float(seconds) < 3
        assert len(message) <= 3
        assert all(word in answer for word in words), answer


# a server that answers like the Hub

READER = """
    import json, sys
    from mla_lm.data.config import DataConfig, TokenizerConfig
    from mla_lm.data.sources import open_source
    from mla_lm.data.tokenizer import build_tokenizer, tokenizer_hash
    from mla_lm.errors import UserError

    def read(tokenizer=None, **keys):
        if tokenizer:
            return tokenizer_hash(build_tokenizer(TokenizerConfig(kind="hub", path=tokenizer), []))
        source = open_source(DataConfig(source="hub", **keys))
        texts = {split: [row["text"] for row in source.documents(split)] for split in ("train", "validation", "test")}
        return source.description, source.fingerprint, texts

    for line in sys.stdin:
        try:
            print(json.dumps(read(**json.loads(line))), flush=True)
        except UserError as error:
            print(json.dumps(str(error)), flush=True)
"""


class Hub:
    """A process with a Hugging Face cache of its own, and a Hub that is there or not."""

    def __init__(self, folder):
        self.root, self.tokens = folder / "root", folder / "tokens"
        self.root.mkdir()
        with serve(self.root) as server:
            self.port = server.server_port
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(READER)],
            env={
                **os.environ,
                "PYTHONPATH": os.getcwd(),
                "HF_HOME": str(folder / "home"),
                "HF_ENDPOINT": f"http://127.0.0.1:{self.port}",
            },
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def online(self):
        return serve(self.root, self.port)

    def read(self, **keys):
        if "path" in keys:
            keys = {"cache_dir": str(self.tokens), **keys}
        self.process.stdin.write(json.dumps(keys) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("hub"))
    yield hub
    hub.process.stdin.close()
    hub.process.wait()


def test_a_dataset_of_the_hub_is_read_and_then_needs_no_network(folder, hub):
    shutil.copytree(folder, hub.root / "stories")
    with hub.online():
        description, fingerprint, texts = hub.read(path="org/stories")
        unknown = hub.read(path="org/stories", name="verse")
    assert "has no configuration data.name=verse: it has default" in unknown
    assert f"at {COMMIT}" in description
    assert sorted(texts["train"] + texts["test"]) == sorted(STORIES[:300])
    assert texts["validation"] == STORIES[300:320]
    assert hub.read(path="org/stories") == [description, fingerprint, texts]  # as remembered
    other = str(hub.tokens / "other")
    assert hub.read(path="org/stories", cache_dir=other)[1:] == [fingerprint, texts]  # as cached by `datasets`
    assert hub.read(path="org/stories", cache_dir=other, revision=COMMIT)[1:] == [fingerprint, texts]
    assert "data.name=verse is no folder and not in the cache" in hub.read(path="org/stories", name="verse")
    refused = hub.read(path="org/stories", revision="f" * 40)
    assert f"cached at commit {COMMIT}, but not at {'f' * 40}" in refused


def test_streaming_from_the_hub_stops_at_the_cap(hub):
    for shard in range(3):
        rows = rows_of(STORIES[100 * shard :][:100])
        write_rows(hub.root / "shards" / f"train-{shard:05d}-of-00003.parquet", rows)
    with hub.online() as server:
        _, fingerprint, texts = hub.read(path="org/shards", max_characters=3000)
        asked = [request for request in server.requests if request.startswith("GET") and "2-of-00003" in request]
    everything = sorted(texts["train"] + texts["validation"] + texts["test"])
    assert everything == sorted(STORIES[: len(everything)])
    assert 3000 <= len("".join(everything)) < 3100
    assert asked == []
    assert hub.read(path="org/shards", max_characters=3000)[1:] == [fingerprint, texts]  # without a network


def test_an_unknown_dataset_is_named(hub):
    with hub.online():
        message = hub.read(path="org/novels")
    assert "data.path=org/novels: Dataset 'org/novels' doesn't exist on the Hub" in message
    assert "organisation/name" in message
    assert len(message.splitlines()) <= 3


def test_mistakes_that_the_hub_answers(folder, hub):
    shutil.copytree(folder, hub.root / "scripted")
    (hub.root / "scripted" / "scripted.py").write_text("raise SystemExit")
    with hub.online():
        messages = [
            hub.read(path="org/scripted"),
            hub.read(path="org/scripted", revision="v7"),
            hub.read(tokenizer="org/novels"),
        ]
    for message, words in zip(
        messages,
        ("which is never run", "Revision 'v7'", "org/novels has no tokenizer"),
        strict=True,
    ):
        assert words in message
        assert len(message.splitlines()) <= 3


def test_a_tokenizer_of_the_hub_is_downloaded_once(folder, hub):
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=300), STORIES)
    (hub.root / "model").mkdir()
    tokenizer.save(str(hub.root / "model" / "tokenizer.json"))
    with hub.online():
        assert hub.read(tokenizer="org/model") == tokenizer_hash(tokenizer)
    assert hub.read(tokenizer="org/model") == tokenizer_hash(tokenizer)
    config = config_of(folder, tokenizer=TokenizerConfig(kind="hub", path=str(hub.root / "model")))
    assert tokenizer_hash(open_store(config).tokenizer) == tokenizer_hash(tokenizer)
