import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def strict_numerics():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def assets() -> Path:
    root = Path(os.environ.get("TRACE_ASSETS") or Path(__file__).parents[4] / "shared" / "assets")
    if not root.is_dir():
        pytest.skip("the shared assets are not here; set TRACE_ASSETS")
    return root
