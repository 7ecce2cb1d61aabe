"""That operations stay on the device, as those of a CUDA graph must; held without a GPU."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that wait for a GPU: their result, or what they check, is a number that the host must know.
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "multinomial", "bincount", "_unique2"}


class OnTheDevice(TorchDispatchMode):
    """Fails where an operation waits for the device, or gets or makes a tensor that is elsewhere.

    The device is `meta`, which stands for a GPU: its tensors have no elements to look at.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += 1
        name = func.overloadpacket.__name__
        assert name not in WAITING, name
        for value in tree_leaves((args, kwargs, out)):
            assert not isinstance(value, Tensor) or value.is_meta, name
        return out
