"""The configuration objects of the seed, as Hugging Face configs: positional or by keyword, saved and loaded as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PretrainedConfig

from probing._errors import ConfigError

if TYPE_CHECKING:
    from probing._readout import Readout


class _Config(PretrainedConfig):
    """What Hugging Face's base class is asked for: a JSON file there and back, with exactly our options in it."""

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **unknown: Any) -> None:
        # Loading adds bookkeeping of the hub's own; anything else is a misspelling.
        for name in unknown.keys() - {"transformers_version", "name_or_path", "architectures", "dtype"}:
            close = get_close_matches(name, self.options, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(self.options)}"
            raise ConfigError(f"{type(self).__name__} has no option {name!r}; {hint}")
        super().__init__(**{name: value for name, value in unknown.items() if name != "dtype"})

    def to_dict(self) -> dict[str, Any]:
        """The options, nested configs as dictionaries."""
        values = {name: getattr(self, name) for name in self.options}
        return {k: v.to_dict() if isinstance(v, PretrainedConfig) else v for k, v in values.items()}

    def to_diff_dict(self) -> dict[str, Any]:
        """All options: a saved probe says in full how it was made."""
        return self.to_dict()


class ResidualUpdateModelConfig(_Config):
    """Which readouts a `ResidualUpdateModel` remembers.

    >>> ResidualUpdateModelConfig("gpt", [0, 1], mlp=True, attn=True).keys()
    ['attn_update_0', 'mlp_update_0', 'attn_update_1', 'mlp_update_1']

    Args:
        model_type: the kind of model expected: ``"bert"``, ``"gpt"``, ``"gptneox"``, ``"vit"``, any Hugging Face model
            type, or ``"auto"``. It is checked, not needed.
        target_layers: block indices.
        mlp: remember the MLP's readouts.
        attn: remember the attention's readouts (cross-attention's too, with ``cross``).
        updates: what the sub-block adds to the stream.
        stream: the stream after that addition.
        resid: ``resid_in``, ``resid_mid`` and ``resid_out`` as well.
        heads: ``head_output`` as well: the input of the attention's output projection, [..., heads, head_dim].
        cross: ``cross_update`` as well, in decoders with cross-attention.
        blocks: path of the block list, for models with several stacks (``"decoder.block"``).
    """

    options = ("model_type", "target_layers", "mlp", "attn", "updates", "stream", "resid", "heads", "cross", "blocks")

    def __init__(
        self,
        model_type: str = "auto",
        target_layers: Sequence[int] = (),
        mlp: bool = False,
        attn: bool = False,
        updates: bool = True,
        stream: bool = False,
        resid: bool = False,
        heads: bool = False,
        cross: bool = False,
        blocks: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(**unknown)
        self.model_type = model_type  # type: ignore[misc]
        self.target_layers = list(target_layers)
        self.mlp, self.attn, self.updates, self.stream = mlp, attn, updates, stream
        self.resid, self.heads, self.cross, self.blocks = resid, heads, cross, blocks
        if (mlp or attn) and not (updates or stream):
            raise ConfigError("updates=False and stream=False leave nothing to remember; set one of them")

    def readouts(self) -> list[Readout]:
        """The readouts, layer by layer."""
        from probing._readout import Readout

        kinds = [
            *(["attn_update"] if self.attn and self.updates else []),
            *(["attn_stream"] if self.attn and self.stream else []),
            *(["mlp_update"] if self.mlp and self.updates else []),
            *(["mlp_stream"] if self.mlp and self.stream else []),
            *(["resid_in", "resid_mid", "resid_out"] if self.resid else []),
            *(["head_output"] if self.heads else []),
            *(["cross_update"] if self.cross else []),
        ]
        return [Readout(kind, layer) for layer in self.target_layers for kind in kinds]

    def keys(self) -> list[str]:
        """The names ``vector_cache`` will have."""
        return [readout.key for readout in self.readouts()]
