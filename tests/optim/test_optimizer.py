"""Which parameters decay, and what the optimiser does with them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_lm import AttentionConfig, Transformer, TransformerConfig, UserError
from mla_lm.optim import muon
from mla_lm.optim.muon import MuonAdamW, orthogonalize
from mla_lm.optim.optimizer import OptimizerConfig, build_optimizer

ATTENTION = AttentionConfig(kind="mla", kv_compressed_dim=16, q_compressed_dim=12, rope_dim=4)


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
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"])) == (0.01, (0.8, 0.9))
        # None leaves both to PyTorch: foreach where the device has it. False would be a loop over the parameters.
        assert (group["fused"], group["foreach"]) == (fused or None, None)


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


MUON = OptimizerConfig(kind="muon", lr=0.01, weight_decay=0.3)


def muon_of(matrices, dtype) -> MuonAdamW:
    groups = [{"params": matrices, "weight_decay": 0.3, "muon": True}]
    return MuonAdamW(groups, lr=0.01, betas=(0.9, 0.95), momentum=0.95, fused=True, dtype=dtype)


def train_steps(model, optimizer, steps):
    torch.manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(61, (2, 16))
        model(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(tied):
    model = model_of(use_bias=True, tie_embeddings=tied)
    muon, tables, vectors = build_optimizer(model, MUON).param_groups
    blocks = [p for p in model.blocks.parameters() if p.ndim == 2]
    assert {id(p) for p in muon["params"]} == {id(p) for p in blocks}
    assert {id(p) for p in tables["params"]} == {id(model.embedding.weight), id(model.head.weight)}
    assert (muon["weight_decay"], tables["weight_decay"], vectors["weight_decay"]) == (0.3, 0.3, 0.0)
    held = [id(p) for group in (muon, tables, vectors) for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_the_rest_moves_as_under_adamw():
    model, other = model_of(), model_of()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    build_optimizer(model, MUON).step()
    build_optimizer(other, OptimizerConfig(lr=0.01, weight_decay=0.3)).step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-7) == (p.ndim < 2 or name == "embedding.weight"), name


@settings(max_examples=30)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(2, 24), st.integers(0, 24)),
    bf16=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_orthogonalize_evens_singular_values_and_keeps_their_vectors(sizes, bf16, scale, seed):
    torch.manual_seed(seed)
    count, rows, more = sizes
    left = torch.linalg.qr(torch.randn(count, rows, rows)).Q
    right = torch.linalg.qr(torch.randn(count, rows + more, rows)).Q
    values = torch.empty(count, rows).uniform_(0.05, 1)  # of a spread that random matrices have
    matrices = scale * left @ torch.diag_embed(values) @ right.mT
    out = orthogonalize(matrices.to(torch.bfloat16 if bf16 else torch.float32)).float()
    middle = left.mT @ out @ right  # diagonal, if the vectors are kept
    tolerance = 0.15 if bf16 else 1e-3  # of entries up to 1.8; bf16 rounds three steps to 0.4% each
    torch.testing.assert_close(left @ middle @ right.mT, out, rtol=0, atol=tolerance)
    diagonal = middle.diagonal(dim1=-2, dim2=-1)
    assert (middle - torch.diag_embed(diagonal)).abs().max() < tolerance
    assert diagonal.min() > 0.15
    assert diagonal.max() < 2


def test_matrices_of_one_shape_and_its_transpose_move_as_each_would_alone():
    """Batching is for speed only."""
    model = model_of()
    single = [p.detach().clone().requires_grad_() for p in model.blocks.parameters() if p.ndim == 2]
    together = [p.detach().clone().requires_grad_() for p in single]
    for p, q in zip(single, together, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    muon_of(together, torch.float32).step()
    for p in single:
        muon_of([p], torch.float32).step()
    for p, q in zip(single, together, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_given_its_steps_it_is_the_muon_of_torch(monkeypatch, shape):
    """Momentum, decay and the size of the update; and the steps, as far as bf16 shows."""
    monkeypatch.setattr(muon, "POLAR_STEPS", ((3.4445, -4.775, 2.0315),) * 5)
    monkeypatch.setattr(muon, "SAFETY", 1.0)
    p = torch.nn.Parameter(torch.randn(shape))
    q = torch.nn.Parameter(p.detach().clone())
    ours = muon_of([p], torch.bfloat16)
    theirs = torch.optim.Muon([q], lr=0.01, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(p, q, rtol=0, atol=3e-4)  # a step is about 0.01 * 0.2


@pytest.mark.parametrize("fused", [True, False])
def test_state_saved_and_loaded_goes_on_the_same(fused):
    model, other = model_of(), model_of()
    optimizer = build_optimizer(model, MUON, fused)
    train_steps(model, optimizer, 3)
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(other, MUON, fused)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, resumed)):
        train_steps(m, o, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("config", [MUON, OptimizerConfig()], ids=lambda config: config.kind)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("saved", [True, False, "before groups had it"])
def test_loaded_state_lies_where_a_fresh_one_would(config, fused, saved):
    """The fused kernel reads the step on the weights' device, the others on the CPU, whoever saved it."""
    model = model_of()
    optimizer = build_optimizer(model, config, fused=bool(saved))
    train_steps(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    if saved == "before groups had it":
        for group in state["param_groups"]:
            del group["fused"]
    with torch.device("meta"):  # one that is not the CPU
        elsewhere = build_optimizer(model_of(), config, fused)
    elsewhere.load_state_dict(state)
    placed = [(name, t.device.type) for s in elsewhere.state.values() for name, t in s.items()]
    assert {name for name, _ in placed} >= {"step", "exp_avg"}
    assert all(device == ("cpu" if name == "step" and not fused else "meta") for name, device in placed)
    assert {group["fused"] for group in elsewhere.param_groups} == {fused or None}
    assert {id(p) for p in elsewhere.state} == {id(p) for group in elsewhere.param_groups for p in group["params"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 must be a number above 0"),
        ({"weight_decay": -0.1}, "must be at least 0"),
        ({"gradient_clip": -1.0}, "must be at least 0"),
        ({"betas": [0.9, 1.0]}, "must be two numbers in"),
        ({"betas": [0.9]}, "must be two numbers in"),
        ({"kind": "sgd"}, "kind=sgd is unknown: adamw or muon"),
        ({"momentum": 1.0}, "momentum=1.0 must be in"),
    ],
)
def test_refused(changes, message):
    OptimizerConfig().check()
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**changes).check()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_projections_into_the_residual_stream_have_their_own_share_of_the_rate(kind):
    model = model_of()
    groups = build_optimizer(model, OptimizerConfig(kind=kind, residual_lr=0.1)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    slow = [names[id(p)] for group in groups if group.get("lr_share") == 0.1 for p in group["params"]]
    assert sorted(slow) == sorted(n for n in names.values() if "out_proj" in n or "down_proj" in n)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(names)
    plain = build_optimizer(model, OptimizerConfig(kind=kind)).param_groups
    assert not any("lr_share" in group for group in plain)  # a run from before there was a share resumes


def test_a_share_of_the_rate_must_be_above_zero():
    with pytest.raises(UserError, match="residual_lr=0 "):
        OptimizerConfig(residual_lr=0).check()
