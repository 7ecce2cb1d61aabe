"""Decoding through the cache gives what recomputing everything for each token gives; sampling gives what is asked."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mla_lm import Transformer
from mla_lm.attention import KINDS, gpu_kernel
from mla_lm.errors import UserError
from mla_lm.inference import generate as generate_module
from mla_lm.inference.generate import NOTHING, generate, penalize, pick, token_weights
from tests import kinds
from tests.kinds import spread
from tests.on_device import OnTheDevice


def model_of(kind: str, seq_len: int = 24) -> Transformer:
    """The likeliest token depends on the context."""
    return spread(kinds.model_of(kind, seq_len=seq_len, tie_embeddings=False), std=0.2)


def sample(model, prompts, max_tokens, **options) -> torch.Tensor:
    return torch.stack(list(generate(model, prompts, max_tokens, **options)), dim=1)


def test_each_prompt_of_a_batch_as_if_alone():
    model, prompts = model_of("mla"), torch.randint(61, (4, 5))
    alone = [sample(model, prompt[None], 10, temperature=0) for prompt in prompts]
    assert torch.equal(sample(model, prompts, 10, temperature=0), torch.cat(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_from_a_filled_cache(kind):
    """What it holds is not read again: other ids in its place change nothing."""
    model, prompts = model_of(kind), torch.randint(61, (2, 7))
    expected = sample(model, prompts, 10, temperature=0)
    cache = model.new_cache(2)
    model.hidden_states(prompts[:, :5], cache)
    prompts[:, :5] = 0
    assert torch.equal(sample(model, prompts, 10, temperature=0, cache=cache), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 1), (torch.int8, 2)])
def test_a_step_is_one_graph_and_not_one_for_each_length(kind, dtype, batch):
    """So that compiling it pays; here it is captured and not compiled, which takes long."""
    model, tokens = model_of(kind), torch.randint(61, (batch, 20))
    torch.compiler.reset()  # torch compiles a function anew for a few models only
    captured = []
    capture = torch.compile(
        model.hidden_states, dynamic=True, fullgraph=True, backend=lambda graph, _: captured.append(graph) or graph
    )
    caches = [model.new_cache(batch, 21, dtype) for _ in range(2)]
    # Sums are in another order. Over int8, the kernel of compiled steps rounds queries to 15 bits, after which a number
    # of the next layer may round to another int8.
    tolerance = 0.02 if dtype == torch.int8 else 1e-4
    with torch.no_grad():
        for cache in caches:
            model.hidden_states(tokens[:, :5], cache)
        for token in tokens[:, 5:].split(1, dim=1):
            stepped, expected = capture(token, caches[0]), model.hidden_states(token, caches[1])
            torch.testing.assert_close(stepped, expected, rtol=tolerance, atol=tolerance)
    assert len(captured) == 1
    products = [node for node in captured[0].graph.nodes if node.target is torch.nn.functional.linear]
    assert bool(products) == (batch > 1)  # of a single vector, each is a sum


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mla", "mha"])
@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_it_gives_the_same(kind, batch):
    model, prompts = model_of(kind), torch.randint(61, (batch, 7))
    torch.compiler.reset()
    counters.clear()
    compiled = sample(model, prompts, 15, temperature=0, compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(compiled, sample(model, prompts, 15, temperature=0))


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)
def test_every_model_is_compiled_however_many_there_are():
    torch.compiler.reset()
    counters.clear()
    for kind in ("mla", "mha", "gqa", "mqa"):
        sample(model_of(kind), torch.randint(61, (2, 7)), 3, compiled=True)
    assert counters["stats"]["unique_graphs"] == 4


@pytest.fixture
def uncaptured(monkeypatch):
    """Let the CPU take the GPU's path, whose steps it runs as they are: neither compiled nor captured."""
    monkeypatch.setattr(generate_module, "can_capture", lambda device: True)
    monkeypatch.setattr(generate_module, "CapturedStep", lambda step, device, generator: step)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_at_a_fixed_position_it_gives_the_same(uncaptured, kind, dtype):
    """Greedy and sampled, with prompts of different lengths, whether the room or max_tokens ends it."""
    model, prompts = model_of(kind), [torch.randint(61, (length,)) for length in (5, 1, 23, 17)]
    for max_tokens in (4, 99):
        for options in ({"temperature": 0}, {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}):
            fixed, ordinary = (
                sample(
                    *(model, prompts, max_tokens),
                    **options,
                    dtype=dtype,
                    compiled=compiled,
                    generator=torch.Generator().manual_seed(5),
                )
                for compiled in (True, False)
            )
            assert torch.equal(fixed, ordinary)


