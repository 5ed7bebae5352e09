"""The commands: ``python -m sparsify MODEL [DATASET] ...`` and ``trace sae train|eval|dashboard|cache|convert|push``.

Importing this module imports no torch: the heavy half of each command is imported when it runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from sparsify._config import SaeConfig, TrainConfig
from sparsify._errors import ConfigError, SparsifyError
from sparsify._options import Command, options_from, parse_assignments


@dataclass(frozen=True)
class Artifacts:
    """What to train on; the rest of a command line is `SaeConfig` and `TrainConfig`."""

    split: str = "train"
    """Dataset split."""
    ctx_len: int = 2048
    """Tokens per row."""
    hf_token: str | None = None
    """Hub token; never written anywhere."""
    revision: str | None = None
    """Model revision."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of the model: auto is bf16 on a GPU that has it, elsewhere as it was saved."""
    load_in_8bit: bool = False
    """Load the model in 8 bits, by bitsandbytes."""
    max_examples: int | None = None
    """At most this many rows; required for streamed datasets."""
    text_column: str = "text"
    """The dataset's column of text."""
    shuffle_seed: int = 42
    """Seed with which rows are shuffled."""
    data_preprocessing_num_proc: int = 1
    """Processes that tokenize."""
    data_args: str = ""
    """Arguments for load_dataset, as "name=value,name=value"."""
    exclude_special: bool = False
    """Add the tokenizer's special ids (bos, eos, ...) to exclude_tokens."""
    device: str | None = None
    """cpu, cuda:0, mps ...; by default the best there is."""


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
        arguments = parse_assignments(artifacts.data_args)
        if cache is not None:
            averages, folder = _train_from_cache(cache, cfg, artifacts, resume)
        else:
            averages, folder = _train(model, dataset, cfg, artifacts, arguments, resume)
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
    model: str, dataset: str, cfg: TrainConfig, artifacts: Artifacts, arguments: dict[str, Any], resume: bool
) -> tuple[dict[str, float] | None, str]:
    from sparsify import _load, _parallel
    from sparsify._trainer import Trainer

    with _parallel.joined() as local_rank:
        first = _parallel.Processes().first
        device = _load.pick_device(artifacts.device, local_rank)
        if artifacts.exclude_special:
            ids = _load.special_ids(model, artifacts.revision, artifacts.hf_token)
            cfg = replace(cfg, exclude_tokens=(*cfg.exclude_tokens, *ids))
        loaded = _load.load_model(
            model,
            head=cfg.loss_fn != "fvu",
            revision=artifacts.revision,
            token=artifacts.hf_token,
            eight_bit=artifacts.load_in_8bit,
            device=device,
            precision=artifacts.precision,
        )
        with _parallel.first_alone():  # the others find the tokenized dataset in the cache
            rows = _load.load_rows(
                dataset,
                model,
                split=artifacts.split,
                ctx_len=artifacts.ctx_len,
                max_examples=artifacts.max_examples,
                text_column=artifacts.text_column,
                shuffle_seed=artifacts.shuffle_seed,
                num_proc=artifacts.data_preprocessing_num_proc,
                arguments=arguments,
                revision=artifacts.revision,
                token=artifacts.hf_token,
            )
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
    **options: Any,
) -> None:
    """Judge the coders in the folder CODERS by reconstruction, and by CE and KL when grafted into MODEL."""
    with errors_as_messages():
        from rich.console import Console

        from sparsify import _load
        from sparsify._evaluate import evaluate
        from sparsify._files import load_many
        from sparsify._plots import plot_evaluation
        from sparsify._progress import stages

        artifacts = Artifacts(**options)
        loaded, rows = _model_and_rows(model, dataset, artifacts, head=True)
        found = load_many(coders, True, None, _load.pick_device(artifacts.device), True)
        exclude = _load.special_ids(model, artifacts.revision, artifacts.hf_token) if artifacts.exclude_special else ()
        with stages() as progress:
            shared = {"batch_size": batch_size, "max_batches": max_batches, "progress": progress}
            result = evaluate(loaded, found, rows, exclude=exclude, **shared)
        target = Path(out or f"{coders}/eval.json")
        result.save(target)
        plot_evaluation(result, target.with_suffix(".svg"))
        if as_json:
            click.echo(json.dumps(result.to_dict()))
        else:
            Console().print(result.table())
            click.echo(f"{target} and {target.with_suffix('.svg')}", err=True)


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
        loaded, rows = _model_and_rows(model, dataset, artifacts, head=True)
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

        loaded, rows = _model_and_rows(model, dataset, Artifacts(**options), head=False)
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


def _model_and_rows(model: str, dataset: str, artifacts: Artifacts, *, head: bool) -> tuple[Any, Any]:
    from sparsify import _load

    loaded = _load.load_model(
        model,
        head=head,
        revision=artifacts.revision,
        token=artifacts.hf_token,
        eight_bit=False,
        precision=artifacts.precision,
        device=_load.pick_device(artifacts.device),
    )
    rows = _load.load_rows(
        dataset,
        model,
        split=artifacts.split,
        ctx_len=artifacts.ctx_len,
        max_examples=artifacts.max_examples,
        text_column=artifacts.text_column,
        shuffle_seed=artifacts.shuffle_seed,
        num_proc=artifacts.data_preprocessing_num_proc,
        arguments=parse_assignments(artifacts.data_args),
        revision=artifacts.revision,
        token=artifacts.hf_token,
    )
    return loaded, rows


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Errors made on purpose become one line and exit status 1; anything else is a bug and keeps its traceback."""
    try:
        yield
    except SparsifyError as error:
        raise click.ClickException(str(error)) from None
