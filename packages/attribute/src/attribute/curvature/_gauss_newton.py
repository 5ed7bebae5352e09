"""Products with the generalised Gauss-Newton matrix, exact and matrix-free: H x = E_rows[Jᵀ (diag p − p pᵀ) J x].

J x by forward mode through the base model, the middle factor over the vocabulary, and Jᵀ by a backward pass (Martens
2020, section 8; Pearlmutter 1994), for many directions at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribute._errors import AttributionError
from attribute.batching import Batch
from attribute.engine import evaluating
from attribute.model import LanguageModel
from gradcore import IGNORE, CapturePlan, Identity

AT_ONCE = 1 << 27
"""Floats that the passes of one batch may keep for all directions together, about."""
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
        with evaluating(self.model), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own scripted derivatives, and of vmap's loops
            for batch in self.batches:
                step = max(1, AT_ONCE // (batch.input_ids.numel() * self._floats_a_token))
                for first in range(0, len(directions), step):
                    some = slice(first, first + step)
                    out[some] += self._of_batch(batch, directions[some]).to(out.dtype)
        return out / sum(len(batch.rows) for batch in self.batches)

    @property
    def _floats_a_token(self) -> int:
        """What a pass keeps of a token and direction, about."""
        outputs = sum(each.out_features for each in self.plan.modules if each.kind != "embedding" and not each.tied)
        return 3 * outputs + 2 * self._head.weight.shape[0]

    def _of_batch(self, batch: Batch, directions: Tensor) -> Tensor:
        """Σ over the batch's rows for all directions at once: one forward pass serves every J x, another every Jᵀ."""
        base, ids = self.model.base, batch.input_ids
        every = self.directions(directions)
        head = {each for path in self.model.outside for each in (f"{path}.weight", f"{path}.bias")}
        tangents = {name: tangent for name, tangent in every.items() if name not in head}
        turned = {name.rpartition(".")[2]: tangent for name, tangent in every.items() if name in head}
        primals = {name: base.get_parameter(name).detach() for name in tangents}

        def hidden_of(parameters: dict[str, Tensor]) -> Tensor:
            return functional_call(base, parameters, kwargs={"input_ids": ids, "use_cache": False})[0]

        change: Tensor | None = None
        if tangents:
            with torch.no_grad():
                change = vmap(lambda tangent: jvp(hidden_of, (primals,), (tangent,))[1])(tangents)
        leaves = {name: primal.requires_grad_() for name, primal in primals.items()}
        with torch.enable_grad():
            hidden = hidden_of(leaves)
        if change is None:
            change = hidden.new_zeros(len(directions), *hidden.shape)
        counted, push = self._vocabulary(hidden.detach(), change, turned, batch.labels)  # [q, t, v]
        found = dict[str, Tensor]()
        if tangents:
            back = torch.zeros_like(change)
            back[:, counted] = (push @ self._head.weight.float()).to(change.dtype)
            gradients = torch.autograd.grad(
                hidden, tuple(leaves.values()), back, is_grads_batched=True, allow_unused=True, materialize_grads=True
            )
            found.update(zip(leaves, gradients))
        if turned:
            (path,) = self.model.outside
            found[f"{path}.weight"] = push.mT @ hidden.detach()[counted].float()
            if "bias" in turned:
                found[f"{path}.bias"] = push.sum(1)
        return self.columns(found)

    @property
    def _head(self) -> nn.Linear:
        return self.model.model.get_output_embeddings()  # type: ignore[no-any-return,operator]

    def _vocabulary(
        self, hidden: Tensor, change: Tensor, turned: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Where a token carries loss ``[n, s]``, and (diag p − p pᵀ) dl there ``[q, t, v]``, dl = W dh + dW h + db."""
        head = self._head
        counted = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
        counted[:, :-1] = labels[:, 1:] != IGNORE
        some = hidden[counted]
        with torch.no_grad():
            p = nn.functional.linear(some, head.weight, head.bias).float().softmax(-1)
            moved = change[:, counted].float() @ head.weight.float().T
            if turned:
                moved += some.float() @ turned["weight"].float().mT
                moved += turned["bias"].float()[:, None] if "bias" in turned else 0.0
            moved -= (moved[..., None, :] @ p[..., None]).squeeze(-1)
            push = moved.mul_(p)
        if self.plan.reduction == "mean":
            push /= counted.sum(1).clamp(min=1)[:, None].expand(counted.shape)[counted][:, None]
        return counted, push

    def directions(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows ``[q, width]`` as parameter name → directions ``[q, …]`` in the parameter's own shape."""
        found = dict[str, Tensor]()
        for planned in self.plan.modules:
            matrix = rows[:, self.plan.slices[planned.name]].unflatten(1, (planned.out_features, planned.in_features))
            weight = self.model.module(planned.path).get_parameter("weight")
            if planned.bias:
                found[f"{planned.path}.bias"] = matrix[..., -1].to(weight.dtype)
                matrix = matrix[..., :-1]
            matrix = matrix.mT if planned.kind == "hf_conv1d" else matrix
            for path in (planned.path, *planned.tied):
                found[f"{path}.weight"] = matrix.reshape(-1, *weight.shape).to(weight.dtype)
        return found

    def columns(self, gradients: dict[str, Tensor]) -> Tensor:
        """The transpose of :meth:`directions`: what each use of a tied weight gives is added."""
        parts: list[Tensor] = []
        for planned in self.plan.modules:
            uses = [gradients[f"{path}.weight"] for path in (planned.path, *planned.tied)]
            matrix = torch.stack([each.float() for each in uses]).sum(0) if len(uses) > 1 else uses[0].float()
            matrix = matrix.mT if planned.kind == "hf_conv1d" else matrix
            matrix = matrix.reshape(len(matrix), planned.out_features, -1)
            if planned.bias:
                matrix = torch.cat((matrix, gradients[f"{planned.path}.bias"].float()[..., None]), dim=2)
            parts.append(matrix.flatten(1))
        return torch.cat(parts, dim=1)
