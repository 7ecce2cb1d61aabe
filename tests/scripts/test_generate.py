"""scripts.generate on a real run."""

import io
import os
import pty
import re
import sys
import termios
from pathlib import Path

import pytest
import torch

import mla_lm
from mla_lm.data.tokenizer import decode, encode
from mla_lm.runs.report import human_bytes
from mla_lm.terminal import cli
from scripts import generate
from tests.conftest import Result, TrainCommand, call_main, refused, small, succeeded, summary_of
from tests.terminal.screen import sides


@pytest.fixture(scope="module")
def folder(tmp_path_factory, on_corpus) -> Path:
    """Where the run `mla` is, trained until it repeats more than spaces, and `mha`, which differs in all it can."""
    folder = tmp_path_factory.mktemp("runs")
    steps = ("trainer.max_steps=40", "val_every_n_steps=40", "checkpoint.every_n_steps=40", "optimizer.lr=0.01")
    train = TrainCommand(folder, on_corpus)
    succeeded(train(*steps, "hydra.run.dir=mla"))
    mha = (*small("mha"), *on_corpus, *steps, "hydra.run.dir=mha")
    succeeded(train.bare(*mha, "data.tokenizer.kind=bytes", "model.seq_len=16", "trainer.precision=bf16-mixed"))
    return folder


def call(folder: Path, *arguments: str) -> Result:
    return call_main(lambda: cli.run(generate.main), ["scripts.generate", *arguments], folder)


def expected_text(folder: Path, prompt: str, count: int) -> str:
    """By recomputing everything for each token."""
    model, tokenizer, _ = mla_lm.load_run(folder / "mla")
    end = tokenizer.token_to_id("<|endoftext|>")
    ids = [end, *encode(tokenizer, prompt)]
    for _ in range(min(count, 32 - len(ids))):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == end:
            break
    return decode(tokenizer, [i for i in ids if i != end]).rstrip("\N{REPLACEMENT CHARACTER}")


def test_greedy_decoding(folder):
    result = succeeded(call(folder, "mla", "--prompt", "def f(", "--temperature", "0", "--max-tokens", "8"))
    assert result.stdout.rstrip("\n") == expected_text(folder, "def f(", 8).rstrip("\n")
    model, tokenizer, _ = mla_lm.load_run(folder / "mla")
    stored = 1 + len(encode(tokenizer, "def f(")) + 8
    assert re.match("8 tokens, ", result.stderr)
    assert f"KV cache of {stored} tokens: {model.new_cache(1, stored).nbytes / 1024:.1f} KiB" in result.stderr


def test_int8_cache(folder):
    """Half of bf16's bytes and the scales; the text is, at first at least, that of the whole cache."""
    arguments = ("--prompt", "def f(", "--temperature", "0", "--max-tokens", "2")
    for name in ("mla", "mha"):
        model, tokenizer, _ = mla_lm.load_run(folder / name)
        stored = 1 + len(encode(tokenizer, "def f(")) + 2
        result = succeeded(call(folder, name, *arguments, "--cache", "int8"))
        held = human_bytes(model.new_cache(1, stored, torch.int8).nbytes)
        assert f"KV cache of {stored} tokens: {held}" in result.stderr
        assert result.stdout == succeeded(call(folder, name, *arguments)).stdout


def test_several_prompts_each_as_if_alone(folder):
    prompts = ["import os, sys, re", "d", "\n", "class A:\n    pass"]
    options = [option for prompt in prompts for option in ("--prompt", prompt)]
    result = succeeded(call(folder, "mla", *options, "--temperature", "0", "--max-tokens", "9"))
    expected = [expected_text(folder, prompt, 9) for prompt in prompts]
    assert result.stdout == generate.BETWEEN_TEXTS.join(expected) + "\n\n"


def test_the_end_of_the_context(folder):
    result = succeeded(call(folder, "mla", "--prompt", "def f(", "--temperature", "0", "--max-tokens", "1000"))
    assert result.stdout == expected_text(folder, "def f(", 1000) + "\n\n"
    assert "KV cache of 32 tokens" in result.stderr
    assert "fills the model's seq_len=32" in result.stderr


def test_files_and_standard_input(folder, monkeypatch):
    (folder / "prompt.txt").write_text("import ")
    outputs = {call(folder, "mla", "--prompt-file", "prompt.txt", "--max-tokens", "8").stdout}
    outputs.add(call(folder, "mla", "--prompt", "import ", "--max-tokens", "8").stdout)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"import ")))
    outputs.add(call(folder, "mla", "--max-tokens", "8").stdout)
    assert len(outputs) == 1
    assert next(iter(outputs)).startswith("import ")


