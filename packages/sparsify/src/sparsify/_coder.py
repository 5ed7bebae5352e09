"""The sparse coder: an SAE, a transcoder or a skip-transcoder, in the parameters EleutherAI's files name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify._config import SaeConfig
from sparsify._errors import ConfigError, DataError
from sparsify._select import Among, Rule
from sparsify._sparse import Routes, chosen_products, decode, product, products_of
from sparsify.activations import Batch, activation_named


class EncoderOutput(NamedTuple):
    """Active latents of each token: activations and indices are (..., K), unused places hold activation 0."""

    top_acts: Tensor
    top_indices: Tensor
    pre_acts: Tensor | None = None
    """(..., M) after the ReLU; only where asked for, since it is M / K times the size of the rest."""


class ForwardOutput(NamedTuple):
    """A reconstruction and its losses, each a scalar; those not asked for are 0."""

    sae_out: Tensor
    latent_acts: Tensor
    latent_indices: Tensor
    fvu: Tensor
    auxk_loss: Tensor
    multi_topk_fvu: Tensor
    nested_fvu: Tensor
    """Matryoshka: the FVUs of all proper prefixes, summed."""
    sparsity_loss: Tensor
    """JumpReLU: (L0 / k − 1)². Gated: L1 of the gate plus the gate's own reconstruction."""


