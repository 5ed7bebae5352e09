"""Latents as one HTML page: how often each fires, its strongest contexts with highlighted tokens, what it promotes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify._contexts import Context, Latent
from sparsify._errors import DataError
from sparsify._evaluate import Evaluation


@dataclass(frozen=True)
class Piece:
    """A token's text and how strongly it is shaded, 0 to 1."""

    text: str
    shade: float
    act: float
    peak: bool


def write_dashboard(
    path: Path | str,
    latents: Mapping[str, Sequence[Latent]],
    tokenizer: Any,
    *,
    title: str = "Latents",
    evaluation: Evaluation | None = None,
) -> Path:
    """Write the page: one file, no scripts, nothing loaded from elsewhere, every text escaped.

    >>> write_dashboard("latents.html", top_contexts(model, coders, rows), tokenizer)  # doctest: +SKIP

    Args:
        latents: by coder, as `top_contexts` finds them.
        tokenizer: turns ids into text.
        evaluation: adds the coders' metrics.

    Raises:
        DataError: there is nothing to show.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if not any(latents.values()):
        raise DataError("there are no latents to show")
    environment = Environment(
        loader=PackageLoader("sparsify", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("dashboard.html.jinja").render(
        title=title,
        latents=latents,
        metrics=evaluation.reconstruction if evaluation else {},
        grafted=evaluation.grafted if evaluation else {},
        recovered=evaluation.recovered if evaluation else {},
        pieces=lambda context, top: pieces(context, top, tokenizer),
        token=lambda token: shown(tokenizer.decode([token])),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def pieces(context: Context, top: float, tokenizer: Any) -> list[Piece]:
    """The window's tokens as text, shaded relative to the latent's strongest activation ``top``.

    Texts join to what the tokenizer makes of all ids, spaces included: a token alone often loses its space.
    """
    found: list[Piece] = []
    strongest = max(range(len(context.acts)), key=lambda place: context.acts[place])
    done = ""
    for place, act in enumerate(context.acts):
        whole = tokenizer.decode(list(context.tokens[: place + 1]))
        # A character that spans tokens shows as a replacement mark until its last byte has come.
        text = whole[len(done) :] if whole.startswith(done) and not whole.endswith("\ufffd") else ""
        done = whole if text else done
        found.append(Piece(text, min(1.0, act / top) if top else 0.0, act, place == strongest))
    return found


def shown(text: str) -> str:
    """A token's text with its white space visible.

    >>> shown(" a\\n")
    '␣a⏎'
    """
    return text.replace(" ", "␣").replace("\n", "⏎") or "∅"
