"""The frozen prefix, computed once: what the masks cannot change is cached, only the rest runs in the loop.

Three savings, none of which may change a result:

1. everything before the first masked block is cached as that block's (or sub-block's) arguments;
2. inside, modules that no mask reaches – above all the products xW of the first masked layers – replay stored outputs;
3. the rest runs on the probed positions only, where the layers involved work position by position; masks of an
   attention's queries, keys and values become scales of one query and one output a row (`FoldedAttention`).

What is constant and what works position by position is not assumed but tried out on a few rows, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from probing._attention import AttentionCall, FoldedAttention, difference, fold, probed_queries
from probing._data import ProbeData, take
from probing._errors import SiteError
from probing._intervene import Intervention, intervened
from probing._rows import common_path, joined, map_rows, padded_row, same
from probing._sites import Site
from probing._tensors import copied_arguments, first_tensor, hidden_states, map_tensors, model_device, with_hidden

if TYPE_CHECKING:
    from probing._probes import _Probe


class _Stop(Exception):
    """The readout has been seen; the rest of the model need not run."""


# What `NewGELUActivation` spells out in eight operations and fifteen copies, in one; equal to rounding.
_gelu = partial(nn.functional.gelu, approximate="tanh")

_Selection = Literal["root", "queries", "source", None]
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class FullModel:
    """The slow way: the whole model, every time. `Prefix` must agree with it."""

    def __init__(self, probe: _Probe[Any], data: ProbeData) -> None:
        self.probe, self.data = probe, data

    def vectors(self, rows: Tensor) -> Tensor:
        """Readout vectors of these rows under the current masks, [R, d]."""
        inputs = take(self.data.inputs, rows)
        return self.probe.vectors(self.data.token_mask[rows], **inputs)


class Prefix:
    """Readout vectors from a cached prefix.

    >>> prefix = Prefix(probe, data)  # doctest: +SKIP
    >>> prefix.vectors(torch.arange(500)).shape  # doctest: +SKIP
    torch.Size([500, 768])

    Args:
        probe: whose masks and readout.
        data: the rows that will be asked for; at least three, to tell row axes from others.
        batch_size: rows at a time while the cache is filled.

    Raises:
        SiteError: a mask that the readout cannot see, or one before the blocks.
    """

    def __init__(self, probe: _Probe[Any], data: ProbeData, batch_size: int = 256) -> None:
        probe.check(data.token_mask, data.inputs)
        self.probe, self.data = probe, data
        self._modules = dict(probe.base.named_modules())
        self._sites = probe.circuit.sites
        self._chain, self._source = self._find_chain()
        self._padded = padded_row(data)
        inside = [m for root in self._chain for m in self._modules[root].modules()]
        exact = next(probe.base.parameters()).dtype in (torch.float32, torch.float64)  # half precision rounds each step
        self._gelus = [module for module in inside if exact and type(module) is NewGELUActivation]
        self._selects: _Selection = None
        self._selects = self._find_selection()
        # Models build another mask, or none, for batches without padding: each batch here has the same padded row more.
        extra = torch.tensor([], dtype=torch.long) if self._padded is None else torch.tensor([self._padded])
        parts = [torch.cat([part, extra]) for part in torch.arange(len(data)).split(batch_size)]
        two, three = (torch.cat([torch.arange(size), extra]) for size in (2, 3))
        self._fold = self._find_fold([*parts, self._few()])
        self._calls: list[_Arguments] = []
        self._stored: dict[str, Any] = {}
        self._fixed = self._find_fixed()
        if self._fold is not None:
            return
        entries = (self._entries(two), self._entries(three), self._entries(extra))
        parts += [two, three]
        entered = [self._enter(part) for part in parts]
        ones = [Intervention(site, torch.ones(site.shape, device=self._device(site))) for site in self._sites]

        def constants(part: Tensor, calls: list[_Arguments]) -> dict[str, Any]:
            outputs = self._outputs(part, ones, calls) if self._fixed else {}
            return {path: outputs[path] for path in self._fixed}

        raw = [constants(part, calls) for part, calls in zip(parts, entered)]
        self._calls = joined(entered[:-2], entered[-2], entered[-1], entries)
        self._stored = joined(raw[:-2], raw[-2], raw[-1], entries)

    @property
    def cached_bytes(self) -> int:
        """Memory held by the cache."""
        total = 0

        def count(rows: Tensor) -> Tensor:
            nonlocal total
            total += rows.numel() * rows.element_size()
            return rows

        if self._fold is not None:
            return sum(t.numel() * t.element_size() for t in vars(self._fold.call).values() if isinstance(t, Tensor))
        map_rows((self._calls, self._stored), count)
        return total

    def vectors(self, rows: Tensor, interventions: list[Intervention] | None = None) -> Tensor:
        """Readout vectors of these rows, [R, d], under the current masks or under other interventions."""
        given = self.probe.circuit.interventions() if interventions is None else interventions
        if interventions is None and any(item.weights is not None for item in given):
            return FullModel(self.probe, self.data).vectors(rows)  # other weights: what is cached was made with the old
        index = self.data.positions_of(rows) if self._selects == "root" else rows
        index = index.to(self.data.token_mask.device)
        if self._fold is not None:
            return self._folded(index, given)
        with intervened(self.probe.base, given), ExitStack() as stack:
            for module in self._gelus:
                stack.enter_context(_forward(module, _gelu))
            for path, value in map_rows(self._stored, lambda stored: stored.index_select(0, index)).items():
                stack.enter_context(_forward(self._modules[path], lambda *_, value=value, **__: value))
            return self._run(map_rows(self._calls, lambda stored: stored.index_select(0, index)), rows)

    def _folded(self, index: Tensor, given: Sequence[Intervention]) -> Tensor:
        folded = self._fold
        assert folded is not None
        keeps = {site.path: torch.ones(site.shape, device=self._device(site)) for site in self._off(given)}
        keeps |= {item.site.path: item.keep for item in given}
        heads = folded.heads([keeps[path] for path in folded.sites], index)
        with intervened(self.probe.base, [item for item in given if item.site.path not in folded.sites]):
            found = first_tensor(self._modules[str(self._source)](heads))
        assert found is not None
        return found

    def _off(self, given: Sequence[Intervention]) -> list[Site]:
        on = {item.site.path for item in given}
        return [site for site in self._sites if site.path not in on]

    # Where the masks and the readout are

    def _find_chain(self) -> tuple[list[str], str | None]:
        """The smallest module around all masks and the readout, or block after block if they are in several; and the
        module whose first output is the readout, where there is one.
        """
        readout = self.probe.readout
        layout = next(entry for entry in self.probe.wrapped_model.layouts if entry.index == readout.layer)
        source = {"attn_update": layout.sources[0], "mlp_update": layout.sources[1]}.get(readout.kind)
        if source and any(source.startswith(f"{site.path}.") for site in self._sites):
            # A mask on the module around it: its output, not the inner one's, is what is added to the stream.
            source = layout.attn if readout.kind == "attn_update" else layout.mlp
        stack = layout.path.rpartition(".")[0] + "."
        paths = [*(site.path for site in self._sites), source or layout.path]
        for path in paths:
            if not path.startswith(stack):
                raise SiteError(
                    f"{path!r} lies outside the blocks {stack[:-1]!r}, so no prefix can be cached; pass cache=False"
                )
        blocks = [int(path.removeprefix(stack).split(".")[0]) for path in paths]
        if max(blocks) > layout.index:
            late = paths[blocks.index(max(blocks))]
            raise SiteError(f"{late!r} lies behind the readout {readout.key!r}, so its mask could not be trained")
        if min(blocks) == layout.index:
            return [common_path(paths)], source
        return [f"{stack}{index}" for index in range(min(blocks), layout.index + 1)], source

    def _device(self, site: Site) -> torch.device:
        return model_device(self._modules[site.path])

    def _entries(self, rows: Tensor) -> int:
        return len(self.data.positions_of(rows)) if self._selects == "root" and len(rows) else len(rows)

    # Running the chain

    @torch.no_grad()
    def _enter(self, rows: Tensor) -> list[_Arguments]:
        """Arguments of each module in the chain, for these rows; the base model runs only that far."""
        calls: dict[str, _Arguments] = {}

        def remember(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls[path] = copied_arguments(args, kwargs)
                if path == self._chain[-1]:
                    raise _Stop

            return hook

        with ExitStack() as stack:
            for path in self._chain:
                hook = self._modules[path].register_forward_pre_hook(remember(path), with_kwargs=True)
                stack.callback(hook.remove)
            with suppress(_Stop):
                self.probe.base(**take(self.data.inputs, rows))
        if self._chain[-1] not in calls:
            raise SiteError(
                f"{self._chain[-1]!r} is not called by this model on this data: no mask there can be trained"
            )
        found = [calls[path] for path in self._chain]
        if self._selects == "root":
            found[0] = self._probed_only(found[0], rows)
        return found

    def _probed_only(self, call: _Arguments, rows: Tensor) -> _Arguments:
        given = hidden_states(*call)
        assert given is not None
        return with_hidden(*call, given[self.data.token_mask[rows]][:, None])

    def _run(self, calls: list[_Arguments], rows: Tensor) -> Tensor:
        """The chain under whatever masks are installed: the readout at the probed positions of these rows, [R, d]."""
        mask, readout = self.data.token_mask[rows], self.probe.readout
        found: Tensor | None = None

        def stop(_: nn.Module, args: Any, out: Any) -> None:
            nonlocal found
            found = first_tensor(out)
            raise _Stop

        with ExitStack() as stack:
            cache = {} if self._source else stack.enter_context(self.probe.wrapped_model.tap.open())
            if self._source:
                module = self._modules[self._source]
                stack.callback(module.register_forward_hook(stop).remove)
                if self._selects == "source":
                    inner = module.forward
                    stack.enter_context(_forward(module, lambda x: inner(x[mask])))
                if self._selects == "queries":
                    stack.enter_context(probed_queries(self._block(), mask))
            hidden: Tensor | None = None
            try:
                for path, call in zip(self._chain, calls):
                    args, kwargs = call if hidden is None else with_hidden(*call, hidden)
                    hidden = first_tensor(self._modules[path](*args, **kwargs))
            except _Stop:
                pass
            except AttentionCall as reached:
                with suppress(_Stop):
                    self._modules[str(self._source)](reached.heads())
        found = cache[readout.key] if found is None else found
        if self._selects == "root":
            found = found[:, 0]
        elif self._selects is None:
            found = found.reshape(*mask.shape, *found.shape[found.ndim - 1 :])[mask] if found.ndim < 4 else found[mask]
        return found.flatten(1)

    # Trying out what is constant and what works position by position

    def _few(self) -> Tensor:
        others = [row for row in range(4) if row != self._padded][:3]
        return torch.tensor(others if self._padded is None else [*others[:2], self._padded])

    def _block(self) -> nn.Module:
        readout = self.probe.readout
        layout = next(entry for entry in self.probe.wrapped_model.layouts if entry.index == readout.layer)
        return self._modules[layout.path]

    def _random(self, seed: int) -> list[Intervention]:
        draw = torch.Generator().manual_seed(seed)
        return [Intervention(s, torch.rand(s.shape, generator=draw).to(self._device(s))) for s in self._sites]

    @torch.no_grad()
    def _find_selection(self) -> _Selection:
        """Whether the whole chain, or at least the readout's module, may run on the probed positions alone."""
        if self._source is None:
            return None
        rows = self._few()
        with intervened(self.probe.base, self._random(0)):
            expected = self._run(self._enter(rows), rows)
            for choice in ("root", "queries", "source"):
                self._selects = choice
                try:
                    if choice == "root" and not self._one_tensor(rows):
                        continue
                    if choice == "queries" and not self.data.single:
                        continue
                    found = self._run(self._enter(rows), rows)
                except (RuntimeError, ValueError, IndexError, TypeError):
                    continue  # a layer that insists on whole sequences
                finally:
                    self._selects = None
                if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-6):
                    return choice
        return None

    @torch.no_grad()
    def _find_fold(self, parts: Sequence[Tensor]) -> FoldedAttention | None:
        """The attention with its masks folded into scales, over all rows, if that is what they are."""
        first = [site for site in self._sites if site.unit == "neuron" and site.path != self._source]
        if self._selects != "queries" or len(self._chain) > 1 or not first or self.probe.circuit.config.mask_bias:
            return None
        others = [
            Intervention(site, torch.ones(site.shape, device=self._device(site)))
            for site in self._sites
            if site not in first
        ]

        def call(rows: Tensor, entered: list[_Arguments], keeps: Sequence[Tensor]) -> AttentionCall | None:
            masks = [Intervention(site, keep.to(self._device(site))) for site, keep in zip(first, keeps)]
            ((args, kwargs),) = entered
            with intervened(self.probe.base, [*masks, *others]):
                try:
                    with probed_queries(self._block(), self.data.token_mask[rows]):
                        self._modules[self._chain[0]](*args, **kwargs)
                except AttentionCall as reached:
                    return reached
            return None

        few = self._enter(parts[-1])
        found = fold([(site.path, site.units) for site in first], lambda keeps: call(parts[-1], few, keeps))
        if found is None:
            return None
        extra = 0 if self._padded is None else 1
        calls = []
        for part in parts[:-1]:
            entered = self._enter(part)
            on, off = (
                call(part, entered, [value(site.units) for site in first]) for value in (torch.ones, torch.zeros)
            )
            assert on is not None
            assert off is not None
            calls.append(difference(on, off))
        whole = {
            name: torch.cat([getattr(each, name)[: len(part) - extra] for each, part in zip(calls, parts)])
            for name in ("query", "key", "value", "bias")
        }
        return replace(found, call=replace(found.call, **whole))

    def _one_tensor(self, rows: Tensor) -> bool:
        if len(self._chain) > 1:
            return False
        self._selects = None
        ((args, kwargs),) = self._enter(rows)
        self._selects = "root"
        count = 0

        def seen(tensor: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return tensor

        map_tensors((args, kwargs), seen)
        given = hidden_states(args, kwargs)
        return count == 1 and given is not None and given.shape[:2] == self.data.token_mask[rows].shape

    @torch.no_grad()
    def _find_fixed(self) -> list[str]:
        """Topmost modules with parameters whose raw output no mask changes: they will replay what they once gave."""
        first, second = (self._outputs(self._few(), self._random(seed)) for seed in (0, 1))
        for site in self._sites:
            if site.path not in first:
                raise SiteError(
                    f"{site.path!r} is not called exactly once on the way to {self.probe.readout.key!r}, so its mask "
                    "cannot be trained from a cache; unmask it or pass cache=False"
                )
        fixed: list[str] = []
        for path in sorted(first, key=lambda p: p.count(".")):
            module = self._modules[path]
            own = [site for site in self._sites if site.path == path]
            if (
                path not in self._chain[1:]
                and next(module.parameters(), None) is not None
                and not any(path.startswith(f"{other}.") for other in fixed)
                and not any(site.path.startswith(f"{path}.") for site in self._sites)
                and all(site.unit in ("neuron", "module") for site in own)
                and not (path == self._source and self._selects in ("source", "queries"))
                and same(first[path], second.get(path))
            ):
                fixed.append(path)
        return fixed

    @torch.no_grad()
    def _outputs(
        self, rows: Tensor, interventions: list[Intervention], calls: list[_Arguments] | None = None
    ) -> dict[str, Any]:
        """Raw outputs of all modules called once in the chain, before the masks on them."""
        seen: dict[str, Any] = {}
        twice: set[str] = set()

        def watch(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, out: Any) -> None:
                if path in seen:
                    twice.add(path)
                seen[path] = map_tensors(out, torch.clone)

            return hook

        # Copies: a module that works in place must not spoil the cache.
        calls = self._enter(rows) if calls is None else [copied_arguments(*call) for call in calls]
        with intervened(self.probe.base, interventions), ExitStack() as stack:
            for root in self._chain:
                for name, module in self._modules[root].named_modules():
                    hook = watch(f"{root}.{name}" if name else root)
                    stack.callback(module.register_forward_hook(hook, prepend=True).remove)
            self._run(calls, rows)
        return {path: out for path, out in seen.items() if path not in twice}


@contextmanager
def _forward(module: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    """``module`` computes something else while the context lasts; its hooks still run."""
    module.forward = replacement  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
