"""Strict numerics for every test: seeded, deterministic, full float32 products."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def strict():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
