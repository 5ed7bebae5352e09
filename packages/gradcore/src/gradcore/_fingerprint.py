"""A fingerprint of a model's weights: two checkpoints of one architecture must not be taken for each other."""

from __future__ import annotations

import hashlib

from torch import nn

from gradcore._tensor_bytes import tensor_bytes

_SAMPLES = 4096


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and up to 4,096 evenly spaced entries of every parameter.

    A few milliseconds for a small model and under a second for a large one; moving the model to another device does
    not change it, converting it to another dtype does.

    >>> from torch import nn
    >>> layer = nn.Linear(2, 2)
    >>> before = model_fingerprint(layer)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> model_fingerprint(layer) == before
    False
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        digest.update(tensor_bytes(flat[:: max(1, flat.numel() // _SAMPLES)]))
    return digest.hexdigest()
