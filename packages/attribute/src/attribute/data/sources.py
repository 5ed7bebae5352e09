"""Reading datasets: local files through pyarrow, ``save_to_disk`` folders and hub ids through datasets.

``datasets`` is imported only where it is needed: it takes two seconds, and copies plain files into a cache first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribute._errors import DataError
from attribute.config import DataConfig
from attribute.processes import current

if TYPE_CHECKING:
    import pyarrow as pa

_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".txt")
_SPLIT_IN_NAME = re.compile(r"(?:^|[^a-zA-Z])(train|validation|valid|val|dev|test|eval)(?=$|[^a-zA-Z])", re.IGNORECASE)
_BATCH = 1000


@dataclass(frozen=True)
class Source:
    """A dataset opened for reading: its columns, its length (``None``: a stream's), and its records in order, as often
    as asked."""

    name: str
    columns: tuple[str, ...]
    length: int | None
    batches: Callable[[], Iterator[list[dict[str, Any]]]]

    def require(self, *columns: str) -> None:
        """Raise :class:`DataError` unless the columns exist, with close matches."""
        for column in columns:
            if column not in self.columns:
                close = get_close_matches(column, self.columns, n=3, cutoff=0.4)
                hint = f"; did you mean {', '.join(close)}?" if close else ""
                raise DataError(
                    f"{self.name} has no column {column!r}; it has {', '.join(self.columns)}{hint} "
                    "(--prompt-column, --completion-column and --conversation-column choose)"
                )


def open_source(config: DataConfig) -> Source:
    """Open what ``config.dataset`` names.

    Raises:
        DataError: nothing there, nothing readable, an unknown split, or no rows.
    """
    arguments = parse_arguments(config.data_args)
    path = Path(config.dataset).expanduser()
    if config.streaming:
        from attribute.data.streams import open_stream

        return open_stream(config, arguments)
    if path.is_dir() and (path / "dataset_info.json").exists() | (path / "dataset_dict.json").exists():
        source = _from_disk(path, config)
    elif path.is_dir():
        source = _from_files(of_split(files_in(path), config), config, arguments)
    elif path.is_file():
        source = _from_files(of_split([path], config), config, arguments)
    elif looks_like_path(config.dataset):
        raise DataError(f"there is no file or folder {config.dataset!r}")
    else:
        source = _from_hub(config, arguments)
    if not source.length:
        raise DataError(f"{config.dataset} has no rows (split {config.split!r})")
    return source


def shared_source(config: DataConfig) -> Source:
    """:func:`open_source` in the first of several processes; the others learn of what it is, and never read it."""
    here = current()
    if here.world == 1:
        return open_source(config)
    source = open_source(config) if here.first else Source("", (), 0, _unread)
    about = here.from_first(lambda: replace(source, batches=_unread))
    return source if here.first else about


def _unread() -> Iterator[list[dict[str, Any]]]:
    return iter([])


def parse_arguments(text: str) -> dict[str, Any]:
    """``"a=1,b=x"`` to ``{"a": 1, "b": "x"}``; values are read as JSON where they are."""
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise DataError(f"--data-args wants name=value,name=value; {part!r} is not that")
        try:
            found[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[name.strip()] = value
    return found


def looks_like_path(name: str) -> bool:
    """Whether a name cannot be one of the hub's."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(_SUFFIXES)


def files_in(folder: Path) -> list[Path]:
    """The files of the first readable kind that a folder has any of."""
    for suffix in _SUFFIXES:
        if found := sorted(folder.glob(f"*{suffix}")):
            return found
    raise DataError(f"the folder {folder} holds none of {', '.join('*' + each for each in _SUFFIXES)}")


def of_split(files: list[Path], config: DataConfig) -> list[Path]:
    """The files whose names speak of the split (``train.jsonl``, ``test-00000-of-00002.parquet``).

    Where no name speaks of any split, and for a file given by itself, all is ``train``.
    """
    wanted = config.split.partition("[")[0]
    splits: dict[str, list[Path]] = {}
    for file in files:
        if match := _SPLIT_IN_NAME.search(file.stem):
            splits.setdefault(match[1].lower(), []).append(file)
    if not splits or (len(files) == 1 and wanted == "train"):
        splits = {"train": files}
    if wanted not in splits:
        raise DataError(f"{config.dataset} has no split {wanted!r}; it has {', '.join(sorted(splits))} (--split)")
    return splits[wanted]


def _from_files(files: list[Path], config: DataConfig, arguments: dict[str, Any]) -> Source:
    import pyarrow as pa

    if config.subset:
        raise DataError(f"--subset {config.subset} is for datasets of the hub, {config.dataset} is local")
    known = {"sample_by"} if files[0].suffix == ".txt" else set[str]()
    if unknown := sorted(set(arguments) - known):
        raise DataError(f"--data-args: reading {files[0].suffix} takes no {unknown[0]!r} (txt takes sample_by)")
    try:
        table = pa.concat_tables([_read(file, arguments) for file in files], promote_options="default")
    except (pa.ArrowException, ValueError) as error:  # broken JSON and UTF-8 are ValueErrors
        raise DataError(f"{config.dataset} cannot be read: {error}") from error
    start, stop = _slice(config.split, table.num_rows)
    table = table.slice(start, stop - start)

    def batches() -> Iterator[list[dict[str, Any]]]:
        for batch in table.to_batches(max_chunksize=_BATCH):
            yield batch.to_pylist()

    return Source(config.dataset, tuple(table.column_names), table.num_rows, batches)


def _read(file: Path, arguments: dict[str, Any]) -> pa.Table:
    import pyarrow as pa

    if file.suffix == ".parquet":
        import pyarrow.parquet as parquet

        return parquet.read_table(file, memory_map=True)
    if file.suffix == ".txt":
        return pa.table({"text": _texts(file.read_text(encoding="utf-8"), arguments.get("sample_by", "line"))})
    if file.stat().st_size == 0:
        return pa.table({})
    if file.suffix == ".csv":
        import pyarrow.csv as csv

        # Quoted texts have line breaks in them.
        return csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True))
    with file.open(encoding="utf-8") as stream:
        if file.suffix == ".json" and stream.read(4096).lstrip().startswith("["):
            stream.seek(0)
            return _table_of(json.load(stream), file)
    import pyarrow.json as arrow_json

    return arrow_json.read_json(file, read_options=arrow_json.ReadOptions(block_size=1 << 26))


