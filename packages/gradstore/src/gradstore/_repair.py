"""`repair`: keep what is sound of a damaged store, say what is lost, and leave a store that can be resumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gradstore._data import OFFSETS, data_files
from gradstore._errors import StoreCorrupt
from gradstore._files import WriterLock, write_atomic, write_errors
from gradstore._journal import NAME, Entry, parse_line, read_journal
from gradstore._manifest import load_manifest
from gradstore._shard import map_file
from gradstore._writer import own_files, shard_file


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What `repair` found: files kept, files lost with the (dataset) rows they held, unreadable journal lines."""

    path: str
    kept: int
    lost: tuple[tuple[str, int, int], ...]
    torn_lines: int

    @property
    def changed(self) -> bool:
        """Whether anything had to be done."""
        return bool(self.lost or self.torn_lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "changed": self.changed}


def repair(path: str | Path) -> RepairReport:
    """Check every file, drop those that are damaged, and mark the store unfinished if any was.

    Example:
        >>> repair("runs/a").lost
        (('shards/00003.safetensors', 1536, 2048),)

    Then `StoreWriter.resume` has just the lost shards in `pending`. A sound store is left as it is. A damaged manifest
    can't be repaired: it alone says what the rows mean.
    """
    store = Path(path)
    manifest = load_manifest(store)
    lock = WriterLock(store)
    try:
        entries, torn = _readable_entries(store, manifest.journal)
        expected = {shard_file(shard): manifest.span(shard) for shard in range(manifest.shards)}
        for shard in range(manifest.data_shards):
            expected |= dict.fromkeys(data_files(shard), manifest.data_span(shard))
        if manifest.documents is not None:
            expected[OFFSETS] = (0, manifest.rows)
        sound = {name: entry for name, entry in entries.items() if name in expected and _is_sound(store, entry)}
        missing = expected if manifest.complete else {name: expected[name] for name in entries if name in expected}
        lost = tuple((name, *span) for name, span in missing.items() if name not in sound)
        report = RepairReport(str(store), len(sound), lost, torn)
        if report.changed:
            replace(manifest, complete=False, journal=None).save(store)
            write_atomic(store / NAME, [sound[name].render() for name in sorted(sound)])
            for file in own_files(store):
                if file.relative_to(store).as_posix() not in sound:
                    with write_errors(file):
                        file.unlink()
        return report
    finally:
        lock.release()


def _readable_entries(store: Path, expected: str | None) -> tuple[dict[str, Entry], int]:
    """Journal lines that can be read, and how many can't; a sealed journal that checks out is believed as a whole."""
    try:
        entries, sound = read_journal(store, expected)
        size = (store / NAME).stat().st_size if (store / NAME).exists() else 0
        return entries, int(size > sound)
    except StoreCorrupt:
        raw = (store / NAME).read_bytes() if (store / NAME).exists() else b""
    lines = raw.split(b"\n")
    parsed = [parse_line(line) for line in lines if line]
    entries = {entry.file: entry for entry in parsed if entry is not None}
    return entries, max(1, len(parsed) - len(entries))


def _is_sound(store: Path, entry: Entry) -> bool:
    try:
        map_file(store, entry, verify=True)
    except StoreCorrupt:
        return False
    return True
