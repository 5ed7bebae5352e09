"""Writers beside the one that owns a store: each has a journal of its own, whose lines the owner takes over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from gradstore._files import WriterLock, write_errors
from gradstore._journal import Journal, read_journal

FOLDER: Final = "parts"


def part_journal(part: int) -> str:
    """Path inside the store of a part's journal."""
    return f"{FOLDER}/{part}.jsonl"


def lock_part(store: Path, part: int) -> WriterLock:
    """The lock that a part's writer holds for as long as it lives."""
    with write_errors(store / FOLDER):
        (store / FOLDER).mkdir(exist_ok=True)
    return WriterLock(store, f"{FOLDER}/{part}.lock")


def take_over(store: Path, journal: Journal) -> None:
    """Enter the files of all parts in the store's own journal and remove the parts.

    Raises `StoreLocked` if the writer of a part is still alive: one that outlived the run that began it.
    """
    for path in sorted((store / FOLDER).glob("*.jsonl")):
        lock = lock_part(store, int(path.stem))
        try:
            for file, entry in read_journal(store, None, part_journal(int(path.stem)))[0].items():
                path = store / file
                there = path.exists() and path.stat().st_size == entry.bytes  # a repair in between may have dropped it
                if there and journal.entries.get(file) != entry:
                    journal.add(entry)
        finally:
            lock.release()
    remove(store)


def remove(store: Path) -> None:
    """Forget all parts."""
    if (store / FOLDER).is_dir():
        with write_errors(store / FOLDER):
            shutil.rmtree(store / FOLDER)
