"""Products in fp8: within the error that rounding allows, in the layout that a GPU takes, and never beyond the format.

Bounds are derived, not tuned. Rounding to e4m3 changes a value by at most 2^-4 of itself, and to e5m2 by 2^-3; below
the smallest normal number, by at most half of the smallest subnormal one.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mla_lm.attention.fp8 import MULTIPLE, check_fp8, fp8_linear, to_fp8
from mla_lm.attention.linear import Linear
from mla_lm.errors import UserError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RELATIVE = {E4M3: 2.0**-4, E5M2: 2.0**-3}
SUBNORMAL = {E4M3: 2.0**-10, E5M2: 2.0**-17}  # half of the smallest
FP32, BF16 = 2.0**-23, 2.0**-8
sizes = st.integers(1, 4).map(lambda n: n * MULTIPLE)
magnitudes = st.floats(-12, 12).map(lambda exponent: 10.0**exponent)


def rounding(x: Tensor, dtype: torch.dtype) -> Tensor:
    """How far an element of `to_fp8` may be off, in fp64."""
    scale = x.abs().amax().double() / torch.finfo(dtype).max
    return (RELATIVE[dtype] + 4 * FP32) * x.abs().double() + SUBNORMAL[dtype] * scale


def allowed(a: Tensor, of_a: torch.dtype, b: Tensor, of_b: torch.dtype, out: float) -> Tensor:
    """How far a b^T of rounded factors may be off, summed in fp32 and rounded by a share `out` of the result."""
    a_off, b_off = rounding(a, of_a), rounding(b, of_b)
    a, b = a.double().abs(), b.double().abs()
    largest = (a + a_off) @ (b + b_off).T
    return largest - a @ b.T + (2 * a.size(1) * FP32 + out) * largest + torch.finfo(torch.float32).tiny


def drawn(rows: int, columns: int, magnitude: float, generator: torch.Generator, outlier: bool) -> Tensor:
    """Normal numbers, an eighth of them zeros; as an outlier, one is a thousand times as large."""
    x = magnitude * torch.randn(rows, columns, generator=generator)
    x[torch.rand(rows, columns, generator=generator) < 1 / 8] = 0
    if outlier:
        x[0, 0] = 1000 * magnitude
    return x


@given(sizes, sizes, sizes, magnitudes, magnitudes, magnitudes, st.booleans(), st.integers(0, 99))
def test_the_product_and_its_gradients_are_off_by_rounding_alone(m, n, k, of_x, of_w, of_grad, outlier, seed):
    generator = torch.Generator().manual_seed(seed)
    x = drawn(m, k, of_x, generator, outlier).requires_grad_()
    weight = drawn(n, k, of_w, generator, outlier).requires_grad_()
    grad = drawn(m, n, of_grad, generator, outlier).bfloat16()
    out = fp8_linear(x.view(2, m // 2, k), weight, None).flatten(0, 1)
    of_x, of_weight = torch.autograd.grad(out, (x, weight), grad)
    assert (out.dtype, of_x.dtype, of_weight.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    x, weight, grad = x.detach(), weight.detach(), grad.float()
    for result, a, of_a, b, out_share in (
        (out, x, E4M3, weight, BF16),
        (of_x, grad, E5M2, weight.T, 0.0),
        (of_weight, grad.T, E5M2, x.T, 0.0),
    ):
        off = (result.double() - a.double() @ b.double().T).abs()
        assert (off <= allowed(a, of_a, b, E4M3, out_share)).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@given(largest=st.floats(-140, 127).map(lambda exponent: 2.0**exponent), seed=st.integers(0, 99))
def test_no_value_leaves_the_format(dtype, largest, seed):
    x = torch.rand(64, generator=torch.Generator().manual_seed(seed)) * largest
    x[:2] = torch.tensor([largest, -largest])
    values, scale = to_fp8(x, dtype)
    assert values.float().isfinite().all()
    assert 0 < scale < torch.inf
    if largest > 1e-30:  # below, the scale is the smallest that fp32 can divide by
        assert values[0].float() == -values[1].float() == torch.finfo(dtype).max
        assert ((values.double() * scale - x).abs() <= rounding(x, dtype)).all()


def test_zeros_and_numbers_that_are_none():
    zeros = torch.zeros(16, 32, requires_grad=True)
    weight = torch.randn(16, 32, requires_grad=True)
    out = fp8_linear(zeros, weight, None)
    gradients = torch.autograd.grad(out, (zeros, weight), torch.zeros_like(out))
    assert not any(result.any() for result in (out, *gradients))
    for lost in (torch.inf, torch.nan):  # a run that diverges is found by its loss
        x = torch.ones(16, 32)
        x[3, 5] = lost
        assert not fp8_linear(x, weight, None)[3].isfinite().any()


class Layouts(TorchDispatchMode):
    """Checks of every product in fp8 what a GPU asks of its factors, and notes their dtypes and whether it is fast."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_mm.default:
            a, b, *_ = args
            assert a.stride() == (a.size(1), 1)  # by rows
            assert b.stride() == (1, b.size(0))  # by columns
            assert not any(size % 16 for size in (a.size(1), *b.shape))
            self.products.append((a.dtype, b.dtype, args[-1] is True))  # the last is left out where false
        return func(*args, **(kwargs or {}))


def test_factors_lie_in_memory_as_a_gpu_takes_them():
    x, weight, grad = (torch.randn(*shape).T for shape in ((64, 16), (64, 32), (32, 16)))  # none lies by rows
    with Layouts() as ran:
        fp8_linear(x.requires_grad_(), weight.requires_grad_(), None).backward(grad.bfloat16())
    assert ran.products == [(E4M3, E4M3, True), (E5M2, E4M3, False), (E5M2, E4M3, False)]


def test_a_layer_computes_in_fp8_in_training_alone():
    torch.manual_seed(0)
    layer = Linear(32, 48)
    x = torch.randn(2, 8, 32)
    plain = layer(x)
    layer.fp8 = True
    assert layer.fits_fp8
    assert layer(x).dtype == torch.bfloat16
    expected = plain.flatten(0, 1).double()
    off = (layer(x).flatten(0, 1).double() - expected).abs()
    bias_rounding = 2 * BF16 * (layer.bias.abs() + expected.abs())
    assert (off <= allowed(x.flatten(0, 1), E4M3, layer.weight, E4M3, BF16) + bias_rounding).all()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((48,), 16.0))
    assert torch.equal(layer.eval()(x), plain)
    assert not Linear(32, 40).fits_fp8
    assert not Linear(40, 32).fits_fp8


@pytest.mark.slow
def test_compiled_and_under_autocast_it_computes_the_same():
    torch.manual_seed(0)
    layer, x = Linear(64, 96, bias=False), torch.randn(4, 16, 64, requires_grad=True)
    grad = torch.randn(4, 16, 96).bfloat16()
    layer.fp8 = True
    results = []
    for forward in (layer, torch.compile(layer, fullgraph=True)):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = forward(x)
            results.append((out, *torch.autograd.grad(out, (x, layer.weight), grad)))
    for expected, *others in zip(*results, strict=True):
        assert all(torch.equal(other, expected) for other in others)


def test_fp8_is_refused_where_it_is_not():
    check_fp8("cpu", "bf16-mixed")
    with pytest.raises(UserError, match=r"trainer\.fp8=true does not work here: Apple's GPUs have no fp8"):
        check_fp8("mps", "bf16-mixed")
    with pytest.raises(UserError, match=r"trainer\.fp8=true, but the precision is 16-mixed.*bf16-mixed"):
        check_fp8("cpu", "16-mixed")
