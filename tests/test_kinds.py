"""What holds for every kind of attention, whatever it is: causal, cached as it says, counted, matched, learning."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mla_lm import AttentionConfig, Transformer, TransformerConfig, UserError
from mla_lm.attention import KINDS
from mla_lm.attention.kind import SharedOptions
from mla_lm.inference.generate import generate
from mla_lm.model.size import ModelSize, model_size
from tests.conftest import ROOT
from tests.kinds import config_of, each_kind, model_of, preset_of, spread

# Size: the vocabulary it is meant for, and about how many parameters it has with it.
SIZES = {"tiny": (4096, 1e6), "small": (4096, 2.6e6), "medium": (50257, 124e6), "large": (50257, 350e6)}
ONLY_OF_THE_FIRST_KINDS = {"large"}  # sizes that a kind may lack
PRESETS = {file.stem for file in (ROOT / "conf" / "model").glob("*.yaml")}


def size_of(kind: str, size: str) -> ModelSize:
    config = preset_of(f"{kind}_{size}")
    config.vocab_size = SIZES[size][0]
    return model_size(config)


# the registry and the presets


@each_kind
def test_an_option_belongs_to_the_kinds_that_read_it(kind):
    """Set for another kind, it is refused by name."""
    own = {option.name for option in fields(KINDS[kind].options)} | {option.name for option in fields(SharedOptions)}
    for option in fields(AttentionConfig):
        if option.name not in own:
            config = config_of(kind)
            setattr(config.attention, option.name, False if option.default is True else [1.0])
            with pytest.raises(UserError, match=f"attention.{option.name} is set, but belongs to kind"):
                config.layer_config()


def test_a_kind_that_is_none():
    with pytest.raises(UserError, match="kind=gpa is unknown: one of mla, mha, gqa, mqa"):
        TransformerConfig(attention=AttentionConfig(kind="gpa")).layer_config()


def test_every_preset_is_of_a_size_that_is_known():
    needed = {f"{kind}_{size}" for kind in KINDS for size in set(SIZES) - ONLY_OF_THE_FIRST_KINDS} | {"mla_serving"}
    assert needed <= PRESETS <= needed | {f"{kind}_{size}" for kind in KINDS for size in ONLY_OF_THE_FIRST_KINDS}


@pytest.mark.parametrize(
    ("kind", "size"), [(kind, size) for kind in KINDS for size in SIZES if f"{kind}_{size}" in PRESETS]
)
def test_presets_of_one_size_are_equal_but_for_attention_and_feed_forward(kind, size):
    def shared(config: TransformerConfig) -> dict:
        return {key: value for key, value in vars(config).items() if key not in ("attention", "ff_hidden")}

    ours, mha = size_of(kind, size), size_of("mha", size)
    assert ours.attention == kind
    assert ours.parameters == pytest.approx(mha.parameters, rel=0.01)
    assert ours.parameters == pytest.approx(SIZES[size][1], rel=0.15)
    if kind != "mlra":  # which attends several times for each head
        assert ours.flops_per_token == pytest.approx(mha.flops_per_token, rel=0.01)
    assert shared(preset_of(f"{kind}_{size}")) == shared(preset_of(f"mha_{size}"))


# counted


def counted(model: Transformer, tokens: torch.Tensor, backend: SDPBackend) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(backend):
        model(tokens, tokens).backward()
    return counter.get_total_flops()


@each_kind
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_flops_are_those_of_the_model(kind, tied):
    """PyTorch's counter, on tensors without data, sees all products but those of the fused CPU kernel.

    It sees those of the math path, whose scores are the whole T x T: a causal model needs (T + 1) / 2T of them.
    """
    config = config_of(kind, tie_embeddings=tied)
    with FakeTensorMode():
        model, tokens = Transformer(config), torch.zeros(2, config.seq_len, dtype=torch.long)
        others = counted(model, tokens, SDPBackend.FLASH_ATTENTION)
        attended = counted(model, tokens, SDPBackend.MATH) - others
    size = model_size(config)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.non_embedding_parameters == size.parameters - 61 * config.d_model
    assert attended > 0
    assert size.flops_per_token * tokens.numel() == others + attended * (config.seq_len + 1) / (2 * config.seq_len)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_has_the_bytes_that_the_kind_says(kind, dtype):
    model = model_of(kind)
    cache = model.new_cache(3, 10, dtype)
    elements = KINDS[kind].caches(2) * model.config.layer_config().cached_elements
    assert cache.nbytes == 3 * 10 * elements * dtype.itemsize  # batch, tokens
    assert model_size(model.config).cache_bytes_per_token(2, dtype) == cache.nbytes / (3 * 10)
    with torch.no_grad():
        model(torch.zeros(3, 10, dtype=torch.long), cache=cache)
    assert (cache.nbytes, cache.length) == (3 * 10 * elements * dtype.itemsize, 10)  # filling it adds nothing


@each_kind
@torch.no_grad()
def test_an_int8_cache_changes_little(kind):
    model, tokens = spread(model_of(kind)), torch.randint(61, (2, 16))
    cache = model.new_cache(2, 16, torch.int8)
    logits = torch.cat([model(part, cache=cache) for part in tokens.split([9, 1, 1, 5], dim=1)], dim=1)
    assert cache.nbytes < model.new_cache(2, 16, torch.bfloat16).nbytes
    full = model(tokens)
    assert 0 < (logits - full).std() < 0.1 * full.std()


# computed


@each_kind
@torch.no_grad()
@settings(max_examples=15)
@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_causal_and_the_same_through_the_cache(kind, chunks, data):
    length = min(16, sum(chunks))
    model, tokens = spread(model_of(kind)), data.draw(tokens_of(2, length))
    logits, cache = model(tokens), model.new_cache(2)
    parts = [model(part, cache=cache) for part in tokens.split_with_sizes(fitting(chunks, length), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, rtol=1e-4, atol=1e-4)
    cut = data.draw(st.integers(1, length))
    changed = torch.cat((tokens[:, :cut], (tokens[:, cut:] + 1) % 61), dim=1)
    torch.testing.assert_close(model(changed)[:, :cut], logits[:, :cut], rtol=1e-5, atol=1e-5)


def tokens_of(batch: int, length: int) -> st.SearchStrategy[torch.Tensor]:
    return st.integers(0, 2**31).map(
        lambda seed: torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))
    )


def fitting(chunks: list[int], length: int) -> list[int]:
    """The chunks, the last of them cut, so that together they have this length."""
    cut, left = [], length
    for chunk in chunks:
        cut.append(min(chunk, left))
        left -= cut[-1]
    return [chunk for chunk in cut if chunk]


@each_kind
@torch.no_grad()
def test_the_order_of_tokens_matters(kind):
    """The last token sees all the others: only their positions tell it their order."""
    model, tokens = spread(model_of(kind)), torch.randperm(61)[None, :8]
    permuted = tokens[:, [2, 0, 1, 5, 3, 6, 4, 7]]
    assert (model(tokens)[:, -1] - model(permuted)[:, -1]).abs().max() > 1e-3


@each_kind
def test_greedy_generation_is_full_recomputation(kind):
    model, prompts = spread(model_of(kind, tie_embeddings=False), std=0.2), torch.randint(61, (3, 4))
    tokens = prompts
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    continued = torch.stack(list(generate(model, prompts, 12, temperature=0)), dim=1)
    assert torch.equal(continued, tokens[:, 4:])
    assert len(continued.unique()) > 5


@each_kind
def test_learns(kind):
    model = model_of(kind)
    tokens = torch.randint(61, (1, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.5
