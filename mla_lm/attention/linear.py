"""The linear layer of every projection."""

from typing import Any

import torch
from torch import Tensor, nn

from mla_lm.attention.fp8 import MULTIPLE, fp8_linear


class Linear(nn.Linear):
    """`nn.Linear`, but a compiled step on a CPU computes the product with a single vector as a sum.

    Such a product need take no longer than reading its matrix from memory. A library's kernel takes twice as long. The
    loop that the compiler makes of the sum runs at the speed of memory, and is fused with the operations around it.

    Attributes:
        fp8: compute products in fp8 in training mode; the weights stay what they are
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.fp8 = False

    @property
    def fits_fp8(self) -> bool:
        """Whether products with this matrix can be computed in fp8."""
        return self.in_features % MULTIPLE == 0 and self.out_features % MULTIPLE == 0

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 and self.training:
            return fp8_linear(x, self.weight, self.bias)
        inference = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        if not (inference and x.device.type == "cpu" and x.numel() == x.size(-1)):
            return super().forward(x)
        out = (self.weight.float() * x.reshape(-1).float()).sum(-1)
        if self.bias is not None:
            out = out + self.bias
        return out.to(self.weight.dtype).view(*x.shape[:-1], -1)
