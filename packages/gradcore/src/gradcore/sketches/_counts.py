"""Count sketches: each coordinate goes to one of ``width`` places under a random sign.

``E⟨Cx, Cy⟩ = ⟨x, y⟩`` whatever the places, since the signs are independent (Charikar, Chen & Farach-Colton 2002); the
places decide the variance, through what shares one. They are balanced: no place holds more than ⌈d / width⌉
coordinates. A *scattered* sketch puts them there in random order and, where there is room, evenly spaced; a plain one
in their own order. One scattered factor is enough for a tensor sketch, and permuting columns is what costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradcore._factors import Factor, OneHot
from gradcore._philox import order, rademacher, stream_key


class CountSketch:
    """One sketch of vectors ``[..., d]`` to ``[..., width]``, in two steps, so that only the smaller form is kept.

    >>> import torch
    >>> sketch = CountSketch(("fc", "left", 0), 6, 4, torch.device("cpu"), scattered=True)
    >>> sketch.spread(sketch.folded(torch.ones(2, 6))).shape
    torch.Size([2, 4])

    Args:
        identity: what keys the random numbers.
        features: d.
        width: places.
        device: where vectors will lie.
        scattered: in random order.
    """

    def __init__(
        self, identity: tuple[object, ...], features: int, width: int, device: torch.device, *, scattered: bool
    ) -> None:
        self.features, self.width = features, width
        self.stride = _spacing(features, width) if scattered else 1
        signs = rademacher(1, features, stream_key(*identity, "signs"))[0]
        ordered = order(features, stream_key(*identity, "order")) if scattered else torch.arange(features)
        places = torch.empty_like(ordered)
        places[ordered] = torch.arange(features) * self.stride % width
        self.signs, self.places = signs.to(device), places.to(device)
        self._order = ordered.to(device) if scattered else None
        self._ordered_signs = signs[ordered].to(device)

    def folded(self, factor: Factor) -> Factor:
        """``[..., min(d, width)]``: signed and in order, summed where several coordinates share a place."""
        if isinstance(factor, OneHot):
            return factor
        if self._order is not None:
            factor = _columns(factor, self._order)
        signs = self._ordered_signs.to(factor.dtype)
        if self.features <= self.width:
            return factor * signs
        width = self.width
        total = (factor[..., :width] * signs[:width]).float()  # several terms meet
        for start in range(width, self.features, width):
            part = factor[..., start : start + width]
            total[..., : part.shape[-1]].addcmul_(part, signs[start : start + width])
        return total

    def spread(self, folded: Factor) -> Tensor:
        """What :meth:`folded` made, ``[..., ≤ width]`` in float32; places left out at the end are zero."""
        if isinstance(folded, OneHot):
            out = self.signs.new_zeros(*folded.ids.shape, self.width)
            known = folded.ids.clamp(min=0)
            signs = torch.where(folded.ids >= 0, self.signs[known], 0.0)
            return out.scatter_(-1, self.places[known][..., None], signs[..., None])
        folded = folded.float()
        if self.stride == 1:
            return folded
        out = folded.new_zeros(*folded.shape, self.stride)
        out[..., 0] = folded
        return out.flatten(-2)

    def spectrum(self, folded: Factor) -> Tensor:
        """The Fourier transform of :meth:`spread` up to its middle, ``[..., width // 2 + 1]``."""
        return torch.fft.rfft(self.spread(folded), n=self.width)

    def multiply(self, spectrum: Tensor, folded: Factor) -> Tensor:
        """``spectrum`` times this one's, in place.

        Numbers spaced ``stride`` apart have the spectrum of the numbers alone, ``stride`` times over: a short
        transform is enough.
        """
        if self.stride == 1 or isinstance(folded, OneHot):
            return spectrum.mul_(self.spectrum(folded))
        short = torch.fft.fft(folded.float(), n=self.width // self.stride)  # [..., width / stride]
        half = self.width // 2
        spectrum[..., :half].unflatten(-1, (self.stride // 2, -1)).mul_(short[..., None, :])
        spectrum[..., half].mul_(short[..., 0])
        return spectrum


def _spacing(features: int, width: int) -> int:
    """The largest power of two that divides ``width`` and leaves room for all features."""
    stride = 1
    while width % (2 * stride) == 0 and width // (2 * stride) >= features:
        stride *= 2
    return stride


def _columns(factor: Tensor, index: Tensor) -> Tensor:
    if factor.device.type != "cpu":
        return factor[..., index]
    # Several times as fast on a CPU as indexing; no row of the index is ever written out.
    return factor.gather(-1, index.expand(*factor.shape[:-1], -1))
