"""Small tensors between host and device, in ways that make neither wait for the other.

A copy from ordinary host memory to a GPU first waits until the GPU has done all it was given, and so does a copy back.
From and into pinned memory both are entries in the GPU's queue like everything else.
"""

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on `device`.

    Args:
        array: nobody writes into it any more: on a CPU the tensor is the array's own memory.
        device: where it goes.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A tensor on the host that gets the content of `tensor`; of a GPU's once all that is queued until now is done."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
