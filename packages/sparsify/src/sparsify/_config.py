"""What is trained and how: two frozen dataclasses, importable without torch. The command line is made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, get_args

from sparsify._errors import ConfigError, check_choice, check_number, check_whole
from sparsify._loggers import TRACKERS

Activation = Literal["topk", "groupmax", "batchtopk", "jumprelu", "gated"]
ACTIVATIONS = get_args(Activation)
PRECISIONS = ("auto", "fp32", "bf16")
LOSSES = ("fvu", "ce", "kl")
OPTIMIZERS = ("adam", "signum", "muon")


@dataclass(frozen=True)
class SaeConfig:
    """Shape and activation of a sparse coder. The first eight fields are EleutherAI's, in name and meaning.

    >>> SaeConfig(k=64, expansion_factor=8).latents(512)
    4096
    """

    activation: Activation = "topk"
    """Which latents are active: topk, groupmax, batchtopk, jumprelu or gated."""
    expansion_factor: int = 32
    """Latents per input dimension, where num_latents is 0."""
    normalize_decoder: bool = True
    """Keep decoder rows at unit norm (not for transcoders, whose decoder starts at zero)."""
    num_latents: int = 0
    """Number of latents; 0 means expansion_factor times the input width."""
    k: int = 32
    """Active latents per token; the target L0 for jumprelu."""
    multi_topk: bool = False
    """Add the reconstruction from the top 4k latents to the loss, at weight 1/8."""
    skip_connection: bool = False
    """Add a linear map from input to output."""
    transcode: bool = False
    """Predict a module's output from its input, instead of a tensor from itself."""
    tied: bool = False
    """Use the encoder's rows as the decoder's."""
    matryoshka: tuple[int, ...] = ()
    """Nested dictionaries: rising prefix sizes, each of which must reconstruct alone; the last is all latents."""

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, ACTIVATIONS)
        check_whole("k", self.k, 1)
        check_whole("num_latents", self.num_latents, 0)
        check_whole("expansion_factor", self.expansion_factor, 1)
        if self.multi_topk and self.activation != "topk":
            raise ConfigError(f"multi_topk needs activation='topk', found {self.activation!r}")
        if self.tied and self.transcode:
            raise ConfigError("a transcoder cannot be tied: its encoder reads one space and its decoder writes another")
        if self.matryoshka:
            object.__setattr__(self, "matryoshka", tuple(self.matryoshka))
            for size in self.matryoshka:
                check_whole("matryoshka", size, 1)
            if list(self.matryoshka) != sorted(set(self.matryoshka)):
                raise ConfigError(
                    f"matryoshka={list(self.matryoshka)}: prefix sizes must rise strictly from at least 1"
                )

    def latents(self, d_in: int) -> int:
        """The number of latents for inputs of width ``d_in``, after checking that k and the groups fit it."""
        total = self.num_latents or d_in * self.expansion_factor
        if self.k > total:
            raise ConfigError(
                f"k={self.k} is more than the {total} latents; lower --k, or raise --num_latents or --expansion_factor"
            )
        if self.activation == "groupmax" and total % self.k:
            raise ConfigError(f"groupmax splits the latents into k groups, but k={self.k} does not divide {total}")
        if self.matryoshka and self.matryoshka[-1] != total:
            raise ConfigError(f"matryoshka must end at all latents: found {self.matryoshka[-1]}, expected {total}")
        return total


