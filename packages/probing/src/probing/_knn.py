"""Does a readout cluster by the variable? One nearest neighbour, averaged over many reference sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probing._data import ProbeData, most_frequent
from probing._errors import DataError
from probing._estimate import Estimate
from probing._losses import unit
from probing._prefix import FullModel, Prefix

if TYPE_CHECKING:
    from probing._probes import _Probe


@dataclass(frozen=True)
class KnnResult:
    """How often the nearest reference vector, by cosine, has the right label.

    Attributes:
        circuit: through the binary circuit.
        full: the unmasked model's readout; high means the variable is readable anyway.
        chance: what the most frequent class of the test set would score.
    """

    circuit: Estimate
    full: Estimate
    chance: float


def knn_accuracy(
    reference: Tensor, reference_labels: Tensor, test: Tensor, test_labels: Tensor, *, draws: int = 20, seed: int = 0
) -> list[float]:
    """1-nearest-neighbour accuracy, once per drawn reference set of one vector a class.

    >>> vectors, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    >>> knn_accuracy(vectors, labels, vectors, labels, draws=2)
    [1.0, 1.0]

    The published figures rest on one draw; that draw alone moves the accuracy by several points, hence many.

    Args:
        reference: [n, d] vectors to draw the reference sets from.
        reference_labels: [n].
        test: [m, d] vectors to classify.
        test_labels: [m].
        draws: how many reference sets.
        seed: of the draws.
    """
    classes = reference_labels.unique()
    if len(classes) < 2:
        raise DataError("the reference labels hold one class only: nothing to tell apart")
    generator = torch.Generator().manual_seed(seed)
    similarity = unit(test)[0] @ unit(reference)[0].T if len(reference) <= 4096 else None
    found = []
    for _ in range(draws):
        order = torch.randperm(len(reference_labels), generator=generator).to(reference_labels.device)
        shuffled = reference_labels[order]
        chosen = torch.stack([order[(shuffled == value).int().argmax()] for value in classes])
        scores = similarity[:, chosen] if similarity is not None else unit(test)[0] @ unit(reference[chosen])[0].T
        found.append(float((classes[scores.argmax(1)] == test_labels).float().mean()))
    return found


@torch.no_grad()
def probed_vectors(probe: _Probe[Any], data: ProbeData, *, masked: bool = True, cache: bool = False) -> Tensor:
    """The readout of all probed positions, [R, d], through the circuit or (``masked=False``) the full model."""
    was_training = probe.training
    probe.eval()
    source = Prefix(probe, data) if cache else FullModel(probe, data)
    probe.circuit.use_masks(masked)
    try:
        return torch.cat([source.vectors(rows) for rows in torch.arange(len(data)).split(512)])
    finally:
        probe.circuit.use_masks(True)
        probe.train(was_training)


def evaluate_knn(probe: _Probe[Any], train: ProbeData, test: ProbeData, *, draws: int = 20, seed: int = 0) -> KnnResult:
    """KNN through the circuit and through the full model, with the same reference sets.

    >>> evaluate_knn(probe, train, test)  # doctest: +SKIP
    KnnResult(circuit=Estimate(mean=0.99, …), full=Estimate(mean=0.66, …), chance=0.02)
    """
    found = {}
    for masked in (True, False):
        reference, tested = (probed_vectors(probe, data, masked=masked) for data in (train, test))
        scores = knn_accuracy(reference, train.labels, tested, test.labels, draws=draws, seed=seed)
        found[masked] = Estimate.over_draws(scores)
    return KnnResult(found[True], found[False], most_frequent(test.labels))
