"""One store written by all processes of a run: the first makes it, the others put their shards beside its."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from attribute.processes import current
from gradstore import StoreWriter


@contextmanager
def shared_writer(
    path: Path, begin: Callable[[], AbstractContextManager[StoreWriter]]
) -> Iterator[tuple[StoreWriter, list[tuple[int, int, int]]]]:
    """A writer for each process and what all of them together have left to write; the store is finished at the end.

    Args:
        path: the store.
        begin: makes or resumes it; called in the first process, and over before the others go on.
    """
    here = current()
    with ExitStack() as stack:
        writer = stack.enter_context(begin()) if here.first else None
        here.barrier()
        if writer is None:
            writer = stack.enter_context(StoreWriter.join(path, here.rank))
        found = writer
        # As the first saw it then: the others may find shards that it has written since.
        yield writer, here.from_first(lambda: found.pending)
        if here.first:
            writer.flush()
            here.barrier()  # the others have let go of their parts
    if not here.first:
        here.barrier()
    here.barrier()
