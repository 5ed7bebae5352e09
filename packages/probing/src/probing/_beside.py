"""The probes beside circuit probing: linear and MLP classifiers, control tasks, LEACE, counterfactual vectors.

All work on vectors [n, d] and labels [n], wherever these come from; `probed_vectors` reads them off a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probing._data import as_labels, check_labels
from probing._errors import ConfigError, DataError
from probing._estimate import Estimate


@dataclass(frozen=True)
class VectorProbe:
    """A trained classifier of vectors.

    >>> x = torch.cat([torch.randn(50, 4) + 4, torch.randn(50, 4) - 4])
    >>> probe = train_vector_probe(x, torch.arange(2).repeat_interleave(50))
    >>> probe.accuracy(x, torch.arange(2).repeat_interleave(50)).mean
    1.0
    """

    head: nn.Module
    mean: Tensor
    scale: Tensor

    def logits(self, vectors: Tensor) -> Tensor:
        """Class scores [n, classes]; differentiable in the vectors."""
        return self.head((vectors.float() - self.mean) / self.scale)

    @torch.no_grad()
    def accuracy(self, vectors: Tensor, labels: Tensor) -> Estimate:
        """Share classified right, with a bootstrap interval."""
        return Estimate.over_examples((self.logits(vectors).argmax(-1) == labels).float())


def train_vector_probe(
    vectors: Tensor,
    labels: Tensor,
    *,
    hidden: int | None = None,
    classes: int | None = None,
    epochs: int = 100,
    batch_size: int = 500,
    lr: float = 0.01,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> VectorProbe:
    """A linear probe, or with ``hidden`` an MLP (Linear-ReLU-Linear) probe; vectors are standardised first.

    Args:
        vectors: [n, d].
        labels: [n], at least two classes.
        hidden: width of the hidden layer; the papers use 256.
        classes: how many classes; by default those seen.
        epochs: passes over the data (AdamW).
        batch_size: vectors a step.
        lr: learning rate.
        weight_decay: AdamW's.
        seed: of initial weights and order.

    Raises:
        DataError: labels of one class, or lengths that disagree.
    """
    labels = as_labels(labels).to(vectors.device)
    if len(vectors) != len(labels):
        raise DataError(f"{len(vectors)} vectors but {len(labels)} labels")
    check_labels(labels)
    if epochs < 1 or (hidden is not None and hidden < 1):
        raise ConfigError(f"epochs={epochs} and hidden={hidden} must be at least 1")
    classes = classes or int(labels.max()) + 1
    x = vectors.detach().float()
    mean, scale = x.mean(0), x.std(0, unbiased=False).clamp_min(1e-6)
    x = (x - mean) / scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(x.shape[1], classes)]
        if hidden is not None:
            layers = [nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, classes)]
        head = nn.Sequential(*layers).to(x.device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
            optimiser.zero_grad()
            F.cross_entropy(head(x[rows]), labels[rows]).backward()
            optimiser.step()
    return VectorProbe(head.requires_grad_(False), mean, scale)


def control_labels(keys: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
    """Labels of a control task (Hewitt & Liang 2019): each distinct input gets one random label, drawn as labels occur.

    >>> control_labels(torch.tensor([7, 8, 7]), torch.tensor([0, 1, 0]))[[0, 2]].unique().numel()
    1

    A probe's selectivity is its accuracy minus that on the control task: what it reads, less what it can memorise.

    Args:
        keys: [n] or [n, …], what the label may depend on: the word type, say, or the whole input.
        labels: [n], the real labels.
        seed: of the draw.
    """
    _, inverse = torch.unique(keys, dim=0, return_inverse=True)
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(labels), (int(inverse.max()) + 1,), generator=draw)
    return labels[chosen.to(labels.device)][inverse]


def selectivity(
    train: tuple[Tensor, Tensor, Tensor],
    test: tuple[Tensor, Tensor, Tensor],
    *,
    seed: int = 0,
    **how: int | float | None,
) -> tuple[Estimate, Estimate | None, float | None]:
    """Accuracy, control accuracy and their difference, of a probe trained as `train_vector_probe` does.

    Where all training keys have one control label – a single key, say – there is no control task: None, twice.

    Args:
        train: vectors, labels, and keys that the control task labels.
        test: the same for the rows scored; keys shared with ``train`` keep their control label.
        seed: of the control task and the probes.
        **how: for `train_vector_probe`.
    """
    keys, labels = torch.cat([train[2], test[2]]), torch.cat([as_labels(train[1]), as_labels(test[1])])
    sizes = [len(train[1]), len(test[1])]
    # Few keys may all draw one label by accident, which is no task: draw again.
    draws = (control_labels(keys, labels, seed + again).split(sizes) for again in range(20))
    control = next((drawn for drawn in draws if len(drawn[0].unique()) > 1), None)
    classes = int(labels.max()) + 1

    def accuracy(train_labels: Tensor, test_labels: Tensor) -> Estimate:
        probe = train_vector_probe(train[0], train_labels, classes=classes, seed=seed, **how)  # type: ignore[arg-type]
        return probe.accuracy(test[0], test_labels)

    real = accuracy(train[1], test[1])
    if control is None:
        return real, None, None
    memorised = accuracy(*control)
    return real, memorised, real.mean - memorised.mean


@dataclass(frozen=True)
class Eraser:
    """r(x) = x − W⁺PW(x − μ): the least change after which no linear probe beats chance (LEACE, Belrose et al. 2023).

    >>> labels = torch.arange(3).repeat(40)
    >>> x = torch.randn(120, 6) + 3 * torch.eye(6)[labels]
    >>> erased = Eraser.fit(x, labels)(x)
    >>> means = torch.stack([erased[labels == c].mean(0) for c in range(3)])
    >>> bool((means - means[0]).abs().max() < 1e-4)
    True
    """

    mean: Tensor
    projection: Tensor
    """W⁺PW, [d, d]."""

    @classmethod
    def fit(cls, vectors: Tensor, labels: Tensor) -> Eraser:
        """From vectors [n, d] and class labels [n] of rows other than those evaluated.

        W is the whitening Σ_xx^{−1/2} (pseudo-inverse), P projects onto the columns of WΣ_xz, z one-hot (eq. 1 there).
        """
        labels = as_labels(labels).to(vectors.device)
        check_labels(labels)
        x = vectors.detach().double()
        z = F.one_hot(labels, int(labels.max()) + 1).double()
        mean = x.mean(0)
        centred, z = x - mean, z - z.mean(0)
        values, basis = torch.linalg.eigh(centred.T @ centred / len(x))
        seen = values > values.max() * len(values) * torch.finfo(torch.float32).eps
        root = values.clamp_min(0).sqrt()
        inverse = torch.where(seen, 1 / torch.where(seen, root, 1.0), 0.0)
        whiten, colour = (basis * inverse) @ basis.T, (basis * torch.where(seen, root, 0.0)) @ basis.T
        u, s, _ = torch.linalg.svd(whiten @ (centred.T @ z / len(x)), full_matrices=False)
        u = u[:, s > 1e-9 * max(1.0, float(s.max()))]
        return cls(mean.to(vectors.dtype), (colour @ u @ u.T @ whiten).to(vectors.dtype))

    def __call__(self, vectors: Tensor) -> Tensor:
        """The vectors without the concept."""
        return vectors - (vectors - self.mean) @ self.projection.T


def counterfactual_vectors(
    probe: VectorProbe, vectors: Tensor, targets: Tensor, *, steps: int = 100, lr: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Vectors moved until the probe reads another value (Tucker et al. 2021), to be patched into the model.

    Args:
        probe: a trained probe.
        vectors: [n, d], the true ones.
        targets: [n], the counterfactual values.
        steps: of AdamW, on the vectors.
        lr: its rate.

    Returns:
        The moved vectors, and which of them the probe now reads as their target. If nearly all succeed and the model's
        answer does not follow, the probe reads what the model does not use.
    """
    moved = vectors.detach().clone().float().requires_grad_(True)
    optimiser = torch.optim.AdamW([moved], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(probe.logits(moved), targets, reduction="sum").backward()
        optimiser.step()
    moved = moved.detach()
    return moved.to(vectors.dtype), probe.logits(moved).argmax(-1) == targets
