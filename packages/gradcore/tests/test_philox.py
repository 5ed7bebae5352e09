"""The counter-based generator: known answers, sub-matrices, independence, moments."""

from __future__ import annotations

import hashlib

import pytest
import torch

from gradcore._philox import normal, philox, rademacher, stream_key


# The three known-answer vectors that Salmon et al. publish with the generator (philox 4x32, 10 rounds).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert tuple(philox(torch.tensor(counter), key).tolist()) == expected


@pytest.mark.parametrize("make", [rademacher, normal])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (16, 128), (7, 300)])
def test_a_corner_of_a_larger_matrix_is_the_smaller_matrix(make, rows, columns):
    large = make(20, 400, (1, 2))
    assert torch.equal(make(rows, columns, (1, 2)), large[:rows, :columns])


def test_bytes_are_pinned():
    """Stores written years apart must agree: these digests may never change."""
    signs = rademacher(16, 64, stream_key("h.0.attn", "left", 0)).to(torch.int8).numpy().tobytes()
    assert hashlib.sha256(signs).hexdigest()[:16] == "50fe2dfb93e18c51"
    values = normal(2, 4, (3, 4)).numpy().tobytes()
    assert hashlib.sha256(values).hexdigest()[:16] == "1565a2e15c0641b1"


def test_keys_differ_for_every_part():
    keys = {stream_key(name, side, seed) for name in ("a", "a/b", "b") for side in ("left", "right") for seed in (0, 1)}
    assert len(keys) == 12
    assert stream_key("a", "b/c") != stream_key("a/b", "c")


@pytest.mark.parametrize(("make", "fourth"), [(rademacher, 1.0), (normal, 3.0)])
def test_moments(make, fourth):
    values = make(256, 1024, stream_key("moments")).double()
    n = values.numel()
    assert abs(values.mean()) < 4 / n**0.5
    assert abs(values.square().mean() - 1) < 4 * (fourth - 1 + 1e-9) ** 0.5 / n**0.5 + 1e-12
    assert abs(values.pow(4).mean() - fourth) < 0.1 * fourth


def test_rows_are_uncorrelated():
    values = rademacher(64, 4096, stream_key("rows")).double()
    gram = values @ values.T / 4096
    off = gram[~torch.eye(64, dtype=torch.bool)]
    assert off.abs().max() < 5 / 4096**0.5
