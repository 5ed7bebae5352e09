"""Building a gradient store from a model and a dataset, resumably."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from attribute._errors import DataError, RunError
from attribute._fidelity import Yardstick, share_by_energy
from attribute._shared_writer import shared_writer
from attribute.config import IndexConfig
from attribute.data import Row, Source, TokenFile, TokenFileWriter, rows_of, shared_source
from attribute.data.rewards import weights_of
from attribute.engine import MatrixSink, StoreSink, document_windows, run_pass
from attribute.model import LanguageModel, load_tokenizer, model_of
from attribute.normalizing import normalizer_for, save_normalizer
from attribute.processes import current
from attribute.progress import Progress, Quiet
from attribute.run import (
    RECORDS,
    is_begun,
    refuse_finished,
    remove_run,
    require_same_inputs,
    require_same_options,
    scratch_beside,
)
from attribute.spectral import fit_basis, plan_of, save_basis
from gradcore import (
    AttentionConfig,
    Budgeted,
    CapturePlan,
    Fidelity,
    Identity,
    Normalizer,
    Spectral,
    coverage,
    share_floats,
    with_residual,
)
from gradstore import GradientStore, StoreWriter


def build_index(
    path: str | Path,
    config: IndexConfig,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_begun: Callable[[], None] | None = None,
) -> GradientStore:
    """Collect the gradient of every row of a dataset into a store: what ``trace build`` does.

    An interrupted run of the same configuration is continued; finished shards are kept.

    Args:
        path: the run folder.
        config: model, data, sketch and batching.
        overwrite: replace a run that exists.
        progress: told of each stage.
        on_begun: called once the run folder is there and before the first gradient, so that notes for continuing the
            run can be left in it.

    Raises:
        RunError: the folder exists and is not a run that this configuration began.
        DataError, ModelError: see :func:`open_source` and :func:`load_model`.
    """
    refuse_finished(path, overwrite)
    source = shared_source(config.data)
    tokenizer = load_tokenizer(config.tokenizer or config.model, config.revision)
    model = model_of(config)
    return collect_gradients(
        model,
        source,
        path,
        tokenizer=tokenizer,
        config=config,
        overwrite=overwrite,
        progress=progress,
        on_begun=on_begun,
    )


def collect_gradients(
    model: nn.Module | LanguageModel,
    data: Source | Any,
    path: str | Path,
    *,
    tokenizer: Any = None,
    config: IndexConfig | None = None,
    attention_cfgs: Mapping[str, AttentionConfig] | None = None,
    normalizer: Normalizer | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_begun: Callable[[], None] | None = None,
) -> GradientStore:
    """Collect per-example gradients of a model you have over data you have.

    Example::

        store = collect_gradients(model, dataset, "runs/example", tokenizer=tokenizer)
        store.block(0, 10)            # [10, width] float32
        store.data(3)["text"]

    Args:
        model: a transformers causal language model.
        data: a ``datasets.Dataset``, a list of dictionaries, or an opened :class:`Source`. A column ``input_ids``
            (and ``labels``) is taken as it is; otherwise the columns of ``config.data`` are tokenised.
        path: the run folder.
        tokenizer: needed unless the data holds ``input_ids``.
        attention_cfgs: pattern of modules → how their heads lie: each head becomes columns of its own,
            ``h.0.attn.c_proj.head_3``.
        normalizer: that of another run, instead of one from where ``config`` says.
        config: everything else; its model name and dataset name are kept as provenance.
        overwrite: replace a run that exists.
        progress: told of each stage.
        on_begun: as for :func:`build_index`.

    Returns:
        The finished store, in dataset order.
    """
    progress, config, path = progress or Quiet(), config or IndexConfig(), Path(path)
    refuse_finished(path, overwrite)
    here = current()
    if here.first and is_begun(path) and not overwrite:
        require_same_options(path, config)
    language_model = model if isinstance(model, LanguageModel) else LanguageModel.wrap(model)
    source = data if isinstance(data, Source) else source_of(data)
    plan = language_model.plan(config, attention_cfgs)
    announce(language_model, plan, progress)

    with scratch_beside(path) as scratch:
        tokens = tokenise(scratch, source, tokenizer, config, language_model, progress)
        if overwrite and here.first:
            remove_run(path)
        begun = here.from_first(lambda: is_begun(path))
        plan, kept = _settled(path, begun, language_model, tokens, plan, config, normalizer, progress)

        @contextmanager
        def begin() -> Iterator[StoreWriter]:
            with _writer(path, tokens, plan, config, language_model.head_fingerprint(), kept) as writer:
                save_normalizer(path, plan.normalizer)
                save_basis(path, plan)
                if on_begun is not None:
                    on_begun()
                yield writer

        with shared_writer(path, begin) as (writer, pending):
            if here.first:
                writer.write_data(records_of(scratch))
            else:
                plan = _of_the_first(path, plan)
            _collect(writer, pending, language_model, tokens, plan, config, progress)
    return GradientStore.open(path)


def _settled(
    path: Path,
    begun: bool,
    model: LanguageModel,
    tokens: TokenFile,
    plan: CapturePlan,
    config: IndexConfig,
    normalizer: Normalizer | None,
    progress: Progress,
) -> tuple[CapturePlan, Fidelity | None]:
    """The plan able to capture, and what a new run's sketch keeps of exact gradients.

    Normaliser and basis are those of the run that is continued, or fitted by the first process alone: sums in another
    order would be other bytes.
    """
    if begun:
        saved = plan_of(GradientStore.open(path, partial=True))
        return replace(plan, normalizer=saved.normalizer, sketch=saved.sketch), None
    if not current().first and not model.sharded:
        return plan, None
    plan = replace(plan, normalizer=normalizer or normalizer_for(model, tokens, plan, config, progress))
    if isinstance(plan.sketch, Identity):
        return plan, None
    fitted = budgeted(model, tokens, plan, config)
    if isinstance(plan.sketch, Spectral):
        equal = config.sketch_budget == "equal"
        fitted = fit_basis(model, tokens, plan, budget=config.token_batch_size, equal=equal, progress=progress)
    yardstick = Yardstick(model, tokens, plan, budget=config.token_batch_size)
    kept = yardstick.judge(fitted)
    if isinstance(fitted.sketch, Spectral) and fitted.sketch.budgets:
        mixed = with_residual(fitted)
        other = yardstick.judge(mixed)
        # The basis alone orders rows well by what they share and loses what sets them apart; where that is most of
        # them, its inner products are the worse ones. Unmeasured, the unbiased one is taken.
        if kept is None or (other is not None and other.error <= kept.error):
            fitted, kept = mixed, other
        assert isinstance(fitted.sketch, Spectral)
        lead = sum(count for _, count in fitted.sketch.budgets)
        progress.note(f"sketch: {lead:,} leading coordinates a row, and {fitted.width - lead:,} floats for the rest")
    if kept is not None:
        progress.note(f"fidelity of the sketch: {kept}")
    return fitted, kept


def budgeted(model: LanguageModel, tokens: TokenFile, plan: CapturePlan, config: IndexConfig) -> CapturePlan:
    """The plan with the floats of an oblivious sketch shared by the modules as the configuration says."""
    if not isinstance(plan.sketch, Budgeted) or config.sketch_budget in ("", "equal"):
        return plan
    if config.sketch_budget == "shape":
        return share_floats(plan)
    return share_by_energy(model, tokens, plan, budget=config.token_batch_size)


def _of_the_first(path: Path, plan: CapturePlan) -> CapturePlan:
    """The plan of the store that the first process made, with its normaliser and basis."""
    found = plan_of(GradientStore.open(path, partial=True))
    if found.model != plan.model:
        raise RunError(f"process {current().rank} has other weights than the first: do all machines have one model?")
    return found


def source_of(data: Any, name: str = "data") -> Source:
    """A :class:`Source` over a ``datasets.Dataset`` or a sequence of records."""
    if hasattr(data, "with_format"):
        from attribute.data.sources import of_dataset

        return of_dataset(name, data)
    records = list(data)
    if not records:
        raise DataError(f"{name} has no rows")
    if not all(isinstance(record, Mapping) for record in records):
        raise DataError(f"{name} is neither a datasets.Dataset nor a list of dictionaries")
    return Source(name, tuple(records[0]), len(records), lambda: iter([records]))


def tokenise(
    scratch: Path, source: Source, tokenizer: Any, config: IndexConfig, model: LanguageModel, progress: Progress
) -> TokenFile:
    """Token ids of all rows, and beside them in the scratch folder the records that hits will show.

    The first of several processes writes them, all read them.
    """
    if tokenizer is None and "input_ids" not in source.columns:
        raise DataError("data without a column input_ids needs a tokenizer")

    without_loss = 0

    def counted(found: Iterable[Row]) -> Iterator[Row]:
        nonlocal without_loss
        with (scratch / RECORDS).open("w", encoding="utf-8") as records:
            for row in found:
                without_loss += not row.labelled.any()
                records.write(json.dumps(row.record) + "\n")
                yield row
                progress.advance(1)

    here = current()
    if not here.first:
        here.barrier()
        tokens = TokenFile(scratch)
        tokens.weigh(weights_of(records_of(scratch), config.data))
        return tokens
    progress.start("tokenise", source.length if not config.data.chunk_length else None, "rows")
    rows = rows_of(source, tokenizer, config.data, model.context)
    try:
        tokens = TokenFileWriter(scratch, model.vocabulary).write(counted(rows))
    except OSError as error:
        raise DataError(f"{scratch}: the tokens cannot be written ({error.strerror or error})") from error
    progress.stop()
    if not len(tokens):
        raise DataError(f"{source.name} has no rows")
    tokens.weigh(weights_of(records_of(scratch), config.data))
    if tokens.weights is not None and not tokens.weights.any():
        raise DataError(f"every row of {source.name} has weight 0: each reward is the mean of its prompt's")
    if without_loss == len(tokens):
        raise DataError(
            f"none of the {len(tokens)} rows of {source.name} has a token with a loss: each has fewer than 2 tokens, "
            "or no completion (within the model's context)"
        )
    if without_loss:
        progress.note(f"{without_loss} of {len(tokens)} rows have no token with a loss: kept, with zero gradient")
    here.barrier()
    return tokens


def records_of(scratch: Path) -> Iterator[dict[str, Any]]:
    """The records of all rows, as :func:`tokenise` left them."""
    with (scratch / RECORDS).open(encoding="utf-8") as records:
        yield from map(json.loads, records)


def announce(model: LanguageModel, plan: CapturePlan, progress: Progress) -> None:
    """Say what is captured, what is not, and what is peculiar about the model."""
    report = coverage(model.base, plan, model.outside)
    progress.note(
        f"{len(plan.modules)} modules, {plan.width:,} floats a row; they hold {report.share:.0%} "
        f"of the model's {report.total:,} parameters"
    )
    if left_out := _left_out(report.left_out, model.outside):
        progress.note(f"not captured: {left_out}")
    for each in plan.modules:
        if each.tied:
            progress.note(f"{each.path} is tied to {', '.join(each.tied)}: its gradient is that of all its uses")
    if not model.fused:
        progress.note("the output head rescales its logits, so the model's own (slower) logits are used")


def _left_out(left_out: Iterable[Any], outside: Container[str]) -> str:
    by_reason: dict[str, int] = {}
    for each in left_out:
        kind = "biases" if each.parameters == ("bias",) else each.kind
        kind = "output embedding" if each.module in outside else kind
        by_reason[kind] = by_reason.get(kind, 0) + each.floats
    return ", ".join(f"{kind} {floats:,}" for kind, floats in by_reason.items())


def _writer(
    path: Path, tokens: TokenFile, plan: CapturePlan, config: IndexConfig, head: str, kept: Fidelity | None
) -> StoreWriter:
    identity = {
        "capture": plan.to_dict(),
        "head": head,
        "tokens": tokens.digest,
        "token_batch_size": config.token_batch_size,
    }
    if is_begun(path):
        require_same_inputs(path, config, weights=plan.model, tokens=tokens.digest)
        return StoreWriter.resume(path, plan=identity)
    return StoreWriter.create(
        path,
        rows=tokens.total if config.attribute_tokens else len(tokens),
        columns=plan.columns,
        plan=identity,
        meta={
            "config": config.to_dict(),
            "sign": "positive scores are proponents",
            "fidelity": None if kept is None else asdict(kept),
        },
        dtype=config.store_dtype,
        rows_per_shard=config.rows_per_shard or None,
        side_columns=() if config.attribute_tokens else ("loss", "tokens"),
        offsets=tokens.offsets if config.attribute_tokens else None,
    )


def _collect(
    writer: StoreWriter,
    spans: list[tuple[int, int, int]],
    model: LanguageModel,
    tokens: TokenFile,
    plan: CapturePlan,
    config: IndexConfig,
    progress: Progress,
) -> None:
    of_tokens = config.attribute_tokens
    pending = document_windows(tokens, spans) if of_tokens else spans
    sink = MatrixSink(writer, tokens.offsets) if of_tokens else StoreSink(writer, plan.width)
    left = sum(int(tokens.offsets[stop] - tokens.offsets[start]) for _, start, stop in pending)
    if left < tokens.total:
        progress.note(f"continuing: {1 - left / tokens.total:.0%} of the tokens are done already")
    progress.start("gradients", left, "tokens")
    run_pass(
        model,
        tokens,
        plan,
        pending,
        [sink],
        budget=config.token_batch_size,
        per_position=of_tokens,
        progress=progress,
        deal="windows",
    )
    progress.stop()
