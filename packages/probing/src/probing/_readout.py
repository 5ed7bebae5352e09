"""Readouts: the named places of the residual stream, and the wrapper that fills ``vector_cache`` with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from probing._configs import ResidualUpdateModelConfig
from probing._errors import ConfigError, ReadoutError
from probing._structure import BlockLayout, find_layout
from probing._tensors import first_tensor, hidden_states

KINDS = (
    "attn_update", "mlp_update", "cross_update", "attn_stream", "mlp_stream",
    "resid_in", "resid_mid", "resid_out", "head_output",
)  # fmt: skip
_KEY = re.compile(rf"({'|'.join(KINDS)})_(\d+)")


@dataclass(frozen=True)
class Readout:
    """One vector of the residual stream per position: what (``attn_update`` …) and in which layer.

    >>> Readout.parse("attn_update_1")
    Readout(kind='attn_update', layer=1)
    >>> Readout("resid_mid", 3).key
    'resid_mid_3'

    ``attn_update`` and ``mlp_update`` are what the sub-block adds; ``attn_stream`` (= ``resid_mid``) and ``mlp_stream``
    (= ``resid_out``) are the stream after that addition, after the norm in post-norm blocks. In parallel blocks, where
    no such tensor exists, ``attn_stream`` is block input + attention update. ``head_output`` is the input of the
    attention's output projection, [..., heads, head_dim].
    """

    kind: str
    layer: int

    @property
    def key(self) -> str:
        """The name in ``vector_cache``."""
        return f"{self.kind}_{self.layer}"

    @classmethod
    def parse(cls, key: str) -> Readout:
        """From ``"mlp_stream_5"``.

        Raises:
            ConfigError: not of the form ``<kind>_<layer>``.
        """
        match = _KEY.fullmatch(key)
        if match is None:
            raise ConfigError(f"{key!r} names no readout: write one of {', '.join(k + '_<layer>' for k in KINDS)}")
        return cls(match[1], int(match[2]))


class ReadoutTap:
    """Collects readouts while open; leaves no hook behind.

    >>> tap = ReadoutTap(model, layouts, [Readout("attn_update", 1)])  # doctest: +SKIP
    >>> with tap.open() as cache:  # doctest: +SKIP
    ...     model(input_ids)
    >>> cache["attn_update_1"].shape  # doctest: +SKIP
    torch.Size([4, 7, 64])
    """

    def __init__(self, model: nn.Module, layouts: Sequence[BlockLayout], readouts: Sequence[Readout]) -> None:
        self._modules = dict(model.named_modules())
        self._layouts = {layout.index: layout for layout in layouts}
        self.readouts = list(readouts)
        self._heads = {r.layer: self._head_count(model, r) for r in readouts if r.kind == "head_output"}
        for readout in self.readouts:
            layout = self._layouts.get(readout.layer)
            if layout is None:
                raise ReadoutError(f"{readout.key!r}: layer {readout.layer} was not analysed; add it to target_layers")
            if readout.kind == "cross_update" and layout.cross is None:
                raise ReadoutError(f"{readout.key!r}: block {layout.path!r} has no cross-attention")

    def _head_count(self, model: nn.Module, readout: Readout) -> int:
        layout = self._layouts[readout.layer]
        return head_count(model, layout)

    @contextmanager
    def open(self) -> Iterator[dict[str, Tensor]]:
        """Hooks on entry, none on exit, the cache in between and after."""
        cache: dict[str, Tensor] = {}
        inputs: dict[int, Tensor] = {}
        handles: list[Any] = []

        def keep(key: str, shape_like: int | None = None) -> Any:
            def hook(_: nn.Module, args: Any, output: Any) -> None:
                found = first_tensor(output)
                if found is None:
                    raise ReadoutError(f"{key!r}: the module returned no tensor")
                if shape_like is not None and shape_like in inputs:  # OPT flattens positions inside its block
                    found = found.reshape(inputs[shape_like].shape)
                cache[key] = found.clone()

            return hook

        def block_input(layer: int, key: str | None) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                found = hidden_states(args, kwargs)
                assert found is not None
                inputs[layer] = found.clone()
                if key is not None:
                    cache[key] = inputs[layer]

            return hook

        def attention_added(layer: int, key: str) -> Any:
            def hook(_: nn.Module, args: Any, output: Any) -> None:
                found = first_tensor(output)
                assert found is not None
                cache[key] = inputs[layer] + found.reshape(inputs[layer].shape)

            return hook

        def head_input(layer: int, key: str) -> Any:
            def hook(_: nn.Module, args: Any) -> None:
                cache[key] = args[0].unflatten(-1, (self._heads[layer], -1)).clone()

            return hook

        layers = {readout.layer for readout in self.readouts}
        for layer in sorted(layers):
            wants_input = next((r.key for r in self.readouts if r.layer == layer and r.kind == "resid_in"), None)
            block = self._modules[self._layouts[layer].path]
            handles.append(block.register_forward_pre_hook(block_input(layer, wants_input), with_kwargs=True))
        for readout in self.readouts:
            layout, key = self._layouts[readout.layer], readout.key
            if readout.kind in ("attn_update", "mlp_update", "cross_update"):
                path = str(getattr(layout, readout.kind.removesuffix("_update")))
                handles.append(self._modules[path].register_forward_hook(keep(key, layout.index)))
            elif readout.kind in ("mlp_stream", "resid_out"):
                handles.append(self._modules[layout.path].register_forward_hook(keep(key)))
            elif readout.kind in ("attn_stream", "resid_mid"):
                if layout.middle is not None:
                    handles.append(self._modules[layout.middle].register_forward_hook(keep(key)))
                else:
                    hook = attention_added(layout.index, key)
                    handles.append(self._modules[layout.attn].register_forward_hook(hook))
            elif readout.kind == "head_output":
                hook = head_input(layout.index, key)
                handles.append(self._modules[str(layout.projection)].register_forward_pre_hook(hook))
        try:
            yield cache
        finally:
            for handle in handles:
                handle.remove()


def head_count(model: nn.Module, layout: BlockLayout) -> int:
    """How many heads the attention's output projection reads.

    Raises:
        ReadoutError: the block has no output projection, or its input is not made of the config's heads alone.
    """
    if layout.projection is None:
        raise ReadoutError(
            f"block {layout.path!r}: no linear map makes its attention update, so it has no heads to tell apart"
        )
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    width = _in_features(model.get_submodule(layout.projection))
    attention = [m for name, m in model.named_modules() if layout.attn.startswith(name) or name.startswith(layout.path)]
    own = {getattr(m, "num_attention_heads", heads) for m in attention}
    if not isinstance(heads, int) or width % heads or own - {heads}:
        raise ReadoutError(
            f"{layout.projection!r} reads {width} numbers, which are not just {heads} attention heads "
            "(ConvBERT mixes in a convolution): read attn_update, or mask input units instead"
        )
    return heads


def _in_features(module: nn.Module) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]  # type: ignore[return-value,union-attr]


# The seed's four family names, and which of today's model types each may stand for.
_FAMILIES = {
    "bert": ("bert", "roberta", "mpnet", "convbert", "ernie", "electra", "xlm-roberta", "camembert", "distilbert"),
    "gpt": ("gpt2", "gpt_neo"),
    "gptneox": ("gpt_neox",),
    "gpt_neox": ("gpt_neox",),
    "vit": ("vit",),
}


class ResidualUpdateModel(nn.Module):
    """A transformer that remembers its residual stream: each forward call fills ``vector_cache``.

    >>> config = ResidualUpdateModelConfig("auto", target_layers=[0], mlp=True, attn=True)  # doctest: +SKIP
    >>> hooked = ResidualUpdateModel(config, model)  # doctest: +SKIP
    >>> logits = hooked(input_ids=ids).logits  # doctest: +SKIP
    >>> hooked.vector_cache["attn_update_0"].shape  # doctest: +SKIP
    torch.Size([8, 12, 768])

    The places are derived from the model's own arithmetic on one batch at construction, and refused if the residual sum
    does not come out (`find_layout`). Vectors are copies that keep their graph. Hooks live only inside ``forward``: the
    wrapped model is never left changed.

    Args:
        config: what to remember.
        model: a transformer, or a `CircuitModel` around one.
        example: keyword arguments of one forward call, for models whose config does not tell.

    Raises:
        ReadoutError: a layer or readout the model lacks, or a block that fails the check.
        ConfigError: ``model_type`` names another kind of model.
    """

    def __init__(
        self, config: ResidualUpdateModelConfig, model: nn.Module, example: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.wrapped_model = model
        base = unwrap(model)
        _check_family(config.model_type, base)
        self.layouts = find_layout(base, config.target_layers, blocks=config.blocks, example=example)
        self.tap = ReadoutTap(base, self.layouts, config.readouts())
        self.vector_cache: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped model, with whatever it takes, and return what it returns."""
        with self.tap.open() as cache:
            output = self.wrapped_model(*args, **kwargs)
        self.vector_cache = cache
        return output


def unwrap(model: nn.Module) -> nn.Module:
    """The base model under any wrappers of this package."""
    while isinstance(inner := getattr(model, "wrapped_model", None), nn.Module):
        model = inner
    return model


def _check_family(claimed: str, model: nn.Module) -> None:
    actual = getattr(getattr(model, "config", None), "model_type", None)
    if claimed == "auto" or actual is None or claimed == actual or actual in _FAMILIES.get(claimed, ()):
        return
    raise ConfigError(
        f"model_type={claimed!r}, but the model is a {actual!r}; write model_type='auto' (the layout is derived anyway)"
    )
