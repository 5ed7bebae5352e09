"""The commands: ``python -m sparsify MODEL [DATASET] ...`` and ``trace sae train|eval|dashboard|cache|convert|push``.

Importing this module imports no torch: the heavy half of each command is imported when it runs.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from sparsify._config import SaeConfig, TrainConfig
from sparsify._errors import ConfigError
from sparsify._inputs import (
    Artifacts,
    Exclusion,
    errors_as_messages,
    exclusion_of,
    load_model,
    load_rows,
    model_and_rows,
)
from sparsify._options import Command, options_from, parse_assignments


@click.group(help="Train and use sparse autoencoders and transcoders.")
def sae() -> None:
    """The group that `trace` mounts."""


@sae.command("train", cls=Command)
@click.argument("model", default="HuggingFaceTB/SmolLM2-135M")
@click.argument("dataset", default="EleutherAI/SmolLM2-135M-10B")
@options_from(SaeConfig)
@options_from(TrainConfig, skip=("sae",))
@options_from(Artifacts, skip=("precision",))
@click.option("--resume", is_flag=True, help="Go on with the run in save_dir/run_name.")
@click.option("--cache", type=click.Path(exists=True), help="Train on activations kept by `cache`, without MODEL.")
@click.option("--json", "as_json", is_flag=True, help="Print the final averages as JSON.")
def train(model: str, dataset: str, resume: bool, cache: str | None, as_json: bool, **options: Any) -> None:
    """Train sparse coders on the activations of MODEL over DATASET.

    DATASET is a Hub name, a folder a dataset was saved to, a .txt, .jsonl, .csv or .parquet file, or a .bin memory map
    of 16-bit token ids. Under torchrun every process trains on its own share.
    """
    with errors_as_messages():
        own = [f.name for f in fields(Artifacts) if f.name != "precision"]
        artifacts = Artifacts(**{name: options.pop(name) for name in own}, precision=options["precision"])
        coder = SaeConfig(**{f.name: options.pop(f.name) for f in fields(SaeConfig)})
        cfg = TrainConfig(sae=coder, **options)
        parse_assignments(artifacts.data_args)  # refused before anything is loaded
        if cache is not None:
            averages, folder = _train_from_cache(cache, cfg, artifacts, resume)
        else:
            averages, folder = _train(model, dataset, cfg, artifacts, resume)
    if averages is None:
        return
    if as_json:
        click.echo(json.dumps({"folder": folder, **averages}))
        return
    for name in sorted(averages):
        if name.startswith("fvu/"):
            hook = name.removeprefix("fvu/")
            l0, silent = averages[f"l0/{hook}"], averages[f"silent/{hook}"]
            click.echo(f"{hook}: FVU {averages[name]:.4f}, L0 {l0:.1f}, silent {silent:.1%}")
        elif name in ("ce", "kl"):
            click.echo(f"{name} {averages[name]:.4f}")
    click.echo(folder)


def _train(
    model: str, dataset: str, cfg: TrainConfig, artifacts: Artifacts, resume: bool
) -> tuple[dict[str, float] | None, str]:
    from sparsify import _load, _parallel
    from sparsify._trainer import Trainer

    with _parallel.joined() as local_rank:
        first = _parallel.Processes().first
        device = _load.pick_device(artifacts.device, local_rank)
        if artifacts.exclude_special:
            ids = _load.special_ids(model, artifacts.revision, artifacts.hf_token)
            cfg = replace(cfg, exclude_tokens=(*cfg.exclude_tokens, *ids))
        loaded = load_model(model, artifacts, head=cfg.loss_fn != "fvu", device=device)
        with _parallel.first_alone():  # the others find the tokenized dataset in the cache
            rows = load_rows(model, dataset, artifacts)
        recipe = {"model": model, "dataset": dataset}
        recipe |= {
            f.name: getattr(artifacts, f.name) for f in fields(Artifacts) if f.name not in ("hf_token", "device")
        }
        trainer = Trainer(cfg, rows, loaded, recipe=recipe)
        if resume:
            trainer.load_state()
        trainer.fit()
        return (trainer.averages if first else None), str(trainer.folder)


# What a cache has settled: these say how activations are made, and it holds them made.
_SETTLED = ("model", "dataset", "batch_size", *(f.name for f in fields(Artifacts)))
_STILL_OPEN = ("device", "precision", "exclude_special", "hf_token")


def _train_from_cache(
    folder: str, cfg: TrainConfig, artifacts: Artifacts, resume: bool
) -> tuple[dict[str, float] | None, str]:
    context = click.get_current_context()
    for name in _SETTLED:
        if name not in _STILL_OPEN and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            shown = name.upper() if name in ("model", "dataset") else f"--{name}"
            raise ConfigError(f"{shown} would do nothing, since --cache holds activations already made: leave it out")
    from sparsify import _load, _parallel
    from sparsify._cache import ActivationCache
    from sparsify._trainer import Trainer

    with _parallel.joined() as local_rank:
        processes = _parallel.Processes()
        cache = ActivationCache(folder)
        recipe = cache.manifest["recipe"]
        if artifacts.exclude_special:
            if "model" not in recipe:
                raise ConfigError(
                    f"--exclude_special: {folder} does not say whose tokens it holds: use --exclude_tokens"
                )
            ids = _load.special_ids(recipe["model"], recipe.get("revision"), artifacts.hf_token)
            cfg = replace(cfg, exclude_tokens=(*cfg.exclude_tokens, *ids))
        cfg = replace(cfg, batch_size=cache.manifest["batch_size"])
        source = cache.source_for(cfg, (processes.rank, processes.world))
        trainer = Trainer(cfg, source=source, device=_load.pick_device(artifacts.device, local_rank), recipe=recipe)
        if resume:
            trainer.load_state()
        trainer.fit()
        return (trainer.averages if processes.first else None), str(trainer.folder)


@sae.command("eval", cls=Command)
@click.argument("model")
@click.argument("dataset")
@click.argument("coders", type=click.Path(exists=True, file_okay=False))
@options_from(Artifacts, skip=("load_in_8bit",))
@options_from(Exclusion)
@click.option("--all_tokens", is_flag=True, help="Judge every token, also those that training left out.")
@click.option("--batch_size", default=8, help="Rows per batch.")
@click.option("--max_batches", type=int, help="Stop after this many batches.")
@click.option("--out", type=click.Path(), help="Where to write the result; CODERS/eval.json by default.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate_command(
    model: str,
    dataset: str,
    coders: str,
    batch_size: int,
    max_batches: int | None,
    out: str | None,
    as_json: bool,
    all_tokens: bool,
    **options: Any,
) -> None:
    """Judge the coders in the folder CODERS by reconstruction, and by CE and KL when grafted into MODEL.

    The tokens that their training left out, as CODERS/config.json says, are left out here too: give others, or
    --all_tokens.
    """
    with errors_as_messages():
        from rich.console import Console

        from sparsify import _load
        from sparsify._evaluate import evaluate
        from sparsify._files import load_many
        from sparsify._plots import plot_evaluation
        from sparsify._progress import stages

        given = Exclusion(**{f.name: options.pop(f.name) for f in fields(Exclusion)})
        artifacts = Artifacts(**options)
        left_out = _left_out(coders, model, given, artifacts, all_tokens)
        loaded, rows = model_and_rows(model, dataset, artifacts, head=True)
        found = load_many(coders, True, None, _load.pick_device(artifacts.device), True)
        with stages() as progress:
            shared = {"batch_size": batch_size, "max_batches": max_batches, "progress": progress}
            result = evaluate(loaded, found, rows, **left_out, **shared)
        target = Path(out or f"{coders}/eval.json")
        result.save(target)
        plot_evaluation(result, target.with_suffix(".svg"))
        if as_json:
            click.echo(json.dumps(result.to_dict()))
        else:
            Console().print(result.table())
            click.echo(f"{target} and {target.with_suffix('.svg')}", err=True)


def _left_out(coders: str, model: str, given: Exclusion, artifacts: Artifacts, all_tokens: bool) -> dict[str, Any]:
    """The tokens that `evaluate` leaves out: those given, else those of training, of which a line tells."""
    from sparsify import _load

    ids, ratio = given.exclude_tokens, given.max_norm_ratio
    if all_tokens and (ids or ratio or artifacts.exclude_special):
        raise ConfigError("--all_tokens leaves nothing out: give either it, or what to leave out")
    if artifacts.exclude_special:
        ids = (*ids, *_load.special_ids(model, artifacts.revision, artifacts.hf_token))
    trained = Exclusion() if all_tokens else exclusion_of(coders)
    told: list[str] = []
    if not ids and trained.exclude_tokens:
        ids = trained.exclude_tokens
        told.append(f"--exclude_tokens {' '.join(map(str, ids))}")
    if ratio is None and trained.max_norm_ratio:
        ratio = trained.max_norm_ratio
        told.append(f"--max_norm_ratio {ratio:g}")
    if told:
        click.echo(f"as in training: {' '.join(told)} (--all_tokens judges every token)", err=True)
    return {"exclude": ids, "max_norm_ratio": ratio or 0.0}


@sae.command("dashboard", cls=Command)
@click.argument("model")
@click.argument("dataset")
@click.argument("coders", type=click.Path(exists=True, file_okay=False))
@options_from(Artifacts, skip=("load_in_8bit", "exclude_special"))
@click.option("--latents", multiple=True, type=int, help="Which latents; by default a sample of those that fire.")
@click.option("--sample", default=24, help="How many latents a coder, where none are named.")
@click.option("--contexts", default=6, help="Contexts a latent.")
@click.option("--batch_size", default=8, help="Rows per batch.")
@click.option("--max_batches", type=int, help="Stop after this many batches.")
@click.option("--out", type=click.Path(dir_okay=False), help="The page; CODERS/dashboard.html by default.")
def dashboard_command(
    model: str,
    dataset: str,
    coders: str,
    latents: tuple[int, ...],
    sample: int,
    contexts: int,
    batch_size: int,
    max_batches: int | None,
    out: str | None,
    **options: Any,
) -> None:
    """Show what makes the latents of the coders in CODERS fire on DATASET, as one HTML page."""
    with errors_as_messages():
        from sparsify import _load
        from sparsify._contexts import top_contexts
        from sparsify._dashboard import write_dashboard
        from sparsify._evaluate import evaluate
        from sparsify._files import load_many
        from sparsify._progress import stages

        artifacts = Artifacts(**options)
        loaded, rows = model_and_rows(model, dataset, artifacts, head=True)
        found = load_many(coders, True, None, _load.pick_device(artifacts.device), True)
        with stages() as progress:
            shared = {"batch_size": batch_size, "max_batches": max_batches, "progress": progress}
            many = {"sample": sample, "contexts": contexts}
            shown = top_contexts(loaded, found, rows, latents=latents or None, **many, **shared)
            judged = evaluate(loaded, found, rows, **shared)
        tokenizer = _load.load_tokenizer(model, artifacts.revision, artifacts.hf_token)
        page = write_dashboard(
            out or f"{coders}/dashboard.html",
            shown,
            tokenizer,
            title=f"Latents of {coders} on {dataset}",
            evaluation=judged,
        )
        click.echo(str(page))


@sae.command("cache", cls=Command)
@click.argument("model")
@click.argument("dataset")
@click.argument("out", type=click.Path(file_okay=False))
@options_from(Artifacts, skip=("load_in_8bit", "exclude_special"))
@click.option("--hookpoints", multiple=True, help="Module-name patterns; every layer's output by default.")
@click.option("--batch_size", default=32, help="Rows per file.")
@click.option("--max_batches", type=int, help="Stop after this many batches.")
@click.option("--pairs", is_flag=True, help="Keep inputs too, for transcoders.")
def cache_command(
    model: str,
    dataset: str,
    out: str,
    hookpoints: tuple[str, ...],
    batch_size: int,
    max_batches: int | None,
    pairs: bool,
    **options: Any,
) -> None:
    """Compute activations of MODEL over DATASET once and keep them in the folder OUT; run again to go on or append."""
    with errors_as_messages():
        from sparsify._cache import build_cache
        from sparsify._progress import stages

        loaded, rows = model_and_rows(model, dataset, Artifacts(**options), head=False)
        with stages() as progress:
            cache = build_cache(
                out,
                loaded,
                rows,
                hookpoints,
                batch_size=batch_size,
                pairs=pairs,
                max_batches=max_batches,
                recipe={"model": model, "dataset": dataset, "revision": options["revision"]},
                progress=progress,
            )
        click.echo(f"{len(cache)} batches of {', '.join(cache.hookpoints)}, {cache.bytes / 2**20:,.1f} MiB in {out}")


@sae.command("convert", cls=Command)
@click.argument("source", type=click.Path(exists=True))
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--to", "layout", default="sparsify", help="sparsify, saelens, dictionary_learning or circuit_tracer.")
@click.option("--layout", "seen", help="What SOURCE is, where its files leave a doubt.")
@click.option("--allow_pickle", is_flag=True, help="Read .pt files too (tensors and plain values only).")
@click.option("--dict_class", help="dictionary_learning's class, where no config.json names it.")
@click.option("--act_mean", type=click.Choice(["fold", "ignore"]), help="What to do with a stored act_mean.")
@click.option("--allow_inexact", is_flag=True, help="Write TopK transcoders for circuit-tracer.")
@click.option("--metadata", default="", help='What the layout wants to know, as "name=value,name=value".')
def convert_command(
    source: str,
    out: str,
    layout: str,
    seen: str | None,
    allow_pickle: bool,
    dict_class: str | None,
    act_mean: str | None,
    allow_inexact: bool,
    metadata: str,
) -> None:
    """Rewrite the coders in SOURCE, of whatever library, in another library's layout under OUT."""
    with errors_as_messages():
        from sparsify import convert

        found = convert.load(source, layout=seen, allow_pickle=allow_pickle, dict_class=dict_class, act_mean=act_mean)
        told = parse_assignments(metadata, "--metadata")
        convert.save(found.coders, out, layout, metadata=told, allow_inexact=allow_inexact)
        click.echo(f"{found.layout} → {layout}: {', '.join(found.coders)}")


@sae.command("push", cls=Command)
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.argument("repo")
@click.option("--revision", default="main", help="Branch, made where missing.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--license", help="Licence of the weights, for the card.")
@click.option("--dry_run", is_flag=True, help="List the files and stop; contacts nothing.")
@click.option("--hf_token", help="Hub token; the one logged in with by default.")
def push_command(
    folder: str, repo: str, revision: str, private: bool, license: str | None, dry_run: bool, hf_token: str | None
) -> None:
    """Upload the coders in FOLDER to the Hub repository REPO, with a model card, in one commit."""
    with errors_as_messages():
        from sparsify._hub import push_to_hub

        done = push_to_hub(
            folder, repo, revision=revision, private=private, license=license, dry_run=dry_run, token=hf_token
        )
        for name, size in done.files.items():
            click.echo(f"{size:>12,} {name}")
        click.echo("nothing was uploaded" if done.commit_url is None else done.commit_url)