class SparseCoder(nn.Module):
    """Encodes vectors as a few active latents and decodes them again.

    >>> sae = SparseCoder(16, SaeConfig(k=4, expansion_factor=8))
    >>> acts, indices, _ = sae.encode(torch.randn(10, 16))
    >>> sae.decode(acts, indices).shape
    torch.Size([10, 16])

    With W = ``encoder.weight`` (M, D), rows of ``W_dec`` (M, Do), c = ``b_dec`` for autoencoders and 0 for transcoders:

        a = W (x − c) + b        f = activation(a)        y = Σ_j f_j W_dec[j] + b_dec (+ W_skip x)

    Args:
        d_in: input width D.
        cfg: shape and activation.
        d_out: output width Do of a transcoder; D by default.
        decoder: False makes an encoder alone.
    """

    def __init__(
        self,
        d_in: int,
        cfg: SaeConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        d_out: int | None = None,
        decoder: bool = True,
    ) -> None:
        super().__init__()
        # Made by the activations that need them.
        self.threshold: Tensor
        self.bandwidth: Tensor
        self.r_mag: Tensor
        self.b_mag: Tensor
        self.activation = activation_named(cfg.activation)
        self.cfg, self.d_in, self.d_out = cfg, d_in, d_in if d_out is None else d_out
        self.num_latents = cfg.latents(d_in)
        if self.d_out != d_in and not cfg.transcode:
            raise ConfigError(f"an autoencoder has d_out = d_in = {d_in}, found d_out={self.d_out}; set transcode=True")
        made = {"device": device, "dtype": dtype}
        self.encoder = nn.Linear(d_in, self.num_latents, **made)
        nn.init.zeros_(self.encoder.bias)
        self.W_dec = self._new_decoder() if decoder else None
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, **made))
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in, **made)) if cfg.skip_connection else None
        self.activation.add_parameters(self, made)

    def _new_decoder(self) -> nn.Parameter:
        weight = self.encoder.weight
        if self.cfg.tied:
            if self.cfg.normalize_decoder:
                with torch.no_grad():
                    weight.div_(weight.norm(dim=1, keepdim=True))
            assert isinstance(weight, nn.Parameter)
            return weight
        if self.cfg.transcode:
            return nn.Parameter(weight.new_zeros(self.num_latents, self.d_out))
        copy = weight.detach().clone()
        return nn.Parameter(copy / copy.norm(dim=1, keepdim=True) if self.cfg.normalize_decoder else copy)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype; inputs are converted to it."""
        return self.encoder.weight.dtype

    @property
    def centre(self) -> Tensor | None:
        """What is subtracted from inputs."""
        return None if self.cfg.transcode else self.b_dec

    # ------------------------------------------------------------------ encode and decode

    def encode(self, x: Tensor, *, pre_acts: bool = False) -> EncoderOutput:
        """The active latents of x, (..., D). ``pre_acts=True`` adds all M pre-activations, after the ReLU."""
        flat, shape = self._flat(x), x.shape[:-1]
        products = chosen_products(flat, self.encoder.weight, self.encoder.bias, self.centre, [self._rule()])
        acts = self.activation.values(self, products.values, products.routes)
        every = None
        if pre_acts:
            centred = flat if self.centre is None else flat - self.centre
            every = _shaped(products_of(centred, self.encoder.weight, self.encoder.bias).relu(), shape)
        return EncoderOutput(_shaped(acts, shape), _shaped(products.routes.indices, shape), every)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Σ_j acts_j W_dec[j] + b_dec for codes (..., K); the skip connection is not part of it."""
        shape = top_acts.shape[:-1]
        routes = Routes(_rows(top_indices), None, self.num_latents)
        if top_acts.is_inference() and not torch.is_inference_mode_enabled():
            top_acts = top_acts.clone()  # autograd cannot save tensors made under inference_mode
        y = decode(_rows(top_acts).to(self.dtype), routes, self.decoder_rows())
        return _shaped(y + self.b_dec, shape)

    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x)) with the skip connection: what is grafted into a model. (..., D) to (..., Do)."""
        acts, indices, _ = self.encode(x)
        return self.skipped(self.decode(acts, indices), x)

    def skipped(self, y: Tensor, x: Tensor) -> Tensor:
        """y plus the skip connection of x, where this coder has one."""
        return y if self.W_skip is None else y + product(x.to(self.dtype), self.W_skip.T)

    # ------------------------------------------------------------------ losses

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
        total_tokens: float | Tensor | None = None,
        total: Callable[[Tensor], Tensor] | None = None,
        k: int | None = None,
    ) -> ForwardOutput:
        """Reconstruct x, or predict y from it, with every loss the configuration asks for.

        Args:
            x: (..., D). y: (..., Do), x itself by default.
            dead_mask: (M,) bool, the latents AuxK should revive.
            total_variance: Σ‖y − ȳ‖² of the whole batch, where x is only a chunk of it; losses are then x's shares.
            total_tokens: its number of tokens.
            total: from a sum over x's tokens to the sum over the whole batch's.
            k: active latents, where a schedule sets it; ``cfg.k`` by default.
        """
        k = self.cfg.k if k is None else k
        flat, shape = self._flat(x), x.shape[:-1]
        target = flat if y is None else _rows(y).to(self.dtype)
        if total_variance is None:
            total_variance = (target - target.mean(0)).square().sum()
        tokens = max(target.shape[0], 1) if total_tokens is None else total_tokens
        batch = Batch(total_variance, tokens, total or (lambda own: own))
        dead, k_aux = self._dead(dead_mask)
        rules: list[Rule] = [self._rule(k)]
        if k_aux:
            rules.append(Among(dead, k_aux))
        values, routes, widths = chosen_products(flat, self.encoder.weight, self.encoder.bias, self.centre, rules)

        base = self.skipped(self.b_dec, flat)
        zero = values.new_zeros(())
        main, main_routes = _columns(values, routes, slice(0, widths[0]))
        acts, code_routes, out, multi = self._reconstruction(main, main_routes, base, k, target, total_variance)
        fvu = (target - out).square().sum() / total_variance
        auxk = zero
        if k_aux:
            aux, aux_routes = _columns(values, routes, slice(widths[0], None))
            guess = decode(aux.relu(), aux_routes, self.decoder_rows())
            # Gao et al. 2024, A.2; fewer dead latents than k_aux count for proportionally less.
            scale = min(dead.numel() / (self.d_out // 2), 1.0)
            auxk = scale * (guess - (target - out).detach()).square().sum() / total_variance
        nested = self._nested(acts, code_routes, base, target, total_variance) if self.cfg.matryoshka else zero
        sparsity = self.activation.loss(self, main, main_routes, k, target, batch)
        return ForwardOutput(
            _shaped(out, shape),
            _shaped(acts, shape),
            _shaped(code_routes.indices, shape),
            fvu,
            auxk,
            zero if multi is None else multi,
            nested,
            zero if sparsity is None else sparsity,
        )

    def _reconstruction(
        self, products: Tensor, routes: Routes, base: Tensor, k: int, target: Tensor, variance: Tensor
    ) -> tuple[Tensor, Routes, Tensor, Tensor | None]:
        """The code with its routes, the reconstruction, and Multi-TopK's FVU."""
        acts = self.activation.values(self, products, routes)
        if not self.cfg.multi_topk:
            return acts, routes, decode(acts, routes, self.decoder_rows()) + base, None
        # The 4k entries are in order, so the first k are the code and the rest only refine it.
        first, first_routes = _columns(acts, routes, slice(0, k))
        rest, rest_routes = _columns(acts, routes, slice(k, None))
        out = decode(first, first_routes, self.decoder_rows()) + base
        wide = out + decode(rest, rest_routes, self.decoder_rows())
        return first, first_routes, out, (target - wide).square().sum() / variance

    def _nested(self, acts: Tensor, routes: Routes, base: Tensor, target: Tensor, variance: Tensor) -> Tensor:
        total, out, begin = acts.new_zeros(()), base, 0
        for end in self.cfg.matryoshka[:-1]:
            inside = (routes.indices >= begin) & (routes.indices < end)
            inside = inside if routes.valid is None else inside & routes.valid
            ring = Routes(routes.indices, inside, self.num_latents)
            out = out + decode(acts.masked_fill(~inside, 0.0), ring, self.decoder_rows())
            total = total + (target - out).square().sum() / variance
            begin = end
        return total

    # ------------------------------------------------------------------ parts

    def _rule(self, k: int | None = None) -> Rule:
        return self.activation.rule(self, self.cfg.k if k is None else k)

    def _dead(self, mask: Tensor | None) -> tuple[Tensor, int]:
        if mask is None:
            return torch.empty(0, dtype=torch.long), 0
        dead = mask.nonzero().squeeze(1)
        return dead, min(self.d_out // 2, dead.numel())

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise DataError(f"expected vectors of width {self.d_in}, found a tensor of shape {tuple(x.shape)}")
        return _rows(x).to(self.dtype)

    def decoder_rows(self) -> Tensor:
        """``W_dec`` (M, Do), where this coder has one."""
        if self.W_dec is None:
            raise ConfigError("this coder was loaded with decoder=False, so it can only encode")
        return self.W_dec

    # ------------------------------------------------------------------ between steps

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor) -> None:
        """Fit what a first batch can tell: x is (N, D), y (N, Do).

        Outputs start at the mean of y, and transcoders read inputs around x's mean. The encoder of an autoencoder that
        keeps a fixed number of latents is scaled by the one factor that minimises the FVU (Gao et al. 2024, A.1, with
        the batch in place of unit vectors): activations start at the data's scale instead of spending the warm-up
        growing to it. JumpReLU thresholds start where 4k latents fire.
        """
        x, y = self._flat(x), _rows(y).to(self.dtype)
        self.b_dec.copy_(y.mean(0))
        if self.cfg.transcode:
            self.encoder.bias.copy_(-(self.encoder.weight @ x.mean(0)))
        elif self.activation.scale_free and not self.cfg.tied:
            self._fit_scale(x)
        self.activation.initialise(self, x)

    def _fit_scale(self, x: Tensor) -> None:
        products = chosen_products(x, self.encoder.weight, self.encoder.bias, self.b_dec, [self._rule()])
        guess = decode(products.values.relu(), products.routes, self.decoder_rows())
        # argmin_α ‖(x − b) − α guess‖²; products are linear in the weights, and the top k does not depend on α > 0.
        scale = ((x - self.b_dec) * guess).sum() / guess.square().sum()
        if scale > 0:
            self.encoder.weight.mul_(scale)

    @torch.no_grad()
    def after_step(self) -> None:
        """Project back onto the constraints: unit decoder rows, thresholds not below zero."""
        if self.W_dec is not None and self.cfg.normalize_decoder and not self.cfg.transcode:
            self.set_decoder_norm_to_unit_norm()
        self.activation.after_step(self)

    @torch.no_grad()
    def set_decoder_norm_to_unit_norm(self) -> None:
        """Divide each decoder row by its length; rows of zeros stay."""
        weight = self.decoder_rows()
        tiny = torch.finfo(weight.dtype).tiny
        weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(tiny))

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        """Make each decoder row's gradient orthogonal to the row."""
        weight = self.decoder_rows()
        if weight.grad is not None:
            weight.grad.addcmul_(torch.linalg.vecdot(weight.grad, weight)[:, None], weight, value=-1)

    def tie(self) -> None:
        """Make the decoder's rows the encoder's own again, after something has moved or replaced them."""
        weight = self.encoder.weight
        assert isinstance(weight, nn.Parameter)
        self.W_dec = weight

    # ------------------------------------------------------------------ files

    def save_to_disk(self, path: Path | str) -> None:
        """Write ``cfg.json`` and ``sae.safetensors``, which EleutherAI's sparsify reads too."""
        from sparsify._files import save_coder

        save_coder(self, Path(path))

    @staticmethod
    def load_from_disk(path: Path | str, device: str | torch.device = "cpu", *, decoder: bool = True) -> SparseCoder:
        """Read a folder that this package or EleutherAI's sparsify wrote."""
        from sparsify._files import load_coder

        return load_coder(Path(path), device, decoder)

    @staticmethod
    def load_from_hub(
        name: str,
        hookpoint: str | None = None,
        device: str | torch.device = "cpu",
        *,
        decoder: bool = True,
        revision: str | None = None,
        token: str | None = None,
    ) -> SparseCoder:
        """``Sae.load_from_hub("EleutherAI/sae-llama-3-8b-32x", hookpoint="layers.10")``."""
        from sparsify._files import load_from_hub

        return load_from_hub(name, hookpoint, device, decoder, revision, token)

    @staticmethod
    def load_many(
        name: str,
        local: bool = False,
        layers: list[str] | None = None,
        device: str | torch.device = "cpu",
        *,
        decoder: bool = True,
        pattern: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> dict[str, SparseCoder]:
        """Every coder of a repository or (``local=True``) folder by hookpoint, naturally sorted.

        ``pattern`` is a glob over hookpoints; ``layers`` lists them.
        """
        from sparsify._files import load_many

        return load_many(name, local, layers, device, decoder, pattern, revision, token)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    return rows.reshape(*shape, rows.shape[-1])


def _columns(values: Tensor, routes: Routes, columns: slice) -> tuple[Tensor, Routes]:
    """Part of a code; the whole keeps its routes, so that one sort serves encoder and decoder."""
    part = values[:, columns]
    if part.shape[1] == values.shape[1]:
        return values, routes
    valid = None if routes.valid is None else routes.valid[:, columns]
    return part, Routes(routes.indices[:, columns].contiguous(), valid, routes.latents)


Sae = SparseCoder