def test_seed_and_limits(folder):
    def draw(*options: str) -> str:
        return succeeded(call(folder, "mla", "--prompt", "def ", "--max-tokens", "16", *options)).stdout

    greedy = draw("--temperature", "0")
    assert draw("--seed", "3") == draw("--seed", "3") != draw("--seed", "4")
    for limit in ("--top-k=1", "--top-p=1e-9", "--min-p=1"):
        assert draw(limit) == greedy
    assert draw("--temperature", "0", "--repetition-penalty", "100") != greedy


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_string_ends_the_text_before_it(folder, length):
    whole = expected_text(folder, "def f(", 20)
    stop = whole[10 : 10 + length]
    at = whole.index(stop, len("def f("))
    options = ("--temperature", "0", "--max-tokens", "20", "--stop", "never this", "--stop", stop)
    assert succeeded(call(folder, "mla", "--prompt", "def f(", *options)).stdout == whole[:at] + "\n\n"


@pytest.fixture
def terminal(monkeypatch):
    """A terminal as standard input; what is written to the descriptor has been typed there."""
    keyboard, screen = pty.openpty()
    settings = termios.tcgetattr(screen)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(screen, termios.TCSANOW, settings)
    with open(screen) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield keyboard
    os.close(keyboard)


def test_interactive(folder, terminal):
    os.write(terminal, b"def f(\n" + b"word " * 40 + b"\n\nclass A\n\x04")
    result = succeeded(call(folder, "mla", "--temperature", "0", "--max-tokens", "8"))
    texts = [expected_text(folder, prompt, 8) for prompt in ("def f(", "class A")]
    assert result.stdout == f"> {texts[0]}\n\n> > > {texts[1]}\n\n> \n"
    assert result.stderr.count("KV cache") == 2
    assert re.findall(r"error: (the prompt \w+ \w+)", result.stderr) == ["the prompt has 161", "the prompt is empty"]


def versus(monkeypatch, folder: Path, *arguments: str) -> Result:
    monkeypatch.setenv("COLUMNS", "400")  # enough for any line of these texts
    return succeeded(call(folder, *arguments))


@pytest.mark.parametrize("options", [("--temperature", "0"), ("--seed", "5"), ("--stop", "e", "--top-p", "0.9")])
def test_versus_is_what_each_run_gives_alone(folder, monkeypatch, options):
    arguments = ("--prompt", "def f(", "--max-tokens", "20", *options)
    result = versus(monkeypatch, folder, "mla", "--versus", "mha", *arguments)
    for name, rows in zip(("mla", "mha"), sides(result.stdout.split("\n")), strict=True):
        assert rows[0] == f"{name} ({name})"
        alone = succeeded(call(folder, name, *arguments))
        text = [row.expandtabs(4).rstrip() for row in alone.stdout.removesuffix("\n\n").split("\n")]
        assert rows[2:-2] == text + [""] * (len(rows) - 4 - len(text))
        stored, cache = re.search(r"KV cache of (\d+) tokens: (.*)", alone.stderr).groups()
        per_token = int(summary_of(folder / name)["kv_cache_bytes_per_token"])
        assert rows[-1].startswith(f"{stored} tokens  {cache} of cache  ({per_token:,} B/token)  ")


