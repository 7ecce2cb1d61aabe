"""A model that begins as an induction circuit copies from its context before any training."""

import pytest
import torch
import torch.nn.functional as F

from mla_lm import Transformer, UserError
from mla_lm.attention import KINDS
from tests.kinds import config_of, model_of, preset_of

COPYING = ("mla", "mla_shared", "mha", "gqa", "mqa")
copying = pytest.mark.parametrize("kind", COPYING)


def small(kind: str, **changes) -> Transformer:
    torch.manual_seed(0)
    config = preset_of(f"{kind}_small")
    for name, value in {"vocab_size": 1000, "induction_init": True, **changes}.items():
        setattr(config, name, value)
    return Transformer(config)


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
    first, again = losses_on_a_text_read_twice(small(kind, induction_init=False))
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
    config = preset_of("mla_small")
    config.vocab_size, config.induction_init = 1000, True
    config.attention.q_compressed_dim, config.attention.latent_norm = 96, False
    torch.manual_seed(0)
    first, again = losses_on_a_text_read_twice(Transformer(config))
    assert again < first - 0.03


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in COPYING])
def test_kinds_without_such_heads_say_so(kind):
    with pytest.raises(UserError, match=f"not made for model.attention.kind={kind}"):
        model_of(kind, induction_init=True, num_layers=4)


def test_one_layer_is_too_few():
    with pytest.raises(UserError, match=r"two layers.*num_layers=1"):
        model_of("mla", induction_init=True, num_layers=1)


def test_sizes_can_be_counted_without_memory():
    with torch.device("meta"):
        model = Transformer(config_of("mla", induction_init=True))
    assert model.embedding.weight.is_meta
