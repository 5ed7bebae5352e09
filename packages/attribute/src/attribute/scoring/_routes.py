"""The planner: what each way to the same scores costs, and the cheapest of them.

Costs are multiplications a row of so many tokens; attention's own, the same in all of them, are left out. With P the
matrices of the model below its output embedding, A those after the first captured one, C the captured ones and H the
output embedding, a token costs

* backward: P + A + 2H, and then what it takes to meet the queries, by module (:func:`gradcore.product_costs`);
* forward mode: P + A + C for each query, as every product has two derivatives, and 2H.

Forward mode never costs less than factors that are contracted. It is the way to the scores of single tokens' losses, of
which each would need a backward pass of its own.

On one core of a Xeon, a Llama of width 256 and rows of 16 to 256 tokens, all routes took 0.11 to 0.17 ns a
multiplication, so that the cheapest by estimate was within a fifth of the fastest; at width 64 what is no product takes
up to three times as long.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from attribute.model import LanguageModel
from attribute.scoring import _forward_mode
from attribute.scoring._queries import Queries
from gradcore import MATRICES, Identity, product_costs
from gradcore.layers import layer_for

CONTRACTED, FORMED, MIXED, FORWARD, GHOST, SKETCHED = "contracted", "formed", "mixed", "forward", "ghost", "sketched"
DUAL = 1.2
"""Time of a forward-mode pass, by that of its products alone: 1.0 to 1.5, as norms, activations and attention have a
derivative, too."""


@dataclass(frozen=True)
class Route:
    """One way to the scores of a row.

    Attributes:
        kind: its name.
        cost: multiplications a row, passes of the model included.
        words: what happens, for the person who waits.
    """

    kind: str
    cost: float
    words: str

    @property
    def product(self) -> str:
        """How a row's factors meet matrices; ``""`` leaves it to each module."""
        return self.kind if self.kind in (CONTRACTED, FORMED) else ""


@dataclass(frozen=True)
class Plan:
    """The routes that give these scores, the cheapest first; the first one is taken.

    >>> str(Plan((Route("contracted", 2.5e6, "factors contracted"), Route("formed", 4e6, "formed")), 64))
    'factors contracted; 2.5 M multiplications a row of 64 tokens (formed: 4.0 M)'
    """

    routes: tuple[Route, ...]
    positions: int

    @property
    def route(self) -> Route:
        """The one that is taken."""
        return self.routes[0]

    def __str__(self) -> str:
        others = ", ".join(f"{each.kind}: {_millions(each.cost)}" for each in self.routes[1:])
        cost = f"{_millions(self.route.cost)} multiplications a row of {self.positions} tokens"
        return f"{self.route.words}; {cost}{f' ({others})' if others else ''}"


def plan_routes(queries: Queries, model: LanguageModel, positions: int) -> Plan:
    """What can be done for these queries with rows of so many tokens, and what it costs."""
    config, count = queries.config, len(queries)
    many = f"{count} {'query' if count == 1 else 'queries'}"
    forward, above, captured, head = _passes(model, queries)
    backward = positions * (forward + above + 2 * head)
    dual = Route(
        FORWARD,
        float(count * positions * (DUAL * (forward + above + captured) + 2 * head)),
        f"forward-mode derivatives along {many}: each gives the change of every token's loss",
    )
    if config.tokens == "output":
        return Plan((dual,), positions)
    if not isinstance(queries.plan.sketch, Identity):
        width = queries.plan.width
        return Plan(
            (Route(SKETCHED, float(backward + count * width), f"sketched rows of {width:,} floats times {many}"),),
            positions,
        )
    if config.query_rank:
        words = f"ghost products of factors with {many} of rank {config.query_rank}"
        return Plan((Route(GHOST, backward + _ghost(queries, positions), words),), positions)
    costs = _meetings(queries, positions)
    found = [
        Route(CONTRACTED, backward + costs[CONTRACTED], f"factors contracted with {many}: no gradient is formed"),
        Route(FORMED, backward + costs[FORMED], f"gradients formed module by module, times {many}"),
    ]
    if costs[MIXED] < min(costs[CONTRACTED], costs[FORMED]):
        words = f"factors contracted or gradients formed, whichever is cheaper for a module, times {many}"
        found.append(Route(MIXED, backward + costs[MIXED], words))
    if not (config.tokens or config.unit_normalize or _forward_mode.impossible(model, queries.plan)):
        found.append(dual)
    return Plan(tuple(sorted(found, key=lambda each: each.cost)), positions)  # the sort is stable: ties in this order


def _passes(model: LanguageModel, queries: Queries) -> tuple[int, int, int, int]:
    """Multiplications a token of P, A, C and H."""
    sizes = {name: _size(module) for name, module in model.base.named_modules()}
    captured = {each.path for each in queries.plan.modules}
    order = list(sizes)
    first = min((order.index(path) for path in captured if path in sizes), default=len(order))
    head = _size(model.model.get_output_embeddings())  # type: ignore[operator]
    planned = sum(each.out_features * each.in_features for each in queries.plan.modules if each.kind in MATRICES)
    return sum(sizes.values()), sum(sizes[name] for name in order[first + 1 :]), planned, head


def _size(module: nn.Module) -> int:
    """Multiplications a token of a linear layer itself; others have none to speak of."""
    layer = layer_for(module)
    if layer is None or layer.kind not in MATRICES or layer.kind == "experts":
        return 0
    out, into = layer.shape(module, False)
    return out * into


def _meetings(queries: Queries, positions: int) -> dict[str, float]:
    """Multiplications a row in which factors meet the queries. A token that is scored is an example of one position."""
    examples, each = (positions, 1) if queries.config.tokens else (1, positions)
    totals: dict[str, float] = {CONTRACTED: 0.0, FORMED: 0.0, MIXED: 0.0}
    for module in queries.plan.modules:
        shape = (module.out_features, module.in_features)
        costs = product_costs(*shape, each, len(queries), norms=queries.config.unit_normalize)
        if module.elementwise or module.kind == "embedding":  # whose way is the same whatever is chosen
            costs = dict.fromkeys(costs, float(len(queries) * module.in_features))
        for kind, cost in {**costs, MIXED: min(costs.values())}.items():
            totals[kind] += examples * cost
    return totals


def _ghost(queries: Queries, positions: int) -> float:
    """Multiplications a row to meet queries of low rank, whose factors are kept where they are the smaller."""
    rank, count = queries.config.query_rank, len(queries)
    total = 0.0
    for module in queries.plan.modules:
        out, into = module.out_features, module.in_features
        whole = min(product_costs(out, into, positions, count).values())
        low = float(count * positions * rank * (out + into))
        total += min(low, whole) if rank * (out + into) < out * into else whole
    return total


def _millions(cost: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if cost >= size:
            return f"{cost / size:.3g} {unit}"
    return f"{cost / 1e6:.1f} M" if cost >= 1e5 else f"{cost:,.0f}"