def test_the_cache_it_was_given_is_an_ordinary_one_afterwards(uncaptured):
    model, prompts = model_of("mla"), torch.randint(61, (2, 7))
    for steps in (10, 3):  # 3: it is left before it ends
        cache = model.new_cache(2)
        tokens = generate(model, prompts, 10, temperature=0, cache=cache, compiled=True)
        first = torch.stack([next(tokens) for _ in range(steps)], dim=1)
        tokens.close()
        assert (cache.length, cache.layers[0].position) == (6 + steps, None)
        prompts = torch.cat((prompts, first), dim=1)
        assert torch.equal(
            sample(model, prompts, 4, temperature=0, cache=cache), sample(model, prompts, 4, temperature=0)
        )
        prompts = prompts[:, :7]


def test_no_token_beyond_the_room_of_a_fixed_cache(uncaptured):
    tokens = generate(
        model_of("mla"), torch.randint(61, (2, 7)), 10, cache=model_of("mla").new_cache(2, 9), compiled=True
    )
    assert len([next(tokens) for _ in range(3)]) == 3
    with pytest.raises(ValueError, match="room for 9 tokens: 9 are stored, 10 needed"):
        next(tokens)


@pytest.mark.slow
def test_compiled_at_a_fixed_position_one_graph_serves_every_room(uncaptured):
    model = model_of("mla")
    torch.compiler.reset()
    counters.clear()
    with torch.compiler.set_stance("default"):
        for length, max_tokens in ((2, 3), (7, 15)):
            prompts = torch.randint(61, (2, length))
            compiled = sample(model, prompts, max_tokens, temperature=0, compiled=True)
            assert torch.equal(compiled, sample(model, prompts, max_tokens, temperature=0))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("options", [{}, {"top_k": 9, "top_p": 0.8, "min_p": 0.05}])
def test_a_whole_step_stays_on_the_device(uncaptured, monkeypatch, options):
    """After the first ids, which the host waits for. The meta device stands for a GPU."""
    monkeypatch.setattr(gpu_kernel, "_serves", lambda q, width: True)
    prompts = [torch.zeros(length, dtype=torch.int64, device="meta") for length in (3, 5)]
    tokens = generate(model_of("mla").to("meta"), prompts, 6, repetition_penalty=1.2, **options, compiled=True)
    next(tokens), next(tokens)
    with OnTheDevice() as ops:
        assert next(tokens).is_meta
    assert ops.count > 50


@pytest.mark.parametrize("vocab_size", [1, 61, 50_257])
def test_an_id_is_drawn_as_torch_draws_it(vocab_size):
    logits = 3 * torch.randn(3, vocab_size)
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(5):
        weights = token_weights(logits, 0.7, top_p=0.9)
        expected = torch.multinomial(weights, 1, generator=theirs).squeeze(1)
        assert torch.equal(pick(logits, 0.7, top_p=0.9, generator=ours), expected)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_refuses_a_cache_that_holds_the_whole_prompt():
    model, prompts = model_of("mla"), torch.randint(61, (2, 7))
    cache = model.new_cache(2)
    model.hidden_states(prompts, cache)
    with pytest.raises(UserError, match="holds 7 tokens, and a prompt has 7"):
        next(generate(model, prompts, 3, cache=cache))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_tokens", [4, 99])
