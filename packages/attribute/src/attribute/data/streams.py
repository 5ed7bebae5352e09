"""Datasets read as they come (``--streaming``): nothing is downloaded or decoded before its row is wanted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from attribute._errors import DataError
from attribute.config import DataConfig
from attribute.data.sources import Source, files_in, first_line, looks_like_path, of_split

_BATCH = 1000
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def open_stream(config: DataConfig, arguments: dict[str, Any]) -> Source:
    """Open what ``config.dataset`` names as a stream.

    Raises:
        DataError: nothing there, nothing readable, no rows, or a part of a split that needs its length.
    """
    name, start, stop = _part(config.split)
    path = Path(config.dataset).expanduser()
    try:
        stream = _opened(path, name, config, arguments)
    except DataError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated types here
        raise DataError(
            f"{config.dataset!r} cannot be streamed: {type(error).__name__}: {first_line(error)}"
        ) from error
    stream = stream.skip(start) if start else stream
    stream = stream if stop is None else stream.take(max(stop - start, 0))
    return of_stream(config.dataset, stream, split=config.split)


def of_stream(name: str, stream: Any, *, split: str = "") -> Source:
    """A source over a ``datasets.IterableDataset``, whose first record says what its columns are.

    Raises:
        DataError: it has no records, or they cannot be read.
    """

    def batches() -> Iterator[list[dict[str, Any]]]:
        records = iter(stream)
        try:
            while batch := list(islice(records, _BATCH)):
                yield batch
        except DataError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise DataError(f"the stream of {name} broke off: {type(error).__name__}: {first_line(error)}") from error

    first = next(batches(), [])
    if not first:
        raise DataError(f"{name} has no rows" + (f" (split {split!r})" if split else ""))
    return Source(name, tuple(stream.column_names or first[0]), None, batches)


def _opened(path: Path, split: str, config: DataConfig, arguments: dict[str, Any]) -> Any:
    import datasets

    if path.is_dir() and (path / "dataset_info.json").exists() | (path / "dataset_dict.json").exists():
        raise DataError(f"{path} was saved by save_to_disk and is read from the disk as it is: leave --streaming away")
    if path.exists():
        files = of_split(files_in(path) if path.is_dir() else [path], config)
        if files[0].suffix not in _BUILDERS:
            raise DataError(f"{files[0]}: --streaming reads {', '.join(_BUILDERS)}")
        names = [str(file) for file in files]
        kind = _BUILDERS[files[0].suffix]
        return datasets.load_dataset(kind, data_files=names, split="train", streaming=True, **arguments)
    if looks_like_path(config.dataset):
        raise DataError(f"there is no file or folder {config.dataset!r}")
    return datasets.load_dataset(config.dataset, config.subset or None, split=split, streaming=True, **arguments)


def _part(split: str) -> tuple[str, int, int | None]:
    """Name, start and stop of ``train``, ``train[:100]`` or ``train[100:200]``."""
    match = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", split)
    if match is None:
        raise DataError(f"a stream has no length to take {split!r} of: count rows from its start, as in train[:1000]")
    return match[1], int(match[2] or 0), int(match[3]) if match[3] else None
