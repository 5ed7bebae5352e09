"""`manifest.json`: what the store holds, sealed by a checksum, refused when unknown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from gradstore._encodings import DTYPES, Layout
from gradstore._errors import (
    FormatVersion,
    InvalidInput,
    PlanMismatch,
    StoreCorrupt,
    StoreNotFound,
    did_you_mean,
)
from gradstore._files import checksum, read_errors, write_atomic

FORMAT: Final = "gradstore"
VERSION: Final = 1
NAME: Final = "manifest.json"
SIDE_DTYPES: Final = {"fp32": "<f4", "fp64": "<f8", "int32": "<i4", "int64": "<i8"}
RESERVED: Final = ("rows", "scale", "norm", *(f"plane{p}" for p in range(8)))  # tensor names that the encodings use

_PREFIX: Final = b'{\n  "checksum": "'  # fixes where the 32 hex digits of the checksum stand
_ZEROS: Final = "0" * 32

Json = Any


@dataclass(frozen=True, slots=True)
class Side:
    """One number (`width` None) or `width` numbers beside every row: loss, token count, norms per module."""

    dtype: str = "fp32"
    width: int | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parsed `manifest.json`."""

    rows: int
    rows_per_shard: int
    columns: Mapping[str, int]
    dtype: str
    side: Mapping[str, Side]
    data: bool
    documents: int | None
    plan: Json
    meta: Json
    complete: bool = False
    journal: str | None = None

    @property
    def width(self) -> int:
        """Floats per row over all modules."""
        return sum(self.columns.values())

    @property
    def shards(self) -> int:
        """How many shards the finished store has."""
        return -(-self.rows // self.rows_per_shard)

    def span(self, shard: int) -> tuple[int, int]:
        """First and one-past-last row of a shard."""
        start = min(shard * self.rows_per_shard, self.rows)
        return start, min(start + self.rows_per_shard, self.rows)

    @property
    def items(self) -> int:
        """Dataset rows: one per document in a per-token store, else one per row."""
        return self.rows if self.documents is None else self.documents

    @property
    def data_shards(self) -> int:
        """How many data shards the finished store has."""
        return -(-self.items // self.rows_per_shard) if self.data else 0

    def data_span(self, shard: int) -> tuple[int, int]:
        """First and one-past-last dataset row of a data shard."""
        start = min(shard * self.rows_per_shard, self.items)
        return start, min(start + self.rows_per_shard, self.items)

    @property
    def fingerprint(self) -> str:
        """xxh3-128 of the manifest, and so, in a finished store, of everything in it."""
        return checksum(self.render())

    def sealed(self, journal: str) -> Manifest:
        """The manifest of the finished store, bound to its journal's checksum."""
        return replace(self, complete=True, journal=journal)

    def render(self) -> bytes:
        """The file's bytes: JSON whose first field is the xxh3-128 of the file with that field zeroed."""
        fields = {
            "checksum": _ZEROS,
            "format": FORMAT,
            "version": VERSION,
            "rows": self.rows,
            "rows_per_shard": self.rows_per_shard,
            "dtype": self.dtype,
            "columns": dict(self.columns),
            "side": {name: {"dtype": side.dtype, "width": side.width} for name, side in self.side.items()},
            "data": self.data,
            "documents": self.documents,
            "plan_hash": plan_hash(self.plan),
            "plan": self.plan,
            "meta": self.meta,
            "complete": self.complete,
            "journal": self.journal,
        }
        zeroed = (json.dumps(fields, indent=2) + "\n").encode()
        start = len(_PREFIX)
        return zeroed[:start] + checksum(zeroed).encode() + zeroed[start + 32 :]

    def save(self, store: Path) -> None:
        """Replace the manifest in one step."""
        write_atomic(store / NAME, [self.render()])


def load_manifest(store: Path) -> Manifest:
    """Read and check `manifest.json`: it exists, its version is known, its bytes are what was written."""
    path = store / NAME
    try:
        with read_errors(path):
            raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise StoreNotFound(
            f"{store}: no store here ({NAME} is missing). Expected a folder made by StoreWriter."
        ) from None
    damaged = StoreCorrupt(f"{path}: the manifest is damaged or was edited. Restore it from a copy of the store.")
    try:
        parsed: Json = json.loads(raw)
    except ValueError:
        raise damaged from None
    if not isinstance(parsed, dict):
        raise damaged
    fields = cast("dict[str, Json]", parsed)
    if fields.get("format") != FORMAT:
        raise damaged
    if fields.get("version") != VERSION:
        raise FormatVersion(
            f"{path}: format version {fields.get('version')!r}; this reader knows version {VERSION}. "
            "Install the gradstore that wrote the store, or rebuild it."
        )
    start = len(_PREFIX)
    zeroed = raw[:start] + _ZEROS.encode() + raw[start + 32 :]
    if raw[:start] != _PREFIX or raw[start : start + 32] != checksum(zeroed).encode():
        raise damaged
    try:
        return Manifest(
            rows=fields["rows"],
            rows_per_shard=fields["rows_per_shard"],
            columns=fields["columns"],
            dtype=fields["dtype"],
            side={name: Side(**spec) for name, spec in fields["side"].items()},
            data=fields["data"],
            documents=fields.get("documents"),
            plan=fields["plan"],
            meta=fields["meta"],
            complete=fields["complete"],
            journal=fields["journal"],
        )
    except (KeyError, TypeError) as error:
        raise StoreCorrupt(f"{path}: a field is missing or unknown ({error}). Rebuild the store.") from None


def new_manifest(
    *,
    rows: int,
    columns: Mapping[str, int],
    plan: Json,
    meta: Json,
    dtype: str,
    rows_per_shard: int | None,
    side: Sequence[str] | Mapping[str, str | Side],
    data: bool,
    documents: int | None,
) -> Manifest:
    """Check a caller's arguments and make them a manifest; everything JSON is copied, so later edits don't leak in."""
    if dtype not in DTYPES:
        raise InvalidInput(f"Unknown dtype {dtype!r}; known: {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
    if rows < 0:
        raise InvalidInput(f"rows is {rows}; a store has 0 or more.")
    for name, width in columns.items():
        if not name or width < 0:
            raise InvalidInput(f"Column {name!r} has width {width}; expected a name and a width of 0 or more.")
    if rows_per_shard is None:
        rows_per_shard = default_rows_per_shard(rows, Layout(dtype, columns).row_bytes)
    if rows_per_shard < 1:
        raise InvalidInput(f"rows_per_shard is {rows_per_shard}; a shard has 1 row or more.")
    return Manifest(
        rows=int(rows),
        rows_per_shard=int(rows_per_shard),
        columns={name: int(width) for name, width in columns.items()},
        dtype=dtype,
        side=_sides(side),
        data=data,
        documents=documents,
        plan=as_json(plan, "plan"),
        meta=as_json({} if meta is None else meta, "meta"),
    )


def _sides(side: Sequence[str] | Mapping[str, str | Side]) -> dict[str, Side]:
    given = side if isinstance(side, Mapping) else {name: "int32" if name == "tokens" else "fp32" for name in side}
    sides = {name: Side(spec) if isinstance(spec, str) else spec for name, spec in given.items()}
    for name, spec in sides.items():
        if name in RESERVED or not name:
            raise InvalidInput(f"A side column can't be called {name!r}; that name belongs to the row encoding.")
        if spec.width is not None and spec.width < 1:
            raise InvalidInput(f"Side column {name!r} has width {spec.width}; expected None or 1 and more.")
        if spec.dtype not in SIDE_DTYPES:
            raise InvalidInput(f"Side column {name!r} has dtype {spec.dtype!r}; known: {', '.join(SIDE_DTYPES)}.")
    return sides


def default_rows_per_shard(rows: int, bytes_per_row: int) -> int:
    """At most 64 MiB and 8,192 rows a shard; about a sixteenth of a small store, so that a kill never costs much."""
    by_bytes = (64 << 20) // max(bytes_per_row, 1)
    by_share = max(256, -(-rows // 16))
    return max(1, min(8192, by_bytes, by_share))


def as_json(value: Json, name: str) -> Json:
    """A deep copy through JSON; refuses what JSON can't hold."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{name} must be plain JSON (finite numbers, strings, lists, dicts): {error}") from error


def plan_hash(plan: Json) -> str:
    """xxh3-128 of the plan as JSON with sorted keys and no spaces."""
    return checksum(json.dumps(plan, sort_keys=True, separators=(",", ":")).encode())


def require_same_plan(stored: Json, wanted: Json, where: str) -> None:
    """Raise `PlanMismatch` naming the first field that differs, with both values."""
    difference = _first_difference(stored, as_json(wanted, "plan"), "plan")
    if difference:
        field, left, right = difference
        raise PlanMismatch(
            f"{where}: {field} is {left} in the store and {right} in this run. "
            "Give the run the store's plan, or build a new store."
        )


def _first_difference(left: Json, right: Json, path: str) -> tuple[str, str, str] | None:
    if isinstance(left, dict) and isinstance(right, dict):
        one, two = cast("dict[str, Json]", left), cast("dict[str, Json]", right)
        for key in [*one, *(key for key in two if key not in one)]:
            if key not in one or key not in two:
                return f"{path}.{key}", *(json.dumps(d[key]) if key in d else "missing" for d in (one, two))  # type: ignore[return-value]
            if found := _first_difference(one[key], two[key], f"{path}.{key}"):
                return found
        return None
    if isinstance(left, list) and isinstance(right, list):
        items = list(zip(cast("list[Json]", left), cast("list[Json]", right)))
        for i, (a, b) in enumerate(items):
            if found := _first_difference(a, b, f"{path}[{i}]"):
                return found
    # 1 == 1.0 == True in Python; a plan tells them apart
    one, two = json.dumps(left, sort_keys=True), json.dumps(right, sort_keys=True)
    return None if one == two else (path, one, two)
