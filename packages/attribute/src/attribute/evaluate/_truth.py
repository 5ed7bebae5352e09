"""Ground truth on disk: what retraining without some rows did to the queries, once for all methods.

A folder holds ``train.jsonl`` and ``queries.jsonl`` (a record a row, with ``input_ids``, ``labels`` if not all tokens
count, ``text``, and ``weight`` where rows have one), the trained model (``config.json`` …), and ``losses.npz``:

=====================  =====================================================================
``base [q]``           loss of each query under the trained model
``kept_N [s, rows]``   bool: the rows that retraining s of bank N was made with
``loss_N [s, q]``      loss of each query after it
``again_N [s, q]``     the same subsets trained with another seed, for the noise ceiling (optional)
=====================  =====================================================================

``N`` names a bank, such as ``50`` for half of the rows dropped. How it was trained is for the methods that ask for it,
and is read from ``recipe.json``, as ``trace evaluate make`` writes it, or from a ``training.json`` with
``learning_rates``, one a step, and ``batch``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attribute._errors import DataError
from attribute.data import Row, TokenFile, TokenFileWriter
from gradcore import IGNORE

LOSSES, TRAIN, QUERIES = "losses.npz", "train.jsonl", "queries.jsonl"
WEIGHT = "weight"


def training_of(folder: Path, rows: int) -> dict[str, Any]:
    """Σ of the learning rates and rows a step of the training, for :func:`attribute.influence.run_method`, if known."""
    if (file := folder / "training.json").is_file():
        told = json.loads(file.read_text())
        return {"horizon": float(sum(told["learning_rates"])), "batch": int(told["batch"])}
    if (file := folder / "recipe.json").is_file():
        told = json.loads(file.read_text())
        if {"epochs", "batch_size", "learning_rate"} <= set(told):
            steps = told["epochs"] * -(-rows // told["batch_size"])
            return {"horizon": told["learning_rate"] * (steps + 1) / 2, "batch": told["batch_size"]}
    return {}


@dataclass(frozen=True)
class Bank:
    """Retrainings without some rows.

    Attributes:
        name: such as ``50``.
        kept: ``[subsets, rows]``.
        losses: of the queries, ``[subsets, queries]``.
        again: the same with another seed, or none.
    """

    name: str
    kept: np.ndarray
    losses: np.ndarray
    again: np.ndarray | None = None

    def of_queries(self, chosen: np.ndarray) -> Bank:
        """The same for some of the queries, a bool each."""
        again = None if self.again is None else self.again[:, chosen]
        return Bank(self.name, self.kept, self.losses[:, chosen], again)

    @property
    def dropped(self) -> float:
        """Share of the rows that a retraining left out."""
        return float(1 - self.kept.mean())


@dataclass(frozen=True)
class GroundTruth:
    """All of a folder.

    Example::

        truth = GroundTruth.open("runs/truth")
        linear_datamodelling_score(truth.banks["50"], truth.base, scores)

    Attributes:
        path: the folder, which is also that of the model.
        base: ``[queries]``.
        banks: by name.
        rows: training rows.
    """

    path: Path
    base: np.ndarray
    banks: Mapping[str, Bank]
    rows: int

    @property
    def moved(self) -> np.ndarray:
        """Which queries some retraining changed the loss of ``[queries]``; one without a loss never changes."""
        return np.any([(bank.losses != self.base).any(0) for bank in self.banks.values()], axis=0)

    @property
    def weighted(self) -> bool:
        """Whether its training rows have weights."""
        with (self.path / TRAIN).open(encoding="utf-8") as stream:
            return WEIGHT in json.loads(stream.readline() or "{}")

    @classmethod
    def open(cls, path: str | Path) -> GroundTruth:
        """Read a folder.

        Raises:
            DataError: no ground truth there, or parts that do not fit.
        """
        path = Path(path)
        if not (path / LOSSES).is_file():
            raise DataError(f"{path} holds no ground truth: {LOSSES} is missing (trace evaluate make writes one)")
        with np.load(path / LOSSES, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        if "base" not in arrays:
            raise DataError(f"{path / LOSSES} has no base losses")
        base, banks = np.asarray(arrays["base"], dtype=np.float64), dict[str, Bank]()
        for key in sorted(arrays):
            if key.startswith("kept_"):
                name = key.removeprefix("kept_")
                banks[name] = _bank(path, name, arrays, len(base))
        if not banks:
            raise DataError(f"{path / LOSSES} has no bank of retrainings (kept_N and loss_N)")
        counts = {bank.kept.shape[1] for bank in banks.values()}
        if len(counts) > 1:
            raise DataError(f"{path / LOSSES}: the banks have {sorted(counts)} rows")
        return cls(path, base, banks, counts.pop())

    def records(self, side: str) -> list[dict[str, Any]]:
        """The records of ``train`` or ``queries``."""
        file = self.path / (TRAIN if side == "train" else QUERIES)
        try:
            return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error

    def tokens(self, side: str, folder: Path, vocabulary: int) -> TokenFile:
        """The token file of ``train`` or ``queries``, written into a folder."""
        rows = (
            Row(np.array(each["input_ids"]), np.array(each.get("labels", each["input_ids"])) != IGNORE, {})
            for each in self.records(side)
        )
        folder.mkdir(parents=True, exist_ok=True)
        found = TokenFileWriter(folder, vocabulary).write(rows)
        if side == "train" and self.weighted:
            found.weigh(np.array([each[WEIGHT] for each in self.records(side)], dtype=np.float32))
        return found

    def require_shape(self, scores: np.ndarray, name: str) -> None:
        """Raise unless scores ``[queries, rows]`` are of this truth and finite."""
        expected = (len(self.base), self.rows)
        if scores.shape != expected:
            raise DataError(
                f"{name} has scores of {scores.shape[0]} queries for {scores.shape[1]} rows, the ground truth has "
                f"{expected[0]} queries and {expected[1]} rows"
            )
        if not np.isfinite(scores).all():
            raise DataError(f"{name} has scores that are not finite")


def _bank(path: Path, name: str, arrays: Mapping[str, np.ndarray], queries: int) -> Bank:
    kept, losses, again = (arrays.get(f"{part}_{name}") for part in ("kept", "loss", "again"))
    assert kept is not None
    if losses is None or losses.shape != (len(kept), queries):
        raise DataError(f"{path / LOSSES}: loss_{name} must have {len(kept)} subsets of {queries} queries")
    if again is not None and again.shape != losses.shape:
        raise DataError(f"{path / LOSSES}: again_{name} has another shape than loss_{name}")
    for what, found in (("loss", losses), ("again", again)):
        if found is not None and not np.isfinite(found).all():
            raise DataError(f"{path / LOSSES}: {what}_{name} is not finite")
    return Bank(name, kept.astype(bool), losses, again)
