"""A model that begins as an induction circuit copies from its context before any training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mla_lm import Transformer, UserError
from mla_lm.model.induction import begin_with_induction
from mla_lm.model.memory import training_memory
from tests.kinds import config_of, model_of, preset_of

COPYING = ("mla", "mla_shared", "mla_qk_norm", "gla", "mlra", "mha", "gqa", "mqa", "gta", "tpa")
copying = pytest.mark.parametrize("kind", COPYING)


def small(kind: str, induction: bool = True, **attention) -> Transformer:
    torch.manual_seed(0)
    config = preset_of(f"{kind}_small")
    config.vocab_size = 1000
    for name, value in attention.items():
        setattr(config.attention, name, value)
    model = Transformer(config)
    if induction:
        begin_with_induction(model)
    return model


@torch.no_grad()
def losses_on_a_text_read_twice(model: Transformer) -> tuple[float, float]:
    """Mean loss over random tokens, and over the same again."""
    tokens = torch.randint(1000, (8, 100)).repeat(1, 2)
    losses = F.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:], reduction="none")
    return losses[:, :99].mean().item(), losses[:, 102:].mean().item()


@copying
def test_repeated_text_is_predicted_better_from_the_start(kind):
    first, again = losses_on_a_text_read_twice(small(kind))
    assert again < first - 0.03
    first, again = losses_on_a_text_read_twice(small(kind, induction=False))
    assert abs(again - first) < 0.03


@copying
def test_what_the_first_layer_writes_depends_on_the_token_before(kind):
    model = small(kind)
    tokens = torch.randint(1000, (1, 40))
    written = first_layer(model, tokens)
    effects = []
    for place in range(10, 30):  # another token there changes what the next position writes
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 1000
        effects.append((first_layer(model, changed) - written).norm(dim=-1)[0, place + 1 : place + 4])
    nearest, *further = torch.stack(effects).mean(0).tolist()
    assert nearest > 3 * max(further)


@torch.no_grad()
def first_layer(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    block = model.blocks[0]
    return block.attention(block.attention_norm(model.embedding(tokens)))


def test_low_rank_queries_and_a_latent_without_norm_can_begin_so():
    first, again = losses_on_a_text_read_twice(small("mla", q_compressed_dim=96, latent_norm=False))
    assert again < first - 0.03


def test_mha_copies_better_with_dimensions_that_rope_leaves_as_they_are():
    gains = []
    for rope_dim in (None, 16):
        first, again = losses_on_a_text_read_twice(small("mha", rope_dim=rope_dim))
        gains.append(first - again)
    assert gains[1] > gains[0] > 0


NO_SUCH_HEAD = [("mla", {"rope_dim": 0}), ("mha", {"rope_dim": 0}), ("mha", {"rope_base": 2.0})]


@pytest.mark.parametrize(("kind", "sizes"), NO_SUCH_HEAD)
def test_sizes_without_such_heads_say_so(kind, sizes):
    with pytest.raises(UserError, match=f"not made for model.attention.kind={kind} of these sizes"):
        small(kind, **sizes)


def test_one_layer_is_too_few():
    with pytest.raises(UserError, match=r"two layers.*num_layers=1"):
        begin_with_induction(model_of("mla", num_layers=1))


def test_a_context_shorter_than_the_sample_will_do():
    begin_with_induction(model_of("mla", seq_len=2))
    with pytest.raises(UserError, match=r"two positions.*seq_len=1 "):
        begin_with_induction(model_of("mla", seq_len=1))


def test_sizes_can_be_counted_without_memory():
    config = config_of("mla", induction_init=True)
    with torch.device("meta"):
        model = Transformer(config)
    assert model.embedding.weight.is_meta
    assert training_memory(config, 2, torch.float32, "cpu", "muon") == training_memory(
        replace(config, induction_init=False), 2, torch.float32, "cpu", "muon"
    )
