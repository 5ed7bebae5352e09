"""Products with the generalised Gauss-Newton matrix, exact and matrix-free: H x = E_rows[Jᵀ (diag p − p pᵀ) J x].

J x by forward mode through the base model, the middle factor over the vocabulary, and Jᵀ by a backward pass under a
collector, so that the result is in the columns of the plan (Martens 2020, section 8; Pearlmutter 1994).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribute._errors import AttributionError
from attribute.batching import Batch
from attribute.engine import evaluating
from attribute.model import LanguageModel
from gradcore import IGNORE, CapturePlan, Identity

_KINDS = ("linear", "hf_conv1d", "embedding", "layer_norm", "rms_norm")


@dataclass(frozen=True)
class GaussNewton:
    """The Gauss-Newton matrix of the rows of some batches, mean over rows.

    Args:
        model: with a plain output head.
        plan: whole gradients.
        batches: the rows it is the mean of.

    Raises:
        AttributionError: a head that rescales its logits, a sketch, or a module whose parameters are not known.
    """

    model: LanguageModel
    plan: CapturePlan
    batches: Sequence[Batch]

    def __post_init__(self) -> None:
        if not self.model.fused:
            raise AttributionError("the Gauss-Newton product needs logits that are the output head and nothing else")
        if not isinstance(self.plan.sketch, Identity):
            raise AttributionError("the Gauss-Newton product needs whole gradients: no sketch")
        if odd := [each.name for each in self.plan.modules if each.kind not in _KINDS or each.head is not None]:
            raise AttributionError(f"the direction of {odd[0]} in its parameters is not known: --exclude it")

    def multiply(self, directions: Tensor) -> Tensor:
        """``[q, width]`` to H times each, ``[q, width]``."""
        out = torch.zeros_like(directions)
        with evaluating(self.model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for place, direction in enumerate(directions):
                for batch in self.batches:
                    out[place] += self._one(batch, direction).to(out.dtype)
        return out / sum(len(batch.rows) for batch in self.batches)

    def _one(self, batch: Batch, direction: Tensor) -> Tensor:
        base, ids = self.model.base, batch.input_ids
        every = self.directions(direction)
        head = {each for path in self.model.outside for each in (f"{path}.weight", f"{path}.bias")}
        tangents = {name: tangent for name, tangent in every.items() if name not in head}
        primals = {name: base.get_parameter(name).detach() for name in tangents}

        def hidden_of(parameters: dict[str, Tensor]) -> Tensor:
            return functional_call(base, parameters, kwargs={"input_ids": ids, "use_cache": False})[0]

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch warns about its own scripted derivatives
            hidden, change = jvp(hidden_of, (primals,), (tangents,))[:2]
            turned = {name.rpartition(".")[2]: tangent for name, tangent in every.items() if name in head}
            counted, push = self._vocabulary(hidden, change, turned, batch.labels)
        with self.model.collector(self.plan) as collector:
            hidden = base(input_ids=ids, use_cache=False)[0]
            if turned:  # through the head's own forward pass, where the collector sees it
                (output,) = self.model.outside.values()
                whole = push.new_zeros(*counted.shape, push.shape[-1])
                whole[counted] = push
                output(hidden).backward(whole.to(hidden.dtype))
            else:
                weight = self._head.weight.float()
                back = torch.zeros_like(hidden)
                back[counted] = (push @ weight).to(hidden.dtype)
                hidden.backward(back)
            return collector.take().sum(0)

    @property
    def _head(self) -> nn.Linear:
        return self.model.model.get_output_embeddings()  # type: ignore[no-any-return,operator]

    def _vocabulary(
        self, hidden: Tensor, change: Tensor, turned: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Where a token carries loss ``[n, s]``, and (diag p − p pᵀ) dl there, with dl = W dh + dW h + db."""
        head = self._head
        counted = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
        counted[:, :-1] = labels[:, 1:] != IGNORE
        some = hidden[counted]
        p = nn.functional.linear(some, head.weight, head.bias).float().softmax(-1)
        moved = change[counted].float() @ head.weight.float().T
        if turned:
            moved += some.float() @ turned["weight"].float().T
            moved += turned["bias"].float() if "bias" in turned else 0.0
        push = p * (moved - (p * moved).sum(-1, keepdim=True))
        if self.plan.reduction == "mean":
            push /= counted.sum(1).clamp(min=1)[:, None].expand(counted.shape)[counted][:, None]
        return counted, push

    def directions(self, row: Tensor) -> dict[str, Tensor]:
        """A row ``[width]`` as parameter name → direction in the parameter's own shape."""
        found = dict[str, Tensor]()
        for planned in self.plan.modules:
            matrix = row[self.plan.slices[planned.name]].reshape(planned.out_features, planned.in_features)
            weight = self.model.module(planned.path).get_parameter("weight")
            if planned.bias:
                found[f"{planned.path}.bias"] = matrix[:, -1].to(weight.dtype)
                matrix = matrix[:, :-1]
            matrix = matrix.T if planned.kind == "hf_conv1d" else matrix
            for path in (planned.path, *planned.tied):
                found[f"{path}.weight"] = matrix.reshape(weight.shape).to(weight.dtype)
        return found
