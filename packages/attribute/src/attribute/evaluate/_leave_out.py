"""Leave-k-out: train again without the rows that a method names for a query, and see what that costs the query.

The counterfactual that scores are about, for the rows that matter most (Koh & Liang 2017, section 4.1; Bae et al. 2024,
section 5.2 for groups of rows). Unlike the linear datamodelling score it asks only about the top of a ranking.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attribute._errors import AttributionError, DataError
from attribute.evaluate._bank import PARTS, Recipe, losses_of, train_on
from attribute.evaluate._retrieval import Estimate, bootstrap, rank
from attribute.evaluate._truth import GroundTruth
from attribute.model import LanguageModel
from attribute.progress import Progress, Quiet

RANDOM = "random rows"


def leave_k_out(
    truth: str | Path,
    start: LanguageModel,
    scores: Mapping[str, np.ndarray],
    *,
    ks: Sequence[int] = (8,),
    queries: int = 8,
    progress: Progress | None = None,
) -> dict[str, dict[int, Estimate]]:
    """Rise of a query's loss, in nats, after training without its ``k`` best rows; mean over queries.

    Trainings are kept in the folder: methods that name the same rows share them, and an interrupted call goes on.

    Example::

        found = leave_k_out("runs/truth", load_model("start/"), {"mine": scores}, ks=(4, 16))
        found["mine"][16].mean, found["random rows"][16].mean

    Args:
        truth: a folder of :func:`make_truth`, whose recipe is used again.
        start: the weights that its trainings began with; it is copied, not changed.
        scores: method → ``[queries, rows]``. Random rows are added.
        ks: how many rows to leave out.
        queries: how many to ask, evenly spaced among those that any retraining changed; each costs a training for every
            method and k.
        progress: told of each training.

    Raises:
        DataError: a ground truth of unknown recipe, or scores of other queries or rows.
        AttributionError: another start, or more rows to leave out than there are.
    """
    found, progress = GroundTruth.open(truth), progress or Quiet()
    recipe = _recipe(found, start)
    if not ks or min(ks) < 1 or max(ks) >= found.rows:
        raise AttributionError(f"--k must lie between 1 and {found.rows - 1}, there are {found.rows} rows")
    for name, each in scores.items():
        found.require_shape(each, name)
    if queries < 1:
        raise AttributionError(f"--queries must be at least 1, not {queries}")
    if not len(able := np.flatnonzero(found.moved)):
        raise DataError(f"no retraining in {truth} changed the loss of any query: there is none to ask")
    asked = able[np.unique(np.linspace(0, len(able) - 1, min(queries, len(able))).round().astype(int))]
    draw = np.random.default_rng(recipe.seed)
    rankings = {name: {q: rank(each[q]) for q in asked} for name, each in scores.items()}
    rankings[RANDOM] = {q: draw.permutation(found.rows).tolist() for q in asked}
    steps = recipe.epochs * -(-found.rows // recipe.batch_size)
    progress.start("retrain", len(rankings) * len(ks) * len(asked) * steps, "steps")
    with tempfile.TemporaryDirectory(prefix="trace-leave-out-") as scratch:
        rows, held_out = (found.tokens(side, Path(scratch, side), start.vocabulary) for side in ("train", "queries"))

        def losses(dropped: list[int]) -> np.ndarray:
            name = hashlib.sha256(json.dumps(sorted(dropped)).encode()).hexdigest()[:24]
            file = found.path / PARTS / f"without-{name}.npy"
            if file.exists():
                progress.advance(steps)
                return np.load(file, allow_pickle=False)
            kept = np.ones(found.rows, dtype=bool)
            kept[dropped] = False
            after = losses_of(train_on(start, rows, kept, recipe, recipe.seed, progress), held_out)
            file.parent.mkdir(exist_ok=True)
            aside = file.with_suffix(".tmp.npy")
            np.save(aside, after)
            os.replace(aside, file)
            return after

        table = {
            name: {
                k: bootstrap([float(losses(ranking[q][:k])[q] - found.base[q]) for q in asked]) for k in sorted(set(ks))
            }
            for name, ranking in rankings.items()
        }
    progress.stop()
    return table


def _recipe(truth: GroundTruth, start: LanguageModel) -> Recipe:
    file = truth.path / "recipe.json"
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = {name: about[name] for name in Recipe.__dataclass_fields__}
        fingerprint = about["start"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{file} does not say how the ground truth was trained ({error}): make one with trace evaluate make"
        ) from None
    if fingerprint != start.fingerprint():
        raise AttributionError(
            f"{start.name or 'the model'} has other weights than those that {truth.path} was trained from: --model "
            "takes the one that trace evaluate make was given"
        )
    return Recipe(**{**known, "drops": tuple(known["drops"])})
