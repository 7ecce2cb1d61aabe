"""scripts.generate on a real run."""

import io
import os
import pty
import sys
import termios
from pathlib import Path

import pytest
import torch

import mla_lm
from mla_lm import cli
from mla_lm.data.tokenizer import decode, encode
from scripts import generate
from tests.conftest import Result, TrainCommand, call_main, refused, succeeded


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus) -> Path:
    """Where the run `mla` is, trained until it repeats more than spaces."""
    folder = tmp_path_factory.mktemp("runs")
    data = ("data=text", f"data.files={corpus}", "data.val_tokens=512", f"data.cache_dir={corpus.parent / 'cache'}")
    steps = ("trainer.max_steps=40", "val_every_n_steps=40", "checkpoint.every_n_steps=40", "optimizer.lr=0.01")
    succeeded(TrainCommand(folder, data)("data.tokenizer.vocab_size=300", *steps, "hydra.run.dir=mla"))
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
    assert "8 tokens, " in result.stderr
    assert f"KV cache of {stored} tokens: {model.new_cache(1, stored).nbytes / 1024:.1f} KiB" in result.stderr


def test_several_prompts_each_as_if_alone(folder):
    prompts = ["import os, sys, re", "d", "", "class A:\n    pass"]
    options = [option for prompt in prompts for option in ("--prompt", prompt)]
    result = succeeded(call(folder, "mla", *options, "--temperature", "0", "--max-tokens", "9"))
    expected = [expected_text(folder, prompt, 9) for prompt in prompts]
    assert result.stdout == generate.BETWEEN_TEXTS.join(expected) + "\n\n"


def test_the_end_of_the_context(folder):
    result = succeeded(call(folder, "mla", "--prompt", "def f(", "--temperature", "0", "--max-tokens", "1000"))
    assert result.stdout == expected_text(folder, "def f(", 1000) + "\n\n"
    assert "KV cache of 32 tokens" in result.stderr


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


def test_what_may_begin_a_stop_string_is_held_back(folder):
    """Shown as soon as it is sure, lost never, whatever the tokens are cut into."""
    _, tokenizer, _ = mla_lm.load_run(folder / "mla")
    text, shown = "a<e|<end|é<endé", ""
    ids = encode(tokenizer, text)
    growing = generate.Continuation(tokenizer, [], end=-1, room=len(ids), stops=["<end>", "é<end|"])
    for token in ids:
        growing.add(token)
        shown += growing.unshown()
        assert text.startswith(shown)
        rest = text[len(shown) :] if growing.done else growing.text.rstrip("\N{REPLACEMENT CHARACTER}")[len(shown) :]
        assert any(stop.startswith(rest) for stop in growing.stops)
    assert growing.done
    assert shown == text


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
    os.write(terminal, b"def f(\n" + b"word " * 40 + b"\n\n\x04")
    result = succeeded(call(folder, "mla", "--temperature", "0", "--max-tokens", "8"))
    texts = [expected_text(folder, prompt, 8) for prompt in ("def f(", "")]
    assert result.stdout == f"> {texts[0]}\n\n> > {texts[1]}\n\n> \n"
    assert result.stderr.count("KV cache") == 2
    assert "error: the prompt has" in result.stderr


def test_mistakes(folder):
    refused(call(folder, "nothing", "--prompt", "x"), "nothing", "does not exist")
    refused(call(folder, ".", "--prompt", "x"), "no run folder")
    refused(call(folder, "mla", "--prompt", "x", "--prompt", "word " * 100), "tokens", "32")
    refused(call(folder, "mla", "--prompt-file", "missing.txt"), "missing.txt")
    refused(call(folder, "mla", "--prompt-file", "x", "--prompt", "x"), "--prompt-file", "not allowed with")
    (folder / "latin.txt").write_bytes(b"\xe9t\xe9")
    refused(call(folder, "mla", "--prompt-file", "latin.txt"), "cannot be read")


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