def _table_of(records: list[Any], file: Path) -> pa.Table:
    import pyarrow as pa

    if wrong := next((each for each in records if not isinstance(each, dict)), None):
        raise DataError(f'{file} is a list of {type(wrong).__name__}, not of records such as {{"text": …}}')
    # pyarrow would take the first record's columns for those of all.
    names = dict.fromkeys(name for record in records for name in record)
    return pa.table({name: [record.get(name) for record in records] for name in names})


def _texts(text: str, sample_by: str) -> list[str]:
    if sample_by == "document":
        return [text]
    if sample_by not in ("line", "paragraph"):
        raise DataError(f"sample_by must be line, paragraph or document, not {sample_by!r}")
    parts = text.split("\n" if sample_by == "line" else "\n\n")
    return [part for part in parts if part.strip()]


def _slice(split: str, rows: int) -> tuple[int, int]:
    """Row range of ``name``, ``name[:100]`` or ``name[10%:20%]``."""
    match = re.fullmatch(r"\w+(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if match is None:
        raise DataError(f"the split {split!r} is not of the form train, train[:100] or train[10%:20%]")

    def place(text: str | None, default: int) -> int:
        if text is None:
            return default
        number = round(rows * int(text[:-1]) / 100) if text.endswith("%") else int(text)
        return min(max(number + rows if number < 0 else number, 0), rows)

    start = place(match[1], 0)
    return start, max(start, place(match[2], rows))


def _from_disk(path: Path, config: DataConfig) -> Source:
    import datasets

    if config.data_args or config.subset:
        raise DataError(f"--data-args and --subset are for datasets of the hub: {path} was saved by save_to_disk")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises a dozen unrelated types here
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {first_line(error)}") from error
    name = config.split.partition("[")[0]
    if isinstance(loaded, datasets.DatasetDict):
        if name not in loaded:
            raise DataError(f"{path} has no split {name!r}; it has {', '.join(map(str, loaded))} (--split)")
        loaded = loaded[name]
    start, stop = _slice(config.split, len(loaded))
    return of_dataset(config.dataset, loaded.select(range(start, stop)))


def _from_hub(config: DataConfig, arguments: dict[str, Any]) -> Source:
    import datasets

    try:
        loaded = datasets.load_dataset(config.dataset, config.subset or None, split=config.split, **arguments)
    except Exception as error:  # datasets raises a dozen unrelated types here
        raise DataError(
            f"the dataset {config.dataset!r} is neither a local file or folder nor one that the hub gave: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return of_dataset(config.dataset, loaded)


def of_dataset(name: str, dataset: Any) -> Source:
    """A source over a ``datasets.Dataset``, or over a stream of one."""
    if not hasattr(dataset, "__len__"):
        from attribute.data.streams import of_stream

        return of_stream(name, dataset)

    def batches() -> Iterator[list[dict[str, Any]]]:
        for table in dataset.with_format("arrow").iter(batch_size=_BATCH):
            yield table.to_pylist()

    return Source(name, tuple(dataset.column_names), len(dataset), batches)


def first_line(error: Exception) -> str:
    """What a message of many lines begins with."""
    return str(error).partition("\n")[0]
