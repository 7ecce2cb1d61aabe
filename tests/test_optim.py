"""Which parameters decay, and what the optimiser does with them."""

import pytest
import torch

from mla_lm import AttentionConfig, Transformer, TransformerConfig, UserError
from mla_lm.optim import OptimizerConfig, build_optimizer

ATTENTION = AttentionConfig(kv_compressed_dim=16, q_compressed_dim=12, rope_dim=4)


def model_of(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(2, 32, 4, 16, 48, ATTENTION, vocab_size=61, **changes))


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_and_tables_decay_and_nothing_else(tied):
    model = model_of(use_bias=True, tie_embeddings=tied)
    decays, stays = build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in stays["params"])
    assert not any("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in decays["params"])
    assert any(p is model.embedding.weight for p in decays["params"])
    held = [id(p) for group in (decays, stays) for p in group["params"]]
    assert sorted(held) == sorted(names)  # each once, a tied one too


@pytest.mark.parametrize("fused", [True, False])
def test_options_reach_adamw(fused):
    optimizer = build_optimizer(model_of(), OptimizerConfig(lr=0.01, betas=[0.8, 0.9]), fused=fused)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(g["lr"], tuple(g["betas"]), g["fused"]) for g in optimizer.param_groups} == {(0.01, (0.8, 0.9), fused)}


def test_decay_is_of_the_matrices_when_gradients_are_zero():
    model = model_of()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5)).step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim == 2 else 1.0))


def test_fused_takes_the_same_step():
    models = model_of(), model_of()
    tokens = torch.randint(61, (2, 16))
    for model, fused in zip(models, (True, False), strict=True):
        optimizer = build_optimizer(model, OptimizerConfig(), fused=fused)
        for _ in range(3):
            model(tokens, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_frozen_parameters_are_left_out():
    model = model_of()
    model.embedding.weight.requires_grad_(False)
    groups = build_optimizer(model, OptimizerConfig()).param_groups
    assert not any(p is model.embedding.weight for group in groups for p in group["params"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 must be a number above 0"),
        ({"weight_decay": -0.1}, "must be at least 0"),
        ({"gradient_clip": -1.0}, "must be at least 0"),
        ({"betas": [0.9, 1.0]}, "must be two numbers in"),
        ({"betas": [0.9]}, "must be two numbers in"),
    ],
)
def test_refused(changes, message):
    OptimizerConfig().check()
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**changes).check()
