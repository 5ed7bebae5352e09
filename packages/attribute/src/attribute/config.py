"""Configurations: what a person chooses, as plain dataclasses that are saved with every result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from attribute._errors import AttributionError
from gradcore import (
    Budgeted,
    Dense,
    GlobalSketch,
    Identity,
    Loss,
    Sketch,
    SparseJL,
    Spectral,
    TensorSketch,
    TwoSided,
    normalizer_kinds,
)

BUDGETS = ("equal", "shape", "energy")
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8", "int4")
SKETCHES = ("spectral", "tensor", "two-sided", "dense", "sparse", "global")
_PATTERNS = ("modules", "exclude", "split_attention_modules")
STORE_DTYPES = ("fp32", "fp16", "bf16", "int8", "int4", "int2", "int1")


@dataclass(frozen=True)
class DataConfig:
    """Which texts, and which of their tokens carry loss.

    Attributes:
        dataset: a hub id, a folder (``save_to_disk`` or of files), or a json, jsonl, csv, parquet or txt file.
        split: split name, with ``[:100]`` or ``[10%:20%]`` to take a part.
        subset: configuration name of a hub dataset.
        prompt_column: the text, or the prompt where there is a completion.
        completion_column: if given, only completion tokens carry loss.
        conversation_column: a list of ``{"role", "content"}`` turns; only assistant turns carry loss.
        truncation: cut documents at the model's context instead of refusing them.
        chunk_length: cut documents into chunks of at most this many tokens, each a row; 0 keeps documents whole.
        max_tokens: stop after the row that reaches this many tokens; 0 takes all.
        reward_column: a number for each completion: its loss is weighted by the reward less the mean reward of the same
            prompt (Dr. GRPO).
        advantage_column: the weights themselves.
        skip_nan_rewards: rows whose reward is NaN count for nothing, instead of being refused.
        data_args: ``"name=value,name=value"`` for the dataset loader.
        streaming: read rows as they come, once and in order, instead of having the whole dataset on this machine first.
    """

    dataset: str = ""
    split: str = "train"
    subset: str = ""
    prompt_column: str = "text"
    completion_column: str = ""
    conversation_column: str = ""
    truncation: bool = False
    chunk_length: int = 0
    max_tokens: int = 0
    reward_column: str = ""
    advantage_column: str = ""
    skip_nan_rewards: bool = False
    data_args: str = ""
    streaming: bool = False

    def __post_init__(self) -> None:
        if self.truncation and self.chunk_length:
            raise AttributionError("--truncation throws away what --chunk-length would keep: choose one of them")
        if self.reward_column and self.advantage_column:
            raise AttributionError("--reward-column and --advantage-column exclude each other")
        if self.reward_column and self.chunk_length:
            raise AttributionError("a reward is of a whole completion: --chunk-length would cut it")
        if self.skip_nan_rewards and not (self.reward_column or self.advantage_column):
            raise AttributionError("--skip-nan-rewards needs --reward-column or --advantage-column")
        if self.chunk_length == 1 or self.chunk_length < 0:
            raise AttributionError(f"--chunk-length must be 0 or at least 2 tokens, not {self.chunk_length}")
        if self.max_tokens < 0:
            raise AttributionError(f"--max-tokens must be 0 (all) or positive, not {self.max_tokens}")
        if self.conversation_column and self.completion_column:
            raise AttributionError("--conversation-column and --completion-column exclude each other")


@dataclass(frozen=True)
class IndexConfig:
    """How gradients are collected and stored.

    Attributes:
        model: a local folder or hub id.
        revision: branch, tag or commit of a hub model.
        tokenizer: another tokenizer than the model's.
        precision: dtype the model runs in; ``int8`` and ``int4`` quantise its weights (bitsandbytes).
        device: ``"auto"`` takes a GPU where there is one.
        fsdp: spread the model's blocks over the processes of the run, for models that do not fit one device.
        modules: glob or ``re:`` patterns of the modules to capture, relative to the base model. By default every linear
            layer; ``"*"`` also takes embeddings, norms and convolutions, which make similarity more lexical.
        exclude: patterns of modules to leave out.
        split_attention_modules: patterns of attention matrices whose heads become columns of their own.
        include_bias: capture biases too, as one more input that is always 1.
        sketch_kind: what is kept of a gradient (``docs/sketches.md``). By default ``spectral``, in a basis fitted to a
            sample of the rows, or ``two-sided`` where ``projection_dim`` is given.
        sketch_floats: floats a module (spectral: on average; global: of all modules together).
        sketch_budget: how modules come by their floats: ``equal`` for each, by ``shape`` (entries of their gradients),
            or by ``energy`` (their part in the gradients of a sample; spectral: of its largest coordinates).
            ``energy`` for a spectral sketch, ``equal`` otherwise.
        projection_dim: side of the two-sided sketch, 16 if that kind is asked for; 0 keeps whole gradients.
        projection_type: entries of the sketch, ``rademacher`` or ``normal``.
        projection_seed: another seed is another sketch.
        normalizer: ``adam``, ``adafactor`` or ``shampoo``: gradients are multiplied, before they are sketched, with
            what that optimiser would multiply them with; none by default.
        processor_path: a folder of ``trace preconditioners --normalizer``, whose normaliser is taken.
        optimizer_state_path: an ``optimizer.pt`` or checkpoint folder whose second moments are taken; without it and
            without ``processor_path`` they are fitted to the rows.
        stats_sample_size: rows that moments are fitted to, at most; 0 takes all.
        loss_fn: ``ce``, ``log_odds`` (TRAK's model output) or ``kl`` to a reference, see :class:`gradcore.Loss`.
        label_smoothing: of ``ce``, from 0 up to 1.
        reference_model: what ``kl`` compares with; the model without its PEFT adapters by default.
        loss_reduction: ``sum`` or ``mean`` over the labelled tokens of a row.
        attribute_tokens: a row a token instead of one a document; a document's rows sum to its gradient.
        token_batch_size: padded tokens a batch; longer rows run alone.
        store_dtype: encoding of the stored rows: floats, or 8, 4, 2 or 1 bits with a scale a row and module; int4
            loses next to nothing of a ranking (``docs/store-format.md``).
        rows_per_shard: rows a file; 0 chooses by size.
    """

    model: str = ""
    revision: str = ""
    tokenizer: str = ""
    precision: str = "fp32"
    device: str = "auto"
    fsdp: bool = False
    modules: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    include_bias: bool = False
    split_attention_modules: tuple[str, ...] = ()
    sketch_kind: str = ""
    sketch_floats: int = 256
    sketch_budget: str = ""
    projection_dim: int | None = None
    projection_type: str = "rademacher"
    projection_seed: int = 0
    normalizer: str = ""
    processor_path: str = ""
    optimizer_state_path: str = ""
    stats_sample_size: int = 10_000
    loss_fn: str = "ce"
    label_smoothing: float = 0.0
    reference_model: str = ""
    loss_reduction: str = "sum"
    attribute_tokens: bool = False
    token_batch_size: int = 2048
    store_dtype: str = "fp32"
    rows_per_shard: int = 0
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        _require("precision", self.precision, PRECISIONS)
        if self.fsdp and self.precision in ("int8", "int4"):
            raise AttributionError(f"--fsdp spreads floats: take --precision bf16, or {self.precision} without --fsdp")
        _require("store-dtype", self.store_dtype, STORE_DTYPES)
        if self.sketch_kind:
            _require("sketch", self.sketch_kind, SKETCHES)
        if self.sketch_floats < 2:
            raise AttributionError(f"--sketch-floats must be at least 2, not {self.sketch_floats}")
        if self.sketch_budget:
            _require("sketch-budget", self.sketch_budget, BUDGETS)
            self._check_budget()
        if self.projection_dim is not None and self.projection_dim < 0:
            raise AttributionError(f"--projection-dim must be 0 (no sketch) or positive, not {self.projection_dim}")
        if self.projection_dim is not None and self.sketch_kind not in ("", "two-sided"):
            raise AttributionError(
                f"--projection-dim is the side of the two-sided sketch; --sketch {self.sketch_kind} has --sketch-floats"
            )
        if self.normalizer:
            _require("normalizer", self.normalizer, normalizer_kinds())
        if self.optimizer_state_path and not self.normalizer:
            raise AttributionError("--optimizer-state-path needs --normalizer adam, adafactor or shampoo")
        if self.optimizer_state_path and self.processor_path:
            raise AttributionError("--processor-path has a normaliser already: leave --optimizer-state-path away")
        Loss(self.loss_fn, self.label_smoothing)
        if self.reference_model and self.loss_fn != "kl":
            raise AttributionError("--reference-model is what --loss-fn kl compares with")
        if self.rows_per_shard < 0:
            raise AttributionError(f"--rows-per-shard must be 0 (by size) or positive, not {self.rows_per_shard}")
        if self.token_batch_size < 1:
            raise AttributionError(f"--token-batch-size must be positive, not {self.token_batch_size}")

    @property
    def sketch(self) -> Sketch:
        """The sketch these options describe; a spectral one has yet to be fitted."""
        floats, seed = self.sketch_floats, self.projection_seed
        match self.sketch_kind or ("spectral" if self.projection_dim is None else "two-sided"):
            case "spectral":
                return Spectral(floats, seed=seed)
            case "tensor":
                return TensorSketch(floats, seed)
            case "dense":
                return Dense(floats, seed)
            case "sparse":
                return SparseJL(floats, seed=seed)
            case "global":
                return GlobalSketch(floats, seed)
        if self.projection_dim == 0:
            return Identity()
        return TwoSided(self.projection_dim or 16, self.projection_type, seed)

    def _check_budget(self) -> None:
        sketch = self.sketch
        if isinstance(sketch, Spectral) and self.sketch_budget == "shape":
            raise AttributionError("--sketch spectral shares floats by energy or equally, not by shape")
        if not isinstance(sketch, (Budgeted, Spectral)) and self.sketch_budget != "equal":
            raise AttributionError(
                f"--sketch-budget {self.sketch_budget} needs --sketch spectral, tensor, dense or sparse, "
                f"not {sketch.kind}"
            )

    def two_sided(self) -> IndexConfig:
        """The same with a two-sided sketch where nothing else was asked for: what methods defined on one take."""
        if self.sketch_kind or self.projection_dim is not None:
            return self
        return replace(self, projection_dim=16)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form that :meth:`from_dict` reads back."""
        saved = asdict(self)
        return {**saved, **{name: list(saved[name]) for name in _PATTERNS}}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> IndexConfig:
        """The configuration saved by :meth:`to_dict`."""
        known = {each.name for each in fields(cls)}
        if unknown := set(saved) - known:
            raise AttributionError(f"unknown settings in the saved configuration: {', '.join(sorted(unknown))}")
        values = dict(saved)
        values["data"] = DataConfig(**values.get("data", {}))
        values |= {name: tuple(values.get(name, ())) for name in _PATTERNS}
        return cls(**values)


@dataclass(frozen=True)
class QueryConfig:
    """How an index is asked.

    Attributes:
        top_k: proponents and opponents a query.
        unit_norm: compare directions (cosine) instead of dot products.
        modules: patterns of the modules that count; all by default.
        rerank: so many rows at either end are ranked again by whole gradients; 0 leaves the sketch's order.
    """

    top_k: int = 5
    unit_norm: bool = True
    modules: tuple[str, ...] = ()
    rerank: int = 0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise AttributionError(f"--top-k must be at least 1, not {self.top_k}")
        if self.rerank and self.rerank < self.top_k:
            raise AttributionError(f"--rerank must be 0 or at least --top-k ({self.top_k}), not {self.rerank}")


def _require(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise AttributionError(f"--{option} must be one of {', '.join(allowed)}, not {value!r}")
