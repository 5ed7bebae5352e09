"""A gradient store as a Hugging Face dataset: the columns it was built from, and the gradients beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from attribute._errors import RunError
from gradcore import select_modules
from gradstore import GradientStore

if TYPE_CHECKING:
    from datasets import Dataset

GRADIENTS = "gradients"
_BYTES = 64 << 20  # of gradients held at a time


def load_gradient_dataset(
    index: str | Path | GradientStore,
    *,
    modules: str | Sequence[str] | None = None,
    structured: bool = False,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """The rows of an index as a ``datasets.Dataset`` with a column ``gradients``.

    Example::

        dataset = load_gradient_dataset("runs/example").with_format("numpy")
        dataset[3]["text"], dataset[3]["gradients"].shape     # "Once upon …", (8960,)
        dataset.push_to_hub("me/gradients")                   # plain columns: whoever loads it needs nothing of ours

    Args:
        index: a run folder, or an opened store.
        modules: patterns of the modules whose gradients are given; all by default.
        structured: let ``gradients`` be a dictionary of module name to floats instead of one vector of all modules.
        cache_dir: where the Arrow file lies, the datasets library's cache by default.

    Returns:
        A memory-mapped dataset in the order of the index: its original columns; ``loss``, ``tokens`` and what else the
        index keeps beside a row, but for names that an original column has; and ``gradients`` as the store decodes
        them, ``[width]`` float32. In an index with a row per token a record is a document, and these are lists over its
        tokens. Made once, at four bytes a float whatever the store's encoding, and found again for the same store,
        modules and form.

    Raises:
        RunError: the records have a column ``gradients`` of their own, or the index was built without its records.
    """
    from datasets import Dataset, config

    store = index if isinstance(index, GradientStore) else GradientStore.open(index)
    if not store.manifest.data:
        raise RunError(f"{store.path} was built without its records (data=False): read it with store.block instead")
    if not store.complete or not store.manifest.items:
        raise RunError(f"{store.path} is {'empty' if store.complete else 'unfinished'}: build it first")
    names = list(store.columns) if modules is None else select_modules(store.columns, modules)
    shaped_by = json.dumps([store.manifest.fingerprint, names, structured])
    folder = Path(cache_dir or config.HF_DATASETS_CACHE) / "gradient_stores"
    file = folder / f"{sha256(shaped_by.encode()).hexdigest()[:32]}.arrow"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(store, names, structured, file)
    return Dataset.from_file(str(file))


def _write(store: GradientStore, names: Sequence[str], structured: bool, file: Path) -> None:
    """The Arrow file, whole or not at all; a part of a shard is in memory at a time."""
    texts = pa.unify_schemas(
        [pa.Table.from_pylist(_records(store, *span)).schema for span in _spans(store)], promote_options="permissive"
    )
    if GRADIENTS in texts.names:
        raise RunError(f"the records of {store.path} have a column {GRADIENTS!r} of their own: rename it, build again")
    side = {name: store.side(name) for name in store.manifest.side if name not in texts.names}
    temp = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    writer = None
    try:
        for start, stop in _spans(store):
            records = pa.Table.from_pylist(_records(store, start, stop), schema=texts).combine_chunks()
            columns: dict[str, Any] = dict(zip(texts.names, records.columns))
            offsets = np.arange(start, stop + 1) if store.offsets is None else store.offsets[start : stop + 1]
            rows = slice(int(offsets[0]), int(offsets[-1]))
            beside = {name: _list_of(values[rows]) for name, values in side.items()}
            beside[GRADIENTS] = _gradients(store, rows, names, structured)
            if store.offsets is not None:
                lists = pa.array(offsets - offsets[0], pa.int32())
                beside = {name: pa.ListArray.from_arrays(lists, values) for name, values in beside.items()}
            table = pa.table({**columns, **beside})
            writer = writer or pa.ipc.new_stream(str(temp), table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
        temp.replace(file)
    finally:
        if writer is not None:
            writer.close()
        temp.unlink(missing_ok=True)


def _spans(store: GradientStore) -> Iterator[tuple[int, int]]:
    """Records `start` to `stop`, few enough to be held as float32."""
    tokens = store.rows / max(store.manifest.items, 1)
    step = max(1, int(_BYTES / (4 * max(store.width, 1) * max(tokens, 1))))
    return ((start, min(start + step, store.manifest.items)) for start in range(0, store.manifest.items, step))


def _records(store: GradientStore, start: int, stop: int) -> list[dict[str, Any]]:
    return [store.item(number) for number in range(start, stop)]


def _gradients(store: GradientStore, rows: slice, names: Sequence[str], structured: bool) -> pa.Array:
    values = store.block(rows.start, rows.stop, modules=names)
    if not structured:
        return _list_of(values)
    stops = np.cumsum([store.layout.widths[m] for m in store.select(names) or ()])
    parts = np.split(values, stops[:-1], axis=1)
    return pa.StructArray.from_arrays([_list_of(part) for part in parts], names=list(names))


def _list_of(values: np.ndarray) -> pa.Array:
    """``[n]`` as numbers, ``[n, w]`` as lists of w numbers each."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
