"""The chunked loss against F.cross_entropy on all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_lm.model import loss
from mla_lm.model.loss import linear_cross_entropy


@pytest.fixture(params=[3, 7, 10**6], autouse=True)
def rows_per_chunk(request, monkeypatch):
    """Many chunks with a remainder, and one chunk of everything."""
    monkeypatch.setattr(loss, "LEAST_ROWS", request.param)
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 1)


def inputs(batch=4, length=13, dim=16, vocab=37, ignored=0.3, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(batch, length, dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, dim, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (batch, length)).masked_fill(torch.rand(batch, length) < ignored, -100)
    return x, weight, targets


def reference(x, weight, targets, reduction="mean"):
    logits = F.linear(x, weight).float().flatten(0, 1)
    out = F.cross_entropy(logits, targets.flatten(), reduction=reduction)
    return out.view_as(targets) if reduction == "none" else out


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_loss_and_both_gradients(ignored):
    x, weight, targets = inputs(ignored=ignored)
    ours, expected = linear_cross_entropy(x, weight, targets), reference(x, weight, targets)
    torch.testing.assert_close(ours, expected)
    grads = torch.autograd.grad(ours, (x, weight))
    for got, want in zip(grads, torch.autograd.grad(expected, (x, weight)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("grad", [True, False])
def test_without_gradients_and_without_reduction(grad):
    x, weight, targets = inputs()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets), reference(x, weight, targets))
        losses = linear_cross_entropy(x, weight, targets, "none")
    torch.testing.assert_close(losses, reference(x, weight, targets, "none"))
    assert losses.shape == targets.shape
    assert not losses[targets == -100].any()


def test_gradients_of_unreduced_losses():
    x, weight, targets = inputs()
    scale = torch.rand(targets.shape)
    ours = torch.autograd.grad((linear_cross_entropy(x, weight, targets, "none") * scale).sum(), (x, weight))
    want = torch.autograd.grad((reference(x, weight, targets, "none") * scale).sum(), (x, weight))
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nothing_to_predict():
    x, weight, targets = inputs(ignored=2.0)
    value = linear_cross_entropy(x, weight, targets)
    value.backward()
    assert value == 0
    assert not x.grad.any()
    assert not weight.grad.any()
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets) == 0


def test_bf16_loss_is_summed_in_fp32():
    x, weight, targets = inputs(batch=8, length=100, dtype=torch.bfloat16)
    ours = linear_cross_entropy(x, weight, targets)
    exact = F.cross_entropy(F.linear(x, weight).double().flatten(0, 1), targets.flatten())  # of the same bf16 logits
    assert ours.dtype == torch.float32
    assert ours.bfloat16().float() != ours  # no rounded value
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(ours, (x, weight))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.bfloat16]
    want = torch.autograd.grad(reference(x.float(), weight.float(), targets), (x, weight))
    for got, expected in zip(grads, want, strict=True):
        assert (got.float() - expected.float()).norm() < 0.02 * expected.float().norm()


def test_autocast():
    x, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, weight, targets)
        assert F.linear(x, weight).dtype == torch.bfloat16
    exact = F.cross_entropy(F.linear(x.bfloat16(), weight.bfloat16()).double().flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(ours, (x, weight))
    want = torch.autograd.grad(reference(x, weight, targets), (x, weight))
    for got, expected in zip(grads, want, strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.02 * expected.norm()


def test_autocast_keeps_no_copy_of_the_weight_without_a_graph():
    x, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(x, weight, targets)
        logits = F.linear(x, weight)
    logits.float().sum().backward()
    assert weight.grad is not None


def test_tied_weight_gets_the_sum_of_both_gradients():
    _, weight, targets = inputs()
    tokens = torch.randint(37, targets.shape)
    linear_cross_entropy(F.embedding(tokens, weight).tanh(), weight, targets).backward()
    want = torch.autograd.grad(reference(F.embedding(tokens, weight).tanh(), weight, targets), weight)[0]
    torch.testing.assert_close(weight.grad, want, rtol=1e-5, atol=1e-6)


def test_accumulated_micro_batches_are_the_whole_batch():
    x, weight, targets = inputs(ignored=0.0)
    for part, target in zip(x.split(1), targets.split(1), strict=True):
        (linear_cross_entropy(part, weight, target) / 4).backward()
    want = torch.autograd.grad(reference(x, weight, targets), (x, weight))
    torch.testing.assert_close(x.grad, want[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weight.grad, want[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [0.5, 65536.0])
def test_a_loss_scaler_reaches_the_gradients(scale):
    x, weight, targets = inputs()
    grads = torch.autograd.grad(linear_cross_entropy(x, weight, targets) * scale, (x, weight))
    want = torch.autograd.grad(reference(x, weight, targets), (x, weight))
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got / scale, expected, rtol=1e-5, atol=1e-7)


def test_against_torch():
    x, weight, targets = inputs()
    expected = F.linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten())
    torch.testing.assert_close(linear_cross_entropy(x, weight, targets), expected)


def test_extreme_logits():
    x, weight, targets = inputs(ignored=0.0)
    value = linear_cross_entropy(x * 1e4, weight, targets)
    value.backward()
    torch.testing.assert_close(value, reference(x * 1e4, weight, targets))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("bad", [-1, 37])
def test_a_target_outside_the_vocabulary_is_refused(bad):
    x, weight, targets = inputs()
    targets[0, 0] = bad
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(x, weight, targets)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="'sum' is unknown"):
        linear_cross_entropy(*inputs(), reduction="sum")


@settings(max_examples=20)
@given(
    rows=st.integers(1, 9),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.integers(1, 12)),
    ignored=st.floats(0, 1),
)
def test_any_shape(rows, sizes, ignored):
    batch, length, dim, vocab = sizes
    x, weight, targets = inputs(batch, length, dim, vocab, ignored)
    least = loss.LEAST_ROWS
    loss.LEAST_ROWS = rows
    try:
        ours = linear_cross_entropy(x, weight, targets)
    finally:
        loss.LEAST_ROWS = least
    if (targets == -100).all():
        assert ours == 0
    else:
        torch.testing.assert_close(ours, reference(x, weight, targets), rtol=1e-5, atol=1e-6)