def test_what_versus_ends_with(folder, monkeypatch):
    result = versus(monkeypatch, folder, "mla", "--versus", "mha/checkpoints/last.ckpt", "--prompt", "def f(")
    mla, mha = (int(summary_of(folder / name)["kv_cache_bytes_per_token"]) for name in ("mla", "mha"))
    assert mla != mha
    first, second = result.stderr.splitlines()
    assert re.fullmatch(rf"mla \(mla\): \d+ tokens.*, \d+ tokens/s; .* {mla:,} B/token, {mla / mha:.3f} of .*", first)
    assert re.fullmatch(rf"mha/last.ckpt \(mha\): .* of 16 tokens: .* {mha:,} B/token, {mha / mla:.3f} of .*", second)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_a_run_versus_itself(folder, monkeypatch, temperature):
    prompts = ("--prompt", "def f(", "--prompt", "import ")
    result = versus(monkeypatch, folder, "mla", "--versus", "mla", *prompts, "--temperature", temperature)
    both = sides(result.stdout.split("\n"))
    left, right = ([row for row in rows if not row.endswith("tokens/s")] for rows in both)
    assert left == right
    assert sum(row.startswith(("def f(", "import")) for row in left) == 2
    assert result.stderr.count(", 1.000 of the other's") == 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_both_grow_in_turns(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate", "mla", "--versus", "mha", "--prompt", "def f(", "--temperature", "0"])
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="0"):
        cli.run(generate.main)
    plain = re.sub(r"\x1b\[[\d;]*m", "", sys.stdout.getvalue())
    frames = re.findall(r"(\d+) tokens  \S+ \S+ of cache.*?(\d+) tokens  \S+ \S+ of cache", plain)
    drawn = [(int(left), int(right)) for left, right in frames]
    first, second = (1 + len(encode(mla_lm.load_run(folder / name)[1], "def f(")) for name in ("mla", "mha"))
    most, other_most = drawn[-1]
    in_turns = [(min(first + n, most), min(second + n, other_most)) for n in range(1, 30)]
    assert drawn[0] == in_turns[0]
    assert [in_turns.index(pair) for pair in drawn] == sorted(in_turns.index(pair) for pair in drawn)


def test_versus_interactive(folder, terminal, monkeypatch):
    os.write(terminal, b"def f(\n\nimport os, sys,\nclass A\n\x04")
    result = versus(monkeypatch, folder, "mla", "--versus", "mha", "--max-tokens", "4")
    assert result.stdout.count("mla (mla)") == 2
    assert result.stderr.count("B/token") == 4
    assert "error: mla (mla): the prompt is empty" in result.stderr
    assert "error: mha (mha): the prompt has 16 tokens, the model reads 16" in result.stderr


def test_mistakes(folder):
    refused(call(folder, "nothing", "--prompt", "x"), "nothing", "does not exist")
    refused(call(folder, ".", "--prompt", "x"), "no run folder")
    refused(call(folder, "mla", "--versus", "nothing", "--prompt", "x"), "nothing", "does not exist")
    refused(call(folder, "mla", "--versus", ".", "--prompt", "x"), "no run folder")
    refused(call(folder, "mla", "--prompt-file", "missing.txt"), "missing.txt")
    refused(call(folder, "mla", "--prompt-file", "x", "--prompt", "x"), "--prompt-file", "not allowed with")
    (folder / "latin.txt").write_bytes(b"\xe9t\xe9")
    refused(call(folder, "mla", "--prompt-file", "latin.txt"), "cannot be read")


def test_compiling_without_a_compiler(folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(call(folder, "mla", "--compile", "--prompt", "x"), "--compile", "no-such-compiler", "CXX=")


def test_a_prompt_longer_than_the_context(folder):
    refused(
        call(folder, "mla", "--prompt", "x", "--prompt", "word " * 100), "has", "tokens, the model reads 32: shorten"
    )
    # The second prompt is too long for the second run: nothing of the first is shown before.
    both = call(folder, "mla", "--versus", "mha", "--prompt", "x", "--prompt", "import os, sys, re")
    refused(both, "mha (mha): the prompt has 19 tokens, the model reads 16: shorten")
    assert both.stdout == ""


@pytest.mark.parametrize("options", [(), ("--versus", "mha")], ids=["alone", "versus"])
def test_an_empty_prompt(folder, monkeypatch, options):
    words = ("the prompt is empty", "--prompt $'\\n'")
    refused(call(folder, "mla", *options, "--prompt", ""), *words)
    refused(call(folder, "mla", *options, "--prompt", "x", "--prompt", ""), *words)
    (folder / "empty.txt").write_text("")
    refused(call(folder, "mla", *options, "--prompt-file", "empty.txt"), *words)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    refused(call(folder, "mla", *options), *words)
    assert succeeded(call(folder, "mla", *options, "--prompt", "\n")).stdout.strip("\n")


@pytest.mark.parametrize(
    ("option", "values", "named"),
    [
        ("--temperature", ("-1", "nan", "inf", "warm"), "temperature"),
        ("--top-k", ("0", "2.5"), "top"),
        ("--top-p", ("0", "1.1", "nan"), "top_p"),
        ("--min-p", ("-0.1", "1.1", "nan"), "min_p"),
        ("--repetition-penalty", ("0", "-1", "inf"), "repetition_penalty"),
        ("--max-tokens", ("0", "many"), "--max-tokens"),
        ("--seed", ("-1", str(2**32)), "--seed"),
        ("--stop", ("",), "--stop"),
    ],
)
def test_values_that_cannot_be(folder, option, values, named):
    for value in values:
        refused(call(folder, "mla", "--prompt", "x", f"{option}={value}"), named)
