"""Training a probe: seeded, scheduled, resumable, from a cached prefix by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probing import _checkpoint
from probing._data import ProbeData
from probing._errors import ConfigError, DataError
from probing._prefix import FullModel, Prefix
from probing._probes import CircuitProbe, SubnetworkProbe
from probing._schedules import Geometric, Schedule


@dataclass(frozen=True)
class TrainPlan:
    """How `fit` trains. Defaults are those of Lepori et al. 2024, with the temperature annealed every step.

    Args:
        epochs: passes over the data.
        batch_size: rows a step.
        lr: of the masks (AdamW).
        weight_decay: AdamW's; it pulls logits towards zero, as in the published runs.
        probe_lr: of the classifier of a `SubnetworkProbe`.
        temperature: β by step, for the rules that anneal.
        l0_lambda: overrides the config's λ by step.
        target_sparsity: prune this share of units instead of weighing a penalty: a Lagrangian leads training there, and
            the final threshold makes it exact.
        lagrangian_lr: step size of the multipliers' ascent.
        target_warmup: share of training over which the target rises from 0.
        stop_undecided: stop when fewer than this share of units is between 0.1 and 0.9.
        drop_last: leave out the last, smaller batch of an epoch.
        seed: of the order of rows.
    """

    epochs: int = 90
    batch_size: int = 500
    lr: float = 1e-3
    weight_decay: float = 0.01
    probe_lr: float = 1e-3
    temperature: Schedule = field(default_factory=Geometric)
    l0_lambda: Schedule | None = None
    target_sparsity: float | None = None
    lagrangian_lr: float = 0.1
    target_warmup: float = 0.5
    stop_undecided: float | None = None
    drop_last: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise ConfigError(f"epochs={self.epochs} and batch_size={self.batch_size} must be at least 1 and 2")
        if self.target_sparsity is not None and not 0 < self.target_sparsity < 1:
            raise ConfigError(f"target_sparsity={self.target_sparsity} must lie strictly between 0 and 1")
        if self.target_sparsity is not None and self.l0_lambda is not None:
            raise ConfigError("target_sparsity and l0_lambda both set the pressure on the masks; choose one")


@dataclass(frozen=True)
class Trace:
    """What happened: one entry a step; ``kept``, the share of units, under a target sparsity only."""

    loss: list[float]
    kept: list[float]
    temperature: list[float]
    seconds: float


@dataclass
class _State:
    step: int
    order: Tensor
    generator: torch.Generator


def fit(
    probe: CircuitProbe | SubnetworkProbe,
    data: ProbeData,
    plan: TrainPlan | None = None,
    *,
    cache: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
    progress: Callable[[int, int, float], None] | None = None,
) -> Trace:
    """Train the masks (and classifier) of a probe, and leave it in eval mode.

    >>> probe = CircuitProbe(config, model)  # doctest: +SKIP
    >>> fit(probe, ProbeData.at_last({"input_ids": ids}, labels))  # doctest: +SKIP
    >>> probe.circuit.masks().save("subject_number.safetensors")  # doctest: +SKIP

    Args:
        probe: trained in place.
        data: rows, probed positions, labels.
        plan: epochs, rates, schedules.
        cache: compute the frozen prefix once. The masks are the same without, only later.
        checkpoint: file to resume from if it exists and to write every ``checkpoint_every`` steps; an interrupted and
            resumed run gives the same masks as one that was not. One of another plan, config, model or data is refused.
        checkpoint_every: steps between checkpoints.
        progress: called with (step, steps, loss).

    Raises:
        DataError: fewer rows than a batch, or labels of one class.
        MaskError: a checkpoint that is damaged or of another run.
        SiteError: masks the readout cannot see.
    """
    import time

    plan = plan or TrainPlan()
    began = time.perf_counter()
    batch = min(plan.batch_size, len(data))
    if len(data) < 3:
        raise DataError(f"{len(data)} rows are too few to train on")
    if checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every={checkpoint_every} must be at least 1 step")
    probe.eval()
    source = Prefix(probe, data) if cache else FullModel(probe, data)
    linear = isinstance(probe, CircuitProbe) and probe.config.loss == "linear"
    full = _full_vectors(probe, source, data) if linear else None
    per_epoch = len(data) // batch if plan.drop_last else -(-len(data) // batch)
    steps = plan.epochs * per_epoch
    trainer = _Trainer(probe, plan, steps)
    state = _State(0, torch.empty(0, dtype=torch.long), torch.Generator().manual_seed(plan.seed))
    path = Path(checkpoint) if checkpoint is not None else None
    identity = {} if path is None else _checkpoint.identity(plan, probe.config.to_dict(), data, probe.base)
    if path is not None and path.exists():
        trainer.load(_checkpoint.read(path, identity), state)
    probe.train()
    while state.step < steps:
        at = state.step % per_epoch
        if at == 0:
            state.order = torch.randperm(len(data), generator=state.generator)
        rows = state.order[at * batch : (at + 1) * batch]
        trainer.step(source.vectors, rows, data, full, state.step)
        state.step += 1
        if progress is not None:
            progress(state.step, steps, float(trainer.losses[-1]))
        if path is not None and state.step % checkpoint_every == 0:
            _checkpoint.write(path, {**identity, **trainer.saved(state)})
        if plan.stop_undecided is not None and probe.circuit.undecided() < plan.stop_undecided:
            break
    probe.eval()
    if plan.target_sparsity is not None:
        probe.circuit.threshold_to(1 - plan.target_sparsity)
    losses = [float(loss) for loss in trainer.losses]
    return Trace(losses, trainer.kept, trainer.temperatures, time.perf_counter() - began)


@torch.no_grad()
def _full_vectors(probe: CircuitProbe | SubnetworkProbe, source: Prefix | FullModel, data: ProbeData) -> Tensor:
    probe.circuit.use_masks(False)
    try:
        return torch.cat([source.vectors(rows) for rows in torch.arange(len(data)).split(256)])
    finally:
        probe.circuit.use_masks(True)


class _Trainer:
    """Optimiser, penalty and record of one run."""

    def __init__(self, probe: CircuitProbe | SubnetworkProbe, plan: TrainPlan, steps: int) -> None:
        self.probe, self.plan, self.steps = probe, plan, steps
        masks = [p for p in probe.circuit.site_masks.parameters() if p.requires_grad]
        head = list(probe.probe.parameters()) if isinstance(probe, SubnetworkProbe) else []
        if not masks and not head:
            raise ConfigError(
                f"{probe.config.circuit_config.mask_method!r} has no parameters, so there is nothing to train"
            )
        if plan.target_sparsity is not None and not probe.circuit.rule.thresholded:
            raise ConfigError(
                f"{probe.config.circuit_config.mask_method!r} keeps a share of its own, whatever the target: set that "
                "(mask_hparams), or leave target_sparsity out"
            )
        groups = [{"params": masks, "lr": plan.lr}, {"params": head, "lr": plan.probe_lr}]
        groups = [group for group in groups if group["params"]]
        self.parameters = [*masks, *head]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=plan.weight_decay, fused=True)
        device = next(probe.base.parameters()).device
        # λ₂ starts at 30, not 0: without that damping the share pruned swings around its target (measured: ±0.1).
        self.multipliers = torch.tensor([0.0, 30.0], device=device, requires_grad=plan.target_sparsity is not None)
        self.losses: list[Tensor | float] = []  # tensors while training: reading one would wait for the device
        self.kept: list[float] = []
        self.temperatures: list[float] = []

    def step(
        self, vectors: Callable[[Tensor], Tensor], rows: Tensor, data: ProbeData, full: Tensor | None, step: int
    ) -> None:
        """One update."""
        probe = self.probe
        probe.circuit.temperature = self.plan.temperature(step, self.steps)
        positions = data.positions_of(rows)
        keys = None if full is None else full[positions]
        loss = probe.loss(vectors(rows), data.labels[positions], keys)[0]
        total = loss + self._penalty(step)
        for parameter in self.parameters:  # what zero_grad does, in a fifth of the time
            parameter.grad = None
        total.backward()
        self.optimiser.step()
        if self.plan.target_sparsity is not None and self.multipliers.grad is not None:
            with torch.no_grad():  # ascent: the multipliers grow while the target is missed
                self.multipliers += self.plan.lagrangian_lr * self.multipliers.grad
            self.multipliers.grad = None
        self.losses.append(loss.detach())
        self.temperatures.append(probe.circuit.temperature)

    def _penalty(self, step: int) -> Tensor | float:
        circuit, plan = self.probe.circuit, self.plan
        if plan.target_sparsity is not None:
            share = circuit.l0(soft=True, norm="mean")
            self.kept.append(float(share.detach()))
            warm = min(1.0, (step + 1) / max(1.0, plan.target_warmup * self.steps))
            gap = (1 - share) - plan.target_sparsity * warm
            # CoFi / Edge-Pruning: λ₁ (s − t) + λ₂ (s − t)², both multipliers learnt; s is the share pruned. The sign
            # makes a positive λ₁ press towards more pruning while s < t.
            return -self.multipliers[0] * gap + self.multipliers[1] * gap.square()
        config = self.probe.config.circuit_config
        if not config.add_l0:
            return 0.0
        weight = config.l0_lambda if plan.l0_lambda is None else plan.l0_lambda(step, self.steps)
        return weight * circuit.l0_loss()

    def saved(self, state: _State) -> dict[str, Any]:
        """Everything that decides the rest of the run."""
        return {
            "masks": self.probe.circuit.site_masks.state_dict(),
            "head": self.probe.probe.state_dict() if isinstance(self.probe, SubnetworkProbe) else {},
            "optimiser": self.optimiser.state_dict(),
            "multipliers": self.multipliers.detach(),
            "random": self.probe.circuit.random_state(),
            "order": state.order,
            "order_random": state.generator.get_state(),
            "step": state.step,
            "trace": ([float(loss) for loss in self.losses], self.kept, self.temperatures),
        }

    def load(self, blob: dict[str, Any], state: _State) -> None:
        """Continue where `saved` was."""
        self.probe.circuit.site_masks.load_state_dict(blob["masks"])
        if isinstance(self.probe, SubnetworkProbe):
            self.probe.probe.load_state_dict(blob["head"])
        self.optimiser.load_state_dict(blob["optimiser"])
        with torch.no_grad():
            self.multipliers.copy_(blob["multipliers"])
        self.probe.circuit.restore_random_state(blob["random"])
        state.order, state.step = blob["order"], blob["step"]
        state.generator.set_state(blob["order_random"])
        self.losses, self.kept, self.temperatures = (list(values) for values in blob["trace"])
