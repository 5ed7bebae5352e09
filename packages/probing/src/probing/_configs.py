"""The configuration objects of the seed, as Hugging Face configs: positional or by keyword, kept as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PretrainedConfig

from probing._errors import ConfigError, check_choice
from probing._rules import RULES, MaskRule
from probing._sites import UNITS

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


# Which hyperparameters of which rule are reachable from a config, under the seed's names.
_RULE_OPTIONS: dict[str, dict[str, str]] = {
    "continuous_sparsification": {"mask_init_value": "init_value"},
    "hard_concrete": {"mask_init_percentage": "init_percentage", "gamma": "gamma", "zeta": "zeta", "beta": "beta"},
    "straight_through": {"mask_init_value": "init_value"},
    "gumbel_sigmoid": {"mask_init_value": "init_value"},
    "top_k": {"keep": "keep"},
    "magnitude_pruning": {"prune_percentage": "prune_percentage"},
    "random": {"keep": "keep"},
}
ABLATIONS = ("none", "zero_ablate", "random_ablate", "randomly_sampled", "complement_sampled")
L0_NORMS = ("paper", "units", "mean")


class CircuitConfig(_Config):
    """How a `CircuitModel` masks a model.

    >>> config = CircuitConfig("continuous_sparsification", {"mask_unit": "neuron"}, ["transformer.h.0.attn.c_*"])
    >>> config.rule()
    ContinuousSparsification(init_value=0.0)

    Args:
        mask_method: ``"continuous_sparsification"``, ``"hard_concrete"``, ``"straight_through"``, ``"gumbel_sigmoid"``,
            ``"top_k"``, ``"magnitude_pruning"`` or ``"random"``.
        mask_hparams: ``ablation`` (``"none"``, ``"zero_ablate"``, ``"random_ablate"``, ``"randomly_sampled"``,
            ``"complement_sampled"``), ``mask_unit`` (``"weight"``, ``"neuron"``, ``"input"``, ``"head"``, ``"module"``,
            ``"expert"``), ``mask_bias``, and the rule's own: ``mask_init_value``, ``mask_init_percentage`` with
            ``gamma``, ``zeta``, ``beta``, ``keep``, ``prune_percentage``. All have defaults.
        target_layers: exact module names, globs or ``"re:…"``; empty masks nothing.
        freeze_base: train the masks only, and keep dropout and batch norm of the base in eval mode.
        add_l0: add the sparsity penalty to the output's loss, where the model returns one.
        l0_lambda: weight of that penalty.
        l0_norm: what the penalty adds up: ``"paper"``, weights kept (each unit counts its fan-in, as the published λ
            mean it); ``"units"``, units kept; ``"mean"``, the share of units kept, in [0, 1].
        seed: of everything random in the masks.
    """

    options = (
        "mask_method", "mask_hparams", "target_layers", "freeze_base", "add_l0", "l0_lambda", "l0_norm", "seed",
    )  # fmt: skip

    def __init__(
        self,
        mask_method: str = "continuous_sparsification",
        mask_hparams: Mapping[str, Any] | None = None,
        target_layers: str | Sequence[str] = (),
        freeze_base: bool = True,
        add_l0: bool = True,
        l0_lambda: float = 1e-8,
        l0_norm: str = "paper",
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        super().__init__(**unknown)
        check_choice("mask_method", mask_method, _RULE_OPTIONS)
        check_choice("l0_norm", l0_norm, L0_NORMS)
        self.mask_method = mask_method
        self.mask_hparams = dict(mask_hparams or {})
        self.target_layers = [target_layers] if isinstance(target_layers, str) else list(target_layers)
        self.freeze_base, self.add_l0 = freeze_base, add_l0
        self.l0_lambda, self.l0_norm, self.seed = l0_lambda, l0_norm, seed
        known = ["ablation", "mask_unit", "mask_bias", *_RULE_OPTIONS[mask_method]]
        for name in self.mask_hparams:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
                raise ConfigError(f"mask_hparams[{name!r}] means nothing to {mask_method!r}; {hint}")
        check_choice("mask_hparams['ablation']", self.ablation, ABLATIONS)
        check_choice("mask_hparams['mask_unit']", self.mask_unit, UNITS)
        if self.mask_bias and self.mask_unit not in ("weight", "neuron"):
            raise ConfigError(f"mask_bias goes with mask_unit 'weight' or 'neuron', not {self.mask_unit!r}")
        self.rule()

    @property
    def ablation(self) -> str:
        """The ablation mode the model starts in."""
        return self.mask_hparams.get("ablation", "none")

    @property
    def mask_unit(self) -> str:
        """The unit of every site."""
        return self.mask_hparams.get("mask_unit", "weight")

    @property
    def mask_bias(self) -> bool:
        """Whether biases have masks of their own."""
        return bool(self.mask_hparams.get("mask_bias", False))

    def rule(self) -> MaskRule:
        """The mask rule with its hyperparameters."""
        names = _RULE_OPTIONS[self.mask_method]
        values = {names[k]: v for k, v in self.mask_hparams.items() if k in names}
        return RULES[self.mask_method](**values)


class _ProbeConfig(_Config):
    """What the two probes' configs share: the readout probed, and the two inner configs."""

    if TYPE_CHECKING:  # the base class makes a required field of every annotation it sees
        probe_vectors: str
        circuit_config: CircuitConfig
        resid_config: ResidualUpdateModelConfig

    def _check(self) -> None:
        if isinstance(self.circuit_config, Mapping):
            self.circuit_config = CircuitConfig(**self.circuit_config)
        if isinstance(self.resid_config, Mapping):
            self.resid_config = ResidualUpdateModelConfig(**self.resid_config)
        if not self.circuit_config.freeze_base:
            raise ConfigError("a probe looks at a model that stands still: set circuit_config.freeze_base=True")
        if self.probe_vectors not in self.resid_config.keys():  # noqa: SIM118
            raise ConfigError(
                f"probe_vectors={self.probe_vectors!r} is not among what resid_config remembers "
                f"({', '.join(self.resid_config.keys()) or 'nothing'}); make the two agree"
            )


