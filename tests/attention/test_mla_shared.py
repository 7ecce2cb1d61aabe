"""MLA with one latent for two layers, by its equations: the second layer attends over the first one's keys."""

from dataclasses import replace

import pytest
import torch

from mla_lm.attention.mla import MLA
from mla_lm.model.layers import Block
from tests.kinds import config_of, model_of, spread


@torch.no_grad()
def test_the_second_layer_reads_the_keys_of_the_first():
    """An MLA that computes its keys from the first layer's input gives the same."""
    config = config_of("mla_shared")
    torch.manual_seed(0)
    owner, reader = Block(config, 0).attention, Block(config, 1).attention
    first, second = torch.randn(2, 2, 9, 128)
    out, carried = owner.attend(first, None, None, None)
    plain = MLA(config.layer_config())
    plain.load_state_dict(owner.state_dict())
    torch.testing.assert_close(out, plain(first))
    plain.load_state_dict(
        reader.state_dict() | {f"kv_{n}.weight": getattr(owner, f"kv_{n}").weight for n in ("down", "norm")}
    )
    plain.latents = lambda x, cos, sin: owner.latents(first, cos, sin)
    torch.testing.assert_close(reader.attend(second, None, None, carried)[0], plain(second))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_half_of_the_layers_have_a_cache(num_layers):
    model = model_of("mla_shared", num_layers=num_layers)
    filled = [len(layer.tensors) for layer in model.new_cache(1, 8).layers]
    assert filled == [1, 0, 1][:num_layers]


@pytest.mark.parametrize("absorb", [False, True])
@torch.no_grad()
def test_absorbed_equals_decompressed(absorb):
    model, tokens = spread(model_of("mla_shared", num_layers=3)), torch.randint(61, (2, 16))
    for block in model.blocks:
        block.attention.absorbing_is_cheaper = lambda queries, keys: absorb
    cache = model.new_cache(2)
    parts = [model(part, cache=cache) for part in tokens.split([5, 1, 3, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-4)


def test_gradients_through_both_layers_with_checkpointing():
    model, tokens = model_of("mla_shared", num_layers=4), torch.randint(61, (2, 17))
    gradients = []
    for checkpointing in (False, True):
        model.config = replace(model.config, activation_checkpointing=checkpointing)
        model.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)
        assert plain.abs().sum() > 0
