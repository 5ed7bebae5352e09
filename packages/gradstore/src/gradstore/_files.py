"""Files that appear whole or not at all, and a lock that dies with its process."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import xxhash

from gradstore._errors import GradStoreError, StoreLocked, StoreUnreadable, StoreUnwritable

TEMP_SUFFIX = ".tmp"

Buffer = bytes | memoryview


def checksum(data: Buffer) -> str:
    """xxh3-128 as 32 hex digits; runs at memory speed, so every file can afford one."""
    return xxhash.xxh3_128_hexdigest(data)


def checksum_of(parts: Iterable[Buffer]) -> str:
    """The checksum of a file made of these parts."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(memoryview(part).cast("B"))
    return digest.hexdigest()


@contextmanager
def write_errors(path: Path) -> Generator[None]:
    """Turn the file system's refusals into `StoreUnwritable` naming the file and the way on."""
    try:
        yield
    except OSError as error:
        raise StoreUnwritable(
            f"{path}: can't be written ({error.strerror or error}). Finished shards are kept: "
            "free space or make the folder writable, then resume."
        ) from error


@contextmanager
def read_errors(path: Path) -> Generator[None]:
    """Turn what the file system refuses to hand over into `StoreUnreadable`; a missing file stays one."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise StoreUnreadable(
            f"{path}: can't be read ({error.strerror or error}). Look at its permissions and at the disk."
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, parts: Iterable[Buffer]) -> tuple[int, str]:
    """Temp file → fsync → rename → fsync folder; returns the bytes written and their checksum."""
    temp = path.with_name(path.name + TEMP_SUFFIX)
    digest, size = xxhash.xxh3_128(), 0
    with write_errors(path):
        try:
            with open(temp, "wb", buffering=0) as file:
                for part in parts:
                    view = memoryview(part).cast("B")
                    digest.update(view)
                    size += len(view)
                    while len(view):  # a raw write may be short (2 GiB limit, signals)
                        view = view[file.write(view) :]
                os.fsync(file.fileno())
            os.replace(temp, path)
        except OSError:
            temp.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return size, digest.hexdigest()


class WriterLock:
    """An exclusive `flock` on `<store>/writer.lock`; the kernel frees it however the process ends."""

    def __init__(self, store: Path, name: str = "writer.lock") -> None:
        try:
            import fcntl
        except ImportError as error:  # pragma: no cover - Windows
            raise GradStoreError("Writing a store needs POSIX file locks; reading works everywhere.") from error
        path = store / name
        with write_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise StoreLocked(
                f"{store}: another process is writing this store. Wait for it to end, or stop it, then resume."
            ) from error

    def release(self) -> None:
        """Let the next writer in; calling it twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
