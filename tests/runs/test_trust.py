"""A run of somebody else reads no file of this user's, and writes none outside its folder, unless the user says so."""

import os
import shutil
import stat
from pathlib import Path

import pytest
import yaml

from mla_lm.config import TrainConfig
from mla_lm.data.config import PartConfig
from mla_lm.runs.folder import RunFolder
from mla_lm.runs.trust import KEY_BYTES, is_signed, paths_wanted, sign
from mla_lm.terminal import cli
from scripts import compare, convert, evaluate, export, generate
from tests.conftest import Result, TrainCommand, call_main, refused, succeeded, summary_of

MORE = "trainer.max_steps=8"


def call(program, folder: Path, *arguments: str) -> Result:
    return call_main(lambda: cli.run(program.main), [program.__name__, *arguments], folder)


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Path:
    """A user who has no key yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    return tmp_path / "settings" / "mla_lm"


def signed_run(folder: Path) -> RunFolder:
    config = TrainConfig()
    config.data.files, config.data.parts = ["/a", "/b"], [PartConfig(path="/c")]
    run = RunFolder(folder)
    run.write_config(config)
    sign(run, config)
    return run


def edit(run: Path, *keys: str, value: object) -> None:
    """Give config.yaml another value."""
    config = part = yaml.safe_load((run / "config.yaml").read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_the_key_is_private_and_made_once(settings, tmp_path):
    run = signed_run(tmp_path / "run")
    key = settings / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(settings.stat().st_mode) == 0o700
    before = key.read_bytes()
    assert len(before) == KEY_BYTES
    assert is_signed(run)
    assert is_signed(signed_run(tmp_path / "other"))
    assert key.read_bytes() == before
    key.write_bytes(b"")  # a process was killed while it made it: an empty key must sign nothing
    assert not is_signed(run)
    assert len(key.read_bytes()) == KEY_BYTES


def test_without_a_place_for_a_key_nothing_is_signed(settings, tmp_path, capsys):
    settings.mkdir(parents=True)
    settings.chmod(0o777)
    assert not is_signed(signed_run(tmp_path / "run"))
    assert "is not signed" in capsys.readouterr().out
    assert not (tmp_path / "run" / "origin").exists()


def test_what_a_signature_covers(settings, tmp_path):
    """Every path, under its own key; neither where the run lies nor what is no path."""
    run = signed_run(tmp_path / "run").path.rename(tmp_path / "moved")
    edit(run, "optimizer", "lr", value=0.5)
    assert is_signed(RunFolder(run))
    for keys, value in (
        (("data", "files"), ["/a", "/b", "/c"]),
        (("data", "cache_dir"), "/a"),
        (("data", "path"), "/a"),
        (("data", "tokenizer", "file"), "/a"),
        (("data", "tokenizer", "path"), "org/name"),
        (("init_from",), "/a"),
        (("data", "parts"), [{"path": "/d"}]),
        (("data", "parts"), [{"path": "/c", "files": "/a"}]),
    ):
        before = (run / "config.yaml").read_text()
        edit(run, *keys, value=value)
        assert not is_signed(RunFolder(run)), keys
        (run / "config.yaml").write_text(before)
    assert is_signed(RunFolder(run))
    (run / "origin").write_bytes(b"\xff" * 5000)
    assert not is_signed(RunFolder(run))


def test_every_path_of_the_configuration_is_named():
    """A key that is added with a path must be added here as well."""
    config = TrainConfig(init_from="a", ckpt_path=None)
    for corpus in (config.data, part := PartConfig()):
        corpus.files = corpus.path = "b"
    config.data.parts, config.data.tokenizer.file, config.data.tokenizer.path = [part], "c", "d"
    assert sorted(paths_wanted(config)) == [
        "data.cache_dir", "data.files", "data.parts[0].files", "data.parts[0].path", "data.path",
        "data.tokenizer.file", "data.tokenizer.path", "init_from",
    ]  # fmt: skip


@pytest.fixture
def theirs(runs) -> Path:
    """A run of a user with another key."""
    return runs / "mla"


@pytest.fixture
def foreign(theirs, settings, tmp_path) -> Path:
    """That run as another user has it, who has a secret; it asks for that, and for a place to copy it to."""
    shutil.copytree(theirs, tmp_path / "run")
    (tmp_path / "secret.txt").write_text("the secret is hunter2\n" * 500)
    edit(tmp_path / "run", "data", "files", value=str(tmp_path / "secret.txt"))
    edit(tmp_path / "run", "data", "cache_dir", value=str(tmp_path / "public"))
    return tmp_path / "run"


def test_tools_ask_before_they_read(foreign, tmp_path):
    for program, arguments in (
        (evaluate, ("run",)),
        (evaluate, ("run", "--split", "validation")),
        (export, ("run", "out", "--check")),
    ):
        refused(call(program, tmp_path, *arguments), "secret.txt", "public", "--trust", str(foreign))
        assert not (tmp_path / "public").exists()
        assert not (tmp_path / "data").exists()
    refused(call(evaluate, tmp_path, "run", "--trust"), "have changed")  # it was opened: it is another text


def test_tools_that_need_no_data_do_not_ask(foreign, tmp_path):
    succeeded(call(generate, tmp_path, "run", "--prompt", "def ", "--max-tokens", "2"))
    succeeded(call(compare, tmp_path, "run"))
    succeeded(call(evaluate, tmp_path, "run", "--files", "secret.txt"))
    succeeded(call(export, tmp_path, "run", "out"))


def test_resuming_asks_once(theirs, settings, train, tmp_path, corpus):
    run = Path(shutil.copytree(theirs, tmp_path / "run"))
    edit(run, "trust", value=True)  # which is not for the run to say
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    refused(train.bare("ckpt_path=run", MORE), "data.files=", str(corpus), "trust=true")
    assert before == {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    succeeded(train.bare("ckpt_path=run", MORE, "trust=true"))
    succeeded(train.bare("ckpt_path=run", "trainer.max_steps=9"))
    succeeded(call(evaluate, tmp_path, "run"))


def test_a_foreign_run_learns_no_variable(theirs, settings, train, tmp_path, monkeypatch):
    """Not on the terminal, nor in any file of the run, what wandb keeps for its upload among them."""
    monkeypatch.setenv("SECRET", "hunter2")
    run = Path(shutil.copytree(theirs, tmp_path / "run"))
    for keys in (("logger", "name"), ("logger", "group"), ("data", "column")):
        edit(run, *keys, value="${oc.env:SECRET}")
    edit(run, "data", "prompts", value=["def ${oc.env:SECRET}"])
    edit(run, "tags", value=["${oc.env:SECRET}"])
    refused(train.bare("ckpt_path=run", MORE, "trust=true"), "data have changed")  # its column, as the literal text
    edit(run, "data", "column", value="text")
    result = succeeded(train.bare("ckpt_path=run", MORE, "trust=true", "logger.kind=wandb"))
    assert "name: ${oc.env:SECRET}" in result.stdout
    assert "hunter2" not in result.stdout + result.stderr
    files = [path for path in run.rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix == ".wandb"]
    assert not [path for path in files if b"hunter2" in path.read_bytes()]


def test_paths_that_the_command_line_names_are_the_users_word(theirs, settings, train, tmp_path):
    shutil.copytree(theirs, tmp_path / "run")
    succeeded(train(MORE, "ckpt_path=run"))  # the command that made it, from another working directory
    assert f"cache_dir: {train.data[-1].partition('=')[2]}" in (tmp_path / "run" / "config.yaml").read_text()
    succeeded(train.bare("ckpt_path=run", "trainer.max_steps=9"))


def test_where_the_cache_is_all_it_names_ours_takes_its_place(theirs, settings, train, tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    for number in range(60):
        (library / f"module{number}.py").write_text(f"def function{number}():\n    return {number}\n" * 30)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    data = ("data=python_stdlib", "data.val_tokens=512", "data.tokenizer.vocab_size=300", "data.cache_dir=first")
    succeeded(TrainCommand(tmp_path, data)("hydra.run.dir=run"))
    edit(tmp_path / "run", "data", "cache_dir", value=str(tmp_path / "public"))
    result = succeeded(call(evaluate, tmp_path, "run"))
    assert str(tmp_path / "data" / "cache") in result.stderr
    assert (tmp_path / "data" / "cache").is_dir()
    succeeded(train.bare("ckpt_path=run", MORE))
    assert not (tmp_path / "public").exists()
    assert summary_of(tmp_path / "run")["steps"] == 8


def test_beginning_from_a_foreign_run_reads_its_weights_only(foreign, train, tmp_path):
    edit(foreign, "data", "tokenizer", "file", value="/nothing/there.json")
    edit(foreign, "data", "tokenizer", "kind", value="file")
    data = [override for override in train.data if "tokenizer" not in override]
    succeeded(TrainCommand(tmp_path, tuple(data))("init_from=run", "hydra.run.dir=tuned", "optimizer.lr=1e-9"))
    succeeded(call(evaluate, tmp_path, "tuned"))
    assert not (tmp_path / "public").exists()


def test_converting_does_not_make_a_foreign_run_ones_own(runs, settings, tmp_path):
    run = RunFolder(Path(shutil.copytree(runs / "mha", tmp_path / "run")))
    sign(run, run.config())
    (tmp_path / "text.txt").write_text("def main():\n    return None\n" * 200)
    sizes = ("--kv-compressed-dim", "8", "--rope-dim", "4", "--files", "text.txt")
    succeeded(call(convert, tmp_path, "run", "own", *sizes))
    assert is_signed(RunFolder(tmp_path / "own"))
    os.remove(settings / "key")
    succeeded(call(convert, tmp_path, "run", "foreign", *sizes))
    assert not is_signed(RunFolder(tmp_path / "foreign"))
    refused(call(convert, tmp_path, "run", "out", *sizes[:4]), "data.files=", "--trust")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_through_a_foreign_link(train, run, tmp_path):
    """`checkpoints` of somebody else's run that is a link to those of a run of this user."""
    run.rename(tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", tmp_path / "theirs")
    (tmp_path / "theirs" / "origin").unlink()
    shutil.rmtree(tmp_path / "theirs" / "checkpoints")
    (tmp_path / "theirs" / "checkpoints").symlink_to(tmp_path / "mine" / "checkpoints")
    before = {path: path.read_bytes() for path in (tmp_path / "mine" / "checkpoints").iterdir()}
    refused(train.bare("ckpt_path=theirs", "trust=true", "trainer.max_steps=7"), "checkpoints is a link")
    assert before == {path: path.read_bytes() for path in (tmp_path / "mine" / "checkpoints").iterdir()}
