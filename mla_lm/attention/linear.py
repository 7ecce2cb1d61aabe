"""The linear layer of every projection."""

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear`, but a compiled step on a CPU computes the product with a single vector as a sum.

    The time of such a product is that of reading its matrix. A library's kernel takes twice as long as memory needs;
    the loop that the compiler makes of the sum keeps up with memory, and is fused with the operations around it.
    """

    def forward(self, x: Tensor) -> Tensor:
        inference = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        if not (inference and x.device.type == "cpu" and x.numel() == x.size(-1)):
            return super().forward(x)
        out = (self.weight.float() * x.reshape(-1).float()).sum(-1)
        if self.bias is not None:
            out = out + self.bias
        return out.to(self.weight.dtype).view(*x.shape[:-1], -1)
