"""Training: batches of activations in, coders out. One step is a function of the state and the step's number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import _checkpoint, _hooks
from sparsify._coder import ForwardOutput, SparseCoder
from sparsify._config import TrainConfig
from sparsify._errors import CheckpointError, DataError
from sparsify._files import save_coder, write_json
from sparsify._loggers import TRACKERS, JsonLines, Logger
from sparsify._meters import Meters
from sparsify._optim import make_optimiser
from sparsify._parallel import Processes
from sparsify._progress import Terminal
from sparsify._source import OnTheFly, Pair, Source, warn_of_end
from sparsify._start import check_cuts, fresh_coder, initialise, source_for, start_from
from sparsify._whole import active_total, learnable_spread


class Trainer:
    """Trains one coder per hookpoint (and seed).

    >>> trainer = Trainer(TrainConfig(SaeConfig(k=32), batch_size=16), tokenized, model)  # doctest: +SKIP
    >>> trainer.fit()  # doctest: +SKIP
    >>> trainer.saes["layers.3"].encode(hidden)  # doctest: +SKIP

    Args:
        cfg: what to train.
        dataset: rows of token ids (see `sparsify.data.token_rows`).
        model: any module that takes token ids; hookpoints are relative to its ``base_model`` where it has one. It is
            put in evaluation mode while training runs and is left as it was.
        source: activations from elsewhere, such as `ActivationCache.source_for`; then dataset and model are not
            needed, and what the configuration says of the data must be what the source does.
        device: where coders live without a model; with one, they live where it does.
        recipe: how model and data came about; kept in config.json beside the configuration.
        loggers: receive the averages of each interval, beside metrics.jsonl and the terminal.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        dataset: Any = None,
        model: nn.Module | None = None,
        *,
        source: Source | None = None,
        device: str | torch.device | None = None,
        loggers: Sequence[Logger] = (),
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self.cfg, self.model, self.loggers = cfg, model, list(loggers)
        self.recipe, self.averages = dict(recipe or {}), dict[str, float]()
        self.processes = Processes()
        self.source = source_for(cfg, dataset, model, source, (self.processes.rank, self.processes.world))
        self.hookpoints = list(self.source.widths)
        self.owned = self.processes.owned(self.hookpoints) if cfg.distribute_modules else self.hookpoints
        self.device = torch.device(device or "cpu") if model is None else _hooks.device_of(model)
        self.saes: dict[str, SparseCoder] = {}
        for hook in self.owned:
            d_in, d_out = self.source.widths[hook]
            for seed in cfg.init_seeds:
                name = f"{hook}/seed{seed}" if len(cfg.init_seeds) > 1 else hook
                self.saes[name] = fresh_coder(cfg, d_in, d_out, seed).to(self.device)
        for coder in self.saes.values():
            if cfg.sae.tied:
                coder.tie()
            check_cuts(cfg, coder.activation, self._replicas, first=self.processes.first)
        self.total_steps = len(self.source) // cfg.grad_acc_steps
        if not self.total_steps:
            raise DataError(
                f"{len(self.source)} batches do not make one step of {cfg.grad_acc_steps}: lower grad_acc_steps"
            )
        self.optimiser = make_optimiser(cfg, list(self.saes.values()), self.total_steps)
        self.global_step = self.tokens_seen = 0
        self.tokens_since_fired = {
            name: torch.zeros(c.num_latents, dtype=torch.long, device=self.device) for name, c in self.saes.items()
        }
        self.best = dict.fromkeys(self.saes, math.inf)
        self.meters = Meters()
        self._take_back: Callable[[], None] | None = None  # while the coders hold the published weights
        if cfg.finetune:
            start_from(cfg.finetune, self.saes)

    @property
    def folder(self) -> Path:
        """Where this run is kept."""
        return Path(self.cfg.save_dir) / (self.cfg.run_name or "unnamed")

    # ------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train to the end of the data, from wherever the state stands, and leave the coders in the run folder.

        `saes` then hold the weights that the folder does. A stream that ends before its ``num_rows`` ends the run
        there, with a warning.
        """
        if self.processes.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "config.json", {**self.cfg.to_dict(), **self.recipe})
        sinks: list[Logger] = [*self.loggers]
        if self.processes.first:
            sinks += [TRACKERS[name](self.folder, self.cfg.run_name, self.cfg.to_dict()) for name in self.cfg.trackers]
            sinks.append(JsonLines(self.folder / "metrics.jsonl", self.global_step))
        terminal = Terminal(self.total_steps, self.global_step, shown=self.processes.first)
        sinks.append(terminal)
        try:
            with _hooks.frozen(self.model or nn.Module(), no_parameter_gradients=self.cfg.loss_fn != "fvu"):
                more = self._goes_on()
                while more:
                    terminal.advance(self.step())
                    more = self._goes_on()
                    if not self.global_step % self.cfg.log_every or not more:
                        self.averages = self._averages()
                        for sink in sinks:
                            sink.log(self.global_step, self.averages)
                    if self.cfg.save_every and not self.global_step % self.cfg.save_every:
                        self.save()
        finally:
            for sink in sinks:
                sink.close()
        for coder in self.saes.values():
            coder.eval()
        self.save()
        self._settle(True)
        if self.global_step < self.total_steps and self.processes.first:
            warn_of_end(self.source, f"so the run ends at step {self.global_step} of its schedule's {self.total_steps}")

    def _goes_on(self) -> bool:
        """Whether there is another step and data for it; a first step is always tried."""
        last = (self.global_step + 1) * self.cfg.grad_acc_steps - 1
        reached = not self.global_step or not isinstance(self.source, OnTheFly) or self.source.reaches(last)
        return self.global_step < self.total_steps and reached

    def step(self) -> int:
        """One optimiser step; returns the tokens it took, over all processes."""
        self._settle(False)
        for coder in self.saes.values():
            coder.train()
        k = self.get_current_k()
        fired = {n: torch.zeros(c.num_latents, dtype=torch.int32, device=self.device) for n, c in self.saes.items()}
        tokens = torch.zeros(len(self.saes), dtype=torch.long, device=self.device)
        for micro in range(self.cfg.grad_acc_steps):
            index = self.global_step * self.cfg.grad_acc_steps + micro
            if self.cfg.loss_fn == "fvu":
                self._local_losses(index, k, fired, tokens)
            else:
                self._end_to_end_loss(index, k, fired, tokens)
        self._update(fired, tokens)
        self.global_step += 1
        taken = int(tokens.max())
        self.tokens_seen += taken
        return taken

    def get_current_k(self) -> int:
        """k falls linearly from 10 times the first hookpoint's width to its value, over k_decay_steps."""
        cfg = self.cfg
        if self.global_step >= cfg.k_decay_steps:
            return cfg.sae.k
        d_in = self.source.widths[self.hookpoints[0]][0]
        start = min(cfg.sae.latents(d_in), 10 * d_in)
        done = self.global_step / cfg.k_decay_steps
        return round(start * (1 - done) + cfg.sae.k * done)

    def _local_losses(self, index: int, k: int, fired: Mapping[str, Tensor], tokens: Tensor) -> None:
        batch = self.source.batch(index)
        for hook in list(batch):
            pair = batch.pop(hook).to(self.device)
            if self.cfg.distribute_modules:
                pair = self._to_owner(hook, pair)
                if hook not in self.owned:
                    continue
            pair = Pair(x := pair.x.float(), x if pair.y is pair.x else pair.y.float())
            variance, count = learnable_spread(pair, hook, index, self._sum)
            for name, coder in self.saes.items():
                if _hooks.hook_of(name) != hook:
                    continue
                if self.global_step == 0 and index == 0 and not self.cfg.finetune:
                    self._initialise(coder, pair)
                with self._precision():
                    total = active_total(coder, pair.x, self.cfg.micro_acc_steps, self._sum)
                batch_is = {"total_variance": variance, "total_tokens": count, "total": total}
                for x, y in zip(pair.x.chunk(self.cfg.micro_acc_steps), pair.y.chunk(self.cfg.micro_acc_steps)):
                    with self._precision():
                        out = coder(x, y, dead_mask=self._dead(name), k=k, **batch_is)
                    share = 1 / self.cfg.grad_acc_steps
                    ((out.fvu + self._added(out)) * share).backward()
                    self._record(out, name, fired, tokens, share)

    def _added(self, out: ForwardOutput) -> Tensor:
        """The losses beside the reconstruction's or the model's own: a chunk's shares of the batch's."""
        loss = self.cfg.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8 + out.nested_fvu
        if out.sparsity_loss.requires_grad:
            loss = loss + self.cfg.sparsity_coefficient * out.sparsity_loss
        return loss

    def _record(self, out: ForwardOutput, name: str, fired: Mapping[str, Tensor], tokens: Tensor, share: float) -> None:
        """Count who fired, and add to the interval's averages."""
        coder, active = self.saes[name], out.latent_acts.detach() > 0
        fired[name].scatter_add_(0, out.latent_indices.flatten(), active.flatten().int())
        tokens[list(self.saes).index(name)] += active.shape[0]
        self.meters.add(f"fvu/{name}", out.fvu.detach() * share)
        self.meters.add(f"l0_sum/{name}", active.sum())
        for key, value in (("auxk", out.auxk_loss), ("multi_topk_fvu", out.multi_topk_fvu), ("nested", out.nested_fvu)):
            if value.requires_grad:
                self.meters.add(f"{key}/{name}", value.detach() * share)
        coder.activation.observe(coder, out.latent_acts.detach())

    def _end_to_end_loss(self, index: int, k: int, fired: Mapping[str, Tensor], tokens: Tensor) -> None:
        from sparsify._end_to_end import check_next_tokens, spliced_loss

        assert isinstance(self.source, OnTheFly)
        assert self.model is not None
        ids, cfg = self.source.tokens(index), self.cfg
        check_next_tokens(ids)
        if self.global_step == 0 and index == 0 and not cfg.finetune:
            for hook, pair in self.source.batch(index).items():
                learnable_spread(pair, hook, index, self._sum)
                self._initialise(self.saes[hook], Pair(pair.x.float(), pair.y.float()))
        keep = ~torch.isin(ids, self.source.exclude) if self.source.exclude.numel() else None
        if keep is not None and not bool(keep.any()):
            raise DataError(f"batch {index}: every token is excluded: exclude_tokens leaves nothing")
        dead = {name: self._dead(name) for name in self.saes}
        try:
            loss, outs = spliced_loss(self.model, self.saes, ids, keep, cfg.loss_fn, k, dead, self._sum)
        except DataError as error:
            raise DataError(f"batch {index}: {error}: the model's weights are broken, or the run diverged") from None
        if not bool(torch.isfinite(loss)):
            raise DataError(f"batch {index}: the {cfg.loss_fn} loss is {float(loss.detach())}; lower the learning rate")
        # The model's loss is a mean over this process's tokens, the others are shares of the whole batch's variance.
        loss, share = loss / self._replicas, 1 / cfg.grad_acc_steps
        (torch.stack([loss, *map(self._added, outs.values())]).sum() * share).backward()
        self.meters.add(cfg.loss_fn, loss.detach() * share)
        for name, out in outs.items():
            self._record(out, name, fired, tokens, share)

    def _update(self, fired: Mapping[str, Tensor], tokens: Tensor) -> None:
        if self._replicas > 1:
            self.processes.sum_(tokens, *fired.values())
            self.processes.sum_(*(p.grad for c in self.saes.values() for p in c.parameters() if p.grad is not None))
            # Running means, such as BatchTopK's threshold, are the first process's.
            self.processes.broadcast_(*(buffer for c in self.saes.values() for buffer in c.buffers()))
        self.optimiser.step(self.global_step)
        for place, (name, coder) in enumerate(self.saes.items()):
            coder.after_step()
            since = self.tokens_since_fired[name]
            since += tokens[place]
            since.masked_fill_(fired[name] > 0, 0)
            self.meters.add(f"tokens/{name}", tokens[place])
        self.meters.add("steps", torch.ones((), device=self.device))

    # ------------------------------------------------------------------ parts of a step

    @property
    def _replicas(self) -> int:
        """Processes that hold a copy of each coder."""
        return 1 if self.cfg.distribute_modules else self.processes.world

    def _precision(self) -> torch.autocast:
        # Products in bf16 double the encoder's speed where there are units for them; everything else stays fp32.
        cuda = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        wanted = self.cfg.precision == "bf16" or (self.cfg.precision == "auto" and cuda)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

    def _to_owner(self, hook: str, pair: Pair) -> Pair:
        owner = self.hookpoints.index(hook) // (len(self.hookpoints) // self.processes.world)
        x = self.processes.gather_rows(pair.x, owner)
        return Pair(x, x if pair.y is pair.x else self.processes.gather_rows(pair.y, owner))

    def _sum(self, own: Tensor) -> Tensor:
        """The sum over the processes that hold parts of a batch."""
        whole = own.clone()
        if self._replicas > 1:
            self.processes.sum_(whole)
        return whole

    def _initialise(self, coder: SparseCoder, pair: Pair) -> None:
        initialise(coder, pair, self.processes if self._replicas > 1 else None)

    def _dead(self, name: str) -> Tensor | None:
        # No latent can be dead yet, so don't look: looking waits for the device.
        if not self.cfg.auxk_alpha or self.tokens_seen <= self.cfg.dead_feature_threshold:
            return None
        return self.tokens_since_fired[name] > self.cfg.dead_feature_threshold

    def _averages(self) -> dict[str, float]:
        """Means over the interval since the last call."""
        averages = self.meters.averages(self.processes if self._replicas > 1 else None)
        for name, since in self.tokens_since_fired.items():
            # A latent silent for the whole interval counts as silent, one past AuxK's threshold as dead.
            averages[f"dead/{name}"] = float((since > self.cfg.dead_feature_threshold).double().mean())
            averages[f"silent/{name}"] = float((since >= averages[f"tokens/{name}"]).double().mean())
        averages["k"] = float(self.get_current_k())
        return self.processes.merge(averages) if self.cfg.distribute_modules else averages

    # ------------------------------------------------------------------ files

    def save(self) -> None:
        """Publish the coders and keep the state; safe to be killed in the middle."""
        with self._trained():
            improved = self._improved() if self.cfg.save_best else ()
            self._settle(True)
            for name, coder in self.saes.items():
                if self.cfg.distribute_modules or self.processes.first:
                    published = _checkpoint.published(coder, self.get_current_k())
                    save_coder(published, self.folder / name)
                    if name in improved:
                        save_coder(published, self.folder / "best" / name)
            self._settle(False)
            self.meters.saved()
            _checkpoint.write_state(self.folder, self.global_step, self._state(), self.processes)

    @contextmanager
    def _trained(self) -> Iterator[None]:
        """The weights that are trained, also after `fit`, which leaves the published ones."""
        settled = self._take_back is not None
        self._settle(False)
        try:
            yield
        finally:
            self._settle(settled)

    def _settle(self, published: bool) -> None:
        """Give the coders the published weights, or take the trained ones back."""
        if published and self._take_back is None:
            self._take_back = self.optimiser.settle()
            if self.cfg.optimizer == "signum":
                for coder in self.saes.values():
                    coder.after_step()  # an average of unit rows is shorter than one
        elif not published and self._take_back is not None:
            self._take_back()
            self._take_back = None

    def _improved(self) -> list[str]:
        """The coders whose loss since the last checkpoint is the best so far; end to end they share the model's."""
        found = []
        for name in self.saes:
            key = f"fvu/{name}" if self.cfg.loss_fn == "fvu" else self.cfg.loss_fn
            mean = self.meters.mean_since_save(key, self.processes if self._replicas > 1 else None)
            if mean < self.best[name]:
                found.append(name)
                self.best[name] = mean
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything a later process needs to go on as if there had been no interruption."""
        with self._trained():
            return deepcopy(self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.global_step,
            "tokens_seen": self.tokens_seen,
            "config": _checkpoint.described(self.cfg),
            "data": self.source.fingerprint(),
            "coders": {name: coder.state_dict() for name, coder in self.saes.items()},
            "optimiser": self.optimiser.state_dict(),
            "tokens_since_fired": self.tokens_since_fired,
            "best": self.best,
            "metrics": self.meters.interval,
        }

    def load_state(self, path: str | Path | None = None) -> None:
        """Take up the run in ``path``, this run's own folder by default.

        Raises:
            CheckpointError: there is none, or it was made with another configuration, data, or number of processes.
        """
        folder = self.folder if path is None else Path(path)
        state = _checkpoint.read_state(folder, self.device, self.processes)
        _checkpoint.check_same(state["config"], _checkpoint.described(self.cfg))
        _checkpoint.check_same({"data": state["data"]}, {"data": self.source.fingerprint()})
        if list(state["coders"]) != list(self.saes):
            raise CheckpointError(
                f"{folder} holds {', '.join(state['coders'])}, this run trains {', '.join(self.saes)}"
            )
        self._settle(False)
        self.global_step, self.tokens_seen = state["step"], state["tokens_seen"]
        for name, coder in self.saes.items():
            coder.load_state_dict(state["coders"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.tokens_since_fired = state["tokens_since_fired"]
        self.best, self.meters.interval = state["best"], state["metrics"]


SaeTrainer = Trainer
