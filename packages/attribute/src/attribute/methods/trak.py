"""TRAK: the model linearised in its log-odds, its rows regressed on sketched gradients.

Park et al. 2023 ("TRAK: Attributing model behavior at scale", eqs. 14–17). With f = log p / (1 − p) of each labelled
token, φ the sketched gradient of Σ f over a row, R = Φᵀ Φ / N and p̄_i the row's mean probability,

    τ(q, i) = mean_m [φ_qᵀ R⁻¹ φ_i] · mean_m [1 − p̄_i]

over an ensemble of models m: the study's checkpoints where it has any, the model itself otherwise, each with a sketch
of its own. One model alone is weak; the paper has 5 to 100.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from attribute.batching import Batch
from attribute.curvature import Inversion
from attribute.curvature._gram import GramSums
from attribute.data import TokenFile
from attribute.engine import MemorySink, RowBlock, labelled_tokens, run_windows
from attribute.methods._estimator import GRADIENTS, SKETCH, Estimator, register_estimator
from attribute.methods._study import Checkpoint, Study
from attribute.model import LanguageModel
from gradcore import IGNORE, CapturePlan


@register_estimator
class Trak(Estimator):
    """Regression on sketched gradients of the log-odds."""

    name: ClassVar[str] = "trak"
    needs: ClassVar[str] = "a sketch; checkpoints of other runs make it an ensemble"
    uses: ClassVar[frozenset[str]] = (GRADIENTS - {"loss_reduction"}) | SKETCH | {"checkpoints", "damping"}
    cost: ClassVar[str] = "1 pass a model"
    source: ClassVar[str] = "Park et al. 2023, eqs. 14–17"

    def influence(self, study: Study) -> np.ndarray:
        """Both factors averaged over the ensemble apart, then multiplied."""
        members = study.checkpoints or (Checkpoint(study.model, 1.0),)
        product = np.zeros((len(study.queries), len(study.rows)), dtype=np.float64)
        doubt = np.zeros(len(study.rows), dtype=np.float64)
        for number, member in enumerate(members):
            plan = replace(study.plan, sketch=study.sketch(number), model="")
            rows, probabilities = _log_odds(member.model, study.rows, plan, study.budget)
            queries, _ = _log_odds(member.model, study.queries, plan, study.budget)
            sums = GramSums(plan)
            sums.add_rows(torch.from_numpy(rows))
            product += sums.finish().apply(queries, Inversion("damped", study.damping)) @ rows.T / len(members)
            doubt += (1 - probabilities) / len(members)
        return (product * doubt).astype(np.float32)


def _log_odds(model: LanguageModel, tokens: TokenFile, plan: CapturePlan, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Sketched gradients of −Σ log p/(1−p) times the row's weight ``[rows, width]``, and the mean p ``[rows]``."""
    sink = MemorySink(len(tokens), plan.width)
    with torch.enable_grad(), model.collector(plan) as collector:

        def measure(batch: Batch) -> RowBlock:
            logits = model.model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
            targets = batch.labels[:, 1:]
            losses = nn.functional.cross_entropy(logits.mT, targets, reduction="none", ignore_index=IGNORE)
            # ∇ log p/(1−p) = ∇ log p / (1 − p); −expm1 keeps 1 − p where p rounds to one.
            surprise = -torch.expm1(-losses.detach())
            odds = (losses / surprise.clamp(min=1e-6)).sum(1)
            (odds if batch.weights is None else odds * batch.weights).sum().backward()
            labelled = targets != IGNORE
            mean = ((-losses.detach()).exp() * labelled).sum(1) / labelled.sum(1).clamp(min=1)
            return RowBlock(batch.rows, collector.take(), mean, labelled_tokens(batch))

        run_windows(model, tokens, [(0, 0, len(tokens))], [sink], measure, budget=budget)
    return sink.gradients, sink.losses
