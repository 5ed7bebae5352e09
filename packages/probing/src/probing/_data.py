"""What a probe is asked about: inputs, the positions looked at, and their labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from probing._errors import DataError


@dataclass(frozen=True, eq=False)
class ProbeData:
    """Rows of a probing task, checked at the door.

    >>> data = ProbeData.at_last({"input_ids": torch.ones(4, 3, dtype=torch.long)}, torch.tensor([0, 1, 0, 1]))
    >>> data.token_mask[0]
    tensor([False, False,  True])

    Attributes:
        inputs: the model's keyword arguments, batched along their first axis.
        labels: one label per probed position, [R], in row-major order; never padding.
        token_mask: [rows, positions], True where the model is probed.

    Raises:
        DataError: lengths that disagree, a mask that selects nothing or padding, labels of one class only.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    token_mask: Tensor

    def __post_init__(self) -> None:
        if not self.inputs:
            raise DataError("no inputs: pass the model's keyword arguments, such as {'input_ids': ids}")
        lengths = {name: len(tensor) for name, tensor in self.inputs.items()} | {"token_mask": len(self.token_mask)}
        if len(set(lengths.values())) > 1:
            raise DataError(f"the inputs' first axes disagree: {lengths}")
        object.__setattr__(self, "labels", select_labels(self.labels, self.token_mask))
        check_labels(self.labels)
        check_attended(self.token_mask, self.inputs)

    @classmethod
    def at_last(cls, inputs: Mapping[str, Tensor], labels: Tensor, of: str = "") -> ProbeData:
        """Probe each row at its last token that is not padding (by the attention mask, if there is one).

        Args:
            inputs, labels: as for the class.
            of: the input whose positions are meant, where there are two: ``"decoder_input_ids"`` for readouts of an
                encoder-decoder's decoder. By default ``input_ids``, or the first.
        """
        of = of or ("input_ids" if "input_ids" in inputs else next(iter(inputs)))
        if of not in inputs:
            raise DataError(f"of={of!r} names none of the inputs: {', '.join(inputs)}")
        shown = "decoder_attention_mask" if of.startswith("decoder") else "attention_mask"
        return cls(inputs, labels, last_token_mask(inputs[of], inputs.get(shown)))

    def __len__(self) -> int:
        return len(self.token_mask)

    @cached_property
    def counts(self) -> Tensor:
        """Probed positions per row."""
        return self.token_mask.sum(1)

    @cached_property
    def single(self) -> bool:
        """Whether each row has exactly one probed position."""
        return bool((self.counts == 1).all())

    @cached_property
    def _ends(self) -> Tensor:
        return self.counts.cumsum(0)

    def classes(self) -> int:
        """The largest label plus one."""
        return int(self.labels.max()) + 1

    def subset(self, rows: Tensor) -> ProbeData:
        """Only these rows, in this order."""
        return ProbeData(
            {name: tensor[rows] for name, tensor in self.inputs.items()}, self.labels_of(rows), self.token_mask[rows]
        )

    def labels_of(self, rows: Tensor) -> Tensor:
        """Labels of these rows, in this order."""
        return self.labels[self.positions_of(rows)]

    def positions_of(self, rows: Tensor) -> Tensor:
        """Where in ``labels`` (and in any [R, …] of probed vectors) these rows are."""
        if self.single:
            return rows
        counts, ends = self.counts, self._ends
        return torch.cat([torch.arange(int(ends[r] - counts[r]), int(ends[r])) for r in rows.tolist()])

    def to(self, device: torch.device | str) -> ProbeData:
        """The same rows on a device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return ProbeData(inputs, self.labels.to(device), self.token_mask.to(device))


def last_token_mask(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """True at each row's last attended position.

    >>> last_token_mask(torch.ones(2, 3), torch.tensor([[1, 1, 0], [0, 1, 1]]))
    tensor([[False,  True, False],
            [False, False,  True]])
    """
    attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = torch.arange(attended.shape[1], device=attended.device)
    last = (attended.bool() * (positions + 1)).amax(1) - 1
    if bool((last < 0).any()):
        raise DataError(f"row {int((last < 0).nonzero()[0])} is all padding, so it has no last token")
    return positions == last[:, None]


_MOST = 1 << 24
"""Classes; more are taken for labels that were never numbered."""


def as_labels(labels: Any) -> Tensor:
    """Class numbers as int64, from any integer or boolean tensor, array or list.

    >>> as_labels([True, False])
    tensor([1, 0])

    Raises:
        DataError: not numbers, no whole numbers, or numbers far too large for classes.
    """
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"labels must be whole numbers, one a probed position: {error}") from None
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(f"labels must be integers, found {labels.dtype}")
    if labels.numel() and int(labels.max()) >= _MOST:
        raise DataError(f"label {int(labels.max())} is no class number: number the classes from 0 (torch.unique does)")
    return labels.long()


def most_frequent(labels: Tensor) -> float:
    """The share of the most frequent label: what always answering it would score."""
    return float(labels.unique(return_counts=True)[1].max() / len(labels))


def select_labels(labels: Any, token_mask: Tensor) -> Tensor:
    """Labels without padding (anything negative), one per probed position, as int64.

    Raises:
        DataError: the mask selects nothing, or the counts or places disagree.
    """
    labels = as_labels(labels)
    if token_mask.dtype != torch.bool or token_mask.ndim != 2:
        raise DataError(
            f"token_mask must be boolean [rows, positions]; found {token_mask.dtype} {tuple(token_mask.shape)}"
        )
    if not bool(token_mask.any()):
        raise DataError("token_mask selects no position at all, so there is nothing to probe")
    valid = labels >= 0
    if labels.shape == token_mask.shape and labels.shape[1] > 1 and not torch.equal(valid, token_mask):
        raise DataError(
            "labels and token_mask have the same shape but disagree about which positions count: label probed "
            "positions and pad all others with -100"
        )
    kept = labels[valid]
    if len(kept) != int(token_mask.sum()):
        raise DataError(
            f"token_mask selects {int(token_mask.sum())} positions, but there are {len(kept)} labels (negative ones "
            "are padding); give one label per selected position"
        )
    return kept


def check_labels(labels: Tensor) -> None:
    """Refuse labels that hold one class only."""
    if int(labels.min()) == int(labels.max()):
        raise DataError(f"all {len(labels)} labels are {int(labels[0])}: with one class there is nothing to tell apart")


def check_attended(token_mask: Tensor, inputs: Mapping[str, Any], path: str | None = None) -> None:
    """Refuse probed positions that are padding, or that the probed stack does not have.

    Args:
        token_mask: [rows, positions].
        inputs: the model's arguments.
        path: of the probed block; an encoder-decoder's masks say nothing as long as it is not known whose is meant.
    """
    both = "decoder_input_ids" in inputs
    if both and path is None:
        return
    prefix = "decoder_" if both and "decoder" in str(path).split(".") else ""
    ids, attended = (inputs.get(f"{prefix}{name}") for name in ("input_ids", "attention_mask"))
    if both and isinstance(ids, Tensor) and ids.shape != token_mask.shape:
        raise DataError(
            f"token_mask is {tuple(token_mask.shape)}, but {path!r} sees the rows and positions of {prefix}input_ids, "
            f"{tuple(ids.shape)}; ProbeData.at_last(…, of={prefix + 'input_ids'!r}) probes the last of these"
        )
    if not isinstance(attended, Tensor) or attended.shape != token_mask.shape:
        return
    padding = (token_mask & (attended == 0).to(token_mask.device)).nonzero()
    if len(padding):
        row, position = padding[0].tolist()
        raise DataError(
            f"token_mask selects position {position} of row {row}, which {prefix}attention_mask says is padding; "
            "ProbeData.at_last finds each row's last real token"
        )


def take(value: Any, rows: Tensor) -> Any:
    """Rows of every tensor in a mapping."""
    return {name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in value.items()}
