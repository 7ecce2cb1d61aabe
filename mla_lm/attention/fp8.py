"""Linear layers whose three products, of forward and backward, are computed in fp8 (arXiv 2209.05433)."""

from typing import Any

import torch
from torch import Tensor

from mla_lm.errors import UserError

MULTIPLE = 16  # of all three sizes of a product: the matrix units of a GPU take no others
TINY = torch.finfo(torch.float32).tiny


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with products in fp8, summed in fp32.

    Args:
        x: (..., K); its leading sizes multiply to a multiple of 16, as N and K are
        weight: (N, K)
        bias: (N,)

    Returns:
        (..., N), bf16
    """
    with torch.autocast(x.device.type, enabled=False):  # a CPU imitates fp8 in fp32, which autocast would do in bf16
        out = FP8Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias.to(out.dtype)


class FP8Product(torch.autograd.Function):
    """x W^T for x (M, K) and W (N, K), in bf16; each gradient has the dtype of what it is the gradient of.

    Activations and weights are rounded to e4m3, which has 3 bits of mantissa. Gradients are rounded to e5m2, which has
    one bit less and more range. For the backward pass, x and W are kept in fp8.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = to_fp8(x, torch.float8_e4m3fn)
        weight8, weight_scale = to_fp8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return _product(x8, x_scale, weight8, weight_scale, torch.bfloat16, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        grad8, grad_scale = to_fp8(grad, torch.float8_e5m2)
        of_x, of_weight = ctx.dtypes
        return (
            _product(grad8, grad_scale, _transposed(weight8), weight_scale, of_x),
            _product(_transposed(grad8), grad_scale, _transposed(x8), x_scale, of_weight),
        )


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round to fp8 with one scale for the whole tensor, which makes its largest element the largest of the format.

    Returns:
        the values in `dtype`, contiguous, in x's shape, and the scale, fp32, (): x is about values * scale. If an
        element of x is infinite or NaN, so is the scale.
    """
    largest = torch.finfo(dtype).max
    scale = (x.abs().amax().float() / largest).clamp(min=TINY)  # of zeros, too, one that can be divided by
    # A value that the division rounds up to beyond the largest would become NaN or infinity.
    values = (x.float() / scale).clamp(-largest, largest)
    return values.to(dtype, memory_format=torch.contiguous_format), scale


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """a b^T for contiguous a (M, K) and b (N, K) in fp8, the only layout that Hopper's matrix units take.

    Args:
        fast: sum within the matrix units, which is less exact; usual for the forward pass, not for gradients
    """
    # PyTorch's public name for it, F.scaled_mm, has no CPU kernel in torch 2.11.
    product = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return product(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)


def _transposed(x: Tensor) -> Tensor:
    return x.t().contiguous()


def fp8_failure(device: str) -> str | None:
    """Why this device does not train in fp8; None: it does."""
    if device == "mps":
        return "Apple's GPUs have no fp8"
    if device == "cuda" and torch.version.hip is not None:
        return "on AMD's GPUs it has not been tried"
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.9, which fp8 needs"
    return None


def check_fp8(device: str, precision: str) -> None:
    """Check that a run can train with trainer.fp8=true.

    Raises:
        UserError: the device has no fp8, or the rest of the run would not be in bf16.
    """
    if failure := fp8_failure(device):
        raise UserError(f"trainer.fp8=true does not work here: {failure}; trainer.fp8=false trains without")
    if precision != "bf16-mixed":
        raise UserError(
            f"trainer.fp8=true, but the precision is {precision}: what is not in fp8 must be in bf16, so give "
            "trainer.precision=bf16-mixed"
        )
