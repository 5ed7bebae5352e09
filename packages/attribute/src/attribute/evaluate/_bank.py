"""Making ground truth: the same training again and again, each time without some rows.

All retrainings share start, order of rows, schedule and divisor; a dropped row has weight 0. So what differs is what
the rows did, and nothing else: there is no noise of retraining. Rows that have a weight (a reward less the mean of its
prompt's) are trained with it.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribute._errors import AttributionError, DataError
from attribute.batching import assemble, plan_batches
from attribute.data import TokenFile
from attribute.evaluate._truth import LOSSES, QUERIES, TRAIN, WEIGHT, GroundTruth
from attribute.model import LanguageModel
from attribute.progress import Progress, Quiet

PARTS = "parts"


@dataclass(frozen=True)
class Recipe:
    """One training.

    Attributes:
        epochs, batch_size, learning_rate, weight_decay: of AdamW; the rate falls linearly to 0.
        seed: of the order of the rows.
        drops: share of the rows that each bank leaves out.
        subsets: retrainings a bank.
        again: also train each subset with another order, for the noise ceiling.
    """

    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0
    drops: tuple[float, ...] = (0.5,)
    subsets: int = 20
    again: bool = False

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.subsets) < 1 or self.learning_rate <= 0:
            raise AttributionError("epochs, batch size, subsets and learning rate must be positive")
        for drop in self.drops:
            if not 0 < drop < 1:
                raise AttributionError(f"a bank drops a share between 0 and 1 of the rows, not {drop}")
        if len(set(map(bank_name, self.drops))) < len(self.drops):
            raise AttributionError(f"each --drop makes a bank of its own, and two are alike: {self.drops}")


def make_truth(
    path: str | Path,
    model: LanguageModel,
    rows: TokenFile,
    queries: TokenFile,
    texts: tuple[Sequence[str], Sequence[str]],
    recipe: Recipe,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> GroundTruth:
    """Train the model on all rows and on random subsets of them, and keep what became of the queries.

    What is finished of an interrupted call is kept, a retraining at a time.

    Args:
        path: the folder; it gets the trained model, rows, queries and losses.
        model: where every training starts; it is copied, not changed.
        rows, queries: token files.
        texts: of rows and queries, to be shown.
        recipe: how to train, and which subsets.
        tokenizer: saved beside the model, where there is one.
        progress: told of each training.

    Raises:
        DataError: the folder was begun with another recipe or other rows; a query without a loss, or with a weight.
    """
    path, progress = Path(path), progress or Quiet()
    _require_measurable(queries)
    parts = path / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    about = {**asdict(recipe), "rows": rows.digest, "queries": queries.digest, "start": model.fingerprint()}
    about["drops"] = list(recipe.drops)
    _require_same(path / "recipe.json", about)
    masks = _masks(len(rows), recipe)
    trainings = 1 + sum(len(each) for each in masks.values()) * (1 + recipe.again)
    steps = recipe.epochs * -(-len(rows) // recipe.batch_size)
    progress.start("retrain", trainings * steps, "steps")

    def losses(name: str, kept: np.ndarray, seed: int) -> np.ndarray:
        file = parts / f"{name}.npy"
        if file.exists():
            progress.advance(steps)
            return np.load(file, allow_pickle=False)
        trained = train_on(model, rows, kept, recipe, seed, progress)
        found = losses_of(trained, queries)
        if not np.isfinite(found).all():
            raise DataError("a retraining ended with losses that are not finite: lower the learning rate")
        if name == "base":
            trained.model.save_pretrained(path)  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(path)
        temporary = parts / f"{name}.tmp.npy"
        np.save(temporary, found)
        os.replace(temporary, file)
        return found

    found = {"base": losses("base", np.ones(len(rows), dtype=bool), recipe.seed)}
    for bank, kept in masks.items():
        found[f"kept_{bank}"] = kept
        found[f"loss_{bank}"] = np.stack([losses(f"{bank}-{n}", each, recipe.seed) for n, each in enumerate(kept)])
        if recipe.again:
            again = [losses(f"{bank}-{n}-again", each, recipe.seed + 1) for n, each in enumerate(kept)]
            found[f"again_{bank}"] = np.stack(again)
    progress.stop()
    for name, side, shown in ((TRAIN, rows, texts[0]), (QUERIES, queries, texts[1])):
        _write_rows(path / name, side, shown)
    temporary = path / "losses.tmp.npz"
    np.savez(temporary, **found)  # type: ignore[arg-type]
    os.replace(temporary, path / LOSSES)
    return GroundTruth.open(path)


def _masks(rows: int, recipe: Recipe) -> dict[str, np.ndarray]:
    found = {}
    for drop in recipe.drops:
        count = max(1, round(drop * rows))
        if count >= rows:
            raise AttributionError(f"dropping {drop:.0%} of {rows} rows leaves none")
        generator = np.random.default_rng([recipe.seed, round(drop * 1e6)])
        kept = np.ones((recipe.subsets, rows), dtype=bool)
        for mask in kept:
            mask[generator.choice(rows, count, replace=False)] = False
        found[bank_name(drop)] = kept
    return found


def bank_name(drop: float) -> str:
    """The share in percent.

    >>> bank_name(0.05), bank_name(0.5), bank_name(0.252)
    ('05', '50', '25.2')
    """
    whole, _, rest = f"{100 * drop:.4f}".partition(".")
    return ".".join(filter(None, (whole.zfill(2), rest.rstrip("0"))))


def _require_measurable(queries: TokenFile) -> None:
    if queries.weights is not None:
        raise DataError(
            "queries have no reward in a ground truth, whose losses are measured as they are: leave "
            "--query.reward-column and --query.advantage-column away"
        )
    if silent := [number for number in range(len(queries)) if not queries.labelled(number)[1:].any()]:
        raise DataError(
            f"query {silent[0]} has no token with a loss, so nothing can be told of it ({len(silent)} of "
            f"{len(queries)} queries): leave it out of the query data"
        )


def train_on(
    start: LanguageModel, rows: TokenFile, kept: np.ndarray, recipe: Recipe, seed: int, progress: Progress
) -> LanguageModel:
    """AdamW over all rows in the order of the seed, each times its weight; a row that is not kept has weight 0."""
    model = LanguageModel.wrap(copy.deepcopy(start.model), start.name)
    network = model.model.eval()  # without dropout, so that subsets differ by their rows alone
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    generator = np.random.default_rng(seed)
    batches = [
        order[first : first + recipe.batch_size]
        for order in (generator.permutation(len(rows)) for _ in range(recipe.epochs))
        for first in range(0, len(rows), recipe.batch_size)
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    given = kept if rows.weights is None else kept * rows.weights
    weights = torch.from_numpy(given.astype(np.float32)).to(start.device)
    for chosen in batches:
        batch = assemble(rows, chosen, start.device)
        logits = network(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
        targets = batch.labels[:, 1:]
        each: Tensor = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none", ignore_index=-100)
        means = each.sum(1) / (targets != -100).sum(1).clamp(min=1)
        optimizer.zero_grad()
        ((means * weights[torch.from_numpy(chosen)]).sum() / len(chosen)).backward()
        optimizer.step()
        schedule.step()
        progress.advance(1)
    return model


def losses_of(model: LanguageModel, queries: TokenFile) -> np.ndarray:
    """Mean loss of each query's tokens ``[queries]``."""
    found = np.zeros(len(queries))
    with torch.no_grad():
        for chosen in plan_batches(queries.lengths, np.arange(len(queries)), 4096):
            batch = assemble(queries, chosen, model.device)
            found[chosen] = model.losses(batch.input_ids, batch.labels, "mean").cpu().numpy()
    return found


def _write_rows(path: Path, tokens: TokenFile, texts: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row, text in zip(range(len(tokens)), texts):
            ids = tokens.ids(row).tolist()
            labels = [token if counted else -100 for token, counted in zip(ids, tokens.labelled(row))]
            record = {"input_ids": ids, "labels": labels, "text": text}
            if tokens.weights is not None:
                record[WEIGHT] = float(tokens.weights[row])
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _require_same(file: Path, about: dict[str, Any]) -> None:
    if not file.exists():
        file.write_text(json.dumps(about, indent=1), encoding="utf-8")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, value in about.items():
        if before.get(name) != value:
            raise DataError(
                f"{file.parent} was begun with {name} {before.get(name)!r}, not {value!r}: continue it with the same, "
                "or choose another folder"
            )
