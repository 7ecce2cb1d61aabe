"""Decoding through the cache gives what recomputing everything for each token gives."""

import pytest
import torch

from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.generate import generate

KINDS = {
    "mla": AttentionConfig(kv_compressed_dim=16, q_compressed_dim=12, rope_dim=4),
    "mha": AttentionConfig(),
    "gqa": AttentionConfig(num_kv_heads=2),
    "mqa": AttentionConfig(num_kv_heads=1),
}


def model_of(kind: str, seq_len: int = 24) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(2, 32, 4, seq_len, 48, KINDS[kind], vocab_size=61, tie_embeddings=False))
    for parameter in model.parameters():  # so that the likeliest token depends on the context
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.eval()


def sample(model, prompts, max_tokens, **options) -> torch.Tensor:
    return torch.stack(list(generate(model, prompts, max_tokens, **options)), dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt_length", [1, 7])
def test_greedy_is_full_recomputation(kind, prompt_length):
    model, prompts = model_of(kind), torch.randint(61, (3, prompt_length))
    tokens = prompts
    with torch.no_grad():
        for _ in range(15):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    continued = sample(model, prompts, 15, temperature=0)
    assert torch.equal(continued, tokens[:, prompt_length:])
    assert len(continued.unique()) > 5


def test_each_prompt_of_a_batch_as_if_alone():
    model, prompts = model_of("mla"), torch.randint(61, (4, 5))
    alone = [sample(model, prompt[None], 10, temperature=0) for prompt in prompts]
    assert torch.equal(sample(model, prompts, 10, temperature=0), torch.cat(alone))


@pytest.mark.parametrize(
    ("prompt_length", "max_tokens"), [(1, 5), (20, 3), (20, 4), (20, 99), (23, 2), (24, 5), (3, 0)]
)
def test_number_of_tokens_and_of_forward_passes(prompt_length, max_tokens):
    model, passes = model_of("mla"), []
    model.norm.register_forward_hook(lambda module, args, out: passes.append(out.size(1)))
    tokens = list(generate(model, torch.randint(61, (2, prompt_length)), max_tokens))
    assert len(tokens) == min(max_tokens, 24 - prompt_length)
    assert passes == ([prompt_length] + [1] * (len(tokens) - 1) if tokens else [])


def test_the_generator_decides():
    model, prompts = model_of("mla"), torch.randint(61, (2, 4))
    draw = lambda seed, **o: sample(model, prompts, 20, generator=torch.Generator().manual_seed(seed), **o)  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=5, temperature=0.7), draw(1, top_k=5, temperature=0.7))


def test_top_k_and_temperature():
    model, prompts = model_of("mha"), torch.randint(61, (64, 4))
    greedy = sample(model, prompts, 8, temperature=0)
    assert torch.equal(sample(model, prompts, 8, top_k=1), greedy)
    assert torch.equal(sample(model, prompts, 8, temperature=1e-4), greedy)
    with torch.no_grad():
        likeliest = model(prompts)[:, -1].topk(3).indices
    first = sample(model, prompts, 1, top_k=3, temperature=5.0)
    assert (first == likeliest).any(1).all()
    assert not torch.equal(first[:, 0], likeliest[:, 0])
    assert sample(model, prompts, 1, top_k=1000).shape == (64, 1)


def test_samples_follow_the_softmax():
    model, prompt = model_of("gqa"), torch.randint(61, (1, 4))
    first = sample(model, prompt.expand(20_000, -1), 1, temperature=2.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = (model(prompt)[0, -1] / 2.0).softmax(-1)
    assert (first[:, 0].bincount(minlength=61) / 20_000 - expected).abs().max() < 0.02


def test_nothing_of_a_graph_is_kept():
    assert not any(t.requires_grad for t in generate(model_of("mla"), torch.randint(61, (1, 4)), 3))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (25, {}, "a prompt of 25 tokens is longer than the model's seq_len=24"),
        (4, {"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        (4, {"top_k": 0}, "top_k=0 at least 1"),
    ],
)
def test_refused(length, options, message):
    with pytest.raises(ValueError, match=message):
        next(generate(model_of("mla"), torch.randint(61, (1, length)), 3, **options))
