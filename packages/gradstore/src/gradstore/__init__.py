"""Gradients on disk: verified, resumable, searched from the memory map."""

from gradstore._errors import (
    FormatVersion,
    GradStoreError,
    InvalidInput,
    PlanMismatch,
    StoreCorrupt,
    StoreExists,
    StoreIncomplete,
    StoreLocked,
    StoreNotFound,
    StoreUnreadable,
    StoreUnwritable,
)
from gradstore._faiss import FaissConfig, FaissIndex
from gradstore._manifest import Side
from gradstore._merge import merge
from gradstore._repair import RepairReport, repair
from gradstore._score_store import ScoreStore
from gradstore._search import RowTransform, SearchResult, scores, search
from gradstore._store import Block, GradientStore
from gradstore._verify import StoreInfo, VerifyReport, info, verify
from gradstore._writer import StoreWriter

__all__ = [
    # write
    "StoreWriter",
    "Side",
    "merge",
    # read
    "GradientStore",
    "Block",
    # search
    "search",
    "scores",
    "SearchResult",
    "ScoreStore",
    "FaissIndex",
    "FaissConfig",
    "RowTransform",
    # check
    "verify",
    "VerifyReport",
    "info",
    "StoreInfo",
    "repair",
    "RepairReport",
    # errors
    "GradStoreError",
    "InvalidInput",
    "StoreExists",
    "StoreNotFound",
    "StoreIncomplete",
    "StoreCorrupt",
    "StoreLocked",
    "StoreUnwritable",
    "StoreUnreadable",
    "FormatVersion",
    "PlanMismatch",
]