SparseCoderConfig = SaeConfig
TranscoderConfig = partial(SaeConfig, transcode=True)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Steps are optimiser steps everywhere; field names are EleutherAI's where they exist there.

    >>> TrainConfig(SaeConfig(k=16), batch_size=16, hookpoints=["layers.[012].mlp"]).loss_fn
    'fvu'
    """

    sae: SaeConfig = field(default_factory=SaeConfig)
    """The coder to train at every hookpoint."""
    batch_size: int = 32
    """Sequences per micro-step and process."""
    grad_acc_steps: int = 1
    """Batches per optimiser step."""
    micro_acc_steps: int = 1
    """Chunks into which a batch's activations are split before they enter the coder."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the base model and of the products by which latents are chosen; weights, values and gradients of the coders
    stay fp32. auto: bf16 on a GPU that has it; elsewhere fp32 and the model as saved. CPUs gain from bf16 where they
    have avx512_bf16 or AMX."""
    loss_fn: Literal["fvu", "ce", "kl"] = "fvu"
    """fvu: reconstruction. ce, kl: end to end, through the model with every coder spliced in."""
    optimizer: Literal["adam", "signum", "muon"] = "adam"
    """adam, signum (sign descent under schedule-free averaging), or muon (with adam for vectors)."""
    lr: float | None = None
    """Peak learning rate; by default a law in the number of latents, see docs/sparsify.md."""
    lr_warmup_steps: int = 1000
    """Warm-up of adam and muon; never more than a tenth of the run."""
    k_decay_steps: int = 0
    """Steps over which k falls linearly from 10 times the input width to its value. Experimental."""
    auxk_alpha: float = 1 / 32
    """Weight of the AuxK loss, by which dead latents learn the residual."""
    dead_feature_threshold: int = 10_000_000
    """Tokens without firing after which a latent counts as dead."""
    sparsity_coefficient: float = 1.0
    """Weight of the sparsity loss of jumprelu and gated coders."""
    exclude_tokens: tuple[int, ...] = ()
    """Token ids whose activations are neither trained on nor counted."""
    max_norm_ratio: float = 0.0
    """Leave out tokens whose input norm exceeds this multiple of the batch's median (attention sinks); 0 keeps all."""
    buffer_batches: int = 1
    """Batches whose tokens are mixed before they are served: the shuffle buffer. 1 keeps each batch to itself."""
    hookpoints: tuple[str, ...] = ()
    """Module-name patterns relative to the base model; by default every layer's output."""
    init_seeds: tuple[int, ...] = (0,)
    """Initialisation seeds; more than one trains as many coders per hookpoint."""
    layers: tuple[int, ...] = ()
    """Layer indices, instead of hookpoints."""
    layer_stride: int = 1
    """Keep every n-th hookpoint."""
    distribute_modules: bool = False
    """Under torchrun: each coder lives on one process, instead of every coder on all."""
    save_every: int = 1000
    """Steps between checkpoints; 0 saves only at the end."""
    save_best: bool = False
    """Also keep each hookpoint's best coder, judged by the mean loss since the last checkpoint, under best/."""
    finetune: str | None = None
    """Folder or Hub repository of coders to start from."""
    log_every: int = 10
    """Steps over which logged metrics are averaged."""
    log_to: tuple[str, ...] = ()
    """Also log to these: tensorboard, trackio, wandb (each needs the package of its name)."""
    log_to_wandb: bool = False
    """The same as --log_to wandb."""
    run_name: str | None = None
    """Folder of this run under save_dir."""
    save_dir: str = "checkpoints"
    """Where run folders are made."""

    def __post_init__(self) -> None:
        for name in ("exclude_tokens", "hookpoints", "init_seeds", "layers", "log_to"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, (str, int)) else tuple(value))
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("loss_fn", self.loss_fn, LOSSES)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        for tracker in self.log_to:
            check_choice("log_to", tracker, TRACKERS)
        self._check_numbers()
        if self.layers and self.hookpoints:
            raise ConfigError("layers and hookpoints both choose modules: give only one of them")
        if self.layers and self.layer_stride != 1:
            raise ConfigError("layers names the layers one by one, so layer_stride has nothing to skip: give only one")
        if not self.init_seeds:
            raise ConfigError("init_seeds is empty: at least one seed is needed")
        if len(set(self.init_seeds)) != len(self.init_seeds):
            raise ConfigError(f"init_seeds={list(self.init_seeds)} repeats a seed: the coders would be equal")
        if self.loss_fn != "fvu":
            self._check_end_to_end()
        self._check_effects()

    def _check_numbers(self) -> None:
        for name in ("batch_size", "grad_acc_steps", "micro_acc_steps", "layer_stride", "buffer_batches", "log_every"):
            check_whole(name, getattr(self, name), 1)
        for name in ("lr_warmup_steps", "k_decay_steps", "dead_feature_threshold", "save_every"):
            check_whole(name, getattr(self, name), 0)
        for name in ("exclude_tokens", "init_seeds", "layers"):
            for value in getattr(self, name):
                check_whole(name, value, 0)
        for name in ("auxk_alpha", "sparsity_coefficient", "max_norm_ratio"):
            check_number(name, getattr(self, name))
        if self.lr is not None:
            check_number("lr", self.lr, positive=True)
        if 0 < self.max_norm_ratio < 1:
            raise ConfigError(f"max_norm_ratio={self.max_norm_ratio} leaves out ordinary tokens: use 10, say, or 0")

    def _check_effects(self) -> None:
        """Refuse options that this run would ignore, where they were set to something."""
        unset = {f.name: f.default for f in fields(self)}
        ignored = {
            "lr_warmup_steps": self.optimizer == "signum" and "signum has a constant rate",
            "sparsity_coefficient": self.sae.activation not in ("jumprelu", "gated")
            and f"{self.sae.activation} has no sparsity loss",
        }
        for name, reason in ignored.items():
            if reason and getattr(self, name) != unset[name]:
                raise ConfigError(f"{name}={getattr(self, name)} would do nothing, since {reason}: leave it out")
        if self.k_decay_steps and self.sae.activation != "topk":
            raise ConfigError(
                f"k_decay_steps changes k every step, which {self.sae.activation} cannot follow: use topk"
            )

    def _check_end_to_end(self) -> None:
        if self.distribute_modules:
            raise ConfigError(f"loss_fn={self.loss_fn!r} needs every coder in every process: drop distribute_modules")
        if self.micro_acc_steps > 1:
            raise ConfigError(
                f"micro_acc_steps chunks activations, but loss_fn={self.loss_fn!r} sends them through the model: "
                "use grad_acc_steps"
            )
        if self.buffer_batches > 1 or self.max_norm_ratio or len(self.init_seeds) > 1:
            raise ConfigError(
                f"loss_fn={self.loss_fn!r} needs whole sequences and one coder per hookpoint: "
                "drop buffer_batches, max_norm_ratio and extra init_seeds"
            )

    @property
    def trackers(self) -> tuple[str, ...]:
        """Every tracker asked for, each once."""
        return tuple(dict.fromkeys([*self.log_to, *(["wandb"] if self.log_to_wandb else [])]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; unknown names are refused with the close match."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                raise ConfigError(
                    f"TrainConfig has no field {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
                )
        sae = values.get("sae", {})
        return cls(**{**values, "sae": sae if isinstance(sae, SaeConfig) else SaeConfig(**sae)})