def test_prompts_of_different_lengths_each_as_if_alone(kind, max_tokens):
    """Up to max_tokens each or to the end of seq_len, also where one prompt ends when another has begun long ago."""
    model = model_of(kind)
    prompts = [torch.randint(61, (length,)) for length in (5, 1, 24, 17)]
    columns = sample(model, prompts, max_tokens, temperature=0, repetition_penalty=1.2)
    for prompt, ids in zip(prompts, columns, strict=True):
        new = ids[ids != NOTHING]
        assert len(new) == min(max_tokens, 24 - len(prompt))
        if len(new):
            assert torch.equal(new, sample(model, [prompt], max_tokens, temperature=0, repetition_penalty=1.2)[0])


@pytest.mark.parametrize(
    ("prompt_length", "max_tokens"), [(1, 5), (20, 3), (20, 4), (20, 99), (23, 2), (24, 5), (3, 0)]
)
def test_number_of_tokens_and_of_forward_passes(prompt_length, max_tokens):
    model, passes = model_of("mla"), []
    model.norm.register_forward_hook(lambda module, args, out: passes.append(out.size(1)))
    tokens = list(generate(model, torch.randint(61, (2, prompt_length)), max_tokens))
    assert len(tokens) == min(max_tokens, 24 - prompt_length)
    assert passes == ([prompt_length] + [1] * (len(tokens) - 1) if tokens else [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_is_read_in_chunks(kind, monkeypatch):
    model, prompts, passes = model_of(kind), torch.randint(61, (2, 13)), []
    whole = sample(model, prompts, 6, temperature=0)
    monkeypatch.setattr("mla_lm.inference.generate.PREFILL", 5)
    model.norm.register_forward_hook(lambda module, args, out: passes.append(out.size(1)))
    assert torch.equal(sample(model, prompts, 6, temperature=0), whole)
    assert passes == [5, 5, 3, 1, 1, 1, 1, 1]


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


@pytest.mark.parametrize("penalty", [1.0, 1.7, 0.8])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    "limits",
    [{}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8, "min_p": 0.1}, {"top_p": 1e-9}],
    ids=str,
)
def test_what_is_drawn_from_is_that_of_transformers(limits, temperature, penalty):
    torch.manual_seed(0)
    logits, ids = 2 * torch.randn(16, 61), torch.randint(61, (16, 12))
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    theirs += [warpers[name](value) for name, value in limits.items()]
    expected = theirs(ids, logits.clone()).softmax(-1)
    seen = torch.zeros(16, 61, dtype=torch.bool).scatter_(1, ids, True)
    weights = token_weights(penalize(logits, seen, penalty), temperature, **limits)
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), expected)


def test_a_repetition_penalty_ends_repetition():
    """One so strong that no id comes twice, nor one of the prompt, as long as there are others."""
    model, prompts = model_of("mla"), [torch.arange(4), torch.arange(4, 10)]
    with torch.no_grad():
        model.head.weight.abs_()  # so that, with what it reads positive, all logits are
        model.norm.register_forward_hook(lambda module, args, out: out.abs())
    for prompt, ids in zip(prompts, sample(model, prompts, 15, temperature=0, repetition_penalty=1e6), strict=True):
        new = ids[ids != NOTHING]
        assert len({*prompt.tolist(), *new.tolist()}) == len(prompt) + len(new)


def test_a_temperature_near_zero_is_zero():
    model, prompts = model_of("mha"), torch.randint(61, (4, 4))
    greedy = sample(model, prompts, 8, temperature=0)
    assert torch.equal(sample(model, prompts, 8, temperature=1e-50), greedy)


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
        (4, {"temperature": -1.0}, "temperature=-1.0 must be"),
        (4, {"temperature": float("nan")}, "temperature=nan must be"),
        (4, {"temperature": float("inf")}, "temperature=inf must be"),
        (4, {"top_k": 0}, "top_k=0 must be at least 1"),
        (4, {"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        (4, {"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        (4, {"min_p": -0.1}, "min_p=-0.1 must be at least 0 and at most 1"),
        (4, {"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be"),
    ],
)
def test_refused(length, options, message):
    with pytest.raises(ValueError, match=message):
        next(generate(model_of("mla"), torch.randint(61, (1, length)), 3, **options))
