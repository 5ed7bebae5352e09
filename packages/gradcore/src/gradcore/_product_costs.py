"""What inner products of a gradient with given matrices cost, by the way they are computed."""

from __future__ import annotations

ROUTES = ("contracted", "formed")
MOVED = 24
"""Multiplications in the time that an entry of a formed gradient takes to be written and read again.

Measured on one core of a Xeon, matrices of 64² to 768²: 20 to 50 where they leave the cache, fewer below 64².
"""


def product_costs(out: int, into: int, positions: int, queries: int, *, norms: bool = False) -> dict[str, float]:
    """Multiplications an example by route, to meet ``queries`` matrices ``[out, in]``.

    *Contracted*: the factors of every position meet every matrix. *Formed*: the gradient is summed over its positions,
    written, and meets all matrices at once. Norms come of formed gradients, or of inner products of positions.

    >>> min(costs := product_costs(768, 768, 64, 1), key=costs.get)
    'contracted'
    >>> min(costs := product_costs(768, 768, 64, 16), key=costs.get)
    'formed'
    """
    entries = out * into
    formed = float((positions + MOVED) * entries)
    apart = min(float(positions**2 * (out + into)), formed + entries) if norms else 0.0
    return {
        "contracted": queries * positions * (entries + into) + apart,
        "formed": formed + (queries + norms) * entries,
    }
