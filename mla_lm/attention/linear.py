"""The linear layer of every projection."""

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear`, but a compiled step on a CPU computes the product with a single vector as a sum.

    Such a product need take no longer than reading its matrix from memory. A library's kernel takes twice as long. The
    loop that the compiler makes of the sum runs at the speed of memory, and is fused with the operations around it.
    """

    def forward(self, x: Tensor) -> Tensor:
        inference = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        if not (inference and x.device.type == "cpu" and x.numel() == x.size(-1)):
            return super().forward(x)
        out = (self.weight.float() * x.reshape(-1).float()).sum(-1)
        if self.bias is not None:
            out = out + self.bias
        return out.to(self.weight.dtype).view(*x.shape[:-1], -1)