class CircuitProbeConfig(_ProbeConfig):
    """What a `CircuitProbe` looks at.

    >>> CircuitProbeConfig(
    ...     "attn_update_0",
    ...     CircuitConfig("continuous_sparsification", {"mask_unit": "neuron"}, ["transformer.h.0.attn.c_*"]),
    ...     ResidualUpdateModelConfig("gpt", [0], attn=True),
    ... ).loss
    'contrastive'

    Args:
        probe_vectors: a key of ``vector_cache``, such as ``"attn_update_1"``.
        circuit_config: the masks.
        resid_config: the readouts; must include ``probe_vectors``.
        loss: ``"contrastive"``, the soft nearest neighbour loss of Lepori et al. 2024; or ``"linear"``, the same loss
            between the circuit's vectors and the full model's.
    """

    options = ("probe_vectors", "circuit_config", "resid_config", "loss")

    def __init__(
        self,
        probe_vectors: str = "",
        circuit_config: CircuitConfig | None = None,
        resid_config: ResidualUpdateModelConfig | None = None,
        loss: str = "contrastive",
        **unknown: Any,
    ) -> None:
        super().__init__(**unknown)
        self.probe_vectors = probe_vectors
        self.circuit_config = circuit_config if circuit_config is not None else CircuitConfig()
        self.resid_config = resid_config if resid_config is not None else ResidualUpdateModelConfig()
        check_choice("loss", loss, ("contrastive", "linear", "linear_probe"))
        self.loss = "linear" if loss == "linear_probe" else loss
        if probe_vectors:
            self._check()


class SubnetworkProbeConfig(_ProbeConfig):
    """What a `SubnetworkProbe` looks at, and the classifier on top.

    Args:
        probe_vectors: a key of ``vector_cache``.
        n_classes: how many classes the probe tells apart.
        circuit_config: the masks; ``target_layers=[]`` makes it an ordinary probe.
        resid_config: the readouts; must include ``probe_vectors``.
        intermediate_size: width of the hidden layer of an MLP probe; −1 for a linear probe.
        labeling: ``"sequence"``, one label and one probed position a row; or ``"token"``, any number.
    """

    options = ("probe_vectors", "n_classes", "circuit_config", "resid_config", "intermediate_size", "labeling")

    def __init__(
        self,
        probe_vectors: str = "",
        n_classes: int = 2,
        circuit_config: CircuitConfig | None = None,
        resid_config: ResidualUpdateModelConfig | None = None,
        intermediate_size: int = -1,
        labeling: str = "sequence",
        **unknown: Any,
    ) -> None:
        super().__init__(**unknown)
        self.probe_vectors, self.n_classes = probe_vectors, n_classes
        self.circuit_config = circuit_config if circuit_config is not None else CircuitConfig()
        self.resid_config = resid_config if resid_config is not None else ResidualUpdateModelConfig()
        self.intermediate_size, self.labeling = intermediate_size, labeling
        check_choice("labeling", labeling, ("sequence", "token"))
        if n_classes < 2:
            raise ConfigError(f"n_classes={n_classes}: a probe needs at least two classes to tell apart")
        if intermediate_size == 0 or intermediate_size < -1:
            raise ConfigError(f"intermediate_size={intermediate_size}: a width, or -1 for a linear probe")
        if probe_vectors:
            self._check()
