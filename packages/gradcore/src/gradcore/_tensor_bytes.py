"""The bytes of a tensor without numpy, which torch runs without."""

from __future__ import annotations

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> bytearray:
    """What lies in memory, row by row, as on the CPU; any dtype.

    >>> import torch
    >>> bytes(tensor_bytes(torch.tensor([1, 258], dtype=torch.int16)))
    b'\\x01\\x00\\x02\\x01'
    """
    buffer = bytearray(tensor.numel() * tensor.element_size())
    if buffer:
        torch.frombuffer(buffer, dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return buffer
