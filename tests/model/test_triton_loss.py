"""The loss by one Triton kernel, run by Triton's interpreter, against PyTorch's; and that it compiles for a GPU."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import triton_kernels  # before the kernels

# isort: split
from mla_lm.model import loss, triton_loss
from mla_lm.model.loss import linear_cross_entropy
from mla_lm.model.triton_loss import cross_entropy_


@settings(max_examples=20)
@given(
    rows=st.integers(0, 5),
    vocab_size=st.integers(1, 70),
    beyond=st.integers(0, 20),
    block=st.sampled_from((8, 16, 64)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradient_of_any_shape(rows, vocab_size, beyond, block, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(rows, vocab_size + beyond, generator=generator)).to(dtype)
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.3] = -100
    exact = logits[:, :vocab_size].float().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_loss, "LARGEST_BLOCK", block)
        before = logits.clone()
        torch.testing.assert_close(cross_entropy_(logits, targets, vocab_size, gradient=False), expected.detach())
        assert torch.equal(logits, before)
        torch.testing.assert_close(cross_entropy_(logits, targets, vocab_size), expected.detach())
    torch.testing.assert_close(logits[:, :vocab_size], gradient.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert not logits[:, vocab_size:].any()


def test_logits_that_overflow_exp():
    logits, targets = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]]), torch.tensor([1, 2])
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(cross_entropy_(logits, targets, 3), expected)


@pytest.mark.parametrize("bad", [-1, 3])
def test_a_target_that_is_no_token_makes_the_loss_nan(bad):
    """A GPU cannot raise here; the run stops at a loss that is no number."""
    assert cross_entropy_(torch.zeros(1, 3), torch.tensor([bad]), 3).isnan()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [3, 10**6])
def test_the_loss_of_a_model_through_the_kernel(monkeypatch, autocast, rows):
    """As on a GPU: the weight padded to 64 rows, the gradient in the place of the logits."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 13, 16, requires_grad=True), torch.randn(37, 16, requires_grad=True)
    targets = torch.randint(37, (4, 13)).masked_fill(torch.rand(4, 13) < 0.3, -100)
    monkeypatch.setattr(loss, "LEAST_ROWS", rows)
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 1)
    results = []
    for by_kernel in (False, True):
        monkeypatch.setattr(loss, "runs_triton", lambda device, by_kernel=by_kernel: by_kernel)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mean = linear_cross_entropy(x, weight, targets)
            with torch.no_grad():
                each = linear_cross_entropy(x, weight, targets, "none")
        results.append((mean, each, *torch.autograd.grad(mean, (x, weight))))
    for by_torch, by_kernel in zip(*results, strict=True):
        assert (by_kernel - by_torch).norm() <= (1e-2 if autocast else 1e-6) * by_torch.norm()


def test_it_compiles_for_a_gpu_and_spills_nothing():
    signature = {"logits": "*bf16", "targets": "*i64", "losses": "*fp32", "stride": "i64", "width": "i32"}
    constants = {"GRADIENT": True, "BLOCK": triton_loss.LARGEST_BLOCK}
    found = triton_kernels.compiled(
        triton_loss._cross_entropy, {**signature, "vocab_size": "i32"}, constants, num_warps=triton_loss.WARPS
    )
    assert found["stack"] == 0, found
    assert found["registers"] <= 64, found  # so that four programs share a multiprocessor's
