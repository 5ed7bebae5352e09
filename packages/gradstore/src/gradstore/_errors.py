"""Every way a store can refuse, one class each, all under `GradStoreError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GradStoreError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidInput(GradStoreError, ValueError):
    """An argument that can't be stored or searched: wrong shape, non-finite values, unknown names."""


class StoreExists(GradStoreError):
    """A store is already where a new one was to be made."""


class StoreNotFound(GradStoreError):
    """The folder holds no store."""


class StoreIncomplete(GradStoreError):
    """Shards or data are missing because the store was not (or not yet) finished."""


class StoreCorrupt(GradStoreError):
    """Bytes on disk differ from what the journal or the manifest promises."""


class StoreLocked(GradStoreError):
    """Another process is writing this store."""


class StoreUnwritable(GradStoreError):
    """The file system refused: full disk, quota, read-only folder."""


class StoreUnreadable(GradStoreError):
    """The file system refused to hand over a file that is there: no permission, a failing disk."""


class FormatVersion(GradStoreError):
    """The store was written in a format this reader does not know."""


class PlanMismatch(GradStoreError):
    """Two artefacts were made by different plans."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'a' or 'b'?"`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
