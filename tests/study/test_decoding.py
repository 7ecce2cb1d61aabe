"""Decoding speeds and greedy samples of a run."""

import torch

from mla_lm import generate, load_run
from mla_lm.runs.folder import RunFolder
from mla_lm.study.decoding import decoding_speeds, greedy_samples
from tests.conftest import summary_of


def test_speeds_at_contexts_beyond_the_trained_one(runs):
    for kind in ("mla", "gqa"):
        found = decoding_speeds(RunFolder(runs / kind).config(), (8, 64, 500))
        assert [at.context for at in found] == [8, 64, 500]
        assert all(at.tokens_per_second > 1 for at in found)
        per_token = summary_of(runs / kind)["kv_cache_bytes_per_token"]
        assert [at.cache_bytes for at in found] == [at.context * per_token for at in found]


def test_samples_take_the_likeliest_token(runs):
    (sample,) = greedy_samples(RunFolder(runs / "mla"), ["import "], max_tokens=8)
    model, tokenizer, _ = load_run(runs / "mla")
    end = tokenizer.token_to_id("<|endoftext|>")
    prompt = torch.tensor([[end, *tokenizer.encode("import ").ids]])
    expected = [int(token) for token in generate(model, prompt, 8, temperature=0)]
    assert end not in expected
    assert sample.prompt == "import "
    assert sample.text == tokenizer.decode(expected)


def test_prompts_are_those_of_the_run(run):
    folder = RunFolder(run)
    config = folder.config()
    config.data.prompts = ["a", "b "]
    folder.write_config(config)
    assert [sample.prompt for sample in greedy_samples(folder, max_tokens=2)] == ["a", "b "]
    config.data.prompts = []
    folder.write_config(config)
    assert [sample.prompt for sample in greedy_samples(folder, max_tokens=2)] == ["\n"]
