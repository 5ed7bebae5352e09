"""How good scores are: against retrained models, labelled rows, known mislabels, or other seeds."""

from attribute.evaluate._bank import Recipe, make_truth
from attribute.evaluate._compare import collect_scores, compare_methods, scores_of
from attribute.evaluate._lds import LdsResult, linear_datamodelling_score, noise_ceiling
from attribute.evaluate._leave_out import leave_k_out
from attribute.evaluate._mislabels import mislabel_auc
from attribute.evaluate._plot import plot_intervals
from attribute.evaluate._ranks import column_spearman, ranks
from attribute.evaluate._retrieval import (
    Estimate,
    Quality,
    Recall,
    bootstrap,
    evaluate_rankings,
    rank,
    recall_at,
    reciprocal_rank,
)
from attribute.evaluate._stability import score_stability
from attribute.evaluate._tail_patch import tail_patch
from attribute.evaluate._truth import Bank, GroundTruth

__all__ = [
    "Bank",
    "Estimate",
    "GroundTruth",
    "LdsResult",
    "Quality",
    "Recall",
    "Recipe",
    "bootstrap",
    "collect_scores",
    "compare_methods",
    "evaluate_rankings",
    "leave_k_out",
    "linear_datamodelling_score",
    "make_truth",
    "column_spearman",
    "mislabel_auc",
    "noise_ceiling",
    "plot_intervals",
    "rank",
    "ranks",
    "recall_at",
    "reciprocal_rank",
    "score_stability",
    "scores_of",
    "tail_patch",
]
