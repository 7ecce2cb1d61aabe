"""The matrix product of every projection."""

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear`, whose product with a single vector becomes a sum in a compiled step on a CPU.

    Such a product only reads its matrix. A library's takes twice as long for that as memory does; the loop
    that the compiler makes of a sum keeps up with memory, and takes in what comes before and after the product.
    """

    def forward(self, x: Tensor) -> Tensor:
        inference = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        if not (inference and x.device.type == "cpu" and x.numel() == x.size(-1)):
            return super().forward(x)
        out = (self.weight.float() * x.reshape(-1).float()).sum(-1)
        if self.bias is not None:
            out = out + self.bias
        return out.to(self.weight.dtype).view(*x.shape[:-1], -1)
