"""`journal.jsonl`: a line per finished file. A file without a line does not exist; a line without newline was torn."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final

from gradstore._errors import StoreCorrupt
from gradstore._files import checksum, read_errors, write_atomic, write_errors

NAME: Final = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished file: its path inside the store, its size, its xxh3-128."""

    file: str
    bytes: int
    checksum: str

    def render(self) -> bytes:
        """The journal's line, newline included."""
        return json.dumps({"file": self.file, "bytes": self.bytes, "xxh3_128": self.checksum}).encode() + b"\n"


def read_journal(store: Path, expected: str | None, name: str = NAME) -> tuple[dict[str, Entry], int]:
    """The finished files and the length of the sound part.

    `expected` is the checksum that a finished store's manifest holds; without it (a store being built) a torn last line
    is left out, since its file will be written again.
    """
    path = store / name
    with read_errors(path):
        raw = path.read_bytes() if path.exists() else b""
    if expected is not None and checksum(raw) != expected:
        raise StoreCorrupt(f"{path}: the journal is damaged or missing. Restore it from a copy, or run repair.")
    sound = raw.rfind(b"\n") + 1
    entries: dict[str, Entry] = {}
    for number, line in enumerate(raw[:sound].splitlines(), 1):
        entry = parse_line(line)
        if entry is None:
            raise StoreCorrupt(f"{path}: line {number} is damaged. Restore it from a copy, or run repair.")
        entries[entry.file] = entry
    return entries, sound


def parse_line(line: bytes) -> Entry | None:
    """The entry of a line, or None if it can't be read."""
    try:
        fields = json.loads(line)
        return Entry(str(fields["file"]), int(fields["bytes"]), str(fields["xxh3_128"]))
    except (ValueError, KeyError, TypeError):
        return None


class Journal:
    """The journal of the one process that writes the store, or under another name of one that writes beside it."""

    def __init__(self, store: Path, expected: str | None, name: str = NAME) -> None:
        self._store = store
        self._name = name
        self._lock = Lock()  # the writer thread and `write_data` both append
        self.entries, sound = read_journal(store, expected, name)
        path = store / name
        with write_errors(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            os.ftruncate(self._descriptor, sound)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._descriptor < 0

    def add(self, entry: Entry) -> None:
        """Record a file that is already durable under its final name."""
        line = entry.render()
        with self._lock, write_errors(self._store / self._name):
            before = os.fstat(self._descriptor).st_size
            try:
                if os.write(self._descriptor, line) != len(line):
                    raise OSError(28, "No space left on device")
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, before)
                raise
            self.entries[entry.file] = entry

    def seal(self) -> str:
        """Sort the lines by file name (the order of writing is nobody's business) and return the file's checksum."""
        lines = [self.entries[name].render() for name in sorted(self.entries)]
        return write_atomic(self._store / NAME, lines)[1]

    def close(self) -> None:
        """Release the file; calling it twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
